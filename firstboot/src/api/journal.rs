//! The node's journal, as lines of a reply.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fleet::node_api::{JournalLine, JournalQuery, MOST_JOURNAL_LINES};
use hyper::StatusCode;
use tokio::time::{Interval, interval, timeout};
use tracing::debug;

use super::gateway::{Select, Source, Start, matches, next};
use super::reply::{Answer, LineSender, Refusal, line, lines};
use super::{NodeApi, query};
use crate::error::{Error, Result};
use seen::Seen;

mod seen;

/// Socket of the gateway to the journals of other nodes, beside that of the node's own.
const KEPT_SOCKET: &str = "journal-remote.sock";
/// Time limit until the gateway begins its reply.
const ANSWER: Duration = Duration::from_secs(5);
/// Lines before the end with which a reply begins: without `lines`, and with `follow`.
const LINES: u32 = 1000;
const LINES_TO_FOLLOW: u32 = 10;
/// Bytes of lines that wait until their number is known. Beyond it, a reply about a unit may begin with more lines.
const WAITING: usize = 2 << 20;
/// Time between two empty lines while there is no entry, so that the client and the hub keep the connection.
pub(super) const BEAT: Duration = Duration::from_secs(20);

/// Returns the entries of this node's journal that a query selects, one a line.
pub(super) async fn entries(api: &NodeApi, query: &str) -> Answer {
    let query = JournalQuery { of: None, ..query::journal(query)? };
    stream(api, &api.journal, "systemd-journal-gatewayd.socket", query).await
}

/// Returns the entries that this monitor has of another node's journal, one a line.
pub(super) async fn kept(api: &NodeApi, query: &str) -> Answer {
    let query = query::journal(query)?;
    if !api.node.has_role("monitor") {
        let text = format!("{} keeps no journals of other nodes", api.node.name);
        return Err(Refusal::new(StatusCode::NOT_FOUND, text).help("ask a node with the role monitor"));
    }
    let Some(of) = query.of.as_deref().filter(|of| api.topology.node(of).is_some()) else {
        return Err(Refusal::new(StatusCode::NOT_FOUND, "the fleet has no node with this name"));
    };
    if of == api.node.name {
        let text = format!("{of} keeps its own journal elsewhere");
        return Err(Refusal::new(StatusCode::NOT_FOUND, text).help("ask the other monitor, or the node itself"));
    }
    if query.boot {
        let text = "the last boot of another node is not known here";
        return Err(Refusal::new(StatusCode::BAD_REQUEST, text).help("use --since"));
    }
    let socket = api.journal.with_file_name(KEPT_SOCKET);
    stream(api, &socket, "journal-remote-gateway.socket", query).await
}

/// Streams the entries of a gateway. `unit`: the unit of its socket.
async fn stream(api: &NodeApi, socket: &Path, unit: &str, query: JournalQuery) -> Answer {
    let crowded = || {
        let text = format!("too many programs read the journal of {}", api.node.name);
        Refusal::new(StatusCode::TOO_MANY_REQUESTS, text).help("retry later")
    };
    let place = api.tasks.readers.clone().try_acquire_owned().map_err(|_| crowded())?;
    let unavailable = |why: String| {
        let help = format!("bakehouse restart {} {unit}", api.node.name);
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, format!("the journal does not answer{why}")).help(help)
    };
    let mut reader = Reader::new(socket, query);
    let opened = timeout(ANSWER, reader.open()).await.map_err(|_| unavailable(String::new()))?;
    opened.map_err(|e| unavailable(format!(": {}", e.chain())))?;
    let (to_client, response) = lines();
    tokio::spawn(async move {
        let _place = place;
        if let Err(e) = reader.send(&to_client).await {
            debug!("the journal's gateway: {}", e.chain());
            // The client must not take the reply for complete.
            let _ = to_client.send(Err(io::Error::other(e.chain()))).await;
        }
    });
    Ok(response)
}

/// Reads entries, and sends them as lines.
struct Reader {
    socket: PathBuf,
    query: JournalQuery,
    matches: Vec<String>,
    /// The streams, one for each of the matches.
    sources: Vec<Source>,
    /// Number of lines before the end with which the reply begins; `None` if it begins elsewhere.
    tail: Option<u32>,
    beat: Interval,
    /// Entries that a monitor has of another node; `None` for the node's own journal.
    seen: Option<Seen>,
}

