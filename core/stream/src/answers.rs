//! The urgent stream at the source: whoever waits for a page is served here, before anything else.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use ferry_pages::{PageId, PageSet};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd};
use rustix::io::Errno;

use crate::StreamError;
use crate::batch::Batch;
use crate::bits::AtomicPages;
use crate::channel::{Channel, unexpected};
use crate::codec::Choice;
use crate::frame::{ANSWER, Head, Kind, Run};
use crate::order::Order;
use crate::shared::Shared;
use crate::socket::hurry_this_thread;

/// Pages sent behind a requested one.
const NEIGHBOURS: usize = 15;
/// They are looked for this far behind it.
const NEAR: u32 = 64;
/// Bulk waits while a request is younger than this, since the next one is likely to follow.
pub const QUIET: Duration = Duration::from_micros(500);
/// But no piece of it longer than this, or a guest that faults all the time would never get rid of
/// its source.
const HOLD: Duration = Duration::from_micros(700);
const HOLD_STEP: Duration = Duration::from_micros(100);

/// What the thread that answers and the threads that push share.
pub struct Post {
    /// Missing pages not sent yet.
    pub unsent: AtomicPages,
    /// Where the push goes on.
    pub order: Mutex<Order>,
    /// When the last request came, in ns since `start`; requests being answered.
    last: AtomicU64,
    busy: AtomicBool,
    start: Instant,
    wake: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    settle: bool,
    settled: bool,
    end: bool,
    /// The thread is gone.
    over: bool,
}

impl Post {
    /// With all of `missing` to send.
    pub fn new(missing: &PageSet) -> Result<Self, StreamError> {
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|errno| StreamError::Refused(format!("eventfd: {errno}")))?;
        Ok(Self {
            unsent: AtomicPages::from_set(missing),
            order: Mutex::new(Order::default()),
            last: AtomicU64::new(0),
            busy: AtomicBool::new(false),
            start: Instant::now(),
            wake,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        })
    }

    fn tell(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().expect("nobody panics inside"));
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Waits until the destination has installed everything sent on the urgent stream so far.
    /// False when the thread has ended.
    pub fn settle(&self) -> bool {
        self.tell(|state| (state.settle, state.settled) = (true, false));
        let mut state = self.state.lock().expect("nobody panics inside");
        while !state.settled && !state.over {
            state = self.changed.wait(state).expect("nobody panics inside");
        }
        state.settled
    }

    /// Asks the thread to end the stream in good order.
    pub fn end(&self) {
        self.tell(|state| state.end = true);
    }

    /// Holds a bulk thread back while somebody waits for a page, and for `quiet` after the last
    /// request; returns how long.
    pub fn give_way(&self, quiet: Duration) -> Duration {
        let start = Instant::now();
        loop {
            let held = start.elapsed();
            let last = self.last.load(SeqCst);
            let idle = self
                .start
                .elapsed()
                .saturating_sub(Duration::from_nanos(last));
            let is_quiet = last == 0 || idle > quiet;
            if held > HOLD || is_quiet && !self.busy.load(SeqCst) {
                return held;
            }
            std::thread::sleep(HOLD_STEP);
        }
    }

    fn requested(&self) {
        self.busy.store(true, SeqCst);
        let now = self.start.elapsed().as_nanos() as u64;
        self.last.store(now.max(1), SeqCst);
    }
}

/// The thread that answers.
pub struct Answers<'a> {
    channel: Channel,
    shared: &'a Shared,
    post: &'a Post,
    batch: Batch,
    asked: Vec<PageId>,
    /// Sequence number of the flush that waits for its ack.
    flush: Option<u64>,
}

impl<'a> Answers<'a> {
    /// Over the urgent stream.
    pub fn new(channel: Channel, shared: &'a Shared, post: &'a Post) -> Result<Self, StreamError> {
        Ok(Self {
            channel,
            shared,
            post,
            batch: Batch::new()?,
            asked: Vec::new(),
            flush: None,
        })
    }

    /// Answers until it is told to end, or the stream breaks.
    pub fn run(mut self) -> Result<(), StreamError> {
        hurry_this_thread();
        let result = self.serve();
        self.post.busy.store(false, SeqCst);
        let mut state = self.post.state.lock().expect("nobody panics inside");
        state.over = true;
        self.post.changed.notify_all();
        drop(state);
        result.map_err(|error| self.shared.fail(error))
    }

    fn serve(&mut self) -> Result<(), StreamError> {
        loop {
            self.take_frames()?;
            if !self.asked.is_empty() {
                self.answer()?;
                continue;
            }
            self.post.busy.store(false, SeqCst);
            let (settle, end) = {
                let mut state = self.post.state.lock().expect("nobody panics inside");
                (std::mem::take(&mut state.settle), state.end)
            };
            if settle {
                self.flush = Some(self.channel.next_sequence());
                self.channel.send(Head::of(Kind::Flush, 0), &[], &[])?;
                self.channel.flush()?;
            }
            if end && self.flush.is_none() {
                return self.end();
            }
            self.wait()?;
        }
    }

