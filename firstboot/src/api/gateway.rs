//! Streams of entries from [systemd-journal-gatewayd] on a socket that only root reaches.
//!
//! [systemd-journal-gatewayd]: https://www.freedesktop.org/software/systemd/man/latest/systemd-journal-gatewayd.service.html

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use fleet::node_api::JournalLine;
use futures_util::future::select_all;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::export::Parser;
use crate::error::{Error, Result};

/// Number of entries that the gateway reads as "no end".
const NO_END: u64 = 1_000_000_000;
/// Longest time for which an entry that is followed waits for an earlier one of another stream.
const HOLD: Duration = Duration::from_millis(200);

/// Where a stream begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// After the entry with this cursor.
    After(String),
    /// At this time, in seconds since 1970.
    Since(u64),
    /// This number of entries before the end, or one more.
    Last(u32),
}

/// Which entries a stream has.
#[derive(Clone, Debug)]
pub(super) struct Select<'a> {
    /// Matches, as in the gateway's URL: the entry has all of them.
    pub(super) matches: &'a str,
    /// Only the current boot.
    pub(super) boot: bool,
    /// Wait for further entries.
    pub(super) follow: bool,
    /// Most entries, if the stream does not follow the journal.
    pub(super) most: u32,
}

/// Returns the matches of a unit's streams: messages of its processes, and systemd's own messages about the unit. The
/// gateway returns entries with all matches of a request, so there is a stream for each. `of`: the node, if the gateway
/// has the journals of several.
pub(super) fn matches(unit: Option<&str>, of: Option<&str>) -> Vec<String> {
    let encoded = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
    let node = of.map(|node| format!("_HOSTNAME={}", encoded(node)));
    let Some(unit) = unit else { return vec![node.unwrap_or_default()] };
    let (unit, node) = (encoded(unit), node.map(|node| format!("&{node}")).unwrap_or_default());
    // Only systemd's own process is trusted to write about other units.
    vec![format!("_SYSTEMD_UNIT={unit}{node}"), format!("UNIT={unit}&_PID=1{node}")]
}

fn path(select: &Select) -> String {
    let flags = [(select.boot, "boot"), (select.follow, "follow")];
    let flags = flags.into_iter().filter_map(|(is_set, flag)| is_set.then_some(flag));
    let arguments: Vec<&str> = Some(select.matches).filter(|m| !m.is_empty()).into_iter().chain(flags).collect();
    if arguments.is_empty() { "/entries".to_owned() } else { format!("/entries?{}", arguments.join("&")) }
}

/// Returns the gateway's range: `entries=cursor:skip:count`, or `realtime=since::count`. It needs a count, and begins
/// `skip` entries after the cursor, or before the end if `skip` is negative.
fn range(start: &Start, select: &Select) -> String {
    let count = |most: u64| if select.follow { NO_END } else { most };
    let most = u64::from(select.most);
    match start {
        // The stream may not have the entry of the cursor itself, so nothing is skipped here.
        Start::After(cursor) => format!("entries={cursor}:0:{}", count(most + 1)),
        Start::Since(at) => format!("realtime={at}::{}", count(most.max(1))),
        Start::Last(lines) => {
            // A skip of 0 would begin at the first entry of the journal.
            let skip = lines.saturating_sub(1).max(1);
            format!("entries=:-{skip}:{}", count(u64::from(skip) + 1))
        }
    }
}

/// A stream of entries.
pub(super) struct Source {
    /// The connection to the gateway lasts as long as its sender.
    _sender: SendRequest<Empty<Bytes>>,
    body: Incoming,
    parser: Parser,
    next: Option<JournalLine>,
    has_ended: bool,
    /// Cursor of the last entry that was taken or skipped.
    last: Option<String>,
}

impl Source {
    /// Opens a stream.
    ///
    /// # Errors
    /// If the gateway does not answer, or refuses.
    pub(super) async fn open(socket: &Path, start: &Start, select: &Select<'_>) -> Result<Self> {
        let stream = UnixStream::connect(socket).await.map_err(Error::io("connect to", socket))?;
        let (mut sender, connection) =
            handshake(TokioIo::new(stream)).await.map_err(Error::cannot("connect to the journal's gateway"))?;
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let request = Request::get(path(select))
            .header("host", "localhost")
            .header("accept", "application/vnd.fdo.journal")
            .header("range", range(start, select))
            .body(Empty::new());
        let request = request.map_err(Error::cannot("build a request to the journal's gateway"))?;
        let answer = sender.send_request(request).await.map_err(Error::cannot("ask the journal's gateway"))?;
        if !answer.status().is_success() {
            return Err(Error::Failed(format!("the journal's gateway replied {}", answer.status())));
        }
        let last = if let Start::After(cursor) = start { Some(cursor.clone()) } else { None };
        let (body, parser) = (answer.into_body(), Parser::default());
        Ok(Self { _sender: sender, body, parser, next: None, has_ended: false, last })
    }