impl Reader {
    fn new(socket: &Path, query: JournalQuery) -> Self {
        let default = || if query.follow { LINES_TO_FOLLOW } else { LINES };
        let tail = match (&query.after, query.lines, query.since) {
            (Some(_), ..) | (None, None, Some(_)) | (None, Some(0), _) => None,
            (None, lines, _) => Some(lines.unwrap_or_else(default)),
        };
        let matches = matches(query.unit.as_deref(), query.of.as_deref());
        let seen = query.of.as_ref().map(|_| Seen::default());
        Self { socket: socket.to_owned(), query, matches, sources: Vec::new(), tail, beat: interval(BEAT), seen }
    }

    /// Most lines of the reply after its begin.
    fn most(&self) -> u32 {
        let lines = self.query.lines.filter(|_| self.query.after.is_some());
        lines.unwrap_or(MOST_JOURNAL_LINES).min(MOST_JOURNAL_LINES)
    }

    /// Opens the first streams.
    async fn open(&mut self) -> Result<()> {
        let start = match (self.tail, &self.query.after, self.query.since) {
            (Some(count), ..) => Start::Last(count),
            (None, Some(cursor), _) => Start::After(cursor.clone()),
            (None, None, Some(at)) if self.query.lines.is_none() => Start::Since(at),
            (None, None, _) => Start::Since(now()),
        };
        let starts = vec![start; self.matches.len()];
        self.connect(&starts, self.query.follow && self.tail.is_none()).await
    }

    async fn connect(&mut self, starts: &[Start], follow: bool) -> Result<()> {
        self.sources.clear();
        for (matches, start) in self.matches.iter().zip(starts) {
            let select = Select { matches, boot: self.query.boot, follow, most: self.most() };
            self.sources.push(Source::open(&self.socket, start, &select).await?);
        }
        Ok(())
    }

    /// Sends the entries to the client, as fast as it reads them.
    async fn send(&mut self, to: &LineSender) -> Result<()> {
        if let Some(count) = self.tail {
            let begun = now();
            if !self.send_last(count, to).await? || !self.query.follow {
                return Ok(());
            }
            // Each stream continues after its own last entry. A stream without an entry begins when it was read.
            let last = |source: Source| source.last().map_or(Start::Since(begun), Start::After);
            let starts: Vec<Start> = self.sources.drain(..).map(last).collect();
            let opened = timeout(ANSWER, self.connect(&starts, true)).await;
            opened.map_err(|_| Error::Failed("the gateway does not answer".to_owned()))??;
        }
        let mut left = if self.query.follow { u32::MAX } else { self.most() };
        while left > 0
            && let Some(entry) = self.next(to, self.query.follow).await?
            && to.send(Ok(line(&entry))).await.is_ok()
        {
            left -= u32::from(!self.query.follow);
        }
        Ok(())
    }

    /// Sends the last entries. Returns whether the client still reads.
    async fn send_last(&mut self, count: u32, to: &LineSender) -> Result<bool> {
        // Each stream has up to this number of entries, and the reply has as many of all.
        let (mut waiting, mut bytes) = (VecDeque::new(), 0);
        let since = self.query.since.unwrap_or_default().saturating_mul(1_000_000);
        while let Some(entry) = self.next(to, false).await? {
            if entry.at < since {
                continue;
            }
            let entry = line(&entry);
            bytes += entry.len();
            waiting.push_back(entry);
            if waiting.len() > usize::try_from(count).unwrap_or(usize::MAX) {
                bytes -= waiting.pop_front().map_or(0, |line| line.len());
            }
            while bytes > WAITING
                && let Some(line) = waiting.pop_front()
            {
                bytes -= line.len();
                if to.send(Ok(line)).await.is_err() {
                    return Ok(false);
                }
            }
        }
        for line in waiting {
            if to.send(Ok(line)).await.is_err() {
                return Ok(false);
            }
        }
        Ok(!to.is_closed())
    }

    /// Returns the next entry; `None` at the end, or if the client has disconnected. Sends empty lines while it waits.
    async fn next(&mut self, to: &LineSender, follow: bool) -> Result<Option<JournalLine>> {
        loop {
            tokio::select! {
                entry = next(&mut self.sources, follow) => {
                    self.beat.reset();
                    if let Ok(Some(entry)) = &entry
                        && self.seen.as_mut().is_some_and(|seen| seen.is_again(&entry.cursor))
                    {
                        continue;
                    }
                    return entry;
                }
                _ = self.beat.tick() => {
                    if to.send(Ok(Bytes::from_static(b"\n"))).await.is_err() {
                        return Ok(None);
                    }
                }
                () = to.closed() => return Ok(None),
            }
        }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests;