    fn wait(&mut self) -> Result<(), StreamError> {
        if self.flush.is_some() {
            // Somebody waits for the ack: the peer must keep moving, and what `wake` says can wait.
            self.channel.socket().wait(PollFlags::IN, true, None)?;
        } else {
            let mut set = [
                self.channel.socket().poll_for(PollFlags::IN),
                PollFd::new(&self.post.wake, PollFlags::IN),
            ];
            match rustix::event::poll(&mut set, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(StreamError::closed(format!("poll: {errno}"))),
            }
            let _ = rustix::io::read(&self.post.wake, &mut [0_u8; 8]);
        }
        self.channel.fill()?;
        Ok(())
    }

    fn take_frames(&mut self) -> Result<(), StreamError> {
        while let Some(frame) = self.channel.next_frame()? {
            match frame.header.kind {
                Kind::Request => {
                    self.post.requested();
                    let block = frame.header.block;
                    for run in &frame.runs {
                        for page in run.start..run.stop() {
                            let id = PageId { block, page };
                            if !self.post.unsent.has(id) || self.asked.len() > 1 << 16 {
                                return Err(StreamError::corrupt("a request for no page"));
                            }
                            self.asked.push(id);
                        }
                    }
                }
                Kind::Ack if self.flush.is_some() => {
                    let flush = self.flush.take().unwrap_or_default().to_be_bytes();
                    if self.channel.body(&frame) != flush {
                        return Err(unexpected(&frame));
                    }
                    let mut state = self.post.state.lock().expect("nobody panics inside");
                    state.settled = true;
                    self.post.changed.notify_all();
                }
                _ => return Err(unexpected(&frame)),
            }
        }
        Ok(())
    }

    /// First every page that was asked for, each alone in its frame; then, if nothing new has come
    /// in, what lies behind them.
    fn answer(&mut self) -> Result<(), StreamError> {
        let asked = std::mem::take(&mut self.asked);
        for id in &asked {
            if self.post.unsent.take(*id) {
                self.send(&[*id], ANSWER)?;
            }
        }
        if let Some(last) = asked.last() {
            self.post
                .order
                .lock()
                .expect("nobody panics inside")
                .fault(*last);
        }
        for id in &asked {
            if self.channel.fill()? {
                self.take_frames()?;
                if !self.asked.is_empty() {
                    break;
                }
            }
            let near = self.neighbours(*id);
            self.send(&near, 0)?;
        }
        Ok(())
    }

    fn neighbours(&self, id: PageId) -> Vec<PageId> {
        let mut near = Vec::with_capacity(NEIGHBOURS);
        let mut at = id;
        while near.len() < NEIGHBOURS {
            let Some(next) = self.post.unsent.next_at_or_after(at) else {
                break;
            };
            if next.block != id.block || next.page - id.page > NEAR {
                break;
            }
            if self.post.unsent.take(next) {
                near.push(next);
            }
            at.page = next.page + 1;
        }
        near
    }

    fn send(&mut self, pages: &[PageId], flags: u8) -> Result<(), StreamError> {
        let Some(first) = pages.first() else {
            return Ok(());
        };
        let mut zeros: Vec<Run> = Vec::new();
        self.batch.read(&self.shared.memory(), pages, &mut zeros)?;
        let counters = &self.shared.counters;
        let kept = self.batch.kept();
        counters.add_zero_pages(pages.len() - kept);
        counters.done(pages.len());
        let mut head = Head {
            flags,
            block: first.block,
            ..Head::of(Kind::Zero, 0)
        };
        if !zeros.is_empty() {
            self.channel.send(head, &zeros, &[])?;
            counters.add_zero_frame(crate::frame::HEADER + zeros.len() * crate::frame::RUN);
        }
        if kept > 0 {
            head.kind = Kind::Pages;
            head.sequence = self.channel.next_sequence();
            let tried = Choice::for_urgent(self.shared.link_ns());
            let (built, encoding, _) = self.batch.seal(head, tried);
            let length = built.len();
            self.channel.send_built(built)?;
            counters.add_pages(kept, length, encoding);
            self.shared.rate.book(length);
        }
        self.channel.flush().map(drop)
    }

    fn end(&mut self) -> Result<(), StreamError> {
        let sequence = self.channel.next_sequence();
        self.channel.send(Head::of(Kind::End, 0), &[], &[])?;
        self.channel.flush()?;
        loop {
            let frame = self.channel.read(crate::channel::Patience::Progress)?;
            match frame.header.kind {
                // Asked for before the end arrived there; it has all pages, so it is served.
                Kind::Request => {}
                Kind::Ack if self.channel.body(&frame) == sequence.to_be_bytes() => return Ok(()),
                _ => return Err(unexpected(&frame)),
            }
        }
    }
}
