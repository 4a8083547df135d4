//! SQL, and Python in Odoo's shell. `tests/cluster/sql.rs` has the real PostgreSQL.

use fleet::node_api::{ODOO_SHELL_PATH, OdooShellRequest, SQL_PATH, SqlRequest};
use fleet::postgres::{self, Messages, kind};
use serde::Serialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::*;

/// Makes the node one with these roles.
async fn with_roles(roles: &'static [&str]) -> TestNode {
    let add = |topology: &mut Topology| topology.nodes[0].roles.extend(roles.iter().map(|role| (*role).to_owned()));
    TestNode::start_with(add).await
}

async fn send(connection: &mut Connection, path: &str, body: &impl Serialize) -> Result<Lines, String> {
    let body = serde_json::to_vec(body).unwrap().into();
    let lines = connection.lines(request("POST", "node", path, &[], body).unwrap(), Duration::from_secs(30)).await;
    lines.map_err(|e| fleet::ErrorChain::new(&e).to_string())
}

fn select(sql: &str) -> SqlRequest {
    SqlRequest { sql: sql.to_owned(), seconds: 7, ..SqlRequest::default() }
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind][..], &u32::try_from(body.len() + 4).unwrap().to_be_bytes(), body].concat()
}

/// A server that accepts sessions, and answers each query with its text as the tag of a statement. `sleep` has no answer
/// until another connection cancels it. Returns what it has read, as texts.
fn serve(node: &TestNode) -> Arc<Mutex<Vec<String>>> {
    let read: Arc<Mutex<Vec<String>>> = Arc::default();
    let listener = UnixListener::bind(node.dir.path().join("postgres.sock")).unwrap();
    let (seen, cancelled) = (read.clone(), Arc::new(tokio::sync::Notify::new()));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(session(stream, seen.clone(), cancelled.clone()));
        }
    });
    read
}

async fn session(
    mut stream: UnixStream,
    seen: Arc<Mutex<Vec<String>>>,
    cancelled: Arc<tokio::sync::Notify>,
) -> Option<()> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace('\0', " ");
    let length = stream.read_u32().await.ok()?;
    let mut startup = vec![0; length as usize - 4];
    stream.read_exact(&mut startup).await.ok()?;
    if startup[..4] == postgres::CANCEL_REQUEST.to_be_bytes() {
        assert_eq!(startup[4..], [0, 0, 0, 7, 1, 2, 3, 4]);
        cancelled.notify_one();
        return None;
    }
    seen.lock().unwrap().push(text(&startup[4..]));
    if text(&startup).contains("database missing") {
        let error = message(kind::ERROR, b"VFATAL\0C3D000\0Mno such database\0\0");
        return stream.write_all(&error).await.ok();
    }
    let ready = message(kind::READY, b"I");
    let key = message(kind::BACKEND_KEY, &[0, 0, 0, 7, 1, 2, 3, 4]);
    stream.write_all(&[message(kind::AUTHENTICATION, &[0; 4]), key, ready.clone()].concat()).await.ok()?;
    let mut messages = Messages::new(1 << 20);
    loop {
        let mut buffer = [0; 1000];
        let count = stream.read(&mut buffer).await.ok().filter(|count| *count > 0)?;
        messages.feed(&buffer[..count]);
        for of in messages.take().unwrap() {
            let sql = text(&of.body).trim_end().to_owned();
            seen.lock().unwrap().push(sql.clone());
            if sql == "sleep" {
                cancelled.notified().await;
            }
            let complete = message(kind::COMPLETE, &of.body);
            stream.write_all(&[complete, ready.clone()].concat()).await.ok()?;
        }
    }
}

