//! Test alerts. Posts an alert to the Alertmanager of a monitor, and reads from its counters and its log what each
//! receiver answered.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use crate::error::{Error, Result, fail};

/// Unit whose journal has the receivers' errors.
pub const ALERTMANAGER_UNIT: &str = "prometheus-alertmanager.service";
/// Number of lines of that journal that are enough for the errors of one test.
pub const ALERTMANAGER_LINES: u32 = 200;
/// Time until each receiver has answered: `group_wait`, 15 s that the second monitor leaves to the first one, and 10 s in
/// which Alertmanager repeats an attempt.
const LIMIT: Duration = Duration::from_secs(40);
/// Time between two reads of the counters.
const PAUSE: Duration = Duration::from_secs(1);
/// Time limit of one request.
const REQUEST: Duration = Duration::from_secs(10);
/// Longest reply, in bytes.
const LONGEST: u64 = 4 << 20;
/// Receiver that discards alerts.
const DISCARD: &str = "discard";

/// A test alert.
#[derive(Clone, Copy, Debug)]
pub struct TestAlert<'a> {
    /// Name of the fleet.
    pub fleet: &'a str,
    /// Name of the monitor.
    pub monitor: &'a str,
    /// Unix time, which distinguishes the alert from earlier ones.
    pub at: u64,
}

/// What a receiver answered to a test alert.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ReceiverReply {
    /// Name of the monitor that sent the alert.
    pub monitor: String,
    /// Name of the receiver: `email`, `dead-man`, or a kind with the number of its entry in fleet.toml, such as
    /// `telegram-1`.
    pub receiver: String,
    /// What happened.
    pub state: ReceiverState,
    /// Seconds until the receiver accepted the alert; `null` if it has not.
    pub seconds: Option<f64>,
    /// The receiver's error, as Alertmanager logs it; empty without an error.
    pub message: String,
}

/// What happened to a test alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReceiverState {
    /// The receiver accepted the alert.
    Delivered,
    /// The receiver refused the alert, or does not answer.
    Failed,
    /// Alertmanager has not tried to deliver the alert within 40 s.
    Silent,
    /// The monitor lacks the receiver's secret.
    NoSecret,
}

impl ReceiverState {
    /// Returns the word for people.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Failed => "failed",
            Self::Silent => "silent",
            Self::NoSecret => "no secret",
        }
    }
}

/// Counters of a receiver.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Counters {
    /// Attempts.
    attempts: f64,
    /// Attempts that failed.
    failed: f64,
    /// Notifications that Alertmanager gave up.
    given_up: f64,
}

/// A receiver's entry in the reply to `GET /api/v2/receivers`.
#[derive(Deserialize)]
struct Receiver {
    name: String,
}

