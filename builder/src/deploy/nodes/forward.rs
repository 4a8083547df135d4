//! Forwards a browser's requests to a web page of a node.
//!
//! The forwarder has the operator's rights, and every program and every web page on this host can connect to it. So it
//! accepts only requests with the secret of the printed link, which a cookie then carries, and only those of the page
//! itself: a page of another site may know the port, and a name server may give this host's address to its name.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{
    AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, COOKIE, HOST, HeaderName, LOCATION, ORIGIN, SET_COOKIE,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Mutex, Semaphore};

use super::client::Client;
use crate::error::{Error, Result};
use crate::util::random::random;

/// Maximum number of connections at the same time. Further ones wait.
pub(super) const CONNECTIONS: usize = 64;
/// Time limit of a request's head.
pub(super) const HEAD: Duration = Duration::from_secs(60);
/// Path of the link, before the secret.
const LINK: &str = "/bakehouse/";
/// Headers in which a browser says which page has sent a request, and why.
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");

pub(super) type Body = BoxBody<Bytes, hyper::Error>;

/// Address at which this host accepts a browser.
pub(crate) struct Entrance {
    listener: TcpListener,
    port: u16,
    secret: String,
}

/// What happens to a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Forward,
    /// The browser gets the cookie.
    Enter,
    Refuse(&'static str),
}

impl Entrance {
    /// Listens on a free port of the loopback interface.
    ///
    /// # Errors
    /// If this host has no free port, or the kernel returns no random bytes.
    pub(crate) async fn open() -> Result<Self> {
        let bind = |e| Error::io("listen on", "127.0.0.1")(e);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(bind)?;
        let port = listener.local_addr().map_err(bind)?.port();
        // Plain letters and digits, so that a double click in a terminal selects the whole link.
        let secret: String = random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { listener, port, secret })
    }

    /// Returns the link for the browser. It has the secret.
    pub(crate) fn link(&self) -> String {
        format!("http://127.0.0.1:{}{LINK}{}", self.port, self.secret)
    }

    /// Returns the next connection of a browser.
    ///
    /// # Errors
    /// If the listener fails.
    pub(super) async fn accept(&self) -> Result<TcpStream> {
        let accepted = self.listener.accept().await;
        Ok(accepted.map_err(Error::io("accept connections on", "127.0.0.1"))?.0)
    }

    /// Returns the reply that gives the browser the cookie.
    pub(super) fn enter(&self) -> Response<Body> {
        let mut response = plain(StatusCode::SEE_OTHER, "");
        let cookie = format!("{}; Path=/; HttpOnly; SameSite=Lax", self.cookie());
        for (name, value) in [(LOCATION, "/"), (CACHE_CONTROL, "no-store"), (SET_COOKIE, &cookie)] {
            response.headers_mut().extend(value.parse().ok().map(|value| (name, value)));
        }
        response
    }

    fn cookie(&self) -> String {
        // Browsers send the cookies of a host to all its ports.
        format!("bakehouse-{}={}", self.port, self.secret)
    }

    /// Decides about a request by its headers and its path.
    pub(super) fn verdict<B>(&self, request: &Request<B>) -> Verdict {
        let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
        let is_own = |host: &str| ["127.0.0.1", "localhost"].iter().any(|name| host == format!("{name}:{}", self.port));
        if !header(HOST).is_some_and(is_own) {
            return Verdict::Refuse("the request is for another host");
        }
        let origin = request.headers().get(ORIGIN).map(|value| value.to_str().unwrap_or_default());
        if origin.is_some_and(|origin| !origin.strip_prefix("http://").is_some_and(is_own)) {
            return Verdict::Refuse("the request is from a page of another site");
        }
        let is_navigation = header(FETCH_MODE) == Some("navigate");
        if header(FETCH_SITE).is_some_and(|site| !matches!(site, "same-origin" | "none") && !is_navigation) {
            return Verdict::Refuse("the request is from a page of another site");
        }
        if request.uri().path().strip_prefix(LINK) == Some(self.secret.as_str()) {
            return Verdict::Enter;
        }
        let own = self.cookie();
        let cookies = request.headers().get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
        let has_cookie = cookies.flat_map(|all| all.split(';')).any(|cookie| cookie.trim() == own);
        if has_cookie || self.is_bearer(header(AUTHORIZATION)) {
            return Verdict::Forward;
        }
        Verdict::Refuse("the request does not have the secret: open the link that `bakehouse open` has printed")
    }

    fn is_bearer(&self, authorization: Option<&str>) -> bool {
        authorization.and_then(|value| value.strip_prefix("Bearer ")) == Some(self.secret.as_str())
    }
}

/// A page of a node, and the way to it.
struct Page {
    entrance: Entrance,
    client: Client,
    node: String,
    path: String,
}

/// Connection to the page, of one connection of a browser.
type Upstream = SendRequest<Incoming>;

/// Forwards the requests of a browser to a path of a node's API, such as `/v1/open/prometheus`.
///
/// # Errors
/// If the listener fails.
pub(crate) async fn forward(client: &Client, node: &str, path: &str, entrance: Entrance) -> Result<()> {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let page = Page { entrance, client: client.clone(), node: node.to_owned(), path: path.to_owned() };
    let page = Arc::new(page);
    loop {
        let permit = room.clone().acquire_owned().await;
        let stream = page.entrance.accept().await?;
        let page = page.clone();
        tokio::spawn(async move {
            let _permit = permit;
            serve(&page, stream).await;
        });
    }
}

