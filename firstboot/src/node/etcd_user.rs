//! etcd users of a node's services, and the header that reports them to a hub.

use std::fs;
use std::path::Path;

/// Header with an etcd user. In `GET /v1/peers` it is the user with whose password the node's Patroni runs, and in
/// `POST /v1/introduce` it is [`MEMBER`].
pub const USER_HEADER: &str = "bakehouse-etcd-user";
/// Patroni's user in etcd, and the name of its role.
pub const PATRONI: &str = "patroni";
/// Value for a voter's etcd that supports passwords of clients. It is not a user.
pub const MEMBER: &str = "member";
/// The configuration with which Patroni started, even if the agent has rendered a newer one since. Patroni's unit
/// copies it there, because systemd hides the credentials of a unit from other units.
const PATRONI_CONFIGURATION: &str = "/run/bakehouse/patroni.started.yml";

/// Whether the Patroni of this node started with a configuration that has this password.
#[must_use]
pub fn patroni_runs_with(password: &str) -> bool {
    patroni_has(password, Path::new(PATRONI_CONFIGURATION))
}

fn patroni_has(password: &str, configuration: &Path) -> bool {
    !password.is_empty() && fs::read_to_string(configuration).is_ok_and(|text| text.contains(password))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_without_password_does_not_have_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("patroni.yml");
        assert!(!patroni_has("secret", &file));
        fs::write(&file, "etcd3:\n  protocol: https\n").unwrap();
        assert!(!patroni_has("secret", &file) && !patroni_has("", &file));
        fs::write(&file, "etcd3:\n  username: patroni\n  password: \"secret\"\n").unwrap();
        assert!(patroni_has("secret", &file));
    }
}
