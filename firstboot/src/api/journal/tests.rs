//! Tests with a fake of systemd-journal-gatewayd.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

use super::*;

/// An entry of the journal. Its index is its cursor.
#[derive(Clone, Debug)]
struct Entry {
    at: u64,
    /// Unit of the process that wrote it.
    unit: &'static str,
    /// Unit that systemd writes about.
    about: &'static str,
    /// End of the cursor, which says what the entry is.
    identity: &'static str,
}

#[derive(Clone)]
struct FakeGateway {
    entries: Arc<watch::Sender<Vec<Entry>>>,
    /// Number of entries after which each connection breaks.
    breaks_after: Arc<Mutex<Option<usize>>>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl FakeGateway {
    fn start(socket: &Path) -> Self {
        let gateway = Self { entries: Arc::default(), breaks_after: Arc::default(), requests: Arc::default() };
        let (serving, listener) = (gateway.clone(), UnixListener::bind(socket).unwrap());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let serving = serving.clone();
                tokio::spawn(async move {
                    // The reader may have closed the connection.
                    let _ = serving.serve(stream).await;
                });
            }
        });
        gateway
    }

    /// Adds a message of a unit.
    fn write(&self, at: u64, unit: &'static str) {
        self.entries.send_modify(|all| all.push(Entry { at, unit, about: "", identity: "" }));
    }

    /// Adds a message of systemd about a unit.
    fn systemd(&self, at: u64, about: &'static str) {
        self.entries.send_modify(|all| all.push(Entry { at, unit: "init.scope", about, identity: "" }));
    }

    async fn serve(&self, mut stream: UnixStream) -> io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        let head = String::from_utf8(head).unwrap().replace("%2E", ".").replace("%2D", "-");
        self.requests.lock().unwrap().push(head.clone());
        let path = head.split(' ').nth(1).unwrap();
        let query: Vec<&str> = path.split_once('?').map_or(Vec::new(), |(_, query)| query.split('&').collect());
        let of = |key: &str| query.iter().find_map(|pair| pair.strip_prefix(key).map(str::to_owned));
        let (unit, about) = (of("_SYSTEMD_UNIT="), of("UNIT="));
        assert_eq!(about.is_some(), query.contains(&"_PID=1"), "only systemd writes about units: {path}");
        let matches = |entry: &Entry| {
            unit.as_ref().is_none_or(|unit| entry.unit == unit)
                && about.as_ref().is_none_or(|about| entry.about == about)
        };
        let range = head.lines().find_map(|line| line.strip_prefix("range: ")).unwrap();
        let all = self.entries.borrow().clone();
        let matching: Vec<usize> = (0..all.len()).filter(|i| matches(&all[*i])).collect();
        let (mut next, count) = match range.split_once('=').unwrap() {
            ("realtime", rest) => {
                let (since, count) = rest.split_once("::").unwrap();
                let since = since.parse::<u64>().unwrap() * 1_000_000;
                (all.iter().position(|entry| entry.at >= since).unwrap_or(all.len()), count)
            }
            (_, rest) => {
                let (rest, count) = rest.rsplit_once(':').unwrap();
                let (cursor, skip) = rest.rsplit_once(':').unwrap();
                if let Some(cursor) = cursor.strip_prefix("s=x;i=") {
                    (cursor.parse().unwrap(), count)
                } else {
                    let skip = 1 + skip.strip_prefix('-').unwrap().parse::<usize>().unwrap();
                    let first = matching.len().saturating_sub(skip);
                    (matching.get(first).copied().unwrap_or(all.len()), count)
                }
            }
        };
        stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
        let mut changes = self.entries.subscribe();
        let (mut left, mut sent) = (count.parse::<u64>().unwrap(), 0);
        loop {
            let all = changes.borrow_and_update().clone();
            while next < all.len() && left > 0 {
                let Entry { at, unit, about, identity } = &all[next];
                if matches(&all[next]) {
                    if *self.breaks_after.lock().unwrap() == Some(sent) {
                        return stream.write_all(b"40\r\n__CURSOR=s=x").await;
                    }
                    let text = format!(
                        "__CURSOR=s=x;i={next}{identity}\n__REALTIME_TIMESTAMP={at}\n_SYSTEMD_UNIT={unit}\nMESSAGE={next} {about}\n\n"
                    );
                    stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await?;
                    (left, sent) = (left - 1, sent + 1);
                }
                next += 1;
            }
            if !query.contains(&"follow") || left == 0 {
                return stream.write_all(b"0\r\n\r\n").await;
            }
            tokio::select! {
                _ = changes.changed() => {}
                _ = stream.read_u8() => return Ok(()),
            }
        }
    }
}

