//! A thread of another process, stopped by ptrace and made to run system calls of ours.
//!
//! The thread is taken wherever it is, in user code or in the middle of a system call, and given
//! back there: its registers, its signal mask and the call it was in are as they were. No code is
//! written into the process, for its other threads run on: a `syscall` instruction that is there
//! already is reused, the thread's own or the vDSO's.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rustix::io::Errno;

use crate::PagesError;
use crate::process::{has_ended, mappings};
use crate::stop::{EVENT_CLONE, EVENT_STOP, STOP_LIMIT, Stop, poll, step, wait_for_news};

const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// The code segment of 64-bit user code.
const USER_CS64: u64 = 0x33;

/// `PTRACE_O_SUSPEND_SECCOMP`: its seccomp filter does not see the calls made meanwhile.
pub(crate) const SUSPEND_SECCOMP: i32 = 1 << 21;

/// A stopped thread. Dropping it puts everything back and lets it go on.
pub(crate) struct Tracee {
    pid: Pid,
    registers: libc::user_regs_struct,
    signal_mask: u64,
    /// Address of a `syscall` instruction.
    syscall: u64,
    /// Whether there is something to put back: taken over, and neither ended nor given up.
    ours: bool,
}

impl Tracee {
    /// Stops the main thread of a process, wherever it is.
    pub fn seize(pid: i32, options: i32) -> Result<Self, PagesError> {
        let pid = Pid::from_raw(pid);
        let options = Options::from_bits_retain(options | Options::PTRACE_O_TRACESYSGOOD.bits());
        // The kernel says EPERM of a process that has ended and is not reaped yet.
        let seized = ptrace::seize(pid, options).map_err(|errno| match errno {
            nix::Error::EPERM if has_ended(pid.as_raw()) => nix::Error::ESRCH,
            errno => errno,
        });
        step(pid, "PTRACE_SEIZE", seized)?;
        let mut this = Self::unstopped(pid);
        let taken = step(pid, "PTRACE_INTERRUPT", ptrace::interrupt(pid))
            .and_then(|()| this.wait_for(Stop::Event(EVENT_STOP)))
            .and_then(|()| this.take_over());
        if taken.is_err() {
            // Still as it was; if it cannot be let go here, the end of the tracer does it.
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
        self.wait_for(Stop::Event(EVENT_STOP))?;
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
        self.resume(0)?;
        match self.wait()? {
            Stop::Event(EVENT_CLONE) => {}
            Stop::Syscall => {
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
        self.resume(0)?;
        self.wait_for(Stop::Syscall)
    }

    fn finish(&mut self, name: &'static str) -> Result<u64, PagesError> {
        self.resume(0)?;
        self.wait_for(Stop::Syscall)?;
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

    /// The kernel kills it should the tracer end before it is let go. Replaces the options that
    /// it inherited, so those still needed are named again.
    pub fn die_with_tracer(&self, options: i32) -> Result<(), PagesError> {
        let options =
            options | (Options::PTRACE_O_EXITKILL | Options::PTRACE_O_TRACESYSGOOD).bits();
        let options = Options::from_bits_retain(options);
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
            match poll(self.pid) {
                Ok(Some(status)) if libc::WIFSTOPPED(status) => {}
                Ok(None) => wait_for_news(STOP_LIMIT.saturating_sub(began.elapsed())),
                Ok(Some(_)) | Err(_) => return,
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

    /// Lets it run to its next stop, and delivers a signal to it unless 0.
    fn resume(&self, signal: i32) -> Result<(), PagesError> {
        let nothing = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: PTRACE_SYSCALL takes no address, and a signal number.
        let result = unsafe {
            libc::ptrace(
                libc::PTRACE_SYSCALL,
                self.pid.as_raw(),
                nothing,
                libc::c_long::from(signal),
            )
        };
        step(
            self.pid,
            "PTRACE_SYSCALL",
            nix::errno::Errno::result(result).map(drop),
        )
    }

    /// Waits for a stop of the kind, and sends the thread on through others. Signals that it was
    /// about to get it gets: one on its way when it was seized, or SIGSTOP, which cannot be
    /// blocked; that one takes effect when the thread is let go.
    fn wait_for(&mut self, wanted: Stop) -> Result<(), PagesError> {
        loop {
            let stop = self.wait()?;
            if stop == wanted {
                return Ok(());
            }
            self.resume(if let Stop::Signal(signal) = stop {
                signal
            } else {
                0
            })?;
        }
    }

    fn wait(&mut self) -> Result<Stop, PagesError> {
        let began = Instant::now();
        loop {
            if let Some(status) = poll(self.pid)? {
                if libc::WIFSTOPPED(status) {
                    return Ok(Stop::from_status(status >> 8));
                }
                self.ours = false;
                return Err(self.failed("tracing", Errno::SRCH));
            }
            let left = STOP_LIMIT.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Err(self.failed("waiting for its main thread to stop", Errno::TIMEDOUT));
            }
            wait_for_news(left);
        }
    }

    fn failed(&self, call: &'static str, errno: Errno) -> PagesError {
        PagesError::Injected {
            pid: self.pid.as_raw(),
            call,
            errno,
        }
    }

    /// Back to where it was taken: in the kernel's signal code, which restarts the call that it
    /// was in. From the end of a call of ours it would get there only because detaching happens
    /// to kick it; missing that, it would see an error that the kernel keeps to itself.
    fn put_back(&mut self) -> Result<(), PagesError> {
        step(self.pid, "PTRACE_INTERRUPT", ptrace::interrupt(self.pid))?;
        self.resume(0)?;
        self.wait_for(Stop::Event(EVENT_STOP))?;
        self.set_registers(self.registers)?;
        self.set_signal_mask(self.signal_mask)?;
        step(self.pid, "PTRACE_DETACH", ptrace::detach(self.pid, None))?;
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

fn errno_of(error: &std::io::Error) -> Errno {
    error
        .raw_os_error()
        .map_or(Errno::IO, Errno::from_raw_os_error)
}
