//! Configuration of an operator's WireGuard for wg-quick.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use fleet::{HubPeer, OperatorPeering, WireguardKey};

/// Longest name of a network interface, which wg-quick takes from the name of the file.
const LONGEST_INTERFACE: usize = 15;
/// Interval of keepalive packets in seconds, so that the laptop's NAT forwards packets of the hub.
const KEEPALIVE: u8 = 25;

/// Returns the name of the file for an operator.
pub(crate) fn file_name(operator: &str) -> String {
    let interface: String = operator.chars().take(LONGEST_INTERFACE).collect();
    format!("{}.conf", interface.trim_end_matches('-'))
}

/// Returns the private key in a configuration.
pub(crate) fn key_in(conf: &str) -> Option<WireguardKey> {
    let value = conf.lines().find_map(|line| line.trim().strip_prefix("PrivateKey")?.trim().strip_prefix('='))?;
    WireguardKey::parse(value.trim())
}

/// What a configuration is for.
pub(crate) struct Owner<'a> {
    /// Name of the operator.
    pub name: &'a str,
    /// Name of the fleet.
    pub fleet: &'a str,
    /// Expiry of the operator's certificate, as a text.
    pub expires: &'a str,
}

/// Returns the configuration. `hosts` are the hubs' public hosts by name. The mesh is behind the hub `first`, and behind
/// another one when `first` does not answer. Hubs without a host are left out.
pub(crate) fn configuration(
    owner: &Owner,
    key: &WireguardKey,
    peering: &OperatorPeering,
    hosts: &BTreeMap<String, String>,
    first: Option<&str>,
) -> String {
    let mut hubs: Vec<(&String, &HubPeer, &String)> =
        peering.hubs.iter().filter_map(|(name, peer)| Some((name, peer, hosts.get(name)?))).collect();
    hubs.sort_by_key(|(name, _, _)| Some(name.as_str()) != first);
    let Owner { name, fleet, expires } = owner;
    let mut text = format!(
        "# WireGuard of the operator {name} to the fleet {fleet}. This file has a private key.\n\
         # Hubs accept it until {expires}. They renew their own keys after 90 days. Then run\n\
         # `bakehouse operator wireguard {name}` again.\n\
         [Interface]\nPrivateKey = {}\nAddress = {}/32\nMTU = {}\n",
        key.text(),
        peering.address,
        peering.mtu
    );
    if hubs.len() > 1 {
        let _ = writeln!(text, "# Every 2 s: if the hub has not answered twice, the mesh is behind the next one.");
        let _ = writeln!(text, "PostUp = {}", failover(&hubs, &peering.subnet.to_string()));
    }
    for (i, (hub, peer, host)) in hubs.iter().enumerate() {
        let rest = if i == 0 { format!(", {}", peering.subnet) } else { String::new() };
        let _ = write!(
            text,
            "\n# {hub}\n[Peer]\nPublicKey = {}\nEndpoint = {host}:{}\nAllowedIPs = {}/32{rest}\n\
             PersistentKeepalive = {KEEPALIVE}\n",
            peer.mesh_key, peering.port, peer.address
        );
    }
    text
}

