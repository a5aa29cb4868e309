//! The destination's end of the page streams: one thread a stream installs what arrives.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry_pages::{Memory, PAGE_SIZE, PageId, PageSet, Userfaultfd, features, page_digest};
use rustix::event::{EventfdFlags, eventfd};

use crate::StreamError;
use crate::bits::AtomicPages;
use crate::channel::{Channel, Patience, unexpected};
use crate::codec::Decoder;
use crate::demand::{Demand, Digests, Trap};
use crate::faults::Faults;
use crate::frame::{Frame, Kind, MAX_PAGES};
use crate::socket::Socket;
use crate::stats::{By, FaultStats};

/// The thread of the urgent stream takes no longer to give the userfaultfd back.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);

static ZEROS: [u8; MAX_PAGES * PAGE_SIZE] = [0; MAX_PAGES * PAGE_SIZE];

/// What the threads of a receiver share.
pub struct Inside {
    /// Where pages go.
    pub memory: Arc<Memory>,
    /// Pages that may hold something: zeros have to be written there. All others are fresh.
    touched: AtomicPages,
    installed: AtomicU64,
    /// Once the missing set has come.
    pub demand: OnceLock<Demand>,
    /// What `serve_faults` brought, until then.
    pub trap: Mutex<Option<Trap>>,
    digests: OnceLock<Arc<Digests>>,
    /// Wakes the thread of the urgent stream.
    pub wake: OwnedFd,
    sockets: Vec<Socket>,
    cancelled: AtomicBool,
    /// The receiver goes away.
    pub dropped: AtomicBool,
    /// `release` waits.
    pub releasing: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Streams that have ended in good order.
    ended: usize,
    failure: Option<StreamError>,
    released: Option<Result<(), StreamError>>,
}

impl Inside {
    /// A stream ended as it should.
    pub fn ended(&self) {
        self.state.lock().expect("nobody panics inside").ended += 1;
        self.changed.notify_all();
    }

    /// Stops all streams; the first failure is the cause of the others.
    pub fn fail(&self, error: StreamError) {
        self.state
            .lock()
            .expect("nobody panics inside")
            .failure
            .get_or_insert(error);
        self.changed.notify_all();
        self.sockets.iter().for_each(Socket::break_off);
    }

    /// The userfaultfd was given back, or cannot be; the first answer holds.
    pub fn released(&self, result: Result<(), StreamError>) {
        let mut state = self.state.lock().expect("nobody panics inside");
        state.released.get_or_insert(result);
        drop(state);
        self.changed.notify_all();
    }

