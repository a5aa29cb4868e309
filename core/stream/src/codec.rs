//! Encoding of a batch of pages, and the choice of it.
//!
//! Everything here works on copies: live guest memory is never compressed or hashed.

use std::time::Duration;

use crate::StreamError;
use crate::frame::{Encoding, MAX_PAGES};

const PAGE: usize = ferry_pages::PAGE_SIZE;
/// An encoding that gains less than this is not worth the decoding.
const WORTH: f64 = 0.9;
/// Batches after which a ratio that is not in use is looked at again.
const LOOK_AGAIN: u32 = 32;

/// One thread's contexts and output buffer.
pub struct Encoder {
    zstd: zstd::bulk::Compressor<'static>,
    out: Vec<u8>,
}

impl Encoder {
    /// With fresh contexts.
    ///
    /// # Errors
    /// `Refused` without memory.
    pub fn new() -> Result<Self, StreamError> {
        let room = lz4_flex::block::get_maximum_output_size(MAX_PAGES * PAGE)
            .max(zstd::zstd_safe::compress_bound(MAX_PAGES * PAGE));
        Ok(Self {
            zstd: zstd::bulk::Compressor::new(1)
                .map_err(|error| StreamError::Refused(format!("zstd: {error}")))?,
            out: vec![0; room],
        })
    }

    /// The encoded bytes, or nothing where that does not gain a tenth.
    pub fn encode(&mut self, encoding: Encoding, data: &[u8]) -> Option<&[u8]> {
        let length = match encoding {
            Encoding::Raw => return None,
            Encoding::Lz4 => lz4_flex::block::compress_into(data, &mut self.out).ok()?,
            Encoding::Zstd => self.zstd.compress_to_buffer(data, &mut self.out[..]).ok()?,
        };
        ((length as f64) < data.len() as f64 * WORTH).then(|| &self.out[..length])
    }
}

/// One thread's contexts and output buffer.
pub struct Decoder {
    zstd: zstd::bulk::Decompressor<'static>,
    out: Vec<u8>,
}

impl Decoder {
    /// With fresh contexts.
    ///
    /// # Errors
    /// `Refused` without memory.
    pub fn new() -> Result<Self, StreamError> {
        Ok(Self {
            zstd: zstd::bulk::Decompressor::new()
                .map_err(|error| StreamError::Refused(format!("zstd: {error}")))?,
            out: vec![0; MAX_PAGES * PAGE],
        })
    }

    /// The content of `pages` pages.
    ///
    /// # Errors
    /// `Corrupt` when the body holds anything but exactly that.
    pub fn decode<'a>(
        &'a mut self,
        encoding: Encoding,
        body: &'a [u8],
        pages: usize,
    ) -> Result<&'a [u8], StreamError> {
        let full = pages * PAGE;
        if pages > MAX_PAGES {
            return Err(StreamError::corrupt("a batch of too many pages"));
        }
        let out = &mut self.out[..full];
        let length = match encoding {
            Encoding::Raw if body.len() == full => return Ok(body),
            Encoding::Raw => Some(body.len()),
            Encoding::Lz4 => lz4_flex::block::decompress_into(body, out).ok(),
            Encoding::Zstd => self.zstd.decompress_to_buffer(body, out).ok(),
        };
        if length != Some(full) {
            return Err(StreamError::corrupt(format!(
                "a batch of {pages} pages does not decode ({encoding:?})"
            )));
        }
        Ok(out)
    }
}

/// How one batch went.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// What was tried; it went out raw where that gained nothing.
    pub tried: Encoding,
    /// Bytes before encoding.
    pub raw: usize,
    /// Bytes after.
    pub encoded: usize,
    /// Bytes that left the send queue meanwhile, and those that are in it now.
    pub drained: i64,
    /// See `drained`.
    pub queue: i64,
    /// Processor time of the encoder. Not wall time: on a busy host that says nothing of it.
    pub encoding: Duration,
    /// Processor time of everything, from reading the pages to the end of writing them.
    pub work: Duration,
    /// Wall time waiting for the socket, or for the rate limit.
    pub blocked: Duration,
    /// Wall time of everything.
    pub total: Duration,
}

