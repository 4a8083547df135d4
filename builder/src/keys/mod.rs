//! The fleet key, and what it signs: certificates, tickets, updates.

pub mod authority;
mod passphrase;
pub mod ticket;
pub mod ticket_log;
pub mod update_key;