    fn nudge(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Whether all pages of a frame exist here.
    pub fn check(&self, frame: &Frame) -> Result<(), StreamError> {
        let pages = self.memory.shape().get(usize::from(frame.header.block));
        let inside = |pages: &u32| frame.runs.iter().all(|run| run.stop() <= *pages);
        if pages.is_some_and(inside) {
            return Ok(());
        }
        Err(StreamError::corrupt(format!(
            "a frame names pages outside of RAM block {}",
            frame.header.block
        )))
    }

    /// Installs content by writing into the process: pages that nobody traps.
    pub fn write(&self, frame: &Frame, data: &[u8]) -> Result<(), StreamError> {
        let pages = pages(frame);
        self.memory.write_pages(&pages, data)?;
        for (id, page) in pages.iter().zip(data.chunks_exact(PAGE_SIZE)) {
            self.touched.put(*id);
            if let Some(digests) = self.digests.get() {
                digests.set(*id, page_digest(page));
            }
        }
        self.installed.fetch_add(pages.len() as u64, Relaxed);
        Ok(())
    }

    /// Writes zeros over pages that may hold something; the others are zero already.
    pub fn write_zeros(&self, frame: &Frame) -> Result<(), StreamError> {
        let mut batch = Vec::with_capacity(MAX_PAGES);
        let block = frame.header.block;
        for run in &frame.runs {
            self.installed.fetch_add(u64::from(run.count), Relaxed);
            for page in run.start..run.stop() {
                let id = PageId { block, page };
                if self.touched.contains(id) {
                    batch.push(id);
                }
                if let Some(digests) = self.digests.get() {
                    digests.set(id, 0);
                }
                if batch.len() == MAX_PAGES {
                    self.memory.write_pages(&batch, &ZEROS)?;
                    batch.clear();
                }
            }
        }
        self.memory
            .write_pages(&batch, &ZEROS[..batch.len() * PAGE_SIZE])?;
        Ok(())
    }
}

/// The pages of a frame that `check` has passed.
fn pages(frame: &Frame) -> Vec<PageId> {
    let block = frame.header.block;
    let pages = frame.runs.iter().flat_map(|run| run.start..run.stop());
    pages.map(|page| PageId { block, page }).collect()
}

/// Installs what arrives on one bulk stream, until its end.
fn receive(inside: &Inside, channel: &mut Channel) -> Result<(), StreamError> {
    let mut decoder = Decoder::new()?;
    loop {
        let frame = channel.read(Patience::Endless)?;
        let block = frame.header.block;
        match frame.header.kind {
            Kind::Pages => {
                inside.check(&frame)?;
                let body = channel.body(&frame);
                let data = decoder.decode(frame.header.encoding, body, frame.pages())?;
                match inside.demand.get() {
                    Some(demand) if demand.covers(block) => {
                        demand.install(block, &frame.runs, Some(data), By::Push)?;
                    }
                    _ => inside.write(&frame, data)?,
                }
            }
            Kind::Zero | Kind::Discard => {
                inside.check(&frame)?;
                match inside.demand.get() {
                    Some(demand) if demand.covers(block) => {
                        demand.install(block, &frame.runs, None, By::Push)?;
                    }
                    _ => inside.write_zeros(&frame)?,
                }
            }
            Kind::Flush | Kind::End => {
                channel.send_ack(&frame)?;
                channel.flush()?;
                if frame.header.kind == Kind::End {
                    return Ok(());
                }
            }
            _ => return Err(unexpected(&frame)),
        }
    }
}

/// Installs the pages of one guest as they arrive.
pub struct Receiver {
    inside: Arc<Inside>,
    threads: Vec<JoinHandle<()>>,
    streams: usize,
}

impl Receiver {
    /// Over accepted streams; installing starts at once.
    ///
    /// # Errors
    /// `Refused` when the memory cannot be looked at.
    pub fn new(
        memory: Arc<Memory>,
        bulk: Vec<Channel>,
        urgent: Channel,
    ) -> Result<Self, StreamError> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|errno| StreamError::Refused(format!("eventfd: {errno}")))?;
        let sockets = bulk
            .iter()
            .chain([&urgent])
            .map(|c| c.socket().clone())
            .collect();
        let inside = Arc::new(Inside {
            touched: AtomicPages::from_set(&memory.populated()?),
            memory,
            installed: AtomicU64::new(0),
            demand: OnceLock::new(),
            trap: Mutex::new(None),
            digests: OnceLock::new(),
            wake,
            sockets,
            cancelled: AtomicBool::new(false),
            dropped: AtomicBool::new(false),
            releasing: AtomicBool::new(false),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        });
        let mut receiver = Self {
            inside: inside.clone(),
            threads: Vec::new(),
            streams: bulk.len() + 1,
        };
        for mut channel in bulk {
            let inside = inside.clone();
            // The channel closes after the failure is noted: it is the cause of the others.
            let work = move || match receive(&inside, &mut channel) {
                Ok(()) => inside.ended(),
                Err(error) => inside.fail(error),
            };
            receiver.spawn("ferry-install", work)?;
        }
        receiver.spawn("ferry-faults", move || Faults::new(&inside, urgent).run())?;
        Ok(receiver)
    }

    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<(), StreamError> {
        let thread = std::thread::Builder::new().name(name.into()).spawn(work);
        let thread = thread.map_err(|e| StreamError::Refused(format!("a thread: {e}")))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Answers faults in these blocks once the source's set of missing pages has come.
    ///
    /// # Errors
    /// `Refused` when the kernel lacks a feature; `Argument` for blocks that cannot be paged.
    pub fn serve_faults(
        &self,
        userfaultfd: OwnedFd,
        blocks: &[u16],
        record_digests: bool,
    ) -> Result<(), StreamError> {
        let memory = &self.inside.memory;
        let mut covered = vec![false; memory.blocks().len()];
        let mut wanted = features::EVENT_REMOVE;
        for index in blocks {
            let Some(block) = memory.blocks().get(usize::from(*index)) else {
                return Err(StreamError::Argument(format!(
                    "there is no RAM block {index}"
                )));
            };
            if block.is_hugetlb() {
                return Err(StreamError::Argument(format!(
                    "RAM block {:?} has huge pages, which are not paged on demand: push it whole",
                    block.name
                )));
            }
            if block.shared {
                wanted |= features::MISSING_SHMEM;
            }
            covered[usize::from(*index)] = true;
        }
        let userfaultfd = Userfaultfd::from(userfaultfd);
        rustix::io::ioctl_fionbio(&userfaultfd, true)
            .map_err(|errno| StreamError::Refused(format!("the userfaultfd: {errno}")))?;
        userfaultfd.enable(wanted)?;
        let digests = record_digests.then(|| {
            let fresh = || Arc::new(Digests::new(memory.shape()));
            self.inside.digests.get_or_init(fresh).clone()
        });
        let mut trap = self.inside.trap.lock().expect("nobody panics inside");
        if trap.is_some() || self.inside.demand.get().is_some() {
            return Err(StreamError::Argument(
                "`serve_faults` was called before".into(),
            ));
        }
        *trap = Some(Trap {
            userfaultfd,
            covered,
            digests,
        });
        drop(trap);
        self.inside.nudge();
        Ok(())
    }

    /// Waits for the source's orderly end.
    ///
    /// # Errors
    /// `Closed`, `Corrupt`, `Cancelled`, `Refused`.
    pub fn wait(&self) -> Result<(), StreamError> {
        let mut state = self.inside.state.lock().expect("nobody panics inside");
        loop {
            if self.inside.cancelled.load(SeqCst) {
                return Err(StreamError::Cancelled);
            }
            if let Some(error) = &state.failure {
                return Err(error.clone());
            }
            if state.ended == self.streams {
                return Ok(());
            }
            state = self
                .inside
                .changed
                .wait(state)
                .expect("nobody panics inside");
        }
    }

    /// Pages still missing.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.inside.demand.get().map_or(0, Demand::missing)
    }

    /// Pages installed so far, duplicates and zero pages included.
    #[must_use]
    pub fn pages_installed(&self) -> u64 {
        let trapped = self.inside.demand.get().map_or(0, Demand::installed);
        self.inside.installed.load(Relaxed) + trapped
    }

    /// How long the guest waited for pages.
    #[must_use]
    pub fn fault_stats(&self) -> FaultStats {
        self.inside
            .demand
            .get()
            .map(Demand::stats)
            .unwrap_or_default()
    }

    /// Digests of the pages as installed; nothing unless they are recorded.
    #[must_use]
    pub fn installed_digests(&self) -> Vec<u8> {
        self.inside
            .digests
            .get()
            .map(|d| d.bytes())
            .unwrap_or_default()
    }

    /// Pages that the guest gave back while it was paged on demand.
    #[must_use]
    pub fn discarded(&self) -> PageSet {
        match self.inside.demand.get() {
            Some(demand) => demand.discarded(),
            None => PageSet::new(self.inside.memory.shape()),
        }
    }

    /// Unregisters the userfaultfd and closes it.
    ///
    /// # Errors
    /// `Refused` while pages are missing: they would read as zeros.
    pub fn release(&self) -> Result<(), StreamError> {
        let missing = self.missing();
        if missing > 0 {
            return Err(StreamError::Refused(format!(
                "{missing} pages are missing still: without the userfaultfd they would read as zeros"
            )));
        }
        if self.inside.demand.get().is_none() {
            *self.inside.trap.lock().expect("nobody panics inside") = None;
            return Ok(());
        }
        self.inside.releasing.store(true, SeqCst);
        self.inside.nudge();
        let state = self.inside.state.lock().expect("nobody panics inside");
        let waited = self
            .inside
            .changed
            .wait_timeout_while(state, RELEASE_LIMIT, |state| state.released.is_none());
        let (state, _) = waited.expect("nobody panics inside");
        state.released.clone().unwrap_or_else(|| {
            Err(StreamError::Refused(
                "the fault service does not answer".into(),
            ))
        })
    }

    /// Makes `wait` fail with `Cancelled` and closes the streams. Faults that need no network are
    /// served on.
    pub fn cancel(&self) {
        self.inside.cancelled.store(true, SeqCst);
        self.inside.fail(StreamError::Cancelled);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.inside.dropped.store(true, SeqCst);
        self.cancel();
        self.inside.nudge();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
