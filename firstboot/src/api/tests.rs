//! Requests of operators over TLS, with a fake of systemd, and a lock that replies as the test says.

mod drain;
mod exec;
mod sql;
mod verbs;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::node_api::{
    ACTION_PATH, ActionReply, ActionRequest, AuditEntry, DrainAnswer, DrainRequest, EXEC_PATH, ExecEvent, ExecRequest,
    JOURNAL_PATH, OPEN_PREFIX, REBOOT_PATH, RESTART_PATH, STATUS_PATH,
};
use fleet::{
    Fleet, Issuer, Operator, OperatorRevocation, OperatorRole, OrderScope, PROTOCOL, PrivateKey, RevokedOperator,
    SignedOrder as _, UpdateDecision, encoding,
};
use fleet_https::{Connection, Identity, Lines, request};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::*;
use crate::host::manager::fake::FakeSystemd;

const LONGEST: usize = 1 << 20;

/// The agent's log.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn lines(&self, part: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let texts = text.lines().map(|line| line.split(" message_id=").next().unwrap_or_default().to_owned());
        texts.filter(|line| line.contains(part)).collect()
    }

    /// Waits until the log has a line with this text.
    async fn until(&self, part: &str) {
        for _ in 0..500 {
            if !self.lines(part).is_empty() {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
        panic!("no line has `{part}`:\n{}", self.lines("").join("\n"));
    }
}

/// The fleet's lock: which seconds were asked for, and the reply.
#[derive(Clone)]
struct FakeLock(Arc<Mutex<LockState>>);

type LockState = (Vec<u32>, Result<String, String>);

impl FakeLock {
    /// Replies that the node has the lock (`Ok("")`), that it has to wait, or not at all.
    fn replies(&self, reply: Result<&str, &str>) {
        self.0.lock().unwrap().1 = reply.map(str::to_owned).map_err(str::to_owned);
    }

    fn asked(&self) -> Vec<u32> {
        self.0.lock().unwrap().0.clone()
    }

    /// Waits until these seconds were asked for.
    async fn until(&self, asked: &[u32]) {
        for _ in 0..500 {
            if self.asked() == asked {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
        panic!("the node asked for {:?}", self.asked());
    }
}

/// The hubs' records of drained nodes: the requests, and the reply.
type Drains = Arc<Mutex<(Vec<DrainRequest>, Result<DrainAnswer, String>)>>;

struct TestNode {
    root: Issuer,
    port: u16,
    systemd: FakeSystemd,
    lock: FakeLock,
    drains: Drains,
    drained: Arc<DrainState>,
    log: Log,
    /// Entries of the audit log that a hub has got.
    recorded: Arc<Mutex<Vec<AuditEntry>>>,
    revocations: Arc<Revocations>,
    phase: watch::Sender<Phase>,
    _log: tracing::subscriber::DefaultGuard,
    dir: tempfile::TempDir,
}

impl TestNode {
    /// Starts a voter of a fleet whose other voters do not run.
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// As [`Self::start`], after a change of the topology.
    async fn start_with(change: impl FnOnce(&mut Topology)) -> Self {
        let log = Log::default();
        let writer = log.clone();
        let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(move || writer.clone());
        let guard = tracing_subscriber::registry().with(layer).set_default();
        let dir = tempfile::tempdir().unwrap();
        let toml = b"name = \"acme\"\n[access]\nshell = true\nsql = true\n[groups]\nhub.count = 3\n";
        let mut topology = Topology::from_fleet(&Fleet::parse("fleet.toml", toml).unwrap());
        for node in topology.nodes.iter_mut().chain(&mut topology.hubs) {
            node.address = [127, 0, 0, 1].into();
        }
        change(&mut topology);
        let node = topology.nodes[0].clone();
        let root = Issuer::root("acme").unwrap();
        let key = PrivateKey::generate().unwrap();
        let issuer = root.issuer("acme", &node.name).unwrap();
        let cert = issuer.node(&topology, &node, &key.public().unwrap()).unwrap();
        let own = Identity { cert: &cert, key: key.pem() };
        let bus = dir.path().join("bus");
        let systemd = FakeSystemd::listen(&bus);
        let lock = FakeLock(Arc::new(Mutex::new((Vec::new(), Ok(String::new())))));
        let replies = lock.clone();
        let revocations = Arc::new(Revocations::load(dir.path(), "acme", root.certificate()));
        let phase = watch::Sender::new(Phase::Ready);
        let recorded: Arc<Mutex<Vec<AuditEntry>>> = Arc::default();
        let entries = recorded.clone();
        let recorder: crate::node::outbox::Recorder = Box::new(move |new| {
            entries.lock().unwrap().extend(new);
            Box::pin(async { Ok(()) })
        });
        let granted = DrainAnswer { granted: true, ..DrainAnswer::default() };
        let drains: Drains = Arc::new(Mutex::new((Vec::new(), Ok(granted))));
        let requested = drains.clone();
        let drained = Arc::new(DrainState::load(dir.path(), &dir.path().join("run")));
        let api = NodeApi {
            topology,
            node,
            image: "7".to_owned(),
            epoch: 1,
            root: root.certificate().to_owned(),
            tls: fleet_https::client(root.certificate(), Some(own)).unwrap(),
            revocations: revocations.clone(),
            phase: phase.subscribe(),
            bus: Some(format!("unix:path={}", bus.display())),
            journal: dir.path().join("journal.sock"),
            postgres: dir.path().join("postgres.sock"),
            locker: Box::new(move |seconds| {
                let mut state = replies.0.lock().unwrap();
                state.0.push(seconds);
                let reply = state.1.clone().map_err(Error::Failed);
                let decision = reply.map(|why| UpdateDecision { granted: why.is_empty() || seconds == 0, why });
                Box::pin(async move { decision })
            }),
            outbox: Arc::new(Outbox::load(dir.path(), "hub-1", recorder)),
            drained: drained.clone(),
            drainer: Box::new(move |request| {
                let mut state = requested.lock().unwrap();
                state.0.push(request);
                let reply = state.1.clone().map_err(Error::Failed);
                Box::pin(async move { reply })
            }),
            tasks: Tasks::default(),
        };
        let outbox = api.outbox.clone();
        tokio::spawn(async move { outbox.keep().await });
        let operators = fleet_https::OperatorVerifier::new(root.certificate()).unwrap();
        let acceptor = fleet_https::mutual_server(root.certificate(), own).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(listener::accept(Arc::new(api), operators, listener, acceptor.into()));
        Self { root, port, systemd, lock, drains, drained, log, recorded, revocations, phase, _log: guard, dir }
    }

    /// Connects as an operator. Returns the operator's public key, too.
    async fn connect_with_key(&self, name: &str, role: OperatorRole) -> (Connection, String) {
        let key = PrivateKey::generate().unwrap();
        let public = key.public().unwrap();
        let valid = (now() - 60, now() + 3600);
        let cert = self.root.operator(&Operator::new(name, role).unwrap(), &public, valid).unwrap();
        let own = Identity { cert: &cert, key: key.pem() };
        let tls = fleet_https::client(self.root.certificate(), Some(own)).unwrap();
        let connection = Connection::open("127.0.0.1", self.port, "hub-1", &tls).await.unwrap();
        (connection, encoding::encode(public.as_bytes()))
    }

    async fn connect(&self, role: OperatorRole) -> Connection {
        self.connect_with_key("anna", role).await.0
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

async fn get(connection: &mut Connection, path: &str) -> Result<String, String> {
    let reply = connection.ask(request("GET", "node", path, &[], "".into()).unwrap(), LONGEST).await;
    reply.map(|body| String::from_utf8(body.to_vec()).unwrap()).map_err(|e| fleet::ErrorChain::new(&e).to_string())
}

async fn post(connection: &mut Connection, path: &str, body: &ActionRequest) -> Result<ActionReply, String> {
    let body = serde_json::to_vec(body).unwrap().into();
    let reply = connection.ask(request("POST", "node", path, &[], body).unwrap(), LONGEST).await;
    reply.map(|body| serde_json::from_slice(&body).unwrap()).map_err(|e| fleet::ErrorChain::new(&e).to_string())
}

fn restart(unit: &str) -> ActionRequest {
    ActionRequest { unit: Some(unit.to_owned()), force: None }
}

async fn events(mut lines: Lines) -> Vec<ExecEvent> {
    let mut events = Vec::new();
    while let Some(line) = timeout(Duration::from_secs(20), lines.next()).await.expect("a line in time").unwrap() {
        events.push(serde_json::from_slice(&line).unwrap());
    }
    events
}

#[tokio::test]
async fn a_restart_is_logged_before_and_after_and_its_end_can_be_read() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    assert!(get(&mut connection, ACTION_PATH).await.unwrap_err().contains("no action"));
    // An alias, and a name without a type.
    let reply = post(&mut connection, RESTART_PATH, &restart("lb")).await.unwrap();
    assert!(reply.done && reply.message == "hub-1: restart of haproxy.service done", "{reply:?}");
    assert_eq!(node.systemd.calls(), ["restart haproxy.service replace"]);
    let status: ActionStatus = serde_json::from_str(&get(&mut connection, ACTION_PATH).await.unwrap()).unwrap();
    assert_eq!((status.id, status.done, status.error), (reply.id, true, None));
    assert_eq!(status.operator, "anna.operator.operator");
    let lines = node.log.lines("restart of haproxy.service");
    assert!(lines.len() == 2 && lines[0].ends_with("begins") && lines[1].ends_with("done"), "{lines:?}");
    assert_eq!(node.lock.asked(), [0; 0], "HAProxy needs no lock");
    let recorded = node.recorded.lock().unwrap().clone();
    let begun = recorded.first().expect("a hub has the action before it is done");
    assert_eq!((begun.operator.as_str(), begun.role.as_str(), begun.result.as_str()), ("anna", "operator", "begins"));
    assert_eq!((begun.node.as_str(), begun.action.as_str()), ("hub-1", "restart of haproxy.service"));

    node.systemd.set_restarted(Some("failed"));
    let e = post(&mut connection, RESTART_PATH, &restart("haproxy")).await.unwrap_err();
    assert!(e.contains("haproxy.service failed; see: bakehouse logs hub-1"), "{e}");
    let status: ActionStatus = serde_json::from_str(&get(&mut connection, ACTION_PATH).await.unwrap()).unwrap();
    assert!(status.done && status.error.unwrap().contains("failed"));
}

#[tokio::test]
async fn a_long_action_continues_after_the_reply_and_excludes_others() {
    let node = TestNode::start().await;
    node.systemd.set_restarted(None);
    let mut connection = node.connect(OperatorRole::Operator).await;
    let begun = tokio::time::Instant::now();
    let reply = post(&mut connection, RESTART_PATH, &restart("haproxy")).await.unwrap();
    assert!(!reply.done && reply.message.ends_with("continues"), "{reply:?}");
    assert!(begun.elapsed() < Duration::from_secs(10), "clients wait for 10 s");
    let e = post(&mut connection, RESTART_PATH, &restart("broken")).await.unwrap_err();
    assert!(e.contains("a restart of anna.operator.operator runs on hub-1"), "{e}");
    let status: ActionStatus = serde_json::from_str(&get(&mut connection, ACTION_PATH).await.unwrap()).unwrap();
    assert!(status.id == reply.id && !status.done);
    node.systemd.set_restarted(Some("active"));
    node.log.until("restart of haproxy.service: done").await;
    let status: ActionStatus = serde_json::from_str(&get(&mut connection, ACTION_PATH).await.unwrap()).unwrap();
    assert!(status.done && status.error.is_none());
}

#[tokio::test]
async fn what_hurts_is_refused_unless_forced() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    // Aliases do not get around the rules.
    for (unit, expected) in [
        ("systemd-poweroff.service", "a part of the system"),
        ("off.service", "operators may not restart systemd-poweroff.service"),
        ("poweroff.target", "no service, socket, timer"),
        ("debug-shell", "a part of the system"),
        ("firstboot", "serves this request"),
        ("no-such", "hub-1 has no unit no-such.service"),
        ("a b", "names no unit"),
    ] {
        let e = post(&mut connection, RESTART_PATH, &restart(unit)).await.unwrap_err();
        assert!(e.contains(expected), "{unit}: {e}");
    }
    assert_eq!(node.lock.asked(), [0; 0]);
    // The other voters do not answer. nftables is below all services, and the lock is free again.
    for unit in ["etcd", "nftables", "dbus"] {
        let e = post(&mut connection, RESTART_PATH, &restart(unit)).await.unwrap_err();
        assert!(e.contains("etcd would lose its quorum without hub-1: hub-2, hub-3"), "{unit}: {e}");
    }
    let e = post(&mut connection, REBOOT_PATH, &ActionRequest::default()).await.unwrap_err();
    assert!(e.contains("quorum") && e.contains("--force hub-1"), "{e}");
    node.lock.until(&[600, 0, 600, 0, 600, 0, 600, 0]).await;
    assert_eq!(node.systemd.calls(), [""; 0]);

    for (reply, expected) in [
        (Ok("an operator's action stops hub-2"), "hub-1 has to wait: an operator's action stops hub-2"),
        (Err("etcd does not answer"), "no hub can make sure"),
    ] {
        node.lock.replies(reply);
        let e = post(&mut connection, REBOOT_PATH, &ActionRequest::default()).await.unwrap_err();
        assert!(e.contains(expected) && e.contains("--force hub-1"), "{e}");
    }
    assert_eq!(node.systemd.calls(), [""; 0]);
    let forced = ActionRequest { unit: None, force: Some("hub-1".to_owned()) };
    assert!(post(&mut connection, REBOOT_PATH, &forced).await.unwrap().done);
    assert_eq!(node.systemd.calls(), ["start reboot.target replace-irreversibly"]);
    assert!(!node.log.lines("reboot (forced): begins").is_empty());
}

#[tokio::test]
async fn the_lock_is_free_when_the_node_is_ready_again() {
    let node = TestNode::start_with(|topology| topology.voters.clear()).await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    node.phase.send_replace(Phase::Starting);
    let reply = post(&mut connection, RESTART_PATH, &restart("nftables")).await.unwrap();
    assert!(reply.done, "{reply:?}");
    sleep(Duration::from_millis(500)).await;
    assert_eq!(node.lock.asked(), [600]);
    // The end of the first action does not free the lock of the second one.
    node.systemd.set_restarted(None);
    assert!(!post(&mut connection, RESTART_PATH, &restart("dbus")).await.unwrap().done);
    node.phase.send_replace(Phase::Ready);
    sleep(Duration::from_secs(3)).await;
    assert_eq!(node.lock.asked(), [600, 600]);
    node.systemd.set_restarted(Some("active"));
    node.lock.until(&[600, 600, 0]).await;
}

#[tokio::test]
async fn a_refused_action_keeps_no_lock_of_an_earlier_one() {
    let node = TestNode::start_with(|topology| topology.voters.clear()).await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    node.phase.send_replace(Phase::Starting);
    assert!(post(&mut connection, RESTART_PATH, &restart("nftables")).await.unwrap().done);
    node.lock.replies(Ok("db-2 waits for the fleet's lock"));
    post(&mut connection, RESTART_PATH, &restart("nftables")).await.unwrap_err();
    node.phase.send_replace(Phase::Ready);
    node.lock.until(&[600, 600, 0]).await;
}

#[tokio::test]
async fn a_node_that_reboots_keeps_the_lock() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    let forced = ActionRequest { unit: None, force: Some("hub-1".to_owned()) };
    assert!(post(&mut connection, REBOOT_PATH, &forced).await.unwrap().done);
    sleep(Duration::from_millis(200)).await;
    assert_eq!(node.lock.asked(), [lock::LONGEST]);
}

#[tokio::test]
async fn an_action_whose_client_disconnects_is_in_the_log() {
    let node = TestNode::start().await;
    node.systemd.set_restarted(None);
    let mut connection = node.connect(OperatorRole::Operator).await;
    let asked = restart("haproxy");
    tokio::select! {
        _ = post(&mut connection, RESTART_PATH, &asked) => panic!("the restart lasts"),
        () = node.systemd.until_called("restart haproxy.service replace") => {}
    }
    drop(connection);
    let lines = node.log.lines("restart of haproxy.service: begins");
    assert!(lines.len() == 1 && lines[0].contains("anna.operator.operator"), "{lines:?}");
    node.systemd.set_restarted(Some("active"));
    node.log.until("restart of haproxy.service: done").await;
}

#[tokio::test]
async fn refused_requests_are_in_the_log_and_a_flood_of_them_is_not() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Viewer).await;
    post(&mut connection, REBOOT_PATH, &ActionRequest::default()).await.unwrap_err();
    let lines = node.log.lines("anna.viewer.operator from hub-1: POST /v1/reboot: anna has the role viewer");
    assert!(lines.len() == 1 && lines[0].ends_with(": 403"), "{lines:?}");
    for n in 0..100 {
        get(&mut connection, &format!("/v1/{n}")).await.unwrap_err();
        get(&mut connection, &format!("{STATUS_PATH}?{n}")).await.unwrap();
    }
    let lines = node.log.lines("anna.viewer.operator");
    assert!(lines.len() <= 11, "{}", lines.join("\n"));
    // Another operator's lines are not left out.
    let mut other = node.connect_with_key("ben", OperatorRole::Viewer).await.0;
    get(&mut other, "/v1/x").await.unwrap_err();
    assert_eq!(node.log.lines("ben.viewer.operator").len(), 1);
    let journal = get(&mut other, &format!("{JOURNAL_PATH}?lines=1")).await.unwrap_err();
    assert!(journal.contains("the journal does not answer"), "{journal}");
    let open = get(&mut other, &format!("{OPEN_PREFIX}haproxy")).await.unwrap_err();
    assert!(open.contains("unknown path"), "{open}");
}

#[tokio::test]
async fn requests_for_states_share_a_connection_to_the_bus() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Viewer).await;
    for _ in 0..10 {
        let units = get(&mut connection, "/v1/units").await.unwrap();
        assert!(units.contains("patroni.service"));
    }
    assert_eq!(node.systemd.connections(), 1);
}
