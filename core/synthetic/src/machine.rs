//! The guest itself: memory, and threads that rewrite it and check it first.
//!
//! What each page of the area must hold is kept outside of the memory, in the device state: so a
//! page that arrives stale, torn or not at all is found by the next thread that comes by it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::memory::Block;
use crate::options::Options;
use crate::pattern::{PAGE, Pattern, Random};

const ROM_LENGTH: usize = 64 << 10;
/// Pages of the rom that hold something, as firmware does; the others are never touched.
const ROM_PAGES: u64 = 12;
/// Page number under which rom pages are filled, far from any of the RAM.
const ROM_NUMBER: u64 = 1 << 40;
/// CORRUPT lines printed by a process; all are counted.
const REPORTED_MAX: u64 = 50;

/// What a vCPU keeps between two pages; all but the thread travels in the device state.
#[derive(Default)]
pub struct Vcpu {
    /// Its thread's id, 0 until it has started.
    pub thread: AtomicU32,
    pub random: AtomicU64,
    pub writes: AtomicU64,
    pub checked: AtomicU64,
    pub corrupt: AtomicU64,
}

/// Counters of the self-check.
#[derive(Clone, Copy, Debug, Default)]
pub struct Check {
    pub writes: u64,
    pub checked: u64,
    pub corrupt: u64,
}

/// Memory and vCPUs.
pub struct Machine {
    pub ram: Block,
    pub rom: Block,
    pub pattern: Pattern,
    /// Pages from the start of RAM that are written; the rest is never touched.
    pub area_pages: u64,
    pub generations: Vec<AtomicU32>,
    pub vcpus: Vec<Vcpu>,
    rate: u64,
    gate: Gate,
}

impl Machine {
    /// Maps the memory, fills it unless the machine comes in from elsewhere, and starts the
    /// threads, stopped.
    pub fn start(options: &Options) -> io::Result<Arc<Self>> {
        let length = (options.memory_mib as usize) << 20;
        let area_pages = (options.area_mib << 20) / PAGE as u64;
        let machine = Arc::new(Self {
            ram: Block::map("synthetic.ram", 0, length, false)?,
            rom: Block::map("synthetic.rom", length, ROM_LENGTH, true)?,
            pattern: options.pattern,
            area_pages,
            generations: (0..area_pages).map(|_| AtomicU32::new(0)).collect(),
            vcpus: (0..options.vcpus).map(|_| Vcpu::default()).collect(),
            rate: options.rate,
            gate: Gate::new(options.vcpus),
        });
        let mut seeds = Random(options.seed);
        for vcpu in &machine.vcpus {
            vcpu.random.store(seeds.next(), Relaxed);
        }
        if !options.incoming {
            machine.populate();
        }
        for index in 0..options.vcpus {
            let machine = Arc::clone(&machine);
            thread::Builder::new()
                .name(format!("CPU {index}/synth"))
                .spawn(move || machine.run(index))?;
        }
        machine.gate.stop();
        Ok(machine)
    }

    fn populate(&self) {
        for page in 0..self.area_pages {
            self.generations[page as usize].store(1, Relaxed);
            // SAFETY: the threads have not been started.
            self.pattern.fill(page, 1, unsafe { self.ram.page(page) });
        }
        for page in 0..ROM_PAGES {
            // SAFETY: as above.
            Pattern::Text.fill(ROM_NUMBER + page, 1, unsafe { self.rom.page(page) });
        }
    }

    /// Lets the vCPUs run.
    pub fn resume(&self) {
        self.gate.start();
    }

    /// Halts the vCPUs, each between two pages. Blocks while one waits for a missing page.
    pub fn pause(&self) {
        self.gate.stop();
    }

    /// Sums over the vCPUs.
    pub fn check(&self) -> Check {
        self.vcpus.iter().fold(Check::default(), |sum, vcpu| Check {
            writes: sum.writes + vcpu.writes.load(Relaxed),
            checked: sum.checked + vcpu.checked.load(Relaxed),
            corrupt: sum.corrupt + vcpu.corrupt.load(Relaxed),
        })
    }

    /// Compares every page of the area and of the rom, with the vCPUs halted: (compared, differing).
    pub fn sweep(&self) -> (u64, u64) {
        let was_running = self.gate.is_running();
        self.gate.stop();
        let mut expected = [0; PAGE];
        let in_area = (0..self.area_pages)
            .filter(|&p| !self.matches(p, &mut expected))
            .count();
        let in_rom = (0..ROM_PAGES)
            .filter(|&p| !self.rom_matches(p, &mut expected))
            .count();
        if was_running {
            self.gate.start();
        }
        (self.area_pages + ROM_PAGES, (in_area + in_rom) as u64)
    }

    /// Reads page 0 on behalf of a device, as a load of virtio reads its rings from guest memory.
    pub fn read_ring(&self) {
        let mut expected = [0; PAGE];
        if !self.matches(0, &mut expected) {
            self.vcpus[0].corrupt.fetch_add(1, Relaxed);
        }
    }

