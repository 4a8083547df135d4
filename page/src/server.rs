//! The page's HTTP server. systemd gives it a Unix socket, and only the node's agent connects to it, after it has verified
//! the operator. The server answers GET and HEAD: nothing that a browser sends changes anything.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::unfold;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep, timeout};

use crate::config::Fleet;
use crate::format::{plain, rfc3339};
use crate::history::Range;
use crate::views::{self, Viewer};
use crate::watch::{View, Watch};

/// Open connections. The agent has a limit for each operator.
const CONNECTIONS: usize = 64;
/// Time limit of a request's header, with the idle time before it.
const HEADER: Duration = Duration::from_secs(60);
/// Longest header of a request, in bytes.
const LONGEST_HEADER: usize = 16 << 10;
/// Longest time between two events. The operator's machine takes another hub if no event arrives for 2.5 s.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Time within which a viewer takes an event.
const SEND: Duration = Duration::from_secs(20);
/// Time without a connection after which the process ends. systemd starts it again with the next one.
const IDLE: Duration = Duration::from_secs(600);

/// Name and role of the person, from the agent or from the operator's own machine. Only the page's text depends on it.
const VIEWER: HeaderName = HeaderName::from_static("bakehouse-viewer");
/// Present if links for actions reach the operator's own machine.
const ACTS: HeaderName = HeaderName::from_static("bakehouse-acts");

const STYLE: &str = include_str!("../static/page.css");
const SCRIPT: &str = include_str!("../static/page.js");
const ICON: &str = include_str!("../static/icon.svg");

/// The browser may load the page's own files, connect to the page itself, and nothing else.
pub const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types page";

type Body = UnsyncBoxBody<Bytes, Infallible>;

struct Server {
    watch: Arc<Watch>,
    /// Changes with the page's own files, so that an open page loads the new ones.
    build: String,
    open: AtomicUsize,
}

/// Serves the page until no browser has been connected for 10 min.
pub async fn serve(fleet: Fleet, listener: UnixListener) {
    let mut hasher = DefaultHasher::new();
    (STYLE, SCRIPT, views::SHELL).hash(&mut hasher);
    let server = Arc::new(Server {
        watch: Watch::new(fleet),
        build: format!("{:016x}", hasher.finish()),
        open: AtomicUsize::new(0),
    });
    let reading = server.watch.clone();
    tokio::select! {
        () = accept(server, listener) => {}
        () = reading.run() => {}
    }
}

async fn accept(server: Arc<Server>, listener: UnixListener) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let mut quiet_since = Instant::now();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = sleep(Duration::from_secs(5)) => {
                if server.open.load(Ordering::Relaxed) > 0 {
                    quiet_since = Instant::now();
                } else if quiet_since.elapsed() >= IDLE {
                    return;
                }
                continue;
            }
        };
        let Ok((stream, _)) = accepted else {
            // No file descriptor is free, or the client has disconnected: both are temporary.
            sleep(Duration::from_millis(50)).await;
            continue;
        };
        quiet_since = Instant::now();
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let server = server.clone();
        server.open.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(async move {
            connection(&server, stream).await;
            server.open.fetch_sub(1, Ordering::Relaxed);
            drop(place);
        });
    }
}

async fn connection(server: &Arc<Server>, stream: UnixStream) {
    let service = service_fn(|request| {
        let server = server.clone();
        async move { Ok::<_, Infallible>(answer(&server, &request).await) }
    });
    // A client whose connection fails sends its request again.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .max_buf_size(LONGEST_HEADER)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(server: &Arc<Server>, request: &Request<Incoming>) -> Response<Body> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return text(
            StatusCode::METHOD_NOT_ALLOWED,
            "text/plain; charset=utf-8",
            "The page changes nothing: use GET.\n",
        );
    }
    let viewer = viewer(request.headers(), request.uri().query().unwrap_or_default());
    match request.uri().path() {
        "/" => {
            let _interest = server.watch.interest(viewer.range);
            let view = server.watch.first(viewer.range).await;
            let html = views::page(&view.content(&server.watch.fleet, viewer.range), &viewer, &server.build);
            text(StatusCode::OK, "text/html; charset=utf-8", html)
        }
        "/events" => with_headers(StatusCode::OK, "text/event-stream", events(server, viewer)),
        "/page.css" => text(StatusCode::OK, "text/css; charset=utf-8", STYLE),
        "/page.js" => text(StatusCode::OK, "text/javascript; charset=utf-8", SCRIPT),
        "/icon.svg" => text(StatusCode::OK, "image/svg+xml", ICON),
        _ => text(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "There is no such page.\n"),
    }
}

fn viewer(headers: &HeaderMap, query: &str) -> Viewer {
    let name = headers.get(VIEWER).and_then(|value| value.to_str().ok()).map(plain).filter(|name| !name.is_empty());
    let range = query.split('&').find_map(|pair| Range::new(pair.strip_prefix("range=")?));
    Viewer { name, acts: headers.contains_key(ACTS), range: range.unwrap_or_default() }
}

fn text(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    with_headers(status, kind, Full::new(body.into()).boxed_unsync())
}

fn with_headers(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Returns the events of a viewer: the parts that have changed.
fn events(server: &Arc<Server>, viewer: Viewer) -> Body {
    let (sender, receiver) = mpsc::channel::<Bytes>(1);
    let server = server.clone();
    tokio::spawn(async move {
        let _interest = server.watch.interest(viewer.range);
        let mut views = server.watch.subscribe();
        let mut sent = BTreeMap::new();
        let mut view = server.watch.first(viewer.range).await;
        let mut next = Some(Bytes::from_static(b"retry: 300\n\n"));
        views.mark_changed();
        loop {
            let event = match next.take() {
                Some(event) => event,
                None => event(&server, &view, &viewer, &mut sent),
            };
            // A viewer that has left, or does not read, has no event in time.
            let Ok(Ok(())) = timeout(SEND, sender.send(event)).await else { return };
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = sleep(HEARTBEAT) => next = Some(Bytes::from_static(b"event: beat\ndata:\n\n")),
                () = sender.closed() => return,
            }
            if next.is_none() {
                view = views.borrow_and_update().clone();
            }
        }
    });
    let frames = unfold(receiver, async |mut receiver| {
        let bytes = receiver.recv().await?;
        Some((Ok::<_, Infallible>(Frame::data(bytes)), receiver))
    });
    StreamBody::new(frames).boxed_unsync()
}

/// Returns an event with the parts that differ from those that were sent.
fn event(server: &Server, view: &View, viewer: &Viewer, sent: &mut BTreeMap<&'static str, u64>) -> Bytes {
    #[derive(Serialize)]
    struct Event<'a> {
        build: &'a str,
        time: String,
        parts: BTreeMap<&'static str, String>,
    }
    let mut parts = views::parts(&view.content(&server.watch.fleet, viewer.range), viewer);
    parts.retain(|name, html| {
        let mut hasher = DefaultHasher::new();
        html.hash(&mut hasher);
        let hash = hasher.finish();
        sent.insert(name, hash) != Some(hash)
    });
    let event = Event { build: &server.build, time: rfc3339(view.state.at), parts };
    let json = serde_json::to_string(&event).unwrap_or_default();
    format!("event: parts\ndata: {json}\n\n").into()
}
