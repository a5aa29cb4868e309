//! The memory of a process that is not ours: found, tracked, read, written and trapped from outside.
//!
//! Nothing here decides what to move or when. Pages are 4096 bytes everywhere; a page is named by
//! the index of its RAM block and its index inside it, whatever page size the mapping has.

mod block;
mod digest;
mod error;
mod memory;
mod page_set;
mod userfaultfd;

pub use block::{Block, PAGE_SIZE, PageId};
pub use digest::{is_zero, page_digest};
pub use error::PagesError;
pub use memory::Memory;
pub use page_set::PageSet;
pub use rustix::io::Errno;
pub use userfaultfd::{FaultEvent, InstallError, Mode, Userfaultfd, features};
