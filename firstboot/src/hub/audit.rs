//! The log of operators' actions in etcd. A node sends its own entries, and a hub writes them, so that the log outlives
//! the node.
//!
//! ```text
//! /bakehouse/audit/actions/TIME-NODE-ID  AuditEntry    an action; TIME: milliseconds since 1970, 13 digits
//! /bakehouse/audit/rates/NODE            "HOUR COUNT"  the node's new entries in this hour since 1970
//! ```
//!
//! Hubs delete old entries by their time. A lease does not do it: each new leader of etcd grants every lease its whole
//! time again, so in a fleet with rollouts a lease of 90 days has no end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleet::etcd_keys::{AUDIT_ACTIONS, AUDIT_RATES};
use fleet::node_api::{
    AUDIT_DAYS, AuditEntry, AuditLog, AuditQuery, LONGEST_AUDIT_ENTRY, LONGEST_AUDIT_REQUEST, MOST_AUDIT_ENTRIES,
};
use fleet::{Reason, Refusal};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::api::{Hub, refused};
use super::claims::SlotAllocator;
use super::peer::Member;
use super::refusal::refuse;
use crate::client::etcd::{Compare, Etcd, KeyValue, Op};
use crate::error::{Error, Result};
use crate::host::manager::clock_is_synchronized;

/// Time for which an entry stays, in milliseconds.
const KEPT: u64 = AUDIT_DAYS as u64 * 86_400_000;
/// Largest difference between the clock of a node and that of a hub at which the hub takes an entry, in milliseconds.
const AHEAD: u64 = 300_000;
const HOUR: u64 = 3_600_000;
/// Most new entries of one node within an hour. The node sends further ones in the next hour.
const MOST_PER_HOUR: u32 = 100;
/// Most entries of all nodes: 80 MiB of etcd's 2 GiB if each has its largest size.
const MOST: u64 = 20_000;
/// Number of entries that a hub deletes at once if there are too many. etcd permits 128 operations in a transaction.
const FREED: usize = 100;
/// Most keys of one read of a query, and most values.
const PAGE: u64 = 1000;
const CHUNK: usize = 100;
/// Most values that a hub reads for one query. A query for an operator's entries reads those of others, too.
const MOST_READ: usize = 5000;
/// Time after which a query returns the entries that the hub has found.
const DEADLINE: Duration = Duration::from_secs(4);
/// Queries that a hub answers at the same time, and the time for which further ones wait.
static QUERIES: Semaphore = Semaphore::const_new(2);
const TURN: Duration = Duration::from_secs(4);
/// Time after that of each entry, in milliseconds since 1970: keys have 13 digits.
const LATEST: u64 = 10_u64.pow(13) - 1;
/// How often a hub retries when another hub's transaction wins.
const ATTEMPTS: u32 = 8;
/// Time between two deletions of old entries.
const PURGE_INTERVAL: Duration = Duration::from_secs(3600);

/// Returns the time in milliseconds since 1970.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

impl Hub {
    /// Stores a member's own entries in etcd.
    pub(super) async fn take_audit(&self, member: &Member, body: &[u8]) -> Result<(), Refusal> {
        if let Some(epoch) = self.allocator.fenced(&member.slot, &member.tls_key) {
            let text = format!("another machine has owned {} since epoch {epoch}", member.slot);
            return Err(refuse(Reason::Fenced, &text));
        }
        let malformed = |text: &str| Err(refuse(Reason::Malformed, text));
        if body.len() > LONGEST_AUDIT_REQUEST {
            return malformed("the list of entries is too long");
        }
        let Ok(entries) = serde_json::from_slice::<Vec<AuditEntry>>(body) else {
            return malformed("the request is no list of entries");
        };
        store(self.allocator.etcd(), &member.slot, entries).await.map_err(refused)
    }

