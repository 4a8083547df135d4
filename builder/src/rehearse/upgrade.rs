//! The fleet changes to a newer version while clients use it. Whoever carries the clients has to
//! restart too: so they run in two places, one after the other, and what they see is added up.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fleet::Node;

use super::outcome::Outcome;
use super::scenario::Scenario;
use super::{Rehearsal, WARM_UP, told, whole};
use crate::error::{Error, Result, fail};
use crate::progress::Step;
use crate::util::time::rfc3339;
use crate::vm::{FleetStatus, Vm};

/// For one node: load, restart, prove itself.
const EACH: Duration = Duration::from_secs(900);

impl Rehearsal<'_> {
    /// None where nothing newer is published.
    pub(super) fn upgrade(&self, scenario: &'static Scenario, step: Step) -> Result<Option<Outcome>> {
        let topology = &self.project.topology;
        let nodes: Vec<&Node> = topology.nodes.iter().collect();
        if topology.update.url.is_none() {
            return Ok(None);
        }
        let board = whole(self.project, &step, EACH)?;
        let before = self.versions()?;
        // The clients are first where the primary is: of all that carry clients it restarts last.
        let Some(first) = board.primary().and_then(|name| topology.node(name)) else { return Ok(None) };
        let earlier: Vec<&Node> = nodes.iter().copied().filter(|n| goes_before(n, first, &board)).collect();
        let mut outcome = self.phase(scenario, first, &earlier, &before, &step)?;
        let rest: Vec<&Node> = nodes.iter().copied().filter(|n| !earlier.iter().any(|e| e.name == n.name)).collect();
        let second = earlier.iter().find(|n| n.has_role("app")).or_else(|| earlier.iter().find(|n| n.has_role("db")));
        let Some(second) = second else {
            return fail("nobody but the primary can carry the clients; have two nodes with the role `db`");
        };
        outcome.add(&self.phase(scenario, second, &rest, &before, &step)?);
        outcome.victims = nodes.iter().map(|n| n.name.clone()).collect();
        let since = Instant::now();
        let mended = whole(self.project, &step, EACH);
        outcome.whole = if mended.is_ok() { since.elapsed().as_secs_f64() } else { f64::INFINITY };
        outcome.judge(&scenario.promise, None, f64::from(self.factor));
        if let Err(e) = mended {
            outcome.broken.push(e.to_string());
        }
        told(step, &outcome);
        Ok(Some(outcome))
    }

    /// Some nodes look for a newer version, and change; `stage` carries the clients meanwhile.
    fn phase(
        &self,
        scenario: &'static Scenario,
        stage: &Node,
        changing: &[&Node],
        before: &BTreeMap<String, String>,
        step: &Step,
    ) -> Result<Outcome> {
        let probe = self.start_probe(stage, step)?;
        std::thread::sleep(Duration::from_secs(WARM_UP));
        let (t0, began) = (probe.clock()?, SystemTime::now());
        for node in changing {
            let vm = Vm::of(self.project, &node.name)?;
            let offered = vm.exec("systemctl start firstboot-check; cat /run/bakehouse/offer")?.output;
            if offered.trim().is_empty() {
                return fail(format!(
                    "{} is offered nothing newer than version {}: raise `version`, and `bakehouse publish` to where \
                     [update] url leads",
                    node.name, before[&node.name]
                ));
            }
        }
        let until = Instant::now() + EACH * changing.len() as u32;
        loop {
            let now = self.versions()?;
            let left: Vec<&str> = (changing.iter().map(|n| n.name.as_str()))
                .filter(|n| now.get(*n).is_none_or(|v| Some(v) == before.get(*n)))
                .collect();
            if left.is_empty() {
                break;
            }
            if Instant::now() > until {
                return fail(format!("{} did not change in time", left.join(", ")));
            }
            step.message(&format!("{}: {} to go", scenario.about, left.join(", ")));
            std::thread::sleep(Duration::from_secs(5));
        }
        whole(self.project, step, EACH)?;
        let seen = probe.end(self.factor)?;
        for (after, pause) in seen.pauses(t0, u64::from(self.factor)) {
            let when = began + Duration::from_secs_f64(after);
            let when = rfc3339(when.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs());
            self.progress.say(scenario.name, &format!("at {when} writers waited for {pause:.1} s"));
        }
        Ok(seen.outcome_in_all(scenario.name, t0, u64::from(self.factor)))
    }

    /// Versions that run; who restarts has none.
    fn versions(&self) -> Result<BTreeMap<String, String>> {
        let mut found = BTreeMap::new();
        for node in &self.project.topology.nodes {
            let vm = Vm::of(self.project, &node.name)?;
            let asked = "sed -n 's/^IMAGE_VERSION=//p' /usr/lib/os-release";
            if let Ok(done) = vm.exec_within(asked, Duration::from_secs(20)) {
                found.insert(node.name.clone(), done.output.trim().trim_matches('"').to_owned());
            }
        }
        if found.is_empty() { Err(Error::Failed("no machine answers".to_owned())) } else { Ok(found) }
    }
}

/// Whether a node's turn comes before that of the primary's. Who holds the VIP waits until all of its kind
/// are offered the version, the primary among them.
fn goes_before(node: &Node, primary: &Node, board: &FleetStatus) -> bool {
    let (own, its) = (fleet::disruption_order(node), fleet::disruption_order(primary));
    own < its || own == its && node.name != primary.name && board.holder() != Some(&node.name)
}
