//! The userfaultfd of another process, held by us.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, UFFD_PAGEFAULT_FLAG_WRITE, uffd_msg,
    uffdio_api, uffdio_continue, uffdio_copy, uffdio_range, uffdio_register, uffdio_zeropage,
};
use linux_raw_sys::ioctl;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater};

use crate::PagesError;

/// Feature bits of `Userfaultfd::enable`, as in `linux/userfaultfd.h`.
pub mod features {
    use linux_raw_sys::general as raw;

    /// Write-protect faults.
    pub const WP: u64 = raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
    /// Messages when pages are given back (balloon).
    pub const EVENT_REMOVE: u64 = raw::UFFD_FEATURE_EVENT_REMOVE as u64;
    /// Missing pages of hugetlbfs mappings.
    pub const MISSING_HUGETLBFS: u64 = raw::UFFD_FEATURE_MISSING_HUGETLBFS as u64;
    /// Missing pages of shared memory.
    pub const MISSING_SHMEM: u64 = raw::UFFD_FEATURE_MISSING_SHMEM as u64;
    /// Minor faults of hugetlbfs mappings.
    pub const MINOR_HUGETLBFS: u64 = raw::UFFD_FEATURE_MINOR_HUGETLBFS as u64;
    /// Minor faults of shared memory: the page is in the file, not in the page table.
    pub const MINOR_SHMEM: u64 = raw::UFFD_FEATURE_MINOR_SHMEM as u64;
    /// Write-protection of hugetlbfs and shared memory.
    pub const WP_HUGETLBFS_SHMEM: u64 = raw::UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64;
    /// Write-protection of pages that were never touched.
    pub const WP_UNPOPULATED: u64 = raw::UFFD_FEATURE_WP_UNPOPULATED as u64;
    /// Write-protect faults resolved by the kernel itself, without a message.
    pub const WP_ASYNC: u64 = raw::UFFD_FEATURE_WP_ASYNC as u64;
}

/// What a registered range traps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode(u64);

impl Mode {
    /// Accesses to pages that are not there.
    pub const MISSING: Self = Self(1);
    /// Writes to write-protected pages.
    pub const WP: Self = Self(2);
    /// Accesses to pages that are in the file but not in the page table.
    pub const MINOR: Self = Self(4);

    /// Both of the two.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Why a page was not installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// A page is there already. Whoever waits for it still needs a `wake`.
    #[error("a page is there already")]
    Exists,
    /// Stopped early; `done` bytes are installed. With 0 a message waits to be read first: never
    /// try again on the thread that reads messages before it has read them.
    #[error("interrupted after {done} bytes")]
    Again {
        /// Bytes installed.
        done: u64,
    },
    /// The process has ended.
    #[error("the process is gone")]
    Gone,
    /// Anything else.
    #[error("{0}")]
    Other(Errno),
}

/// A message of the userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultEvent {
    /// Somebody waits for a page.
    Fault {
        /// Address of the access, rounded down to the page size of the mapping.
        address: u64,
        /// Whether it was a write.
        write: bool,
    },
    /// Pages were given back: they are holes now, and whoever gave them waited for this reading.
    Remove {
        /// First address.
        start: u64,
        /// First address after.
        end: u64,
    },
    /// A message of a feature that was not asked for.
    Other,
}

/// A userfaultfd. Dropping it closes our descriptor only.
#[derive(Debug)]
pub struct Userfaultfd {
    descriptor: OwnedFd,
}