    /// Returns the entries that an operator asks for.
    pub(super) async fn audit(&self, body: &[u8]) -> Result<AuditLog, Refusal> {
        let query = serde_json::from_slice(body)
            .map_err(|e| refuse(Reason::Malformed, &format!("cannot parse the request: {e}")))?;
        let Ok(Ok(_turn)) = timeout(TURN, QUERIES.acquire()).await else {
            return Err(refuse(Reason::Busy, "other operators read the audit log; retry later"));
        };
        // Its own connection, so that claims do not wait for it.
        read(&self.allocator.etcd().reconnected(), &query, now()).await.map_err(refused)
    }
}

/// Stores entries of the node `slot` in etcd. Idempotent: an entry that has its end does not change any more.
///
/// # Errors
/// [`Error::Refused`] if an entry is not valid, is that of another node, or exceeds a limit; another error if etcd does
/// not answer.
pub async fn store(etcd: &Etcd, slot: &str, entries: Vec<AuditEntry>) -> Result<()> {
    for entry in entries {
        store_at(etcd, slot, entry, now()).await?;
    }
    Ok(())
}

async fn store_at(etcd: &Etcd, slot: &str, entry: AuditEntry, now: u64) -> Result<()> {
    check(slot, &entry)?;
    if entry.at + KEPT < now {
        return Ok(());
    }
    if entry.at > now + AHEAD {
        let text = format!("the clock of {slot} is more than {} min ahead of this hub's", AHEAD / 60_000);
        return Err(refuse(Reason::Busy, &text).into());
    }
    let (key, rate_key) = (key(slot, &entry), format!("{AUDIT_RATES}{slot}"));
    for _ in 0..ATTEMPTS {
        let [found, rate] = <[KeyValue; 2]>::try_from(etcd.get(&[&key, &rate_key]).await?)
            .map_err(|_| Error::network("etcd", "the reply has another number of keys"))?;
        let unchanged = [Compare::Unchanged(&key, found.revision), Compare::Unchanged(&rate_key, rate.revision)];
        if found.revision > 0 {
            let known: AuditEntry = serde_json::from_slice(&found.value).unwrap_or_default();
            if known.ended.is_some() || entry.ended.is_none() {
                return Ok(());
            }
            // A node cannot change what it has reported before.
            let ended = AuditEntry { result: entry.result.clone(), ended: entry.ended, ..known }.fitted();
            if etcd.transact(&unchanged[..1], &[Op::Put(&key, &json(&ended)?)]).await? {
                return Ok(());
            }
            continue;
        }
        let (hour, count) = (now / HOUR, used(&rate.value, now / HOUR));
        if count >= MOST_PER_HOUR {
            let text = format!("{slot} has {MOST_PER_HOUR} entries of this hour already");
            return Err(refuse(Reason::Busy, &text).into());
        }
        make_room(etcd, MOST).await?;
        let (value, count) = (json(&entry)?, format!("{hour} {}", count + 1));
        let put = [Op::Put(&key, &value), Op::Put(&rate_key, count.as_bytes())];
        if etcd.transact(&unchanged, &put).await? {
            return Ok(());
        }
    }
    Err(refuse(Reason::Busy, "another hub stores entries of the same node").into())
}

/// Checks an entry of the node `slot`.
fn check(slot: &str, entry: &AuditEntry) -> Result<(), Refusal> {
    let invalid = |text: &str| Err(refuse(Reason::Malformed, text));
    if entry.node != slot {
        return invalid(&format!("{slot} sends an entry of another node"));
    }
    let is_id = |id: &str| (1..=16).contains(&id.len()) && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !is_id(&entry.id) || entry.at >= 10_u64.pow(13) {
        return invalid("an entry has an invalid identifier or time");
    }
    if entry.size() > LONGEST_AUDIT_ENTRY {
        return invalid(&format!("an entry has more than {LONGEST_AUDIT_ENTRY} bytes"));
    }
    Ok(())
}

