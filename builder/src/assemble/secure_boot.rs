//! Secure Boot: signs UEFI programs with the fleet's key, and creates the signed variables from which systemd-boot
//! enrols that key in setup mode.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use uuid::{Uuid, uuid};

use crate::error::{Error, Result, fail};
use crate::format::efi_signature::{authenticated, signature_list, signed_data, signed_part};
use crate::project::Project;
use crate::toolchain::Tools;
use crate::util::digest::sha256;
use crate::util::fs::{write_atomic, write_private};
use crate::util::process::run;

const GLOBAL: Uuid = uuid!("8be4df61-93ca-11d2-aa0d-00e098032b8c");
const IMAGE_SECURITY: Uuid = uuid!("d719b2cb-3d3a-4596-a3bc-dad00e67656f");

/// The fleet's key and certificate for Secure Boot.
pub(crate) struct Signer {
    key: PathBuf,
    certificate: PathBuf,
}

impl Signer {
    /// Returns the signer of `[secure_boot]`.
    #[must_use]
    pub(crate) fn for_project(project: &Project) -> Option<Self> {
        let given = project.fleet.secure_boot.as_ref()?;
        Some(Self { key: project.dir.join(&given.key), certificate: project.dir.join(&given.certificate) })
    }

    /// Creates a key and a self-signed certificate, unless they exist. Returns whether it created them.
    ///
    /// # Errors
    /// If openssl fails, or a file cannot be written.
    pub(crate) fn init(&self, fleet: &str) -> Result<bool> {
        if self.key.exists() && self.certificate.exists() {
            return Ok(false);
        }
        for path in [&self.key, &self.certificate] {
            let dir = path.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        }
        let dir = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
        let (key, certificate) = (dir.path().join("key"), dir.path().join("certificate"));
        let mut make = Command::new("openssl");
        // All UEFI firmware supports RSA 2048. Firmware does not check the expiry, because its clock is not reliable.
        make.args(["req", "-x509", "-newkey", "rsa:2048", "-sha256", "-nodes", "-days", "36500"]);
        make.args(["-subj", &format!("/CN={fleet} Secure Boot"), "-keyout"]).arg(&key).arg("-out").arg(&certificate);
        run(&mut make, "openssl (apt install openssl)")?;
        let read = |path: &Path| fs::read(path).map_err(Error::io("read", path));
        write_private(&self.key, &read(&key)?)?;
        write_atomic(&self.certificate, &read(&certificate)?)?;
        Ok(true)
    }

    /// Returns the path of the key.
    #[must_use]
    pub(crate) fn key(&self) -> &Path {
        &self.key
    }

    /// Returns the digest of the certificate, to detect a changed key.
    ///
    /// # Errors
    /// If the certificate cannot be read.
    pub(crate) fn id(&self) -> Result<String> {
        Ok(sha256(&self.certificate()?))
    }

    /// Returns the certificate in DER.
    fn certificate(&self) -> Result<Vec<u8>> {
        let path = &self.certificate;
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        let body = text.split_once("-----BEGIN CERTIFICATE-----").and_then(|(_, rest)| rest.split_once("-----END"));
        let base64 = body.map(|(body, _)| body.split_whitespace().collect::<String>());
        base64
            .and_then(|b| BASE64.decode(b).ok())
            .ok_or_else(|| Error::Failed(format!("{} is not a PEM certificate", path.display())))
    }

    /// Signs a program. The same program and key give the same bytes.
    ///
    /// # Errors
    /// If the key cannot be read, or does not match the certificate.
    pub(crate) fn sign(&self, tools: &Tools, program: &[u8], epoch: u64) -> Result<Vec<u8>> {
        let dir = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
        let (from, to) = (dir.path().join("program"), dir.path().join("signed"));
        fs::write(&from, program).map_err(Error::io("write", &from))?;
        let mut sign = tools.command("usr/lib/systemd/systemd-sbsign");
        let option = |name: &str, path: &Path| format!("--{name}={}", path.display());
        sign.arg("sign").arg(option("certificate", &self.certificate)).arg(option("private-key", &self.key));
        sign.arg(option("output", &to)).arg(&from);
        // systemd-sbsign writes the current time into the signature, and has no option for another time.
        sign.env("LD_PRELOAD", tools.file("usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"));
        sign.env("FAKETIME_FMT", "%s").env("FAKETIME", epoch.to_string());
        run(&mut sign, "systemd-sbsign")?;
        fs::read(&to).map_err(Error::io("read", &to))
    }

    /// Returns the files of the ESP from which systemd-boot enrols the key as PK, KEK and db.
    ///
    /// # Errors
    /// As [`Self::sign`].
    pub(crate) fn enrolment(&self, tools: &Tools) -> Result<BTreeMap<String, Vec<u8>>> {
        let list = signature_list(&self.certificate()?);
        let file = |(name, vendor): (&str, Uuid)| {
            let signature = self.signature(tools, &signed_part(name, vendor, &list))?;
            let Some(signature) = signed_data(&signature) else {
                return fail("openssl did not return a PKCS #7 signature");
            };
            Ok((format!("loader/keys/auto/{name}.auth"), authenticated(signature, &list)))
        };
        [("PK", GLOBAL), ("KEK", GLOBAL), ("db", IMAGE_SECURITY)].into_iter().map(file).collect()
    }

    /// Returns a detached PKCS #7 signature without attributes, so that the same content gives the same bytes.
    fn signature(&self, tools: &Tools, content: &[u8]) -> Result<Vec<u8>> {
        let dir = tempfile::tempdir().map_err(Error::io("create", "a temporary folder"))?;
        let (from, to) = (dir.path().join("content"), dir.path().join("signature"));
        fs::write(&from, content).map_err(Error::io("write", &from))?;
        let mut sign = tools.command("usr/bin/openssl");
        sign.env("OPENSSL_CONF", "/dev/null").args(["smime", "-sign", "-binary", "-noattr", "-md", "sha256"]);
        sign.args(["-outform", "DER", "-signer"]).arg(&self.certificate).arg("-inkey").arg(&self.key);
        run(sign.arg("-in").arg(&from).arg("-out").arg(&to), "openssl smime")?;
        fs::read(&to).map_err(Error::io("read", &to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn init_creates_one_private_key() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join("secure-boot").join(name);
        let signer = Signer { key: at("db.key"), certificate: at("db.crt") };
        assert!(signer.init("acme").unwrap());
        let id = signer.id().unwrap();
        assert!(!signer.init("acme").unwrap());
        assert_eq!(signer.id().unwrap(), id);
        assert_eq!(fs::metadata(signer.key()).unwrap().permissions().mode() & 0o777, 0o600);
        fs::write(at("db.crt"), "nothing").unwrap();
        assert!(signer.id().unwrap_err().to_string().contains("is not a PEM certificate"));
    }
}
