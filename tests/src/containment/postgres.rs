//! Attack on PostgreSQL: TLS, the start-up message, and SCRAM with every password that the attacker has.

use std::num::NonZeroU32;

use fleet::encoding::{decode, encode};
use ring::{digest, hmac, pbkdf2};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;

use super::foothold::{Door, Foothold, NodeIdentity, TIMEOUT, doors};
use super::{Arena, Finding, Place};

/// PostgreSQL's port, and HAProxy's port for the primary.
const PORTS: [u16; 2] = [5432, 5000];
const ROLES: [&str; 4] = ["postgres", "replicator", "rewind", "odoo"];

/// Tries to log in as a role that the attacker's machine does not need.
pub(super) fn log_in(arena: &Arena, from: &Foothold) -> Finding {
    // An app node's own role is the owner of Odoo's database.
    let own = if from.place == Place::App { "odoo" } else { "" };
    let found = from.run(|| async {
        let mut last = "ports 5432 and 5000 are filtered or closed".to_owned();
        for door in from.reachable(targets(arena)).await {
            for role in ROLES.iter().filter(|role| **role != own) {
                for shown in [from.credentials.first(), None] {
                    match try_role(from, &door, shown, role).await {
                        Ok(how) => return Ok(format!("{}:{} as {role} {how}", door.host, door.port)),
                        Err(e) => last = format!("{}:{} as {role}: {e}", door.host, door.port),
                    }
                }
            }
        }
        Err(last)
    });
    found.map_or_else(Finding::no, Finding::yes)
}

fn targets(arena: &Arena) -> Vec<Door> {
    let dbs: Vec<_> = arena.topology.nodes.iter().filter(|n| n.has_role("db")).collect();
    let mut all = doors(arena, dbs.iter().copied(), PORTS[0]);
    all.extend(doors(arena, arena.topology.hubs.iter(), PORTS[1]));
    all.push(Door { host: arena.topology.vip.to_string(), port: PORTS[1], name: String::new() });
    all
}

/// Tries a role with every password, each over a new connection. Returns the password's name.
async fn try_role(from: &Foothold, door: &Door, shown: Option<&NodeIdentity>, role: &str) -> Result<String, String> {
    let mut last = String::new();
    let none = String::new();
    for (name, word) in from.passwords.iter().map(|(n, w)| (n.as_str(), w)).chain([("an empty password", &none)]) {
        match timeout(TIMEOUT, session(from, door, shown, role, word)).await {
            Ok(Ok(())) => return Ok(format!("with {name}")),
            Ok(Err(e)) => last = e,
            Err(_) => "no reply".clone_into(&mut last),
        }
        // A `pg_hba.conf` rule that rejects the address does so with every password.
        if last.contains("pg_hba.conf") {
            break;
        }
    }
    Err(last)
}

async fn session(
    from: &Foothold,
    door: &Door,
    shown: Option<&NodeIdentity>,
    role: &str,
    password: &str,
) -> Result<(), String> {
    let mut stream = encrypted(from, door, shown).await?;
    let mut start = 196_608_u32.to_be_bytes().to_vec();
    for word in ["user", role, "database", "postgres", ""] {
        start.extend(word.bytes().chain([0]));
    }
    send(&mut stream, None, &start).await?;
    let (kind, body) = receive(&mut stream).await?;
    let code = body.get(..4).map(|b| u32::from_be_bytes(b.try_into().unwrap_or_default()));
    match (kind, code) {
        (b'R', Some(0)) => Ok(()),
        (b'R', Some(10)) => scram(&mut stream, password).await,
        (b'E', _) => Err(words(&body)),
        _ => Err(format!("unexpected message type {kind}")),
    }
}

