//! Alerts that fire, in the state of a fleet.

use schemars::JsonSchema;
use serde::Serialize;

use super::duration;
use super::status::FleetStatus;

/// Number of alerts that `bakehouse status` prints.
const MOST: usize = 10;

/// An alert that fires.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct FiringAlert {
    /// Name of the rule.
    pub name: String,
    /// Severity: `critical`, `warning` or another one.
    pub severity: String,
    /// Node that the alert is about; empty if it is about the fleet.
    pub node: String,
    /// What happens, in a sentence.
    pub summary: String,
    /// Begin, in seconds since 1970.
    pub since: u64,
}

impl FiringAlert {
    /// Returns the alert as a line, at the time `now`.
    pub(crate) fn line(&self, now: u64) -> String {
        let node = if self.node.is_empty() { String::new() } else { format!(" {}", self.node) };
        let age = duration(now.saturating_sub(self.since));
        format!("{} {}{node}: {} (since {age})", self.severity, self.name, self.summary)
    }
}

/// Returns the number of alerts in words.
pub(crate) fn number(alerts: &[FiringAlert]) -> String {
    match alerts.len() {
        0 => "no alert fires".to_owned(),
        1 => "1 alert fires".to_owned(),
        several => format!("{several} alerts fire"),
    }
}

impl FleetStatus {
    /// Returns the lines about alerts at the time `now`: the number, then the most severe ones. Empty if the fleet has no
    /// monitor that answers the operator.
    #[must_use]
    pub fn alert_lines(&self, now: u64) -> String {
        let Some(alerts) = &self.alerts else {
            let answers = |row: &super::NodeRow| row.report.is_some() && row.roles.iter().any(|role| role == "monitor");
            let is_late = self.nodes.iter().any(answers);
            return if is_late { "alerts unknown: no Prometheus answered in time\n".to_owned() } else { String::new() };
        };
        let mut text = format!("{}\n", number(alerts));
        for alert in alerts.iter().take(MOST) {
            text.push_str(&format!("  {}\n", alert.line(now)));
        }
        if alerts.len() > MOST {
            text.push_str(&format!("  … and {} more: `bakehouse open page` shows them\n", alerts.len() - MOST));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alert(name: &str, node: &str) -> FiringAlert {
        let (name, node) = (name.to_owned(), node.to_owned());
        FiringAlert { name, severity: "critical".to_owned(), node, summary: "writes fail".to_owned(), since: 100 }
    }

    #[test]
    fn status_has_the_number_of_alerts_and_the_first_ones() {
        let of = |alerts| FleetStatus { alerts, ..FleetStatus::default() }.alert_lines(400);
        assert_eq!(of(None), "");
        assert_eq!(of(Some(Vec::new())), "no alert fires\n");
        let all = vec![alert("WritesFail", "db-1"), alert("LoginPageFails", "")];
        let expected = "2 alerts fire\n  critical WritesFail db-1: writes fail (since 5 min)\n  \
            critical LoginPageFails: writes fail (since 5 min)\n";
        assert_eq!(of(Some(all)), expected);
        let many = of(Some((0..500).map(|i| alert(&format!("A{i}"), "db-1")).collect()));
        assert_eq!((many.lines().count(), many.starts_with("500 alerts fire\n")), (12, true));
        assert!(many.ends_with("… and 490 more: `bakehouse open page` shows them\n"), "{many}");
    }
}
