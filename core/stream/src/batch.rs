//! A bulk stream at the source: pages are copied out, looked at, encoded and sent.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use ferry_pages::{Memory, PAGE_SIZE, PageId, is_zero};

use crate::StreamError;
use crate::answers::Post;
use crate::channel::Channel;
use crate::codec::{Choice, Encoder, Sample};
use crate::frame::{self, Encoding, HEADER, Head, Kind, MAX_PAGES, MAX_RUNS, RUN, Run, push_run};
use crate::shared::Shared;

/// Where the body lies in the buffer, so that any table fits in front of it without a copy.
const BODY: usize = HEADER + MAX_PAGES * RUN;
/// Bytes that are given to the socket at once, unless somebody waits.
const WRITE: usize = 256 << 10;

/// Copied-out pages and what it takes to encode them.
pub struct Batch {
    buffer: Vec<u8>,
    encoded: Vec<u8>,
    encoder: Encoder,
    runs: Vec<Run>,
    kept: usize,
}

impl Batch {
    /// Room for `MAX_PAGES`.
    pub fn new() -> Result<Self, StreamError> {
        Ok(Self {
            buffer: vec![0; BODY + MAX_PAGES * PAGE_SIZE],
            encoded: vec![0; BODY + MAX_PAGES * PAGE_SIZE],
            encoder: Encoder::new()?,
            runs: Vec::with_capacity(MAX_PAGES),
            kept: 0,
        })
    }

    /// Copies pages of one block out; those of zeros go to `zeros`, the others are kept.
    pub fn read(
        &mut self,
        memory: &Memory,
        pages: &[PageId],
        zeros: &mut Vec<Run>,
    ) -> Result<(), StreamError> {
        let length = pages.len() * PAGE_SIZE;
        memory.read_pages(pages, &mut self.buffer[BODY..BODY + length])?;
        self.runs.clear();
        self.kept = 0;
        for (at, id) in pages.iter().enumerate() {
            let from = BODY + at * PAGE_SIZE;
            if is_zero(&self.buffer[from..from + PAGE_SIZE]) {
                push_run(zeros, id.page);
                continue;
            }
            if self.kept < at {
                let to = BODY + self.kept * PAGE_SIZE;
                self.buffer.copy_within(from..from + PAGE_SIZE, to);
            }
            push_run(&mut self.runs, id.page);
            self.kept += 1;
        }
        Ok(())
    }

    /// Pages kept by the last `read`.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// The frame of the kept pages, how it is encoded, and how long the encoder took.
    pub fn seal(&mut self, head: Head, tried: Encoding) -> (&[u8], Encoding, Duration) {
        let raw = BODY + self.kept * PAGE_SIZE;
        let start = processor_time();
        let encoded = self.encoder.encode(tried, &self.buffer[BODY..raw]);
        let length = encoded.map(|encoded| {
            self.encoded[BODY..BODY + encoded.len()].copy_from_slice(encoded);
            encoded.len()
        });
        let took = processor_time().saturating_sub(start);
        let (buffer, end, encoding) = match length {
            Some(length) => (&mut self.encoded, BODY + length, tried),
            None => (&mut self.buffer, raw, Encoding::Raw),
        };
        let frame = &mut buffer[BODY - HEADER - self.runs.len() * RUN..end];
        frame::seal(frame, Head { encoding, ..head }, &self.runs);
        (frame, encoding, took)
    }
}

/// One bulk stream.
pub struct Bulk {
    channel: Channel,
    batch: Batch,
    choice: Choice,
    /// Zero pages not yet sent, all of one block.
    zeros: Vec<Run>,
    zero_block: u16,
    /// Something was sent after the last `settle`.
    open: bool,
}

/// Of this thread.
fn processor_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec as u32)
}

impl Bulk {
    /// Over a connected stream.
    pub fn new(channel: Channel) -> Result<Self, StreamError> {
        Ok(Self {
            channel,
            batch: Batch::new()?,
            choice: Choice::default(),
            zeros: Vec::new(),
            zero_block: 0,
            open: false,
        })
    }

    /// Nanoseconds a byte on this stream's share of the link.
    pub fn link(&self) -> f64 {
        self.choice.link()
    }

    /// Bounds what lies in the kernel between the two ends.
    pub fn limit_in_flight(&self, bytes: usize) {
        // The kernel doubles the number for its own bookkeeping, which takes less than that.
        self.channel.socket().limit_send_buffer(bytes * 3 / 5);
    }

