//! The fleet's page: a process of its own on monitors (`bakehouse-page.service`), behind a Unix socket that only the agent
//! may open. The agent verifies operators. The page gets their name, and no right.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::handshake;
use hyper::header::{HOST, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::NodeApi;
use super::listener::Client;
use super::reply::{Answer, Refusal};

/// Paths of the page that a browser with an operator's certificate opens without `bakehouse open`.
pub(super) const PATHS: [&str; 5] = ["/", "/events", "/page.css", "/page.js", "/icon.svg"];
/// Name of the page's socket, beside that of the journal.
const SOCKET: &str = "page.sock";
/// Time limit for the connection. systemd starts the page with the first one.
const CONNECT: Duration = Duration::from_secs(2);
/// Time limit of the reply's header. The page waits for Prometheus for a second.
const REPLY: Duration = Duration::from_secs(10);
/// Header with the operator's name and role, for the page's text.
const VIEWER: HeaderName = HeaderName::from_static("bakehouse-viewer");

/// Connects to the page of this node.
pub(super) async fn connect(api: &NodeApi) -> Result<UnixStream, Refusal> {
    let failed = |why: String| Refusal::new(StatusCode::BAD_GATEWAY, format!("the page does not answer{why}"));
    match timeout(CONNECT, UnixStream::connect(api.journal.with_file_name(SOCKET))).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(e)) => Err(failed(format!(": {e}"))),
        Err(_) => Err(failed(String::new())),
    }
}

/// Forwards a browser's request to the page, without the browser's headers.
pub(super) async fn forward(client: &Arc<Client>, request: &Request<Incoming>) -> Answer {
    let api = &client.shared().api;
    if !api.node.has_role("monitor") {
        let text = format!("{} has no page", api.node.name);
        return Err(Refusal::new(StatusCode::NOT_FOUND, text).help("open it on a node with the role monitor"));
    }
    let failed = |e: hyper::Error| Refusal::new(StatusCode::BAD_GATEWAY, format!("the page does not answer: {e}"));
    let (mut sender, connection) = handshake(TokioIo::new(connect(api).await?)).await.map_err(failed)?;
    // The task ends with the connection, which closes when the reply ends or its body is dropped.
    tokio::spawn(connection);
    let operator = &client.certificate.operator;
    let mut own = Request::new(Empty::<Bytes>::new());
    if let Some(path) = request.uri().path_and_query() {
        *own.uri_mut() = path.clone().into();
    }
    own.headers_mut().insert(HOST, HeaderValue::from_static("page"));
    let viewer = HeaderValue::from_str(&format!("{} ({})", operator.name, operator.role));
    own.headers_mut().extend(viewer.ok().map(|viewer| (VIEWER, viewer)));
    let reply = timeout(REPLY, sender.send_request(own)).await;
    let reply = reply.map_err(|_| Refusal::new(StatusCode::GATEWAY_TIMEOUT, "the page does not answer"))?;
    let (mut parts, body) = reply.map_err(failed)?.into_parts();
    parts.headers.remove(hyper::header::TRANSFER_ENCODING);
    Ok(Response::from_parts(parts, body.map_err(io::Error::other).boxed_unsync()))
}
