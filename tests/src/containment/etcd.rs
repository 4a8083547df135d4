//! Attack on etcd's data through its JSON gateway, which the agent and Patroni use too.

use std::sync::PoisonError;
use std::thread::sleep;
use std::time::Duration;

use fleet::encoding::{decode, encode};
use serde_json::{Value, json};

use super::arena::SCRATCH;
use super::foothold::{Door, Foothold, NodeIdentity, doors};
use super::{Arena, Finding, raft};

/// Port at which etcd serves clients.
pub(super) const CLIENT_PORT: u16 = 2379;
/// Users of the fleet's etcd.
const USERS: [&str; 2] = ["root", "patroni"];

/// A member that accepts the attacker as a client.
struct Session<'a> {
    door: Door,
    shown: Option<&'a NodeIdentity>,
    /// Users that the attacker could log in as, and their tokens. Empty if etcd requires no authentication.
    tokens: Vec<(String, String)>,
}

impl Session<'_> {
    fn describe(&self) -> String {
        let shown = self.shown.map_or("no certificate", |s| s.name.as_str());
        let users: Vec<&str> = self.tokens.iter().map(|(user, _)| user.as_str()).collect();
        format!("{}:{CLIENT_PORT} as {shown} {}", self.door.host, users.join("+")).trim_end().to_owned()
    }

    /// Sends a call with each token until one succeeds.
    async fn call(&self, from: &Foothold, path: &str, body: &Value) -> Result<Value, String> {
        let mut last = String::new();
        let bare = [(String::new(), String::new())];
        let tokens = if self.tokens.is_empty() { &bare[..] } else { &self.tokens };
        for (_, token) in tokens {
            let header = [("authorization", token.as_str())];
            let headers = if token.is_empty() { &[][..] } else { &header };
            match post(from, &self.door, self.shown, path, headers, body).await {
                Ok(answer) => return Ok(answer),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    async fn get(&self, from: &Foothold, key: &str) -> Option<String> {
        let answer = self.call(from, "/v3/kv/range", &json!({ "key": encode(key.as_bytes()) })).await.ok()?;
        let value = answer["kvs"][0]["value"].as_str()?;
        String::from_utf8(decode(value)?).ok()
    }

    async fn put(&self, from: &Foothold, key: &str, value: &str) -> Result<(), String> {
        let body = json!({ "key": encode(key.as_bytes()), "value": encode(value.as_bytes()) });
        self.call(from, "/v3/kv/put", &body).await.map(drop)
    }
}

/// Opens a session with every member that accepts one of the attacker's credentials.
async fn sessions<'a>(arena: &Arena, from: &'a Foothold) -> Result<Vec<Session<'a>>, String> {
    let mut found = Vec::new();
    let mut last = format!("port {CLIENT_PORT} is filtered or closed");
    for door in from.reachable(voter_doors(arena, from, CLIENT_PORT)).await {
        for shown in from.shown() {
            let probe = json!({ "key": encode(SCRATCH.as_bytes()) });
            let tokens = match post(from, &door, shown, "/v3/kv/range", &[], &probe).await {
                Ok(_) => Vec::new(),
                // TLS verification succeeded, and etcd requires a user.
                Err(e) if e.contains("user name is empty") || e.contains("permission denied") => {
                    let tokens = log_in(from, &door, shown).await;
                    if tokens.is_empty() {
                        last = e;
                        continue;
                    }
                    tokens
                }
                Err(e) => {
                    last = e;
                    continue;
                }
            };
            found.push(Session { door: door.clone(), shown, tokens });
        }
    }
    if found.is_empty() { Err(last) } else { Ok(found) }
}

/// Returns a port's addresses on every voter, and on loopback if the attacker's machine is one.
pub(super) fn voter_doors(arena: &Arena, from: &Foothold, port: u16) -> Vec<Door> {
    let voters = arena.topology.voters.iter().filter(|name| arena.machines.contains_key(*name));
    let mut all = doors(arena, voters.map(|name| arena.node(name)), port);
    if let Some(own) = from.node.as_ref().filter(|n| arena.topology.voters.contains(&n.name)) {
        all.insert(0, Door { host: "127.0.0.1".to_owned(), port, name: own.name.clone() });
    }
    all
}

