//! Alerts that fire, from a monitor's Prometheus.

use std::time::Duration;

use bytes::Bytes;
use fleet::one_line;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1::handshake;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::time::timeout;

use super::client::Client;
use crate::error::{Error, Result, fail};
use crate::util::time::since;
use crate::vm::FiringAlert;

/// Path of a node's API to its Prometheus.
const PROMETHEUS: &str = "/v1/open/prometheus";
/// Time limit.
const LIMIT: Duration = Duration::from_secs(7);
/// Longest reply, in bytes.
const LONGEST: usize = 4 << 20;

#[derive(Deserialize)]
struct Reply {
    data: Data,
}

#[derive(Deserialize)]
struct Data {
    alerts: Vec<Alert>,
}

#[derive(Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[derive(Default)]
struct Alert {
    labels: Labels,
    annotations: Annotations,
    state: String,
    active_at: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Labels {
    alertname: String,
    severity: String,
    node: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Annotations {
    summary: String,
}

/// Returns the alerts that fire, the most severe ones first, from the first of the `monitors` that answers. An alert of the
/// severity `none` fires while all is well.
///
/// # Errors
/// If no monitor answers. The error is that of the last one.
pub(crate) async fn firing(client: &Client, monitors: &[String]) -> Result<Vec<FiringAlert>> {
    first_of(monitors, |monitor| of_monitor(client, monitor)).await
}

/// Returns the reply of the first monitor that answers.
pub(super) async fn first_of<T, F>(monitors: &[String], ask: impl Fn(String) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut last = Error::Failed("the fleet has no monitor".to_owned());
    for monitor in monitors {
        let late = |_| fail(format!("{monitor} does not answer within {} s", LIMIT.as_secs()));
        match timeout(LIMIT, ask(monitor.clone())).await.unwrap_or_else(late) {
            Ok(reply) => return Ok(reply),
            Err(e) => last = e,
        }
    }
    Err(last)
}

async fn of_monitor(client: &Client, monitor: String) -> Result<Vec<FiringAlert>> {
    let body = get(client, &monitor, "/api/v1/alerts").await?;
    parse(&body).map_err(Error::cannot(format!("parse the alerts of {monitor}")))
}

/// Gets a path of a monitor's Prometheus.
pub(super) async fn get(client: &Client, monitor: &str, path: &str) -> Result<Bytes> {
    let failed = |e: hyper::Error| Error::cannot(format!("ask the Prometheus of {monitor}"))(e);
    let stream = client.stream(monitor, PROMETHEUS).await?;
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await.map_err(failed)?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    let request = Request::get(path).header("host", "localhost").body(Empty::<Bytes>::new());
    let request = request.map_err(Error::cannot("build a request"))?;
    let reply = sender.send_request(request).await.map_err(failed)?;
    if !reply.status().is_success() {
        return fail(format!("the Prometheus of {monitor} replied {}", reply.status()));
    }
    let body = Limited::new(reply.into_body(), LONGEST).collect().await;
    Ok(body.map_err(Error::cannot(format!("read the reply of the Prometheus of {monitor}")))?.to_bytes())
}

fn parse(body: &[u8]) -> serde_json::Result<Vec<FiringAlert>> {
    let reply: Reply = serde_json::from_slice(body)?;
    let fires = |alert: &Alert| alert.state == "firing" && alert.labels.severity != "none";
    let firing = reply.data.alerts.into_iter().filter(fires);
    let mut alerts: Vec<FiringAlert> = firing
        .map(|Alert { labels, annotations, active_at, .. }| FiringAlert {
            name: one_line(&labels.alertname),
            severity: one_line(&labels.severity),
            node: one_line(&labels.node),
            summary: one_line(&annotations.summary),
            since: since(&active_at, 0).unwrap_or_default(),
        })
        .collect();
    let rank = |alert: &FiringAlert| ["critical", "warning"].iter().position(|s| *s == alert.severity).unwrap_or(2);
    alerts.sort_by(|a, b| (rank(a), a.since, &a.name, &a.node).cmp(&(rank(b), b.since, &b.name, &b.node)));
    Ok(alerts)
}

#[cfg(test)]
mod tests {
    use super::super::test_servers::Fleet;
    use super::*;

    #[test]
    fn alerts_that_fire_are_sorted_by_severity_and_time() {
        let alert = |name: &str, severity: &str, state: &str, at: &str| {
            format!(
                r#"{{"labels":{{"alertname":"{name}","severity":"{severity}","node":"db-1","job":"x"}},
                "annotations":{{"summary":"one\u001b[2J\ntwo","runbook":"r"}},"state":"{state}","activeAt":"{at}","value":"1"}}"#
            )
        };
        let all = [
            alert("Old", "warning", "firing", "1970-01-01T00:01:00.123456789Z"),
            alert("Later", "critical", "firing", "1970-01-01T01:00:00Z"),
            alert("Not", "critical", "pending", "1970-01-01T00:00:01Z"),
            alert("Other", "info", "firing", "1970-01-01T00:00:01Z"),
            alert("DeadMan", "none", "firing", "1970-01-01T00:00:01Z"),
        ];
        let body = format!(r#"{{"status":"success","data":{{"alerts":[{}]}}}}"#, all.join(","));
        let alerts = parse(body.as_bytes()).unwrap();
        let names: Vec<(&str, u64)> = alerts.iter().map(|alert| (alert.name.as_str(), alert.since)).collect();
        assert_eq!(names, [("Later", 3600), ("Old", 60), ("Other", 1)]);
        assert_eq!(alerts[0].summary, "one\u{fffd}[2J two");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_next_monitor_answers_if_one_does_not() {
        let fleet = Fleet::start(&["hub-1"], &["monitor-1", "monitor-2"]).await;
        fleet.make_unreachable("monitor-1");
        let monitors = ["monitor-1".to_owned(), "monitor-2".to_owned()];
        // The page of the test is no list of alerts.
        let e = firing(&fleet.client(), &monitors).await.unwrap_err().chain();
        assert!(e.contains("parse the alerts of monitor-2"), "{e}");
        let e = firing(&fleet.client(), &[]).await.unwrap_err().chain();
        assert!(e.contains("no monitor"), "{e}");
    }
}
