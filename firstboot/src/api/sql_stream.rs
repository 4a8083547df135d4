//! Streams of an operator's own client of PostgreSQL, such as psql, to the node's PostgreSQL. The agent replaces the user
//! in the start-up message, and copies all bytes after it.

use std::sync::Arc;
use std::time::Duration;

use fleet::one_line;
use fleet::postgres::{self, CANCEL_REQUEST, GSSENC_REQUEST, LONGEST_STARTUP, SSL_REQUEST};
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use super::listener::Client;
use super::reply::{Answer, upgrade};
use super::{audit, random_id, sql};
use crate::server::copy::copy_both;

/// Time limit for the client's start-up message.
const START: Duration = Duration::from_secs(30);
/// Longest time without a byte in either direction.
const IDLE: Duration = Duration::from_secs(3600);
/// Most requests for encryption before the start-up message.
const ENCRYPTIONS: usize = 2;

/// What a client begins with.
#[derive(Debug, PartialEq, Eq)]
enum Start {
    /// A session in this database, with the packet for PostgreSQL.
    Session { database: String, packet: Vec<u8> },
    /// A request to cancel what another session runs, with its packet.
    Cancel(Vec<u8>),
}

/// Connects to PostgreSQL, and copies the bytes after the reply.
pub(super) async fn open(client: &Arc<Client>, writes: bool, request: Request<Incoming>) -> Answer {
    sql::permitted(client)?;
    let stream = sql::connect(&client.shared().api.postgres).await?;
    let client = client.clone();
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else { return };
        tokio::select! {
            () = session(&client, writes, TokioIo::new(upgraded), stream) => {}
            () = client.until_refused() => {}
        }
    });
    Ok(upgrade())
}

async fn session(
    client: &Client,
    writes: bool,
    mut operator: impl AsyncRead + AsyncWrite + Unpin,
    mut server: UnixStream,
) {
    let (user, default) = (sql::user(writes), &client.shared().api.topology.odoo.database);
    let Ok(Some(start)) = timeout(START, read(&mut operator, user, default)).await else { return };
    match start {
        Start::Cancel(packet) => {
            let _ = timeout(START, server.write_all(&packet)).await;
        }
        Start::Session { database, packet } => {
            let Ok(id) = random_id() else { return };
            let (what, begun) = (format!("open postgres {id}"), Instant::now());
            let _ended = Ended { client, what: &what, begun };
            // PostgreSQL logs each statement of these users.
            audit::begins(client, &format!("{what} as {user} on {}", one_line(&database)));
            if server.write_all(&packet).await.is_ok() {
                // Either end may close the stream at any time.
                let _ = copy_both(operator, server, IDLE).await;
            }
        }
    }
}

/// Logs the end of a session, also if its future is dropped.
struct Ended<'a> {
    client: &'a Client,
    what: &'a str,
    begun: Instant,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        audit::ended(self.client, self.what, &format!("ended after {} s", self.begun.elapsed().as_secs()));
    }
}

/// Reads until a client has sent its start-up message or a cancel request. `None` if its bytes are neither.
async fn read(from: &mut (impl AsyncRead + AsyncWrite + Unpin), user: &str, default: &str) -> Option<Start> {
    for _ in 0..=ENCRYPTIONS {
        let length = usize::try_from(from.read_u32().await.ok()?).ok()?;
        let code = from.read_u32().await.ok()?;
        let mut body = vec![0; length.checked_sub(8).filter(|_| length <= LONGEST_STARTUP)?];
        from.read_exact(&mut body).await.ok()?;
        match code {
            // TLS ends at this process, so the client's session inside it is not encrypted.
            SSL_REQUEST | GSSENC_REQUEST => {
                from.write_all(b"N").await.ok()?;
                from.flush().await.ok()?;
            }
            CANCEL_REQUEST => return Some(Start::Cancel(postgres::cancel(&body))),
            version if version >> 16 == postgres::PROTOCOL_3 >> 16 => {
                let (database, parameters) = as_user(postgres::parameters(&body)?, user, default);
                return Some(Start::Session { database, packet: postgres::startup(version, &parameters) });
            }
            _ => return None,
        }
    }
    None
}

