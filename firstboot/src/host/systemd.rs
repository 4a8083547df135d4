//! Client of systemd over D-Bus. It starts and stops units, and waits for their jobs.

use futures_util::StreamExt as _;
use futures_util::future::join_all;
use zbus::proxy::CacheProperties;
use zbus::zvariant::OwnedObjectPath;

use crate::error::{Error, Result};

#[zbus::proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn subscribe(&self) -> zbus::Result<()>;
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn virtualization(&self) -> zbus::Result<String>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: String, result: String) -> zbus::Result<()>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Unit", default_service = "org.freedesktop.systemd1")]
trait Unit {
    #[zbus(property(emits_changed_signal = "false"))]
    fn active_state(&self) -> zbus::Result<String>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn job(&self) -> zbus::Result<(u32, OwnedObjectPath)>;
    #[zbus(property(emits_changed_signal = "false"), name = "InvocationID")]
    fn invocation_id(&self) -> zbus::Result<Vec<u8>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn requires(&self) -> zbus::Result<Vec<String>>;
    #[zbus(property(emits_changed_signal = "false"))]
    fn wants(&self) -> zbus::Result<Vec<String>>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Service", default_service = "org.freedesktop.systemd1")]
trait Service {
    #[zbus(property(emits_changed_signal = "false"))]
    fn status_text(&self) -> zbus::Result<String>;
}

#[zbus::proxy(
    interface = "org.freedesktop.hostname1",
    default_service = "org.freedesktop.hostname1",
    default_path = "/org/freedesktop/hostname1"
)]
trait Hostname {
    fn set_hostname(&self, name: &str, interactive: bool) -> zbus::Result<()>;
}

#[zbus::proxy(
    interface = "org.freedesktop.network1.Manager",
    default_service = "org.freedesktop.network1",
    default_path = "/org/freedesktop/network1"
)]
trait Network {
    fn reload(&self) -> zbus::Result<()>;
}

/// State of a unit at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceState {
    /// Active state: `active`, `activating` (also for a unit whose job waits for another unit), `failed` and others.
    pub state: String,
    /// Invocation id, which is new for each start; empty before the first start.
    pub invocation: Vec<u8>,
}

/// Client of systemd's manager.
pub struct Systemd {
    bus: zbus::Connection,
    manager: ManagerProxy<'static>,
}

impl Systemd {
    /// Subscribes this connection to the signals of jobs.
    ///
    /// # Errors
    /// If the connection to the bus is closed, or has subscribed already.
    pub async fn new(bus: &zbus::Connection) -> Result<Self> {
        let manager = ManagerProxy::new(bus).await?;
        manager.subscribe().await?;
        Ok(Self { bus: bus.clone(), manager })
    }

    /// Starts a unit, and waits until its job is done.
    ///
    /// # Errors
    /// If the connection to the bus is closed, the unit does not exist, or the result of the job is not `done`.
    pub async fn start(&self, unit: &str) -> Result<()> {
        self.job(unit, async || self.manager.start_unit(unit, "replace").await).await
    }

    /// Starts a unit without waiting for its job.
    ///
    /// # Errors
    /// If the connection to the bus is closed, or the unit does not exist.
    pub async fn begin(&self, unit: &str) -> Result<()> {
        self.manager.start_unit(unit, "replace").await?;
        Ok(())
    }

    /// Stops a unit, and waits until its job is done.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub async fn stop(&self, unit: &str) -> Result<()> {
        self.job(unit, async || self.manager.stop_unit(unit, "replace").await).await
    }

    /// Stops a target, and the services and timers that it requires or wants, except `kept`. systemd does not stop them
    /// with the target. Waits until all jobs are done.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub async fn stop_with_all(&self, target: &str, kept: &[&str]) -> Result<()> {
        let unit = self.proxy(self.manager.load_unit(target).await?).await?;
        let mut units = unit.requires().await?;
        units.extend(unit.wants().await?);
        units.retain(|u| (u.ends_with(".service") || u.ends_with(".timer")) && !kept.contains(&u.as_str()));
        units.push(target.to_owned());
        // A failed stop does not prevent the others.
        join_all(units.iter().map(|name| self.stop(name))).await.into_iter().collect()
    }

    /// Whether a unit is active.
    ///
    /// # Errors
    /// If the connection to the bus is closed, or the unit cannot be loaded.
    pub async fn is_active(&self, unit: &str) -> Result<bool> {
        let path = self.manager.load_unit(unit).await?;
        Ok(self.proxy(path).await?.active_state().await? == "active")
    }

    /// Returns a unit's state and invocation id.
    ///
    /// # Errors
    /// If the connection to the bus is closed, or the unit cannot be loaded.
    pub async fn unit(&self, unit: &str) -> Result<ServiceState> {
        let path = self.manager.load_unit(unit).await?;
        let unit = self.proxy(path).await?;
        // The job is read first: the unit may start between the two replies.
        let has_job = unit.job().await?.0 != 0;
        let mut state = unit.active_state().await?;
        if state == "inactive" && has_job {
            "activating".clone_into(&mut state);
        }
        Ok(ServiceState { state, invocation: unit.invocation_id().await? })
    }

    /// Returns the status that a service has set (`STATUS=` of sd_notify); empty without one.
    ///
    /// # Errors
    /// If the connection to the bus is closed, or the service cannot be loaded.
    pub async fn status(&self, service: &str) -> Result<String> {
        let path = self.manager.load_unit(service).await?;
        let service =
            ServiceProxy::builder(&self.bus).path(path)?.cache_properties(CacheProperties::No).build().await?;
        Ok(service.status_text().await?)
    }

    /// Returns the proxy of a unit. It has no cache, because filling the cache would read all properties of the unit.
    async fn proxy(&self, path: OwnedObjectPath) -> zbus::Result<UnitProxy<'_>> {
        UnitProxy::builder(&self.bus).path(path)?.cache_properties(CacheProperties::No).build().await
    }

    /// Returns systemd's name of the hypervisor; empty for a physical machine.
    ///
    /// # Errors
    /// If the connection to the bus is closed.
    pub async fn virtualization(&self) -> Result<String> {
        Ok(self.manager.virtualization().await?)
    }

    /// Restarts the machine after every service has stopped in its order. The manager's method `Reboot` kills all
    /// services at the same time, so that a primary could not hand over.
    ///
    /// # Errors
    /// If the connection to the bus is closed, or systemd refuses the job.
    pub async fn reboot(&self) -> Result<()> {
        // The job ends with the machine, so there is nothing to wait for.
        self.manager.start_unit("reboot.target", "replace-irreversibly").await?;
        Ok(())
    }

    async fn job(&self, unit: &str, begin: impl AsyncFnOnce() -> zbus::Result<OwnedObjectPath>) -> Result<()> {
        // Subscribe before the job begins, because a fast job could end before.
        let mut removed = self.manager.receive_job_removed().await?;
        let job = begin().await?;
        while let Some(signal) = removed.next().await {
            let args = signal.args()?;
            if args.job == job {
                return match args.result.as_str() {
                    "done" => Ok(()),
                    result => Err(Error::Job { unit: unit.to_owned(), result: result.to_owned() }),
                };
            }
        }
        Err(Error::Bus(zbus::Error::InputOutput(std::sync::Arc::new(std::io::ErrorKind::UnexpectedEof.into()))))
    }
}

