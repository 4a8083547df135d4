//! The fleet key, and what the builder signs with it: certificates, tickets, updates.

pub mod authority;
mod passphrase;
pub mod ticket;
pub(crate) mod ticket_log;
pub(crate) mod update_key;
