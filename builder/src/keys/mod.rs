//! The fleet key, and what the builder signs with it: certificates, tickets, updates.

pub mod authority;
pub(crate) mod operator;
pub(crate) mod operator_log;
pub(crate) mod operator_places;
pub(crate) mod operator_request;
pub(crate) mod operator_wireguard;
pub(crate) mod passphrase;
pub mod rescue;
pub mod ticket;
pub(crate) mod ticket_log;
pub(crate) mod update_key;
