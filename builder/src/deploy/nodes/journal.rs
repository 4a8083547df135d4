//! Journals of nodes as streams of messages. If a stream breaks, the client opens it again through another hub, and asks
//! for the messages after the last one that has arrived.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fleet::node_api::{JOURNAL_PATH, JournalLine, JournalQuery, KEPT_JOURNAL_PATH, MOST_JOURNAL_LINES};
use fleet_https::backoff::Backoff;
use tokio::sync::mpsc::{Sender, channel};
use tokio::time::{Instant, sleep};

use super::client::{Client, is_final_error};
use super::merge::{Merge, Source};
use super::spool::{self, Spool, SpooledJournal};
use crate::error::{Error, Result};

/// Longest time between two lines of a reply. Nodes send an empty line at least every 20 s.
const IDLE: Duration = Duration::from_secs(30);
/// Number of messages of a node that wait to be merged.
const WAITING: usize = 256;
/// Longest time for which a followed message waits for earlier ones of other nodes.
const WINDOW: Duration = Duration::from_millis(300);
/// Time for which the first followed messages wait for those of all nodes.
const START_UP: Duration = Duration::from_secs(2);
/// Longest pause before an attempt to continue a stream.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Number of attempts to complete a journal that is not followed.
const ATTEMPTS: u32 = 4;
/// Time before the start from which a stream begins that had no message yet when it broke. Covers a difference of clocks.
const MARGIN: u64 = 60;

/// A message, and the name of its node.
pub(crate) struct JournalLineOf<'a> {
    /// Name of the node.
    pub node: &'a str,
    /// Index of the node among those that were asked.
    pub index: usize,
    /// The message.
    pub line: JournalLine,
}

/// Gets the name of a node, and why its stream has broken.
type OnBreak = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Query of the journals of several nodes.
pub(crate) struct Logs<'a> {
    pub client: &'a Client,
    pub nodes: &'a [String],
    pub query: &'a JournalQuery,
    /// Monitor that keeps copies of the journals, if the copies are read.
    pub kept_by: Option<&'a str>,
    /// Gets the name of a followed node whose stream has broken, and the cause.
    pub on_break: OnBreak,
}

impl Logs<'_> {
    /// Passes the messages to `print` in the order of time. Returns the nodes whose journals are incomplete, with the
    /// causes. While following, it returns when no node can answer any more.
    ///
    /// # Errors
    /// If no hub answers, the hubs permit fewer connections than there are nodes to follow, or `print` fails.
    pub(crate) async fn merged(
        &self,
        mut print: impl FnMut(JournalLineOf) -> Result<()>,
    ) -> Result<Vec<(String, Error)>> {
        let capacity = self.client.capacity();
        if self.nodes.len() > capacity {
            if self.query.follow {
                return Err(Error::Usage(format!(
                    "the hubs permit {capacity} connections to an operator, and these are {} nodes\n  help: follow fewer \
                     nodes: name them, or use `--role ROLE`",
                    self.nodes.len()
                )));
            }
            return self.one_after_the_other(print).await;
        }
        let (mut sources, mut tasks) = (Vec::new(), Vec::new());
        for node in self.nodes {
            let (sender, receiver) = channel(WAITING);
            sources.push(Source::new(receiver));
            tasks.push(tokio::spawn(self.stream(node, sender).run()));
        }
        let mut merge = Merge::new(sources, self.query.follow.then_some(WINDOW), START_UP);
        while let Some((index, line)) = merge.next().await {
            print(JournalLineOf { node: &self.nodes[index], index, line })?;
        }
        let mut incomplete = Vec::new();
        for (node, task) in self.nodes.iter().zip(tasks) {
            let ended = task.await.unwrap_or_else(|e| Err(Error::cannot("read a journal")(e)));
            incomplete.extend(ended.err().map(|e| (node.clone(), e)));
        }
        self.unless_no_hub(incomplete)
    }

    /// Reads the journals of more nodes than the hubs permit connections, and merges them when it has all.
    async fn one_after_the_other(
        &self,
        mut print: impl FnMut(JournalLineOf) -> Result<()>,
    ) -> Result<Vec<(String, Error)>> {
        let (journals, ends): (Vec<_>, Vec<_>) = self.spooled().await?.into_iter().unzip();
        let all: Vec<&SpooledJournal> = journals.iter().collect();
        spool::merge(&all, |index, line| print(JournalLineOf { node: &self.nodes[index], index, line }))?;
        let named = self.nodes.iter().cloned().zip(ends);
        self.unless_no_hub(named.filter_map(|(node, end)| Some((node, end?))).collect())
    }

    /// Reads all journals into a temporary file. Returns each with the cause if it is incomplete.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) async fn spooled(&self) -> Result<Vec<(SpooledJournal, Option<Error>)>> {
        let spool = Spool::new()?;
        let read = |_, node: String| {
            let (sender, receiver) = channel(WAITING);
            let (stream, mut journal) = (self.stream(&node, sender), SpooledJournal::new(spool.clone()));
            async move {
                let write = async {
                    // If the file cannot be written, the receiver goes, and the stream ends.
                    let mut receiver = receiver;
                    while let Some((_, line)) = receiver.recv().await {
                        journal.push(&line)?;
                    }
                    Ok::<_, Error>(())
                };
                let (ended, written) = tokio::join!(stream.run(), write);
                written.map(|()| (journal, ended.err()))
            }
        };
        self.client.each(self.nodes, read).await.into_iter().collect()
    }

    fn stream(&self, node: &str, sender: Sender<(Instant, JournalLine)>) -> Stream {
        let query = self.query.clone();
        let left = query.lines.filter(|_| !query.follow);
        Stream {
            client: self.client.clone(),
            node: node.to_owned(),
            kept_by: self.kept_by.map(str::to_owned),
            query,
            left,
            sender,
            on_break: self.on_break.clone(),
        }
    }

    /// Returns the incomplete nodes, or the error that all of them have if no hub has answered.
    fn unless_no_hub(&self, mut incomplete: Vec<(String, Error)>) -> Result<Vec<(String, Error)>> {
        match incomplete.pop() {
            Some((_, e)) if !self.client.has_reached_a_hub() => Err(e),
            last => Ok(incomplete.into_iter().chain(last).collect()),
        }
    }
}

