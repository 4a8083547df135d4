//! Running nodes, as an operator's machine sees them: a connection goes through any hub to the node's API, with a TLS
//! session of its own inside.

mod action;
mod alerts;
mod client;
mod facts;
mod forward;
mod journal;
mod merge;
mod page;
mod postgres;
mod report;
mod route;
mod spool;
mod status;
#[cfg(test)]
mod test_node;
#[cfg(test)]
mod test_servers;
mod watch;

pub(crate) use action::Action;
pub(crate) use alerts::firing;
pub(crate) use client::{Client, NodeConnection, NodeLines, permits_no_commands, run};
pub(crate) use facts::facts;
pub(crate) use forward::{Entrance, forward};
pub(crate) use journal::{JournalLineOf, Logs};
pub(crate) use page::FleetPage;
pub(crate) use postgres::{PostgresSocket, forward_postgres};
pub(crate) use report::collect;
pub(crate) use route::Entry;
pub(crate) use status::{ask_all, fleet_status};
pub(crate) use watch::watch;
