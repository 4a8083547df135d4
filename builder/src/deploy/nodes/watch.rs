//! State of all nodes, again and again. A node that does not answer does not delay the others.

use std::convert::Infallible;
use std::time::Duration;

use fleet::node_api::{NodeStatus, STATUS_PATH};
use tokio::sync::mpsc::{Sender, channel};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout};

use super::client::{Client, NodeConnection};
use super::status::{LIMIT, LONGEST, row};
use crate::error::{Error, Result};
use crate::keys::operator::KnownNode;
use crate::vm::{FleetStatus, SeenNode};

/// Time for which the first state waits for the answers of all nodes.
const FIRST: Duration = Duration::from_secs(1);
/// Number of answers that wait to be read.
const WAITING: usize = 64;

/// Asks each node every `interval`, and passes the state of all nodes to `show` as often.
///
/// # Errors
/// If no hub has answered yet, or `show` fails.
pub(crate) async fn watch(
    client: &Client,
    nodes: &[KnownNode],
    interval: Duration,
    mut show: impl FnMut(FleetStatus) -> Result<()>,
) -> Result<Infallible> {
    let (sender, mut answers) = channel(WAITING);
    let mut tasks = JoinSet::new();
    for (index, node) in nodes.iter().enumerate() {
        let asked = Asked {
            client: client.clone(),
            node: node.name.clone(),
            // Other commands of the operator need places, too.
            keeps: nodes.len() <= client.capacity() / 2,
            connection: None,
        };
        tasks.spawn(asked.again_and_again(index, interval, sender.clone()));
    }
    let mut seen: Vec<SeenNode> = nodes
        .iter()
        .map(|node| row(node, Err(Error::Failed(format!("waiting for the first answer of {}", node.name)))))
        .collect();
    let mut missing = nodes.len();
    let mut ticks = interval_at(Instant::now() + FIRST, interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut has_shown = false;
    loop {
        tokio::select! {
            Some((index, answer)) = answers.recv() => {
                match answer {
                    Err(e) if !client.has_reached_a_hub() => return Err(e),
                    answer => seen[index] = row(&nodes[index], answer),
                }
                missing = missing.saturating_sub(1);
                // The first answers of all nodes.
                if missing == 0 && !has_shown {
                    ticks.reset_immediately();
                }
            }
            _ = ticks.tick() => {
                has_shown = true;
                show(FleetStatus::new(seen.clone(), None))?;
            }
        }
    }
}

/// A node, and the connection to it.
struct Asked {
    client: Client,
    node: String,
    /// Whether the connection stays between two questions.
    keeps: bool,
    connection: Option<NodeConnection>,
}

impl Asked {
    async fn again_and_again(
        mut self,
        index: usize,
        interval: Duration,
        answers: Sender<(usize, Result<NodeStatus>)>,
    ) -> Result<()> {
        loop {
            let next = Instant::now() + interval;
            let room = self.client.room().await;
            let late = |_| Err(Error::Failed(format!("{} does not answer within {} s", self.node, LIMIT.as_secs())));
            let connection = self.connection.take();
            let asked = ask(&self.client, &self.node, connection);
            let (answer, connection) = match timeout(LIMIT, asked).await.unwrap_or_else(late) {
                Ok((status, connection)) => (Ok(status), Some(connection)),
                Err(e) => (Err(e), None),
            };
            drop(room);
            self.connection = connection.filter(|_| self.keeps);
            if answers.send((index, answer)).await.is_err() {
                return Ok(());
            }
            sleep_until(next).await;
        }
    }
}

/// Asks a node over a connection, or over a new one if it has ended. Returns the connection, too.
async fn ask(client: &Client, node: &str, connection: Option<NodeConnection>) -> Result<(NodeStatus, NodeConnection)> {
    if let Some(mut connection) = connection
        && let Ok(status) = connection.get(STATUS_PATH, LONGEST).await
    {
        return Ok((status, connection));
    }
    let mut connection = client.connect(node).await?;
    let status = connection.get(STATUS_PATH, LONGEST).await?;
    Ok((status, connection))
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;
    use crate::vm::MachineState;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_silent_node_does_not_delay_the_board() {
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1", "app-1", "app-2"]).await;
        fleet.make_unreachable("app-1");
        fleet.node("app-2").hang(true);
        let (client, nodes) = (fleet.client(), fleet.nodes());
        let started = Instant::now();
        let mut states = Vec::new();
        let ended = watch(&client, &nodes, Duration::from_millis(300), |status| {
            let of = |node: &str| (status.row(node).unwrap().state, status.row(node).unwrap().message.clone());
            states.push((of("db-1"), of("app-1"), of("app-2")));
            if states.len() == 2 {
                fleet.node("app-2").hang(false);
            }
            if states.len() == 6 { Err(Error::Interrupted) } else { Ok(()) }
        });
        assert!(matches!(ended.await, Err(Error::Interrupted)));
        assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
        let (db, app_1, app_2) = &states[0];
        assert_eq!(db.0, MachineState::Ready);
        assert!(app_1.0 == MachineState::Silent && app_1.1.contains("504"), "{}", app_1.1);
        assert!(app_2.0 == MachineState::Silent && app_2.1.contains("waiting for the first answer"), "{}", app_2.1);
        assert_eq!(states.last().unwrap().2.0, MachineState::Ready);
        // The connection to a node stays.
        let db = fleet.node("db-1").statuses.load(std::sync::atomic::Ordering::SeqCst);
        let forwarded = fleet.connections("hub-1") + fleet.connections("hub-2");
        assert!(db >= 5 && forwarded <= 5, "{db} answers, {forwarded} connections");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_hub_ends_the_board() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        fleet.stop_hub("hub-1");
        let shown = |_: FleetStatus| -> Result<()> { panic!("there is no state") };
        let e = watch(&fleet.client(), &fleet.nodes(), Duration::from_secs(1), shown).await.unwrap_err().chain();
        assert!(e.contains("no hub answers"), "{e}");
    }
}
