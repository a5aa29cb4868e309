//! The fault service: the thread of the urgent stream at the destination.
//!
//! It polls the userfaultfd and the urgent stream together. It never waits for one page while
//! others could be served: what the kernel wants tried again is kept and tried after the messages
//! are read. Nothing here depends on the guest's process answering anything: that may itself be
//! waiting for a page.

use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use ferry_pages::PageSet;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::StreamError;
use crate::bits::AtomicPages;
use crate::channel::{Channel, unexpected};
use crate::codec::Decoder;
use crate::demand::{Deferred, Demand};
use crate::frame::{ANSWER, Frame, Head, Kind, Run};
use crate::receiver::Inside;
use crate::socket::{SILENCE, hurry_this_thread, timespec};
use crate::stats::By;

/// A page that has to be tried again is, after this long.
const RETRY: Duration = Duration::from_micros(200);

/// The thread's state.
pub struct Faults<'a> {
    inside: &'a Inside,
    /// Until the stream has ended.
    channel: Option<Channel>,
    missing: PageSet,
    /// The whole set has come, and waits for `serve_faults`.
    complete: bool,
    requested: AtomicPages,
    deferred: Vec<Deferred>,
    /// Flushes to be answered once nothing is deferred.
    flushes: Vec<Frame>,
}

/// What a poll found.
struct Ready {
    socket: bool,
    faults: bool,
}

impl<'a> Faults<'a> {
    /// Over the urgent stream.
    pub fn new(inside: &'a Inside, channel: Channel) -> Self {
        let shape = inside.memory.shape();
        Self {
            inside,
            channel: Some(channel),
            missing: PageSet::new(shape),
            complete: false,
            requested: AtomicPages::new(shape),
            deferred: Vec::new(),
            flushes: Vec::new(),
        }
    }

    /// Serves until the receiver goes away, or nothing is left to serve.
    pub fn run(mut self) {
        hurry_this_thread();
        self.serve();
        if let Some(demand) = self.inside.demand.get() {
            demand.leave();
        }
        self.inside.released(Err(StreamError::Refused(
            "the fault service has ended".into(),
        )));
    }

    fn serve(&mut self) {
        let mut decoder = match Decoder::new() {
            Ok(decoder) => decoder,
            Err(error) => return self.inside.fail(error),
        };
        loop {
            if self.inside.dropped.load(SeqCst) {
                return;
            }
            // A broken stream does not end the local part: whoever gives pages back waits until
            // its message is read.
            if let Err(error) = self.step(&mut decoder) {
                // First the cause, then the close: it makes the other streams fail as well.
                let local = matches!(error, StreamError::Refused(_));
                self.inside.fail(error);
                self.channel = None;
                if local {
                    return;
                }
            }
            let trapped = self
                .inside
                .demand
                .get()
                .is_some_and(|d| d.descriptor().is_some());
            let pending = self
                .inside
                .trap
                .lock()
                .expect("nobody panics inside")
                .is_some();
            if self.channel.is_none() && !trapped && !pending {
                return;
            }
        }
    }

    fn step(&mut self, decoder: &mut Decoder) -> Result<(), StreamError> {
        let ready = self.poll()?;
        if self.inside.releasing.swap(false, SeqCst)
            && let Some(demand) = self.inside.demand.get()
        {
            self.inside.released(demand.release());
        }
        if ready.faults
            && let Some(demand) = self.inside.demand.get()
        {
            self.take_faults(demand)?;
        }
        if ready.socket {
            self.take_frames(decoder)?;
        }
        if self.complete && self.inside.demand.get().is_none() {
            self.arm()?;
        }
        if let Some(demand) = self.inside.demand.get() {
            demand.retry(&mut self.deferred)?;
        }
        if let Some(channel) = &mut self.channel {
            if self.deferred.is_empty() {
                for flush in self.flushes.drain(..) {
                    channel.send_ack(&flush)?;
                }
            }
            channel.try_flush()?;
        }
        Ok(())
    }