/// Chooses the encoding of a stream's next batch by what its last ones took.
///
/// A batch is expected to take as long as the slower of the two that work side by side: the thread
/// (base work and encoder), or the link (encoded bytes at its measured rate). The encoder's time is
/// counted once more on top, since the guest has a use for that processor as well: with the
/// starting values that makes raw win above some 5 Gbit/s a stream, LZ4 about 1 Gbit/s, zstd below.
///
/// The link's rate shows when it is what limits: the thread waits for the socket, or, earlier, the
/// send queue grows (megabytes fit into it before anybody waits). Otherwise the rate is at least
/// what was sent, and the estimate is lowered little by little, so that a lighter encoding is tried
/// again on a link that has become faster.
#[derive(Debug)]
pub struct Choice {
    /// Decayed sums over the last batches: bytes and seconds.
    raw: f64,
    wire: f64,
    drained: f64,
    total: f64,
    blocked: f64,
    work: f64,
    encoding: f64,
    /// Nanoseconds a byte; 0 before anything is known.
    link: f64,
    lz4: Codec,
    zstd: Codec,
    current: Encoding,
    batches: u32,
    /// Batches to send raw before the next try, and the last such number.
    skip: u32,
    skipped: u32,
}

#[derive(Debug)]
struct Codec {
    /// Encoded size over size.
    ratio: f64,
    /// Nanoseconds a byte.
    cost: f64,
    samples: u32,
}

impl Codec {
    fn learn(&mut self, sample: &Sample) {
        let raw = sample.raw as f64;
        // The first measurement counts more than what was assumed, and so on.
        self.samples = self.samples.saturating_add(1);
        let step = f64::from(self.samples + 1).recip().max(0.2);
        self.ratio += step * (sample.encoded as f64 / raw - self.ratio);
        self.cost += step * (sample.encoding.as_nanos() as f64 / raw - self.cost);
    }
}

/// Weight of a past batch, each time a new one comes.
const DECAY: f64 = 0.85;
/// The link limits a stream that waited for this share of its time, or whose send queue grew by
/// this share of what it sent.
const WAITED: f64 = 0.1;
const GREW: f64 = 0.2;
/// A shorter send queue may be what a long link holds, or a receiver that was not scheduled.
const BACKLOG: i64 = 1 << 20;
/// How far one measurement moves the estimate of the link.
const STEP: f64 = 0.3;
/// What a batch that the link did not limit does to it.
const LOWER: f64 = 0.99;
/// Another encoding must be better by this factor, or every measurement would change it.
const BETTER: f64 = 0.9;
/// Link time, in ns a byte, below which no codec can pay (16 Gbit/s).
const FAST_LINK: f64 = 0.5;
/// Wall time of work over its processor time, at most.
const MOST_CROWDED: f64 = 8.0;
/// Batches before the first decision.
const FIRST: u32 = 4;

impl Default for Choice {
    fn default() -> Self {
        Self {
            raw: 0.0,
            wire: 0.0,
            drained: 0.0,
            total: 0.0,
            blocked: 0.0,
            work: 0.0,
            encoding: 0.0,
            link: 0.0,
            lz4: Codec {
                ratio: 0.5,
                cost: 2.0,
                samples: 0,
            },
            zstd: Codec {
                ratio: 0.35,
                cost: 4.0,
                samples: 0,
            },
            current: Encoding::Lz4,
            batches: 0,
            skip: 0,
            skipped: 0,
        }
    }
}

impl Choice {
    /// What to try on the next batch.
    pub fn next(&mut self) -> Encoding {
        self.batches += 1;
        if self.skip > 0 {
            self.skip -= 1;
            return Encoding::Raw;
        }
        if self.batches % LOOK_AGAIN == 0 && self.link > FAST_LINK {
            return match self.current {
                Encoding::Lz4 => Encoding::Zstd,
                Encoding::Raw | Encoding::Zstd => Encoding::Lz4,
            };
        }
        self.current
    }

    /// Nanoseconds that a byte takes on this stream's share of the link, as far as known; 0 before
    /// the link has ever been what limits.
    #[must_use]
    pub fn link(&self) -> f64 {
        self.link
    }

