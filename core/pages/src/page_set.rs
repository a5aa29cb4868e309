//! Sets of pages, a bit a page.

use crate::{PageId, PagesError};

/// A set of pages of a guest: one bitmap a block.
///
/// Operations on two sets ask for the same shape and panic otherwise; `same_shape` tells.
/// A page outside the shape is in no set, and adding one panics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    shape: Vec<u32>,
    words: Vec<Vec<u64>>,
}

const BITS: u32 = u64::BITS;

/// Bits `[start, stop)` of a word, `start < stop <= 64`.
fn mask(start: u32, stop: u32) -> u64 {
    (u64::MAX >> (BITS - (stop - start))) << start
}

impl PageSet {
    /// The empty set over blocks of so many pages each.
    #[must_use]
    pub fn new(shape: &[u32]) -> Self {
        assert!(
            shape.len() <= usize::from(u16::MAX) + 1,
            "at most 65,536 blocks"
        );
        Self {
            shape: shape.to_vec(),
            words: shape
                .iter()
                .map(|pages| vec![0; pages.div_ceil(BITS) as usize])
                .collect(),
        }
    }

    /// The set of all pages.
    #[must_use]
    pub fn full(shape: &[u32]) -> Self {
        let mut set = Self::new(shape);
        for (block, pages) in shape.iter().enumerate() {
            set.insert_range(block_id(block), 0, *pages);
        }
        set
    }

    /// Pages of each block.
    #[must_use]
    pub fn shape(&self) -> &[u32] {
        &self.shape
    }

    /// Whether the two are over the same blocks, so that they mix.
    #[must_use]
    pub fn same_shape(&self, other: &Self) -> bool {
        self.shape == other.shape
    }

    /// Number of pages in the set. Counts: about 1 µs a GiB of guest.
    #[must_use]
    pub fn len(&self) -> usize {
        (0..self.shape.len())
            .map(|block| self.count(block_id(block)) as usize)
            .sum()
    }

