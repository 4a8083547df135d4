//! The fleet key, and what the builder signs with it: certificates, tickets, updates.

pub mod authority;
mod passphrase;
pub mod ticket;
pub mod ticket_log;
pub mod update_key;
