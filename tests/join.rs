//! The join protocol against a real etcd on loopback: claims from many nodes at once, lost
//! replies, crashes of hubs and of etcd's members.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bakehouse_tests::Cluster;
use firstboot::etcd::Etcd;
use firstboot::https::{self, Connection, Identity, request};
use firstboot::hub::api::{Hub, serve};
use firstboot::hub::claims::ClaimsDesk;
use firstboot::neighbours::Neighbourhood;
use fleet::{
    Claims, Fleet, Grant, Issuer, JoinReply, JoinRequest, Joiner, MeshKey, PROTOCOL, PrivateKey, Reason,
    SIGNATURE_HEADER, Secrets, Topology, encoding,
};
use tokio::task::JoinSet;

/// Three hubs at 127.0.0.1 to 127.0.0.3, and an etcd of three members.
struct Site {
    topology: Topology,
    root: Issuer,
    cluster: Cluster,
    dir: tempfile::TempDir,
    hubs: Vec<tokio::task::JoinHandle<()>>,
}

/// One who asks: its keys, and its right.
#[derive(Clone)]
struct Asker {
    joiner: Joiner,
    tls: PrivateKey,
    mesh_key: MeshKey,
    group: String,
}

impl Site {
    fn open(port: u16, groups: &str) -> Self {
        let toml = format!(
            "name = \"acme\"\n[mesh]\nsubnet = \"10.10.0.0/16\"\ntransport = \"10.11.0.0/16\"\nport = {port}\n\
             [vip]\naddress = \"10.10.0.100\"\n\
             [groups]\n{groups}\n[groups.hub]\ncount = 3\nendpoints = [\"127.0.0.1\", \"127.0.0.2\", \"127.0.0.3\"]\n"
        );
        let topology = Topology::of(&Fleet::parse("fleet.toml", toml.as_bytes()).expect("a fleet"));
        let root = Issuer::root("acme").expect("randomness");
        let cluster = Cluster::start(&topology, &root, port + 100);
        let dir = tempfile::tempdir().expect("a folder");
        let mut site = Self { topology, root, cluster, dir, hubs: Vec::new() };
        for i in 0..3 {
            let hub = site.hub(i);
            site.hubs.push(hub);
        }
        site
    }

