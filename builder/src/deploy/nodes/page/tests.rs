//! Tests of the page's servers on the operator's machine, with a monitor in an attacker's hands.

use std::time::Duration;

use fleet::OperatorRole;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::super::test_servers::Fleet;
use super::*;

/// The page of an operator with this role.
struct Opened {
    fleet: Fleet,
    server: JoinHandle<()>,
    link: String,
}

impl Opened {
    async fn new(role: OperatorRole) -> Self {
        let fleet = Fleet::start_for(role, &["hub-1", "hub-2"], &["db-1", "db-2", "monitor-1"]).await;
        let entrance = Entrance::open().await.unwrap();
        let (link, client, nodes) = (entrance.link(), fleet.client(), fleet.nodes());
        let server = tokio::spawn(async move {
            let operator = Operator::new("anna", role).unwrap();
            let page =
                FleetPage { client: &client, node: "monitor-1", fleet: "acme", operator: &operator, nodes: &nodes };
            page.serve(entrance).await.map(drop).unwrap();
        });
        Self { fleet, server, link }
    }

    fn port(&self) -> u16 {
        self.link.split(['/', ':']).find_map(|part| part.parse().ok()).unwrap()
    }

    /// Sends a request of the browser, with its cookie.
    async fn get(&self, target: &str) -> String {
        let secret = self.link.rsplit('/').next().unwrap();
        ask(self.port(), "GET", target, &format!("authorization: Bearer {secret}\r\n"), "").await
    }

