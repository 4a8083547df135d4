//! Creates the hash tree of [dm-verity](https://docs.kernel.org/admin-guide/device-mapper/verity.html), with the
//! [superblock](https://gitlab.com/cryptsetup/cryptsetup/-/wikis/DMVerity) and bytes of `veritysetup format`.

use std::thread;

use sha2::{Digest as _, Sha256};

use crate::util::digest::hex;

/// Size of a block in bytes.
pub(crate) const BLOCK: usize = 4096;
const DIGEST: usize = 32;

/// The salt of all roots. It is fixed, so that the root hash depends only on the content, and so that unchanged blocks
/// keep their hashes from build to build.
const SALT: [u8; 32] = *b"bakehouse root file system, v1..";
const UUID: [u8; 16] = [0xba, 0x4e, 0x40, 0x05, 0xe0, 0, 0x40, 0, 0x80, 0, 0, 0, 0, 0, 0, 0x01];

/// Returns the hashes of the data blocks, which are the tree's lowest level.
pub(crate) fn leaves(data: &[u8]) -> Vec<u8> {
    let blocks = data.len().div_ceil(BLOCK);
    let threads = thread::available_parallelism().map_or(2, usize::from);
    let share = blocks.div_ceil(threads).max(1);
    thread::scope(|scope| {
        let parts: Vec<_> = data.chunks(share * BLOCK).map(|part| scope.spawn(|| hash_blocks(part))).collect();
        parts.into_iter().flat_map(|p| p.join().unwrap_or_default()).collect()
    })
}

/// Returns the hashes of `data`. Takes the hashes of blocks that are the same in `base` from `known`.
pub(crate) fn leaves_from(data: &[u8], base: &[u8], known: &[u8]) -> Vec<u8> {
    let mut all = Vec::with_capacity(data.len() / BLOCK * DIGEST);
    for (i, block) in data.chunks(BLOCK).enumerate() {
        let at = i * BLOCK;
        match (base.get(at..at + block.len()), known.get(i * DIGEST..(i + 1) * DIGEST)) {
            (Some(old), Some(hash)) if old == block => all.extend_from_slice(hash),
            _ => all.extend(hash_blocks(block)),
        }
    }
    all
}

/// Returns the verity partition's content and the root hash, from the hashes of the data blocks.
#[must_use]
pub(crate) fn tree(leaves: &[u8]) -> (Vec<u8>, String) {
    let mut levels = vec![pad(leaves)];
    while let Some(top) = levels.last().filter(|l| l.len() > BLOCK) {
        let next = pad(&hash_blocks(top));
        levels.push(next);
    }
    let root = levels.last().map(|top| hash_blocks(top)).unwrap_or_default();
    let mut out = superblock(leaves.len() / DIGEST);
    for level in levels.iter().rev() {
        out.extend_from_slice(level);
    }
    (out, hex(&root))
}

/// Returns the size of the tree for this many data bytes, in bytes.
#[must_use]
pub(crate) fn tree_size(data: u64) -> u64 {
    let per_block = (BLOCK / DIGEST) as u64;
    let mut blocks = data.div_ceil(BLOCK as u64);
    let mut total = 1;
    while blocks > 1 {
        blocks = blocks.div_ceil(per_block);
        total += blocks;
    }
    total * BLOCK as u64
}

fn hash_blocks(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len() / BLOCK * DIGEST + DIGEST);
    for block in data.chunks(BLOCK) {
        let mut hash = Sha256::new();
        hash.update(SALT);
        hash.update(block);
        if block.len() < BLOCK {
            hash.update(vec![0; BLOCK - block.len()]);
        }
        out.extend_from_slice(&hash.finalize());
    }
    out
}

fn pad(bytes: &[u8]) -> Vec<u8> {
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(BLOCK), 0);
    padded
}

fn superblock(data_blocks: usize) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK);
    block.extend_from_slice(b"verity\0\0");
    block.extend_from_slice(&1_u32.to_le_bytes()); // version
    block.extend_from_slice(&1_u32.to_le_bytes()); // hash type: salt first
    block.extend_from_slice(&UUID);
    let mut algorithm = [0; 32];
    algorithm[..6].copy_from_slice(b"sha256");
    block.extend_from_slice(&algorithm);
    block.extend_from_slice(&(BLOCK as u32).to_le_bytes());
    block.extend_from_slice(&(BLOCK as u32).to_le_bytes());
    block.extend_from_slice(&(data_blocks as u64).to_le_bytes());
    block.extend_from_slice(&(SALT.len() as u16).to_le_bytes());
    block.resize(block.len() + 6, 0);
    block.extend_from_slice(&SALT);
    block.resize(BLOCK, 0);
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_reads_block_hashes_of_the_tree() {
        // Trees of one, two and three levels.
        for blocks in [2, 128, 129, 16_384, 16_385] {
            let known: Vec<u8> = (0..blocks * DIGEST).map(|i| (i % 255) as u8).collect();
            let (tree, _) = tree(&known);
            assert_eq!(tree.len() as u64, tree_size((blocks * BLOCK) as u64));
            let found = fleet::blocks::Blocks::from_tree(&tree).unwrap();
            assert_eq!(found.size, (blocks * BLOCK) as u64);
            assert_eq!(found.list()[8..], known);
        }
    }

    #[test]
    fn unchanged_blocks_keep_their_hashes() {
        let base: Vec<u8> = (0..BLOCK * 5).map(|i| (i / 7) as u8).collect();
        let mut data = base.clone();
        data[BLOCK + 1] ^= 1;
        data.extend_from_slice(&[9; BLOCK * 2]);
        assert_eq!(leaves_from(&data, &base, &leaves(&base)), leaves(&data));
        assert_ne!(leaves(&data), leaves(&base));
    }

    #[test]
    fn tree_size_matches_the_tree() {
        for blocks in [2, 127, 128, 129, 128 * 128, 128 * 128 + 1] {
            let (out, _) = tree(&vec![7; blocks * DIGEST]);
            assert_eq!(out.len() as u64, tree_size((blocks * BLOCK) as u64), "{blocks}");
        }
    }
}
