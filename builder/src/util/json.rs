//! JSON for files and answers.

use serde::Serialize;

use crate::error::{Error, Result};

/// Pretty JSON with a newline, for files a person may open.
///
/// # Errors
/// The value can't be JSON.
pub fn pretty_json(value: &impl Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| Error::Failed(e.to_string()))?;
    bytes.push(b'\n');
    Ok(bytes)
}
