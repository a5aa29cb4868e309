//! Page sets against the standard library's sets.

use std::collections::BTreeSet;

use ferry_pages::{PageId, PageSet};
use proptest::prelude::*;

const SHAPE: [u32; 4] = [1, 64, 200, 129];

/// Adds or removes pages `[start, stop)` of a block.
type Step = (bool, u16, u32, u32);

fn step() -> impl Strategy<Value = Step> {
    (any::<bool>(), 0..SHAPE.len()).prop_flat_map(|(add, block)| {
        let pages = SHAPE[block];
        (0..=pages, 0..=pages).prop_map(move |(a, b)| (add, block as u16, a.min(b), a.max(b)))
    })
}

fn build(steps: &[Step]) -> (PageSet, BTreeSet<PageId>) {
    let mut set = PageSet::new(&SHAPE);
    let mut model = BTreeSet::new();
    for (add, block, start, stop) in steps.iter().copied() {
        let pages = (start..stop).map(|page| PageId { block, page });
        if add {
            set.insert_range(block, start, stop);
            model.extend(pages);
        } else {
            set.remove_range(block, start, stop);
            pages.for_each(|id| {
                model.remove(&id);
            });
        }
    }
    (set, model)
}

fn runs(model: &BTreeSet<PageId>, block: u16) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for id in model.iter().filter(|id| id.block == block) {
        match runs.last_mut() {
            Some(last) if last.1 == id.page => last.1 += 1,
            _ => runs.push((id.page, id.page + 1)),
        }
    }
    runs
}

fn sets() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 0..12)
}

proptest! {
    #[test]
    fn it_holds_what_was_added_and_not_removed(steps in sets()) {
        let (set, model) = build(&steps);
        prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
        prop_assert_eq!(set.len(), model.len());
        prop_assert_eq!(set.is_empty(), model.is_empty());
        for block in 0..SHAPE.len() as u16 {
            prop_assert_eq!(set.ranges(block), runs(&model, block));
            let count = model.iter().filter(|id| id.block == block).count();
            prop_assert_eq!(set.count(block) as usize, count);
        }
    }

    #[test]
    fn single_pages_are_ranges_of_one(steps in sets(), (_, block, page, stop) in step()) {
        prop_assume!(page < stop);
        let id = PageId { block, page };
        let (mut set, mut model) = build(&steps);
        prop_assert_eq!(set.contains(id), model.contains(&id));
        prop_assert_eq!(set.insert(id), model.insert(id));
        prop_assert!(set.contains(id));
        prop_assert_eq!(set.remove(id), model.remove(&id));
        prop_assert!(!set.contains(id));
        prop_assert!(!set.remove(id));
    }

    #[test]
    fn two_combine_as_sets_do(a in sets(), b in sets()) {
        let ((a, a_model), (b, b_model)) = (build(&a), build(&b));
        let mut union = a.clone();
        union.union_with(&b);
        prop_assert!(union.iter().eq(a_model.union(&b_model).copied()));
        let mut common = a.clone();
        common.intersect_with(&b);
        prop_assert!(common.iter().eq(a_model.intersection(&b_model).copied()));
        let mut rest = a.clone();
        rest.subtract(&b);
        prop_assert!(rest.iter().eq(a_model.difference(&b_model).copied()));
        rest.union_with(&common);
        prop_assert_eq!(rest, a);
    }

    #[test]
    fn the_next_page_is_the_first_not_before(
        steps in sets(), block in 0..6_u16, page in 0..300_u32,
    ) {
        let (set, model) = build(&steps);
        let from = PageId { block, page };
        prop_assert_eq!(set.next_at_or_after(from), model.range(from..).next().copied());
    }

    #[test]
    fn bitmaps_travel(steps in sets()) {
        let (set, _) = build(&steps);
        let mut copy = PageSet::new(&SHAPE);
        for block in 0..SHAPE.len() as u16 {
            copy.set_words(block, set.words(block)).unwrap();
        }
        prop_assert_eq!(copy, set);
    }
}

#[test]
fn bitmaps_that_do_not_fit_are_refused() {
    let mut set = PageSet::new(&SHAPE);
    assert!(set.set_words(0, &[2]).is_err());
    assert!(set.set_words(1, &[1, 0]).is_err());
    assert!(set.set_words(1, &[]).is_err());
    assert!(set.set_words(9, &[1]).is_err());
    assert!(set.set_words(1, &[u64::MAX]).is_ok());
    assert_eq!(set.len(), 64);
}

#[test]
fn the_full_set_has_every_page() {
    let full = PageSet::full(&SHAPE);
    assert_eq!(full.len(), SHAPE.iter().sum::<u32>() as usize);
    assert_eq!(full.ranges(2), [(0, 200)]);
}
