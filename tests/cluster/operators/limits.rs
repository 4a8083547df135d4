//! Limits of operators at hubs, nodes that do not answer, and the fleet's lock.

use std::net::SocketAddr;
use std::time::Instant;

use fleet::UpdateDecision;
use fleet_https::{ByteStream, CONNECTIONS_PER_HUB, Obstacle, PeerError};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpSocket, TcpStream};

use super::*;

/// Adds a node's address to this machine.
fn add_address(site: &TestCluster, node: &str) -> SocketAddr {
    let address = site.topology.node(node).expect("a node").address;
    let added = Command::new("ip").args(["addr", "add", &format!("{address}/32"), "dev", "lo"]).status();
    assert!(added.expect("ip").success());
    (address, NODE_API_PORT).into()
}

/// Opens a connection to a node's API through a hub, without the TLS session inside.
async fn tunnel(operator: &TestOperator, hub: u8, node: &str) -> Result<ByteStream, Error> {
    let (host, name) = (format!("127.0.0.{hub}"), format!("hub-{hub}"));
    let hub = Connection::open(&host, HUB_PORT, &name, &operator.tls).await?;
    hub.stream(&format!("{node}:{NODE_API_PORT}")).await
}

/// Returns whether a connection ends within 10 s.
async fn ends(stream: &mut ByteStream) -> bool {
    // The hub closes a connection without an end of its TLS session.
    timeout(Duration::from_secs(10), stream.read(&mut [0; 1])).await.is_ok_and(|read| read.map_or(true, |n| n == 0))
}

/// Lets this process have as many open files as a hub's agent.
fn allow_open_files() {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(4096)), hard).expect("a limit");
}

#[test]
fn neither_one_operator_nor_several_exhaust_a_hub() {
    allow_open_files();
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let listener = TcpListener::bind(add_address(&site, "db-1")).await.expect("a port");
        // A node that accepts connections, and is silent.
        let node = tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                held.push(stream);
            }
        });
        let viewers: Vec<TestOperator> = ["anna", "ben", "carl", "dora"]
            .iter()
            .map(|name| TestOperator::new(&site, name, OperatorRole::Viewer))
            .collect();
        let mut open: Vec<Vec<ByteStream>> = Vec::new();
        for viewer in &viewers[..3] {
            let mut own = Vec::new();
            for _ in 0..CONNECTIONS_PER_HUB {
                own.push(tunnel(viewer, 1, "db-1").await.expect("a connection"));
            }
            let text = refused(tunnel(viewer, 1, "db-1").await.map(drop), "one more than the limit");
            assert!(text.contains("429") && text.contains("too many connections"), "{text}");
            open.push(own);
        }
        // The viewers have all their places at this hub. A further one takes a place of the one with the most.
        let mut dora = tunnel(&viewers[3], 1, "db-1").await.expect("a connection");
        let mut oldest = open.iter_mut().map(|own| &mut own[0]);
        let (first, second, third) =
            (oldest.next().expect("one"), oldest.next().expect("one"), oldest.next().expect("one"));
        assert!(tokio::select! {
            ended = ends(first) => ended,
            ended = ends(second) => ended,
            ended = ends(third) => ended,
        });
        // Operators with other roles have places of their own, and displace no one.
        let admin = TestOperator::new(&site, "root", OperatorRole::Admin);
        let _admins =
            [tunnel(&admin, 1, "db-1").await.expect("a place"), tunnel(&admin, 1, "db-1").await.expect("one")];
        assert!(timeout(Duration::from_millis(200), dora.read(&mut [0; 1])).await.is_err(), "the hub closed it");
        // The other hubs count for themselves.
        tunnel(&viewers[0], 2, "db-1").await.expect("a connection");
        drop(open);
        let deadline = Instant::now() + Duration::from_secs(10);
        while tunnel(&viewers[0], 1, "db-1").await.is_err() {
            assert!(Instant::now() < deadline, "closed connections keep their places");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        node.abort();
    });
}

