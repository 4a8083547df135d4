//! What a monitor's Prometheus knows about backups, certificates and Odoo.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;

use super::alerts::{first_of, get};
use super::client::Client;
use crate::error::{Error, Result};
use crate::vm::MonitorFacts;

/// The facts, with an expression for each. All but the number and the result of the login are times in seconds since 1970.
const QUERIES: [(&str, &str); 5] = [
    ("backup", r#"max(bakehouse_backup_newest_seconds{job="node"} > 0)"#),
    ("backups", r#"max(bakehouse_backup_count{job="node"})"#),
    (
        "archived",
        r#"time() - max(pg_stat_archiver_last_archive_age{job="postgres"} and on (node) (patroni_primary{job="patroni"} == 1))"#,
    ),
    ("login", r#"min(probe_success{job="login"})"#),
    ("web_certificate", r#"min(probe_ssl_earliest_cert_expiry{job="certificate"})"#),
];
/// Label that distinguishes them.
const LABEL: &str = "fact";

#[derive(Deserialize)]
struct Reply {
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    result: Vec<Sample>,
}

#[derive(Deserialize)]
struct Sample {
    metric: BTreeMap<String, String>,
    /// Time, and the value as a text.
    value: (f64, String),
}

/// Returns the facts that the first of the `monitors` that answers has.
///
/// # Errors
/// If no monitor answers. The error is that of the last one.
pub(crate) async fn facts(client: &Client, monitors: &[String]) -> Result<MonitorFacts> {
    first_of(monitors, |monitor| of_monitor(client, monitor)).await
}

async fn of_monitor(client: &Client, monitor: String) -> Result<MonitorFacts> {
    let labelled = QUERIES.map(|(name, query)| format!(r#"label_replace({query}, "{LABEL}", "{name}", "", "")"#));
    let path = format!("/api/v1/query?query={}", encoded(&labelled.join(" or ")));
    let body = get(client, &monitor, &path).await?;
    parse(&monitor, &body).map_err(Error::cannot(format!("parse the metrics of {monitor}")))
}

/// Returns a text for a query string: bytes other than letters and digits are escaped.
fn encoded(text: &str) -> String {
    let byte = |b: u8| if b.is_ascii_alphanumeric() { char::from(b).to_string() } else { format!("%{b:02X}") };
    text.bytes().map(byte).collect()
}

fn parse(monitor: &str, body: &[u8]) -> serde_json::Result<MonitorFacts> {
    let reply: Reply = serde_json::from_slice(body)?;
    let value = |name: &str| {
        let sample = reply.data.result.iter().find(|sample| sample.metric.get(LABEL).is_some_and(|of| of == name))?;
        // NaN and infinities are no times.
        Some(Duration::try_from_secs_f64(sample.value.1.parse().ok()?).ok()?.as_secs())
    };
    Ok(MonitorFacts {
        monitor: monitor.to_owned(),
        backup: value("backup"),
        backups: value("backups"),
        archived: value("archived"),
        web_certificate: value("web_certificate"),
        login: value("login").map(|success| success > 0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_have_the_values_that_prometheus_returns() {
        let sample =
            |name: &str, value: &str| format!(r#"{{"metric":{{"fact":"{name}"}},"value":[1796000000.123,"{value}"]}}"#);
        let all =
            [sample("backup", "1.79599e+09"), sample("backups", "7"), sample("archived", "NaN"), sample("login", "0")]
                .join(",");
        let body = format!(r#"{{"status":"success","data":{{"resultType":"vector","result":[{all}]}}}}"#);
        let facts = parse("monitor-1", body.as_bytes()).unwrap();
        assert_eq!((facts.backup, facts.backups), (Some(1_795_990_000), Some(7)));
        assert_eq!((facts.archived, facts.web_certificate, facts.login), (None, None, Some(false)));
        assert!(parse("monitor-1", b"{}").is_err());
    }

    #[test]
    fn expressions_are_escaped() {
        assert_eq!(encoded(r#"max(a > 0){b="c"}"#), "max%28a%20%3E%200%29%7Bb%3D%22c%22%7D");
    }
}
