//! Tickets: what a node is given at provisioning, as the systemd credential
//! `bakehouse.ticket`.

use serde::{Deserialize, Serialize};

use crate::membership::Membership;
use crate::topology::slot_parts;

/// A founder's ticket: bound to one slot of one fleet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ticket {
    /// Format of this message.
    pub version: u16,
    /// Name of the fleet.
    pub fleet: String,
    /// Slot, e.g. `hub-1`.
    pub slot: String,
    /// Counts the owners the slot has had.
    pub epoch: u64,
    /// What the node is given by hand, as long as no hub is asked for it.
    pub membership: Membership,
}

#[derive(Debug, thiserror::Error)]
pub enum TicketError {
    #[error("the ticket is not readable: {0}; provision the node with a ticket made by `bakehouse ticket`")]
    Malformed(#[from] serde_json::Error),
    #[error("the ticket has format {0}, this image reads format {known}; rebuild the image or mint the ticket again", known = Ticket::VERSION)]
    Version(u16),
    #[error("the ticket's slot `{0}` is not of the form group-number")]
    Slot(String),
}

impl Ticket {
    pub const VERSION: u16 = 1;
    /// Name of the systemd credential.
    pub const CREDENTIAL: &str = "bakehouse.ticket";

    #[must_use]
    pub fn founder(fleet: &str, slot: &str, membership: Membership) -> Self {
        Self { version: Self::VERSION, fleet: fleet.to_owned(), slot: slot.to_owned(), epoch: 1, membership }
    }

    /// Reads a ticket.
    ///
    /// # Errors
    /// Bytes that are no ticket, or one of another format.
    pub fn parse(bytes: &[u8]) -> Result<Self, TicketError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u16,
        }
        let Versioned { version } = serde_json::from_slice(bytes)?;
        if version != Self::VERSION {
            return Err(TicketError::Version(version));
        }
        let ticket: Self = serde_json::from_slice(bytes)?;
        if slot_parts(&ticket.slot).is_none() {
            return Err(TicketError::Slot(ticket.slot));
        }
        Ok(ticket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let ticket = Ticket::founder("acme", "hub-1", Membership::sample());
        let bytes = serde_json::to_vec(&ticket).unwrap();
        assert_eq!(Ticket::parse(&bytes).unwrap(), ticket);
    }

    #[test]
    fn another_format_is_named_before_its_fields_are_read() {
        let e = Ticket::parse(br#"{"version":9,"new":"field"}"#).unwrap_err();
        assert!(matches!(e, TicketError::Version(9)), "{e}");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = Ticket::parse(&bytes);
        }
    }
}
