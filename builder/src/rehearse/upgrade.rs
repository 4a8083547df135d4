//! The scenario `upgrade`: the fleet changes to a newer version while clients use it. The node that runs the clients
//! has to restart, too, so the clients run on two nodes, one after the other. This module adds up the outcomes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleet::Node;

use super::outcome::Outcome;
use super::scenario::Scenario;
use super::{Rehearsal, WARM_UP, report, wait_until_healthy};
use crate::error::{Error, Result, fail};
use crate::progress::Step;
use crate::util::time::rfc3339;
use crate::vm::{FleetStatus, Vm};

/// Time for one node to download, restart, and become healthy.
const NODE_TIMEOUT: Duration = Duration::from_secs(900);

impl Rehearsal<'_> {
    /// Runs the scenario. Returns `None` if the fleet has no `[update] url`, or no database.
    pub(super) fn upgrade(&self, scenario: &'static Scenario, step: Step) -> Result<Option<Outcome>> {
        let topology = &self.project.topology;
        let nodes: Vec<&Node> = topology.nodes.iter().collect();
        if topology.update.url.is_none() {
            return Ok(None);
        }
        let status = wait_until_healthy(self.project, &step, NODE_TIMEOUT)?;
        let before = self.versions()?;
        // The clients run on the primary's node first, because it restarts last of all nodes that can run clients.
        let Some(first) = status.primary().and_then(|name| topology.node(name)) else { return Ok(None) };
        let earlier: Vec<&Node> = nodes.iter().copied().filter(|n| changes_before(n, first, &status)).collect();
        let mut outcome = self.phase(scenario, first, &earlier, &before, &step)?;
        let rest: Vec<&Node> = nodes.iter().copied().filter(|n| !earlier.iter().any(|e| e.name == n.name)).collect();
        let second = earlier.iter().find(|n| n.has_role("app")).or_else(|| earlier.iter().find(|n| n.has_role("db")));
        let Some(second) = second else {
            return fail("only the primary's node can run the clients\n  help: add a second node with the role `db`");
        };
        outcome.add(&self.phase(scenario, second, &rest, &before, &step)?);
        outcome.victims = nodes.iter().map(|n| n.name.clone()).collect();
        let since = Instant::now();
        let healthy = wait_until_healthy(self.project, &step, NODE_TIMEOUT);
        outcome.whole = if healthy.is_ok() { since.elapsed().as_secs_f64() } else { f64::INFINITY };
        outcome.judge(&scenario.promise, None, f64::from(self.factor));
        if let Err(e) = healthy {
            outcome.broken.push(e.chain());
        }
        report(step, &outcome);
        Ok(Some(outcome))
    }

    /// Changes some of the nodes, while `host` runs the clients.
    fn phase(
        &self,
        scenario: &'static Scenario,
        host: &Node,
        changing: &[&Node],
        before: &BTreeMap<String, String>,
        step: &Step,
    ) -> Result<Outcome> {
        let probe = self.start_probe(host, step)?;
        std::thread::sleep(Duration::from_secs(WARM_UP));
        let (t0, began) = (probe.clock()?, SystemTime::now());
        for node in changing {
            let vm = Vm::for_node(self.project, &node.name)?;
            let offered = vm.exec("systemctl start firstboot-check; cat /run/bakehouse/offer")?.output;
            if offered.trim().is_empty() {
                return fail(format!(
                    "{} finds no newer version than {}\n  help: raise `version`, and run `bakehouse publish` with the \
                     folder of [update] url",
                    node.name, before[&node.name]
                ));
            }
        }
        let timeout = NODE_TIMEOUT * changing.len() as u32;
        let until = Instant::now() + timeout;
        loop {
            let now = self.versions()?;
            let left: Vec<&str> = (changing.iter().map(|n| n.name.as_str()))
                .filter(|n| now.get(*n).is_none_or(|v| Some(v) == before.get(*n)))
                .collect();
            if left.is_empty() {
                break;
            }
            if Instant::now() > until {
                let seconds = timeout.as_secs();
                return fail(format!("{} did not change to the new version within {seconds} s", left.join(", ")));
            }
            step.message(&format!("{}: waiting for {}", scenario.about, left.join(", ")));
            std::thread::sleep(Duration::from_secs(5));
        }
        wait_until_healthy(self.project, step, NODE_TIMEOUT)?;
        let seen = probe.end(self.factor)?;
        for (after, pause) in seen.pauses(t0, u64::from(self.factor)) {
            let when = began + Duration::from_secs_f64(after);
            let when = rfc3339(when.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs());
            self.progress.say(scenario.name, &format!("at {when} writers waited for {pause:.1} s"));
        }
        Ok(seen.summed_outcome(scenario.name, t0, u64::from(self.factor)))
    }

    /// Returns the running version of each node; leaves out nodes that restart.
    fn versions(&self) -> Result<BTreeMap<String, String>> {
        let mut found = BTreeMap::new();
        for node in &self.project.topology.nodes {
            let vm = Vm::for_node(self.project, &node.name)?;
            let command = "sed -n 's/^IMAGE_VERSION=//p' /usr/lib/os-release";
            if let Ok(done) = vm.exec_within(command, Duration::from_secs(20)) {
                found.insert(node.name.clone(), done.output.trim().trim_matches('"').to_owned());
            }
        }
        if found.is_empty() { Err(Error::Failed("no machine replies".to_owned())) } else { Ok(found) }
    }
}

/// Returns whether a node gets the update lock before the primary's node. The holder of the VIP waits until all nodes
/// of equal rank, among them the primary's, have been offered the version.
fn changes_before(node: &Node, primary: &Node, status: &FleetStatus) -> bool {
    let (own, others) = (fleet::disruption_order(node), fleet::disruption_order(primary));
    own < others || own == others && node.name != primary.name && status.holder() != Some(&node.name)
}
