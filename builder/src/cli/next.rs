//! What a command prints when it is done: the result in a sentence, and what to do next.

use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Instant;

use fleet::{Hardware, Ticket, Token};

use super::context::Context;
use super::output::colour;
use crate::deploy::publish::Published;
use crate::error::{Error, Result};
use crate::image::BuiltImage;
use crate::keys::authority::FleetKey;
use crate::progress::line;
use crate::project::Project;
use crate::util::fs::shown;
use crate::util::time::rfc3339;
use crate::vm::{FleetStatus, HostForward, MachineState, hub_forwards};

/// Prints the summary of a build.
pub(super) fn built(context: &Context, images: &[BuiltImage], started: Instant) {
    let Context { project, progress, .. } = context;
    progress.say("build", &sum(project, images, started.elapsed().as_secs_f64()));
    progress
        .say("next", "`bakehouse up` starts the images on this host; `bakehouse flash NODE DISK` writes a node's disk");
}

fn sum(project: &Project, images: &[BuiltImage], seconds: f64) -> String {
    let new = images.iter().filter(|image| !image.unchanged).count();
    let kept = match images.len() - new {
        0 => String::new(),
        kept => format!(", {kept} unchanged"),
    };
    let word = if images.len() == 1 { "image" } else { "images" };
    format!("{} {word} in {}{kept} ({seconds:.1} s)", images.len(), shown(&project.dir.join("build")))
}

/// Prints how to use the fleet of local machines that `bakehouse up` started.
///
/// # Errors
/// If the fleet key of local machines cannot be read.
pub(super) fn started(context: &Context, status: &FleetStatus) -> Result<()> {
    let Context { project, progress, .. } = context;
    let Some(url) = entrance(project, status) else { return Ok(()) };
    progress.say("open", &format!("{url} (the browser warns about the fleet's own certificate)"));
    // A key of local machines only is no secret for a user who can read their disks. fleet.key is the real fleet's, and
    // standard error may go to a log.
    let password = if project.dir.join(FleetKey::FILE).exists() {
        format!("`odoo_admin` in {}", FleetKey::FILE)
    } else {
        FleetKey::of_vms(project)?.secrets.odoo_admin
    };
    progress.say("log in", &format!("user admin, password: {password}"));
    progress
        .say("next", "`bakehouse rehearse db` stops the primary while you watch; `bakehouse down` stops the machines");
    Ok(())
}

/// Returns Odoo's URL at one hub. Prefers a hub without a database, because `rehearse db` stops the primary.
fn entrance(project: &Project, status: &FleetStatus) -> Option<String> {
    let topology = &project.topology;
    if !topology.nodes.iter().any(|node| node.has_role("app")) {
        return None;
    }
    let forwards = hub_forwards(project);
    let is_up = |name: &str| status.row(name).is_some_and(|row| row.state != MachineState::Off);
    let hubs = topology.hubs.iter().filter(|hub| is_up(&hub.name));
    let hub = hubs.min_by_key(|hub| hub.has_role("db"))?;
    Some(format!("https://{}:{}/", forwards.get(&hub.name)?, HostForward::PORT))
}

/// Warns before the image of a cloud's kernel is written to a whole disk.
pub(super) fn drivers(context: &Context, target: &Path) {
    let is_disk = target.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
    if is_disk && context.project.fleet.image.hardware == Hardware::Cloud && !context.quiet {
        let prefix = if colour() { "\u{1b}[1;33mwarning\u{1b}[0m" } else { "warning" };
        line(&format!(
            "{prefix}: [image] hardware is \"cloud\": this kernel has no drivers for most servers' network cards and \
             RAID controllers\n  help: for a physical server, set `hardware = \"metal\"`, then run `bakehouse lock`"
        ));
    }
}

/// Refuses to print a ticket on a terminal, where others may see it and scrollback keeps it.
///
/// # Errors
/// If standard output is a terminal, and there is no output file.
pub(super) fn refuse_terminal(to: &str, output: Option<&Path>, is_terminal: bool) -> Result<()> {
    if output.is_some() || !is_terminal {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "a ticket is a secret, and standard output is a terminal\n  help: add `-o {to}.ticket`, or pipe the ticket to a \
         program"
    )))
}

/// Prints what a written disk holds, and what to do with it.
pub(super) fn flashed(context: &Context, to: &str, target: &Path, ticket: Option<&Ticket>) {
    let progress = context.progress;
    let disk = shown(target);
    progress.say("flash", &format!("{disk}: {}", contents(to, ticket)));
    progress
        .say("next", &format!("start the machine from {disk}; `bakehouse rollout` lists the node when it has joined"));
}

