//! Terms of a token: when it grants a slot, and when the same keys get their grant again.

use fleet::{Claims, JoinRequest, Reason, Refusal, SlotRecord};

use super::claims::SlotAllocator;
use super::records::GrantedSlot;
use super::refusal::{left_text, refuse};
use crate::client::etcd::KeyValue;
use crate::error::Result;

/// Time after a grant in which the same keys get it again with the same token, seconds, because the reply may have been
/// lost. A node stores its grant on disk and does not repeat its claim later.
const REPEATABLE: u64 = 24 * 3600;

/// State of a token: its keys in etcd, and the time.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenState {
    /// Use count; `None` if the count in etcd cannot be parsed.
    pub(super) used: Option<u32>,
    pub(super) revoked: bool,
    /// Unix time.
    pub(super) now: u64,
}

impl TokenState {
    pub(super) fn new(count: &KeyValue, revoked: &KeyValue, now: u64) -> Self {
        let read = || std::str::from_utf8(&count.value).ok().and_then(|text| text.parse().ok());
        Self { used: if count.revision == 0 { Some(0) } else { read() }, revoked: revoked.revision != 0, now }
    }

    /// Returns the use count of a token that grants a slot; otherwise the refusal.
    pub(super) fn uses(self, claims: &Claims) -> Result<u32, Refusal> {
        let mint = "mint another with `bakehouse ticket`";
        if self.revoked {
            return Err(refuse(Reason::Revoked, &format!("the token was revoked; {mint}")));
        }
        if self.now > claims.expires {
            return Err(refuse(Reason::Expired, &format!("the token has expired; {mint}")));
        }
        // A damaged count must not allow more uses.
        let Some(used) = self.used else {
            return Err(refuse(Reason::Spent, &format!("cannot parse the token's use count in etcd; {mint}")));
        };
        if used >= claims.uses {
            return Err(refuse(
                Reason::Spent,
                &format!("all uses of the token are spent ({used} of {}); {mint}", claims.uses),
            ));
        }
        Ok(used)
    }

    /// Checks whether a node that owns its slot may get its grant again.
    fn repeats(self, claims: &Claims, slot: &str, record: &SlotRecord) -> Result<(), Refusal> {
        if record.token.as_ref() != Some(&claims.id) {
            if claims.slot.as_ref().is_some_and(|other| other != slot) {
                return Err(refuse(
                    Reason::Taken,
                    &format!("these keys own {slot}; to give this machine another slot, wipe it"),
                ));
            }
            return self.uses(claims).map(drop);
        }
        if self.revoked {
            return Err(refuse(Reason::Revoked, "the token was revoked; mint another with `bakehouse ticket`"));
        }
        let age = self.now.saturating_sub(record.at);
        if age > REPEATABLE {
            let text = format!(
                "this machine got {slot} {} h ago, and a token repeats a grant for {} h only; mint another with \
                 `bakehouse ticket {slot}`",
                age / 3600,
                REPEATABLE / 3600
            );
            return Err(refuse(Reason::Expired, &text));
        }
        Ok(())
    }
}

impl SlotAllocator {
    /// Decides a claim of a mesh key that owns a slot, or has owned one.
    pub(super) async fn repeat_grant(
        &self,
        slot: &str,
        claims: &Claims,
        request: &JoinRequest,
        token: TokenState,
    ) -> Result<GrantedSlot> {
        let granted = match self.place(slot).await?.before {
            Some(record) if record.mesh_key == request.mesh_key && record.vacant => {
                Err(refuse(Reason::Fenced, &left_text(slot)))
            }
            Some(record) if record.mesh_key == request.mesh_key && record.tls_key == request.tls_key => token
                .repeats(claims, slot, &record)
                .map(|()| GrantedSlot { slot: slot.to_owned(), epoch: record.epoch }),
            Some(record) if record.mesh_key == request.mesh_key => {
                Err(refuse(Reason::Forged, "a node with another TLS key owns this mesh key"))
            }
            record => {
                let epoch = record.map_or(0, |r| r.epoch);
                let text = format!(
                    "another machine has owned {slot} since epoch {epoch}; wipe this machine to join as a new node"
                );
                Err(refuse(Reason::Fenced, &text))
            }
        };
        Ok(granted?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::token::tests::claims;
    use super::*;
    use fleet::MeshKey;

    fn pair(value: &[u8], revision: u64) -> KeyValue {
        KeyValue { key: String::new(), value: value.to_vec(), revision }
    }

    fn token(count: &[u8], revoked: u64, now: u64) -> TokenState {
        TokenState::new(&pair(count, u64::from(!count.is_empty())), &pair(b"", revoked), now)
    }

    #[test]
    fn refuses_tokens_with_a_damaged_count() {
        let reason = |count: &[u8]| token(count, 0, 0).uses(&claims("db")).map_err(|refusal| refusal.reason);
        assert_eq!((reason(b""), reason(b"0"), reason(b"1")), (Ok(0), Ok(0), Err(Reason::Spent)));
        for damaged in [&b"x"[..], b"-1", b"99999999999", b"\xff"] {
            assert_eq!(reason(damaged), Err(Reason::Spent));
        }
    }

    #[test]
    fn repeats_a_grant_for_a_day_unless_the_token_is_revoked() {
        let record = SlotRecord {
            epoch: 1,
            mesh_key: MeshKey([1; 32]),
            tls_key: "key".into(),
            token: Some("token-1".into()),
            image: "1".into(),
            by: "hub-1".into(),
            at: 1_000_000,
            leaving: false,
            vacant: false,
            eviction: None,
        };
        let mut claims = Claims { expires: 1_000_001, ..claims("db") };
        let again = |claims: &Claims, state: TokenState| {
            state.repeats(claims, "db-1", &record).map_err(|refusal| refusal.reason)
        };
        // The token was spent and has expired since the grant.
        assert_eq!(again(&claims, token(b"1", 0, 1_000_000 + REPEATABLE)), Ok(()));
        assert_eq!(again(&claims, token(b"1", 0, 1_000_001 + REPEATABLE)), Err(Reason::Expired));
        assert_eq!(again(&claims, token(b"1", 7, 1_000_000)), Err(Reason::Revoked));
        // The terms of another ticket apply to a claim with that ticket.
        claims.id = "token-2".into();
        assert_eq!(again(&claims, token(b"", 0, 1_000_000)), Ok(()));
        assert_eq!(again(&claims, token(b"", 0, 1_000_002)), Err(Reason::Expired));
        assert_eq!(again(&claims, token(b"1", 0, 1_000_000)), Err(Reason::Spent));
        claims.slot = Some("db-2".into());
        assert_eq!(again(&claims, token(b"", 0, 1_000_000)), Err(Reason::Taken));
    }
}
