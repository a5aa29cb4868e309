//! Work done in a process of its own that shares all our memory and descriptors.
//!
//! For tracing, for three reasons. Tracing belongs to one thread, and the kernel lets go of all
//! that it traces when it ends. A tracer that belongs to the tracee's parent makes the parent's
//! own `waitpid` return at every trace stop, and asyncio take a live child for dead. And should we
//! be killed half way, this process still ends its work and puts the traced one back.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::io::Errno;

const STACK: usize = 256 * 1024;

struct Job<W, T> {
    work: Option<W>,
    result: Option<Result<T, Box<dyn Any + Send>>>,
}

extern "C" fn run<W: FnOnce() -> T, T>(job: *mut c_void) -> libc::c_int {
    // SAFETY: `apart` passes its job, and looks at it again only after this process has ended.
    let job = unsafe { &mut *job.cast::<Job<W, T>>() };
    job.result = job
        .work
        .take()
        .map(|work| catch_unwind(AssertUnwindSafe(work)));
    0
}

/// Runs `work` to its end in a process of its own, while this thread stands still.
///
/// # Errors
/// Those of `clone`.
pub(crate) fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Errno> {
    let run = entry(&work);
    let mut job = Job {
        work: Some(work),
        result: None,
    };
    let mut stack = vec![0_u128; STACK / size_of::<u128>()];
    // A handler of ours, run there, would act on our memory as if the signal had been for us.
    let mask = SigSet::all()
        .thread_swap_mask(SigmaskHow::SIG_SETMASK)
        .map_err(errno)?;
    // As posix_spawn does it: CLONE_VFORK keeps this thread still until the child has ended, so
    // the child may use its thread-local storage; locks work, for they lie in shared memory. Exit
    // signal 0: no SIGCHLD, and invisible to a `waitpid` for any child.
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES;
    // SAFETY: the stack is large, aligned, and lives until the child has ended, as does the job,
    // which this thread does not touch meanwhile.
    let child = unsafe {
        let top = stack.as_mut_ptr_range().end;
        libc::clone(run, top.cast(), flags, (&raw mut job).cast())
    };
    let child = nix::errno::Errno::result(child).map_err(errno);
    let restored = mask.thread_set_mask().map_err(errno);
    let child = Pid::from_raw(child?);
    while waitpid(child, Some(WaitPidFlag::__WALL)) == Err(nix::Error::EINTR) {}
    restored?;
    match job.result {
        Some(Ok(result)) => Ok(result),
        Some(Err(panic)) => resume_unwind(panic),
        // It was killed.
        None => Err(Errno::CANCELED),
    }
}

fn entry<W: FnOnce() -> T, T>(_: &W) -> extern "C" fn(*mut c_void) -> libc::c_int {
    run::<W, T>
}

fn errno(error: nix::Error) -> Errno {
    Errno::from_raw_os_error(error as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_sees_our_memory_and_its_result_comes_back() {
        let mut seen = Vec::new();
        let here = std::process::id();
        let there = apart(|| {
            seen.extend(0..1000);
            std::process::id()
        });
        assert_ne!(there.unwrap(), here);
        assert_eq!(seen.len(), 1000);
    }

    #[test]
    fn a_panic_comes_back_as_one() {
        let caught = catch_unwind(|| apart(|| -> i32 { panic!("as asked") }));
        assert!(caught.is_err());
    }
}
