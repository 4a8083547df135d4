use std::collections::BTreeMap;
use std::fs;

use fleet::{Credential, Topology};

use super::*;
use crate::keys::authority::FleetKey;
use crate::keys::ticket::{DEFAULT_TERMS, TicketTerms, mint};

const ONE: &str = "52:54:00:00:00:01";

struct Acme {
    topology: Topology,
    authority: FleetKey,
}

fn acme() -> Acme {
    let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\napp.count = 3\nmonitor.count = 1\n";
    let topology = Topology::from_fleet(&fleet::Fleet::parse("f", toml).unwrap());
    Acme { topology, authority: FleetKey::create("acme").unwrap() }
}

impl Plan for Acme {
    fn group_of(&self, to: &str) -> String {
        self.topology.node(to).map_or(to.to_owned(), |n| n.group.clone())
    }
    fn slots(&self, group: &str) -> Vec<String> {
        self.topology.nodes.iter().filter(|n| n.group == group).map(|n| n.name.clone()).collect()
    }
    fn is_founder(&self, to: &str) -> bool {
        self.topology.node(to).is_some_and(|n| self.topology.is_founder(n))
    }
    fn is_volatile(&self, group: &str) -> bool {
        group == "app"
    }
    fn disk(&self, _: &str, mode: &InstallMode) -> u64 {
        if matches!(mode, InstallMode::Run(_)) { 50 } else { 100 }
    }
    fn memory(&self, _: &str) -> u64 {
        1000
    }
    fn mint(&self, to: &str, replace: bool) -> Result<Ticket> {
        mint(&self.authority, &self.topology, to, &TicketTerms { replace, ..DEFAULT_TERMS }, BTreeMap::new())
    }
}

/// Returns a ticket's slot or group, and whether it replaces the slot's owner.
fn target(ticket: &Ticket) -> (String, bool) {
    match &ticket.right {
        Credential::Founder(founder) => (founder.slot.clone(), founder.replaces.is_some()),
        Credential::Joiner(joiner) => {
            let claims = joiner.token.read().unwrap();
            (claims.slot.unwrap_or(claims.group), claims.replace)
        }
    }
}

/// Rules with `trust_lan`. The tests with codes are in `attacks.rs`.
fn rules() -> Netboot {
    let machines = [(ONE, "hub-1"), ("A1", "db-9"), ("A2", "app-2"), ("A3", "monitor")];
    let machines = machines.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let diskless = vec!["app".into(), "monitor".into()];
    Netboot { machines, others: None, diskless, disk: None, trust_lan: true }
}

fn machine(mac: &str, serial: &str, disks: &[(&str, u64, bool)]) -> NetbootMachine {
    let disks = disks.iter().map(|&(path, size, removable)| MachineDisk { path: path.into(), size, removable });
    NetbootMachine {
        version: NetbootMachine::VERSION,
        macs: vec![mac.parse().unwrap()],
        serial: serial.into(),
        disks: disks.collect(),
        memory: 1000,
        key: "its key".into(),
    }
}

#[track_caller]
fn assigned(decision: RegistryDecision) -> Decision {
    match decision {
        RegistryDecision::Assigned(decision) => decision,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(decision: RegistryDecision, reason: &str) {
    match decision {
        RegistryDecision::Refused(why) => assert!(why.contains(reason), "{why}"),
        other => panic!("{other:?}"),
    }
}

const DISK: [(&str, u64, bool); 2] = [("/dev/vda", 200, false), ("/dev/sda", 200, true)];

#[test]
fn assigns_only_suitable_machines_that_a_rule_names() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut registry = MachineRegistry::open(dir.path(), &rules()).unwrap();
    let mut decide = |m: &NetbootMachine| registry.decide(m, &acme).unwrap();
    refused(decide(&machine("52:54:00:00:00:09", "", &DISK)), "[netboot.machines] \"52:54:00:00:00:09\"");
    refused(decide(&machine(ONE, "", &[])), "no disk");
    refused(decide(&machine(ONE, "", &[("/dev/vda", 99, false)])), "too small");
    refused(decide(&machine(ONE, "", &[("/dev/a", 200, false), ("/dev/b", 200, false)])), "several disks");
    refused(decide(&machine("52:54:00:00:00:02", "A1", &DISK)), "there is no node or group `db-9`");
    refused(decide(&NetbootMachine { version: 1, ..machine(ONE, "", &DISK) }), "another version");
    refused(decide(&NetbootMachine { macs: Vec::new(), ..machine(ONE, "", &DISK) }), "without a network card");
    refused(decide(&machine(ONE, &"x".repeat(1000), &DISK)), "longer than 256 bytes");
    let decision = assigned(decide(&machine(ONE, "", &DISK)));
    assert_eq!((decision.to.as_str(), decision.mode), ("hub-1", InstallMode::Install("/dev/vda".into())));
}

/// Each request goes to a restarted server.
#[test]
fn reuses_the_ticket_until_the_machine_is_installed() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let open = || MachineRegistry::open(dir.path(), &rules()).unwrap();
    let decide = || open().decide(&machine(ONE, "", &DISK), &acme).unwrap();
    let first = assigned(decide()).ticket;
    assert!(assigned(decide()).ticket == first);
    let key = fleet::netboot::Key::generate().unwrap();
    let (sealed, server) = fleet::netboot::seal(b"x", key.public()).unwrap();
    open().trust_reports(ONE, key.public(), server).unwrap();
    let report = ProgressReport {
        version: NetbootMachine::VERSION,
        mac: ONE.parse().unwrap(),
        step: Step::Installed,
        key: key.public().to_owned(),
        proof: String::new(),
    };
    assert_eq!(open().accept_report(&report).unwrap(), None);
    let report = key.open(&sealed).unwrap().1.prove(report);
    let accepted = open().accept_report(&report).unwrap();
    assert_eq!(accepted, Some(AcceptedReport { name: ONE.to_owned(), to: "hub-1".to_owned() }));
    assert_eq!(open().installed(), BTreeSet::from([ONE.parse().unwrap()]));
    refused(decide(), "--again 52:54:00:00:00:01");
    assert!(open().again("52:54:00:00:00:09").is_err());
    open().again("52:54:00:00:00:01").unwrap();
    // The report belongs to the previous boot.
    assert_eq!(open().accept_report(&report).unwrap(), None);
    let again = assigned(decide()).ticket;
    assert_eq!(target(&again), ("hub-1".to_owned(), true));
    assert!(assigned(decide()).ticket == again);
    let audit = fs::read_to_string(dir.path().join("audit.jsonl")).unwrap();
    assert_eq!(audit.lines().count(), 5, "{audit}");
    assert!(!audit.contains("joiner"), "a ticket is in the log: {audit}");
}