/// Stream of one node's journal.
struct Stream {
    client: Client,
    node: String,
    kept_by: Option<String>,
    query: JournalQuery,
    /// Number of messages that are wanted yet; all without it.
    left: Option<u32>,
    sender: Sender<(Instant, JournalLine)>,
    on_break: OnBreak,
}

impl Stream {
    /// Sends the messages until the end of the journal. While following, the stream ends only if the node refuses.
    async fn run(mut self) -> Result<()> {
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (mut pause, mut failures) = (Backoff::default(), 0);
        loop {
            let before = self.query.after.clone();
            let ended = self.read().await;
            if self.sender.is_closed() || self.left == Some(0) {
                return Ok(());
            }
            if self.query.after != before {
                (pause, failures) = (Backoff::default(), 0);
            }
            match ended {
                Ok(count) if !self.query.follow && count < MOST_JOURNAL_LINES => return Ok(()),
                // The node may have more messages.
                Ok(_) if !self.query.follow => continue,
                Err(e) if is_final_error(&e) || !self.client.has_reached_a_hub() => return Err(e),
                Err(e) => {
                    failures += 1;
                    if !self.query.follow && failures == ATTEMPTS {
                        return Err(e);
                    }
                    if failures == 2 {
                        (self.on_break)(&self.node, e.chain().lines().next().unwrap_or_default());
                    }
                }
                // The node's agent has stopped.
                Ok(_) => {}
            }
            if self.query.after.is_none() && self.query.follow {
                // No message was sent yet. The next request must not skip those that came since.
                self.query.lines = None;
                self.query.since = self.query.since.or(Some(started.saturating_sub(MARGIN)));
            }
            sleep(pause.next_delay().min(LONGEST_PAUSE)).await;
        }
    }

    /// Sends the messages of one reply. Notes the cursor of each in the query. Returns the number of messages in the
    /// reply.
    async fn read(&mut self) -> Result<u32> {
        let path = if self.kept_by.is_some() { KEPT_JOURNAL_PATH } else { JOURNAL_PATH };
        let of = self.kept_by.is_some().then(|| self.node.clone());
        let path = format!("{path}?{}", query_string(&JournalQuery { of, ..self.query.clone() })?);
        let connected = self.client.connect(self.kept_by.as_ref().unwrap_or(&self.node)).await?;
        let mut lines = connected.lines("GET", &path, Bytes::new(), IDLE).await?;
        let mut count = 0;
        while let Some(bytes) = lines.next().await? {
            let action = || format!("read the journal of {}", self.node);
            let line: JournalLine = serde_json::from_slice(&bytes).map_err(|e| Error::cannot(action())(e))?;
            count += 1;
            if self.query.after.as_deref() == Some(&line.cursor) {
                continue;
            }
            let after = Some(line.cursor.clone());
            if self.sender.send((Instant::now(), line)).await.is_err() {
                return Ok(count);
            }
            self.left = self.left.map(|left| left.saturating_sub(1));
            // After a break, everything after this message is wanted, also of a later boot.
            self.query =
                JournalQuery { after, lines: self.left, since: None, boot: false, ..std::mem::take(&mut self.query) };
            if self.left == Some(0) {
                return Ok(count);
            }
        }
        Ok(count)
    }
}

