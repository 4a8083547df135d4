//! Backups of PostgreSQL, for operators: starts one, and reads how the last ones ended.

use std::time::Duration;

use fleet::BACKUP;
use fleet::node_api::{BackupRequest, BackupStatus};
use hyper::StatusCode;
use tokio::time::{Instant, sleep, timeout};

use super::listener::Client;
use super::reply::{Answer, Refusal, json};
use super::{NodeApi, audit};
use crate::error::{Error, Result};
use crate::host::manager::run::{Run, last_run, start};

/// Units that make an incremental and a full backup.
const INCREMENTAL: &str = "pgbackrest@incr.service";
const FULL: &str = "pgbackrest@full.service";
/// Time limit for systemd, and for the start of a backup.
const ANSWER: Duration = Duration::from_secs(5);
/// Time between two reads of a unit's state.
const POLL: Duration = Duration::from_millis(100);

/// Starts a backup, and returns it. If a backup of the same kind runs, returns that one.
pub(super) async fn begin(client: &Client, asked: BackupRequest) -> Answer {
    let api = &client.shared().api;
    check(api)?;
    let unit = if asked.full { FULL } else { INCREMENTAL };
    let what = format!("backup {unit}");
    audit::begins(client, &what);
    let started = timeout(ANSWER, async {
        let bus = api.bus().await?;
        let before = last_run(&bus, unit).await?.ok_or_else(|| no_unit(unit))?;
        start(&bus, unit).await?;
        begun(&bus, unit, &before).await
    });
    let started = match started.await {
        Ok(Ok(run)) => Ok(json(StatusCode::ACCEPTED, &status(unit, &run))),
        Ok(Err(e)) => Err(silent(&format!(": {}", e.chain()))),
        Err(_) => Err(silent("")),
    };
    audit::ended(client, &what, started.as_ref().map_or_else(Refusal::text, |_| "started"));
    started
}

/// Returns the last backup of each kind.
pub(super) async fn list(api: &NodeApi) -> Answer {
    check(api)?;
    let read = timeout(ANSWER, async {
        let (bus, mut found) = (api.bus().await?, Vec::new());
        for unit in [INCREMENTAL, FULL] {
            if let Some(run) = last_run(&bus, unit).await? {
                found.push(status(unit, &run));
            }
        }
        Ok::<_, Error>(found)
    });
    match read.await {
        Ok(Ok(found)) => Ok(json(StatusCode::OK, &found)),
        Ok(Err(e)) => Err(silent(&format!(": {}", e.chain()))),
        Err(_) => Err(silent("")),
    }
}

/// Waits until the run has begun. It may have ended by then.
async fn begun(bus: &zbus::Connection, unit: &str, before: &Run) -> Result<Run> {
    let until = Instant::now() + ANSWER;
    loop {
        let run = last_run(bus, unit).await?.ok_or_else(|| no_unit(unit))?;
        // A backup that ran before this request continues under its identifier.
        if (run.id != before.id || before.running) && !run.id.is_empty() {
            return Ok(run);
        }
        if Instant::now() > until {
            return Err(Error::Failed(format!("{unit} did not start within {} s", ANSWER.as_secs())));
        }
        sleep(POLL).await;
    }
}

fn no_unit(unit: &str) -> Error {
    Error::Failed(format!("there is no unit {unit}"))
}

fn silent(why: &str) -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, format!("systemd does not answer{why}"))
}

/// Refuses on a node that makes no backups.
fn check(api: &NodeApi) -> Result<(), Refusal> {
    let (node, backup) = (&api.node, &api.topology.backup);
    if node.has_role(BACKUP) || backup.s3.is_some() && node.has_role("db") {
        return Ok(());
    }
    let refused = Refusal::new(StatusCode::NOT_FOUND, format!("{} makes no backups", node.name));
    Err(match &backup.node {
        Some(keeper) => refused.help(format!("bakehouse backup now {keeper}")),
        None if backup.s3.is_some() => refused.help("name a database node"),
        None => refused.help("the fleet has no backups: every node has the role `db`"),
    })
}

fn status(unit: &str, run: &Run) -> BackupStatus {
    let seconds = |microseconds: u64| Some(microseconds / 1_000_000).filter(|seconds| *seconds > 0);
    BackupStatus {
        unit: unit.to_owned(),
        run: run.id.clone(),
        running: run.running,
        result: if run.id.is_empty() { String::new() } else { run.result.clone() },
        exit_code: run.status,
        started: seconds(run.started),
        ended: seconds(run.ended).filter(|_| !run.running),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_backup_has_no_end() {
        let run = Run {
            id: "ab".to_owned(),
            running: true,
            result: "success".to_owned(),
            status: 0,
            started: 9_500_000,
            ended: 4_000_000,
        };
        let running = status(INCREMENTAL, &run);
        assert_eq!((running.started, running.ended, running.running), (Some(9), None, true));
        let ended = status(INCREMENTAL, &Run { running: false, ended: 12_000_000, ..run });
        assert_eq!((ended.ended, ended.result.as_str()), (Some(12), "success"));
        let never = status(FULL, &Run { result: "success".to_owned(), ..Run::default() });
        assert_eq!((never.started, never.ended, never.result.as_str()), (None, None, ""));
    }
}
