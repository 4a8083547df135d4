//! Merges the journals of several nodes by time, with little memory: it holds the next message of each node.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use fleet::node_api::JournalLine;
use tokio::sync::mpsc::Receiver;
use tokio::time::{Instant, sleep_until};

/// Messages of one node.
pub(super) struct Source {
    /// Messages with the times at which they arrived.
    pub(super) lines: Receiver<(Instant, JournalLine)>,
    head: Option<(Instant, JournalLine)>,
    is_open: bool,
}

impl Source {
    pub(super) fn new(lines: Receiver<(Instant, JournalLine)>) -> Self {
        Self { lines, head: None, is_open: true }
    }
}

/// A merge of sources.
pub(super) struct Merge {
    sources: Vec<Source>,
    /// Longest time for which a message waits for earlier ones of other nodes; without it, a message waits until every
    /// node has a later one.
    window: Option<Duration>,
    /// Until then, messages wait for the first ones of all nodes.
    warm: Instant,
}

impl Merge {
    /// Makes a merge. With `window`, the sources do not end: a message waits so long, and until `start_up` is over.
    pub(super) fn new(sources: Vec<Source>, window: Option<Duration>, start_up: Duration) -> Self {
        Self { sources, window, warm: Instant::now() + start_up }
    }

    /// Returns the next message and the index of its source; `None` if all sources have ended.
    pub(super) async fn next(&mut self) -> Option<(usize, JournalLine)> {
        loop {
            self.fill().await;
            let waits = self.sources.iter().any(|s| s.is_open && s.head.is_none());
            let earliest = |(index, source): (usize, &Source)| source.head.as_ref().map(|(at, l)| (l.at, index, *at));
            let first = self.sources.iter().enumerate().filter_map(earliest).min();
            let Some((_, index, arrived)) = first else {
                if waits {
                    self.changed(None).await;
                    continue;
                }
                return None;
            };
            if waits {
                let until = self.window.map(|window| (arrived + window).max(self.warm));
                if until.is_none_or(|until| until > Instant::now()) {
                    self.changed(until).await;
                    continue;
                }
            }
            return self.sources[index].head.take().map(|(_, line)| (index, line));
        }
    }

    /// Takes the next message of each source that has one already.
    async fn fill(&mut self) {
        let sources = &mut self.sources;
        poll_fn(|cx| {
            for source in sources.iter_mut().filter(|s| s.is_open && s.head.is_none()) {
                if let Poll::Ready(line) = source.lines.poll_recv(cx) {
                    (source.is_open, source.head) = (line.is_some(), line);
                }
            }
            Poll::Ready(())
        })
        .await;
    }

    /// Returns when a source without a message has one or ends, or at `until`.
    async fn changed(&mut self, until: Option<Instant>) {
        let sources = &mut self.sources;
        let arrival = poll_fn(|cx| {
            let mut is_changed = false;
            for source in sources.iter_mut().filter(|s| s.is_open && s.head.is_none()) {
                if let Poll::Ready(line) = source.lines.poll_recv(cx) {
                    (source.is_open, source.head, is_changed) = (line.is_some(), line, true);
                }
            }
            if is_changed { Poll::Ready(()) } else { Poll::Pending }
        });
        match until {
            Some(until) => tokio::select! {
                () = arrival => {}
                () = sleep_until(until) => {}
            },
            None => arrival.await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc::{Sender, channel};

    fn line(at: u64) -> JournalLine {
        JournalLine { at, ..JournalLine::default() }
    }

    fn sources(count: usize) -> (Vec<Sender<(Instant, JournalLine)>>, Vec<Source>) {
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..count).map(|_| channel(4)).unzip();
        (senders, receivers.into_iter().map(Source::new).collect())
    }

    async fn all(mut merge: Merge) -> Vec<(usize, u64)> {
        let mut found = Vec::new();
        while let Some((source, line)) = merge.next().await {
            found.push((source, line.at));
        }
        found
    }

    #[tokio::test]
    async fn ended_journals_merge_by_time_however_slow_a_node_is() {
        let (senders, sources) = sources(3);
        for (i, sender) in senders.into_iter().enumerate() {
            tokio::spawn(async move {
                // The last node is slow, and more messages come than a channel holds.
                for n in 0..20u64 {
                    if i == 2 {
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    sender.send((Instant::now(), line(n * 3 + i as u64))).await.unwrap();
                }
            });
        }
        let found = all(Merge::new(sources, None, Duration::ZERO)).await;
        let expected: Vec<(usize, u64)> = (0..60).map(|n| ((n % 3) as usize, n)).collect();
        assert_eq!(found, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_followed_node_waits_only_for_the_window() {
        let (senders, sources) = sources(2);
        let start = Instant::now();
        let mut merge = Merge::new(sources, Some(Duration::from_millis(300)), Duration::ZERO);
        let send = |source: usize, at: u64| {
            let sender = senders[source].clone();
            async move { sender.send((Instant::now(), line(at))).await.unwrap() }
        };
        send(0, 10).await;
        send(0, 11).await;
        // An earlier message of the other node, within the window.
        tokio::time::sleep(Duration::from_millis(100)).await;
        send(1, 9).await;
        let mut order = Vec::new();
        for _ in 0..3 {
            order.push(merge.next().await.unwrap().1.at);
        }
        assert_eq!((order, start.elapsed()), (vec![9, 10, 11], Duration::from_millis(300)));
        drop(senders);
        assert_eq!(merge.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_messages_wait_for_all_nodes_while_a_follower_starts() {
        let (senders, sources) = sources(2);
        let mut merge = Merge::new(sources, Some(Duration::from_millis(300)), Duration::from_secs(2));
        senders[0].send((Instant::now(), line(2))).await.unwrap();
        let late = senders[1].clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            late.send((Instant::now(), line(1))).await.unwrap();
        });
        assert_eq!(merge.next().await.unwrap().1.at, 1);
        assert_eq!(merge.next().await.unwrap().1.at, 2);
    }

    #[tokio::test]
    async fn a_node_keeps_its_own_order() {
        // The node's clock was set back.
        let (senders, sources) = sources(1);
        for at in [5, 3, 4] {
            senders[0].send((Instant::now(), line(at))).await.unwrap();
        }
        drop(senders);
        assert_eq!(all(Merge::new(sources, None, Duration::ZERO)).await, [(0, 5), (0, 3), (0, 4)]);
    }
}
