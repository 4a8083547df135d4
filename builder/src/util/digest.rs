//! SHA-256 digests, and keys of build steps.

use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;

/// Returns bytes in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Returns the SHA-256 digest in hex.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The key of a build step: a digest of named inputs. It covers each input's length, so that different lists of inputs
/// never give the same bytes.
pub(crate) struct Key {
    hash: Sha256,
}

impl Key {
    /// Starts a key. `step` is the digest of the step's code from `build.rs` if the store keeps the step's results.
    pub(crate) fn new(step: &str) -> Self {
        let mut key = Self { hash: Sha256::new() };
        key.add("step", step.as_bytes());
        key
    }

    /// Adds an input.
    pub(crate) fn add(&mut self, name: &str, value: impl AsRef<[u8]>) -> &mut Self {
        for part in [name.as_bytes(), value.as_ref()] {
            self.hash.update((part.len() as u64).to_le_bytes());
            self.hash.update(part);
        }
        self
    }

    /// Returns the key in hex.
    pub(crate) fn finish(&self) -> String {
        hex(&self.hash.clone().finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_separates_names_from_values() {
        let ab_c = Key::new("s").add("ab", "c").finish();
        let a_bc = Key::new("s").add("a", "bc").finish();
        assert_ne!(ab_c, a_bc);
    }

    #[test]
    fn sha256_of_abc() {
        assert_eq!(sha256(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
