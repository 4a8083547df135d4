//! The services of all roles, for real: in one machine that has every role, and each role's
//! own image booted alone.

use std::fs;
use std::process::Command;

use bakehouse_tests::{ETCDCTL, Lab, Machine, root};

const MONITORS: &str = "prometheus prometheus-alertmanager prometheus-blackbox-exporter prometheus-node-exporter \
    prometheus-postgres-exporter";

/// A browser in a few lines: it checks the certificate, keeps cookies, loads the style sheets.
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
    # Odoo takes its time to start on an emulated processor.
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

/// Logs in; the session must outlive the service that made it, and lie in no file. Whoever asked before HAProxy
/// stops is answered, or Odoo, though there are more of them than workers.
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
# It was frozen, and may be started again; what it missed it sees before long.
for attempt in range(120):
    try:
        seen = look()
        # At its start it has no targets yet.
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
fn every_service_works_with_the_others() {
    let lab = Lab::empty("solo");
    fs::copy(root().join("tests/fleets/solo.toml"), lab.dir.join("fleet.toml")).expect("the fleet is there");
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let node = Machine::of(&lab, "all-1");
    node.start();
    node.wait_for(&["bakehouse: all-1: starting voter, hub, db, app, monitor, backup"]);
    // Ready means that Odoo's database was made: minutes of an emulated processor, which the
    // monitor would share.
    node.ok("until systemctl is-active -q role-monitor.target; do sleep 1; done");
    node.ok(&format!("systemctl freeze {MONITORS}"));
    node.wait_for(&["bakehouse: ready (all-1)"]);
    assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");

    // etcd answers those who show a certificate, and only those.
    assert!(node.ok(&format!("{ETCDCTL} endpoint health 2>&1")).contains("is healthy"));
    let stranger = node.exec("etcdctl --endpoints=https://127.0.0.1:2379 --cacert=/run/bakehouse/tls/ca.crt get x");
    assert_ne!(stranger.status, 0, "{}", stranger.output);

    // A primary, reached by the VIP through HAProxy, takes a write.
    let listed = node.ok("patronictl -c /run/bakehouse/patroni.yml list --format json");
    let members: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    assert_eq!((members[0]["Role"].as_str(), members[0]["State"].as_str()), (Some("Leader"), Some("running")));
    let psql = "PGPASSWORD=$(sed -n 's/^db_password = //p' /run/bakehouse/odoo.conf) psql -AtX \
        'host=10.10.0.100 port=5000 user=odoo dbname=odoo sslmode=verify-ca sslrootcert=/run/bakehouse/tls/ca.crt'";
    assert_eq!(
        node.ok(&format!("{psql} -c 'CREATE TEMP TABLE t AS SELECT 7 AS x' -c 'SELECT x FROM t'")),
        "SELECT 1\n7"
    );
    assert_ne!(node.exec(&psql.replace("verify-ca", "disable")).status, 0, "a password could cross in clear");
    assert_eq!(node.ok(&format!("{psql} -c 'SHOW data_checksums'")), "on");
    assert_eq!(node.ok("cat /sys/class/watchdog/watchdog0/state"), "active");

    // WAL arrives in the repository, and the first backup was made without being asked for.
    let pgbackrest = "setpriv --reuid=postgres --regid=postgres --clear-groups pgbackrest \
        --config=/run/pgbackrest/pgbackrest.conf --log-level-console=off --stanza=main --output=json info";
    let made = format!("for i in $(seq 120); do {pgbackrest} | grep -q '\"label\"' && exit; sleep 2; done; exit 1");
    node.ok(&made);
    let info: serde_json::Value = serde_json::from_str(&node.ok(pgbackrest)).expect("JSON");
    assert_eq!((info[0]["status"]["code"].as_i64(), info[0]["backup"][0]["error"].as_bool()), (Some(0), Some(false)));

    // Odoo, as a browser sees it.
    assert_eq!(node.ok(&python(&format!("{BROWSER}{LOGIN_PAGE}"))), "200\n200 True\nTrue True");
    assert_eq!(node.ok(&python(&format!("{BROWSER}{SESSION}"))), "2\n{b'200'}\n{b'200'}\n2");
    assert_ne!(node.ok(&format!("{psql} -c 'SELECT count(*) FROM http_session'")), "0");
    assert_eq!(node.ok("find /var/lib/odoo/sessions /var/lib/odoo/filestore -type f 2>/dev/null | wc -l"), "0");
    for unit in ["odoo-http", "odoo-websocket", "odoo-cron"] {
        assert_eq!(node.ok(&format!("systemctl is-active {unit}")), "active", "{unit}");
    }

    node.ok(&format!("systemctl thaw {MONITORS}"));
    // The monitor sees all of it, and is quiet but for the sign that it lives.
    let seen = node.ok(&python(TARGETS));
    assert!(seen.contains("down: []"), "{seen}");
    assert!(
        seen.contains("jobs: alertmanager etcd haproxy node odoo odoo-node patroni postgres prometheus writes\n"),
        "{seen}"
    );
    assert!(seen.ends_with("alerts: DeadMan"), "{seen}");

    // Every unit of ours has little to lose.
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

    // An hour later, or after a power cut, the same: nothing is made twice.
    node.ok("journalctl --sync; sync");
    node.cut_power();
    node.start();
    node.wait_for(&["bakehouse: ready (all-1)"]);
    assert!(node.ok("journalctl -b -u odoo-init -o cat").contains("the database exists"));
    assert_eq!(node.ok(&python(&format!("{BROWSER}{LOGIN_PAGE}"))), "200\n200 True\nTrue True");
    node.shut_down();
}

