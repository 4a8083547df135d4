//! Actions from the fleet's page: questions, answers and results, on an origin of their own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fleet::node_api::{ActionRequest, REBOOT_PATH, RESTART_PATH, SWITCHOVER_PATH, UNDRAIN_PATH, unit_name};
use fleet::{Operator, one_line};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue, LOCATION, ORIGIN};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::html::{Document, POLICY, STYLE, escape, paragraph};
use super::{Body, FleetPage, QUESTION, secure};
use crate::deploy::nodes::action::Action;
use crate::deploy::nodes::client::Client;
use crate::deploy::nodes::forward::{CONNECTIONS, HEAD, plain};
use crate::deploy::nodes::status::fleet_status;
use crate::error::{Error, Result, fail};
use crate::keys::operator::KnownNode;
use crate::util::random::random;

/// Shortest time between a question and its answer. A page that makes the operator click twice cannot put a question under
/// the second click.
const READING: Duration = Duration::from_millis(700);
/// Longest answer to a question, in bytes.
const LONGEST: usize = 256;
/// Questions and results that are kept. Older ones are forgotten.
const MOST: usize = 64;
const FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// What an operator may do from the page.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verb {
    Restart { node: String, unit: String },
    Reboot { node: String },
    Switchover,
    Undrain { node: String },
}

/// A question that waits for its answer.
struct Question {
    verb: Verb,
    asked: Instant,
}

/// An action that the operator has confirmed.
struct Job {
    verb: Verb,
    /// What the node does.
    state: String,
    /// The result, when the action has ended.
    result: Option<Result<String, String>>,
}

#[derive(Default)]
struct Desk {
    /// Questions by their secret, which only the page with the question has.
    questions: BTreeMap<String, Question>,
    jobs: BTreeMap<u64, Job>,
    /// Number of the last job.
    last: u64,
}

/// The server of questions.
pub(super) struct Steering {
    listener: TcpListener,
    port: u16,
    /// First part of every path.
    secret: String,
    client: Client,
    fleet: String,
    operator: Operator,
    nodes: Vec<KnownNode>,
    desk: Mutex<Desk>,
}

impl Steering {
    /// Listens on a free port of the loopback interface.
    pub(super) async fn open(page: &FleetPage<'_>) -> Result<Self> {
        let bind = |e| Error::io("listen on", "127.0.0.1")(e);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(bind)?;
        Ok(Self {
            port: listener.local_addr().map_err(bind)?.port(),
            listener,
            secret: secret()?,
            client: page.client.clone(),
            fleet: page.fleet.to_owned(),
            operator: page.operator.clone(),
            nodes: page.nodes.to_vec(),
            desk: Mutex::default(),
        })
    }

    fn origin(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn desk(&self) -> std::sync::MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the link to the question about the action that a query names; `None` if there is no such action.
    pub(super) fn question(&self, query: &str) -> Option<String> {
        self.verb(query)?;
        Some(format!("{}/{}/ask?{query}", self.origin(), self.secret))
    }

    /// Parses the query of a button. All of it comes from the monitor.
    fn verb(&self, query: &str) -> Option<Verb> {
        let mut values: BTreeMap<&str, String> = BTreeMap::new();
        for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let value = percent_decode(value)?;
            if !["verb", "node", "unit"].contains(&name) || values.insert(name, value).is_some() {
                return None;
            }
        }
        let node = || values.get("node").filter(|node| self.nodes.iter().any(|known| known.name == **node)).cloned();
        match values.get("verb")?.as_str() {
            "restart" => Some(Verb::Restart { node: node()?, unit: unit_name(values.get("unit")?)? }),
            "reboot" => Some(Verb::Reboot { node: node()? }),
            "switchover" => Some(Verb::Switchover),
            "undrain" => Some(Verb::Undrain { node: node()? }),
            _ => None,
        }
    }