fn key(slot: &str, entry: &AuditEntry) -> String {
    format!("{AUDIT_ACTIONS}{:013}-{slot}-{}", entry.at, entry.id)
}

/// Returns the node of a key.
fn node_of(key: &str) -> Option<&str> {
    let (_, rest) = key.strip_prefix(AUDIT_ACTIONS)?.split_once('-')?;
    rest.rsplit_once('-').map(|(node, _)| node)
}

/// Returns the number of new entries in an hour.
fn used(rate: &[u8], hour: u64) -> u32 {
    let text = String::from_utf8_lossy(rate);
    let (of, count) = text.split_once(' ').unwrap_or_default();
    if of.parse() == Ok(hour) { count.parse().unwrap_or(MOST_PER_HOUR) } else { 0 }
}

fn json(entry: &AuditEntry) -> Result<Vec<u8>> {
    serde_json::to_vec(entry).map_err(Error::json("an entry of the audit log"))
}

/// If there are `most` entries, deletes the oldest ones of the node that has the most, so that one node cannot delete
/// the others' by many of its own.
async fn make_room(etcd: &Etcd, most: u64) -> Result<()> {
    if etcd.count(AUDIT_ACTIONS).await? < most {
        return Ok(());
    }
    let keys = etcd.keys(AUDIT_ACTIONS, AUDIT_ACTIONS).await?;
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for node in keys.iter().filter_map(|key| node_of(key)) {
        *counts.entry(node).or_default() += 1;
    }
    let Some((largest, count)) = counts.into_iter().max_by_key(|(_, count)| *count) else { return Ok(()) };
    let oldest: Vec<Op> =
        keys.iter().filter(|key| node_of(key) == Some(largest)).take(FREED).map(|key| Op::Delete(key)).collect();
    warn!(
        "the audit log in etcd has {most} entries, and {count} of {largest}: deleting the oldest {} of {largest}",
        oldest.len()
    );
    etcd.transact(&[], &oldest).await.map(drop)
}

/// Returns the last entries that match a query: the newest first from etcd, until there are enough. etcd sorts a range in
/// descending order by reading all of it, so the hub reads one period after the other.
async fn read(etcd: &Etcd, query: &AuditQuery, now: u64) -> Result<AuditLog> {
    let deadline = Instant::now() + DEADLINE;
    let most = query.count.unwrap_or(MOST_AUDIT_ENTRIES).min(MOST_AUDIT_ENTRIES) as usize;
    let since = query.since.unwrap_or_default().saturating_mul(1000).max(now.saturating_sub(KEPT));
    let mut entries: Vec<AuditEntry> = Vec::new();
    let mut values_read = 0;
    let is_of = |entry: &AuditEntry| query.operator.as_deref().is_none_or(|operator| entry.operator == operator);
    let at = |time: u64| format!("{AUDIT_ACTIONS}{time:013}");
    // The clock of another hub may be ahead.
    let (mut until, mut span) = ((now + 2 * AHEAD).min(LATEST), 24 * HOUR);
    while until > since && entries.len() <= most {
        let from = since.max(until.saturating_sub(span));
        let (first, end) = (at(from), at(until));
        let count = etcd.count_until(&first, end.as_bytes()).await?;
        if count > PAGE && until - from > 1 {
            span = (until - from) / 2;
            continue;
        }
        let mut keys = if count == 0 { Vec::new() } else { etcd.keys_until(&first, end.as_bytes(), PAGE).await? };
        keys.retain(|key| query.node.as_deref().is_none_or(|node| node_of(key) == Some(node)));
        for chunk in keys.rchunks(CHUNK) {
            if values_read >= MOST_READ || Instant::now() > deadline {
                return Ok(log(entries, most, true));
            }
            values_read += chunk.len();
            let names: Vec<&str> = chunk.iter().map(String::as_str).collect();
            // An entry that another hub has deleted meanwhile has no value.
            let found = etcd.get(&names).await?;
            let parsed = found.iter().rev().filter_map(|pair| serde_json::from_slice(&pair.value).ok());
            entries.extend(parsed.filter(is_of));
            if entries.len() > most {
                break;
            }
        }
        if Instant::now() > deadline {
            return Ok(log(entries, most, from > since));
        }
        until = from;
        if count < PAGE / 4 {
            span = span.saturating_mul(8);
        }
    }
    Ok(log(entries, most, false))
}

