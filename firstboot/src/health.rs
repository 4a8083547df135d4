//! Whether this image is a good one on this machine: what has to run here does, and keeps
//! running. systemd blesses the boot when it is; when it is not, the boot loader's next try is
//! the older image's turn.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::systemd::{Seen, Systemd};

/// How long everything has to run without a restart.
const STEADY: Duration = Duration::from_secs(10);
/// When it is given up. systemd's own limit for the unit is longer.
const PATIENCE: Duration = Duration::from_secs(600);
/// systemd-boot sets it while it counts the tries of the image that runs.
const COUNTING: &str = "/sys/firmware/efi/efivars/LoaderBootCountPath-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// Waits until all units run and none was restarted for a while.
///
/// # Errors
/// They don't in ten minutes, or one has failed for good: which ones.
pub async fn healthy(systemd: &Systemd, units: &[String]) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    let mut before: BTreeMap<String, Seen> = BTreeMap::new();
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
        if Instant::now() > until {
            return judge(&before, &now);
        }
        before = now;
        tokio::time::sleep(STEADY).await;
    }
}

/// Who is not there when the time is up, or was restarted since the last look. One that is still
/// in its first start waits for another node: whatever else takes so long, its own time limit
/// would have ended it.
fn judge(before: &BTreeMap<String, Seen>, now: &BTreeMap<String, Seen>) -> Result<()> {
    let well = |unit: &String, s: &Seen| match s.state.as_str() {
        "active" => before.get(unit).is_some_and(|b| b.restarts == s.restarts),
        "activating" => s.restarts == 0,
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

/// Whether another boot may choose an older image.
#[must_use]
pub fn is_counted() -> bool {
    Path::new(COUNTING).exists()
}

async fn look(systemd: &Systemd, units: &[String]) -> Result<BTreeMap<String, Seen>> {
    let mut seen = BTreeMap::new();
    for unit in units {
        seen.insert(unit.clone(), systemd.unit(unit).await?);
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(state: &str, restarts: u32) -> BTreeMap<String, Seen> {
        BTreeMap::from([("etcd.service".to_owned(), Seen { state: state.to_owned(), restarts })])
    }

    #[test]
    fn waiting_for_another_node_is_no_fault_of_the_image() {
        judge(&seen("activating", 0), &seen("activating", 0)).unwrap();
        judge(&seen("activating", 0), &seen("active", 0)).unwrap();
    }

    #[test]
    fn what_does_not_run_or_not_for_long_is() {
        for (before, now) in [
            (seen("inactive", 0), seen("inactive", 0)),
            (seen("activating", 40), seen("activating", 40)),
            (seen("active", 39), seen("active", 40)),
        ] {
            let e = judge(&before, &now).unwrap_err().to_string();
            assert!(e.starts_with("etcd.service did not come up"), "{e}");
        }
    }
}
