//! The alert rules in promtool, and messages of the real Alertmanager, both of the images' packages.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use bakehouse_tests::packages::unpack;
use bakehouse_tests::root;
use builder::deploy::alertmanager::{ReceiverReply, TestAlert, send_test};
use builder::error::Error;
use builder::project::Project;
use fleet::{AlertKey, AlertSecrets, Membership, Secrets};

/// Longest wait for all messages.
const LIMIT: Duration = Duration::from_secs(60);

fn tools() -> PathBuf {
    static TOOLS: OnceLock<PathBuf> = OnceLock::new();
    TOOLS.get_or_init(|| unpack("alerts", &["promtool", "prometheus-alertmanager"])).clone()
}

#[test]
fn rules_fire_when_their_tests_say_and_at_no_other_time() {
    let done = Command::new(tools().join("usr/bin/promtool"))
        .args(["test", "rules", "tests/alerts/rules.yml"])
        .current_dir(root())
        .output()
        .expect("promtool starts");
    let said = [done.stdout, done.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(done.status.success(), "{said}");
}

/// Accepts HTTP requests, and sends the path, the header `Authorization` and the body of each. Refuses paths that begin
/// with `/refuse`.
fn sink(to: &Sender<(String, String, String)>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("a port").port();
    let to = to.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, to) = (stream.expect("a connection"), to.clone());
            thread::spawn(move || -> Option<()> {
                let mut reader = BufReader::new(stream.try_clone().ok()?);
                loop {
                    let (mut first, mut length, mut authorization) = (String::new(), 0, String::new());
                    reader.read_line(&mut first).ok().filter(|n| *n > 0)?;
                    loop {
                        let mut line = String::new();
                        reader.read_line(&mut line).ok()?;
                        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
                        match name.to_ascii_lowercase().as_str() {
                            "content-length" => length = value.parse().ok()?,
                            "authorization" => value.clone_into(&mut authorization),
                            _ => {}
                        }
                    }
                    let mut body = vec![0; length];
                    reader.read_exact(&mut body).ok()?;
                    let path = first.split(' ').nth(1)?.to_owned();
                    let (status, reply) = if path.starts_with("/refuse") {
                        ("403 Forbidden", "no \"entry\" here")
                    } else if path.starts_with("/telegram") {
                        ("200 OK", r#"{"ok":true,"result":{"message_id":1,"chat":{"id":1}}}"#)
                    } else {
                        // Slack's own reply.
                        ("200 OK", "ok")
                    };
                    to.send((path, authorization, String::from_utf8(body).ok()?)).ok()?;
                    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", reply.len());
                    (&stream).write_all((head + reply).as_bytes()).ok()?;
                }
            });
        }
    });
    port
}

/// An Alertmanager that is killed when it is dropped.
struct Alertmanager(Child);

