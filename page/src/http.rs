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
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::error::{Error, Result};

/// Longest reply to most requests, in MB. Prometheus of 1,000 nodes replies with 0.4 MB to a query with four values of each
/// node, and with 1.3 MB of alerts when all 1,000 nodes are down.
pub(crate) const LONGEST: usize = 4;
/// Replies of [`LONGEST`] that the page reads and parses at the same time. Values take about eight times the memory of their
/// text, so these need up to 108 MB. The values that the page keeps (`watch::MOST_VALUES`) need up to 70 MB more, and a
/// range 24 MB, and alerts 30 MB: together less than `MemoryMax=256M` of the unit.
pub(crate) static ROOM: Semaphore = Semaphore::const_new(3);

/// A service with an HTTP API.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    /// Time limit of a request with its reply.
    pub(crate) limit: Duration,
    /// Longest reply, in MB.
    pub(crate) longest: usize,
    /// Places of requests that run at the same time.
    pub(crate) room: &'static Semaphore,
}

impl Service {
    /// Gets a value, or posts a form if there is one.
    ///
    /// # Errors
    /// If the service does not answer in time, or replies with something else.
    pub(crate) async fn ask<T: DeserializeOwned>(&self, path: &str, form: &[(&str, String)]) -> Result<T> {
        let failed = |cause: String| Error::Service { service: self.name, cause };
        // The place is free again when the reply is parsed.
        let _place = self.room.acquire().await.map_err(|e| failed(e.to_string()))?;
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
        let body =
            Limited::new(reply.into_body(), self.longest * 1_000_000).collect().await.map_err(|e| e.to_string())?;
        Ok((status, body.to_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    /// Returns the error of a service whose reply has this number of bytes, of which 1 MB is allowed.
    async fn error_of(length: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await;
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
            let _ = stream.write_all(head.as_bytes()).await;
            let _ = stream.write_all(&vec![b' '; length]).await;
        });
        let service = Service { name: "Test", address, limit: Duration::from_secs(20), longest: 1, room: &ROOM };
        service.ask::<u32>("/", &[]).await.unwrap_err().chain()
    }

    #[tokio::test]
    async fn a_reply_over_the_limit_is_an_error() {
        let e = error_of(1_000_001).await;
        assert!(e.contains("length limit exceeded"), "{e}");
        // An allowed one is read to its end.
        let e = error_of(1_000_000).await;
        assert!(e.contains("EOF while parsing"), "{e}");
    }
}
