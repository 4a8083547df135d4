//! Machine ids of local and of exported machines.

use crate::util::digest::sha256;

/// The same node has the same machine id after its disk is wiped.
pub(crate) fn uuid_of(node: &str) -> String {
    let h = sha256(node.as_bytes());
    format!("{}-{}-4{}-8{}-{}", &h[..8], &h[8..12], &h[13..16], &h[17..20], &h[20..32])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_ids_are_uuids() {
        let id = uuid_of("hub-1");
        assert_eq!(id.len(), 36);
        assert_ne!(id, uuid_of("hub-2"));
    }
}
