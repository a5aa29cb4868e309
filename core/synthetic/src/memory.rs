//! RAM blocks laid out as QEMU lays out its own: anonymous private memory, 2 MiB aligned, a guard
//! page after it, MADV_DONTFORK (by which `/proc/PID/smaps` tells RAM from heap) and MADV_HUGEPAGE.

use std::io;
use std::ptr::null_mut;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::pattern::PAGE;

const ALIGNMENT: usize = 2 << 20;

/// One RAM block. It lives as long as the process.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// As `info ramblock` names it.
    pub name: &'static str,
    /// Where it lies in QEMU's space of RAM addresses.
    pub offset: usize,
    pub length: usize,
    pub read_only: bool,
    base: *mut u8,
}

// SAFETY: the memory is never unmapped, and who may touch which page when is settled by the
// callers of `page`.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// Maps `length` bytes that were never touched.
    pub fn map(
        name: &'static str,
        offset: usize,
        length: usize,
        read_only: bool,
    ) -> io::Result<Self> {
        let reserved = length + ALIGNMENT + PAGE;
        // SAFETY: a new anonymous mapping, of which only the part inside `start..start+length` is
        // replaced; head and tail lie inside it and are given back, the guard page stays.
        let base = unsafe {
            let map = mmap_anonymous(null_mut(), reserved, ProtFlags::empty(), MapFlags::PRIVATE)?;
            let head = (map as usize).next_multiple_of(ALIGNMENT) - map as usize;
            let start = map.byte_add(head);
            let flags = MapFlags::PRIVATE | MapFlags::FIXED;
            mmap_anonymous(start, length, ProtFlags::READ | ProtFlags::WRITE, flags)?;
            if head > 0 {
                munmap(map, head)?;
            }
            let tail = reserved - head - length - PAGE;
            if tail > 0 {
                munmap(start.byte_add(length + PAGE), tail)?;
            }
            madvise(start, length, Advice::LinuxDontFork)?;
            // A kernel without THP says EINVAL; QEMU does not mind either.
            let _ = madvise(start, length, Advice::LinuxHugepage);
            start
        };
        Ok(Self {
            name,
            offset,
            length,
            read_only,
            base: base.cast(),
        })
    }

    /// Address in this process.
    pub fn address(&self) -> usize {
        self.base as usize
    }

    /// Pages of 4 KiB.
    pub fn pages(&self) -> u64 {
        (self.length / PAGE) as u64
    }

    /// A page.
    ///
    /// # Safety
    /// No other thread of this process may touch the page while the reference lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn page(&self, index: u64) -> &mut [u8; PAGE] {
        assert!(index < self.pages(), "page {index} of {}", self.name);
        // SAFETY: inside the mapping, and exclusive by this function's own contract.
        unsafe { &mut *self.base.add(index as usize * PAGE).cast() }
    }
}

/// `info ramblock` of QEMU 10.0, line ends given.
pub fn table(blocks: &[&Block], end: &str) -> String {
    let mut text = format!(
        "{:>24} {:>8}  {:>18} {:>18} {:>18} {:>18} {:>3}{end}",
        "Block Name", "PSize", "Offset", "Used", "Total", "HVA", "RO"
    );
    for b in blocks {
        let (offset, length, address) = (b.offset, b.length, b.address());
        let access = if b.read_only { "ro" } else { "rw" };
        text += &format!(
            "{:>24} {:>8}  {offset:#018x} {length:#018x} {length:#018x} {address:#018x} {access:>3}{end}",
            b.name, "4 KiB",
        );
    }
    text
}
