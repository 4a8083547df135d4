//! Results of a run: what the clients observed, compared with the promised limits.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::scenario::Limits;

/// Shortest interval between writes that counts as a pause, in milliseconds on a real machine.
const PAUSE: u64 = 1000;

/// Observations of the probe. Times are milliseconds of the clock of its machine.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Observations {
    /// Times of ping replies.
    vip: Vec<u64>,
    /// Times of acknowledged writes.
    writes: Vec<u64>,
    /// Times of correct responses of Odoo.
    http: Vec<u64>,
    /// Times of failed requests to Odoo.
    errors: Vec<u64>,
    /// Times of responses that report an expired session.
    logouts: Vec<u64>,
    /// By database server: start and end of queries to which it replied that it accepts writes.
    primaries: BTreeMap<String, Vec<(u64, u64)>>,
    /// Acknowledged writes that are missing in the end.
    lost: Vec<u64>,
}

/// Outcome of one run of a scenario.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Outcome {
    /// Name of the scenario.
    pub scenario: &'static str,
    /// Nodes that the fault hit.
    pub victims: Vec<String>,
    /// Longest time without a ping reply, in seconds.
    pub vip: Option<f64>,
    /// Longest time without an acknowledged write, in seconds; the sum of all pauses for an upgrade.
    pub writes: Option<f64>,
    /// Longest time without a correct response of Odoo, in seconds.
    pub http: Option<f64>,
    /// Number of acknowledged writes in this run.
    pub acknowledged: usize,
    /// Number of acknowledged writes that are missing in the end.
    pub lost: usize,
    /// Number of failed requests to Odoo since the fault.
    pub errors: usize,
    /// Number of correct responses of Odoo since the fault.
    pub pages: usize,
    /// Number of expired sessions.
    pub logouts: usize,
    /// Maximum number of database servers that accepted writes at the same time.
    pub primaries: usize,
    /// Seconds until an alert named a target; `None` in a fleet without a monitor.
    pub alert: Option<f64>,
    /// Seconds from the recovery until the fleet was healthy; infinite, in JSON `null`, if it did not become healthy.
    #[schemars(with = "Option<f64>")]
    pub whole: f64,
    /// Promises that the fleet broke.
    pub broken: Vec<String>,
}

impl Observations {
    /// Evaluates the observations of a fault that began at `t0` (milliseconds).
    pub(super) fn outcome(&self, scenario: &'static str, victims: Vec<String>, t0: u64) -> Outcome {
        Outcome {
            scenario,
            victims,
            vip: outage(&self.vip, t0),
            writes: outage(&self.writes, t0),
            http: outage(&self.http, t0),
            acknowledged: self.writes.len(),
            lost: self.lost.len(),
            errors: self.errors.iter().filter(|t| **t >= t0).count(),
            pages: self.http.iter().filter(|t| **t >= t0).count(),
            logouts: self.logouts.len(),
            primaries: max_concurrent(&self.primaries),
            alert: None,
            whole: 0.0,
            broken: Vec::new(),
        }
    }

    /// Returns the pauses of writers: start in seconds after `t0` (milliseconds), and length in seconds.
    pub(super) fn pauses(&self, t0: u64, factor: u64) -> Vec<(f64, f64)> {
        let long = gaps(&self.writes, t0).into_iter().filter(|(_, gap)| *gap > PAUSE * factor);
        long.map(|(begun, gap)| ((begun - t0) as f64 / 1e3, gap as f64 / 1e3)).collect()
    }

    /// Evaluates the observations of a fault with several interruptions: `writes` is the sum of all pauses. `factor` is
    /// how many times slower the machine is than a real one.
    pub(super) fn summed_outcome(&self, scenario: &'static str, t0: u64, factor: u64) -> Outcome {
        let waited = self.pauses(t0, factor).iter().map(|(_, pause)| pause).sum();
        let writes = (!self.writes.is_empty()).then_some(waited);
        Outcome { writes, ..self.outcome(scenario, Vec::new(), t0) }
    }
}

impl Outcome {
    /// Adds the outcome of a later part of the same run.
    pub(super) fn add(&mut self, later: &Self) {
        let combine = |a: Option<f64>, b: Option<f64>, both: fn(f64, f64) -> f64| Some(both(a?, b?));
        self.vip = combine(self.vip, later.vip, f64::max);
        self.writes = combine(self.writes, later.writes, |a, b| a + b);
        self.http = combine(self.http, later.http, f64::max);
        self.acknowledged += later.acknowledged;
        self.lost += later.lost;
        self.errors += later.errors;
        self.pages += later.pages;
        self.logouts += later.logouts;
        self.primaries = self.primaries.max(later.primaries);
    }

    /// Compares the outcome with the limits. `factor` is how many times slower the machines are than real ones.
    pub(super) fn judge(&mut self, limits: &Limits, alert: Option<f64>, factor: f64) {
        let kinds = [
            ("VIP", self.vip, limits.vip),
            ("writes", self.writes, limits.writes),
            ("HTTP", self.http, limits.http),
            ("alert", self.alert.or(alert.map(|_| f64::INFINITY)), alert),
        ];
        for (kind, took, limit) in kinds {
            if let (Some(took), Some(limit)) = (took, limit)
                && took > limit * factor
            {
                self.broken.push(format!("{kind}: {took:.1} s, promised {:.1} s", limit * factor));
            }
        }
        // A dropped connection is one error on any machine, but a slow machine has fewer responses in all.
        let share = self.errors as f64 / (self.errors + self.pages).max(1) as f64;
        if let Some(limit) = limits.errors.map(|limit| limit * factor)
            && share > limit
        {
            self.broken.push(format!("errors: {:.1} % of pages, promised {:.1} %", share * 100.0, limit * 100.0));
        }
        for (what, count, limit) in
            [("writes lost", self.lost, 0), ("logouts", self.logouts, 0), ("primaries at once", self.primaries, 1)]
        {
            if count > limit {
                self.broken.push(format!("{count} {what}"));
            }
        }
    }
}

