//! A cap over all streams of a sender together.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

/// What may be sent at once after a pause.
const BURST: Duration = Duration::from_millis(10);

/// A token bucket.
#[derive(Debug)]
pub struct Rate {
    bucket: Mutex<Bucket>,
    changed: Condvar,
}

#[derive(Debug)]
struct Bucket {
    /// Bytes a second; 0 for no cap.
    rate: u64,
    /// When all that has been let through is paid for.
    paid: Instant,
    opened: bool,
}

impl Default for Rate {
    fn default() -> Self {
        Self {
            bucket: Mutex::new(Bucket {
                rate: 0,
                paid: Instant::now(),
                opened: false,
            }),
            changed: Condvar::new(),
        }
    }
}

impl Rate {
    /// Sets the cap; who waits goes by it from now on.
    pub fn set(&self, bytes_per_second: u64) {
        let mut bucket = self.bucket.lock().expect("nobody panics inside");
        bucket.rate = bytes_per_second;
        bucket.paid = Instant::now();
        self.changed.notify_all();
    }

    /// Lets everybody through for good.
    pub fn open(&self) {
        self.bucket.lock().expect("nobody panics inside").opened = true;
        self.changed.notify_all();
    }

    /// Books bytes that nobody may hold up, such as the answer to a fault.
    pub fn book(&self, bytes: usize) {
        let mut bucket = self.bucket.lock().expect("nobody panics inside");
        bucket.book(bytes);
    }

    /// Waits until `bytes` may be sent; returns how long that was.
    pub fn wait(&self, bytes: usize) -> Duration {
        let start = Instant::now();
        let mut bucket = self.bucket.lock().expect("nobody panics inside");
        loop {
            let ahead = bucket.paid.saturating_duration_since(Instant::now());
            if bucket.rate == 0 || bucket.opened || ahead <= BURST {
                bucket.book(bytes);
                return start.elapsed();
            }
            let waited = self.changed.wait_timeout(bucket, ahead - BURST);
            bucket = waited.expect("nobody panics inside").0;
        }
    }
}

impl Bucket {
    fn book(&mut self, bytes: usize) {
        if self.rate > 0 {
            let cost = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            self.paid = self.paid.max(Instant::now()) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_let_through_never_exceeds_the_rate_and_the_burst() {
        let rate = Rate::default();
        rate.set(10_000_000);
        let start = Instant::now();
        let mut bytes = 0.0;
        while start.elapsed() < Duration::from_millis(100) {
            rate.wait(50_000);
            bytes += 50_000.0;
            let allowed = (start.elapsed() + BURST).as_secs_f64() * 1e7;
            assert!(bytes <= allowed + 50_000.0, "{bytes} of {allowed}");
        }
    }

    #[test]
    fn opening_lets_everybody_go() {
        let rate = Rate::default();
        rate.set(1);
        rate.book(1_000_000);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| rate.wait(1));
            rate.open();
            waiter.join().unwrap();
        });
    }
}
