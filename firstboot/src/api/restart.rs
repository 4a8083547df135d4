//! Units that operators may restart. systemd's `RestartUnit` starts a unit that does not run, so a restart of a unit of
//! systemd itself could switch the machine off, or open a shell on its console.

use std::time::Duration;

use fleet::node_api::unit_name;
use hyper::StatusCode;
use tokio::time::{Instant, sleep, timeout};

use super::NodeApi;
use super::danger::Stops;
use super::reply::Refusal;
use crate::error::{Error, Result};
use crate::host::manager;

/// Time limit of systemd's answer.
const ANSWER: Duration = Duration::from_secs(2);
/// Time limit for a unit's restart.
const RESTART: Duration = Duration::from_secs(300);
/// Time between two reads of a unit's state.
const POLL: Duration = Duration::from_millis(250);
/// The agent. It serves this API.
const AGENT: &str = "firstboot.service";

/// Types of units that operators may restart.
const TYPES: [&str; 3] = [".service", ".socket", ".timer"];
/// Units of systemd that operators may restart. The others switch machines off, start shells, or change disks.
const OF_SYSTEMD: [&str; 9] = [
    "systemd-journal-gatewayd.",
    "systemd-journal-remote.",
    "systemd-journal-upload@",
    "systemd-journald.",
    "systemd-logind.",
    "systemd-networkd.",
    "systemd-resolved.",
    "systemd-timesyncd.",
    "systemd-udevd.",
];
/// The agent's unit that operators may restart.
const OF_AGENT: &str = "firstboot-check.";
/// Beginnings of names of units that operators may not restart: consoles and shells, steps of a boot or of an update,
/// drains, kernel modules, and commands of admins.
const FORBIDDEN: [&str; 16] = [
    "autovt@",
    "bakehouse-exec-",
    "bakehouse-odoo-shell-",
    "bakehouse-rescue@",
    "console-getty.",
    "container-getty@",
    "debug-shell.",
    "drain-",
    "emergency.",
    "firstboot",
    "getty@",
    "initrd-",
    "modprobe@",
    "rescue.",
    "serial-getty@",
    "systemd-",
];

/// A unit that an operator may restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    /// Name without aliases.
    pub(super) name: String,
    /// What stops with the unit.
    pub(super) stops: Stops,
}

/// Finds the unit with this name or alias.
pub(super) async fn find(api: &NodeApi, asked: &str) -> Result<Unit, Refusal> {
    let refused = |status, text: String| Refusal::new(status, text);
    let Some(name) = unit_name(asked) else {
        let text = "the request names no unit, such as `patroni.service`";
        return Err(refused(StatusCode::BAD_REQUEST, text.to_owned()));
    };
    permit(&name)?;
    let found = timeout(ANSWER, async {
        let bus = api.bus().await?;
        let Some(id) = manager::find(&bus, &name).await? else { return Ok::<_, Error>(None) };
        let stopped = manager::stopped_with(&bus, &id).await?;
        Ok(Some((id, stopped)))
    });
    let silent = |why: String| refused(StatusCode::SERVICE_UNAVAILABLE, format!("systemd does not answer{why}"));
    let found = found.await.map_err(|_| silent(String::new()))?.map_err(|e| silent(format!(": {}", e.chain())))?;
    let Some((id, stopped)) = found else {
        return Err(refused(StatusCode::NOT_FOUND, format!("{} has no unit {name}", api.node.name)));
    };
    permit(&id)?;
    Ok(Unit { stops: stopped.iter().map(|name| Stops::of_unit(name)).collect(), name: id })
}

/// Refuses a unit that operators may not restart.
fn permit(unit: &str) -> Result<(), Refusal> {
    let forbidden = |why: &str| Refusal::new(StatusCode::FORBIDDEN, format!("operators may not restart {unit}: {why}"));
    if unit == AGENT {
        return Err(forbidden("it serves this request").help("reboot the node instead"));
    }
    let is_role = unit.starts_with("role-") && unit.ends_with(".target");
    if !is_role && !TYPES.iter().any(|kind| unit.ends_with(kind)) {
        return Err(forbidden("it is no service, socket, timer, or target of a role").help("reboot the node instead"));
    }
    let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| unit.starts_with(prefix));
    if begins(&FORBIDDEN) && !begins(&OF_SYSTEMD) && !begins(&[OF_AGENT]) {
        return Err(forbidden("it is a part of the system").help("reboot the node instead"));
    }
    Ok(())
}

/// Restarts a unit, and waits until systemd has no job of the unit any more.
pub(super) async fn restart(api: &NodeApi, unit: &str) -> Result<()> {
    let mut bus = api.bus().await?;
    manager::restart(&bus, unit).await?;
    let until = Instant::now() + RESTART;
    loop {
        let (state, has_job) = match manager::state(&bus, unit).await {
            Ok(found) => found,
            // A restart of the bus ends its connections.
            Err(Error::Bus(_)) if Instant::now() < until => {
                sleep(POLL).await;
                if let Ok(Ok(new)) = timeout(ANSWER, api.bus()).await {
                    bus = new;
                }
                continue;
            }
            Err(e) => return Err(e),
        };
        match state.as_str() {
            "failed" if !has_job => {
                return Err(Error::Failed(format!(
                    "{unit} failed; see: bakehouse logs {} --unit {unit}",
                    api.node.name
                )));
            }
            "activating" | "deactivating" | "reloading" => {}
            _ if !has_job => return Ok(()),
            _ => {}
        }
        if Instant::now() > until {
            return Err(Error::Failed(format!("{unit} is still {state} after {} s", RESTART.as_secs())));
        }
        sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_services_of_roles_and_a_few_others_restart() {
        for unit in [
            "patroni.service",
            "backup-age.timer",
            "role-db.target",
            "role-base.target",
            "systemd-journal-gatewayd.socket",
            "systemd-journal-upload@monitor-1.service",
            "systemd-networkd.service",
            "firstboot-check.service",
            "dbus-broker.service",
            "getty-like.service",
        ] {
            assert_eq!(permit(unit), Ok(()), "{unit}");
        }
        for unit in [
            "poweroff.target",
            "reboot.target",
            "halt.target",
            "kexec.target",
            "emergency.target",
            "rescue.target",
            "multi-user.target",
            "systemd-poweroff.service",
            "systemd-reboot.service",
            "systemd-soft-reboot.service",
            "systemd-veritysetup@root.service",
            "emergency.service",
            "rescue.service",
            "debug-shell.service",
            "serial-getty@ttyS0.service",
            "getty@tty1.service",
            "initrd-switch-root.service",
            "modprobe@sctp.service",
            "firstboot.service",
            "firstboot-install.service",
            "bakehouse-exec-0123.service",
            "drain-hub.service",
            "bakehouse-odoo-shell-0123.service",
            "-.mount",
            "var.mount",
            "system.slice",
            "dev-vda.device",
        ] {
            assert_eq!(permit(unit).map_err(|refusal| refusal.status), Err(StatusCode::FORBIDDEN), "{unit}");
        }
    }
}
