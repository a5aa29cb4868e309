//! A connected TCP socket with limits on every wait.

use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};

use crate::StreamError;

/// A peer that neither takes nor gives a byte for this long, while it has to, is gone. A slow link
/// never meets it: each byte that leaves the send queue starts it anew.
pub const SILENCE: Duration = Duration::from_secs(10);

/// A wait looks this often whether the send queue has moved.
const LOOK: Duration = Duration::from_millis(500);

/// Probes of an idle connection: first after 4 s, then each 2 s, gone after three.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(4), Duration::from_secs(2), 3);

/// Shared by the thread that works on it and by whoever cancels.
#[derive(Debug, Clone)]
pub struct Socket(Arc<TcpStream>);

fn silent() -> StreamError {
    let seconds = SILENCE.as_secs();
    StreamError::closed(format!("the peer has been silent for {seconds} s"))
}

fn broken(doing: &str, errno: Errno) -> StreamError {
    match errno {
        // TCP_USER_TIMEOUT or the keepalive probes.
        Errno::TIMEDOUT => silent(),
        _ => StreamError::closed(format!("{doing}: {errno}")),
    }
}

fn refused(what: &str) -> impl Fn(Errno) -> StreamError {
    move |errno| StreamError::Refused(format!("a page stream's socket: {what}: {errno}"))
}

impl Socket {
    /// Takes over a connected TCP socket and sets it up.
    ///
    /// # Errors
    /// `Refused` when it is no such socket.
    pub fn new(descriptor: OwnedFd) -> Result<Self, StreamError> {
        let stream = TcpStream::from(descriptor);
        let fd = stream.as_fd();
        sockopt::set_tcp_nodelay(fd, true).map_err(refused("TCP_NODELAY"))?;
        sockopt::set_tcp_user_timeout(fd, SILENCE.as_millis() as u32)
            .map_err(refused("TCP_USER_TIMEOUT"))?;
        let (idle, interval, count) = KEEPALIVE;
        sockopt::set_tcp_keepidle(fd, idle).map_err(refused("TCP_KEEPIDLE"))?;
        sockopt::set_tcp_keepintvl(fd, interval).map_err(refused("TCP_KEEPINTVL"))?;
        sockopt::set_tcp_keepcnt(fd, count).map_err(refused("TCP_KEEPCNT"))?;
        sockopt::set_socket_keepalive(fd, true).map_err(refused("SO_KEEPALIVE"))?;
        Ok(Self(Arc::new(stream)))
    }

    /// Marks its packets as interactive, which the default queue of Linux and many switches send
    /// before others. A hint: that it is refused does no harm.
    pub fn mark_urgent(&self) {
        const LOW_DELAY: u8 = 0x10;
        let _ = sockopt::set_ip_tos(self.0.as_fd(), LOW_DELAY);
        let _ = sockopt::set_ipv6_tclass(self.0.as_fd(), u32::from(LOW_DELAY));
    }

    /// Bounds the bytes that lie in the kernel between us and the peer.
    pub fn limit_send_buffer(&self, bytes: usize) {
        let _ = sockopt::set_socket_send_buffer_size(self.0.as_fd(), bytes);
    }

    /// Wakes everybody who waits on it; it is of no use afterwards.
    pub fn break_off(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// For a poll set.
    #[must_use]
    pub fn poll_for(&self, flags: PollFlags) -> PollFd<'_> {
        PollFd::from_borrowed_fd(self.0.as_fd(), flags)
    }

    /// Bytes sent that the peer's kernel has not acknowledged.
    #[must_use]
    pub fn queued(&self) -> Option<i32> {
        const TIOCOUTQ: rustix::ioctl::Opcode = 0x5411;
        // SAFETY: SIOCOUTQ (the same number) writes one int.
        let call = unsafe { rustix::ioctl::Getter::<TIOCOUTQ, i32>::new() };
        // SAFETY: as above; the descriptor is a socket.
        unsafe { rustix::ioctl::ioctl(self.0.as_fd(), call) }.ok()
    }

    /// Waits until one of `flags` holds. With `progress` the peer must keep moving (`SILENCE`);
    /// `until` bounds the wait whatever it does.
    ///
    /// # Errors
    /// `Closed`.
    pub fn wait(
        &self,
        flags: PollFlags,
        progress: bool,
        until: Option<Instant>,
    ) -> Result<(), StreamError> {
        let mut moved = Instant::now();
        let mut queued = if progress { self.queued() } else { None };
        loop {
            let mut limit = progress.then_some(LOOK);
            if let Some(until) = until {
                let left = until.saturating_duration_since(Instant::now());
                limit = Some(limit.map_or(left, |limit| limit.min(left)));
            }
            let limit = limit.map(timespec);
            match rustix::event::poll(&mut [self.poll_for(flags)], limit.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(StreamError::closed(format!("poll: {errno}"))),
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(StreamError::closed("the peer did not answer in time"));
            }
            if progress {
                let now = self.queued();
                if now != queued {
                    (moved, queued) = (Instant::now(), now);
                } else if moved.elapsed() >= SILENCE {
                    return Err(silent());
                }
            }
        }
    }

    /// Sends what the kernel takes without waiting; 0 when it takes nothing now.
    ///
    /// # Errors
    /// `Closed`.
    pub fn send(&self, data: &[u8]) -> Result<usize, StreamError> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::send(self.0.as_fd(), data, flags) {
            Ok(sent) => Ok(sent),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(errno) => Err(broken("sending to the peer", errno)),
        }
    }

    /// Receives what is there without waiting; `None` when nothing is.
    ///
    /// # Errors
    /// `Closed`, also at the end of the stream.
    pub fn receive(&self, room: &mut [u8]) -> Result<Option<usize>, StreamError> {
        match rustix::net::recv(self.0.as_fd(), room, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(StreamError::closed("the peer closed the stream")),
            Ok((got, _)) => Ok(Some(got)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(errno) => Err(broken("receiving from the peer", errno)),
        }
    }
}

/// Lets this thread run before those that move bulk on the same processors: somebody waits for what
/// it does, and it does little. A hint: without the privilege it stays as it was.
pub fn hurry_this_thread() {
    const NICE: i32 = -10;
    let thread = rustix::thread::gettid();
    let _ = rustix::process::setpriority_process(Some(thread), NICE);
}

/// For the kernel.
#[must_use]
pub fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs() as i64,
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
