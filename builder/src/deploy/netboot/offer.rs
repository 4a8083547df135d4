//! Descriptions of images for machines that boot from the network: what to download, and from where.

use std::fs::{self, File};
use std::io::Read as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use fleet::netboot::{Extent, ImageStatement, SignedImage};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use crate::assemble::layout::ROOT_START;
use crate::error::{Error, Result};
use crate::format::verity::tree_size;
use crate::image::BuiltImage;
use crate::keys::authority::FleetKey;
use crate::util::digest::hex;

/// Parts of an image begin and end at multiples of this.
const GRAIN: u64 = 1 << 20;

/// Description of one image for the installers.
#[derive(Clone)]
pub(super) struct ImageOffer {
    /// Path in the server's folder.
    pub path: String,
    /// Size of the disk in bytes.
    pub size: u64,
    pub table: String,
    pub extents: Vec<Extent>,
    pub sha256: String,
    pub root: Extent,
    pub verity: Extent,
    pub roothash: String,
    /// Signed statement about the root hash, for machines that run from memory.
    pub signed: SignedImage,
}

impl ImageOffer {
    /// Reads an image once from beginning to end, and describes it.
    ///
    /// # Errors
    /// If the image or its manifest cannot be read.
    pub(super) fn read(
        file: &File,
        path: String,
        image: &BuiltImage,
        verity_start: u64,
        authority: &FleetKey,
    ) -> Result<Self> {
        /// The part of the manifest that the description needs.
        #[derive(Deserialize)]
        struct Manifest {
            fleet: String,
            group: String,
            version: String,
            roothash: String,
            sizes: Sizes,
        }
        #[derive(Deserialize)]
        struct Sizes {
            root: u64,
        }
        let manifest = fs::read(&image.manifest).map_err(Error::io("read", &image.manifest))?;
        let manifest: Manifest =
            serde_json::from_slice(&manifest).map_err(Error::cannot(format!("parse {}", image.manifest.display())))?;
        let root = Extent { start: ROOT_START, size: manifest.sizes.root };
        let verity = Extent { start: verity_start, size: tree_size(root.size) };
        let read = |e| Error::io("read", &image.disk)(e);
        let size = file.metadata().map_err(read)?.len();
        let mut hash = Sha256::new();
        let mut extents: Vec<Extent> = Vec::new();
        let mut table = Vec::new();
        let mut chunk = vec![0; GRAIN as usize];
        let mut at = 0;
        let mut source = file;
        while at < size {
            let part = usize::try_from(GRAIN.min(size - at)).unwrap_or(0);
            source.read_exact(&mut chunk[..part]).map_err(read)?;
            let bytes = &chunk[..part];
            if at == 0 {
                let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
                table.extend_from_slice(&bytes[..end]);
            } else if bytes.iter().any(|b| *b != 0) {
                hash.update(bytes);
                match extents.last_mut() {
                    Some(last) if last.start + last.size == at => last.size += part as u64,
                    _ => extents.push(Extent { start: at, size: part as u64 }),
                }
            }
            at += part as u64;
        }
        let (table, sha256) = (BASE64.encode(table), hex(&hash.finalize()));
        let Manifest { fleet, group, version, roothash, .. } = manifest;
        let statement = ImageStatement { fleet, group, version, roothash: roothash.clone() };
        let signed = authority.update_key()?.sign_image(&statement)?;
        Ok(Self { path, size, table, extents, sha256, root, verity, roothash, signed })
    }
}
