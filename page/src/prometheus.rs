//! Queries to Prometheus, and alerts with their silences. Label values and annotations contain texts of nodes, which may
//! be hostile: nothing here trusts them, and the templates escape them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use tokio::sync::Semaphore;

use crate::error::{Error, Result};
use crate::http::Service;

/// Labels of a series or an alert.
pub(crate) type Labels = BTreeMap<String, String>;

/// A value of an instant query.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Sample {
    #[serde(rename = "metric")]
    pub(crate) labels: Labels,
    pub(crate) value: Point,
}

/// A series of a range query.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Series {
    #[serde(rename = "metric")]
    pub(crate) labels: Labels,
    #[serde(rename = "values")]
    pub(crate) points: Vec<Point>,
}

/// Unix time and value. The value may be infinite or not a number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Point {
    pub(crate) at: f64,
    pub(crate) value: f64,
}

impl<'de> Deserialize<'de> for Point {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (at, text) = <(f64, String)>::deserialize(deserializer)?;
        // Rust parses Prometheus' `NaN`, `+Inf` and `-Inf`.
        let value = text.parse().map_err(|_| D::Error::custom("a value is not a number"))?;
        Ok(Self { at, value })
    }
}

impl Sample {
    /// Returns a label's value; empty without the label.
    pub(crate) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// An alert that fires, or waits for its `for`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Alert {
    pub(crate) labels: Labels,
    #[serde(default)]
    pub(crate) annotations: Labels,
    /// `firing` or `pending`.
    pub(crate) state: String,
    /// Time since which the condition holds, RFC 3339.
    #[serde(rename = "activeAt", default)]
    pub(crate) since: String,
    /// Whether Alertmanager notifies of the alert.
    #[serde(skip)]
    pub(crate) muted: Option<Muted>,
}

/// Reason why Alertmanager does not notify of an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Muted {
    /// An operator has silenced it.
    Silenced,
    /// Another alert explains it.
    Inhibited,
}

#[derive(Deserialize)]
struct Reply<T> {
    data: T,
}

#[derive(Deserialize)]
struct Results<T> {
    result: Vec<T>,
}

#[derive(Deserialize)]
struct Alerts {
    alerts: Vec<Alert>,
}

/// An alert in Alertmanager.
#[derive(Deserialize)]
struct Notified {
    labels: Labels,
    status: Status,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(default)]
    silenced_by: Vec<String>,
    #[serde(default)]
    inhibited_by: Vec<String>,
}

/// Range and resolution of a graph, in seconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    pub(crate) start: f64,
    pub(crate) end: f64,
    pub(crate) step: f64,
}

/// Time limit of a range query. In a large fleet, it reads a million values.
const RANGE_LIMIT: Duration = Duration::from_secs(20);

/// Longest reply to a range query, in MB. The longest is that of the alerts of 24 h, with 36 kB for each alert that fires
/// all the time: 12 MB have 330 of them.
const LONGEST_RANGE: usize = 12;
/// Range queries run one after the other, and do not delay the state.
static RANGES: Semaphore = Semaphore::const_new(1);

/// Clients of the monitor's services.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sources {
    pub(crate) prometheus: Service,
    pub(crate) alertmanager: Service,
}

impl Sources {
    /// Returns the current values of an expression.
    ///
    /// # Errors
    /// If Prometheus does not answer, or refuses the expression.
    pub(crate) async fn query(&self, expression: &str) -> Result<Vec<Sample>> {
        let reply: Reply<Results<Sample>> =
            self.prometheus.ask("/api/v1/query", &[("query", expression.to_owned())]).await?;
        Ok(reply.data.result)
    }

    /// Returns the series of an expression.
    ///
    /// # Errors
    /// If Prometheus does not answer, or refuses the expression.
    pub(crate) async fn range(&self, expression: &str, window: Window) -> Result<Vec<Series>> {
        let form = [
            ("query", expression.to_owned()),
            ("start", window.start.to_string()),
            ("end", window.end.to_string()),
            ("step", window.step.to_string()),
        ];
        let prometheus = Service { limit: RANGE_LIMIT, longest: LONGEST_RANGE, room: &RANGES, ..self.prometheus };
        let reply: Reply<Results<Series>> = prometheus.ask("/api/v1/query_range", &form).await?;
        Ok(reply.data.result)
    }

    /// Returns the alerts. If Alertmanager does not answer, no alert counts as silenced, and the error is beside them.
    ///
    /// # Errors
    /// If Prometheus does not answer.
    pub(crate) async fn alerts(&self) -> Result<(Vec<Alert>, Option<Error>)> {
        let (alerts, notified) = tokio::join!(
            self.prometheus.ask::<Reply<Alerts>>("/api/v1/alerts", &[]),
            self.alertmanager.ask::<Vec<Notified>>("/api/v2/alerts", &[]),
        );
        let mut alerts = alerts?.data.alerts;
        let (notified, error) = match notified {
            Ok(notified) => (notified, None),
            Err(e) => (Vec::new(), Some(e)),
        };
        let muted: BTreeMap<Labels, Option<Muted>> =
            notified.into_iter().map(|notified| (own(notified.labels), notified.status.muted())).collect();
        for alert in &mut alerts {
            alert.muted = muted.get(&own(alert.labels.clone())).copied().flatten();
        }
        Ok((alerts, error))
    }
}

/// Returns the labels without the fleet's, which Prometheus adds when it sends an alert (`external_labels`).
fn own(mut labels: Labels) -> Labels {
    labels.remove("fleet");
    labels
}

impl Status {
    fn muted(&self) -> Option<Muted> {
        match (self.silenced_by.is_empty(), self.inhibited_by.is_empty()) {
            (false, _) => Some(Muted::Silenced),
            (true, false) => Some(Muted::Inhibited),
            (true, true) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_be_no_numbers() {
        let text = r#"[{"metric":{"__name__":"up","node":"a"},"value":[1.5,"NaN"]},{"metric":{},"value":[2,"+Inf"]},
            {"metric":{},"value":[3,"-1e3"]}]"#;
        let samples: Vec<Sample> = serde_json::from_str(text).unwrap();
        assert!(samples[0].value.value.is_nan() && samples[1].value.value.is_infinite());
        assert_eq!(samples[2].value, Point { at: 3.0, value: -1000.0 });
        assert_eq!((samples[0].label("node"), samples[1].label("node")), ("a", ""));
        assert!(serde_json::from_str::<Point>(r#"[1,"one"]"#).is_err());
    }

    #[test]
    fn a_silence_counts_for_the_alert_with_the_same_labels() {
        let labels = |text: &str| serde_json::from_str::<Labels>(text).unwrap();
        let status: Status =
            serde_json::from_str(r#"{"state":"suppressed","silencedBy":["x"],"inhibitedBy":[]}"#).unwrap();
        let notified = own(labels(r#"{"alertname":"A","node":"db-1","fleet":"acme"}"#));
        assert_eq!(notified, own(labels(r#"{"alertname":"A","node":"db-1"}"#)));
        assert_ne!(notified, own(labels(r#"{"alertname":"A","node":"db-2"}"#)));
        assert_eq!(status.muted(), Some(Muted::Silenced));
    }
}
