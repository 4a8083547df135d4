//! The real services of all roles: on one machine with every role, and with each role's own image in a fleet of four
//! machines.

use std::fs;
use std::process::Command;

use bakehouse_tests::{ETCDCTL, Machine, TestFleet, root};

const MONITORS: &str = "prometheus prometheus-alertmanager prometheus-blackbox-exporter prometheus-node-exporter \
    prometheus-postgres-exporter";

/// A minimal browser, which verifies the certificate and stores cookies.
const BROWSER: &str = r"
import http.cookiejar, json, re, ssl, subprocess, time, urllib.request as r
tls = ssl.create_default_context(cafile='/run/bakehouse/tls/ca.crt')
jar = http.cookiejar.CookieJar()
web = r.build_opener(r.HTTPSHandler(context=tls), r.HTTPCookieProcessor(jar))
base = 'https://10.10.0.100'
def get(path):
    with web.open(base + path, timeout=300) as a:
        return a.status, a.headers.get_content_type(), a.read().decode()
def wait():
    # On an emulated processor Odoo takes minutes to start.
    for attempt in range(240):
        try:
            if get('/web/health')[0] == 200:
                return
        except OSError:
            time.sleep(1)
def call(path, **params):
    body = json.dumps({'jsonrpc': '2.0', 'method': 'call', 'params': params}).encode()
    with web.open(r.Request(base + path, body, {'Content-Type': 'application/json'}), timeout=300) as a:
        return json.load(a)
";

const LOGIN_PAGE: &str = r#"
wait()
print(get('/web/health')[0])
status, kind, page = get('/web/login')
print(status, 'name="password"' in page)
sheets = re.findall(r'href="([^"]+\.css[^"]*)"', page)
print(len(sheets) > 0, all(get(s)[:2] == (200, 'text/css') and len(get(s)[2]) > 1000 for s in sheets))
"#;

/// Logs in, restarts HAProxy and Odoo, and prints the session's user again: the session must survive both. Requests
/// that began before a restart must get a response, also when there are more requests than Odoo workers.
const SESSION: &str = r"
import socket
def ask(port):
    line = socket.create_connection(('10.10.0.1', port))
    line.sendall(b'GET /web/login HTTP/1.0\r\nHost: x\r\n\r\n')
    return line
password = open('/run/bakehouse/odoo-admin').read()
print(call('/web/session/authenticate', db='odoo', login='admin', password=password)['result']['uid'])
for port, service, people in (80, 'haproxy', 4), (8069, 'odoo-http', 12):
    asked = [ask(port) for _ in range(people)]
    subprocess.run(['systemctl', 'restart', service], check=True)
    print({line.recv(12)[9:] for line in asked})
    wait()
print(call('/web/session/get_session_info')['result']['uid'])
";

const TARGETS: &str = r"
import json, time, urllib.request as r
def api(path):
    with r.urlopen('http://10.10.0.1:9090/api/v1/' + path, timeout=30) as a:
        return json.load(a)['data']
def look():
    targets = api('targets')['activeTargets']
    down = sorted({t['labels']['job'] + ': ' + t['lastError'] for t in targets if t['health'] != 'up'})
    jobs = ' '.join(sorted({t['labels']['job'] for t in targets}))
    alerts = ' '.join(sorted({a['labels']['alertname'] for a in api('alerts')['alerts'] if a['state'] == 'firing'}))
    return f'down: {down}\njobs: {jobs}\nalerts: {alerts}'
# systemd froze Prometheus and may have restarted it since, so the first scrapes may be missing.
for attempt in range(120):
    try:
        seen = look()
        # Prometheus has no targets right after its start.
        if 'down: []' in seen and 'jobs: a' in seen and seen.endswith('alerts: DeadMan'):
            break
    except OSError as e:
        seen = str(e)
    time.sleep(3)
print(seen)
";

fn python(script: &str) -> String {
    format!("cat > /tmp/script <<'EOF'\n{script}\nEOF\npython3 /tmp/script")
}

