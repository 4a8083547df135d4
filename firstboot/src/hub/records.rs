//! Keys in etcd that records of slots and tokens have, and what a hub reads and writes there.
//!
//! ```text
//! /bakehouse/slots/SLOT     SlotRecord      who has it
//! /bakehouse/owners/KEY     slot's name     what this mesh key has
//! /bakehouse/tokens/ID      number          how often it was used
//! /bakehouse/revoked/ID     anything        it is of no use any more
//! /bakehouse/audit/SLOT/EPOCH  SlotRecord   what was ever granted
//! /bakehouse/seen/SLOT      hub's name      as long as its owner was seen not long ago (a lease)
//! ```

use std::collections::BTreeMap;

use fleet::{MeshKey, SlotRecord};

pub(super) const SLOTS: &str = "/bakehouse/slots/";
pub(super) const TOKENS: &str = "/bakehouse/tokens/";
pub(super) const REVOKED: &str = "/bakehouse/revoked/";
/// Grants of a slot that stay on record.
const AUDITED: u64 = 32;

/// Every slot's owner, as this hub has heard: the truth is etcd's.
pub type Owners = BTreeMap<String, SlotRecord>;

/// A slot that was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantedSlot {
    pub slot: String,
    pub epoch: u64,
}

/// A slot that somebody is about to have.
pub(super) struct PendingGrant {
    pub(super) place: SlotState,
    pub(super) record: SlotRecord,
    pub(super) keys: EtcdKeys,
    /// Key in etcd of the owner that it replaces by itself: of a renewal.
    pub(super) former: Option<String>,
}

/// How often a token was used, as of a revision.
pub(super) struct TokenUsage {
    pub(super) used: u32,
    pub(super) revision: u64,
}

pub(super) struct SlotState {
    pub(super) slot: String,
    pub(super) before: Option<SlotRecord>,
    pub(super) revision: u64,
    /// Its owner says nothing; if it does before the slot is taken, it is not.
    pub(super) silent: bool,
}

pub(super) struct EtcdKeys {
    pub(super) owner: String,
    pub(super) token: String,
    pub(super) revoked: String,
}

impl EtcdKeys {
    pub(super) fn of(mesh_key: MeshKey, token: &str) -> Self {
        Self {
            owner: format!("/bakehouse/owners/{mesh_key}"),
            token: format!("{TOKENS}{token}"),
            revoked: format!("{REVOKED}{token}"),
        }
    }
}

/// Where a grant of a slot is recorded.
pub(super) fn audit(slot: &str, epoch: u64) -> String {
    format!("/bakehouse/audit/{slot}/{epoch:08}")
}

/// The record of a slot's grants that is dropped with a new one: etcd's space has an end.
pub(super) fn forgotten_audit(slot: &str, epoch: u64) -> Option<String> {
    epoch.checked_sub(AUDITED).filter(|epoch| *epoch > 0).map(|epoch| audit(slot, epoch))
}
