//! What a page holds: all of it follows from its number and its generation, so that a page that
//! is stale, torn, lost or in the wrong place is told from the right one.

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// The kind of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Words of a small vocabulary: compresses as text does.
    Text,
    /// Incompressible.
    Random,
    /// Zeros in every even generation, text in every odd one: pages turn to zero and back.
    Zero,
}

const WORDS: [&[u8]; 32] = [
    b"the ",
    b"guest ",
    b"page ",
    b"memory ",
    b"of ",
    b"and ",
    b"to ",
    b"host ",
    b"migration ",
    b"downtime ",
    b"a ",
    b"is ",
    b"dirty ",
    b"round ",
    b"source ",
    b"destination ",
    b"network ",
    b"was ",
    b"that ",
    b"fault ",
    b"copy ",
    b"write ",
    b"read ",
    b"when ",
    b"until ",
    b"stops ",
    b"resumes ",
    b"virtual ",
    b"machine ",
    b"with ",
    b"from ",
    b"again\n",
];

impl Pattern {
    /// The pattern of that name on the command line.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "text" => Some(Self::Text),
            "random" => Some(Self::Random),
            "zero" => Some(Self::Zero),
            _ => None,
        }
    }

    /// One byte that names it in the device state.
    pub fn code(self) -> u8 {
        match self {
            Self::Text => 0,
            Self::Random => 1,
            Self::Zero => 2,
        }
    }

    /// Writes the content of that page in that generation. Generation 0 was never written: zeros.
    pub fn fill(self, page: u64, generation: u32, out: &mut [u8; PAGE]) {
        if generation == 0 || (self == Self::Zero && generation % 2 == 0) {
            out.fill(0);
            return;
        }
        out[..8].copy_from_slice(&page.to_le_bytes());
        out[8..12].copy_from_slice(&generation.to_le_bytes());
        out[12..16].copy_from_slice(b"page");
        let mut state = Random(page << 32 ^ u64::from(generation));
        let mut at = 16;
        if self == Self::Random {
            while at < PAGE {
                out[at..at + 8].copy_from_slice(&state.next().to_le_bytes());
                at += 8;
            }
            return;
        }
        while at < PAGE {
            let mut bits = state.next();
            for _ in 0..12 {
                let word = WORDS[(bits & 31) as usize];
                bits >>= 5;
                let length = word.len().min(PAGE - at);
                out[at..at + length].copy_from_slice(&word[..length]);
                at += length;
            }
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): eight bytes of state, any seed is good.
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_and_generations_differ_and_repeat() {
        for pattern in [Pattern::Text, Pattern::Random] {
            let content = |page, generation| {
                let mut out = [0; PAGE];
                pattern.fill(page, generation, &mut out);
                out
            };
            assert_eq!(content(5, 3), content(5, 3));
            assert_ne!(content(5, 3), content(5, 4));
            assert_ne!(content(5, 3), content(6, 3));
            assert_eq!(content(5, 0), [0; PAGE]);
        }
    }

    #[test]
    fn zero_pattern_comes_and_goes() {
        let mut out = [1; PAGE];
        Pattern::Zero.fill(9, 2, &mut out);
        assert_eq!(out, [0; PAGE]);
        Pattern::Zero.fill(9, 3, &mut out);
        assert_ne!(out, [0; PAGE]);
    }
}
