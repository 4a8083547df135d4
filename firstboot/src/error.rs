//! The agent's one error type.

use std::io;
use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Trying again can't help: the text says what to change.
    #[error("{0}")]
    Configuration(String),
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "another machine is {slot} since epoch {epoch}: this one has stopped; to put it there again, wipe it and give it a ticket of `bakehouse ticket {slot} --replace`"
    )]
    Fenced { slot: String, epoch: u64 },
    /// The operator said so, or somebody on the machine itself.
    #[error("this node is to leave the fleet")]
    Leaving,
    #[error(
        "this machine was {slot}, and has left the fleet: it may be switched off; wiped and given a new ticket, it is a new node"
    )]
    Left { slot: String },
    #[error(transparent)]
    Ticket(#[from] fleet::netboot::SealError),
    #[error(transparent)]
    Image(#[from] fleet::netboot::UntrustedImage),
    #[error(transparent)]
    Grub(#[from] fleet::grubenv::TooLong),
    /// Something that is not there now; trying again may help.
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
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// 78 (sysexits' `EX_CONFIG`) for what only a person can mend: systemd does not restart on it.
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