/// Sets the transient host name.
///
/// # Errors
/// If systemd-hostnamed does not answer, or refuses the name.
pub async fn set_hostname(bus: &zbus::Connection, name: &str) -> Result<()> {
    Ok(HostnameProxy::new(bus).await?.set_hostname(name, false).await?)
}

/// Makes systemd-networkd reload its files.
///
/// # Errors
/// If systemd-networkd does not answer, or cannot reload.
pub async fn reload_networkd(bus: &zbus::Connection) -> Result<()> {
    Ok(NetworkProxy::new(bus).await?.reload().await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::net::UnixStream;
    use zbus::object_server::SignalEmitter;

    /// A fake of systemd's manager. It emits the end of other jobs first.
    struct FakeManager {
        result: &'static str,
        subscribed: bool,
    }

    #[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
    impl FakeManager {
        fn subscribe(&mut self) -> zbus::fdo::Result<()> {
            if std::mem::replace(&mut self.subscribed, true) {
                return Err(zbus::fdo::Error::Failed("Client is already subscribed.".to_owned()));
            }
            Ok(())
        }

        async fn start_unit(
            &self,
            name: String,
            mode: String,
            #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
        ) -> zbus::fdo::Result<OwnedObjectPath> {
            let expected = if name == "reboot.target" { "replace-irreversibly" } else { "replace" };
            assert_eq!(mode, expected);
            if name == "no.target" {
                return Err(zbus::fdo::Error::Failed("Unit no.target not found.".to_owned()));
            }
            let path = |n: u32| OwnedObjectPath::try_from(format!("/org/freedesktop/systemd1/job/{n}")).unwrap();
            // The job ends before the reply, and another unit's job ends before that.
            Self::job_removed(&emitter, 6, path(6), "other.service".to_owned(), "failed".to_owned()).await?;
            Self::job_removed(&emitter, 7, path(7), name, self.result.to_owned()).await?;
            Ok(path(7))
        }

        #[zbus(signal)]
        async fn job_removed(
            emitter: &SignalEmitter<'_>,
            id: u32,
            job: OwnedObjectPath,
            unit: String,
            result: String,
        ) -> zbus::Result<()>;
    }

    async fn start(units: &[&str], result: &'static str) -> Result<()> {
        let (systemd, _server) = fake(result).await?;
        for unit in units {
            tokio::time::timeout(Duration::from_secs(10), systemd.start(unit))
                .await
                .expect("the end of the job was missed")?;
        }
        Ok(())
    }

    async fn fake(result: &'static str) -> Result<(Systemd, zbus::Connection)> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guid = zbus::Guid::generate();
        let server = zbus::connection::Builder::unix_stream(theirs)
            .server(guid)
            .unwrap()
            .p2p()
            .serve_at("/org/freedesktop/systemd1", FakeManager { result, subscribed: false })
            .unwrap()
            .build();
        let client = zbus::connection::Builder::unix_stream(ours).p2p().build();
        let (server, client) = tokio::try_join!(server, client).unwrap();
        Ok((Systemd::new(&client).await?, server))
    }

    #[tokio::test]
    async fn reboot_starts_the_target_of_systemd() {
        let (systemd, _server) = fake("done").await.unwrap();
        systemd.reboot().await.unwrap();
    }

    #[tokio::test]
    async fn start_sees_jobs_that_end_before_the_reply() {
        start(&["role-base.target", "role-hub.target"], "done").await.unwrap();
    }

    #[tokio::test]
    async fn failed_job_is_an_error_with_its_unit() {
        let e = start(&["role-hub.target"], "dependency").await.unwrap_err();
        assert!(e.chain().contains("role-hub.target did not start (dependency)"), "{e}");
    }

    #[tokio::test]
    async fn missing_unit_is_an_error() {
        assert!(matches!(start(&["no.target"], "done").await.unwrap_err(), Error::Bus(_)));
    }
}
