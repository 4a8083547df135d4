//! Life of a fleet: three hubs and a worker join from blank disks over real WireGuard and etcd, hubs refuse invalid
//! tickets, nodes renew their keys, and a hub is lost, replaced, and leaves.

use std::thread;

use bakehouse_tests::{ETCDCTL, Machine, TestFleet};

#[test]
fn machines_join_and_survive_the_loss_of_a_hub() {
    come_up_and_outlive_a_hub(&TestFleet::of_fleet("fleet", "ha"));
}

/// Containers run at the host's speed and on its kernel, with wireguard-go.
#[test]
fn containers_join_and_survive_the_loss_of_a_hub() {
    let lab = TestFleet::of_fleet("fleet-containers", "ha");
    lab.is_of_containers();
    come_up_and_outlive_a_hub(&lab);
}

fn come_up_and_outlive_a_hub(lab: &TestFleet) {
    lab.init();
    lab.ok(&["build", "hub", "db"]);
    let hubs = ["hub-1", "hub-2", "hub-3"].map(|name| Machine::for_node(lab, name));
    let db = Machine::for_node(lab, "db-1");

    // A ticket of another group: the agent prints the reason on the console and stores nothing.
    let wrong = lab.ok(&["ticket", "app"]).out;
    let elsewhere = TestFleet::of_fleet("fleet-elsewhere", "ha");
    elsewhere.init();
    let foreign = elsewhere.ok(&["ticket", "db"]).out;
    thread::scope(|scope| {
        for hub in &hubs {
            scope.spawn(|| {
                hub.start();
                hub.wait_for(&["bakehouse: ready"]);
            });
        }
        scope.spawn(|| {
            db.start_with(&wrong);
            db.wait_for(&["the ticket is for the group `app`, this image is for `db`"]);
            assert_eq!(db.ok("ls -A /var/lib/bakehouse"), "");
            db.cut_power();
        });
    });
    // A ticket of another fleet: the node does not trust these hubs' certificates.
    db.start_with(&foreign);
    db.wait_for(&["invalid peer certificate: BadSignature", "invalid peer certificate: UnknownIssuer"]);
    assert_eq!(db.ok("ls /var/lib/bakehouse"), "keys.json");
    let keys = db.ok("sha256sum /var/lib/bakehouse/keys.json");
    db.cut_power();

    // Its own ticket: it joins with the keys that it created before the power cut.
    db.start();
    db.wait_for(&["bakehouse: ready (db-1)"]);
    assert_eq!(db.ok("sha256sum /var/lib/bakehouse/keys.json"), keys);
    assert!(db.ok("firstboot status --json").contains(r#""node":"db-1""#));
    assert_eq!(db.ok("hostname"), "db-1");
    reaches_three_hubs(&db);
    // Through the hubs it has a route to every other worker.
    assert!(db.ok("ip route get 10.10.0.20").contains("dev wg-hub"));

    // One etcd cluster of three, one hub with the VIP, and a database behind it.
    let everybody: Vec<&Machine> = hubs.iter().collect();
    assert_eq!(hubs[0].ok(&until(&format!("{ETCDCTL} member list | grep -c started"), "3")), "3");
    let first = holder(&everybody);
    db.ok(&write(lab));
    vip_goes(lab, &db, &hubs[first]);
    let lost = holder(&everybody);
    assert_ne!(lost, first, "the VIP returned to its first hub");
    for node in everybody.iter().chain([&&db]) {
        assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");
        // The node exporter found every folder of metrics. If not, it logs an error at each scrape.
        let address = "$(ip -4 -o address show dev mesh0 | sed 's/.*inet //; s,/.*,,')";
        let request = "printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n'";
        let error = "grep ^node_textfile_scrape_error";
        let scrape = format!("exec 7<>/dev/tcp/{address}/9100; {request} >&7; {error} <&7");
        assert_eq!(node.ok(&scrape), "node_textfile_scrape_error 0");
    }
    db.ok(&write(lab));

    // Patroni asks the other members before it promotes a standby, so its user needs the key of its client certificate.
    let key = "sed -n '/^ctl:/,/^[a-z]/s/ *keyfile: //p' /run/bakehouse/patroni.yml";
    db.ok(&format!("setpriv --reuid=postgres --regid=postgres --clear-groups test -r $({key})"));

    // A worker and a hub renew old keys, and every peer learns the new ones.
    let renewed = &hubs[(lost + 1) % 3];
    let of_db = renews(&db);
    for hub in &hubs {
        assert_eq!(hub.ok(&until(&handshakes("wg0", &of_db), "1")), "1");
    }
    let of_hub = renews(renewed);
    for node in everybody.iter().filter(|hub| !std::ptr::eq(**hub, renewed)).chain([&&db]) {
        assert_eq!(node.ok(&until(&handshakes("all", &of_hub), "1")), "1");
    }
    reaches_three_hubs(&db);
    db.ok(&write(lab));

    // The hub with the VIP is lost: another hub takes the VIP, and writes continue.
    hubs[lost].cut_power();
    let left: Vec<&Machine> = everybody.iter().enumerate().filter(|(i, _)| *i != lost).map(|(_, h)| *h).collect();
    holder(&left);
    db.ok(&write(lab));

    // A machine with a blank disk and a replacement's ticket becomes the slot's second owner and an etcd member.
    let name = format!("hub-{}", lost + 1);
    let replacement = lab.ok(&["ticket", &name, "--replace"]).out;
    hubs[lost].wipe();
    hubs[lost].start_with(&replacement);
    hubs[lost].wait_for(&[&format!("bakehouse: ready ({name})")]);
    assert!(hubs[lost].ok("firstboot status --json").contains(r#""epoch":2"#));
    let voting = format!("{ETCDCTL} member list | grep started | grep -c 'false$'");
    assert_eq!(left[0].ok(&until(&voting, "3")), "3");
    reaches_three_hubs(&db);
    db.ok(&write(lab));

    // `firstboot leave` removes its etcd vote before it stops the services, and the other hubs continue.
    hubs[lost].ok("firstboot leave");
    let gone = format!("this machine was {name}, and has left the fleet");
    hubs[lost].wait_for(&[&gone]);
    for unit in ["etcd", "keepalived", "bird", "haproxy"] {
        assert_ne!(hubs[lost].exec(&format!("systemctl is-active {unit}")).status, 0, "{unit} still runs");
    }
    assert_eq!(left[0].ok(&until(&format!("{ETCDCTL} member list | grep -c started"), "2")), "2");
    holder(&left);
    db.ok(&write(lab));
    // After a reboot it prints that it has left and starts no service.
    hubs[lost].cut_power();
    hubs[lost].start_with(&replacement);
    hubs[lost].wait_for(&[&gone]);
    assert_eq!(left[0].ok(&format!("{ETCDCTL} member list | grep -c started")), "2");
}

/// Waits until exactly one of the hubs has the VIP. Returns its index.
#[track_caller]
fn holder(hubs: &[&Machine]) -> usize {
    for _ in 0..60 {
        let has = |hub: &Machine| hub.exec("ip -brief address show dev lo | grep -q 10.10.0.100/32").status == 0;
        let holders: Vec<usize> = hubs.iter().enumerate().filter(|(_, hub)| has(hub)).map(|(i, _)| i).collect();
        if let [one] = holders[..] {
            return one;
        }
        thread::sleep(std::time::Duration::from_secs(2));
    }
    panic!("no hub has the VIP, or two have it");
}

/// Stops keepalived on the hub with the VIP. A request that is under way is answered, and HAProxy resets a longer
/// connection instead of leaving its client without a reply.
#[track_caller]
fn vip_goes(lab: &TestFleet, client: &Machine, holder: &Machine) {
    let sleeps = sql(lab, "SELECT pg_sleep(3000)");
    client.ok(&format!("({sleeps}; echo told) >/tmp/waits 2>&1 & sleep 1"));
    client.ok(&until("ss -Htn state established dst 10.10.0.100:5000 | wc -l", "1"));
    // The client completes its request while the hub drains connections: 2 s, or 10 s under emulation.
    let asks_on = if client.ok("systemd-detect-virt") == "qemu" { 5 } else { 2 };
    client.ok(&format!(
        "(exec 7<>/dev/tcp/10.10.0.100/80; printf 'GET / HTTP/1.1\\r\\nHost: x\\r\\n' >&7; \
         sleep {asks_on}; printf '\\r\\n' >&7; head -n 1 <&7) >/tmp/asks 2>&1 & sleep 1"
    ));
    holder.ok("systemctl stop keepalived");
    // 503 is the reply, because no app node runs yet.
    assert_eq!(client.ok(&until("grep -c '503 Service Unavailable' /tmp/asks", "1")), "1");
    assert_eq!(client.ok(&until("grep -c told /tmp/waits", "1")), "1");
    holder.ok("systemctl start keepalived");
}

/// Makes a node's keys old and restarts its agent, which renews them and must restart no service. Returns the new mesh
/// key.
#[track_caller]
fn renews(node: &Machine) -> String {
    let services = "systemctl show --property=MainPID --value etcd patroni haproxy bird prometheus-node-exporter";
    let before = node.ok(services);
    let key = "wg show all public-key | head -n 1 | cut -f 2";
    let old = node.ok(key);
    node.ok(r#"sed -i 's/"made": [0-9]*/"made": 1/' /var/lib/bakehouse/keys.json && systemctl restart firstboot"#);
    assert_eq!(node.ok(&until(r#"firstboot status --json | grep -c '"epoch":2'"#, "1")), "1");
    // A hub also stores the slots' records.
    assert_eq!(node.ok("ls /var/lib/bakehouse | grep -v slots.json"), "keys.json\nneighbours.json\nstate.json");
    assert_eq!(node.ok(services), before);
    // The agent reports the new epoch before it configures the key in the kernel.
    assert_eq!(node.ok(&until(&format!("{key} | grep -vc '{old}'"), "1")), "1");
    node.ok(key)
}

/// Returns a command that counts the peers with this key and a completed handshake.
fn handshakes(interface: &str, key: &str) -> String {
    format!("wg show {interface} latest-handshakes | grep '{key}' | grep -vc '\t0$'")
}

#[track_caller]
fn reaches_three_hubs(node: &Machine) {
    let sessions = "birdc -s /run/bird/bird.ctl show protocols | grep -c Established";
    assert_eq!(node.ok(&until(sessions, "3")), "3");
}

/// Returns a shell loop that repeats a command until it prints `wanted`, for about 3 min. The last run shows errors.
fn until(command: &str, wanted: &str) -> String {
    format!(
        "for i in $(seq 50); do [ \"$(exec 2>/dev/null; {command})\" = {wanted} ] && break; sleep 2; done; {command}"
    )
}

/// Returns a command that writes through the VIP and retries until it succeeds.
fn write(lab: &TestFleet) -> String {
    format!("for i in $(seq 20); do {} && exit; sleep 2; done; exit 1", sql(lab, "CREATE TEMP TABLE t (x int)"))
}

/// Returns a command that runs SQL on the primary through the VIP.
fn sql(lab: &TestFleet, statement: &str) -> String {
    let key: serde_json::Value = serde_json::from_str(&lab.read("fleet.key")).expect("JSON");
    let password = key["secrets"]["odoo"].as_str().expect("a password");
    format!(
        "PGPASSWORD={password} psql -AtXq 'host=10.10.0.100 port=5000 user=odoo dbname=postgres sslmode=verify-ca \
         sslrootcert=/run/bakehouse/tls/ca.crt connect_timeout=10' -c '{statement}'"
    )
}
