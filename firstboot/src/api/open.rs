//! Streams of bytes to web pages of the node's services, for an operator's browser.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use fleet::OperatorRole;
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::listener::Client;
use super::reply::{Answer, Refusal, upgrade};
use crate::server::copy::copy_both;

/// Time limit for the connection to the service.
const CONNECT: Duration = Duration::from_secs(2);
/// Longest time without a byte in either direction.
const IDLE: Duration = Duration::from_secs(600);

/// A service with a web page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    Prometheus,
    Alertmanager,
    Haproxy,
}

impl Service {
    pub(super) fn new(name: &str) -> Option<Self> {
        [Self::Prometheus, Self::Alertmanager, Self::Haproxy].into_iter().find(|service| service.name() == name)
    }

    /// Returns the name in paths.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Prometheus => "prometheus",
            Self::Alertmanager => "alertmanager",
            Self::Haproxy => "haproxy",
        }
    }

    /// Returns the role that the page needs. A user of Alertmanager's page can silence alerts.
    pub(super) fn role(self) -> OperatorRole {
        match self {
            Self::Prometheus | Self::Haproxy => OperatorRole::Viewer,
            Self::Alertmanager => OperatorRole::Operator,
        }
    }

    fn port(self) -> u16 {
        match self {
            Self::Prometheus => 9090,
            Self::Alertmanager => 9093,
            Self::Haproxy => 8404,
        }
    }

    /// Returns the roles of the nodes that run the service.
    fn runs_on(self) -> &'static [&'static str] {
        match self {
            Self::Prometheus | Self::Alertmanager => &["monitor"],
            Self::Haproxy => &["hub", "app"],
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
    let at = SocketAddr::from((node.address, service.port()));
    let failed = |why: String| Refusal::new(StatusCode::BAD_GATEWAY, format!("{at} does not answer{why}"));
    let stream = match timeout(CONNECT, TcpStream::connect(at)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => return Err(failed(format!(": {e}"))),
        Err(_) => return Err(failed(String::new())),
    };
    let _ = stream.set_nodelay(true);
    let client = client.clone();
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(request).await else { return };
        tokio::select! {
            // Either end may close the stream at any time.
            _ = copy_both(TokioIo::new(upgraded), stream, IDLE) => {}
            () = client.until_refused() => {}
        }
    });
    Ok(upgrade())
}
