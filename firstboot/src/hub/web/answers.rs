//! Answers the authority's HTTP-01 requests (RFC 8555 § 8.3) behind HAProxy, on a Unix socket. Any hub answers, because
//! the answers are in etcd.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fleet::etcd_keys::WEB_CHALLENGES;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixListener;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::timeout;
use tracing::warn;

use crate::client::etcd::Etcd;
use crate::error::{Error, Result};

/// Path of the requests.
const PATH: &str = "/.well-known/acme-challenge/";
/// Time for which a list of answers from etcd is current. A client that guesses tokens makes a hub read etcd once a
/// second at most. An order waits for longer before the authority asks.
pub(super) const FRESH: Duration = Duration::from_secs(1);
/// Connections at the same time.
const MOST: usize = 64;
/// Time limit of a connection.
const LIMIT: Duration = Duration::from_secs(10);
/// Time limit for etcd. HAProxy asks another hub if no answer arrives within 2.5 s.
const ETCD: Duration = Duration::from_secs(2);
/// Longest token, in characters.
const LONGEST: usize = 256;

struct Answers {
    etcd: Etcd,
    /// Time of the last read, and the answers by token.
    known: Mutex<(Option<Instant>, BTreeMap<String, Bytes>)>,
}

/// Serves until the socket breaks.
///
/// # Errors
/// If the socket cannot be made.
pub(super) async fn serve(etcd: Etcd, socket: &Path) -> Result<()> {
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket).map_err(Error::io("listen on", socket))?;
    // HAProxy runs as another user. The answers are public.
    fs::set_permissions(socket, Permissions::from_mode(0o666)).map_err(Error::io("set the mode of", socket))?;
    let answers = Arc::new(Answers { etcd, known: Mutex::default() });
    let open = Arc::new(Semaphore::new(MOST));
    loop {
        let Ok(permit) = open.clone().acquire_owned().await else { return Ok(()) };
        let (stream, _) = listener.accept().await.map_err(Error::io("accept on", socket))?;
        let answers = answers.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let answers = answers.clone();
                async move { Ok::<_, std::convert::Infallible>(answers.reply(&request).await) }
            });
            let mut server = http1::Builder::new();
            server.keep_alive(false).max_buf_size(16 << 10);
            let _ = timeout(LIMIT, server.serve_connection(TokioIo::new(stream), service)).await;
            drop(permit);
        });
    }
}

impl Answers {
    async fn reply(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let (status, text) = match token(request.method(), request.uri().path()) {
            None => (StatusCode::NOT_FOUND, Bytes::from_static(b"no such challenge\n")),
            Some(token) => match self.answer(token).await {
                Ok(Some(answer)) => (StatusCode::OK, answer),
                Ok(None) => (StatusCode::NOT_FOUND, Bytes::from_static(b"no such challenge\n")),
                Err(e) => {
                    warn!("cannot answer a challenge of the certificate authority: {}", e.chain());
                    (StatusCode::SERVICE_UNAVAILABLE, Bytes::from_static(b"etcd does not answer\n"))
                }
            },
        };
        let mut response = Response::new(Full::new(text));
        *response.status_mut() = status;
        let kind = hyper::header::HeaderValue::from_static("application/octet-stream");
        response.headers_mut().insert(hyper::header::CONTENT_TYPE, kind);
        response
    }

    async fn answer(&self, token: &str) -> Result<Option<Bytes>> {
        // Requests wait here for the one that reads etcd.
        let mut known = self.known.lock().await;
        let is_fresh = known.0.is_some_and(|at| at.elapsed() < FRESH);
        if !is_fresh && !known.1.contains_key(token) {
            let listed = timeout(ETCD, self.etcd.list(WEB_CHALLENGES)).await;
            let (_, all) = listed.map_err(|_| Error::Failed("etcd does not answer in time".to_owned()))??;
            let pairs = all.into_iter();
            known.1 = pairs.map(|pair| (pair.key[WEB_CHALLENGES.len()..].to_owned(), pair.value.into())).collect();
            known.0 = Some(Instant::now());
        }
        Ok(known.1.get(token).cloned())
    }
}

/// Returns the token of a request.
fn token<'a>(method: &Method, path: &'a str) -> Option<&'a str> {
    let token = path.strip_prefix(PATH)?;
    (is_token(token) && (method == Method::GET || method == Method::HEAD)).then_some(token)
}

/// Returns whether a text can be a token: base64url (RFC 8555 § 8.3).
pub(super) fn is_token(text: &str) -> bool {
    (1..=LONGEST).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tokens_reach_etcd() {
        let get = |path| token(&Method::GET, path);
        assert_eq!(get("/.well-known/acme-challenge/aZ0-_"), Some("aZ0-_"));
        let long = format!("{PATH}{}", "a".repeat(LONGEST + 1));
        for bad in [PATH, "/", "/.well-known/acme-challenge/a/b", "/.well-known/acme-challenge/%61", &long] {
            assert_eq!(get(bad), None, "{bad}");
        }
        assert_eq!(token(&Method::POST, "/.well-known/acme-challenge/a"), None);
    }
}
