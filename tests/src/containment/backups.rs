//! Attack on the backups: runs pgBackRest against the server on the node that stores them.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use super::foothold::{Foothold, doors};
use super::network::Impersonation;
use super::{Arena, Finding, Place};

const PORT: u16 = 8432;
/// Node whose pgBackRest the attack runs, because an attacker can bring the program along.
const TOOLS: &str = "db-1";

/// Tries to list the repository.
pub(super) fn read(arena: &Arena, from: &Foothold) -> Finding {
    let keeper = arena.topology.backup.node.as_deref().expect("a node stores the backups");
    if from.node.as_ref().is_some_and(|n| n.name == keeper) {
        let listed = arena.machine(keeper).exec("ls /var/lib/pgbackrest/backup/main/backup.info");
        return if listed.status == 0 { Finding::yes("its own disk") } else { Finding::no(listed.output) };
    }
    // A hub can take any worker's address.
    let _db =
        (from.place == Place::Hub).then(|| Impersonation::new(arena, from, arena.node("db-2"), arena.node(keeper)));
    let open = from.run(|| async { from.reachable(doors(arena, [arena.node(keeper)].into_iter(), PORT)).await });
    let mut last = format!("port {PORT} is filtered or closed");
    for door in open {
        for shown in &from.credentials {
            let place = arena.lab.dir.join("build/vm").join(TOOLS).join("var/tmp/containment");
            fs::create_dir_all(&place).expect("the lab is writable");
            for (name, text) in [("ca.crt", &from.root), ("node.crt", &shown.cert), ("node.key", &shown.key)] {
                fs::write(place.join(name), text).expect("the lab is writable");
                fs::set_permissions(place.join(name), Permissions::from_mode(0o600)).expect("the lab is writable");
            }
            let listed = Command::new("nsenter")
                .args(["--target", &arena.pid(TOOLS), "--mount", &format!("--net={}", from.namespace().display())])
                .args(["--", "timeout", "20", "pgbackrest", "--config=/dev/null", "--stanza=main"])
                .args(["--log-level-file=off", "--repo1-host-type=tls"])
                .args(["--io-timeout=5", "--protocol-timeout=8"])
                .args(["--repo1-host-config=/run/pgbackrest/pgbackrest.conf", &format!("--repo1-host={}", door.host)])
                .args(
                    [("ca", "ca.crt"), ("cert", "node.crt"), ("key", "node.key")]
                        .map(|(what, file)| format!("--repo1-host-{what}-file=/var/tmp/containment/{file}")),
                )
                .args(["repo-ls", "backup/main"])
                .output()
                .expect("nsenter");
            let out = String::from_utf8_lossy(&listed.stdout);
            if out.contains("backup.info") {
                return Finding::yes(format!("{}:{PORT} as {}", door.host, shown.name));
            }
            let said = format!("{out}{}", String::from_utf8_lossy(&listed.stderr));
            last = said.lines().find(|line| line.contains("ERROR")).unwrap_or(said.trim()).chars().take(120).collect();
        }
    }
    Finding::no(last)
}
