//! The health check of a boot: all required units run, and keep running. systemd then blesses the boot. Otherwise the
//! boot loader counts a failed try, and starts the older image when the tries are used up.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::host::systemd::{ServiceState, Systemd};

/// How long all units must run without a restart.
const STEADY: Duration = Duration::from_secs(10);
/// Time limit of the health check.
pub const TIMEOUT: Duration = Duration::from_secs(600);
/// Time limit while a unit works on what the other nodes wait for: the update of Odoo's database, whose own limit is
/// shorter. systemd's time-out of the health check's unit is longer.
const WORK: Duration = Duration::from_secs(3300);
/// How the status of a unit begins that works and does not wait for another node.
const WORKING: &str = "working: ";

/// Waits until all units run and none was restarted for 10 s.
///
/// # Errors
/// If a unit has failed, or the units do not run within 10 min, or 55 min while one of them works. The error names the units.
pub async fn healthy(systemd: &Systemd, units: &[String]) -> Result<()> {
    let since = Instant::now();
    let mut before: BTreeMap<String, ServiceState> = BTreeMap::new();
    let mut first: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    loop {
        let now = unit_states(systemd, units).await?;
        if now == before && now.values().all(|unit| unit.state == "active") {
            return Ok(());
        }
        // A unit that systemd is going to restart is `activating`, not `failed`.
        let failed = |unit: &&String| now[*unit].state == "failed" && before.get(*unit) == now.get(*unit);
        if let Some(unit) = units.iter().find(failed) {
            return Err(Error::Failed(format!("{unit} has failed; see: bakehouse logs NODE -u {unit}")));
        }
        for (unit, state) in now.iter().filter(|(_, state)| !state.invocation.is_empty()) {
            first.entry(unit.clone()).or_insert_with(|| state.invocation.clone());
        }
        let gone = since.elapsed();
        if gone > WORK || gone > TIMEOUT && !is_working(systemd, &now).await? {
            return check_at_deadline(&first, &before, &now);
        }
        before = now;
        tokio::time::sleep(STEADY).await;
    }
}

/// Whether a unit that is starting says that it works. Its outcome decides whether the image is good.
async fn is_working(systemd: &Systemd, units: &BTreeMap<String, ServiceState>) -> Result<bool> {
    for (unit, _) in units.iter().filter(|(name, unit)| unit.state == "activating" && name.ends_with(".service")) {
        if systemd.status(unit).await?.starts_with(WORKING) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Fails if a unit does not run at the deadline, or was restarted since the previous check. A unit that is still in its
/// `first` start waits for another node, because its start time-out would have ended any other start. A unit that ended
/// and was restarted, by systemd or by the agent, is a failure.
fn check_at_deadline(
    first: &BTreeMap<String, Vec<u8>>,
    before: &BTreeMap<String, ServiceState>,
    now: &BTreeMap<String, ServiceState>,
) -> Result<()> {
    let is_healthy = |unit: &String, s: &ServiceState| match s.state.as_str() {
        "active" => before.get(unit).is_some_and(|b| b.invocation == s.invocation),
        "activating" => first.get(unit).is_none_or(|i| *i == s.invocation),
        _ => false,
    };
    let unhealthy: Vec<&str> =
        now.iter().filter(|(unit, s)| !is_healthy(unit, s)).map(|(unit, _)| unit.as_str()).collect();
    match unhealthy.first() {
        None => Ok(()),
        Some(first) => Err(Error::Failed(format!(
            "{} did not come up, or restarted; see: bakehouse logs NODE -u {first}",
            unhealthy.join(", ")
        ))),
    }
}

async fn unit_states(systemd: &Systemd, units: &[String]) -> Result<BTreeMap<String, ServiceState>> {
    let mut states = BTreeMap::new();
    for unit in units {
        states.insert(unit.clone(), systemd.unit(unit).await?);
    }
    Ok(states)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(state: &str, start: u8) -> BTreeMap<String, ServiceState> {
        let invocation = if start == 0 { Vec::new() } else { vec![start; 16] };
        BTreeMap::from([("etcd.service".to_owned(), ServiceState { state: state.to_owned(), invocation })])
    }

    fn first() -> BTreeMap<String, Vec<u8>> {
        BTreeMap::from([("etcd.service".to_owned(), vec![1; 16])])
    }

    #[test]
    fn passes_units_that_wait_for_another_node() {
        check_at_deadline(&BTreeMap::new(), &state("activating", 0), &state("activating", 0)).unwrap();
        check_at_deadline(&first(), &state("activating", 1), &state("activating", 1)).unwrap();
        check_at_deadline(&first(), &state("activating", 1), &state("active", 1)).unwrap();
    }

    #[test]
    fn fails_units_that_do_not_run_or_restarted() {
        for (before, now) in [
            (state("inactive", 0), state("inactive", 0)),
            // The unit failed, and the agent started it again.
            (state("activating", 1), state("activating", 2)),
            (state("activating", 2), state("activating", 2)),
            (state("active", 2), state("active", 3)),
        ] {
            let e = check_at_deadline(&first(), &before, &now).unwrap_err().chain();
            assert!(e.starts_with("etcd.service did not come up"), "{e}");
        }
    }
}
