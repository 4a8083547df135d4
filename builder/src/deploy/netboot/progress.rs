//! Machines and how far each is: a line each that changes in place on a terminal, a line for each
//! change where it is piped.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use fleet::netboot::printable;
use serde_json::json;

use crate::progress::{Progress, Step, event};

/// Machines without a node that are shown, at most: every host on the network can make up another one.
const ROWS: usize = 256;
/// Characters of a line that are shown.
const LINE: usize = 400;

pub struct NetbootProgress {
    progress: Progress,
    json: bool,
    /// By MAC address or serial number: its line, and what was said of it last.
    rows: Mutex<BTreeMap<String, MachineRow>>,
}

struct MachineRow {
    step: Step,
    said: String,
}

impl NetbootProgress {
    #[must_use]
    pub fn new(progress: Progress, json: bool) -> Self {
        Self { progress, json, rows: Mutex::default() }
    }

    /// Prints a machine's state when it changes. The text comes from the machine, so control characters in it are
    /// escaped.
    pub fn tell(&self, machine: &str, node: Option<&str>, state: &str) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        // Those with a node are as many as fleet.toml has places for.
        if node.is_none() && rows.len() >= ROWS && !rows.contains_key(machine) {
            return;
        }
        let line = shown(machine, node, state);
        let row = rows.entry(machine.to_owned()).or_insert_with(|| MachineRow {
            step: self.progress.step("machine", &printable(machine)),
            said: String::new(),
        });
        if row.said == line {
            return;
        }
        row.step.message(&line);
        row.said.clone_from(&line);
        if self.json {
            event(&json!({ "machine": machine, "node": node, "state": state }));
        } else if !self.progress.is_live() {
            self.progress.say("machine", &line);
        }
    }

    /// A line for the operator.
    pub fn say(&self, text: &str) {
        self.progress.say("netboot", &printable(text));
    }
}

fn shown(machine: &str, node: Option<&str>, state: &str) -> String {
    printable(&format!("{machine} {}: {state}", node.unwrap_or("-"))).chars().take(LINE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_machine_says_moves_no_cursor() {
        let line = shown("52:54:00:00:00:01", Some("app-1"), "\x1b]0;title\x07\x1b[2Jdisk \"/dev/vda\"\nroot@host:~# ");
        assert!(!line.chars().any(char::is_control), "{line}");
        assert!(line.starts_with("52:54:00:00:00:01 app-1: ") && line.contains("disk \"/dev/vda\""), "{line}");
        assert_eq!(shown("x", None, &"y".repeat(10_000)).len(), LINE);
    }

    #[test]
    fn made_up_machines_take_a_bounded_number_of_rows() {
        let board = NetbootProgress::new(Progress::new(true, false), false);
        for i in 0..10_000 {
            board.tell(&format!("machine {i}"), None, "is unknown");
        }
        board.tell("52:54:00:00:00:01", Some("db-1"), "goes to /dev/vda");
        assert_eq!(board.rows.lock().unwrap().len(), ROWS + 1);
    }
}
