//! Whether this image is a good one on this machine: what has to run here does, and keeps
//! running. systemd blesses the boot when it is; when it is not, the boot loader's next try is
//! the older image's turn.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::host::systemd::{ServiceState, Systemd};

/// How long everything has to run without a restart.
const STEADY: Duration = Duration::from_secs(10);
/// When it is given up. systemd's own limit for the unit is longer.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// Waits until all units run and none was restarted for a while.
///
/// # Errors
/// They don't in ten minutes, or one has failed for good: which ones.
pub async fn healthy(systemd: &Systemd, units: &[String]) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let mut before: BTreeMap<String, ServiceState> = BTreeMap::new();
    let mut first: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    loop {
        let now = look(systemd, units).await?;
        if now == before && now.values().all(|seen| seen.state == "active") {
            return Ok(());
        }
        // One that systemd would start again is `activating` meanwhile.
        let failed = |unit: &&String| now[*unit].state == "failed" && before.get(*unit) == now.get(*unit);
        if let Some(unit) = units.iter().find(failed) {
            return Err(Error::Failed(format!("{unit} has failed; see: journalctl -u {unit}")));
        }
        for (unit, seen) in now.iter().filter(|(_, seen)| !seen.invocation.is_empty()) {
            first.entry(unit.clone()).or_insert_with(|| seen.invocation.clone());
        }
        if Instant::now() > until {
            return judge(&first, &before, &now);
        }
        before = now;
        tokio::time::sleep(STEADY).await;
    }
}

/// Who is not there when the time is up, or was started anew since the last look. One that is
/// still in its `first` start waits for another node: whatever else takes so long, its own time
/// limit would have ended it. One that ended and was started again, by systemd or by the agent,
/// does not wait.
fn judge(
    first: &BTreeMap<String, Vec<u8>>,
    before: &BTreeMap<String, ServiceState>,
    now: &BTreeMap<String, ServiceState>,
) -> Result<()> {
    let well = |unit: &String, s: &ServiceState| match s.state.as_str() {
        "active" => before.get(unit).is_some_and(|b| b.invocation == s.invocation),
        "activating" => first.get(unit).is_none_or(|i| *i == s.invocation),
        _ => false,
    };
    let unwell: Vec<&str> = now.iter().filter(|(unit, s)| !well(unit, s)).map(|(unit, _)| unit.as_str()).collect();
    match unwell.first() {
        None => Ok(()),
        Some(first) => Err(Error::Failed(format!(
            "{} did not come up, or not for long; see: journalctl -u {first}",
            unwell.join(", ")
        ))),
    }
}

async fn look(systemd: &Systemd, units: &[String]) -> Result<BTreeMap<String, ServiceState>> {
    let mut seen = BTreeMap::new();
    for unit in units {
        seen.insert(unit.clone(), systemd.unit(unit).await?);
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(state: &str, start: u8) -> BTreeMap<String, ServiceState> {
        let invocation = if start == 0 { Vec::new() } else { vec![start; 16] };
        BTreeMap::from([("etcd.service".to_owned(), ServiceState { state: state.to_owned(), invocation })])
    }

    fn first() -> BTreeMap<String, Vec<u8>> {
        BTreeMap::from([("etcd.service".to_owned(), vec![1; 16])])
    }

    #[test]
    fn waiting_for_another_node_is_no_fault_of_the_image() {
        judge(&BTreeMap::new(), &seen("activating", 0), &seen("activating", 0)).unwrap();
        judge(&first(), &seen("activating", 1), &seen("activating", 1)).unwrap();
        judge(&first(), &seen("activating", 1), &seen("active", 1)).unwrap();
    }

    #[test]
    fn what_does_not_run_or_not_for_long_is() {
        for (before, now) in [
            (seen("inactive", 0), seen("inactive", 0)),
            // It failed, and the agent had it start again.
            (seen("activating", 1), seen("activating", 2)),
            (seen("activating", 2), seen("activating", 2)),
            (seen("active", 2), seen("active", 3)),
        ] {
            let e = judge(&first(), &before, &now).unwrap_err().to_string();
            assert!(e.starts_with("etcd.service did not come up"), "{e}");
        }
    }
}
