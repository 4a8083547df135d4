//! The rollout's state in etcd. [`fleet::Rollout`] decides on a node's report; this module reads and writes the keys.
//!
//! ```text
//! /bakehouse/rollout/nodes/SLOT      Report      the node's last report, with a lease
//! /bakehouse/rollout/turn            UpdateLock  the node that changes its image now
//! /bakehouse/rollout/held            slot        the update lock's lease
//! /bakehouse/rollout/acting          slot        the node that carries out an operator's action (`lock.rs`)
//! /bakehouse/rollout/denied/VERSION  reason      no node installs this version
//! /bakehouse/rollout/paused          reason      no node gets the update lock
//! /bakehouse/rollout/allowed/VERSION time        the operator allowed it: one node's offer is enough
//! /bakehouse/rollout/skipped/SLOT    time        the rollout does not wait for this node
//! /bakehouse/rollout/drained/SLOT    time        the node is drained (`drains.rs`)
//! /bakehouse/rollout/acted/SLOT      time        the node has had the fleet's lock (`lock.rs`)
//! /bakehouse/rollout/waiting/SLOT    time        the node waits for the fleet's lock (`lock.rs`)
//! ```

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::etcd_keys::{ACTING, HELD, PAUSED, ROLLOUT, SLOTS, TURN};
use fleet::{Report, Rollout, RolloutOrder, SlotRecord, Topology, UpdateDecision, Verdict};
use tracing::{error, info, warn};

use super::lock::{acts, note_wait, waiting};
use crate::client::etcd::{Compare, Etcd, Op};
use crate::error::{Error, Result};

/// Lease of a node's report, seconds: three of the node's report intervals.
const SILENCE: u32 = 90;
/// Lease of the update lock, seconds: a download over a slow line, and three boots that fail.
const LONGEST_TURN: u32 = 3600;
/// Time between two writes of the metrics.
const EXPORT_INTERVAL: Duration = Duration::from_secs(30);
/// How often a report is retried when another hub's transaction wins.
const ATTEMPTS: u32 = 8;

/// Stores a node's report, and returns whether the node may change its image.
///
/// # Errors
/// If etcd does not answer.
pub(crate) async fn report(etcd: &Etcd, topology: &Topology, slot: &str, report: &Report) -> Result<UpdateDecision> {
    let text = serde_json::to_vec(report).map_err(Error::json("the report"))?;
    let lease = etcd.lease(SILENCE).await?;
    etcd.transact(&[], &[Op::PutFor(&format!("{ROLLOUT}nodes/{slot}"), &text, &lease)]).await?;
    for _ in 0..ATTEMPTS {
        let Read { mut rollout, turn, acting, .. } = read(etcd).await?;
        if report.doing.is_well() && rollout.skipped.remove(slot).is_some() {
            info!(slot, "{slot} is healthy again: the rollout no longer skips it");
            etcd.transact(&[], &[Op::Delete(&skipped(slot))]).await?;
        }
        let verdict = rollout.decide(topology, slot, report);
        if let Some((other, _)) = acting.as_ref().filter(|(other, _)| other != slot)
            && takes_without_pause(&rollout, other, topology, (slot, report))
        {
            note_wait(etcd, slot).await?;
        }
        let done = match &verdict {
            Verdict::Wait(why) => return Ok(UpdateDecision { granted: false, why: why.clone() }),
            Verdict::Go => return Ok(UpdateDecision { granted: true, why: String::new() }),
            Verdict::Take(_) if acting.is_some() => return Ok(waits(&acts(&acting.unwrap_or_default().0))),
            Verdict::Take(taken) => {
                let text = serde_json::to_vec(taken).map_err(Error::json("the update lock"))?;
                let denied = denied(&taken.to);
                let lease = etcd.lease(LONGEST_TURN).await?;
                let when = [TURN, ACTING, PAUSED, &denied].map(|key| Compare::Unchanged(key, 0));
                let waiting = waiting(slot);
                let held = Op::PutFor(HELD, slot.as_bytes(), &lease);
                let then = [Op::Put(TURN, &text), held, Op::Delete(&waiting)];
                let done = etcd.transact(&when, &then).await?;
                if !done {
                    // Another hub's transaction won.
                    etcd.revoke(&lease).await?;
                }
                done
            }
            Verdict::Release => {
                etcd.transact(&[Compare::Unchanged(TURN, turn)], &[Op::Delete(TURN), Op::Delete(HELD)]).await?
            }
            Verdict::Deny { image, why } => {
                error!(version = image, "version {image} is denied: {why}");
                let denied = denied(image);
                let mut then = vec![Op::Put(&denied, why.as_bytes())];
                if rollout.turn.as_ref().is_some_and(|t| t.to == *image) {
                    then.extend([Op::Delete(TURN), Op::Delete(HELD)]);
                }
                etcd.transact(&[Compare::Unchanged(TURN, turn)], &then).await?
            }
        };
        if done && matches!(verdict, Verdict::Take(_)) {
            return Ok(UpdateDecision { granted: true, why: String::new() });
        }
    }
    Ok(waits("too many nodes report at the same time"))
}