    /// Serves the questions, without end.
    pub(super) async fn serve(self: Arc<Self>) -> Result<Infallible> {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let permit = room.clone().acquire_owned().await;
            let accepted = self.listener.accept().await;
            let (stream, _) = accepted.map_err(Error::io("accept connections on", "127.0.0.1"))?;
            let steering = self.clone();
            tokio::spawn(async move {
                let _permit = permit;
                steering.connection(stream).await;
            });
        }
    }

    async fn connection(self: &Arc<Self>, stream: TcpStream) {
        let service = service_fn(|request| async { Ok::<_, Infallible>(self.answer(request).await) });
        // The browser shows the end of a connection.
        let _ = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    async fn answer(self: &Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let mut response = self.checked(request).await.unwrap_or_else(|(status, why)| plain(status, why));
        // The browser sends the header `Origin` with the form only if it may send a referrer.
        secure(response.headers_mut(), POLICY, "same-origin");
        response
    }

    async fn checked(
        self: &Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, (StatusCode, &'static str)> {
        let header = |name: &HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok());
        if header(&HOST) != self.origin().strip_prefix("http://") {
            return Err((StatusCode::FORBIDDEN, "the request is for another host"));
        }
        let missing = (StatusCode::NOT_FOUND, "there is no such page: use a button of the fleet's page");
        let path = request.uri().path().strip_prefix('/').and_then(|path| path.strip_prefix(self.secret.as_str()));
        let path = path.and_then(|path| path.strip_prefix('/')).ok_or(missing)?.to_owned();
        match (request.method(), path.as_str()) {
            (&Method::GET, "style.css") => Ok(reply("text/css; charset=utf-8", STYLE)),
            (&Method::GET, "ask") => {
                let verb = self.verb(request.uri().query().unwrap_or_default()).ok_or(missing)?;
                self.ask(verb).map_err(|_| (StatusCode::INTERNAL_SERVER_ERROR, "the kernel returns no random bytes"))
            }
            (&Method::GET, job) => {
                let number = job.strip_prefix("job-").and_then(|number| number.parse().ok()).ok_or(missing)?;
                self.show(number).ok_or(missing)
            }
            (&Method::POST, "run") => {
                let is_own = header(&ORIGIN) == Some(self.origin().as_str());
                if !is_own || header(&FETCH_SITE).is_some_and(|site| site != "same-origin") {
                    return Err((StatusCode::FORBIDDEN, "the answer is from a page of another site"));
                }
                let body = timeout(HEAD, Limited::new(request.into_body(), LONGEST).collect()).await;
                let Ok(Ok(body)) = body else { return Err((StatusCode::BAD_REQUEST, "the answer is incomplete")) };
                let body = body.to_bytes();
                let answer = std::str::from_utf8(&body).unwrap_or_default().strip_prefix("answer=").unwrap_or_default();
                self.run(answer)
                    .ok_or((StatusCode::CONFLICT, "the question was answered already, at once, or too late: ask again"))
            }
            _ => Err((StatusCode::METHOD_NOT_ALLOWED, "use GET")),
        }
    }

    /// Returns the page with a question. The page has a new secret, which is good for one answer.
    fn ask(&self, verb: Verb) -> Result<Response<Body>> {
        let answer = secret()?;
        let title = verb.question();
        let mut body = String::new();
        paragraph(&mut body, "", &format!("Fleet {}, as {} ({}).", self.fleet, self.operator.name, self.operator.role));
        body.push_str(&format!("<p class=\"dim\">The same as <code>{}</code>.</p>\n", escape(&verb.command())));
        paragraph(&mut body, "dim", verb.effect());
        body.push_str(&format!(
            "<form method=\"post\" action=\"run\"><input type=\"hidden\" name=\"answer\" value=\"{answer}\"><button \
             type=\"submit\">{}</button></form>\n<p class=\"dim\">To cancel, close this tab.</p>",
            escape(&verb.button())
        ));
        let mut desk = self.desk();
        desk.questions.retain(|_, question| question.asked.elapsed() < QUESTION);
        while desk.questions.len() >= MOST {
            let oldest = desk.questions.iter().min_by_key(|(_, question)| question.asked).map(|(key, _)| key.clone());
            let Some(oldest) = oldest else { break };
            desk.questions.remove(&oldest);
        }
        desk.questions.insert(answer, Question { verb, asked: Instant::now() });
        Ok(reply("text/html; charset=utf-8", Document { title: &title, body, refresh: None }.html()))
    }

    /// Begins the action of a question, and sends the browser to its result. `None` if there is no such question.
    fn run(self: &Arc<Self>, answer: &str) -> Option<Response<Body>> {
        let mut desk = self.desk();
        let question = desk.questions.remove(answer)?;
        if !(READING..QUESTION).contains(&question.asked.elapsed()) {
            return None;
        }
        desk.last += 1;
        let number = desk.last;
        while desk.jobs.len() >= MOST {
            desk.jobs.pop_first();
        }
        let verb = question.verb;
        desk.jobs.insert(number, Job { verb: verb.clone(), state: "asking the node".to_owned(), result: None });
        drop(desk);
        let steering = self.clone();
        tokio::spawn(async move {
            let result = steering.carry_out(number, &verb).await;
            let mut desk = steering.desk();
            if let Some(job) = desk.jobs.get_mut(&number) {
                job.result = Some(result.map_err(|e| e.chain()));
            }
        });
        let mut response = plain(StatusCode::SEE_OTHER, "");
        response.headers_mut().insert(LOCATION, HeaderValue::from_str(&format!("job-{number}")).ok()?);
        Some(response)
    }

    /// Carries an action out, with the operator's certificate. The node refuses what would hurt the fleet.
    async fn carry_out(&self, number: u64, verb: &Verb) -> Result<String> {
        let (node, path, unit) = match verb {
            Verb::Restart { node, unit } => (node.clone(), RESTART_PATH, Some(unit.clone())),
            Verb::Reboot { node } => (node.clone(), REBOOT_PATH, None),
            Verb::Switchover => (self.primary().await?, SWITCHOVER_PATH, None),
            Verb::Undrain { node } => (node.clone(), UNDRAIN_PATH, None),
        };
        let on_state = |text: &str| {
            if let Some(job) = self.desk().jobs.get_mut(&number) {
                job.state = one_line(text);
            }
        };
        let action = Action { client: &self.client, node: &node, on_state: &on_state };
        action.run(path, &ActionRequest { unit, force: None }, path == REBOOT_PATH).await
    }

    async fn primary(&self) -> Result<String> {
        let has_role = |node: &&KnownNode| node.roles.iter().any(|role| role == "db");
        let databases: Vec<KnownNode> = self.nodes.iter().filter(has_role).cloned().collect();
        match fleet_status(&self.client, &databases).await?.primary() {
            Some(primary) => Ok(primary.to_owned()),
            None => fail("no node reports the primary"),
        }
    }

    /// Returns the page with the result of an action.
    fn show(&self, number: u64) -> Option<Response<Body>> {
        let desk = self.desk();
        let job = desk.jobs.get(&number)?;
        let mut body = format!("<p class=\"dim\"><code>{}</code></p>\n", escape(&job.verb.command()));
        let (title, refresh) = match &job.result {
            None => {
                paragraph(&mut body, "", &job.state);
                ("In progress".to_owned(), Some(1))
            }
            Some(Ok(message)) => {
                paragraph(&mut body, "", &one_line(message));
                paragraph(&mut body, "dim", "The fleet's page shows what follows. You can close this tab.");
                ("Done".to_owned(), None)
            }
            Some(Err(why)) => {
                let lines: Vec<String> = why.lines().map(one_line).collect();
                paragraph(&mut body, "bad", &lines.join("\n"));
                ("Not done".to_owned(), None)
            }
        };
        Some(reply("text/html; charset=utf-8", Document { title: &title, body, refresh }.html()))
    }
}