/// Returns a query as in a URL.
fn query_string(query: &JournalQuery) -> Result<String> {
    let value = serde_json::to_value(query).map_err(Error::Json)?;
    let pairs = value.as_object().into_iter().flatten().map(|(key, value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("{key}={}", percent_encoded(&text))
    });
    Ok(pairs.collect::<Vec<_>>().join("&"))
}

fn percent_encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        byte if byte.is_ascii_alphanumeric() => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;
    use fleet_https::CONNECTIONS_PER_HUB;

    #[test]
    fn query_is_percent_encoded() {
        let query = JournalQuery {
            unit: Some("a b&c.service".to_owned()),
            lines: Some(10),
            after: Some("s=0f;i=1".to_owned()),
            follow: true,
            ..JournalQuery::default()
        };
        let text = query_string(&query).unwrap();
        let mut pairs: Vec<&str> = text.split('&').collect();
        pairs.sort_unstable();
        assert_eq!(pairs, ["after=s%3D0f%3Bi%3D1", "boot=false", "follow=true", "lines=10", "unit=a%20b%26c.service"]);
    }

    /// Returns the messages of `nodes`, until `stop` of them were printed.
    async fn logs(fleet: &Fleet, nodes: &[&str], query: &JournalQuery, stop: usize) -> Vec<String> {
        let nodes: Vec<String> = nodes.iter().map(|node| (*node).to_owned()).collect();
        let client = fleet.client();
        let logs = Logs { client: &client, nodes: &nodes, query, kept_by: None, on_break: Arc::new(|_, _| {}) };
        let mut found = Vec::new();
        let ended = logs.merged(|of| {
            found.push(format!("{} {}", of.node, of.line.message));
            if found.len() == stop { Err(Error::Interrupted) } else { Ok(()) }
        });
        let ended = tokio::time::timeout(Duration::from_secs(60), ended).await.expect("the messages arrive");
        match ended {
            Err(Error::Interrupted) => assert_eq!(found.len(), stop),
            Err(e) => panic!("{}", e.chain()),
            Ok(incomplete) => {
                let causes: Vec<String> = incomplete.iter().map(|(node, e)| format!("{node}: {}", e.chain())).collect();
                assert!(causes.is_empty(), "{causes:?}");
                assert!(!query.follow, "the journals ended after {} of {stop} messages", found.len());
            }
        }
        found
    }

    /// Number that no test prints.
    const ALL: usize = usize::MAX;

    fn numbers(found: &[String]) -> Vec<u64> {
        found.iter().map(|line| line.split(' ').nth(1).unwrap().parse().unwrap()).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn journals_of_two_nodes_merge_by_time() {
        let fleet = Fleet::start(&["hub-1"], &["db-1", "db-2"]).await;
        fleet.write("db-1", &[10, 30]);
        fleet.write("db-2", &[20, 40]);
        let found = logs(&fleet, &["db-1", "db-2"], &JournalQuery::default(), ALL).await;
        assert_eq!(found, ["db-1 10", "db-2 20", "db-1 30", "db-2 40"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn more_nodes_than_the_hubs_permit_connections_merge_by_time() {
        let count = CONNECTIONS_PER_HUB as u64 + 6;
        let names: Vec<String> = (1..=count).map(|n| format!("app-{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let fleet = Fleet::start(&["hub-1"], &names).await;
        for (n, name) in names.iter().enumerate() {
            // More messages than wait to be merged.
            let times: Vec<u64> = (0..600).map(|i| i * count + n as u64).collect();
            fleet.write(name, &times);
        }
        let found = numbers(&logs(&fleet, &names, &JournalQuery::default(), ALL).await);
        assert_eq!(found, (0..600 * count).collect::<Vec<u64>>());
        let (client, follow) = (fleet.client(), JournalQuery { follow: true, ..JournalQuery::default() });
        let nodes = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let logs =
            Logs { client: &client, nodes: &nodes, query: &follow, kept_by: None, on_break: Arc::new(|_, _| {}) };
        let e = logs.merged(|_| Ok(())).await.map(drop).unwrap_err();
        let number = format!("{CONNECTIONS_PER_HUB} connections");
        assert!(matches!(&e, Error::Usage(text) if text.contains(&number) && text.contains("these are")));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reply_that_ends_early_continues_after_its_last_message() {
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1"]).await;
        fleet.write("db-1", &(0..300).collect::<Vec<u64>>());
        let node = fleet.node("db-1");
        *node.breaks.lock().unwrap() = vec![50, 70];
        let found = numbers(&logs(&fleet, &["db-1"], &JournalQuery::default(), ALL).await);
        assert_eq!(found, (0..300).collect::<Vec<u64>>());
        // With a number of messages, it is the number of all replies together.
        *node.breaks.lock().unwrap() = vec![30];
        let query = JournalQuery { lines: Some(100), ..JournalQuery::default() };
        let writer = async {
            while node.journals.load(std::sync::atomic::Ordering::SeqCst) < 4 {
                sleep(Duration::from_millis(1)).await;
            }
            fleet.write("db-1", &[1000, 1001]);
        };
        let (found, ()) = tokio::join!(logs(&fleet, &["db-1"], &query, ALL), writer);
        assert_eq!(numbers(&found), (200..300).collect::<Vec<u64>>());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reply_of_the_greatest_length_is_continued() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        let count = u64::from(MOST_JOURNAL_LINES) + 1;
        fleet.write("db-1", &(0..count).collect::<Vec<u64>>());
        let query = JournalQuery { since: Some(0), ..JournalQuery::default() };
        let found = numbers(&logs(&fleet, &["db-1"], &query, ALL).await);
        assert_eq!(found, (0..count).collect::<Vec<u64>>());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_passing_refusal_does_not_end_a_stream() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        fleet.write("db-1", &[1]);
        let refusals = &fleet.node("db-1").refusals;
        let passing = [("503 Service Unavailable", "the journal does not answer"), ("429 Too Many Requests", "busy")];
        for follow in [false, true] {
            *refusals.lock().unwrap() = passing.to_vec();
            let query = JournalQuery { follow, ..JournalQuery::default() };
            assert_eq!(logs(&fleet, &["db-1"], &query, 1).await, ["db-1 1"]);
        }
        let query = JournalQuery { unit: Some("no/unit".to_owned()), follow: true, ..JournalQuery::default() };
        let (client, nodes) = (fleet.client(), ["db-1".to_owned()]);
        let logs = Logs { client: &client, nodes: &nodes, query: &query, kept_by: None, on_break: Arc::new(|_, _| {}) };
        let incomplete = logs.merged(|_| Ok(())).await.unwrap();
        assert!(incomplete[0].1.chain().contains("`unit` is not valid"), "{}", incomplete[0].1.chain());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_unit_has_its_own_messages() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        fleet.write("db-1", &[1, 2]);
        fleet.node("db-1").write("patroni.service", &[3]);
        let query = JournalQuery { unit: Some("patroni".to_owned()), ..JournalQuery::default() };
        assert_eq!(logs(&fleet, &["db-1"], &query, ALL).await, ["db-1 3"]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn following_continues_through_another_hub_without_gap_or_duplicate() {
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1", "db-2"]).await;
        let query = JournalQuery { follow: true, ..JournalQuery::default() };
        let writer = async {
            for at in 1..=60u64 {
                fleet.write(if at % 2 == 0 { "db-2" } else { "db-1" }, &[at]);
                tokio::time::sleep(Duration::from_millis(30)).await;
                if at == 20 {
                    // The hub dies in the middle of both streams.
                    fleet.stop_hub("hub-1");
                }
            }
        };
        let (found, ()) = tokio::join!(logs(&fleet, &["db-1", "db-2"], &query, 60), writer);
        let of = |node: &str| -> Vec<u64> {
            let own = found.iter().filter_map(|line| line.strip_prefix(node));
            own.map(|at| at.trim().parse().unwrap()).collect()
        };
        let (odd, even): (Vec<u64>, Vec<u64>) = (1..=60).partition(|at| at % 2 == 1);
        assert_eq!((of("db-1"), of("db-2")), (odd, even));
        assert!(fleet.connections("hub-2") >= 2, "the second hub took the streams over");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_node_that_refuses_ends_its_stream_with_the_reason() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        let (client, nodes) = (fleet.client(), ["db-1".to_owned(), "no-such".to_owned()]);
        fleet.write("db-1", &[1]);
        let query = JournalQuery { follow: false, ..JournalQuery::default() };
        let logs = Logs { client: &client, nodes: &nodes, query: &query, kept_by: None, on_break: Arc::new(|_, _| {}) };
        let incomplete = logs.merged(|_| Ok(())).await.unwrap();
        assert_eq!(incomplete.len(), 1);
        let (node, cause) = &incomplete[0];
        assert!(node == "no-such" && cause.chain().contains("404"), "{}", cause.chain());
    }
}
