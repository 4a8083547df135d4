//! Replay attacks on real hubs: an attacker sends signed requests again that it has read at its end of a TLS
//! connection. Hubs must refuse them on another connection, at another hub, under another path, and later.

use std::collections::BTreeMap;
use std::time::Duration;

use bakehouse_tests::network::in_own_network;
use bakehouse_tests::rogue_hub::{Captured, RogueHub};
use bakehouse_tests::site::{HUB_PORT, TestCluster, TestJoiner, departure, granted, hub_address, refused, scope};
use firstboot::client::etcd::Op;
use firstboot::node::hubs::Hubs;
use firstboot::node::image::{Image, ImageInfo};
use firstboot::node::join::join;
use firstboot::node::keys::Keys;
use fleet::{
    Departure, JoinReply, PROTOCOL, PrivateKey, Reason, Refusal, Renewal, SignedOrder, SlotRecord, TokensRequest,
    encoding,
};
use fleet_https::{Connection, request};

fn busy() -> Vec<u8> {
    let refusal = Refusal { reason: Reason::Busy, text: "later".to_owned() };
    serde_json::to_vec(&JoinReply::Refused(refusal)).expect("JSON")
}

/// Sends a recorded request to a hub over a new connection.
async fn replay(site: &TestCluster, hub: usize, captured: &Captured) -> Result<bytes::Bytes, String> {
    let tls = fleet_https::client(site.root.certificate(), None).expect("a certificate");
    let (method, path) = captured.target();
    let names = ["bakehouse-bound-signature", "bakehouse-signature"];
    let headers: Vec<(&str, String)> = names.into_iter().filter_map(|n| Some((n, captured.header(n)?))).collect();
    let headers: Vec<(&str, &str)> = headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
    let (host, name) = (format!("127.0.0.{}", hub + 1), format!("hub-{}", hub + 1));
    let sent = async {
        let mut hub = Connection::open(&host, site.topology.mesh.port, &name, &tls).await?;
        hub.ask(request(&method, "hub", &path, &headers, captured.body.clone().into())?, 1 << 20).await
    };
    sent.await.map_err(|e| fleet::ErrorChain::new(&e).to_string())
}

/// A compromised hub records a joiner's request and sends it to other hubs, before and after the joiner has its grant.
/// It must get neither the node's secrets nor a slot.
#[test]
fn rejects_join_request_replayed_on_another_connection() {
    in_own_network(async {
        let mut site = TestCluster::open("db.count = 2\n");
        site.hubs.remove(1).abort();
        let key = PrivateKey::generate().expect("randomness");
        let at = hub_address(2);
        // The hub's task releases its port when it ends.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let rogue = RogueHub::start(&site.topology, &site.root, ("hub-2", &key), at, |_| busy()).await;

        // The joiner's topology has only the attacker's hub, as if it could not reach the others.
        let joiner = site.token("db", |_| {});
        let keys = Keys::make().expect("randomness");
        let mut reach = site.topology.clone();
        reach.hubs.retain(|hub| hub.name == "hub-2");
        let tls = fleet_https::client(site.root.certificate(), None).expect("a certificate");
        let hubs = Hubs::new(&reach, &BTreeMap::new(), "", tls.clone());
        let info = ImageInfo {
            id: "acme-db".to_owned(),
            version: "1".to_owned(),
            group: "db".to_owned(),
            roles: vec!["db".to_owned()],
            health: Vec::new(),
        };
        let image = Image { info, topology: site.topology.clone() };
        let asked = join(&hubs, &joiner, &image, &keys);
        assert!(tokio::time::timeout(Duration::from_secs(2), asked).await.is_err(), "the attacker granted a slot");
        let captured =
            rogue.captured().into_iter().find(|r| r.target().1 == "/v1/join").expect("a recorded join request");
        assert!(captured.header("bakehouse-signature").is_some(), "an older hub cannot verify the request");

        let reply = |answer: bytes::Bytes| serde_json::from_slice::<JoinReply>(&answer).expect("JSON");
        assert_eq!(refused(reply(replay(&site, 0, &captured).await.expect("a reply"))), Reason::Forged);
        // The replay took no slot: the joiner gets the first one, and one use is spent.
        let mut reach = site.topology.clone();
        reach.hubs.retain(|hub| hub.name != "hub-2");
        let grant = join(&Hubs::new(&reach, &BTreeMap::new(), "", tls), &joiner, &image, &keys).await.expect("a grant");
        assert_eq!((grant.slot.as_str(), grant.secrets.postgres.as_str()), ("db-1", "sample-postgres"));
        for hub in [0, 2] {
            let JoinReply::Refused(refusal) = reply(replay(&site, hub, &captured).await.expect("a reply")) else {
                panic!("the attacker has the secrets of db-1");
            };
            assert_eq!(refusal.reason, Reason::Forged);
        }
        // The same request with only the signature that images of the previous version send, without a connection binding.
        let old = Captured { head: captured.head.replace("bakehouse-bound-signature", "x-none"), ..captured };
        let JoinReply::Refused(refusal) = reply(replay(&site, 0, &old).await.expect("a reply")) else {
            panic!("the attacker has the secrets of db-1");
        };
        assert!(refusal.text.contains("build the image again"), "{}", refusal.text);
    });
}

