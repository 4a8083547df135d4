//! The hubs' keys in etcd. Patroni's keys are below `/bakehouse/NAME/`, so no fleet has the name of one of these folders.
//! The modules of the hubs describe the values.

/// Defines keys and prefixes of keys, by the folder of `/bakehouse/` that has them, and the list of the folders.
macro_rules! folders {
    ($($folder:literal { $($name:ident = $rest:literal, $doc:literal;)* })*) => {
        /// Folders of `/bakehouse/` in etcd that only hubs write.
        pub(crate) const FOLDERS: &[&str] = &[$($folder),*];

        $($(
            #[doc = $doc]
            pub const $name: &str = concat!("/bakehouse/", $folder, "/", $rest);
        )*)*
    };
}

folders! {
    "audit" {
        GRANTS = "", "Prefix of `SLOT/EPOCH`: the grants of a slot.";
        AUDIT_ACTIONS = "actions/", "Prefix of `TIME-NODE-ID`: an operator's action.";
        AUDIT_RATES = "rates/", "Prefix of `NODE`: the node's new entries of the audit log.";
    }
    "etcd-ready" {
        ETCD_READY = "", "Prefix of `SLOT`: the slot's owner has its etcd password.";
    }
    "operators" {
        OPERATOR_PEERS = "wireguard/", "Prefix of `ADDRESS`: an operator's machine.";
        OPERATOR_PEER_KEYS = "wireguard-keys/", "Prefix of `KEY`: the address of the machine with this WireGuard key.";
        REVOKED_OPERATORS = "revoked/", "Prefix of `HASH`: a revoked certificate of an operator.";
    }
    "owners" {
        OWNERS = "", "Prefix of `KEY`: the slot of a mesh key.";
    }
    "readmitted" {
        READMITTED = "", "Prefix of `SLOT`: the epoch for which a hub has added the etcd member.";
    }
    "renewed" {
        RENEWED = "", "Prefix of `SLOT`: the last renewal of the keys.";
    }
    "revoked" {
        REVOKED_TOKENS = "", "Prefix of `ID`: a revoked token.";
    }
    "rollout" {
        ROLLOUT = "", "Prefix of every key of the rollout.";
        TURN = "turn", "The update lock.";
        HELD = "held", "The update lock's lease.";
        ACTING = "acting", "The fleet's lock.";
        ACTED = "acted/", "Prefix of `SLOT`: when the node took the fleet's lock.";
        WAITING = "waiting/", "Prefix of `SLOT`: the node waits for the fleet's lock.";
        PAUSED = "paused", "The reason why no node gets the update lock.";
        DRAINED = "drained/", "Prefix of `SLOT`: a drained node.";
    }
    "seen" {
        SEEN = "", "Prefix of `SLOT`: a hub has answered the slot's owner.";
    }
    "shut" {
        FENCED = "", "Prefix of `SLOT/HUB`: the hub forwards nothing from or to the slot.";
    }
    "slots" {
        SLOTS = "", "Prefix of `SLOT`: the slot's owner.";
    }
    "tokens" {
        TOKENS = "", "Prefix of `ID`: the use count of a token.";
    }
    "web-certificate" {
        WEB_CERTIFICATE = "", "Prefix of every key of the certificate for browsers.";
        WEB_CHALLENGES = "challenges/", "Prefix of `TOKEN`: what a hub answers the certificate authority.";
    }
}
