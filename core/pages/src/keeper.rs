//! The keeper: a child of a process that shares its memory and runs nothing.
//!
//! The process can then be killed, provably gone with its sockets and locks, while every page
//! stays readable and scannable through the keeper's number.

use nix::libc;
use nix::sys::ptrace::Options;

use crate::PagesError;
use crate::process::has_seccomp_filter;
use crate::stop::tracing;
use crate::tracer::{SUSPEND_SECCOMP, Tracee};

/// Makes the keeper of a process and returns its number. The process is not disturbed, also when
/// this fails; no child stays then.
///
/// The keeper has no descriptors, a session of its own, all signals blocked, and sits in `pause`.
/// Killing it gives the memory up once the process has ended too. It stays a zombie until the
/// process ends or `reap_keeper` is called.
///
/// # Errors
/// `Injected`. `EPERM` under a seccomp filter when we lack CAP_SYS_ADMIN: the filter may answer
/// `clone` by killing the process, so without leave to suspend it nothing is tried.
pub fn make_keeper(pid: i32) -> Result<i32, PagesError> {
    tracing(pid, || {
        let suspend = if has_seccomp_filter(pid)? {
            SUSPEND_SECCOMP
        } else {
            0
        };
        let mut tracee = Tracee::seize(pid, Options::PTRACE_O_TRACECLONE.bits() | suspend)?;
        // No CLONE_FILES, CLONE_SIGHAND or CLONE_THREAD: a process of its own. Exit signal 0: its
        // parent is not told of its end.
        let mut keeper = tracee.call_clone(libc::CLONE_VM as u64)?;
        let number = keeper.number();
        match settle(&mut keeper, tracee.syscall_address(), suspend) {
            Ok(()) => keeper.release().map(|()| number),
            Err(error) => {
                keeper.kill();
                let _ = reap(&mut tracee, number);
                Err(error)
            }
        }
    })
}

/// Kills a keeper whose process lives on, and lets the process reap it: nothing of it stays.
///
/// # Errors
/// `Injected`.
pub fn reap_keeper(pid: i32, keeper: i32) -> Result<(), PagesError> {
    tracing(pid, || {
        let mut tracee = Tracee::seize(pid, 0)?;
        let process = nix::unistd::Pid::from_raw(keeper);
        let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL);
        reap(&mut tracee, keeper)
    })
}

fn reap(parent: &mut Tracee, child: i32) -> Result<(), PagesError> {
    let any_kind = libc::__WALL as u32;
    parent
        .call(
            "wait4",
            libc::SYS_wait4,
            &[child as u64, 0, any_kind.into(), 0],
        )
        .map(drop)
}

/// From its first stop, before it has run anything, to the inside of `pause`.
///
/// `pause` has no way back: only a signal handler ends it, and every signal is blocked. After a
/// stop or a debugger the kernel runs the same `syscall` instruction again with the same number.
fn settle(keeper: &mut Tracee, syscall: u64, suspend: i32) -> Result<(), PagesError> {
    keeper.arrive(syscall)?;
    keeper.die_with_tracer(suspend)?;
    keeper.set_signal_mask(u64::MAX)?;
    keeper.call(
        "close_range",
        libc::SYS_close_range,
        &[0, u64::from(u32::MAX), 0],
    )?;
    keeper.call("setsid", libc::SYS_setsid, &[])?;
    keeper.begin(libc::SYS_pause, &[])
}
