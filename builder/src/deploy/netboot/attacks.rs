//! Requests of a hostile host on the PXE network, against the server's own request handler.

use std::collections::BTreeMap;

use fleet::netboot::{Assignment, Extent, ImageStatement, ProgressReport, Step};
use fleet::netboot::{Key, ReportKey, code, signed_root};
use serde_json::{Value, json};

use super::*;
use crate::progress::Progress;

/// MAC address that fleet.toml names.
const KNOWN: &str = "52:54:00:00:00:01";

pub(super) struct Attacked {
    pub front: NetbootHandler,
    pub project: tempfile::TempDir,
    pub served: tempfile::TempDir,
    trust: InstallerTrust,
}

pub(super) fn attacked(rules: &str) -> Attacked {
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

/// A server that starts with what an earlier one kept.
fn open(project: tempfile::TempDir, served: tempfile::TempDir, authority: FleetKey) -> Attacked {
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
    let desk = MachineRegistry::open(&project.path().join(RECORDS), &rules).unwrap();
    let fleet = FleetPlan { authority, project: loaded, offers };
    let front = NetbootHandler::new(
        fleet,
        desk,
        served.path().to_owned(),
        NetbootProgress::new(Progress::new(true, false), false),
    );
    Attacked { front, project, served, trust }
}

fn machine(macs: &[&str], serial: &str, key: &str) -> Value {
    let disk = json!({ "path": "/dev/vda", "size": 1_u64 << 40, "removable": false });
    json!({ "version": 2, "macs": macs, "serial": serial, "disks": [disk], "memory": 1_u64 << 40, "key": key })
}

impl Attacked {
    fn post(&self, path: &str, body: &Value) -> Result<Value, String> {
        let answer = self.front.answer(path, body.to_string().as_bytes())?;
        Ok(serde_json::from_slice(&answer).unwrap())
    }

    fn ask(&self, macs: &[&str], key: &Key) -> Assignment {
        let answer = self.post("/v1/machine", &machine(macs, "", key.public())).unwrap();
        serde_json::from_value(answer).unwrap()
    }

    /// The key for the reports of a machine that is to be installed or run.
    #[track_caller]
    fn is_assigned(&self, macs: &[&str], key: &Key) -> ReportKey {
        match self.ask(macs, key) {
            Assignment::Install(install) => key.open(&install.ticket).unwrap().1,
            Assignment::Run(run) => key.open(&run.ticket).unwrap().1,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn is_refused(&self, macs: &[&str], key: &Key, words: &str) {
        match self.ask(macs, key) {
            Assignment::Nothing { why } => assert!(why.contains(words), "{why}"),
            other => panic!("{other:?}"),
        }
    }

    fn tell(&self, news: &ProgressReport) -> Result<Value, String> {
        self.post("/v1/news", &serde_json::to_value(news).unwrap())
    }

    /// Every file below the server's folders.
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

    fn kept(&self) -> String {
        fs::read_to_string(self.project.path().join("build/netboot/machines.json")).unwrap()
    }
}

#[test]
fn a_mac_address_is_no_path() {
    let attacked = attacked(&format!("[netboot.machines]\n\"{KNOWN}\" = \"db-1\"\n"));
    let victim = attacked.project.path().join("fleet.key");
    fs::write(&victim, "root of the fleet").unwrap();
    let key = Key::generate().unwrap();
    for name in [victim.to_str().unwrap(), "../../outside", "52:54:00:00:00:0g", "52:54:00:00:00:01\nx"] {
        let _ = attacked.post("/v1/machine", &machine(&[name, KNOWN], "", key.public()));
        let _ = attacked.post("/v1/news", &json!({ "version": 2, "mac": name, "step": "installed" }));
    }
    assert_eq!(fs::read_to_string(&victim).unwrap(), "root of the fleet");
    assert_eq!(attacked.files(), [""; 0], "the server wrote a file for a name that is no MAC address");
    assert_eq!(attacked.records(), 0);
}

#[test]
fn one_rule_is_one_record_and_one_ticket_whatever_the_first_mac_address() {
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

fn news(key: &Key, step: Step) -> ProgressReport {
    let mac = KNOWN.parse().unwrap();
    ProgressReport { version: 2, mac, step, key: key.public().to_owned(), proof: String::new() }
}

/// With `others`, no MAC address need be known: still no more records than the group has nodes.
#[test]
fn made_up_machines_get_no_more_tickets_than_there_are_nodes() {
    for (to, places) in [("db", 2), ("db-1", 1)] {
        let attacked = attacked(&format!("[netboot]\nothers = \"{to}\"\n"));
        let key = Key::generate().unwrap();
        for i in 0..300 {
            let _ = attacked.ask(&[&format!("52:54:00:00:{:02x}:{:02x}", i / 256, i % 256)], &key);
        }
        assert_eq!(attacked.records(), places);
        let minted = fs::read_to_string(attacked.project.path().join("tickets.jsonl")).unwrap();
        assert_eq!(minted.lines().count(), places);
    }
}

#[test]
fn a_founders_ticket_goes_to_the_key_that_the_operator_confirmed() {
    let attacked = attacked(&format!("[netboot.machines]\n\"{KNOWN}\" = \"hub-1\"\n"));
    let (real, hostile) = (Key::generate().unwrap(), Key::generate().unwrap());
    let is_unconfirmed = |key: &Key| matches!(attacked.ask(&[KNOWN], key), Assignment::Confirm { to } if to == "hub-1");
    assert!(is_unconfirmed(&real) && is_unconfirmed(&hostile));
    assert_eq!(attacked.records(), 0, "a ticket was minted before the code was confirmed");
    // The code of this key for another node, a wrong code, the right one.
    attacked.front.approve(&code(real.public(), "hub-2"));
    attacked.front.approve("0000-0000-0000-0000");
    assert!(is_unconfirmed(&real));
    attacked.front.approve(&code(real.public(), "hub-1").to_lowercase());
    assert!(is_unconfirmed(&hostile));
    attacked.is_assigned(&[KNOWN], &real);
    // A download that failed: the same machine gets the same ticket.
    attacked.is_assigned(&[KNOWN], &real);
    // Another key does not, not even one that is confirmed: --again has to say that this is meant.
    attacked.front.approve(&code(hostile.public(), "hub-1"));
    attacked.is_refused(&[KNOWN], &hostile, "--again 52:54:00:00:00:01");
    attacked.is_refused(&["52:54:00:00:00:77", KNOWN], &hostile, "--again");
    assert_eq!(attacked.records(), 1);
}

#[test]
fn trust_in_the_network_is_said_in_fleet_toml() {
    let attacked = attacked(&format!("[netboot]\ntrust_lan = true\n[netboot.machines]\n\"{KNOWN}\" = \"hub-1\"\n"));
    let (first, second) = (Key::generate().unwrap(), Key::generate().unwrap());
    let proof = attacked.is_assigned(&[KNOWN], &first);
    // Its power failed: it starts over with another key and needs no one.
    attacked.is_assigned(&[KNOWN], &second);
    attacked.tell(&proof.prove(news(&first, Step::Installed))).unwrap();
    // The second founder's ticket: a known MAC address behind one that is not.
    attacked.is_refused(&["52:54:00:00:00:77", KNOWN], &second, "installed before");
    assert_eq!(attacked.records(), 1);
}

#[test]
fn news_are_believed_of_the_machine_that_has_the_ticket_and_of_no_other() {
    let attacked = attacked(&format!("[netboot.machines]\n\"{KNOWN}\" = \"db-1\"\n"));
    let (real, hostile) = (Key::generate().unwrap(), Key::generate().unwrap());
    let proof = attacked.is_assigned(&[KNOWN], &real);
    let installed = news(&real, Step::Installed);
    let old = json!({ "version": 1, "mac": KNOWN, "step": "installed" });
    assert!(attacked.post("/v1/news", &old).is_err());
    assert!(attacked.tell(&installed).is_err());
    let (_, other) = fleet::netboot::seal(b"x", hostile.public()).unwrap();
    assert!(attacked.tell(&other.prove(installed.clone())).is_err());
    assert!(attacked.tell(&other.prove(news(&hostile, Step::Installed))).is_err());
    assert_eq!(attacked.files(), [""; 0]);
    attacked.is_assigned(&[KNOWN], &real);
    // The answers differ, and so do the proofs: the last one counts.
    let again = attacked.is_assigned(&[KNOWN], &real);
    assert!(attacked.tell(&proof.prove(installed.clone())).is_err());
    attacked.tell(&again.prove(installed.clone())).unwrap();
    attacked.tell(&again.prove(installed)).unwrap();
    assert_eq!(attacked.files(), [format!("{HOSTS}/52-54-00-00-00-01")]);
    attacked.is_refused(&[KNOWN], &real, "installed before");
    assert!(!attacked.kept().contains("joiner"), "the ticket is kept after the disk has it: {}", attacked.kept());
}

/// A machine that says another's MAC address beside its own does not keep that one from booting.
#[test]
fn an_installed_machine_keeps_no_other_from_booting() {
    let attacked = attacked("[netboot]\nothers = \"app\"\n[netboot.machines]\nA1 = \"db-1\"\n");
    let (victim, key) = (Key::generate().unwrap(), Key::generate().unwrap());
    attacked.is_assigned(&["52:54:00:00:00:0c"], &victim);
    let body = machine(&["52:54:00:00:00:09", "52:54:00:00:00:0c"], "A1", key.public());
    let Assignment::Install(install) = serde_json::from_value(attacked.post("/v1/machine", &body).unwrap()).unwrap()
    else {
        panic!("it is to be installed")
    };
    assert_eq!(install.to, "db-1");
    let proof = key.open(&install.ticket).unwrap().1;
    attacked.tell(&proof.prove(news(&key, Step::Installed))).unwrap();
    assert_eq!(attacked.files(), [format!("{HOSTS}/52-54-00-00-00-09")]);
}

/// What the server says of an image is what the installer believes, and no more.
#[test]
fn the_installer_believes_the_server_of_its_own_fleet() {
    let rules = format!("[netboot]\ndiskless = [\"app\"]\n[netboot.machines]\n\"{KNOWN}\" = \"app-1\"\n");
    let (one, two) = (attacked(&rules), attacked(&rules));
    let run = |of: &Attacked| match of.ask(&[KNOWN], &Key::generate().unwrap()) {
        Assignment::Run(run) => run,
        other => panic!("{other:?}"),
    };
    assert_eq!(signed_root(&one.trust, &run(&one)).unwrap(), "0".repeat(64));
    assert!(signed_root(&one.trust, &run(&two)).is_err(), "another fleet of the same name");
}

/// Tickets of machines that keep nothing are one for a start.
#[test]
fn a_machine_that_keeps_nothing_gets_one_ticket_for_a_start() {
    let rules = format!("[netboot]\ndiskless = [\"app\"]\n[netboot.machines]\n\"{KNOWN}\" = \"app-1\"\n");
    let attacked = attacked(&rules);
    let key = Key::generate().unwrap();
    let mut proof = attacked.is_assigned(&[KNOWN], &key);
    for _ in 0..20 {
        proof = attacked.is_assigned(&[KNOWN], &key);
    }
    let minted = || fs::read_to_string(attacked.project.path().join("tickets.jsonl")).unwrap().lines().count();
    assert_eq!(minted(), 1);
    attacked.tell(&proof.prove(news(&key, Step::Started))).unwrap();
    attacked.is_refused(&[KNOWN], &key, "it gets another after");
    assert_eq!(minted(), 1);
}

/// `machines.json` of the version before: the first MAC address of the machine is its name, and the ticket is there.
#[test]
fn records_of_the_version_before_are_read() {
    let mut attacked = attacked(&format!("[netboot.machines]\nA1 = \"db-1\"\n\"{KNOWN}\" = \"hub-1\"\n"));
    let ticket = |to: &str| {
        let authority = FleetKey::create("acme").unwrap();
        let topology = &Project::load(attacked.project.path()).unwrap().topology;
        crate::keys::ticket::mint(&authority, topology, to, &crate::keys::ticket::DEFAULT_TERMS, BTreeMap::new())
            .unwrap()
    };
    let before = json!({
        "52:54:00:00:00:0a": { "to": "db-1", "ticket": ticket("db-1"), "minted": 1, "installed": 1_700_000_000, "heir": false },
        KNOWN: { "to": "hub-1", "ticket": ticket("hub-1"), "minted": 4_000_000_000_u64, "installed": null, "heir": false },
        "/home/op/fleet.key": { "to": "db-2", "ticket": ticket("db-2"), "minted": 1, "installed": 1, "heir": false },
    });
    fs::write(attacked.project.path().join("build/netboot/machines.json"), before.to_string()).unwrap();
    let authority = FleetKey::create("acme").unwrap();
    attacked = open(attacked.project, attacked.served, authority);
    let key = Key::generate().unwrap();
    // It is installed, and its first MAC address does not matter any more.
    let body = machine(&["52:54:00:00:00:0b"], "A1", key.public());
    let answer = attacked.post("/v1/machine", &body).unwrap().to_string();
    assert!(answer.contains("installed before") && answer.contains("--again A1"), "{answer}");
    assert!(matches!(attacked.ask(&[KNOWN], &key), Assignment::Confirm { .. }));
    attacked.front.approve(&code(key.public(), "hub-1"));
    attacked.is_assigned(&[KNOWN], &key);
    assert_eq!(attacked.records(), 3);
}

/// The attack as it came: two requests over HTTP.
#[test]
fn two_requests_over_http_write_no_file() {
    use std::io::{Read as _, Write as _};
    let Attacked { front, project, served, .. } = attacked(&format!("[netboot.machines]\n\"{KNOWN}\" = \"db-1\"\n"));
    let victim = project.path().join("fleet.key");
    fs::write(&victim, "root of the fleet").unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            tell.send(listener.local_addr().unwrap()).unwrap();
            let desk = Box::new(move |path: &str, body: &[u8]| front.answer(path, body));
            http_server::serve(listener, Arc::new(FileServer { files: BTreeMap::new(), desk })).await
        })
    });
    let to = told.recv().unwrap();
    let post = |path: &str, body: &Value| {
        let body = body.to_string();
        let mut stream = std::net::TcpStream::connect(to).unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}", body.len());
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let key = Key::generate().unwrap();
    let name = victim.to_str().unwrap();
    let answer = post("/v1/machine", &machine(&[name, KNOWN], "", key.public()));
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let answer = post("/v1/news", &json!({ "version": 2, "mac": name, "step": "installed" }));
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    assert_eq!(fs::read_to_string(&victim).unwrap(), "root of the fleet");
    assert_eq!(walkdir::WalkDir::new(served.path().join(HOSTS)).into_iter().count(), 1);
    // The machine itself is answered.
    let answer = post("/v1/machine", &machine(&[KNOWN], "", key.public()));
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"install\""), "{answer}");
}
