//! Ranges of keys: their names, their number, and their deletion.

use fleet::encoding::{decode, encode};
use serde::Deserialize;
use serde_json::json;

use super::gateway::{Etcd, after, foreign};
use crate::error::Result;

#[derive(Default, Deserialize)]
#[serde(default)]
struct Ranged {
    kvs: Vec<Named>,
    count: String,
}

#[derive(Deserialize)]
struct Named {
    key: String,
}

impl Etcd {
    /// Returns the keys below `prefix` from the key `first` on, in their order, without values.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn keys(&self, first: &str, prefix: &str) -> Result<Vec<String>> {
        let body = json!({
            "key": encode(first.as_bytes()), "range_end": encode(&after(prefix)), "keys_only": true,
        });
        let found: Ranged = self.call("/v3/kv/range", &body).await?;
        let key = |named: &Named| String::from_utf8(decode(&named.key)?).ok();
        found.kvs.iter().map(key).collect::<Option<_>>().ok_or_else(foreign)
    }

    /// Returns the number of keys below a prefix.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn count(&self, prefix: &str) -> Result<u64> {
        let body = json!({
            "key": encode(prefix.as_bytes()), "range_end": encode(&after(prefix)), "count_only": true,
        });
        let found: Ranged = self.call("/v3/kv/range", &body).await?;
        // The gateway leaves zeros out.
        if found.count.is_empty() { Ok(0) } else { found.count.parse().map_err(|_| foreign()) }
    }

    /// Deletes the keys from `first` on, up to `end` and without it. Returns their number.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn delete_range(&self, first: &str, end: &str) -> Result<u64> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Deleted {
            deleted: String,
        }
        let body = json!({ "key": encode(first.as_bytes()), "range_end": encode(end.as_bytes()) });
        let found: Deleted = self.call("/v3/kv/deleterange", &body).await?;
        Ok(found.deleted.parse().unwrap_or_default())
    }
}
