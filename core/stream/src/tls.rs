//! TLS 1.3 over one socket, both ends authenticated by pinned certificates.
//!
//! A connection has one owner at a time and no lock. A bulk stream is used in strict turns by one
//! thread at each end (frames, flush, then the ack). The urgent stream is full duplex, so at each
//! end one thread polls the socket together with what else it serves (the userfaultfd there, the
//! requests here): the answer to a fault then needs no hand-over between threads, and nobody can
//! wait on the socket while holding what the other half needs.
//!
//! rustls is used unbuffered: its buffered reader takes 4 KiB of a socket at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustls::client::UnbufferedClientConnection;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::StreamError;
use crate::socket::Socket;

/// The DNS name that every host's certificate carries.
pub const SERVER_NAME: &str = "vmferry";
/// A handshake and the first answer take no longer.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

const RECEIVE_BUFFER: usize = 1 << 20;
/// Room that a receive call is offered at least.
const RECEIVE_LEAST: usize = 128 << 10;
/// Upper bound on what TLS adds to a record of 16 KiB.
const RECORD: (usize, usize) = (16 << 10, 64);

/// A host's certificate and key, and the certificates of the peers it trusts.
#[derive(Debug, Clone)]
pub struct Credentials {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Credentials {
    /// From PEM. The peers' certificates are the only trust anchors, in both roles.
    ///
    /// # Errors
    /// `Argument` when something does not parse, key and certificate do not belong together, or
    /// there is no peer.
    pub fn new(certificate: &[u8], key: &[u8], peers: &[Vec<u8>]) -> Result<Self, StreamError> {
        let bad = |what: &str, error: &dyn std::fmt::Display| {
            StreamError::Argument(format!("{what}: {error}"))
        };
        let chain = certificates(certificate)?;
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|e| bad("the host's key", &e))?;
        let mut roots = RootCertStore::empty();
        for peer in peers {
            for certificate in certificates(peer)? {
                roots
                    .add(certificate)
                    .map_err(|e| bad("a peer's certificate", &e))?;
            }
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| bad("the peers' certificates", &e))?;
        let versions = [&rustls::version::TLS13];
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions)
            .map_err(|e| bad("TLS 1.3", &e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|e| bad("the host's certificate", &e))?;
        // Nobody resumes, and a ticket that is never read would turn our close into a reset.
        server.send_tls13_tickets = 0;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(|e| bad("TLS 1.3", &e))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|e| bad("the host's certificate", &e))?;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, StreamError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(StreamError::Argument(
            "no certificate in the PEM text".into(),
        )),
        Err(error) => Err(StreamError::Argument(format!("a certificate: {error}"))),
    }
}

/// AES-128-GCM first: the fastest where the processor has AES.
fn provider() -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    provider
}

enum Connection {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// What a round of `process` stopped at.
#[derive(PartialEq, Eq)]
enum At {
    Handshake,
    Traffic,
    Enough,
}

/// The body of `Tls::process`: rustls has one type for each side and no trait over both.
macro_rules! process_records {
    ($tls:ident, $connection:ident, $enough:ident, $data:ident) => {{
        let mut failure: Option<StreamError> = None;
        loop {
            let at_hand = $tls.plain.len() - $tls.plain_start;
            if at_hand >= $enough && $data.is_none() {
                break Ok(At::Enough);
            }
            let (start, end) = $tls.incoming_at;
            let status = $connection.process_tls_records(&mut $tls.incoming[start..end]);
            let mut discard = status.discard;
            let mut done = None;
            match status.state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        match record {
                            Ok(record) => {
                                discard += record.discard;
                                $tls.plain.extend_from_slice(record.payload);
                            }
                            Err(error) => failure = Some(tls_error(&error)),
                        }
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut record)) => {
                    let encoded = put(&mut $tls.outgoing, &mut $tls.outgoing_at, 1024, |room| {
                        record.encode(room).map_err(|error| match error {
                            EncodeError::InsufficientSize(size) => Some(size.required_size),
                            EncodeError::AlreadyEncoded => None,
                        })
                    });
                    if !encoded {
                        done = Some(Err(StreamError::closed("TLS: a record cannot be encoded")));
                    }
                }
                // What was encoded lies in `outgoing` and leaves before anything later does.
                Ok(ConnectionState::TransmitTlsData(transmit)) => transmit.done(),
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    let sent = $data.is_none_or(|data: &[u8]| {
                        let room = data.len() + (data.len() / RECORD.0 + 1) * RECORD.1;
                        put(&mut $tls.outgoing, &mut $tls.outgoing_at, room, |room| {
                            traffic.encrypt(data, room).map_err(|error| match error {
                                EncryptError::InsufficientSize(size) => Some(size.required_size),
                                EncryptError::EncryptExhausted => None,
                            })
                        })
                    });
                    done = Some(if sent {
                        Ok(At::Traffic)
                    } else {
                        Err(StreamError::closed("TLS: the keys are used up"))
                    });
                }
                Ok(ConnectionState::BlockedHandshake) => done = Some(Ok(At::Handshake)),
                Ok(_) => done = Some(Err(StreamError::closed("the peer closed the stream"))),
                // Once more: rustls may have an alert for the peer, and then fails again.
                Err(error) if failure.is_none() => failure = Some(tls_error(&error)),
                Err(_) => done = Some(Ok(At::Handshake)),
            }
            $tls.incoming_at.0 += discard;
            if let Some(done) = done {
                break match failure {
                    Some(error) => Err(error),
                    None => done,
                };
            }
        }
    }};
}

