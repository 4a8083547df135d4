//! The maintenance console: a root shell on the machine's consoles while a rescue disk is attached, until the disk
//! expires. udev starts `firstboot-rescue@DISK.service` for such a disk, and that unit runs [`rescue`]. The agent does not
//! have to run.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleet::{Credential, Rescue, RescueDisk, RescueError, RescueTarget, Ticket, Token, one_line};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::time::sleep;

use crate::error::{Error, Result};
use crate::host::console::{BANNER, log_event, terminals};
use crate::host::journal::Event;
use crate::host::systemd::Systemd;
use crate::node::identity::read_ticket;
use crate::node::image::Image;
use crate::node::state::{State, StateDir};
use crate::node::trust::signed_by_root;

/// systemd-timesyncd sets the modification time of this file at most 60 s after each other, so the machine's clock is
/// never far behind it, also without a battery.
const LAST_KNOWN_TIME: &str = "/var/lib/systemd/timesync/clock";
/// State of Secure Boot: 4 bytes of attributes, and a byte that is 1 if the firmware verifies what it starts.
const SECURE_BOOT: &str = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// Time between two looks at the clock and the disk.
const POLL: Duration = Duration::from_secs(1);

/// What decides about a rescue disk on a machine.
pub struct Machine<'a> {
    /// Folder of the node's state.
    pub state: &'a StateDir,
    /// Folder of systemd's credentials.
    pub credentials: Option<&'a PathBuf>,
    /// Data of the image.
    pub image: &'a Image,
    /// Files whose modification times are not later than the true time.
    pub clocks: &'a [PathBuf],
    /// Whether the firmware verifies what it starts, and the machine has a TPM.
    pub is_guarded: bool,
}

/// Folders of a running maintenance console.
pub struct Folders<'a> {
    /// Folder of [`BANNER`].
    pub runtime: &'a Path,
    /// Folder of the metric.
    pub metrics: &'a Path,
}

/// Returns the files that show the time on a node.
#[must_use]
pub fn clocks(image: &Path) -> [PathBuf; 2] {
    [LAST_KNOWN_TIME.into(), image.join("image.json")]
}

/// Whether the firmware of this machine verifies what it starts, and the machine has a TPM 2.0.
#[must_use]
pub fn is_guarded() -> bool {
    let has_tpm = fs::read_dir("/sys/class/tpmrm").is_ok_and(|mut all| all.next().is_some());
    has_tpm && fs::read(SECURE_BOOT).is_ok_and(|bytes| bytes.get(4) == Some(&1))
}

/// Opens the maintenance console that the disk orders, and returns when the disk has expired or is gone.
///
/// # Errors
/// If the machine does not obey the disk, or systemd does not start the shells.
pub async fn rescue(machine: &Machine<'_>, device: &Path, folders: &Folders<'_>) -> Result<()> {
    let now = machine.now();
    let order = machine.accept(&read(device)?, now)?;
    // Without a battery, the clock may be years late. The disk then works for as long as it was made for.
    let lasts = order.expires.saturating_sub(order.issued_at.max(now));
    let until = Instant::now() + Duration::from_secs(lasts);
    let disk = device.file_name().unwrap_or_default().to_string_lossy();
    let metric = "bakehouse_rescue_expires_timestamp_seconds";
    let text = format!("# TYPE {metric} gauge\n{metric}{{disk=\"{disk}\"}} {}\n", order.expires);
    write(&folders.metrics.join("rescue.prom"), &text)?;
    // The message precedes the banner: from then on, the agent writes nothing on the consoles.
    let (node, expires) = (&order.node, order.expires_at());
    log_event(
        Event::Rescue,
        &format!("{node}: a rescue disk opens the maintenance console until {expires} (order {})", order.id),
    );
    let shown = folders.runtime.join(BANNER);
    write(&shown, &banner(&order))?;
    let started = start_shells().await;
    while started.is_ok() && Instant::now() < until && machine.now() < order.expires && device.exists() {
        sleep(POLL).await;
    }
    // The unit stops the shells. From now on, messages go to the consoles again.
    fs::remove_file(&shown).map_err(Error::io("remove", &shown))?;
    started?;
    let why = if device.exists() { "has expired" } else { "is gone" };
    log_event(Event::RescueClosed, &format!("{node}: the maintenance console closes: the rescue disk {why}"));
    Ok(())
}

/// Starts a shell on each console.
async fn start_shells() -> Result<()> {
    let units = Systemd::new(&zbus::Connection::system().await?).await?;
    for terminal in terminals() {
        units.begin(&format!("bakehouse-rescue@{terminal}.service")).await?;
    }
    Ok(())
}

