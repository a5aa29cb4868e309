//! Waiting for the stops of a traced thread, with a limit.

use std::time::Duration;

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::Pid;
use rustix::io::Errno;

use crate::PagesError;
use crate::apart::apart;

/// How long a stopped thread may take to stop. One that waits in the kernel for something that
/// does not come (its own missing page, a dead NFS server) cannot be stopped at all.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(5);

pub(crate) const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;
pub(crate) const EVENT_CLONE: i32 = libc::PTRACE_EVENT_CLONE;

/// Why a traced thread stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It enters or leaves a system call.
    Syscall,
    /// `EVENT_CLONE`, or `EVENT_STOP`: interrupted, stopped by job control, or just born.
    Event(i32),
    /// A signal is about to be delivered.
    Signal(i32),
}

impl Stop {
    pub fn from_status(status: i32) -> Self {
        match (status >> 8, status & 0xff) {
            (0, signal) if signal == libc::SIGTRAP | 0x80 => Self::Syscall,
            (0, signal) => Self::Signal(signal),
            (event, _) => Self::Event(event),
        }
    }
}

/// Runs `work`, which traces `pid`, in a process of its own.
///
/// That `pid` is gone is an error of the injection like any other, `ESRCH`.
pub(crate) fn tracing<T: Send>(
    pid: i32,
    work: impl FnOnce() -> Result<T, PagesError> + Send,
) -> Result<T, PagesError> {
    let injected = |call, errno| PagesError::Injected { pid, call, errno };
    let work = || {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        // SAFETY: no handler is installed; the table is this process's own.
        unsafe { sigaction(Signal::SIGCHLD, &default) }.map_err(|errno| {
            injected(
                "preparing the tracer",
                Errno::from_raw_os_error(errno as i32),
            )
        })?;
        work()
    };
    match apart(work).map_err(|errno| injected("starting the tracer", errno))? {
        Err(PagesError::Gone { .. }) => Err(injected("tracing", Errno::SRCH)),
        result => result,
    }
}

/// Its wait status, when there is one. The status of an end goes on to its parent.
pub(crate) fn poll(pid: Pid) -> Result<Option<i32>, PagesError> {
    let mut status = 0;
    let flags = libc::WNOHANG | libc::__WALL;
    // SAFETY: writes one integer.
    let found = unsafe { libc::waitpid(pid.as_raw(), &raw mut status, flags) };
    match nix::errno::Errno::result(found) {
        Ok(0) | Err(nix::Error::EINTR) => Ok(None),
        Ok(_) => Ok(Some(status)),
        Err(errno) => step(pid, "waiting for a stop", Err(errno)),
    }
}

/// Until a trace stop or an end is announced by SIGCHLD, which `apart` has blocked.
pub(crate) fn wait_for_news(limit: Duration) {
    let mut news = SigSet::empty();
    news.add(Signal::SIGCHLD);
    let limit = libc::timespec {
        tv_sec: limit.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
    };
    // SAFETY: reads the two; whatever ends it, the caller looks again.
    unsafe { libc::sigtimedwait(news.as_ref(), std::ptr::null_mut(), &raw const limit) };
}

/// The error of a step of tracing.
pub(crate) fn step<T>(
    pid: Pid,
    call: &'static str,
    result: nix::Result<T>,
) -> Result<T, PagesError> {
    result.map_err(|errno| PagesError::Injected {
        pid: pid.as_raw(),
        call,
        errno: Errno::from_raw_os_error(errno as i32),
    })
}
