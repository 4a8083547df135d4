//! Requests of a hostile host on the PXE network, sent to the server's request handler.

use std::collections::BTreeMap;

use fleet::netboot::{Assignment, Extent, ImageStatement, ProgressReport, Step};
use fleet::netboot::{Key, ReportKey, code, signed_root};
use serde_json::{Value, json};

use super::*;
use crate::progress::Progress;

/// MAC address that fleet.toml names.
const KNOWN: &str = "52:54:00:00:00:01";

pub(super) struct AttackedServer {
    pub handler: NetbootHandler,
    pub project: tempfile::TempDir,
    pub served: tempfile::TempDir,
    trust: InstallerTrust,
}

pub(super) fn attacked(rules: &str) -> AttackedServer {
    let project = tempfile::tempdir().unwrap();
    let toml = format!(
        "name = \"acme\"\n{rules}[groups.hub]\ncount = 3\nendpoints = [\"192.0.2.1\", \"192.0.2.2\", \"192.0.2.3\"]\n\
         [groups.db]\ncount = 2\n[groups.app]\ncount = 2\n"
    );
    fs::write(project.path().join("fleet.toml"), toml).unwrap();
    let served = tempfile::tempdir().unwrap();
    fs::create_dir(served.path().join(HOSTS)).unwrap();
    open(project, served, FleetKey::create("acme").unwrap())
}

/// Starts a server with the records of an earlier one.
fn open(project: tempfile::TempDir, served: tempfile::TempDir, authority: FleetKey) -> AttackedServer {
    let loaded = Project::load(project.path()).unwrap();
    let update = authority.update_key().unwrap();
    let offer = |group: &str| {
        let (fleet, group, version) = ("acme".to_owned(), group.to_owned(), "1".to_owned());
        let roothash = "0".repeat(64);
        let statement = ImageStatement { fleet, group, version, roothash: roothash.clone() };
        ImageOffer {
            path: "/images/x.raw".to_owned(),
            size: 1 << 20,
            table: String::new(),
            extents: Vec::new(),
            sha256: String::new(),
            root: Extent { start: 0, size: 1 },
            verity: Extent { start: 1, size: 1 },
            roothash,
            signed: update.sign_image(&statement).unwrap(),
        }
    };
    let offers: BTreeMap<_, _> = ["hub", "db", "app"].map(|group| (group.to_owned(), offer(group))).into();
    let trust = InstallerTrust { fleet: "acme".into(), version: "1".into(), key: encode(update.public()) };
    let rules = loaded.fleet.netboot.get_ref().clone();
    let registry = MachineRegistry::open(&project.path().join(RECORDS), &rules).unwrap();
    let fleet = FleetPlan { authority, project: loaded, offers };
    let handler = NetbootHandler::new(
        fleet,
        registry,
        served.path().to_owned(),
        NetbootProgress::new(Progress::new(true, false), None),
    );
    AttackedServer { handler, project, served, trust }
}

fn machine(macs: &[&str], serial: &str, key: &str) -> Value {
    let disk = json!({ "path": "/dev/vda", "size": 1_u64 << 40, "removable": false });
    json!({ "version": 2, "macs": macs, "serial": serial, "disks": [disk], "memory": 1_u64 << 40, "key": key })
}

