//! The certificate with which HAProxy starts.

use std::fs;
use std::path::Path;

use fleet::{HubKey, Secrets, Tls, Topology, Web};
use fleet_https::{web_file, web_pair};
use tracing::error;

use super::install;
use crate::error::{Error, Result};
use crate::node::state::StateDir;

/// Name of the systemd credential that holds certificates and key for browsers, PEM.
const CREDENTIAL: &str = "bakehouse.web-certificate";

/// Returns certificates and key for browsers, PEM: those that the hubs ordered last, those of the systemd credential, of
/// `[web] certificate`, or the node's own. HAProxy does not start with a certificate that does not fit its key, so the
/// node reports such a certificate and does not use it.
#[must_use]
pub fn web_file_for_start(
    topology: &Topology,
    secrets: &Secrets,
    state: &StateDir,
    credentials: Option<&Path>,
    own: &Tls,
) -> String {
    let ways = [
        ("the certificate that the hubs ordered", ordered(&topology.web, state)),
        ("the credential bakehouse.web-certificate", credential(credentials, topology.web.name.as_deref())),
        ("[web] certificate", configured(topology, secrets)),
    ];
    for (what, found) in ways {
        match found {
            Ok(Some(pem)) => return pem,
            Ok(None) => {}
            Err(e) => error!("{what} is not used: {}", e.chain()),
        }
    }
    format!("{}{}", own.cert, own.key)
}

fn credential(dir: Option<&Path>, name: Option<&str>) -> Result<Option<String>> {
    let Some(path) = dir.map(|dir| dir.join(CREDENTIAL)).filter(|path| path.exists()) else { return Ok(None) };
    let pem = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    match name {
        Some(name) => web_pair(&pem, &pem, name)?,
        None => web_file(&pem)?,
    };
    Ok(Some(pem))
}

fn configured(topology: &Topology, secrets: &Secrets) -> Result<Option<String>> {
    let (Some(chain), Some(name)) = (&topology.web_certificate, &topology.web.name) else { return Ok(None) };
    // Nodes that are no hubs have no key, and serve no browsers.
    let Some(key) = HubKey::derive(&topology.name, &secrets.etcd_root) else { return Ok(None) };
    let sealed = topology.web_secrets.open(&key, Web::KEY).and_then(|key| String::from_utf8(key).ok());
    let key = sealed.ok_or_else(|| {
        let text = "its key is missing, or encrypted with another fleet.key: give it to `bakehouse secret web_key` \
                    on standard input, and publish";
        Error::Failed(text.to_owned())
    })?;
    web_pair(chain, &key, name)?;
    Ok(Some(format!("{}\n{}\n", chain.trim_end(), key.trim_end())))
}

fn ordered(web: &Web, state: &StateDir) -> Result<Option<String>> {
    match web.name.as_deref().filter(|_| web.acme) {
        Some(name) => Ok(install::load(state, name)?.map(|certificate| certificate.pem())),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{Fleet, HubSecrets, Issuer, Membership, Operator, OperatorRole, PrivateKey};

    #[test]
    fn certificate_that_does_not_fit_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let toml = b"name = \"acme\"\nweb = { name = \"anna.admin.operator\" }\ngroups.hub.count = 3\n";
        let mut topology = Topology::from_fleet(&Fleet::parse("f", toml).unwrap());
        let Membership { tls, secrets } = Membership::sample();
        let state = StateDir::new(dir.path(), None);
        let own = format!("{}{}", tls.cert, tls.key);
        let start = |topology: &Topology, dir: Option<&Path>| web_file_for_start(topology, &secrets, &state, dir, &tls);
        assert_eq!(start(&topology, Some(dir.path())), own);

        let root = Issuer::root("acme").unwrap();
        let key = PrivateKey::generate().unwrap();
        let operator = Operator::new("anna", OperatorRole::Admin).unwrap();
        let chain = root.operator(&operator, &key.public().unwrap(), (0, 4_000_000_000)).unwrap();
        let other = PrivateKey::generate().unwrap();
        let file = dir.path().join(CREDENTIAL);
        fs::write(&file, format!("{chain}{}", other.pem())).unwrap();
        assert_eq!(start(&topology, Some(dir.path())), own, "another key");
        let good = format!("{chain}{}", key.pem());
        fs::write(&file, &good).unwrap();
        assert_eq!(start(&topology, Some(dir.path())), good);
        topology.web.name = Some("erp.example.com".to_owned());
        assert_eq!(start(&topology, Some(dir.path())), own, "another name");
        topology.web.name = Some("anna.admin.operator".to_owned());

        topology.web_certificate = Some(chain.clone());
        assert_eq!(start(&topology, None), own, "no key");
        let hub = HubKey::derive("acme", &secrets.etcd_root).unwrap();
        let mut sealed = HubSecrets::default();
        sealed.seal(&hub, Web::KEY, key.pem().as_bytes()).unwrap();
        topology.web_secrets = sealed;
        assert!(start(&topology, None).contains(key.pem().trim_end()));
    }
}