#[test]
fn all_roles_work_on_one_machine() {
    let lab = TestFleet::empty("solo");
    fs::copy(root().join("tests/fleets/solo.toml"), lab.dir.join("fleet.toml")).expect("the fleet exists");
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let node = Machine::for_node(&lab, "all-1");
    node.start();
    node.wait_for(&["bakehouse: all-1: starting voter, hub, db, app, monitor, backup"]);
    // The node is ready once it has created Odoo's database. That takes minutes on an emulated processor, so the test
    // freezes the monitor until then.
    node.ok("until systemctl is-active -q role-monitor.target; do sleep 1; done");
    node.ok(&format!("systemctl freeze {MONITORS}"));
    node.wait_for(&["bakehouse: ready (all-1)"]);
    assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");

    // etcd accepts only clients with a certificate.
    assert!(node.ok(&format!("{ETCDCTL} endpoint health 2>&1")).contains("is healthy"));
    let stranger = node.exec("etcdctl --endpoints=https://127.0.0.1:2379 --cacert=/run/bakehouse/tls/ca.crt get x");
    assert_ne!(stranger.status, 0, "{}", stranger.output);

    // The primary accepts a write through the VIP and HAProxy.
    let listed = node.ok("patronictl -c /run/bakehouse/patroni.yml list --format json");
    let members: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!((members[0]["Role"].as_str(), members[0]["State"].as_str()), (Some("Leader"), Some("running")));
    let psql = "PGPASSWORD=$(sed -n 's/^db_password = //p' /run/bakehouse/odoo.conf) psql -AtX \
        'host=10.10.0.100 port=5000 user=odoo dbname=odoo sslmode=verify-ca sslrootcert=/run/bakehouse/tls/ca.crt'";
    assert_eq!(
        node.ok(&format!("{psql} -c 'CREATE TEMP TABLE t AS SELECT 7 AS x' -c 'SELECT x FROM t'")),
        "SELECT 1\n7"
    );
    assert_ne!(node.exec(&psql.replace("verify-ca", "disable")).status, 0, "a login without TLS");
    assert_eq!(node.ok(&format!("{psql} -c 'SHOW data_checksums'")), "on");
    assert_eq!(node.ok("cat /sys/class/watchdog/watchdog0/state"), "active");

    // The primary archives WAL to the repository, and a timer has started the first backup.
    let pgbackrest = "setpriv --reuid=postgres --regid=postgres --clear-groups pgbackrest \
        --config=/run/pgbackrest/pgbackrest.conf --log-level-console=off --stanza=main --output=json info";
    let made = format!("for i in $(seq 120); do {pgbackrest} | grep -q '\"label\"' && exit; sleep 2; done; exit 1");
    node.ok(&made);
    let info: serde_json::Value = serde_json::from_str(&node.ok(pgbackrest)).expect("JSON");
    assert_eq!((info[0]["status"]["code"].as_i64(), info[0]["backup"][0]["error"].as_bool()), (Some(0), Some(false)));

    // Odoo in a browser.
    assert_eq!(node.ok(&python(&format!("{BROWSER}{LOGIN_PAGE}"))), "200\n200 True\nTrue True");
    assert_eq!(node.ok(&python(&format!("{BROWSER}{SESSION}"))), "2\n{b'200'}\n{b'200'}\n2");
    assert_ne!(node.ok(&format!("{psql} -c 'SELECT count(*) FROM http_session'")), "0");
    assert_eq!(node.ok("find /var/lib/odoo/sessions /var/lib/odoo/filestore -type f 2>/dev/null | wc -l"), "0");
    for unit in ["odoo-http", "odoo-websocket", "odoo-cron"] {
        assert_eq!(node.ok(&format!("systemctl is-active {unit}")), "active", "{unit}");
    }

    node.ok(&format!("systemctl thaw {MONITORS}"));
    // Prometheus scrapes every target, and only the dead man's switch fires.
    let seen = node.ok(&python(TARGETS));
    assert!(seen.contains("down: []"), "{seen}");
    assert!(
        seen.contains("jobs: alertmanager etcd haproxy node odoo odoo-node patroni postgres prometheus writes\n"),
        "{seen}"
    );
    assert!(seen.ends_with("alerts: DeadMan"), "{seen}");

    // systemd rates the exposure of every unit of Bakehouse below 5.0, except for those that need root.
    let ours = "early-filter firstboot firstboot-forget bird etcd haproxy keepalived nftables odoo-cron odoo-http odoo-init odoo-ready odoo-websocket patroni postgresql-ready \
        pgbackrest pgbackrest-files pgbackrest-stanza pgbackrest@incr softdog \
        prometheus prometheus-alertmanager prometheus-blackbox-exporter prometheus-node-exporter prometheus-postgres-exporter";
    let mut exposed = Vec::new();
    for unit in ours.split_whitespace() {
        let level = node.exposure(&format!("{unit}.service"));
        println!("{unit}: {level}");
        if level >= 5.0 && !ROOT_BY_TRADE.contains(&unit) {
            exposed.push((unit, level));
        }
    }
    assert!(exposed.is_empty(), "{exposed:#?}");

    // After a power cut the node serves the same data and creates nothing a second time.
    node.ok("journalctl --sync; sync");
    node.cut_power();
    node.start();
    node.wait_for(&["bakehouse: ready (all-1)"]);
    assert!(node.ok("journalctl -b -u odoo-init -o cat").contains("the database exists"));
    assert_eq!(node.ok(&python(&format!("{BROWSER}{LOGIN_PAGE}"))), "200\n200 True\nTrue True");
    node.shut_down();
}

