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
    let topology = Topology::of(&fleet::Fleet::parse("f", toml).unwrap());
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
    fn disk(&self, _: &str, way: &InstallMode) -> u64 {
        if matches!(way, InstallMode::Run(_)) { 50 } else { 100 }
    }
    fn memory(&self, _: &str) -> u64 {
        1000
    }
    fn mint(&self, to: &str, replace: bool) -> Result<Ticket> {
        mint(&self.authority, &self.topology, to, &TicketTerms { replace, ..DEFAULT_TERMS }, BTreeMap::new())
    }
}

/// Slot or group that a ticket is good for, and whether it takes its owner's place.
fn right(ticket: &Ticket) -> (String, bool) {
    match &ticket.right {
        Credential::Founder(founder) => (founder.slot.clone(), founder.replaces.is_some()),
        Credential::Joiner(joiner) => {
            let claims = joiner.token.read().unwrap();
            (claims.slot.unwrap_or(claims.group), claims.replace)
        }
    }
}

/// The operator trusts the network: what only a code is asked for is in `attacks.rs`.
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
fn yes(answer: RegistryDecision) -> Decision {
    match answer {
        RegistryDecision::Assigned(decision) => decision,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn no(answer: RegistryDecision, words: &str) {
    match answer {
        RegistryDecision::Refused(why) => assert!(why.contains(words), "{why}"),
        other => panic!("{other:?}"),
    }
}

const DISK: [(&str, u64, bool); 2] = [("/dev/vda", 200, false), ("/dev/sda", 200, true)];

#[test]
fn who_is_named_is_told_and_nobody_else() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut desk = MachineRegistry::open(dir.path(), &rules()).unwrap();
    let mut ask = |m: &NetbootMachine| desk.decide(m, &acme).unwrap();
    no(ask(&machine("52:54:00:00:00:09", "", &DISK)), "[netboot.machines] \"52:54:00:00:00:09\"");
    no(ask(&machine(ONE, "", &[])), "no disk");
    no(ask(&machine(ONE, "", &[("/dev/vda", 99, false)])), "too small");
    no(ask(&machine(ONE, "", &[("/dev/a", 200, false), ("/dev/b", 200, false)])), "several disks");
    no(ask(&machine("52:54:00:00:00:02", "A1", &DISK)), "there is no node or group `db-9`");
    no(ask(&NetbootMachine { version: 1, ..machine(ONE, "", &DISK) }), "another version");
    no(ask(&NetbootMachine { macs: Vec::new(), ..machine(ONE, "", &DISK) }), "without a network card");
    no(ask(&machine(ONE, &"x".repeat(1000), &DISK)), "more than 256 bytes");
    let told = yes(ask(&machine(ONE, "", &DISK)));
    assert_eq!((told.to.as_str(), told.way), ("hub-1", InstallMode::Install("/dev/vda".into())));
}

#[test]
fn a_machine_gets_its_ticket_again_until_it_is_installed_also_from_a_server_that_was_restarted() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let open = || MachineRegistry::open(dir.path(), &rules()).unwrap();
    let ask = || open().decide(&machine(ONE, "", &DISK), &acme).unwrap();
    let first = yes(ask()).ticket;
    assert!(yes(ask()).ticket == first);
    let key = fleet::netboot::Key::generate().unwrap();
    let (sealed, server) = fleet::netboot::seal(b"x", key.public()).unwrap();
    open().believe(ONE, key.public(), server).unwrap();
    let news = ProgressReport {
        version: NetbootMachine::VERSION,
        mac: ONE.parse().unwrap(),
        step: Step::Installed,
        key: key.public().to_owned(),
        proof: String::new(),
    };
    assert_eq!(open().hear(&news).unwrap(), None);
    let news = key.open(&sealed).unwrap().1.prove(news);
    let heard = open().hear(&news).unwrap();
    assert_eq!(heard, Some(AcceptedReport { name: ONE.to_owned(), to: "hub-1".to_owned() }));
    assert_eq!(open().installed(), BTreeSet::from([ONE.parse().unwrap()]));
    no(ask(), "--again 52:54:00:00:00:01");
    assert!(open().again("52:54:00:00:00:09").is_err());
    open().again("52:54:00:00:00:01").unwrap();
    // What was said before is of the boot before.
    assert_eq!(open().hear(&news).unwrap(), None);
    let again = yes(ask()).ticket;
    assert_eq!(right(&again), ("hub-1".to_owned(), true));
    assert!(yes(ask()).ticket == again);
    let audit = fs::read_to_string(dir.path().join("audit.jsonl")).unwrap();
    assert_eq!(audit.lines().count(), 5, "{audit}");
    assert!(!audit.contains("joiner"), "a ticket is in the log: {audit}");
}

