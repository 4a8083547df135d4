//! Differential downloads: the blocks of a newer file that an older file also has. For a root file system, dm-verity's
//! hash tree has the hash of every block. For other files, `publish` writes a list of hashes beside them.

use std::cmp::Ordering;

use sha2::{Digest as _, Sha256};

/// Size of a block, in bytes.
pub const BLOCK: usize = 4096;
const DIGEST: usize = 32;
/// Number of bytes whose download takes about as long as one more request.
const BRIDGE: u64 = 64 << 10;

/// Hashes of a file's blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Size of the file, in bytes. The last block may be shorter than the others.
    pub size: u64,
    salt: Vec<u8>,
    digests: Vec<u8>,
}

impl Blocks {
    /// Reads the hashes of a root file system from its [dm-verity] hash tree. `tree` may be longer than the hash tree,
    /// because a partition may be longer. Returns `None` if the tree does not have the default parameters of
    /// `veritysetup format`.
    ///
    /// [dm-verity]: https://gitlab.com/cryptsetup/cryptsetup/-/wikis/DMVerity
    #[must_use]
    pub fn from_tree(tree: &[u8]) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(tree.get(at..at + 4)?.try_into().ok()?));
        let known = tree.starts_with(b"verity\0\0")
            && (u32_at(8)?, u32_at(12)?) == (1, 1)
            && tree.get(32..64)? == b"sha256\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
            && (u32_at(64)?, u32_at(68)?) == (BLOCK as u32, BLOCK as u32);
        if !known {
            return None;
        }
        let count = usize::try_from(u64::from_le_bytes(tree.get(72..80)?.try_into().ok()?)).ok()?;
        let salt = usize::from(u16::from_le_bytes(tree.get(80..82)?.try_into().ok()?));
        // The levels of the tree follow the superblock, from the top down. The last level has the blocks' hashes.
        let mut start = BLOCK;
        let mut level = count.div_ceil(BLOCK / DIGEST);
        while level > 1 {
            level = level.div_ceil(BLOCK / DIGEST);
            start = start.checked_add(level.checked_mul(BLOCK)?)?;
        }
        let digests = tree.get(start..start.checked_add(count.checked_mul(DIGEST)?)?)?;
        Some(Self {
            size: count.checked_mul(BLOCK)? as u64,
            salt: tree.get(88..88 + salt)?.to_vec(),
            digests: digests.to_vec(),
        })
    }

    /// Hashes the blocks of a file.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let digests = bytes.chunks(BLOCK).flat_map(Sha256::digest).collect();
        Self { size: bytes.len() as u64, salt: Vec::new(), digests }
    }

    /// Reads a list: the size of the file (8 bytes, little endian), then the SHA-256 of each block.
    #[must_use]
    pub fn from_list(list: &[u8]) -> Option<Self> {
        let (size, digests) = list.split_first_chunk()?;
        let size = u64::from_le_bytes(*size);
        let count = usize::try_from(size.div_ceil(BLOCK as u64)).ok()?;
        (count.checked_mul(DIGEST)? == digests.len()).then(|| Self {
            size,
            salt: Vec::new(),
            digests: digests.to_vec(),
        })
    }

    /// Returns the list that [`Blocks::from_list`] reads.
    #[must_use]
    pub fn list(&self) -> Vec<u8> {
        [&self.size.to_le_bytes(), &self.digests[..]].concat()
    }

    fn count(&self) -> usize {
        self.digests.len() / DIGEST
    }

    fn digest(&self, block: usize) -> Option<&[u8]> {
        self.digests.get(block.checked_mul(DIGEST)?..)?.get(..DIGEST)
    }
}

/// A part of the newer file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// Offset in the newer file, in bytes.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset in the older file, if the older file has the part.
    pub here: Option<u64>,
}

/// Returns the parts of the whole newer file, in order. Each is as long as possible.
#[must_use]
pub fn pieces(old: &Blocks, new: &Blocks) -> Vec<BlockRange> {
    let mut sorted: Vec<u32> = if old.salt == new.salt { (0..old.count() as u32).collect() } else { Vec::new() };
    let compare = |a: u32, digest: Option<&[u8]>| old.digest(a as usize).cmp(&digest);
    sorted.sort_unstable_by(|a, b| compare(*a, old.digest(*b as usize)).then(a.cmp(b)));
    let find = |digest: Option<&[u8]>| {
        let first = sorted.partition_point(|a| compare(*a, digest) == Ordering::Less);
        sorted.get(first).map(|a| *a as usize).filter(|a| old.digest(*a) == digest)
    };
    let mut found: Vec<BlockRange> = Vec::new();
    let mut next = None;
    for block in 0..new.count() {
        let digest = new.digest(block);
        // Long parts are faster to read, so prefer the block after the last one.
        let here = next.filter(|n| !sorted.is_empty() && old.digest(*n) == digest).or_else(|| find(digest));
        next = here.map(|h| h + 1);
        let at = (block * BLOCK) as u64;
        let len = (new.size - at).min(BLOCK as u64);
        join(&mut found, BlockRange { at, len, here: here.map(|h| (h * BLOCK) as u64) });
    }
    bridged(&found)
}