impl Verb {
    fn question(&self) -> String {
        match self {
            Self::Restart { node, unit } => format!("Restart {unit} on {node}?"),
            Self::Reboot { node } => format!("Reboot {node}?"),
            Self::Switchover => "Hand the primary over to a standby?".to_owned(),
            Self::Undrain { node } => format!("Put {node} into service again?"),
        }
    }

    fn button(&self) -> String {
        match self {
            Self::Restart { unit, .. } => format!("Restart {unit}"),
            Self::Reboot { node } => format!("Reboot {node}"),
            Self::Switchover => "Hand over".to_owned(),
            Self::Undrain { node } => format!("Undrain {node}"),
        }
    }

    fn command(&self) -> String {
        match self {
            Self::Restart { node, unit } => format!("bakehouse restart {node} {unit}"),
            Self::Reboot { node } => format!("bakehouse reboot {node}"),
            Self::Switchover => "bakehouse switchover".to_owned(),
            Self::Undrain { node } => format!("bakehouse undrain {node}"),
        }
    }

    fn effect(&self) -> &'static str {
        match self {
            Self::Restart { .. } | Self::Reboot { .. } => {
                "The node refuses if the fleet would lose a quorum, the last primary or the VIP."
            }
            Self::Switchover => "Connections to the database end, and Odoo connects again.",
            Self::Undrain { .. } => "The node takes work again. The primary and the VIP stay where they are.",
        }
    }
}

/// Returns a random text that cannot be guessed.
fn secret() -> Result<String> {
    Ok(random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Decodes `%XX`; `None` if that gives no text.
fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, others)) = rest.split_first() {
        if *first == b'%' {
            let digits = std::str::from_utf8(others.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &others[2..];
        } else {
            bytes.push(*first);
            rest = others;
        }
    }
    String::from_utf8(bytes).ok()
}

fn reply(kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let body = Full::new(body.into()).map_err(|never| match never {}).boxed();
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
