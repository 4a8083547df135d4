//! Choice of the slot that a claim gets.

use fleet::{Claims, Node, Reason};

use super::claims::SlotAllocator;
use super::records::{PendingGrant, SlotState};
use super::refusal::refuse;
use crate::error::Result;

impl SlotAllocator {
    /// Returns the slot for a token: the token's own slot, or the first free slot of its group. `None` if an earlier
    /// claim of this batch reserved the slot; the next attempt decides the claim.
    pub(super) async fn choose(&self, claims: &Claims, grants: &[PendingGrant]) -> Result<Option<SlotState>> {
        let reserved = |slot: &str| grants.iter().any(|t| t.place.slot == slot);
        if let Some(slot) = &claims.slot {
            if self.topology.node(slot).is_none_or(|n| n.group != claims.group) {
                let text = format!("the fleet has no slot `{slot}` in the group `{}`", claims.group);
                return Err(refuse(Reason::Malformed, &text).into());
            }
            let place = self.place(slot).await?;
            let owned = place.before.as_ref().is_some_and(|r| !r.vacant);
            let place = if owned && !claims.replace { self.abandoned(place).await? } else { Ok(place) };
            let Ok(place) = place else {
                let replace =
                    format!("to replace the owner now, mint a ticket with `bakehouse ticket --replace {slot}`");
                let refusal = match self.topology.node(slot).and_then(|n| n.reclaim_after) {
                    // `Full` makes the machine wait, because the owner may stay silent.
                    Some(after) => refuse(
                        Reason::Full,
                        &format!(
                            "{slot} has an owner, which loses the slot after {after} s without contact; {replace}"
                        ),
                    ),
                    None => refuse(Reason::Taken, &format!("{slot} has an owner; {replace}")),
                };
                return Err(refusal.into());
            };
            return Ok((!reserved(slot)).then_some(place));
        }
        let owners = self.owners();
        // Only a founder's own ticket gives a founder's slot.
        let in_group = |n: &&Node| n.group == claims.group && !self.topology.is_founder(n);
        let is_free = |n: &&Node| owners.get(&n.name).is_none_or(|r| r.vacant);
        let free: Vec<&Node> = self.topology.nodes.iter().filter(in_group).filter(is_free).collect();
        if free.is_empty() {
            for slot in self.silent(&claims.group, &owners).await? {
                if reserved(&slot) {
                    continue;
                }
                if let Ok(place) = self.abandoned(self.place(&slot).await?).await? {
                    return Ok(Some(place));
                }
            }
            let text = format!(
                "every slot of the group `{0}` has an owner; raise groups.{0}.count in fleet.toml and rebuild, or \
                 replace a dead node with `bakehouse ticket --replace`",
                claims.group
            );
            return Err(refuse(Reason::Full, &text).into());
        }
        let Some(node) = free.into_iter().find(|n| !reserved(&n.name)) else { return Ok(None) };
        // A slot that never had an owner needs no read of etcd.
        let new = SlotState { slot: node.name.clone(), before: None, revision: 0, silent: false };
        let place = if owners.contains_key(&node.name) { self.place(&node.name).await? } else { new };
        // Another hub may have granted the slot meanwhile.
        let owned = place.before.as_ref().is_some_and(|r| !r.vacant);
        Ok((!owned).then_some(place))
    }
}
