//! Identity of the node: loaded from the disk, made from a founder's ticket, or granted by a hub.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fleet::{Credential, Founder, Grant, Joiner, MeshKey, Node, Ticket};
use tokio_rustls::rustls::ClientConfig;
use tracing::info;

use crate::error::{Error, Result};
use crate::host::console::log_event;
use crate::host::journal::Event;
use crate::node::hubs::Hubs;
use crate::node::image::Image;
use crate::node::join::join;
use crate::node::keys::Keys;
use crate::node::neighbours::PeerTable;
use crate::node::revocations::Revocations;
use crate::node::state::{State, StateDir};

/// Identity of a node. All of it is on the disk.
pub struct Identity {
    /// Private keys.
    pub keys: Keys,
    /// Slot, certificate and passwords.
    pub state: State,
    /// Mesh keys of the other nodes.
    pub neighbourhood: Arc<PeerTable>,
    /// Revoked certificates of operators.
    pub revocations: Arc<Revocations>,
}

impl Identity {
    fn new(dir: &StateDir, keys: Keys, state: State) -> Self {
        let neighbourhood = Arc::new(PeerTable::load(dir.path(), BTreeMap::new()));
        let revocations = Arc::new(Revocations::load(dir.path(), &state.fleet, &state.root));
        Self { keys, state, neighbourhood, revocations }
    }

    /// Returns the TLS configuration with which this node connects to others.
    ///
    /// # Errors
    /// If the certificate and the key do not match.
    pub fn client(&self) -> Result<Arc<ClientConfig>> {
        let own = fleet_https::Identity { cert: &self.state.cert, key: self.keys.tls.pem() };
        Ok(fleet_https::client(&self.state.root, Some(own))?)
    }
}

/// Loads the identity, or makes it from a founder's ticket, or claims a slot. Each step is on the disk before the next
/// one begins.
///
/// # Errors
/// If the state cannot be read or written, the ticket is missing or does not fit, or a hub refuses the node. If no hub
/// answers, the node asks without end.
pub async fn identity(dir: &StateDir, credentials: Option<&PathBuf>, image: &Image) -> Result<Identity> {
    if let Some(mut state) = State::load(dir)? {
        // Earlier versions stored the issuer on voters that are not hubs, where it has no use.
        if node_of(&state, image)?.hub == 0 && state.issuer.take().is_some() {
            state.store(dir)?;
        }
        info!(slot = state.slot, "{} since an earlier boot", state.slot);
        let keys = Keys::load_or_make(dir)?;
        return Ok(Identity::new(dir, keys, state));
    }
    let ticket = read_ticket(credentials)?;
    if ticket.fleet != image.topology.name {
        return Err(wrong(&format!("of the fleet `{}`, this image is of `{}`", ticket.fleet, image.topology.name)));
    }
    let first = |slot: &str, epoch| State {
        endpoints: ticket.endpoints.clone(),
        ..State::new(&image.topology, slot, epoch, &ticket.root)
    };
    // The agent makes keys only after it has checked the ticket, so a wrong ticket leaves no file.
    let (keys, state, known) = match &ticket.right {
        Credential::Founder(founder) => {
            let state = first(&founder.slot, 1);
            let node = node_of(&state, image)?.clone();
            let keys = Keys::load_or_make(dir)?;
            let state = found(state, founder, &node, image, &keys)?;
            match &founder.replaces {
                None => (keys, state, BTreeMap::new()),
                Some(joiner) => {
                    let hubs = Hubs::new(
                        &image.topology,
                        &ticket.endpoints,
                        &node.name,
                        fleet_https::client(&ticket.root, None)?,
                    );
                    let grant = join(&hubs, joiner, image, &keys).await?;
                    (keys, State { epoch: grant.epoch, ..state }, grant.hubs)
                }
            }
        }
        Credential::Joiner(joiner) => {
            check_token(joiner, image)?;
            let keys = Keys::load_or_make(dir)?;
            let hubs = Hubs::new(&image.topology, &ticket.endpoints, "", fleet_https::client(&ticket.root, None)?);
            let grant = join(&hubs, joiner, image, &keys).await?;
            let (state, known) = granted(first(&grant.slot, grant.epoch), grant);
            node_of(&state, image)?;
            (keys, state, known)
        }
    };
    let own = Identity::new(dir, keys, state);
    for (slot, key) in &known {
        own.neighbourhood.learn(slot, *key);
    }
    own.neighbourhood.flush();
    own.state.store(dir)?;
    log_event(Event::Joined, &format!("{} of the fleet {}", own.state.slot, own.state.fleet));
    Ok(own)
}

