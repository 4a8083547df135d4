//! A mistake is undone: the database goes back to a moment, from the backups on another node.

use std::fs;

use bakehouse_tests::{Lab, Machine, root};

const PSQL: &str = "setpriv --reuid=postgres --regid=postgres --clear-groups psql -AtXq -v ON_ERROR_STOP=1";
const PGBACKREST: &str = "setpriv --reuid=postgres --regid=postgres --clear-groups pgbackrest \
    --config=/run/pgbackrest/pgbackrest.conf --log-level-console=off --stanza=main --output=json info";

#[test]
fn the_database_goes_back_to_a_moment() {
    let lab = Lab::empty("restore");
    fs::copy(root().join("tests/fleets/restore.toml"), lab.dir.join("fleet.toml")).expect("the fleet is there");
    lab.init();
    lab.ok(&["lock"]);
    lab.ok(&["build"]);
    let (hub, db) = (Machine::of(&lab, "hub-1"), Machine::of(&lab, "db-1"));
    hub.start();
    db.start();
    hub.wait_for(&["bakehouse: ready (hub-1)"]);
    db.wait_for(&["bakehouse: ready (db-1)"]);
    let sql = |text: &str| db.ok(&format!("{PSQL} -c \"{text}\""));

    // What is in the first backup, what came after it, and the mistake.
    sql("CREATE TABLE books (name text); INSERT INTO books VALUES ('first')");
    hub.ok(&until(&format!("{PGBACKREST} | grep -q '\"label\"'")));
    sql("INSERT INTO books VALUES ('second')");
    let before = sql("SELECT date_trunc('second', now()) + interval '1 second'");
    db.ok("sleep 3");
    sql("DELETE FROM books");
    let wal = sql("SELECT pg_walfile_name(pg_switch_wal())");
    // The repository has the mistake too.
    hub.ok(&until(&format!("ls /var/lib/pgbackrest/archive/main/*/* | grep -q {wal}")));
    assert_eq!(sql("SELECT count(*) FROM books"), "0");
    db.cut_power();

    lab.edit("fleet.toml", "node = \"hub-1\"", &format!("node = \"hub-1\"\nrestore = \"{before}\""));
    lab.edit("fleet.toml", "version = \"1\"", "version = \"2\"");
    lab.ok(&["build", "db"]);
    let replacement = lab.ok(&["ticket", "db-1", "--replace"]).out;
    let db = Machine::of(&lab, "db-1");
    db.start_with(&replacement);
    db.wait_for(&["bakehouse: ready (db-1)"]);
    let sql = |text: &str| db.ok(&format!("{PSQL} -c \"{text}\""));
    db.ok(&until(&format!("[ $({PSQL} -c 'SELECT pg_is_in_recovery()') = f ]")));
    assert_eq!(sql("SELECT string_agg(name, ' ' ORDER BY name) FROM books"), "first second");

    // It is a database like any other: it takes writes, and its own WAL goes to the repository.
    sql("INSERT INTO books VALUES ('third')");
    let wal = sql("SELECT pg_walfile_name(pg_switch_wal())");
    hub.ok(&until(&format!("ls /var/lib/pgbackrest/archive/main/*/* | grep -q {wal}")));
    for node in [&hub, &db] {
        assert_eq!(node.ok("systemctl --failed --no-legend --plain"), "");
    }
    // A restart restores nothing again.
    db.ok("sync");
    db.cut_power();
    db.start_with(&replacement);
    db.wait_for(&["bakehouse: ready (db-1)"]);
    assert_eq!(sql("SELECT count(*) FROM books"), "3");
}

/// Repeats a command until it succeeds, for ten minutes at most.
fn until(command: &str) -> String {
    format!("for i in $(seq 300); do {command} && exit; sleep 2; done; exit 1")
}
