//! How a command reaches the nodes: operator's file, hubs, and whether local machines are the target.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, IsTerminal as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::Operator;

use super::output::Output;
use super::problem::Problem;
use super::verbs::AccessArgs;
use crate::deploy::nodes::{Client, Entry};
use crate::error::{Error, Result, fail};
use crate::keys::operator::{KnownNode, OperatorFile};
use crate::keys::operator_places::{Places, config_dir};
use crate::progress::Progress;
use crate::project::Project;
use crate::util::fs::shown;
use crate::util::time::rfc3339;
use crate::vm;

/// What a command for running nodes gets. An operator's machine may have no fleet's folder.
pub(super) struct NodeContext<'a> {
    pub(super) project: Option<&'a Project>,
    /// Folder of `fleet.toml`, or where it would be.
    pub(super) folder: &'a Path,
    pub(super) progress: &'a Progress,
    pub(super) output: Output,
    /// Warnings of the command.
    pub(super) warnings: RefCell<Vec<Problem>>,
}

/// The way to the nodes.
pub(super) struct Reach {
    pub(super) client: Client,
    pub(super) nodes: Vec<KnownNode>,
    /// Name of the fleet.
    pub(super) fleet: String,
    /// Whether the nodes are local machines.
    pub(super) is_local: bool,
    /// The operator whose certificate the client presents.
    pub(super) operator: Operator,
    /// Expiry of that certificate, in seconds since 1970.
    pub(super) expires: u64,
}

/// An operator's file, and the hubs that it reaches.
pub(super) struct Operated {
    pub(super) file: OperatorFile,
    pub(super) entries: Vec<Entry>,
    /// TCP port of the hubs' API.
    pub(super) port: u16,
    nodes: Vec<KnownNode>,
    fleet: String,
    is_local: bool,
}

/// What is missing on the way to the nodes, and the fix.
pub(super) struct Missing(String);

impl From<Missing> for Error {
    fn from(missing: Missing) -> Self {
        Self::Failed(missing.0)
    }
}

impl Missing {
    /// Returns the text on one line, for progress output.
    pub(super) fn line(&self) -> String {
        self.0.replace("\n  help: ", ": ")
    }

    /// Returns the fix for a real fleet, as a further part of another help.
    pub(super) fn help(&self) -> String {
        let last = self.0.rsplit("; ").next().filter(|part| part.contains("operator add"));
        last.map(|part| format!("; {part}")).unwrap_or_default()
    }
}

impl NodeContext<'_> {
    /// Warns about a fact that the result lacks.
    pub(super) fn warn_that(&self, step: &str, message: String) {
        self.progress.say(step, &message);
        self.warnings.borrow_mut().push(Problem::warning(message));
    }

    /// Returns the warnings about the fleet's files, and those of the command.
    pub(super) fn warnings(&self) -> Vec<Problem> {
        let of_files = self.project.iter().flat_map(|project| project.warnings.iter().map(Problem::from));
        of_files.chain(self.warnings.borrow().iter().cloned()).collect()
    }

    /// Whether local machines are the target: `--endpoint local`, or machines that run on this host.
    pub(super) fn is_local(&self, access: &AccessArgs) -> bool {
        let runs = || self.project.is_some_and(|project| !vm::running(project).is_empty());
        access.endpoint == ["local"] || access.endpoint.is_empty() && runs()
    }

    /// Returns the way to the nodes, or what is missing.
    ///
    /// # Errors
    /// If a file cannot be read, is for another fleet, or has expired, or `--endpoint` is invalid.
    pub(super) fn reach(&self, access: &AccessArgs) -> Result<Result<Reach, Missing>> {
        let Operated { file, entries, port, nodes, fleet, is_local } = match self.operated(access)? {
            Ok(operated) => operated,
            Err(missing) => return Ok(Err(missing)),
        };
        let client = Client::new(&file, entries, port)?;
        let (operator, expires) = (file.operator, file.expires);
        Ok(Ok(Reach { client, nodes, fleet, is_local, operator, expires }))
    }

    /// Returns the operator's file with the hubs, or what is missing.
    ///
    /// # Errors
    /// As [`Self::reach`].
    pub(super) fn operated(&self, access: &AccessArgs) -> Result<Result<Operated, Missing>> {
        let is_local = self.is_local(access);
        let places = Places {
            given: access.operator.as_deref(),
            folder: self.folder,
            config: config_dir(),
            fleet: self.project.map(|project| project.topology.name.as_str()),
            local: self.project.filter(|_| is_local),
        };
        let Some(path) = places.find()? else { return Ok(Err(self.no_file(is_local, &places.in_folder()?.0))) };
        let file = OperatorFile::read(&path)?;
        let fleet = self.project.map_or(&file.fleet, |project| &project.topology.name).clone();
        if file.fleet != fleet {
            return fail(format!("{} is for the fleet `{}`, not for `{fleet}`", path.display(), file.fleet));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if file.expires <= now {
            let expired = format!("the certificate in {} has expired at {}", path.display(), rfc3339(file.expires));
            if is_local {
                // Local machines also have ports for commands.
                return Ok(Err(Missing(format!("{expired}\n  help: `bakehouse up` renews it"))));
            }
            return fail(format!("{expired}\n  help: `bakehouse operator add` makes a new one"));
        }
        let nodes = self.project.map_or_else(|| file.nodes.clone(), |project| KnownNode::all(&project.topology));
        let port = self.project.map_or(file.port, |project| project.topology.mesh.port);
        let entries = match self.project {
            Some(project) if is_local => {
                let forwards = vm::hub_forwards(project).into_iter();
                let running = vm::running(project);
                let up = forwards.filter(|(hub, _)| running.contains(&hub.as_str()));
                up.map(|(hub, host)| Entry { hub, host }).collect()
            }
            _ => entries(&nodes, &access.endpoint)?,
        };
        if entries.is_empty() {
            return Ok(Err(Missing(
                "no hub's address is known\n  help: set `endpoints` of the hubs in fleet.toml, or add `--endpoint HUB=HOST`"
                    .to_owned(),
            )));
        }
        Ok(Ok(Operated { file, entries, port, nodes, fleet, is_local }))
    }

    /// `others`: files of other persons in the fleet's folder.
    fn no_file(&self, is_local: bool, others: &[PathBuf]) -> Missing {
        Missing(if is_local {
            "there is no operator's file for the local machines\n  help: `bakehouse up` makes one, unless fleet.key is \
             encrypted; then `bakehouse operator add NAME --role admin --own` makes one"
                .to_owned()
        } else if let Some(other) = others.first() {
            format!(
                "no machine of the fleet runs on this host, and {} was made for another person or machine\n  help: \
                 `bakehouse up` starts local machines; `bakehouse operator add NAME --role ROLE --own` makes an \
                 operator's file for you",
                shown(other)
            )
        } else if self.project.is_some() {
            "no machine of the fleet runs on this host, and there is no operator's file for a real fleet\n  help: \
             `bakehouse up` starts local machines; `bakehouse operator add NAME --role ROLE --own` makes an operator's \
             file"
                .to_owned()
        } else {
            format!(
                "there is no fleet.toml and no operator's file in {}\n  help: `--operator FILE` names an operator's file, \
                 and `bakehouse -C DIR` a fleet's folder",
                self.folder.display()
            )
        })
    }
}