/// Its power failed before the image was on its disk. It takes no place from itself: in a new fleet no hub could
/// allow that.
#[test]
fn a_machine_that_was_not_installed_takes_no_place() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut desk = MachineRegistry::open(dir.path(), &rules()).unwrap();
    let first = yes(desk.decide(&machine(ONE, "", &DISK), &acme).unwrap()).ticket;
    desk.again(ONE).unwrap();
    let second = yes(desk.decide(&machine(ONE, "", &DISK), &acme).unwrap()).ticket;
    assert!(first != second);
    assert_eq!(right(&second), ("hub-1".to_owned(), false));
}

#[test]
fn a_machine_is_named_again_by_any_of_its_cards() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut desk = MachineRegistry::open(dir.path(), &rules()).unwrap();
    yes(desk.decide(&machine("52:54:00:00:00:0A", "A3", &DISK), &acme).unwrap());
    desk.again("A3").unwrap();
    desk.again("52:54:00:00:00:0A").unwrap();
    assert!(desk.again("52:54:00:00:00:0b").unwrap_err().to_string().contains("known are: A3"));
}

#[test]
fn what_keeps_nothing_has_the_same_slot_at_each_start_and_takes_it_from_itself() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut desk = MachineRegistry::open(dir.path(), &Netboot { others: Some("app".into()), ..rules() }).unwrap();
    for (mac, to) in [("52:54:00:00:00:11", "app-1"), ("52:54:00:00:00:12", "app-3")] {
        let first = yes(desk.decide(&machine(mac, "", &[]), &acme).unwrap());
        assert_eq!((first.to.as_str(), &first.way), (to, &InstallMode::Run(None)));
        assert_eq!(right(&first.ticket), (to.to_owned(), false));
        // It started, some time ago.
        let record = desk.records.all.get_mut(mac).unwrap();
        (record.started, record.minted) = (true, record.minted - BETWEEN);
        let again = yes(desk.decide(&machine(mac, "", &[]), &acme).unwrap());
        assert_eq!(again.to, to);
        assert_eq!(right(&again.ticket), (to.to_owned(), true));
    }
    let mut ask = |m: &NetbootMachine| desk.decide(m, &acme).unwrap();
    no(ask(&machine("52:54:00:00:00:13", "", &[])), "another machine's");
    no(ask(&NetbootMachine { memory: 999, ..machine("52:54:00:00:00:11", "", &[]) }), "of memory");
    assert_eq!(yes(ask(&machine("52:54:00:00:00:14", "A2", &[]))).to, "app-2");
}

#[test]
fn what_keeps_something_keeps_it_on_a_disk() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut desk = MachineRegistry::open(dir.path(), &Netboot { others: Some("monitor".into()), ..rules() }).unwrap();
    let mut ask = |disks: &[_]| desk.decide(&machine("52:54:00:00:00:21", "A3", disks), &acme).unwrap();
    no(ask(&[]), "no disk");
    no(ask(&[("/dev/vda", 49, false)]), "too small");
    let first = yes(ask(&[("/dev/vda", 50, false)]));
    assert_eq!((first.to.as_str(), first.way), ("monitor", InstallMode::Run(Some("/dev/vda".into()))));
    no(desk.decide(&machine("52:54:00:00:00:22", "", &[]), &acme).unwrap(), "every node of `monitor`");
    let mut ask = |disks: &[_]| desk.decide(&machine("52:54:00:00:00:21", "A3", disks), &acme).unwrap();
    // It has joined with it, or not: the same is good for both.
    assert!(yes(ask(&[("/dev/vda", 50, false)])).ticket == first.ticket);
}

#[test]
fn a_ticket_that_is_too_old_to_be_installed_is_not_renewed_by_itself() {
    let acme = acme();
    let dir = tempfile::tempdir().unwrap();
    let mut desk = MachineRegistry::open(dir.path(), &rules()).unwrap();
    yes(desk.decide(&machine(ONE, "", &DISK), &acme).unwrap());
    desk.records.all.get_mut(ONE).unwrap().minted -= GOOD_FOR;
    no(desk.decide(&machine(ONE, "", &DISK), &acme).unwrap(), "--again 52:54:00:00:00:01");
}