/// One operator's `status` of a large fleet while two of three hubs are down.
#[test]
fn one_hub_carries_a_thousand_connections_of_one_operator() {
    allow_open_files();
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        let listener = TcpListener::bind(add_address(&site, "db-1")).await.expect("a port");
        let node = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move { stream.write_all(b"reply").await });
            }
        });
        let viewer = Arc::new(TestOperator::new(&site, "anna", OperatorRole::Viewer));
        let places = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS_PER_HUB));
        let begun = Instant::now();
        let connections: Vec<_> = (0..1000)
            .map(|_| {
                let (viewer, places) = (viewer.clone(), places.clone());
                tokio::spawn(async move {
                    let _place = places.acquire().await.expect("an open semaphore");
                    // The hub counts a connection until it has read its end.
                    let mut busy = 0;
                    loop {
                        match tunnel(&viewer, 1, "db-1").await {
                            Ok(mut stream) => break stream.read_exact(&mut [0; 5]).await.map(|_| busy),
                            Err(Error::Network { source: PeerError::Status { status, .. }, .. }) if status == 429 => {
                                busy += 1;
                                tokio::time::sleep(Duration::from_millis(50)).await;
                            }
                            Err(e) => panic!("{e:?}"),
                        }
                    }
                })
            })
            .collect();
        let mut busy = 0;
        for connection in connections {
            busy += connection.await.expect("a task").expect("a reply");
        }
        let took = begun.elapsed();
        println!("1000 connections through one hub took {took:?}; it refused {busy} at its limit");
        // The hub, its two ends and the clients share the machine's processors with other tests.
        assert!(took < Duration::from_secs(20), "{took:?}");
        node.abort();
    });
}

#[test]
fn requests_of_an_operator_that_go_to_no_node_have_a_rate() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &viewer.tls).await.expect("a hub");
        // The burst has 20 requests, and 5 follow in each second.
        let begun = Instant::now();
        for i in 0..30 {
            ask(&mut hub, "GET", "/v1/operators/revoked", "").await.unwrap_or_else(|e| panic!("request {i}: {e:?}"));
        }
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(1500), "{took:?}");
        // Several connections share the rate.
        let asked = (0..40).map(|_| async {
            let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &viewer.tls).await.expect("a hub");
            ask(&mut hub, "GET", "/v1/operators/revoked", "").await
        });
        let replies = futures_util::future::join_all(asked).await;
        let is_busy = |reply: &&Result<_, Error>| matches!(reply, Err(Error::Network { source: PeerError::Status { status, .. }, .. }) if *status == 429);
        let busy = replies.iter().filter(is_busy).count();
        assert!(busy >= 30 && replies.iter().all(|reply| reply.is_ok() || is_busy(&reply)), "{busy}");
        // More bytes than a request needs end the connection.
        let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &viewer.tls).await.expect("a hub");
        let long = "x".repeat(2 << 20);
        refused(ask(&mut hub, "POST", "/v1/join", &long).await, "2 MiB");
    });
}

#[test]
fn hub_names_the_node_that_does_not_answer() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        // The kernel drops the SYN of a further connection while this queue is full, as the packet filter of a node
        // without the node API drops it.
        let socket = TcpSocket::new_v4().expect("a socket");
        let at = add_address(&site, "db-1");
        socket.bind(at).expect("a port");
        let _listener = socket.listen(1).expect("a port");
        let mut queued = Vec::new();
        while let Ok(Ok(stream)) = timeout(Duration::from_millis(500), TcpStream::connect(at)).await {
            queued.push(stream);
        }
        let viewer = TestOperator::new(&site, "anna", OperatorRole::Viewer);
        let connect = async |node: &'static str| {
            let (begun, limit) = (Instant::now(), Duration::from_secs(3));
            let through = Connection::through_hub(("127.0.0.1", HUB_PORT), "hub-1", &viewer.tls, node, limit).await;
            let failed = through.map(drop).expect_err("no node");
            (failed.obstacle, fleet::ErrorChain::new(&failed).to_string(), begun.elapsed())
        };
        let (obstacle, text, took) = connect("db-1").await;
        assert_eq!(obstacle, Obstacle::Node, "{text}");
        assert!(text.contains("504") && text.contains("db-1 does not answer within 1.5 s"), "{text}");
        assert!(text.contains("version without the node API") && took < Duration::from_millis(2500), "{took:?} {text}");
        // A node that refuses the connection, and one that the fleet does not have.
        add_address(&site, "db-2");
        let (obstacle, text, _) = connect("db-2").await;
        assert_eq!(obstacle, Obstacle::Node, "{text}");
        assert!(text.contains("502") && text.contains("db-2 does not accept"), "{text}");
        let (obstacle, text, _) = connect("db-9").await;
        assert_eq!(obstacle, Obstacle::Version, "{text}");
        assert!(text.contains("404") && text.contains("no such node"), "{text}");
    });
}

