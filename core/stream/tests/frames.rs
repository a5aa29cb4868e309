//! Whatever bytes come: a frame, an error, or "not yet", and never a panic.

use ferry_stream::StreamError;
use ferry_stream::frame::{
    ANSWER, Encoding, HEADER, Head, Header, Kind, MAX_PAGES, MAX_RUNS, Run, build, needed, parse,
};
use proptest::prelude::*;

const PAGE: usize = 4096;
/// The largest frame there is.
const LARGEST: usize = HEADER + MAX_PAGES * 8 + MAX_PAGES * PAGE;

fn pages(sequence: u64, runs: &[Run], body: &[u8], encoding: Encoding) -> Vec<u8> {
    let head = Head {
        kind: Kind::Pages,
        encoding,
        flags: ANSWER,
        block: 3,
        sequence,
    };
    build(head, runs, body)
}

fn run(start: u32, count: u32) -> Run {
    Run { start, count }
}

fn a_frame() -> impl Strategy<Value = Vec<u8>> {
    let runs = prop::collection::vec((0..u32::MAX - 4, 1..4_u32), 1..16);
    (runs, any::<u64>(), any::<u8>(), 0..4_u8).prop_map(|(runs, sequence, fill, kind)| {
        let runs: Vec<Run> = runs.into_iter().map(|(s, c)| run(s, c)).collect();
        let count: u32 = runs.iter().map(|run| run.count).sum();
        match kind {
            0 => pages(
                sequence,
                &runs,
                &vec![fill; count as usize * PAGE],
                Encoding::Raw,
            ),
            1 => pages(sequence, &runs, &[fill; 100], Encoding::Lz4),
            2 => build(Head::of(Kind::Zero, sequence), &runs, &[]),
            _ => build(Head::of(Kind::Ack, sequence), &[], &[fill; 8]),
        }
    })
}

proptest! {
    #[test]
    fn a_frame_comes_back_as_it_was(frame in a_frame(), more in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut stream = frame.clone();
        stream.extend(more);
        prop_assert_eq!(needed(&stream).unwrap(), frame.len());
        let read = parse(&stream).unwrap().unwrap();
        let head = Head {
            kind: read.header.kind,
            encoding: read.header.encoding,
            flags: read.header.flags,
            block: read.header.block,
            sequence: read.header.sequence,
        };
        prop_assert_eq!(build(head, &read.runs, &frame[read.body]), frame);
    }

    #[test]
    fn part_of_a_frame_is_not_yet_one(frame in a_frame(), at in any::<prop::sample::Index>()) {
        prop_assert_eq!(parse(&frame[..at.index(frame.len())]), Ok(None));
    }

    #[test]
    fn a_flipped_bit_is_noticed(frame in a_frame(), at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let mut frame = frame;
        let at = at.index(frame.len());
        frame[at] ^= 1_u8 << bit;
        // A length that has grown within its bounds waits for the rest, which then does not fit.
        frame.resize(LARGEST + MAX_RUNS * 8, 0);
        prop_assert!(matches!(parse(&frame), Err(StreamError::Corrupt(_))));
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse(&bytes);
        let _ = needed(&bytes);
    }

    #[test]
    fn random_bytes_behind_the_magic_number_never_panic(
        bytes in prop::collection::vec(any::<u8>(), HEADER..300),
        kind in 0..14_u8,
        encoding in 0..4_u8,
        runs in 0..80_u32,
        length in 0..700_u32,
    ) {
        let mut bytes = bytes;
        bytes[..3].copy_from_slice(b"VF\x01");
        bytes[3] = kind;
        bytes[4] = encoding;
        bytes[8..12].copy_from_slice(&runs.to_be_bytes());
        bytes[12..16].copy_from_slice(&length.to_be_bytes());
        bytes[24..28].fill(0);
        let _ = parse(&bytes);
    }

    /// No header, however it is made, makes a reader wait for more than the largest frame.
    #[test]
    fn lengths_are_bounded(bytes in prop::array::uniform32(any::<u8>()), kind in 1..12_u8) {
        let mut bytes = bytes;
        bytes[..3].copy_from_slice(b"VF\x01");
        bytes[3] = kind;
        bytes[4] %= 3;
        bytes[24..28].fill(0);
        if let Ok(header) = Header::parse(&bytes) {
            prop_assert!(header.total() <= LARGEST);
        }
    }
}

#[track_caller]
fn refused(frame: &[u8], why: &str) {
    match parse(frame) {
        Err(StreamError::Corrupt(text)) => assert!(text.contains(why), "{text}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_checksum_does_not_catch() {
    let page = vec![1; PAGE];
    refused(&pages(0, &[run(5, 0)], &page, Encoding::Raw), "runs");
    refused(&pages(0, &[run(u32::MAX, 1)], &page, Encoding::Raw), "runs");
    refused(&pages(0, &[run(0, 2)], &page, Encoding::Raw), "body");
    refused(
        &pages(0, &[run(0, u32::MAX); 64], &page, Encoding::Zstd),
        "body",
    );
    refused(&pages(0, &[run(0, 65)], &page, Encoding::Lz4), "body");
    refused(&pages(0, &[run(0, 1)], &page, Encoding::Lz4), "body");
    refused(&pages(0, &[], &page, Encoding::Raw), "cannot have");
    refused(&build(Head::of(Kind::Ack, 0), &[], &[0; 9]), "cannot have");
    refused(
        &build(Head::of(Kind::Flush, 0), &[run(0, 1)], &[]),
        "cannot have",
    );
    let mut newer = build(Head::of(Kind::Flush, 0), &[], &[]);
    newer[2] = 2;
    refused(&newer, "version 2");
}
