//! Client of the nodes' API.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use fleet::node_api::{ACTION_REPLY_SECONDS, ActionReply, ActionRequest};
use fleet::one_line;
use fleet_https::{ByteStream, Connection, Error as HttpsError, Lines, PeerError, request};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::route::{Entry, Place, Routes};
use crate::error::{Error, Result};
use crate::keys::operator::OperatorFile;

/// Maximum number of nodes to which the client talks at the same time.
const PARALLEL: usize = 64;
/// Time limit of a reply to an action. Nodes reply within 8 s.
const ACTION: Duration = Duration::from_secs(ACTION_REPLY_SECONDS + 12);
/// Longest reply to an action, in bytes.
const LONGEST_ACTION_REPLY: usize = 64 << 10;

/// Client of the nodes' API.
#[derive(Clone)]
pub(crate) struct Client {
    pub(super) routes: Arc<Routes>,
    /// Nodes that [`Client::each`] works for.
    room: Arc<Semaphore>,
}

/// A connection to a node's API. It carries one request at a time.
pub(crate) struct NodeConnection {
    node: String,
    connection: Connection,
    place: Place,
}

/// Lines of a node's reply. The reply ends when the caller drops them.
pub(crate) struct NodeLines {
    lines: Lines,
    _connection: Connection,
    _place: Place,
}

/// Stream of bytes to a service of a node.
pub(crate) struct NodeStream {
    stream: ByteStream,
    _place: Place,
}

impl AsyncRead for NodeStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context, buf: &mut ReadBuf) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buf)
    }
}

impl AsyncWrite for NodeStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl NodeLines {
    /// Returns the next line; `None` after the last one.
    ///
    /// # Errors
    /// If the connection ends before the reply, or no line arrives in time.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        Ok(self.lines.next().await?)
    }
}

impl NodeConnection {
    /// Gets a value from the node.
    ///
    /// # Errors
    /// If the node does not answer, refuses, or replies with more than `longest` bytes.
    pub(crate) async fn get<T: DeserializeOwned>(&mut self, path: &str, longest: usize) -> Result<T> {
        let request = request("GET", &self.node, path, &[], Bytes::new())?;
        parse(&self.node, &self.connection.ask(request, longest).await?)
    }

    /// Sends a request whose reply is a sequence of lines. `idle` is the longest time between two lines.
    ///
    /// # Errors
    /// If the node does not answer, or refuses.
    pub(crate) async fn lines(mut self, method: &str, path: &str, body: Bytes, idle: Duration) -> Result<NodeLines> {
        let lines = self.connection.lines(request(method, &self.node, path, &[], body)?, idle).await?;
        Ok(NodeLines { lines, _connection: self.connection, _place: self.place })
    }
}

impl Client {
    /// Makes a client that presents an operator's certificate. `entries` are the hubs and their hosts, and `port` is the
    /// port of the hubs' API.
    ///
    /// # Errors
    /// If the certificate or the key is invalid.
    pub(crate) fn new(operator: &OperatorFile, entries: Vec<Entry>, port: u16) -> Result<Self> {
        let routes = Routes::new(operator, entries, port)?;
        let room = Arc::new(Semaphore::new(PARALLEL.min(routes.capacity())));
        Ok(Self { routes, room })
    }

    /// Returns the number of connections that the hubs permit to an operator at the same time.
    pub(crate) fn capacity(&self) -> usize {
        self.routes.capacity()
    }

    /// Returns whether a hub has answered.
    pub(crate) fn has_reached_a_hub(&self) -> bool {
        self.routes.has_answered()
    }

    /// Connects to a node, through any hub.
    ///
    /// # Errors
    /// If no hub answers, or none reaches the node. The message has the cause of each.
    pub(crate) async fn connect(&self, node: &str) -> Result<NodeConnection> {
        let (connection, place) = self.routes.connect(node).await?;
        Ok(NodeConnection { node: node.to_owned(), connection, place })
    }