#[test]
fn only_one_node_at_a_time_has_the_lock() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let members = site.members("db", 2).await;
        let clients: Vec<Arc<ClientConfig>> = members
            .iter()
            .map(|(joiner, grant)| {
                let own = Identity { cert: &grant.cert, key: joiner.tls.pem() };
                fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate")
            })
            .collect();
        let lock = async |node: usize, hub: u8, seconds: u32| -> UpdateDecision {
            let (host, name) = (format!("127.0.0.{hub}"), format!("hub-{hub}"));
            let mut hub = Connection::open(&host, HUB_PORT, &name, &clients[node]).await.expect("a hub");
            let reply = ask(&mut hub, "POST", LOCK_PATH, &format!("{{\"seconds\":{seconds}}}")).await.expect("a reply");
            serde_json::from_slice(&reply).expect("JSON")
        };
        assert!(lock(0, 1, 600).await.granted);
        let other = lock(1, 2, 600).await;
        let first = &members[0].1.slot;
        assert!(!other.granted && other.why.contains(first.as_str()), "{}", other.why);
        // Hubs of earlier versions go by the pause.
        let etcd = site.etcd(0);
        let paused = async || etcd.get(&["/bakehouse/rollout/paused"]).await.expect("etcd answers")[0].value.clone();
        assert!(String::from_utf8_lossy(&paused().await).starts_with(first.as_str()));
        // The owner takes it again, and another node does not free it.
        assert!(lock(0, 3, 600).await.granted && lock(1, 1, 0).await.granted);
        assert!(!lock(1, 2, 600).await.granted);
        assert!(lock(0, 2, 0).await.granted && paused().await.is_empty());
        assert!(lock(1, 3, 2).await.granted);
        // The lease ends, also if the node does not come back.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !lock(0, 1, 600).await.granted {
            assert!(Instant::now() < deadline, "the lease does not end");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
}

/// A hostile member takes the lock again and again.
#[test]
fn a_node_cannot_keep_the_lock_from_another_one() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let members = site.members("db", 2).await;
        let [hostile, other] = [0, 1].map(|i: usize| (&members[i].0, &members[i].1));
        let lock = async |member: (&TestJoiner, &Grant), hub: usize, seconds: u32| -> UpdateDecision {
            let body = format!("{{\"seconds\":{seconds}}}").into_bytes();
            let reply = site.member(hub, member, ("POST", LOCK_PATH), body).await.expect("a reply");
            serde_json::from_slice(&reply).expect("JSON")
        };
        assert!(lock(hostile, 0, 5).await.granted);
        // No other node waits, so the node may lengthen its time.
        assert!(lock(hostile, 1, 900).await.granted);
        assert!(!lock(other, 2, 600).await.granted);
        tokio::time::sleep(Duration::from_secs(4)).await;
        let longer = lock(hostile, 0, 900).await;
        assert!(!longer.granted && longer.why.contains(&format!("{} waits", other.1.slot)), "{longer:?}");
        // It frees the lock, and cannot take it before the other node.
        assert!(lock(hostile, 1, 0).await.granted);
        let again = lock(hostile, 2, 600).await;
        assert!(!again.granted && again.why.contains("waits for the fleet's lock"), "{again:?}");
        assert!(lock(other, 0, 600).await.granted && lock(other, 1, 0).await.granted);
        // The other node does not wait any more.
        assert!(lock(hostile, 2, 600).await.granted);
        // The hub refuses many requests of one member, and other members do not notice.
        let mut refused = 0;
        for _ in 0..10 {
            let ask = |_| site.member(0, hostile, ("POST", LOCK_PATH), b"{}".to_vec());
            let replies = futures_util::future::join_all((0..8).map(ask)).await;
            refused += replies.iter().filter(|reply| reply.as_ref().is_err_and(|e| e.contains("429"))).count();
        }
        assert!(refused > 5, "the hub refused {refused} of 80 requests");
        assert!(lock(other, 0, 600).await.granted);
    });
}
