//! The operator's log of minted tickets. It has the tickets' claims, never a key.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{Claims, Ticket, Token, Tokens};
use schemars::JsonSchema;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::util::fs::append_line;
use crate::util::time::rfc3339;

/// Name of the file, beside `fleet.toml`. Each line is the JSON of a ticket's claims.
const FILE: &str = "tickets.jsonl";

/// A minted ticket, as `bakehouse ticket` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct TicketRow {
    /// Number of the ticket, which `--revoke` takes.
    pub number: String,
    /// A node, or a group.
    pub to: String,
    /// Number of times that nodes have joined with the ticket; `None` if no hub replied.
    pub used: Option<u32>,
    /// Number of nodes that may join with the ticket.
    pub uses: u32,
    /// Seconds since 1970.
    pub expires: u64,
    /// The same time, RFC 3339.
    pub expires_at: String,
    /// Whether a machine can join with the ticket.
    pub state: TicketState,
}

/// Whether a ticket is still valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum TicketState {
    /// A machine can join with the ticket.
    Good,
    /// All uses are spent.
    Spent,
    /// The time of the ticket has passed.
    Expired,
    /// The operator revoked the ticket.
    Revoked,
}

/// Appends a ticket to the log, if it has a token.
///
/// # Errors
/// If the log cannot be written.
pub(crate) fn note(dir: &Path, ticket: &Ticket) -> Result<()> {
    let Some(claims) = ticket.token().and_then(Token::read) else { return Ok(()) };
    append_line(&dir.join(FILE), &serde_json::to_vec(&claims).map_err(Error::Json)?)
}

/// Returns the tickets in the log, oldest first, with the use counts and revocations that a hub reports.
///
/// # Errors
/// If the log cannot be read.
pub(crate) fn rows(dir: &Path, known: Option<&Tokens>) -> Result<Vec<TicketRow>> {
    let path = dir.join(FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
        Err(e) => return Err(Error::io("read", &path)(e)),
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    // An incomplete line comes from a power cut. The operator never received that ticket.
    let minted = text.lines().filter_map(|line| serde_json::from_str::<Claims>(line).ok());
    Ok(minted.map(|claims| row(claims, known, now)).collect())
}

fn row(claims: Claims, known: Option<&Tokens>, now: u64) -> TicketRow {
    let used = known.map(|k| k.used.get(&claims.id).copied().unwrap_or(0));
    let state = if known.is_some_and(|k| k.revoked.contains(&claims.id)) {
        TicketState::Revoked
    } else if used.is_some_and(|used| used >= claims.uses) {
        TicketState::Spent
    } else if now > claims.expires {
        TicketState::Expired
    } else {
        TicketState::Good
    };
    TicketRow {
        number: claims.id,
        to: claims.slot.unwrap_or(claims.group),
        used,
        uses: claims.uses,
        expires: claims.expires,
        expires_at: rfc3339(claims.expires),
        state,
    }
}

/// Formats the tickets as a table.
#[must_use]
pub(crate) fn table(rows: &[TicketRow]) -> String {
    let mut text = format!("{:<32} {:<12} {:>7} {:<20} {}\n", "number", "for", "used", "expires", "state");
    for row in rows {
        let used = row.used.map_or_else(|| "?".to_owned(), |n| n.to_string());
        let state = match row.state {
            TicketState::Good => "good",
            TicketState::Spent => "spent",
            TicketState::Expired => "expired",
            TicketState::Revoked => "revoked",
        };
        text += &format!(
            "{:<32} {:<12} {:>7} {:<20} {state}\n",
            row.number,
            row.to,
            format!("{used}/{}", row.uses),
            row.expires_at
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn claims(id: &str, uses: u32, expires: u64) -> Claims {
        Claims {
            fleet: "acme".into(),
            id: id.into(),
            group: "db".into(),
            slot: None,
            replace: false,
            uses,
            expires,
            key: String::new(),
        }
    }

    #[test]
    fn ticket_state_follows_reports_of_hubs() {
        let known = Tokens {
            used: BTreeMap::from([("a".to_owned(), 2), ("b".to_owned(), 1)]),
            revoked: BTreeSet::from(["d".to_owned()]),
        };
        let of = |id: &str, known: Option<&Tokens>| row(claims(id, 2, 100), known, 50);
        assert_eq!((of("a", Some(&known)).state, of("a", Some(&known)).used), (TicketState::Spent, Some(2)));
        assert_eq!((of("b", Some(&known)).state, of("b", None).used), (TicketState::Good, None));
        assert_eq!(of("d", Some(&known)).state, TicketState::Revoked);
        assert_eq!(row(claims("c", 2, 100), Some(&known), 101).state, TicketState::Expired);
    }

    #[test]
    fn ignores_incomplete_line() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(rows(dir.path(), None).unwrap(), []);
        let whole = serde_json::to_string(&claims("a", 1, 1)).unwrap();
        fs::write(dir.path().join(FILE), format!("{whole}\n{}", &whole[..20])).unwrap();
        let first = rows(dir.path(), None).unwrap();
        assert_eq!(first.len(), 1);
        assert!(table(&first).contains("1970-01-01T00:00:01Z expired"), "{}", table(&first));
        let authority = crate::keys::authority::FleetKey::create("acme").unwrap();
        let joiner = fleet::Joiner::mint(&authority.root, claims("b", 1, u64::MAX)).unwrap();
        let ticket = Ticket {
            version: Ticket::VERSION,
            fleet: "acme".into(),
            root: String::new(),
            endpoints: BTreeMap::new(),
            right: fleet::Credential::Joiner(joiner),
        };
        note(dir.path(), &ticket).unwrap();
        let all: Vec<String> = rows(dir.path(), None).unwrap().into_iter().map(|r| r.number).collect();
        assert_eq!(all, ["a", "b"]);
    }
}
