//! Requests for operators' certificates. The key stays on the operator's machine.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use fleet::{PrivateKey, PublicKey, encoding};
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, fail};
use crate::util::fs::{write_new, write_private};
use crate::util::json::pretty_json;

/// Version of the file's format.
const VERSION: u16 = 1;
/// Prefix of the message that proves possession of the key in a request.
const CONTEXT: &str = "bakehouse-operator-request-1";

/// Content of `NAME.request`: a public key, and the proof that the sender has the private key. A CSR (PKCS #10) has the
/// same content, but a program that reads one needs a parser of ASN.1 with a large tree of crates.
#[derive(Serialize, Deserialize)]
pub(crate) struct OperatorRequest {
    /// Version of the format: 1.
    version: u16,
    /// Name of the operator.
    pub name: String,
    /// Base64 of the public key, a point of P-256.
    key: String,
    /// Base64 of the private key's signature over the other fields: ECDSA P-256, SHA-256, ASN.1.
    signature: String,
}

impl OperatorRequest {
    /// Longest file, in bytes.
    const LONGEST: u64 = 4096;

    /// Makes a request for an operator.
    ///
    /// # Errors
    /// If the key cannot sign.
    pub(crate) fn new(name: &str, key: &PrivateKey) -> Result<Self> {
        let point = key.public()?;
        let signature = key.sign(&Self::message(name, point.as_bytes()))?;
        let (key, signature) = (encoding::encode(point.as_bytes()), encoding::encode(&signature));
        Ok(Self { version: VERSION, name: name.to_owned(), key, signature })
    }

    /// Makes a key and a request, and writes them to `NAME.key` and `NAME.request` in a folder. Keeps an existing key.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub(crate) fn create(name: &str, dir: &Path) -> Result<(PathBuf, PathBuf)> {
        let (path, request) = (dir.join(format!("{name}.key")), dir.join(format!("{name}.request")));
        write_new(&path, PrivateKey::generate()?.pem().as_bytes())?;
        let pem = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let key = PrivateKey::from_pem(pem)
            .map_err(Error::damaged(&path, "move the file away, and run the command again"))?;
        let made = Self::new(name, &key)?;
        write_private(&request, &pretty_json(&made)?)?;
        Ok((path, request))
    }

    /// Reads a request for the operator `name`, and verifies its signature. Returns the public key.
    ///
    /// # Errors
    /// If the file cannot be read, is for another name, or its signature is invalid.
    pub(crate) fn verified(path: &Path, name: &str) -> Result<PublicKey> {
        let request = Self::read(path)?;
        let shown = path.display();
        let fix = "ask for a new request (`bakehouse operator request`)";
        if request.version != VERSION || request.name != name {
            return fail(format!("{shown} is a request of `{}` in version {}", request.name, request.version));
        }
        let invalid = || Error::Failed(format!("the signature of {shown} is invalid\n  help: {fix}"));
        let point = encoding::decode(&request.key).ok_or_else(invalid)?;
        let signature = encoding::decode(&request.signature).ok_or_else(invalid)?;
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &point);
        key.verify(&Self::message(name, &point), &signature).map_err(|_| invalid())?;
        PublicKey::from_point(&point).ok_or_else(invalid)
    }

    /// Reads a request without verifying its signature.
    ///
    /// # Errors
    /// If the file cannot be read, or is no request.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(Error::io("read", path))?;
        file.take(Self::LONGEST + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        if bytes.len() as u64 > Self::LONGEST {
            return fail(format!("{} has more than {} bytes, so it is no request", path.display(), Self::LONGEST));
        }
        let fix = "ask for a new request (`bakehouse operator request`)";
        serde_json::from_slice(&bytes).map_err(Error::damaged(path, fix))
    }

    /// Returns the base64 of the public key.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    fn message(name: &str, point: &[u8]) -> Vec<u8> {
        [CONTEXT.as_bytes(), b"\0", name.as_bytes(), b"\0", point].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn request_proves_possession_of_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let (key, path) = OperatorRequest::create("anna", dir.path()).unwrap();
        let own = PrivateKey::from_pem(fs::read_to_string(&key).unwrap()).unwrap();
        let public = OperatorRequest::verified(&path, "anna").unwrap();
        assert_eq!((public, fs::metadata(&key).unwrap().permissions().mode() & 0o777), (own.public().unwrap(), 0o600));
        OperatorRequest::create("anna", dir.path()).unwrap();
        assert_eq!(fs::read_to_string(&key).unwrap(), own.pem(), "a second request keeps the key");

        assert!(OperatorRequest::verified(&path, "ben").is_err());
        let other = PrivateKey::generate().unwrap().public().unwrap();
        let mut forged: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        forged["key"] = encoding::encode(other.as_bytes()).into();
        fs::write(&path, forged.to_string()).unwrap();
        assert!(OperatorRequest::verified(&path, "anna").unwrap_err().to_string().contains("signature"));
        fs::write(&path, vec![b' '; 5000]).unwrap();
        assert!(OperatorRequest::verified(&path, "anna").unwrap_err().to_string().contains("more than 4096"));
    }
}
