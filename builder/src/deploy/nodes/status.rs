//! State of all nodes, as their agents report it.

use std::collections::BTreeMap;
use std::time::Duration;

use fleet::node_api::{NodeStatus, STATUS_PATH};

use super::client::Client;
use crate::error::Result;
use crate::keys::operator::KnownNode;
use crate::vm::{Database, FleetStatus, MachineState, NodeRow, SeenNode, Standby};

/// Time within which a node answers.
pub(super) const LIMIT: Duration = Duration::from_secs(7);
/// Longest reply in bytes.
pub(super) const LONGEST: usize = 256 << 10;

/// Asks all nodes for their state, in parallel. A node that does not answer is `silent`, with the reason as its message.
///
/// # Errors
/// If no hub answers.
pub(crate) async fn ask_all(client: &Client, nodes: &[KnownNode]) -> Result<Vec<SeenNode>> {
    let names: Vec<String> = nodes.iter().map(|node| node.name.clone()).collect();
    let ask = |client: Client, node: String| async move {
        client.get::<NodeStatus>(&node, STATUS_PATH, LONGEST, LIMIT).await
    };
    let mut answers = client.each(&names, ask).await;
    if !client.has_reached_a_hub()
        && let Some(Err(_)) = answers.first()
    {
        // Every node has the same error.
        return answers.swap_remove(0).map(|_| Vec::new());
    }
    Ok(nodes.iter().zip(answers).map(|(node, answer)| row(node, answer)).collect())
}

/// Asks all nodes of a real fleet, as [`ask_all`] does.
///
/// # Errors
/// If no hub answers.
pub(crate) async fn fleet_status(client: &Client, nodes: &[KnownNode]) -> Result<FleetStatus> {
    Ok(FleetStatus::new(ask_all(client, nodes).await?, None))
}

/// Returns the row of a node, and Odoo's servers if it is a hub.
pub(super) fn row(node: &KnownNode, answer: Result<NodeStatus>) -> SeenNode {
    let mut odoo = BTreeMap::new();
    let mut row = NodeRow {
        node: node.name.clone(),
        group: node.group.clone(),
        roles: node.roles.clone(),
        address: node.address.clone(),
        state: MachineState::Silent,
        message: String::new(),
        vip: false,
        database: None,
        report: None,
    };
    match answer {
        Err(e) => e.chain().lines().next().unwrap_or_default().clone_into(&mut row.message),
        Ok(status) => {
            row.state = MachineState::from_phase(&status.phase);
            row.message.clone_from(&status.message);
            row.vip = status.vip;
            row.database = status.database.as_ref().map(|database| {
                let standby =
                    |s: &fleet::node_api::StandbyStatus| Standby { node: s.node.clone(), sync: s.sync, lag: s.lag };
                if database.primary {
                    Database::Primary(database.standbys.iter().map(standby).collect())
                } else {
                    Database::Standby
                }
            });
            odoo.clone_from(&status.odoo);
            row.report = Some(status);
        }
    }
    (row, odoo)
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;
    use std::time::Instant;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_silent_node_has_the_reason_and_the_others_their_state() {
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1", "app-1"]).await;
        let mut nodes = fleet.nodes();
        nodes.push(KnownNode { name: "db-9".to_owned(), ..nodes[0].clone() });
        let status = fleet_status(&fleet.client(), &nodes).await.unwrap();
        let of = |node: &str| status.row(node).unwrap();
        assert_eq!((of("db-1").state, of("app-1").state), (MachineState::Ready, MachineState::Ready));
        assert_eq!(of("db-1").report.as_ref().unwrap().image, "7");
        let silent = of("db-9");
        assert!(silent.state == MachineState::Silent && silent.message.contains("404"), "{}", silent.message);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_dead_first_hub_costs_less_than_its_time_limit() {
        // hub-1 accepts connections and never answers.
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1"]).await;
        fleet.mute_hub("hub-1");
        let started = Instant::now();
        let status = fleet_status(&fleet.client(), &fleet.nodes()).await.unwrap();
        assert_eq!(status.row("db-1").unwrap().state, MachineState::Ready, "{status}");
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_hub_gives_one_error_with_the_cause_of_each() {
        let fleet = Fleet::start(&["hub-1", "hub-2"], &["db-1"]).await;
        let client = fleet.client();
        fleet.stop_hub("hub-1");
        fleet.stop_hub("hub-2");
        let e = fleet_status(&client, &fleet.nodes()).await.map(drop).unwrap_err().chain();
        for part in ["no hub answers", "hub-1", "hub-2", "--endpoint HUB=HOST"] {
            assert!(e.contains(part), "{e}");
        }
    }

    /// Returns the time for which this thread has used a processor.
    fn processor_time() -> Duration {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    }

    /// `NODES=1000` sets the number of nodes. Prints the time, which depends on the load of the host and has that of the
    /// servers, and the client's own processor time.
    #[tokio::test(flavor = "multi_thread")]
    async fn many_nodes_answer_in_parallel() {
        let count: usize = std::env::var("NODES").map_or(200, |count| count.parse().unwrap());
        let names: Vec<String> = (1..=count).map(|n| format!("app-{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let fleet = Fleet::start(&["hub-1", "hub-2", "hub-3"], &names).await;
        let (client, nodes) = (fleet.client(), fleet.nodes());
        fleet.prepare();
        let started = Instant::now();
        // A thread of its own, because the servers use the threads of the test.
        let client = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let status = runtime.block_on(fleet_status(&client, &nodes)).unwrap();
            (status, processor_time())
        });
        let (status, used) = tokio::task::spawn_blocking(|| client.join().unwrap()).await.unwrap();
        println!("{count} nodes: {:?}; the client used a processor for {used:?}", started.elapsed());
        assert!(status.nodes.iter().all(|row| row.state == MachineState::Ready), "{status}");
        assert_eq!(status.nodes.len(), count);
        // The client uses all hubs, and asks up to 64 nodes at the same time.
        let most = fleet.most_parallel();
        // A server counts a connection until it has read its end, which is later than the client's next connection.
        assert!(most <= 96 && most > 8.min(count / 2), "{most}");
        // One connection a node, and none only to look whether a hub answers.
        let asked: usize = ["hub-1", "hub-2", "hub-3"].iter().map(|hub| fleet.requests(hub)).sum();
        assert!(asked >= count && asked < count + count / 10, "{asked} requests for {count} nodes");
        assert!(["hub-1", "hub-2", "hub-3"].iter().all(|hub| fleet.connections(hub) > count / 10));
    }
}
