//! The slot that a claim gets.

use fleet::{Claims, Node, Reason, Refusal};

use super::claims::SlotAllocator;
use super::records::{PendingGrant, SlotState};
use super::refusal::no;
use crate::error::Result;

impl SlotAllocator {
    /// Returns the slot for a token: its own, or the first that is free. `None` if an earlier claim of this batch
    /// reserved the slot: the claim is retried with the next batch.
    pub(super) async fn choose(
        &self,
        claims: &Claims,
        takings: &[PendingGrant],
    ) -> Result<Result<Option<SlotState>, Refusal>> {
        let promised = |slot: &str| takings.iter().any(|t| t.place.slot == slot);
        if let Some(slot) = &claims.slot {
            if self.topology.node(slot).is_none_or(|n| n.group != claims.group) {
                let text = format!("the fleet has no slot `{slot}` in the group `{}`", claims.group);
                return Ok(Err(no(Reason::Malformed, &text)));
            }
            let place = self.place(slot).await?;
            let owned = place.before.as_ref().is_some_and(|r| !r.vacant);
            let place = if owned && !claims.replace { self.abandoned(place).await? } else { Ok(place) };
            let Ok(place) = place else {
                let replace = format!(
                    "to put this machine in its place now, mint a ticket with `bakehouse ticket --replace {slot}`"
                );
                return Ok(Err(match self.topology.node(slot).and_then(|n| n.reclaim_after) {
                    // That passes: this machine may wait for it.
                    Some(after) => no(
                        Reason::Full,
                        &format!("{slot} has an owner, who loses it after {after} s of silence; {replace}"),
                    ),
                    None => no(Reason::Taken, &format!("{slot} has an owner; {replace}")),
                }));
            };
            return Ok(Ok((!promised(slot)).then_some(place)));
        }
        let owners = self.owners();
        // Founders' slots are given by their tickets alone.
        let mine = |n: &&Node| n.group == claims.group && !self.topology.is_founder(n);
        let nobodys = |n: &&Node| owners.get(&n.name).is_none_or(|r| r.vacant);
        let free: Vec<&Node> = self.topology.nodes.iter().filter(mine).filter(nobodys).collect();
        if free.is_empty() {
            for slot in self.silent(&claims.group, &owners).await? {
                if promised(&slot) {
                    continue;
                }
                if let Ok(place) = self.abandoned(self.place(&slot).await?).await? {
                    return Ok(Ok(Some(place)));
                }
            }
            let text = format!(
                "every slot of the group `{0}` has an owner; raise groups.{0}.count in fleet.toml and rebuild, or `bakehouse ticket --replace` a dead node",
                claims.group
            );
            return Ok(Err(no(Reason::Full, &text)));
        }
        let Some(node) = free.into_iter().find(|n| !promised(&n.name)) else { return Ok(Ok(None)) };
        // What was never taken need not be looked up.
        let new = SlotState { slot: node.name.clone(), before: None, revision: 0, silent: false };
        let place = if owners.contains_key(&node.name) { self.place(&node.name).await? } else { new };
        // Somebody was faster.
        let owned = place.before.as_ref().is_some_and(|r| !r.vacant);
        Ok(Ok((!owned).then_some(place)))
    }
}
