//! What happens at a boot, in order.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use fleet::{Membership, NodeContext, Ticket};
use futures_util::future::try_join_all;

use crate::console::say;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::machine;
use crate::notify::notify;
use crate::render::render_all;
use crate::state::{State, StateFile};
use crate::systemd::{self, Systemd};

/// Name of the systemd credential that holds the certificate and key for browsers, PEM.
const WEB_CERTIFICATE: &str = "bakehouse.web-certificate";

/// Where things are on a node; another root in tests.
pub struct Paths {
    /// The image's part: `fleet.json`, `image.json`, `templates/`.
    pub image: PathBuf,
    pub state: PathBuf,
    /// Root below which templates are rendered.
    pub root: PathBuf,
    pub credentials: Option<PathBuf>,
}

impl Paths {
    #[must_use]
    pub fn of_node() -> Self {
        Self {
            image: Path::new("/").join(fleet::IMAGE_DIR),
            state: env::var_os("STATE_DIRECTORY").map_or_else(|| "/var/lib/bakehouse".into(), PathBuf::from),
            root: "/".into(),
            credentials: env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from),
        }
    }
}

/// Makes this machine its node. Returns the node's name when its roles run.
///
/// # Errors
/// What is wrong; see [`Error::exit_code`] for whether trying again can help.
pub async fn run(paths: &Paths) -> Result<String> {
    let image = Image::read(&paths.image)?;
    let state = identity(paths, &image)?;
    let Some(node) = image.topology.node(&state.slot) else {
        return Err(Error::Configuration(format!(
            "this node is {}, which version {} of the fleet does not have; put the slot back into fleet.toml, or wipe the node",
            state.slot, image.topology.version
        )));
    };
    let member = &state.membership;
    let context = NodeContext {
        fleet: &image.topology,
        node,
        machine: machine::read()?,
        tls: &member.tls,
        secrets: &member.secrets,
        web: &web_certificate(paths, member)?,
    };
    let count = render_all(&paths.image.join("templates"), &paths.root, &context)?;
    println!("{}: {count} configurations rendered", node.name);
    // Units may be ordered after the agent's start, never after its end.
    notify("READY=1");
    let bus = zbus::Connection::system().await?;
    systemd::set_hostname(&bus, &node.name).await?;
    // The node's mesh address is in a file that was just rendered.
    systemd::reload_networkd(&bus).await?;
    let units = Systemd::new(&bus).await?;
    units.start("role-base.target").await?;
    say(&format!("{}: starting {}", node.name, node.roles.join(", ")));
    // All at once: a role may wait for another one, here or elsewhere.
    try_join_all(node.roles.iter().map(async |role| {
        units.start(&format!("role-{role}.target")).await?;
        println!("{}: {role} runs", node.name);
        Ok::<_, Error>(())
    }))
    .await?;
    Ok(node.name.clone())
}

/// Certificate and key that browsers see: the user's, else the node's own, which the fleet's
/// authority signed.
fn web_certificate(paths: &Paths, member: &Membership) -> Result<String> {
    let given = paths.credentials.as_ref().map(|dir| dir.join(WEB_CERTIFICATE)).filter(|path| path.exists());
    match given {
        Some(path) => fs::read_to_string(&path).map_err(Error::io("read", &path)),
        None => Ok(format!("{}{}", member.tls.cert, member.tls.key)),
    }
}

/// The slot this node holds: remembered, or taken from the ticket and remembered.
fn identity(paths: &Paths, image: &Image) -> Result<State> {
    let file = StateFile::in_dir(&paths.state);
    if let Some(state) = file.load()? {
        if state.fleet != image.topology.name {
            return Err(Error::Configuration(format!(
                "this node is of the fleet `{}`, the image is of `{}`; wipe /var to move it",
                state.fleet, image.topology.name
            )));
        }
        println!("{} since an earlier boot", state.slot);
        return Ok(state);
    }
    let ticket = paths.credentials.as_ref().map(|dir| dir.join(Ticket::CREDENTIAL)).filter(|path| path.exists());
    let Some(path) = ticket else {
        return Err(Error::Configuration(
            "no ticket: give this machine the credential `bakehouse.ticket` (`bakehouse up`, `flash` and `netboot` do)"
                .to_owned(),
        ));
    };
    let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
    let ticket = Ticket::parse(&bytes).map_err(|e| Error::Configuration(e.to_string()))?;
    let state = State::from_ticket(&ticket, image)?;
    file.store(&state)?;
    println!("{} by its ticket", state.slot);
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Lab {
        dir: tempfile::TempDir,
        paths: Paths,
        image: Image,
    }

    fn lab() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let paths = Paths {
            image: path("image"),
            state: path("state"),
            root: path("root"),
            credentials: Some(path("credentials")),
        };
        let fleet = fleet::Fleet::parse("f", b"name = \"acme\"\ngroups.hub.count = 3\n").unwrap();
        let topology = fleet::Topology::of(&fleet);
        fs::write(paths.image.join("fleet.json"), serde_json::to_vec(&topology).unwrap()).unwrap();
        fs::write(paths.image.join("image.json"), r#"{"id":"acme-hub","version":"1","group":"hub","roles":["hub"]}"#)
            .unwrap();
        let image = Image::read(&paths.image).unwrap();
        Lab { dir, paths, image }
    }

    impl Lab {
        fn give(&self, ticket: &Ticket) {
            let path = self.dir.path().join("credentials").join(Ticket::CREDENTIAL);
            fs::write(path, serde_json::to_vec(ticket).unwrap()).unwrap();
        }
    }

    #[test]
    fn a_node_keeps_its_slot_whatever_ticket_it_is_given_later() {
        let lab = lab();
        lab.give(&Ticket::founder("acme", "hub-1", Membership::sample()));
        assert_eq!(identity(&lab.paths, &lab.image).unwrap().slot, "hub-1");
        lab.give(&Ticket::founder("acme", "hub-2", Membership::sample()));
        assert_eq!(identity(&lab.paths, &lab.image).unwrap().slot, "hub-1");
    }

    #[test]
    fn without_a_ticket_the_fix_is_told_and_nothing_is_written() {
        let lab = lab();
        let e = identity(&lab.paths, &lab.image).unwrap_err();
        assert_eq!(e.exit_code(), 78);
        assert!(e.to_string().contains("bakehouse.ticket"), "{e}");
        assert_eq!(fs::read_dir(&lab.paths.state).unwrap().count(), 0);
    }

    #[test]
    fn another_fleets_ticket_leaves_no_trace() {
        let lab = lab();
        lab.give(&Ticket::founder("other", "hub-1", Membership::sample()));
        assert_eq!(identity(&lab.paths, &lab.image).unwrap_err().exit_code(), 78);
        assert_eq!(fs::read_dir(&lab.paths.state).unwrap().count(), 0);
    }
}
