//! PAGEMAP_SCAN: which pages of a range are in a category, and re-arming them in the same step.

use std::os::fd::OwnedFd;

use linux_raw_sys::general::{
    PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING, page_region, pm_scan_arg,
};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

use crate::process;
use crate::{PAGE_SIZE, PagesError};

const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);

/// Ranges a call. With more, the kernel reports a `walk_end` that lies before what it walked.
const REGIONS: usize = 512;

pub(crate) const PRESENT: u64 = PAGE_IS_PRESENT as u64;
/// Read and never written: mapped to the kernel's one page of zeros.
pub(crate) const ZEROS: u64 = PAGE_IS_PFNZERO as u64;

/// What to look for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query {
    flags: u64,
    mask: u64,
    any_of: u64,
    returned: u64,
}

impl Query {
    /// Pages that hold something: in memory or swapped out.
    pub const POPULATED: Self = Self {
        flags: 0,
        mask: 0,
        any_of: POPULATED,
        returned: 0,
    };
    /// Pages that hold something and were written since they were armed; arms them. Pages never
    /// touched stay as they are: no page table grows, and they can still become huge pages. Says
    /// which are the kernel's page of zeros.
    pub const ARM_WRITTEN_POPULATED: Self = Self {
        flags: ARM,
        mask: WRITTEN,
        any_of: POPULATED,
        returned: ZEROS,
    };
    /// Pages written since they were armed, those that reclaim took out of the page table and
    /// those never touched among them; arms them. Says which are in the page table.
    pub const ARM_WRITTEN: Self = Self {
        flags: ARM,
        mask: WRITTEN,
        any_of: 0,
        returned: PRESENT,
    };
}

const ARM: u64 = (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC) as u64;
const WRITTEN: u64 = PAGE_IS_WRITTEN as u64;
const POPULATED: u64 = PRESENT | PAGE_IS_SWAPPED as u64;

/// /proc/PID/pagemap. It belongs to the address space: it works on for as long as a process
/// lives that shares it, even when the one it was opened through has ended.
#[derive(Debug)]
pub(crate) struct Pagemap {
    pid: i32,
    file: OwnedFd,
}

impl Pagemap {
    pub fn open(pid: i32) -> Result<Self, PagesError> {
        Ok(Self {
            pid,
            file: process::open(pid, &format!("/proc/{pid}/pagemap"))?,
        })
    }

    /// Calls `found(first address, address after, returned categories)` for each range of
    /// `[start, end)` that fits the query, in ascending order.
    pub fn scan(
        &self,
        start: u64,
        end: u64,
        query: Query,
        mut found: impl FnMut(u64, u64, u64),
    ) -> Result<(), PagesError> {
        let mut regions = vec![
            page_region {
                start: 0,
                end: 0,
                categories: 0
            };
            REGIONS
        ];
        let mut at = start;
        while at < end {
            let (count, walked) = self.scan_once(at, end, query, &mut regions)?;
            for region in &regions[..count] {
                found(region.start, region.end, region.categories);
            }
            if count < REGIONS {
                break;
            }
            at = walked;
        }
        self.check_alive(start)
    }

    fn scan_once(
        &self,
        start: u64,
        end: u64,
        query: Query,
        regions: &mut [page_region],
    ) -> Result<(usize, u64), PagesError> {
        let mut argument = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: query.flags,
            start,
            end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: query.mask,
            category_anyof_mask: query.any_of,
            return_mask: query.returned,
        };
        loop {
            // SAFETY: PAGEMAP_SCAN reads and writes the argument and writes at most `vec_len`
            // regions at `vec`, which is `regions`, borrowed here alone.
            match unsafe { rustix::ioctl::ioctl(&self.file, Scan(&mut argument)) } {
                Ok(count) => return Ok((count, argument.walk_end)),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(PagesError::of_process(self.pid, "PAGEMAP_SCAN", errno));
                }
            }
        }
    }

    /// A scan of an address space that has ended finds nothing and says no error; a read of its
    /// page map ends early.
    fn check_alive(&self, address: u64) -> Result<(), PagesError> {
        let mut entry = [0; 8];
        let offset = address / PAGE_SIZE as u64 * 8;
        match rustix::io::pread(&self.file, &mut entry, offset) {
            Ok(8) => Ok(()),
            Ok(_) => Err(PagesError::Gone { pid: self.pid }),
            Err(errno) => Err(PagesError::of_process(
                self.pid,
                "reading the page map",
                errno,
            )),
        }
    }
}

/// rustix's own patterns drop the ioctl's return value, which here counts the regions.
struct Scan<'a>(&'a mut pm_scan_arg);

// SAFETY: the opcode is PAGEMAP_SCAN's and the pointer that of its argument.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        PAGEMAP_SCAN
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<usize> {
        usize::try_from(output).map_err(|_| Errno::INVAL)
    }
}