/// Returns the number of bytes to download.
#[must_use]
pub fn missing(pieces: &[BlockRange]) -> u64 {
    pieces.iter().filter(|p| p.here.is_none()).map(|p| p.len).sum()
}

/// Marks a short part between two missing parts as missing, too. One request then downloads all three parts.
fn bridged(found: &[BlockRange]) -> Vec<BlockRange> {
    let mut all = Vec::new();
    for (i, piece) in found.iter().enumerate() {
        let between =
            i > 0 && found.get(i + 1).is_some_and(|after| after.here.is_none()) && found[i - 1].here.is_none();
        let here = piece.here.filter(|_| !between || piece.len > BRIDGE);
        join(&mut all, BlockRange { here, ..*piece });
    }
    all
}

fn join(pieces: &mut Vec<BlockRange>, piece: BlockRange) {
    if let Some(last) = pieces.last_mut()
        && last.here.map(|h| h + last.len) == piece.here
    {
        last.len += piece.len;
    } else {
        pieces.push(piece);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Returns a file whose blocks each repeat one byte.
    fn file(blocks: &[u8], tail: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = blocks.iter().flat_map(|b| [*b; BLOCK]).collect();
        bytes.extend(vec![1; tail]);
        bytes
    }

    fn put_together(old: &[u8], new: &[u8], pieces: &[BlockRange]) -> Vec<u8> {
        let mut out = Vec::new();
        for BlockRange { at, len, here } in pieces {
            assert_eq!(*at, out.len() as u64);
            let (from, start) = here.map_or((new, *at), |h| (old, h));
            out.extend(&from[start as usize..(start + len) as usize]);
        }
        out
    }

    #[test]
    fn missing_counts_only_new_blocks() {
        let (old, new) = (file(&[1, 2, 3, 4], 9), file(&[9, 1, 2, 3, 4], 9));
        let found = pieces(&Blocks::from_bytes(&old), &Blocks::from_bytes(&new));
        assert_eq!(missing(&found), BLOCK as u64);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(put_together(&old, &new, &found), new);
        // Hashes with different salts cannot be compared.
        let salted = Blocks { salt: vec![1], ..Blocks::from_bytes(&old) };
        assert_eq!(missing(&pieces(&salted, &Blocks::from_bytes(&new))), new.len() as u64);
        // Two missing parts with a short part between them are one request.
        let far = file(&[8, 1, 7, 3, 4], 9);
        let found = pieces(&Blocks::from_bytes(&old), &Blocks::from_bytes(&far));
        assert_eq!(found[0], BlockRange { at: 0, len: 3 * BLOCK as u64, here: None });
        assert_eq!(put_together(&old, &far, &found), far);
    }

    proptest! {
        #[test]
        fn pieces_make_up_the_file(old: Vec<u8>, new: Vec<u8>, tails in (0..BLOCK, 0..BLOCK)) {
            let (old, new) = (file(&old[..old.len().min(40)], tails.0), file(&new[..new.len().min(40)], tails.1));
            let found = pieces(&Blocks::from_bytes(&old), &Blocks::from_bytes(&new));
            prop_assert_eq!(put_together(&old, &new, &found), new);
        }

        #[test]
        fn list_round_trips(bytes: Vec<u8>) {
            let blocks = Blocks::from_bytes(&bytes);
            prop_assert_eq!(Blocks::from_list(&blocks.list()), Some(blocks));
        }

        #[test]
        fn parsers_never_panic(mut bytes: Vec<u8>, count: u64, salt: u16) {
            let _ = Blocks::from_list(&bytes);
            let _ = Blocks::from_tree(&bytes);
            let mut tree = b"verity\0\0\x01\0\0\0\x01\0\0\0".to_vec();
            tree.resize(32, 0);
            tree.extend(b"sha256");
            tree.resize(64, 0);
            tree.extend([0, 16, 0, 0, 0, 16, 0, 0]);
            tree.extend(count.to_le_bytes());
            tree.extend(salt.to_le_bytes());
            tree.append(&mut bytes);
            let _ = Blocks::from_tree(&tree);
        }
    }
}
