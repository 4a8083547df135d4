//! Base64, as keys and signatures are written in messages.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

#[must_use]
pub fn decode(text: &str) -> Option<Vec<u8>> {
    STANDARD.decode(text).ok()
}