/// An operator's order is valid at one hub, for one path, for some minutes, once, and for the owner in it.
#[test]
fn order_is_valid_once_at_one_hub_for_one_path() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        let first = site.members("db", 1).await;
        let order = |scope_of: fn(&mut fleet::OrderScope)| {
            let mut scope = scope(Departure::PATH, "hub-1");
            scope_of(&mut scope);
            departure("db-1", true, Some(1)).with_scope(scope)
        };
        let refused = async |hub: usize, path: &str, order: &Departure, words: &[&str]| {
            let e = site.order(hub, path, order, &site.root).await.expect_err("the hub carried out the order");
            assert!(words.iter().all(|w| e.contains(w)), "{e}");
        };
        // An order of a version without scope, then orders at another hub, at another time, and under another path.
        refused(0, "/v1/leave", &departure("db-1", true, None), &["update bakehouse"]).await;
        refused(1, "/v1/leave", &order(|_| {}), &["signed for hub-1, this is hub-2"]).await;
        refused(0, "/v1/leave", &order(|s| s.issued_at -= 360), &["operator's clock", "hub-1's"]).await;
        refused(0, "/v1/leave", &order(|s| s.issued_at += 360), &["operator's clock", "hub-1's"]).await;
        refused(0, "/v1/tokens", &order(|_| {}), &["signed for /v1/leave, not for /v1/tokens"]).await;
        refused(0, "/v1/revoke", &order(|_| {}), &[]).await;

        // An attacker records the order at its end of the connection.
        let key = PrivateKey::generate().expect("randomness");
        let at = hub_address(9);
        let rogue = RogueHub::start(&site.topology, &site.root, ("hub-1", &key), at, |_| Vec::new()).await;
        let tls = fleet_https::client(site.root.certificate(), None).expect("a certificate");
        let mut connection = Connection::open("127.0.0.9", HUB_PORT, "hub-1", &tls).await.expect("a connection");
        let body = serde_json::to_vec(&order(|_| {})).expect("JSON");
        connection.post_signed(Departure::PATH, &body, |m| site.root.sign(m), 100).await.expect("a reply");
        let captured = rogue.captured().pop().expect("a recorded order");
        let e = replay(&site, 0, &captured).await.expect_err("the hub carried out the replayed order");
        assert!(e.contains("did not sign this request for this connection"), "{e}");

        // The hub carries out the order once. A second order for the old owner does not affect the slot's next owner.
        let given = order(|_| {});
        site.order(0, Departure::PATH, &given, &site.root).await.expect("a hub accepts the order");
        refused(0, "/v1/leave", &given, &["already"]).await;
        let next = granted(site.insist(&TestCluster::asker(&site.token("db", |_| {}), "db"), 0).await);
        assert_eq!((next.slot.as_str(), next.epoch), ("db-1", 3));
        refused(0, "/v1/leave", &order(|_| {}), &["another machine has owned db-1 since epoch 3"]).await;
        assert_eq!(first[0].1.epoch, 1);
        // A scoped request for the tokens succeeds.
        let asked =
            TokensRequest { version: 1, fleet: "acme".to_owned(), scope: Some(scope(TokensRequest::PATH, "hub-1")) };
        site.order(0, TokensRequest::PATH, &asked, &site.root).await.expect("a hub replies");
    });
}

