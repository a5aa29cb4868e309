//! System calls that another process makes for us.

use std::os::fd::OwnedFd;

use linux_raw_sys::general::UFFD_USER_MODE_ONLY;
use nix::libc;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::PagesError;
use crate::stop::tracing;
use crate::tracer::Tracee;

/// `_IO(0xAA, 0)` of /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: u64 = 0xAA00;

const DESCRIPTOR_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;

/// Which faults a userfaultfd made inside a process may trap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultSource {
    /// Its user code's only; needs no privilege there.
    UserMode,
    /// The kernel's too; needs privilege there, or vm.unprivileged_userfaultfd.
    AnyMode,
    /// The kernel's too, through /dev/userfaultfd, which is open there as this descriptor.
    Device(i32),
}

/// Makes a userfaultfd inside a process and takes a copy, non-blocking and close-on-exec.
///
/// With `keep_open` it stays open there too, under the number returned, so that it outlives us;
/// otherwise it is closed there. The process goes on as if nothing had happened, also when this
/// fails.
///
/// # Errors
/// `Injected` with the errno of the call made there, or of a step on the way.
pub fn inject_userfaultfd(
    pid: i32,
    source: FaultSource,
    keep_open: bool,
) -> Result<(OwnedFd, Option<i32>), PagesError> {
    tracing(pid, || {
        let process = open_process(pid)?;
        let mut tracee = Tracee::seize(pid, 0)?;
        let number = match source {
            FaultSource::UserMode => {
                let flags = DESCRIPTOR_FLAGS | u64::from(UFFD_USER_MODE_ONLY);
                tracee.call("userfaultfd", libc::SYS_userfaultfd, &[flags])
            }
            FaultSource::AnyMode => {
                tracee.call("userfaultfd", libc::SYS_userfaultfd, &[DESCRIPTOR_FLAGS])
            }
            FaultSource::Device(device) => tracee.call(
                "USERFAULTFD_IOC_NEW",
                libc::SYS_ioctl,
                &[device as u64, USERFAULTFD_IOC_NEW, DESCRIPTOR_FLAGS],
            ),
        }?;
        let copy = i32::try_from(number)
            .map_err(|_| Errno::BADF)
            .and_then(|number| {
                pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).map(|copy| (copy, number))
            });
        if keep_open && copy.is_ok() {
            drop(tracee);
        } else {
            tracee.call("close", libc::SYS_close, &[number])?;
        }
        match copy {
            Ok((copy, number)) => Ok((copy, keep_open.then_some(number))),
            Err(errno) => Err(PagesError::Injected {
                pid,
                call: "pidfd_getfd",
                errno,
            }),
        }
    })
}

/// Closes a descriptor inside a process.
///
/// # Errors
/// `Injected`.
pub fn inject_close(pid: i32, descriptor: i32) -> Result<(), PagesError> {
    inject(pid, "close", libc::SYS_close, &[descriptor as u64])
}

/// `madvise(MADV_DONTNEED)` inside a process: a range of private memory becomes a hole.
///
/// # Errors
/// `Injected`.
pub fn inject_discard(pid: i32, address: u64, length: u64) -> Result<(), PagesError> {
    inject(
        pid,
        "madvise",
        libc::SYS_madvise,
        &[address, length, libc::MADV_DONTNEED as u64],
    )
}

fn inject(
    pid: i32,
    name: &'static str,
    number: libc::c_long,
    arguments: &[u64],
) -> Result<(), PagesError> {
    tracing(pid, || {
        Tracee::seize(pid, 0)?
            .call(name, number, arguments)
            .map(drop)
    })
}

fn open_process(pid: i32) -> Result<OwnedFd, PagesError> {
    Pid::from_raw(pid)
        .ok_or(Errno::SRCH)
        .and_then(|process| pidfd_open(process, PidfdFlags::empty()))
        .map_err(|errno| PagesError::Injected {
            pid,
            call: "pidfd_open",
            errno,
        })
}