/// Sends a test alert to every receiver of an Alertmanager. `connect` opens a connection to it, and `log` returns the last
/// lines of its journal.
///
/// # Errors
/// If Alertmanager does not answer, has no receiver, or is of a version without names of receivers in its counters.
pub async fn send_test<S, C, L>(
    alert: &TestAlert<'_>,
    connect: impl Fn() -> C,
    log: impl FnOnce() -> L,
) -> Result<Vec<ReceiverReply>>
where
    S: AsyncRead + AsyncWrite + Unpin,
    C: Future<Output = Result<S>>,
    L: Future<Output = Result<Vec<String>>>,
{
    let monitor = alert.monitor;
    let read = async |path: &str| ask(connect().await?, monitor, "GET", path, &[]).await;
    let names = receivers(&read("/api/v2/receivers").await?, monitor)?;
    let before = counters(&read("/metrics").await?);
    if before.is_empty() {
        return fail(format!(
            "Alertmanager on {monitor} does not name its receivers\n  help: update {monitor} to this version first"
        ));
    }
    let post = async |ends: Option<&str>| {
        let body = serde_json::to_vec(&body(alert, ends)).map_err(Error::Json)?;
        ask(connect().await?, monitor, "POST", "/api/v2/alerts", &body).await
    };
    post(None).await?;
    let began = Instant::now();
    let mut seconds: BTreeMap<String, f64> = BTreeMap::new();
    let mut given_up = BTreeSet::new();
    let mut tried = BTreeSet::new();
    let mut seen = BTreeSet::new();
    while began.elapsed() < LIMIT {
        sleep(PAUSE).await;
        // Another node may have cut the connection, or the monitor's Alertmanager restarts.
        let Ok(text) = read("/metrics").await else { continue };
        let now = counters(&text);
        for (name, now) in &now {
            let before = before.get(name).copied().unwrap_or_default();
            if now.attempts > before.attempts {
                tried.insert(name.clone());
            }
            if now.given_up > before.given_up {
                given_up.insert(name.clone());
            }
            // The counter of attempts increases a moment before that of failures, so one look is not enough.
            let succeeded = now.attempts - now.failed > before.attempts - before.failed;
            if succeeded && !seen.insert(name.clone()) {
                seconds.entry(name.clone()).or_insert_with(|| began.elapsed().as_secs_f64());
            } else if !succeeded {
                seen.remove(name);
            }
        }
        if before.keys().all(|name| seconds.contains_key(name) || given_up.contains(name)) {
            break;
        }
    }
    // If this request fails, the alert ends by itself after 5 min.
    let _ = post(Some("1970-01-01T00:00:01Z")).await;
    let lines = if before.keys().all(|name| seconds.contains_key(name)) { Vec::new() } else { log().await? };
    let reply = |receiver: String| {
        let seconds = seconds.get(&receiver).copied();
        let (state, message) = match seconds {
            Some(_) => (ReceiverState::Delivered, String::new()),
            None if !before.contains_key(&receiver) => (ReceiverState::NoSecret, String::new()),
            None if tried.contains(&receiver) || given_up.contains(&receiver) => {
                (ReceiverState::Failed, last_error(&lines, &receiver).unwrap_or_default())
            }
            None => (ReceiverState::Silent, String::new()),
        };
        ReceiverReply { monitor: monitor.to_owned(), receiver, state, seconds, message }
    };
    Ok(names.into_iter().map(reply).collect())
}

/// Parses the names of the receivers, without the one that discards alerts.
fn receivers(reply: &str, monitor: &str) -> Result<Vec<String>> {
    let all: Vec<Receiver> = serde_json::from_str(reply)
        .map_err(Error::cannot(format!("read the list of receivers of Alertmanager on {monitor}")))?;
    let names: Vec<String> = all.into_iter().map(|receiver| receiver.name).filter(|name| name != DISCARD).collect();
    if names.is_empty() {
        return fail(format!(
            "Alertmanager on {monitor} has no receiver\n  help: add one to [alerts] in fleet.toml (docs/howto/alerts.md), \
             raise `version`, and publish"
        ));
    }
    Ok(names)
}

/// Returns the alert as Alertmanager's API takes it. Without an end, the alert ends after 5 min.
fn body(alert: &TestAlert, ends: Option<&str>) -> serde_json::Value {
    let TestAlert { fleet, monitor, at } = alert;
    let mut body = json!({
        "labels": {
            "alertname": "TestAlert", "severity": "test", "node": monitor, "fleet": fleet, "test": at.to_string(),
        },
        "annotations": {
            "summary": format!("test of the receivers of {monitor}"),
            "impact": "Nothing: this is a test.",
            "runbook": "No action is needed. `bakehouse alert test` has sent this message.",
        },
    });
    if let Some(ends) = ends {
        body["endsAt"] = ends.into();
    }
    json!([body])
}

