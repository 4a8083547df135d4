//! Bootstrap of etcd: two hubs and a monitor form one cluster in any order, with minutes between their starts, and with
//! power cuts on the way. A wiped disk, or a disk that was in another machine for a while, must not form a second
//! cluster.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use bakehouse_tests::{ETCDCTL, Machine, TestFleet};

const APART: Duration = Duration::from_secs(120);
const ETCD: &str = "/var/lib/etcd/duo/member";
const STATE: &str = "/var/lib/bakehouse/state.json";

#[test]
fn founders_started_minutes_apart_form_one_cluster() {
    let lab = TestFleet::empty("founders");
    lab.write(
        "fleet.toml",
        "name = \"duo\"\n[groups.hub]\ncount = 2\nendpoints = [\"hub1.example.net\", \"hub2.example.net\"]\n\
         [groups.monitor]\ncount = 1\n",
    );
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let [mut one, two, monitor] = ["hub-1", "hub-2", "monitor-1"].map(|name| Machine::for_node(&lab, name));
    let ticket = |name: &str| lab.ok(&["ticket", name]).out;
    let heir = |name: &str| lab.ok(&["ticket", name, "--replace"]).out;

    // monitor-1 starts alone, with power cuts, and must wait for a quorum.
    for step in [STATE, ETCD] {
        monitor.start_cut_at(&ticket("monitor-1"), step);
    }
    monitor.start();
    monitor.ok("until systemctl is-active -q etcd; do sleep 1; done");
    sleep(APART);
    let alone = monitor.exec(&format!("{ETCDCTL} put /test/alone x"));
    assert_ne!(alone.status, 0, "a cluster of one: {}", alone.output);

    // hub-2 completes the quorum, after a power cut in its first start.
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

    // Without its TPM, hub-1's disk must not start. With the TPM it is the same node again.
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

    // A blank disk with an ordinary founder's ticket is refused, and the message names `--replace`.
    two.cut_power();
    two.wipe();
    two.start_with(&ticket("hub-2"));
    two.wait_for(&["another machine has owned hub-2 since epoch 1: this machine has stopped", "--replace"]);
    is_stopped(&two);
    agree(&[&one, &monitor], "without");

    // The same without an etcd quorum: hub-1 refuses the blank hub-2 from its own records.
    for node in [&one, &two, &monitor] {
        node.cut_power();
    }
    two.wipe();
    two.start_with(&ticket("hub-2"));
    one.start();
    two.wait_for(&["another machine has owned hub-2 since epoch 1: this machine has stopped"]);
    is_stopped(&two);
    let forgotten = one.exec(&format!("{ETCDCTL} put /test/forgotten x"));
    assert_ne!(forgotten.status, 0, "a wiped member completed the quorum: {}", forgotten.output);
    monitor.start();
    agree(&[&one, &monitor], "remembered");

    // With a replacement's ticket it becomes the slot's next owner, also after power cuts.
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

    // The same for a voter that is not a hub.
    monitor.cut_power();
    monitor.wipe();
    let replacement = heir("monitor-1");
    monitor.start_cut_at(&replacement, STATE);
    is_taken_in(&monitor, &replacement, "monitor-1", &one);
    agree(&[&one, &two, &monitor], "monitored");

    // All nodes lose their power, and start in another order.
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

/// Starts a machine with a replacement's ticket, and waits until it is the slot's second owner and has a vote.
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

/// Asserts that a write on the first node, a hub, is readable from each node's etcd member, and that all of them list
/// the same members.
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

/// Returns a command that lists the slots with an owner.
fn slots() -> String {
    format!("{ETCDCTL} get --prefix --keys-only /bakehouse/slots/ | sed -n 's,.*/,,p' | sort")
}