async fn serve(page: &Page, stream: TcpStream) {
    let upstream = Mutex::new(None);
    let service = service_fn(|request| async { Ok::<_, Infallible>(answer(page, &upstream, request).await) });
    // The browser shows the end of a connection.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(page: &Page, upstream: &Mutex<Option<Upstream>>, request: Request<Incoming>) -> Response<Body> {
    match page.entrance.verdict(&request) {
        Verdict::Forward => match relay(page, upstream, request).await {
            Ok(response) => response,
            Err(e) => plain(StatusCode::BAD_GATEWAY, &e.chain()),
        },
        Verdict::Enter => page.entrance.enter(),
        Verdict::Refuse(why) => plain(StatusCode::FORBIDDEN, why),
    }
}

/// Sends a request to the page. The page gets no cookie of this host.
async fn relay(
    page: &Page,
    upstream: &Mutex<Option<Upstream>>,
    mut request: Request<Incoming>,
) -> Result<Response<Body>> {
    let failed = |e: hyper::Error| Error::cannot(format!("reach the page of {}", page.node))(e);
    request.headers_mut().remove(COOKIE);
    let authorization = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    if page.entrance.is_bearer(authorization) {
        request.headers_mut().remove(AUTHORIZATION);
    }
    let mut upstream = upstream.lock().await;
    let mut ready = upstream.take();
    if let Some(open) = &mut ready
        && open.ready().await.is_err()
    {
        ready = None;
    }
    let mut open = if let Some(open) = ready {
        open
    } else {
        let stream = page.client.stream(&page.node, &page.path).await?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(failed)?;
        tokio::spawn(async move {
            // The next request reports the end of the connection.
            let _ = connection.await;
        });
        sender
    };
    let response = open.send_request(request).await.map_err(failed)?;
    *upstream = Some(open);
    Ok(response.map(BodyExt::boxed))
}

/// Returns a reply with a text.
pub(super) fn plain(status: StatusCode, text: &str) -> Response<Body> {
    let body = Full::from(format!("{text}\n")).map_err(|never| match never {}).boxed();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let kind = "text/plain; charset=utf-8".parse().ok();
    response.headers_mut().extend(kind.map(|kind| (CONTENT_TYPE, kind)));
    response
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// Sends a request, and returns the reply.
    async fn ask(port: u16, path: &str, headers: &str) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn requests_reach_the_page_and_failures_the_browser() {
        let fleet = Fleet::start(&["hub-1"], &["monitor-1"]).await;
        for (node, expected) in [("monitor-1", "echo /v1/open/prometheus: GET /graph?g=1"), ("no-such", "502 ")] {
            let entrance = Entrance::open().await.unwrap();
            let (port, link, cookie) = (entrance.port, entrance.link(), entrance.cookie());
            let client = fleet.client();
            let server =
                tokio::spawn(async move { forward(&client, node, "/v1/open/prometheus", entrance).await.map(drop) });
            let host = format!("host: 127.0.0.1:{port}\r\n");
            let entered = ask(port, link.split_once(&format!(":{port}")).unwrap().1, &host).await;
            assert!(entered.starts_with("HTTP/1.1 303 ") && entered.contains("location: /\r\n"), "{entered}");
            let set = format!("set-cookie: {cookie}; Path=/; HttpOnly; SameSite=Lax\r\n");
            assert!(entered.contains(&set), "{entered}");
            let with_cookie = format!("{host}cookie: other=1; {cookie}\r\n");
            let reply = ask(port, "/graph?g=1", &with_cookie).await;
            assert!(reply.contains(expected) && !reply.contains("cookie"), "{reply}");
            // Without the secret, nothing reaches the node.
            let before = fleet.connections("hub-1");
            let refused = ask(port, "/graph", &host).await;
            assert!(refused.starts_with("HTTP/1.1 403 ") && refused.contains("bakehouse open"), "{refused}");
            assert_eq!(fleet.connections("hub-1"), before);
            server.abort();
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn pages_of_other_sites_are_refused() {
        let entrance = Entrance::open().await.unwrap();
        let (port, cookie) = (entrance.port, entrance.cookie());
        let verdict = |headers: &[(&str, &str)]| {
            let mut request = Request::get("/-/reload");
            for (name, value) in headers {
                request = request.header(*name, value.replace("PORT", &port.to_string()));
            }
            entrance.verdict(&request.body(()).unwrap())
        };
        let own = ("host", "127.0.0.1:PORT");
        let secret = ("cookie", cookie.as_str());
        let bearer = format!("Bearer {}", entrance.secret);
        for headers in [
            &[own, secret][..],
            &[("host", "localhost:PORT"), secret],
            &[own, ("authorization", &bearer)],
            &[own, secret, ("origin", "http://127.0.0.1:PORT"), ("sec-fetch-site", "same-origin")],
            &[own, secret, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")],
        ] {
            assert_eq!(verdict(headers), Verdict::Forward, "{headers:?}");
        }
        for headers in [
            &[own][..],
            &[secret],
            // DNS rebinding.
            &[("host", "evil.example.net:PORT"), secret],
            &[("host", "127.0.0.1"), secret],
            &[own, secret, ("origin", "https://evil.example.net")],
            &[own, secret, ("origin", "null")],
            &[own, secret, ("origin", "http://127.0.0.1:1")],
            &[own, secret, ("sec-fetch-site", "same-site"), ("sec-fetch-mode", "no-cors")],
            &[own, ("cookie", "bakehouse-PORT=0")],
            &[own, ("authorization", "Bearer x")],
        ] {
            assert!(matches!(verdict(headers), Verdict::Refuse(_)), "{headers:?}");
        }
    }
}
