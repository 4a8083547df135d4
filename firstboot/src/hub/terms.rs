//! What a token is good for: when it gives a slot, and when the same keys get their grant again.

use fleet::{Claims, JoinRequest, Reason, Refusal, SlotRecord};

use super::claims::SlotAllocator;
use super::records::GrantedSlot;
use super::refusal::{gone, no};
use crate::client::etcd::KeyValue;
use crate::error::Result;

/// Seconds after a grant in which the same keys get it again with the same token: the reply may have
/// been lost. A node keeps its grant on its disk, and does not ask later.
const REPEATABLE: u64 = 24 * 3600;

/// What etcd and the clock say of a token.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenState {
    /// How often it was used; `None` where etcd's count is not readable.
    pub(super) used: Option<u32>,
    pub(super) revoked: bool,
    /// Seconds since 1970.
    pub(super) now: u64,
}

impl TokenState {
    pub(super) fn of(count: &KeyValue, revoked: &KeyValue, now: u64) -> Self {
        let read = || std::str::from_utf8(&count.value).ok().and_then(|text| text.parse().ok());
        Self { used: if count.revision == 0 { Some(0) } else { read() }, revoked: revoked.revision != 0, now }
    }

    /// Why a token gives nothing, if it does not; how often it was used, if it does.
    pub(super) fn uses(self, claims: &Claims) -> Result<u32, Refusal> {
        let mint = "mint another with `bakehouse ticket`";
        if self.revoked {
            return Err(no(Reason::Revoked, &format!("the token was revoked; {mint}")));
        }
        if self.now > claims.expires {
            return Err(no(Reason::Expired, &format!("the token has expired; {mint}")));
        }
        // A count that is not readable is no count of none.
        let Some(used) = self.used else {
            return Err(no(Reason::Spent, &format!("etcd's count of the token's uses is not readable; {mint}")));
        };
        if used >= claims.uses {
            return Err(no(Reason::Spent, &format!("the token was used {used} times, as often as it may be; {mint}")));
        }
        Ok(used)
    }

    /// Whether a node that has its slot may be given its grant again.
    fn repeats(self, claims: &Claims, slot: &str, record: &SlotRecord) -> Result<(), Refusal> {
        if record.token.as_ref() != Some(&claims.id) {
            if claims.slot.as_ref().is_some_and(|other| other != slot) {
                return Err(no(
                    Reason::Taken,
                    &format!("these keys are {slot}'s; wipe this machine to make it another"),
                ));
            }
            return self.uses(claims).map(drop);
        }
        if self.revoked {
            return Err(no(Reason::Revoked, "the token was revoked; mint another with `bakehouse ticket`"));
        }
        let age = self.now.saturating_sub(record.at);
        if age > REPEATABLE {
            let text = format!(
                "this machine was given {slot} {} hours ago, and a token gives the same grant again for {} hours; mint another \
                 with `bakehouse ticket {slot}`",
                age / 3600,
                REPEATABLE / 3600
            );
            return Err(no(Reason::Expired, &text));
        }
        Ok(())
    }
}

impl SlotAllocator {
    /// This key has a slot, or had one.
    pub(super) async fn again(
        &self,
        slot: &str,
        claims: &Claims,
        request: &JoinRequest,
        token: TokenState,
    ) -> Result<Result<GrantedSlot, Refusal>> {
        Ok(match self.place(slot).await?.before {
            Some(record) if record.mesh_key == request.mesh_key && record.vacant => {
                Err(no(Reason::Fenced, &gone(slot)))
            }
            Some(record) if record.mesh_key == request.mesh_key && record.tls_key == request.tls_key => token
                .repeats(claims, slot, &record)
                .map(|()| GrantedSlot { slot: slot.to_owned(), epoch: record.epoch }),
            Some(record) if record.mesh_key == request.mesh_key => {
                Err(no(Reason::Forged, "this mesh key is of a node with another TLS key"))
            }
            record => {
                let epoch = record.map_or(0, |r| r.epoch);
                let text =
                    format!("{slot} is another machine's since epoch {epoch}; wipe this one to make it a new node");
                Err(no(Reason::Fenced, &text))
            }
        })
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
        TokenState::of(&pair(count, u64::from(!count.is_empty())), &pair(b"", revoked), now)
    }

    #[test]
    fn a_count_that_is_not_readable_is_no_count_of_none() {
        let reason = |count: &[u8]| token(count, 0, 0).uses(&claims("db")).map_err(|no| no.reason);
        assert_eq!((reason(b""), reason(b"0"), reason(b"1")), (Ok(0), Ok(0), Err(Reason::Spent)));
        for damaged in [&b"x"[..], b"-1", b"99999999999", b"\xff"] {
            assert_eq!(reason(damaged), Err(Reason::Spent));
        }
    }

    #[test]
    fn the_same_keys_get_their_grant_for_a_day_and_not_once_the_token_is_revoked() {
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
        let again = |claims: &Claims, state: TokenState| state.repeats(claims, "db-1", &record).map_err(|no| no.reason);
        // Spent and expired since.
        assert_eq!(again(&claims, token(b"1", 0, 1_000_000 + REPEATABLE)), Ok(()));
        assert_eq!(again(&claims, token(b"1", 0, 1_000_001 + REPEATABLE)), Err(Reason::Expired));
        assert_eq!(again(&claims, token(b"1", 7, 1_000_000)), Err(Reason::Revoked));
        // With another ticket, that one's terms hold.
        claims.id = "token-2".into();
        assert_eq!(again(&claims, token(b"", 0, 1_000_000)), Ok(()));
        assert_eq!(again(&claims, token(b"", 0, 1_000_002)), Err(Reason::Expired));
        assert_eq!(again(&claims, token(b"1", 0, 1_000_000)), Err(Reason::Spent));
        claims.slot = Some("db-2".into());
        assert_eq!(again(&claims, token(b"", 0, 1_000_000)), Err(Reason::Taken));
    }
}
