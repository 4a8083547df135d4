//! A node for tests. It checks roles, names of units and queries by the rules of real nodes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fleet::OperatorRole;
use fleet::node_api::{
    ActionReply, ActionRequest, ActionStatus, DatabaseStatus, JournalLine, MOST_JOURNAL_LINES, NodeStatus, UnitStatus,
    unit_name,
};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::sleep;

use super::test_servers::{read_request, reply};

/// What a node does.
pub(super) struct FakeNode {
    /// Unit and time of each message.
    journal: Mutex<Vec<(String, u64)>>,
    /// Refusals of the next requests for the journal: status and message.
    pub(super) refusals: Mutex<Vec<(&'static str, &'static str)>>,
    /// Number of messages of the next replies, after which their connections break.
    pub(super) breaks: Mutex<Vec<usize>>,
    /// Whether the node does not answer questions about its state.
    hangs: AtomicBool,
    /// Replies with the state so far.
    pub(super) statuses: AtomicUsize,
    /// Replies with journals so far.
    pub(super) journals: AtomicUsize,
    /// Time at which the node has booted.
    pub(super) booted: Mutex<Instant>,
    pub(super) status: Mutex<NodeStatus>,
    /// How the next action ends; `None` if it is done at once.
    pub(super) ends: Mutex<Option<Result<(), &'static str>>>,
    /// Questions about the action before it ends.
    pub(super) left: AtomicUsize,
}

impl Default for FakeNode {
    fn default() -> Self {
        let status = NodeStatus { image: "7".to_owned(), phase: "ready".to_owned(), ..NodeStatus::default() };
        Self {
            journal: Mutex::default(),
            refusals: Mutex::default(),
            breaks: Mutex::default(),
            hangs: AtomicBool::new(false),
            statuses: AtomicUsize::new(0),
            journals: AtomicUsize::new(0),
            booted: Mutex::new(Instant::now().checked_sub(Duration::from_secs(1000)).unwrap()),
            status: Mutex::new(status),
            ends: Mutex::default(),
            left: AtomicUsize::new(0),
        }
    }
}

impl FakeNode {
    /// Adds messages of a unit with these times to the journal.
    pub(super) fn write(&self, unit: &str, times: &[u64]) {
        self.journal.lock().unwrap().extend(times.iter().map(|at| (unit.to_owned(), *at)));
    }

    /// Sets whether the node leaves questions about its state without an answer.
    pub(super) fn hang(&self, hangs: bool) {
        self.hangs.store(hangs, Ordering::SeqCst);
    }

    /// Makes the node one with a database.
    pub(super) fn set_primary(&self, primary: bool) {
        let database = DatabaseStatus { primary, ..DatabaseStatus::default() };
        self.status.lock().unwrap().database = Some(database);
    }

    fn status(&self, name: &str) -> NodeStatus {
        let uptime = self.booted.lock().unwrap().elapsed().as_secs();
        NodeStatus { node: name.to_owned(), uptime, ..self.status.lock().unwrap().clone() }
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap()
}

fn refusal(text: &str) -> String {
    format!("{{\"message\":\"{text}\"}}")
}

/// Answers the requests to the node `name`.
pub(super) async fn serve_node<S>(node: &FakeNode, name: &str, role: Option<OperatorRole>, stream: &mut S) -> Option<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let request = read_request(stream).await?;
        answer(node, name, role, request, stream).await?;
    }
}

async fn answer<S>(
    node: &FakeNode,
    name: &str,
    role: Option<OperatorRole>,
    (method, target, body): (String, String, Vec<u8>),
    stream: &mut S,
) -> Option<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let path = target.split('?').next().unwrap_or_default();
    let needed = match (method.as_str(), path) {
        ("GET", "/v1/status" | "/v1/units" | "/v1/journal" | "/v1/action") | ("CONNECT", _) => OperatorRole::Viewer,
        ("POST", "/v1/reboot" | "/v1/poweroff" | "/v1/restart" | "/v1/switchover" | "/v1/drain" | "/v1/undrain") => {
            OperatorRole::Operator
        }
        ("POST", "/v1/exec") => OperatorRole::Admin,
        _ => return reply(stream, "404 Not Found", &refusal("unknown path or method")).await,
    };
    if role.is_none_or(|role| role < needed) {
        return reply(stream, "403 Forbidden", &refusal(&format!("this request needs the role {needed}"))).await;
    }
    match path {
        "/v1/status" => {
            sleep(Duration::from_millis(20)).await;
            while node.hangs.load(Ordering::SeqCst) {
                sleep(Duration::from_millis(20)).await;
            }
            node.statuses.fetch_add(1, Ordering::SeqCst);
            reply(stream, "200 OK", &json(&node.status(name))).await
        }
        "/v1/units" => {
            let (name, active) = ("patroni.service".to_owned(), "active".to_owned());
            reply(stream, "200 OK", &json(&[UnitStatus { name, active, ..UnitStatus::default() }])).await
        }
        "/v1/action" => {
            let ended = *node.ends.lock().unwrap();
            let left = node.left.load(Ordering::SeqCst);
            node.left.store(left.saturating_sub(1), Ordering::SeqCst);
            let error = ended.and_then(Result::err).filter(|_| left == 0).map(str::to_owned);
            let (id, action) = ("a1".to_owned(), "restart".to_owned());
            let status = ActionStatus { id, action, done: left == 0, error, ..ActionStatus::default() };
            reply(stream, "200 OK", &json(&status)).await
        }
        "/v1/journal" => journal(node, target.split_once('?').map_or("", |(_, query)| query), stream).await,
        "/v1/exec" => reply(stream, "403 Forbidden", &refusal("this fleet permits no commands on its nodes")).await,
        _ if method == "CONNECT" => page(path, stream).await,
        _ => act(node, name, path, &body, stream).await,
    }
}