    /// Whether no page is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().flatten().all(|word| *word == 0)
    }

    /// Number of pages of one block in the set.
    #[must_use]
    pub fn count(&self, block: u16) -> u32 {
        self.words[usize::from(block)]
            .iter()
            .map(|word| word.count_ones())
            .sum()
    }

    /// Adds a page; says whether it is new.
    pub fn insert(&mut self, id: PageId) -> bool {
        assert!(
            self.has(id),
            "page {} of block {} is outside the set",
            id.page,
            id.block
        );
        let word = &mut self.words[usize::from(id.block)][(id.page / BITS) as usize];
        let bit = 1 << (id.page % BITS);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Takes a page out; says whether it was in.
    pub fn remove(&mut self, id: PageId) -> bool {
        if !self.has(id) {
            return false;
        }
        let word = &mut self.words[usize::from(id.block)][(id.page / BITS) as usize];
        let bit = 1 << (id.page % BITS);
        let was = *word & bit != 0;
        *word &= !bit;
        was
    }

    /// Whether a page is in it.
    #[must_use]
    pub fn contains(&self, id: PageId) -> bool {
        self.has(id)
            && self.words[usize::from(id.block)][(id.page / BITS) as usize] >> (id.page % BITS) & 1
                == 1
    }

    /// Adds pages `[start, stop)` of a block.
    pub fn insert_range(&mut self, block: u16, start: u32, stop: u32) {
        self.on_range(block, start, stop, |word, bits| *word |= bits);
    }

    /// Takes pages `[start, stop)` of a block out.
    pub fn remove_range(&mut self, block: u16, start: u32, stop: u32) {
        self.on_range(block, start, stop, |word, bits| *word &= !bits);
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.words.iter_mut().flatten().for_each(|word| *word = 0);
    }

    /// Adds what is in `other`.
    pub fn union_with(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| *mine |= theirs);
    }

    /// Keeps only what is in `other` as well.
    pub fn intersect_with(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| *mine &= theirs);
    }

    /// Takes out what is in `other`.
    pub fn subtract(&mut self, other: &Self) {
        self.combine(other, |mine, theirs| *mine &= !theirs);
    }

    /// All pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageId> + '_ {
        self.words.iter().enumerate().flat_map(|(block, words)| {
            words.iter().enumerate().flat_map(move |(at, word)| {
                let base = at as u32 * BITS;
                Ones(*word).map(move |bit| PageId {
                    block: block_id(block),
                    page: base + bit,
                })
            })
        })
    }

    /// The first page of the set that is not before `from`.
    #[must_use]
    pub fn next_at_or_after(&self, from: PageId) -> Option<PageId> {
        let mut page = from.page;
        for block in usize::from(from.block)..self.shape.len() {
            if let Some(page) = self.next_in(block, page, false) {
                return Some(PageId {
                    block: block_id(block),
                    page,
                });
            }
            page = 0;
        }
        None
    }

    /// Maximal runs `[start, stop)` of a block in ascending order.
    #[must_use]
    pub fn ranges(&self, block: u16) -> Vec<(u32, u32)> {
        self.iter_ranges(block).collect()
    }

    /// The same, one by one.
    pub fn iter_ranges(&self, block: u16) -> impl Iterator<Item = (u32, u32)> + '_ {
        let block = usize::from(block);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next_in(block, at, false)?;
            let stop = self
                .next_in(block, start, true)
                .unwrap_or(self.shape[block]);
            at = stop;
            Some((start, stop))
        })
    }

    /// The bitmap of a block: page `p` is bit `p % 64` of word `p / 64`.
    #[must_use]
    pub fn words(&self, block: u16) -> &[u64] {
        &self.words[usize::from(block)]
    }

    /// Replaces the bitmap of a block by one that came from elsewhere.
    ///
    /// # Errors
    /// `Argument` when its length or its last bits do not fit the block.
    pub fn set_words(&mut self, block: u16, words: &[u64]) -> Result<(), PagesError> {
        let pages = self.shape.get(usize::from(block)).copied();
        let mine = self.words.get_mut(usize::from(block));
        let (Some(pages), Some(mine)) = (pages, mine) else {
            return Err(PagesError::Argument(format!("there is no block {block}")));
        };
        let tail = pages % BITS;
        let stray = tail != 0 && words.last().is_some_and(|last| last >> tail != 0);
        if words.len() != mine.len() || stray {
            return Err(PagesError::Argument(format!(
                "a bitmap of {} words does not fit the {pages} pages of block {block}",
                words.len()
            )));
        }
        mine.copy_from_slice(words);
        Ok(())
    }

    fn has(&self, id: PageId) -> bool {
        self.shape
            .get(usize::from(id.block))
            .is_some_and(|pages| id.page < *pages)
    }

    /// The first page of `block` from `from` on that is in the set, or with `absent` one that is not.
    fn next_in(&self, block: usize, from: u32, absent: bool) -> Option<u32> {
        let pages = self.shape[block];
        if from >= pages {
            return None;
        }
        let flip = if absent { u64::MAX } else { 0 };
        let words = &self.words[block];
        let first = (from / BITS) as usize;
        let head = (words[first] ^ flip) & (u64::MAX << (from % BITS));
        let (at, word) = if head != 0 {
            (first, head)
        } else {
            let ahead = words[first + 1..]
                .iter()
                .position(|word| word ^ flip != 0)?;
            (first + 1 + ahead, words[first + 1 + ahead] ^ flip)
        };
        let page = at as u32 * BITS + word.trailing_zeros();
        (page < pages).then_some(page)
    }

    fn on_range(&mut self, block: u16, start: u32, stop: u32, apply: impl Fn(&mut u64, u64)) {
        let pages = self.shape[usize::from(block)];
        assert!(
            stop <= pages,
            "page {stop} is outside block {block} of {pages} pages"
        );
        if start >= stop {
            return;
        }
        let words = &mut self.words[usize::from(block)];
        let (first, last) = ((start / BITS) as usize, ((stop - 1) / BITS) as usize);
        let (head, tail) = (start % BITS, (stop - 1) % BITS + 1);
        if first == last {
            apply(&mut words[first], mask(head, tail));
            return;
        }
        apply(&mut words[first], mask(head, BITS));
        words[first + 1..last]
            .iter_mut()
            .for_each(|word| apply(word, u64::MAX));
        apply(&mut words[last], mask(0, tail));
    }

    fn combine(&mut self, other: &Self, apply: impl Fn(&mut u64, u64)) {
        assert!(
            self.same_shape(other),
            "the two sets are over different blocks"
        );
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            mine.iter_mut()
                .zip(theirs)
                .for_each(|(mine, theirs)| apply(mine, *theirs));
        }
    }
}

fn block_id(block: usize) -> u16 {
    block as u16
}

/// Indices of the set bits of a word.
struct Ones(u64);

impl Iterator for Ones {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.0 == 0 {
            return None;
        }
        let bit = self.0.trailing_zeros();
        self.0 &= self.0 - 1;
        Some(bit)
    }
}
