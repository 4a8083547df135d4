//! Who this node is: remembered; or founded, by its ticket alone; or granted, by the hubs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fleet::{Credential, Founder, Grant, Joiner, MeshKey, Node, Ticket};
use tokio_rustls::rustls::ClientConfig;

use crate::error::{Error, Result};
use crate::host::console::say;
use crate::host::journal::Event;
use crate::node::hubs::Hubs;
use crate::node::image::Image;
use crate::node::join::join;
use crate::node::keys::Keys;
use crate::node::neighbours::PeerTable;
use crate::node::state::{State, StateDir};

/// Everything a node is, on its disk by the time this is returned.
pub struct Identity {
    pub keys: Keys,
    pub state: State,
    pub neighbourhood: Arc<PeerTable>,
}

impl Identity {
    /// How this node shows itself to others of the fleet.
    ///
    /// # Errors
    /// What it keeps does not fit together.
    pub fn client(&self) -> Result<Arc<ClientConfig>> {
        let own = fleet_https::Identity { cert: &self.state.cert, key: self.keys.tls.pem() };
        Ok(fleet_https::client(&self.state.root, Some(own))?)
    }
}

/// Remembers, founds, or asks; each step is on the disk before the next one begins.
///
/// # Errors
/// What only a person can mend. Hubs that don't answer are asked for ever.
pub async fn identity(dir: &StateDir, credentials: Option<&PathBuf>, image: &Image) -> Result<Identity> {
    if let Some(mut state) = State::load(dir)? {
        // Earlier versions kept it on voters that are not hubs, which sign nobody.
        if node_of(&state, image)?.hub == 0 && state.issuer.take().is_some() {
            state.store(dir)?;
        }
        println!("{} since an earlier boot", state.slot);
        let keys = Keys::load_or_make(dir)?;
        return Ok(Identity { keys, state, neighbourhood: Arc::new(PeerTable::load(dir.path(), BTreeMap::new())) });
    }
    let ticket = read_ticket(credentials)?;
    if ticket.fleet != image.topology.name {
        return Err(wrong(&format!("of the fleet `{}`, this image is of `{}`", ticket.fleet, image.topology.name)));
    }
    let first = |slot: &str, epoch| State {
        endpoints: ticket.endpoints.clone(),
        ..State::new(&image.topology, slot, epoch, &ticket.root)
    };
    // A ticket that is wrong leaves no trace: keys are made once it is known to fit.
    let (keys, state, known) = match &ticket.right {
        Credential::Founder(founder) => {
            let state = first(&founder.slot, 1);
            let node = node_of(&state, image)?.clone();
            let keys = Keys::load_or_make(dir)?;
            let state = found(state, founder, &node, image, &keys)?;
            match &founder.replaces {
                None => (keys, state, BTreeMap::new()),
                Some(joiner) => {
                    let hubs = Hubs::of(
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
            let hubs = Hubs::of(&image.topology, &ticket.endpoints, "", fleet_https::client(&ticket.root, None)?);
            let grant = join(&hubs, joiner, image, &keys).await?;
            let (state, known) = granted(first(&grant.slot, grant.epoch), grant);
            node_of(&state, image)?;
            (keys, state, known)
        }
    };
    let neighbourhood = Arc::new(PeerTable::load(dir.path(), BTreeMap::new()));
    for (slot, key) in &known {
        neighbourhood.learn(slot, *key);
    }
    neighbourhood.flush();
    state.store(dir)?;
    say(Event::Joined, &format!("{} of the fleet {}", state.slot, state.fleet));
    Ok(Identity { keys, state, neighbourhood })
}

/// This state's node in this image's plan.
///
/// # Errors
/// The image is another fleet's or another group's, or its plan has no such slot.
pub fn node_of<'a>(state: &State, image: &'a Image) -> Result<&'a Node> {
    if state.fleet != image.topology.name {
        return Err(Error::Configuration(format!(
            "this node is of the fleet `{}`, the image is of `{}`; wipe /var to move it",
            state.fleet, image.topology.name
        )));
    }
    let Some(node) = image.topology.node(&state.slot) else {
        return Err(Error::Configuration(format!(
            "this node is {}, which version {} of the fleet does not have; put the slot back into fleet.toml, or wipe the node",
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

/// A founder signs its own certificate, and tells no other node yet. Hubs keep the issuer, to sign other nodes
/// and their own next keys; a voter that is not a hub has no further use for it.
fn found(state: State, founder: &Founder, node: &Node, image: &Image, keys: &Keys) -> Result<State> {
    let cert = founder.issuer.node(&image.topology, node, &keys.tls.public()?)?;
    let issuer = (node.hub > 0).then(|| founder.issuer.clone());
    Ok(State { cert, secrets: founder.secrets.clone(), issuer, ..state })
}

fn granted(state: State, grant: Grant) -> (State, BTreeMap<String, MeshKey>) {
    (State { cert: grant.cert, secrets: grant.secrets, ..state }, grant.hubs)
}

/// What can be said of a token without asking anybody.
fn check_token(joiner: &Joiner, image: &Image) -> Result<()> {
    let claims = joiner.token.read().ok_or_else(|| wrong("damaged"))?;
    if claims.group != image.info.group {
        return Err(wrong(&format!("for the group `{}`, this image is for `{}`", claims.group, image.info.group)));
    }
    Ok(())
}

fn read_ticket(credentials: Option<&PathBuf>) -> Result<Ticket> {
    let given = credentials.map(|dir| dir.join(Ticket::CREDENTIAL));
    let on_disk = Path::new("/efi").join(Ticket::FILE);
    let path = given.into_iter().chain([on_disk]).find(|path| path.exists());
    let Some(path) = path else {
        return Err(Error::Configuration(
            "no ticket: give this machine the credential `bakehouse.ticket`, made by `bakehouse ticket`".to_owned(),
        ));
    };
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    Ticket::parse(&bytes).map_err(|e| Error::Configuration(e.to_string()))
}

fn wrong(why: &str) -> Error {
    Error::Configuration(format!("the ticket is {why}; mint one with `bakehouse ticket`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::image::ImageInfo;
    use fleet::{Claims, Issuer, Secrets, Topology};

    struct Lab {
        dir: tempfile::TempDir,
        image: Image,
        root: Issuer,
    }

    fn lab() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("state")).unwrap();
        fs::create_dir(dir.path().join("credentials")).unwrap();
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\n";
        let topology = Topology::of(&fleet::Fleet::parse("f", toml).unwrap());
        let info = ImageInfo {
            id: "acme-hub".into(),
            version: "1".into(),
            group: "hub".into(),
            roles: vec!["hub".into()],
            health: Vec::new(),
        };
        Lab { dir, image: Image { info, topology }, root: Issuer::root("acme").unwrap() }
    }

    impl Lab {
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

        async fn who(&self) -> Result<Identity> {
            identity(&self.states(), Some(&self.dir.path().join("credentials")), &self.image).await
        }

        fn traces(&self) -> usize {
            fs::read_dir(self.dir.path().join("state")).unwrap().count()
        }
    }

    #[tokio::test]
    async fn a_node_keeps_its_slot_and_keys_whatever_ticket_it_is_given_later() {
        let lab = lab();
        lab.founder("acme", "hub-1");
        let one = lab.who().await.unwrap();
        lab.founder("acme", "hub-2");
        let two = lab.who().await.unwrap();
        assert_eq!((one.state.slot.as_str(), two.state.slot.as_str()), ("hub-1", "hub-1"));
        assert!(one.keys == two.keys && one.state == two.state);
    }

    #[tokio::test]
    async fn a_cut_between_keys_and_grant_keeps_the_keys() {
        let lab = lab();
        let keys = Keys::load_or_make(&lab.states()).unwrap();
        lab.founder("acme", "hub-1");
        assert!(lab.who().await.unwrap().keys == keys);
    }

    #[tokio::test]
    async fn a_ticket_that_does_not_fit_says_why_and_leaves_no_trace() {
        let lab = lab();
        for (fleet, slot, words) in [
            ("other", "hub-1", "of the fleet `other`"),
            ("acme", "hub-9", "does not have"),
            ("acme", "db-1", "boot the image of `db`"),
        ] {
            lab.founder(fleet, slot);
            let e = lab.who().await.map(drop).unwrap_err();
            assert_eq!(e.exit_code(), 78);
            assert!(e.to_string().contains(words), "{e}");
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
        lab.give("acme", Credential::Joiner(Joiner::mint(&lab.root, claims).unwrap()));
        let e = lab.who().await.map(drop).unwrap_err();
        assert!(e.to_string().contains("for the group `db`"), "{e}");
        assert_eq!(lab.traces(), 0);
    }

    #[tokio::test]
    async fn without_a_ticket_the_fix_is_told_and_nothing_is_written() {
        let lab = lab();
        let e = lab.who().await.map(drop).unwrap_err();
        assert_eq!(e.exit_code(), 78);
        assert!(e.to_string().contains("bakehouse.ticket"), "{e}");
        assert_eq!(lab.traces(), 0);
    }

    #[tokio::test]
    async fn only_a_hub_keeps_its_issuer() {
        let lab = lab();
        lab.founder("acme", "hub-1");
        assert!(lab.who().await.unwrap().state.issuer.is_some());
        // A voter that is not a hub, with a state of an earlier version.
        let mut lab = self::lab();
        for node in lab.image.topology.nodes.iter_mut().filter(|n| n.name == "hub-2") {
            node.hub = 0;
        }
        lab.founder("acme", "hub-2");
        let who = lab.who().await.unwrap();
        assert!(who.state.issuer.is_none());
        who.client().unwrap();
        let issuer = Some(lab.root.issuer("acme", "hub-2").unwrap());
        State { issuer, ..who.state }.store(&lab.states()).unwrap();
        assert!(lab.who().await.unwrap().state.issuer.is_none());
        assert!(State::load(&lab.states()).unwrap().unwrap().issuer.is_none());
    }

    #[tokio::test]
    async fn a_founders_certificate_is_its_own_keys() {
        let lab = lab();
        lab.founder("acme", "hub-1");
        let who = lab.who().await.unwrap();
        let own = fleet_https::Identity { cert: &who.state.cert, key: who.keys.tls.pem() };
        fleet_https::server(&who.state.root, own).unwrap();
        fleet_https::client(&who.state.root, Some(own)).unwrap();
        let other = fleet::PrivateKey::generate().unwrap();
        assert!(fleet_https::server(&who.state.root, fleet_https::Identity { key: other.pem(), ..own }).is_err());
    }
}
