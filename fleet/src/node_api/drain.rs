//! Drained nodes: they have given their work away, and take none.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `POST`, operator, with an [`ActionRequest`](super::ActionRequest): the node gives its work away, and takes none until
/// it is undrained, also after a reboot.
pub const DRAIN_PATH: &str = "/v1/drain";
/// `POST`, operator, with an [`ActionRequest`](super::ActionRequest): the node takes work again.
pub const UNDRAIN_PATH: &str = "/v1/undrain";
/// `POST` of a node to a hub, with a [`DrainRequest`]: a [`DrainAnswer`]. Hubs of earlier versions reply 404.
pub const DRAINED_PATH: &str = "/v1/drained";

/// A node's request to a hub about drained nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DrainRequest {
    /// Whether the node is drained, or will be; `None`: the hub changes nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drained: Option<bool>,
    /// Whether the hub refuses if the fleet would lose a role. Without it, the node is drained already.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub check: bool,
}

/// A hub's reply to a [`DrainRequest`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DrainAnswer {
    /// Whether the hub has recorded the change.
    pub granted: bool,
    /// What the fleet would lose, if the hub has not.
    pub why: String,
    /// Drained nodes, with the time since when the hubs know of the drain, in seconds since 1970.
    pub drained: BTreeMap<String, u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_of_other_versions_are_read() {
        let read: DrainRequest = serde_json::from_str(r#"{"later":1}"#).unwrap();
        assert_eq!(read, DrainRequest::default());
        let drains = DrainRequest { drained: Some(true), check: false };
        assert_eq!(serde_json::to_string(&drains).unwrap(), r#"{"drained":true}"#);
        let answer: DrainAnswer = serde_json::from_str(r#"{"granted":true,"later":{}}"#).unwrap();
        assert_eq!(answer, DrainAnswer { granted: true, ..DrainAnswer::default() });
    }
}
