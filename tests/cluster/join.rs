//! The join protocol with a real etcd on loopback: concurrent claims, lost replies, crashes of hubs and of etcd
//! members.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::site::{HUB_PORT, TestCluster, TestJoiner, ask, granted, insist, refused};
use firstboot::node::hubs::Hubs;
use firstboot::node::identity::identity;
use firstboot::node::image::{Image, ImageInfo};
use firstboot::node::renewal::{is_pending, renew};
use firstboot::node::state::StateDir;
use fleet::{Credential, Issuer, JoinReply, Joiner, PROTOCOL, Reason, Ticket, encoding};
use fleet_https::{Connection, Identity, request};
use tokio::task::JoinSet;

#[test]
fn ten_claims_for_two_slots_get_two_grants_and_eight_refusals() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 2\n");
        let token = site.token("db", |c| c.uses = 10);
        let askers: Vec<TestJoiner> = (0..10).map(|_| TestCluster::asker(&token, "db")).collect();
        let mut asked = JoinSet::new();
        for (i, asker) in askers.iter().enumerate() {
            asked.spawn(insist(site.root.certificate().to_owned(), HUB_PORT, asker.clone(), i));
        }
        let replies = asked.join_all().await;
        let slots: BTreeSet<String> = replies
            .iter()
            .filter_map(|r| match r {
                JoinReply::Granted(grant) => Some(grant.slot.clone()),
                JoinReply::Refused(_) => None,
            })
            .collect();
        assert_eq!(slots.into_iter().collect::<Vec<_>>(), ["db-1", "db-2"]);
        let full = replies.iter().filter(|r| matches!(r, JoinReply::Refused(no) if no.reason == Reason::Full)).count();
        assert_eq!(full, 8, "{replies:#?}");
    });
}

