//! The source's end of the page streams.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_pages::{Memory, PageId, PageSet};

use crate::StreamError;
use crate::answers::{Answers, Post, QUIET};
use crate::batch::Bulk;
use crate::channel::{Channel, Patience, unexpected};
use crate::frame::{Head, Kind, MAX_PAGES, MAX_RUNS, Run};
use crate::shared::{Progress, Shared};

/// A push of no more pages than this goes over one stream on the caller's thread.
const SMALL: usize = 256;
/// The destination may take this long to trap the missing pages: it may not yet have been told to.
const ARM_LIMIT: Duration = Duration::from_secs(30);
/// Beside a guest that waits for pages the answer to a fault queues behind the bulk that is in
/// flight. That is kept at what the link holds, and what it takes in this time more.
const QUEUE: Duration = Duration::from_micros(500);
/// Room for a link whose rate was measured while it was not full.
const GROWTH: f64 = 1.25;
/// Bytes in flight over all streams, whatever was measured.
const IN_FLIGHT: (usize, usize) = (64 << 10, 16 << 20);
/// Taken for the link's nanoseconds a byte before anything was measured: 1 Gbit/s.
const LINK_NS: f64 = 8.0;
/// Taken for it where something else than the link limits.
const FAST_LINK: f64 = 0.5;
/// Pieces in which bulk gives way to faults.
const PIECE: (usize, usize) = (16 << 10, 256 << 10);
/// Pages of a batch beside a waiting guest: a page in it cannot be sent alone any more.
const BESIDE_PAGES: usize = 16;
/// Batches between two looks at the link.
const LOOK: u32 = 16;

enum Urgent {
    Idle(Box<Channel>),
    Serving {
        post: Arc<Post>,
        thread: JoinHandle<Result<(), StreamError>>,
    },
    Ended,
}

/// Sends pages of one guest to its destination.
pub struct Sender {
    shared: Arc<Shared>,
    shape: Vec<u32>,
    bulk: Mutex<Vec<Bulk>>,
    urgent: Mutex<Urgent>,
}

/// Hands the pages of a set out, batch by batch.
struct Cursor<'a> {
    pages: &'a PageSet,
    at: Mutex<Option<PageId>>,
}

impl Cursor<'_> {
    fn next(&self, batch: &mut Vec<PageId>) {
        batch.clear();
        let mut at = self.at.lock().expect("nobody panics inside");
        while batch.len() < MAX_PAGES {
            let Some(id) = at.and_then(|at| self.pages.next_at_or_after(at)) else {
                *at = None;
                return;
            };
            if batch.first().is_some_and(|first| first.block != id.block) {
                return;
            }
            batch.push(id);
            // A block's last page may be the last that a u32 can name.
            *at = match id.page.checked_add(1) {
                Some(page) => Some(PageId { page, ..id }),
                None => id
                    .block
                    .checked_add(1)
                    .map(|block| PageId { block, page: 0 }),
            };
        }
    }
}

/// Bytes in flight that keep a link of so many nanoseconds a byte busy, and little more.
fn window(link_ns: f64, trip: Duration) -> usize {
    let bytes = GROWTH * (trip + QUEUE).as_nanos() as f64 / link_ns;
    (bytes as usize).clamp(IN_FLIGHT.0, IN_FLIGHT.1)
}

fn runs(pages: &PageSet, block: u16) -> Vec<Run> {
    pages
        .iter_ranges(block)
        .map(|(start, stop)| Run {
            start,
            count: stop - start,
        })
        .collect()
}

impl Sender {
    /// Over connected streams.
    ///
    /// # Errors
    /// `Argument` without a bulk stream.
    pub fn new(
        memory: Arc<Memory>,
        bulk: Vec<Channel>,
        urgent: Channel,
    ) -> Result<Self, StreamError> {
        if bulk.is_empty() {
            return Err(StreamError::Argument("a sender needs a bulk stream".into()));
        }
        let sockets = bulk
            .iter()
            .chain([&urgent])
            .map(|c| c.socket().clone())
            .collect();
        let shape = memory.shape().to_vec();
        Ok(Self {
            shared: Arc::new(Shared::new(memory, sockets)),
            shape,
            bulk: Mutex::new(bulk.into_iter().map(Bulk::new).collect::<Result<_, _>>()?),
            urgent: Mutex::new(Urgent::Idle(Box::new(urgent))),
        })
    }