/// One TLS connection.
pub struct Tls {
    socket: Socket,
    connection: Connection,
    /// Received and not yet decrypted: `incoming[start..end]`.
    incoming: Vec<u8>,
    incoming_at: (usize, usize),
    /// Decrypted and not yet consumed: `plain[start..]`.
    plain: Vec<u8>,
    plain_start: usize,
    /// Encrypted and not yet sent: `outgoing[start..end]`.
    outgoing: Vec<u8>,
    outgoing_at: (usize, usize),
}

impl Tls {
    /// Client's side of a handshake.
    ///
    /// # Errors
    /// `Closed` when the peer is not who we trust, does not trust us, or is no peer at all.
    pub fn connect(socket: Socket, credentials: &Credentials) -> Result<Self, StreamError> {
        let name = ServerName::try_from(SERVER_NAME).expect("a valid name");
        let connection = UnbufferedClientConnection::new(credentials.client.clone(), name)
            .map_err(|error| tls_error(&error))?;
        Self::shake(socket, Connection::Client(connection))
    }

    /// Server's side of a handshake.
    ///
    /// # Errors
    /// As `connect`.
    pub fn accept(socket: Socket, credentials: &Credentials) -> Result<Self, StreamError> {
        let connection = UnbufferedServerConnection::new(credentials.server.clone())
            .map_err(|error| tls_error(&error))?;
        Self::shake(socket, Connection::Server(connection))
    }

    fn shake(socket: Socket, connection: Connection) -> Result<Self, StreamError> {
        let until = Instant::now() + HANDSHAKE_LIMIT;
        let mut tls = Self {
            socket,
            connection,
            incoming: vec![0; RECEIVE_BUFFER],
            incoming_at: (0, 0),
            plain: Vec::new(),
            plain_start: 0,
            outgoing: Vec::new(),
            outgoing_at: (0, 0),
        };
        loop {
            let at = tls.process(1, None);
            // Flushed whatever it was: an alert tells the peer what we did not like.
            let flushed = tls.flush_until(Some(until));
            if at? != At::Handshake {
                flushed?;
                return Ok(tls);
            }
            flushed?;
            tls.socket.wait(PollFlags::IN, false, Some(until))?;
            tls.fill()?;
        }
    }

    /// The socket below.
    #[must_use]
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Goes through the received records until `enough` decrypted bytes are at hand or nothing
    /// whole is left; then encrypts `data`, if there is any.
    fn process(&mut self, enough: usize, data: Option<&[u8]>) -> Result<At, StreamError> {
        match &mut self.connection {
            Connection::Client(connection) => {
                process_records!(self, connection, enough, data)
            }
            Connection::Server(connection) => {
                process_records!(self, connection, enough, data)
            }
        }
    }

    /// Encrypts a frame behind what waits to be sent.
    ///
    /// # Errors
    /// `Closed`.
    pub fn queue(&mut self, data: &[u8]) -> Result<(), StreamError> {
        self.process(usize::MAX, Some(data)).map(drop)
    }

