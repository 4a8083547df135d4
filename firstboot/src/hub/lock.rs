//! The fleet's lock in etcd: one node at a time carries out an operator's action that stops a service.
//!
//! ```text
//! /bakehouse/rollout/acting        slot  the node that has the lock, with a lease
//! /bakehouse/rollout/acted/SLOT    time  when the node took the lock, with a lease that outlives the lock
//! /bakehouse/rollout/waiting/SLOT  time  another node had the lock when this one asked for it, with a lease
//! ```
//!
//! A hostile member must not keep the lock from the other nodes. So while another node waits, a node cannot take the
//! lock again before as much time has passed as it had the lock, and it cannot lengthen its time to more than 900 s.

use fleet::etcd_keys::{ACTED, ACTING, PAUSED, TURN, WAITING};
use fleet::{UpdateDecision, UpdateLock};

use super::rollout::{now, waits};
use crate::client::etcd::{Compare, Etcd, KeyValue, Op};
use crate::error::{Error, Result};

/// Longest lease of an action, seconds.
const LONGEST: u32 = 900;
/// Lease of a node's mark that it waits, seconds: until the end of the longest action, and as long again for the
/// operator's next attempt.
const WAITS: u32 = 2 * LONGEST;
/// How often a request is retried when another hub's transaction wins.
const ATTEMPTS: u32 = 8;

/// Takes the fleet's lock for an operator's action on the node `slot`, for `seconds`, or frees it if `seconds` is 0.
/// While another node has it, or changes its image, the node has to wait. A lease of its own is no update lock: a node
/// that does not free it denies no version. Hubs of earlier versions go by the pause, which has the same lease.
///
/// # Errors
/// If etcd does not answer.
pub(crate) async fn lock(etcd: &Etcd, slot: &str, seconds: u32) -> Result<UpdateDecision> {
    let granted = || UpdateDecision { granted: true, why: String::new() };
    let (acted_key, waiting_key) = (format!("{ACTED}{slot}"), format!("{WAITING}{slot}"));
    for _ in 0..ATTEMPTS {
        let found = etcd.get(&[TURN, ACTING, PAUSED, &acted_key]).await?;
        let [turn, acting, paused, acted] = <[KeyValue; 4]>::try_from(found)
            .map_err(|_| Error::network("etcd", "the reply has another number of keys"))?;
        let is_own = acting.revision > 0 && acting.value == slot.as_bytes();
        let pause = acts(slot);
        let is_own_pause = is_own && paused.value == pause.as_bytes();
        let unchanged = [(TURN, &turn), (ACTING, &acting), (PAUSED, &paused), (&acted_key, &acted)];
        let unchanged = unchanged.map(|(key, found)| Compare::Unchanged(key, found.revision));
        let now = now();
        if seconds == 0 {
            if !is_own {
                return Ok(granted());
            }
            let rest = etcd.lease(held(&acted, now).max(1)).await?;
            let mut freed = vec![Op::Delete(ACTING), Op::PutFor(&acted_key, &acted.value, &rest)];
            if is_own_pause {
                freed.push(Op::Delete(PAUSED));
            }
            if etcd.transact(&unchanged[1..], &freed).await? {
                return Ok(granted());
            }
            etcd.revoke(&rest).await?;
            continue;
        }
        if acting.revision > 0 && !is_own {
            note_wait(etcd, slot).await?;
            return Ok(waits(&acts(&String::from_utf8_lossy(&acting.value))));
        }
        let update = serde_json::from_slice::<UpdateLock>(&turn.value).ok().filter(|update| update.slot != slot);
        if let Some(update) = update.filter(|_| turn.revision > 0) {
            return Ok(waits(&format!("{} changes to version {} now", update.slot, update.to)));
        }
        let seconds = seconds.min(LONGEST);
        let since = if is_own { held(&acted, now) } else { 0 };
        let has_had_it = acted.revision > 0 && (!is_own || since + seconds > LONGEST);
        if has_had_it && let Some(other) = other_waiting(etcd, slot).await? {
            let text = format!("{other} waits for the fleet's lock, which {slot} has had for as long as it may");
            return Ok(waits(&text));
        }
        let lease = etcd.lease(seconds).await?;
        // After the lock's lease, the mark lasts for as long as the node had the lock.
        let mark = etcd.lease(seconds + (since + seconds).min(LONGEST)).await?;
        let began = if since > 0 { acted.value.clone() } else { now.to_string().into_bytes() };
        let mut taken = vec![
            Op::PutFor(ACTING, slot.as_bytes(), &lease),
            Op::PutFor(&acted_key, &began, &mark),
            Op::Delete(&waiting_key),
        ];
        if paused.revision == 0 || is_own_pause {
            taken.push(Op::PutFor(PAUSED, pause.as_bytes(), &lease));
        }
        if etcd.transact(&unchanged, &taken).await? {
            return Ok(granted());
        }
        // Another hub's transaction won.
        for lease in [&lease, &mark] {
            etcd.revoke(lease).await?;
        }
    }
    Ok(waits("too many nodes ask at the same time"))
}

/// Returns the time for which a node has had the lock, in seconds. The clocks of the hubs may differ.
fn held(acted: &KeyValue, now: u64) -> u32 {
    let began = std::str::from_utf8(&acted.value).ok().and_then(|text| text.parse().ok());
    let held = began.map_or(0, |began| now.saturating_sub(began));
    u32::try_from(held).unwrap_or(LONGEST).min(LONGEST)
}

/// Records that a node waits for the lock, unless etcd has a new record of it.
///
/// # Errors
/// If etcd does not answer.
pub(super) async fn note_wait(etcd: &Etcd, slot: &str) -> Result<()> {
    let key = format!("{WAITING}{slot}");
    let found = etcd.get(&[&key]).await?;
    let (revision, now) = (found.first().map_or(0, |pair| pair.revision), now());
    if found.first().is_some_and(|pair| pair.revision > 0 && held(pair, now) < LONGEST) {
        return Ok(());
    }
    let lease = etcd.lease(WAITS).await?;
    let since = now.to_string();
    let put = [Op::PutFor(&key, since.as_bytes(), &lease)];
    if !etcd.transact(&[Compare::Unchanged(&key, revision)], &put).await? {
        etcd.revoke(&lease).await?;
    }
    Ok(())
}

/// Returns the key of the record that a node waits.
pub(super) fn waiting(slot: &str) -> String {
    format!("{WAITING}{slot}")
}

/// Returns another node that waits for the lock.
async fn other_waiting(etcd: &Etcd, slot: &str) -> Result<Option<String>> {
    let keys = etcd.keys(WAITING, WAITING).await?;
    let mut slots = keys.iter().filter_map(|key| key.strip_prefix(WAITING));
    Ok(slots.find(|other| *other != slot).map(str::to_owned))
}

/// Returns the reason why other nodes wait while the node `slot` has the lock.
pub(super) fn acts(slot: &str) -> String {
    format!("{slot} carries out an action of an operator")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_of_the_lock_is_bounded_whatever_the_clocks_are() {
        let at = |value: &[u8]| held(&KeyValue { key: String::new(), value: value.to_vec(), revision: 1 }, 1_000_000);
        assert_eq!([at(b"999990"), at(b"1"), at(b"1000005"), at(b"x"), at(b"")], [10, LONGEST, 0, 0, 0]);
    }
}
