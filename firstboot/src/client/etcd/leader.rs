//! etcd's leader.

use serde::Deserialize;
use serde_json::{Value, json};

use super::gateway::{Etcd, EtcdMember};
use crate::error::{Error, Result};

/// A reply to `/v3/maintenance/status`. The gateway writes 64-bit numbers as strings.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    header: Header,
    leader: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Header {
    member_id: String,
}

impl Etcd {
    /// Makes another voting member the leader, if the member `from` is. `avoided`: members that are selected only if
    /// there is no other. Returns the new leader's name; `None` if `from` is not the leader.
    ///
    /// # Errors
    /// If etcd has no quorum, or no other member can become the leader.
    pub async fn move_leader(&self, from: &str, avoided: &[String]) -> Result<Option<String>> {
        let members = self.members().await?;
        let status: Status = self.call("/v3/maintenance/status", &json!({})).await?;
        let Some(own) = members.iter().find(|member| member.name == from && member.id == status.leader) else {
            return Ok(None);
        };
        let mut others: Vec<&EtcdMember> =
            members.iter().filter(|m| m.id != own.id && !m.is_learner && !m.name.is_empty()).collect();
        others.sort_by_key(|member| avoided.contains(&member.name));
        let mut last = Error::Failed(format!("etcd has no other voting member than {from}"));
        // Only the leader carries out the request.
        for at in self.each_member() {
            let status: Status = match at.call("/v3/maintenance/status", &json!({})).await {
                Ok(status) => status,
                Err(e) => {
                    last = e;
                    continue;
                }
            };
            if status.header.member_id != own.id {
                continue;
            }
            for to in &others {
                let body = json!({ "targetID": to.id });
                match at.call("/v3/maintenance/transfer-leadership", &body).await.map(|_: Value| ()) {
                    Ok(()) => return Ok(Some(to.name.clone())),
                    Err(e) => last = e,
                }
            }
        }
        Err(last)
    }
}
