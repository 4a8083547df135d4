//! Commands of operators.

use super::*;

async fn exec(connection: &mut Connection, words: &[&str], seconds: u32) -> Result<Lines, String> {
    let command = words.iter().map(|word| (*word).to_owned()).collect();
    let body = serde_json::to_vec(&ExecRequest { command, seconds }).unwrap().into();
    let lines = connection.lines(request("POST", "node", EXEC_PATH, &[], body).unwrap(), Duration::from_secs(30)).await;
    lines.map_err(|e| fleet::ErrorChain::new(&e).to_string())
}

#[tokio::test]
async fn a_command_runs_and_the_log_has_all_of_it() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Admin).await;
    let words = ["psql", "--password", "s3cret", "${HOME}"];
    let lines = exec(&mut connection, &words, 7).await.unwrap();
    node.systemd.until_starting().await;
    node.systemd.end_command(1, 3, "exit-code");
    assert_eq!(events(lines).await, [ExecEvent::Stdout("b3V0".to_owned()), ExecEvent::Exit(3)]);
    assert_eq!(node.systemd.command()[..4], words);
    // Viewers read the description.
    let started = node.systemd.calls()[0].clone();
    assert!(started.contains("description: psql of anna.admin.operator") && !started.contains("s3cret"), "{started}");
    let log = node.log.lines(r#"exec ["psql", "--password", "s3cret", "${HOME}"] for up to 7 s"#);
    assert!(log.len() == 2 && log[0].ends_with("begins") && log[1].ends_with("exit code 3"), "{log:?}");

    // The log would cut a longer command.
    let long = format!("{}; rm -rf /", " ".repeat(4100));
    let e = exec(&mut connection, &["bash", "-c", &long], 7).await.err().unwrap();
    assert!(e.contains("and may have 4096"), "{e}");
    for (words, seconds, expected) in [
        (&["true"][..], 0, "from 1 to 3600 s"),
        (&["true"], 3601, "from 1 to 3600 s"),
        (&[], 1, "no command"),
        (&["a\0b"], 1, "no command"),
    ] {
        let e = exec(&mut connection, words, seconds).await.err().unwrap();
        assert!(e.contains(expected), "{e}");
    }
    assert_eq!(node.systemd.calls().len(), 1);
}

#[tokio::test]
async fn a_command_without_an_exit_code_has_a_reason() {
    let node = TestNode::start().await;
    let mut connection = node.connect(OperatorRole::Admin).await;
    let lines = exec(&mut connection, &["no-such-program"], 7).await.unwrap();
    node.systemd.set_handoff(0);
    node.systemd.end_command(1, 203, "exit-code");
    let events = events(lines).await;
    let Some(ExecEvent::Failed(why)) = events.last() else { panic!("{events:?}") };
    assert!(why.contains("no such program"), "{why}");
}

#[tokio::test]
async fn a_command_stops_with_its_operator() {
    let stopped = |calls: &[String]| calls.iter().any(|call| call.starts_with("stop bakehouse-exec-"));
    // The operator disconnects while the command runs, and while systemd starts it.
    for holds in [false, true] {
        let node = TestNode::start().await;
        if holds {
            node.systemd.hold_starts();
        }
        let mut connection = node.connect(OperatorRole::Admin).await;
        tokio::select! {
            lines = exec(&mut connection, &["sleep", "60"], 60) => drop(lines.unwrap()),
            () = async { node.systemd.until_starting().await; if !holds { std::future::pending().await } } => {}
        }
        drop(connection);
        let wait = async {
            while !stopped(&node.systemd.calls()) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(15), wait).await.unwrap_or_else(|_| panic!("{:?}", node.systemd.calls()));
        assert_eq!(node.log.lines(r#"exec ["sleep", "60"] for up to 60 s: begins"#).len(), 1);
    }
    // The operator's certificate is revoked. The operator's connection closes in the same moment, and must not be the
    // reason in the log.
    for _ in 0..8 {
        let node = TestNode::start().await;
        let (mut connection, key) = node.connect_with_key("anna", OperatorRole::Admin).await;
        let lines = exec(&mut connection, &["sleep", "60"], 60).await.unwrap();
        node.systemd.until_starting().await;
        let revoke = async {
            node.revocations.learn(&revocation(&node.root, &key));
            node.log.until("stopped: the operator's certificate is not valid any more").await;
        };
        let ((), ()) = tokio::join!(revoke, async {
            let mut lines = lines;
            while let Ok(Some(_)) = lines.next().await {}
        });
        assert!(stopped(&node.systemd.calls()));
    }
}

/// Returns the owner's order to revoke a key.
fn revocation(root: &Issuer, key: &str) -> RevokedOperator {
    let scope = OrderScope {
        path: OperatorRevocation::PATH.to_owned(),
        hub: "hub-1".to_owned(),
        issued_at: now(),
        nonce: String::new(),
    };
    let order = OperatorRevocation {
        version: PROTOCOL,
        fleet: "acme".to_owned(),
        name: "anna".to_owned(),
        key: key.to_owned(),
        expires: now() + 3600,
        scope: Some(scope),
    };
    let order = serde_json::to_string(&order).unwrap();
    RevokedOperator { signature: encoding::encode(&root.sign(order.as_bytes()).unwrap()), order }
}
