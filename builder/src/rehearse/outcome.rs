//! What the clients saw, against what was promised.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::scenario::Limits;

/// What somebody who writes notices, in milliseconds of a real machine.
const PAUSE: u64 = 1000;

/// What the probe wrote down; times in milliseconds of its machine's clock.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observations {
    /// Answers to pings, acknowledged writes, good answers of Odoo.
    vip: Vec<u64>,
    writes: Vec<u64>,
    http: Vec<u64>,
    errors: Vec<u64>,
    logouts: Vec<u64>,
    /// When a database server said that it takes writes: from asking to hearing.
    primaries: BTreeMap<String, Vec<(u64, u64)>>,
    /// Acknowledged writes that are not there.
    lost: Vec<u64>,
}

/// One run of one scenario.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub scenario: &'static str,
    pub victims: Vec<String>,
    /// Seconds without an answer, a write, a page.
    pub vip: Option<f64>,
    pub writes: Option<f64>,
    pub http: Option<f64>,
    /// Writes that were acknowledged in this run, and of them those that are not there.
    pub acknowledged: usize,
    pub lost: usize,
    /// Odoo's answers since the fault that were none, and those that were good.
    pub errors: usize,
    pub pages: usize,
    pub logouts: usize,
    /// Most database servers that took writes at the same time.
    pub primaries: usize,
    /// Seconds until an alert named the victim; none where there is no monitor.
    pub alert: Option<f64>,
    /// Seconds from mending to a whole fleet.
    pub whole: f64,
    /// What was promised and not kept.
    pub broken: Vec<String>,
}

impl Observations {
    /// What it comes to, when the fault began at `t0` (milliseconds).
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
            primaries: at_once(&self.primaries),
            alert: None,
            whole: 0.0,
            broken: Vec::new(),
        }
    }

    /// When writers waited, in seconds after `t0` (milliseconds), and for how many.
    pub(super) fn pauses(&self, t0: u64, factor: u64) -> Vec<(f64, f64)> {
        let long = gaps(&self.writes, t0).into_iter().filter(|(_, gap)| *gap > PAUSE * factor);
        long.map(|(begun, gap)| ((begun - t0) as f64 / 1e3, gap as f64 / 1e3)).collect()
    }

    /// The same where it was not one blow: what writers waited in all. `factor` is how much slower this
    /// machine is.
    pub(super) fn outcome_in_all(&self, scenario: &'static str, t0: u64, factor: u64) -> Outcome {
        let waited = self.pauses(t0, factor).iter().map(|(_, pause)| pause).sum();
        let writes = (!self.writes.is_empty()).then_some(waited);
        Outcome { writes, ..self.outcome(scenario, Vec::new(), t0) }
    }
}

impl Outcome {
    /// What was seen after this, as if it were one time.
    pub(super) fn add(&mut self, later: &Self) {
        let of_both = |a: Option<f64>, b: Option<f64>, both: fn(f64, f64) -> f64| Some(both(a?, b?));
        self.vip = of_both(self.vip, later.vip, f64::max);
        self.writes = of_both(self.writes, later.writes, |a, b| a + b);
        self.http = of_both(self.http, later.http, f64::max);
        self.acknowledged += later.acknowledged;
        self.lost += later.lost;
        self.errors += later.errors;
        self.pages += later.pages;
        self.logouts += later.logouts;
        self.primaries = self.primaries.max(later.primaries);
    }

    /// Holds it against what was promised; `factor` is how much slower this machine is.
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
                self.broken.push(format!("{kind}: {took:.1} s, promised {:.1}", limit * factor));
            }
        }
        // Who is cut off is one error on any machine, and a slow one has so many fewer answers.
        let share = self.errors as f64 / (self.errors + self.pages).max(1) as f64;
        if let Some(limit) = limits.errors.map(|limit| limit * factor)
            && share > limit
        {
            self.broken.push(format!("errors: {:.1} % of pages, promised {:.1} %", share * 100.0, limit * 100.0));
        }
        for (what, count, most) in
            [("writes lost", self.lost, 0), ("logouts", self.logouts, 0), ("primaries at once", self.primaries, 1)]
        {
            if count > most {
                self.broken.push(format!("{count} {what}"));
            }
        }
    }
}

