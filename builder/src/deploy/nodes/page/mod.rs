//! The fleet's page, for a browser on the operator's machine.
//!
//! A monitor serves the page, and must not act: an attacker who takes a monitor must not own the other nodes. So there
//! are two servers on loopback, and a browser treats them as two sites (origins):
//!
//! - The view forwards `GET` requests to the monitor. It replaces the reply's headers, so that the monitor cannot relax
//!   the browser's rules for the page.
//! - The steering ([`steering`]) has pages of its own, and never a byte of the monitor. A button of the page is a link to
//!   `act` of the view, which checks it and sends the browser to a question. If the operator confirms, this program
//!   carries the action out with the operator's own certificate.
//!
//! A hostile page can ask the operator a true question, and nothing else: it can neither read nor answer it.

mod html;
mod monitor;
mod steering;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use fleet::{Operator, OperatorRole};
use hyper::body::Incoming;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, LOCATION,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, Semaphore};

use super::client::Client;
use super::forward::{Body, CONNECTIONS, Entrance, HEAD, Verdict, plain};
use crate::error::{Error, Result};
use crate::keys::operator::KnownNode;
use monitor::{Monitor, Upstream};
use steering::Steering;

/// Path of the page in the API of a monitor.
pub(crate) const PAGE_PATH: &str = "/v1/open/page";
/// What the browser may load for the page, whatever the monitor's reply says. The monitor sends the same
/// (`page/src/server.rs`).
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types page";
/// Types of content that the page has.
const TYPES: [&str; 6] =
    ["text/html", "text/css", "text/javascript", "image/svg+xml", "text/event-stream", "text/plain"];
/// Headers with which the page learns who looks at it, and whether its buttons work. Only its text depends on them.
const VIEWER: HeaderName = HeaderName::from_static("bakehouse-viewer");
const ACTS: HeaderName = HeaderName::from_static("bakehouse-acts");

/// The page of a monitor, with the operator who looks at it.
pub(crate) struct FleetPage<'a> {
    /// Client with the operator's certificate.
    pub(crate) client: &'a Client,
    /// The monitor.
    pub(crate) node: &'a str,
    /// Name of the fleet.
    pub(crate) fleet: &'a str,
    /// The operator.
    pub(crate) operator: &'a Operator,
    /// All nodes.
    pub(crate) nodes: &'a [KnownNode],
}

struct View {
    entrance: Entrance,
    monitor: Monitor,
    viewer: HeaderValue,
    /// `None` for a viewer, who may not act.
    steering: Option<Arc<Steering>>,
}

impl FleetPage<'_> {
    /// Connects to the page once.
    ///
    /// # Errors
    /// If no hub reaches the monitor, or the monitor has no page.
    pub(crate) async fn check(&self) -> Result<()> {
        self.client.stream(self.node, PAGE_PATH).await.map(drop)
    }

    /// Serves the page at `entrance`, without end.
    ///
    /// # Errors
    /// If this host has no free port, or a listener fails.
    pub(crate) async fn serve(&self, entrance: Entrance) -> Result<Infallible> {
        let acts = self.operator.role >= OperatorRole::Operator;
        let steering = if acts { Some(Arc::new(Steering::open(self).await?)) } else { None };
        let viewer = format!("{} ({})", self.operator.name, self.operator.role);
        let monitor = Monitor::new(self.client, self.node);
        let viewer = viewer.parse().map_err(Error::cannot("name the viewer"))?;
        let view = Arc::new(View { entrance, monitor, viewer, steering });
        let steers = async {
            match &view.steering {
                Some(steering) => steering.clone().serve().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            failed = view.clone().serve() => failed,
            failed = steers => failed,
        }
    }
}

impl View {
    async fn serve(self: Arc<Self>) -> Result<Infallible> {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let permit = room.clone().acquire_owned().await;
            let stream = self.entrance.accept().await?;
            let view = self.clone();
            tokio::spawn(async move {
                let _permit = permit;
                view.connection(stream).await;
            });
        }
    }

    async fn connection(&self, stream: TcpStream) {
        let upstream = Mutex::new(None);
        let service = service_fn(|request| async { Ok::<_, Infallible>(self.answer(&upstream, request).await) });
        // The browser shows the end of a connection.
        let _ = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    async fn answer(&self, upstream: &Mutex<Option<Upstream>>, request: Request<Incoming>) -> Response<Body> {
        let mut response = match self.entrance.verdict(&request) {
            Verdict::Enter => self.entrance.enter(),
            Verdict::Refuse(why) => plain(StatusCode::FORBIDDEN, why),
            Verdict::Forward if request.method() != Method::GET => {
                plain(StatusCode::METHOD_NOT_ALLOWED, "the page changes nothing: use GET")
            }
            Verdict::Forward if request.uri().path() == "/act" => self.ask(request.uri().query().unwrap_or_default()),
            Verdict::Forward => match self.monitor.ask(upstream, &self.own(&request)).await {
                Ok(response) => filtered(response),
                Err(e) => plain(StatusCode::BAD_GATEWAY, &e.chain()),
            },
        };
        secure(response.headers_mut(), POLICY, "no-referrer");
        response
    }

    /// Returns the path and the headers that the monitor gets: none of the browser's headers.
    fn own(&self, request: &Request<Incoming>) -> Request<()> {
        let mut own = Request::new(());
        *own.uri_mut() = request.uri().clone();
        let headers = own.headers_mut();
        headers.insert(HOST, HeaderValue::from_static("page"));
        headers.insert(VIEWER, self.viewer.clone());
        if self.steering.is_some() {
            headers.insert(ACTS, HeaderValue::from_static("yes"));
        }
        own
    }

    /// Sends the browser to the question about an action.
    fn ask(&self, query: &str) -> Response<Body> {
        let Some(steering) = &self.steering else {
            return plain(StatusCode::FORBIDDEN, "your certificate is a viewer's: a viewer changes nothing");
        };
        let Some(location) = steering.question(query).and_then(|link| HeaderValue::from_str(&link).ok()) else {
            return plain(StatusCode::BAD_REQUEST, "the page asks for an action that does not exist");
        };
        let mut response = plain(StatusCode::SEE_OTHER, "");
        response.headers_mut().insert(LOCATION, location);
        response
    }
}

/// Removes every header of the monitor's reply but the type of its content, and its content if the page has no such type.
fn filtered(response: Response<Body>) -> Response<Body> {
    let kind = response.headers().get(CONTENT_TYPE).cloned();
    let essence = kind.as_ref().and_then(|kind| kind.to_str().ok()).map(|kind| kind.split(';').next().unwrap_or(kind));
    // A redirect could lead to another site.
    let is_plain = response.status().is_success() || response.status().is_client_error();
    let Some(kind) = kind.clone().filter(|_| is_plain && essence.is_some_and(|kind| TYPES.contains(&kind.trim())))
    else {
        return plain(StatusCode::BAD_GATEWAY, "the monitor's reply is not a part of the page");
    };
    let (mut parts, body) = response.into_parts();
    parts.headers.clear();
    parts.headers.insert(CONTENT_TYPE, kind.clone());
    let is_live = kind.as_bytes().starts_with(b"text/event-stream");
    Response::from_parts(parts, if is_live { monitor::with_silence_limit(body) } else { body })
}

/// Sets the headers that every reply has.
fn secure(headers: &mut HeaderMap, policy: &'static str, referrer: &'static str) {
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, policy),
        (CACHE_CONTROL, "no-store"),
        (REFERRER_POLICY, referrer),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

/// Longest time for which a question waits for its answer.
const QUESTION: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests;