/// Sends a request by HTTP/1.0, whose reply ends with the connection. Returns the body of the reply.
async fn ask<S>(mut stream: S, monitor: &str, method: &str, path: &str, body: &[u8]) -> Result<String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: alertmanager\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let exchanged = timeout(REQUEST, async {
        stream.write_all(&[head.as_bytes(), body].concat()).await?;
        stream.flush().await?;
        let mut reply = Vec::new();
        stream.take(LONGEST).read_to_end(&mut reply).await?;
        Ok::<_, std::io::Error>(reply)
    });
    let late = |_| Error::Failed(format!("Alertmanager on {monitor} does not answer within {} s", REQUEST.as_secs()));
    let reply = exchanged.await.map_err(late)?.map_err(Error::cannot(format!("ask Alertmanager on {monitor}")))?;
    let reply = String::from_utf8_lossy(&reply);
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    match head.split(' ').nth(1) {
        Some("200") => Ok(body.to_owned()),
        _ => fail(format!(
            "Alertmanager on {monitor} refuses the request: {}",
            body.lines().next().or(head.lines().next()).unwrap_or_default()
        )),
    }
}

/// Reads the counters of each receiver from Alertmanager's metrics. Metrics without names of receivers have no counters.
fn counters(metrics: &str) -> BTreeMap<String, Counters> {
    let mut all: BTreeMap<String, Counters> = BTreeMap::new();
    for line in metrics.lines() {
        let Some((name, rest)) = line.split_once('{') else { continue };
        let Some((labels, value)) = rest.rsplit_once("} ") else { continue };
        let receiver = labels.split_once("receiver_name=\"").and_then(|(_, rest)| rest.split_once('"'));
        let (Some((receiver, _)), Ok(value)) = (receiver, value.trim().parse::<f64>()) else { continue };
        let mut add = |counter: fn(&mut Counters) -> &mut f64| {
            *counter(all.entry(receiver.to_owned()).or_default()) += value;
        };
        match name {
            "alertmanager_notification_requests_total" => add(|c| &mut c.attempts),
            "alertmanager_notification_requests_failed_total" => add(|c| &mut c.failed),
            "alertmanager_notifications_failed_total" => add(|c| &mut c.given_up),
            _ => {}
        }
    }
    all
}

/// Returns the error in the last line of the log about a receiver. The log is in logfmt: `key=value`, or `key="value"`
/// with Go's escapes.
fn last_error(lines: &[String], receiver: &str) -> Option<String> {
    lines.iter().rev().find_map(|line| {
        let fields = logfmt(line);
        let field = |key: &str| fields.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        let error = field("err")?;
        if field("receiver") == Some(receiver) {
            return Some(error.to_owned());
        }
        // `webhook-2/webhook[0]: notify retry canceled after 8 attempts: unexpected status code 403`
        let (integration, why) = error.strip_prefix(receiver)?.strip_prefix('/')?.split_once(": ")?;
        integration.ends_with(']').then(|| why.to_owned())
    })
}

/// Parses the fields of a line in logfmt.
fn logfmt(line: &str) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    let mut rest = line;
    while let Some((key, after)) = rest.split_once('=') {
        let key = key.rsplit(' ').next().unwrap_or_default();
        let (value, end) = if let Some(quoted) = after.strip_prefix('"') {
            unquoted(quoted)
        } else {
            let end = after.find(' ').unwrap_or(after.len());
            (after[..end].to_owned(), &after[end..])
        };
        fields.push((key.to_owned(), value));
        rest = end;
    }
    fields
}

