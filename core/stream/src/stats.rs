//! How long the guest waited for pages.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use ferry_pages::PageId;

/// Latencies kept; those of a longer move are counted but no longer listed.
const LISTED: usize = 1 << 20;

/// What the fault service has seen.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FaultStats {
    /// Accesses that had to ask over the network.
    pub network_faults: u64,
    /// Accesses served by a page that was already under way when the fault came.
    pub served_under_way: u64,
    /// Accesses to pages known to be zero, served here.
    pub zero_faults: u64,
    /// From reading the fault to waking who waits.
    pub latency_us_p50: f64,
    /// As above.
    pub latency_us_p99: f64,
    /// As above.
    pub latency_us_max: f64,
    /// Wall time in which at least one access waited.
    pub stall_ms: f64,
    /// Pages that the guest gave back.
    pub discarded_pages: u64,
}

/// Accesses that wait, and those that have waited.
#[derive(Debug, Default)]
pub struct Waiting {
    pages: HashMap<PageId, Vec<Instant>>,
    since: Option<Instant>,
    stalled: Duration,
    longest_us: f32,
    latencies_us: Vec<f32>,
    counts: FaultStats,
}

/// Who brought a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// It was sent because it was asked for.
    Answer,
    /// It was under way anyway.
    Push,
    /// Known to be zero, without asking.
    Zero,
}

impl Waiting {
    /// Somebody waits for the page.
    pub fn add(&mut self, id: PageId) {
        let now = Instant::now();
        self.since.get_or_insert(now);
        self.pages.entry(id).or_default().push(now);
    }

    /// How long the longest of those who wait has waited.
    pub fn longest(&self) -> Option<Duration> {
        let first = self.pages.values().flatten().min()?;
        Some(first.elapsed())
    }

    /// Whether somebody waits for the page.
    pub fn contains(&self, id: PageId) -> bool {
        self.pages.contains_key(&id)
    }

    /// The page is there and its waiters are awake.
    pub fn done(&mut self, id: PageId, by: By) {
        let Some(waiters) = self.pages.remove(&id) else {
            return;
        };
        let count = waiters.len() as u64;
        match by {
            By::Answer => self.counts.network_faults += count,
            By::Push => self.counts.served_under_way += count,
            By::Zero => self.counts.zero_faults += count,
        }
        for start in waiters {
            let took = start.elapsed();
            if by == By::Zero {
                continue;
            }
            let took_us = took.as_secs_f32() * 1e6;
            self.longest_us = self.longest_us.max(took_us);
            if self.latencies_us.len() < LISTED {
                self.latencies_us.push(took_us);
            }
        }
        if self.pages.is_empty()
            && let Some(since) = self.since.take()
        {
            self.stalled += since.elapsed();
        }
    }

    /// Pages were given back.
    pub fn discarded(&mut self, pages: u64) {
        self.counts.discarded_pages += pages;
    }

    /// A reading; what waits now counts as stalled until now.
    pub fn read(&self) -> FaultStats {
        let mut sorted = self.latencies_us.clone();
        sorted.sort_unstable_by(f32::total_cmp);
        let at = |share: f64| match sorted.len() {
            0 => 0.0,
            n => f64::from(sorted[((n - 1) as f64 * share).round() as usize]),
        };
        let now = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        FaultStats {
            latency_us_p50: at(0.5),
            latency_us_p99: at(0.99),
            latency_us_max: f64::from(self.longest_us),
            stall_ms: (self.stalled + now).as_secs_f64() * 1e3,
            ..self.counts
        }
    }
}
