//! The frame: a header of 32 bytes, a table of page runs, a body. All numbers are big-endian.
//!
//! `docs/page-stream.md` describes it for people. Nothing here reads a socket or allocates by a
//! length that it has not checked.

use crate::StreamError;

/// Bytes of a header.
pub const HEADER: usize = 32;
/// Pages that one frame carries at most.
pub const MAX_PAGES: usize = 64;
/// Runs that a frame without a body carries at most.
pub const MAX_RUNS: usize = 8192;
/// Bytes of an entry of the table of runs.
pub const RUN: usize = 8;
/// Bytes of the token that names a move.
pub const TOKEN: usize = 16;

const MAGIC: [u8; 2] = *b"VF";
const VERSION: u8 = 1;
const PAGE: usize = ferry_pages::PAGE_SIZE;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Client's first: the token of its move; flag `URGENT` for the urgent stream.
    Hello = 1,
    /// Server's first answer: only now is the client connected.
    HelloOk = 2,
    /// Pages with their content.
    Pages = 3,
    /// Pages of zeros.
    Zero = 4,
    /// Pages given back: they read as zeros.
    Discard = 5,
    /// Asks for an `Ack` once everything before it on this stream is installed.
    Flush = 6,
    /// Answers the frame whose sequence number is its body.
    Ack = 7,
    /// Pages that the destination must ask for; one without runs ends the list.
    Missing = 8,
    /// The destination traps accesses to the missing pages.
    Armed = 9,
    /// Somebody waits for these pages.
    Request = 10,
    /// Orderly end of the stream.
    End = 11,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Hello,
            2 => Self::HelloOk,
            3 => Self::Pages,
            4 => Self::Zero,
            5 => Self::Discard,
            6 => Self::Flush,
            7 => Self::Ack,
            8 => Self::Missing,
            9 => Self::Armed,
            10 => Self::Request,
            11 => Self::End,
            _ => return None,
        })
    }
}

/// How the body of a `Pages` frame is encoded, all its pages together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// As they are.
    Raw = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One zstd frame.
    Zstd = 2,
}

impl Encoding {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Raw,
            1 => Self::Lz4,
            2 => Self::Zstd,
            _ => return None,
        })
    }
}

/// Flag of `Hello`: this is the urgent stream.
pub const URGENT: u8 = 1;
/// Flag of `Pages` and `Zero`: the page was asked for.
pub const ANSWER: u8 = 2;

/// Pages `[start, start + count)` of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First page.
    pub start: u32,
    /// Pages.
    pub count: u32,
}

impl Run {
    /// First page after it.
    #[must_use]
    pub fn stop(&self) -> u32 {
        self.start + self.count
    }
}

/// A header, its fields known to be within their bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Of the body.
    pub encoding: Encoding,
    /// `URGENT`, `ANSWER`.
    pub flags: u8,
    /// Block of the runs.
    pub block: u16,
    /// Entries of the table.
    pub runs: u32,
    /// Bytes of table and body.
    pub length: u32,
    /// Number of the frame on its stream and direction, from 0.
    pub sequence: u64,
    checksum: u32,
}

/// A frame that has been checked. Its body stays where it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// Its table.
    pub runs: Vec<Run>,
    /// Bytes of the body, counted from the start of the frame.
    pub body: std::ops::Range<usize>,
}

impl Frame {
    /// Pages that its runs name.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.runs.iter().map(|run| run.count as usize).sum()
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) << 32 | u64::from(word(bytes, at + 4))
}

impl Header {
    /// Reads a header and checks every length in it against what its kind may have.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, StreamError> {
        let wrong = |what: &str| Err(StreamError::corrupt(format!("a frame has {what}")));
        if bytes[..2] != MAGIC {
            return wrong("no magic number: this is no page stream, or it lost its place");
        }
        if bytes[2] != VERSION {
            return wrong(&format!("version {}, this is version {VERSION}", bytes[2]));
        }
        let Some(kind) = Kind::from_byte(bytes[3]) else {
            return wrong(&format!("unknown kind {}", bytes[3]));
        };
        let Some(encoding) = Encoding::from_byte(bytes[4]) else {
            return wrong(&format!("unknown encoding {}", bytes[4]));
        };
        let header = Self {
            kind,
            encoding,
            flags: bytes[5],
            block: u16::from_be_bytes([bytes[6], bytes[7]]),
            runs: word(bytes, 8),
            length: word(bytes, 12),
            sequence: long(bytes, 16),
            checksum: word(bytes, 28),
        };
        let (runs, body) = match kind {
            Kind::Pages => (1..=MAX_PAGES, 1..=MAX_PAGES * PAGE),
            Kind::Zero | Kind::Discard => (1..=MAX_RUNS, 0..=0),
            Kind::Missing => (0..=MAX_RUNS, 0..=0),
            Kind::Request => (1..=MAX_PAGES, 0..=0),
            Kind::Hello => (0..=0, TOKEN..=TOKEN),
            Kind::Ack => (0..=0, 8..=8),
            Kind::HelloOk | Kind::Flush | Kind::Armed | Kind::End => (0..=0, 0..=0),
        };
        let table = header.runs as usize * RUN;
        let in_body = (header.length as usize).checked_sub(table);
        if !runs.contains(&(header.runs as usize)) || !in_body.is_some_and(|n| body.contains(&n)) {
            return wrong(&format!(
                "{} runs in {} bytes, which its kind {kind:?} cannot have",
                header.runs, header.length
            ));
        }
        if bytes[24..28] != [0; 4] {
            return wrong("reserved bytes that are not zero");
        }
        Ok(header)
    }

    /// Bytes of the whole frame.
    #[must_use]
    pub fn total(&self) -> usize {
        HEADER + self.length as usize
    }
}