/// Returns the text before the closing quote, and what follows the quote.
fn unquoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => match characters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, 't')) => value.push('\t'),
                Some((_, other)) => value.push(other),
                None => {}
            },
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::io::DuplexStream;

    use super::*;

    /// An Alertmanager with a good, a bad, a locked and an idle receiver.
    #[derive(Default)]
    struct Fake {
        is_old: bool,
        /// Bodies of the requests, and the number of reads of the metrics after the first one.
        state: Mutex<(Vec<String>, u32)>,
    }

    impl Fake {
        fn metrics(&self) -> String {
            let mut state = self.state.lock().unwrap();
            let sent = u32::from(!state.0.is_empty());
            state.1 += sent;
            let line = |name: &str, receiver: &str, value: u32| {
                let label = if self.is_old { String::new() } else { format!(",receiver_name=\"{receiver}\"") };
                format!("alertmanager_{name}{{integration=\"webhook\"{label}}} {value}\n")
            };
            // The counter of failures follows that of attempts.
            let is_later = u32::from(state.1 > 1);
            [
                "# HELP alertmanager_notifications_failed_total {x} 1\n".to_owned(),
                line("notification_requests_total", "webhook-1", 7 + sent),
                line("notification_requests_failed_total", "webhook-1", 7),
                line("notifications_failed_total", "webhook-1", 1),
                line("notification_requests_total", "webhook-2", sent),
                line("notification_requests_failed_total", "webhook-2", is_later),
                line("notifications_failed_total", "webhook-2", is_later),
                line("notification_requests_total", "ntfy-1", 0),
            ]
            .concat()
        }

        fn reply(&self, request: &str) -> String {
            match request.split(' ').nth(1).unwrap() {
                "/api/v2/receivers" => ["discard", "webhook-1", "webhook-2", "telegram-1", "ntfy-1"]
                    .map(|name| json!({ "name": name }))
                    .into_iter()
                    .collect::<serde_json::Value>()
                    .to_string(),
                "/metrics" => self.metrics(),
                "/api/v2/alerts" => {
                    self.state.lock().unwrap().0.push(request.to_owned());
                    String::new()
                }
                other => panic!("{other}"),
            }
        }
    }

    fn connect(fake: &Arc<Fake>) -> DuplexStream {
        let (client, mut server) = tokio::io::duplex(1 << 16);
        let fake = fake.clone();
        tokio::spawn(async move {
            let mut request = vec![0; 1 << 16];
            let length = server.read(&mut request).await.unwrap();
            let body = fake.reply(&String::from_utf8_lossy(&request[..length]));
            let reply = format!("HTTP/1.0 200 OK\r\nContent-Type: x\r\n\r\n{body}");
            server.write_all(reply.as_bytes()).await.unwrap();
        });
        client
    }

    const LOG: &str = r#"time=x level=WARN msg="Notify attempt failed, will retry later" receiver=webhook-2 integration=webhook[0] err="old"
time=x level=ERROR msg="Notify for alerts failed" component=dispatcher num_alerts=1 err="webhook-2/webhook[0]: notify retry canceled: unexpected status code 403: \"no\" entry"
time=x level=INFO msg="flushing" receiver=webhook-2"#;

    #[tokio::test(start_paused = true)]
    async fn each_receiver_has_its_own_answer() {
        let fake = Arc::new(Fake::default());
        let alert = TestAlert { fleet: "acme", monitor: "monitor-1", at: 1 };
        let log = || async { Ok(LOG.lines().map(str::to_owned).collect()) };
        let found = send_test(&alert, || std::future::ready(Ok(connect(&fake))), log).await.unwrap();
        let text: Vec<String> =
            found.iter().map(|r| format!("{} {} {}", r.receiver, r.state.as_str(), r.message)).collect();
        assert_eq!(
            text,
            [
                "webhook-1 delivered ",
                "webhook-2 failed notify retry canceled: unexpected status code 403: \"no\" entry",
                "telegram-1 no secret ",
                "ntfy-1 silent ",
            ]
        );
        assert!(found[0].seconds.is_some() && found[1].seconds.is_none());
        let posted = &fake.state.lock().unwrap().0;
        assert!(!posted[0].contains("endsAt") && posted[1].contains("endsAt"), "{posted:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_older_alertmanager_is_an_error_with_the_fix() {
        let fake = Arc::new(Fake { is_old: true, ..Fake::default() });
        let alert = TestAlert { fleet: "acme", monitor: "monitor-1", at: 1 };
        let log = || async { Ok(Vec::new()) };
        let e = send_test(&alert, || std::future::ready(Ok(connect(&fake))), log).await.unwrap_err().chain();
        assert!(e.contains("help: update monitor-1"), "{e}");
    }

    #[test]
    fn fields_of_a_log_line_are_unquoted() {
        let fields = logfmt(r#"a=1 msg="x \"y\" = z" err="p\\q" last=2"#);
        let text: Vec<String> = fields.iter().map(|(key, value)| format!("{key}:{value}")).collect();
        assert_eq!(text, ["a:1", r#"msg:x "y" = z"#, r"err:p\q", "last:2"]);
    }
}