    /// Gets a value from a node, within a time limit.
    ///
    /// # Errors
    /// If the node does not answer, refuses, or replies with more than `longest` bytes.
    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        node: &str,
        path: &str,
        longest: usize,
        limit: Duration,
    ) -> Result<T> {
        let asked = async { self.connect(node).await?.get(path, longest).await };
        let late = |_| Err(Error::Failed(format!("{node} does not answer within {} s", limit.as_secs_f32())));
        timeout(limit, asked).await.unwrap_or_else(late)
    }

    /// Posts a value to a node, within a time limit, and gets a value.
    ///
    /// # Errors
    /// If the node does not answer, or refuses.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        node: &str,
        path: &str,
        value: &impl Serialize,
        limit: Duration,
    ) -> Result<T> {
        let body = serde_json::to_vec(value).map_err(Error::Json)?;
        let asked = async {
            let NodeConnection { mut connection, place: _place, .. } = self.connect(node).await?;
            parse(node, &connection.ask(request("POST", node, path, &[], body.into())?, LONGEST_ACTION_REPLY).await?)
        };
        let late = |_| Err(Error::Failed(format!("{node} does not answer within {} s", limit.as_secs_f32())));
        timeout(limit, asked).await.unwrap_or_else(late)
    }

    /// Posts an action to a node. Returns the node's reply, which may come before the action's end.
    ///
    /// # Errors
    /// If the node does not answer, or refuses.
    pub(super) async fn act(&self, node: &str, path: &str, action: &ActionRequest) -> Result<ActionReply> {
        let body = serde_json::to_vec(action).map_err(Error::Json)?;
        let NodeConnection { connection, place: _place, .. } = self.connect(node).await?;
        let mut connection = connection.with_limit(ACTION);
        let asked = connection.ask(request("POST", node, path, &[], body.into())?, LONGEST_ACTION_REPLY).await;
        match asked {
            // The action counts, also if a newer node describes it in another way.
            Ok(reply) => Ok(parse(node, &reply).unwrap_or_default()),
            Err(e) if is_refusal(&e) => Err(e.into()),
            Err(e) => Err(Error::Failed(format!(
                "{}\n  help: {node} may do it nevertheless: look at `bakehouse status` before you repeat the command",
                Error::from(e).chain()
            ))),
        }
    }

    /// Waits until the client talks to fewer than 64 nodes.
    pub(super) async fn room(&self) -> Option<OwnedSemaphorePermit> {
        self.room.clone().acquire_owned().await.ok()
    }

    /// Opens a stream of bytes to a service of a node.
    ///
    /// # Errors
    /// If the node does not answer, or refuses.
    pub(crate) async fn stream(&self, node: &str, path: &str) -> Result<NodeStream> {
        let NodeConnection { connection, place, .. } = self.connect(node).await?;
        Ok(NodeStream { stream: connection.stream(path).await?, _place: place })
    }

    /// Runs an operation for each node, for up to 64 nodes at the same time. Returns the results in the order of the
    /// nodes.
    pub(crate) async fn each<T, F>(&self, nodes: &[String], operation: impl Fn(Self, String) -> F) -> Vec<Result<T>>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let tasks: Vec<_> = nodes
            .iter()
            .map(|node| {
                let (client, work) = (self.clone(), operation(self.clone(), node.clone()));
                tokio::spawn(async move {
                    let _room = client.room().await;
                    work.await
                })
            })
            .collect();
        let mut results = Vec::with_capacity(tasks.len());
        for task in tasks {
            results.push(task.await.unwrap_or_else(|e| Err(Error::cannot("run a task")(e))));
        }
        results
    }
}

/// Parses a node's reply. Its texts cannot control a terminal, and have one line each.
fn parse<T: DeserializeOwned>(node: &str, reply: &[u8]) -> Result<T> {
    let value = serde_json::from_slice(reply).and_then(|value| serde_json::from_value(cleaned(value)));
    value.map_err(Error::cannot(format!(
        "read the reply of {node}\n  help: use a version of bakehouse that is not older than the node's"
    )))
}

fn cleaned(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(one_line(&text)),
        Value::Array(all) => all.into_iter().map(cleaned).collect(),
        Value::Object(all) => all.into_iter().map(|(key, value)| (one_line(&key), cleaned(value))).collect(),
        other => other,
    }
}

