//! The builder's one error type. Each message names the thing and the fix.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use fleet::{Diagnostic, Diagnostics};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The user's files are wrong.
    #[error("{0}")]
    Config(Diagnostics),
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// The world said no; the text says who and what to do.
    #[error("{0}")]
    Failed(String),
    #[error("interrupted")]
    Interrupted,
    /// Whoever read standard output has gone, as `head` does when it has enough.
    #[error("nobody reads the answer")]
    Unread,
}

impl Error {
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// 2: the command line or the TOML is wrong; 130 and 141, as shells tell of signals: Ctrl-C, and an answer that
    /// is not read; 1: anything else.
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
                Some("templates see `fleet`, `group` and, below run/, `node`".to_owned()),
            )
            .into(),
        )
    }
}

/// A failure that is told in a sentence.
pub fn fail<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Failed(message.into()))
}
