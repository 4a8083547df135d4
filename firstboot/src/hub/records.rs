//! etcd keys of slots and tokens, and their values.
//!
//! ```text
//! /bakehouse/slots/SLOT        SlotRecord     the slot's owner
//! /bakehouse/owners/KEY        slot's name    the slot of this mesh key
//! /bakehouse/tokens/ID         number         use count of the token
//! /bakehouse/revoked/ID        anything       the token was revoked
//! /bakehouse/audit/SLOT/EPOCH  SlotRecord     the grants of a slot
//! /bakehouse/seen/SLOT         hub's name     a hub has answered the owner recently (with a lease)
//! ```

use std::collections::BTreeMap;

use fleet::etcd_keys::{GRANTS, OWNERS, REVOKED_TOKENS, TOKENS};
use fleet::{MeshKey, SlotRecord};

/// Number of grants of a slot that stay in etcd.
const AUDITED: u64 = 32;

/// Records of all slots, as this hub last read them from etcd.
pub(crate) type Owners = BTreeMap<String, SlotRecord>;

/// A granted slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantedSlot {
    /// Name of the slot.
    pub slot: String,
    /// Epoch of its new owner.
    pub epoch: u64,
}

/// A grant that the transaction has not written yet.
pub(super) struct PendingGrant {
    pub(super) place: SlotState,
    pub(super) record: SlotRecord,
    pub(super) keys: EtcdKeys,
    /// For a renewal: etcd key of the same owner's previous mesh key.
    pub(super) former: Option<String>,
}

/// Use count of a token, with the revision of its etcd key.
pub(super) struct TokenUsage {
    pub(super) used: u32,
    pub(super) revision: u64,
}

/// A slot as read from etcd.
pub(super) struct SlotState {
    pub(super) slot: String,
    pub(super) before: Option<SlotRecord>,
    pub(super) revision: u64,
    /// The owner is silent. The transaction fails if a hub answers the owner before.
    pub(super) silent: bool,
}

/// The etcd keys that a claim reads and writes.
pub(super) struct EtcdKeys {
    pub(super) owner: String,
    pub(super) token: String,
    pub(super) revoked: String,
}

impl EtcdKeys {
    pub(super) fn new(mesh_key: MeshKey, token: &str) -> Self {
        Self {
            owner: format!("{OWNERS}{mesh_key}"),
            token: format!("{TOKENS}{token}"),
            revoked: format!("{REVOKED_TOKENS}{token}"),
        }
    }
}

/// Returns the etcd key of a grant's audit record.
pub(super) fn audit(slot: &str, epoch: u64) -> String {
    format!("{GRANTS}{slot}/{epoch:08}")
}

/// Returns the audit record to delete when the slot gets a new one, because etcd's space is limited.
pub(super) fn forgotten_audit(slot: &str, epoch: u64) -> Option<String> {
    epoch.checked_sub(AUDITED).filter(|epoch| *epoch > 0).map(|epoch| audit(slot, epoch))
}