    fn poll(&self) -> Result<Ready, StreamError> {
        let demand = self.inside.demand.get();
        let mut set = vec![PollFd::new(&self.inside.wake, PollFlags::IN)];
        if let Some(channel) = &self.channel {
            let out = if channel.queued() > 0 {
                PollFlags::OUT
            } else {
                PollFlags::empty()
            };
            set.push(channel.socket().poll_for(PollFlags::IN | out));
        }
        let trapped = demand.and_then(Demand::descriptor);
        if let Some(descriptor) = trapped {
            // SAFETY: only `release` closes it, which this thread calls between two polls.
            let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
            set.push(PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
        }
        let longest = demand.and_then(Demand::longest_wait);
        let longest = longest.filter(|_| self.channel.is_some());
        if longest.is_some_and(|longest| longest > SILENCE) {
            return Err(StreamError::closed(format!(
                "the source has not sent a requested page for {} s",
                SILENCE.as_secs()
            )));
        }
        let limit = if self.deferred.is_empty() {
            longest.map(|_| SILENCE / 4)
        } else {
            Some(RETRY)
        };
        match rustix::event::poll(&mut set, limit.map(timespec).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(StreamError::closed(format!("poll: {errno}"))),
        }
        let mut ready = set.iter().map(|polled| !polled.revents().is_empty());
        if ready.next() == Some(true) {
            let _ = rustix::io::read(&self.inside.wake, &mut [0_u8; 8]);
        }
        Ok(Ready {
            socket: self.channel.is_some() && ready.next() == Some(true),
            faults: trapped.is_some() && ready.next() == Some(true),
        })
    }

    fn take_faults(&mut self, demand: &Demand) -> Result<(), StreamError> {
        let mut faults = Vec::new();
        demand.read_messages(&mut faults, &mut self.deferred)?;
        for id in faults {
            if !demand.fault(id, &mut self.deferred)? || !self.requested.put(id) {
                continue;
            }
            let Some(channel) = &mut self.channel else {
                continue;
            };
            let head = Head {
                block: id.block,
                ..Head::of(Kind::Request, 0)
            };
            let run = Run {
                start: id.page,
                count: 1,
            };
            channel.send(head, &[run], &[])?;
        }
        // At once, before the pages that may have come meanwhile are installed.
        if let Some(channel) = &mut self.channel {
            channel.try_flush()?;
        }
        Ok(())
    }

    fn take_frames(&mut self, decoder: &mut Decoder) -> Result<(), StreamError> {
        let Some(mut channel) = self.channel.take() else {
            return Ok(());
        };
        let result = self.take_frames_of(&mut channel, decoder);
        if result != Ok(true) {
            self.channel = Some(channel);
        }
        result.map(drop)
    }

    /// True at the stream's end.
    fn take_frames_of(
        &mut self,
        channel: &mut Channel,
        decoder: &mut Decoder,
    ) -> Result<bool, StreamError> {
        channel.fill()?;
        while let Some(frame) = channel.next_frame()? {
            self.take_frame(channel, &frame, decoder)?;
            if frame.header.kind == Kind::End {
                channel.flush()?;
                self.inside.ended();
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn take_frame(
        &mut self,
        channel: &mut Channel,
        frame: &Frame,
        decoder: &mut Decoder,
    ) -> Result<(), StreamError> {
        let block = frame.header.block;
        let by = if frame.header.flags & ANSWER != 0 {
            By::Answer
        } else {
            By::Push
        };
        match (frame.header.kind, self.inside.demand.get()) {
            (Kind::Pages | Kind::Zero, Some(demand)) => {
                self.inside.check(frame)?;
                if !demand.covers(block) {
                    return Err(unexpected(frame));
                }
                let data = match frame.header.kind {
                    Kind::Pages => {
                        let body = channel.body(frame);
                        Some(decoder.decode(frame.header.encoding, body, frame.pages())?)
                    }
                    _ => None,
                };
                demand.install_or_defer(block, &frame.runs, data, by, &mut self.deferred)
            }
            (Kind::Missing, None) if !self.complete => {
                if frame.runs.is_empty() {
                    self.complete = true;
                    return Ok(());
                }
                self.inside.check(frame)?;
                for run in &frame.runs {
                    self.missing.insert_range(block, run.start, run.stop());
                }
                Ok(())
            }
            (Kind::Flush, _) => {
                self.flushes.push(frame.clone());
                Ok(())
            }
            (Kind::End, demand) => match demand.map_or(0, Demand::missing) {
                0 => channel.send_ack(frame),
                missing => Err(StreamError::closed(format!(
                    "the source ended the streams while {missing} pages were missing"
                ))),
            },
            _ => Err(unexpected(frame)),
        }
    }

    /// Traps accesses to the missing pages, as soon as both the set and the userfaultfd are here.
    fn arm(&mut self) -> Result<(), StreamError> {
        let trap = self
            .inside
            .trap
            .lock()
            .expect("nobody panics inside")
            .take();
        let Some(trap) = trap else {
            return Ok(());
        };
        let missing = std::mem::replace(&mut self.missing, PageSet::new(&[]));
        let demand = Demand::arm(self.inside.memory.clone(), trap, &missing)?;
        if self.inside.demand.set(demand).is_err() {
            unreachable!("armed once");
        }
        if let Some(channel) = &mut self.channel {
            channel.send(Head::of(Kind::Armed, 0), &[], &[])?;
        }
        Ok(())
    }
}
