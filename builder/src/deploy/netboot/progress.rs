//! Progress of the machines. On a terminal, each machine has a line that changes in place; otherwise each change prints
//! a line.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use fleet::netboot::printable;
use schemars::JsonSchema;
use serde::Serialize;

use crate::progress::{Progress, Step};

/// Maximum number of shown machines without a node, because every host on the network can invent machines.
const MAX_ROWS: usize = 256;
/// Maximum length of a line in characters.
const MAX_LINE: usize = 400;

/// State of a machine that boots from the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct MachineChange {
    /// MAC address or serial number.
    pub machine: String,
    /// Node that the machine becomes; `null` if fleet.toml assigns none.
    pub node: Option<String>,
    /// What the machine does, as a text.
    pub state: String,
}

/// Receiver of machines' states.
pub(crate) type MachineEvents = Arc<dyn Fn(MachineChange) + Send + Sync>;

/// Shows the progress of machines.
pub(super) struct NetbootProgress {
    progress: Progress,
    on_change: Option<MachineEvents>,
    /// By MAC address or serial number.
    rows: Mutex<BTreeMap<String, MachineRow>>,
}

struct MachineRow {
    /// The machine's line on a terminal. Elsewhere each change is a line of its own.
    step: Option<Step>,
    last_line: String,
}

impl NetbootProgress {
    /// Returns an empty list of machines. `on_change` gets each change.
    #[must_use]
    pub(super) fn new(progress: Progress, on_change: Option<MachineEvents>) -> Self {
        Self { progress, on_change, rows: Mutex::default() }
    }

    /// Prints a machine's state when it changes. The text comes from the machine, so control characters in it are
    /// escaped.
    pub(super) fn report(&self, machine: &str, node: Option<&str>, state: &str) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        // fleet.toml limits the number of machines with a node.
        if node.is_none() && rows.len() >= MAX_ROWS && !rows.contains_key(machine) {
            return;
        }
        let line = shown(machine, node, state);
        let row = rows.entry(machine.to_owned()).or_insert_with(|| MachineRow {
            step: self.progress.is_live().then(|| self.progress.step("machine", &printable(machine))),
            last_line: String::new(),
        });
        if row.last_line == line {
            return;
        }
        if let Some(step) = &row.step {
            step.message(&line);
        }
        row.last_line.clone_from(&line);
        if let Some(on_change) = &self.on_change {
            on_change(MachineChange {
                machine: machine.to_owned(),
                node: node.map(str::to_owned),
                state: state.to_owned(),
            });
        } else if !self.progress.is_live() {
            self.progress.say("machine", &line);
        }
    }

    /// Prints a line for the operator.
    pub(super) fn say(&self, text: &str) {
        self.progress.say("netboot", &printable(text));
    }
}

fn shown(machine: &str, node: Option<&str>, state: &str) -> String {
    printable(&format!("{machine} {}: {state}", node.unwrap_or("-"))).chars().take(MAX_LINE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_control_characters_from_machines() {
        let line = shown("52:54:00:00:00:01", Some("app-1"), "\x1b]0;title\x07\x1b[2Jdisk \"/dev/vda\"\nroot@host:~# ");
        assert!(!line.chars().any(char::is_control), "{line}");
        assert!(line.starts_with("52:54:00:00:00:01 app-1: ") && line.contains("disk \"/dev/vda\""), "{line}");
        assert_eq!(shown("x", None, &"y".repeat(10_000)).len(), MAX_LINE);
    }

    #[test]
    fn limits_the_rows_of_invented_machines() {
        let progress = NetbootProgress::new(Progress::new(true, false), None);
        for i in 0..10_000 {
            progress.report(&format!("machine {i}"), None, "is unknown");
        }
        progress.report("52:54:00:00:00:01", Some("db-1"), "installs on /dev/vda");
        assert_eq!(progress.rows.lock().unwrap().len(), MAX_ROWS + 1);
    }
}
