//! Errors of the agent.
//!
//! The text of an error names the operation that failed. [`std::error::Error::source`] is its cause, so
//! [`Error::chain`] gives the whole text.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;

use fleet::{ErrorChain, Refusal};
use fleet_https::Cause;

/// Result with the agent's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Error of the agent. The text names the operation that failed, and the fix if an operator has to act.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of `#[error]` describes a variant and its fields")]
pub enum Error {
    /// A retry cannot help. The text names the fix.
    #[error("{0}")]
    Configuration(String),
    /// A file cannot be used, and a retry cannot help.
    #[error("cannot use {path}\n  help: {fix}")]
    Unusable { path: PathBuf, fix: &'static str, source: Cause },
    #[error("cannot {action} {path}")]
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
    /// A hub refuses a request. Another request may succeed.
    #[error("{}", .0.text)]
    Refused(Refusal),
    #[error(transparent)]
    Ticket(#[from] fleet::TicketError),
    #[error(transparent)]
    Sealed(#[from] fleet::netboot::SealError),
    #[error(transparent)]
    Image(#[from] fleet::netboot::UntrustedImage),
    #[error(transparent)]
    Grub(#[from] fleet::grubenv::TooLong),
    /// systemd cannot encrypt or decrypt a credential. The text is the name of systemd's error.
    #[error("{0}")]
    Credential(String),
    #[error(
        "{name} was sealed for the TPM of another machine, or for this one's before it was cleared\n  \
         help: put the disk back into its machine, or wipe /var to make this a new node"
    )]
    Elsewhere { name: String, source: Cause },
    /// A failure without a cause. It may be temporary: a retry may help.
    #[error("{0}")]
    Failed(String),
    /// A failure that may be temporary: a retry may help.
    #[error("cannot {action}")]
    Cannot { action: String, source: Cause },
    #[error("cannot encode {what} as JSON")]
    Json { what: &'static str, source: serde_json::Error },
    #[error("cannot parse the record of {slot} in etcd")]
    Record { slot: String, source: serde_json::Error },
    #[error("etcd returned fewer keys than requested")]
    MissingKeys,
    /// A program that the agent ran. `output` is its standard error, or empty if the journal has it.
    #[error("{program} failed ({status}){}{output}", if .output.is_empty() { "" } else { ": " })]
    Tool { program: String, status: ExitStatus, output: String },
    /// The server of the update folder refuses to send a part of a file. A retry cannot help.
    #[error("{file}: the server replied {status} to a request for a part")]
    NoPart { file: String, status: hyper::StatusCode },
    #[error("{file}: the server sent more bytes than requested")]
    TooMuch { file: String },
    #[error(transparent)]
    Https(#[from] fleet_https::Error),
    #[error(transparent)]
    Certificate(#[from] fleet::CertificateError),
    #[error("the D-Bus call failed")]
    Bus(#[from] zbus::Error),
    #[error("{unit} did not start ({result}); see: bakehouse logs NODE -u {unit}")]
    Job { unit: String, result: String },
    /// A failed request to etcd for several claims of slots.
    #[error(transparent)]
    Shared(#[from] Arc<Error>),
}

impl Error {
    /// Returns a function that wraps an I/O error: `cannot {action} {path}`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { action, path, source }
    }

    /// Returns a function that wraps a cause: `cannot {action}`.
    pub fn cannot<E: Into<Cause>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::Cannot { action, source: source.into() }
    }

    /// Returns a function that wraps an error of serde: `cannot encode {what} as JSON`.
    pub fn json(what: &'static str) -> impl FnOnce(serde_json::Error) -> Self {
        move |source| Self::Json { what, source }
    }

    /// Returns the error of a request to the peer `to`. The cause is an error, or a text.
    pub fn network(to: impl Into<String>, cause: impl Into<Cause>) -> Self {
        fleet_https::Error::network(to, cause).into()
    }

    /// Returns the error, its causes and the fixes on one line, for logs, the console and other nodes.
    #[must_use]
    pub fn chain(&self) -> String {
        ErrorChain::new(self).one_line()
    }

    /// Returns the exit code: 78 (`EX_CONFIG` of sysexits.h) for errors that need an operator, otherwise 1. systemd
    /// does not restart the agent on 78.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Configuration(_)
            | Self::Unusable { .. }
            | Self::Ticket(_)
            | Self::Fenced { .. }
            | Self::Left { .. }
            | Self::Https(fleet_https::Error::Configuration { .. }) => 78,
            _ => 1,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_has_the_cause_and_then_the_fix() {
        let cause = serde_json::from_str::<u8>("x").unwrap_err();
        let text = format!("cannot use /var/lib/bakehouse/keys.json: {cause}; wipe /var");
        let error =
            Error::Unusable { path: "/var/lib/bakehouse/keys.json".into(), fix: "wipe /var", source: cause.into() };
        assert_eq!((error.chain(), error.exit_code()), (text, 78));
        let io = Error::io("read", "/x")(io::Error::from_raw_os_error(13));
        assert_eq!(io.chain(), "cannot read /x: Permission denied (os error 13)");
        assert_eq!(Error::from(Arc::new(io)).chain(), "cannot read /x: Permission denied (os error 13)");
        let refused = Error::network("hub-1", "no reply");
        assert_eq!((refused.chain(), refused.exit_code()), ("request to hub-1 failed: no reply".to_owned(), 1));
    }
}