async fn act(
    node: &FakeNode,
    name: &str,
    path: &str,
    body: &[u8],
    stream: &mut (impl AsyncWrite + Unpin),
) -> Option<()> {
    let asked: ActionRequest = serde_json::from_slice(body).ok()?;
    if path == "/v1/restart" && asked.unit.as_deref().and_then(unit_name).as_deref() != asked.unit.as_deref() {
        return reply(stream, "400 Bad Request", &refusal("the request names no unit")).await;
    }
    if asked.force.is_none() && node.status.lock().unwrap().database.as_ref().is_some_and(|d| d.primary) {
        let text = format!(
            "{{\"message\":\"the fleet loses its last primary\\u001b]52;c;AAAA\",\"help\":\"add `--force {name}`\"}}"
        );
        return reply(stream, "409 Conflict", &text).await;
    }
    let done = node.ends.lock().unwrap().is_none();
    let (message, id) = (format!("{name}: accepted"), "a1".to_owned());
    let status = if done { "200 OK" } else { "202 Accepted" };
    reply(stream, status, &json(&ActionReply { message, done, id })).await
}

/// Serves a web page.
async fn page<S: AsyncRead + AsyncWrite + Unpin>(path: &str, stream: &mut S) -> Option<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.ok()?;
    while let Some((method, target, _)) = read_request(stream).await {
        if path.ends_with("/page") {
            hostile_page(&target, stream).await?;
            continue;
        }
        reply(stream, "200 OK", &format!("echo {path}: {method} {target}")).await?;
    }
    Some(())
}

/// A part of the fleet's page, with headers that only an attacker would send.
async fn hostile_page(target: &str, stream: &mut (impl AsyncWrite + Unpin)) -> Option<()> {
    let (status, kind) = match target {
        "/away" => ("302 Found", "text/html"),
        "/file" => ("200 OK", "application/octet-stream"),
        _ => ("200 OK", "text/html"),
    };
    let head =
        "location: http://evil.example/\r\ncontent-security-policy: default-src *\r\nset-cookie: a=b\r\nrefresh: 0";
    let reply = format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\n{head}\r\ncontent-length: 4\r\n\r\npage");
    stream.write_all(reply.as_bytes()).await.ok()
}

/// Sends a journal, and with `follow` the messages that come later.
async fn journal<S: AsyncWrite + Unpin>(node: &FakeNode, query: &str, stream: &mut S) -> Option<()> {
    node.journals.fetch_add(1, Ordering::SeqCst);
    let refused = node.refusals.lock().unwrap().pop();
    if let Some((status, text)) = refused {
        return reply(stream, status, &refusal(text)).await;
    }
    let pairs: BTreeMap<&str, String> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key, value.replace("%3D", "=").replace("%40", "@")))
        .collect();
    let unit = match pairs.get("unit").map(|unit| unit_name(unit)) {
        Some(None) => return reply(stream, "400 Bad Request", &refusal("the value of `unit` is not valid")).await,
        unit => unit.flatten(),
    };
    let number = |key: &str| pairs.get(key).map(|text| text.parse::<usize>().unwrap());
    let follow = pairs.get("follow").is_some_and(|flag| flag == "true");
    let most = if follow { usize::MAX } else { MOST_JOURNAL_LINES as usize };
    let after = pairs.get("after").map(|cursor| cursor.strip_prefix("i=").unwrap().parse::<usize>().unwrap());
    let mut left = number("lines").filter(|_| after.is_some() && !follow).unwrap_or(most).min(most);
    let all = |node: &FakeNode| node.journal.lock().unwrap().clone();
    let is_of = |of: &str| unit.as_deref().is_none_or(|unit| unit == of);
    let mut next = match (after, number("lines")) {
        (Some(index), _) => index + 1,
        (None, None) => 0,
        (None, Some(lines)) => {
            let journal = all(node);
            let of_unit = journal.iter().enumerate().rev().filter(|(_, (of, _))| is_of(of));
            of_unit.take(lines).last().map_or(journal.len(), |(index, _)| index)
        }
    };
    let mut until_break = node.breaks.lock().unwrap().pop().unwrap_or(usize::MAX);
    stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.ok()?;
    loop {
        let journal = all(node);
        let mut text = String::new();
        for (index, (unit, at)) in journal.iter().enumerate().skip(next).filter(|(_, (of, _))| is_of(of)) {
            if left == 0 || until_break == 0 {
                break;
            }
            (left, until_break) = (left - 1, until_break - 1);
            let (cursor, message) = (format!("i={index}"), at.to_string());
            let line = JournalLine { at: *at, cursor, message, unit: unit.clone(), ..JournalLine::default() };
            let _ = writeln!(text, "{}", json(&line));
        }
        if !text.is_empty() {
            stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await.ok()?;
            stream.flush().await.ok()?;
        }
        if until_break == 0 {
            // The body has no end.
            return None;
        }
        next = journal.len();
        if !follow {
            stream.write_all(b"0\r\n\r\n").await.ok()?;
            return stream.flush().await.ok();
        }
        sleep(Duration::from_millis(5)).await;
    }
}
