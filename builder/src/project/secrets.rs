//! Keys and tokens that must not get into an image.

use fleet::{Diagnostic, Severity};

use crate::error::{Error, Result};

/// Images are public: what looks like a key or a token in an overlay is refused.
///
/// # Errors
/// It looks like one.
pub fn secret(origin: &str, bytes: &[u8]) -> Result<()> {
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
        let help = "images are public; give secrets to nodes as credentials".to_owned();
        let file = format!("{origin}:{}", i + 1);
        return Err(Error::Config(Diagnostic::whole_file(Severity::Error, &file, message, Some(help)).into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_refused_with_their_line() {
        for text in [
            concat!("x\n-----BEGIN OPENSSH ", "PRIVATE KEY-----\n"),
            "x\nPrivateKey = abcdef=\n",
            "x\nAGE-SECRET-KEY-1QQ\n",
        ] {
            let words = secret("overlays/a/etc/f", text.as_bytes()).unwrap_err().to_string();
            assert!(words.starts_with("overlays/a/etc/f:2: holds"), "{words}");
        }
        assert!(secret("f", b"PublicKey = abc=\n# a private key goes elsewhere\n").is_ok());
    }
}
