//! Base64 (RFC 4648 § 4, with padding) of keys and signatures in messages.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Returns the base64 of `bytes`.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Returns the bytes of a base64 text; `None` if it is not base64.
#[must_use]
pub fn decode(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}