    /// Returns the cursor of the last entry that was taken, or the one after which the stream began.
    pub(super) fn last(self) -> Option<String> {
        self.last
    }

    /// Reads the next entry. Dropping the future loses nothing.
    async fn fill(&mut self) -> Result<()> {
        loop {
            while let Some(entry) = self.parser.next().map_err(Error::cannot("parse the journal"))? {
                // The stream begins with the entry of the cursor, if the entry has its matches.
                if self.last.as_ref() != Some(&entry.cursor) {
                    self.next = Some(entry);
                    return Ok(());
                }
            }
            let Some(frame) = self.body.frame().await else {
                self.has_ended = true;
                return Ok(());
            };
            let frame = frame.map_err(Error::cannot("read the journal"))?;
            self.parser.feed(&frame.into_data().unwrap_or_default());
        }
    }

    fn take(&mut self) -> Option<JournalLine> {
        let entry = self.next.take();
        if let Some(entry) = &entry {
            self.last = Some(entry.cursor.clone());
        }
        entry
    }
}

/// Returns the next entry of several streams in the order of time, and each entry once; `None` at the end of all.
/// Dropping the future loses nothing.
///
/// # Errors
/// If a stream breaks.
pub(super) async fn next(sources: &mut [Source], follow: bool) -> Result<Option<JournalLine>> {
    loop {
        let is_waiting = sources.iter().any(|source| source.next.is_some());
        let empty = sources.iter_mut().filter(|source| source.next.is_none() && !source.has_ended);
        let filling: Vec<_> = empty.map(|source| Box::pin(source.fill())).collect();
        if filling.is_empty() {
            break;
        }
        let filled = select_all(filling);
        if !(is_waiting && follow) {
            filled.await.0?;
        } else if let Ok((filled, ..)) = timeout(HOLD, filled).await {
            filled?;
        } else {
            break;
        }
    }
    let time = |source: &&mut Source| source.next.as_ref().map_or(u64::MAX, |entry| entry.at);
    let first = sources.iter_mut().min_by_key(time).and_then(Source::take);
    if let Some(first) = &first {
        for source in sources {
            if source.next.as_ref().is_some_and(|entry| entry.cursor == first.cursor) {
                source.take();
            }
        }
    }
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_of_the_gateway() {
        let plain = Select { matches: "", boot: false, follow: false, most: 100_000 };
        let follow = Select { follow: true, ..plain.clone() };
        let of = |start: Start, select: &Select| (path(select), range(&start, select));
        let expected = |path: &str, range: &str| (path.to_owned(), range.to_owned());
        assert_eq!(of(Start::Last(1000), &plain), expected("/entries", "entries=:-999:1000"));
        assert_eq!(of(Start::Last(5), &plain), expected("/entries", "entries=:-4:5"));
        assert_eq!(of(Start::Last(1), &plain), expected("/entries", "entries=:-1:2"));
        assert_eq!(of(Start::Since(7), &plain), expected("/entries", "realtime=7::100000"));
        assert_eq!(of(Start::Since(99), &follow), expected("/entries?follow", "realtime=99::1000000000"));
        let after = Start::After("s=a;i=5".to_owned());
        let boot = Select { boot: true, ..plain.clone() };
        assert_eq!(of(after.clone(), &boot), expected("/entries?boot", "entries=s=a;i=5:0:100001"));
        assert_eq!(of(after, &follow), expected("/entries?follow", "entries=s=a;i=5:0:1000000000"));
        let unit = matches(Some("a@b-c.service"), None);
        assert_eq!(unit, ["_SYSTEMD_UNIT=a%40b%2Dc%2Eservice", "UNIT=a%40b%2Dc%2Eservice&_PID=1"]);
        let unit = Select { matches: &unit[0], boot: true, ..follow };
        assert_eq!(path(&unit), "/entries?_SYSTEMD_UNIT=a%40b%2Dc%2Eservice&boot&follow");
        assert_eq!(matches(None, None), [""]);
        assert_eq!(matches(None, Some("db-1")), ["_HOSTNAME=db%2D1"]);
        let both = matches(Some("a.service"), Some("db-1"));
        assert_eq!(both, ["_SYSTEMD_UNIT=a%2Eservice&_HOSTNAME=db%2D1", "UNIT=a%2Eservice&_PID=1&_HOSTNAME=db%2D1"]);
    }
}
