//! Mints tickets. This needs no connection to a hub, because hubs trust the signature of the fleet's root.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::{Claims, Credential, Founder, Joiner, Node, Ticket, Token, Topology};
use schemars::JsonSchema;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::keys::authority::FleetKey;
use crate::util::digest::hex;
use crate::util::random::random;
use crate::util::time::rfc3339;

/// Limits of a ticket.
pub struct TicketTerms {
    /// Number of nodes that may join with it.
    pub uses: u32,
    /// Validity from now.
    pub lasts: Duration,
    /// Whether the joiner replaces the owner of the slot.
    pub replace: bool,
}

/// Terms of a ticket on a disk or in an exported image: one use within seven days.
pub const DEFAULT_TERMS: TicketTerms = TicketTerms { uses: 1, lasts: Duration::from_secs(7 * 86_400), replace: false };

/// Facts about a ticket, without its secrets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct TicketSummary {
    /// Number, with which `bakehouse ticket --revoke NUMBER` revokes the ticket; `null` for the ticket of a founder, which
    /// has none.
    pub number: Option<String>,
    /// A node, or a group.
    pub to: String,
    /// Whether it is for a founder (hub or voter). Such a ticket does not expire.
    pub founder: bool,
    /// Number of nodes that may join with the ticket; `null` for a founder's.
    pub uses: Option<u32>,
    /// Time after which the ticket is invalid, in seconds since 1970; `null` for a founder's.
    pub expires: Option<u64>,
    /// The same time, RFC 3339.
    pub expires_at: Option<String>,
}

impl TicketSummary {
    /// Returns the facts about a ticket.
    #[must_use]
    pub fn from_ticket(ticket: &Ticket) -> Self {
        let claims = ticket.token().and_then(Token::read);
        let to = match (&ticket.right, &claims) {
            (Credential::Founder(founder), _) => founder.slot.clone(),
            (_, Some(claims)) => claims.slot.clone().unwrap_or_else(|| claims.group.clone()),
            (_, None) => String::new(),
        };
        let expires = claims.as_ref().map(|claims| claims.expires);
        Self {
            to,
            founder: matches!(ticket.right, Credential::Founder(_)),
            uses: claims.as_ref().map(|claims| claims.uses),
            expires,
            expires_at: expires.map(rfc3339),
            number: claims.map(|claims| claims.id),
        }
    }
}

/// Mints a ticket for a slot, or for any slot of a group.
///
/// # Errors
/// If there is no such slot or group, or each node of the group is a founder.
pub fn mint(
    authority: &FleetKey,
    topology: &Topology,
    to: &str,
    terms: &TicketTerms,
    endpoints: BTreeMap<String, String>,
) -> Result<Ticket> {
    let right = match topology.node(to) {
        Some(node) if topology.is_founder(node) => founder(authority, topology, node, terms)?,
        Some(node) => Credential::Joiner(joiner(authority, topology, &node.group, Some(to), terms)?),
        None if topology.nodes.iter().any(|n| n.group == to) => {
            if topology.nodes.iter().filter(|n| n.group == to).all(|n| topology.is_founder(n)) {
                let slots: Vec<&str> =
                    topology.nodes.iter().filter(|n| n.group == to).map(|n| n.name.as_str()).collect();
                return Err(Error::Usage(format!(
                    "the nodes of `{to}` are founders, and each has a ticket of its own; name one of {}",
                    slots.join(", ")
                )));
            }
            Credential::Joiner(joiner(authority, topology, to, None, terms)?)
        }
        None => {
            let known: Vec<&str> = topology.nodes.iter().map(|n| n.name.as_str()).collect();
            return Err(Error::Usage(format!("there is no node or group `{to}`; there are: {}", known.join(", "))));
        }
    };
    Ok(Ticket {
        version: Ticket::VERSION,
        fleet: topology.name.clone(),
        root: authority.root.certificate().to_owned(),
        endpoints,
        right,
    })
}

fn founder(authority: &FleetKey, topology: &Topology, node: &Node, terms: &TicketTerms) -> Result<Credential> {
    // A hub grants secrets to nodes of any role, so it needs all. Another founder gets the secrets of its own roles.
    let secrets = if node.hub > 0 { authority.secrets.clone() } else { authority.secrets.for_roles(&node.roles) };
    let issuer = authority.root.founder_issuer(topology, node)?;
    let replaces =
        if terms.replace { Some(joiner(authority, topology, &node.group, Some(&node.name), terms)?) } else { None };
    Ok(Credential::Founder(Founder { slot: node.name.clone(), issuer, secrets, replaces }))
}

fn joiner(
    authority: &FleetKey,
    topology: &Topology,
    group: &str,
    slot: Option<&str>,
    terms: &TicketTerms,
) -> Result<Joiner> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let claims = Claims {
        fleet: topology.name.clone(),
        id: hex(&random::<16>()?),
        group: group.to_owned(),
        slot: slot.map(str::to_owned),
        replace: terms.replace,
        uses: terms.uses,
        expires: (now + terms.lasts).as_secs(),
        key: String::new(),
    };
    Ok(Joiner::mint(&authority.root, claims)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONCE: TicketTerms = TicketTerms { uses: 1, lasts: Duration::from_secs(60), replace: false };

    fn minted(to: &str) -> Result<Ticket> {
        let toml = b"name = \"acme\"\n[groups]\nhub.count = 3\ndb.count = 2\n";
        let topology = Topology::from_fleet(&fleet::Fleet::parse("f", toml).unwrap());
        mint(&FleetKey::create("acme").unwrap(), &topology, to, &ONCE, BTreeMap::new())
    }

    #[test]
    fn founders_get_a_slot_and_joiners_a_token() {
        assert!(matches!(minted("hub-1").unwrap().right, Credential::Founder(f) if f.slot == "hub-1"));
        let claims = |to: &str| match minted(to).unwrap().right {
            Credential::Joiner(joiner) => joiner.token.read().unwrap(),
            Credential::Founder(_) => panic!("{to} is a founder"),
        };
        assert_eq!((claims("db").slot, claims("db-2").slot.as_deref()), (None, Some("db-2")));
        assert_ne!(claims("db").id, claims("db").id);
    }

    #[test]
    fn rejects_founder_groups_and_unknown_names() {
        for (to, message) in [("hub", "name one of hub-1, hub-2, hub-3"), ("web", "there is no node or group `web`")] {
            let e = minted(to).map(drop).unwrap_err();
            assert!(e.to_string().contains(message), "{e}");
        }
    }
}
