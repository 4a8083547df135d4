//! Founders that come when they come: two hubs and a monitor are one etcd cluster, in whatever order
//! and however far apart they start, and wherever the power fails while they do. A disk that was wiped,
//! or that was in another machine for a while, makes no second one.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use bakehouse_tests::{ETCDCTL, Lab, Machine};

const APART: Duration = Duration::from_secs(120);
const ETCD: &str = "/var/lib/etcd/duo/member";
const STATE: &str = "/var/lib/bakehouse/state.json";

#[test]
fn founders_that_come_minutes_apart_are_one_cluster_and_stay_one() {
    let lab = Lab::empty("founders");
    lab.write(
        "fleet.toml",
        "name = \"duo\"\n[groups.hub]\ncount = 2\nendpoints = [\"hub1.example.net\", \"hub2.example.net\"]\n\
         [groups.monitor]\ncount = 1\n",
    );
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let [mut one, two, monitor] = ["hub-1", "hub-2", "monitor-1"].map(|name| Machine::of(&lab, name));
    let ticket = |name: &str| lab.ok(&["ticket", name]).out;
    let heir = |name: &str| lab.ok(&["ticket", name, "--replace"]).out;

    // The last one first, and alone: it waits for others, whatever happens to it.
    for step in [STATE, ETCD] {
        monitor.start_cut_at(&ticket("monitor-1"), step);
    }
    monitor.start();
    monitor.ok("until systemctl is-active -q etcd; do sleep 1; done");
    sleep(APART);
    let alone = monitor.exec(&format!("{ETCDCTL} put /test/alone x"));
    assert_ne!(alone.status, 0, "a cluster of one: {}", alone.output);

    // Two are a quorum; the second one loses its power as it comes.
    two.start_cut_at(&ticket("hub-2"), &format!("{ETCD}/wal"));
    two.start();
    two.wait_for(&["bakehouse: ready (hub-2)"]);
    agree(&[&two, &monitor], "two");
    sleep(APART);

    let tpm = lab.dir.join("tpm");
    let _ = fs::remove_dir_all(&tpm);
    one.has_tpm(Some(&tpm));
    one.start();
    one.wait_for(&["bakehouse: ready (hub-1)"]);
    agree(&[&one, &two, &monitor], "three");
    assert_eq!(one.ok(&format!("{ETCDCTL} get --print-value-only /test/two")), "written");
    assert_eq!(one.ok(&slots()), "hub-1\nhub-2\nmonitor-1");

    // Its disk in a machine without its TPM is nobody; put back, it is who it was.
    let key = one.ok("wg show all public-key | cut -f 2 | sort -u");
    one.cut_power();
    one.has_tpm(None);
    one.start();
    one.wait_for(&["bakehouse: state.json was sealed for the TPM of another machine"]);
    assert_ne!(one.exec("systemctl is-active etcd").status, 0);
    one.cut_power();
    one.has_tpm(Some(&tpm));
    one.start();
    one.wait_for(&["bakehouse: ready (hub-1)"]);
    assert_eq!(one.ok("wg show all public-key | cut -f 2 | sort -u"), key);
    agree(&[&one, &two, &monitor], "back");

    // A blank disk with a ticket as for the first time: the place is taken, and it is told how to have it.
    two.cut_power();
    two.wipe();
    two.start_with(&ticket("hub-2"));
    two.wait_for(&["another machine is hub-2 since epoch 1: this one has stopped", "--replace"]);
    is_stopped(&two);
    agree(&[&one, &monitor], "without");

    // Nor is it taken where etcd can't be asked: of three, one knows that it had another owner.
    for node in [&one, &two, &monitor] {
        node.cut_power();
    }
    two.wipe();
    two.start_with(&ticket("hub-2"));
    one.start();
    two.wait_for(&["another machine is hub-2 since epoch 1: this one has stopped"]);
    is_stopped(&two);
    let forgotten = one.exec(&format!("{ETCDCTL} put /test/forgotten x"));
    assert_ne!(forgotten.status, 0, "a quorum with one that has forgotten everything: {}", forgotten.output);
    monitor.start();
    agree(&[&one, &monitor], "remembered");

    // With the right one it is taken in, as the next owner, though it loses its power on the way.
    two.cut_power();
    two.wipe();
    let replacement = heir("hub-2");
    for step in [STATE.to_owned(), ETCD.to_owned(), format!("{ETCD}/wal")] {
        two.start_cut_at(&replacement, &step);
        agree(&[&one, &monitor], "meanwhile");
    }
    is_taken_in(&two, &replacement, "hub-2", &one);
    agree(&[&one, &two, &monitor], "again");
    assert_eq!(two.ok(&format!("{ETCDCTL} get --print-value-only /test/two")), "written");

    // So is a voter that is no hub.
    monitor.cut_power();
    monitor.wipe();
    let replacement = heir("monitor-1");
    monitor.start_cut_at(&replacement, STATE);
    is_taken_in(&monitor, &replacement, "monitor-1", &one);
    agree(&[&one, &two, &monitor], "monitored");

    // The power fails everywhere, and comes back in another order.
    for node in [&two, &one, &monitor] {
        node.cut_power();
    }
    for (node, name) in [(&one, "hub-1"), (&monitor, "monitor-1"), (&two, "hub-2")] {
        node.start();
        node.wait_for(&[&format!("bakehouse: ready ({name})")]);
    }
    agree(&[&one, &two, &monitor], "powered");
    for what in ["two", "three", "back", "without", "remembered", "meanwhile", "again", "monitored"] {
        assert_eq!(two.ok(&format!("{ETCDCTL} get --print-value-only /test/{what}")), "written", "{what}");
    }
    assert_eq!(two.ok(&slots()), "hub-1\nhub-2\nmonitor-1");
    for node in [&one, &two, &monitor] {
        assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");
    }
}

#[track_caller]
fn is_stopped(node: &Machine) {
    node.ok("for i in $(seq 60); do systemctl is-active -q etcd keepalived || exit 0; sleep 1; done; exit 1");
}

/// A machine with a replacement's ticket becomes the second owner of its slot, with a vote of its own.
#[track_caller]
fn is_taken_in(node: &Machine, ticket: &str, name: &str, other: &Machine) {
    node.start_with(ticket);
    node.wait_for(&[&format!("bakehouse: ready ({name})")]);
    assert!(node.ok("firstboot status --json").contains(r#""epoch":2"#));
    let voting = format!("{ETCDCTL} member list | grep started | grep -c 'false$'");
    other.ok(&format!(
        "for i in $(seq 90); do [ $({voting}) = 3 ] && exit; sleep 2; done; {ETCDCTL} member list; exit 1"
    ));
}

/// What the first one, a hub, writes it reads from each one's member of etcd, and they name the same members.
#[track_caller]
fn agree(nodes: &[&Machine], what: &str) {
    let ask = |command: &str| nodes[0].ok(&format!("{ETCDCTL} --command-timeout=120s {command}"));
    ask(&format!("put /test/{what} written"));
    let members = ask("member list | sort");
    for node in nodes {
        let at = node.ok("ip -o -4 addr show mesh0 | sed 's,.*inet \\([0-9.]*\\)/.*,--endpoints=https://\\1:2379,'");
        assert_eq!(ask(&format!("{at} get --print-value-only /test/{what}")), "written");
        assert_eq!(ask(&format!("{at} member list | sort")), members);
    }
}

/// The slots that have an owner.
fn slots() -> String {
    format!("{ETCDCTL} get --prefix --keys-only /bakehouse/slots/ | sed -n 's,.*/,,p' | sort")
}
