//! Renewal of keys. When the agent starts with keys that are older than 90 days, it replaces them. The hubs enter the
//! new keys and remove the old ones in one transaction. Services keep running.

use std::time::Duration;

use fleet::{Grant, JoinReply, Mail, Node};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::error::Result;
use crate::node::hubs::Hubs;
use crate::node::identity::{Identity, node_of};
use crate::node::image::Image;
use crate::node::keys::Keys;
use crate::node::state::{State, StateDir};

/// Age at which keys are replaced.
const LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);
const FILE: &str = "renewal.json";
/// Longest wait at the start for passwords that an earlier version did not have.
const PASSWORDS_TIMEOUT: Duration = Duration::from_secs(5);

/// A renewal in progress. The agent stores it before it sends the keys to a hub, and again with the hub's reply.
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
    /// Format of the sealed file. [`Self::OPEN`] is the format of a file that is not sealed.
    const VERSION: u16 = 2;
    const OPEN: u16 = 1;

    fn load(dir: &StateDir) -> Result<Option<Self>> {
        dir.read(FILE, Self::OPEN..=Self::VERSION)
    }

    fn store(&self, dir: &StateDir) -> Result<()> {
        dir.write(FILE, Self::VERSION, self)
    }
}

/// Whether a renewal is in progress: the hubs may already have the new keys.
#[must_use]
pub fn is_pending(dir: &StateDir) -> bool {
    Renewal::load(dir).is_ok_and(|r| r.is_some())
}

/// Replaces the node's keys if they are old and a hub accepts new ones, and completes an interrupted renewal. Returns
/// the identity, and whether its keys are new.
///
/// # Errors
/// If a file cannot be read, written or removed. If no hub answers, the node keeps its keys and asks at its next start.
pub async fn renew(dir: &StateDir, own: Identity, image: &Image) -> Result<(Identity, bool)> {
    let node = node_of(&own.state, image)?;
    let alone = image.topology.hubs.iter().all(|hub| hub.name == node.name);
    let mut renewal = match Renewal::load(dir)? {
        Some(begun) => begun,
        None if own.keys.age() < LIFETIME || alone => return Ok((own, false)),
        None => {
            let new = Renewal { version: Renewal::OPEN, keys: Keys::make()?, granted: None };
            new.store(dir)?;
            new
        }
    };
    let granted = match renewal.granted.take() {
        Some(granted) => granted,
        // The key and the certificate are in two files, so the agent stores both in `renewal.json` first. After a power
        // loss it continues from there.
        None => match hubs(&own, node, image)?.renew(&renewal.keys).await {
            Ok(JoinReply::Granted(Grant { epoch, cert, .. })) => {
                // Name constraints forbid other hubs' issuers to sign a hub, so a hub signs its own certificate.
                let cert = match &own.state.issuer {
                    Some(issuer) if node.hub > 0 => issuer.node(&image.topology, node, &renewal.keys.tls.public()?)?,
                    _ => cert,
                };
                renewal.granted = Some(Granted { epoch, cert: cert.clone() });
                renewal.store(dir)?;
                Granted { epoch, cert }
            }
            Ok(JoinReply::Refused(refusal)) => {
                warn!("renewal of the keys refused: {}; the old keys stay in use", refusal.text);
                if !refusal.reason.passes() {
                    dir.remove(FILE)?;
                }
                return Ok((own, false));
            }
            Err(e) => {
                warn!("renewal of the keys failed: {}; the next start tries again", e.chain());
                return Ok((own, false));
            }
        },
    };
    let state = State { epoch: granted.epoch, cert: granted.cert, ..own.state };
    // After a power loss between these steps, the next start repeats them.
    renewal.keys.store(dir)?;
    state.store(dir)?;
    dir.remove(FILE)?;
    let key = renewal.keys.mesh_public()?;
    info!(
        slot = state.slot,
        epoch = state.epoch,
        "{}: keys renewed, the mesh key is {key} (epoch {})",
        state.slot,
        state.epoch
    );
    Ok((Identity { keys: renewal.keys, state, ..own }, true))
}

