//! Operators' actions on this node that no hub has stored in etcd yet. A file keeps them across a boot.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::Operator;
use fleet::node_api::{AuditEntry, BEGINS, LONGEST_AUDIT_REQUEST};
use fleet_https::PeerError;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::state::{load_or_default, write_json};
use crate::client::backoff::Backoff;
use crate::error::{Error, Result};

/// Stores entries of this node in etcd, through a hub. Storing an entry again changes nothing.
pub type Recorder = Box<dyn Fn(Vec<AuditEntry>) -> BoxFuture<'static, Result<()>> + Send + Sync>;

/// Most actions that wait for a hub. Further ones are only in the node's journal. Their number is in the next entry.
const MOST: usize = 256;
/// Most actions that have begun and not ended.
const MOST_BEGUN: usize = 64;
/// Longest time for which an action waits until etcd has it.
const WAIT: Duration = Duration::from_secs(1);
/// Time limit of the hubs, and of the disk.
const ANSWER: Duration = Duration::from_secs(10);
const DISK: Duration = Duration::from_secs(1);

/// The actions that wait for a hub.
pub struct Outbox {
    dir: PathBuf,
    node: String,
    recorder: Recorder,
    state: Mutex<Pending>,
    changed: Notify,
    /// Number of actions since the agent started.
    count: AtomicU32,
    /// Number of entries that wait.
    waiting: watch::Sender<usize>,
    /// The file's only writer.
    disk: Arc<tokio::sync::Mutex<()>>,
    /// The only task that sends.
    sending: tokio::sync::Mutex<()>,
}

struct Pending {
    queue: Queue,
    /// Actions that have begun and not ended, with their complete texts.
    begun: Vec<(String, AuditEntry)>,
}

/// Content of the file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Queue {
    version: u16,
    /// Number of actions without an entry.
    #[serde(default)]
    left_out: u32,
    entries: Vec<AuditEntry>,
}

impl Queue {
    const VERSION: u16 = 1;
    const FILE: &str = "audit-outbox.json";

    /// Adds an entry. Returns whether there is room.
    fn add(&mut self, entry: &mut AuditEntry) -> bool {
        if self.entries.len() >= MOST {
            self.left_out = self.left_out.saturating_add(1);
            return false;
        }
        entry.left_out = std::mem::take(&mut self.left_out);
        self.entries.push(entry.clone());
        true
    }

    /// Replaces the entry of the same action, or adds it.
    fn replace(&mut self, entry: AuditEntry) {
        let has_room = self.entries.len() < MOST + MOST_BEGUN;
        match self.entries.iter_mut().find(|other| other.is_same_action(&entry)) {
            Some(other) => *other = entry,
            // The begin of the action had room.
            None if has_room => self.entries.push(entry),
            None => {}
        }
    }

    /// Returns the first entries that one request can carry.
    fn batch(&self) -> Vec<AuditEntry> {
        let (mut batch, mut size) = (Vec::new(), 2);
        for entry in &self.entries {
            size += entry.size() + 1;
            if size > LONGEST_AUDIT_REQUEST {
                break;
            }
            batch.push(entry.clone());
        }
        batch
    }
}

impl Outbox {
    /// Returns the outbox of a node, with the entries in its file below `dir`.
    #[must_use]
    pub fn load(dir: &Path, node: &str, recorder: Recorder) -> Self {
        let queue: Queue = load_or_default(dir, Queue::FILE, Queue::VERSION);
        let queue = Queue { version: Queue::VERSION, ..queue };
        Self {
            dir: dir.to_owned(),
            node: node.to_owned(),
            recorder,
            waiting: watch::Sender::new(queue.entries.len()),
            state: Mutex::new(Pending { queue, begun: Vec::new() }),
            changed: Notify::new(),
            count: AtomicU32::new(0),
            disk: Arc::default(),
            sending: tokio::sync::Mutex::default(),
        }
    }

    /// Adds an action that begins now.
    pub fn begin(&self, operator: &Operator, from: &str, action: &str) {
        let mut entry = self.entry(operator, from, action);
        BEGINS.clone_into(&mut entry.result);
        let mut entry = entry.fitted();
        let mut state = self.state();
        let has_room = state.queue.add(&mut entry);
        if has_room && state.begun.len() < MOST_BEGUN {
            state.begun.push((action.to_owned(), entry));
        }
        self.wake(&state);
    }

    /// Adds how an action has ended.
    pub fn end(&self, operator: &Operator, from: &str, action: &str, result: &str) {
        let own = self.entry(operator, from, action);
        let (result, ended) = (result.to_owned(), Some(own.at));
        let mut state = self.state();
        let is_same =
            |(text, of): &(String, AuditEntry)| text == action && of.operator == own.operator && of.from == from;
        match state.begun.iter().position(is_same) {
            Some(index) => {
                let (_, begun) = state.begun.remove(index);
                state.queue.replace(AuditEntry { result, ended, ..begun }.fitted());
            }
            // Its begin had no room.
            None if state.queue.left_out > 0 => {}
            None => {
                state.queue.add(&mut AuditEntry { result, ended, ..own }.fitted());
            }
        }
        self.wake(&state);
    }