/// The longest time between two successes that ended after `t0`, in seconds; none where there
/// was no client of the kind.
fn outage(successes: &[u64], t0: u64) -> Option<f64> {
    let longest = || gaps(successes, t0).into_iter().map(|(_, gap)| gap).max().unwrap_or(0);
    (!successes.is_empty()).then(|| longest() as f64 / 1e3)
}

/// Between each two successes, as far as it is after `t0`: from when, and for how many milliseconds.
fn gaps(successes: &[u64], t0: u64) -> Vec<(u64, u64)> {
    let mut sorted = successes.to_vec();
    sorted.sort_unstable();
    let after = sorted.windows(2).filter(|w| w[1] >= t0);
    after.map(|w| (w[0].max(t0), w[1] - w[0].max(t0))).collect()
}

/// How many took writes at the same time: a span is certain where it and the one before
/// belong to the same server, with nothing in between.
fn at_once(primaries: &BTreeMap<String, Vec<(u64, u64)>>) -> usize {
    let mut edges = Vec::new();
    for spans in primaries.values() {
        for (from, to) in spans {
            edges.push((*from, 1));
            edges.push((*to, -1));
        }
    }
    // Where one ends as another begins, they were not there together.
    edges.sort_unstable();
    let mut count = 0_i64;
    let most = edges.iter().map(|(_, step)| {
        count += step;
        count
    });
    usize::try_from(most.max().unwrap_or(0)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen() -> Observations {
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
    fn an_outage_is_the_longest_silence_after_the_fault() {
        let o = seen().outcome("hub", vec!["hub-1".into()], 200);
        assert_eq!((o.vip, o.writes, o.http), (Some(0.7), Some(2.0), None));
        assert_eq!((o.acknowledged, o.errors, o.primaries), (4, 1, 1));
        // A silence that was there before counts from the fault on.
        assert_eq!(outage(&[0, 1000], 600), Some(0.4));
        assert_eq!(outage(&[0, 1000, 1100], 1050), Some(0.05));
    }

    #[test]
    fn what_was_promised_is_held_against_it() {
        let limits = Limits { vip: Some(0.5), writes: Some(3.0), ..Limits::default() };
        let mut slow = seen().outcome("hub", Vec::new(), 200);
        slow.judge(&limits, None, 1.0);
        assert_eq!(slow.broken, ["VIP: 0.7 s, promised 0.5"]);
        let mut allowed = seen().outcome("hub", Vec::new(), 200);
        allowed.judge(&limits, None, 10.0);
        assert!(allowed.broken.is_empty());
        let mut unheard = seen().outcome("hub", Vec::new(), 200);
        unheard.judge(&limits, Some(30.0), 10.0);
        assert!(unheard.broken[0].starts_with("alert"), "{:?}", unheard.broken);
    }

    #[test]
    fn what_comes_in_several_blows_is_added_up() {
        let seen = Observations {
            vip: vec![0, 500, 3000],
            writes: vec![0, 1500, 1600, 4000, 4900],
            http: (0..999).map(|t| 5 * t).collect(),
            errors: vec![600, 700],
            ..Observations::default()
        };
        let mut o = seen.outcome_in_all("upgrade", 0, 1);
        assert_eq!((o.vip, o.writes, o.pages), (Some(2.5), Some(3.9), 999));
        assert_eq!(seen.pauses(100, 1), [(0.0, 1.4), (1.5, 2.4)]);
        o.add(&seen.outcome_in_all("upgrade", 500, 1));
        assert_eq!((o.vip, o.writes, o.pages, o.errors), (Some(2.5), Some(6.3), 1898, 4));
        assert_eq!(seen.outcome_in_all("upgrade", 0, 2).writes, Some(2.4));
        let limits = Limits { errors: Some(0.001), ..Limits::default() };
        o.judge(&limits, None, 10.0);
        assert!(o.broken.is_empty(), "{:?}", o.broken);
        o.judge(&limits, None, 1.0);
        assert_eq!(o.broken, ["errors: 0.2 % of pages, promised 0.1 %"]);
    }

    #[test]
    fn two_primaries_lost_writes_and_logouts_are_never_fine() {
        let mut seen = seen();
        seen.primaries.insert("db-3".into(), vec![(405, 410)]);
        seen.lost = vec![7];
        seen.logouts = vec![9];
        let mut o = seen.outcome("db", Vec::new(), 0);
        o.judge(&Limits::default(), None, 1e9);
        assert_eq!(o.broken, ["1 writes lost", "1 logouts", "2 primaries at once"]);
    }
}
