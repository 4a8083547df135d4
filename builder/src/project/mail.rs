//! Files of `[odoo.mail]`: the authority of the mail server, and `odoo.secrets` with the encrypted password.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use fleet::{Diagnostic, Fleet, Mail, MailSecrets, Severity};

use crate::error::{Error, Result, fail};

/// Reads the file; no secrets if it does not exist.
///
/// # Errors
/// If the file cannot be read or parsed.
pub(crate) fn read(dir: &Path) -> Result<MailSecrets> {
    let path = dir.join(MailSecrets::FILE);
    match fs::read_to_string(&path) {
        Ok(text) => match MailSecrets::parse(&text) {
            Ok(secrets) => Ok(secrets),
            Err(e) => {
                fail(format!("cannot parse {}: {e}\n  help: remove it, and repeat `bakehouse secret`", path.display()))
            }
        },
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(MailSecrets::default()),
        Err(e) => Err(Error::io("read", &path)(e)),
    }
}

/// Returns a warning if the mail server has a user, and the file has no password.
pub(crate) fn missing(fleet: &Fleet, stored: &MailSecrets) -> Option<Diagnostic> {
    let mail = fleet.odoo.get_ref().mail.as_ref();
    mail.filter(|mail| mail.user.is_some() && stored.is_empty())?;
    let span = fleet.source.value(&["odoo", "mail", "user"]);
    let message = format!("[odoo.mail] the secret `{}` is missing: the mail server refuses Odoo's login", Mail::SECRET);
    let help = Some(format!("type `bakehouse secret {}`", Mail::SECRET));
    Some(Diagnostic::at(Severity::Warning, &fleet.source, span, message, help))
}

/// Adds the file of `ca` to the app nodes' image.
///
/// # Errors
/// If the file cannot be read, or has no certificate.
pub(super) fn add_authority(
    fleet: &Fleet,
    dir: &Path,
    files: &mut BTreeMap<String, Vec<u8>>,
) -> Result<(), Box<Diagnostic>> {
    let Some(ca) = fleet.odoo.get_ref().mail.as_ref().and_then(|mail| mail.ca.as_ref()) else { return Ok(()) };
    let error = |message: String, help: &str| {
        let span = fleet.source.value(&["odoo", "mail", "ca"]);
        Box::new(Diagnostic::at(Severity::Error, &fleet.source, span, message, Some(help.to_owned())))
    };
    let path = dir.join(ca);
    let relative = "write the path relative to fleet.toml";
    let text = fs::read_to_string(&path)
        .map_err(|e| error(format!("[odoo.mail] cannot read {}: {e}", path.display()), relative))?;
    if text.contains("PRIVATE KEY") {
        let message = format!("[odoo.mail] {} has a private key, which must not be in an image", path.display());
        return Err(error(message, "name a PEM file with nothing but the authority's certificate"));
    }
    if !text.contains("-----BEGIN CERTIFICATE-----") {
        let message = format!("[odoo.mail] {} has no certificate", path.display());
        return Err(error(message, "name a PEM file with the certificate of the mail server's authority"));
    }
    files.insert(format!("overlays/odoo/{}", Mail::CA_FILE), text.into_bytes());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fleet(mail: &str) -> Fleet {
        let text = format!("name = \"acme\"\n[odoo.mail]\nsmarthost = \"mail.acme.example:587\"\n{mail}\n[groups]\n");
        Fleet::parse("fleet.toml", text.as_bytes()).unwrap()
    }

    #[test]
    fn authority_of_the_mail_server_gets_into_the_image_and_no_key_does() {
        let dir = tempfile::tempdir().unwrap();
        let fleet = fleet("ca = \"mail-ca.pem\"");
        let mut files = BTreeMap::new();
        let mut add = |text: Option<&str>| {
            if let Some(text) = text {
                fs::write(dir.path().join("mail-ca.pem"), text).unwrap();
            }
            add_authority(&fleet, dir.path(), &mut files).map_err(|e| (e.line, e.message.clone()))
        };
        let (line, message) = add(None).unwrap_err();
        assert!(line == 4 && message.contains("cannot read"), "{message}");
        assert!(add(Some("nothing")).unwrap_err().1.contains("has no certificate"));
        let certificate = "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n";
        let with_key = format!("{certificate}-----BEGIN PRIVATE KEY-----\n");
        assert!(add(Some(&with_key)).unwrap_err().1.contains("has a private key"));
        add(Some(certificate)).unwrap();
        assert_eq!(files["overlays/odoo/usr/share/bakehouse/mail-ca.crt"], certificate.as_bytes());
    }

    #[test]
    fn missing_password_is_a_warning_with_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let none = read(dir.path()).unwrap();
        assert!(missing(&fleet(""), &none).is_none());
        let warning = missing(&fleet("user = \"erp\""), &none).unwrap();
        assert!(
            warning.line == 4 && warning.message.contains("the secret `odoo_mail` is missing"),
            "{}",
            warning.message
        );
        assert_eq!(warning.help.as_deref(), Some("type `bakehouse secret odoo_mail`"));
        fs::write(dir.path().join(MailSecrets::FILE), "odoo_mail = 3\n").unwrap();
        assert!(read(dir.path()).unwrap_err().to_string().contains("cannot parse"));
    }
}
