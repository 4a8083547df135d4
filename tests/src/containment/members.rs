//! Attacks on the hubs' API and its records in etcd: replace another node's mesh key, deny a version, take a slot, read
//! secrets.

use std::thread::sleep;
use std::time::Duration;

use fleet::{
    BOUND_SIGNATURE_HEADER, Claims, Grant, Introduction, Issuer, JoinReply, JoinRequest, Joiner, MeshKey, PROTOCOL,
    PrivateKey, Renewal, Report, SIGNATURE_HEADER, SlotRecord, UpdateState, bound_message, encoding,
};
use fleet_https::Connection;
use serde::Serialize;
use tokio::time::timeout;

use super::foothold::{Door, Foothold, TIMEOUT, doors};
use super::{Arena, Finding, Place, etcd};

/// Group with free slots.
pub const GROUP: &str = "app";
/// Slot of that group that no machine of the test takes.
const FREE_SLOT: &str = "app-6";
const SLOTS: &str = "/bakehouse/slots/";
const REPORTS: &str = "/bakehouse/rollout/nodes/";
const DENIED: &str = "/bakehouse/rollout/denied/";

/// A join request, as the other end of the TLS connection reads it.
#[derive(Clone, Debug, Default)]
pub struct Captured {
    /// Names and values of the headers.
    pub headers: Vec<(String, String)>,
    /// The body, which the signature covers.
    pub body: Vec<u8>,
}

/// Returns reachable addresses of the other hubs' API.
async fn hubs(arena: &Arena, from: &Foothold) -> Vec<Door> {
    let others = arena.topology.hubs.iter().filter(|h| from.node.as_ref().is_none_or(|n| n.name != h.name));
    from.reachable(doors(arena, others, arena.topology.mesh.port)).await
}

/// Tries to replace another node's mesh key.
pub(super) fn change_mesh_key(arena: &Arena, from: &Foothold) -> Finding {
    let key = MeshKey([from.place as u8 + 1; 32]);
    let tls_key = encoding::encode(PrivateKey::generate().and_then(|k| k.public()).expect("randomness").as_bytes());
    // Each request that carries a mesh key, with every certificate of another node.
    let mut last = from.run(|| async {
        let mut last = "no certificate of another node".to_owned();
        for door in hubs(arena, from).await {
            for shown in from.credentials.iter().filter(|c| c.name != door.name) {
                let said = Introduction { version: PROTOCOL, mesh_key: key, epoch: 99 };
                let asked = Renewal { version: PROTOCOL, mesh_key: key, tls_key: tls_key.clone() };
                if from.node.as_ref().is_none_or(|n| n.name != shown.name) {
                    for (path, body) in [("/v1/introduce", json(&said)), ("/v1/renew", json(&asked))] {
                        let answer = from.ask(&door, Some(shown), ("POST", path), &[], body).await;
                        last = format!("{path} as {}: {}", shown.name, answered(answer));
                    }
                }
            }
        }
        last
    });
    if let Some(how) = took_key(arena, from, key) {
        return Finding::yes(how);
    }
    // Hubs read mesh keys from this record. The attack changes only its `by`, so that the fleet keeps working.
    let slot = format!("{SLOTS}watch-1");
    let mut record: SlotRecord = serde_json::from_str(&arena.get(&slot)).expect("a record");
    "the attacker".clone_into(&mut record.by);
    match etcd::put(arena, from, &slot, &serde_json::to_string(&record).expect("JSON")) {
        Ok(how) => return Finding::yes(format!("{slot} by {how}")),
        Err(e) => last = format!("{last}; etcd: {e}"),
    }
    Finding::no(last)
}

/// Searches the peer tables of all other nodes for this key, for about 2 s.
fn took_key(arena: &Arena, from: &Foothold, key: MeshKey) -> Option<String> {
    for _ in 0..4 {
        for (name, machine) in &arena.machines {
            if from.node.as_ref().is_some_and(|n| n.name == *name) {
                continue;
            }
            let found = machine.exec(&format!("grep -F '{key}' /var/lib/bakehouse/neighbours.json"));
            if found.status == 0 {
                return Some(format!("{name} has the attacker's key: {}", found.output.trim()));
            }
        }
        sleep(Duration::from_millis(400));
    }
    None
}

