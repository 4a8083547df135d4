//! Client of the HTTP APIs of the monitor's own Prometheus and Alertmanager.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::error::{Error, Result};

/// Longest reply, in bytes. Prometheus of 1,000 nodes replies with 1 MB to most queries.
const LONGEST: usize = 32 << 20;

/// A service with an HTTP API.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    /// Time limit of a request with its reply.
    pub(crate) limit: Duration,
}

impl Service {
    /// Gets a value, or posts a form if there is one.
    ///
    /// # Errors
    /// If the service does not answer in time, or replies with something else.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, path: &str, form: &[(&str, String)]) -> Result<T> {
        let failed = |cause: String| Error::Service { service: self.name, cause };
        let reply = timeout(self.limit, self.send(path, form)).await;
        let (status, body) = reply.map_err(|_| failed("the time limit is over".to_owned()))?.map_err(failed)?;
        // Prometheus has the reason of a refused query in its JSON.
        if !status.is_success() {
            let text = String::from_utf8_lossy(&body).chars().take(300).collect::<String>();
            return Err(failed(format!("{status} {text}")));
        }
        serde_json::from_slice(&body)
            .map_err(|source| Error::Json { what: format!("the reply of {}", self.name), source })
    }

    async fn send(&self, path: &str, form: &[(&str, String)]) -> Result<(StatusCode, Bytes), String> {
        let text = |e: hyper::Error| e.to_string();
        let stream = TcpStream::connect(self.address).await.map_err(|e| e.to_string())?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(text)?;
        // The task ends with the connection, which closes when `sender` is dropped.
        tokio::spawn(connection);
        let request = Request::builder().uri(path).header(HOST, self.address.to_string());
        let request = if form.is_empty() {
            request.body(Full::default())
        } else {
            let encode = |text: &str| utf8_percent_encode(text, NON_ALPHANUMERIC).to_string();
            let pairs: Vec<String> = form.iter().map(|(key, value)| format!("{key}={}", encode(value))).collect();
            let request = request.method("POST").header(CONTENT_TYPE, "application/x-www-form-urlencoded");
            request.body(Full::new(Bytes::from(pairs.join("&"))))
        };
        let reply = sender.send_request(request.map_err(|e| e.to_string())?).await.map_err(text)?;
        let status = reply.status();
        let body = Limited::new(reply.into_body(), LONGEST).collect().await.map_err(|e| e.to_string())?;
        Ok((status, body.to_bytes()))
    }
}
