//! What can go wrong with the memory of another process.

use rustix::io::Errno;

/// Kinds that a caller must tell apart.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The process has ended, or its memory is gone.
    #[error("process {pid} is gone")]
    Gone {
        /// The process asked about.
        pid: i32,
    },
    /// A system call of ours failed.
    #[error("{call} failed: {errno}")]
    Kernel {
        /// The call, with what it was for.
        call: String,
        /// Its error.
        errno: Errno,
    },
    /// A call made inside another process, or a step on the way there, failed.
    #[error("{call} in process {pid} failed: {errno}")]
    Injected {
        /// The process.
        pid: i32,
        /// The call or the step.
        call: &'static str,
        /// Its error.
        errno: Errno,
    },
    /// An argument makes no sense; nothing was done.
    #[error("{0}")]
    Argument(String),
}

impl PagesError {
    pub(crate) fn kernel(call: impl Into<String>, errno: Errno) -> Self {
        Self::Kernel {
            call: call.into(),
            errno,
        }
    }

    /// `ESRCH` of a call on a process means that it is gone; anything else is that call's error.
    pub(crate) fn of_process(pid: i32, call: &str, errno: Errno) -> Self {
        if errno == Errno::SRCH {
            Self::Gone { pid }
        } else {
            Self::kernel(call, errno)
        }
    }
}
