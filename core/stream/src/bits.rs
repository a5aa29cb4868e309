//! Page sets that several threads take from.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};

use ferry_pages::{PageId, PageSet};

const BITS: u32 = u64::BITS;

/// A set of pages, a bit a page, changed by atomic operations.
pub struct AtomicPages {
    shape: Vec<u32>,
    words: Vec<Vec<AtomicU64>>,
    len: AtomicUsize,
}

impl AtomicPages {
    /// The empty set.
    #[must_use]
    pub fn new(shape: &[u32]) -> Self {
        Self::from_set(&PageSet::new(shape))
    }

    /// A set with what is in `set`.
    #[must_use]
    pub fn from_set(set: &PageSet) -> Self {
        let blocks = 0..set.shape().len() as u16;
        Self {
            shape: set.shape().to_vec(),
            words: blocks
                .map(|block| {
                    set.words(block)
                        .iter()
                        .map(|w| AtomicU64::new(*w))
                        .collect()
                })
                .collect(),
            len: AtomicUsize::new(set.len()),
        }
    }

    /// What is in it now, not of one instant while others change it.
    #[must_use]
    pub fn to_set(&self) -> PageSet {
        let mut set = PageSet::new(&self.shape);
        for (block, words) in self.words.iter().enumerate() {
            let words: Vec<u64> = words.iter().map(|word| word.load(SeqCst)).collect();
            set.set_words(block as u16, &words)
                .expect("bits are set inside the shape only");
        }
        set
    }

    /// Number of pages in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len.load(SeqCst)
    }

    /// Whether the page exists in this shape.
    #[must_use]
    pub fn has(&self, id: PageId) -> bool {
        self.shape
            .get(usize::from(id.block))
            .is_some_and(|pages| id.page < *pages)
    }

    fn word(&self, id: PageId) -> (&AtomicU64, u64) {
        let word = &self.words[usize::from(id.block)][(id.page / BITS) as usize];
        (word, 1 << (id.page % BITS))
    }

    /// Whether the page is in it.
    #[must_use]
    pub fn contains(&self, id: PageId) -> bool {
        let (word, bit) = self.word(id);
        word.load(SeqCst) & bit != 0
    }

    /// Takes the page out; true for the one caller that did.
    pub fn take(&self, id: PageId) -> bool {
        let (word, bit) = self.word(id);
        let was = word.fetch_and(!bit, SeqCst) & bit != 0;
        if was {
            self.len.fetch_sub(1, SeqCst);
        }
        was
    }

    /// Puts the page in; true for the one caller that did.
    pub fn put(&self, id: PageId) -> bool {
        assert!(
            self.has(id),
            "page {} is outside block {}",
            id.page,
            id.block
        );
        let (word, bit) = self.word(id);
        let new = word.fetch_or(bit, SeqCst) & bit == 0;
        if new {
            self.len.fetch_add(1, SeqCst);
        }
        new
    }

    /// The first page of the set that is not before `from`.
    #[must_use]
    pub fn next_at_or_after(&self, from: PageId) -> Option<PageId> {
        let mut page = from.page;
        for block in usize::from(from.block)..self.shape.len() {
            if let Some(page) = self.next_in(block, page) {
                let block = block as u16;
                return Some(PageId { block, page });
            }
            page = 0;
        }
        None
    }

    fn next_in(&self, block: usize, from: u32) -> Option<u32> {
        let words = &self.words[block];
        let mut at = (from / BITS) as usize;
        let mut keep = u64::MAX << (from % BITS);
        while at < words.len() {
            let word = words[at].load(SeqCst) & keep;
            if word != 0 {
                return Some(at as u32 * BITS + word.trailing_zeros());
            }
            keep = u64::MAX;
            at += 1;
        }
        None
    }
}