    /// Learns from a batch.
    pub fn learn(&mut self, sample: &Sample) {
        for (sum, value) in [
            (&mut self.raw, sample.raw as f64),
            (&mut self.wire, sample.encoded as f64),
            (&mut self.drained, sample.drained as f64),
            (&mut self.total, sample.total.as_secs_f64()),
            (&mut self.blocked, sample.blocked.as_secs_f64()),
            (&mut self.work, sample.work.as_secs_f64()),
            (&mut self.encoding, sample.encoding.as_secs_f64()),
        ] {
            *sum = *sum * DECAY + value;
        }
        match sample.tried {
            Encoding::Raw => {}
            Encoding::Lz4 => self.lz4.learn(sample),
            Encoding::Zstd => self.zstd.learn(sample),
        }
        if sample.tried != Encoding::Raw {
            if sample.encoded < sample.raw {
                self.skipped = 0;
            } else if sample.tried == self.current {
                self.skipped = (self.skipped * 2).clamp(2, LOOK_AGAIN);
                self.skip = self.skipped;
            }
        }
        self.estimate(sample.queue);
        if self.batches >= FIRST {
            self.decide();
        }
    }

    fn estimate(&mut self, queue: i64) {
        let grew = queue > BACKLOG && self.wire - self.drained > GREW * self.wire;
        if !grew && self.blocked <= WAITED * self.total {
            let reached = self.total / self.wire.max(1.0) * 1e9;
            self.link = self.link.min(reached) * LOWER;
            return;
        }
        // A queue that takes nearly everything says little of the rate at its other end.
        if self.batches < FIRST || self.drained < GREW * self.wire {
            return;
        }
        let measured = self.total / self.drained * 1e9;
        self.link = if self.link == 0.0 {
            measured
        } else {
            let measured = measured.clamp(self.link / 2.0, self.link * 2.0);
            self.link + STEP * (measured - self.link)
        };
    }

    fn decide(&mut self) {
        let base = (self.work - self.encoding).max(0.0) / self.raw.max(1.0) * 1e9;
        // Where others want the processor, work takes that much longer.
        let crowded = self.total / (self.work + self.blocked).max(1e-9);
        let crowded = crowded.clamp(1.0, MOST_CROWDED);
        let time = |ratio: f64, cost: f64| {
            ((base + cost) * crowded).max(ratio * self.link) + cost * crowded
        };
        let of = |encoding: Encoding| match encoding {
            Encoding::Raw => time(1.0, 0.0),
            Encoding::Lz4 => time(self.lz4.ratio, self.lz4.cost),
            Encoding::Zstd => time(self.zstd.ratio, self.zstd.cost),
        };
        let mut best = self.current;
        for other in [Encoding::Raw, Encoding::Lz4, Encoding::Zstd] {
            let factor = if best == self.current { BETTER } else { 1.0 };
            if of(other) < of(best) * factor {
                best = other;
            }
        }
        self.current = best;
    }