    /// Waits until etcd has all actions so far, for up to a second.
    pub(crate) async fn recorded(&self) {
        let mut waiting = self.waiting.subscribe();
        if timeout(WAIT, waiting.wait_for(|count| *count == 0)).await.is_err() {
            debug!("etcd does not have the last actions of operators yet");
        }
    }

    /// Sends the entries to the hubs, and writes those that wait to the file. Does not return.
    pub async fn keep(&self) {
        let _only = self.sending.lock().await;
        let mut pause = Backoff::default();
        // After a refusal, one entry at a time shows which one is refused.
        let mut most = usize::MAX;
        let mut is_logged = false;
        loop {
            let mut batch = self.state().queue.batch();
            batch.truncate(most);
            if batch.is_empty() {
                self.changed.notified().await;
                continue;
            }
            let late = |_| Err(Error::Failed("no answer".to_owned()));
            let sent = async { timeout(ANSWER, (self.recorder)(batch.clone())).await.unwrap_or_else(late) };
            let ((), sent) = tokio::join!(self.store(), sent);
            match sent {
                Err(e) if is_final(&e) && batch.len() > 1 => most = 1,
                Err(e) if !is_final(&e) => {
                    if !is_logged {
                        warn!("no hub stores the actions of operators, trying again: {}", e.chain());
                        is_logged = true;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(pause.next_delay()) => {}
                        () = self.changed.notified() => {}
                    }
                }
                sent => {
                    if let Err(e) = sent {
                        warn!("a hub refuses an entry of the audit log: {}", e.chain());
                    }
                    (pause, most, is_logged) = (Backoff::default(), usize::MAX, false);
                    self.remove(&batch);
                    self.store().await;
                }
            }
        }
    }

    /// Removes entries that etcd has. An action may have ended meanwhile, and its entry then stays.
    fn remove(&self, sent: &[AuditEntry]) {
        let mut state = self.state();
        state.queue.entries.retain(|entry| !sent.contains(entry));
        self.waiting.send_replace(state.queue.entries.len());
    }

    /// Writes the file. A disk that hangs delays the entries by up to a second.
    async fn store(&self) {
        let (disk, queue) = (self.disk.clone(), self.state().queue.clone());
        let path = self.dir.join(Queue::FILE);
        let written = async move {
            let only = disk.lock_owned().await;
            let write = move || {
                let written = write_json(&path, &queue);
                drop(only);
                written
            };
            tokio::task::spawn_blocking(write).await.map_err(Error::cannot("write the actions of operators"))?
        };
        match timeout(DISK, written).await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => warn!("cannot keep the actions of operators on the disk: {}", e.chain()),
            Err(_) => {
                warn!("cannot keep the actions of operators: the disk did not answer within {} s", DISK.as_secs());
            }
        }
    }

    fn entry(&self, operator: &Operator, from: &str, action: &str) -> AuditEntry {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The number keeps the order of actions that begin within a millisecond. The random bytes distinguish actions of
        // two runs of the agent, if the clock was set back.
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let mut random = [0; 4];
        let _ = getrandom::fill(&mut random);
        AuditEntry {
            at: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            id: format!("{number:08x}{:08x}", u32::from_ne_bytes(random)),
            node: self.node.clone(),
            operator: operator.name.clone(),
            role: operator.role.to_string(),
            from: from.to_owned(),
            action: action.to_owned(),
            ..AuditEntry::default()
        }
    }

    fn state(&self) -> MutexGuard<'_, Pending> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: &Pending) {
        self.waiting.send_replace(state.queue.entries.len());
        self.changed.notify_one();
    }
}

