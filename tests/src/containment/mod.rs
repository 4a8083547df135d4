//! The containment matrix: what an attacker with root on one machine can do to the rest of the fleet.
//!
//! A row is the attacker's position ([`Place`]), a column is the attacker's goal ([`Target`]). The test attacks each
//! goal from each position, with everything that root finds there: the certificate and its key, the issuer if the node
//! has one, passwords, raw sockets, the routing daemon. A machine that the attacker does not control verifies the
//! effect. [`table`] has the expected results and their reasons, and `docs/security.md` prints the same table.

mod arena;
mod backups;
mod etcd;
mod foothold;
mod members;
mod netboot;
mod network;
mod page;
mod patroni;
mod postgres;
mod raft;
mod rogue;
mod table;

pub use arena::Arena;
pub use foothold::{Door, Foothold};
pub use members::{GROUP, ask_to_join, join, request_of};
pub use netboot::{HUB_MAC, NetbootServer, attack as attack_netboot};
pub use page::{Matrix, publish};
pub use rogue::{RogueHub, rogue_effect};
pub use table::{Place, Reach, Target};

/// Result of an attack.
#[derive(Clone, Debug)]
pub struct Finding {
    /// How far the attack succeeded.
    pub reach: Reach,
    /// The attack that succeeded, or the last refusal.
    pub evidence: String,
}

impl Finding {
    fn yes(evidence: impl Into<String>) -> Self {
        Self { reach: Reach::Yes, evidence: evidence.into() }
    }

    fn part(evidence: impl Into<String>) -> Self {
        Self { reach: Reach::Part, evidence: evidence.into() }
    }

    fn no(evidence: impl Into<String>) -> Self {
        Self { reach: Reach::No, evidence: evidence.into() }
    }
}

/// Runs the attack of one cell.
///
/// # Panics
/// If a machine of the fleet does not work.
#[must_use]
pub fn attack(arena: &Arena, from: &Foothold, target: Target) -> Finding {
    match target {
        Target::ReadEtcd => etcd::read(arena, from),
        Target::WriteEtcd => etcd::write(arena, from),
        Target::EtcdPeer => raft::peer(arena, from),
        Target::Patroni => patroni::change(arena, from),
        Target::Postgres => postgres::log_in(arena, from),
        Target::Backups => backups::read(arena, from),
        Target::Vip => network::take_vip(arena, from),
        Target::Routes => network::announce(arena, from),
        Target::MeshKeys => members::change_mesh_key(arena, from),
        Target::DenyVersion => members::deny_version(arena, from),
        Target::TakeSlot => members::take_slot(arena, from),
        Target::Secrets => members::read_secrets(arena, from),
    }
}
