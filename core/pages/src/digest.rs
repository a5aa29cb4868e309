//! Looking at the content of a page that has been copied out.

use xxhash_rust::xxh3::xxh3_64;

/// Whether all bytes are zero. Leaves at the first block of 256 bytes that is not.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    let mut blocks = page.chunks_exact(256);
    blocks
        .by_ref()
        .all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
        && blocks.remainder().iter().all(|byte| *byte == 0)
}

/// xxh3-64 of a page; 0 stands for a page of zeros, and for nothing else.
#[must_use]
pub fn page_digest(page: &[u8]) -> u64 {
    if is_zero(page) {
        0
    } else {
        xxh3_64(page).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zeros_have_digest_zero() {
        let mut page = vec![0; 4096];
        assert!(is_zero(&page));
        assert_eq!(page_digest(&page), 0);
        for at in [0, 255, 256, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page));
            assert_ne!(page_digest(&page), 0);
            page[at] = 0;
        }
        assert!(!is_zero(&[0, 0, 1]));
        assert!(is_zero(&[]));
    }
}
