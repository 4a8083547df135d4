//! Which machine becomes what, and how far each is. Kept in a file: a server that was stopped goes
//! on where it was, and a machine whose power failed gets the same ticket again.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::netboot::{Machine, MachineDisk, News, Step};
use fleet::{Netboot, Ticket};
use serde::{Deserialize, Serialize};

use crate::authority::write_private;
use crate::bake::pretty_json;
use crate::error::{Error, Result};

/// A ticket is handed out again for so long, in seconds; then there is a new one.
const GOOD_FOR: u64 = 6 * 86_400;

/// What is known of a machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    to: String,
    ticket: Ticket,
    /// Seconds since 1970.
    minted: u64,
    installed: Option<u64>,
    /// It was this node before, with keys that are gone.
    heir: bool,
}

/// Machines by the MAC address that they boot from.
pub struct Desk {
    rules: Netboot,
    path: PathBuf,
    audit: PathBuf,
    known: BTreeMap<String, Record>,
}

/// What a machine is to be.
#[derive(Clone, Debug)]
pub struct Decision {
    pub to: String,
    pub way: Way,
    pub ticket: Ticket,
}

/// Where its image goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// To this disk.
    Install(String),
    /// To its memory; what it keeps goes to this disk, if it keeps something.
    Run(Option<String>),
}

/// What is known of the fleet, as far as it is asked for here.
pub trait Plan {
    fn group_of(&self, to: &str) -> String;
    fn slots(&self, group: &str) -> Vec<String>;
    /// Whether nothing needs to be kept.
    fn is_volatile(&self, group: &str) -> bool;
    /// Bytes that it needs of the disk that it is on, or that /var is on.
    fn disk(&self, group: &str, way: &Way) -> u64;
    /// Bytes that it needs when it runs from memory.
    fn memory(&self, group: &str) -> u64;
    /// A ticket, which takes the place of whoever has it if `replace` says so.
    fn mint(&self, to: &str, replace: bool) -> Result<Ticket>;
}

