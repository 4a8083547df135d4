//! Metrics of the certificate for node_exporter.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::certificate::WebCertificate;
use super::records::Attempt;
use crate::error::{Error, Result};

/// Writes the metrics. Without a certificate, its times are 0.
///
/// # Errors
/// If the file cannot be written.
pub(super) fn write(path: &Path, certificate: Option<&WebCertificate>, attempt: &Attempt, is_used: bool) -> Result<()> {
    let (until, due, life) = certificate.map_or((0, 0, 0), |c| (c.until, c.due(), c.life()));
    let mut text = String::new();
    for (name, help, value) in [
        ("expires_timestamp_seconds", "End of the certificate that the hubs ordered; 0: none yet.", until),
        ("renewal_timestamp_seconds", "Time from which the hubs renew it.", due),
        ("life_seconds", "Duration of its validity.", life),
        ("failures", "Failed orders since the last certificate.", u64::from(attempt.failures)),
        ("failed_since_timestamp_seconds", "Time of the first of these failures; 0: none.", attempt.failed_since),
        ("used", "HAProxy on this hub uses it.", u64::from(is_used)),
    ] {
        let name = format!("bakehouse_web_certificate_{name}");
        text += &format!("# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}\n");
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    fs::set_permissions(dir, Permissions::from_mode(0o755)).map_err(Error::io("set the mode of", dir))?;
    let beside = path.with_extension("new");
    fs::write(&beside, text).map_err(Error::io("write", &beside))?;
    // node_exporter runs as another user.
    fs::set_permissions(&beside, Permissions::from_mode(0o644)).map_err(Error::io("set the mode of", &beside))?;
    fs::rename(&beside, path).map_err(Error::io("rename", &beside))
}