/// Tries every password of the attacker for every user of etcd. Returns the users and tokens of successful logins.
async fn log_in(from: &Foothold, door: &Door, shown: Option<&NodeIdentity>) -> Vec<(String, String)> {
    let known = from.logins.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(known) = known {
        return known;
    }
    let mut tokens = Vec::new();
    for user in USERS {
        for word in from.passwords.values() {
            let body = json!({ "name": user, "password": word });
            if let Ok(answer) = post(from, door, shown, "/v3/auth/authenticate", &[], &body).await
                && let Some(token) = answer["token"].as_str()
            {
                tokens.push((user.to_owned(), token.to_owned()));
                break;
            }
        }
    }
    *from.logins.lock().unwrap_or_else(PoisonError::into_inner) = Some(tokens.clone());
    tokens
}

async fn post(
    from: &Foothold,
    door: &Door,
    shown: Option<&NodeIdentity>,
    path: &str,
    headers: &[(&str, &str)],
    body: &Value,
) -> Result<Value, String> {
    let answer = from.ask(door, shown, ("POST", path), headers, body.to_string().into()).await?;
    serde_json::from_slice(&answer).map_err(|e| e.to_string())
}

/// Tries to read values that the trusted hub has just written, below the fleet's prefix and below Patroni's.
pub(super) fn read(arena: &Arena, from: &Foothold) -> Finding {
    let canary = format!("canary-{:?}", from.place);
    let keys = [format!("{SCRATCH}read"), format!("{}containment", arena.scope())];
    for key in &keys {
        arena.put(key, &canary);
    }
    let seen = from.run(|| async {
        let sessions = sessions(arena, from).await?;
        let mut seen = [None, None];
        for session in &sessions {
            for (seen, key) in seen.iter_mut().zip(&keys) {
                if seen.is_none() && session.get(from, key).await.as_ref() == Some(&canary) {
                    *seen = Some(session.describe());
                }
            }
        }
        Ok::<_, String>(seen)
    });
    let copied = from.node.as_ref().is_some_and(|node| {
        let search = format!("grep -rqa {canary} /var/lib/etcd 2>/dev/null");
        arena.machine(&node.name).exec(&search).status == 0
    });
    for key in &keys {
        arena.delete(key);
    }
    match seen {
        Ok([Some(how), _]) => Finding::yes(how),
        _ if copied => Finding::yes("the data folder of its own etcd"),
        Ok([None, Some(how)]) => Finding::part(format!("Patroni's keys only: {how}")),
        Ok(_) => Finding::no("logged in, but may read neither prefix"),
        Err(e) => Finding::no(e),
    }
}

/// Tries to write below the fleet's prefix and below Patroni's.
pub(super) fn write(arena: &Arena, from: &Foothold) -> Finding {
    let key = format!("{SCRATCH}write");
    let patroni = format!("{}containment-write", arena.scope());
    let finding = match (put(arena, from, &key, "taken"), put(arena, from, &patroni, "taken")) {
        (Ok(how), _) => Finding::yes(how),
        (Err(_), Ok(how)) => Finding::part(format!("Patroni's keys only: {how}")),
        (Err(e), Err(_)) => Finding::no(e),
    };
    arena.delete(&key);
    arena.delete(&patroni);
    finding
}

/// Writes a key as a client or as a peer, and verifies the value on the trusted hub. Returns how.
pub(super) fn put(arena: &Arena, from: &Foothold, key: &str, value: &str) -> Result<String, String> {
    let asked = from.run(|| async {
        let mut last = Err("no session".to_owned());
        for session in sessions(arena, from).await? {
            last = session.put(from, key, value).await.map(|()| session.describe());
            if last.is_ok() {
                break;
            }
        }
        last
    });
    let refused = match asked {
        Ok(how) if arena.get(key) == value => return Ok(how),
        Ok(how) => format!("{how}: accepted, but not stored"),
        Err(e) => e,
    };
    let how = raft::propose(arena, from, key, value).map_err(|e| format!("{refused}; peer: {e}"))?;
    for _ in 0..20 {
        if arena.get(key) == value {
            return Ok(how);
        }
        sleep(Duration::from_millis(100));
    }
    Err(format!("{refused}; {how}: accepted, but not stored"))
}