    fn begin(&self, pages: Option<&PageSet>) -> Result<MutexGuard<'_, Vec<Bulk>>, StreamError> {
        if pages.is_some_and(|pages| pages.shape() != self.shape) {
            return Err(StreamError::Argument(
                "the page set does not have the shape of the sender's memory".into(),
            ));
        }
        let bulk = self.bulk.lock().expect("a worker's panic is a bug");
        self.shared.check()?;
        if bulk.is_empty() {
            return Err(StreamError::closed("the sender has finished"));
        }
        Ok(bulk)
    }

    /// Sends these pages; when it returns the destination has installed them.
    ///
    /// # Errors
    /// `Closed`, `Cancelled`, `Refused` when the memory cannot be read.
    pub fn push(&self, pages: &PageSet) -> Result<(), StreamError> {
        let mut bulk = self.begin(Some(pages))?;
        let wanted = pages.len();
        if wanted == 0 {
            return Ok(());
        }
        self.shared.counters.remaining.store(wanted as u64, Relaxed);
        let cursor = Cursor {
            pages,
            at: Mutex::new(Some(PageId { block: 0, page: 0 })),
        };
        let work = |bulk: &mut Bulk| {
            let mut batch = Vec::with_capacity(MAX_PAGES);
            loop {
                cursor.next(&mut batch);
                if batch.is_empty() {
                    return bulk.settle(&self.shared);
                }
                bulk.send(&self.shared, &batch, None)?;
            }
        };
        let used = if wanted <= SMALL { 1 } else { bulk.len() };
        let result = self.on_each(&mut bulk[..used], &work);
        self.note_link(&bulk);
        result
    }

    /// Runs `work` on every stream at once, the first on this thread. The first failure stops all.
    fn on_each(
        &self,
        bulk: &mut [Bulk],
        work: &(impl Fn(&mut Bulk) -> Result<(), StreamError> + Sync),
    ) -> Result<(), StreamError> {
        let work = |bulk: &mut Bulk| work(bulk).map_err(|error| self.shared.fail(error));
        let Some((first, others)) = bulk.split_first_mut() else {
            return Ok(());
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = others
                .iter_mut()
                .map(|bulk| scope.spawn(move || work(bulk)))
                .collect();
            let mut result = work(first);
            for thread in threads {
                result = result.and(thread.join().expect("a worker's panic is a bug"));
            }
            result
        })
    }

    fn note_link(&self, bulk: &[Bulk]) {
        let slowest = bulk.iter().map(Bulk::link).fold(0.0, f64::max);
        let all = slowest / bulk.len() as f64 * 1000.0;
        self.shared.link.store(all as u64, Relaxed);
    }

    /// Tells the destination that these pages are holes now.
    ///
    /// # Errors
    /// `Closed`, `Cancelled`.
    pub fn discard(&self, pages: &PageSet) -> Result<(), StreamError> {
        let mut bulk = self.begin(Some(pages))?;
        let work = |bulk: &mut Bulk| {
            for block in 0..self.shape.len() as u16 {
                let runs = runs(pages, block);
                bulk.send_runs(&self.shared, Kind::Discard, block, &runs)?;
            }
            bulk.settle(&self.shared)
        };
        self.on_each(&mut bulk[..1], &work)
    }

    /// Hands the set of missing pages over; when it returns the destination traps accesses to
    /// them, and requests are answered.
    ///
    /// # Errors
    /// `Closed`, `Cancelled`, `Argument` when it was called before.
    pub fn serve(&self, missing: &PageSet) -> Result<(), StreamError> {
        drop(self.begin(Some(missing))?);
        let mut urgent = self.urgent.lock().expect("nobody panics inside");
        let Urgent::Idle(mut channel) = std::mem::replace(&mut *urgent, Urgent::Ended) else {
            return Err(StreamError::Argument("`serve` was called before".into()));
        };
        self.hand_over(&mut channel, missing)
            .map_err(|error| self.shared.fail(error))?;
        let post = Arc::new(Post::new(missing)?);
        let (shared, for_thread) = (self.shared.clone(), post.clone());
        self.shared
            .counters
            .remaining
            .store(missing.len() as u64, Relaxed);
        let thread = std::thread::Builder::new()
            .name("ferry-answers".into())
            .spawn(move || Answers::new(*channel, &shared, &for_thread)?.run())
            .map_err(|error| StreamError::Refused(format!("a thread: {error}")))?;
        *urgent = Urgent::Serving { post, thread };
        Ok(())
    }

    fn hand_over(&self, channel: &mut Channel, missing: &PageSet) -> Result<(), StreamError> {
        for block in 0..self.shape.len() as u16 {
            for part in runs(missing, block).chunks(MAX_RUNS) {
                let head = Head {
                    block,
                    ..Head::of(Kind::Missing, 0)
                };
                channel.send(head, part, &[])?;
                channel.flush()?;
            }
        }
        channel.send(Head::of(Kind::Missing, 0), &[], &[])?;
        channel.flush()?;
        let armed = channel.read(Patience::Until(Instant::now() + ARM_LIMIT))?;
        if armed.header.kind != Kind::Armed {
            return Err(unexpected(&armed));
        }
        Ok(())
    }

    fn post(&self) -> Result<Arc<Post>, StreamError> {
        match &*self.urgent.lock().expect("nobody panics inside") {
            Urgent::Serving { post, .. } => Ok(post.clone()),
            _ => Err(StreamError::Argument("`pull` needs `serve` first".into())),
        }
    }

    /// Pushes what is still missing while requests go on being answered; when it returns the
    /// destination has installed every missing page.
    ///
    /// # Errors
    /// `Closed`, `Cancelled`, `Argument` before `serve`.
    pub fn pull(&self) -> Result<(), StreamError> {
        let post = self.post()?;
        let mut bulk = self.begin(None)?;
        let mut trip = Duration::MAX;
        for bulk in bulk.iter_mut() {
            let measured = bulk.round_trip().map_err(|error| self.shared.fail(error))?;
            trip = trip.min(measured);
        }
        let streams = bulk.len();
        let result = self.on_each(&mut bulk, &|bulk: &mut Bulk| {
            self.pull_over(bulk, &post, trip, streams)
        });
        self.note_link(&bulk);
        result?;
        if !post.settle() {
            self.shared.check()?;
            return Err(StreamError::closed("the urgent stream has ended"));
        }
        Ok(())
    }

    fn pull_over(
        &self,
        bulk: &mut Bulk,
        post: &Post,
        trip: Duration,
        streams: usize,
    ) -> Result<(), StreamError> {
        let mut batch = Vec::with_capacity(MAX_PAGES);
        let mut window = window(LINK_NS, trip);
        for round in 0.. {
            if round % LOOK == 0 {
                let link = bulk.link() / streams as f64;
                if link > 0.0 {
                    window = self::window(link, trip);
                } else if round > 0 {
                    window = self::window(FAST_LINK, trip);
                }
                bulk.limit_in_flight(window / streams);
                self.shared.link.store((link * 1000.0) as u64, Relaxed);
            }
            let piece = (window / streams / 2).clamp(PIECE.0, PIECE.1);
            // Where the link holds that much nothing queues in it: after an answer the next fault
            // need not be awaited, and a whole batch takes no longer than one.
            let (pages, quiet) = if piece == PIECE.1 {
                (MAX_PAGES, Duration::ZERO)
            } else {
                (BESIDE_PAGES, QUIET)
            };
            let mut order = post.order.lock().expect("nobody panics inside");
            order.next(&post.unsent, pages, &mut batch);
            drop(order);
            if batch.is_empty() {
                break;
            }
            bulk.send(&self.shared, &batch, Some((post, piece, quiet)))?;
        }
        bulk.settle(&self.shared)
    }

    /// Caps all streams together; 0 takes the cap away.
    pub fn set_rate(&self, bytes_per_second: u64) {
        self.shared.rate.set(bytes_per_second);
    }

    /// Reads from another process of the same layout from now on.
    ///
    /// # Errors
    /// `Argument` when the layout differs.
    pub fn set_memory(&self, memory: Arc<Memory>) -> Result<(), StreamError> {
        if memory.shape() != self.shape {
            return Err(StreamError::Argument(
                "the memory has another layout".into(),
            ));
        }
        self.shared.set_memory(memory);
        Ok(())
    }

    /// What has been sent so far.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.shared.counters.read()
    }

    /// Makes the running call fail with `Cancelled` and closes the streams.
    pub fn cancel(&self) {
        self.shared.cancel();
    }

    /// Ends every stream in good order.
    ///
    /// # Errors
    /// `Closed`, `Cancelled`.
    pub fn finish(&self) -> Result<(), StreamError> {
        let mut bulk = self.begin(None)?;
        let mut urgent = self.urgent.lock().expect("nobody panics inside");
        let fail = |error| self.shared.fail(error);
        for bulk in bulk.drain(..) {
            bulk.end().map_err(fail)?;
        }
        match std::mem::replace(&mut *urgent, Urgent::Ended) {
            Urgent::Idle(mut channel) => channel.settle(Kind::End).map_err(fail),
            Urgent::Serving { post, thread } => {
                post.end();
                thread.join().expect("a worker's panic is a bug")
            }
            Urgent::Ended => Ok(()),
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.shared.cancel();
        let urgent = self.urgent.get_mut().expect("nobody panics inside");
        if let Urgent::Serving { thread, .. } = std::mem::replace(urgent, Urgent::Ended) {
            let _ = thread.join();
        }
    }
}
