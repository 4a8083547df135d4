//! Files of `[web]`: the certificate, the directory's authority, and `web.secrets` with the encrypted secrets.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use fleet::{Diagnostic, ErrorChain, Fleet, HubSecrets, Severity, Web};

use crate::error::{Error, Result, fail};

/// Overlay with the directory's authority: hubs have it.
const CA_OVERLAY: &str = "overlays/hub/";

/// Reads `web.secrets`; no secrets if it does not exist.
///
/// # Errors
/// If the file cannot be read or parsed.
pub(crate) fn secrets(dir: &Path) -> Result<HubSecrets> {
    let path = dir.join(HubSecrets::FILE);
    match fs::read_to_string(&path) {
        Ok(text) => match HubSecrets::parse(&text) {
            Ok(secrets) => Ok(secrets),
            Err(e) => {
                fail(format!("cannot parse {}: {e}\n  help: remove it, and repeat `bakehouse secret`", path.display()))
            }
        },
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(HubSecrets::default()),
        Err(e) => Err(Error::io("read", &path)(e)),
    }
}

/// Adds the file of `authority.ca` to the image's files. Returns the content of `certificate`.
///
/// # Errors
/// If a file cannot be read, has no certificate, or the certificate is not for `name`.
pub(super) fn read_files(
    dir: &Path,
    fleet: &Fleet,
    files: &mut BTreeMap<String, Vec<u8>>,
) -> Result<Option<String>, Box<Diagnostic>> {
    let web = fleet.web.get_ref();
    let error = |path: &[&str], message: String, help: &str| {
        let span = fleet.source.value(path);
        Box::new(Diagnostic::at(Severity::Error, &fleet.source, span, message, Some(help.to_owned())))
    };
    let read = |path: &[&str], file: &str| {
        let relative = "write the path relative to fleet.toml";
        let file = dir.join(file);
        fs::read_to_string(&file)
            .map_err(|e| error(path, format!("[web] cannot read {}: {e}", file.display()), relative))
    };
    if let Some(ca) = &web.authority.ca {
        let path = ["web", "authority", "ca"];
        let text = read(&path, ca)?;
        fleet_https::client(&text, None).map_err(|_| {
            let message = format!("[web.authority] {ca} has no certificate of an authority");
            error(&path, message, "name a PEM file with the root certificate of the directory's server")
        })?;
        files.insert(format!("{CA_OVERLAY}{}", Web::CA_FILE), text.into_bytes());
    }
    let (Some(file), Some(name)) = (&web.certificate, &web.name) else { return Ok(None) };
    let path = ["web", "certificate"];
    let chain = read(&path, file)?;
    if chain.contains("PRIVATE KEY") {
        let message = format!("[web] {file} has a private key, which must not be in an image");
        return Err(error(
            &path,
            message,
            "remove the key from the file, and type `bakehouse secret web_key <KEY.pem`",
        ));
    }
    let validity = fleet_https::web_certificate(&chain, name).map_err(|e| {
        let message = format!("[web] {file} is no certificate for `{name}`: {}", ErrorChain::new(&e));
        error(&path, message, "name a PEM file with the certificate for `name`, followed by those of its authorities")
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    if validity.until < now {
        return Err(error(&path, format!("[web] {file} has expired"), "get a new certificate, or set `acme = true`"));
    }
    Ok(Some(chain))
}

/// Returns a warning for each secret that `[web]` needs and `web.secrets` does not have, and an error for a key that is
/// not the certificate's.
pub(super) fn check(fleet: &Fleet, stored: &HubSecrets, certificate: Option<&str>) -> Vec<Diagnostic> {
    let names = stored.names();
    let missing = fleet.web.get_ref().secrets().into_iter().filter(|name| !names.contains(name));
    let mut found: Vec<Diagnostic> = missing
        .map(|name| {
            let (path, effect) = match name {
                Web::EAB => (&["web", "authority", "eab_key_id"][..], "the authority refuses the hubs' account"),
                _ => (&["web", "certificate"][..], "hubs show a certificate of the fleet's own authority"),
            };
            let message = format!("[web] the secret `{name}` is missing: {effect}");
            let help = Some(format!("type `bakehouse secret {name}`"));
            Diagnostic::at(Severity::Warning, &fleet.source, fleet.source.value(path), message, help)
        })
        .collect();
    let of_certificate = certificate.and_then(|chain| fleet_https::web_key_digest(chain).ok());
    if let (Some(wanted), Some(kept)) = (of_certificate, stored.public(Web::KEY))
        && wanted != kept
    {
        let message = "[web] the key of `bakehouse secret web_key` is not the certificate's".to_owned();
        let help = Some("type `bakehouse secret web_key <KEY.pem` with the key of this certificate".to_owned());
        let span = fleet.source.value(&["web", "certificate"]);
        found.push(Diagnostic::at(Severity::Error, &fleet.source, span, message, help));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::{HubKey, Issuer, Operator, OperatorRole, PrivateKey};

    fn fleet(web: &str) -> Fleet {
        Fleet::parse("fleet.toml", format!("name = \"acme\"\n[web]\n{web}\n[groups]\n").as_bytes()).unwrap()
    }

    #[test]
    fn certificate_has_to_fit_its_name_and_its_key() {
        let dir = tempfile::tempdir().unwrap();
        let (root, key) = (Issuer::root("acme").unwrap(), PrivateKey::generate().unwrap());
        let operator = Operator::new("anna", OperatorRole::Admin).unwrap();
        let pem = |until| root.operator(&operator, &key.public().unwrap(), (0, until)).unwrap();
        let write = |text: String| fs::write(dir.path().join("web.crt"), text).unwrap();
        let load = |name: &str| {
            let fleet = fleet(&format!("name = \"{name}\"\ncertificate = \"web.crt\""));
            read_files(dir.path(), &fleet, &mut BTreeMap::new()).map_err(|e| (e.line, e.message.clone()))
        };
        let name = operator.dns_name();
        assert!(load(&name).unwrap_err().1.contains("cannot read"));
        // Each signature is another one.
        let good = pem(4_000_000_000);
        write(good.clone());
        assert_eq!(load(&name).unwrap(), Some(good));
        let (line, message) = load("erp.example.com").unwrap_err();
        assert!(
            line == 4 && message.contains("it is for anna.admin.operator, and not for erp.example.com"),
            "{message}"
        );
        write(pem(1_000_000_000));
        assert!(load(&name).unwrap_err().1.contains("has expired"));
        write(format!("{}{}", pem(4_000_000_000), key.pem()));
        assert!(load(&name).unwrap_err().1.contains("has a private key"));
        write("nothing".to_owned());
        assert!(load(&name).unwrap_err().1.contains("is no certificate for"));

        let fleet = fleet(&format!("name = \"{name}\"\ncertificate = \"web.crt\""));
        let mut stored = HubSecrets::default();
        let found = |stored: &HubSecrets| {
            let found = check(&fleet, stored, Some(&pem(4_000_000_000)));
            found.into_iter().map(|d| (d.severity, d.message)).collect::<Vec<_>>()
        };
        assert!(matches!(&found(&stored)[..], [(Severity::Warning, text)] if text.contains("`web_key` is missing")));
        let hub = HubKey::derive("acme", "x").unwrap();
        let other = PrivateKey::generate().unwrap();
        stored.seal(&hub, Web::KEY, other.pem().as_bytes()).unwrap();
        stored.set_public(Web::KEY, &fleet_https::web_key_digest(other.pem()).unwrap());
        assert!(matches!(&found(&stored)[..], [(Severity::Error, text)] if text.contains("is not the certificate's")));
        stored.set_public(Web::KEY, &fleet_https::web_key_digest(key.pem()).unwrap());
        assert_eq!(found(&stored), []);
    }

    #[test]
    fn root_of_the_directory_gets_into_the_hubs_images() {
        let dir = tempfile::tempdir().unwrap();
        let fleet = fleet("name = \"a.example\"\nacme = true\nauthority.ca = \"ca.pem\"");
        let mut files = BTreeMap::new();
        fs::write(dir.path().join("ca.pem"), "nothing").unwrap();
        let e = read_files(dir.path(), &fleet, &mut files).unwrap_err();
        assert!(e.line == 5 && e.message.contains("no certificate of an authority"), "{}", e.message);
        let root = Issuer::root("acme").unwrap();
        fs::write(dir.path().join("ca.pem"), root.certificate()).unwrap();
        read_files(dir.path(), &fleet, &mut files).unwrap();
        assert_eq!(files["overlays/hub/usr/share/bakehouse/acme-ca.crt"], root.certificate().as_bytes());
        let missing = check(
            &self::fleet("name = \"a.example\"\nacme = true\nauthority.eab_key_id = \"k\""),
            &HubSecrets::default(),
            None,
        );
        assert!(missing[0].message.contains("`acme_eab` is missing"));
    }
}
