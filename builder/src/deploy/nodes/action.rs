//! Actions on nodes, and how they end.

use std::time::{Duration, Instant};

use fleet::node_api::{ACTION_PATH, ActionRequest, ActionStatus, NodeStatus, STATUS_PATH};
use tokio::time::sleep;

use super::client::{Client, is_final_error};
use super::status::fleet_status;
use crate::error::{Error, Result, fail};
use crate::keys::operator::KnownNode;

/// Time between two questions about an action.
const POLL: Duration = Duration::from_secs(1);
/// Time limit of a question.
const LIMIT: Duration = Duration::from_secs(10);
/// Longest reply, in bytes.
const LONGEST: usize = 256 << 10;
/// Longest action: the restart of a unit, after a hand-over of the primary.
const LONGEST_ACTION: Duration = Duration::from_secs(420);
/// Longest time from a reboot to a ready node. An emulated machine needs minutes.
const LONGEST_BOOT: Duration = Duration::from_secs(900);
/// Longest time until a node that switches itself off does not answer any more.
const LONGEST_STOP: Duration = Duration::from_secs(240);
/// Longest time after a hand-over until a node reports the primary.
const LONGEST_PROMOTION: Duration = Duration::from_secs(60);
/// Number of failed questions in a row after which a node is off.
const SILENT: u32 = 3;

/// An action that a node has accepted.
pub(crate) struct Action<'a> {
    pub client: &'a Client,
    pub node: &'a str,
    /// Gets what the node does, while the caller waits.
    pub on_state: &'a (dyn Fn(&str) + Sync),
}

impl Action<'_> {
    /// Posts an action, and waits until it has ended. Returns what the node has done, with its name. `stops`: the action may end with a
    /// node that does not answer.
    ///
    /// # Errors
    /// If the node does not answer, refuses, or the action fails.
    pub(crate) async fn run(&self, path: &str, request: &ActionRequest, stops: bool) -> Result<String> {
        let node = self.node;
        let reply = self.client.act(node, path, request).await?;
        if reply.done || reply.id.is_empty() {
            return Ok(reply.message);
        }
        (self.on_state)(&reply.message);
        let (started, mut failures) = (Instant::now(), 0);
        while started.elapsed() < LONGEST_ACTION {
            sleep(POLL).await;
            match self.client.get::<ActionStatus>(node, ACTION_PATH, LONGEST, LIMIT).await {
                Ok(status) if status.id == reply.id => {
                    failures = 0;
                    match status.error {
                        Some(why) => return fail(format!("{node}: {why}")),
                        None if status.done => return Ok(format!("{node}: {} done", described(&status))),
                        None => {}
                    }
                }
                Ok(_) => return Err(self.unknown("another action has followed, or its agent has restarted")),
                Err(e) if is_final_error(&e) => return Err(self.unknown(&e.chain())),
                Err(e) => {
                    failures += 1;
                    if stops && failures == SILENT {
                        return Ok(format!("{node}: stops"));
                    }
                    (self.on_state)(e.chain().lines().next().unwrap_or_default());
                }
            }
        }
        Err(self.unknown(&format!("it continues after {} s", LONGEST_ACTION.as_secs())))
    }

    fn unknown(&self, why: &str) -> Error {
        let node = self.node;
        Error::Failed(format!(
            "the result of the action on {node} is unknown: {why}\n  help: `bakehouse status` and `bakehouse logs {node} -u \
             firstboot` show what it did"
        ))
    }

    /// Waits until the node has booted again after `since`, and is ready. Returns the time in seconds.
    ///
    /// # Errors
    /// If the node is not ready in time.
    pub(crate) async fn until_booted(&self, since: Instant) -> Result<u64> {
        let (mut silent, mut was_silent) = (0, false);
        let mut last = String::new();
        while since.elapsed() < LONGEST_BOOT {
            match self.state().await {
                Ok(status) => {
                    // The kernel has started after the action. A container has the uptime of its host.
                    let is_new = status.uptime <= since.elapsed().as_secs() || was_silent;
                    if is_new && status.phase == "ready" {
                        return Ok(since.elapsed().as_secs());
                    }
                    silent = 0;
                    last = if is_new { format!("{}: {}", status.phase, status.message) } else { "stops".to_owned() };
                }
                Err(e) if is_final_error(&e) => return Err(e),
                Err(e) => {
                    silent += 1;
                    was_silent |= silent >= SILENT;
                    e.chain().lines().next().unwrap_or_default().clone_into(&mut last);
                }
            }
            (self.on_state)(&last);
            sleep(POLL).await;
        }
        let (node, seconds) = (self.node, LONGEST_BOOT.as_secs());
        fail(format!("{node} is not ready {seconds} s after the reboot: {last}\n  help: look at its console"))
    }

    /// Waits until the node does not answer any more.
    ///
    /// # Errors
    /// If the node still answers when the time is over.
    pub(crate) async fn until_off(&self) -> Result<()> {
        let (started, mut silent) = (Instant::now(), 0);
        while started.elapsed() < LONGEST_STOP {
            match self.state().await {
                Ok(_) => silent = 0,
                Err(e) if is_final_error(&e) => return Err(e),
                Err(_) => silent += 1,
            }
            if silent == SILENT {
                return Ok(());
            }
            (self.on_state)("stops");
            sleep(POLL).await;
        }
        fail(format!("{} still answers after {} s", self.node, LONGEST_STOP.as_secs()))
    }

    /// Waits until another of the `databases` reports the primary. Returns its name.
    ///
    /// # Errors
    /// If no other node has the primary in time.
    pub(crate) async fn until_promoted(&self, databases: &[KnownNode]) -> Result<String> {
        let started = Instant::now();
        let mut last = String::new();
        while started.elapsed() < LONGEST_PROMOTION {
            match fleet_status(self.client, databases).await {
                Ok(status) => match status.primary() {
                    Some(primary) if primary != self.node => return Ok(primary.to_owned()),
                    Some(_) => last = format!("{} still has the primary", self.node),
                    None => "no node reports the primary".clone_into(&mut last),
                },
                Err(e) => last = e.chain(),
            }
            (self.on_state)(&last);
            sleep(POLL).await;
        }
        fail(format!("{} s after the hand-over: {last}", LONGEST_PROMOTION.as_secs()))
    }

    async fn state(&self) -> Result<NodeStatus> {
        self.client.get(self.node, STATUS_PATH, LONGEST, LIMIT).await
    }
}

