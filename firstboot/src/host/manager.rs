//! systemd's units over D-Bus, for operators: lists, restarts, and transient services.

pub(crate) mod command;
#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod run;

use std::collections::BTreeSet;

use zbus::proxy::CacheProperties;
use zbus::zvariant::{OwnedObjectPath, Value};

use crate::error::Result;

/// Most units that [`stopped_with`] reads.
const MOST_DEPENDENTS: usize = 64;

/// A row of `ListUnits`: name, description, load state, active state, sub state, followed unit, path, and the job's id,
/// type and path.
type Row = (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// A property of a transient unit.
pub(crate) type Property<'a> = (&'a str, Value<'a>);

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn list_units_filtered(&self, states: &[&str]) -> zbus::Result<Vec<Row>>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    fn restart_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[Property<'_>],
        auxiliary: &[(&str, Vec<Property<'_>>)],
    ) -> zbus::Result<OwnedObjectPath>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Unit", default_service = "org.freedesktop.systemd1")]
trait Unit {
    #[zbus(property)]
    fn id(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn load_state(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn transient(&self) -> zbus::Result<bool>;
    #[zbus(property)]
    fn active_state(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn job(&self) -> zbus::Result<(u32, OwnedObjectPath)>;
    #[zbus(property)]
    fn required_by(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property)]
    fn bound_by(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property)]
    fn consists_of(&self) -> zbus::Result<Vec<String>>;
}

#[zbus::proxy(
    interface = "org.freedesktop.timedate1",
    default_service = "org.freedesktop.timedate1",
    default_path = "/org/freedesktop/timedate1"
)]
trait Timedate {
    #[zbus(property, name = "NTPSynchronized")]
    fn ntp_synchronized(&self) -> zbus::Result<bool>;
}

/// A unit that systemd has loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedUnit {
    pub(crate) name: String,
    pub(crate) description: String,
    pub(crate) active: String,
    pub(crate) sub: String,
}

/// Returns the loaded units with one of these active states; all without states.
///
/// # Errors
/// If the connection to the bus is closed.
pub(crate) async fn units(bus: &zbus::Connection, states: &[&str]) -> Result<Vec<ListedUnit>> {
    let rows = ManagerProxy::new(bus).await?.list_units_filtered(states).await?;
    let listed = rows.into_iter().map(|row| ListedUnit { name: row.0, description: row.1, active: row.3, sub: row.4 });
    Ok(listed.collect())
}

/// Returns whether a time server has synchronized the clock.
///
/// # Errors
/// If systemd-timedated does not answer.
pub(crate) async fn clock_is_synchronized(bus: &zbus::Connection) -> Result<bool> {
    let timedate = TimedateProxy::builder(bus).cache_properties(CacheProperties::No).build().await?;
    Ok(timedate.ntp_synchronized().await?)
}

/// Returns the name of a unit without aliases; `None` if there is no unit file with the name. A transient unit, such as
/// the service of an admin's command, has none.
///
/// # Errors
/// If the connection to the bus is closed, or the name is not valid.
pub(crate) async fn find(bus: &zbus::Connection, unit: &str) -> Result<Option<String>> {
    let path = ManagerProxy::new(bus).await?.load_unit(unit).await?;
    let unit = unit_proxy(bus, path).await?;
    let has_file = unit.load_state().await? == "loaded" && !unit.transient().await?;
    Ok(if has_file { Some(unit.id().await?) } else { None })
}

/// Returns the units that systemd stops if it stops a unit, which is one of them: those that require it, are bound to it,
/// or are part of it.
///
/// # Errors
/// If the connection to the bus is closed.
pub(crate) async fn stopped_with(bus: &zbus::Connection, unit: &str) -> Result<BTreeSet<String>> {
    let manager = ManagerProxy::new(bus).await?;
    let (mut found, mut open) = (BTreeSet::from([unit.to_owned()]), vec![unit.to_owned()]);
    while let Some(name) = open.pop() {
        let unit = unit_proxy(bus, manager.load_unit(&name).await?).await?;
        for list in [unit.required_by().await?, unit.bound_by().await?, unit.consists_of().await?] {
            let new = list.into_iter().filter(|name| found.len() < MOST_DEPENDENTS && found.insert(name.clone()));
            open.extend(new.collect::<Vec<_>>());
        }
    }
    Ok(found)
}

/// Restarts a unit, and returns without waiting for the job.
///
/// # Errors
/// If the connection to the bus is closed, or systemd refuses the job.
pub(crate) async fn restart(bus: &zbus::Connection, unit: &str) -> Result<()> {
    ManagerProxy::new(bus).await?.restart_unit(unit, "replace").await?;
    Ok(())
}

/// Starts a unit, and returns without waiting for the job.
///
/// # Errors
/// If the connection to the bus is closed, or systemd refuses the job.
pub(crate) async fn start(bus: &zbus::Connection, unit: &str) -> Result<()> {
    ManagerProxy::new(bus).await?.start_unit(unit, "replace").await?;
    Ok(())
}

/// Stops a unit, and returns without waiting for the job.
///
/// # Errors
/// If the connection to the bus is closed, or systemd refuses the job.
pub(crate) async fn stop(bus: &zbus::Connection, unit: &str) -> Result<()> {
    ManagerProxy::new(bus).await?.stop_unit(unit, "replace").await?;
    Ok(())
}

/// Starts `reboot.target` or `poweroff.target`. systemd then stops every service in its order. The manager's methods
/// `Reboot` and `PowerOff` kill all services at the same time.
///
/// # Errors
/// If the connection to the bus is closed, or systemd refuses the job.
pub(crate) async fn stop_machine(bus: &zbus::Connection, target: &str) -> Result<()> {
    ManagerProxy::new(bus).await?.start_unit(target, "replace-irreversibly").await?;
    Ok(())
}

/// Returns the active state of a unit, and whether a job of the unit is pending.
///
/// # Errors
/// If the connection to the bus is closed.
pub(crate) async fn state(bus: &zbus::Connection, unit: &str) -> Result<(String, bool)> {
    let path = ManagerProxy::new(bus).await?.load_unit(unit).await?;
    Ok(state_of(&unit_proxy(bus, path).await?).await?)
}

/// Returns the active state of a unit, and whether a job of the unit is pending. The job is read first. Otherwise a unit
/// that starts between the two replies would seem to have ended: it is `inactive` before, and has no job afterwards.
async fn state_of(unit: &UnitProxy<'_>) -> zbus::Result<(String, bool)> {
    let has_job = unit.job().await?.0 != 0;
    Ok((unit.active_state().await?, has_job))
}

/// Returns the proxy of a unit. It has no cache, because filling the cache would read all properties of the unit.
async fn unit_proxy(bus: &zbus::Connection, path: OwnedObjectPath) -> zbus::Result<UnitProxy<'_>> {
    UnitProxy::builder(bus).path(path)?.cache_properties(CacheProperties::No).build().await
}

