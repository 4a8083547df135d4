//! etcd's users and roles (its own access control), by password: the JSON gateway does not take the user from a
//! certificate's common name.

use fleet::encoding::encode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::gateway::{Etcd, contains};
use crate::error::Result;

const EXISTS: [&str; 2] = ["user name already exists", "role name already exists"];

impl Etcd {
    /// Whether etcd asks its clients for a user.
    ///
    /// # Errors
    /// No member answers.
    pub async fn has_auth(&self) -> Result<bool> {
        #[derive(Deserialize)]
        struct Status {
            #[serde(default)]
            enabled: bool,
        }
        let status: Status = self.call("/v3/auth/status", &json!({})).await?;
        Ok(status.enabled)
    }

    /// Makes a user with a password, or gives the one of that name this password.
    ///
    /// # Errors
    /// No member answers.
    pub async fn put_user(&self, name: &str, password: &str) -> Result<()> {
        let body = json!({ "name": name, "password": password });
        if self.made("/v3/auth/user/add", &body).await? {
            return Ok(());
        }
        self.call("/v3/auth/user/changepw", &body).await.map(|_: Value| ())
    }

    /// Makes a role, unless there is one of that name.
    ///
    /// # Errors
    /// No member answers.
    pub async fn put_role(&self, name: &str) -> Result<()> {
        self.made("/v3/auth/role/add", &json!({ "name": name })).await.map(drop)
    }

    /// Gives a user a role. Done again, it changes nothing.
    ///
    /// # Errors
    /// No member answers, or there is no such user or role.
    pub async fn grant_role(&self, user: &str, role: &str) -> Result<()> {
        self.call("/v3/auth/user/grant", &json!({ "user": user, "role": role })).await.map(|_: Value| ())
    }

    /// Lets a role read and write every key from `first` to before `end`. Done again, it changes nothing.
    ///
    /// # Errors
    /// No member answers, or there is no such role.
    pub async fn permit(&self, role: &str, first: &[u8], end: &[u8]) -> Result<()> {
        let range = json!({ "permType": "READWRITE", "key": encode(first), "range_end": encode(end) });
        self.call("/v3/auth/role/grant", &json!({ "name": role, "perm": range })).await.map(|_: Value| ())
    }

    /// Has etcd ask every client for a user from now on. There must be a user `root` with the role `root`.
    ///
    /// # Errors
    /// No member answers, or there is no such user.
    pub async fn enable_auth(&self) -> Result<()> {
        self.call("/v3/auth/enable", &json!({})).await.map(|_: Value| ())
    }

    /// False if it was there before.
    async fn made(&self, path: &str, body: &Value) -> Result<bool> {
        match self.call(path, body).await.map(|_: Value| ()) {
            Ok(()) => Ok(true),
            Err(e) if contains(&e, &EXISTS) => Ok(false),
            Err(e) => Err(e),
        }
    }
}