/// Units that need root to configure addresses, routes and packet filters.
const ROOT_BY_TRADE: [&str; 5] = ["bird", "early-filter", "haproxy", "keepalived", "nftables"];

#[test]
fn each_roles_image_boots_in_a_fleet_of_four() {
    let lab = TestFleet::empty("four");
    fs::copy(root().join("tests/fleets/four.toml"), lab.dir.join("fleet.toml")).expect("the fleet exists");
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let nodes = [
        ("hub-1", &["haproxy", "keepalived", "etcd"][..]),
        ("db-1", &["patroni", "pgbackrest", "prometheus-postgres-exporter"]),
        ("app-1", &["haproxy", "odoo-http", "odoo-websocket", "odoo-cron", "etcd"]),
        ("monitor-1", &["prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter", "pgbackrest", "etcd"]),
    ];
    let machines = nodes.map(|(name, _)| Machine::for_node(&lab, name));
    for machine in &machines {
        machine.start();
    }
    for (machine, (name, units)) in machines.iter().zip(nodes) {
        machine.wait_for(&[&format!("bakehouse: ready ({name})")]);
        well(machine, units);
    }
}

#[track_caller]
fn well(node: &Machine, units: &[&str]) {
    for unit in units.iter().chain(&["nftables", "bird", "prometheus-node-exporter"]) {
        assert_eq!(node.ok(&format!("systemctl is-active {unit}")), "active", "{unit}");
    }
    assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");
    // Services listen only on mesh addresses and loopback, except for WireGuard, the agent's API and the web ports.
    let wireguard = node.ok("wg show all listen-port | awk '{print $2}' | paste -sd '|'");
    let open = node.ok(&format!("ss -Hltnu | awk '{{print $5}}' | grep -vE '^(127\\.|\\[::1\\]|10\\.1[01]\\.|.*%lo:|.*%en[a-z0-9]+:(68|546)$|0\\.0\\.0\\.0:(179|3784|4784)$|\\[::\\]:(179|3784|4784)$|(0\\.0\\.0\\.0|\\[::\\]):({wireguard})$|.*:51820$|.*:(80|443)$)' || true"));
    assert_eq!(open, "", "a service listens on all addresses");
}

#[test]
fn odoo_database_seed_is_reproducible_and_has_no_secrets() {
    let lab = TestFleet::empty("seed").with_own_store();
    fs::copy(root().join("tests/fleets/four.toml"), lab.dir.join("fleet.toml")).expect("the fleet exists");
    lab.ok(&["lock"]);
    let made = |lab: &TestFleet| {
        lab.ok(&["build", "app"]);
        let made = fs::read_dir(lab.dir.join("store/made")).expect("a store").flatten().map(|e| e.path());
        made.collect::<Vec<_>>().pop().expect("a generated file")
    };
    let first = made(&lab);
    let bytes = fs::read(&first).expect("the seed");
    fs::remove_file(&first).expect("the seed");
    fs::remove_dir_all(lab.dir.join("build")).expect("the built image");
    assert!(fs::read(made(&lab)).expect("the second seed") == bytes, "two builds gave different seeds");
    // A node adds the fleet's secrets when it creates its database.
    let sql = Command::new("gzip").arg("-dc").stdin(fs::File::open(&first).expect("the seed")).output();
    let sql = String::from_utf8(sql.expect("gzip").stdout).expect("SQL");
    assert!(sql.contains("COPY public.res_users "), "the seed has no users");
    for own in ["database.secret", "database.uuid", "$pbkdf2"] {
        assert!(!sql.contains(own), "the seed has {own}");
    }
}
