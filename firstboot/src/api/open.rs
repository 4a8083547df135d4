//! Streams of bytes to services of the node: web pages for an operator's browser, and PostgreSQL for psql.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fleet::OperatorRole;
use fleet::node_api::{OPEN_POSTGRES, OPEN_POSTGRES_WRITE};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::listener::Client;
use super::reply::{Answer, Body, Refusal, upgrade};
use super::{page, sql_stream};
use crate::server::copy::copy_both;

/// Time limit for the connection to the service.
const CONNECT: Duration = Duration::from_secs(2);
/// Longest time without a byte in either direction.
const IDLE: Duration = Duration::from_secs(600);

/// A service of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    Prometheus,
    Alertmanager,
    Haproxy,
    /// The fleet's page, which has a Unix socket.
    Page,
    /// PostgreSQL, as the user that reads or the one that writes.
    Postgres {
        writes: bool,
    },
}

impl Service {
    pub(super) fn new(name: &str) -> Option<Self> {
        let databases = [false, true].map(|writes| Self::Postgres { writes });
        let pages = [Self::Prometheus, Self::Alertmanager, Self::Haproxy, Self::Page];
        pages.into_iter().chain(databases).find(|service| service.name() == name)
    }

    /// Returns the name in paths.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Prometheus => "prometheus",
            Self::Alertmanager => "alertmanager",
            Self::Haproxy => "haproxy",
            Self::Page => "page",
            Self::Postgres { writes: false } => OPEN_POSTGRES,
            Self::Postgres { writes: true } => OPEN_POSTGRES_WRITE,
        }
    }

    /// Returns the role that the service needs. A user of Alertmanager's page can silence alerts.
    pub(super) fn role(self) -> OperatorRole {
        match self {
            Self::Prometheus | Self::Haproxy | Self::Page => OperatorRole::Viewer,
            Self::Alertmanager => OperatorRole::Operator,
            Self::Postgres { .. } => OperatorRole::Admin,
        }
    }

    /// Returns the port at the node's mesh address.
    fn port(self) -> Option<u16> {
        match self {
            Self::Prometheus => Some(9090),
            Self::Alertmanager => Some(9093),
            Self::Haproxy => Some(8404),
            Self::Page | Self::Postgres { .. } => None,
        }
    }

    /// Returns the roles of the nodes that run the service.
    fn runs_on(self) -> &'static [&'static str] {
        match self {
            Self::Prometheus | Self::Alertmanager | Self::Page => &["monitor"],
            Self::Haproxy => &["hub", "app"],
            Self::Postgres { .. } => &["db"],
        }
    }
}

/// Connects to a service, and copies the bytes after the reply.
pub(super) async fn open(client: &Arc<Client>, service: Service, request: Request<Incoming>) -> Answer {
    let node = &client.shared().api.node;
    if !service.runs_on().iter().any(|role| node.has_role(role)) {
        let text = format!("{} does not run this service", node.name);
        let help = format!("open it on a node with the role {}", service.runs_on().join(" or "));
        return Err(Refusal::new(StatusCode::NOT_FOUND, text).help(help));
    }
    if let Service::Postgres { writes } = service {
        return sql_stream::open(client, writes, request).await;
    }
    let Some(port) = service.port() else {
        let stream = page::connect(&client.shared().api).await?;
        return Ok(copy(client, request, stream));
    };
    let at = SocketAddr::from((node.address, port));
    let failed = |why: String| Refusal::new(StatusCode::BAD_GATEWAY, format!("{at} does not answer{why}"));
    let stream = match timeout(CONNECT, TcpStream::connect(at)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => return Err(failed(format!(": {e}"))),
        Err(_) => return Err(failed(String::new())),
    };
    let _ = stream.set_nodelay(true);
    Ok(copy(client, request, stream))
}

/// Copies the bytes after the reply.
fn copy<S>(client: &Arc<Client>, request: Request<Incoming>, stream: S) -> Response<Body>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let client = client.clone();
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else { return };
        tokio::select! {
            // Either end may close the stream at any time.
            _ = copy_both(TokioIo::new(upgraded), stream, IDLE) => {}
            () = client.until_refused() => {}
        }
    });
    upgrade()
}
