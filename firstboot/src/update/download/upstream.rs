//! HTTP client of the update folder.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::{Response, StatusCode, Uri};
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;

use crate::error::{Error, Result};
use fleet_https::Connection;

/// Time limit for the download of a small file.
const TIMEOUT: Duration = Duration::from_secs(300);

/// The update folder on its server.
pub(super) struct Upstream {
    host: String,
    port: u16,
    /// Value of the `Host` header.
    authority: String,
    /// Ends with `/`.
    path: String,
    tls: Option<Arc<ClientConfig>>,
}

impl Upstream {
    /// Parses the folder's URL. A TLS server's certificate is verified against `authorities`, a file of root
    /// certificates, PEM.
    pub(super) fn new(url: &str, authorities: &Path) -> Result<Self> {
        let unusable = || {
            Error::Failed(format!(
                "unsupported URL of the update folder: {url}; use http:// or https:// without a user name"
            ))
        };
        let uri: Uri = url.parse().map_err(|_| unusable())?;
        let authority = uri.authority().filter(|a| !a.as_str().contains('@')).ok_or_else(unusable)?;
        let (tls, port) = match uri.scheme_str() {
            Some("http") => (None, 80),
            Some("https") => {
                let roots = fs::read_to_string(authorities).map_err(Error::io("read", authorities))?;
                (Some(fleet_https::client(&roots, None)?), 443)
            }
            _ => return Err(unusable()),
        };
        Ok(Self {
            host: authority.host().trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: authority.port_u16().unwrap_or(port),
            authority: authority.to_string(),
            path: format!("{}/", uri.path().trim_end_matches('/')),
            tls,
        })
    }

    /// Opens a connection to the server.
    pub(super) async fn connect(&self) -> Result<Connection> {
        Ok(match &self.tls {
            Some(tls) => Connection::open(&self.host, self.port, &self.host, tls).await?,
            None => Connection::plain(&self.host, self.port).await?,
        })
    }

    /// Requests a file, or a part of it (first byte and length). The status is 206 if the server supports ranges.
    pub(super) async fn get(
        &self,
        connection: &mut Connection,
        name: &str,
        part: Option<(u64, u64)>,
    ) -> Result<Response<Incoming>> {
        let range = part.map(|(at, len)| format!("bytes={at}-{}", at + len - 1));
        let headers: Vec<(&str, &str)> = range.iter().map(|r| ("range", r.as_str())).collect();
        let path = format!("{}{name}", self.path);
        Ok(connection.send(fleet_https::request("GET", &self.authority, &path, &headers, Bytes::new())?).await?)
    }

    /// Downloads a small file of at most `longest` bytes.
    pub(super) async fn read(&self, name: &str, longest: usize) -> Result<Bytes> {
        let url = format!("{}{}{name}", self.authority, self.path);
        let answer = self.get(&mut self.connect().await?, name, None).await?;
        if answer.status() != StatusCode::OK {
            return Err(Error::network(url, answer.status().to_string()));
        }
        let body = timeout(TIMEOUT, Limited::new(answer.into_body(), longest).collect()).await;
        Ok(body
            .map_err(|_| Error::network(&url, format!("no complete response within {} s", TIMEOUT.as_secs())))?
            .map_err(|e| Error::network(&url, e))?
            .to_bytes())
    }
}