impl Machine<'_> {
    /// Returns the time in seconds since 1970: that of the clock, or a later one that this machine has had before.
    #[must_use]
    pub fn now(&self) -> u64 {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs());
        let of_file = |path: &PathBuf| fs::metadata(path).and_then(|meta| meta.modified()).map_or(0, seconds);
        self.clocks.iter().map(of_file).fold(seconds(SystemTime::now()), u64::max)
    }

    /// Returns the order of a disk, if this machine obeys it.
    ///
    /// # Errors
    /// If the image forbids rescue disks, the machine does not know the fleet's root, or the order is not valid here.
    pub fn accept(&self, content: &[u8], now: u64) -> Result<Rescue> {
        let topology = &self.image.topology;
        if !topology.access.rescue {
            let text = "the image forbids rescue disks; remove `rescue = false` from `[access]` of fleet.toml, and \
                        install the new image";
            return Err(Error::Configuration(text.to_owned()));
        }
        let disk = RescueDisk::parse(content).map_err(|e| refused(&e))?;
        let (root, slots) = self.trusts()?;
        let slots: Vec<&str> = slots.iter().map(String::as_str).collect();
        let target = RescueTarget { fleet: &topology.name, slots: &slots, now };
        disk.open(&target, |message, signature| signed_by_root(&root, message, signature)).map_err(|e| refused(&e))
    }

    /// Returns the certificate of the fleet's root, and the slots of which this machine is one.
    fn trusts(&self) -> Result<(String, Vec<String>)> {
        // A thief of the machine can replace files on its disk, but cannot seal them for the TPM. Without Secure Boot, the
        // thief needs no rescue disk, and without a TPM, nothing on the disk is secret.
        if self.is_guarded && !is_sealed(&self.state.path().join(State::FILE)) {
            let text = "this machine has Secure Boot and a TPM, but no sealed state, so nothing proves the fleet's key; \
                        give the machine a new ticket, or install its disk again";
            return Err(Error::Configuration(text.to_owned()));
        }
        if let Some(state) = State::load(self.state)? {
            return Ok((state.root, vec![state.slot]));
        }
        let ticket = read_ticket(self.credentials)?;
        let slots = slot_of(&ticket).map_or_else(
            || {
                let nodes = self.image.topology.nodes.iter();
                nodes.filter(|node| node.group == self.image.info.group).map(|node| node.name.clone()).collect()
            },
            |slot| vec![slot],
        );
        Ok((ticket.root, slots))
    }
}

/// Returns the only slot that a machine can get with a ticket.
fn slot_of(ticket: &Ticket) -> Option<String> {
    match &ticket.right {
        Credential::Founder(founder) => Some(founder.slot.clone()),
        Credential::Joiner(_) => ticket.token().and_then(Token::read)?.slot,
    }
}

/// Whether a file of the state exists and is sealed.
fn is_sealed(path: &Path) -> bool {
    #[derive(Deserialize)]
    struct Outside {
        sealed: Option<IgnoredAny>,
    }
    let outside = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<Outside>(&bytes).ok());
    outside.is_some_and(|outside| outside.sealed.is_some())
}

fn refused(e: &RescueError) -> Error {
    Error::Configuration(format!("the rescue disk is refused: {e}"))
}

/// Reads the beginning of a disk.
fn read(device: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = u64::try_from(RescueDisk::LONGEST).unwrap_or(u64::MAX);
    let read = File::open(device).and_then(|disk| disk.take(most).read_to_end(&mut bytes));
    read.map_err(Error::io("read", device))?;
    Ok(bytes)
}

/// Writes a file that every user may read. It appears with its whole content.
fn write(path: &Path, text: &str) -> Result<()> {
    let beside = path.with_extension("new");
    let written = OpenOptions::new().write(true).create(true).truncate(true).open(&beside);
    let written = written.and_then(|mut file| file.write_all(text.as_bytes()));
    written.and_then(|()| fs::rename(&beside, path)).map_err(Error::io("write", path))
}