/// Tries to deny a version.
pub(super) fn deny_version(arena: &Arena, from: &Foothold) -> Finding {
    let version = format!("9.{}", from.place as u8);
    let key = format!("{DENIED}{version}");
    let report = |doing| json(&Report { version: PROTOCOL, image: "1".to_owned(), doing });
    let wants = UpdateState::Available { image: version.clone(), leads: false, primary: false, unwell: true };
    let reports = [report(wants), report(UpdateState::RolledBack { from: version.clone() })];
    // All other nodes have reported that they serve, so only the rollout's rules can refuse the attacker's reports.
    let serving = String::from_utf8(report(UpdateState::Serving)).expect("JSON");
    for slot in arena.keys(SLOTS) {
        arena.put(&format!("{REPORTS}{slot}"), &serving);
    }
    let last = from.run(|| async {
        let mut last = "no hub is reachable".to_owned();
        for door in hubs(arena, from).await {
            for shown in from.shown() {
                for body in &reports {
                    let answer = from.ask(&door, shown, ("POST", "/v1/turn"), &[], body.clone()).await;
                    last = format!("/v1/turn of {}: {}", door.name, answered(answer));
                }
            }
        }
        last
    });
    let denied = || !arena.get(&key).is_empty();
    let finding = if denied() {
        Finding::yes(format!("two reports at /v1/turn: {}", arena.get(&key)))
    } else {
        match etcd::put(arena, from, &key, "denied by the attacker") {
            Ok(how) => Finding::yes(format!("{key} by {how}")),
            Err(e) => Finding::no(format!("{last}; etcd: {e}")),
        }
    };
    for key in [&key, "/bakehouse/rollout/turn", "/bakehouse/rollout/held"] {
        arena.delete(key);
    }
    for slot in arena.keys(SLOTS) {
        arena.delete(&format!("{REPORTS}{slot}"));
    }
    finding
}

/// Tries to get a slot for another machine.
pub(super) fn take_slot(arena: &Arena, from: &Foothold) -> Finding {
    let mut last = String::new();
    // A token signed with the node's issuer or with the attacker's own root, and tickets used for another group.
    let own_root = Issuer::root(&arena.topology.name).expect("randomness");
    let forged = claims(arena).and_then(|c| Joiner::mint(from.issuer.as_ref().unwrap_or(&own_root), c).ok());
    for (joiner, group) in forged.iter().map(|j| (j, GROUP)).chain(from.tickets.iter().map(|j| (j, "db"))) {
        match join(arena, from, joiner, group) {
            Ok((grant, _)) => return Finding::yes(format!("{} of {group}", grant.slot)),
            Err(e) => last = e,
        }
    }
    let slot = format!("{SLOTS}{FREE_SLOT}");
    let record = SlotRecord {
        epoch: 1,
        mesh_key: MeshKey([7; 32]),
        tls_key: "of the attacker".to_owned(),
        token: None,
        image: "1".to_owned(),
        by: "the attacker".to_owned(),
        at: 0,
        leaving: false,
        vacant: false,
        eviction: None,
    };
    let written = etcd::put(arena, from, &slot, &serde_json::to_string(&record).expect("JSON"));
    arena.delete(&slot);
    match written {
        Ok(how) => return Finding::yes(format!("{slot} by {how}")),
        Err(e) => last = format!("{last}; etcd: {e}"),
    }
    // Its own tickets give one slot of their group. A second slot would exceed the ticket.
    for joiner in &from.tickets {
        let group = joiner.token.read().expect("claims").group;
        match join(arena, from, joiner, &group) {
            Ok((grant, _)) => {
                let again = join(arena, from, joiner, &group).map_or_else(|e| e, |(g, _)| g.slot);
                let more = again.contains(&format!("{group}-"));
                let said = format!("{} of its ticket's group; a second machine: {again}", grant.slot);
                return if more { Finding::yes(said) } else { Finding::part(said) };
            }
            Err(e) => last = e,
        }
    }
    Finding::no(last)
}

fn claims(arena: &Arena) -> Option<Claims> {
    let mut claims = arena.ticket(GROUP, 1).token.read()?;
    "forged".clone_into(&mut claims.id);
    Some(claims)
}

/// Joins as a new machine with this token. Returns the grant and the request.
///
/// # Errors
/// If every hub refuses the request. The text is the last refusal.
pub fn join(arena: &Arena, from: &Foothold, joiner: &Joiner, group: &str) -> Result<(Grant, Captured), String> {
    let body = request_of(joiner, group);
    from.run(|| async {
        let mut last = "no hub is reachable".to_owned();
        for door in hubs(arena, from).await {
            match ask_to_join(from, &door, joiner, &body).await {
                Ok(granted) => return Ok(granted),
                Err(e) => last = e,
            }
        }
        Err(last)
    })
}

/// Encodes the join request of a new machine.
#[must_use]
pub fn request_of(joiner: &Joiner, group: &str) -> Vec<u8> {
    let tls = PrivateKey::generate().and_then(|key| key.public()).expect("randomness");
    let mesh_key = MeshKey(tls.as_bytes()[1..33].try_into().expect("32 bytes"));
    json(&JoinRequest {
        version: PROTOCOL,
        token: joiner.token.clone(),
        group: group.to_owned(),
        image: "1".to_owned(),
        mesh_key,
        tls_key: encoding::encode(tls.as_bytes()),
    })
}

