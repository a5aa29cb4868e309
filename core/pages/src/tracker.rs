//! Dirty tracking of a process from outside.
//!
//! The blocks are registered with a userfaultfd in asynchronous write-protect mode: the kernel
//! itself resolves the first write to an armed page and remembers it, and PAGEMAP_SCAN reports
//! and arms again. Kernel writes (a `read` into guest RAM) count. Data that a device puts into a
//! page by DMA after the page was pinned do not: drain block I/O between scan and read.

use std::cell::OnceCell;
use std::mem;
use std::sync::Arc;

use rustix::io::Errno;

use crate::pagemap::{PRESENT, Pagemap, Query, ZEROS};
use crate::populated::{in_files, insert};
use crate::process::{Mapping, mappings};
use crate::{Block, Memory, Mode, PageSet, PagesError, Userfaultfd, features};

const FEATURES: u64 =
    features::WP | features::WP_ASYNC | features::WP_UNPOPULATED | features::WP_HUGETLBFS_SHMEM;

/// Tracks which pages a process writes. Dropping it takes every registration back.
#[derive(Debug)]
pub struct Tracker {
    memory: Arc<Memory>,
    pagemap: Pagemap,
    /// None once closed.
    userfaultfd: Option<Userfaultfd>,
    registered: usize,
    /// Whether a block has had its first scan.
    armed: Vec<bool>,
    /// What scans have found and not handed out. A scan that fails half way has taken marks
    /// already; the next one offers those pages again.
    found: PageSet,
}

impl Tracker {
    /// Enables the features and registers every block. Fails whole: nothing stays registered.
    ///
    /// # Errors
    /// `Gone`, `Kernel`.
    pub fn new(memory: Arc<Memory>, userfaultfd: Userfaultfd) -> Result<Self, PagesError> {
        let pagemap = Pagemap::open(memory.pid())?;
        userfaultfd.enable(FEATURES)?;
        let mut tracker = Self {
            pagemap,
            userfaultfd: Some(userfaultfd),
            registered: 0,
            armed: vec![false; memory.blocks().len()],
            found: PageSet::new(memory.shape()),
            memory,
        };
        let memory = Arc::clone(&tracker.memory);
        for block in memory.blocks() {
            if let Some(userfaultfd) = &tracker.userfaultfd {
                userfaultfd.register(block.address, block.length, Mode::WP)?;
            }
            tracker.registered += 1;
        }
        Ok(tracker)
    }

    /// The memory it tracks.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Pages written since the last scan, armed again in the same step; the first scan returns
    /// every populated page that was ever written. Pages given back since the last scan are not
    /// reported.
    ///
    /// # Errors
    /// `Gone`, `Kernel`; `Argument` once it is closed.
    pub fn scan(&mut self) -> Result<PageSet, PagesError> {
        if self.userfaultfd.is_none() {
            return Err(PagesError::Argument("the tracker is closed".into()));
        }
        let memory = Arc::clone(&self.memory);
        let files = Files {
            pid: memory.pid(),
            mappings: OnceCell::new(),
        };
        for (index, block) in (0_u16..).zip(memory.blocks()) {
            if block.shared && !block.is_hugetlb() {
                self.scan_shared(index, block, &files)?;
            } else {
                self.scan_private(index, block, &files)?;
            }
            self.armed[usize::from(index)] = true;
        }
        Ok(mem::replace(&mut self.found, PageSet::new(memory.shape())))
    }

    /// Unregisters every block and closes the descriptor. Harmless when done before, and when
    /// the process has ended.
    ///
    /// # Errors
    /// `Kernel`; the descriptor is closed all the same.
    pub fn close(&mut self) -> Result<(), PagesError> {
        let Some(userfaultfd) = self.userfaultfd.take() else {
            return Ok(());
        };
        let mut result = Ok(());
        for block in &self.memory.blocks()[..self.registered] {
            match userfaultfd.unregister(block.address, block.length) {
                // What the kernel says of an address space that has ended.
                Err(PagesError::Kernel {
                    errno: Errno::NOMEM | Errno::SRCH,
                    ..
                }) => {}
                Err(error) => result = Err(error),
                Ok(()) => {}
            }
        }
        self.registered = 0;
        result
    }

    /// Also hugetlbfs, shared or not: it is never reclaimed, so its page table tells all.
    fn scan_private(&mut self, index: u16, block: &Block, files: &Files) -> Result<(), PagesError> {
        let first = !self.armed[usize::from(index)];
        let found = &mut self.found;
        let query = Query::ARM_WRITTEN_POPULATED;
        self.pagemap
            .scan(block.address, block.end(), query, |start, end, category| {
                // A page of zeros that was never anything else is the same as none; later it may
                // stand where something else was sent.
                if !first || category & ZEROS == 0 {
                    insert(found, index, block, start, end);
                }
            })?;
        if !first || block.is_hugetlb() {
            return Ok(());
        }
        // A private mapping of a file shows the file's content where nothing was touched yet.
        files.data(block, |start, end| insert(found, index, block, start, end))
    }

    /// Reclaim unmaps pages of shared memory, written ones too, without a trace in the page table
    /// but for the mark of an armed page. So everything is armed, the empty places as well, and
    /// the file says what holds data.
    fn scan_shared(&mut self, index: u16, block: &Block, files: &Files) -> Result<(), PagesError> {
        let first = !self.armed[usize::from(index)];
        let found = &mut self.found;
        // Written and no longer mapped: in the file, or given back and a hole by now.
        let mut absent = Vec::new();
        let query = Query::ARM_WRITTEN;
        let scanned =
            self.pagemap
                .scan(block.address, block.end(), query, |start, end, category| {
                    if first {
                        return;
                    }
                    if category & PRESENT != 0 {
                        insert(found, index, block, start, end);
                    } else {
                        absent.push((start, end));
                    }
                });
        if first {
            scanned?;
            return files.data(block, |start, end| insert(found, index, block, start, end));
        }
        if absent.is_empty() {
            return scanned;
        }
        let sorted = scanned.and_then(|()| {
            files.data(block, |start, end| {
                let after = absent.partition_point(|(_, stop)| *stop <= start);
                for (from, to) in absent[after..].iter().take_while(|(from, _)| *from < end) {
                    insert(found, index, block, (*from).max(start), (*to).min(end));
                }
            })
        });
        if sorted.is_err() {
            for (start, end) in absent {
                insert(found, index, block, start, end);
            }
        }
        sorted
    }
}

/// The mapped files of the process, looked up once a scan, and only if asked.
struct Files {
    pid: i32,
    mappings: OnceCell<Vec<Mapping>>,
}

impl Files {
    fn data(&self, block: &Block, found: impl FnMut(u64, u64)) -> Result<(), PagesError> {
        let mappings = match self.mappings.get() {
            Some(mappings) => mappings,
            None => self.mappings.get_or_init({
                let mappings = mappings(self.pid)?;
                || mappings
            }),
        };
        in_files(self.pid, mappings, block, found)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        // An error here has nobody to go to; closing the descriptor ends the registrations too,
        // unless it stays open in the process.
        let _ = self.close();
    }
}
