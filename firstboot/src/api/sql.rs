//! SQL of operators. The agent is a client of PostgreSQL's Unix socket, as a user that is no superuser: a program such as
//! psql would also run the shell commands of a script. PostgreSQL authenticates the agent's process (`patroni.yml.j2`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fleet::node_api::{ExecEvent, LONGEST_RUN, LONGEST_SCRIPT, SQL_READER, SQL_WRITER, SqlRequest};
use fleet::postgres::{self, Frames, Messages, kind};
use fleet::{encoding, one_line};
use hyper::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{interval, timeout};

use super::journal::BEAT;
use super::listener::Client;
use super::reply::{Answer, LineSender, Refusal, line, lines};
use super::{audit, random_id};
use crate::error::{Error, Result};

/// Time limit for PostgreSQL to begin a session.
const START: Duration = Duration::from_secs(10);
/// Time beyond the limit within which PostgreSQL itself ends a statement that takes too long.
const GRACE: Duration = Duration::from_secs(2);
/// Time limit for PostgreSQL to cancel what it runs.
const CANCEL: Duration = Duration::from_secs(5);
/// Time limit for the client to read the end.
const LAST_EVENT: Duration = Duration::from_secs(60);
/// Longest message before a session begins, in bytes.
const LONGEST_MESSAGE: usize = 64 << 10;
/// Bytes of PostgreSQL's messages in one event.
const PART: usize = 32 << 10;
/// Longest name of a database, in bytes: PostgreSQL's `NAMEDATALEN` less one.
const LONGEST_NAME: usize = 63;

/// Returns the PostgreSQL user of an operator.
pub(super) fn user(writes: bool) -> &'static str {
    if writes { SQL_WRITER } else { SQL_READER }
}

/// Refuses on a node without PostgreSQL, and in a fleet that permits no SQL.
pub(super) fn permitted(client: &Client) -> Result<(), Refusal> {
    let api = &client.shared().api;
    if !api.topology.access.sql {
        let help = "set `sql = true` in `[access]` of fleet.toml, and roll the new images out";
        return Err(Refusal::new(StatusCode::FORBIDDEN, "this fleet permits no SQL of operators").help(help));
    }
    if api.node.has_role("db") {
        return Ok(());
    }
    let text = format!("{} does not run PostgreSQL", api.node.name);
    Err(Refusal::new(StatusCode::NOT_FOUND, text).help("name a node with the role db"))
}

/// Connects to PostgreSQL's socket.
pub(super) async fn connect(socket: &Path) -> Result<UnixStream, Refusal> {
    let failed = |why: String| Refusal::new(StatusCode::BAD_GATEWAY, format!("PostgreSQL does not answer{why}"));
    match timeout(START, UnixStream::connect(socket)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(e)) => Err(failed(format!(": {e}"))),
        Err(_) => Err(failed(String::new())),
    }
}

/// Runs SQL, and returns PostgreSQL's messages while it runs.
pub(super) async fn run(client: &Arc<Client>, asked: SqlRequest) -> Answer {
    let text = checked(client, &asked)?;
    let (api, user) = (&client.shared().api, user(asked.write));
    let database = asked.database.unwrap_or_else(|| api.topology.odoo.database.clone());
    let id = random_id().map_err(|e| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, e.chain()))?;
    let what = format!("sql {id}");
    // The log has the complete text before PostgreSQL gets it.
    audit::begins(
        client,
        &format!("{what} as {user} on {} for up to {} s: {text}", one_line(&database), asked.seconds),
    );
    let name = client.certificate.operator.dns_name();
    let mut session = match Session::begin(&api.postgres, user, &database, &name, asked.seconds).await {
        Ok(session) => session,
        Err(refusal) => {
            audit::ended(client, &what, &format!("failed: {}", refusal.text()));
            return Err(refusal);
        }
    };
    let (to_client, response) = lines();
    let (client, limit) = (client.clone(), Duration::from_secs(asked.seconds.into()) + GRACE);
    tokio::spawn(async move {
        let failed = |text: String| Err(Error::Failed(text));
        let ended = tokio::select! {
            ended = timeout(limit, session.run(&asked.sql, &to_client)) => ended.unwrap_or_else(|_| {
                failed(format!("the statement did not end within its time limit of {} s", asked.seconds))
            }),
            reason = client.until_gone(&to_client) => Err(reason),
        };
        let (event, result) = match ended {
            Ok(failures) => (ExecEvent::Exit(0), if failures { "done, with an error" } else { "done" }.to_owned()),
            Err(e) => {
                let cancelled = if session.cancel().await { "cancelled" } else { "not cancelled within 5 s" };
                let why = format!("{}: {cancelled}", e.chain());
                (ExecEvent::Failed(one_line(&why)), why)
            }
        };
        audit::ended(&client, &what, &result);
        let _ = timeout(LAST_EVENT, to_client.send(Ok(line(&event)))).await;
    });
    Ok(response)
}