    /// Follows a button to its question. Returns port, path of the question, and the page.
    async fn question(&self, query: &str) -> (u16, String, String) {
        let reply = self.get(&format!("/act?{query}")).await;
        assert!(reply.starts_with("HTTP/1.1 303 "), "{reply}");
        let location = reply.lines().find_map(|line| line.strip_prefix("location: ")).unwrap();
        let (port, path) = location.strip_prefix("http://127.0.0.1:").unwrap().split_once('/').unwrap();
        let (port, path) = (port.parse().unwrap(), format!("/{path}"));
        assert_ne!(port, self.port());
        let page = ask(port, "GET", &path, "", "").await;
        (port, path, page)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn ask(port: u16, method: &str, target: &str, headers: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let host = if headers.contains("host: ") { String::new() } else { format!("host: 127.0.0.1:{port}\r\n") };
    let request = format!(
        "{method} {target} HTTP/1.1\r\n{host}{headers}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    reply
}

/// Returns the answer in the form of a question's page.
fn answer(page: &str) -> String {
    let value = page.split("name=\"answer\" value=\"").nth(1).unwrap_or_else(|| panic!("{page}"));
    value.split('"').next().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_monitor_cannot_relax_the_browsers_rules() {
    let opened = Opened::new(OperatorRole::Viewer).await;
    let reply = opened.get("/").await;
    assert!(reply.starts_with("HTTP/1.1 200 OK") && reply.ends_with("page"), "{reply}");
    assert!(reply.contains(&format!("content-security-policy: {POLICY}\r\n")), "{reply}");
    for header in ["evil", "set-cookie", "refresh", "location", "default-src *"] {
        assert!(!reply.contains(header), "{header}: {reply}");
    }
    for target in ["/away", "/file"] {
        let reply = opened.get(target).await;
        assert!(reply.starts_with("HTTP/1.1 502 ") && !reply.contains("evil"), "{reply}");
    }
    let stranger = ask(opened.port(), "GET", "/", "", "").await;
    assert!(stranger.starts_with("HTTP/1.1 403 "), "{stranger}");
    let secret = opened.link.rsplit('/').next().unwrap();
    let post = ask(opened.port(), "POST", "/", &format!("authorization: Bearer {secret}\r\n"), "x").await;
    assert!(post.starts_with("HTTP/1.1 405 "), "{post}");
    // A viewer has no questions.
    let refused = opened.get("/act?verb=reboot&node=db-1").await;
    assert!(refused.starts_with("HTTP/1.1 403 ") && refused.contains("viewer"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_action_needs_its_own_answer() {
    let opened = Opened::new(OperatorRole::Operator).await;
    opened.fleet.node("db-1").set_primary(false);
    let (port, path, page) = opened.question("verb=restart&node=db%2D1&unit=patroni").await;
    assert!(
        page.contains("Restart patroni.service on db-1?") && page.contains("bakehouse restart db-1 patroni.service")
    );
    assert!(page.contains("frame-ancestors 'none'") && page.contains("x-frame-options: DENY"), "{page}");
    let run = format!("{}/run", path.split("/ask").next().unwrap());
    let body = format!("answer={}", answer(&page));
    let own = format!("origin: http://127.0.0.1:{port}\r\n");
    // Answers of other sites, and of the page itself.
    for headers in [
        String::new(),
        "origin: null\r\n".to_owned(),
        format!("origin: http://127.0.0.1:{}\r\n", opened.port()),
        format!("{own}sec-fetch-site: same-site\r\n"),
        format!("host: evil.example:{port}\r\n{own}"),
    ] {
        let reply = ask(port, "POST", &run, &headers, &body).await;
        assert!(reply.starts_with("HTTP/1.1 403 "), "{headers}: {reply}");
    }
    let unknown = ask(port, "POST", "/0123/run", &own, &body).await;
    assert!(unknown.starts_with("HTTP/1.1 404 "), "{unknown}");
    // An answer at once loses the question.
    let fast = ask(port, "POST", &run, &own, &body).await;
    assert!(fast.starts_with("HTTP/1.1 409 "), "{fast}");
    let (_, path, page) = opened.question("verb=restart&node=db%2D1&unit=patroni").await;
    sleep(Duration::from_millis(800)).await;
    let body = format!("answer={}", answer(&page));
    let begun = ask(port, "POST", &run, &own, &body).await;
    assert!(begun.starts_with("HTTP/1.1 303 ") && begun.contains("location: job-1\r\n"), "{begun}");
    let again = ask(port, "POST", &run, &own, &body).await;
    assert!(again.starts_with("HTTP/1.1 409 "), "{again}");
    let job = format!("{}/job-1", path.split("/ask").next().unwrap());
    let mut result = String::new();
    for _ in 0..50 {
        result = ask(port, "GET", &job, "", "").await;
        if result.contains("<h1>Done</h1>") {
            break;
        }
        sleep(Duration::from_millis(100)).await;
    }
    assert!(result.contains("<h1>Done</h1>") && result.contains("db-1: accepted"), "{result}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nodes_refusal_is_the_result() {
    let opened = Opened::new(OperatorRole::Operator).await;
    opened.fleet.node("db-1").set_primary(true);
    let (port, path, page) = opened.question("verb=reboot&node=db-1").await;
    sleep(Duration::from_millis(800)).await;
    let root = path.split("/ask").next().unwrap().to_owned();
    let (run, job) = (format!("{root}/run"), format!("{root}/job-1"));
    let own = format!("origin: http://127.0.0.1:{port}\r\n");
    ask(port, "POST", &run, &own, &format!("answer={}", answer(&page))).await;
    let mut result = String::new();
    for _ in 0..50 {
        result = ask(port, "GET", &job, "", "").await;
        if result.contains("<h1>Not done</h1>") {
            break;
        }
        sleep(Duration::from_millis(100)).await;
    }
    assert!(result.contains("<h1>Not done</h1>") && result.contains("loses its last primary"), "{result}");
    assert!(!result.contains('\u{1b}'), "{result}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_actions_that_exist_have_a_question() {
    let opened = Opened::new(OperatorRole::Admin).await;
    for query in [
        "",
        "verb=poweroff&node=db-1",
        "verb=exec&node=db-1",
        "verb=reboot",
        "verb=reboot&node=evil-1",
        "verb=reboot&node=db-1&node=db-2",
        "verb=reboot&node=db-1&force=db-1",
        "verb=restart&node=db-1",
        "verb=restart&node=db-1&unit=a%20b",
        "verb=restart&node=db-1&unit=%22%3E%3Cscript%3E",
        "verb=restart&node=db-1&unit=%ff",
        "verb=restart&node=db-1&unit=%4",
    ] {
        let reply = opened.get(&format!("/act?{query}")).await;
        assert!(reply.starts_with("HTTP/1.1 400 "), "{query}: {reply}");
    }
}

#[test]
fn the_monitor_sends_the_same_policy() {
    let server = include_str!("../../../../../page/src/server.rs");
    let own = server.split("POLICY: &str = \"").nth(1).and_then(|text| text.split('"').next()).unwrap();
    let words = |text: &str| text.replace('\\', " ").split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(words(own), words(POLICY));
}
