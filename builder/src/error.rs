//! The builder's error type.
//!
//! The text of an error names the operation that failed. [`std::error::Error::source`] is its cause, so
//! [`Error::chain`] gives the whole text.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};

use fleet::{Diagnostic, Diagnostics, ErrorChain};
pub use fleet_https::Cause;

/// Result with the builder's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Error of the builder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the user is invalid.
    #[error("{0}")]
    Config(Diagnostics),
    /// The command line is invalid.
    #[error("{0}")]
    Usage(String),
    /// A file cannot be read, written or changed.
    #[error("cannot {action} {path}")]
    Io {
        /// What failed, such as `read`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// An operation failed without a cause. The message names it and suggests a fix.
    #[error("{0}")]
    Failed(String),
    /// An operation failed.
    #[error("cannot {action}")]
    Cannot {
        /// What failed, and the fix.
        action: String,
        /// Cause.
        source: Cause,
    },
    /// An operation failed for one file, package or overlay.
    #[error("{place}")]
    At {
        /// The file, package or overlay.
        place: String,
        /// Cause.
        source: Cause,
    },
    /// The content of a file is invalid.
    #[error("{path} is damaged\n  help: {fix}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Instruction for the user.
        fix: &'static str,
        /// Cause.
        source: Cause,
    },
    /// A value cannot be written as JSON.
    #[error("cannot write JSON")]
    Json(#[source] serde_json::Error),
    /// A program failed.
    #[error("{program} failed ({status}): {output}")]
    Tool {
        /// Name of the program.
        program: String,
        /// Exit status of the program.
        status: ExitStatus,
        /// Its output.
        output: String,
    },
    /// apt cannot select packages.
    #[error("cannot resolve {what}:\n{output}")]
    Apt {
        /// Image or list of packages.
        what: String,
        /// apt's errors, and the fix.
        output: String,
    },
    /// A package cannot be downloaded.
    #[error("cannot download {package} from {url}")]
    Download {
        /// Name and version of the package.
        package: String,
        /// Address of the package.
        url: String,
        /// Cause.
        source: Cause,
    },
    /// A job in the sandbox failed. The text is the job's error.
    #[error("{0}")]
    Sandbox(String),
    /// Certificates, keys or requests of the HTTPS client are invalid, or a hub does not answer.
    #[error(transparent)]
    Https(#[from] fleet_https::Error),
    /// A certificate or a signature cannot be made.
    #[error(transparent)]
    Certificate(#[from] fleet::CertificateError),
    /// The user pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// The reader closed standard output, as `head` does after its last line.
    #[error("standard output is closed")]
    Unread,
}

impl Error {
    /// Returns a closure that adds the operation and the path to an I/O error: `cannot {action} {path}`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Returns a closure that adds the failed operation to a cause: `cannot {action}`.
    pub fn cannot<E: Into<Cause>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::Cannot { action, source: source.into() }
    }

    /// Returns a closure that adds a file, package or overlay to a cause: `{place}: {cause}`.
    pub fn at<E: Into<Cause>>(place: impl Into<String>) -> impl FnOnce(E) -> Self {
        let place = place.into();
        move |source| Self::At { place, source: source.into() }
    }

    /// Returns a closure that adds the damaged file and the fix to a cause.
    pub fn damaged<E: Into<Cause>>(path: impl AsRef<Path>, fix: &'static str) -> impl FnOnce(E) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Damaged { path, fix, source: source.into() }
    }

    /// Returns the error and its causes on one line, and each fix on a line of its own.
    #[must_use]
    pub fn chain(&self) -> String {
        ErrorChain::new(self).to_string()
    }

    /// Returns the exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// Returns the number of the exit code. 2: the command line or a TOML file is invalid. 130 and 141: Ctrl-C and a
    /// closed standard output, by the shells' rule 128 + signal. 1: any other failure.
    #[must_use]
    pub fn code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Usage(_) => 2,
            Self::Interrupted => 130,
            Self::Unread => 141,
            _ => 1,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_names_the_operation_the_cause_and_the_fix() {
        let io = Error::io("read", "/x/thing.deb")(io::Error::from_raw_os_error(2));
        let error = Error::damaged("/x", "build again")(Error::at("thing 1")(io));
        assert_eq!(
            error.chain(),
            "/x is damaged: thing 1: cannot read /x/thing.deb: No such file or directory (os error 2)\n  help: build again"
        );
        assert_eq!(
            ErrorChain::new(&error).lines(),
            "/x is damaged\n  caused by: thing 1\n  caused by: cannot read /x/thing.deb\n  \
             caused by: No such file or directory (os error 2)\n  help: build again"
        );
    }
}
