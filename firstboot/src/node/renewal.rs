//! Keys that have served for long are replaced when the agent starts: the hubs enter the new ones,
//! and take the old ones out, in one step. Nothing is asked of the services, which go on.

use std::time::Duration;

use fleet::{Grant, JoinReply, Node};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::node::hubs::Hubs;
use crate::node::identity::{Identity, node_of};
use crate::node::image::Image;
use crate::node::keys::Keys;
use crate::node::state::{State, StateDir};

/// How long keys serve.
const LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
const FILE: &str = "renewal.json";
/// How long a start may wait for passwords that an earlier version did not have.
const PASSWORDS_PATIENCE: Duration = Duration::from_secs(5);

/// New keys on their way: written before the hubs hear of them, and again with their answer.
#[derive(Serialize, Deserialize)]
struct Renewal {
    version: u16,
    keys: Keys,
    granted: Option<Granted>,
}

#[derive(Serialize, Deserialize)]
struct Granted {
    epoch: u64,
    cert: String,
}

impl Renewal {
    /// Formats of the file: sealed, and not.
    const VERSION: u16 = 2;
    const OPEN: u16 = 1;

    fn load(dir: &StateDir) -> Result<Option<Self>> {
        dir.read(FILE, Self::OPEN..=Self::VERSION)
    }

    fn store(&self, dir: &StateDir) -> Result<()> {
        dir.write(FILE, Self::VERSION, self)
    }
}

/// Whether the hubs may know this node by keys that it has not taken yet.
#[must_use]
pub fn is_pending(dir: &StateDir) -> bool {
    Renewal::load(dir).is_ok_and(|r| r.is_some())
}

/// The same node, with new keys if its own have served for long and a hub enters them now; and
/// with those of a renewal that was cut short. True if they are new.
///
/// # Errors
/// The disk says no. Hubs that don't answer are asked again at the next start.
pub async fn renew(dir: &StateDir, who: Identity, image: &Image) -> Result<(Identity, bool)> {
    let node = node_of(&who.state, image)?;
    let alone = image.topology.hubs.iter().all(|hub| hub.name == node.name);
    let mut renewal = match Renewal::load(dir)? {
        Some(begun) => begun,
        None if who.keys.age() < LIFETIME || alone => return Ok((who, false)),
        None => {
            let new = Renewal { version: Renewal::OPEN, keys: Keys::make()?, granted: None };
            new.store(dir)?;
            new
        }
    };
    let granted = match renewal.granted.take() {
        Some(granted) => granted,
        // Not before: cut between their files, key and certificate are of two times.
        None => match hubs(&who, node, image)?.renew(&renewal.keys).await {
            Ok(JoinReply::Granted(Grant { epoch, cert, .. })) => {
                // Name constraints keep other hubs' issuers from signing a hub: it signs itself.
                let cert = match &who.state.issuer {
                    Some(issuer) if node.hub > 0 => issuer.node(&image.topology, node, &renewal.keys.tls.public()?)?,
                    _ => cert,
                };
                renewal.granted = Some(Granted { epoch, cert: cert.clone() });
                renewal.store(dir)?;
                Granted { epoch, cert }
            }
            Ok(JoinReply::Refused(no)) => {
                println!("the keys stay as they are: {}", no.text);
                if !no.reason.passes() {
                    dir.remove(FILE)?;
                }
                return Ok((who, false));
            }
            Err(e) => {
                println!("the keys stay as they are for now: {e}");
                return Ok((who, false));
            }
        },
    };
    let state = State { epoch: granted.epoch, cert: granted.cert, ..who.state };
    // Cut between these, it begins again at the first.
    renewal.keys.store(dir)?;
    state.store(dir)?;
    dir.remove(FILE)?;
    println!("{}: new keys, {} in the mesh (epoch {})", state.slot, renewal.keys.mesh_public()?, state.epoch);
    Ok((Identity { keys: renewal.keys, state, ..who }, true))
}

/// Takes over etcd passwords that this node's roles need and its state, of an earlier version, does not have:
/// a hub answers a renewal with the present keys with the same grant, and the passwords in it. Services are
/// rendered with them from then on.
///
/// # Errors
/// The state can't be written. Without an answer within 5 seconds, or from a hub that has none either, the node
/// goes on without, and asks at its next start.
pub async fn take_missing_passwords(dir: &StateDir, mut who: Identity, image: &Image) -> Result<Identity> {
    let node = node_of(&who.state, image)?;
    let secrets = &who.state.secrets;
    let lacks = (node.hub > 0 && secrets.etcd_root.is_empty())
        || ((node.hub > 0 || node.has_role("db")) && secrets.etcd_patroni.is_empty());
    if !lacks || is_pending(dir) {
        return Ok(who);
    }
    let hubs = hubs(&who, node, image)?;
    let answer = tokio::time::timeout(PASSWORDS_PATIENCE, hubs.renew(&who.keys)).await;
    if let Ok(Ok(JoinReply::Granted(Grant { secrets, .. }))) = answer
        && !secrets.etcd_patroni.is_empty()
    {
        who.state.secrets.etcd_root = secrets.etcd_root;
        who.state.secrets.etcd_patroni = secrets.etcd_patroni;
        who.state.store(dir)?;
        println!("{}: etcd passwords taken over from a hub", node.name);
    }
    Ok(who)
}

fn hubs(who: &Identity, node: &Node, image: &Image) -> Result<Hubs> {
    // The mesh is not up yet.
    let hubs = Hubs::of(&image.topology, &who.state.endpoints, &node.name, who.client()?);
    Ok(hubs.known_by(who.neighbourhood.clone()))
}
