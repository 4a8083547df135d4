//! The log of operators' actions that outlives the nodes: what a node sends to a hub, and what a hub returns.

use serde::{Deserialize, Serialize};

/// `POST` of a node to a hub: a list of [`AuditEntry`], up to [`LONGEST_AUDIT_REQUEST`] bytes. The reply has status 200
/// when etcd has all of them. Hubs of earlier versions reply 404.
pub const AUDIT_PATH: &str = "/v1/audit";
/// `POST` of an operator to a hub, viewer, with an [`AuditQuery`]: an [`AuditLog`]. Hubs of earlier versions reply 404.
pub const AUDIT_QUERY_PATH: &str = "/v1/audit/query";
/// Longest entry, in bytes of its JSON.
pub const LONGEST_AUDIT_ENTRY: usize = 4 << 10;
/// Longest list of entries of one request, in bytes.
pub const LONGEST_AUDIT_REQUEST: usize = 14 << 10;
/// Most entries of an [`AuditLog`].
pub const MOST_AUDIT_ENTRIES: u32 = 1000;
/// Days for which hubs keep an entry.
pub const AUDIT_DAYS: u32 = 90;
/// Result of an action without an end.
pub const BEGINS: &str = "begins";

/// Longest name and result in an entry, in characters.
const LONGEST_NAME: usize = 100;
const LONGEST_RESULT: usize = 500;
/// Room for `left_out`, which the outbox adds, in bytes.
const SPARE: usize = 32;
/// Mark of a text that was cut.
const CUT: &str = "… (the node's journal has the rest)";

/// An action of an operator on a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AuditEntry {
    /// Begin by the node's clock, in milliseconds since 1970.
    pub at: u64,
    /// Identifier of the action: up to 16 lower-case hexadecimal digits.
    pub id: String,
    /// Name of the node.
    pub node: String,
    /// Name of the operator.
    pub operator: String,
    /// Role of the operator's certificate.
    pub role: String,
    /// The hub that forwarded the request, or the address of the operator's machine.
    pub from: String,
    /// What the operator asked for.
    pub action: String,
    /// How the action ended; [`BEGINS`] before its end.
    pub result: String,
    /// End, in milliseconds since 1970; `None` before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
    /// Number of the node's earlier actions that have no entry, because no hub answered for long.
    #[serde(skip_serializing_if = "is_zero")]
    pub left_out: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde requires a reference")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

impl AuditEntry {
    /// Returns the length of the entry's JSON, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        serde_json::to_vec(self).map_or(usize::MAX, |json| json.len())
    }

    /// Returns the entry with texts that were cut so that its JSON has at most [`LONGEST_AUDIT_ENTRY`] bytes. A mark
    /// shows where a text was cut.
    #[must_use]
    pub fn fitted(mut self) -> Self {
        for name in [&mut self.node, &mut self.operator, &mut self.role, &mut self.from] {
            cut_at(name, LONGEST_NAME);
        }
        cut_at(&mut self.result, LONGEST_RESULT);
        let excess = |entry: &Self| entry.size().saturating_sub(LONGEST_AUDIT_ENTRY - SPARE);
        let over = excess(&self);
        if over > 0 {
            shorten(&mut self.action, over);
        }
        let over = excess(&self);
        if over > 0 {
            shorten(&mut self.result, over);
        }
        self
    }

    /// Whether another entry is about the same action.
    #[must_use]
    pub fn is_same_action(&self, other: &Self) -> bool {
        (self.at, &self.id) == (other.at, &other.id)
    }
}

/// Cuts a text after a number of characters.
fn cut_at(text: &mut String, most: usize) {
    if let Some((end, _)) = text.char_indices().nth(most) {
        text.truncate(end);
        text.push('…');
    }
}