impl Reach {
    /// Returns the node with this name.
    ///
    /// # Errors
    /// If there is no such node. The error lists all nodes.
    pub(super) fn node(&self, name: &str) -> Result<&KnownNode> {
        self.nodes.iter().find(|node| node.name == name).ok_or_else(|| {
            let known: Vec<&str> = self.nodes.iter().map(|n| n.name.as_str()).collect();
            Error::Usage(format!("there is no node `{name}`; there are: {}", known.join(", ")))
        })
    }
}

/// Returns the hubs with their hosts. `given` replaces the known ones.
fn entries(nodes: &[KnownNode], given: &[String]) -> Result<Vec<Entry>> {
    let hubs: Vec<&KnownNode> = nodes.iter().filter(|node| node.roles.iter().any(|role| role == "hub")).collect();
    let given = parse_endpoints(given, &hubs.iter().map(|hub| hub.name.as_str()).collect::<Vec<_>>())?;
    let host = |hub: &KnownNode| given.get(&hub.name).or(hub.endpoint.as_ref()).cloned();
    // A host that the operator named comes first.
    let (named, others): (Vec<_>, Vec<_>) = hubs.into_iter().partition(|hub| given.contains_key(&hub.name));
    let all = named.into_iter().chain(others);
    Ok(all.filter_map(|hub| host(hub).map(|host| Entry { hub: hub.name.clone(), host })).collect())
}

/// Parses `hub-1=192.0.2.1`. Rejects hubs that the fleet does not have.
pub(super) fn parse_endpoints(given: &[String], hubs: &[&str]) -> Result<BTreeMap<String, String>> {
    let parse = |text: &String| {
        let (hub, host) = text.split_once('=').unwrap_or((text, ""));
        if hubs.contains(&hub) && !host.is_empty() {
            return Ok((hub.to_owned(), host.to_owned()));
        }
        Err(Error::Usage(format!("`{text}` is not HUB=HOST; hubs are {}", hubs.join(", "))))
    };
    given.iter().map(parse).collect()
}

/// Asks for consent on a terminal. `action` is a question without its question mark.
///
/// # Errors
/// If standard input is no terminal, or the answer is not yes.
pub(super) fn confirm(action: &str, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(Error::Usage(format!("{action} needs your consent\n  help: add --yes")));
    }
    eprint!("{action}? [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(Error::io("read", "the answer"))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") { Ok(()) } else { fail("cancelled; nothing was changed") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(name: &str, endpoint: Option<&str>) -> KnownNode {
        KnownNode {
            name: name.to_owned(),
            group: "hub".to_owned(),
            roles: vec!["hub".to_owned()],
            address: "10.10.0.1".to_owned(),
            endpoint: endpoint.map(str::to_owned),
        }
    }

    #[test]
    fn given_hosts_replace_known_ones_and_come_first() {
        let db = KnownNode { roles: vec!["db".to_owned()], ..hub("db-1", Some("x")) };
        let nodes = [hub("hub-1", Some("a")), hub("hub-2", Some("b")), hub("hub-3", None), db];
        let text = |given: &[&str]| -> Result<String> {
            let given: Vec<String> = given.iter().map(|g| (*g).to_owned()).collect();
            let all = entries(&nodes, &given)?;
            Ok(all.iter().map(|e| format!("{}={}", e.hub, e.host)).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(text(&[]).unwrap(), "hub-1=a hub-2=b");
        assert_eq!(text(&["hub-3=c", "hub-2=d"]).unwrap(), "hub-2=d hub-3=c hub-1=a");
        for invalid in ["hub-9=x", "hub-1", "hub-1=", "db-1=x"] {
            let e = text(&[invalid]).unwrap_err();
            assert!(e.to_string().contains("hubs are hub-1, hub-2, hub-3"), "{e}");
        }
    }
}