/// Returns a shell command that runs beside the interface, and ends with it. Each hub's own address belongs to its peer,
/// so a ping tests that hub. `wg set` moves the rest of the mesh. A line of wg-quick has no number sign.
fn failover(hubs: &[(&String, &HubPeer, &String)], subnet: &str) -> String {
    let keys: Vec<String> = hubs.iter().map(|(_, peer, _)| format!("'{}'", peer.mesh_key)).collect();
    let addresses: Vec<String> = hubs.iter().map(|(_, peer, _)| peer.address.to_string()).collect();
    format!(
        "(key=({}); at=({}); now=0; misses=0; while sleep 2 && wg show %i; do \
         if ping -c 1 -W 1 -I %i ${{at[now]}}; then misses=0; \
         elif [ $((++misses)) -ge 2 ]; then for next in ${{!at[@]}}; do \
         if [ $next != $now ] && ping -c 1 -W 1 -I %i ${{at[next]}} \
         && wg set %i peer ${{key[now]}} allowed-ips ${{at[now]}}/32 \
         && wg set %i peer ${{key[next]}} allowed-ips ${{at[next]}}/32,{subnet}; \
         then now=$next; misses=0; break; fi; done; fi; done) </dev/null >/dev/null 2>&1 &",
        keys.join(" "),
        addresses.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::MeshKey;
    use std::process::Command;

    fn peering(hubs: usize) -> OperatorPeering {
        let hub = |i: usize| {
            let peer = HubPeer { mesh_key: MeshKey([i as u8; 32]), address: [10, 10, 0, i as u8].into() };
            (format!("hub-{i}"), peer)
        };
        OperatorPeering {
            address: [10, 10, 0, 193].into(),
            subnet: "10.10.0.0/24".parse().unwrap(),
            mtu: 1420,
            port: 51820,
            hubs: (1..=hubs).map(hub).collect(),
        }
    }

    fn text(hubs: usize, first: Option<&str>) -> String {
        let hosts = (1..=hubs).map(|i| (format!("hub-{i}"), format!("hub{i}.example.net"))).collect();
        let owner = Owner { name: "anna", fleet: "acme", expires: "2026-12-01T00:00:00Z" };
        configuration(&owner, &key(), &peering(hubs), &hosts, first)
    }

    fn key() -> WireguardKey {
        WireguardKey::parse("dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=").unwrap()
    }

    #[test]
    fn mesh_is_behind_one_hub_and_each_hub_behind_its_own_peer() {
        let conf = text(3, Some("hub-2"));
        let allowed: Vec<&str> = conf.lines().filter(|line| line.starts_with("AllowedIPs")).collect();
        let expected =
            ["AllowedIPs = 10.10.0.2/32, 10.10.0.0/24", "AllowedIPs = 10.10.0.1/32", "AllowedIPs = 10.10.0.3/32"];
        assert_eq!(allowed, expected);
        assert!(conf.contains("Endpoint = hub2.example.net:51820") && conf.contains("Address = 10.10.0.193/32"));
        assert_eq!(key_in(&conf).unwrap().text(), key().text());
        assert!(text(1, None).lines().all(|line| !line.starts_with("PostUp")));
        assert!(key_in("[Interface]\nPrivateKey = x\n").is_none());
        assert_eq!(file_name("anna-of-the-north-office"), "anna-of-the-nor.conf");
    }

    /// Runs the command of `PostUp` as wg-quick does, with programs of the test in place of wg and ping.
    #[test]
    fn failover_moves_the_mesh_to_the_next_hub_that_answers() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, script: &str| {
            use std::os::unix::fs::PermissionsExt as _;
            let path = dir.path().join(name);
            std::fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", dir.path().display())).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        // Hub 1 and hub 2 do not answer. The interface exists for three rounds after the move.
        write("ping", "echo \"$7\" >>pings\ncase \"$7\" in 10.10.0.3) exit 0;; *) exit 1;; esac");
        write("wg", "if [ \"$1\" = set ]; then echo \"$*\" >>moves; exit 0; fi\n[ \"$(wc -l <pings)\" -lt 8 ]");
        write("sleep", "exit 0");
        std::fs::write(dir.path().join("pings"), "").unwrap();
        let conf = text(3, None);
        let command = conf.lines().find_map(|line| line.strip_prefix("PostUp = ")).unwrap();
        assert!(!command.contains('#'), "wg-quick takes it for a comment: {command}");
        let command = command.replace("%i", "wg-acme");
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let ran = Command::new("bash").args(["-ec", &format!("{command}\nwait")]).env("PATH", path).status().unwrap();
        assert!(ran.success());
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let moves = read("moves");
        let [one, three] = [1, 3].map(|i| MeshKey([i; 32]).to_string());
        let expected = format!(
            "set wg-acme peer {one} allowed-ips 10.10.0.1/32\n\
             set wg-acme peer {three} allowed-ips 10.10.0.3/32,10.10.0.0/24\n"
        );
        assert_eq!(moves, expected, "pings:\n{}", read("pings"));
    }
}
