//! `bakehouse open page`: the fleet's page in the operator's browser.

use std::fs::OpenOptions;
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::access::NodeContext;
use super::node_results::OpenResult;
use super::output::print;
use super::results::{CommandResult, Event};
use super::verbs::OpenArgs;
use crate::deploy::nodes::{self, Entrance, FleetPage};
use crate::error::{Error, Result};

/// Name of the page in results.
const NAME: &str = "page";
/// Role of the nodes that serve it.
const ROLE: &str = "monitor";

/// Serves the page of the first monitor that answers, until Ctrl-C.
pub(super) fn open_page(context: &NodeContext, args: &OpenArgs) -> Result<CommandResult> {
    let reach = context.reach(&args.access)??;
    let monitors = reach.nodes.iter().filter(|node| node.roles.iter().any(|role| role == ROLE));
    let candidates: Vec<&str> = match &args.node {
        Some(node) => vec![reach.node(node)?.name.as_str()],
        None => monitors.map(|node| node.name.as_str()).collect(),
    };
    if candidates.is_empty() {
        return Err(Error::Usage(format!("the fleet has no node with the role `{ROLE}`, which serves this page")));
    }
    nodes::run(async {
        let mut failures = Vec::new();
        for node in candidates {
            let (client, fleet, operator) = (&reach.client, reach.fleet.as_str(), &reach.operator);
            let page = FleetPage { client, node, fleet, operator, nodes: &reach.nodes };
            // A first connection, so that a monitor without the page is an error here and not in the browser.
            if let Err(e) = page.check().await {
                failures.push(e.chain());
                continue;
            }
            let entrance = Entrance::open().await?;
            let opened = OpenResult { page: NAME.to_owned(), node: node.to_owned(), url: entrance.link() };
            context.output.event(Event::Open(&opened))?;
            if !context.output.json {
                print(format!("{}\n", opened.url))?;
            }
            context.progress.say("open", &format!("page of {node}, until Ctrl-C; the link is secret"));
            let _shown = if context.output.json { None } else { show(&opened.url) };
            page.serve(entrance).await?;
        }
        Err(Error::Failed(format!("no node serves the page:\n  {}", failures.join("\n  "))))
    })?
}

/// Opens the link in the user's browser, if the command runs on a desktop.
fn show(link: &str) -> Option<Redirect> {
    let is_desktop = ["DISPLAY", "WAYLAND_DISPLAY"].iter().any(|name| std::env::var_os(name).is_some());
    let dir = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?);
    if !is_desktop || !std::io::stdout().is_terminal() {
        return None;
    }
    let redirect = Redirect::write(&dir, link)?;
    let mut browser = Command::new("xdg-open");
    browser.arg(&redirect.0).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = browser.spawn().ok()?;
    // The link is on the terminal, too.
    std::thread::spawn(move || child.wait());
    Some(redirect)
}

/// A file that leads the browser to the link. Every user of this host can read the arguments of `xdg-open`, so the link
/// is not one of them. Dropping it removes the file.
struct Redirect(PathBuf);

impl Redirect {
    fn write(dir: &Path, link: &str) -> Option<Self> {
        let path = dir.join(format!("bakehouse-page-{}.html", std::process::id()));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).ok()?;
        let redirect = Self(path);
        writeln!(file, "<!doctype html><meta http-equiv=\"refresh\" content=\"0;url={link}\"><title>Bakehouse</title>")
            .ok()?;
        Some(redirect)
    }
}

impl Drop for Redirect {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn only_the_user_reads_the_link() {
        let dir = tempfile::tempdir().unwrap();
        let redirect = Redirect::write(dir.path(), "http://127.0.0.1:1/bakehouse/x").unwrap();
        assert_eq!(std::fs::metadata(&redirect.0).unwrap().mode() & 0o777, 0o600);
        assert!(std::fs::read_to_string(&redirect.0).unwrap().contains("url=http://127.0.0.1:1/bakehouse/x\""));
        // The file of another process stays as it is.
        assert!(Redirect::write(dir.path(), "http://127.0.0.1:2/").is_none());
        let path = redirect.0.clone();
        drop(redirect);
        assert!(!path.exists());
    }
}