#[test]
fn hubs_enforce_claims_of_tokens_and_repeat_a_grant_for_the_same_key() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 3\napp.count = 2\n");
        let once = site.token("db", |_| {});
        let node = TestCluster::asker(&once, "db");
        let first = granted(site.insist(&node, 0).await);
        assert_eq!((first.slot.as_str(), first.epoch), ("db-1", 1));
        assert_eq!((first.secrets.odoo_admin.as_str(), first.secrets.rewind.as_str()), ("", "sample-rewind"));
        // The reply was lost: every hub repeats the grant, and no second use is spent.
        for hub in 0..3 {
            let again = granted(site.insist(&node, hub).await);
            assert_eq!((again.slot, again.epoch), (first.slot.clone(), 1));
        }
        assert_eq!(refused(site.insist(&TestCluster::asker(&once, "db"), 1).await), Reason::Spent);
        assert_eq!(
            refused(site.insist(&TestCluster::asker(&site.token("db", |c| c.expires = 1), "db"), 1).await),
            Reason::Expired
        );
        assert_eq!(
            refused(site.insist(&TestCluster::asker(&site.token("db", |_| {}), "app"), 1).await),
            Reason::OtherGroup
        );
        let foreign = Joiner::mint(&Issuer::root("acme").expect("randomness"), once.token.read().expect("claims"));
        assert_eq!(refused(site.insist(&TestCluster::asker(&foreign.expect("a root"), "db"), 1).await), Reason::Forged);
        let revoked = site.token("db", |_| {});
        let number = revoked.token.read().expect("claims").id;
        let stranger = Issuer::root("acme").expect("randomness");
        assert!(site.revoke(&number, &stranger).await.is_err(), "a foreign root revoked a token");
        site.revoke(&number, &site.root).await.expect("a hub accepts the order");
        assert!(site.tokens(&stranger).await.is_err(), "a foreign root listed tokens");
        let tokens = site.tokens(&site.root).await.expect("a hub replies");
        let used = once.token.read().expect("claims").id;
        assert_eq!((tokens.used, tokens.revoked), (BTreeMap::from([(used, 1)]), BTreeSet::from([number])));
        assert_eq!(refused(site.insist(&TestCluster::asker(&revoked, "db"), 1).await), Reason::Revoked);
        let taken = site.token("db", |c| c.slot = Some("db-1".to_owned()));
        assert_eq!(refused(site.insist(&TestCluster::asker(&taken, "db"), 2).await), Reason::Taken);

        // A replacement gets the slot. The hubs fence the previous owner, and refuse its next claim.
        let place = site.token("db", |c| (c.slot, c.replace) = (Some("db-1".to_owned()), true));
        let new = granted(site.insist(&TestCluster::asker(&place, "db"), 0).await);
        assert_eq!((new.slot.as_str(), new.epoch), ("db-1", 2));
        assert_eq!(refused(site.insist(&node, 1).await), Reason::Fenced);
        let own = Identity { cert: &first.cert, key: node.tls.pem() };
        let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let mut hub = Connection::open("127.0.0.2", HUB_PORT, "hub-2", &tls).await.expect("a hub");
            let answer = hub.ask(request("GET", "hub", "/v1/peers", &[], "".into()).expect("HTTP"), 1 << 16).await;
            let peers: fleet::Peers = serde_json::from_slice(&answer.expect("a reply")).expect("JSON");
            if peers.fenced == Some(2) {
                break;
            }
            assert!(Instant::now() < deadline, "hub-2 does not fence the old owner: {peers:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}

/// A blank machine gets a stateless slot after its owner has been silent for `reclaim_after`, and not before.
#[test]
fn blank_machine_reclaims_only_the_slot_of_a_silent_owner() {
    in_own_network(async {
        const AFTER: u64 = 3;
        let site = TestCluster::open_with("db.count = 1\napp.count = 1\n", |topology| {
            for node in topology.nodes.iter_mut().filter(|n| n.group == "app") {
                node.reclaim_after = Some(AFTER as u32);
            }
        });
        let first = TestCluster::asker(&site.token("app", |_| {}), "app");
        let owner = granted(site.insist(&first, 0).await);
        let other = TestCluster::asker(&site.token("db", |_| {}), "db");
        let database = granted(site.insist(&other, 0).await);
        let blank = |group: &str| TestCluster::asker(&site.token(group, |_| {}), group);
        let bound = TestCluster::asker(&site.token("app", |c| c.slot = Some("app-1".to_owned())), "app");
        // The owner has just joined. Then it stays in contact with one hub, and the blank machine claims from another.
        assert_eq!(refused(site.insist(&blank("app"), 1).await), Reason::Full);
        let until = Instant::now() + Duration::from_secs(2 * AFTER);
        while Instant::now() < until {
            site.member(2, (&first, &owner), ("GET", "/v1/peers"), Vec::new()).await.expect("a reply");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        assert_eq!(refused(site.insist(&blank("app"), 1).await), Reason::Full);
        // A token for this slot does not shorten the time. `Full` tells its machine to retry.
        assert_eq!(refused(site.insist(&bound, 0).await), Reason::Full);
        // The owner is silent, but the hub has no request of any other node either, so its own network may be the reason.
        tokio::time::sleep(Duration::from_secs(2 * AFTER)).await;
        assert_eq!(
            refused(ask(site.root.certificate().to_owned(), HUB_PORT, bound.clone(), 1).await.expect("a hub")),
            Reason::Full
        );
        assert_eq!(
            refused(ask(site.root.certificate().to_owned(), HUB_PORT, blank("app"), 1).await.expect("a hub")),
            Reason::Full
        );
        site.member(1, (&other, &database), ("GET", "/v1/peers"), Vec::new()).await.expect("a reply");
        let heir = granted(site.insist(&bound, 1).await);
        assert_eq!((heir.slot.as_str(), heir.epoch), ("app-1", 2));
        assert_eq!(refused(site.insist(&first, 2).await), Reason::Fenced);
        // The new owner has just joined. The slot of a silent database is never reclaimed.
        assert_eq!(refused(site.insist(&blank("app"), 0).await), Reason::Full);
        assert_eq!(database.slot, "db-1");
        assert_eq!(refused(site.insist(&blank("db"), 2).await), Reason::Full);
    });
}

/// One node leaves by the operator's order, one on its own, and one is evicted. None can rejoin, and new machines get
/// their slots.
#[test]
fn departed_nodes_free_their_slots_and_cannot_rejoin() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 3\n");
        let members = site.members("db", 3).await;
        let peers = async |i: usize, hub: usize| -> fleet::Peers {
            let (asker, grant) = &members[i];
            let answer = site.member(hub, (asker, grant), ("GET", "/v1/peers"), Vec::new()).await.expect("a reply");
            serde_json::from_slice(&answer).expect("JSON")
        };
        let hears = async |i: usize, what: &str, of: fn(&fleet::Peers) -> bool| {
            let until = Instant::now() + Duration::from_secs(10);
            while !of(&peers(i, 2).await) {
                assert!(Instant::now() < until, "{what}: {:?}", peers(i, 2).await);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let says = async |i: usize, hub: usize, path: &str| {
            let (asker, grant) = &members[i];
            site.member(hub, (asker, grant), ("POST", path), Vec::new()).await.map(drop)
        };
        let stranger = Issuer::root("acme").expect("randomness");
        assert!(site.leave("db-1", false, &stranger).await.is_err(), "a foreign root removed a node");
        let e = site.leave("db-9", false, &site.root).await.expect_err("an unknown slot");
        assert!(e.contains("the slot `db-9` has no owner"), "{e}");

        // After the order the node stays the owner until it reports that it has stopped. It may report that repeatedly.
        site.leave("db-1", false, &site.root).await.expect("a hub accepts the order");
        hears(0, "the hub does not ask it to leave", |p| p.leaving && p.fenced.is_none()).await;
        assert!(!peers(1, 2).await.leaving, "the hub asks another node to leave");
        assert_eq!(refused(site.insist(&TestCluster::asker(&site.token("db", |_| {}), "db"), 0).await), Reason::Full);
        for hub in 0..3 {
            says(0, hub, "/v1/left").await.expect("a hub accepts the order");
        }
        hears(0, "the hub does not fence it", |p| p.fenced == Some(2) && p.vacant.contains("db-1")).await;
        // One node leaves on its own, and one is evicted.
        says(1, 0, "/v1/leave").await.expect("a hub accepts the order");
        hears(1, "the hub does not ask it to leave", |p| p.leaving).await;
        says(1, 1, "/v1/left").await.expect("a hub accepts the order");
        site.leave("db-3", true, &site.root).await.expect("a hub accepts the order");
        hears(2, "the hub does not fence it", |p| p.fenced == Some(2)).await;

        for (asker, _) in &members {
            assert_eq!(refused(site.insist(asker, 1).await), Reason::Fenced);
        }
        // New machines claim a slot by name and by group, concurrently.
        let named = TestCluster::asker(&site.token("db", |c| c.slot = Some("db-2".to_owned())), "db");
        let heir = granted(site.insist(&named, 2).await);
        assert_eq!((heir.slot.as_str(), heir.epoch), ("db-2", 3));
        // The previous owner of a slot cannot make the new owner leave.
        let e = says(1, 0, "/v1/leave").await.expect_err("another owner's slot");
        assert!(e.contains("another machine has owned db-2 since epoch 3"), "{e}");
        let still = site.member(1, (&named, &heir), ("GET", "/v1/peers"), Vec::new()).await.expect("a reply");
        assert!(!serde_json::from_slice::<fleet::Peers>(&still).expect("JSON").leaving);
        let token = site.token("db", |c| c.uses = 3);
        let mut asked = JoinSet::new();
        for i in 0..3 {
            asked.spawn(insist(site.root.certificate().to_owned(), HUB_PORT, TestCluster::asker(&token, "db"), i));
        }
        let replies = asked.join_all().await;
        let mut got: Vec<String> = Vec::new();
        for reply in replies {
            match reply {
                JoinReply::Granted(grant) => got.push(format!("{} {}", grant.slot, grant.epoch)),
                JoinReply::Refused(no) => assert_eq!(no.reason, Reason::Full),
            }
        }
        got.sort_unstable();
        assert_eq!(got, ["db-1 3", "db-3 3"]);
    });
}

#[test]
fn rejects_requests_without_client_certificate() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        site.insist(&TestCluster::asker(&site.token("db", |_| {}), "db"), 0).await;
        let tls = fleet_https::client(site.root.certificate(), None).expect("a certificate");
        for (method, path, status) in [
            ("GET", "/v1/peers", "401"),
            ("POST", "/v1/introduce", "401"),
            ("GET", "/", "404"),
            ("GET", "/v1/join", "404"),
        ] {
            let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &tls).await.expect("a hub");
            let e = hub.ask(request(method, "hub", path, &[], "".into()).expect("HTTP"), 1 << 16).await.map(drop);
            let text = fleet::ErrorChain::new(&e.expect_err(path)).to_string();
            assert!(text.contains(status), "{path}: {text}");
        }
        let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &tls).await.expect("a hub");
        let long = request("POST", "hub", "/v1/join", &[], vec![b'x'; 1 << 20].into()).expect("HTTP");
        assert!(hub.ask(long, 1 << 16).await.is_err());
        // A client does not accept another hub's certificate.
        assert!(Connection::open("127.0.0.1", HUB_PORT, "hub-2", &tls).await.is_err());
    });
}