/// Returns whether the hubs would refuse the same entries again.
fn is_final(e: &Error) -> bool {
    match e {
        Error::Refused(refusal) => !refusal.reason.passes(),
        Error::Https(fleet_https::Error::Network { source: PeerError::Status { status, .. }, .. }) => {
            matches!(status.as_u16(), 400 | 403 | 413)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{OperatorRole, Reason, Refusal};
    use tokio::time::sleep;

    /// Hubs that keep what they get, and reply as the test says.
    #[derive(Clone, Default)]
    struct FakeHubs(Arc<Mutex<(Vec<AuditEntry>, Option<Reason>)>>);

    impl FakeHubs {
        fn outbox(&self, dir: &Path) -> Arc<Outbox> {
            let hubs = self.clone();
            let recorder = move |entries: Vec<AuditEntry>| -> BoxFuture<'static, Result<()>> {
                let mut state = hubs.0.lock().unwrap();
                let is_refused = |entry: &AuditEntry| entry.action == "refused";
                let reason = state.1.or(entries.iter().any(is_refused).then_some(Reason::Malformed));
                if reason.is_none() {
                    state.0.extend(entries);
                }
                let refused = |reason| Err(Refusal { reason, text: "no".to_owned() }.into());
                let reply = reason.map_or(Ok(()), refused);
                Box::pin(async move { reply })
            };
            Arc::new(Outbox::load(dir, "db-1", Box::new(recorder)))
        }

        fn reply(&self, reason: Option<Reason>) {
            self.0.lock().unwrap().1 = reason;
        }

        fn results(&self) -> Vec<(String, String)> {
            self.0.lock().unwrap().0.iter().map(|entry| (entry.action.clone(), entry.result.clone())).collect()
        }

        async fn until(&self, results: &[(&str, &str)]) {
            for _ in 0..300 {
                if self.results().iter().map(|(a, r)| (a.as_str(), r.as_str())).eq(results.iter().copied()) {
                    return;
                }
                sleep(Duration::from_millis(20)).await;
            }
            panic!("{:?}", self.results());
        }
    }

    fn anna() -> Operator {
        Operator::new("anna", OperatorRole::Operator).unwrap()
    }

    /// Waits until the file has this number of entries.
    async fn until_stored(dir: &Path, count: usize) {
        let stored = || load_or_default::<Queue>(dir, Queue::FILE, Queue::VERSION).entries;
        for _ in 0..500 {
            sleep(Duration::from_millis(20)).await;
            if stored().len() == count {
                return;
            }
        }
        panic!("the file has {:?}", stored());
    }

    #[tokio::test]
    async fn an_action_is_sent_at_its_begin_and_at_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let hubs = FakeHubs::default();
        let outbox = hubs.outbox(dir.path());
        let kept = outbox.clone();
        tokio::spawn(async move { kept.keep().await });
        outbox.begin(&anna(), "hub-1", "reboot");
        outbox.recorded().await;
        assert_eq!(hubs.results(), [("reboot".to_owned(), BEGINS.to_owned())]);
        outbox.end(&anna(), "hub-1", "reboot", "done");
        outbox.recorded().await;
        hubs.until(&[("reboot", BEGINS), ("reboot", "done")]).await;
        let [begun, ended] = <[AuditEntry; 2]>::try_from(hubs.0.lock().unwrap().0.clone()).unwrap();
        assert!(begun.is_same_action(&ended) && ended.ended >= Some(begun.at) && begun.ended.is_none());
        assert_eq!((ended.operator.as_str(), ended.role.as_str(), ended.from.as_str()), ("anna", "operator", "hub-1"));
        until_stored(dir.path(), 0).await;
    }

    #[tokio::test]
    async fn entries_wait_on_the_disk_while_the_hubs_are_away_and_are_sent_once() {
        let dir = tempfile::tempdir().unwrap();
        let hubs = FakeHubs::default();
        hubs.reply(Some(Reason::Busy));
        let outbox = hubs.outbox(dir.path());
        let kept = outbox.clone();
        let task = tokio::spawn(async move { kept.keep().await });
        let begun = std::time::Instant::now();
        outbox.begin(&anna(), "hub-1", "reboot");
        outbox.recorded().await;
        assert!(begun.elapsed() >= WAIT && begun.elapsed() < 20 * WAIT, "{:?}", begun.elapsed());
        outbox.end(&anna(), "hub-1", "reboot", "done");
        outbox.begin(&anna(), "hub-2", "restart");
        until_stored(dir.path(), 2).await;
        // The node boots, and a hub answers again.
        task.abort();
        hubs.reply(None);
        let outbox = hubs.outbox(dir.path());
        tokio::spawn(async move { outbox.keep().await });
        hubs.until(&[("reboot", "done"), ("restart", BEGINS)]).await;
    }

    #[tokio::test]
    async fn a_refused_entry_does_not_block_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let hubs = FakeHubs::default();
        let outbox = hubs.outbox(dir.path());
        for action in ["one", "refused", "two"] {
            outbox.begin(&anna(), "hub-1", action);
        }
        tokio::spawn(async move { outbox.keep().await });
        hubs.until(&[("one", BEGINS), ("two", BEGINS)]).await;
    }

    #[test]
    fn the_outbox_is_bounded_and_counts_what_it_leaves_out() {
        let dir = tempfile::tempdir().unwrap();
        let outbox = FakeHubs::default().outbox(dir.path());
        for n in 0..2 * MOST {
            outbox.begin(&anna(), "hub-1", &format!("{n}{}", "x".repeat(5000)));
            outbox.end(&anna(), "hub-1", &format!("{n}{}", "x".repeat(5000)), "done");
        }
        let mut state = outbox.state();
        assert_eq!((state.queue.entries.len(), state.queue.left_out as usize), (MOST, MOST));
        assert!(state.queue.batch().len() == 3 && state.begun.is_empty());
        state.queue.entries.clear();
        drop(state);
        outbox.begin(&anna(), "hub-1", "next");
        assert_eq!(outbox.state().queue.entries[0].left_out as usize, MOST);
    }
}
