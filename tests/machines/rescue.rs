//! The maintenance console of a machine: a rescue disk opens a root shell on the serial console, and other disks do not.
//! And a node whose role is broken still answers.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bakehouse_tests::{Machine, TestFleet};
use builder::keys::authority::FleetKey;
use builder::keys::rescue::{image, order};
use builder::project::Project;

const READY: &str = "bakehouse: ready (hub-1)";
const OPEN: &str = "*** Maintenance console of hub-1 (fleet ha): you are root.";
const REFUSED: &str = "bakehouse: no maintenance console: the rescue disk is refused: ";

/// Types a line on the machine's serial console.
fn type_line(lab: &TestFleet, line: &str) {
    let socket = lab.dir.join("build/vm/hub-1/console.sock");
    let mut console = UnixStream::connect(&socket).expect("the serial console");
    console.write_all(format!("{line}\r").as_bytes()).expect("the serial console");
    // QEMU drops what it has not read when the connection closes.
    sleep(Duration::from_secs(2));
}

#[test]
fn rescue_disk_opens_a_root_shell_on_the_serial_console() {
    let lab = TestFleet::of_fleet("rescue", "ha");
    lab.init();
    lab.ok(&["build", "hub"]);
    let path = |name: &str| lab.dir.join(name);
    let (disk, rescue) = (path("hub-1.raw"), path("rescue.img"));
    lab.ok(&["flash", "hub-1", disk.to_str().expect("a UTF-8 path")]);
    let made =
        lab.ok(&["ticket", "hub-1", "--rescue", "-o", rescue.to_str().expect("a UTF-8 path"), "--json"]).result();
    let number = made["id"].as_str().expect("a number").to_owned();
    assert_eq!(made["rescue"], "hub-1");
    let mut hub = Machine::alone(&lab, "hub-1");

    // The machine joins during the boot. The disk opens the shell before or after that.
    hub.start_seeded(&disk, &rescue);
    hub.wait_for(&[OPEN]);
    hub.ok("for i in $(seq 60); do [ $(systemctl is-active bakehouse-rescue@ttyS0) = active ] && exit; sleep 1; done; exit 1");
    type_line(&lab, "id; tty");
    hub.wait_until("a root shell", |console| {
        console.contains("uid=0(root) gid=0(root)") && console.contains("/dev/ttyS0")
    });
    hub.ok("for i in $(seq 150); do firstboot status --json | grep -q '\"phase\":\"ready\"' && exit; sleep 2; done; exit 1");
    type_line(&lab, "firstboot status");
    hub.wait_for(&["hub-1 of ha (epoch 1): ready (hub-1)"]);
    // The agent leaves the console to the person.
    let console = hub.console();
    assert!(!console.split_once(OPEN).expect("the console").1.contains(READY), "{console}");
    assert_eq!(hub.ok("systemctl is-active bakehouse-rescue@tty1"), "active");
    let said = hub.ok("journalctl -b -o cat MESSAGE_ID=0c6f3f6c5f1e4b0c9a58e3d27b41a9d6");
    assert!(said.contains(&number) && said.contains("hub-1: a rescue disk opens the maintenance console"), "{said}");
    let metric = hub.ok("cat /run/bakehouse-metrics-rescue-*/rescue.prom");
    assert!(metric.contains(&format!("_seconds{{disk=\"vdb1\"}} {}", made["expires"])), "{metric}");
    assert!(hub.exposure("firstboot-rescue@vdb1.service") < 3.0);
    // `exit` gives a new shell.
    type_line(&lab, "exit");
    hub.wait_until("a new shell", |console| console.matches(OPEN).count() > 1);
    assert_eq!(hub.ok("systemctl --failed --no-legend --plain"), "");
    // The shell ends with the unit of the disk, for example when the disk is removed.
    hub.ok("systemctl stop firstboot-rescue@vdb1");
    assert_eq!(hub.ok("systemctl list-units --no-legend --plain 'bakehouse-rescue@*'"), "");
    assert_eq!(hub.ok("ls -d /run/bakehouse-rescue/* /run/bakehouse-metrics-rescue-* 2>/dev/null || :"), "");
    hub.ok("! systemctl start bakehouse-rescue@ttyS0 || ! systemctl is-active bakehouse-rescue@ttyS0");
    hub.cut_power();

    // The next boot without the disk has no shell.
    hub.start_flashed(&disk);
    hub.wait_for(&[READY]);
    assert!(!hub.console().contains("Maintenance console of"), "{}", hub.console());
    assert_eq!(hub.ok("systemctl list-units --no-legend --plain '*rescue@*'"), "");
    hub.cut_power();

    // A disk that has expired, and one of another node.
    let project = Project::load(&lab.dir).expect("a valid fleet.toml");
    let key = FleetKey::load(&project).expect("a fleet key");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    for (node, issued_at, why) in [
        ("hub-1", now - 7200, "it expired at "),
        ("hub-2", now, "it is for hub-2, and this machine is hub-1; make one with `bakehouse ticket NODE --rescue`"),
    ] {
        let order = order(&project.topology, node, issued_at, Duration::from_secs(3600)).expect("an order");
        fs::write(&rescue, image(&key, &order).expect("an image")).expect("the lab is writable");
        hub.start_seeded(&disk, &rescue);
        hub.wait_for(&[&format!("{REFUSED}{why}")]);
        hub.wait_for(&[READY]);
        assert!(!hub.console().contains("Maintenance console of"), "{}", hub.console());
        assert_eq!(hub.ok("systemctl list-units --no-legend --plain 'bakehouse-rescue@*'"), "");
        let failed = hub.ok("systemctl --failed --no-legend --plain");
        assert!(failed.starts_with("firstboot-rescue@vdb1.service"), "{failed}");
        hub.cut_power();
    }
}

