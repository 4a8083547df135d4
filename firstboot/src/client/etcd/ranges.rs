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
        self.keys_until(first, &after(prefix), 0).await
    }

    /// Returns the first `most` keys from `first` on, up to `end` and without it, in their order. 0: all of them.
    ///
    /// # Errors
    /// If no member answers.
    pub(crate) async fn keys_until(&self, first: &str, end: &[u8], most: u64) -> Result<Vec<String>> {
        let body = json!({
            "key": encode(first.as_bytes()), "range_end": encode(end), "keys_only": true, "limit": most.to_string(),
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
        self.count_until(prefix, &after(prefix)).await
    }

    /// Returns the number of keys from `first` on, up to `end` and without it.
    ///
    /// # Errors
    /// If no member answers.
    pub(crate) async fn count_until(&self, first: &str, end: &[u8]) -> Result<u64> {
        let body = json!({ "key": encode(first.as_bytes()), "range_end": encode(end), "count_only": true });
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