    /// Encrypted bytes that wait to be sent.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.outgoing_at.1 - self.outgoing_at.0
    }

    /// Sends what the kernel takes now; true when nothing is left.
    ///
    /// # Errors
    /// `Closed`.
    pub fn try_flush(&mut self) -> Result<bool, StreamError> {
        while self.queued() > 0 {
            let (start, end) = self.outgoing_at;
            match self.socket.send(&self.outgoing[start..end])? {
                0 => return Ok(false),
                sent => self.outgoing_at.0 += sent,
            }
        }
        self.outgoing_at = (0, 0);
        Ok(true)
    }

    /// Sends everything; returns how long it waited for the socket.
    ///
    /// # Errors
    /// `Closed`.
    pub fn flush(&mut self) -> Result<Duration, StreamError> {
        self.flush_until(None)
    }

    fn flush_until(&mut self, until: Option<Instant>) -> Result<Duration, StreamError> {
        let mut blocked = Duration::ZERO;
        while !self.try_flush()? {
            let start = Instant::now();
            self.socket.wait(PollFlags::OUT, true, until)?;
            blocked += start.elapsed();
        }
        Ok(blocked)
    }

    /// The same in pieces of so many bytes, with a call of `gate` before each.
    ///
    /// # Errors
    /// `Closed`.
    pub fn flush_pieces(
        &mut self,
        piece: usize,
        mut gate: impl FnMut(),
    ) -> Result<Duration, StreamError> {
        let mut blocked = Duration::ZERO;
        while self.queued() > 0 {
            gate();
            let stop = self.outgoing_at.1.min(self.outgoing_at.0 + piece);
            while self.outgoing_at.0 < stop {
                let sent = self.socket.send(&self.outgoing[self.outgoing_at.0..stop])?;
                self.outgoing_at.0 += sent;
                if sent == 0 {
                    let start = Instant::now();
                    self.socket.wait(PollFlags::OUT, true, None)?;
                    blocked += start.elapsed();
                }
            }
        }
        self.outgoing_at = (0, 0);
        Ok(blocked)
    }

    /// Receives what is there without waiting; false when nothing is.
    ///
    /// # Errors
    /// `Closed`.
    pub fn fill(&mut self) -> Result<bool, StreamError> {
        let (start, end) = self.incoming_at;
        if start == end {
            self.incoming_at = (0, 0);
        } else if self.incoming.len() - end < RECEIVE_LEAST {
            self.incoming.copy_within(start..end, 0);
            self.incoming_at = (0, end - start);
        }
        let end = self.incoming_at.1;
        match self.socket.receive(&mut self.incoming[end..])? {
            Some(got) => {
                self.incoming_at.1 += got;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Decrypted bytes, `least` of them if the records received so far hold as many.
    ///
    /// # Errors
    /// `Closed` when a record was changed on the way.
    pub fn peek(&mut self, least: usize) -> Result<&[u8], StreamError> {
        if self.plain.len() - self.plain_start < least {
            self.process(least, None)?;
        }
        Ok(self.plain())
    }

    /// Decrypted bytes at hand.
    #[must_use]
    pub fn plain(&self) -> &[u8] {
        &self.plain[self.plain_start..]
    }

    /// Takes decrypted bytes away.
    pub fn consume(&mut self, length: usize) {
        self.plain_start += length;
        debug_assert!(self.plain_start <= self.plain.len());
        if self.plain_start == self.plain.len() {
            self.plain.clear();
            self.plain_start = 0;
        } else if self.plain_start > RECEIVE_LEAST {
            self.plain.drain(..self.plain_start);
            self.plain_start = 0;
        }
    }
}

/// Appends to `buffer` what `write` puts into the room it is given, growing it as it asks. False
/// when it fails for another reason than room.
fn put(
    buffer: &mut Vec<u8>,
    at: &mut (usize, usize),
    room: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<usize>>,
) -> bool {
    let mut room = room;
    loop {
        if buffer.len() < at.1 + room {
            buffer.resize(at.1 + room, 0);
        }
        match write(&mut buffer[at.1..]) {
            Ok(written) => {
                at.1 += written;
                return true;
            }
            Err(Some(required)) if required > room => room = required,
            Err(_) => return false,
        }
    }
}

fn tls_error(error: &rustls::Error) -> StreamError {
    use rustls::Error as E;
    StreamError::Closed(match error {
        E::InvalidCertificate(_) => {
            format!("the peer's certificate is not one we trust: is that host paired? ({error})")
        }
        E::AlertReceived(_) | E::NoCertificatesPresented => {
            format!("the peer refused us: is this host paired there? ({error})")
        }
        E::DecryptError => "a record was changed on the way (TLS)".into(),
        E::InvalidMessage(_) => format!("the peer speaks no TLS ({error})"),
        _ => format!("TLS: {error}"),
    })
}
