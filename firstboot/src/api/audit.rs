//! The log of operators' requests: a line before each action, and one after it. Lines about reads and refusals are
//! limited, so that no client can push other lines out of the journal. Actions also go to etcd, through a hub.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use fleet::node_api::BEGINS;

use super::listener::Client;
use crate::host::journal::{Request, record_request};

/// Time between two log lines about the same kind of read request of an operator, because programs repeat them.
const READS: Duration = Duration::from_secs(600);
/// Most lines about reads and refusals of one operator in [`WINDOW`].
const LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(60);
/// Number of operators, and of their kinds of read requests, that the log remembers.
const MOST: usize = 256;
/// Longest path of a request in the log, in bytes.
const LONGEST_PATH: usize = 200;

/// What the log has of each operator. The keys begin with the operator's public key.
#[derive(Default)]
pub(super) struct Audit(Mutex<Logged>);

#[derive(Default)]
struct Logged {
    /// Time of the last line about each kind of read request.
    reads: BTreeMap<(String, &'static str), Instant>,
    budgets: BTreeMap<String, Budget>,
}

/// Lines since the begin of a window.
struct Budget {
    begun: Instant,
    logged: u32,
    left_out: u32,
}

/// Whether to write a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Write it. This number of lines before it was left out.
    Write {
        left_out: u32,
    },
    /// Write it, and that the next ones are left out.
    Last,
    LeaveOut,
}

impl Audit {
    /// Whether the last line about this kind of read request is old.
    fn is_first(&self, key: &str, kind: &'static str, now: Instant) -> bool {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let reads = &mut logged.reads;
        let of = (key.to_owned(), kind);
        if reads.get(&of).is_some_and(|at| now.duration_since(*at) < READS) {
            return false;
        }
        if reads.len() >= MOST {
            reads.retain(|_, at| now.duration_since(*at) < READS);
        }
        if reads.len() < MOST {
            reads.insert(of, now);
        }
        true
    }

    /// Counts a line about a read or a refusal.
    fn count(&self, key: &str, now: Instant) -> Verdict {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let budgets = &mut logged.budgets;
        let is_over = |budget: &Budget| now.duration_since(budget.begun) >= WINDOW;
        if budgets.len() >= MOST && !budgets.contains_key(key) {
            budgets.retain(|_, budget| !is_over(budget));
        }
        if budgets.len() >= MOST && !budgets.contains_key(key) {
            return Verdict::LeaveOut;
        }
        let new = || Budget { begun: now, logged: 0, left_out: 0 };
        let budget = budgets.entry(key.to_owned()).or_insert_with(new);
        let left_out = if is_over(budget) { std::mem::replace(budget, new()).left_out } else { 0 };
        budget.logged += 1;
        match budget.logged {
            1..LINES => Verdict::Write { left_out },
            LINES => Verdict::Last,
            _ => {
                budget.left_out = budget.left_out.saturating_add(1);
                Verdict::LeaveOut
            }
        }
    }
}

/// Logs that an action begins. The line is in the journal before the action changes anything, and the entry is on its way
/// to etcd: an action that may stop the node waits for [`recorded`].
pub(super) fn begins(client: &Client, what: &str) {
    let operator = &client.certificate.operator;
    record_request(Request::Action, &operator.dns_name(), &client.from, what, BEGINS);
    client.shared().api.outbox.begin(operator, &client.from, what);
}

/// Waits until etcd has the actions that have begun, for up to a second.
pub(super) async fn recorded(client: &Client) {
    client.shared().api.outbox.recorded().await;
}

/// Logs the result of an action that has begun.
pub(super) fn ended(client: &Client, what: &str, result: &str) {
    let operator = &client.certificate.operator;
    record_request(Request::Action, &operator.dns_name(), &client.from, what, result);
    client.shared().api.outbox.end(operator, &client.from, what, result);
}

/// Logs a stream to a service of the node, like a read request that programs repeat. Only the journal has it.
pub(super) fn opened(client: &Client, what: &str, kind: &'static str) {
    if client.shared().audit.is_first(&client.certificate.key, kind, Instant::now()) {
        record_request(Request::Action, &client.certificate.operator.dns_name(), &client.from, what, "200");
    }
}

/// Logs a read request. `repeats`: its path, if programs repeat the request.
pub(super) fn read(client: &Client, what: &str, repeats: Option<&'static str>) {
    let is_first = |kind| client.shared().audit.is_first(&client.certificate.key, kind, Instant::now());
    if repeats.is_none_or(is_first) {
        limited(client, what, "200");
    }
}

/// Logs a refused request.
pub(super) fn refused(client: &Client, what: &str, status: u16, why: &str) {
    limited(client, &format!("{what}: {why}"), &status.to_string());
}

fn limited(client: &Client, what: &str, result: &str) {
    let name = client.certificate.operator.dns_name();
    let verdict = client.shared().audit.count(&client.certificate.key, Instant::now());
    let what = match verdict {
        Verdict::Write { left_out: 0 } => what.to_owned(),
        Verdict::Write { left_out } => format!("{left_out} reads or refused requests without a line, and {what}"),
        Verdict::Last => format!("{what} (the next ones within {} s have no line)", WINDOW.as_secs()),
        Verdict::LeaveOut => return,
    };
    record_request(Request::Read, &name, &client.from, &what, result);
}

/// Returns the method and path of a request for the log.
pub(super) fn request_line<B>(request: &hyper::Request<B>) -> String {
    let path = request.uri().path_and_query().map_or("", |path| path.as_str());
    let cut: String = path.chars().flat_map(char::escape_debug).take(LONGEST_PATH).collect();
    let mark = if cut.len() < path.len() { "…" } else { "" };
    format!("{} {cut}{mark}", request.method())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_reads_have_one_line_whatever_their_query_is() {
        let (audit, now) = (Audit::default(), Instant::now());
        assert!(audit.is_first("anna", "/v1/status", now));
        assert!(!audit.is_first("anna", "/v1/status", now + READS / 2));
        assert!(audit.is_first("anna", "/v1/units", now) && audit.is_first("ben", "/v1/status", now));
        assert!(audit.is_first("anna", "/v1/status", now + READS));
        for n in 0..2 * MOST {
            audit.is_first(&n.to_string(), "/v1/status", now);
        }
        assert!(audit.0.lock().unwrap().reads.len() <= MOST);
    }

    #[test]
    fn a_flood_of_refused_requests_has_few_lines() {
        let (audit, now) = (Audit::default(), Instant::now());
        let verdicts: Vec<Verdict> = (0..1000).map(|_| audit.count("eve", now)).collect();
        let written = verdicts.iter().filter(|verdict| **verdict != Verdict::LeaveOut).count();
        assert_eq!((written, verdicts[LINES as usize - 1]), (LINES as usize, Verdict::Last));
        assert_eq!(audit.count("anna", now), Verdict::Write { left_out: 0 });
        assert_eq!(audit.count("eve", now + WINDOW), Verdict::Write { left_out: 1000 - LINES });
        assert_eq!(audit.count("eve", now + WINDOW), Verdict::Write { left_out: 0 });
    }

    #[test]
    fn a_long_path_is_cut() {
        let request = |path: &str| request_line(&hyper::Request::get(path).body(()).unwrap());
        assert_eq!(request("/v1/status?x=1"), "GET /v1/status?x=1");
        let long = request(&format!("/{}", "x".repeat(8000)));
        assert!(long.ends_with("x…") && long.len() < LONGEST_PATH + 10, "{long}");
    }
}