    fn run(&self, index: usize) {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        self.vcpus[index]
            .thread
            .store(thread.unsigned_abs(), Relaxed);
        let mut expected = [0; PAGE];
        let interval = match self.rate {
            0 => None,
            rate => Some(Duration::from_secs_f64(
                (PAGE * self.vcpus.len()) as f64 / rate as f64,
            )),
        };
        let mut due = Instant::now();
        loop {
            self.gate.pass();
            let Some(interval) = interval else {
                self.gate.sleep(Duration::MAX);
                continue;
            };
            let now = Instant::now();
            if due > now + Duration::from_millis(1) {
                self.gate.sleep(due - now);
                continue;
            }
            // After a halt, or where the machine cannot keep up, the lost time is not made up for.
            due = due.max(now.checked_sub(Duration::from_millis(20)).unwrap_or(now)) + interval;
            self.step(index, &mut expected);
        }
    }

    /// Checks a random page of this vCPU's share and rewrites it.
    fn step(&self, index: usize, expected: &mut [u8; PAGE]) {
        let vcpu = &self.vcpus[index];
        let mut random = Random(vcpu.random.load(Relaxed));
        let draw = random.next();
        vcpu.random.store(random.0, Relaxed);
        let count = self.vcpus.len() as u64;
        let share = (self.area_pages - index as u64).div_ceil(count);
        let page = draw % share * count + index as u64;
        if !self.matches(page, expected) {
            vcpu.corrupt.fetch_add(1, Relaxed);
        }
        if draw >> 56 == 0 && !self.rom_matches(draw >> 8 & 0xff, expected) {
            vcpu.corrupt.fetch_add(1, Relaxed);
        }
        vcpu.checked.fetch_add(1, Relaxed);
        let generation = &self.generations[page as usize];
        let next = generation.load(Relaxed).wrapping_add(1).max(1);
        // SAFETY: a page belongs to the vCPU whose index it has modulo their number; the main
        // thread looks at it only while all are halted.
        self.pattern
            .fill(page, next, unsafe { self.ram.page(page) });
        generation.store(next, Relaxed);
        vcpu.writes.fetch_add(1, Relaxed);
    }

    fn matches(&self, page: u64, expected: &mut [u8; PAGE]) -> bool {
        let generation = self.generations[page as usize].load(Relaxed);
        self.pattern.fill(page, generation, expected);
        // SAFETY: as in `step`.
        compare("page", page, generation, expected, unsafe {
            self.ram.page(page)
        })
    }

    fn rom_matches(&self, page: u64, expected: &mut [u8; PAGE]) -> bool {
        let page = page % ROM_PAGES;
        Pattern::Text.fill(ROM_NUMBER + page, 1, expected);
        // SAFETY: nobody writes the rom once the threads run.
        compare("rom page", page, 1, expected, unsafe {
            self.rom.page(page)
        })
    }
}

fn compare(
    what: &str,
    page: u64,
    generation: u32,
    expected: &[u8; PAGE],
    found: &[u8; PAGE],
) -> bool {
    static REPORTED: AtomicU64 = AtomicU64::new(0);
    if expected == found {
        return true;
    }
    if REPORTED.fetch_add(1, Relaxed) < REPORTED_MAX {
        let at = expected
            .iter()
            .zip(found)
            .position(|(a, b)| a != b)
            .unwrap_or_default();
        let zero = if found.iter().all(|&b| b == 0) {
            ", found zeros"
        } else {
            ""
        };
        let number = u64::from_le_bytes(std::array::from_fn(|i| found[i]));
        let its = u32::from_le_bytes(std::array::from_fn(|i| found[8 + i]));
        eprintln!(
            "CORRUPT {what} {page} generation {generation}: differs from byte {at}{zero} \
             (it says page {number} generation {its})"
        );
    }
    false
}

/// Where the vCPUs halt.
struct Gate {
    threads: usize,
    state: Mutex<GateState>,
    changed: Condvar,
    open: AtomicBool,
}

struct GateState {
    open: bool,
    halted: usize,
}

impl Gate {
    fn new(threads: usize) -> Self {
        Self {
            threads,
            state: Mutex::new(GateState {
                open: false,
                halted: 0,
            }),
            changed: Condvar::new(),
            open: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_running(&self) -> bool {
        self.open.load(Relaxed)
    }

    fn start(&self) {
        self.lock().open = true;
        self.open.store(true, Relaxed);
        self.changed.notify_all();
    }

    /// Returns when every thread has come to `pass` and waits there.
    fn stop(&self) {
        let mut state = self.lock();
        state.open = false;
        self.open.store(false, Relaxed);
        self.changed.notify_all();
        while state.halted < self.threads {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn pass(&self) {
        if self.is_running() {
            return;
        }
        let mut state = self.lock();
        state.halted += 1;
        self.changed.notify_all();
        while !state.open {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.halted -= 1;
    }

    /// Sleeps that long, or until the gate closes.
    fn sleep(&self, time: Duration) {
        let state = self.lock();
        let asleep = self
            .changed
            .wait_timeout_while(state, time, |state| state.open);
        drop(asleep.unwrap_or_else(PoisonError::into_inner));
    }
}
