//! Which pages hold something, and what they hold.

use std::ops::Range;
use std::thread;

use crate::pagemap::{Pagemap, Query};
use crate::process::{Mapping, file_data, mappings};
use crate::{Block, Memory, PAGE_SIZE, PageId, PageSet, PagesError, page_digest};

/// Pages read at a time when digesting: 1 MiB.
const CHUNK: usize = 256;

impl Memory {
    /// Pages that hold something. Private memory: what is in memory or swapped out, and what a
    /// mapped file holds. Shared memory: what is in the file, mapped here or not. Hugetlbfs: what
    /// is in memory, for it is never reclaimed.
    ///
    /// # Errors
    /// `Gone`, `Kernel`.
    pub fn populated(&self) -> Result<PageSet, PagesError> {
        let pagemap = Pagemap::open(self.pid())?;
        let mappings = mappings(self.pid())?;
        let mut set = PageSet::new(self.shape());
        for (index, block) in (0_u16..).zip(self.blocks()) {
            if block.is_hugetlb() || !block.shared {
                pagemap.scan(
                    block.address,
                    block.end(),
                    Query::POPULATED,
                    |start, end, _| {
                        insert(&mut set, index, block, start, end);
                    },
                )?;
            }
            if !block.is_hugetlb() {
                in_files(self.pid(), &mappings, block, |start, end| {
                    insert(&mut set, index, block, start, end);
                })?;
            }
        }
        Ok(set)
    }

    /// The digest of every page of every block, 8 bytes each, little endian: `page_digest`, and
    /// 0 for a hole. Reads populated pages only, so it populates nothing.
    ///
    /// # Errors
    /// `Gone`, `Kernel`.
    pub fn digests(&self) -> Result<Vec<u8>, PagesError> {
        let populated = self.populated()?;
        let pages: Vec<PageId> = populated.iter().collect();
        let (low, high) = pages.split_at(pages.len() / 2);
        let (low, high) = thread::scope(|scope| {
            let other = scope.spawn(|| self.digests_of(high));
            (
                self.digests_of(low),
                other.join().expect("digesting does not panic"),
            )
        });
        let mut first_page = Vec::with_capacity(self.shape().len());
        let mut total = 0;
        for count in self.shape() {
            first_page.push(total);
            total += *count as usize;
        }
        let mut digests = vec![0; total * 8];
        for (id, digest) in pages.iter().zip(low?.into_iter().chain(high?)) {
            let at = (first_page[usize::from(id.block)] + id.page as usize) * 8;
            digests[at..at + 8].copy_from_slice(&digest.to_le_bytes());
        }
        Ok(digests)
    }

    fn digests_of(&self, pages: &[PageId]) -> Result<Vec<u64>, PagesError> {
        let mut digests = Vec::with_capacity(pages.len());
        let mut buffer = vec![0; CHUNK.min(pages.len()) * PAGE_SIZE];
        for chunk in pages.chunks(CHUNK) {
            let copy = &mut buffer[..chunk.len() * PAGE_SIZE];
            self.read_pages(chunk, copy)?;
            digests.extend(copy.chunks_exact(PAGE_SIZE).map(page_digest));
        }
        Ok(digests)
    }
}

/// Calls `found` for each run of addresses of the block whose data lies in a mapped file.
pub(crate) fn in_files(
    pid: i32,
    mappings: &[Mapping],
    block: &Block,
    mut found: impl FnMut(u64, u64),
) -> Result<(), PagesError> {
    mappings
        .iter()
        .filter(|mapping| mapping.inode != 0)
        .filter(|mapping| mapping.start < block.end() && mapping.end > block.address)
        .try_for_each(|mapping| file_data(pid, mapping, block.address, block.end(), &mut found))
}

/// Adds the pages of a run of addresses inside the block.
pub(crate) fn insert(set: &mut PageSet, index: u16, block: &Block, start: u64, end: u64) {
    let Range { start, end } = pages_of(block, start, end);
    set.insert_range(index, start, end);
}

fn pages_of(block: &Block, start: u64, end: u64) -> Range<u32> {
    let page = |address: u64| {
        let offset = address.clamp(block.address, block.end()) - block.address;
        u32::try_from(offset / PAGE_SIZE as u64).expect("Block::check bounds it")
    };
    page(start)..page(end)
}
