//! Journals of many nodes in one temporary file, because together they may not fit into memory.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use fleet::node_api::JournalLine;

use crate::error::{Error, Result};

/// Bytes of a journal that are in memory. A longer message is in memory as a whole.
const BLOCK: usize = 64 << 10;
/// Folder for the file. `/tmp` is often in memory.
const FOLDER: &str = "/var/tmp";

/// A temporary file without a name.
pub(super) struct Spool {
    file: File,
    end: Mutex<u64>,
}

impl Spool {
    /// Creates the file.
    ///
    /// # Errors
    /// If no file can be created.
    pub(super) fn new() -> Result<Arc<Self>> {
        let file = tempfile::tempfile_in(FOLDER).or_else(|_| tempfile::tempfile());
        Ok(Arc::new(Self { file: file.map_err(Error::io("write in", FOLDER))?, end: Mutex::new(0) }))
    }

    fn append(&self, bytes: &[u8]) -> io::Result<u64> {
        let at = {
            let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
            let at = *end;
            *end += bytes.len() as u64;
            at
        };
        self.file.write_all_at(bytes, at)?;
        Ok(at)
    }
}

/// Journal of a node in a spool.
pub(super) struct SpooledJournal {
    spool: Arc<Spool>,
    /// Parts of the file: position and length.
    blocks: Vec<(u64, usize)>,
    /// Messages after the last block, as lines of JSON.
    tail: Vec<u8>,
}

impl SpooledJournal {
    pub(super) fn new(spool: Arc<Spool>) -> Self {
        Self { spool, blocks: Vec::new(), tail: Vec::new() }
    }

    /// Adds a message.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(super) fn push(&mut self, line: &JournalLine) -> Result<()> {
        serde_json::to_writer(&mut self.tail, line).map_err(Error::Json)?;
        self.tail.push(b'\n');
        if self.tail.len() >= BLOCK {
            let at = self.spool.append(&self.tail).map_err(Error::io("write in", FOLDER))?;
            self.blocks.push((at, self.tail.len()));
            self.tail = Vec::new();
        }
        Ok(())
    }

    /// Returns the messages, the first one first.
    pub(super) fn lines(&self) -> Lines<'_> {
        Lines { journal: self, next: 0, block: Vec::new(), at: 0 }
    }
}

/// Reads the messages of a journal.
pub(super) struct Lines<'a> {
    journal: &'a SpooledJournal,
    /// Index of the next block. The tail is the last one.
    next: usize,
    block: Vec<u8>,
    at: usize,
}

impl Iterator for Lines<'_> {
    type Item = Result<JournalLine>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.at == self.block.len() {
            let SpooledJournal { spool, blocks, tail } = self.journal;
            match blocks.get(self.next) {
                Some((at, length)) => {
                    self.block.resize(*length, 0);
                    if let Err(e) = spool.file.read_exact_at(&mut self.block, *at) {
                        return Some(Err(Error::io("read in", FOLDER)(e)));
                    }
                }
                None if self.next == blocks.len() => self.block.clone_from(tail),
                None => return None,
            }
            (self.next, self.at) = (self.next + 1, 0);
        }
        let rest = &self.block[self.at..];
        let length = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
        self.at = (self.at + length + 1).min(self.block.len());
        Some(serde_json::from_slice(&rest[..length]).map_err(Error::Json))
    }
}

/// Passes the messages of all journals to `print` in the order of time, with the indices of their journals. A journal
/// keeps its own order.
///
/// # Errors
/// If the file cannot be read, or `print` fails.
pub(super) fn merge(
    journals: &[&SpooledJournal],
    mut print: impl FnMut(usize, JournalLine) -> Result<()>,
) -> Result<()> {
    let mut readers: Vec<Lines> = journals.iter().map(|journal| journal.lines()).collect();
    let mut heads: Vec<Option<JournalLine>> = Vec::with_capacity(readers.len());
    let mut earliest = BinaryHeap::new();
    for (index, reader) in readers.iter_mut().enumerate() {
        let head = reader.next().transpose()?;
        earliest.extend(head.as_ref().map(|line| Reverse((line.at, index))));
        heads.push(head);
    }
    while let Some(Reverse((_, index))) = earliest.pop() {
        let next = readers[index].next().transpose()?;
        earliest.extend(next.as_ref().map(|line| Reverse((line.at, index))));
        if let Some(line) = std::mem::replace(&mut heads[index], next) {
            print(index, line)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn journals_of_many_blocks_merge_by_time() {
        let spool = Spool::new().unwrap();
        let mut journals: Vec<_> = (0..3).map(|_| SpooledJournal::new(spool.clone())).collect();
        // Many blocks of the first journal, one message that is longer than a block, and an empty journal.
        for n in 0..5000 {
            journals[0].push(&JournalLine { at: 2 * n, message: "x".repeat(100), ..JournalLine::default() }).unwrap();
        }
        journals[1].push(&JournalLine { at: 5, message: "y".repeat(3 * BLOCK), ..JournalLine::default() }).unwrap();
        journals[1].push(&JournalLine { at: 9999, message: "last\nline".into(), ..JournalLine::default() }).unwrap();
        assert!(journals[0].blocks.len() > 5 && journals[1].blocks.len() == 1);
        let mut found = Vec::new();
        let all: Vec<&SpooledJournal> = journals.iter().collect();
        merge(&all, |index, line| {
            found.push((line.at, index, line.message.len()));
            Ok(())
        })
        .unwrap();
        assert_eq!(found.len(), 5002);
        assert!(found.is_sorted(), "{found:?}");
        assert_eq!((found[3], *found.last().unwrap()), ((5, 1, 3 * BLOCK), (9999, 1, 9)));
    }

    #[test]
    fn a_journal_keeps_its_own_order() {
        let mut journal = SpooledJournal::new(Spool::new().unwrap());
        for at in [5, 3, 4] {
            journal.push(&JournalLine { at, ..JournalLine::default() }).unwrap();
        }
        let mut found = Vec::new();
        merge(&[&journal], |_, line| {
            found.push(line.at);
            Ok(())
        })
        .unwrap();
        assert_eq!(found, [5, 3, 4]);
    }
}