    /// Sends up to `MAX_PAGES` pages of one block. Beside a guest that waits for pages (`beside`)
    /// nothing is held back to make larger writes, and each piece of a write gives way to it.
    pub fn send(
        &mut self,
        shared: &Shared,
        pages: &[PageId],
        beside: Option<(&Post, usize, Duration)>,
    ) -> Result<(), StreamError> {
        let Some(first) = pages.first() else {
            return Ok(());
        };
        let (start, busy) = (Instant::now(), processor_time());
        let queue = self.channel.unacknowledged();
        self.open = true;
        if self.zero_block != first.block || self.zeros.len() + pages.len() > MAX_RUNS {
            self.send_zeros(shared)?;
            self.zero_block = first.block;
        }
        self.batch.read(&shared.memory(), pages, &mut self.zeros)?;
        let kept = self.batch.kept();
        shared.counters.add_zero_pages(pages.len() - kept);
        shared.counters.done(pages.len());
        if beside.is_some() {
            // Somebody may be waiting for one of them.
            self.send_zeros(shared)?;
        }
        if kept == 0 {
            return if beside.is_some() {
                self.channel.flush().map(drop)
            } else {
                Ok(())
            };
        }
        let tried = self.choice.next();
        let head = Head {
            block: first.block,
            ..Head::of(Kind::Pages, self.channel.next_sequence())
        };
        let (built, encoding, encode_time) = self.batch.seal(head, tried);
        let length = built.len();
        let mut blocked = shared.rate.wait(length);
        self.channel.send_built(built)?;
        shared.counters.add_pages(kept, length, encoding);
        let mut gave_way = Duration::ZERO;
        if let Some((post, piece, quiet)) = beside {
            blocked += self
                .channel
                .flush_pieces(piece, || gave_way += post.give_way(quiet))?;
        } else if self.channel.queued() >= WRITE {
            blocked += self.channel.flush()?;
        }
        let encoded = if encoding == Encoding::Raw {
            kept * PAGE_SIZE
        } else {
            length
        };
        let queue_now = self.channel.unacknowledged();
        self.choice.learn(&Sample {
            tried,
            raw: kept * PAGE_SIZE,
            encoded,
            drained: encoded as i64 + queue - queue_now,
            queue: queue_now,
            encoding: encode_time,
            work: processor_time().saturating_sub(busy),
            blocked,
            total: start.elapsed().saturating_sub(gave_way),
        });
        Ok(())
    }

    fn send_zeros(&mut self, shared: &Shared) -> Result<(), StreamError> {
        if self.zeros.is_empty() {
            return Ok(());
        }
        let head = Head {
            block: self.zero_block,
            ..Head::of(Kind::Zero, 0)
        };
        self.channel.send(head, &self.zeros, &[])?;
        shared
            .counters
            .add_zero_frame(HEADER + self.zeros.len() * RUN);
        self.zeros.clear();
        Ok(())
    }

    /// Sends a list of runs of one block.
    pub fn send_runs(
        &mut self,
        shared: &Shared,
        kind: Kind,
        block: u16,
        runs: &[Run],
    ) -> Result<(), StreamError> {
        self.open = true;
        for part in runs.chunks(MAX_RUNS) {
            self.channel.send(
                Head {
                    block,
                    ..Head::of(kind, 0)
                },
                part,
                &[],
            )?;
            let length = HEADER + part.len() * RUN;
            shared.counters.wire_bytes.fetch_add(length as u64, Relaxed);
            self.channel.flush()?;
        }
        Ok(())
    }

    /// Waits until the destination has installed everything sent so far.
    pub fn settle(&mut self, shared: &Shared) -> Result<(), StreamError> {
        if self.open {
            self.send_zeros(shared)?;
            self.channel.settle(Kind::Flush)?;
            self.open = false;
        }
        Ok(())
    }

    /// Time that an ack takes when nothing is under way.
    pub fn round_trip(&mut self) -> Result<Duration, StreamError> {
        let start = Instant::now();
        self.channel.settle(Kind::Flush)?;
        Ok(start.elapsed())
    }

    /// Orderly end; the stream closes.
    pub fn end(mut self) -> Result<(), StreamError> {
        self.channel.settle(Kind::End)
    }
}
