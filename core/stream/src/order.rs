//! In which order an active push goes through the missing pages.
//!
//! One pivot that follows the guest: the push goes on with the page after the last fault, and
//! wraps around at the end of memory. An order that knows more (bubbling outwards, several pivots;
//! Hines et al. 2009) is another implementation of `fault` and `next`.

use ferry_pages::PageId;

use crate::bits::AtomicPages;

/// Where the push stands.
#[derive(Debug)]
pub struct Order {
    at: PageId,
}

const START: PageId = PageId { block: 0, page: 0 };

fn after(id: PageId) -> PageId {
    match id.page.checked_add(1) {
        Some(page) => PageId { page, ..id },
        None => PageId {
            block: id.block.saturating_add(1),
            page: 0,
        },
    }
}

impl Default for Order {
    fn default() -> Self {
        Self { at: START }
    }
}

impl Order {
    /// The guest waits for this page: its neighbours come next.
    pub fn fault(&mut self, id: PageId) {
        self.at = after(id);
    }

    /// Takes up to `most` pages of one block out of `unsent` into `batch`.
    pub fn next(&mut self, unsent: &AtomicPages, most: usize, batch: &mut Vec<PageId>) {
        batch.clear();
        let mut wrapped = false;
        while batch.len() < most {
            match unsent.next_at_or_after(self.at) {
                Some(id) => {
                    if batch.first().is_some_and(|first| first.block != id.block) {
                        return;
                    }
                    self.at = after(id);
                    if unsent.take(id) {
                        batch.push(id);
                    }
                }
                None if wrapped || !batch.is_empty() => return,
                None => {
                    wrapped = true;
                    self.at = START;
                }
            }
        }
    }
}
