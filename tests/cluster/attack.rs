//! Attacks on the join API by clients without credentials, on loopback and with a real etcd.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bakehouse_tests::attack::{Target, endless, join_request, peers, source};
use bakehouse_tests::network::in_own_network;
use bakehouse_tests::site::{HUB_PORT, TestCluster, ask, granted, hub_address, refused};
use fleet::{JoinReply, PrivateKey, Reason};
use fleet_https::{Connection, Identity, request};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::task::JoinSet;

/// The hub limits the size of a header and the time to receive it.
#[test]
fn rejects_endless_header() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        let target = Target::new(site.root.certificate(), hub_address(1), "hub-1");
        let begun = Instant::now();
        // The hub either responds, or resets the connection while the client still sends.
        if let Ok(answer) = endless(target.handshake(source(0)).await.expect("a hub"), 64 << 10).await {
            let answer = String::from_utf8_lossy(&answer);
            assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "the hub read for {:?}", begun.elapsed());
        // A short header that never ends.
        let begun = Instant::now();
        let _ = endless(target.handshake(source(1)).await.expect("a hub"), 0).await;
        assert!(begun.elapsed() < Duration::from_secs(10), "the hub waited for {:?}", begun.elapsed());
    });
}

/// During 1,024 idle connections and 64 endless headers, members get replies within 1 s, also from an address that an
/// attacker uses, and a machine can join.
#[test]
fn members_get_replies_during_connection_flood() {
    in_own_network(async {
        let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
        setrlimit(Resource::RLIMIT_NOFILE, most.min(16_384), most).expect("a limit");
        let site = TestCluster::open("app.count = 2\n");
        let members = site.members("app", 1).await;
        let token = site.token("app", |_| {});
        let target = Target::new(site.root.certificate(), hub_address(1), "hub-1");
        let (who, grant) = &members[0];
        let own = Identity { cert: &grant.cert, key: who.tls.pem() };
        let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
        let member = Target { tls, ..target.clone() };
        // The member connects from an address before an attacker uses it too.
        let (alone, shared) = ("127.0.0.1".parse().expect("an address"), source(3));
        peers(&member, shared).await.expect("a reply");
        let mut attackers = JoinSet::new();
        for i in 0..1024 {
            attackers.spawn(target.clone().idle(source(i)));
            if i % 16 == 0 {
                attackers.spawn(target.clone().endless_header(source(i / 16), 400 << 10));
            }
            // The attackers connect over about 2 s.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for from in [alone, shared] {
            let mut took = Vec::new();
            for _ in 0..7 {
                let asked = Instant::now();
                peers(&member, from).await.expect("a reply");
                took.push(asked.elapsed());
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            took.sort();
            // Other processes on the host may delay a reply, so the limit of the slowest reply is higher.
            assert!(took[3] < Duration::from_secs(1) && took[6] < Duration::from_secs(3), "from {from}: {took:?}");
        }
        let asked = Instant::now();
        let asker = TestCluster::asker(&token, "app");
        let joined = ask(site.root.certificate().to_owned(), HUB_PORT, asker, 0).await.expect("a reply");
        assert_eq!(granted(joined).slot, "app-2");
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        assert!(target.made.load(std::sync::atomic::Ordering::Relaxed) > 1000, "too few attacks");
    });
}

/// The hub refuses spent and expired tokens without a request to etcd for each.
#[test]
fn invalid_tokens_cost_few_etcd_requests() {
    in_own_network(async {
        let site = TestCluster::open("app.count = 3\n");
        let reads = async || -> u64 {
            let node = &site.topology.hubs[0];
            let key = PrivateKey::generate().expect("randomness");
            let issuer = site.root.issuer("acme", &node.name).expect("a root");
            let cert = issuer.node(&site.topology, node, &key.public().expect("a key")).expect("an issuer");
            let own = Identity { cert: &cert, key: key.pem() };
            let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
            let mut sum = 0;
            for (host, port) in site.cluster.clients() {
                let mut etcd = Connection::open(&host, port, &host, &tls).await.expect("etcd");
                let metrics = etcd.ask(request("GET", &host, "/metrics", &[], "".into()).expect("HTTP"), 1 << 20).await;
                let metrics = String::from_utf8(metrics.expect("metrics").to_vec()).expect("text");
                let of = |line: &&str| {
                    line.starts_with("grpc_server_handled_total{") && line.contains("\"etcdserverpb.KV\"")
                };
                let counts = metrics.lines().filter(of).filter_map(|l| l.rsplit(' ').next()?.parse::<u64>().ok());
                sum += counts.sum::<u64>();
            }
            sum
        };
        let spent = site.token("app", |_| {});
        let owner = TestCluster::asker(&spent, "app");
        granted(site.insist(&owner, 0).await);
        let expired = site.token("app", |c| c.expires = 1);
        for token in [spent, expired] {
            let before = reads().await;
            // Each attacker has other keys and sends the next claim as soon as the hub has replied.
            let target = Target::new(site.root.certificate(), hub_address(1), "hub-1");
            let mut attackers = JoinSet::new();
            for i in 0..16 {
                let join = Arc::new(join_request(&TestCluster::asker(&token, "app")));
                attackers.spawn(target.clone().joins(source(i), join, Duration::from_millis(20)));
            }
            tokio::time::sleep(Duration::from_secs(3)).await;
            attackers.shutdown().await;
            let (made, asked) = (target.made.load(std::sync::atomic::Ordering::Relaxed), reads().await - before);
            assert!(made > 100, "too few attacks: {made}");
            assert!(asked < 80, "{made} joins took {asked} requests of etcd");
        }
        // The owner of a grant gets it again, although its token is spent.
        let JoinReply::Granted(_) = ask(site.root.certificate().to_owned(), HUB_PORT, owner, 0).await.expect("a reply")
        else {
            panic!("the hub refuses the slot's owner")
        };
        // Without a flood, the reply to an expired token has the reason.
        let late = TestCluster::asker(&site.token("app", |c| c.expires = 1), "app");
        assert_eq!(refused(site.insist(&late, 1).await), Reason::Expired);
    });
}