/// Returns the heading of the console. The image has the list of useful commands below it.
fn banner(order: &Rescue) -> String {
    format!(
        "\n*** Maintenance console of {} (fleet {}): you are root.\n*** Open until {}, and while the rescue disk is \
         attached.\n*** The journal names this order {}.\n\n",
        one_line(&order.node),
        one_line(&order.fleet),
        order.expires_at(),
        one_line(&order.id)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::image::ImageInfo;
    use crate::node::seal::tests::machine as sealing_machine;
    use fleet::{Claims, Founder, Issuer, Joiner, Secrets, Topology};

    const NOW: u64 = 1_800_000_000;

    struct TestMachine {
        dir: tempfile::TempDir,
        image: Image,
        root: Issuer,
        credentials: PathBuf,
        state: StateDir,
        is_guarded: bool,
    }

    impl TestMachine {
        /// Makes a machine of the group `db`, which has no slot yet.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\n";
            let topology = Topology::from_fleet(&fleet::Fleet::parse("f", toml).unwrap());
            let (id, version, group) = ("acme-db".to_owned(), "1".to_owned(), "db".to_owned());
            let info = ImageInfo { id, version, group, roles: vec!["db".to_owned()], health: Vec::new() };
            let (credentials, state) = (dir.path().join("credentials"), StateDir::new(dir.path(), None));
            fs::create_dir(&credentials).unwrap();
            let root = Issuer::root("acme").unwrap();
            Self { dir, image: Image { info, topology }, root, credentials, state, is_guarded: false }
        }

        fn is(self, slot: &str) -> Self {
            let root = self.root.certificate();
            State::new(&self.image.topology, slot, 1, root).store(&self.state).unwrap();
            self
        }

        fn has_ticket(&self, root: &Issuer, right: Credential) {
            let (fleet, root, endpoints) = ("acme".to_owned(), root.certificate().to_owned(), [].into());
            let ticket = Ticket { version: Ticket::VERSION, fleet, root, endpoints, right };
            fs::write(self.credentials.join(Ticket::CREDENTIAL), serde_json::to_vec(&ticket).unwrap()).unwrap();
        }

        fn accept_at(&self, content: &[u8], now: u64) -> Result<Rescue> {
            let clocks = [self.dir.path().join("clock")];
            let credentials = Some(&self.credentials);
            let (state, image, is_guarded) = (&self.state, &self.image, self.is_guarded);
            Machine { state, credentials, image, clocks: &clocks, is_guarded }.accept(content, now)
        }

        fn refusal(&self, content: &[u8]) -> String {
            let e = self.accept_at(content, NOW).unwrap_err();
            assert_eq!(e.exit_code(), 78, "{e}");
            e.chain()
        }
    }

    fn order(node: &str) -> Rescue {
        let (fleet, node) = ("acme".to_owned(), node.to_owned());
        let (issued_at, expires) = (NOW - 60, NOW + 3600);
        Rescue { version: Rescue::VERSION, fleet, node, id: "0".repeat(32), issued_at, expires }
    }

    fn disk(root: &Issuer, order: &Rescue) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(&RescueDisk::sign(root, order).unwrap()).unwrap();
        bytes.resize(RescueDisk::LONGEST, 0);
        bytes
    }

    #[test]
    fn obeys_disks_of_its_root_and_its_slot_alone() {
        let db = TestMachine::new().is("db-1");
        assert_eq!(db.accept_at(&disk(&db.root, &order("db-1")), NOW).unwrap(), order("db-1"));
        assert!(db.refusal(&disk(&db.root, &order("db-2"))).contains("it is for db-2, and this machine is db-1"));
        let other = Issuer::root("acme").unwrap();
        assert!(db.refusal(&disk(&other, &order("db-1"))).contains("not signed with this fleet's key"));
        let elsewhere = Rescue { fleet: "other".to_owned(), ..order("db-1") };
        assert!(db.refusal(&disk(&other, &elsewhere)).contains("of the fleet `other`"));
        assert!(db.refusal(b"nonsense").contains("it is damaged"));
        // A hub's issuer signs certificates of nodes, and no orders.
        let issuer = db.root.issuer("acme", "hub-1").unwrap();
        assert!(db.refusal(&disk(&issuer, &order("db-1"))).contains("not signed"));
    }

    #[test]
    fn refuses_a_disk_with_any_changed_bit() {
        let db = TestMachine::new().is("db-1");
        let whole = disk(&db.root, &order("db-1"));
        let length = whole.iter().position(|byte| *byte == 0).unwrap();
        for at in 0..length {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[at] ^= 1 << bit;
                // A change of the last character of the base64 may leave the signature as it is.
                if let Ok(opened) = db.accept_at(&damaged, NOW) {
                    assert_eq!(opened, order("db-1"), "byte {at}, bit {bit}");
                }
            }
        }
    }

    #[test]
    fn refuses_an_expired_disk_by_the_latest_known_time() {
        let db = TestMachine::new().is("db-1");
        let content = disk(&db.root, &order("db-1"));
        let e = db.accept_at(&content, NOW + 3600).unwrap_err().chain();
        assert!(e.contains("expired at") && e.contains("set the clock"), "{e}");
        // The clock of the machine is late, but a file proves a later time.
        let clock = db.dir.path().join("clock");
        let later = SystemTime::now() + Duration::from_secs(1_000_000);
        File::create(&clock).unwrap().set_modified(later).unwrap();
        let machine = Machine {
            state: &db.state,
            credentials: None,
            image: &db.image,
            clocks: &[clock, db.dir.path().join("missing")],
            is_guarded: false,
        };
        assert_eq!(machine.now(), later.duration_since(UNIX_EPOCH).unwrap().as_secs());
    }

    #[test]
    fn image_can_forbid_rescue_disks() {
        let mut db = TestMachine::new().is("db-1");
        db.image.topology.access.rescue = false;
        assert!(db.refusal(&disk(&db.root, &order("db-1"))).contains("`rescue = false`"));
    }

    #[test]
    fn machine_without_a_slot_trusts_its_ticket() {
        let machine = TestMachine::new();
        let e = machine.refusal(&disk(&machine.root, &order("db-1")));
        assert!(e.contains("no ticket"), "{e}");
        let claims = |slot: Option<&str>| Claims {
            fleet: "acme".to_owned(),
            id: "1".to_owned(),
            group: "db".to_owned(),
            slot: slot.map(str::to_owned),
            replace: false,
            uses: 1,
            expires: 1,
            key: String::new(),
        };
        let joiner = |slot| Credential::Joiner(Joiner::mint(&machine.root, claims(slot)).unwrap());
        let issuer = machine.root.issuer("acme", "hub-1").unwrap();
        let founder = Founder { slot: "hub-1".to_owned(), issuer, secrets: Secrets::sample(), replaces: None };
        for (right, accepted) in [
            (joiner(None), ["db-1", "db-2"].as_slice()),
            (joiner(Some("db-2")), &["db-2"]),
            (Credential::Founder(founder), &["hub-1"]),
        ] {
            machine.has_ticket(&machine.root, right);
            for slot in ["db-1", "db-2", "hub-1", "hub-2"] {
                let opened = machine.accept_at(&disk(&machine.root, &order(slot)), NOW).is_ok();
                assert_eq!(opened, accepted.contains(&slot), "{slot}");
            }
        }
        // A machine with a slot trusts its state, and not a ticket that somebody added.
        let db = machine.is("db-1");
        let other = Issuer::root("acme").unwrap();
        db.has_ticket(&other, Credential::Joiner(Joiner::mint(&other, claims(None)).unwrap()));
        assert!(db.refusal(&disk(&other, &order("db-1"))).contains("not signed"));
    }

    #[test]
    fn with_secure_boot_and_a_tpm_only_sealed_state_counts() {
        let mut db = TestMachine::new();
        db.is_guarded = true;
        let claims = order("db-1");
        let content = disk(&db.root, &claims);
        db.state = StateDir::new(db.dir.path(), Some(sealing_machine(db.dir.path(), 1)));
        let mut db = db.is("db-1");
        assert_eq!(db.accept_at(&content, NOW).unwrap(), claims);
        // A thief replaces the state by one of an own fleet.
        let thief = Issuer::root("acme").unwrap();
        let unsealed = StateDir::new(db.dir.path(), None);
        State::new(&db.image.topology, "db-1", 1, thief.certificate()).store(&unsealed).unwrap();
        assert!(db.refusal(&disk(&thief, &claims)).contains("no sealed state"));
        db.is_guarded = false;
        db.accept_at(&disk(&thief, &claims), NOW).unwrap();
    }

    #[test]
    fn console_begins_with_the_node_and_fits_the_smallest_screen() {
        let text = banner(&order("db-1"));
        assert!(text.contains("console of db-1 (fleet acme)") && text.contains("2027-01-15T09:00:00Z"), "{text}");
        let text = text + include_str!("../../../overlays/firstboot/usr/share/bakehouse/rescue.txt");
        assert!(text.lines().count() < 24, "{text}");
        assert!(text.lines().all(|line| line.is_ascii() && line.len() < 100), "{text}");
        let text = "\u{1b}[2J\r\n".to_owned();
        let foreign = Rescue { node: text.clone(), fleet: text.clone(), id: text, ..order("db-1") };
        let foreign = banner(&foreign);
        let lines = banner(&order("db-1")).lines().count();
        assert!(!foreign.contains(['\u{1b}', '\r']) && foreign.lines().count() == lines, "{}", foreign.escape_debug());
    }
}