/// Replaces the user in the parameters of a session. Returns the database, too. A session cannot replicate: PostgreSQL
/// would read its statements in another way.
fn as_user(mut parameters: Vec<(String, String)>, user: &str, default: &str) -> (String, Vec<(String, String)>) {
    let of = |name: &str| parameters.iter().find(|(of, _)| of == name).map(|(_, value)| value.clone());
    let asked = of("user");
    // A client without the name of a database sends the name of its user, or nothing.
    let database = of("database").filter(|name| !name.is_empty() && Some(name) != asked.as_ref());
    let database = database.unwrap_or_else(|| default.to_owned());
    parameters.retain(|(name, _)| !["user", "database", "replication"].contains(&name.as_str()));
    let own = [("user", user), ("database", database.as_str())];
    parameters.extend(own.map(|(name, value)| (name.to_owned(), value.to_owned())));
    (database, parameters)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
        all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn the_user_is_the_operators_and_the_database_odoos() {
        for (asked, database) in [
            (&[("user", "postgres"), ("database", "shop")][..], "shop"),
            (&[("user", "anna"), ("database", "anna")], "odoo"),
            (&[("user", "anna")], "odoo"),
            (&[("database", "")], "odoo"),
            (&[("replication", "database"), ("user", "a"), ("user", "postgres")], "odoo"),
        ] {
            let expected = pairs(&[("user", "bakehouse_reader"), ("database", database)]);
            assert_eq!(as_user(pairs(asked), "bakehouse_reader", "odoo"), (database.to_owned(), expected));
        }
        let kept = as_user(pairs(&[("application_name", "psql"), ("user", "a")]), "u", "odoo").1;
        assert_eq!(kept, pairs(&[("application_name", "psql"), ("user", "u"), ("database", "odoo")]));
    }

    /// Sends bytes, and returns the answer and what they begin.
    async fn sent(bytes: Vec<u8>) -> (Vec<u8>, Option<Start>) {
        let (mut ours, mut theirs) = tokio::io::duplex(1 << 16);
        ours.write_all(&bytes).await.unwrap();
        ours.shutdown().await.unwrap();
        let start = read(&mut theirs, "u", "odoo").await;
        drop(theirs);
        let mut answer = Vec::new();
        ours.read_to_end(&mut answer).await.unwrap();
        (answer, start)
    }

    #[tokio::test]
    async fn encryption_is_refused_and_a_cancel_request_passes() {
        let request = |code: u32| [8_u32.to_be_bytes(), code.to_be_bytes()].concat();
        let startup = postgres::startup(postgres::PROTOCOL_3, &pairs(&[("user", "a")]));
        let both = [request(GSSENC_REQUEST), request(SSL_REQUEST), startup.clone()].concat();
        let (answer, start) = sent(both).await;
        assert_eq!(answer, b"NN");
        let packet = postgres::startup(postgres::PROTOCOL_3, &pairs(&[("user", "u"), ("database", "odoo")]));
        assert_eq!(start, Some(Start::Session { database: "odoo".to_owned(), packet }));
        let cancel = postgres::cancel(&[0, 0, 0, 7, 1, 2, 3, 4]);
        assert_eq!(sent(cancel.clone()).await, (Vec::new(), Some(Start::Cancel(cancel))));
    }

    #[tokio::test]
    async fn other_bytes_begin_no_session() {
        let long = [&u32::MAX.to_be_bytes()[..], &postgres::PROTOCOL_3.to_be_bytes(), &[0; 100]].concat();
        let version_2 = postgres::startup(2 << 16, &pairs(&[("user", "a")]));
        let ssl = [8_u32.to_be_bytes(), SSL_REQUEST.to_be_bytes()].concat();
        for bytes in
            [Vec::new(), vec![0, 0, 0, 4, 0, 3, 0, 0], long, version_2, b"GET / HTTP/1.1\r\n".to_vec(), ssl.repeat(4)]
        {
            assert_eq!(sent(bytes.clone()).await.1, None, "{bytes:?}");
        }
    }
}