/// Nodes send claims to random hubs, disconnect early, and try again, while hubs restart and etcd members are killed or
/// frozen. No node gets two slots, no slot gets two owners, and no grant is lost.
#[test]
fn crashes_neither_grant_a_slot_twice_nor_lose_a_grant() {
    in_own_network(async {
        let mut site = TestCluster::open("app.count = 40\n");
        let token = site.token("app", |c| c.uses = 1000);
        let seed =
            u64::from_le_bytes(encoding::decode(&token.token.signature).expect("base64")[8..16].try_into().expect("8"));
        println!("seed {seed}");
        let mut chance = seed;
        let mut roll = move |n: u64| {
            // xorshift. The printed seed makes a failed run repeatable.
            chance ^= chance << 13;
            chance ^= chance >> 7;
            chance ^= chance << 17;
            chance % n
        };
        let askers: Vec<TestJoiner> = (0..60).map(|_| TestCluster::asker(&token, "app")).collect();
        let mut acknowledged: BTreeMap<usize, (String, u64)> = BTreeMap::new();
        for round in 0..12 {
            let cut_off = (round % 4 == 3).then(|| roll(3) as usize);
            match round % 4 {
                1 => {
                    let victim = roll(3) as usize;
                    site.cluster.kill(victim);
                    tokio::time::sleep(Duration::from_millis(roll(400))).await;
                    let topology = site.topology.clone();
                    site.cluster.start_member(&topology, victim);
                }
                2 => {
                    let victim = roll(3) as usize;
                    site.hubs[victim].abort();
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    site.hubs[victim] = site.hub(victim);
                }
                _ => {}
            }
            if let Some(victim) = cut_off {
                // Shorter or longer than the election timeout. A frozen leader may still consider itself the leader.
                site.cluster.freeze(victim);
                tokio::time::sleep(Duration::from_millis(roll(3000))).await;
            }
            let mut asked = JoinSet::new();
            for _ in 0..25 {
                let (who, hub, delay) = (roll(60) as usize, roll(3) as usize, roll(300));
                let (root, asker) = (site.root.certificate().to_owned(), askers[who].clone());
                asked.spawn(async move {
                    // Some clients disconnect before the reply.
                    let reply =
                        tokio::time::timeout(Duration::from_millis(20 + delay), ask(root, HUB_PORT, asker, hub));
                    (who, reply.await)
                });
            }
            for (who, reply) in asked.join_all().await {
                if let Ok(Ok(JoinReply::Granted(grant))) = reply {
                    let got = (grant.slot, grant.epoch);
                    let before = acknowledged.insert(who, got.clone());
                    assert!(before.is_none_or(|b| b == got), "{who} got another slot");
                }
            }
            if let Some(victim) = cut_off {
                site.cluster.thaw(victim);
            }
        }
        for (who, got) in &acknowledged {
            let grant = granted(site.insist(&askers[*who], 0).await);
            assert_eq!((grant.slot, grant.epoch), *got, "an acknowledged grant was lost");
        }
        let mut owners: BTreeMap<String, usize> = BTreeMap::new();
        for (who, asker) in askers.iter().enumerate() {
            if let JoinReply::Granted(grant) = site.insist(asker, who).await {
                assert_eq!(owners.insert(grant.slot.clone(), who), None, "{} has two owners", grant.slot);
            }
        }
        assert_eq!(owners.len(), 40, "slots were lost");
        println!("{} grants during the faults", acknowledged.len());
    });
}

