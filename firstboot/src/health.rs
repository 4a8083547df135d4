//! Whether this image is a good one on this machine: what has to run here does, and keeps
//! running. systemd blesses the boot when it is; when it is not, the boot loader's next try is
//! the older image's turn.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

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
    let waited = tokio::time::timeout(PATIENCE, async {
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
            before = now;
            tokio::time::sleep(STEADY).await;
        }
    });
    if let Ok(done) = waited.await {
        return done;
    }
    let now = look(systemd, units).await?;
    let down: Vec<&str> = now.iter().filter(|(_, s)| s.state != "active").map(|(unit, _)| unit.as_str()).collect();
    Err(Error::Failed(if down.is_empty() {
        "units are restarted again and again".to_owned()
    } else {
        format!("{} did not come up; see: journalctl -u {}", down.join(", "), down[0])
    }))
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
