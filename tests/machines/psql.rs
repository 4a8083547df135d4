//! `bakehouse psql`, `odoo shell` and `open postgres` on a fleet in containers. The test of `journals.rs` starts the fleet.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bakehouse_tests::TestFleet;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::runbooks::with_input;

/// Runs SQL and Python, and leaves the database as it was.
pub(super) fn operators_run_sql_and_python(lab: &TestFleet) {
    sql_reads_and_writes(lab);
    sql_ends_with_its_client(lab);
    other_roles_are_refused(lab);
    odoo_runs_scripts(lab);
    psql_connects(lab);
}

fn sql_reads_and_writes(lab: &TestFleet) {
    let begun = Instant::now();
    // The primary creates the users of operators some seconds after its start.
    while lab.run(&["psql", "-c", "select 1"]).status != 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "{}", lab.run(&["psql", "-c", "select 1"]).err);
        sleep(Duration::from_secs(1));
    }
    println!("users of operators: after {:.0} s", begun.elapsed().as_secs_f64());
    let begun = Instant::now();
    let table = lab.ok(&["psql", "-c", "select 1 as one"]).out;
    println!("psql: {:.1} s\n{table}", begun.elapsed().as_secs_f64());
    assert_eq!(table, " one\n-----\n   1\n(1 row)\n");
    let users = lab.ok(&["psql", "-o", "csv", "-c", "select login from res_users where login = 'admin'"]).out;
    assert_eq!(users, "login\nadmin\n");
    assert_eq!(with_input(lab, &["psql", "-o", "json"], "select 1 as a, null as b").out, "{\"a\":1,\"b\":null}\n");
    let result = lab.ok(&["psql", "--json", "-c", "select 'x' as a"]).result();
    assert_eq!((&result["user"], &result["statements"][0]["rows"][0][0]), (&"bakehouse_reader".into(), &"x".into()));

    let create = "create table bakehouse_test (a int)";
    lab.run(&["psql", "-c", create]).fails(1, &["read-only transaction", "help: add `--write`"]);
    assert_eq!(lab.ok(&["psql", "--write", "-c", create]).out, "CREATE TABLE\n");
    let owner = "select tableowner from pg_tables where tablename = 'bakehouse_test'";
    assert_eq!(lab.ok(&["psql", "-o", "csv", "-c", owner]).out, "tableowner\nodoo\n");
    assert_eq!(lab.ok(&["psql", "--write", "-c", "drop table bakehouse_test"]).out, "DROP TABLE\n");
    lab.run(&["psql", "--write", "-c", "copy res_users to program 'id'"]).fails(1, &["42501"]);

    let primary = lab.ok(&["psql", "--json", "-c", "select 1"]).result()["node"].as_str().expect("a node").to_owned();
    let standby = if primary == "one-1" { "two-1" } else { "one-1" };
    assert!(lab.ok(&["psql", standby, "-c", "select pg_is_in_recovery()"]).out.contains(" t\n"));
    lab.run(&["psql", "monitor-1", "-c", "select 1"]).fails(1, &["monitor-1 does not run PostgreSQL"]);
    // The node's log has the SQL of the operator.
    let log = lab.ok(&["logs", &primary, "-u", "firstboot", "-n", "1000", "--grep", "bakehouse_reader on odoo"]).out;
    assert!(log.contains(": \"select 1 as one\": begins"), "{log}");
}

fn sql_ends_with_its_client(lab: &TestFleet) {
    let sleeping = "select pg_sleep(100), 'killed'";
    let mut child = lab.command(&["psql", "-c", sleeping]).stdout(Stdio::null()).spawn().expect("bakehouse starts");
    let count = "select count(*) from pg_stat_activity where query like '%pg_sleep(100)%' and state = 'active' and pid \
                 <> pg_backend_pid()";
    let counted = || lab.ok(&["psql", "-o", "csv", "-c", count]).out;
    let until = |expected: &str| {
        let begun = Instant::now();
        while counted() != format!("count\n{expected}\n") {
            assert!(begun.elapsed() < Duration::from_secs(20), "{} backends, not {expected}", counted());
            sleep(Duration::from_millis(300));
        }
        begun.elapsed().as_secs_f64()
    };
    until("1");
    child.kill().expect("a child");
    child.wait().expect("a child");
    println!("the query of a killed client: cancelled after {:.1} s", until("0"));
    lab.run(&["psql", "--seconds", "2", "-c", sleeping]).fails(1, &["57014", "--seconds"]);
}