/// A power cut after any of the agent's steps leaves the same keys, the same slot, and one use of the token.
#[test]
fn interrupted_join_resumes_with_the_same_keys_and_slot() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 3\n");
        let Bare { dir, states, credentials, image } = Bare::new(&site);
        let state = dir.path().join("state");
        let files = |keep: &[&str]| {
            for entry in fs::read_dir(&state).expect("a folder").flatten() {
                if !keep.iter().any(|k| entry.file_name() == **k) {
                    fs::remove_file(entry.path()).expect("a file");
                }
            }
        };
        let first = identity(&states, Some(&credentials), &image).await.expect("a grant");
        assert_eq!((first.state.slot.as_str(), first.state.epoch), ("db-1", 1));
        // A cut before the grant was stored, with and without the peer table, and a cut after it, each with a partial
        // `state.new`. Only without its keys is the machine another node.
        for kept in
            [&["keys.json"][..], &["keys.json", "neighbours.json"], &["keys.json", "neighbours.json", "state.json"]]
        {
            files(kept);
            fs::write(state.join("state.new"), "{\"version\":2,").expect("a folder");
            let again = identity(&states, Some(&credentials), &image).await.expect("the same grant");
            assert!(again.keys == first.keys, "other keys, with {kept:?}");
            assert_eq!((&again.state.slot, again.state.epoch), (&first.state.slot, 1));
            assert_eq!(again.state.secrets, first.state.secrets);
        }
        files(&[]);
        let e = identity(&states, Some(&credentials), &image).await.map(drop).expect_err("the token is spent");
        assert!(e.chain().contains("all uses of the token are spent"), "{e}");
        assert_eq!(e.exit_code(), 78);
    });
}

