//! Assembles a file from local blocks and from parts of the server's file.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fleet::blocks::BlockRange;
use http_body_util::BodyExt as _;
use hyper::StatusCode;
use hyper::body::Incoming;
use tokio::time::{sleep, timeout};

use super::upstream::Upstream;
use crate::error::{Error, Result};
use fleet_https::Connection;

const CHUNK: u64 = 256 << 10;
/// Time without a byte after which a connection counts as broken.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Reconnects without progress before the download fails; systemd-sysupdate waits for 1 min.
const TRIES: u32 = 4;

/// Reads an assembled file from its start to its end.
pub(super) struct BlockReader {
    pieces: VecDeque<BlockRange>,
    /// The running image's file.
    here: File,
    upstream: Arc<Upstream>,
    name: String,
    connection: Option<Connection>,
    /// Response for the first piece.
    body: Option<Incoming>,
    /// Failures since the last byte.
    failures: u32,
}

impl BlockReader {
    pub(super) fn new(pieces: Vec<BlockRange>, here: File, upstream: Arc<Upstream>, name: &str) -> Self {
        let name = name.to_owned();
        Self { pieces: pieces.into(), here, upstream, name, connection: None, body: None, failures: 0 }
    }

    /// Returns the next bytes; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        while let Some(piece) = self.pieces.front_mut() {
            let Some(here) = piece.here else {
                if let Some(bytes) = self.download().await? {
                    return Ok(Some(bytes));
                }
                continue;
            };
            let mut bytes = vec![0; CHUNK.min(piece.len) as usize];
            if self.here.read_exact_at(&mut bytes, here).is_err() {
                // The disk cannot read the block, so it is downloaded.
                piece.here = None;
                continue;
            }
            piece.here = Some(here + bytes.len() as u64);
            self.advance(bytes.len() as u64);
            return Ok(Some(bytes.into()));
        }
        Ok(None)
    }

    /// Downloads bytes of the first piece; returns `None` after a broken connection.
    async fn download(&mut self) -> Result<Option<Bytes>> {
        match self.next_frame().await {
            Ok(bytes) => {
                self.failures = 0;
                self.advance(bytes.len() as u64);
                Ok(Some(bytes))
            }
            // The server refuses the request; a retry would not help.
            Err(e @ (Error::NoPart { .. } | Error::TooMuch { .. })) => Err(e),
            Err(e) => {
                (self.connection, self.body) = (None, None);
                if self.failures == TRIES {
                    return Err(e);
                }
                sleep(Duration::from_secs(1 << self.failures)).await;
                self.failures += 1;
                Ok(None)
            }
        }
    }

    /// Returns the next bytes of the response for the first piece; requests the piece first if necessary.
    async fn next_frame(&mut self) -> Result<Bytes> {
        let Some(BlockRange { at, len, .. }) = self.pieces.front().copied() else { return Ok(Bytes::new()) };
        let broke = |why: String| Error::network(&self.name, why);
        let body = match &mut self.body {
            Some(body) => body,
            none => {
                let part = Some((at, len));
                let used = match self.connection.as_mut() {
                    Some(used) => self.upstream.get(used, &self.name, part).await.ok(),
                    None => None,
                };
                let answer = if let Some(answer) = used {
                    answer
                } else {
                    // There is no connection yet, or the server has closed it.
                    let connection = self.connection.insert(self.upstream.connect().await?);
                    self.upstream.get(connection, &self.name, part).await?
                };
                let status = answer.status();
                if status != StatusCode::PARTIAL_CONTENT {
                    if status.is_server_error() {
                        return Err(broke(format!("the server replied {status} to a request for a part")));
                    }
                    return Err(Error::NoPart { file: self.name.clone(), status });
                }
                none.insert(answer.into_body())
            }
        };
        loop {
            let frame = timeout(TIMEOUT, body.frame())
                .await
                .map_err(|_| broke(format!("no data for {} s", TIMEOUT.as_secs())))?;
            let frame = frame.ok_or_else(|| broke("the response ended too early".to_owned()))?;
            let Ok(bytes) = frame.map_err(|e| Error::network(&self.name, e))?.into_data() else { continue };
            if bytes.len() as u64 > len {
                return Err(Error::TooMuch { file: self.name.clone() });
            }
            return Ok(bytes);
        }
    }

    fn advance(&mut self, by: u64) {
        if let Some(piece) = self.pieces.front_mut() {
            piece.at += by;
            piece.len -= by;
            if piece.len == 0 {
                self.pieces.pop_front();
                self.body = None;
            }
        }
    }
}
