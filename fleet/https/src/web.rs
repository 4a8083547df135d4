//! The certificate for browsers: whether it fits its key and its name, and its times.

use std::time::Duration;

use ::ring::digest::{SHA256, digest};
use fleet::encoding;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::sign::CertifiedKey;
use webpki::{EndEntityCert, KeyUsage};

use crate::{Cause, Error};

/// Longest certificates with their key, in bytes. HAProxy reads them into one buffer of 16 KiB.
const LONGEST: usize = 15_000;
/// A time after every certificate: the year 9999.
const LATEST: u64 = 253_402_300_799;

/// Validity of a certificate, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WebValidity {
    /// First second.
    pub from: u64,
    /// Last second.
    pub until: u64,
}

/// Checks certificates (PEM, the server's first) for a host name. Returns their validity.
///
/// # Errors
/// If the PEM is damaged or too long, or the first certificate does not have the name.
pub fn web_certificate(chain: &str, name: &str) -> Result<WebValidity, Error> {
    let failed = Error::configuration::<Cause>("use the certificate for browsers");
    check(chain, name).map_err(failed)
}

/// Checks certificates, as [`web_certificate`], and whether the private key (PEM) is the first one's.
///
/// # Errors
/// As [`web_certificate`], or if the key is damaged or does not fit.
pub fn web_pair(chain: &str, key: &str, name: &str) -> Result<WebValidity, Error> {
    let failed = Error::configuration::<Cause>("use the certificate for browsers");
    let pair = || {
        let validity = check(chain, name)?;
        // One file may have both.
        if chain.len() + if chain == key { 0 } else { key.len() } > LONGEST {
            return Err(format!("certificates and key have more than {LONGEST} bytes").into());
        }
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| format!("cannot read the key: {e}"))?;
        // Fails also if the key is not the certificate's.
        CertifiedKey::from_der(certificates(chain)?, key, &ring::default_provider()).map_err(|e| match e {
            tokio_rustls::rustls::Error::InconsistentKeys(_) => {
                Cause::from("the private key is not the certificate's: it belongs to another certificate")
            }
            e => e.into(),
        })?;
        Ok(validity)
    };
    pair().map_err(failed)
}

/// Returns the validity of the first certificate in a file with certificates and key, whatever its name is.
///
/// # Errors
/// If the PEM is damaged, or the key does not fit.
pub fn web_file(pem: &str) -> Result<WebValidity, Error> {
    let failed = Error::configuration::<Cause>("use the certificate for browsers");
    let read = || {
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|e| format!("cannot read the key: {e}"))?;
        let chain = certificates(pem)?;
        let validity = validity(&EndEntityCert::try_from(&chain[0])?)?;
        CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(|e| match e {
            tokio_rustls::rustls::Error::InconsistentKeys(_) => Cause::from("the private key is not the certificate's"),
            e => e.into(),
        })?;
        Ok(validity)
    };
    read().map_err(failed)
}

/// Returns a digest of the public key in the first certificate, or of a private key's public half. Both are equal if
/// the key is the certificate's.
///
/// # Errors
/// If the PEM has neither.
pub fn web_key_digest(pem: &str) -> Result<String, Error> {
    let failed = Error::configuration::<Cause>("read the public key of the certificate for browsers");
    let read = || -> Result<String, Cause> {
        let spki = match PrivateKeyDer::from_pem_slice(pem.as_bytes()) {
            Ok(key) => {
                let key = ring::sign::any_supported_type(&key)?;
                key.public_key().ok_or("this kind of key is unknown")?.to_vec()
            }
            Err(_) => EndEntityCert::try_from(&certificates(pem)?[0])?.subject_public_key_info().to_vec(),
        };
        Ok(encoding::encode(digest(&SHA256, &spki).as_ref()))
    };
    read().map_err(failed)
}

fn check(chain: &str, name: &str) -> Result<WebValidity, Cause> {
    if chain.len() > LONGEST {
        return Err(format!("the certificates have more than {LONGEST} bytes").into());
    }
    let certs = certificates(chain)?;
    let cert = EndEntityCert::try_from(&certs[0])?;
    let server = ServerName::try_from(name)?;
    if cert.verify_is_valid_for_subject_name(&server).is_err() {
        let names: Vec<&str> = cert.valid_dns_names().take(5).collect();
        let names = if names.is_empty() { "no name".to_owned() } else { names.join(", ") };
        return Err(format!("it is for {names}, and not for {name}").into());
    }
    validity(&cert)
}

fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, Cause> {
    let certs: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>()?;
    if certs.is_empty() { Err("the file has no certificate".into()) } else { Ok(certs) }
}

/// Returns the validity. webpki names the times in its errors about other times.
fn validity(cert: &EndEntityCert<'_>) -> Result<WebValidity, Cause> {
    let at = |time: u64| {
        let algorithms = ring::default_provider().signature_verification_algorithms.all;
        let (time, usage) = (UnixTime::since_unix_epoch(Duration::from_secs(time)), KeyUsage::server_auth());
        cert.verify_for_usage(algorithms, &[], &[], time, usage, None, None).map(drop)
    };
    let from = match at(0) {
        Err(webpki::Error::CertNotValidYet { not_before, .. }) => not_before.as_secs(),
        // Valid since 1970.
        _ => 0,
    };
    match at(LATEST) {
        Err(webpki::Error::CertExpired { not_after, .. }) => Ok(WebValidity { from, until: not_after.as_secs() }),
        Err(e) => Err(format!("cannot read its times: {e}").into()),
        Ok(()) => Err("cannot read its times".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Issuer, Operator, OperatorRole, PrivateKey};

    /// A certificate with times, of the only kind that the fleet makes with times.
    fn pair() -> (String, String, String) {
        let root = Issuer::root("acme").unwrap();
        let key = PrivateKey::generate().unwrap();
        let operator = Operator::new("anna", OperatorRole::Admin).unwrap();
        let times = (1_700_000_000, 1_800_000_000);
        let pem = root.operator(&operator, &key.public().unwrap(), times).unwrap();
        (pem, key.pem().to_owned(), operator.dns_name())
    }

    #[test]
    fn pair_has_its_times_and_other_names_or_keys_are_refused() {
        let (chain, key, name) = pair();
        let validity = WebValidity { from: 1_700_000_000, until: 1_800_000_000 };
        assert_eq!(web_pair(&chain, &key, &name).unwrap(), validity);
        assert_eq!(web_file(&format!("{chain}{key}")).unwrap(), validity);
        assert_eq!(web_key_digest(&chain).unwrap(), web_key_digest(&key).unwrap());
        let text = |e: Error| std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default();
        let e = text(web_pair(&chain, &key, "erp.example.com").unwrap_err());
        assert!(e.contains("it is for anna.admin.operator, and not for erp.example.com"), "{e}");
        let other = PrivateKey::generate().unwrap();
        for e in [
            text(web_pair(&chain, other.pem(), &name).unwrap_err()),
            text(web_file(&format!("{chain}{}", other.pem())).unwrap_err()),
        ] {
            assert!(e.contains("private key is not the certificate's"), "{e}");
        }
        assert_ne!(web_key_digest(&chain).unwrap(), web_key_digest(other.pem()).unwrap());
        for bad in ["", "x", &key, &chain[..200], &format!("{chain}{}", " ".repeat(LONGEST))] {
            assert!(web_pair(bad, &key, &name).is_err());
        }
    }
}