/// Bytes that must be at hand to go on with the frame at the start of `bytes`.
///
/// # Errors
/// `Corrupt`.
pub fn needed(bytes: &[u8]) -> Result<usize, StreamError> {
    match bytes.first_chunk() {
        None => Ok(HEADER),
        Some(header) => Header::parse(header).map(|header| header.total()),
    }
}

/// Reads the frame at the start of `bytes`, if all of it is there.
///
/// # Errors
/// `Corrupt`.
pub fn parse(bytes: &[u8]) -> Result<Option<Frame>, StreamError> {
    let Some(first) = bytes.first_chunk() else {
        return Ok(None);
    };
    let header = Header::parse(first)?;
    let total = header.total();
    if bytes.len() < total {
        return Ok(None);
    }
    if checksum(&bytes[..total]) != header.checksum {
        return Err(StreamError::corrupt(format!(
            "the checksum of frame {} does not match its content",
            header.sequence
        )));
    }
    let table = HEADER + header.runs as usize * RUN;
    let runs: Vec<Run> = bytes[HEADER..table]
        .chunks_exact(RUN)
        .map(|entry| Run {
            start: word(entry, 0),
            count: word(entry, 4),
        })
        .collect();
    let bad = runs
        .iter()
        .any(|run| run.count == 0 || run.start.checked_add(run.count).is_none());
    let frame = Frame {
        header,
        runs,
        body: table..total,
    };
    let bodied = match (header.kind, header.encoding) {
        (Kind::Pages, encoding) => {
            // Summed in 64 bits: 64 runs of 2^32 pages do not overflow it.
            let pages: u64 = frame.runs.iter().map(|run| u64::from(run.count)).sum();
            let full = pages * PAGE as u64;
            let body = frame.body.len() as u64;
            pages <= MAX_PAGES as u64
                && match encoding {
                    Encoding::Raw => body == full,
                    Encoding::Lz4 | Encoding::Zstd => body < full,
                }
        }
        (_, encoding) => encoding == Encoding::Raw,
    };
    if bad || !bodied {
        return Err(StreamError::corrupt(format!(
            "the runs of frame {} do not fit its kind or its body",
            header.sequence
        )));
    }
    Ok(Some(frame))
}

fn checksum(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..HEADER - 4]), &frame[HEADER..])
}

/// What the writer of a frame decides.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    /// What it is.
    pub kind: Kind,
    /// Of the body.
    pub encoding: Encoding,
    /// `URGENT`, `ANSWER`.
    pub flags: u8,
    /// Block of the runs.
    pub block: u16,
    /// Number on its stream.
    pub sequence: u64,
}

impl Head {
    /// A frame with neither block nor flags.
    #[must_use]
    pub fn of(kind: Kind, sequence: u64) -> Self {
        Self {
            kind,
            encoding: Encoding::Raw,
            flags: 0,
            block: 0,
            sequence,
        }
    }
}

/// Writes header, table and checksum in front of a body: `frame` is exactly as long as the whole
/// frame, and its last bytes are the body already.
pub fn seal(frame: &mut [u8], head: Head, runs: &[Run]) {
    let length = (frame.len() - HEADER) as u32;
    frame[..2].copy_from_slice(&MAGIC);
    frame[2] = VERSION;
    frame[3] = head.kind as u8;
    frame[4] = head.encoding as u8;
    frame[5] = head.flags;
    frame[6..8].copy_from_slice(&head.block.to_be_bytes());
    frame[8..12].copy_from_slice(&(runs.len() as u32).to_be_bytes());
    frame[12..16].copy_from_slice(&length.to_be_bytes());
    frame[16..24].copy_from_slice(&head.sequence.to_be_bytes());
    frame[24..28].fill(0);
    for (entry, run) in frame[HEADER..].chunks_exact_mut(RUN).zip(runs) {
        entry[..4].copy_from_slice(&run.start.to_be_bytes());
        entry[4..].copy_from_slice(&run.count.to_be_bytes());
    }
    let sum = checksum(frame);
    frame[28..32].copy_from_slice(&sum.to_be_bytes());
}

/// A whole frame in a new buffer; for the small ones.
#[must_use]
pub fn build(head: Head, runs: &[Run], body: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; HEADER + runs.len() * RUN + body.len()];
    let at = frame.len() - body.len();
    frame[at..].copy_from_slice(body);
    seal(&mut frame, head, runs);
    frame
}

/// Appends a page to runs in ascending or any other order, joining neighbours.
pub fn push_run(runs: &mut Vec<Run>, page: u32) {
    match runs.last_mut() {
        Some(last) if last.stop() == page => last.count += 1,
        _ => runs.push(Run {
            start: page,
            count: 1,
        }),
    }
}