/// Removes as many characters from the end of a text that its JSON, with a mark, is shorter by `excess` bytes.
fn shorten(text: &mut String, excess: usize) {
    let mut left = excess + CUT.len();
    while left > 0
        && let Some(last) = text.pop()
    {
        // The two quotes are not a part of the character.
        let length = serde_json::to_string(&last).map_or(last.len_utf8(), |json| json.len() - 2);
        left = left.saturating_sub(length);
    }
    text.push_str(CUT);
}

/// Which entries of the log to return.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AuditQuery {
    /// Earliest begin, in seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// Name of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Name of the operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator: Option<String>,
    /// Most entries, up to [`MOST_AUDIT_ENTRIES`]: the last ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

/// A part of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AuditLog {
    /// The entries, by the time of their begin.
    pub entries: Vec<AuditEntry>,
    /// Whether earlier entries match the query, too, or the hub has not read all of them, because that takes too long.
    pub has_more: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(action: &str) -> AuditEntry {
        AuditEntry {
            at: 1_732_900_003_000,
            id: "0123456789abcdef".to_owned(),
            node: "db-1".to_owned(),
            operator: "anna".to_owned(),
            role: "admin".to_owned(),
            from: "hub-1".to_owned(),
            action: action.to_owned(),
            result: "done".to_owned(),
            ended: Some(1_732_900_004_000),
            left_out: 7,
        }
    }

    #[test]
    fn a_long_entry_is_cut_with_a_mark() {
        assert_eq!(entry("reboot").fitted(), entry("reboot"));
        for text in ["x", "\"", "ä", "\u{1}", "😀"] {
            let cut = entry(&text.repeat(8000)).fitted();
            assert!(cut.size() <= LONGEST_AUDIT_ENTRY, "{text}: {}", cut.size());
            assert!(cut.size() > LONGEST_AUDIT_ENTRY - SPARE - 20, "{text}: {}", cut.size());
            assert!(cut.action.starts_with(text) && cut.action.ends_with(CUT), "{text}: {}", cut.action);
            let all = AuditEntry { result: text.repeat(8000), operator: text.repeat(8000), ..entry(text) }.fitted();
            assert!(all.size() <= LONGEST_AUDIT_ENTRY && all.result.contains('…'), "{text}: {}", all.size());
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_an_entry_or_refused(bytes: Vec<u8>) {
            if let Ok(entry) = serde_json::from_slice::<AuditEntry>(&bytes) {
                // A hub refuses an entry with a long identifier.
                let fitted = AuditEntry { id: String::new(), ..entry }.fitted();
                proptest::prop_assert!(fitted.size() <= LONGEST_AUDIT_ENTRY);
            }
        }

        /// A node sends any texts, and the hub cuts them before it stores the entry.
        #[test]
        fn entry_with_any_texts_fits_and_is_read_back(
            at: u64,
            texts in proptest::array::uniform7(".{0,900}"),
            ended: Option<u64>,
            left_out: u32,
        ) {
            let [id, node, operator, role, from, action, result] = texts;
            let id = id.chars().take(16).collect();
            let entry = AuditEntry { at, id, node, operator, role, from, action, result, ended, left_out }.fitted();
            proptest::prop_assert!(entry.size() <= LONGEST_AUDIT_ENTRY, "{} bytes", entry.size());
            let json = serde_json::to_vec(&entry).unwrap();
            proptest::prop_assert_eq!(&serde_json::from_slice::<AuditEntry>(&json).unwrap(), &entry);
        }
    }

    #[test]
    fn versions_read_each_others_entries() {
        let newer: AuditEntry = serde_json::from_str(r#"{"at":1,"id":"a","action":"drain","new":{"x":1}}"#).unwrap();
        assert_eq!((newer.at, newer.action.as_str(), newer.ended, newer.left_out), (1, "drain", None, 0));
        let begun = AuditEntry { ended: None, left_out: 0, ..entry("reboot") };
        let json = serde_json::to_string(&begun).unwrap();
        assert!(!json.contains("ended") && !json.contains("left_out"), "{json}");
    }
}
