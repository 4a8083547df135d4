//! The node's private keys. The node makes them, stores them before it sends any packet, and sends them to no other
//! machine.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fleet::{MeshKey, PrivateKey, encoding};
use serde::{Deserialize, Serialize};
use tracing::info;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::error::{Error, Result};
use crate::node::state::StateDir;

const FILE: &str = "keys.json";

/// Private keys of WireGuard and of the TLS certificate.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keys {
    version: u16,
    /// WireGuard's private key, base64.
    mesh: String,
    /// Key of the TLS certificate.
    pub tls: PrivateKey,
    /// Time at which the keys were made, in seconds since 1970 by this machine's clock; 0 for keys of earlier agents.
    #[serde(default)]
    made: u64,
}

impl Keys {
    /// Format of the sealed file. [`Self::OPEN`] is the format of a file that is not sealed.
    const VERSION: u16 = 2;
    const OPEN: u16 = 1;

    /// Loads the keys, or makes new keys and stores them.
    ///
    /// # Errors
    /// If the file cannot be read, written or unsealed, or is damaged.
    pub fn load_or_make(dir: &StateDir) -> Result<Self> {
        if let Some(keys) = dir.read::<Self>(FILE, Self::OPEN..=Self::VERSION)? {
            keys.mesh_private()?;
            return Ok(keys);
        }
        let keys = Self::make()?;
        keys.store(dir)?;
        info!("made new keys; the mesh key is {}", keys.mesh_public()?);
        Ok(keys)
    }

    /// Makes new keys, without storing them.
    ///
    /// # Errors
    /// If the kernel returns no random bytes.
    pub fn make() -> Result<Self> {
        let mut mesh = [0; 32];
        getrandom::fill(&mut mesh).map_err(Error::cannot("get random bytes from the kernel"))?;
        // WireGuard stores keys clamped (RFC 7748 § 5).
        mesh[0] &= 0xf8;
        mesh[31] = (mesh[31] & 0x7f) | 0x40;
        Ok(Self { version: Self::OPEN, mesh: encoding::encode(&mesh), tls: PrivateKey::generate()?, made: now() })
    }

    /// Stores the keys.
    ///
    /// # Errors
    /// If the file cannot be sealed or written. The file of before is then unchanged.
    pub fn store(&self, dir: &StateDir) -> Result<()> {
        dir.write(FILE, Self::VERSION, self)
    }

    /// Returns the age of the keys; 0 if their time is in the future.
    #[must_use]
    pub fn age(&self) -> Duration {
        Duration::from_secs(now().saturating_sub(self.made))
    }

    /// Returns WireGuard's private key.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn mesh_private(&self) -> Result<[u8; 32]> {
        encoding::decode(&self.mesh)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| Error::Configuration(format!("{FILE} is damaged; wipe /var to make this a new node")))
    }

    /// Returns WireGuard's public key.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn mesh_public(&self) -> Result<MeshKey> {
        Ok(MeshKey(PublicKey::from(&StaticSecret::from(self.mesh_private()?)).to_bytes()))
    }
}

/// Returns the time in seconds since 1970, by this machine's clock.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn stored_keys_are_private_and_unique() {
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
    fn public_key_matches_openssl() {
        // Made by `openssl genpkey -algorithm X25519`.
        let keys = Keys {
            version: 1,
            mesh: "wFTe/nBkCyNKj6aBu64Z5aEZWZuDv0pyACVGi/cx1XA=".to_owned(),
            tls: PrivateKey::generate().unwrap(),
            made: 0,
        };
        assert_eq!(keys.mesh_public().unwrap().to_string(), "R7Kc4u/m+pA25bC5J3pEdxhb9rdJwHUEfWqcJK3KJm4=");
    }

    #[test]
    fn damaged_keys_are_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(Keys::load_or_make(&StateDir::new(dir.path(), None)).map(drop).unwrap_err().exit_code(), 78);
    }
}