/// A machine repeats its claim with a replacement's token, when an etcd voter has its peer URL already. The hub must
/// not remove this voter. A hub does not repeat a grant for a revoked token.
#[test]
fn repeated_replacement_of_a_founder_removes_no_voter() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        site.register_hubs().await;
        let etcd = site.etcd(0);
        let member = async |name: &str| {
            let members = etcd.members().await.expect("etcd answers");
            members.into_iter().find(|m| m.name == name).expect("a member")
        };
        // Adds hub-2's peer URL in the mesh, by which readmission finds a member. etcd keeps using the loopback URL.
        let place = "https://127.0.0.2:2380";
        let stands_in = async |name: &str| {
            let member = member(name).await;
            let body = serde_json::json!({ "ID": member.id, "peerURLs": [member.peer_urls[0], place] });
            site.etcd_call("/v3/cluster/member/update", &body).await;
        };
        stands_in("hub-2").await;
        let heir =
            TestCluster::asker(&site.token("hub", |c| (c.slot, c.replace) = (Some("hub-2".to_owned()), true)), "hub");
        assert_eq!(granted(site.insist(&heir, 0).await).epoch, 2);
        let members = etcd.members().await.expect("etcd answers");
        let learner = members.iter().find(|m| m.peer_urls == [place]).expect("the new machine is a learner");
        assert!(learner.is_learner && members.iter().all(|m| m.name != "hub-2"), "{members:?}");
        // The reply was lost: the same claim gives the same grant and keeps the learner.
        assert_eq!(granted(site.insist(&heir, 2).await).epoch, 2);
        assert_eq!(etcd.members().await.expect("etcd answers").len(), 3);

        // Later a voting member has that peer URL, and the machine repeats its claim at every hub.
        etcd.remove(learner).await.expect("etcd answers");
        stands_in("hub-3").await;
        let before = etcd.members().await.expect("etcd answers");
        for hub in 0..3 {
            assert_eq!(granted(site.insist(&heir, hub).await).epoch, 2);
            assert_eq!(etcd.members().await.expect("etcd answers"), before, "the hub removed a voter");
        }
        let id = heir.joiner.token.read().expect("claims").id;
        site.revoke(&id, &site.root).await.expect("a hub accepts the order");
        assert_eq!(refused(site.insist(&heir, 0).await), Reason::Revoked);
    });
}