/// Asks for lines.
struct Reading {
    lines: mpsc::Receiver<io::Result<Bytes>>,
}

impl Reading {
    async fn start(socket: &Path, query: JournalQuery) -> Self {
        let mut reader = Reader::new(socket, query);
        reader.open().await.unwrap();
        let (to, lines) = mpsc::channel(16);
        tokio::spawn(async move {
            if let Err(e) = reader.send(&to).await {
                let _ = to.send(Err(io::Error::other(e.chain()))).await;
            }
        });
        Self { lines }
    }

    /// Returns the next line's text; `None` at the end.
    async fn next(&mut self) -> Option<Result<String, String>> {
        loop {
            let received = tokio::time::timeout(Duration::from_secs(10), self.lines.recv()).await.expect("a line");
            match received? {
                Ok(bytes) if bytes.len() == 1 => {}
                Ok(bytes) => {
                    let line: JournalLine = serde_json::from_slice(&bytes).unwrap();
                    return Some(Ok(line.message.trim_end().to_owned()));
                }
                Err(e) => return Some(Err(e.to_string())),
            }
        }
    }

    async fn all(mut self) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(line) = self.next().await {
            all.push(line.unwrap());
        }
        all
    }
}

fn gateway() -> (tempfile::TempDir, PathBuf, FakeGateway) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("journal.sock");
    let gateway = FakeGateway::start(&socket);
    (dir, socket, gateway)
}

fn of_unit() -> JournalQuery {
    JournalQuery { unit: Some("a.service".to_owned()), ..JournalQuery::default() }
}

/// Entries 0 to 7: of the unit, of another one, and of systemd about the unit.
fn write_eight(gateway: &FakeGateway) {
    for at in 1..=8 {
        match at % 4 {
            1 => gateway.write(at * 1_000_000, "a.service"),
            2 => gateway.systemd(at * 1_000_000, "a.service"),
            3 => gateway.write(at * 1_000_000, "b.service"),
            _ => gateway.systemd(at * 1_000_000, "b.service"),
        }
    }
}

#[tokio::test]
async fn a_units_journal_has_systemds_lines_about_it_in_the_order_of_time() {
    let (_dir, socket, gateway) = gateway();
    write_eight(&gateway);
    let own = ["0", "1 a.service", "4", "5 a.service"];
    assert_eq!(Reading::start(&socket, of_unit()).await.all().await, own);
    for count in 1..=4 {
        let query = JournalQuery { lines: Some(count), ..of_unit() };
        assert_eq!(Reading::start(&socket, query).await.all().await, own[4 - count as usize..], "{count}");
    }
    let since = JournalQuery { since: Some(5), ..of_unit() };
    assert_eq!(Reading::start(&socket, since.clone()).await.all().await, own[2..]);
    let both = JournalQuery { lines: Some(3), ..since };
    assert_eq!(Reading::start(&socket, both).await.all().await, own[2..]);
    // The cursor's entry is of one of the two streams, or of none.
    for (after, expected) in [("0", &own[1..]), ("1", &own[2..]), ("2", &own[2..]), ("5", &[])] {
        let query = JournalQuery { after: Some(format!("s=x;i={after}")), ..of_unit() };
        assert_eq!(Reading::start(&socket, query.clone()).await.all().await, expected, "{after}");
        let one = JournalQuery { lines: Some(1), ..query };
        assert_eq!(Reading::start(&socket, one).await.all().await, expected[..expected.len().min(1)]);
    }
}

#[tokio::test]
async fn each_entry_has_one_line_also_if_both_streams_have_it() {
    let (_dir, socket, gateway) = gateway();
    gateway.write(1_000_000, "init.scope");
    gateway.systemd(2_000_000, "init.scope");
    let query = JournalQuery { unit: Some("init.scope".to_owned()), ..JournalQuery::default() };
    assert_eq!(Reading::start(&socket, query).await.all().await, ["0", "1 init.scope"]);
}