impl Drop for Alertmanager {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Renders the configuration of the fleet `receivers`, in which every address is `http://127.0.0.1:PORT/`. The second
/// channel of Slack has the path `mattermost`, and a server of ntfy has the access token `token`, if there is one.
fn configure(dir: &Path, port: u16, mattermost: &str, token: Option<&str>) {
    let here = |path: &str| format!("http://127.0.0.1:{port}/{path}");
    let mut project = Project::load(&root().join("tests/fleets/receivers.toml")).expect("a valid fleet.toml");
    let secrets = Secrets { alerts: String::new(), ..Secrets::sample() };
    let key = secrets.alert_key().expect("the sample has etcd's password");
    let mut sealed = AlertSecrets::default();
    let topology = &mut project.topology;
    let values = [
        ("telegram", "42:token".to_owned()),
        ("slack", here("slack")),
        ("mattermost", here(mattermost)),
        ("matrix", here("matrix")),
        ("email", "unused".to_owned()),
    ];
    for (name, value) in values.into_iter().chain(token.map(|token| ("ntfy", token.to_owned()))) {
        sealed.seal(&key, &topology.name, name, &value).expect("a secret");
    }
    topology.alert_secrets = sealed;
    topology.alerts.email = None;
    topology.alerts.webhooks = vec![here("webhook")];
    topology.alerts.dead_man = Some(here("dead-man"));
    for ntfy in &mut topology.alerts.ntfy {
        ntfy.url = here("");
    }
    let monitor = project.topology.nodes.iter().find(|n| n.has_role("monitor")).expect("a monitor");
    // The monitor has the key of a grant, and not the password that it is derived from.
    let member = Membership { secrets: secrets.for_roles(&monitor.roles), ..Membership::sample() };
    assert_eq!(AlertKey::granted(&member.secrets.alerts), Some(key));
    let context = project.context(monitor, &member);
    let overlay = project.overlay("prometheus").expect("the overlay exists");
    for name in ["alertmanager.yml", "alerts.tmpl"] {
        let path = format!("run/bakehouse/{name}.j2");
        let (_, bytes) = overlay.files.iter().find(|(inner, _)| *inner == path).expect("the template exists");
        let text = fleet::render(&path, &String::from_utf8_lossy(bytes), &context).unwrap_or_else(|e| panic!("{e}"));
        let text = text.replace("/run/bakehouse/", &format!("{}/", dir.display()));
        let text =
            text.replace("        parse_mode:", &format!("        api_url: {}\n        parse_mode:", here("telegram")));
        fs::write(dir.join(name), text).expect("a folder");
    }
}

fn wait_for(messages: &Receiver<(String, String, String)>, count: usize) -> Vec<(String, String, String)> {
    let until = Instant::now() + LIMIT;
    let mut found = Vec::new();
    while found.len() < count {
        match messages.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(message) => found.push(message),
            Err(e) => panic!("{} of {count} messages: {e}\n{found:#?}", found.len()),
        }
    }
    found
}

/// Starts the Alertmanager of the folder's configuration. Returns it with its port.
fn start(dir: &Path) -> (Alertmanager, u16) {
    let tools = tools();
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("a port").port();
    // Debian's Alertmanager reads its own templates below /usr/share.
    let script = "mount --bind \"$1\"/usr/share /usr/share && shift && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(&tools).arg(tools.join("usr/bin/prometheus-alertmanager"));
    command.arg(format!("--config.file={}/alertmanager.yml", dir.display()));
    command.arg(format!("--storage.path={}/data", dir.display())).arg("--enable-feature=receiver-name-in-metrics");
    command.arg(format!("--web.listen-address=127.0.0.1:{free}")).arg("--cluster.listen-address=");
    let log = fs::File::create(dir.join("log")).expect("a folder");
    let running = Alertmanager(command.stderr(log).spawn().expect("unshare starts"));
    let until = Instant::now() + LIMIT;
    while TcpStream::connect(("127.0.0.1", free)).is_err() {
        let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
        assert!(Instant::now() < until, "Alertmanager does not listen:\n{log}");
        thread::sleep(Duration::from_millis(100));
    }
    (running, free)
}

