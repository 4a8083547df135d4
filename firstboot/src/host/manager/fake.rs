//! A fake of systemd's manager on D-Bus, for tests. Its type of each argument is systemd's.

#![expect(
    clippy::needless_pass_by_value,
    clippy::unnecessary_literal_bound,
    clippy::unused_self,
    reason = "zbus calls methods of an interface with the object and owned arguments"
)]

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use zbus::connection::Builder;
use zbus::zvariant::{OwnedObjectPath, OwnedValue, Value};

use super::Row;

/// A unit: its name, an alias, its active state, and the units that require it.
type KnownUnit = (&'static str, &'static str, &'static str, &'static [&'static str]);

const UNITS: [KnownUnit; 14] = [
    ("broken.service", "", "failed", &[]),
    ("dbus-broker.service", "dbus.service", "active", &[]),
    ("debug-shell.service", "", "inactive", &[]),
    ("drain-hub.service", "", "inactive", &[]),
    ("etcd.service", "", "active", &["role-voter.target"]),
    ("firstboot.service", "", "active", &[]),
    ("haproxy.service", "lb.service", "active", &["role-app.target"]),
    ("nftables.service", "", "active", &["role-base.target"]),
    ("patroni.service", "postgres.service", "active", &["role-db.target"]),
    ("role-base.target", "", "active", &[]),
    ("role-db.target", "", "active", &[]),
    ("role-voter.target", "", "active", &[]),
    ("softdog.service", "", "active", &["patroni.service"]),
    ("systemd-poweroff.service", "off.service", "inactive", &[]),
];
/// systemd returns an object for each name.
const NOT_FOUND: KnownUnit = ("not-found.service", "", "inactive", &[]);
const ROOT: &str = "/org/freedesktop/systemd1";
/// Path of each service of a command.
const COMMAND: &str = "/org/freedesktop/systemd1/unit/command";

struct State {
    calls: Vec<String>,
    command: Vec<String>,
    /// What the last command has read from its standard input.
    input: Option<String>,
    /// Code, status and result of the command, and its state.
    ended: (i32, i32, &'static str),
    handoff: u64,
    command_state: &'static str,
    /// Whether `StartTransientUnit` does not reply.
    holds_starts: bool,
    /// Number of connections.
    connections: usize,
    /// State of a unit that restarts; `None` while its job lasts.
    restarted: Option<&'static str>,
    /// Whether the job of the last call is pending. It is done after one reply.
    has_job: bool,
    /// State of a unit that was started.
    started: &'static str,
}

/// The fake, and what it was asked.
#[derive(Clone)]
pub(crate) struct FakeSystemd {
    state: Arc<Mutex<State>>,
    /// Number of calls that have begun.
    count: Arc<watch::Sender<usize>>,
}

impl FakeSystemd {
    fn new() -> Self {
        let state = State {
            calls: Vec::new(),
            command: Vec::new(),
            input: None,
            ended: (0, 0, "success"),
            handoff: 1,
            command_state: "active",
            holds_starts: false,
            connections: 0,
            restarted: Some("active"),
            has_job: false,
            started: "active",
        };
        Self { state: Arc::new(Mutex::new(state)), count: Arc::default() }
    }

    /// Returns a client's connection, the connection of the fake, and the fake.
    pub(crate) async fn connected() -> (zbus::Connection, zbus::Connection, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let systemd = Self::new();
        let client = Builder::unix_stream(ours).p2p().build();
        let (server, client) = tokio::try_join!(systemd.served(theirs), client).unwrap();
        (client, server, systemd)
    }

    /// Serves the fake at a socket, as if it was the only service of a bus.
    pub(crate) fn listen(path: &Path) -> Self {
        let (systemd, listener) = (Self::new(), UnixListener::bind(path).unwrap());
        let serving = systemd.clone();
        tokio::spawn(async move {
            let mut connections = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                let serving = serving.clone();
                connections.push(tokio::spawn(async move {
                    let _connection = serving.served(stream).await;
                    std::future::pending::<()>().await;
                }));
            }
        });
        systemd
    }

    async fn served(&self, stream: UnixStream) -> zbus::Result<zbus::Connection> {
        self.state().connections += 1;
        let mut server = Builder::unix_stream(stream)
            .server(zbus::Guid::generate())?
            .p2p()
            .serve_at("/org/freedesktop/DBus", FakeBus)?
            .serve_at(ROOT, FakeManager(self.clone()))?
            .serve_at(COMMAND, FakeUnit { systemd: self.clone(), unit: None })?
            .serve_at(COMMAND, FakeService(self.clone()))?;
        for unit in UNITS.into_iter().chain([NOT_FOUND]) {
            server = server.serve_at(path(unit.0), FakeUnit { systemd: self.clone(), unit: Some(unit) })?;
        }
        server.build().await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn called(&self, call: String) {
        self.state().calls.push(call);
        self.count.send_modify(|count| *count += 1);
    }

    /// Returns the calls that change something.
    pub(crate) fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    /// Returns the words and then the flags of the last command.
    pub(crate) fn command(&self) -> Vec<String> {
        self.state().command.clone()
    }

    /// Returns what the last command has read from its standard input, after the end of the input.
    pub(crate) fn input(&self) -> Option<String> {
        self.state().input.clone()
    }

    /// Ends the command.
    pub(crate) fn end_command(&self, code: i32, status: i32, result: &'static str) {
        let mut state = self.state();
        (state.ended, state.command_state, state.has_job) = ((code, status, result), "failed", false);
    }

    /// Returns the number of connections so far.
    pub(crate) fn connections(&self) -> usize {
        self.state().connections
    }

    /// Sets the time at which the program began.
    pub(crate) fn set_handoff(&self, handoff: u64) {
        self.state().handoff = handoff;
    }

    /// Makes systemd start commands without a reply.
    pub(crate) fn hold_starts(&self) {
        self.state().holds_starts = true;
    }

    /// Sets how a restart ends; `None`: it does not end.
    pub(crate) fn set_restarted(&self, state: Option<&'static str>) {
        self.state().restarted = state;
    }

    /// Sets the state of units that are started from now on.
    pub(crate) fn set_started(&self, state: &'static str) {
        self.state().started = state;
    }

    /// Waits for a call.
    pub(crate) async fn until_called(&self, call: &str) {
        self.until(|calls| calls.iter().any(|c| c == call)).await;
    }

    /// Waits until a command starts.
    pub(crate) async fn until_starting(&self) {
        self.until(|calls| calls.iter().any(|c| c.contains("ExecStartEx"))).await;
    }

    async fn until(&self, found: impl Fn(&[String]) -> bool) {
        let mut count = self.count.subscribe();
        let waited = count.wait_for(|_| found(&self.calls()));
        let waited = tokio::time::timeout(Duration::from_secs(10), waited).await;
        assert!(waited.is_ok(), "missing call: {:?}", self.calls());
    }
}

fn path(unit: &str) -> String {
    let name: String = unit.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("{ROOT}/unit/{name}")
}

fn object(path: impl Into<String>) -> OwnedObjectPath {
    OwnedObjectPath::try_from(path.into()).unwrap()
}

fn job() -> OwnedObjectPath {
    object(format!("{ROOT}/job/1"))
}

struct FakeBus;

#[zbus::interface(name = "org.freedesktop.DBus")]
impl FakeBus {
    fn hello(&self) -> &str {
        ":1.7"
    }
}

struct FakeManager(FakeSystemd);

#[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
impl FakeManager {
    fn list_units_filtered(&self, states: Vec<String>) -> Vec<Row> {
        let text = |text: &str| text.to_owned();
        let row = |(name, _, active, _): KnownUnit| {
            let none = (0, text(""), object("/"));
            (
                text(name),
                text("A unit"),
                text("loaded"),
                text(active),
                text("x"),
                text(""),
                object(path(name)),
                none.0,
                none.1,
                none.2,
            )
        };
        UNITS.into_iter().map(row).filter(|row: &Row| states.is_empty() || states.contains(&row.3)).collect()
    }

    fn load_unit(&self, name: String) -> OwnedObjectPath {
        assert!(name.contains('.'), "{name}");
        if ["bakehouse-exec-", "bakehouse-odoo-shell-", "x.service"].iter().any(|of| name.starts_with(of)) {
            return object(COMMAND);
        }
        let known = UNITS.iter().find(|unit| unit.0 == name || unit.1 == name);
        object(path(known.unwrap_or(&NOT_FOUND).0))
    }

    fn restart_unit(&self, name: String, mode: String) -> OwnedObjectPath {
        self.0.called(format!("restart {name} {mode}"));
        self.0.state().has_job = true;
        job()
    }

    fn start_unit(&self, name: String, mode: String) -> OwnedObjectPath {
        self.0.called(format!("start {name} {mode}"));
        job()
    }

    fn stop_unit(&self, name: String, mode: String) -> OwnedObjectPath {
        self.0.called(format!("stop {name} {mode}"));
        self.0.end_command(2, 15, "success");
        job()
    }

    async fn start_transient_unit(
        &self,
        name: String,
        mode: String,
        properties: Vec<(String, OwnedValue)>,
        auxiliary: Vec<(String, Vec<(String, OwnedValue)>)>,
    ) -> OwnedObjectPath {
        assert!(mode == "fail" && auxiliary.is_empty() && name.ends_with(".service"));
        let mut types = Vec::new();
        for (name, value) in properties {
            types.push(format!("{name} {}", value.value_signature()));
            match (name.as_str(), &*value) {
                ("StandardOutputFileDescriptor", Value::Fd(fd)) => {
                    let fd = OwnedFd::try_from(fd.try_clone().unwrap()).unwrap();
                    std::fs::File::from(fd).write_all(b"out").unwrap();
                }
                ("StandardInputFileDescriptor", Value::Fd(fd)) => {
                    let fd = OwnedFd::try_from(fd.try_clone().unwrap()).unwrap();
                    let state = self.0.state.clone();
                    std::thread::spawn(move || {
                        let read = std::io::read_to_string(std::fs::File::from(fd)).unwrap();
                        state.lock().unwrap().input = Some(read);
                    });
                }
                ("ExecStartEx", _) => {
                    let commands: Vec<(String, Vec<String>, Vec<String>)> = value.try_into().unwrap();
                    let [(program, words, flags)] = &commands[..] else { panic!("{commands:?}") };
                    assert_eq!(*program, words[0]);
                    self.0.state().command = [words.clone(), flags.clone()].concat();
                }
                ("Description", Value::Str(text)) => types.push(format!("description: {text}")),
                _ => {}
            }
        }
        self.0.state().command_state = "active";
        self.0.state().has_job = true;
        self.0.called(types.join(", "));
        if self.0.state().holds_starts {
            std::future::pending::<()>().await;
        }
        job()
    }
}

struct FakeUnit {
    systemd: FakeSystemd,
    /// A unit of the list; `None`: a command.
    unit: Option<KnownUnit>,
}

#[zbus::interface(name = "org.freedesktop.systemd1.Unit")]
impl FakeUnit {
    #[zbus(property)]
    fn id(&self) -> &str {
        self.unit.map_or("command.service", |unit| unit.0)
    }

    #[zbus(property)]
    fn load_state(&self) -> &str {
        if self.unit == Some(NOT_FOUND) { "not-found" } else { "loaded" }
    }

    #[zbus(property)]
    fn transient(&self) -> bool {
        self.unit.is_none()
    }

    #[zbus(property)]
    fn active_state(&self) -> &str {
        let mut state = self.systemd.state();
        if std::mem::take(&mut state.has_job) {
            return "inactive";
        }
        let last = |name: &str| {
            let of = |call: &&String| call.split(' ').nth(1) == Some(name);
            state.calls.iter().rev().find(of).map_or("", |call| call.split(' ').next().unwrap_or_default())
        };
        match self.unit {
            None => state.command_state,
            Some(unit) if last(unit.0) == "start" => state.started,
            Some(unit) if last(unit.0) == "stop" => "inactive",
            Some(unit) if state.calls.iter().any(|call| *call == format!("restart {} replace", unit.0)) => {
                state.restarted.unwrap_or("activating")
            }
            Some(unit) => unit.2,
        }
    }

    #[zbus(property)]
    fn job(&self) -> (u32, OwnedObjectPath) {
        if std::mem::take(&mut self.systemd.state().has_job) { (1, job()) } else { (0, object("/")) }
    }

    #[zbus(property)]
    fn required_by(&self) -> Vec<&str> {
        self.unit.map_or_else(Vec::new, |unit| unit.3.to_vec())
    }

    #[zbus(property)]
    fn bound_by(&self) -> Vec<&str> {
        Vec::new()
    }

    #[zbus(property)]
    fn consists_of(&self) -> Vec<&str> {
        Vec::new()
    }
}

struct FakeService(FakeSystemd);

#[zbus::interface(name = "org.freedesktop.systemd1.Service")]
impl FakeService {
    #[zbus(property)]
    fn exec_main_code(&self) -> i32 {
        self.0.state().ended.0
    }

    #[zbus(property)]
    fn exec_main_status(&self) -> i32 {
        self.0.state().ended.1
    }

    #[zbus(property)]
    fn exec_main_handoff_timestamp_monotonic(&self) -> u64 {
        self.0.state().handoff
    }

    #[zbus(property)]
    fn result(&self) -> &str {
        self.0.state().ended.2
    }
}