/// Requests the passwords that this node's roles need and its state, written by an earlier version, does not have: those
/// of etcd, and the keys for the passwords of `[alerts]` on monitors and of `[odoo.mail]` on app nodes. The node sends a renewal with its current keys, and the hub replies with the same grant, which has the passwords.
/// The agent renders services with them from then on.
///
/// # Errors
/// If the state cannot be written. If no hub replies within 5 s, or the hub does not have the passwords either, the
/// node starts without them, and asks at its next start.
pub async fn take_missing_passwords(dir: &StateDir, mut own: Identity, image: &Image) -> Result<Identity> {
    let node = node_of(&own.state, image)?;
    let secrets = &own.state.secrets;
    let lacks = (node.hub > 0 && secrets.etcd_root.is_empty())
        || ((node.hub > 0 || node.has_role("db")) && secrets.etcd_patroni.is_empty());
    let topology = &image.topology;
    let lacks_key = node.has_role("monitor") && !topology.alert_secrets.is_empty() && secrets.alert_key().is_none()
        || node.has_role("app") && !topology.mail_secrets.is_empty() && secrets.mail_key().is_none();
    if !(lacks || lacks_key) || is_pending(dir) {
        return Ok(own);
    }
    let hubs = hubs(&own, node, image)?;
    let answer = tokio::time::timeout(PASSWORDS_TIMEOUT, hubs.renew(&own.keys)).await;
    if let Ok(Ok(JoinReply::Granted(Grant { secrets, .. }))) = answer {
        let has_new = !(secrets.etcd_patroni.is_empty() && secrets.alerts.is_empty() && secrets.mail.is_empty());
        let state = &mut own.state.secrets;
        for (kept, granted) in [
            (&mut state.etcd_root, secrets.etcd_root),
            (&mut state.etcd_patroni, secrets.etcd_patroni),
            (&mut state.alerts, secrets.alerts),
            (&mut state.mail, secrets.mail),
        ] {
            if !granted.is_empty() {
                *kept = granted;
            }
        }
        if has_new {
            own.state.store(dir)?;
            info!(slot = node.name, "{}: received missing passwords from a hub", node.name);
        }
    }
    Ok(own)
}

/// Warns about passwords of `[alerts]` and `[odoo.mail]` that the node cannot decrypt. Alertmanager starts without these
/// receivers, and the mail server refuses Odoo's login.
pub fn warn_of_sealed_passwords(own: &Identity, node: &Node, image: &Image) {
    let topology = &image.topology;
    let secrets = &own.state.secrets;
    let has_user = topology.odoo.mail.as_ref().is_some_and(|mail| mail.user.is_some());
    if node.has_role("app") && has_user {
        let key = secrets.mail_key();
        if topology.mail_secrets.password(key.as_ref(), &topology.name).is_empty() {
            warn!(slot = node.name, "[odoo.mail]: cannot read the secret `{}`: {}", Mail::SECRET, why(key.is_none()));
        }
    }
    let (names, key) = (topology.alerts.secrets(), own.state.secrets.alert_key());
    if !node.has_role("monitor") {
        return;
    }
    for (name, _) in
        topology.alert_secrets.values(key.as_ref(), &topology.name, &names).iter().filter(|(_, v)| v.is_empty())
    {
        warn!(slot = node.name, "alerts: cannot read the secret `{name}`: {}", why(key.is_none()));
    }
}

/// Returns why a node cannot decrypt a password.
fn why(lacks_key: bool) -> &'static str {
    if lacks_key {
        "no hub has granted the key yet; restart this node when the hubs run this version"
    } else {
        "it is missing, or encrypted with another fleet.key: type `bakehouse secret`, and publish"
    }
}

fn hubs(own: &Identity, node: &Node, image: &Image) -> Result<Hubs> {
    // The mesh is not up yet, so the hubs' public endpoints are used.
    let hubs = Hubs::new(&image.topology, &own.state.endpoints, &node.name, own.client()?);
    Ok(hubs.known_by(own.neighbourhood.clone()))
}
