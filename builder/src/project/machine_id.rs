//! UUIDs of local and exported virtual machines.

use crate::util::digest::sha256;

/// Returns a node's UUID. It is derived from the name, so that a node keeps its machine id when its disk is erased.
pub(crate) fn uuid_of(node: &str) -> String {
    let h = sha256(node.as_bytes());
    format!("{}-{}-4{}-8{}-{}", &h[..8], &h[8..12], &h[13..16], &h[17..20], &h[20..32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_different_uuids() {
        let id = uuid_of("hub-1");
        assert_eq!(id.len(), 36);
        assert_ne!(id, uuid_of("hub-2"));
    }
}