#[tokio::test]
async fn an_entry_that_a_monitor_has_twice_has_one_line() {
    let (_dir, socket, gateway) = gateway();
    // The node sends the second and third again.
    for identity in [";b=1;m=1", ";b=1;m=2", ";b=1;m=3", ";b=1;m=2", ";b=1;m=3", ";b=2;m=3"] {
        gateway.entries.send_modify(|all| all.push(Entry { at: 1, unit: "a.service", about: "", identity }));
    }
    let of_another = || JournalQuery { of: Some("lost-1".to_owned()), ..JournalQuery::default() };
    for query in [of_another(), JournalQuery { since: Some(0), ..of_another() }] {
        assert_eq!(Reading::start(&socket, query).await.all().await, ["0", "1", "2", "5"]);
    }
    assert_eq!(Reading::start(&socket, JournalQuery::default()).await.all().await.len(), 6, "its own journal");
}

#[tokio::test]
async fn the_last_lines_of_all_units() {
    let (_dir, socket, gateway) = gateway();
    assert_eq!(Reading::start(&socket, JournalQuery::default()).await.all().await, [""; 0]);
    write_eight(&gateway);
    for (count, expected) in [(1, &["7 b.service"][..]), (2, &["6", "7 b.service"])] {
        let query = JournalQuery { lines: Some(count), ..JournalQuery::default() };
        assert_eq!(Reading::start(&socket, query).await.all().await, expected);
    }
    assert_eq!(Reading::start(&socket, JournalQuery::default()).await.all().await.len(), 8);
}

#[tokio::test]
async fn following_begins_with_the_last_lines_and_misses_none() {
    let (_dir, socket, gateway) = gateway();
    write_eight(&gateway);
    let query = JournalQuery { follow: true, lines: Some(2), ..of_unit() };
    let mut reading = Reading::start(&socket, query).await;
    let mut next = async || reading.next().await.unwrap().unwrap();
    assert_eq!((next().await, next().await), ("4".to_owned(), "5 a.service".to_owned()));
    gateway.systemd(9_000_000, "a.service");
    gateway.write(9_000_001, "a.service");
    gateway.write(9_000_002, "b.service");
    gateway.write(9_000_003, "a.service");
    assert_eq!((next().await, next().await, next().await), ("8 a.service".to_owned(), "9".to_owned(), "11".to_owned()));
    // A unit without an entry, and a journal that is followed from its end.
    let later = (now() + 100) * 1_000_000;
    for lines in [Some(0), None] {
        let query =
            JournalQuery { unit: Some("new.service".to_owned()), follow: true, lines, ..JournalQuery::default() };
        let mut reading = Reading::start(&socket, query).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        gateway.systemd(later, "new.service");
        assert!(reading.next().await.unwrap().unwrap().ends_with(" new.service"));
    }
}

#[tokio::test]
async fn a_reply_that_breaks_is_an_error() {
    let (_dir, socket, gateway) = gateway();
    write_eight(&gateway);
    for (breaks_after, follow) in [(0, false), (3, false), (5, true)] {
        *gateway.breaks_after.lock().unwrap() = Some(breaks_after);
        let query = JournalQuery { follow, since: Some(0), ..JournalQuery::default() };
        let mut reading = Reading::start(&socket, query).await;
        let mut lines = 0;
        let end = loop {
            match reading.next().await {
                Some(Ok(_)) => lines += 1,
                end => break end,
            }
        };
        let e = end.expect("an error, not the end").unwrap_err();
        assert!(lines == breaks_after && e.contains("cannot read the journal"), "{lines} {e}");
    }
}

#[tokio::test]
async fn lines_that_wait_need_limited_memory() {
    let (_dir, socket, gateway) = gateway();
    gateway.entries.send_modify(|all| {
        all.extend((0..30_000).map(|at| Entry {
            at,
            unit: "a.service",
            about: if at % 9 == 0 { "b.service" } else { "" },
            identity: "",
        }));
    });
    // All lines have more than 2 MB. The reply still has each of the wanted ones.
    let query = JournalQuery { lines: Some(29_000), ..of_unit() };
    let found = Reading::start(&socket, query).await.all().await;
    assert_eq!((found.len(), found.last().map(String::as_str)), (29_000, Some("29999")));
}