/// Returns an action as nodes name it in a reply.
fn described(status: &ActionStatus) -> String {
    status.unit.as_ref().map_or_else(|| status.action.clone(), |unit| format!("{} of {unit}", status.action))
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;
    use fleet::node_api::{REBOOT_PATH, RESTART_PATH};
    use std::sync::atomic::Ordering;

    async fn restart(fleet: &Fleet, unit: &str) -> Result<String> {
        let client = fleet.client();
        let action = Action { client: &client, node: "db-1", on_state: &|_| {} };
        let request = ActionRequest { unit: Some(unit.to_owned()), force: None };
        action.run(RESTART_PATH, &request, false).await
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_action_that_continues_is_followed_to_its_end() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        assert_eq!(restart(&fleet, "odoo.service").await.unwrap(), "db-1: accepted");
        let node = fleet.node("db-1");
        *node.ends.lock().unwrap() = Some(Ok(()));
        node.left.store(1, Ordering::SeqCst);
        let done = restart(&fleet, "odoo.service").await.unwrap();
        assert!(done.starts_with("db-1: restart") && done.ends_with(" done"), "{done}");
        *node.ends.lock().unwrap() = Some(Err("odoo.service failed"));
        node.left.store(1, Ordering::SeqCst);
        assert_eq!(restart(&fleet, "odoo.service").await.unwrap_err().chain(), "db-1: odoo.service failed");
        let e = restart(&fleet, "odoo").await.unwrap_err().chain();
        assert!(e.contains("names no unit"), "{e}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reboot_ends_when_the_node_is_ready_again() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        let (client, node) = (fleet.client(), fleet.node("db-1"));
        let action = Action { client: &client, node: "db-1", on_state: &|_| {} };
        action.run(REBOOT_PATH, &ActionRequest::default(), true).await.unwrap();
        let booting = async {
            // The node still answers while it stops.
            sleep(Duration::from_millis(1500)).await;
            "starting".clone_into(&mut node.status.lock().unwrap().phase);
            *node.booted.lock().unwrap() = Instant::now();
            sleep(Duration::from_millis(1500)).await;
            "ready".clone_into(&mut node.status.lock().unwrap().phase);
        };
        let (seconds, ()) = tokio::join!(action.until_booted(Instant::now()), booting);
        assert!(seconds.unwrap() >= 3);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_node_that_does_not_answer_any_more_is_off() {
        let fleet = Fleet::start(&["hub-1"], &["db-1"]).await;
        let client = fleet.client();
        let action = Action { client: &client, node: "db-1", on_state: &|_| {} };
        let stopping = async {
            sleep(Duration::from_millis(500)).await;
            fleet.make_unreachable("db-1");
        };
        let (off, ()) = tokio::join!(action.until_off(), stopping);
        off.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_hand_over_ends_when_another_node_has_the_primary() {
        let fleet = Fleet::start(&["hub-1"], &["db-1", "db-2"]).await;
        fleet.node("db-1").set_primary(true);
        fleet.node("db-2").set_primary(false);
        let client = fleet.client();
        let action = Action { client: &client, node: "db-1", on_state: &|_| {} };
        let promotion = async {
            sleep(Duration::from_millis(500)).await;
            fleet.node("db-1").set_primary(false);
            sleep(Duration::from_millis(700)).await;
            fleet.node("db-2").set_primary(true);
        };
        let databases = fleet.nodes();
        let (to, ()) = tokio::join!(action.until_promoted(&databases), promotion);
        assert_eq!(to.unwrap(), "db-2");
    }
}
