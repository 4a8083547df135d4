//! Requests for the network, the disks, backups and captures.

use fleet::node_api::{BACKUP_PATH, BackupRequest, DISK_PATH, DiskStatus, NET_PATH, NetStatus, PCAP_PATH, PcapRequest};
use serde::Serialize;

use super::*;

async fn send(connection: &mut Connection, path: &str, body: &impl Serialize) -> Result<Lines, String> {
    let body = serde_json::to_vec(body).unwrap().into();
    let lines = connection.lines(request("POST", "node", path, &[], body).unwrap(), Duration::from_secs(30)).await;
    lines.map_err(|e| fleet::ErrorChain::new(&e).to_string())
}

#[tokio::test]
async fn viewers_read_network_and_disks_also_if_a_part_fails() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Viewer).await;
    let net: NetStatus = serde_json::from_str(&get(&mut connection, NET_PATH).await.unwrap()).unwrap();
    assert_eq!(net.node, "hub-1");
    assert!(net.links.iter().any(|link| link.name == "lo"), "{net:?}");
    assert_eq!(net.paths.iter().map(|path| path.hub.as_str()).collect::<Vec<_>>(), ["hub-2", "hub-3"]);
    // This machine has no such interfaces, and no BIRD.
    for part in ["peers of wg0: ", "peers of wg-hub2: ", "sessions of BIRD: "] {
        assert!(net.missing.iter().any(|text| text.starts_with(part)), "{part}: {:?}", net.missing);
    }
    let disk: DiskStatus = serde_json::from_str(&get(&mut connection, DISK_PATH).await.unwrap()).unwrap();
    assert_eq!((disk.node.as_str(), &disk.postgresql, &disk.partitions[..]), ("hub-1", &None, &[][..]));
    assert!(disk.file_systems.iter().any(|of| of.mount == "/" && of.total > 0), "{disk:?}");
    for path in [NET_PATH, DISK_PATH] {
        assert_eq!(node.log.lines(&format!("anna.viewer.operator from hub-1: GET {path}")).len(), 1);
    }
}

#[tokio::test]
async fn only_the_node_that_makes_backups_begins_one() {
    let node = TestNode::start().await;
    let mut viewer = node.connect(OperatorRole::Viewer).await;
    let e = send(&mut viewer, BACKUP_PATH, &BackupRequest::default()).await.err().unwrap();
    assert!(e.contains("needs the role operator"), "{e}");
    let mut operator = node.connect(OperatorRole::Operator).await;
    let e = send(&mut operator, BACKUP_PATH, &BackupRequest { full: true }).await.err().unwrap();
    assert!(e.contains("hub-1 makes no backups"), "{e}");
    assert!(get(&mut operator, BACKUP_PATH).await.unwrap_err().contains("makes no backups"));
    assert_eq!(node.systemd.calls(), [""; 0]);
}

#[tokio::test]
async fn a_capture_runs_as_a_service_and_is_in_the_log() {
    let node = TestNode::start().await;
    let asked = PcapRequest { interface: Some("wg0".to_owned()), seconds: 7, bytes: 1000, snap: 256 };
    let mut operator = node.connect(OperatorRole::Operator).await;
    let e = send(&mut operator, PCAP_PATH, &asked).await.err().unwrap();
    assert!(e.contains("needs the role admin"), "{e}");
    let mut admin = node.connect(OperatorRole::Admin).await;
    let lines = send(&mut admin, PCAP_PATH, &asked).await.unwrap();
    node.systemd.until_starting().await;
    node.systemd.end_command(1, 0, "success");
    assert_eq!(events(lines).await, [ExecEvent::Stdout("b3V0".to_owned()), ExecEvent::Exit(0)]);
    let command = ["/usr/lib/bakehouse/firstboot", "capture", "wg0", "7", "1000", "256"];
    assert_eq!(node.systemd.command()[..6], command);
    let what = "pcap of wg0 for up to 7 s, 1000 bytes, 256 bytes of each packet: ";
    node.log.until(&format!("{what}exit code 0")).await;
    assert_eq!(node.log.lines(&format!("{what}begins")).len(), 1);
    let e = send(&mut admin, PCAP_PATH, &PcapRequest { snap: 0, ..asked }).await.err().unwrap();
    assert!(e.contains("bytes of each packet is not from 1"), "{e}");
    assert_eq!(node.systemd.calls().len(), 1);
}