impl From<OwnedFd> for Userfaultfd {
    fn from(descriptor: OwnedFd) -> Self {
        Self { descriptor }
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

const MESSAGES: usize = 64;
const MESSAGE_SIZE: usize = size_of::<uffd_msg>();

impl Userfaultfd {
    /// Enables features; once a userfaultfd, before anything else. Returns all that the kernel has.
    ///
    /// # Errors
    /// `EINVAL` where the kernel lacks one of them.
    pub fn enable(&self, features: u64) -> Result<u64, PagesError> {
        let mut api = uffdio_api {
            api: u64::from(UFFD_API),
            features,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_API reads and writes one uffdio_api.
        unsafe { self.update::<{ ioctl::UFFDIO_API }, _>(&mut api) }
            .map_err(|errno| PagesError::kernel("UFFDIO_API", errno))?;
        Ok(api.features)
    }

    /// Registers a range, and returns which ioctls it allows, a bit each.
    ///
    /// # Errors
    /// `EINVAL` where the mapping does not support the mode, `Gone`.
    pub fn register(&self, address: u64, length: u64, mode: Mode) -> Result<u64, PagesError> {
        let range = uffdio_range {
            start: address,
            len: length,
        };
        let mut register = uffdio_register {
            range,
            mode: mode.0,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER reads and writes one uffdio_register.
        unsafe { self.update::<{ ioctl::UFFDIO_REGISTER }, _>(&mut register) }.map_err(
            |errno| PagesError::kernel(format!("UFFDIO_REGISTER of {length} bytes"), errno),
        )?;
        Ok(register.ioctls)
    }

    /// Takes the registration of a range back; whoever waits in it goes on.
    ///
    /// # Errors
    /// `Kernel`.
    pub fn unregister(&self, address: u64, length: u64) -> Result<(), PagesError> {
        let range = uffdio_range {
            start: address,
            len: length,
        };
        // SAFETY: UFFDIO_UNREGISTER reads one uffdio_range.
        let call = unsafe { Setter::<{ ioctl::UFFDIO_UNREGISTER }, _>::new(range) };
        // SAFETY: as above; it touches the registrations of the other process only.
        unsafe { rustix::ioctl::ioctl(&self.descriptor, call) }
            .map_err(|errno| PagesError::kernel("UFFDIO_UNREGISTER", errno))
    }

    /// Installs whole pages at `destination`, atomically page by page, and wakes who waits.
    ///
    /// # Errors
    /// See `InstallError`.
    pub fn copy(&self, destination: u64, source: &[u8]) -> Result<(), InstallError> {
        let mut copy = uffdio_copy {
            dst: destination,
            src: source.as_ptr() as u64,
            len: source.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: UFFDIO_COPY reads and writes one uffdio_copy and reads `len` bytes of `source`.
        let result = unsafe { self.update::<{ ioctl::UFFDIO_COPY }, _>(&mut copy) };
        installed(result, copy.copy)
    }

    /// Installs pages of zeros, and wakes who waits. Not on hugetlbfs.
    ///
    /// # Errors
    /// See `InstallError`.
    pub fn zero(&self, destination: u64, length: u64) -> Result<(), InstallError> {
        let range = uffdio_range {
            start: destination,
            len: length,
        };
        let mut zero = uffdio_zeropage {
            range,
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: UFFDIO_ZEROPAGE reads and writes one uffdio_zeropage.
        let result = unsafe { self.update::<{ ioctl::UFFDIO_ZEROPAGE }, _>(&mut zero) };
        installed(result, zero.zeropage)
    }

    /// Maps pages that are in the file (registered with `Mode::MINOR`), and wakes who waits.
    ///
    /// # Errors
    /// See `InstallError`.
    pub fn continue_(&self, destination: u64, length: u64) -> Result<(), InstallError> {
        let range = uffdio_range {
            start: destination,
            len: length,
        };
        let mut proceed = uffdio_continue {
            range,
            mode: 0,
            mapped: 0,
        };
        // SAFETY: UFFDIO_CONTINUE reads and writes one uffdio_continue.
        let result = unsafe { self.update::<{ ioctl::UFFDIO_CONTINUE }, _>(&mut proceed) };
        installed(result, proceed.mapped)
    }

    /// Lets whoever waits in the range try its access again.
    ///
    /// # Errors
    /// `Kernel`.
    pub fn wake(&self, address: u64, length: u64) -> Result<(), PagesError> {
        let range = uffdio_range {
            start: address,
            len: length,
        };
        // SAFETY: UFFDIO_WAKE reads one uffdio_range.
        let call = unsafe { Setter::<{ ioctl::UFFDIO_WAKE }, _>::new(range) };
        // SAFETY: as above.
        unsafe { rustix::ioctl::ioctl(&self.descriptor, call) }
            .map_err(|errno| PagesError::kernel("UFFDIO_WAKE", errno))
    }

    /// Appends what messages there are, at most 64, without waiting; returns how many.
    /// The descriptor must be non-blocking, as injected ones are.
    ///
    /// # Errors
    /// `Kernel`.
    pub fn read_events(&self, events: &mut Vec<FaultEvent>) -> Result<usize, PagesError> {
        let mut buffer = [0_u8; MESSAGES * MESSAGE_SIZE];
        let length = match rustix::io::read(&self.descriptor, &mut buffer) {
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(errno) => return Err(PagesError::kernel("reading the userfaultfd", errno)),
        };
        events.extend(buffer[..length].chunks_exact(MESSAGE_SIZE).map(parse));
        Ok(length / MESSAGE_SIZE)
    }

    /// # Safety
    /// The ioctl must read and write one `Value`, and reach no other memory of ours than what
    /// `value` truly points at.
    unsafe fn update<const NUMBER: Opcode, Value>(&self, value: &mut Value) -> Result<(), Errno> {
        // SAFETY: the caller's.
        let call = unsafe { Updater::<NUMBER, Value>::new(value) };
        // SAFETY: the caller's.
        unsafe { rustix::ioctl::ioctl(&self.descriptor, call) }
    }
}

/// The kernel answers in the structure: bytes done when it stopped early, or the negative error.
fn installed(result: Result<(), Errno>, done: i64) -> Result<(), InstallError> {
    match result {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(InstallError::Exists),
        Err(Errno::AGAIN) => Err(InstallError::Again {
            done: u64::try_from(done).unwrap_or(0),
        }),
        Err(Errno::SRCH) => Err(InstallError::Gone),
        Err(errno) => Err(InstallError::Other(errno)),
    }
}

fn parse(bytes: &[u8]) -> FaultEvent {
    let word = |at: usize| {
        u64::from_ne_bytes(
            bytes[at..at + 8]
                .try_into()
                .expect("a message has 32 bytes"),
        )
    };
    match u32::from(bytes[0]) {
        UFFD_EVENT_PAGEFAULT => FaultEvent::Fault {
            address: word(16),
            write: word(8) & u64::from(UFFD_PAGEFAULT_FLAG_WRITE) != 0,
        },
        UFFD_EVENT_REMOVE => FaultEvent::Remove {
            start: word(8),
            end: word(16),
        },
        _ => FaultEvent::Other,
    }
}
