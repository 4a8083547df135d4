//! Errors of the agent.

use std::io;
use std::path::{Path, PathBuf};

/// Result with the agent's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Error of the agent. The text names the operation that failed, and the fix if an operator has to act.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A retry cannot help. The text names the fix.
    #[error("{0}")]
    Configuration(String),
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "another machine has owned {slot} since epoch {epoch}: this machine has stopped; to give it the slot again, \
         wipe it and use a ticket made by `bakehouse ticket {slot} --replace`"
    )]
    Fenced { slot: String, epoch: u64 },
    /// The operator, or root on this machine, ordered the node to leave.
    #[error("this node is ordered to leave the fleet")]
    Leaving,
    #[error("this machine was {slot}, and has left the fleet: switch it off, or wipe it and give it a new ticket")]
    Left { slot: String },
    #[error(transparent)]
    Ticket(#[from] fleet::netboot::SealError),
    #[error(transparent)]
    Image(#[from] fleet::netboot::UntrustedImage),
    #[error(transparent)]
    Grub(#[from] fleet::grubenv::TooLong),
    /// A failure that may be temporary. A retry may help.
    #[error("{0}")]
    Failed(String),
    #[error("{to}: {why}")]
    Network { to: String, why: String },
    #[error(transparent)]
    Certificate(#[from] fleet::CertificateError),
    #[error("D-Bus: {0}")]
    Bus(#[from] zbus::Error),
    #[error("{unit} did not start ({result}); see: journalctl -u {unit}")]
    Job { unit: String, result: String },
}

impl Error {
    /// Returns a function that wraps an I/O error: `cannot {action} {path}: {cause}`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Returns the exit code: 78 (`EX_CONFIG` of sysexits.h) for errors that need an operator, otherwise 1. systemd
    /// does not restart the agent on 78.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Configuration(_) | Self::Fenced { .. } | Self::Left { .. }) { 78 } else { 1 }
    }
}

impl From<fleet_https::Error> for Error {
    fn from(e: fleet_https::Error) -> Self {
        match e {
            fleet_https::Error::Configuration(why) => Self::Configuration(why),
            fleet_https::Error::Failed(why) => Self::Failed(why),
            fleet_https::Error::Network { to, why } => Self::Network { to, why },
            fleet_https::Error::Certificate(e) => Self::Certificate(e),
        }
    }
}