/// Checks a request, and returns the SQL for the log.
fn checked(client: &Client, asked: &SqlRequest) -> Result<String, Refusal> {
    permitted(client)?;
    let invalid = |text: String| Refusal::new(StatusCode::BAD_REQUEST, text);
    if asked.sql.trim().is_empty() || asked.sql.contains('\0') {
        return Err(invalid("the request has no SQL".to_owned()));
    }
    if !(1..=LONGEST_RUN).contains(&asked.seconds) {
        return Err(invalid(format!("the time limit is not from 1 to {LONGEST_RUN} s")));
    }
    let is_name = |name: &String| (1..=LONGEST_NAME).contains(&name.len()) && !name.contains('\0');
    if asked.database.as_ref().is_some_and(|name| !is_name(name)) {
        return Err(invalid("the name of the database is not valid".to_owned()));
    }
    let text = format!("{:?}", asked.sql);
    if text.len() > LONGEST_SCRIPT {
        let text = format!("the SQL has {} bytes with its quotes, and may have {LONGEST_SCRIPT}", text.len());
        return Err(invalid(text).help("run several shorter ones, because the log has each of them completely"));
    }
    Ok(text)
}

/// A session of PostgreSQL.
struct Session {
    stream: UnixStream,
    socket: PathBuf,
    /// Key with which a second connection cancels what the session runs.
    key: Vec<u8>,
}

impl Session {
    /// Begins a session.
    async fn begin(socket: &Path, user: &str, database: &str, operator: &str, seconds: u32) -> Result<Self, Refusal> {
        let mut parameters = vec![
            ("user", user.to_owned()),
            ("database", database.to_owned()),
            ("client_encoding", "UTF8".to_owned()),
            ("application_name", format!("psql of {operator}")),
            ("statement_timeout", format!("{seconds}s")),
        ];
        if user == SQL_READER {
            parameters.push(("default_transaction_read_only", "on".to_owned()));
        }
        let parameters: Vec<_> = parameters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut stream = connect(socket).await?;
        let silent = |why: String| Refusal::new(StatusCode::BAD_GATEWAY, format!("PostgreSQL does not answer{why}"));
        let begun = timeout(START, async {
            let sent = stream.write_all(&postgres::startup(postgres::PROTOCOL_3, &parameters)).await;
            sent.map_err(|e| silent(format!(": {e}")))?;
            ready(&mut stream).await
        });
        let key = begun.await.unwrap_or_else(|_| Err(silent(String::new())))?;
        Ok(Self { stream, socket: socket.to_owned(), key })
    }