fn is_refusal(e: &HttpsError) -> bool {
    matches!(e, HttpsError::Network { source: PeerError::Refused(_) | PeerError::Status { .. }, .. })
}

/// Returns whether an error would come again: the operator or the request is refused.
fn is_final(e: &HttpsError) -> bool {
    match e {
        HttpsError::Network { source: PeerError::Status { status, .. }, .. } => {
            matches!(status.as_u16(), 401 | 403)
        }
        // Others, such as 429 and 503, pass.
        HttpsError::Network { source: PeerError::Refused(refusal), .. } => {
            matches!(refusal.status.as_u16(), 400 | 401 | 403 | 404 | 409)
        }
        HttpsError::Network { .. } => false,
        _ => true,
    }
}

/// Returns whether a later request, or another hub, would give the same answer.
pub(super) fn is_final_error(e: &Error) -> bool {
    matches!(e, Error::Https(e) if is_final(e))
}

/// Returns whether a node has refused a command because its fleet permits none.
pub(crate) fn permits_no_commands(e: &Error) -> bool {
    let Error::Https(HttpsError::Network { source: PeerError::Refused(refusal), .. }) = e else { return false };
    refusal.status.as_u16() == 403 && refusal.error.message.starts_with("this fleet permits no commands")
}

/// Runs a future of a client to its end.
///
/// # Errors
/// If the kernel starts no thread.
pub(crate) fn run<F: Future>(future: F) -> Result<F::Output> {
    // TLS sessions with many nodes take processor time.
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 8));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let runtime = runtime.map_err(Error::cannot("start the network client"))?;
    let output = runtime.block_on(future);
    // A lookup of a name may still run. The command does not wait for it.
    runtime.shutdown_background();
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;
    use fleet::OperatorRole;
    use fleet::node_api::REBOOT_PATH;
    use tokio::time::sleep;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_refused_action_has_the_nodes_reason_and_is_not_repeated() {
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1"]).await;
        fleet.node("db-1").set_primary(true);
        let client = fleet.client();
        let plain = ActionRequest::default();
        let e = client.act("db-1", REBOOT_PATH, &plain).await.unwrap_err().chain();
        // The node's text has an escape sequence.
        assert!(e.ends_with("the fleet loses its last primary\u{fffd}]52;c;AAAA\n  help: add `--force db-1`"), "{e:?}");
        assert_eq!(fleet.connections("hub-1") + fleet.connections("hub-2"), 1);
        let forced = ActionRequest { force: Some("db-1".to_owned()), ..plain };
        assert!(client.act("db-1", REBOOT_PATH, &forced).await.unwrap().done);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_viewer_reads_and_does_not_act() {
        let fleet = Fleet::start_for(OperatorRole::Viewer, &["hub-1"], &["db-1"]).await;
        let client = fleet.client();
        let status: Value = client.get("db-1", "/v1/status", 1 << 20, Duration::from_secs(10)).await.unwrap();
        assert_eq!(status["phase"], "ready");
        let e = client.act("db-1", REBOOT_PATH, &ActionRequest::default()).await.unwrap_err();
        assert!(is_final_error(&e) && e.chain().contains("needs the role operator"), "{}", e.chain());
    }

    #[test]
    fn texts_of_a_node_have_one_line_without_escape_sequences() {
        let reply = br#"{"a\u001b[2J": ["one\ntwo\u202e", {"b": "\u009b31m\r"}], "n": 18446744073709551615}"#;
        let value: Value = parse("db-1", reply).unwrap();
        let expected = serde_json::json!({
            "a\u{fffd}[2J": ["one two\u{fffd}", {"b": "\u{fffd}31m"}],
            "n": u64::MAX
        });
        assert_eq!(value, expected);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn results_are_in_the_order_of_the_nodes() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        let names: Vec<String> = (0..200).map(|n| n.to_string()).collect();
        let slow_first = |_: Client, name: String| async move {
            sleep(Duration::from_millis(if name.len() == 1 { 30 } else { 1 })).await;
            Ok(name)
        };
        let results = fleet.client().each(&names, slow_first).await;
        assert_eq!(results.into_iter().collect::<Result<Vec<_>>>().unwrap(), names);
    }
}
