//! etcd users of a node's services, and how the node names them to a hub.

use std::fs;
use std::path::Path;

/// Header of `GET /v1/peers`: the etcd user whose password the node's Patroni runs with; of `POST /v1/introduce`:
/// [`MEMBER`].
pub const USER_HEADER: &str = "bakehouse-etcd-user";
/// Patroni's user, and the role that it has.
pub const PATRONI: &str = "patroni";
/// No user: the node's etcd takes its clients' passwords.
pub const MEMBER: &str = "member";
/// The configuration that Patroni was started with, whatever was rendered since. Its unit copies it there: systemd
/// shows the credentials of a unit to no other one.
const PATRONI_CONFIGURATION: &str = "/run/bakehouse/patroni.started.yml";

/// Whether the Patroni that runs on this node was started with a configuration that has this password.
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
    fn a_patroni_that_was_started_before_its_password_came_does_not_have_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("patroni.yml");
        assert!(!patroni_has("secret", &file));
        fs::write(&file, "etcd3:\n  protocol: https\n").unwrap();
        assert!(!patroni_has("secret", &file) && !patroni_has("", &file));
        fs::write(&file, "etcd3:\n  username: patroni\n  password: \"secret\"\n").unwrap();
        assert!(patroni_has("secret", &file));
    }
}