fn other_roles_are_refused(lab: &TestFleet) {
    for role in ["viewer", "operator"] {
        let folder = lab.dir.join("others");
        let folder = folder.to_str().expect("a UTF-8 path");
        lab.ok(&["operator", "add", role, "--role", role, "--endpoint", "local", "-o", folder]);
        let file = format!("{folder}/{role}.operator");
        for args in
            [&["psql", "one-1", "-c", "select 1"][..], &["odoo", "shell", "one-1", "-c", "1"], &["open", "postgres"]]
        {
            let args = [args, &["--operator", &file]].concat();
            lab.run(&args).fails(1, &["needs the role admin", "bakehouse operator add NAME --role admin"]);
        }
    }
}

fn odoo_runs_scripts(lab: &TestFleet) {
    let begun = Instant::now();
    let users = lab.ok(&["odoo", "shell", "-c", "print(env['res.users'].search_count([]))"]);
    println!("odoo shell: {:.1} s", begun.elapsed().as_secs_f64());
    assert!(users.out.trim().parse::<u32>().is_ok_and(|count| count > 0), "{}{}", users.out, users.err);
    let broken = with_input(lab, &["odoo", "shell"], "print(1)\nprint(\n");
    assert!(broken.status != 0 && broken.err.contains("SyntaxError"), "{}: {}", broken.status, broken.err);
    // What a script does not commit is not there.
    let set = "env['ir.config_parameter'].set_param('bakehouse.test', '7')";
    let print = "print(env['ir.config_parameter'].get_param('bakehouse.test'))";
    let script = |text: &str| {
        let done = with_input(lab, &["odoo", "shell", "two-1"], text);
        assert_eq!(done.status, 0, "{}{}", done.out, done.err);
        done.out.trim().to_owned()
    };
    assert_eq!(script(&format!("{set}\n{print}\n")), "7");
    assert_eq!(script(print), "False");
    assert_eq!(script(&format!("{set}\nenv.cr.commit()\n")), "");
    let delete = "env['ir.config_parameter'].set_param('bakehouse.test', False)\nenv.cr.commit()\n";
    assert_eq!(script(&format!("{print}\n{delete}")), "7");
    lab.run(&["odoo", "shell", "monitor-1", "-c", "1"]).fails(1, &["monitor-1 does not run Odoo"]);
    let log = lab.ok(&["logs", "--role", "app", "-u", "firstboot", "-n", "1000", "--grep", "odoo shell"]).out;
    assert!(log.contains("search_count([]))\": begins") && log.contains("exit code 0"), "{log}");
}

fn psql_connects(lab: &TestFleet) {
    let mut open = lab.command(&["open", "postgres"]).stdout(Stdio::piped()).spawn().expect("bakehouse starts");
    let mut line = String::new();
    let mut out = BufReader::new(open.stdout.take().expect("a pipe"));
    out.read_line(&mut line).expect("a line");
    println!("{line}");
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!((words[0], words[1], &words[3..5]), ("psql", "-h", &["-U", "bakehouse_reader"][..]));
    let databases =
        Command::new(words[0]).args(&words[1..]).args(["-XAtc", "select datname from pg_database"]).output();
    let databases = databases.expect("this host has psql");
    let text = String::from_utf8_lossy(&databases.stdout).into_owned();
    assert!(text.lines().any(|name| name == "odoo"), "{text}{}", String::from_utf8_lossy(&databases.stderr));
    kill(Pid::from_raw(i32::try_from(open.id()).expect("a pid")), Signal::SIGINT).expect("a process");
    assert_eq!(open.wait().expect("a child").code(), Some(130));
    assert!(!Path::new(words[2]).exists(), "{} remains", words[2]);
}
