//! etcd's users and roles. Users authenticate with passwords, because the JSON gateway does not take the user from a
//! certificate's common name.

use fleet::encoding::encode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::gateway::{Etcd, contains};
use crate::error::Result;

const EXISTS: [&str; 2] = ["user name already exists", "role name already exists"];

impl Etcd {
    /// Whether etcd requires its clients to authenticate.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn has_auth(&self) -> Result<bool> {
        #[derive(Deserialize)]
        struct Status {
            #[serde(default)]
            enabled: bool,
        }
        let status: Status = self.call("/v3/auth/status", &json!({})).await?;
        Ok(status.enabled)
    }

    /// Creates a user with a password, or changes the password if the user exists.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn put_user(&self, name: &str, password: &str) -> Result<()> {
        let body = json!({ "name": name, "password": password });
        if self.create("/v3/auth/user/add", &body).await? {
            return Ok(());
        }
        self.call("/v3/auth/user/changepw", &body).await.map(|_: Value| ())
    }

    /// Creates a role, if it does not exist.
    ///
    /// # Errors
    /// If no member answers.
    pub async fn put_role(&self, name: &str) -> Result<()> {
        self.create("/v3/auth/role/add", &json!({ "name": name })).await.map(drop)
    }

    /// Grants a role to a user. A repeated call changes nothing.
    ///
    /// # Errors
    /// If no member answers, or the user or the role does not exist.
    pub async fn grant_role(&self, user: &str, role: &str) -> Result<()> {
        self.call("/v3/auth/user/grant", &json!({ "user": user, "role": role })).await.map(|_: Value| ())
    }

    /// Permits a role to read and write every key from `first` to before `end`. A repeated call changes nothing.
    ///
    /// # Errors
    /// If no member answers, or the role does not exist.
    pub async fn permit(&self, role: &str, first: &[u8], end: &[u8]) -> Result<()> {
        let range = json!({ "permType": "READWRITE", "key": encode(first), "range_end": encode(end) });
        self.call("/v3/auth/role/grant", &json!({ "name": role, "perm": range })).await.map(|_: Value| ())
    }

    /// Makes etcd require authentication. The user `root` with the role `root` must exist.
    ///
    /// # Errors
    /// If no member answers, or that user does not exist.
    pub async fn enable_auth(&self) -> Result<()> {
        self.call("/v3/auth/enable", &json!({})).await.map(|_: Value| ())
    }

    /// Creates a user or a role. Returns false if it exists.
    async fn create(&self, path: &str, body: &Value) -> Result<bool> {
        match self.call(path, body).await.map(|_: Value| ()) {
            Ok(()) => Ok(true),
            Err(e) if contains(&e, &EXISTS) => Ok(false),
            Err(e) => Err(e),
        }
    }
}
