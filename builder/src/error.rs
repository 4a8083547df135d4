//! The builder's error type. Each message says what failed and how to fix it.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use fleet::{Diagnostic, Diagnostics};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the user is invalid.
    #[error("{0}")]
    Config(Diagnostics),
    /// The command line is invalid.
    #[error("{0}")]
    Usage(String),
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// An operation failed. The message names it and suggests a fix.
    #[error("{0}")]
    Failed(String),
    #[error("interrupted")]
    Interrupted,
    /// The reader closed standard output, as `head` does after its last line.
    #[error("standard output is closed")]
    Unread,
}

impl Error {
    /// Returns a closure that adds the operation and the path to an I/O error: `cannot {action} {path}: {source}`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Returns the exit code of the process. 2: the command line or a TOML file is invalid. 130 and 141: Ctrl-C and a
    /// closed standard output, by the shells' rule 128 + signal. 1: any other failure.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_) | Self::Usage(_) => ExitCode::from(2),
            Self::Interrupted => ExitCode::from(130),
            Self::Unread => ExitCode::from(141),
            Self::Io { .. } | Self::Failed(_) => ExitCode::FAILURE,
        }
    }
}

impl From<Box<Diagnostic>> for Error {
    fn from(d: Box<Diagnostic>) -> Self {
        Self::Config((*d).into())
    }
}

impl From<fleet::RenderError> for Error {
    fn from(e: fleet::RenderError) -> Self {
        Self::Config(
            Diagnostic::whole_file(
                fleet::Severity::Error,
                &format!("{}:{}", e.name, e.line),
                e.message,
                Some("templates can use `fleet` and `group`, and below run/ also `node`".to_owned()),
            )
            .into(),
        )
    }
}

/// Returns [`Error::Failed`] with this message.
pub fn fail<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Failed(message.into()))
}
