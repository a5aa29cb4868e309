//! Demand paging by userfaultfd, on our own memory.

use std::ptr::NonNull;
use std::thread;

use ferry_pages::{FaultEvent, InstallError, Mode, PAGE_SIZE, PagesError, Userfaultfd, features};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags, madvise, mmap_anonymous, munmap};

const PAGES: usize = 16;
const LENGTH: usize = PAGES * PAGE_SIZE;

/// Anonymous memory whose missing pages a userfaultfd traps.
struct Trapped {
    memory: NonNull<u8>,
    userfaultfd: Userfaultfd,
}

impl Trapped {
    fn new(flags: MapFlags) -> Self {
        // SAFETY: a fresh mapping of our own.
        let memory = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                LENGTH,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        };
        let memory = NonNull::new(memory.unwrap().cast()).unwrap();
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: only the mapping above is registered with it.
        let userfaultfd = Userfaultfd::from(unsafe { rustix::mm::userfaultfd(flags) }.unwrap());
        userfaultfd
            .enable(features::EVENT_REMOVE | features::MISSING_SHMEM)
            .unwrap();
        let this = Self {
            memory,
            userfaultfd,
        };
        let ioctls = this
            .userfaultfd
            .register(this.page(0), LENGTH as u64, Mode::MISSING)
            .unwrap();
        assert_ne!(ioctls & 1 << 3, 0, "UFFDIO_COPY is allowed");
        this
    }

    fn page(&self, page: usize) -> u64 {
        (self.memory.as_ptr() as usize + page * PAGE_SIZE) as u64
    }

    fn next_event(&self) -> FaultEvent {
        let mut events = Vec::new();
        let limit = Timespec {
            tv_sec: 30,
            tv_nsec: 0,
        };
        while events.is_empty() {
            let mut wanted = [PollFd::new(&self.userfaultfd, PollFlags::IN)];
            assert_eq!(
                poll(&mut wanted, Some(&limit)).unwrap(),
                1,
                "no event in 30 s"
            );
            self.userfaultfd.read_events(&mut events).unwrap();
        }
        assert_eq!(events.len(), 1);
        events[0]
    }

    /// Reads a byte of a page on another thread.
    fn read(&self, page: usize) -> thread::JoinHandle<u8> {
        let address = self.page(page) as usize;
        // SAFETY: the mapping is there until the end of the test, which joins this thread.
        thread::spawn(move || unsafe { (address as *const u8).read_volatile() })
    }
}

impl Drop for Trapped {
    fn drop(&mut self) {
        // SAFETY: nobody uses the mapping any more.
        unsafe { munmap(self.memory.as_ptr().cast(), LENGTH) }.unwrap();
    }
}

#[test]
fn a_missing_page_is_reported_installed_and_installed_once() {
    for flags in [MapFlags::PRIVATE, MapFlags::SHARED] {
        let trapped = Trapped::new(flags);
        let mut none = Vec::new();
        assert_eq!(trapped.userfaultfd.read_events(&mut none).unwrap(), 0);
        let reader = trapped.read(3);
        let fault = FaultEvent::Fault {
            address: trapped.page(3),
            write: false,
        };
        assert_eq!(trapped.next_event(), fault);
        let content = vec![7; 2 * PAGE_SIZE];
        trapped
            .userfaultfd
            .copy(trapped.page(3), &content[..PAGE_SIZE])
            .unwrap();
        assert_eq!(reader.join().unwrap(), 7);
        let again = trapped
            .userfaultfd
            .copy(trapped.page(3), &content[..PAGE_SIZE]);
        assert_eq!(again, Err(InstallError::Exists));
        let partly = trapped.userfaultfd.copy(trapped.page(2), &content);
        assert_eq!(
            partly,
            Err(InstallError::Again {
                done: PAGE_SIZE as u64
            })
        );
    }
}

#[test]
fn a_page_of_zeros_is_installed_without_a_copy() {
    let trapped = Trapped::new(MapFlags::PRIVATE);
    let reader = trapped.read(5);
    trapped.next_event();
    trapped
        .userfaultfd
        .zero(trapped.page(4), 2 * PAGE_SIZE as u64)
        .unwrap();
    assert_eq!(reader.join().unwrap(), 0);
    let again = trapped.userfaultfd.zero(trapped.page(5), PAGE_SIZE as u64);
    assert_eq!(again, Err(InstallError::Exists));
}

#[test]
fn a_wake_makes_the_access_anew() {
    let trapped = Trapped::new(MapFlags::PRIVATE);
    let reader = trapped.read(0);
    let fault = trapped.next_event();
    trapped
        .userfaultfd
        .wake(trapped.page(0), LENGTH as u64)
        .unwrap();
    assert_eq!(trapped.next_event(), fault);
    trapped
        .userfaultfd
        .unregister(trapped.page(0), LENGTH as u64)
        .unwrap();
    assert_eq!(reader.join().unwrap(), 0);
}

#[test]
fn pages_given_back_are_reported_and_block_copies_until_then() {
    let trapped = Trapped::new(MapFlags::PRIVATE);
    let content = vec![9; PAGE_SIZE];
    trapped.userfaultfd.copy(trapped.page(8), &content).unwrap();
    let start = trapped.page(8);
    // SAFETY: the mapping is there until the end of the test, which joins this thread.
    let giver = thread::spawn(move || unsafe {
        madvise(start as *mut _, 2 * PAGE_SIZE, Advice::LinuxDontNeed)
    });
    let mut wanted = [PollFd::new(&trapped.userfaultfd, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    assert_eq!(poll(&mut wanted, Some(&limit)).unwrap(), 1);
    let unread = trapped.userfaultfd.copy(trapped.page(9), &content);
    assert_eq!(unread, Err(InstallError::Again { done: 0 }));
    let end = start + 2 * PAGE_SIZE as u64;
    assert_eq!(trapped.next_event(), FaultEvent::Remove { start, end });
    giver.join().unwrap().unwrap();
    trapped.userfaultfd.copy(trapped.page(8), &content).unwrap();
}

#[test]
fn what_cannot_be_registered_says_so() {
    let trapped = Trapped::new(MapFlags::PRIVATE);
    let error = trapped
        .userfaultfd
        .register(0x1000, PAGE_SIZE as u64, Mode::MISSING);
    assert!(matches!(error, Err(PagesError::Kernel { .. })));
    let error = trapped.userfaultfd.enable(0);
    assert!(
        matches!(error, Err(PagesError::Kernel { .. })),
        "features are enabled once"
    );
}
