//! Frames over one TLS connection.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use crate::StreamError;
use crate::frame::{self, Frame, HEADER, Head, Kind, Run, TOKEN};
use crate::socket::Socket;
use crate::tls::{Credentials, HANDSHAKE_LIMIT, Tls};

/// Names the move that a stream belongs to.
pub type Token = [u8; TOKEN];

/// How long a read may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// The peer may have nothing to say: only its death ends the wait.
    Endless,
    /// The peer has to answer, and must keep moving meanwhile.
    Progress,
    /// Until then, whatever the peer does.
    Until(Instant),
}

/// One end of a page stream.
pub struct Channel {
    tls: Tls,
    sent: u64,
    received: u64,
    /// Bytes of the frame handed out last.
    current: usize,
}

/// Its name on the Python side.
pub type Stream = Channel;

impl Channel {
    fn over(tls: Tls) -> Self {
        Self {
            tls,
            sent: 0,
            received: 0,
            current: 0,
        }
    }

    /// Client: handshake, then says which move this stream is for, and waits for the answer. Only
    /// that answer means connected: a TLS 1.3 client whose certificate is refused has seen a
    /// finished handshake by then.
    ///
    /// # Errors
    /// `Closed`, after 10 s at most.
    pub fn connect(
        socket: OwnedFd,
        credentials: &Credentials,
        token: Token,
        urgent: bool,
    ) -> Result<Self, StreamError> {
        let until = Instant::now() + HANDSHAKE_LIMIT;
        let mut channel = Self::over(Tls::connect(Socket::new(socket)?, credentials)?);
        let flags = if urgent { frame::URGENT } else { 0 };
        channel.send(
            Head {
                flags,
                ..Head::of(Kind::Hello, 0)
            },
            &[],
            &token,
        )?;
        channel.flush()?;
        match channel.read(Patience::Until(until)) {
            Ok(frame) if frame.header.kind == Kind::HelloOk => {}
            Ok(frame) => return Err(unexpected(&frame)),
            Err(StreamError::Closed(why)) if why.contains("closed") || why.contains("reset") => {
                return Err(StreamError::closed(format!(
                    "the peer closed the stream without a word: is this host paired there? ({why})"
                )));
            }
            Err(error) => return Err(error),
        }
        channel.set_up(urgent);
        Ok(channel)
    }

    /// Server: handshake, and the client's token.
    ///
    /// # Errors
    /// `Closed` or `Corrupt`, after 10 s at most.
    pub fn accept(
        socket: OwnedFd,
        credentials: &Credentials,
    ) -> Result<(Token, bool, Self), StreamError> {
        let until = Instant::now() + HANDSHAKE_LIMIT;
        let mut channel = Self::over(Tls::accept(Socket::new(socket)?, credentials)?);
        let hello = channel.read(Patience::Until(until))?;
        if hello.header.kind != Kind::Hello {
            return Err(unexpected(&hello));
        }
        let token = channel
            .body(&hello)
            .try_into()
            .expect("checked by the frame");
        let urgent = hello.header.flags & frame::URGENT != 0;
        channel.send(Head::of(Kind::HelloOk, 0), &[], &[])?;
        channel.flush()?;
        channel.set_up(urgent);
        Ok((token, urgent, channel))
    }

    fn set_up(&self, urgent: bool) {
        if urgent {
            self.socket().mark_urgent();
        }
    }

    /// The socket below.
    #[must_use]
    pub fn socket(&self) -> &Socket {
        self.tls.socket()
    }

