//! Machines and how far each is: a line each that changes in place on a terminal, a line for each
//! change where it is piped.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use serde_json::json;

use crate::progress::{Progress, Step, event};

pub struct Board {
    progress: Progress,
    json: bool,
    /// By MAC address: its line, and what was said of it last.
    rows: Mutex<BTreeMap<String, Row>>,
}

struct Row {
    step: Step,
    said: String,
}

impl Board {
    #[must_use]
    pub fn new(progress: Progress, json: bool) -> Self {
        Self { progress, json, rows: Mutex::default() }
    }

    /// What a machine is doing; once, however often it is told.
    pub fn tell(&self, mac: &str, node: Option<&str>, state: &str) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let row = rows
            .entry(mac.to_owned())
            .or_insert_with(|| Row { step: self.progress.step("machine", mac), said: String::new() });
        let line = format!("{mac} {}: {state}", node.unwrap_or("-"));
        if row.said == line {
            return;
        }
        row.step.message(&line);
        row.said.clone_from(&line);
        if self.json {
            event(&json!({ "machine": mac, "node": node, "state": state }));
        } else if !self.progress.is_live() {
            self.progress.say("machine", &line);
        }
    }
}
