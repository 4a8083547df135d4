//! What every command gets: the fleet, the progress output, and the hubs.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::access::parse_endpoints;
use super::output::{Output, colour};
use super::problem::Problem;
use crate::deploy::hub_client::Hubs;
use crate::error::Result;
use crate::keys::authority::FleetKey;
use crate::progress::{Progress, line};
use crate::project::Project;
use crate::vm;

/// A command's fleet and output.
pub(super) struct Context<'a> {
    pub(super) project: &'a Project,
    pub(super) progress: &'a Progress,
    pub(super) output: Output,
    /// Prints only errors.
    pub(super) quiet: bool,
    /// Warnings of the command.
    pub(super) warnings: RefCell<Vec<Problem>>,
}

impl Context<'_> {
    /// Prints the warnings about the fleet's files to standard error.
    pub(super) fn warn(&self) {
        if !self.quiet && !self.output.json {
            self.project.warnings.iter().for_each(|w| line(&w.render(colour())));
        }
    }

    /// Warns about a fact that the result lacks.
    pub(super) fn warn_that(&self, step: &str, message: String) {
        self.progress.say(step, &message);
        self.warnings.borrow_mut().push(Problem::warning(message));
    }

    /// Returns the warnings about the fleet's files, and those of the command.
    pub(super) fn warnings(&self) -> Vec<Problem> {
        let of_files = self.project.warnings.iter().map(Problem::from);
        of_files.chain(self.warnings.borrow().iter().cloned()).collect()
    }

    /// Returns a client of the hubs. `local` as endpoint selects the hubs that `up` started.
    pub(super) fn hubs(&self, endpoint: &[String]) -> Result<Hubs<'_>> {
        let authority = FleetKey::load(self.project)?;
        let is_local = endpoint == ["local"];
        let endpoints = if is_local { vm::hub_forwards(self.project) } else { self.endpoints(endpoint)? };
        let runs = || !vm::running(self.project).is_empty();
        let help = "`--endpoint local` sends the order to the machines that `bakehouse up` started";
        let help = (endpoint.is_empty() && runs()).then_some(help);
        Ok(Hubs { authority, topology: &self.project.topology, endpoints, help })
    }

    /// Parses `hub-1=192.0.2.1`. Rejects hubs that the fleet does not have.
    pub(super) fn endpoints(&self, given: &[String]) -> Result<BTreeMap<String, String>> {
        parse_endpoints(given, &self.project.topology.hubs.iter().map(|hub| hub.name.as_str()).collect::<Vec<_>>())
    }
}