/// The power failed during the installation. In a new fleet, no hub could accept a ticket that replaces an owner.
#[test]
fn a_machine_that_was_not_installed_replaces_no_owner() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut registry = MachineRegistry::open(dir.path(), &rules()).unwrap();
    let first = assigned(registry.decide(&machine(ONE, "", &DISK), &acme).unwrap()).ticket;
    registry.again(ONE).unwrap();
    let second = assigned(registry.decide(&machine(ONE, "", &DISK), &acme).unwrap()).ticket;
    assert!(first != second);
    assert_eq!(target(&second), ("hub-1".to_owned(), false));
}

#[test]
fn option_again_accepts_each_name_of_a_machine() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut registry = MachineRegistry::open(dir.path(), &rules()).unwrap();
    assigned(registry.decide(&machine("52:54:00:00:00:0A", "A3", &DISK), &acme).unwrap());
    registry.again("A3").unwrap();
    registry.again("52:54:00:00:00:0A").unwrap();
    assert!(registry.again("52:54:00:00:00:0b").unwrap_err().to_string().contains("known machines are: A3"));
}

#[test]
fn a_stateless_machine_keeps_its_slot_and_replaces_itself() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut registry = MachineRegistry::open(dir.path(), &Netboot { others: Some("app".into()), ..rules() }).unwrap();
    for (mac, to) in [("52:54:00:00:00:11", "app-1"), ("52:54:00:00:00:12", "app-3")] {
        let first = assigned(registry.decide(&machine(mac, "", &[]), &acme).unwrap());
        assert_eq!((first.to.as_str(), &first.mode), (to, &InstallMode::Run(None)));
        assert_eq!(target(&first.ticket), (to.to_owned(), false));
        // The machine started some time ago.
        let record = registry.records.all.get_mut(mac).unwrap();
        (record.started, record.minted) = (true, record.minted - MIN_TICKET_INTERVAL);
        let again = assigned(registry.decide(&machine(mac, "", &[]), &acme).unwrap());
        assert_eq!(again.to, to);
        assert_eq!(target(&again.ticket), (to.to_owned(), true));
    }
    let mut decide = |m: &NetbootMachine| registry.decide(m, &acme).unwrap();
    refused(decide(&machine("52:54:00:00:00:13", "", &[])), "other machines have every node");
    refused(decide(&NetbootMachine { memory: 999, ..machine("52:54:00:00:00:11", "", &[]) }), "of memory");
    assert_eq!(assigned(decide(&machine("52:54:00:00:00:14", "A2", &[]))).to, "app-2");
}

#[test]
fn a_machine_with_state_runs_from_memory_with_var_on_a_disk() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut registry =
        MachineRegistry::open(dir.path(), &Netboot { others: Some("monitor".into()), ..rules() }).unwrap();
    let mut decide = |disks: &[_]| registry.decide(&machine("52:54:00:00:00:21", "A3", disks), &acme).unwrap();
    refused(decide(&[]), "no disk");
    refused(decide(&[("/dev/vda", 49, false)]), "too small");
    let first = assigned(decide(&[("/dev/vda", 50, false)]));
    assert_eq!((first.to.as_str(), first.mode), ("monitor", InstallMode::Run(Some("/dev/vda".into()))));
    refused(registry.decide(&machine("52:54:00:00:00:22", "", &[]), &acme).unwrap(), "every node of `monitor`");
    let mut decide = |disks: &[_]| registry.decide(&machine("52:54:00:00:00:21", "A3", disks), &acme).unwrap();
    // The machine's state is on the disk, so the same ticket serves for another boot, whether it has joined or not.
    assert!(assigned(decide(&[("/dev/vda", 50, false)])).ticket == first.ticket);
}

#[test]
fn old_unused_ticket_requires_option_again() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut registry = MachineRegistry::open(dir.path(), &rules()).unwrap();
    assigned(registry.decide(&machine(ONE, "", &DISK), &acme).unwrap());
    registry.records.all.get_mut(ONE).unwrap().minted -= MAX_TICKET_AGE;
    refused(registry.decide(&machine(ONE, "", &DISK), &acme).unwrap(), "--again 52:54:00:00:00:01");
}
