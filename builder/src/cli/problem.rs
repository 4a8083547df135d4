//! Errors and warnings in the output of `--json`.

use fleet::{Diagnostic, Severity};
use schemars::JsonSchema;
use serde::Serialize;

/// An error or a warning.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(super) struct Problem {
    /// Whether it is an error or a warning.
    severity: Severity,
    /// File that it is about. The key is absent if it is not about a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<String>,
    /// Line, counted from 1. The key is absent if it is about the whole file.
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<usize>,
    /// What is wrong.
    message: String,
    /// The fix, as an instruction.
    help: Option<String>,
}

impl Problem {
    /// Makes a warning that is not about a file.
    pub(super) fn warning(message: String) -> Self {
        Self { severity: Severity::Warning, file: None, line: None, message, help: None }
    }
}

impl From<&Diagnostic> for Problem {
    fn from(d: &Diagnostic) -> Self {
        Self {
            severity: d.severity,
            file: Some(d.file.clone()),
            line: (d.line > 0).then_some(d.line),
            message: d.message.clone(),
            help: d.help.clone(),
        }
    }
}