/// Sends a join request to one hub, with the signatures of the token's owner. Returns the grant and the request.
///
/// # Errors
/// If the hub refuses the request.
pub async fn ask_to_join(
    from: &Foothold,
    door: &Door,
    joiner: &Joiner,
    body: &[u8],
) -> Result<(Grant, Captured), String> {
    let tls = fleet_https::client(&from.root, None).map_err(|e| fleet::ErrorChain::new(&e).to_string())?;
    let asked = async {
        let mut hub = Connection::open(&door.host, door.port, &door.name, &tls).await?;
        let binding = *hub.binding().expect("a connection with TLS");
        let signed = |message: &[u8]| encoding::encode(&joiner.key.sign(message).expect("a key"));
        let headers = vec![
            (BOUND_SIGNATURE_HEADER.to_owned(), signed(&bound_message(&binding, "POST", "/v1/join", body))),
            (SIGNATURE_HEADER.to_owned(), signed(body)),
        ];
        let answer = hub.post_signed("/v1/join", body, |message| joiner.key.sign(message), 1 << 20).await?;
        Ok::<_, firstboot::error::Error>((answer, Captured { headers, body: body.to_vec() }))
    };
    let (answer, captured) = timeout(TIMEOUT, asked)
        .await
        .map_err(|e| e.to_string())?
        .map_err(|e| fleet::ErrorChain::new(&e).to_string())?;
    granted(&answer).map(|grant| (grant, captured))
}

fn granted(answer: &[u8]) -> Result<Grant, String> {
    match serde_json::from_slice(answer).map_err(|e| e.to_string())? {
        JoinReply::Granted(grant) => Ok(grant),
        JoinReply::Refused(no) => Err(no.text),
    }
}

/// Replays a recorded join request.
async fn send(from: &Foothold, door: &Door, request: &Captured) -> Result<Grant, String> {
    let headers: Vec<(&str, &str)> = request.headers.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    granted(&from.ask(door, None, ("POST", "/v1/join"), &headers, request.body.clone()).await?)
}

/// Tries to read a password that the roles of the attacker's node do not need.
pub(super) fn read_secrets(arena: &Arena, from: &Foothold) -> Finding {
    if !from.loot.is_empty() {
        return Finding::yes(from.loot.join("; "));
    }
    if let Some(found) = on_disk(arena, from) {
        return Finding::yes(found);
    }
    let asked = from.run(|| async {
        let mut last = "only its own secrets on its disk, and no certificate of another node".to_owned();
        for door in hubs(arena, from).await {
            // Renewals with a forged certificate of another node.
            for shown in from.credentials.iter().filter(|c| from.node.as_ref().is_none_or(|n| n.name != c.name)) {
                let tls = PrivateKey::generate().and_then(|key| key.public()).expect("randomness");
                let mesh_key = MeshKey(tls.as_bytes()[1..33].try_into().expect("32 bytes"));
                let asked = Renewal { version: PROTOCOL, mesh_key, tls_key: encoding::encode(tls.as_bytes()) };
                let answer = from.ask(&door, Some(shown), ("POST", "/v1/renew"), &[], json(&asked)).await;
                match answer.as_ref().map(|a| serde_json::from_slice(a)) {
                    Ok(Ok(JoinReply::Granted(grant))) => return Ok(format!("the grant of {}", grant.slot)),
                    _ => last = format!("/v1/renew as {}: {}", shown.name, answered(answer)),
                }
            }
            // Another machine's join request, over a new connection.
            for request in &from.captured {
                match send(from, &door, request).await {
                    Ok(grant) => return Ok(format!("the grant of {} by a replayed request", grant.slot)),
                    Err(e) => last = format!("a replayed request: {e}"),
                }
            }
        }
        Err(last)
    });
    asked.map_or_else(Finding::no, Finding::yes)
}

/// Searches the node's files for passwords that its roles do not need.
fn on_disk(arena: &Arena, from: &Foothold) -> Option<String> {
    let node = from.node.as_ref()?;
    let all: fleet::Secrets = serde_json::from_value(serde_json::json!(arena.secrets)).expect("passwords by name");
    let needed = serde_json::to_value(all.for_roles(&node.roles)).expect("JSON");
    let machine = arena.machine(&node.name);
    let found: Vec<&str> = (arena.secrets.iter())
        .filter(|(name, word)| !word.is_empty() && needed[name.as_str()].as_str().is_none_or(str::is_empty))
        .filter(|(_, word)| {
            let places = "/run/bakehouse /run/credentials /run/host/credentials /var/lib/bakehouse /var/lib/etcd";
            machine.exec(&format!("grep -rqaF -- '{word}' {places} 2>/dev/null")).status == 0
        })
        .map(|(name, _)| name.as_str())
        .collect();
    let why = if from.place == Place::EvictedHub { "still on its disk" } else { "on its disk" };
    (!found.is_empty()).then(|| format!("{why}: {}", found.join(", ")))
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("JSON")
}

/// Returns the first 90 characters of a reply or an error.
fn answered(answer: Result<bytes::Bytes, String>) -> String {
    let text = answer.map_or_else(|e| e, |body| String::from_utf8_lossy(&body).into_owned());
    text.chars().take(90).collect()
}
