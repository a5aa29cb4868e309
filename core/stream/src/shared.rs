//! What all threads of a sender have in common.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, RwLock};

use ferry_pages::Memory;

use crate::StreamError;
use crate::frame::Encoding;
use crate::rate::Rate;
use crate::socket::Socket;

/// Counters that may be read at any time.
#[derive(Debug, Default)]
pub struct Counters {
    /// Pages sent, duplicates and zero pages included.
    pub pages: AtomicU64,
    /// Of them zero.
    pub zero_pages: AtomicU64,
    /// Bytes of pages before encoding, zero pages included.
    pub payload_bytes: AtomicU64,
    /// Bytes of frames.
    pub wire_bytes: AtomicU64,
    /// Pages of the running push or pull not sent yet.
    pub remaining: AtomicU64,
    /// Wire bytes of pages by encoding: raw, lz4, zstd, zero.
    pub by_encoding: [AtomicU64; 4],
}

/// Index of zero runs in `by_encoding`.
pub const ZERO: usize = 3;

/// A reading of the counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// See `Counters`.
    pub pages: u64,
    /// See `Counters`.
    pub zero_pages: u64,
    /// See `Counters`.
    pub payload_bytes: u64,
    /// See `Counters`.
    pub wire_bytes: u64,
    /// See `Counters`.
    pub remaining: u64,
    /// See `Counters`.
    pub by_encoding: [u64; 4],
}

impl Counters {
    /// Adds a frame of pages.
    pub fn add_pages(&self, pages: usize, frame: usize, encoding: Encoding) {
        self.pages.fetch_add(pages as u64, Relaxed);
        self.payload_bytes
            .fetch_add((pages * ferry_pages::PAGE_SIZE) as u64, Relaxed);
        self.wire_bytes.fetch_add(frame as u64, Relaxed);
        self.by_encoding[encoding as usize].fetch_add(frame as u64, Relaxed);
    }

    /// Adds a frame of zero runs.
    pub fn add_zero_frame(&self, frame: usize) {
        self.wire_bytes.fetch_add(frame as u64, Relaxed);
        self.by_encoding[ZERO].fetch_add(frame as u64, Relaxed);
    }

    /// Adds zero pages.
    pub fn add_zero_pages(&self, pages: usize) {
        self.pages.fetch_add(pages as u64, Relaxed);
        self.zero_pages.fetch_add(pages as u64, Relaxed);
        self.payload_bytes
            .fetch_add((pages * ferry_pages::PAGE_SIZE) as u64, Relaxed);
    }

    /// Pages of the running push were sent.
    pub fn done(&self, pages: usize) {
        self.remaining.fetch_sub(pages as u64, Relaxed);
    }

    /// Reads them.
    pub fn read(&self) -> Progress {
        Progress {
            pages: self.pages.load(Relaxed),
            zero_pages: self.zero_pages.load(Relaxed),
            payload_bytes: self.payload_bytes.load(Relaxed),
            wire_bytes: self.wire_bytes.load(Relaxed),
            remaining: self.remaining.load(Relaxed),
            by_encoding: [0, 1, 2, 3].map(|at: usize| self.by_encoding[at].load(Relaxed)),
        }
    }
}

/// Common to all threads of a sender.
pub struct Shared {
    memory: RwLock<Arc<Memory>>,
    /// Counters.
    pub counters: Counters,
    /// Cap over all streams.
    pub rate: Rate,
    /// Picoseconds that a byte takes on the link, over all bulk streams together; 0 where the
    /// link is not what limits.
    pub link: AtomicU64,
    sockets: Vec<Socket>,
    cancelled: AtomicBool,
    failure: Mutex<Option<StreamError>>,
}

impl Shared {
    /// Before anything was sent.
    pub fn new(memory: Arc<Memory>, sockets: Vec<Socket>) -> Self {
        Self {
            memory: RwLock::new(memory),
            counters: Counters::default(),
            rate: Rate::default(),
            link: AtomicU64::new(0),
            sockets,
            cancelled: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    /// Where pages are read.
    pub fn memory(&self) -> Arc<Memory> {
        self.memory.read().expect("nobody panics inside").clone()
    }

    /// Where pages are read from now on.
    pub fn set_memory(&self, memory: Arc<Memory>) {
        *self.memory.write().expect("nobody panics inside") = memory;
    }

    /// Nanoseconds a byte on the link.
    pub fn link_ns(&self) -> f64 {
        self.link.load(Relaxed) as f64 / 1000.0
    }

    /// Why nothing can be sent any more, if so.
    pub fn check(&self) -> Result<(), StreamError> {
        if self.cancelled.load(SeqCst) {
            return Err(StreamError::Cancelled);
        }
        match &*self.failure.lock().expect("nobody panics inside") {
            Some(error) => Err(error.clone()),
            None => Ok(()),
        }
    }

    /// Breaks all streams off, so that every thread stops; returns the first failure, which is
    /// the cause of the others.
    pub fn fail(&self, error: StreamError) -> StreamError {
        let first = {
            let mut failure = self.failure.lock().expect("nobody panics inside");
            failure.get_or_insert(error).clone()
        };
        self.break_off();
        if self.cancelled.load(SeqCst) {
            return StreamError::Cancelled;
        }
        first
    }

    /// Makes running and later calls fail with `Cancelled`.
    pub fn cancel(&self) {
        self.cancelled.store(true, SeqCst);
        self.break_off();
    }

    fn break_off(&self) {
        self.rate.open();
        self.sockets.iter().for_each(Socket::break_off);
    }
}
