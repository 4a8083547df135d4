//! Time of the update folder's signature, which the server of the folder cannot change. If the server withholds
//! updates, the time stays the same.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::sysupdate::{AUTHORITIES, TRANSFERS, source, transfers};
use super::upstream::Upstream;
use crate::error::{Error, Result};

/// The keyring of systemd-sysupdate.
const KEYRING: &str = "/usr/lib/systemd/import-pubring.gpg";
/// The metric that Prometheus compares with its clock.
const METRIC: &str = "bakehouse_update_signed_seconds";
const LONGEST_SUMS: usize = 1 << 20;
const LONGEST_SIGNATURE: usize = 1 << 16;

/// Downloads the folder's signed checksums, and writes the signature's Unix time as a metric to `metrics`/update.prom,
/// atomically. `scratch`: an empty folder for temporary files.
///
/// # Errors
/// If the checksums cannot be downloaded, their signature is not the fleet's, or the metric cannot be written.
pub async fn record(metrics: &Path, scratch: &Path) -> Result<()> {
    let transfers = transfers(Path::new(TRANSFERS))?;
    let url = transfers.iter().find_map(|(_, text)| source(text));
    let url = url.ok_or_else(|| Error::Failed(format!("{TRANSFERS} has no URL; build the image again")))?;
    let upstream = Upstream::new(url, Path::new(AUTHORITIES))?;
    let sums = upstream.read("SHA256SUMS", LONGEST_SUMS).await?;
    let signature = upstream.read("SHA256SUMS.gpg", LONGEST_SIGNATURE).await?;
    let time = signed_at(Path::new(KEYRING), &sums, &signature, scratch)?;
    let (path, beside) = (metrics.join("update.prom"), metrics.join("update.prom.new"));
    let text = format!("# TYPE {METRIC} gauge\n{METRIC} {time}\n");
    fs::write(&beside, text).map_err(Error::io("write", &beside))?;
    fs::rename(&beside, &path).map_err(Error::io("rename", &beside))
}

/// Verifies a detached OpenPGP signature with gpg, and returns the signature's Unix time.
///
/// # Errors
/// If gpg cannot be run, or finds no valid signature of a key in the keyring.
pub fn signed_at(keyring: &Path, content: &[u8], signature: &[u8], scratch: &Path) -> Result<u64> {
    let (home, content_file, signature_file) =
        (scratch.join("gnupg"), scratch.join("content"), scratch.join("signature"));
    fs::create_dir_all(&home).map_err(Error::io("create", &home))?;
    fs::write(&content_file, content).map_err(Error::io("write", &content_file))?;
    fs::write(&signature_file, signature).map_err(Error::io("write", &signature_file))?;
    let mut gpg = Command::new("gpg");
    gpg.args(["--no-options", "--no-default-keyring", "--no-auto-key-locate", "--no-auto-check-trustdb", "--batch"]);
    gpg.args(["--trust-model=always", "--status-fd=1", "--homedir"]).arg(&home).arg("--keyring").arg(keyring);
    let output = gpg.arg("--verify").arg(&signature_file).arg(&content_file).output();
    let output = output.map_err(Error::io("run", "gpg"))?;
    let status = String::from_utf8_lossy(&output.stdout);
    let time = status.lines().find_map(time_of).filter(|_| output.status.success());
    time.ok_or_else(|| {
        let cause = String::from_utf8_lossy(&output.stderr);
        Error::Failed(format!("the update folder's SHA256SUMS has no valid signature of this fleet: {}", cause.trim()))
    })
}

/// Parses the time of `[GNUPG:] VALIDSIG FINGERPRINT DATE SECONDS …`.
fn time_of(line: &str) -> Option<u64> {
    line.strip_prefix("[GNUPG:] VALIDSIG ")?.split(' ').nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::encoding::decode;

    /// Made by gpg: an Ed25519 key, and its signature of [`CONTENT`] at 2025-10-09 08:53:20 UTC.
    const RING: &str = "mDMEaNxvABYJKwYBBAHaRw8BAQdAp0fETbBd9teA5mU0Vi7k+/WIUAGh0426DxmJyLJvZ8y0F1Rlc3QgPHRlc3RA\
        ZXhhbXBsZS5uZXQ+iJAEExYIADgWIQRlfkjIeQSWq9aaYeIKRN23cgXfogUCaNxvAAIbAwULCQgHAgYVCgkICwIE\
        FgIDAQIeAQIXgAAKCRAKRN23cgXfotsNAQDpbCjlgwEW7jMX8f0Uc1J28j6Y92DoVCkkeGkCPk+S4QEAh6o2Ge4v\
        +3tFb0UPdyfw1vX/2Qb78btaehLNWyCImQ0=";
    const SIGNATURE: &str = "iHUEABYIAB0WIQRlfkjIeQSWq9aaYeIKRN23cgXfogUCaOd4AAAKCRAKRN23cgXfoq/SAP4x3Mlf7t7vUh3ONWwb\
        SoMyaQx1o35tRB2Yns/t0pHHAwD9GhHrwWJ+5j1xyQYx6tSyTKpJ3W4gD5LLlQ0OHvmMMAQ=";
    const CONTENT: &[u8] = b"0  more\n";

    #[test]
    fn reads_the_time_of_a_valid_signature_only() {
        let scratch = tempfile::tempdir().unwrap();
        let (ring, empty) = (scratch.path().join("ring.gpg"), scratch.path().join("empty.gpg"));
        fs::write(&ring, decode(RING).unwrap()).unwrap();
        fs::write(&empty, b"").unwrap();
        let at = |keyring: &Path, content: &[u8]| {
            signed_at(keyring, content, &decode(SIGNATURE).unwrap(), scratch.path()).map_err(|e| e.to_string())
        };
        assert_eq!(at(&ring, CONTENT), Ok(1_760_000_000));
        for (keyring, content) in [(&ring, b"1  more\n"), (&empty, b"0  more\n")] {
            let e = at(keyring, content).unwrap_err();
            assert!(e.contains("no valid signature"), "{e}");
        }
    }
}
