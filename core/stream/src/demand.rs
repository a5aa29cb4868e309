//! Blocks whose missing pages are trapped: every page is installed once, whole, by whoever has it.

use std::os::fd::AsRawFd;
use std::os::fd::{AsFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use ferry_pages::{
    FaultEvent, InstallError, Memory, Mode, PAGE_SIZE, PageId, PageSet, Userfaultfd, page_digest,
};

use crate::StreamError;
use crate::bits::AtomicPages;
use crate::frame::Run;
use crate::stats::{By, FaultStats, Waiting};

/// Pages installed in one hold of the lock: the thread that reads fault messages waits for it.
const PIECE: usize = 16;
/// A bulk thread that is told "again" waits this long for the messages to be read.
const AGAIN: Duration = Duration::from_micros(50);

/// Digests of pages as they were installed, in block order.
pub struct Digests {
    first: Vec<usize>,
    digests: Vec<AtomicU64>,
}

impl Digests {
    /// All 0.
    pub fn new(shape: &[u32]) -> Self {
        let mut first = Vec::with_capacity(shape.len());
        let mut total = 0;
        for pages in shape {
            first.push(total);
            total += *pages as usize;
        }
        Self {
            first,
            digests: (0..total).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Sets one.
    pub fn set(&self, id: PageId, digest: u64) {
        self.digests[self.first[usize::from(id.block)] + id.page as usize].store(digest, Relaxed);
    }

    /// 8 bytes each, little endian.
    pub fn bytes(&self) -> Vec<u8> {
        self.digests
            .iter()
            .flat_map(|digest| digest.load(Relaxed).to_le_bytes())
            .collect()
    }
}

/// What the destination was told before the missing set came.
pub struct Trap {
    /// Inside the guest's process.
    pub userfaultfd: Userfaultfd,
    /// Blocks by index: whether they are paged on demand.
    pub covered: Vec<bool>,
    /// Where to note digests.
    pub digests: Option<Arc<Digests>>,
}

/// A piece that has to be tried again once the waiting messages are read.
pub struct Deferred {
    page: PageId,
    data: Vec<u8>,
    by: By,
}

enum Tried {
    /// So many pages were dealt with.
    Done(usize),
    /// Messages wait to be read first.
    Again,
}

/// The demand-paged blocks.
pub struct Demand {
    memory: Arc<Memory>,
    covered: Vec<bool>,
    missing: AtomicPages,
    discarded: AtomicPages,
    digests: Option<Arc<Digests>>,
    /// Installing holds it for reading, and reading messages for writing: a page found missing
    /// cannot be given back between that look and its installation. The kernel lets the giver go on
    /// as soon as its message is read; a page installed after that would show old content.
    userfaultfd: RwLock<Option<Userfaultfd>>,
    waiting: Mutex<Waiting>,
    installed: AtomicU64,
    /// Nobody reads messages any more.
    unattended: AtomicBool,
}

impl Demand {
    /// Registers the blocks and checks that no missing page is there already: it would never fault.
    pub fn arm(memory: Arc<Memory>, trap: Trap, missing: &PageSet) -> Result<Self, StreamError> {
        for (block, covered) in memory.blocks().iter().zip(&trap.covered) {
            if *covered {
                trap.userfaultfd
                    .register(block.address, block.length, Mode::MISSING)?;
            }
        }
        let outside: usize = (0..memory.blocks().len())
            .filter(|block| !trap.covered[*block])
            .map(|block| missing.count(block as u16) as usize)
            .sum();
        if outside > 0 {
            return Err(StreamError::Refused(format!(
                "{outside} missing pages are in blocks that are not paged on demand"
            )));
        }
        let mut there = memory.populated()?;
        there.intersect_with(missing);
        if let Some(first) = there.next_at_or_after(PageId { block: 0, page: 0 }) {
            return Err(StreamError::Refused(format!(
                "{} missing pages are in place at the destination already and would never fault \
                 (the first is page {} of RAM block {:?}): discard them before the switch-over",
                there.len(),
                first.page,
                memory.blocks()[usize::from(first.block)].name,
            )));
        }
        Ok(Self {
            covered: trap.covered,
            missing: AtomicPages::from_set(missing),
            discarded: AtomicPages::new(memory.shape()),
            digests: trap.digests,
            userfaultfd: RwLock::new(Some(trap.userfaultfd)),
            waiting: Mutex::new(Waiting::default()),
            installed: AtomicU64::new(0),
            unattended: AtomicBool::new(false),
            memory,
        })
    }

    /// The thread that reads messages ends: who waits for it to read them must not wait on.
    pub fn leave(&self) {
        self.unattended.store(true, Relaxed);
    }

    /// Whether the block is paged on demand.
    pub fn covers(&self, block: u16) -> bool {
        self.covered[usize::from(block)]
    }

    /// Pages still missing.
    pub fn missing(&self) -> usize {
        self.missing.len()
    }

    /// Pages installed.
    pub fn installed(&self) -> u64 {
        self.installed.load(Relaxed)
    }

    /// Pages given back.
    pub fn discarded(&self) -> PageSet {
        self.discarded.to_set()
    }

    /// How long the guest waited.
    pub fn stats(&self) -> FaultStats {
        self.waiting.lock().expect("nobody panics inside").read()
    }

    /// How long the longest of those who wait has waited.
    pub fn longest_wait(&self) -> Option<Duration> {
        self.waiting.lock().expect("nobody panics inside").longest()
    }

    /// To poll on; only the thread that also runs `release` may.
    pub fn descriptor(&self) -> Option<RawFd> {
        let userfaultfd = self.userfaultfd.read().expect("nobody panics inside");
        userfaultfd.as_ref().map(|u| u.as_fd().as_raw_fd())
    }

    /// Unregisters the blocks and closes the descriptor.
    pub fn release(&self) -> Result<(), StreamError> {
        let mut userfaultfd = self.userfaultfd.write().expect("nobody panics inside");
        let Some(userfaultfd) = userfaultfd.take() else {
            return Ok(());
        };
        for (block, covered) in self.memory.blocks().iter().zip(&self.covered) {
            if *covered {
                userfaultfd.unregister(block.address, block.length)?;
            }
        }
        Ok(())
    }

    /// Installs pages of a block on a thread that reads no fault messages. Pages that are no
    /// longer missing (given back) are dropped. Without `data` they are zero.
    pub fn install(
        &self,
        block: u16,
        runs: &[Run],
        data: Option<&[u8]>,
        by: By,
    ) -> Result<(), StreamError> {
        self.pieces(block, runs, data, |demand, page, count, data| {
            loop {
                match demand.try_piece(page, count, data, by)? {
                    Tried::Done(done) => return Ok(done),
                    Tried::Again if demand.unattended.load(Relaxed) => {
                        return Err(StreamError::closed("the fault service has ended"));
                    }
                    Tried::Again => std::thread::sleep(AGAIN),
                }
            }
        })
    }

    /// The same on the thread that reads fault messages: what has to wait goes to `deferred`.
    pub fn install_or_defer(
        &self,
        block: u16,
        runs: &[Run],
        data: Option<&[u8]>,
        by: By,
        deferred: &mut Vec<Deferred>,
    ) -> Result<(), StreamError> {
        self.pieces(block, runs, data, |demand, page, count, data| match demand
            .try_piece(page, count, data, by)?
        {
            Tried::Done(done) => Ok(done),
            Tried::Again => {
                let zeros = vec![0; if data.is_none() { count * PAGE_SIZE } else { 0 }];
                let data = data.unwrap_or(&zeros).to_vec();
                deferred.push(Deferred { page, data, by });
                Ok(count)
            }
        })
    }

    /// Tries what was deferred once more; what still has to wait stays.
    pub fn retry(&self, deferred: &mut Vec<Deferred>) -> Result<(), StreamError> {
        for piece in std::mem::take(deferred) {
            if piece.by == By::Zero {
                self.settle_absent(piece.page, deferred)?;
                continue;
            }
            let run = Run {
                start: piece.page.page,
                count: (piece.data.len() / PAGE_SIZE) as u32,
            };
            let block = piece.page.block;
            self.install_or_defer(block, &[run], Some(&piece.data), piece.by, deferred)?;
        }
        Ok(())
    }

    fn pieces(
        &self,
        block: u16,
        runs: &[Run],
        data: Option<&[u8]>,
        mut step: impl FnMut(&Self, PageId, usize, Option<&[u8]>) -> Result<usize, StreamError>,
    ) -> Result<(), StreamError> {
        let mut offset = 0;
        for run in runs {
            let mut page = run.start;
            while page < run.stop() {
                let count = PIECE.min((run.stop() - page) as usize);
                let bytes = data.map(|data| &data[offset..offset + count * PAGE_SIZE]);
                let done = step(self, PageId { block, page }, count, bytes)?;
                page += done as u32;
                offset += done * PAGE_SIZE;
            }
        }
        Ok(())
    }

    /// Deals with the first of `count` pages: installs as many missing ones as lie in a row, or
    /// skips those that are not missing.
    fn try_piece(
        &self,
        page: PageId,
        count: usize,
        data: Option<&[u8]>,
        by: By,
    ) -> Result<Tried, StreamError> {
        let at = |n: usize| PageId {
            page: page.page + n as u32,
            ..page
        };
        let held = self.userfaultfd.read().expect("nobody panics inside");
        let Some(userfaultfd) = held.as_ref() else {
            return Ok(Tried::Done(count));
        };
        let row = (0..count)
            .take_while(|n| self.missing.contains(at(*n)))
            .count();
        if row == 0 {
            let gone = (0..count)
                .take_while(|n| !self.missing.contains(at(*n)))
                .count();
            return Ok(Tried::Done(gone));
        }
        let address = self.memory.address_of(page);
        let length = row * PAGE_SIZE;
        let result = match data {
            Some(data) => userfaultfd.copy(address, &data[..length]),
            None => userfaultfd.zero(address, length as u64),
        };
        let done = match result {
            Ok(()) => row,
            Err(InstallError::Again { done }) => done as usize / PAGE_SIZE,
            Err(InstallError::Exists) => {
                // Somebody else's page: theirs counts, but a waiter still has to be woken.
                userfaultfd.wake(address, PAGE_SIZE as u64)?;
                self.arrived(page, None, by);
                return Ok(Tried::Done(1));
            }
            Err(error) => return Err(StreamError::Refused(format!("installing a page: {error}"))),
        };
        if done == 0 {
            return Ok(Tried::Again);
        }
        for n in 0..done {
            let data = data.map(|data| &data[n * PAGE_SIZE..(n + 1) * PAGE_SIZE]);
            self.arrived(at(n), data, by);
        }
        Ok(Tried::Done(done))
    }

    /// In this order: whoever adds itself to the waiting after this looks at `missing` again.
    fn arrived(&self, id: PageId, data: Option<&[u8]>, by: By) {
        if let Some(digests) = &self.digests {
            digests.set(id, data.map_or(0, page_digest));
        }
        self.installed.fetch_add(1, Relaxed);
        self.missing.take(id);
        self.waiting
            .lock()
            .expect("nobody panics inside")
            .done(id, by);
    }

    /// Reads fault messages: pages given back are no longer missing, and the pages that somebody
    /// waits for are appended to `faults`.
    pub fn read_messages(
        &self,
        faults: &mut Vec<PageId>,
        deferred: &mut Vec<Deferred>,
    ) -> Result<(), StreamError> {
        let mut events = Vec::new();
        let mut waited = Vec::new();
        {
            let held = self.userfaultfd.write().expect("nobody panics inside");
            let Some(userfaultfd) = held.as_ref() else {
                return Ok(());
            };
            userfaultfd.read_events(&mut events)?;
            for event in &events {
                if let FaultEvent::Remove { start, end } = *event {
                    self.remove(start, end, &mut waited);
                }
            }
        }
        for event in events {
            if let FaultEvent::Fault { address, .. } = event
                && let Some(id) = self.memory.page_at(address)
            {
                faults.push(id);
            }
        }
        for id in waited {
            self.settle_absent(id, deferred)?;
        }
        Ok(())
    }

    fn remove(&self, start: u64, end: u64, waited: &mut Vec<PageId>) {
        let mut waiting = self.waiting.lock().expect("nobody panics inside");
        let mut pages = 0;
        for address in (start..end).step_by(PAGE_SIZE) {
            let Some(id) = self.memory.page_at(address) else {
                continue;
            };
            self.missing.take(id);
            pages += u64::from(self.discarded.put(id));
            if let Some(digests) = &self.digests {
                digests.set(id, 0);
            }
            if waiting.contains(id) {
                waited.push(id);
            }
        }
        waiting.discarded(pages);
    }

    /// Somebody waits for the page: true when it has to be asked for. Otherwise it is served here.
    pub fn fault(&self, id: PageId, deferred: &mut Vec<Deferred>) -> Result<bool, StreamError> {
        self.waiting.lock().expect("nobody panics inside").add(id);
        // After `add`: see `arrived`.
        if self.missing.contains(id) {
            return Ok(true);
        }
        self.settle_absent(id, deferred)?;
        Ok(false)
    }

    /// Serves a page that is not missing: it is there, or it is zero.
    fn settle_absent(&self, id: PageId, deferred: &mut Vec<Deferred>) -> Result<(), StreamError> {
        let held = self.userfaultfd.read().expect("nobody panics inside");
        let Some(userfaultfd) = held.as_ref() else {
            return Ok(());
        };
        let address = self.memory.address_of(id);
        let by = match userfaultfd.zero(address, PAGE_SIZE as u64) {
            Ok(()) => By::Zero,
            Err(InstallError::Exists) => {
                userfaultfd.wake(address, PAGE_SIZE as u64)?;
                By::Push
            }
            Err(InstallError::Again { .. }) => {
                deferred.push(Deferred {
                    page: id,
                    data: Vec::new(),
                    by: By::Zero,
                });
                return Ok(());
            }
            Err(error) => return Err(StreamError::Refused(format!("a page of zeros: {error}"))),
        };
        self.waiting
            .lock()
            .expect("nobody panics inside")
            .done(id, by);
        Ok(())
    }
}