/// Returns the log of these entries, which begin with the newest. `stopped`: the hub has not read the earlier ones.
fn log(mut entries: Vec<AuditEntry>, most: usize, stopped: bool) -> AuditLog {
    let has_more = stopped || entries.len() > most;
    entries.truncate(most);
    entries.reverse();
    AuditLog { entries, has_more }
}

/// Deletes the entries that are older than 90 days at the time `now`, in milliseconds since 1970. Returns their number.
///
/// # Errors
/// If etcd does not answer.
pub async fn purge(etcd: &Etcd, now: u64) -> Result<u64> {
    etcd.delete_range(AUDIT_ACTIONS, &format!("{AUDIT_ACTIONS}{:013}", now.saturating_sub(KEPT))).await
}

/// Deletes old entries every hour while this hub's clock is synchronized: a clock that is years ahead must not delete
/// the log. Does not return.
///
/// # Errors
/// Never: failed attempts are logged and repeated.
pub async fn keep(allocator: &SlotAllocator) -> Result<()> {
    loop {
        let purged = async {
            let bus = zbus::Connection::system().await?;
            if clock_is_synchronized(&bus).await? { purge(allocator.etcd(), now()).await } else { Ok(0) }
        };
        match purged.await {
            Ok(0) => {}
            Ok(count) => info!("deleted {count} entries of the audit log that are older than {AUDIT_DAYS} days"),
            Err(e) => debug!("cannot delete old entries of the audit log: {}", e.chain()),
        }
        tokio::time::sleep(PURGE_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> AuditEntry {
        AuditEntry {
            at: 1_732_900_003_000,
            id: "1f".to_owned(),
            node: "db-1".to_owned(),
            action: "reboot".to_owned(),
            ..AuditEntry::default()
        }
    }

    #[test]
    fn keys_are_in_the_order_of_time_and_have_the_node() {
        let early = key("my-db-1", &AuditEntry { at: 999_999_999_999, ..entry() });
        let late = key("app-1", &entry());
        assert!(early < late && late == "/bakehouse/audit/actions/1732900003000-app-1-1f", "{early} {late}");
        assert_eq!(
            (node_of(&early), node_of(&late), node_of("/bakehouse/audit/db-1/1")),
            (Some("my-db-1"), Some("app-1"), None)
        );
    }

    #[test]
    fn only_a_nodes_own_valid_entries_are_taken() {
        assert!(check("db-1", &entry()).is_ok());
        for wrong in [
            AuditEntry { node: "db-2".to_owned(), ..entry() },
            AuditEntry { node: String::new(), ..entry() },
            AuditEntry { id: String::new(), ..entry() },
            AuditEntry { id: "../slots".to_owned(), ..entry() },
            AuditEntry { id: "0123456789abcdef0".to_owned(), ..entry() },
            AuditEntry { at: 10_000_000_000_000, ..entry() },
            AuditEntry { action: "x".repeat(LONGEST_AUDIT_ENTRY), ..entry() },
        ] {
            assert_eq!(check("db-1", &wrong).map_err(|refusal| refusal.reason), Err(Reason::Malformed), "{wrong:?}");
        }
    }

    #[test]
    fn the_rate_is_that_of_one_hour() {
        assert_eq!([used(b"", 5), used(b"5 7", 5), used(b"4 7", 5)], [0, 7, 0]);
        assert_eq!(used(b"5 x", 5), MOST_PER_HOUR, "a value that no hub has written");
    }
}
