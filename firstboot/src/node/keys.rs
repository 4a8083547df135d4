//! The node's own keys: made here, on the disk before any packet leaves, and never elsewhere.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::{MeshKey, PrivateKey, encoding};
use serde::{Deserialize, Serialize};
use x25519_dalek::{PublicKey, StaticSecret};

use crate::error::{Error, Result};
use crate::node::state::StateDir;

const FILE: &str = "keys.json";

/// WireGuard's private key and that of the TLS certificate.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    version: u16,
    /// Base64, as WireGuard writes it.
    mesh: String,
    pub tls: PrivateKey,
    /// Seconds since 1970, by the clock of this machine; 0 for what earlier agents made.
    #[serde(default)]
    made: u64,
}

impl Keys {
    /// Formats of the file: sealed, and not.
    const VERSION: u16 = 2;
    const OPEN: u16 = 1;

    /// The keys of an earlier boot, or new ones that are on the disk when this returns.
    ///
    /// # Errors
    /// The disk says no, or holds something else.
    pub fn load_or_make(dir: &StateDir) -> Result<Self> {
        if let Some(keys) = dir.read::<Self>(FILE, Self::OPEN..=Self::VERSION)? {
            keys.mesh_private()?;
            return Ok(keys);
        }
        let keys = Self::make()?;
        keys.store(dir)?;
        println!("new keys; this node is {} in the mesh", keys.mesh_public()?);
        Ok(keys)
    }

    /// New keys, nowhere but here yet.
    ///
    /// # Errors
    /// No randomness.
    pub fn make() -> Result<Self> {
        let mut mesh = [0; 32];
        getrandom::fill(&mut mesh).map_err(|e| Error::Failed(format!("no randomness: {e}")))?;
        // The form that WireGuard keeps them in.
        mesh[0] &= 0xf8;
        mesh[31] = (mesh[31] & 0x7f) | 0x40;
        Ok(Self { version: Self::OPEN, mesh: encoding::encode(&mesh), tls: PrivateKey::generate()?, made: now() })
    }

    /// # Errors
    /// The disk says no; what was there before still is.
    pub fn store(&self, dir: &StateDir) -> Result<()> {
        dir.write(FILE, Self::VERSION, self)
    }

    /// How long they have served; nothing, if they are of a time to come.
    #[must_use]
    pub fn age(&self) -> Duration {
        Duration::from_secs(now().saturating_sub(self.made))
    }

    /// # Errors
    /// The file was damaged.
    pub fn mesh_private(&self) -> Result<[u8; 32]> {
        encoding::decode(&self.mesh)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| Error::Configuration(format!("{FILE} is damaged; wipe /var to make this a new node")))
    }

    /// # Errors
    /// The file was damaged.
    pub fn mesh_public(&self) -> Result<MeshKey> {
        Ok(MeshKey(PublicKey::from(&StaticSecret::from(self.mesh_private()?)).to_bytes()))
    }
}

/// Seconds since 1970, by this machine's clock.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn keys_are_made_once_and_are_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let states = StateDir::new(dir.path(), None);
        let keys = Keys::load_or_make(&states).unwrap();
        assert!(keys == Keys::load_or_make(&states).unwrap());
        let mode = std::fs::metadata(dir.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let other = tempfile::tempdir().unwrap();
        assert!(
            keys.mesh_public().unwrap()
                != Keys::load_or_make(&StateDir::new(other.path(), None)).unwrap().mesh_public().unwrap()
        );
    }

    #[test]
    fn the_public_key_is_the_one_wireguard_knows() {
        // Of OpenSSL's making (`openssl genpkey -algorithm X25519`).
        let keys = Keys {
            version: 1,
            mesh: "wFTe/nBkCyNKj6aBu64Z5aEZWZuDv0pyACVGi/cx1XA=".to_owned(),
            tls: PrivateKey::generate().unwrap(),
            made: 0,
        };
        assert_eq!(keys.mesh_public().unwrap().to_string(), "R7Kc4u/m+pA25bC5J3pEdxhb9rdJwHUEfWqcJK3KJm4=");
    }

    #[test]
    fn damaged_keys_are_not_new_keys() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(Keys::load_or_make(&StateDir::new(dir.path(), None)).map(drop).unwrap_err().exit_code(), 78);
    }
}