/// Returns the node, and its ticket with number and validity.
fn contents(to: &str, ticket: Option<&Ticket>) -> String {
    let Some(ticket) = ticket else { return format!("the image of {to}, without a ticket") };
    let Some(claims) = ticket.token().and_then(Token::read) else {
        return format!("{to}, a founder (hub or voter): its ticket does not expire; keep the disk safe");
    };
    let node = match &claims.slot {
        Some(slot) => slot.clone(),
        None => format!("any free slot of {}", claims.group),
    };
    format!(
        "{node}; ticket {} is valid for one machine until {} (`bakehouse ticket --revoke NUMBER` makes it invalid)",
        claims.id,
        rfc3339(claims.expires)
    )
}

/// Prints how nodes get the published images. `first`: the folder was empty before.
pub(super) fn published(context: &Context, dir: &Path, all: &[Published], first: bool) {
    let Context { project, progress, .. } = context;
    if all.iter().all(|one| one.unchanged) {
        return;
    }
    let update = project.fleet.update.get_ref();
    let Some(url) = &update.url else {
        progress
            .say("next", "set `[update] url`: no node looks into this folder, because its image has no address of it");
        return;
    };
    if first {
        let folder = shown(dir);
        progress.say("next", &format!("serve {folder} at {url} with any web server that can send ranges of files"));
    }
    let when = &update.when;
    progress.say(
        "next",
        &format!(
            "nodes look for the version at \"{when}\", and change one after the other: `bakehouse rollout` shows it"
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::ticket::{DEFAULT_TERMS, mint};
    use std::collections::BTreeMap;

    const FLEET: &str =
        "name = \"acme\"\n[groups]\nhub.count = 3\nhub.endpoints = [\"a\", \"b\", \"c\"]\ndb.count = 2\n";

    #[test]
    fn text_about_a_disk_has_slot_ticket_and_validity() {
        let topology = fleet::Topology::from_fleet(&fleet::Fleet::parse("f", FLEET.as_bytes()).unwrap());
        let key = FleetKey::create("acme").unwrap();
        let ticket = |to: &str| mint(&key, &topology, to, &DEFAULT_TERMS, BTreeMap::new()).unwrap();
        let (founder, slot, group) = (ticket("hub-1"), ticket("db-2"), ticket("db"));
        assert!(contents("hub-1", Some(&founder)).starts_with("hub-1, a founder"));
        let claims = slot.token().and_then(Token::read).unwrap();
        let text = contents("db-2", Some(&slot));
        assert!(text.starts_with(&format!("db-2; ticket {} is valid", claims.id)), "{text}");
        assert!(text.contains(&format!("until {}", rfc3339(claims.expires))), "{text}");
        assert!(contents("db", Some(&group)).starts_with("any free slot of db; ticket "));
        assert_eq!(contents("db", None), "the image of db, without a ticket");
    }

    #[test]
    fn refuses_to_print_a_ticket_on_a_terminal() {
        let e = refuse_terminal("app", None, true).unwrap_err().to_string();
        assert!(e.contains("standard output is a terminal") && e.contains("add `-o app.ticket`"), "{e}");
        assert!(refuse_terminal("app", None, false).is_ok());
        assert!(refuse_terminal("app", Some(Path::new("f")), true).is_ok());
    }

    #[test]
    fn url_is_that_of_a_hub_without_a_database() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("fleet.toml"), crate::project::built_in_fleet("quick-ha").unwrap()).unwrap();
        let project = Project::load(dir.path()).unwrap();
        let mut status = FleetStatus::read(&project);
        assert_eq!(entrance(&project, &status), None, "no machine runs");
        status.nodes.iter_mut().for_each(|row| row.state = MachineState::Ready);
        let url = entrance(&project, &status).unwrap();
        assert_eq!(url, format!("https://{}:8443/", hub_forwards(&project)["front-1"]));
    }

    #[test]
    fn summary_of_a_build_counts_images() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("fleet.toml"), FLEET).unwrap();
        let project = Project::load(dir.path()).unwrap();
        let image = |group: &str, unchanged| BuiltImage {
            group: group.to_owned(),
            disk: "d".into(),
            uki: "u".into(),
            manifest: "m".into(),
            unchanged,
        };
        let build = dir.path().join("build");
        let images = [image("hub", true), image("db", false)];
        assert_eq!(sum(&project, &images, 2.25), format!("2 images in {}, 1 unchanged (2.2 s)", build.display()));
        assert_eq!(sum(&project, &images[1..], 2.0), format!("1 image in {} (2.0 s)", build.display()));
    }
}