/// A hub, and a node whose role cannot start.
const BROKEN: &str = "\
name = \"broken\"
version = \"1\"
[groups.hub]
count = 1
endpoints = [\"hub.example.net\"]
[groups.broken]
count = 1
[access]
shell = true
";

#[test]
fn containers_node_with_a_broken_role_answers() {
    let lab = TestFleet::empty("broken-role");
    lab.write("fleet.toml", BROKEN);
    lab.has_idle_role("broken", false);
    lab.write(
        "overlays/broken/usr/lib/systemd/system/role-broken.target",
        "[Unit]\nDescription=A role that cannot start\nRequires=broken.service\nAfter=broken.service\n",
    );
    lab.write(
        "overlays/broken/usr/lib/systemd/system/broken.service",
        "[Unit]\nDescription=A service that cannot start\n[Service]\nType=oneshot\n\
         ExecStart=/usr/bin/dash -c 'echo this service is broken; exit 7'\n",
    );
    lab.init();
    lab.is_of_containers();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let (hub, broken) = (Machine::for_node(&lab, "hub-1"), Machine::for_node(&lab, "broken-1"));
    // It also makes the operator's file.
    lab.ok(&["up", "hub-1"]);
    broken.start();
    broken.wait_for(&["bakehouse: broken-1: starting broken"]);
    broken.ok("for i in $(seq 60); do systemctl is-failed -q broken && exit; sleep 1; done; exit 1");

    // An operator's host asks the node through the hub.
    // The agent starts the role again and again, so the unit is not always failed.
    let begun = Instant::now();
    while !lab.ok(&["units", "broken-1", "--failed"]).out.contains("broken.service") {
        assert!(begun.elapsed() < Duration::from_secs(60), "no failed unit");
    }
    let logs = lab.ok(&["logs", "broken-1", "-u", "broken", "-n", "5"]);
    assert!(logs.out.contains("this service is broken"), "{}{}", logs.out, logs.err);
    let agent = lab.ok(&["logs", "broken-1", "-u", "firstboot", "--grep", "cannot start the roles"]);
    assert!(agent.out.contains("role-broken.target did not start"), "{}{}", agent.out, agent.err);
    let begun = Instant::now();
    loop {
        let status = lab.run(&["status", "--json"]).result();
        let rows = status["nodes"].as_array().expect("nodes");
        let row = rows.iter().find(|row| row["node"] == "broken-1").expect("a row of the node");
        assert_eq!(row["state"], "starting", "{row}");
        if row["report"]["failed"].to_string().contains("broken.service") {
            println!("{row:#}");
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "the status has no failed unit: {row}");
    }
    let failed = "for i in $(seq 60); do systemctl is-failed broken && exit; sleep 1; done; exit 1";
    let done = lab.ok(&["exec", "broken-1", failed]);
    assert_eq!(done.out.lines().last(), Some("failed"));
    lab.ok(&["net", "broken-1"]);
    lab.ok(&["disk", "broken-1"]);

    // The operator removes the cause, and the agent starts the role without a restart.
    broken.ok(
        "mkdir -p /run/systemd/system/broken.service.d && printf '[Service]\\nExecStart=\\nExecStart=/usr/bin/true\\n' \
               >/run/systemd/system/broken.service.d/repair.conf && systemctl daemon-reload",
    );
    broken.wait_for(&["bakehouse: ready (broken-1)"]);

    // Without any hub, the console shows what the node waits for, its addresses, its last warnings, and a QR code.
    hub.cut_power();
    let address = broken.ok("ip -4 -o address show dev mesh0 | sed 's/.*inet //; s,/.*,,'");
    broken.wait_until("the page of a node without a hub", |console| {
        let parts = ["broken-1 of broken", " min: no hub replies: ", "Last warnings:", "\u{2588}\u{2580}", &address];
        parts.iter().all(|part| console.contains(part))
    });
    println!("{}", broken.console());
}