#[cfg(test)]
mod tests {
    use super::fake::FakeSystemd;
    use super::*;

    #[tokio::test]
    async fn lists_and_restarts_units() {
        let (bus, _server, systemd) = FakeSystemd::connected().await;
        let names = async |states: &[&str]| {
            units(&bus, states).await.unwrap().into_iter().map(|unit| unit.name).collect::<Vec<_>>()
        };
        assert!(names(&[]).await.contains(&"patroni.service".to_owned()));
        assert_eq!(names(&["failed"]).await, ["broken.service"]);
        restart(&bus, "patroni.service").await.unwrap();
        assert!(state(&bus, "patroni.service").await.unwrap().1, "the job is done between the two replies");
        assert_eq!(state(&bus, "patroni.service").await.unwrap(), ("active".to_owned(), false));
        stop_machine(&bus, "reboot.target").await.unwrap();
        assert_eq!(systemd.calls(), ["restart patroni.service replace", "start reboot.target replace-irreversibly"]);
        assert!(clock_is_synchronized(&bus).await.is_err(), "there is no timedated");
    }

    #[tokio::test]
    async fn names_of_units_are_those_without_aliases() {
        let (bus, _server, _systemd) = FakeSystemd::connected().await;
        for (name, id) in [
            ("patroni.service", Some("patroni.service")),
            ("dbus.service", Some("dbus-broker.service")),
            ("no-such.service", None),
            ("bakehouse-exec-1.service", None),
        ] {
            assert_eq!(find(&bus, name).await.unwrap().as_deref(), id);
        }
        let stopped = stopped_with(&bus, "softdog.service").await.unwrap();
        assert_eq!(
            stopped.iter().map(String::as_str).collect::<Vec<_>>(),
            ["patroni.service", "role-db.target", "softdog.service"]
        );
    }
}