impl AttackedServer {
    fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let reply = self.handler.handle(path, body.to_string().as_bytes())?;
        Ok(serde_json::from_slice(&reply).unwrap())
    }

    fn request(&self, macs: &[&str], key: &Key) -> Assignment {
        let reply = self.post("/v1/machine", &machine(macs, "", key.public())).unwrap();
        serde_json::from_value(reply).unwrap()
    }

    /// Returns the key for the reports of a machine that gets a ticket.
    #[track_caller]
    fn is_assigned(&self, macs: &[&str], key: &Key) -> ReportKey {
        match self.request(macs, key) {
            Assignment::Install(install) => key.open(&install.ticket).unwrap().1,
            Assignment::Run(run) => key.open(&run.ticket).unwrap().1,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn is_refused(&self, macs: &[&str], key: &Key, reason: &str) {
        match self.request(macs, key) {
            Assignment::Nothing { why } => assert!(why.contains(reason), "{why}"),
            other => panic!("{other:?}"),
        }
    }

    fn report(&self, report: &ProgressReport) -> Result<Value> {
        self.post("/v1/news", &serde_json::to_value(report).unwrap())
    }

    /// Returns every file below the folder that dnsmasq serves.
    fn files(&self) -> Vec<String> {
        let walk = walkdir::WalkDir::new(self.served.path()).into_iter().flatten();
        let mut found: Vec<String> = walk
            .filter(|e| e.file_type().is_file())
            .map(|e| e.path().strip_prefix(self.served.path()).unwrap().display().to_string())
            .collect();
        found.sort();
        found
    }

    fn records(&self) -> usize {
        let bytes = fs::read(self.project.path().join("build/netboot/machines.json")).unwrap_or(b"{}".to_vec());
        serde_json::from_slice::<serde_json::Map<String, Value>>(&bytes).unwrap().len()
    }

    fn stored(&self) -> String {
        fs::read_to_string(self.project.path().join("build/netboot/machines.json")).unwrap()
    }
}

#[test]
fn a_mac_address_never_becomes_a_path() {
    let attacked = attacked(&format!("[netboot.machines]\n\"{KNOWN}\" = \"db-1\"\n"));
    let victim = attacked.project.path().join("fleet.key");
    fs::write(&victim, "root of the fleet").unwrap();
    let key = Key::generate().unwrap();
    for name in [victim.to_str().unwrap(), "../../outside", "52:54:00:00:00:0g", "52:54:00:00:00:01\nx"] {
        let _ = attacked.post("/v1/machine", &machine(&[name, KNOWN], "", key.public()));
        let _ = attacked.post("/v1/news", &json!({ "version": 2, "mac": name, "step": "installed" }));
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "root of the fleet");
    assert_eq!(attacked.files(), [""; 0], "the server wrote a file for an invalid MAC address");
    assert_eq!(attacked.records(), 0);
}

#[test]
fn each_rule_gives_one_record_and_one_ticket() {
    let attacked = attacked(&format!("[netboot.machines]\n\"{KNOWN}\" = \"db-1\"\nA1 = \"db-2\"\n"));
    let key = Key::generate().unwrap();
    for i in 0..50 {
        let other = format!("52:54:00:00:01:{i:02x}");
        let _ = attacked.post("/v1/machine", &machine(&[&other, KNOWN], "", key.public()));
        let _ = attacked.post("/v1/machine", &machine(&[&other], "A1", key.public()));
    }
    assert_eq!(attacked.records(), 2);
    let minted = fs::read_to_string(attacked.project.path().join("tickets.jsonl")).unwrap();
    assert_eq!(minted.lines().count(), 2, "{minted}");
}

fn report(key: &Key, step: Step) -> ProgressReport {
    let mac = KNOWN.parse().unwrap();
    ProgressReport { version: 2, mac, step, key: key.public().to_owned(), proof: String::new() }
}

/// `others` matches every MAC address.
#[test]
fn invented_machines_get_at_most_one_ticket_per_node() {
    for (to, places) in [("db", 2), ("db-1", 1)] {
        let attacked = attacked(&format!("[netboot]\nothers = \"{to}\"\n"));
        let key = Key::generate().unwrap();
        for i in 0..300 {
            let _ = attacked.request(&[&format!("52:54:00:00:{:02x}:{:02x}", i / 256, i % 256)], &key);
        }
        assert_eq!(attacked.records(), places);
        let minted = fs::read_to_string(attacked.project.path().join("tickets.jsonl")).unwrap();
        assert_eq!(minted.lines().count(), places);
    }
}

#[test]
fn only_the_confirmed_key_gets_a_founders_ticket() {
    let attacked = attacked(&format!("[netboot.machines]\n\"{KNOWN}\" = \"hub-1\"\n"));
    let (real, hostile) = (Key::generate().unwrap(), Key::generate().unwrap());
    let is_unconfirmed =
        |key: &Key| matches!(attacked.request(&[KNOWN], key), Assignment::Confirm { to } if to == "hub-1");
    assert!(is_unconfirmed(&real) && is_unconfirmed(&hostile));
    assert_eq!(attacked.records(), 0, "the server minted a ticket before the operator confirmed the code");
    // The code of this key for another node, a wrong code, and then the right one.
    attacked.handler.approve(&code(real.public(), "hub-2"));
    attacked.handler.approve("0000-0000-0000-0000");
    assert!(is_unconfirmed(&real));
    attacked.handler.approve(&code(real.public(), "hub-1").to_lowercase());
    assert!(is_unconfirmed(&hostile));
    attacked.is_assigned(&[KNOWN], &real);
    // After a failed download, the same machine gets the same ticket.
    attacked.is_assigned(&[KNOWN], &real);
    // Another key gets no ticket, even if the operator confirms its code. That needs --again.
    attacked.handler.approve(&code(hostile.public(), "hub-1"));
    attacked.is_refused(&[KNOWN], &hostile, "--again 52:54:00:00:00:01");
    attacked.is_refused(&["52:54:00:00:00:77", KNOWN], &hostile, "--again");
    assert_eq!(attacked.records(), 1);
}

#[test]
fn trust_lan_assigns_founders_without_a_code() {
    let attacked = attacked(&format!("[netboot]\ntrust_lan = true\n[netboot.machines]\n\"{KNOWN}\" = \"hub-1\"\n"));
    let (first, second) = (Key::generate().unwrap(), Key::generate().unwrap());
    let proof = attacked.is_assigned(&[KNOWN], &first);
    // After a power failure, the machine boots with another key and needs no operator.
    attacked.is_assigned(&[KNOWN], &second);
    attacked.report(&proof.prove(report(&first, Step::Installed))).unwrap();
    // An unknown MAC address before a known one does not give a second ticket.
    attacked.is_refused(&["52:54:00:00:00:77", KNOWN], &second, "installed before");
    assert_eq!(attacked.records(), 1);
}

#[test]
fn accepts_reports_only_from_the_machine_with_the_ticket() {
    let attacked = attacked(&format!("[netboot.machines]\n\"{KNOWN}\" = \"db-1\"\n"));
    let (real, hostile) = (Key::generate().unwrap(), Key::generate().unwrap());
    let proof = attacked.is_assigned(&[KNOWN], &real);
    let installed = report(&real, Step::Installed);
    let old = json!({ "version": 1, "mac": KNOWN, "step": "installed" });
    assert!(attacked.post("/v1/news", &old).is_err());
    assert!(attacked.report(&installed).is_err());
    let (_, other) = fleet::netboot::seal(b"x", hostile.public()).unwrap();
    assert!(attacked.report(&other.prove(installed.clone())).is_err());
    assert!(attacked.report(&other.prove(report(&hostile, Step::Installed))).is_err());
    assert_eq!(attacked.files(), [""; 0]);
    attacked.is_assigned(&[KNOWN], &real);
    // Each reply seals the ticket again with a new key for reports. The server accepts only the last one.
    let again = attacked.is_assigned(&[KNOWN], &real);
    assert!(attacked.report(&proof.prove(installed.clone())).is_err());
    attacked.report(&again.prove(installed.clone())).unwrap();
    attacked.report(&again.prove(installed)).unwrap();
    assert_eq!(attacked.files(), [format!("{HOSTS}/52-54-00-00-00-01")]);
    attacked.is_refused(&[KNOWN], &real, "installed before");
    assert!(
        !attacked.stored().contains("joiner"),
        "the record has a ticket after the installation: {}",
        attacked.stored()
    );
}

/// A machine lists another machine's MAC address beside its own.
#[test]
fn an_installed_machine_cannot_stop_another_from_booting() {
    let attacked = attacked("[netboot]\nothers = \"app\"\n[netboot.machines]\nA1 = \"db-1\"\n");
    let (victim, key) = (Key::generate().unwrap(), Key::generate().unwrap());
    attacked.is_assigned(&["52:54:00:00:00:0c"], &victim);
    let body = machine(&["52:54:00:00:00:09", "52:54:00:00:00:0c"], "A1", key.public());
    let Assignment::Install(install) = serde_json::from_value(attacked.post("/v1/machine", &body).unwrap()).unwrap()
    else {
        panic!("the server does not install the machine")
    };
    assert_eq!(install.to, "db-1");
    let proof = key.open(&install.ticket).unwrap().1;
    attacked.report(&proof.prove(report(&key, Step::Installed))).unwrap();
    assert_eq!(attacked.files(), [format!("{HOSTS}/52-54-00-00-00-09")]);
}

#[test]
fn the_installer_accepts_only_images_that_its_own_fleet_signed() {
    let rules = format!("[netboot]\ndiskless = [\"app\"]\n[netboot.machines]\n\"{KNOWN}\" = \"app-1\"\n");
    let (one, two) = (attacked(&rules), attacked(&rules));
    let run = |server: &AttackedServer| match server.request(&[KNOWN], &Key::generate().unwrap()) {
        Assignment::Run(run) => run,
        other => panic!("{other:?}"),
    };
    assert_eq!(signed_root(&one.trust, &run(&one)).unwrap(), "0".repeat(64));
    assert!(signed_root(&one.trust, &run(&two)).is_err(), "it accepted an image of another fleet with the same name");
}

#[test]
fn a_stateless_machine_gets_one_ticket_per_start() {
    let rules = format!("[netboot]\ndiskless = [\"app\"]\n[netboot.machines]\n\"{KNOWN}\" = \"app-1\"\n");
    let attacked = attacked(&rules);
    let key = Key::generate().unwrap();
    let mut proof = attacked.is_assigned(&[KNOWN], &key);
    for _ in 0..20 {
        proof = attacked.is_assigned(&[KNOWN], &key);
    }
    let minted = || fs::read_to_string(attacked.project.path().join("tickets.jsonl")).unwrap().lines().count();
    assert_eq!(minted(), 1);
    attacked.report(&proof.prove(report(&key, Step::Started))).unwrap();
    attacked.is_refused(&[KNOWN], &key, "it gets another after");
    assert_eq!(minted(), 1);
}

/// In `machines.json` of the previous version, records have the first MAC address as their name, and keep the ticket.
#[test]
fn reads_records_of_the_previous_version() {
    let mut attacked = attacked(&format!("[netboot.machines]\nA1 = \"db-1\"\n\"{KNOWN}\" = \"hub-1\"\n"));
    let ticket = |to: &str| {
        let authority = FleetKey::create("acme").unwrap();
        let topology = &Project::load(attacked.project.path()).unwrap().topology;
        crate::keys::ticket::mint(&authority, topology, to, &crate::keys::ticket::DEFAULT_TERMS, BTreeMap::new())
            .unwrap()
    };
    let record = |to: &str, minted: u64, installed: Option<u64>| {
        let ticket = ticket(to);
        json!({ "to": to, "ticket": ticket, "minted": minted, "installed": installed, "heir": false })
    };
    let before = json!({
        "52:54:00:00:00:0a": record("db-1", 1, Some(1_700_000_000)),
        KNOWN: record("hub-1", 4_000_000_000, None),
        "/home/op/fleet.key": record("db-2", 1, Some(1)),
    });
    fs::write(attacked.project.path().join("build/netboot/machines.json"), before.to_string()).unwrap();
    let authority = FleetKey::create("acme").unwrap();
    attacked = open(attacked.project, attacked.served, authority);
    let key = Key::generate().unwrap();
    // The rule's serial number matches, so the record applies although the machine has another MAC address.
    let body = machine(&["52:54:00:00:00:0b"], "A1", key.public());
    let reply = attacked.post("/v1/machine", &body).unwrap().to_string();
    assert!(reply.contains("installed before") && reply.contains("--again A1"), "{reply}");
    assert!(matches!(attacked.request(&[KNOWN], &key), Assignment::Confirm { .. }));
    attacked.handler.approve(&code(key.public(), "hub-1"));
    attacked.is_assigned(&[KNOWN], &key);
    assert_eq!(attacked.records(), 3);
}

/// A path in place of a MAC address, over HTTP.
#[test]
fn http_requests_with_a_path_write_no_file() {
    use std::io::{Read as _, Write as _};
    let rules = format!("[netboot.machines]\n\"{KNOWN}\" = \"db-1\"\n");
    let AttackedServer { handler, project, served, .. } = attacked(&rules);
    let victim = project.path().join("fleet.key");
    fs::write(&victim, "root of the fleet").unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            send.send(listener.local_addr().unwrap()).unwrap();
            let handler = Box::new(move |path: &str, body: &[u8]| handler.handle(path, body));
            http_server::serve(listener, Arc::new(FileServer { files: BTreeMap::new(), handler })).await
        })
    });
    let address = receive.recv().unwrap();
    let post = |path: &str, body: &Value| {
        let body = body.to_string();
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}", body.len());
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    };
    let key = Key::generate().unwrap();
    let name = victim.to_str().unwrap();
    let response = post("/v1/machine", &machine(&[name, KNOWN], "", key.public()));
    assert!(response.starts_with("HTTP/1.1 400"), "{response}");
    let response = post("/v1/news", &json!({ "version": 2, "mac": name, "step": "installed" }));
    assert!(response.starts_with("HTTP/1.1 400"), "{response}");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "root of the fleet");
    assert_eq!(walkdir::WalkDir::new(served.path().join(HOSTS)).into_iter().count(), 1);
    // The server still serves the machine itself.
    let response = post("/v1/machine", &machine(&[KNOWN], "", key.public()));
    assert!(response.starts_with("HTTP/1.1 200") && response.contains("\"install\""), "{response}");
}
