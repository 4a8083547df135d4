//! Forwards clients of PostgreSQL on this host to the database of a node.

use std::convert::Infallible;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fleet::postgres::{LONGEST_STARTUP, fatal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::client::Client;
use super::forward::CONNECTIONS;
use crate::error::{Error, Result};

/// Name of the socket in its folder, as libpq has it for PostgreSQL's usual port.
const NAME: &str = ".s.PGSQL.5432";
/// Time limit for a client to read why it is refused.
const REFUSAL: Duration = Duration::from_secs(5);

/// A Unix socket for clients on this host, in a folder that only the user can enter.
pub(crate) struct PostgresSocket {
    listener: UnixListener,
    folder: PathBuf,
}

impl PostgresSocket {
    /// Makes the folder, and listens.
    ///
    /// # Errors
    /// If the folder cannot be made, or its path is too long for a socket.
    pub(crate) fn open() -> Result<Self> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
        let parent = runtime.unwrap_or_else(std::env::temp_dir);
        // The folder has this mode from its begin, whatever the umask is.
        let only_user = Permissions::from_mode(0o700);
        let folder = tempfile::Builder::new().prefix("bakehouse-psql-").permissions(only_user).tempdir_in(&parent);
        let folder = folder.map_err(Error::io("make a folder in", &parent))?;
        let path = folder.path().join(NAME);
        let listener = UnixListener::bind(&path).map_err(Error::io("listen at", &path))?;
        Ok(Self { listener, folder: folder.keep() })
    }

    /// Returns the folder. The caller removes it.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Forwards clients to a path of a node's API, such as `/v1/open/postgres`.
///
/// # Errors
/// If the listener fails.
pub(crate) async fn forward_postgres(
    client: &Client,
    node: &str,
    path: &str,
    socket: &PostgresSocket,
) -> Result<Infallible> {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let permit = room.clone().acquire_owned().await;
        let accepted = socket.listener.accept().await;
        let (stream, _) = accepted.map_err(Error::io("accept connections at", &socket.folder))?;
        let (client, node, path) = (client.clone(), node.to_owned(), path.to_owned());
        tokio::spawn(async move {
            let _permit = permit;
            relay(&client, &node, &path, stream).await;
        });
    }
}

async fn relay(client: &Client, node: &str, path: &str, mut stream: UnixStream) {
    match client.stream(node, path).await {
        Ok(mut node) => {
            // Either end may close the stream at any time.
            let _ = copy_bidirectional(&mut stream, &mut node).await;
        }
        Err(e) => {
            let refuse = async {
                // The kernel discards the reply to a client whose message was not read.
                let _ = stream.read(&mut vec![0; LONGEST_STARTUP]).await?;
                stream.write_all(&fatal(&e.chain())).await
            };
            let _ = timeout(REFUSAL, refuse).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;
    use fleet::postgres::{Messages, PROTOCOL_3, kind, report, startup};
    use std::os::unix::fs::MetadataExt as _;

    #[tokio::test(flavor = "multi_thread")]
    async fn only_the_user_enters_and_a_refusal_reaches_the_client() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        for (node, expected) in [("db-1", None), ("no-such", Some("no-such"))] {
            let (client, socket) = (fleet.client(), PostgresSocket::open().unwrap());
            let folder = socket.folder().to_owned();
            assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
            let server = tokio::spawn(async move {
                forward_postgres(&client, node, "/v1/open/postgres", &socket).await.map(|never| match never {})
            });
            let mut stream = UnixStream::connect(folder.join(NAME)).await.unwrap();
            if let Some(expected) = expected {
                stream.write_all(&startup(PROTOCOL_3, &[])).await.unwrap();
                let (mut reply, mut messages) = (Vec::new(), Messages::new(1 << 16));
                stream.read_to_end(&mut reply).await.unwrap();
                messages.feed(&reply);
                let message = messages.take().unwrap().remove(0);
                let error = report(&message.body);
                assert!(message.kind == kind::ERROR && error.severity == "FATAL", "{error:?}");
                assert!(error.message.contains(expected), "{error:?}");
            } else {
                // The test's node answers every stream as a web page.
                stream.write_all(b"GET /x HTTP/1.1\r\n\r\n").await.unwrap();
                let mut reply = vec![0; 500];
                let count = stream.read(&mut reply).await.unwrap();
                let reply = String::from_utf8_lossy(&reply[..count]).into_owned();
                assert!(reply.contains("echo /v1/open/postgres: GET /x"), "{reply}");
            }
            server.abort();
            std::fs::remove_dir_all(folder).unwrap();
        }
    }
}