#[test]
fn every_receiver_gets_the_alert_with_its_secret() {
    let dir = tempfile::tempdir().expect("a folder");
    let (sender, messages) = channel();
    let port = sink(&sender);
    configure(dir.path(), port, "mattermost", Some("tk_access"));
    let (_running, free) = start(dir.path());
    let post = |body: &str| -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(("127.0.0.1", free))?;
        let head = "POST /api/v2/alerts HTTP/1.0\r\nContent-Type: application/json";
        write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        let mut reply = String::new();
        stream.read_to_string(&mut reply)?;
        Ok(reply.starts_with("HTTP/1.0 200"))
    };
    let alerts = r#"[
        {"labels": {"alertname": "WritesFail", "severity": "critical", "node": "db-1", "fleet": "receivers"},
         "annotations": {"summary": "no writes", "impact": "Users wait.", "runbook": "Type `bakehouse status`."},
         "generatorURL": "http://monitor-1:9090/graph"},
        {"labels": {"alertname": "DeadMan", "severity": "none"}, "annotations": {"summary": "x"}}]"#;
    let until = Instant::now() + LIMIT;
    while !post(alerts).is_ok_and(|accepted| accepted) {
        let log = fs::read_to_string(dir.path().join("log")).unwrap_or_default();
        assert!(Instant::now() < until, "Alertmanager does not accept the alerts:\n{log}");
        thread::sleep(Duration::from_millis(100));
    }
    let found = wait_for(&messages, 9);
    let one = |path: &str| found.iter().filter(|(to, ..)| to.starts_with(path)).collect::<Vec<_>>();
    assert_eq!([one("/dead-man").len(), one("/webhook").len(), one("/matrix").len()], [1, 1, 1], "{found:#?}");
    assert!(one("/dead-man")[0].2.contains("DeadMan") && !one("/webhook")[0].2.contains("DeadMan"), "{found:#?}");
    for path in ["/slack", "/mattermost", "/telegram/bot42:token/sendMessage"] {
        for (_, _, text) in one(path) {
            for part in
                ["no writes", "Users wait.", "`bakehouse status`", "https://docs.example.net/alerts.html#writesfail"]
            {
                assert!(text.contains(part), "{path} lacks `{part}`: {text}");
            }
            assert!(!text.contains("9090") && !text.contains("9093"), "{path} has an address of the mesh: {text}");
        }
    }
    assert_eq!((one("/slack").len(), one("/mattermost").len(), one("/telegram/").len()), (1, 1, 2), "{found:#?}");
    let ntfy = one("/acme-alerts?tpl=1&t=");
    let mut tokens: Vec<&str> = ntfy.iter().map(|(_, authorization, _)| authorization.as_str()).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, ["", "Bearer tk_access"], "{found:#?}");
}

#[test]
fn test_alert_shows_what_each_receiver_answers() {
    let dir = tempfile::tempdir().expect("a folder");
    let (sender, messages) = channel();
    let port = sink(&sender);
    configure(dir.path(), port, "refuse/mattermost", None);
    let (_running, free) = start(dir.path());
    let connect = || async {
        tokio::net::TcpStream::connect(("127.0.0.1", free)).await.map_err(Error::io("connect to", "Alertmanager"))
    };
    let log = || async {
        let log = fs::read_to_string(dir.path().join("log")).map_err(Error::io("read", "the log"))?;
        Ok(log.lines().map(str::to_owned).collect())
    };
    let alert = TestAlert { fleet: "receivers", monitor: "monitor-1", at: 1 };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let replies = runtime.block_on(send_test(&alert, connect, log)).unwrap_or_else(|e| panic!("{}", e.chain()));
    let shown: Vec<String> = replies
        .iter()
        .map(|ReceiverReply { receiver, state, message, .. }| format!("{receiver} {} {message}", state.as_str()))
        .collect();
    let refusal = "slack-2 failed notify retry canceled due to unrecoverable error after 1 attempts: channel \
        \"#operations\": unexpected status code 403: no \"entry\" here";
    let expected = [
        "telegram-1 delivered ",
        "telegram-2 delivered ",
        "slack-1 delivered ",
        refusal,
        "matrix-1 delivered ",
        "ntfy-1 delivered ",
        "ntfy-2 no secret ",
        "webhook-1 delivered ",
        "dead-man delivered ",
    ];
    assert_eq!(shown, expected);
    // The alert ends when each receiver has answered, and not after 5 min.
    let ended = "\"status\":\"resolved\"";
    let is_end = |(path, _, text): &(String, String, String)| path == "/webhook" && text.contains(ended);
    let until = Instant::now() + LIMIT;
    while !messages.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok_and(|m| is_end(&m)) {
        assert!(Instant::now() < until, "the test alert does not end");
    }
}
