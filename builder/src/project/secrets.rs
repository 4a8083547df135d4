//! Detects keys and tokens, which must not become part of an image.

use fleet::{Diagnostic, Severity};

use crate::error::{Error, Result};

/// Fails if a file of an overlay has a key or a token, because images are not secret.
///
/// # Errors
/// If a line looks like a private key or a token. The error names the line.
pub(crate) fn secret(origin: &str, bytes: &[u8]) -> Result<()> {
    let text = String::from_utf8_lossy(bytes);
    for (i, line) in text.lines().enumerate() {
        let what = if line.contains("PRIVATE KEY-----") {
            "a private key"
        } else if line.contains("AGE-SECRET-KEY-1") {
            "an age key"
        } else if line.trim_start().to_ascii_lowercase().split(['=', ' ']).next() == Some("privatekey")
            && line.trim_end().ends_with('=')
        {
            "a WireGuard key"
        } else {
            continue;
        };
        let message = format!("holds {what}");
        let help = "images are not secret; pass secrets to nodes as credentials".to_owned();
        let file = format!("{origin}:{}", i + 1);
        return Err(Error::Config(Diagnostic::whole_file(Severity::Error, &file, message, Some(help)).into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_secrets_and_names_the_line() {
        for text in [
            concat!("x\n-----BEGIN OPENSSH ", "PRIVATE KEY-----\n"),
            "x\nPrivateKey = abcdef=\n",
            "x\nAGE-SECRET-KEY-1QQ\n",
        ] {
            let message = secret("overlays/a/etc/f", text.as_bytes()).unwrap_err().to_string();
            assert!(message.starts_with("overlays/a/etc/f:2: holds"), "{message}");
        }
        assert!(secret("f", b"PublicKey = abc=\n# a private key goes elsewhere\n").is_ok());
    }
}
