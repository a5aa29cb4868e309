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

#[cfg(test)]
mod tests {
    use ferry_pages::PageSet;

    use super::*;

    fn id(block: u16, page: u32) -> PageId {
        PageId { block, page }
    }

    #[test]
    fn every_page_once_from_the_pivot_on() {
        let mut set = PageSet::new(&[100, 70]);
        set.insert_range(0, 10, 30);
        set.insert_range(1, 0, 70);
        let unsent = AtomicPages::from_set(&set);
        let mut order = Order::default();
        let mut batch = Vec::new();
        order.next(&unsent, 16, &mut batch);
        assert_eq!(batch, (10..26).map(|page| id(0, page)).collect::<Vec<_>>());
        order.fault(id(1, 64));
        order.next(&unsent, 16, &mut batch);
        assert_eq!(batch, (65..70).map(|page| id(1, page)).collect::<Vec<_>>());
        // It wraps around, and a batch stays in its block.
        order.next(&unsent, 16, &mut batch);
        assert_eq!(batch, (26..30).map(|page| id(0, page)).collect::<Vec<_>>());
        let mut count = 0;
        loop {
            order.next(&unsent, 16, &mut batch);
            count += batch.len();
            if batch.is_empty() {
                break;
            }
        }
        assert_eq!((count, unsent.len()), (65, 0));
    }

    #[test]
    fn a_fault_on_the_last_page_there_can_be() {
        let mut order = Order::default();
        order.fault(id(u16::MAX, u32::MAX));
        let unsent = AtomicPages::from_set(&PageSet::full(&[3]));
        let mut batch = Vec::new();
        order.next(&unsent, 16, &mut batch);
        assert_eq!(batch.len(), 3);
    }
}
