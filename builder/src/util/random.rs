//! Random numbers of the kernel.

use crate::error::{Error, Result};

/// Returns random bytes from getrandom(2).
///
/// # Errors
/// If the kernel returns none.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| Error::Failed(format!("the kernel returns no random bytes: {e}")))?;
    Ok(bytes)
}