/// Whether the node would get the update lock if the node `acting` did not have the fleet's lock, which pauses the
/// rollout.
fn takes_without_pause(rollout: &Rollout, acting: &str, topology: &Topology, of: (&str, &Report)) -> bool {
    let mut running = rollout.clone();
    if running.paused.as_ref() == Some(&acts(acting)) {
        running.paused = None;
    }
    matches!(running.decide(topology, of.0, of.1), Verdict::Take(_))
}

pub(super) fn waits(why: &str) -> UpdateDecision {
    UpdateDecision { granted: false, why: why.to_owned() }
}

/// Carries out an operator's order, and returns the state of the rollout.
///
/// # Errors
/// If etcd does not answer.
pub(crate) async fn order(etcd: &Etcd, order: &RolloutOrder) -> Result<Rollout> {
    match order {
        RolloutOrder::Tell => {}
        RolloutOrder::Pause { why } => drop(etcd.transact(&[], &[Op::Put(PAUSED, why.as_bytes())]).await?),
        RolloutOrder::Resume => drop(etcd.transact(&[], &[Op::Delete(PAUSED)]).await?),
        RolloutOrder::Allow { version } => {
            let (allowed, now) = (format!("{ROLLOUT}allowed/{version}"), now().to_string());
            let then = [Op::Delete(&denied(version)), Op::Put(&allowed, now.as_bytes())];
            etcd.transact(&[], &then).await?;
        }
        RolloutOrder::Skip { node } => {
            etcd.transact(&[], &[Op::Put(&skipped(node), now().to_string().as_bytes())]).await?;
        }
    }
    read(etcd).await.map(|read| read.rollout)
}

/// What etcd has about the rollout.
pub(super) struct Read {
    pub(super) rollout: Rollout,
    /// Revision of the update lock; 0: no node holds it.
    turn: u64,
    /// The node that carries out an operator's action, and the revision of its lock.
    pub(super) acting: Option<(String, u64)>,
    /// Revision of etcd at which the keys of the rollout were read.
    pub(super) revision: u64,
}