/// Hubs limit renewals to one a day and prune old records, so a compromised member cannot fill etcd with renewals.
#[test]
fn keys_are_renewed_at_most_once_a_day() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 1\n");
        let (node, grant) = site.members("db", 1).await.remove(0);
        let renew = async |with: (&TestJoiner, &fleet::Grant), next: &TestJoiner| {
            let asked = Renewal {
                version: PROTOCOL,
                mesh_key: next.mesh_key,
                tls_key: encoding::encode(next.tls.public().expect("a key").as_bytes()),
            };
            let body = serde_json::to_vec(&asked).expect("JSON");
            let answer = site.member(0, with, ("POST", "/v1/renew"), body).await.expect("a reply");
            serde_json::from_slice::<JoinReply>(&answer).expect("JSON")
        };
        let next = TestCluster::asker(&node.joiner, "db");
        let second = granted(renew((&node, &grant), &next).await);
        assert_eq!(second.epoch, 2);
        // The reply was lost, and the node repeats the request.
        assert_eq!(granted(renew((&node, &grant), &next).await).epoch, 2);
        let third = TestCluster::asker(&node.joiner, "db");
        let JoinReply::Refused(refusal) = renew((&next, &second), &third).await else { panic!("a second renewal") };
        assert!(refusal.text.contains("can renew them again in 24 h"), "{}", refusal.text);
        let keys = async |prefix: &str| site.etcd(0).list(prefix).await.expect("etcd answers").1;
        let owners: Vec<String> = keys("/bakehouse/owners/").await.into_iter().map(|pair| pair.key).collect();
        assert_eq!(owners, [format!("/bakehouse/owners/{}", next.mesh_key)], "the old key has an owner");

        // etcd keeps the last 32 audit records of a slot.
        let mut record: SlotRecord =
            serde_json::from_slice(&keys("/bakehouse/slots/db-1").await[0].value).expect("a record");
        record.epoch = 60;
        let value = serde_json::to_vec(&record).expect("JSON");
        let audits: Vec<String> = (29..=60).map(|epoch| format!("/bakehouse/audit/db-1/{epoch:08}")).collect();
        let mut then = vec![Op::Put("/bakehouse/slots/db-1", &value)];
        then.extend(audits.iter().map(|key| Op::Put(key, b"{}")));
        assert!(site.etcd(0).transact(&[], &then).await.expect("etcd answers"));
        site.leave("db-1", true, &site.root).await.expect("a hub accepts the order");
        let heir = TestCluster::asker(&site.token("db", |_| {}), "db");
        assert_eq!(granted(site.insist(&heir, 0).await).epoch, 62);
        let kept = keys("/bakehouse/audit/db-1/").await;
        let numbers: Vec<&str> = kept.iter().filter_map(|pair| pair.key.rsplit('/').next()).collect();
        assert_eq!((numbers.iter().filter(|n| **n >= "00000029").count(), numbers.last()), (32, Some(&"00000062")));
    });
}

/// The clock of a hub without a battery starts in the past, and the hub would accept an expired token. The times in the
/// records of two hubs are a lower bound of the time. The record of one hub is not, because that hub's clock may be
/// wrong.
#[test]
fn hub_with_slow_clock_rejects_expired_token() {
    in_own_network(async {
        let site = TestCluster::open("db.count = 3\n");
        site.register_hubs().await;
        let now = scope("/", "hub-1").issued_at;
        let asks = async |change: fn(&mut fleet::Claims, u64)| {
            let token = site.token("db", |claims| change(claims, now));
            site.insist(&TestCluster::asker(&token, "db"), 0).await
        };
        // Gives a hub's record a time 3 h in the future.
        let later = async |hub: usize| {
            let name = format!("hub-{}", hub + 1);
            let key = format!("/bakehouse/slots/{name}");
            let found = site.etcd(0).get(&[&key]).await.expect("etcd answers");
            let mut record: SlotRecord = serde_json::from_slice(&found[0].value).expect("a record");
            (record.by, record.at) = (name.clone(), now + 10_800);
            let value = serde_json::to_vec(&record).expect("JSON");
            assert!(site.etcd(0).transact(&[], &[Op::Put(&key, &value)]).await.expect("etcd answers"));
            let heard = || {
                let text = std::fs::read_to_string(site.state(0).join("slots.json")).unwrap_or_default();
                let slots: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
                slots["slots"][&name]["at"] == now + 10_800
            };
            while !heard() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        later(0).await;
        assert_eq!(granted(asks(|c, now| c.expires = now + 3600).await).slot, "db-1");
        later(1).await;
        assert_eq!(refused(asks(|c, now| c.expires = now + 3600).await), Reason::Expired);
        assert_eq!(granted(asks(|c, now| c.expires = now + 14_400).await).slot, "db-2");

        // A damaged counter of uses must not count as zero.
        let token = site.token("db", |_| {});
        let key = format!("/bakehouse/tokens/{}", token.token.read().expect("claims").id);
        assert!(site.etcd(0).transact(&[], &[Op::Put(&key, b"?")]).await.expect("etcd answers"));
        assert_eq!(refused(site.insist(&TestCluster::asker(&token, "db"), 0).await), Reason::Spent);
    });
}
