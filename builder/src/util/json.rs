//! JSON for files and replies.

use serde::Serialize;

use crate::error::{Error, Result};

/// Returns indented JSON with a final newline.
///
/// # Errors
/// If the value cannot be serialised.
pub(crate) fn pretty_json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(Error::Json)?;
    bytes.push(b'\n');
    Ok(bytes)
}
