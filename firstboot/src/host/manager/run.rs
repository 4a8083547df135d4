//! Runs of a oneshot service, such as a backup.

use zbus::proxy::CacheProperties;

use super::ManagerProxy;
use crate::error::Result;

#[zbus::proxy(interface = "org.freedesktop.systemd1.Unit", default_service = "org.freedesktop.systemd1")]
trait OneshotUnit {
    #[zbus(property)]
    fn load_state(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn active_state(&self) -> zbus::Result<String>;
    #[zbus(property, name = "InvocationID")]
    fn invocation_id(&self) -> zbus::Result<Vec<u8>>;
    #[zbus(property)]
    fn inactive_exit_timestamp(&self) -> zbus::Result<u64>;
    #[zbus(property)]
    fn inactive_enter_timestamp(&self) -> zbus::Result<u64>;
}

#[zbus::proxy(interface = "org.freedesktop.systemd1.Service", default_service = "org.freedesktop.systemd1")]
trait OneshotService {
    #[zbus(property)]
    fn result(&self) -> zbus::Result<String>;
    #[zbus(property)]
    fn exec_main_status(&self) -> zbus::Result<i32>;
}

/// The last run of a service since the machine booted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Run {
    /// systemd's identifier of the run, in hexadecimal digits; empty if there was none.
    pub(crate) id: String,
    pub(crate) running: bool,
    /// systemd's result: `success`, `exit-code` and others.
    pub(crate) result: String,
    /// Exit code of the main process.
    pub(crate) status: i32,
    /// Start, in microseconds since 1970; 0 if there was none.
    pub(crate) started: u64,
    /// End, in microseconds since 1970; 0 if there was none. While the service runs, the end of the run before.
    pub(crate) ended: u64,
}

/// Starts a service, and returns without waiting for its end. A run that has begun continues.
///
/// # Errors
/// If the connection to the bus is closed, or systemd refuses the job.
pub(crate) async fn start(bus: &zbus::Connection, unit: &str) -> Result<()> {
    ManagerProxy::new(bus).await?.start_unit(unit, "fail").await?;
    Ok(())
}

/// Returns the last run of a service; `None` if systemd finds no such unit.
///
/// # Errors
/// If the connection to the bus is closed.
pub(crate) async fn last_run(bus: &zbus::Connection, unit: &str) -> Result<Option<Run>> {
    let path = ManagerProxy::new(bus).await?.load_unit(unit).await?;
    // Filling a cache would read all properties.
    let of_unit = OneshotUnitProxy::builder(bus).path(path.clone())?.cache_properties(CacheProperties::No);
    let of_unit = of_unit.build().await?;
    if of_unit.load_state().await? != "loaded" {
        return Ok(None);
    }
    let service = OneshotServiceProxy::builder(bus).path(path)?.cache_properties(CacheProperties::No).build().await?;
    // A run may begin or end between two replies. The identifier is read last, so that it is not of an older run than the
    // result.
    let state = of_unit.active_state().await?;
    let (started, ended) = (of_unit.inactive_exit_timestamp().await?, of_unit.inactive_enter_timestamp().await?);
    let (result, status) = (service.result().await?, service.exec_main_status().await?);
    let id = of_unit.invocation_id().await?;
    let id = if id.iter().all(|byte| *byte == 0) {
        String::new()
    } else {
        id.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    Ok(Some(Run { id, running: !matches!(state.as_str(), "inactive" | "failed"), result, status, started, ended }))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unused_self, reason = "zbus calls methods of an interface with the object")]

    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::net::UnixStream;
    use zbus::connection::Builder;
    use zbus::zvariant::OwnedObjectPath;

    const ROOT: &str = "/org/freedesktop/systemd1";
    const BACKUP: &str = "/org/freedesktop/systemd1/unit/backup";
    const MISSING: &str = "/org/freedesktop/systemd1/unit/missing";

    fn object(path: &str) -> OwnedObjectPath {
        OwnedObjectPath::try_from(path).unwrap()
    }

    /// Number of starts.
    struct FakeManager(Arc<Mutex<u8>>);

    #[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
    impl FakeManager {
        #[expect(clippy::needless_pass_by_value, reason = "zbus passes owned values")]
        fn load_unit(&self, name: String) -> OwnedObjectPath {
            object(if name == "pgbackrest@incr.service" { BACKUP } else { MISSING })
        }

        #[expect(clippy::needless_pass_by_value, reason = "zbus passes owned values")]
        fn start_unit(&self, name: String, mode: String) -> OwnedObjectPath {
            assert_eq!((name.as_str(), mode.as_str()), ("pgbackrest@incr.service", "fail"));
            *self.0.lock().unwrap() += 1;
            object("/org/freedesktop/systemd1/job/1")
        }
    }

    struct FakeUnit(Option<Arc<Mutex<u8>>>);

    #[zbus::interface(name = "org.freedesktop.systemd1.Unit")]
    impl FakeUnit {
        #[zbus(property)]
        fn load_state(&self) -> String {
            if self.0.is_some() { "loaded" } else { "not-found" }.to_owned()
        }

        #[zbus(property)]
        fn active_state(&self) -> String {
            if self.starts() == 0 { "failed" } else { "activating" }.to_owned()
        }

        #[zbus(property, name = "InvocationID")]
        fn invocation_id(&self) -> Vec<u8> {
            vec![self.starts(); 16]
        }

        #[zbus(property)]
        fn inactive_exit_timestamp(&self) -> u64 {
            7_000_000
        }

        #[zbus(property)]
        fn inactive_enter_timestamp(&self) -> u64 {
            5_000_000
        }
    }

    impl FakeUnit {
        fn starts(&self) -> u8 {
            self.0.as_ref().map_or(0, |starts| *starts.lock().unwrap())
        }
    }

    struct FakeService;

    #[zbus::interface(name = "org.freedesktop.systemd1.Service")]
    impl FakeService {
        #[zbus(property)]
        fn result(&self) -> String {
            "exit-code".to_owned()
        }

        #[zbus(property)]
        fn exec_main_status(&self) -> i32 {
            55
        }
    }

    #[tokio::test]
    async fn a_run_has_its_identifier_and_its_result() {
        let starts = Arc::new(Mutex::new(0));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = async {
            let server = Builder::unix_stream(theirs).server(zbus::Guid::generate())?.p2p();
            let server = server.serve_at(ROOT, FakeManager(starts.clone()))?;
            let server = server.serve_at(BACKUP, FakeUnit(Some(starts.clone())))?.serve_at(BACKUP, FakeService)?;
            server.serve_at(MISSING, FakeUnit(None))?.build().await
        };
        let (_server, bus) = tokio::try_join!(server, Builder::unix_stream(ours).p2p().build()).unwrap();
        let run = last_run(&bus, "pgbackrest@incr.service").await.unwrap().unwrap();
        let expected = Run {
            id: String::new(),
            running: false,
            result: "exit-code".to_owned(),
            status: 55,
            started: 7_000_000,
            ended: 5_000_000,
        };
        assert_eq!(run, expected);
        start(&bus, "pgbackrest@incr.service").await.unwrap();
        let run = last_run(&bus, "pgbackrest@incr.service").await.unwrap().unwrap();
        assert_eq!(run, Run { id: "01".repeat(16), running: true, ..expected });
        assert_eq!(last_run(&bus, "pgbackrest@full.service").await.unwrap(), None);
    }
}