    /// Starts the API of one hub, as a new process would be: it remembers nothing.
    fn hub(&self, i: usize) -> tokio::task::JoinHandle<()> {
        let node = self.topology.hubs[i].clone();
        let issuer = self.root.issuer("acme", &node.name).expect("a root");
        let key = PrivateKey::generate().expect("randomness");
        let cert = issuer.node(&self.topology, &node, &key.public().expect("a key")).expect("an issuer");
        let own = Identity { cert: &cert, key: key.pem() };
        let mut members = self.cluster.clients();
        members.rotate_left(i);
        let etcd = Etcd::new(members, https::client(self.root.certificate(), Some(own)).expect("a certificate"));
        let desk = Arc::new(ClaimsDesk::new(etcd, self.topology.clone(), &node.name));
        let dir = self.dir.path().join(&node.name);
        std::fs::create_dir_all(&dir).expect("a folder");
        let hub = Arc::new(Hub {
            topology: self.topology.clone(),
            root: self.root.certificate().to_owned(),
            issuer,
            secrets: Secrets::sample(),
            desk: desk.clone(),
            neighbourhood: Arc::new(Neighbourhood::load(&dir, BTreeMap::new())),
        });
        let at: SocketAddr = format!("127.0.0.{}:{}", i + 1, self.topology.mesh.port).parse().expect("an address");
        let tls = https::server(self.root.certificate(), own).expect("a certificate");
        tokio::spawn(async move {
            let followed = async {
                loop {
                    let _ = desk.follow(async |_| {}).await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            tokio::select! {
                served = serve(hub, at, tls) => served.expect("the port is free"),
                () = followed => {}
            }
        })
    }

    fn token(&self, group: &str, change: impl FnOnce(&mut Claims)) -> Joiner {
        let mut claims = Claims {
            fleet: "acme".to_owned(),
            id: encoding::encode(PrivateKey::generate().expect("randomness").public().expect("a key").as_bytes()),
            group: group.to_owned(),
            slot: None,
            replace: false,
            uses: 1,
            expires: u64::MAX,
            key: String::new(),
        };
        change(&mut claims);
        Joiner::mint(&self.root, claims).expect("a root")
    }

    fn asker(joiner: &Joiner, group: &str) -> Asker {
        let tls = PrivateKey::generate().expect("randomness");
        let mesh_key = MeshKey(tls.public().expect("a key").as_bytes()[1..33].try_into().expect("32 bytes"));
        Asker { joiner: joiner.clone(), tls, mesh_key, group: group.to_owned() }
    }

    /// Asks until somebody answers with more than "later".
    async fn insist(&self, asker: &Asker, first: usize) -> JoinReply {
        insist(self.root.certificate().to_owned(), self.topology.mesh.port, asker.clone(), first).await
    }
}

async fn ask(root: String, port: u16, asker: Asker, hub: usize) -> firstboot::error::Result<JoinReply> {
    let asked = JoinRequest {
        version: PROTOCOL,
        token: asker.joiner.token.clone(),
        group: asker.group.clone(),
        image: "1".to_owned(),
        mesh_key: asker.mesh_key,
        tls_key: encoding::encode(asker.tls.public().expect("a key").as_bytes()),
    };
    let body = serde_json::to_vec(&asked).expect("JSON");
    let signature = encoding::encode(&asker.joiner.key.sign(&body).expect("a key"));
    let host = format!("127.0.0.{}", hub + 1);
    let tls = https::client(&root, None).expect("a certificate");
    let mut connection = Connection::open(&host, port, &format!("hub-{}", hub + 1), &tls).await?;
    let asked = request("POST", &host, "/v1/join", &[(SIGNATURE_HEADER, &signature)], body.into())?;
    let answer = connection.ask(asked, fleet::LONGEST).await?;
    Ok(serde_json::from_slice(&answer).expect("an answer"))
}

async fn insist(root: String, port: u16, asker: Asker, first: usize) -> JoinReply {
    for attempt in 0..400 {
        match ask(root.clone(), port, asker.clone(), (first + attempt) % 3).await {
            Ok(JoinReply::Refused(no)) if no.reason == Reason::Busy => {}
            Ok(reply) => return reply,
            Err(_) => {}
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nobody answers for {}", asker.mesh_key);
}

fn granted(reply: JoinReply) -> Grant {
    match reply {
        JoinReply::Granted(grant) => grant,
        JoinReply::Refused(no) => panic!("refused: {no:?}"),
    }
}

fn refused(reply: JoinReply) -> Reason {
    match reply {
        JoinReply::Granted(grant) => panic!("granted {}", grant.slot),
        JoinReply::Refused(no) => no.reason,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_nodes_for_two_slots_get_two_grants_and_eight_refusals() {
    let site = Site::open(21_000, "db.count = 2\n");
    let token = site.token("db", |c| c.uses = 10);
    let askers: Vec<Asker> = (0..10).map(|_| Site::asker(&token, "db")).collect();
    let mut asked = JoinSet::new();
    for (i, asker) in askers.iter().enumerate() {
        asked.spawn(insist(site.root.certificate().to_owned(), 21_000, asker.clone(), i));
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
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_good_for_what_it_says_and_the_same_key_gets_the_same_grant() {
    let site = Site::open(21_300, "db.count = 3\napp.count = 2\n");
    let once = site.token("db", |_| {});
    let node = Site::asker(&once, "db");
    let first = granted(site.insist(&node, 0).await);
    assert_eq!((first.slot.as_str(), first.epoch), ("db-1", 1));
    assert_eq!((first.secrets.odoo_admin.as_str(), first.secrets.rewind.as_str()), ("", "sample-rewind"));
    // The reply was lost: asked again, of every hub, the same; nothing is spent twice.
    for hub in 0..3 {
        let again = granted(site.insist(&node, hub).await);
        assert_eq!((again.slot, again.epoch), (first.slot.clone(), 1));
    }
    assert_eq!(refused(site.insist(&Site::asker(&once, "db"), 1).await), Reason::Spent);
    assert_eq!(
        refused(site.insist(&Site::asker(&site.token("db", |c| c.expires = 1), "db"), 1).await),
        Reason::Expired
    );
    assert_eq!(refused(site.insist(&Site::asker(&site.token("db", |_| {}), "app"), 1).await), Reason::OtherGroup);
    let foreign = Joiner::mint(&Issuer::root("acme").expect("randomness"), once.token.read().expect("claims"));
    assert_eq!(refused(site.insist(&Site::asker(&foreign.expect("a root"), "db"), 1).await), Reason::Forged);
    let taken = site.token("db", |c| c.slot = Some("db-1".to_owned()));
    assert_eq!(refused(site.insist(&Site::asker(&taken, "db"), 2).await), Reason::Taken);

    // Replaced: the new machine has the slot, the old one is told, and can't come back.
    let place = site.token("db", |c| (c.slot, c.replace) = (Some("db-1".to_owned()), true));
    let new = granted(site.insist(&Site::asker(&place, "db"), 0).await);
    assert_eq!((new.slot.as_str(), new.epoch), ("db-1", 2));
    assert_eq!(refused(site.insist(&node, 1).await), Reason::Fenced);
    let own = Identity { cert: &first.cert, key: node.tls.pem() };
    let tls = https::client(site.root.certificate(), Some(own)).expect("a certificate");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut hub = Connection::open("127.0.0.2", 21_300, "hub-2", &tls).await.expect("a hub");
        let answer = hub.ask(request("GET", "hub", "/v1/peers", &[], "".into()).expect("HTTP"), 1 << 16).await;
        let peers: fleet::Peers = serde_json::from_slice(&answer.expect("an answer")).expect("JSON");
        if peers.fenced == Some(2) {
            break;
        }
        assert!(Instant::now() < deadline, "hub-2 does not hear of it: {peers:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_certificate_is_told_nothing() {
    let site = Site::open(21_600, "db.count = 1\n");
    site.insist(&Site::asker(&site.token("db", |_| {}), "db"), 0).await;
    let tls = https::client(site.root.certificate(), None).expect("a certificate");
    for (method, path, status) in
        [("GET", "/v1/peers", "401"), ("POST", "/v1/introduce", "401"), ("GET", "/", "404"), ("GET", "/v1/join", "404")]
    {
        let mut hub = Connection::open("127.0.0.1", 21_600, "hub-1", &tls).await.expect("a hub");
        let e = hub.ask(request(method, "hub", path, &[], "".into()).expect("HTTP"), 1 << 16).await.map(drop);
        assert!(e.expect_err(path).to_string().contains(status), "{path}");
    }
    let mut hub = Connection::open("127.0.0.1", 21_600, "hub-1", &tls).await.expect("a hub");
    let long = request("POST", "hub", "/v1/join", &[], vec![b'x'; 1 << 20].into()).expect("HTTP");
    assert!(hub.ask(long, 1 << 16).await.is_err());
    // Whoever answers in a hub's place is not believed.
    assert!(Connection::open("127.0.0.1", 21_600, "hub-2", &tls).await.is_err());
}

/// Nodes that ask hubs of chance, break off half-way, ask again; hubs that forget everything;
/// members of etcd that are killed. Nobody gets two slots, no slot two owners, and what was
/// acknowledged once stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crashes_give_no_slot_twice_and_lose_no_grant() {
    let mut site = Site::open(22_000, "app.count = 40\n");
    let token = site.token("app", |c| c.uses = 1000);
    let seed =
        u64::from_le_bytes(encoding::decode(&token.token.signature).expect("base64")[8..16].try_into().expect("8"));
    println!("seed {seed}");
    let mut chance = seed;
    let mut roll = move |n: u64| {
        // xorshift: any sequence will do, as long as it can be told.
        chance ^= chance << 13;
        chance ^= chance >> 7;
        chance ^= chance << 17;
        chance % n
    };
    let askers: Vec<Asker> = (0..60).map(|_| Site::asker(&token, "app")).collect();
    let mut acknowledged: BTreeMap<usize, (String, u64)> = BTreeMap::new();
    for round in 0..12 {
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
        let mut asked = JoinSet::new();
        for _ in 0..25 {
            let (who, hub, patience) = (roll(60) as usize, roll(3) as usize, roll(300));
            let (root, asker) = (site.root.certificate().to_owned(), askers[who].clone());
            asked.spawn(async move {
                // Some don't wait for their answer.
                let reply = tokio::time::timeout(Duration::from_millis(20 + patience), ask(root, 22_000, asker, hub));
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
    println!("{} acknowledged while it broke", acknowledged.len());
}
