//! Puts the certificate to use on this hub: on the disk, for HAProxy's next start, and in the running HAProxy.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::certificate::WebCertificate;
use crate::client::haproxy;
use crate::error::{Error, Result};
use crate::node::state::StateDir;

/// File of the hub's state with the certificate.
const FILE: &str = "web.json";

/// Returns the certificate that this hub stored last; `None` if there is none, or it is for another name.
///
/// # Errors
/// If the file cannot be read or unsealed, or the certificate does not fit its key.
pub(super) fn load(state: &StateDir, name: &str) -> Result<Option<WebCertificate>> {
    let versions = WebCertificate::VERSION..=WebCertificate::VERSION;
    let found: Option<WebCertificate> = state.read(FILE, versions).map_err(|e| {
        let detail = e.chain();
        Error::Failed(format!("cannot use the stored certificate, and the hub takes it from etcd again: {detail}"))
    })?;
    found.filter(|certificate| certificate.name == name).map(|certificate| certificate.verified(name)).transpose()
}

/// Stores the certificate for the next boot, and for the next start of HAProxy.
///
/// # Errors
/// If a file cannot be written. It then has the certificate of before.
pub(super) fn store(state: &StateDir, pem: &Path, certificate: &WebCertificate) -> Result<()> {
    state.write(FILE, WebCertificate::VERSION, certificate)?;
    let beside = pem.with_extension("new");
    let _ = fs::remove_file(&beside);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&beside)
        .map_err(Error::io("create", &beside))?;
    file.write_all(certificate.pem().as_bytes()).and_then(|()| file.sync_all()).map_err(Error::io("write", &beside))?;
    fs::rename(&beside, pem).map_err(Error::io("rename", &beside))?;
    let dir = pem.parent().unwrap_or(Path::new("/"));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", dir))
}

/// Replaces the certificate in the running HAProxy. New connections use it, and open ones continue.
///
/// # Errors
/// If HAProxy does not run, or refuses the certificate.
pub(super) async fn use_now(socket: &Path, pem: &Path, certificate: &WebCertificate) -> Result<()> {
    haproxy::set_certificate(socket, pem, &certificate.pem()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Issuer, Operator, OperatorRole, PrivateKey};
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn stored_certificate_is_private_and_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let root = Issuer::root("acme").unwrap();
        let key = PrivateKey::generate().unwrap();
        let operator = Operator::new("anna", OperatorRole::Admin).unwrap();
        let chain = root.operator(&operator, &key.public().unwrap(), (1_700_000_000, 1_800_000_000)).unwrap();
        let certificate = WebCertificate::new(&operator.dns_name(), "https://ca.example/", &chain, key.pem()).unwrap();
        let state = StateDir::new(dir.path(), None);
        let pem = dir.path().join("web.pem");
        assert_eq!(load(&state, &certificate.name).unwrap(), None);
        for _ in 0..2 {
            store(&state, &pem, &certificate).unwrap();
        }
        assert_eq!(load(&state, &certificate.name).unwrap().as_ref(), Some(&certificate));
        assert_eq!(load(&state, "erp.example.com").unwrap(), None);
        assert_eq!(fs::read_to_string(&pem).unwrap(), certificate.pem());
        for file in ["web.json", "web.pem"] {
            assert_eq!(fs::metadata(dir.path().join(file)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        let other = PrivateKey::generate().unwrap();
        let damaged = WebCertificate { key: other.pem().to_owned(), ..certificate.clone() };
        store(&state, &pem, &damaged).unwrap();
        assert!(load(&state, &certificate.name).unwrap_err().chain().contains("private key is not the certificate's"));
    }
}
