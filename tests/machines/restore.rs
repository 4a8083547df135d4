//! Point-in-time recovery of the database, from backups on another node and from an object store.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::lan::{end, enter};
use bakehouse_tests::{Machine, TestFleet, root};

const PSQL: &str = "setpriv --reuid=postgres --regid=postgres --clear-groups psql -AtXq -v ON_ERROR_STOP=1";
const PGBACKREST: &str = "setpriv --reuid=postgres --regid=postgres --clear-groups pgbackrest \
    --config=/run/pgbackrest/pgbackrest.conf --log-level-console=off --stanza=main";

/// Address of the object store: this host on the machines' network, beyond the machines' own addresses.
const STORE: &str = "198.18.255.254";
const KEY: &str = "a-key";
const SECRET: &str = "a-secret";

#[test]
fn restores_database_to_point_in_time() {
    let lab = lab_of("restore");
    lab.init();
    let (hub, db) = build(&lab);
    goes_back(&lab, &hub, db);
}

/// The object store has a self-signed certificate that only the fleet trusts.
#[test]
fn restores_database_from_object_store() {
    let lab = lab_of("restore-s3");
    certificate(&lab.dir);
    lab.edit(
        "fleet.toml",
        "node = \"hub-1\"",
        &format!(
            "s3 = {{ bucket = \"backups\", endpoint = \"{STORE}:9000\", region = \"lab\", path_style = true, \
             ca = \"store.crt\" }}"
        ),
    );
    let mut init = lab.command(&["init"]);
    let init = init.arg(&lab.dir).env("BAKEHOUSE_S3_KEY", KEY).env("BAKEHOUSE_S3_SECRET", SECRET).status();
    assert!(init.expect("bakehouse starts").success());
    let (hub, db) = build(&lab);
    enter();
    let _store = Store::open(&lab.dir, &hub.lan());
    goes_back(&lab, &hub, db);
    let kept = fs::read_dir(lab.dir.join("store/backups/restore/backup/main")).expect("a folder");
    assert!(kept.count() > 1, "the object store has no backup");
}

fn lab_of(name: &str) -> TestFleet {
    let lab = TestFleet::empty(name);
    fs::copy(root().join("tests/fleets/restore.toml"), lab.dir.join("fleet.toml")).expect("the fleet exists");
    lab
}

fn build(lab: &TestFleet) -> (Machine, Machine) {
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    (Machine::for_node(lab, "hub-1"), Machine::for_node(lab, "db-1"))
}

fn goes_back(lab: &TestFleet, hub: &Machine, db: Machine) {
    hub.start();
    db.start();
    hub.wait_for(&["bakehouse: ready (hub-1)"]);
    db.wait_for(&["bakehouse: ready (db-1)"]);
    let sql = |text: &str| db.ok(&format!("{PSQL} -c \"{text}\""));

    // One row before the first backup, one row after it, and then the mistake: a DELETE of all rows.
    sql("CREATE TABLE books (name text); INSERT INTO books VALUES ('first')");
    until(&db, &format!("{PGBACKREST} info --output=json | grep -q '\"label\"'"));
    sql("INSERT INTO books VALUES ('second')");
    let before = sql("SELECT date_trunc('second', now()) + interval '1 second'");
    db.ok("sleep 3");
    sql("DELETE FROM books");
    let wal = sql("SELECT pg_walfile_name(pg_switch_wal())");
    // The WAL of the mistake is archived, too.
    archived(&db, &wal);
    assert_eq!(sql("SELECT count(*) FROM books"), "0");
    db.cut_power();

    lab.edit("fleet.toml", "[backup]", &format!("[backup]\nrestore = \"{before}\""));
    lab.edit("fleet.toml", "version = \"1\"", "version = \"2\"");
    lab.ok(&["build", "db"]);
    let replacement = lab.ok(&["ticket", "db-1", "--replace"]).out;
    drop(db);
    let db = Machine::for_node(lab, "db-1");
    db.start_with(&replacement);
    db.wait_for(&["bakehouse: ready (db-1)"]);
    let sql = |text: &str| db.ok(&format!("{PSQL} -c \"{text}\""));
    until(&db, &format!("[ $({PSQL} -c 'SELECT pg_is_in_recovery()') = f ]"));
    assert_eq!(sql("SELECT string_agg(name, ' ' ORDER BY name) FROM books"), "first second");

    // The restored database accepts writes and archives its own WAL.
    sql("INSERT INTO books VALUES ('third')");
    let wal = sql("SELECT pg_walfile_name(pg_switch_wal())");
    archived(&db, &wal);
    for node in [hub, &db] {
        assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");
        // A unit that systemd restarts again and again never reaches the state `failed`.
        let restarts: u32 = node.ok("systemctl show -P NRestarts pgbackrest").parse().expect("a number");
        assert!(restarts < 5, "systemd restarted pgbackrest {restarts} times");
    }
    // A reboot must not restore a second time.
    db.ok("sync");
    db.cut_power();
    db.start_with(&replacement);
    db.wait_for(&["bakehouse: ready (db-1)"]);
    assert_eq!(sql("SELECT count(*) FROM books"), "3");
}

/// Creates a key and a self-signed certificate for the object store's address.
fn certificate(dir: &Path) {
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30"]);
    openssl.args(["-subj", &format!("/CN={STORE}"), "-keyout", "store.key", "-out", "store.crt"]);
    let done = openssl.current_dir(dir).stderr(Stdio::null()).status().expect("openssl");
    assert!(done.success());
}

/// The object store, socat in front of it for TLS, and socat on the machines' network.
struct Store([Child; 3]);

impl Store {
    fn open(dir: &Path, lan: &str) -> Self {
        let program: PathBuf = root().join("target/tools/bin/s3s-fs");
        assert!(program.exists(), "`make roles` installs it");
        let folder = dir.join("store");
        fs::create_dir_all(folder.join("backups")).expect("the lab is writable");
        let bridge = end(lan, &format!("TUN:{STORE}/16,tun-type=tap,tun-name=store0,iff-no-pi,iff-up"), "store0");
        let mut store = Command::new(program);
        store.args(["--host", "127.0.0.1", "--port", "8014", "--access-key", KEY, "--secret-key", SECRET]).arg(folder);
        let mut door = Command::new("socat");
        door.arg("OPENSSL-LISTEN:9000,fork,reuseaddr,verify=0,cert=store.crt,key=store.key").arg("TCP:127.0.0.1:8014");
        door.current_dir(dir);
        let start = |command: &mut Command| {
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the store starts")
        };
        Self([bridge, start(&mut store), start(&mut door)])
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

/// Waits until the repository has this WAL segment.
#[track_caller]
fn archived(db: &Machine, wal: &str) {
    until(db, &format!("{PGBACKREST} archive-get {wal} /run/postgresql/segment"));
}

/// Repeats a command until it succeeds, for at most 10 min.
#[track_caller]
fn until(machine: &Machine, command: &str) {
    let begun = Instant::now();
    while machine.exec(command).status != 0 {
        assert!(begun.elapsed() < Duration::from_secs(600), "`{command}` does not succeed");
        sleep(Duration::from_secs(2));
    }
}
