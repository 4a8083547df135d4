//! HTTPS client of the authority's directory, for `instant_acme`.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fleet_https::{Cause, Connection, TIMEOUT};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Method, Request, Uri};
use instant_acme::{BodyWrapper, BytesResponse, HttpClient};
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;

/// Longest reply, in bytes.
const LONGEST: usize = 256 << 10;
/// Time limit of a reply. Some authorities sign while the client waits.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest time that the directory can make the hubs wait.
const LONGEST_WAIT: Duration = Duration::from_secs(7 * 86_400);

/// Time that the directory's last refusal asked the client to wait (`Retry-After`).
#[derive(Clone, Default)]
pub(super) struct Wait(Arc<Mutex<Option<Duration>>>);

impl Wait {
    pub(super) fn get(&self) -> Option<Duration> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, headers: &HeaderMap) {
        let wait = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()).and_then(seconds);
        if let Some(wait) = wait {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(wait.min(LONGEST_WAIT));
        }
    }
}

/// Parses `Retry-After` (RFC 9110 § 10.2.3): seconds, or a date.
fn seconds(value: &str) -> Option<Duration> {
    let value = value.trim();
    let date = || httpdate::parse_http_date(value).ok();
    value
        .parse()
        .map(Duration::from_secs)
        .ok()
        .or_else(|| Some(date()?.duration_since(SystemTime::now()).unwrap_or_default()))
}

/// Client with a connection of its own for each request, because an order has about ten.
pub(super) struct DirectoryClient {
    tls: Arc<ClientConfig>,
    wait: Wait,
}

impl DirectoryClient {
    pub(super) fn new(tls: Arc<ClientConfig>, wait: Wait) -> Self {
        Self { tls, wait }
    }
}

impl HttpClient for DirectoryClient {
    fn request(
        &self,
        request: Request<BodyWrapper<Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, instant_acme::Error>> + Send>> {
        let (tls, wait) = (self.tls.clone(), self.wait.clone());
        Box::pin(async move { exchange(&tls, &wait, request).await.map_err(instant_acme::Error::Other) })
    }
}

async fn exchange(
    tls: &Arc<ClientConfig>,
    wait: &Wait,
    request: Request<BodyWrapper<Bytes>>,
) -> Result<BytesResponse, Cause> {
    let (mut parts, body) = request.into_parts();
    // `instant_acme` reports the problem in a reply to its other requests, and parses the directory in any case.
    let is_directory = parts.method == Method::GET;
    let body = body.collect().await.map_err(|e| match e {})?.to_bytes();
    let url = parts.uri.to_string();
    let authority = parts.uri.authority().filter(|_| parts.uri.scheme_str() == Some("https")).cloned();
    // The directory names the URLs of all other requests.
    let authority = authority.ok_or_else(|| format!("{url} is not an address that begins with https://"))?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let mut connection = Connection::open(host, authority.port_u16().unwrap_or(443), host, tls).await.map_err(text)?;
    parts.headers.insert(HOST, HeaderValue::from_str(authority.as_str())?);
    parts.uri = parts.uri.path_and_query().map_or_else(|| Uri::from_static("/"), |path| Uri::from(path.clone()));
    connection = connection.with_limit(PATIENCE);
    let response = connection.send(Request::from_parts(parts, Full::new(body))).await.map_err(text)?;
    let (parts, body) = response.into_parts();
    let body = timeout(TIMEOUT, Limited::new(body, LONGEST).collect()).await;
    let body = body.map_err(|_| format!("{url}: no complete reply"))?.map_err(|e| format!("{url}: {e}"))?.to_bytes();
    if parts.status.is_client_error() || parts.status.is_server_error() {
        wait.note(&parts.headers);
        let is_problem = parts.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        // Parameters may follow: `; charset=utf-8`.
        let is_problem = is_problem.is_some_and(|kind| kind.contains("json"));
        if is_directory || !is_problem {
            return Err(format!("{url} replied {}", parts.status).into());
        }
    }
    Ok(BytesResponse { parts, body: Box::new(body) })
}

fn text(e: fleet_https::Error) -> Cause {
    crate::error::Error::from(e).chain().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_has_seconds_or_a_date_and_a_limit() {
        assert_eq!(seconds(" 120 "), Some(Duration::from_secs(120)));
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(3600));
        assert!(seconds(&date).is_some_and(|wait| (3590..=3600).contains(&wait.as_secs())), "{date}");
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert!(["", "-1", "soon", "1.5"].iter().all(|bad| seconds(bad).is_none()));
        let wait = Wait::default();
        wait.note(&HeaderMap::new());
        assert_eq!(wait.get(), None);
        let far = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static("99999999999"))]);
        wait.note(&far);
        assert_eq!(wait.get(), Some(LONGEST_WAIT));
    }
}