    /// For a page that somebody waits for, over a link of so many nanoseconds a byte: encoded
    /// alone a page gains less, and its latency is the sum of both times.
    #[must_use]
    pub fn for_urgent(link: f64) -> Encoding {
        if link < 6.0 {
            Encoding::Raw
        } else if link < 40.0 {
            Encoding::Lz4
        } else {
            Encoding::Zstd
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pages: usize) -> Vec<u8> {
        b"struct page *of(unsigned long n); "
            .iter()
            .copied()
            .cycle()
            .take(pages * PAGE)
            .collect()
    }

    /// Does not compress; xorshift.
    fn noise(pages: usize) -> Vec<u8> {
        let mut state = 88_172_645_463_325_252_u64;
        (0..pages * PAGE)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
            .collect()
    }

    #[test]
    fn a_batch_comes_back() {
        let (mut encoder, mut decoder) = (Encoder::new().unwrap(), Decoder::new().unwrap());
        for pages in [1, 3, MAX_PAGES] {
            let data = text(pages);
            for encoding in [Encoding::Lz4, Encoding::Zstd] {
                let encoded = encoder.encode(encoding, &data).unwrap().to_vec();
                assert!(encoded.len() < data.len() / 2);
                assert_eq!(decoder.decode(encoding, &encoded, pages).unwrap(), data);
            }
            let noise = noise(pages);
            assert_eq!(encoder.encode(Encoding::Lz4, &noise), None);
            assert_eq!(encoder.encode(Encoding::Zstd, &noise), None);
            assert_eq!(decoder.decode(Encoding::Raw, &noise, pages).unwrap(), noise);
        }
    }

    #[test]
    fn garbage_is_an_error() {
        let (mut encoder, mut decoder) = (Encoder::new().unwrap(), Decoder::new().unwrap());
        let data = text(4);
        for encoding in [Encoding::Lz4, Encoding::Zstd] {
            let good = encoder.encode(encoding, &data).unwrap().to_vec();
            for pages in [1, 3, 5, MAX_PAGES] {
                assert!(decoder.decode(encoding, &good, pages).is_err());
            }
            assert!(decoder.decode(encoding, &good, MAX_PAGES + 1).is_err());
            for seed in 0..2000 {
                let mut bad = good.clone();
                let at = seed * 7919 % bad.len();
                bad[at] ^= 1 << (seed % 8);
                bad.truncate(bad.len() - seed % 3);
                // Some changes still decode to the full length: the checksum is there for those.
                let _ = decoder.decode(encoding, &bad, 4);
                let _ = decoder.decode(encoding, &noise(1)[at % 1000..], 4);
            }
        }
        assert!(decoder.decode(Encoding::Raw, &data[1..], 4).is_err());
    }

    /// A thread and a link, as `Choice` sees them: 0.6 ns a byte of base work, encoders at the
    /// speeds measured, and a link at `ns` a byte behind a send queue of 4 MB. Returns what most
    /// batches used once it has settled.
    fn settled(ns: f64, ratios: [f64; 3]) -> Encoding {
        let mut choice = Choice::default();
        let raw = MAX_PAGES * PAGE;
        let mut used = [0; 3];
        let mut queue = 0.0;
        for batch in 0..600 {
            let tried = choice.next();
            let ratio = ratios[tried as usize];
            let wire = if ratio < WORTH { ratio } else { 1.0 } * raw as f64;
            let encoding = [0.0, 2.0, 3.5][tried as usize] * raw as f64;
            let work = 0.6 * raw as f64 + encoding;
            // What does not fit into the queue waits until it does.
            let blocked = ((queue + wire - work / ns - 4e6) * ns).max(0.0);
            let total = work + blocked;
            let drained = (total / ns).min(queue + wire);
            queue += wire - drained;
            let span = |ns: f64| Duration::from_nanos(ns as u64);
            choice.learn(&Sample {
                tried,
                raw,
                encoded: wire as usize,
                drained: drained as i64,
                queue: queue as i64,
                encoding: span(encoding),
                work: span(work),
                blocked: span(blocked),
                total: span(total),
            });
            if batch >= 100 {
                used[tried as usize] += 1;
            }
        }
        let most = (0..3).max_by_key(|at| used[*at]).unwrap();
        assert!(used[most] > 400, "it settles: {used:?} at {ns} ns a byte");
        [Encoding::Raw, Encoding::Lz4, Encoding::Zstd][most]
    }

    #[test]
    fn the_choice_follows_the_link() {
        let source_code = [1.0, 0.35, 0.2];
        assert_eq!(settled(0.3, source_code), Encoding::Raw); // faster than a core copies
        assert_eq!(settled(1.0, source_code), Encoding::Raw); // 8 Gbit/s
        assert_eq!(settled(8.4, source_code), Encoding::Lz4); // 1 Gbit/s
        assert_eq!(settled(16.8, source_code), Encoding::Lz4); // two streams on 1 Gbit/s
        assert_eq!(settled(84.0, source_code), Encoding::Zstd); // 100 Mbit/s
        for ns in [0.3, 8.4, 84.0] {
            let incompressible = settled(ns, [1.0; 3]);
            assert_eq!(incompressible, Encoding::Raw, "at {ns} ns a byte");
        }
    }
}