/// Opens a TLS connection. Behind HAProxy either database may be the primary, so this accepts both names.
async fn encrypted(from: &Foothold, door: &Door, shown: Option<&NodeIdentity>) -> Result<TlsStream<TcpStream>, String> {
    let identity = shown.map(|own| fleet_https::Identity { cert: &own.cert, key: &own.key });
    let tls = fleet_https::client(&from.root, identity).map_err(|e| fleet::ErrorChain::new(&e).to_string())?;
    let mut last = String::new();
    for name in ["db-1", "db-2"] {
        let tried = async {
            let mut tcp = TcpStream::connect((door.host.as_str(), door.port)).await?;
            tcp.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await?;
            tcp.read_u8().await?;
            let expected = ServerName::try_from(name).map_err(std::io::Error::other)?;
            TlsConnector::from(tls.clone()).connect(expected, tcp).await
        };
        match tried.await {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e.to_string(),
        }
    }
    Err(last)
}

/// Authenticates with SCRAM-SHA-256 without channel binding, see RFC 5802 and RFC 7677.
async fn scram(stream: &mut TlsStream<TcpStream>, password: &str) -> Result<(), String> {
    let bare = "n=,r=containment";
    let first = format!("n,,{bare}");
    let mut body = b"SCRAM-SHA-256\0".to_vec();
    body.extend((first.len() as u32).to_be_bytes());
    body.extend(first.bytes());
    send(stream, Some(b'p'), &body).await?;
    let (kind, body) = receive(stream).await?;
    if kind != b'R' {
        return Err(words(&body));
    }
    let challenge = String::from_utf8_lossy(&body[4..]).into_owned();
    let part = |name: &str| challenge.split(',').find_map(|p| p.strip_prefix(name)).map(str::to_owned);
    let (Some(nonce), Some(salt), Some(rounds)) = (part("r="), part("s="), part("i=")) else {
        return Err(format!("invalid SCRAM challenge: {challenge}"));
    };
    let rounds: NonZeroU32 = rounds.parse().map_err(|_| "invalid iteration count".to_owned())?;
    let salt = decode(&salt).ok_or("salt is not base64")?;
    let mut salted = [0; digest::SHA256_OUTPUT_LEN];
    pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, rounds, &salt, password.as_bytes(), &mut salted);
    let mac = |key: &[u8], text: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text);
    let client = mac(&salted, b"Client Key");
    let stored = digest::digest(&digest::SHA256, client.as_ref());
    let last = format!("c=biws,r={nonce}");
    let signature = mac(stored.as_ref(), format!("{bare},{challenge},{last}").as_bytes());
    let proof: Vec<u8> = client.as_ref().iter().zip(signature.as_ref()).map(|(a, b)| a ^ b).collect();
    send(stream, Some(b'p'), format!("{last},p={}", encode(&proof)).as_bytes()).await?;
    // `AuthenticationOk` follows the server's proof, and comes before any error about the database.
    loop {
        let (kind, body) = receive(stream).await?;
        match (kind, body.get(..4)) {
            (b'R', Some([0, 0, 0, 12])) => {}
            (b'R', Some([0, 0, 0, 0])) => return Ok(()),
            _ => return Err(words(&body)),
        }
    }
}

async fn send(stream: &mut TlsStream<TcpStream>, kind: Option<u8>, body: &[u8]) -> Result<(), String> {
    let mut message: Vec<u8> = kind.into_iter().collect();
    message.extend((body.len() as u32 + 4).to_be_bytes());
    message.extend(body);
    stream.write_all(&message).await.map_err(|e| e.to_string())?;
    stream.flush().await.map_err(|e| e.to_string())
}

async fn receive(stream: &mut TlsStream<TcpStream>) -> Result<(u8, Vec<u8>), String> {
    let read = async {
        let kind = stream.read_u8().await?;
        let length = stream.read_u32().await?.saturating_sub(4).min(1 << 16);
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).await?;
        Ok::<_, std::io::Error>((kind, body))
    };
    read.await.map_err(|e| e.to_string())
}

/// Returns the message field of an `ErrorResponse`.
fn words(body: &[u8]) -> String {
    let field = body.split(|b| *b == 0).find_map(|field| field.strip_prefix(b"M"));
    String::from_utf8_lossy(field.unwrap_or(body)).into_owned()
}
