//! A thread of another process, stopped by ptrace and made to run system calls of ours.
//!
//! The thread is taken wherever it is, in user code or in the middle of a system call, and given
//! back there: its registers, its signal mask and the call it was in are as they were. No code is
//! written into the process, for its other threads run on: a `syscall` instruction that is there
//! already is reused, the thread's own or the vDSO's.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::ptrace::{self, Event, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::io::Errno;

use crate::PagesError;
use crate::process::mappings;

/// How long a stopped thread may take to stop. One that waits in the kernel for something that
/// does not come (its own missing page, a dead NFS server) cannot be stopped at all.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// After so long, waiting costs sleeps instead of a core.
const SPIN: Duration = Duration::from_millis(1);

const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// The code segment of 64-bit user code.
const USER_CS64: u64 = 0x33;

/// `PTRACE_O_SUSPEND_SECCOMP`: its seccomp filter does not see the calls made meanwhile.
pub(crate) const SUSPEND_SECCOMP: i32 = 1 << 21;

/// Runs `work` on a thread of its own. Tracing belongs to one OS thread, and the kernel lets go
/// of all that a thread traces when it ends, whatever happened in it.
///
/// That `pid` is gone is an error of the injection like any other, `ESRCH`.
pub(crate) fn on_own_thread<T: Send>(
    pid: i32,
    work: impl FnOnce() -> Result<T, PagesError> + Send,
) -> Result<T, PagesError> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(Err(PagesError::Gone { .. })) => Err(PagesError::Injected {
            pid,
            call: "tracing",
            errno: Errno::SRCH,
        }),
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// A stopped thread. Dropping it puts everything back and lets it go on.
pub(crate) struct Tracee {
    pid: Pid,
    registers: libc::user_regs_struct,
    signal_mask: u64,
    /// Address of a `syscall` instruction.
    syscall: u64,
    /// A job-control stop arrived meanwhile and is owed to it.
    owed_stop: bool,
    /// Whether there is something to put back: taken over, and neither ended nor given up.
    ours: bool,
}

impl Tracee {
    /// Stops the main thread of a process, wherever it is.
    pub fn seize(pid: i32, options: i32) -> Result<Self, PagesError> {
        let pid = Pid::from_raw(pid);
        let options = Options::from_bits_retain(options | Options::PTRACE_O_TRACESYSGOOD.bits());
        step(pid, "PTRACE_SEIZE", ptrace::seize(pid, options))?;
        let mut this = Self::unstopped(pid);
        let taken = step(pid, "PTRACE_INTERRUPT", ptrace::interrupt(pid))
            .and_then(|()| this.wait_for(is_event_stop))
            .and_then(|()| this.take_over());
        if taken.is_err() {
            // Still as it was; if it cannot be let go here, the end of this OS thread does it.
            let _ = ptrace::detach(pid, None);
        }
        taken.map(|()| this)
    }

    /// A child that the kernel attached by `PTRACE_O_TRACECLONE`. Dropping it puts nothing back.
    pub fn child(pid: i32) -> Self {
        Self::unstopped(Pid::from_raw(pid))
    }

    /// Waits until the child has arrived, before its first instruction.
    pub fn arrive(&mut self, syscall: u64) -> Result<(), PagesError> {
        self.wait_for(is_event_stop)?;
        self.registers = self.get_registers()?;
        self.syscall = syscall;
        Ok(())
    }

    fn unstopped(pid: Pid) -> Self {
        Self {
            pid,
            // SAFETY: a structure of integers.
            registers: unsafe { std::mem::zeroed() },
            signal_mask: 0,
            syscall: 0,
            owed_stop: false,
            ours: false,
        }
    }

    fn take_over(&mut self) -> Result<(), PagesError> {
        self.registers = self.get_registers()?;
        if self.registers.cs != USER_CS64 {
            return Err(self.failed("looking for 64-bit code", Errno::NOEXEC));
        }
        self.syscall = self.find_syscall()?;
        self.signal_mask = self.get_signal_mask()?;
        self.set_signal_mask(u64::MAX)?;
        self.ours = true;
        Ok(())
    }