    /// Runs statements, and sends PostgreSQL's messages to the client. Returns whether one of them is an error. Dropping
    /// the future leaves the statements running.
    async fn run(&mut self, sql: &str, to: &LineSender) -> Result<bool> {
        let failed = || Error::io("talk to", "PostgreSQL");
        self.stream.write_all(&postgres::query(sql)).await.map_err(failed())?;
        let (mut frames, mut failures, mut buffer) = (Frames::default(), false, vec![0; PART]);
        let mut beat = interval(BEAT);
        loop {
            let count = tokio::select! {
                read = self.stream.read(&mut buffer) => read.map_err(failed())?,
                _ = beat.tick() => {
                    let _ = to.send(Ok(Bytes::from_static(b"\n"))).await;
                    continue;
                }
            };
            if count == 0 {
                return Err(Error::Failed("PostgreSQL has closed the session".to_owned()));
            }
            let part = &buffer[..count];
            let kinds = frames.ended(part).map_err(Error::Failed)?;
            let event = ExecEvent::Stdout(encoding::encode(part));
            if to.send(Ok(line(&event))).await.is_err() {
                // The caller ends this wait, and knows the reason.
                std::future::pending::<()>().await;
            }
            for of in kinds {
                match of {
                    kind::ERROR => failures = true,
                    kind::COPY_IN => {
                        let why = "there is no input: use `bakehouse open postgres`, and psql";
                        self.stream.write_all(&postgres::copy_fail(why)).await.map_err(failed())?;
                    }
                    kind::READY => return Ok(failures),
                    _ => {}
                }
            }
        }
    }

    /// Cancels what the session runs. Returns whether PostgreSQL has stopped it.
    async fn cancel(mut self) -> bool {
        let cancelled = timeout(CANCEL, async {
            let mut second = UnixStream::connect(&self.socket).await?;
            second.write_all(&postgres::cancel(&self.key)).await?;
            // PostgreSQL closes the connection when it has sent the signal.
            second.read_to_end(&mut Vec::new()).await?;
            // The last message may be in any part of the rest, so the end of the session is what counts. The server then
            // waits for the next message, and reads the end of the connection.
            self.stream.shutdown().await?;
            let mut rest = vec![0; PART];
            while self.stream.read(&mut rest).await? > 0 {}
            Ok::<_, std::io::Error>(())
        });
        matches!(cancelled.await, Ok(Ok(())))
    }
}

/// Reads until PostgreSQL waits for a query. Returns the session's key.
async fn ready(stream: &mut UnixStream) -> Result<Vec<u8>, Refusal> {
    let broken = |why: String| Refusal::new(StatusCode::BAD_GATEWAY, format!("PostgreSQL's reply is not valid: {why}"));
    let (mut messages, mut key, mut buffer) = (Messages::new(LONGEST_MESSAGE), Vec::new(), vec![0; PART]);
    loop {
        let count = stream.read(&mut buffer).await.map_err(|e| broken(e.to_string()))?;
        if count == 0 {
            return Err(broken("the session has ended".to_owned()));
        }
        messages.feed(&buffer[..count]);
        for message in messages.take().map_err(broken)? {
            match message.kind {
                kind::AUTHENTICATION if message.body != [0; 4] => return Err(refused(&message_of_password())),
                kind::ERROR => return Err(refused(&postgres::report(&message.body))),
                kind::BACKEND_KEY => key = message.body,
                kind::READY => return Ok(key),
                _ => {}
            }
        }
    }
}

/// Returns what it means that PostgreSQL asks for a password: an earlier version has written its rules.
fn message_of_password() -> postgres::Report {
    let (message, code) = ("PostgreSQL requires a password".to_owned(), "28000".to_owned());
    postgres::Report { message, code, ..postgres::Report::default() }
}

/// Returns the refusal of a session.
fn refused(report: &postgres::Report) -> Refusal {
    let text = format!("PostgreSQL refuses the session: {} ({})", report.message, report.code);
    let refusal = Refusal::new(StatusCode::CONFLICT, text);
    match report.code.as_str() {
        // Invalid authorization, or an unknown user.
        "28000" => refusal.help(
            "the primary creates the users of operators within a minute, once it runs a version with `[access] sql = \
             true`",
        ),
        "3D000" => refusal.help("add `--database postgres`, and read the names from pg_database"),
        "53300" => refusal.help("end other sessions of operators"),
        _ => refusal,
    }
}