/// Returns the node of this state in the image's topology.
///
/// # Errors
/// If the image is for another fleet or another group, or its topology does not have the slot.
pub fn node_of<'a>(state: &State, image: &'a Image) -> Result<&'a Node> {
    if state.fleet != image.topology.name {
        return Err(Error::Configuration(format!(
            "this node is of the fleet `{}`, the image is of `{}`; wipe /var to move it",
            state.fleet, image.topology.name
        )));
    }
    let Some(node) = image.topology.node(&state.slot) else {
        return Err(Error::Configuration(format!(
            "this node is {}, which version {} of the fleet does not have; add the slot to fleet.toml, or wipe the \
             node",
            state.slot, image.topology.version
        )));
    };
    if node.group != image.info.group {
        return Err(Error::Configuration(format!(
            "this node is {}, the image is for the group `{}`; boot the image of `{}`",
            state.slot, image.info.group, node.group
        )));
    }
    Ok(node)
}

/// Makes the state of a founder, which signs its own certificate and needs no other node. Hubs keep the issuer to sign
/// other nodes and their own next keys. A voter that is not a hub does not keep it.
fn found(state: State, founder: &Founder, node: &Node, image: &Image, keys: &Keys) -> Result<State> {
    let cert = founder.issuer.node(&image.topology, node, &keys.tls.public()?)?;
    let issuer = (node.hub > 0).then(|| founder.issuer.clone());
    Ok(State { cert, secrets: founder.secrets.clone(), issuer, ..state })
}

fn granted(state: State, grant: Grant) -> (State, BTreeMap<String, MeshKey>) {
    (State { cert: grant.cert, secrets: grant.secrets, ..state }, grant.hubs)
}

/// Checks a token as far as that is possible without a hub.
fn check_token(joiner: &Joiner, image: &Image) -> Result<()> {
    let claims = joiner.token.read().ok_or_else(|| wrong("damaged"))?;
    if claims.group != image.info.group {
        return Err(wrong(&format!("for the group `{}`, this image is for `{}`", claims.group, image.info.group)));
    }
    Ok(())
}

pub(super) fn read_ticket(credentials: Option<&PathBuf>) -> Result<Ticket> {
    let given = credentials.map(|dir| dir.join(Ticket::CREDENTIAL));
    let on_disk = Path::new("/efi").join(Ticket::FILE);
    let path = given.into_iter().chain([on_disk]).find(|path| path.exists());
    let Some(path) = path else {
        return Err(Error::Configuration(
            "no ticket: give this machine the credential `bakehouse.ticket`, made by `bakehouse ticket`".to_owned(),
        ));
    };
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    Ok(Ticket::parse(&bytes)?)
}

