//! Random numbers of the kernel.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use crate::error::{Error, Result};

/// Returns random bytes from /dev/urandom.
///
/// # Errors
/// If the device cannot be read.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let path = Path::new("/dev/urandom");
    File::open(path).and_then(|mut f| f.read_exact(&mut bytes)).map_err(Error::io("read", path))?;
    Ok(bytes)
}