/// A node renews old keys once, also after power cuts and lost replies, and the hubs fence the old keys.
#[test]
fn renews_old_keys_once_and_fences_them() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 3\n");
        let Bare { dir, states, credentials, image } = Bare::new(&site);
        let path = |file: &str| dir.path().join("state").join(file);
        let read = |file: &str| fs::read_to_string(path(file)).expect("a file");
        let write = |file: &str, text: &str| fs::write(path(file), text).expect("a folder");
        let start = async || {
            let who = identity(&states, Some(&credentials), &image).await.expect("a node");
            renew(&states, who, &image).await.expect("a disk")
        };

        // New keys need no renewal.
        let (first, renewed) = start().await;
        assert!(!renewed && !is_pending(&states));
        let made: serde_json::Value = serde_json::from_str(&read("keys.json")).expect("JSON");
        let aged = read("keys.json").replace(&made["made"].to_string(), "1");
        write("keys.json", &aged);
        // No hub answers: the node keeps its identity, and tries again with the same new keys.
        let mut lonely = site.topology.clone();
        lonely.mesh.port = 23_999;
        let lonely = Image { topology: lonely, info: image.info.clone() };
        let who = identity(&states, Some(&credentials), &image).await.expect("a node");
        let (who, renewed) = renew(&states, who, &lonely).await.expect("a disk");
        assert!(!renewed && is_pending(&states));
        assert_eq!(who.keys.mesh_public().ok(), first.keys.mesh_public().ok());
        let begun: serde_json::Value = serde_json::from_str(&read("renewal.json")).expect("JSON");
        let old_state = read("state.json");

        let (second, renewed) = start().await;
        assert!(renewed && !is_pending(&states));
        assert_eq!((second.state.slot.as_str(), second.state.epoch), ("db-1", 2));
        assert_eq!(second.state.secrets, first.state.secrets);
        assert_eq!(begun["keys"], serde_json::from_str::<serde_json::Value>(&read("keys.json")).expect("JSON"));
        let new = ["keys.json", "state.json"].map(read);
        let granted = |with: bool| {
            let mut cut = begun.clone();
            if with {
                cut["granted"] = serde_json::json!({ "epoch": 2, "cert": second.state.cert });
            }
            cut.to_string()
        };
        // A cut before the reply was stored, after it, between the two files, and before the renewal was deleted.
        for (renewal, keys, state) in [
            (granted(false), &aged, &old_state),
            (granted(true), &aged, &old_state),
            (granted(true), &new[0], &old_state),
            (granted(true), &new[0], &new[1]),
        ] {
            write("renewal.json", &renewal);
            write("keys.json", keys);
            write("state.json", state);
            let (again, renewed) = start().await;
            assert!(renewed && !is_pending(&states) && again.keys == second.keys, "from {renewal}");
            assert_eq!((&again.state.slot, again.state.epoch), (&second.state.slot, 2));
            again.client().expect("the certificate matches the key");
        }
        let (again, renewed) = start().await;
        assert!(!renewed && again.state.epoch == 2);

        // The hubs accept the new keys and fence the old ones, with which an attacker cannot renew.
        let heard = async |who: &firstboot::node::identity::Identity| -> fleet::Peers {
            let hubs = Hubs::new(&site.topology, &BTreeMap::new(), "db-1", who.client().expect("a certificate"));
            hubs.answers().await.pop().expect("a reply").peers
        };
        let until = Instant::now() + Duration::from_secs(10);
        while heard(&first).await.fenced != Some(2) {
            assert!(Instant::now() < until, "the old keys are not fenced");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(heard(&second).await.fenced, None);
        let thief = Hubs::new(&site.topology, &BTreeMap::new(), "db-1", first.client().expect("a certificate"));
        assert_eq!(refused(thief.renew(&first.keys).await.expect("a reply")), Reason::Fenced);
        // A renewal cannot take another node's keys.
        let (other, _) = &site.members("db", 1).await[0];
        let asked = fleet::Renewal {
            version: PROTOCOL,
            mesh_key: other.mesh_key,
            tls_key: encoding::encode(other.tls.public().expect("a key").as_bytes()),
        };
        let own = Identity { cert: &second.state.cert, key: second.keys.tls.pem() };
        let tls = fleet_https::client(site.root.certificate(), Some(own)).expect("a certificate");
        let mut hub = Connection::open("127.0.0.1", HUB_PORT, "hub-1", &tls).await.expect("a hub");
        let body = serde_json::to_vec(&asked).expect("JSON");
        let answer = hub.ask(request("POST", "hub", "/v1/renew", &[], body.into()).expect("HTTP"), 1 << 16).await;
        assert_eq!(refused(serde_json::from_slice(&answer.expect("a reply")).expect("JSON")), Reason::Busy);

        // The node was evicted meanwhile: it drops the pending renewal and keeps its keys.
        site.leave("db-1", true, &site.root).await.expect("a hub accepts the order");
        write("renewal.json", &granted(false));
        let (last, renewed) = start().await;
        assert!(!renewed && !is_pending(&states) && last.keys.mesh_public().is_ok());
    });
}

/// A machine with a ticket of the group `db`, before its first claim.
struct Bare {
    dir: tempfile::TempDir,
    states: StateDir,
    credentials: PathBuf,
    image: Image,
}

impl Bare {
    fn new(site: &TestCluster) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let (state, credentials) = (dir.path().join("state"), dir.path().join("credentials"));
        for folder in [&state, &credentials] {
            fs::create_dir(folder).expect("a folder");
        }
        let ticket = Ticket {
            version: Ticket::VERSION,
            fleet: "acme".to_owned(),
            root: site.root.certificate().to_owned(),
            endpoints: BTreeMap::new(),
            right: Credential::Joiner(site.token("db", |_| {})),
        };
        fs::write(credentials.join(Ticket::CREDENTIAL), serde_json::to_vec(&ticket).expect("JSON")).expect("a folder");
        let info = ImageInfo {
            id: "acme-db".to_owned(),
            version: "1".to_owned(),
            group: "db".to_owned(),
            roles: vec!["db".to_owned()],
            health: Vec::new(),
        };
        let image = Image { info, topology: site.topology.clone() };
        Self { states: StateDir::new(&state, None), dir, credentials, image }
    }
}