#[tokio::test]
async fn sql_runs_as_the_reader_and_the_log_has_all_of_it() {
    let node = with_roles(&["db"]).await;
    let seen = serve(&node);
    let mut connection = node.connect(OperatorRole::Admin).await;
    let lines = send(&mut connection, SQL_PATH, &select("select\n'ü'")).await.unwrap();
    let events = events(lines).await;
    assert_eq!(events.last(), Some(&ExecEvent::Exit(0)), "{events:?}");
    let bytes = events.iter().filter_map(|event| match event {
        ExecEvent::Stdout(text) => Some(encoding::decode(text).unwrap()),
        _ => None,
    });
    let mut messages = Messages::new(1000);
    messages.feed(&bytes.collect::<Vec<_>>().concat());
    let kinds: Vec<u8> = messages.take().unwrap().iter().map(|message| message.kind).collect();
    assert_eq!(kinds, [kind::COMPLETE, kind::READY]);
    let write = SqlRequest { write: true, database: Some("shop".to_owned()), ..select("delete") };
    send(&mut connection, SQL_PATH, &write).await.unwrap();
    node.log.until("done").await;
    let seen = seen.lock().unwrap().clone();
    let reader = "user bakehouse_reader database odoo client_encoding UTF8 application_name psql of \
                  anna.admin.operator statement_timeout 7s default_transaction_read_only on  ";
    assert_eq!(seen[..2], [reader, "select\n'ü'"]);
    assert!(seen[2].starts_with("user bakehouse_writer database shop ") && !seen[2].contains("read_only"), "{seen:?}");
    let begins = node.log.lines(r#" as bakehouse_reader on odoo for up to 7 s: "select\n'ü'": begins"#);
    assert!(begins.len() == 1 && begins[0].contains("anna.admin.operator from hub-1: sql "), "{begins:?}");
}

#[tokio::test]
async fn sql_is_cancelled_when_its_time_or_its_operator_is_gone() {
    let node = with_roles(&["db"]).await;
    serve(&node);
    let mut connection = node.connect(OperatorRole::Admin).await;
    let lines = send(&mut connection, SQL_PATH, &SqlRequest { seconds: 1, ..select("sleep") }).await.unwrap();
    let events = events(lines).await;
    let Some(ExecEvent::Failed(why)) = events.last() else { panic!("{events:?}") };
    assert_eq!(why, "the statement did not end within its time limit of 1 s: cancelled");
    let lines = send(&mut connection, SQL_PATH, &select("sleep")).await.unwrap();
    drop((lines, connection));
    node.log.until("the operator has disconnected: cancelled").await;
}

#[tokio::test]
async fn sql_needs_a_role_a_switch_and_a_database() {
    let node = with_roles(&["db"]).await;
    let mut operator = node.connect(OperatorRole::Operator).await;
    let mut admin = node.connect(OperatorRole::Admin).await;
    let e = send(&mut operator, SQL_PATH, &select("select 1")).await.err().unwrap();
    assert!(e.contains("needs the role admin"), "{e}");
    let long = format!("select '{}'", "x".repeat(70_000));
    for (asked, expected) in [
        (select(" \n"), "has no SQL"),
        (select("a\0b"), "has no SQL"),
        (select(&long), "may have 65536"),
        (SqlRequest { seconds: 0, ..select("x") }, "from 1 to 3600 s"),
        (SqlRequest { database: Some(String::new()), ..select("x") }, "name of the database"),
        (select("select 1"), "PostgreSQL does not answer"),
    ] {
        let e = send(&mut admin, SQL_PATH, &asked).await.err().unwrap();
        assert!(e.contains(expected), "{e}");
    }
    serve(&node);
    let missing = SqlRequest { database: Some("missing".to_owned()), ..select("select 1") };
    let e = send(&mut admin, SQL_PATH, &missing).await.err().unwrap();
    assert!(e.contains("no such database (3D000)") && e.contains("--database postgres"), "{e}");
    node.log.until("failed: PostgreSQL refuses the session: no such database").await;

    let hub = TestNode::start().await;
    let e = send(&mut hub.connect(OperatorRole::Admin).await, SQL_PATH, &select("x")).await.err().unwrap();
    assert!(e.contains("hub-1 does not run PostgreSQL") && e.contains("role db"), "{e}");
    let closed = TestNode::start_with(|topology| topology.access.sql = false).await;
    let e = send(&mut closed.connect(OperatorRole::Admin).await, SQL_PATH, &select("x")).await.err().unwrap();
    assert!(e.contains("permits no SQL") && e.contains("`sql = true`"), "{e}");
}

#[tokio::test]
async fn a_script_reaches_odoos_shell_as_its_standard_input() {
    let node = with_roles(&["app"]).await;
    let mut admin = node.connect(OperatorRole::Admin).await;
    // Longer than a pipe's buffer, with the quotes of the log shorter than the limit.
    let script = format!("print(1)\n#{}", "x".repeat(65_000));
    let asked = OdooShellRequest { script: script.clone(), seconds: 7 };
    let lines = send(&mut admin, ODOO_SHELL_PATH, &asked).await.unwrap();
    node.systemd.until_starting().await;
    node.systemd.end_command(1, 1, "exit-code");
    assert_eq!(events(lines).await, [ExecEvent::Stdout("b3V0".to_owned()), ExecEvent::Exit(1)]);
    for _ in 0..500 {
        if node.systemd.input().is_some() {
            break;
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(node.systemd.input(), Some(script));
    let command = node.systemd.command();
    assert!(command[0] == "/usr/bin/odoo" && command[1] == "shell" && command.contains(&"--no-http".to_owned()));
    let started = node.systemd.calls()[0].clone();
    for property in ["User s", "LoadCredential a(ss)", "EnvironmentFiles a(sb)", "SystemCallFilter (bas)"] {
        assert!(started.contains(property), "{property}: {started}");
    }
    // The variables of root do not reach Odoo.
    assert!(!started.contains("Environment as") && !started.contains("StandardInput s"), "{started}");
    node.log.until("exit code 1").await;
    let begins = node.log.lines(r#" on odoo for up to 7 s: "print(1)\n#xx"#);
    assert!(begins.len() == 1 && begins[0].ends_with("xx\": begins"), "{}", begins.len());

    for (asked, expected) in [
        (OdooShellRequest { script: String::new(), seconds: 7 }, "has no script"),
        (OdooShellRequest { script: "x".repeat(66_000), seconds: 7 }, "may have 65536"),
        (OdooShellRequest { script: "x".to_owned(), seconds: 3601 }, "from 1 to 3600 s"),
    ] {
        let e = send(&mut admin, ODOO_SHELL_PATH, &asked).await.err().unwrap();
        assert!(e.contains(expected), "{e}");
    }
    let hub = TestNode::start().await;
    let asked = OdooShellRequest { script: "x".to_owned(), seconds: 7 };
    let e = send(&mut hub.connect(OperatorRole::Admin).await, ODOO_SHELL_PATH, &asked).await.err().unwrap();
    assert!(e.contains("hub-1 does not run Odoo"), "{e}");
}