/// Returns the longest time between two successes that ended after `t0`, in seconds; `None` if there was no such
/// client.
fn outage(successes: &[u64], t0: u64) -> Option<f64> {
    let longest = || gaps(successes, t0).into_iter().map(|(_, gap)| gap).max().unwrap_or(0);
    (!successes.is_empty()).then(|| longest() as f64 / 1e3)
}

/// Returns the start and the length, in milliseconds, of the gap between each two successes, without its part before
/// `t0`.
fn gaps(successes: &[u64], t0: u64) -> Vec<(u64, u64)> {
    let mut sorted = successes.to_vec();
    sorted.sort_unstable();
    let after = sorted.windows(2).filter(|w| w[1] >= t0);
    after.map(|w| (w[0].max(t0), w[1] - w[0].max(t0))).collect()
}

/// Returns the maximum number of servers that accepted writes at the same time. Only the time from the start to the end
/// of a query counts, because a server may have changed between two queries.
fn max_concurrent(primaries: &BTreeMap<String, Vec<(u64, u64)>>) -> usize {
    let mut edges = Vec::new();
    for spans in primaries.values() {
        for (from, to) in spans {
            edges.push((*from, 1));
            edges.push((*to, -1));
        }
    }
    // At the same time, an end (-1) sorts before a start (1), so adjacent spans do not overlap.
    edges.sort_unstable();
    let mut count = 0_i64;
    let counts = edges.iter().map(|(_, step)| {
        count += step;
        count
    });
    usize::try_from(counts.max().unwrap_or(0)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observations() -> Observations {
        Observations {
            vip: vec![100, 150, 200, 900, 950],
            writes: vec![100, 180, 2200, 2300],
            primaries: BTreeMap::from([
                ("db-1".into(), vec![(100, 110), (400, 420)]),
                ("db-2".into(), vec![(2000, 2010)]),
            ]),
            errors: vec![50, 1000],
            ..Observations::default()
        }
    }

    #[test]
    fn an_outage_is_the_longest_gap_after_the_fault() {
        let o = observations().outcome("hub", vec!["hub-1".into()], 200);
        assert_eq!((o.vip, o.writes, o.http), (Some(0.7), Some(2.0), None));
        assert_eq!((o.acknowledged, o.errors, o.primaries), (4, 1, 1));
        // A gap that began earlier counts from the fault on.
        assert_eq!(outage(&[0, 1000], 600), Some(0.4));
        assert_eq!(outage(&[0, 1000, 1100], 1050), Some(0.05));
    }

    #[test]
    fn reports_exceeded_limits_and_missing_alerts() {
        let limits = Limits { vip: Some(0.5), writes: Some(3.0), ..Limits::default() };
        let mut slow = observations().outcome("hub", Vec::new(), 200);
        slow.judge(&limits, None, 1.0);
        assert_eq!(slow.broken, ["VIP: 0.7 s, promised 0.5 s"]);
        let mut allowed = observations().outcome("hub", Vec::new(), 200);
        allowed.judge(&limits, None, 10.0);
        assert!(allowed.broken.is_empty());
        let mut without_alert = observations().outcome("hub", Vec::new(), 200);
        without_alert.judge(&limits, Some(30.0), 10.0);
        assert!(without_alert.broken[0].starts_with("alert"), "{:?}", without_alert.broken);
    }

    #[test]
    fn adds_up_the_pauses_of_an_upgrade() {
        let seen = Observations {
            vip: vec![0, 500, 3000],
            writes: vec![0, 1500, 1600, 4000, 4900],
            http: (0..999).map(|t| 5 * t).collect(),
            errors: vec![600, 700],
            ..Observations::default()
        };
        let mut o = seen.summed_outcome("upgrade", 0, 1);
        assert_eq!((o.vip, o.writes, o.pages), (Some(2.5), Some(3.9), 999));
        assert_eq!(seen.pauses(100, 1), [(0.0, 1.4), (1.5, 2.4)]);
        o.add(&seen.summed_outcome("upgrade", 500, 1));
        assert_eq!((o.vip, o.writes, o.pages, o.errors), (Some(2.5), Some(6.3), 1898, 4));
        assert_eq!(seen.summed_outcome("upgrade", 0, 2).writes, Some(2.4));
        let limits = Limits { errors: Some(0.001), ..Limits::default() };
        o.judge(&limits, None, 10.0);
        assert!(o.broken.is_empty(), "{:?}", o.broken);
        o.judge(&limits, None, 1.0);
        assert_eq!(o.broken, ["errors: 0.2 % of pages, promised 0.1 %"]);
    }

    #[test]
    fn two_primaries_lost_writes_and_logouts_always_break_a_promise() {
        let mut seen = observations();
        seen.primaries.insert("db-3".into(), vec![(405, 410)]);
        seen.lost = vec![7];
        seen.logouts = vec![9];
        let mut o = seen.outcome("db", Vec::new(), 0);
        o.judge(&Limits::default(), None, 1e9);
        assert_eq!(o.broken, ["1 writes lost", "1 logouts", "2 primaries at once"]);
    }
}