pub(super) async fn read(etcd: &Etcd) -> Result<Read> {
    let (_, slots) = etcd.list(SLOTS).await?;
    let mut rollout = Rollout::default();
    for pair in &slots {
        let (Some(slot), Ok(record)) =
            (pair.key.strip_prefix(SLOTS), serde_json::from_slice::<SlotRecord>(&pair.value))
        else {
            continue;
        };
        rollout.epochs.insert(slot.to_owned(), record.epoch);
        if !record.vacant {
            rollout.members.insert(slot.to_owned());
            rollout.tls_keys.insert(slot.to_owned(), record.tls_key);
        }
    }
    let (mut turn, mut acting) = (0, None);
    let (revision, pairs) = etcd.list(ROLLOUT).await?;
    for pair in pairs {
        let text = || String::from_utf8_lossy(&pair.value).into_owned();
        match &pair.key[ROLLOUT.len()..] {
            "turn" => {
                rollout.turn = serde_json::from_slice(&pair.value).ok();
                turn = pair.revision;
            }
            "held" => rollout.held = true,
            "acting" => acting = Some((text(), pair.revision)),
            "paused" => rollout.paused = Some(text()),
            key => {
                if let Some(version) = key.strip_prefix("denied/") {
                    rollout.denied.insert(version.to_owned(), text());
                } else if let Some(version) = key.strip_prefix("allowed/") {
                    rollout.allowed.insert(version.to_owned());
                } else if let Some(slot) = key.strip_prefix("skipped/") {
                    rollout.skipped.insert(slot.to_owned(), text().parse().unwrap_or_default());
                } else if let Some(slot) = key.strip_prefix("drained/") {
                    rollout.drained.insert(slot.to_owned(), text().parse().unwrap_or_default());
                } else if let Some((slot, Ok(report))) =
                    key.strip_prefix("nodes/").map(|slot| (slot, serde_json::from_slice(&pair.value)))
                {
                    rollout.nodes.insert(slot.to_owned(), report);
                }
            }
        }
    }
    // A new machine in the slot of a lost one is not drained.
    rollout.drained.retain(|slot, _| rollout.members.contains(slot));
    Ok(Read { rollout, turn, acting, revision })
}

/// Writes the rollout's metrics for node_exporter to the file `metrics` every 30 s, until the process ends.
pub(crate) async fn export(etcd: &Etcd, metrics: &Path) {
    loop {
        match read(etcd).await {
            Ok(read) => {
                if let Err(e) = write_metrics(metrics, &read.rollout) {
                    warn!("rollout metrics are not written: {}", e.chain());
                }
            }
            // Prometheus would take an old value for a current one.
            Err(_) => drop(fs::remove_file(metrics)),
        }
        tokio::time::sleep(EXPORT_INTERVAL).await;
    }
}

fn write_metrics(path: &Path, rollout: &Rollout) -> Result<()> {
    let text = format!(
        "# HELP bakehouse_rollout_blocked Nodes wait for a newer version, none installs it, and the rollout runs.\n\
         # TYPE bakehouse_rollout_blocked gauge\n\
         bakehouse_rollout_blocked {}\n\
         # HELP bakehouse_rollout_denied Versions that no node installs.\n\
         # TYPE bakehouse_rollout_denied gauge\n\
         bakehouse_rollout_denied {}\n\
         # HELP bakehouse_rollout_skipped Nodes that the rollout skips by the operator's order.\n\
         # TYPE bakehouse_rollout_skipped gauge\n\
         bakehouse_rollout_skipped {}\n",
        u8::from(rollout.is_blocked()),
        rollout.denied.len(),
        rollout.skipped.len()
    );
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(Error::io("set the mode of", dir))?;
    let beside = path.with_extension("new");
    fs::write(&beside, text).map_err(Error::io("write", &beside))?;
    // node_exporter runs as another user.
    fs::set_permissions(&beside, Permissions::from_mode(0o644)).map_err(Error::io("set the mode of", &beside))?;
    fs::rename(&beside, path).map_err(Error::io("rename", &beside))
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn skipped(slot: &str) -> String {
    format!("{ROLLOUT}skipped/{slot}")
}

fn denied(version: &str) -> String {
    format!("{ROLLOUT}denied/{version}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_readable_for_node_exporter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics/rollout.prom");
        let rollout = Rollout { denied: [("2".to_owned(), "why".to_owned())].into(), ..Rollout::default() };
        write_metrics(&path, &rollout).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            text.contains("\nbakehouse_rollout_blocked 0\n") && text.contains("\nbakehouse_rollout_denied 1\n"),
            "{text}"
        );
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path().join("metrics")).unwrap().count(), 1);
    }
}