/// They move addresses, routes and packet filters: that is what root is for.
const ROOT_BY_TRADE: [&str; 5] = ["bird", "early-filter", "haproxy", "keepalived", "nftables"];

/// Each role's own image, and the four of them as a fleet.
#[test]
fn each_roles_image_comes_up_beside_the_others() {
    let lab = Lab::empty("four");
    fs::copy(root().join("tests/fleets/four.toml"), lab.dir.join("fleet.toml")).expect("the fleet is there");
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let nodes = [
        ("hub-1", &["haproxy", "keepalived", "etcd"][..]),
        ("db-1", &["patroni", "pgbackrest", "prometheus-postgres-exporter"]),
        ("app-1", &["haproxy", "odoo-http", "odoo-websocket", "odoo-cron", "etcd"]),
        ("monitor-1", &["prometheus", "prometheus-alertmanager", "prometheus-blackbox-exporter", "pgbackrest", "etcd"]),
    ];
    let machines = nodes.map(|(name, _)| Machine::of(&lab, name));
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
    // Nothing listens but on the mesh and this machine itself, and WireGuard.
    let wireguard = node.ok("wg show all listen-port | awk '{print $2}' | paste -sd '|'");
    let open = node.ok(&format!("ss -Hltnu | awk '{{print $5}}' | grep -vE '^(127\\.|\\[::1\\]|10\\.1[01]\\.|.*%lo:|.*%en[a-z0-9]+:(68|546)$|0\\.0\\.0\\.0:(179|3784|4784)$|\\[::\\]:(179|3784|4784)$|(0\\.0\\.0\\.0|\\[::\\]):({wireguard})$|.*:51820$|.*:(80|443)$)' || true"));
    assert_eq!(open, "", "listening to everybody");
}

#[test]
fn what_an_odoo_database_begins_with_is_the_same_bytes_each_time() {
    let lab = Lab::empty("seed").with_own_store();
    fs::copy(root().join("tests/fleets/four.toml"), lab.dir.join("fleet.toml")).expect("the fleet");
    lab.ok(&["lock"]);
    let made = |lab: &Lab| {
        lab.ok(&["build", "app"]);
        let made = fs::read_dir(lab.dir.join("store/made")).expect("a store").flatten().map(|e| e.path());
        made.collect::<Vec<_>>().pop().expect("what was made")
    };
    let first = made(&lab);
    let bytes = fs::read(&first).expect("it was made");
    fs::remove_file(&first).expect("it was made");
    fs::remove_dir_all(lab.dir.join("build")).expect("it was built");
    assert!(fs::read(made(&lab)).expect("it was made again") == bytes, "it is another one");
    // Nothing of it is a secret: what is a fleet's own comes on the node.
    let sql = Command::new("gzip").arg("-dc").stdin(fs::File::open(&first).expect("it is there")).output();
    let sql = String::from_utf8(sql.expect("gzip").stdout).expect("SQL");
    assert!(sql.contains("COPY public.res_users "), "it has users");
    for own in ["database.secret", "database.uuid", "$pbkdf2"] {
        assert!(!sql.contains(own), "it has {own}");
    }
}
