//! The hubs' name service (`[dns]`): which hubs a name leads to, the zone, and the key that signs it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hkdf::{HKDF_SHA256, Salt};
use serde::{Deserialize, Serialize};

#[cfg(feature = "schema")]
use crate::form;
use crate::topology::Node;

/// Seconds for which a resolver may keep an address. A dead hub's address leaves all caches within this time after the
/// hubs have noticed.
const TTL: u32 = 10;
/// Seconds for which a resolver may keep the names of the hubs, which do not change.
const NAME_TTL: u32 = 3600;
/// Most addresses of a hub in the zone.
const MOST: usize = 8;

/// `[dns]`: one name that the hubs serve themselves, with the addresses of the hubs that work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct Dns {
    /// Name that users type. Your name servers delegate it to the hubs. No hub's endpoint is below it. Default: none, and
    /// hubs serve no name. Example: `"erp.acme.example"`.
    #[cfg_attr(feature = "schema", schemars(with = "Option<form::Host>"))]
    pub name: Option<String>,
    /// Whether the hubs sign the name with DNSSEC. Default: `false`.
    pub dnssec: bool,
}

impl Dns {
    /// Returns the name in lower case.
    #[must_use]
    pub fn zone(&self) -> Option<String> {
        self.name.as_ref().map(|name| name.to_ascii_lowercase())
    }
}

/// What a hub's HAProxy returns to another hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum HubAnswer {
    /// Nothing.
    None,
    /// An error, because it reaches no application server.
    Error,
    /// Odoo's health page.
    Page,
}

/// Returns the hubs to which the name leads, as the hub `own` sees them.
///
/// A hub that reaches Odoo excludes all that do not. While none does, a hub excludes those that do not answer. A hub that
/// is cut off reaches neither Odoo nor another hub. It returns all others, because they may work and it does not.
///
/// # Examples
///
/// ```
/// use std::collections::BTreeMap;
///
/// use fleet::{HubAnswer, serving_hubs};
///
/// let seen = BTreeMap::from([("hub-1", HubAnswer::Page), ("hub-2", HubAnswer::None)]);
/// let serving = serving_hubs(&seen.into_iter().map(|(hub, answer)| (hub.to_owned(), answer)).collect(), "hub-1");
/// assert_eq!(serving.into_iter().collect::<Vec<_>>(), ["hub-1"]);
/// ```
#[must_use]
pub fn serving_hubs(seen: &BTreeMap<String, HubAnswer>, own: &str) -> BTreeSet<String> {
    let with = |wanted: &dyn Fn(&str, HubAnswer) -> bool| -> BTreeSet<String> {
        seen.iter().filter(|(hub, answer)| wanted(hub, **answer)).map(|(hub, _)| hub.clone()).collect()
    };
    let best = seen.values().max().copied().unwrap_or(HubAnswer::None);
    let is_alone = seen.iter().all(|(hub, answer)| hub == own || *answer == HubAnswer::None);
    let others = with(&|hub, _| hub != own);
    if best != HubAnswer::Page && is_alone && !others.is_empty() {
        return others;
    }
    with(&|_, answer| answer == best)
}

/// Returns the text of the zone `name` in the format of RFC 1035. `addresses` are the known addresses of each hub.
#[must_use]
pub fn zone_file(
    name: &str,
    hubs: &[(&Node, Option<String>)],
    addresses: &BTreeMap<String, Vec<IpAddr>>,
    serving: &BTreeSet<String>,
) -> String {
    let of = |hub: &str| addresses.get(hub).map(Vec::as_slice).unwrap_or_default().iter().take(MOST);
    // Without a known address of a serving hub, an old answer is better than an empty one.
    let is_empty = serving.iter().all(|hub| of(hub).next().is_none());
    let mut text = format!("; Written by the agent.\n$ORIGIN {name}.\n");
    let servers: Vec<String> = hubs.iter().map(|(hub, endpoint)| server(&hub.name, endpoint.as_deref())).collect();
    let first = servers.first().map_or("@", String::as_str);
    // The name server counts the serial up.
    let _ = writeln!(text, "@ {TTL} SOA {first} hostmaster 1 {NAME_TTL} 60 604800 {TTL}");
    for server in &servers {
        let _ = writeln!(text, "@ {NAME_TTL} NS {server}");
    }
    let mut record = |at: &str, ttl: u32, address: &IpAddr| {
        let kind = if address.is_ipv4() { "A" } else { "AAAA" };
        let _ = writeln!(text, "{at} {ttl} {kind} {address}");
    };
    for ((hub, _), server) in hubs.iter().zip(&servers) {
        if *server == hub.name {
            of(&hub.name).for_each(|address| record(server, NAME_TTL, address));
        }
        if is_empty || serving.contains(&hub.name) {
            of(&hub.name).for_each(|address| record("@", TTL, address));
        }
    }
    text
}

/// Returns the name of a hub as a name server: its endpoint, or a name in the zone if the endpoint is an address.
fn server(hub: &str, endpoint: Option<&str>) -> String {
    match endpoint.filter(|endpoint| endpoint.parse::<IpAddr>().is_err()) {
        Some(name) => format!("{}.", name.trim_end_matches('.').to_ascii_lowercase()),
        None => hub.to_owned(),
    }
}

