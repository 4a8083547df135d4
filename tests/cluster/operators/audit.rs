//! The audit log in etcd: through a hub, without a node, and within its limits.

use std::sync::Mutex;

use firstboot::hub::audit::{purge, store};
use fleet::node_api::{
    AUDIT_PATH, AUDIT_QUERY_PATH, AuditEntry, AuditLog, AuditQuery, LONGEST_AUDIT_ENTRY, RESTART_PATH,
};

use super::*;

const ACTIONS: &str = "/bakehouse/audit/actions/";
const DAY: u64 = 86_400_000;

fn now_millis() -> u64 {
    now() * 1000
}

/// Returns an entry that is `id` ms later than `base`.
fn entry(node: &str, base: u64, id: u64) -> AuditEntry {
    AuditEntry {
        at: base + id,
        id: format!("{id:x}"),
        node: node.to_owned(),
        operator: "anna".to_owned(),
        role: "admin".to_owned(),
        from: "hub-1".to_owned(),
        action: "reboot".to_owned(),
        result: "done".to_owned(),
        ended: Some(base + 1000),
        left_out: 0,
    }
}

/// Sends entries to a hub with a member's certificate.
async fn send(
    site: &TestCluster,
    hub: usize,
    (joiner, grant): &(TestJoiner, Grant),
    entries: &[AuditEntry],
) -> Result<(), String> {
    let body = serde_json::to_vec(entries).expect("JSON");
    site.member(hub, (joiner, grant), ("POST", AUDIT_PATH), body).await.map(drop)
}

/// Reads the log through a hub.
async fn log(operator: &TestOperator, hub: u8, query: &AuditQuery) -> AuditLog {
    let (host, name) = (format!("127.0.0.{hub}"), format!("hub-{hub}"));
    let mut connection = Connection::open(&host, HUB_PORT, &name, &operator.tls).await.expect("a hub");
    let body = serde_json::to_string(query).expect("JSON");
    let reply = connection.ask(request("POST", "hub", AUDIT_QUERY_PATH, &[], body.into()).expect("HTTP"), 8 << 20);
    serde_json::from_slice(&reply.await.expect("a reply")).expect("JSON")
}

fn actions(log: &AuditLog) -> Vec<(&str, &str, &str)> {
    log.entries.iter().map(|e| (e.node.as_str(), e.action.as_str(), e.result.as_str())).collect()
}

#[test]
fn an_action_is_in_the_log_after_its_node_is_lost() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let members = site.members("db", 1).await;
        let node = TestNode::start(&site, &members[0]);
        let operator = TestOperator::new(&site, "ben", OperatorRole::Operator);
        let mut connection = through(&operator.tls, 2, "db-1").await.expect("a connection");
        // There is no systemd here, so the node refuses the unit before the action begins.
        let unit = r#"{"unit":"odoo.service"}"#;
        refused(ask(&mut connection, "POST", RESTART_PATH, unit).await, "a unit without systemd");
        let text = refused(ask(&mut connection, "POST", REBOOT_PATH, r#"{"force":"db-1"}"#).await, "no systemd");
        assert!(text.contains("D-Bus") || text.contains("bus"), "{text}");
        // The action has ended, and its end is on its way.
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        let until = tokio::time::Instant::now() + Duration::from_secs(20);
        while log(&viewer, 1, &AuditQuery::default()).await.entries.iter().all(|entry| entry.ended.is_none()) {
            assert!(tokio::time::Instant::now() < until, "the log has no end of the action");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        drop((connection, node));
        let found = log(&viewer, 3, &AuditQuery::default()).await;
        let [only] = &found.entries[..] else { panic!("{found:?}") };
        assert_eq!((only.operator.as_str(), only.role.as_str()), ("ben", "operator"));
        assert_eq!((only.node.as_str(), only.action.as_str()), ("db-1", "reboot (forced)"));
        assert!(only.result.starts_with("failed: ") && only.ended >= Some(only.at), "{only:?}");
        assert!(!only.from.is_empty());
        // A client without an operator's certificate does not read it.
        let member = site.member(0, (&members[0].0, &members[0].1), ("POST", AUDIT_QUERY_PATH), b"{}".to_vec()).await;
        assert!(member.expect_err("a member").contains("401"));
    });
}

