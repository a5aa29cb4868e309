//! RAM blocks and the names of pages.

use crate::PagesError;

/// Bytes in a page. Blocks backed by larger pages are counted in these as well.
pub const PAGE_SIZE: usize = 4096;

/// One RAM block as it lies in a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// The hypervisor's name for it, such as `pc.ram`.
    pub name: String,
    /// Where it starts in the process.
    pub address: u64,
    /// Bytes, a multiple of `page_size`.
    pub length: u64,
    /// Bytes in a page of the mapping: 4096, or the size of a huge page on hugetlbfs.
    pub page_size: u64,
    /// Whether the mapping is MAP_SHARED.
    pub shared: bool,
}

impl Block {
    /// Length in pages of 4096 bytes.
    #[must_use]
    pub fn pages(&self) -> u32 {
        (self.length / PAGE_SIZE as u64) as u32
    }

    /// First address after it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.address + self.length
    }

    /// Whether its memory comes from hugetlbfs, which has rules of its own.
    #[must_use]
    pub fn is_hugetlb(&self) -> bool {
        self.page_size > PAGE_SIZE as u64
    }

    pub(crate) fn check(&self) -> Result<(), PagesError> {
        let wrong = if !self.page_size.is_power_of_two() || self.page_size < PAGE_SIZE as u64 {
            "a page size that is no power of two of at least 4096"
        } else if self.length == 0 || self.length % self.page_size != 0 {
            "a length that is no multiple of its page size"
        } else if self.address % self.page_size != 0 {
            "an address that is no multiple of its page size"
        } else if self.address.checked_add(self.length).is_none()
            || u32::try_from(self.length / PAGE_SIZE as u64).is_err()
        {
            "a length that is too large"
        } else {
            return Ok(());
        };
        Err(PagesError::Argument(format!(
            "RAM block {:?} has {wrong}",
            self.name
        )))
    }
}

/// A page of a guest. Ordered by block, then by page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId {
    /// Index of the block.
    pub block: u16,
    /// Index of the page in the block.
    pub page: u32,
}