impl Desk {
    /// The records of the fleet whose folder for them this is.
    ///
    /// # Errors
    /// The file was damaged.
    pub fn open(dir: &Path, rules: &Netboot) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let path = dir.join("machines.json");
        let known = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| Error::Failed(format!("{} is damaged ({e}); remove it to begin anew", path.display())))?,
            Err(_) => BTreeMap::new(),
        };
        Ok(Self { rules: rules.clone(), path, audit: dir.join("audit.jsonl"), known })
    }

    /// Has a machine installed again, in the place that it had.
    ///
    /// # Errors
    /// It is not known; the disk is full.
    pub fn again(&mut self, mac: &str) -> Result<()> {
        let Some(record) = self.known.get_mut(mac) else {
            let known: Vec<&str> = self.known.keys().map(String::as_str).collect();
            return Err(Error::Usage(format!("no machine `{mac}` was installed; known are: {}", known.join(", "))));
        };
        *record = Record { installed: None, minted: 0, heir: true, ..record.clone() };
        self.store()
    }

    /// MAC addresses of machines that have their node on their disks.
    pub fn installed(&self) -> impl Iterator<Item = &str> {
        self.known.iter().filter(|(_, r)| r.installed.is_some()).map(|(mac, _)| mac.as_str())
    }

    /// What the machine is to be; or why nothing.
    ///
    /// # Errors
    /// The record can't be written.
    pub fn decide(&mut self, machine: &Machine, plan: &impl Plan) -> Result<Result<Decision, String>> {
        let (mac, to, way) = match self.errand(machine, plan) {
            Ok(found) => found,
            Err(why) => return Ok(Err(why)),
        };
        let known = self.known.get(&mac).filter(|r| r.to == to);
        // What keeps nothing is new at each start, and its own predecessor's heir.
        let forgets = matches!(way, Way::Run(None));
        let again = known.filter(|r| !forgets && now() < r.minted + GOOD_FOR).map(|r| r.ticket.clone());
        // Which of a group's places it had is not known here.
        let heir = known.is_some_and(|r| r.heir || forgets) && plan.group_of(&to) != to;
        let ticket = match again {
            Some(ticket) => ticket,
            None => match plan.mint(&to, heir) {
                Ok(ticket) => {
                    let record =
                        Record { to: to.clone(), ticket: ticket.clone(), minted: now(), installed: None, heir };
                    self.known.insert(mac.clone(), record);
                    self.store()?;
                    ticket
                }
                Err(e) => return Ok(Err(e.to_string())),
            },
        };
        let place = match &way {
            Way::Install(disk) => format!("on {disk}"),
            Way::Run(None) => "in memory".to_owned(),
            Way::Run(Some(disk)) => format!("in memory, with /var on {disk}"),
        };
        self.note(&mac, &format!("is to be {to}, {place}"))?;
        Ok(Ok(Decision { to, way, ticket }))
    }

    /// MAC address, node or group, and where it goes.
    fn errand(&self, machine: &Machine, plan: &impl Plan) -> Result<(String, String, Way), String> {
        if machine.version != Machine::VERSION {
            return Err("this installer is of another version of bakehouse; boot it again".to_owned());
        }
        let mac = machine.macs.first().cloned().ok_or("a machine without a network card")?;
        let rule = machine.macs.iter().chain([&machine.serial]).find_map(|name| self.rules.machines.get(name));
        let to = rule.or(self.rules.others.as_ref()).cloned().ok_or_else(|| {
            format!("nobody said what this machine is to be; in fleet.toml: [netboot.machines] \"{mac}\" = \"NODE\"")
        })?;
        let group = plan.group_of(&to);
        self.room(&mac, &to, plan)?;
        if self.rules.diskless.contains(&group) {
            let (need, have) = (plan.memory(&group), machine.memory);
            if have < need {
                return Err(format!(
                    "this machine has {} MB of memory, and {to} takes {} MB when it runs from there",
                    have / 1_000_000,
                    need.div_ceil(1_000_000)
                ));
            }
            if plan.is_volatile(&group) {
                return Ok((mac.clone(), self.slot(&mac, to, plan)?, Way::Run(None)));
            }
            let need = plan.disk(&group, &Way::Run(None));
            return Ok((mac, to, Way::Run(Some(self.disk(&machine.disks, need)?))));
        }
        if let Some(at) = self.known.get(&mac).and_then(|r| r.installed) {
            return Err(format!(
                "this machine was installed before (at {at}); start it from its disk, or: bakehouse netboot --again {mac}"
            ));
        }
        let disk = self.disk(&machine.disks, plan.disk(&group, &Way::Install(String::new())))?;
        Ok((mac, to, Way::Install(disk)))
    }

    /// Whether a group has a place for one more machine: whoever asks gets a ticket, and any number may.
    fn room(&self, mac: &str, group: &str, plan: &impl Plan) -> Result<(), String> {
        let slots = plan.slots(group);
        let here = |to: &String| to == group || slots.contains(to);
        let taken = self.known.iter().filter(|(other, r)| *other != mac && here(&r.to)).count();
        if slots.is_empty() || taken < slots.len() {
            return Ok(());
        }
        Err(format!("every node of `{group}` is another machine's; raise its `count`"))
    }

    /// A slot for a machine that remembers none: the one it has, or the first that no machine has here.
    fn slot(&self, mac: &str, to: String, plan: &impl Plan) -> Result<String, String> {
        let slots = plan.slots(&to);
        if slots.is_empty() {
            return Ok(to);
        }
        if let Some(known) = self.known.get(mac).filter(|r| slots.contains(&r.to)) {
            return Ok(known.to.clone());
        }
        let taken = |slot: &String| {
            self.known.values().any(|r| r.to == *slot) || self.rules.machines.values().any(|to| to == slot)
        };
        slots
            .iter()
            .find(|slot| !taken(slot))
            .cloned()
            .ok_or_else(|| format!("every node of `{to}` is another machine's; raise its `count`"))
    }

    /// The disk to overwrite: the one that fleet.toml names, or the only one there is.
    fn disk(&self, disks: &[MachineDisk], need: u64) -> Result<String, String> {
        let list = |disks: &[&MachineDisk]| {
            disks.iter().map(|d| format!("{} ({} MB)", d.path, d.size / 1_000_000)).collect::<Vec<_>>().join(", ")
        };
        let all: Vec<&MachineDisk> = disks.iter().collect();
        let fixed: Vec<&MachineDisk> = disks.iter().filter(|d| !d.removable).collect();
        let chosen = match (&self.rules.disk, &fixed[..]) {
            (Some(path), _) => all.iter().find(|d| d.path == *path).copied(),
            (None, [one]) => Some(*one),
            (None, []) => return Err("this machine has no disk".to_owned()),
            (None, _) => {
                return Err(format!(
                    "this machine has several disks, say which: [netboot] disk; it has {}",
                    list(&fixed)
                ));
            }
        };
        let Some(chosen) = chosen else {
            return Err(format!("[netboot] disk is not there; this machine has {}", list(&all)));
        };
        if chosen.size < need {
            return Err(format!("{} is too small: it takes {} MB", list(&[chosen]), need.div_ceil(1_000_000)));
        }
        Ok(chosen.path.clone())
    }

    /// Keeps what a machine says; returns what it is to be, if it is one that was told.
    ///
    /// # Errors
    /// The record can't be written.
    pub fn hear(&mut self, news: &News) -> Result<Option<String>> {
        let Some(record) = self.known.get_mut(&news.mac) else { return Ok(None) };
        let to = record.to.clone();
        match &news.step {
            Step::Writing { .. } => {}
            Step::Started => self.note(&news.mac, &format!("runs as {to}"))?,
            Step::Installed => {
                record.installed = Some(now());
                self.store()?;
                self.note(&news.mac, &format!("has {to} on its disk"))?;
            }
            Step::Failed { why } => self.note(&news.mac, &format!("failed: {why}"))?,
        }
        Ok(Some(to))
    }

    /// The audit log: a line for everything that was decided or happened.
    fn note(&self, mac: &str, what: &str) -> Result<()> {
        let line = serde_json::json!({ "at": now(), "machine": mac, "what": what });
        let file = OpenOptions::new().create(true).append(true).open(&self.audit);
        file.and_then(|mut f| writeln!(f, "{line}")).map_err(Error::io("write", &self.audit))
    }

    /// There are tickets in it.
    fn store(&self) -> Result<()> {
        write_private(&self.path, &pretty_json(&self.known)?)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authority::Authority;
    use crate::ticket::{CARRIED, Terms, mint};
    use fleet::{Right, Topology};

    const ONE: &str = "52:54:00:00:00:01";

    struct Acme {
        topology: Topology,
        authority: Authority,
    }

    fn acme() -> Acme {
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\napp.count = 3\nmonitor.count = 1\n";
        let topology = Topology::of(&fleet::Fleet::parse("f", toml).unwrap());
        Acme { topology, authority: Authority::create("acme").unwrap() }
    }

    impl Plan for Acme {
        fn group_of(&self, to: &str) -> String {
            self.topology.node(to).map_or(to.to_owned(), |n| n.group.clone())
        }
        fn slots(&self, group: &str) -> Vec<String> {
            self.topology.nodes.iter().filter(|n| n.group == group).map(|n| n.name.clone()).collect()
        }
        fn is_volatile(&self, group: &str) -> bool {
            group == "app"
        }
        fn disk(&self, _: &str, way: &Way) -> u64 {
            if matches!(way, Way::Run(_)) { 50 } else { 100 }
        }
        fn memory(&self, _: &str) -> u64 {
            1000
        }
        fn mint(&self, to: &str, replace: bool) -> Result<Ticket> {
            mint(&self.authority, &self.topology, to, &Terms { replace, ..CARRIED }, BTreeMap::new())
        }
    }

    /// Slot or group that a ticket is good for, and whether it takes somebody's place.
    fn right(ticket: &Ticket) -> (String, bool) {
        match &ticket.right {
            Right::Founder(founder) => (founder.slot.clone(), founder.replaces.is_some()),
            Right::Joiner(joiner) => {
                let claims = joiner.token.read().unwrap();
                (claims.slot.unwrap_or(claims.group), claims.replace)
            }
        }
    }

    fn rules() -> Netboot {
        let machines = [(ONE, "hub-1"), ("A1", "db-9"), ("A2", "app-2"), ("A3", "monitor")];
        let machines = machines.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        Netboot { machines, others: None, diskless: vec!["app".into(), "monitor".into()], disk: None }
    }

    fn machine(mac: &str, serial: &str, disks: &[(&str, u64, bool)]) -> Machine {
        let disks = disks.iter().map(|&(path, size, removable)| MachineDisk { path: path.into(), size, removable });
        Machine {
            version: Machine::VERSION,
            macs: vec![mac.into()],
            serial: serial.into(),
            disks: disks.collect(),
            memory: 1000,
            key: String::new(),
        }
    }

    #[track_caller]
    fn no(answer: Result<Decision, String>, words: &str) {
        let why = answer.unwrap_err();
        assert!(why.contains(words), "{why}");
    }

    const DISK: [(&str, u64, bool); 2] = [("/dev/vda", 200, false), ("/dev/sda", 200, true)];

    #[test]
    fn who_is_named_is_told_and_nobody_else() {
        let acme = acme();
        let dir = tempfile::tempdir().unwrap();
        let mut desk = Desk::open(dir.path(), &rules()).unwrap();
        let mut ask = |m: &Machine| desk.decide(m, &acme).unwrap();
        no(ask(&machine("52:54:00:00:00:09", "", &DISK)), "[netboot.machines] \"52:54:00:00:00:09\"");
        no(ask(&machine(ONE, "", &[])), "no disk");
        no(ask(&machine(ONE, "", &[("/dev/vda", 99, false)])), "too small");
        no(ask(&machine(ONE, "", &[("/dev/a", 200, false), ("/dev/b", 200, false)])), "several disks");
        no(ask(&machine("52:54:00:00:00:02", "A1", &DISK)), "there is no node or group `db-9`");
        no(ask(&Machine { version: 2, ..machine(ONE, "", &DISK) }), "another version");
        no(ask(&Machine { macs: Vec::new(), ..machine(ONE, "", &DISK) }), "without a network card");
        let told = ask(&machine(ONE, "", &DISK)).unwrap();
        assert_eq!((told.to.as_str(), told.way), ("hub-1", Way::Install("/dev/vda".into())));
    }

    #[test]
    fn a_machine_gets_its_ticket_again_until_it_is_installed_also_from_a_server_that_was_restarted() {
        let acme = acme();
        let dir = tempfile::tempdir().unwrap();
        let open = || Desk::open(dir.path(), &rules()).unwrap();
        let ask = || open().decide(&machine(ONE, "", &DISK), &acme).unwrap();
        let first = ask().unwrap().ticket;
        assert!(ask().unwrap().ticket == first);
        let news = |step| News { version: Machine::VERSION, mac: ONE.into(), step };
        assert_eq!(open().hear(&news(Step::Installed)).unwrap().as_deref(), Some("hub-1"));
        no(ask(), "--again 52:54:00:00:00:01");
        assert!(open().again("52:54:00:00:00:09").is_err());
        open().again(ONE).unwrap();
        let again = ask().unwrap().ticket;
        assert_eq!(right(&again), ("hub-1".to_owned(), true));
        assert!(ask().unwrap().ticket == again);
        let stranger = News { mac: "52:54:00:00:00:09".into(), ..news(Step::Installed) };
        assert_eq!(open().hear(&stranger).unwrap(), None);
        let audit = fs::read_to_string(dir.path().join("audit.jsonl")).unwrap();
        assert_eq!(audit.lines().count(), 5, "{audit}");
        assert!(!audit.contains("joiner"), "a ticket is in the log: {audit}");
    }

    #[test]
    fn what_keeps_nothing_has_the_same_slot_at_each_start_and_takes_it_from_itself() {
        let acme = acme();
        let dir = tempfile::tempdir().unwrap();
        let mut desk = Desk::open(dir.path(), &Netboot { others: Some("app".into()), ..rules() }).unwrap();
        let mut ask = |m: &Machine| desk.decide(m, &acme).unwrap();
        for (mac, to) in [("52:54:00:00:00:11", "app-1"), ("52:54:00:00:00:12", "app-3")] {
            let first = ask(&machine(mac, "", &[])).unwrap();
            assert_eq!((first.to.as_str(), &first.way), (to, &Way::Run(None)));
            assert_eq!(right(&first.ticket), (to.to_owned(), false));
            let again = ask(&machine(mac, "", &[])).unwrap();
            assert_eq!(again.to, to);
            assert_eq!(right(&again.ticket), (to.to_owned(), true));
        }
        no(ask(&machine("52:54:00:00:00:13", "", &[])), "another machine's");
        no(ask(&Machine { memory: 999, ..machine("52:54:00:00:00:11", "", &[]) }), "of memory");
        assert_eq!(ask(&machine("52:54:00:00:00:14", "A2", &[])).unwrap().to, "app-2");
    }

    #[test]
    fn what_keeps_something_keeps_it_on_a_disk() {
        let acme = acme();
        let dir = tempfile::tempdir().unwrap();
        let mut desk = Desk::open(dir.path(), &rules()).unwrap();
        let mut ask = |disks: &[_]| desk.decide(&machine("52:54:00:00:00:21", "A3", disks), &acme).unwrap();
        no(ask(&[]), "no disk");
        no(ask(&[("/dev/vda", 49, false)]), "too small");
        let first = ask(&[("/dev/vda", 50, false)]).unwrap();
        assert_eq!((first.to.as_str(), first.way), ("monitor", Way::Run(Some("/dev/vda".into()))));
        no(desk.decide(&machine("52:54:00:00:00:22", "A3", &[]), &acme).unwrap(), "every node of `monitor`");
        let mut ask = |disks: &[_]| desk.decide(&machine("52:54:00:00:00:21", "A3", disks), &acme).unwrap();
        // It has joined with it, or not: the same is good for both.
        assert!(ask(&[("/dev/vda", 50, false)]).unwrap().ticket == first.ticket);
    }
}