fn wrong(why: &str) -> Error {
    Error::Configuration(format!("the ticket is {why}; mint one with `bakehouse ticket`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::image::ImageInfo;
    use fleet::{Claims, Issuer, Secrets, Topology};

    struct TestNode {
        dir: tempfile::TempDir,
        image: Image,
        root: Issuer,
    }

    fn test_node() -> TestNode {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        fs::create_dir(dir.path().join("credentials")).unwrap();
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\n";
        let topology = Topology::from_fleet(&fleet::Fleet::parse("f", toml).unwrap());
        let info = ImageInfo {
            id: "acme-hub".into(),
            version: "1".into(),
            group: "hub".into(),
            roles: vec!["hub".into()],
            health: Vec::new(),
        };
        TestNode { dir, image: Image { info, topology }, root: Issuer::root("acme").unwrap() }
    }

    impl TestNode {
        fn give(&self, fleet: &str, right: Credential) {
            let root = self.root.certificate().to_owned();
            let ticket =
                Ticket { version: Ticket::VERSION, fleet: fleet.into(), root, endpoints: BTreeMap::new(), right };
            let path = self.dir.path().join("credentials").join(Ticket::CREDENTIAL);
            fs::write(path, serde_json::to_vec(&ticket).unwrap()).unwrap();
        }

        fn founder(&self, fleet: &str, slot: &str) {
            let issuer = self.root.issuer(fleet, slot).unwrap();
            self.give(
                fleet,
                Credential::Founder(Founder { slot: slot.into(), issuer, secrets: Secrets::sample(), replaces: None }),
            );
        }

        fn states(&self) -> StateDir {
            StateDir::new(&self.dir.path().join("state"), None)
        }

        async fn identity(&self) -> Result<Identity> {
            identity(&self.states(), Some(&self.dir.path().join("credentials")), &self.image).await
        }

        fn traces(&self) -> usize {
            fs::read_dir(self.dir.path().join("state")).unwrap().count()
        }
    }

    #[tokio::test]
    async fn later_ticket_changes_neither_slot_nor_keys() {
        let node = test_node();
        node.founder("acme", "hub-1");
        let one = node.identity().await.unwrap();
        node.founder("acme", "hub-2");
        let two = node.identity().await.unwrap();
        assert_eq!((one.state.slot.as_str(), two.state.slot.as_str()), ("hub-1", "hub-1"));
        assert!(one.keys == two.keys && one.state == two.state);
    }

    #[tokio::test]
    async fn keys_survive_power_loss_before_the_grant() {
        let node = test_node();
        let keys = Keys::load_or_make(&node.states()).unwrap();
        node.founder("acme", "hub-1");
        assert!(node.identity().await.unwrap().keys == keys);
    }

    #[tokio::test]
    async fn rejects_wrong_ticket_and_writes_nothing() {
        let node = test_node();
        for (fleet, slot, expected) in [
            ("other", "hub-1", "of the fleet `other`"),
            ("acme", "hub-9", "does not have"),
            ("acme", "db-1", "boot the image of `db`"),
        ] {
            node.founder(fleet, slot);
            let e = node.identity().await.map(drop).unwrap_err();
            assert_eq!(e.exit_code(), 78);
            assert!(e.chain().contains(expected), "{e}");
        }
        let claims = Claims {
            fleet: "acme".into(),
            id: "1".into(),
            group: "db".into(),
            slot: None,
            replace: false,
            uses: 1,
            expires: 1,
            key: String::new(),
        };
        node.give("acme", Credential::Joiner(Joiner::mint(&node.root, claims).unwrap()));
        let e = node.identity().await.map(drop).unwrap_err();
        assert!(e.chain().contains("for the group `db`"), "{e}");
        assert_eq!(node.traces(), 0);
    }

    #[tokio::test]
    async fn missing_ticket_is_an_error_and_writes_nothing() {
        let node = test_node();
        let e = node.identity().await.map(drop).unwrap_err();
        assert_eq!(e.exit_code(), 78);
        assert!(e.chain().contains("bakehouse.ticket"), "{e}");
        assert_eq!(node.traces(), 0);
    }

    #[tokio::test]
    async fn only_hubs_keep_their_issuer() {
        let node = test_node();
        node.founder("acme", "hub-1");
        assert!(node.identity().await.unwrap().state.issuer.is_some());
        // A voter that is not a hub, with the state of an earlier version.
        let mut node = test_node();
        for hub in node.image.topology.nodes.iter_mut().filter(|n| n.name == "hub-2") {
            hub.hub = 0;
        }
        node.founder("acme", "hub-2");
        let identity = node.identity().await.unwrap();
        assert!(identity.state.issuer.is_none());
        identity.client().unwrap();
        let issuer = Some(node.root.issuer("acme", "hub-2").unwrap());
        State { issuer, ..identity.state }.store(&node.states()).unwrap();
        assert!(node.identity().await.unwrap().state.issuer.is_none());
        assert!(State::load(&node.states()).unwrap().unwrap().issuer.is_none());
    }

    #[tokio::test]
    async fn certificate_of_founder_matches_its_key() {
        let node = test_node();
        node.founder("acme", "hub-1");
        let identity = node.identity().await.unwrap();
        let own = fleet_https::Identity { cert: &identity.state.cert, key: identity.keys.tls.pem() };
        fleet_https::server(&identity.state.root, own).unwrap();
        fleet_https::client(&identity.state.root, Some(own)).unwrap();
        let other = fleet::PrivateKey::generate().unwrap();
        assert!(fleet_https::server(&identity.state.root, fleet_https::Identity { key: other.pem(), ..own }).is_err());
    }
}
