//! Drain and undrain of a hub.

use fleet::node_api::{DRAIN_PATH, NodeStatus, UNDRAIN_PATH};

use super::*;

const CHECKED: DrainRequest = DrainRequest { drained: Some(true), check: true };
const DRAINED: DrainRequest = DrainRequest { drained: Some(true), check: false };

fn forced() -> ActionRequest {
    ActionRequest { unit: None, force: Some("hub-1".to_owned()) }
}

impl TestNode {
    fn hubs_refuse(&self, why: Result<&str, &str>) {
        let refusal = |why: &str| DrainAnswer { granted: false, why: why.to_owned(), ..DrainAnswer::default() };
        self.drains.lock().unwrap().1 = why.map(refusal).map_err(str::to_owned);
    }

    fn reported(&self) -> Vec<DrainRequest> {
        self.drains.lock().unwrap().0.clone()
    }

    /// Returns whether the files on the disk and in /run exist.
    fn files(&self) -> [bool; 2] {
        ["drained.json", "run/drained"].map(|name| self.dir.path().join(name).exists())
    }
}

async fn status(connection: &mut Connection) -> NodeStatus {
    serde_json::from_str(&get(connection, STATUS_PATH).await.unwrap()).unwrap()
}

#[tokio::test]
async fn a_drain_is_on_the_disk_and_an_undrain_removes_it() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    let none = ActionRequest::default();
    assert_eq!(post(&mut connection, UNDRAIN_PATH, &none).await.unwrap().message, "hub-1 is not drained");
    let reply = post(&mut connection, DRAIN_PATH, &none).await.unwrap();
    assert!(reply.done && reply.message == "hub-1: drain done", "{reply:?}");
    assert_eq!(node.files(), [true; 2]);
    // The role `voter` has no unit: the node keeps its vote.
    assert_eq!(node.systemd.calls(), ["start drain-hub.service replace"]);
    assert_eq!(node.reported(), [CHECKED, DRAINED]);
    assert!(status(&mut connection).await.drained.is_some());
    // Another action may begin at once.
    node.lock.until(&[600, 0]).await;
    let again = post(&mut connection, DRAIN_PATH, &none).await.unwrap();
    assert!(again.done && again.message == "hub-1 is drained already by anna.operator.operator", "{again:?}");
    assert_eq!(node.systemd.calls().len(), 1);

    let reply = post(&mut connection, UNDRAIN_PATH, &none).await.unwrap();
    assert!(reply.done && reply.message == "hub-1: undrain done", "{reply:?}");
    assert_eq!(node.files(), [false; 2]);
    assert_eq!(node.systemd.calls(), ["start drain-hub.service replace", "stop drain-hub.service replace"]);
    assert_eq!(status(&mut connection).await.drained, None);
    assert_eq!(node.log.lines("drain: begins").len() + node.log.lines("drain: done").len(), 4);
}

#[tokio::test]
async fn a_drain_that_hurts_is_refused_unless_forced() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    let none = ActionRequest::default();
    for (why, expected) in [
        (Ok("hub-1 is the last hub that can hold the VIP: hub-2 is drained"), "last hub that can hold the VIP"),
        (Err("no answer"), "no hub can make sure that another node takes the work"),
    ] {
        node.hubs_refuse(why);
        let e = post(&mut connection, DRAIN_PATH, &none).await.unwrap_err();
        assert!(e.contains(expected) && e.contains("--force hub-1"), "{e}");
    }
    assert_eq!((node.files(), node.systemd.calls()), ([false; 2], Vec::<String>::new()));
    // The hubs do not answer, and the node drains itself nevertheless.
    assert!(post(&mut connection, DRAIN_PATH, &forced()).await.unwrap().done);
    assert_eq!(node.files(), [true; 2]);
    assert!(!node.log.lines("drain (forced): begins").is_empty());
    let mut viewer = node.connect(OperatorRole::Viewer).await;
    for path in [DRAIN_PATH, UNDRAIN_PATH] {
        assert!(post(&mut viewer, path, &none).await.unwrap_err().contains("needs the role operator"));
    }
}

#[tokio::test]
async fn a_failed_drain_leaves_the_node_in_service() {
    let node = TestNode::start().await;
    node.systemd.set_started("failed");
    let mut connection = node.connect(OperatorRole::Operator).await;
    let e = post(&mut connection, DRAIN_PATH, &ActionRequest::default()).await.unwrap_err();
    assert!(e.contains("hub-1 is not drained: drain-hub.service is failed"), "{e}");
    assert_eq!((node.files(), node.drained.current()), ([false; 2], None));
    let undrained = DrainRequest { drained: Some(false), check: false };
    assert_eq!(node.reported(), [CHECKED, undrained]);
}

#[tokio::test]
async fn a_boot_applies_the_drain_on_the_disk() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    assert!(post(&mut connection, DRAIN_PATH, &ActionRequest::default()).await.unwrap().done);
    // A boot: /run is empty.
    std::fs::remove_file(node.dir.path().join("run/drained")).unwrap();
    let (bus, _server, systemd) = FakeSystemd::connected().await;
    let mut hub = Topology::from_fleet(&Fleet::parse("f", b"name = \"acme\"\ngroups.hub.count = 1\n").unwrap()).hubs;
    let hub = hub.remove(0);
    let state = DrainState::load(node.dir.path(), &node.dir.path().join("run"));
    restore_drain(&bus, &hub, &state).await;
    assert_eq!((systemd.calls(), node.files()), (vec!["start drain-hub.service replace".to_owned()], [true; 2]));
    // The agent stopped after it had removed the file, and before it stopped the unit.
    std::fs::remove_file(node.dir.path().join("drained.json")).unwrap();
    let state = DrainState::load(node.dir.path(), &node.dir.path().join("run"));
    restore_drain(&bus, &hub, &state).await;
    assert_eq!(systemd.calls()[1..], ["stop drain-hub.service replace"]);
    assert_eq!(node.files(), [false; 2]);
    // Nothing to do: no call.
    restore_drain(&bus, &hub, &state).await;
    assert_eq!(systemd.calls().len(), 2);
}

#[tokio::test]
async fn drained_nodes_are_no_reserve() {
    let change = |topology: &mut Topology| {
        topology.voters.clear();
        let mut app = topology.nodes[1].clone();
        (app.name, app.roles, app.hub) = ("app-2".to_owned(), vec!["app".to_owned()], 0);
        topology.nodes.push(app);
        topology.nodes[0].roles.push("app".to_owned());
    };
    let node = TestNode::start_with(change).await;
    let mut connection = node.connect(OperatorRole::Operator).await;
    let drained = [("app-2".to_owned(), 1)].into();
    node.drains.lock().unwrap().1 = Ok(DrainAnswer { granted: true, why: String::new(), drained });
    let e = post(&mut connection, REBOOT_PATH, &ActionRequest::default()).await.unwrap_err();
    assert!(e.contains("all app nodes except hub-1 are drained: app-2") && e.contains("bakehouse undrain"), "{e}");
    // A drained node serves nothing.
    node.drained.store(crate::node::drained::Drained::now("")).unwrap();
    assert!(post(&mut connection, REBOOT_PATH, &ActionRequest::default()).await.unwrap().done);
}