#[test]
fn a_node_writes_its_own_entries_within_limits() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let members = site.members("db", 2).await;
        let (first, second, base) = (&members[0].1.slot, &members[1].1.slot, now_millis());
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);

        // Another node's name, a long entry, and text that is no list.
        let e = send(&site, 0, &members[0], &[entry(second, base, 1)]).await.expect_err("another node's entry");
        assert!(e.contains("403") && e.contains("sends an entry of another node"), "{e}");
        let long = AuditEntry { action: "x".repeat(LONGEST_AUDIT_ENTRY), ..entry(first, base, 1) };
        let e = send(&site, 0, &members[0], std::slice::from_ref(&long)).await.expect_err("a long entry");
        assert!(e.contains("403") && e.contains("has more than 4096 bytes"), "{e}");
        let e = site.member(0, (&members[0].0, &members[0].1), ("POST", AUDIT_PATH), b"{}".to_vec()).await;
        assert!(e.expect_err("no list").contains("is no list of entries"));
        let ahead = AuditEntry { at: now_millis() + DAY, ..entry(first, base, 1) };
        let e = send(&site, 0, &members[0], &[ahead]).await.expect_err("a clock that is ahead");
        assert!(e.contains("503") && e.contains("ahead of this hub's"), "{e}");
        assert!(log(&viewer, 1, &AuditQuery::default()).await.entries.is_empty());

        // The node cuts a long text, and several hubs store the same entry once.
        let (begun, cut) =
            (AuditEntry { ended: None, result: "begins".to_owned(), ..entry(first, base, 2) }, long.fitted());
        for hub in [0, 1, 2, 0] {
            send(&site, hub, &members[0], &[cut.clone(), begun.clone()]).await.expect("a hub stores it");
        }
        let found = log(&viewer, 2, &AuditQuery::default()).await;
        assert_eq!(found.entries, [cut.clone(), begun.clone()]);
        // The end completes the entry. After that, the node cannot change the entry.
        let ended = AuditEntry { action: "harmless".to_owned(), ..entry(first, base, 2) };
        let changed = AuditEntry { result: "nothing".to_owned(), ..ended.clone() };
        for new in [&ended, &begun, &changed] {
            send(&site, 1, &members[0], std::slice::from_ref(new)).await.expect("a hub stores it");
        }
        let found = log(&viewer, 3, &AuditQuery::default()).await;
        assert_eq!(actions(&found)[1], (first.as_str(), "reboot", "done"));

        // One node has 100 new entries in an hour, and the others their own 100.
        let flood: Vec<AuditEntry> = (10..120).map(|id| entry(first, base, id)).collect();
        let mut taken = 0;
        for part in flood.chunks(10) {
            match send(&site, taken % 3, &members[0], part).await {
                Ok(()) => taken += 1,
                Err(e) => assert!(e.contains("503") && e.contains("has 100 entries of this hour"), "{e}"),
            }
        }
        assert_eq!(taken, 9, "two entries came before");
        send(&site, 0, &members[1], &[entry(second, base, 500)]).await.expect("the other node has its own limit");

        // Filters, and the last entries.
        let last = log(&viewer, 1, &AuditQuery { count: Some(2), ..AuditQuery::default() }).await;
        assert!(last.has_more && last.entries.len() == 2 && last.entries[1].node == *second, "{last:?}");
        let node = AuditQuery { node: Some(second.clone()), ..AuditQuery::default() };
        let found = log(&viewer, 1, &node).await;
        assert!(!found.has_more && found.entries.len() == 1, "{found:?}");
        let of_ben = AuditQuery { operator: Some("ben".to_owned()), ..AuditQuery::default() };
        assert!(log(&viewer, 1, &of_ben).await.entries.is_empty());
        let later = AuditQuery { since: Some(now() + 100), ..AuditQuery::default() };
        assert!(log(&viewer, 1, &later).await.entries.is_empty());
    });
}