    /// Its number.
    pub fn number(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Address of the `syscall` instruction in use.
    pub fn syscall_address(&self) -> u64 {
        self.syscall
    }

    /// Runs a system call and returns its result, or its error.
    pub fn call(
        &mut self,
        name: &'static str,
        number: libc::c_long,
        arguments: &[u64],
    ) -> Result<u64, PagesError> {
        self.begin(number, arguments)?;
        self.finish(name)
    }

    /// Runs `clone` and returns the child, which is attached and waits.
    pub fn call_clone(&mut self, flags: u64) -> Result<Self, PagesError> {
        self.begin(libc::SYS_clone, &[flags, 0, 0, 0, 0])?;
        self.resume_to_stop()?;
        match self.wait()? {
            WaitStatus::PtraceEvent(_, _, event) if event == Event::PTRACE_EVENT_CLONE as i32 => {}
            WaitStatus::PtraceSyscall(_) => {
                return Err(match self.result("clone") {
                    Ok(_) => self.failed("clone", Errno::PROTO),
                    Err(error) => error,
                });
            }
            _ => return Err(self.failed("clone", Errno::PROTO)),
        }
        let number = step(self.pid, "PTRACE_GETEVENTMSG", ptrace::getevent(self.pid))?;
        let number = i32::try_from(number).map_err(|_| self.failed("clone", Errno::PROTO))?;
        let child = Self::child(number);
        match self.finish("clone") {
            Ok(_) => Ok(child),
            Err(error) => {
                child.kill();
                Err(error)
            }
        }
    }

    /// Puts the thread at the `syscall` instruction with these registers, and lets it enter.
    pub fn begin(&mut self, number: libc::c_long, arguments: &[u64]) -> Result<(), PagesError> {
        let mut registers = self.registers;
        registers.rip = self.syscall;
        registers.rax = number as u64;
        // -1: the kernel is not to restart the call that the thread was in.
        registers.orig_rax = u64::MAX;
        let slots = [
            &mut registers.rdi,
            &mut registers.rsi,
            &mut registers.rdx,
            &mut registers.r10,
            &mut registers.r8,
            &mut registers.r9,
        ];
        for (slot, argument) in slots.into_iter().zip(arguments) {
            *slot = *argument;
        }
        self.set_registers(registers)?;
        self.resume_to_stop()?;
        self.wait_for(is_syscall_stop)
    }

    fn finish(&mut self, name: &'static str) -> Result<u64, PagesError> {
        self.resume_to_stop()?;
        self.wait_for(is_syscall_stop)?;
        self.result(name)
    }

    fn result(&self, name: &'static str) -> Result<u64, PagesError> {
        let result = self.get_registers()?.rax;
        match i32::try_from(result as i64) {
            Ok(error @ -4095..=-1) => Err(self.failed(name, Errno::from_raw_os_error(-error))),
            _ => Ok(result),
        }
    }

    /// Blocks these signals (a bit each) for the thread.
    pub fn set_signal_mask(&self, mask: u64) -> Result<(), PagesError> {
        let mut mask = mask;
        self.signal_mask_request(libc::PTRACE_SETSIGMASK, "PTRACE_SETSIGMASK", &mut mask)
    }

    fn get_signal_mask(&self) -> Result<u64, PagesError> {
        let mut mask = 0;
        self.signal_mask_request(libc::PTRACE_GETSIGMASK, "PTRACE_GETSIGMASK", &mut mask)?;
        Ok(mask)
    }

    fn signal_mask_request(
        &self,
        request: libc::c_uint,
        name: &'static str,
        mask: &mut u64,
    ) -> Result<(), PagesError> {
        // SAFETY: both requests take the size of the mask and a pointer to it.
        let result = unsafe {
            libc::ptrace(
                request,
                self.pid.as_raw(),
                size_of::<u64>(),
                std::ptr::from_mut(mask),
            )
        };
        step(self.pid, name, nix::errno::Errno::result(result).map(drop))
    }

    /// The kernel kills it should this OS thread end before it is let go.
    pub fn die_with_us(&self) -> Result<(), PagesError> {
        let options = Options::PTRACE_O_EXITKILL | Options::PTRACE_O_TRACESYSGOOD;
        step(
            self.pid,
            "PTRACE_SETOPTIONS",
            ptrace::setoptions(self.pid, options),
        )
    }

    /// Lets it go where it stands, with the signal mask it has now.
    pub fn release(mut self) -> Result<(), PagesError> {
        self.ours = false;
        step(self.pid, "PTRACE_DETACH", ptrace::detach(self.pid, None))
    }

    /// Ends a child, whatever state it is in, and hands its remains to its parent.
    pub fn kill(mut self) {
        self.ours = false;
        let _ = nix::sys::signal::kill(self.pid, Signal::SIGKILL);
        let began = Instant::now();
        while began.elapsed() < STOP_LIMIT {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
            match waitpid(self.pid, Some(flags)) {
                Ok(WaitStatus::Signaled(..) | WaitStatus::Exited(..)) | Err(nix::Error::ECHILD) => {
                    return;
                }
                _ => thread::yield_now(),
            }
        }
    }

    fn find_syscall(&self) -> Result<u64, PagesError> {
        let pid = self.pid.as_raw();
        let memory = File::open(format!("/proc/{pid}/mem"))
            .map_err(|error| self.failed("opening /proc/PID/mem", errno_of(&error)))?;
        let mut code = [0; 2];
        let before = self.registers.rip.wrapping_sub(2);
        if memory.read_exact_at(&mut code, before).is_ok() && code == SYSCALL {
            return Ok(before);
        }
        let mut places: Vec<_> = mappings(pid)?
            .into_iter()
            .filter(|mapping| mapping.executable)
            .collect();
        places.sort_by_key(|mapping| mapping.name != "[vdso]");
        for place in places.iter().filter(|place| place.name != "[vsyscall]") {
            let length = usize::try_from(place.end - place.start).unwrap_or(0);
            let mut code = vec![0; length];
            if memory.read_exact_at(&mut code, place.start).is_err() {
                continue;
            }
            if let Some(at) = code.windows(2).position(|pair| pair == SYSCALL) {
                return Ok(place.start + at as u64);
            }
        }
        Err(self.failed("looking for a syscall instruction", Errno::NOEXEC))
    }

    fn get_registers(&self) -> Result<libc::user_regs_struct, PagesError> {
        step(self.pid, "PTRACE_GETREGS", ptrace::getregs(self.pid))
    }

    fn set_registers(&self, registers: libc::user_regs_struct) -> Result<(), PagesError> {
        step(
            self.pid,
            "PTRACE_SETREGS",
            ptrace::setregs(self.pid, registers),
        )
    }

    fn resume_to_stop(&self) -> Result<(), PagesError> {
        step(self.pid, "PTRACE_SYSCALL", ptrace::syscall(self.pid, None))
    }

    /// Waits for a stop of the kind, and sends the thread on through stops for signals. All that
    /// can be blocked are; what remains is SIGSTOP, which it gets when it is let go.
    fn wait_for(&mut self, wanted: fn(&WaitStatus) -> bool) -> Result<(), PagesError> {
        loop {
            let status = self.wait()?;
            if wanted(&status) {
                return Ok(());
            }
            if let WaitStatus::Stopped(_, signal) = status {
                self.owed_stop |= signal == Signal::SIGSTOP;
            }
            self.resume_to_stop()?;
        }
    }

    fn wait(&mut self) -> Result<WaitStatus, PagesError> {
        let began = Instant::now();
        loop {
            self.peek_end()?;
            let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
            match waitpid(self.pid, Some(flags)) {
                Ok(WaitStatus::StillAlive) | Err(nix::Error::EINTR) => {}
                Ok(status) => return Ok(status),
                Err(errno) => return step(self.pid, "waiting for a stop", Err(errno)),
            }
            let waited = began.elapsed();
            if waited > STOP_LIMIT {
                return Err(self.failed("waiting for its main thread to stop", Errno::TIMEDOUT));
            }
            if waited < SPIN {
                thread::yield_now();
            } else {
                thread::sleep(SPIN);
            }
        }
    }

    /// An end is looked at and left for whoever is its parent, which may be us elsewhere.
    fn peek_end(&mut self) -> Result<(), PagesError> {
        // SAFETY: a structure of integers.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT | libc::__WALL;
        // SAFETY: writes one siginfo_t.
        let result = unsafe {
            libc::waitid(
                libc::P_PID,
                self.pid.as_raw() as libc::id_t,
                &raw mut info,
                flags,
            )
        };
        // SAFETY: waitid sets these fields, or leaves the zeros.
        let ended = result == 0 && unsafe { info.si_pid() } != 0;
        if ended {
            self.ours = false;
            return Err(self.failed("tracing", Errno::SRCH));
        }
        Ok(())
    }

    fn failed(&self, call: &'static str, errno: Errno) -> PagesError {
        PagesError::Injected {
            pid: self.pid.as_raw(),
            call,
            errno,
        }
    }

    /// Back to where it was taken: in the signal code of the kernel, from where it restarts the
    /// call that it was in. After a call of ours it would return to user code instead, and show
    /// it the kernel's own "to be restarted".
    fn put_back(&mut self) -> Result<(), PagesError> {
        step(self.pid, "PTRACE_INTERRUPT", ptrace::interrupt(self.pid))?;
        self.resume_to_stop()?;
        self.wait_for(is_event_stop)?;
        self.set_registers(self.registers)?;
        self.set_signal_mask(self.signal_mask)?;
        step(self.pid, "PTRACE_DETACH", ptrace::detach(self.pid, None))?;
        if self.owed_stop {
            let _ = nix::sys::signal::kill(self.pid, Signal::SIGSTOP);
        }
        Ok(())
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if self.ours {
            // It fails only when the process is being killed.
            let _ = self.put_back();
        }
    }
}

fn is_event_stop(status: &WaitStatus) -> bool {
    matches!(status, WaitStatus::PtraceEvent(_, _, event)
        if *event == Event::PTRACE_EVENT_STOP as i32)
}

fn is_syscall_stop(status: &WaitStatus) -> bool {
    matches!(status, WaitStatus::PtraceSyscall(_))
}

fn step<T>(pid: Pid, call: &'static str, result: nix::Result<T>) -> Result<T, PagesError> {
    result.map_err(|errno| PagesError::Injected {
        pid: pid.as_raw(),
        call,
        errno: Errno::from_raw_os_error(errno as i32),
    })
}

fn errno_of(error: &std::io::Error) -> Errno {
    error
        .raw_os_error()
        .map_or(Errno::IO, Errno::from_raw_os_error)
}