    /// The sequence number of the next frame out.
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.sent
    }

    /// Queues a frame; its sequence number is set here.
    ///
    /// # Errors
    /// `Closed`.
    pub fn send(&mut self, head: Head, runs: &[Run], body: &[u8]) -> Result<(), StreamError> {
        let sequence = self.sent;
        self.send_built(&frame::build(Head { sequence, ..head }, runs, body))
    }

    /// Queues a frame that was built with `next_sequence`.
    ///
    /// # Errors
    /// `Closed`.
    pub fn send_built(&mut self, built: &[u8]) -> Result<(), StreamError> {
        self.sent += 1;
        self.tls.queue(built)
    }

    /// Queues an answer to a frame.
    ///
    /// # Errors
    /// `Closed`.
    pub fn send_ack(&mut self, answered: &Frame) -> Result<(), StreamError> {
        let body = answered.header.sequence.to_be_bytes();
        self.send(Head::of(Kind::Ack, 0), &[], &body)
    }

    /// Encrypted bytes not yet given to the kernel.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.tls.queued()
    }

    /// Encrypted bytes that the peer's kernel does not have for certain.
    #[must_use]
    pub fn unacknowledged(&self) -> i64 {
        self.queued() as i64 + i64::from(self.socket().queued().unwrap_or(0))
    }

    /// Sends everything; returns how long it waited for the socket.
    ///
    /// # Errors
    /// `Closed`.
    pub fn flush(&mut self) -> Result<Duration, StreamError> {
        self.tls.flush()
    }

    /// The same in pieces of so many bytes, with a call of `gate` before each.
    ///
    /// # Errors
    /// `Closed`.
    pub fn flush_pieces(
        &mut self,
        piece: usize,
        gate: impl FnMut(),
    ) -> Result<Duration, StreamError> {
        self.tls.flush_pieces(piece, gate)
    }

    /// Sends what the kernel takes now; true when nothing is left.
    ///
    /// # Errors
    /// `Closed`.
    pub fn try_flush(&mut self) -> Result<bool, StreamError> {
        self.tls.try_flush()
    }

    /// Receives what is there; false when nothing is.
    ///
    /// # Errors
    /// `Closed`.
    pub fn fill(&mut self) -> Result<bool, StreamError> {
        self.tls.fill()
    }

    /// The next frame, if all of it has been received. It ends the one before.
    ///
    /// # Errors
    /// `Corrupt`, `Closed`.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, StreamError> {
        self.tls.consume(std::mem::take(&mut self.current));
        let needed = frame::needed(self.tls.peek(HEADER)?)?;
        let Some(frame) = frame::parse(self.tls.peek(needed)?)? else {
            return Ok(None);
        };
        if frame.header.sequence != self.received {
            return Err(StreamError::corrupt(format!(
                "frame {} came where {} was due",
                frame.header.sequence, self.received
            )));
        }
        self.received += 1;
        self.current = frame.header.total();
        Ok(Some(frame))
    }

    /// The body of the frame that `next_frame` or `read` gave last.
    #[must_use]
    pub fn body(&self, frame: &Frame) -> &[u8] {
        &self.tls.plain()[frame.body.clone()]
    }

    /// Waits for the next frame. In the middle of one the peer must keep moving.
    ///
    /// # Errors
    /// `Corrupt`, `Closed`.
    pub fn read(&mut self, patience: Patience) -> Result<Frame, StreamError> {
        loop {
            if let Some(frame) = self.next_frame()? {
                return Ok(frame);
            }
            let inside = !self.tls.plain().is_empty();
            let (progress, until) = match patience {
                Patience::Endless => (inside, None),
                Patience::Progress => (true, None),
                Patience::Until(until) => (false, Some(until)),
            };
            self.socket().wait(PollFlags::IN, progress, until)?;
            self.fill()?;
        }
    }

    /// Reads the answer to the frame with this sequence number.
    ///
    /// # Errors
    /// `Corrupt` when it is anything else; `Closed`.
    pub fn read_ack(&mut self, sequence: u64) -> Result<(), StreamError> {
        let frame = self.read(Patience::Progress)?;
        if frame.header.kind == Kind::Ack && self.body(&frame) == sequence.to_be_bytes() {
            Ok(())
        } else {
            Err(unexpected(&frame))
        }
    }

    /// Sends a frame without runs and waits for its ack; with `Flush` all before is installed.
    ///
    /// # Errors
    /// `Corrupt`, `Closed`.
    pub fn settle(&mut self, kind: Kind) -> Result<(), StreamError> {
        let sequence = self.sent;
        self.send(Head::of(kind, 0), &[], &[])?;
        self.flush()?;
        self.read_ack(sequence)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.socket().break_off();
    }
}

/// A frame that its receiver has no use for.
#[must_use]
pub fn unexpected(frame: &Frame) -> StreamError {
    StreamError::corrupt(format!(
        "the peer sent {:?} where it may not",
        frame.header.kind
    ))
}