#[test]
fn old_entries_are_deleted_and_never_returned() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        site.members("db", 1).await;
        let (etcd, base) = (site.etcd(0), now_millis());
        let keys = async || etcd.keys(ACTIONS, ACTIONS).await.expect("etcd answers").len();
        let old = AuditEntry { at: now_millis() - 89 * DAY, ..entry("db-1", base, 1) };
        let too_old = AuditEntry { at: now_millis() - 91 * DAY, ..entry("db-1", base, 2) };
        store(&etcd, "db-1", vec![old, too_old, entry("db-1", base, 3)]).await.expect("etcd answers");
        assert_eq!((keys().await, etcd.count(ACTIONS).await.expect("etcd answers")), (2, 2));
        assert_eq!(purge(&etcd, now_millis()).await.expect("etcd answers"), 0);
        assert_eq!(purge(&etcd, now_millis() + 2 * DAY).await.expect("etcd answers"), 1);
        assert_eq!(keys().await, 1);
        // The grants of slots, whose keys begin with the same folder, stay.
        assert_eq!(purge(&etcd, now_millis() + 200 * DAY).await.expect("etcd answers"), 1);
        assert_eq!(etcd.count("/bakehouse/audit/db-1/").await.expect("etcd answers"), 1);
    });
}

#[test]
fn entries_wait_while_no_hub_answers_and_arrive_once() {
    in_own_network(async {
        let mut site = TestCluster::open("db.count = 1\n");
        let members = site.members("db", 1).await;
        let (joiner, grant) = &members[0];
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        let operator = Operator::new("ben", OperatorRole::Operator).expect("a name");
        for hub in site.hubs.drain(..) {
            hub.abort();
            let _ = hub.await;
        }
        let own = Identity { cert: &grant.cert, key: joiner.tls.pem() };
        let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
        let dir = tempfile::tempdir().expect("a folder");
        let sent: Arc<Mutex<Vec<usize>>> = Arc::default();
        let outbox = || {
            let hubs = Arc::new(Hubs::new(&site.topology, &BTreeMap::new(), "db-1", tls.clone()));
            let sent = sent.clone();
            let outbox = Arc::new(Outbox::load(
                dir.path(),
                "db-1",
                Box::new(move |entries| {
                    let (hubs, sent) = (hubs.clone(), sent.clone());
                    Box::pin(async move {
                        hubs.audit(&entries).await?;
                        sent.lock().expect("no panic").push(entries.len());
                        Ok(())
                    })
                }),
            ));
            let kept = outbox.clone();
            (outbox, tokio::spawn(async move { kept.keep().await }))
        };
        let (before, task) = outbox();
        before.begin(&operator, "hub-1", "reboot");
        before.end(&operator, "hub-1", "reboot", "done");
        before.begin(&operator, "hub-1", "power-off");
        let file = dir.path().join("audit-outbox.json");
        let until = tokio::time::Instant::now() + Duration::from_secs(20);
        let is_kept =
            || std::fs::read_to_string(&file).is_ok_and(|text| text.contains("done") && text.contains("power-off"));
        while !is_kept() {
            assert!(tokio::time::Instant::now() < until, "the disk does not have the entries");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(sent.lock().expect("no panic").is_empty());
        // The machine stops, and starts again while the hubs are back.
        task.abort();
        for i in 0..3 {
            let hub = site.hub(i);
            site.hubs.push(hub);
        }
        let (_after, _task) = outbox();
        let until = tokio::time::Instant::now() + Duration::from_secs(20);
        while sent.lock().expect("no panic").is_empty() {
            assert!(tokio::time::Instant::now() < until, "no hub has got the entries");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(*sent.lock().expect("no panic"), [2]);
        let found = log(&viewer, 1, &AuditQuery::default()).await;
        assert_eq!(actions(&found), [("db-1", "reboot", "done"), ("db-1", "power-off", "begins")]);
    });
}