/// Derives the Ed25519 key that signs the zone, PEM (PKCS #8), from the password of etcd's user `root`, which only hubs
/// have. So all hubs have the same key, and none has to wait for another one. `None` without a password.
#[must_use]
pub fn dnssec_key(etcd_root: &str, fleet: &str, zone: &str) -> Option<String> {
    // Header of a PKCS #8 structure with an Ed25519 seed of 32 bytes, RFC 8410.
    const HEADER: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
    let mut seed = [0; 32];
    let secret = Salt::new(HKDF_SHA256, b"bakehouse").extract(etcd_root.as_bytes());
    let context = [b"dnssec key, v1".as_slice(), fleet.as_bytes(), zone.as_bytes()].join(&0);
    secret.expand(&[context.as_slice()], HKDF_SHA256).and_then(|key| key.fill(&mut seed)).ok()?;
    let text = STANDARD.encode([&HEADER[..], &seed].concat());
    (!etcd_root.is_empty()).then(|| format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Fleet, Topology};

    fn seen(answers: [HubAnswer; 3]) -> BTreeMap<String, HubAnswer> {
        answers.into_iter().enumerate().map(|(i, answer)| (format!("hub-{}", i + 1), answer)).collect()
    }

    #[test]
    fn name_leads_to_hubs_that_reach_odoo() {
        use HubAnswer::{Error, None, Page};
        let of = |answers, own: &str| serving_hubs(&seen(answers), own).into_iter().collect::<Vec<_>>().join(" ");
        assert_eq!(of([Page, Page, None], "hub-1"), "hub-1 hub-2");
        assert_eq!(of([Page, Error, None], "hub-2"), "hub-1");
        assert_eq!(of([Error, Error, None], "hub-1"), "hub-1 hub-2", "Odoo is down, and two hubs say so");
        assert_eq!(of([Error, None, None], "hub-1"), "hub-2 hub-3", "hub-1 is cut off");
        assert_eq!(of([None, None, None], "hub-1"), "hub-2 hub-3");
        assert_eq!(of([Page, None, None], "hub-1"), "hub-1", "the last hub serves");
        let one = BTreeMap::from([("hub-1".to_owned(), None)]);
        assert_eq!(serving_hubs(&one, "hub-1").len(), 1, "a fleet with one hub");
    }

    #[test]
    fn zone_has_addresses_of_serving_hubs_and_names_of_all() {
        let toml = "name = \"x\"\n[groups.hub]\ncount = 2\nendpoints = [\"192.0.2.1\", \"Hub2.acme.example\"]\n";
        let topology = Topology::from_fleet(&Fleet::parse("f", toml.as_bytes()).unwrap());
        let hubs: Vec<(&Node, Option<String>)> = topology.hubs.iter().map(|hub| (hub, hub.endpoint.clone())).collect();
        let addresses: BTreeMap<String, Vec<IpAddr>> = BTreeMap::from([
            ("hub-1".to_owned(), vec!["192.0.2.1".parse().unwrap()]),
            ("hub-2".to_owned(), vec!["192.0.2.2".parse().unwrap(), "2001:db8::2".parse().unwrap()]),
        ]);
        let zone = |serving: &[&str]| {
            let serving = serving.iter().map(|hub| (*hub).to_owned()).collect();
            zone_file("erp.acme.example", &hubs, &addresses, &serving)
        };
        let text = "; Written by the agent.\n$ORIGIN erp.acme.example.\n\
            @ 10 SOA hub-1 hostmaster 1 3600 60 604800 10\n@ 3600 NS hub-1\n@ 3600 NS hub2.acme.example.\n\
            hub-1 3600 A 192.0.2.1\n@ 10 A 192.0.2.2\n@ 10 AAAA 2001:db8::2\n";
        assert_eq!(zone(&["hub-2"]), text);
        let all = zone_file("erp.acme.example", &hubs, &addresses, &BTreeSet::from(["hub-3".to_owned()]));
        assert!(all.contains("@ 10 A 192.0.2.1\n") && all.contains("@ 10 A 192.0.2.2\n"), "{all}");
    }

    #[test]
    fn key_is_the_same_on_all_hubs_and_differs_by_zone_and_fleet() {
        let key = dnssec_key("password", "acme", "erp.acme.example").unwrap();
        assert_eq!(dnssec_key("password", "acme", "erp.acme.example").as_ref(), Some(&key));
        for other in
            [("other", "acme", "erp.acme.example"), ("password", "b", "erp.acme.example"), ("password", "acme", "b")]
        {
            assert_ne!(dnssec_key(other.0, other.1, other.2).unwrap(), key);
        }
        assert_eq!(dnssec_key("", "acme", "erp.acme.example"), None);
        let der: String = key.lines().filter(|line| !line.starts_with('-')).collect();
        let der = STANDARD.decode(der).unwrap();
        assert!(ring::signature::Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).is_ok());
    }
}
