//! The memory of a process that is not ours: found, tracked, read, written and trapped from outside.
//!
//! Nothing here decides what to move or when. Pages are 4096 bytes everywhere; a page is named by
//! the index of its RAM block and its index inside it, whatever page size the mapping has.

mod apart;
mod block;
mod digest;
mod error;
mod inject;
mod keeper;
mod memory;
mod page_set;
mod pagemap;
mod populated;
mod process;
mod stop;
mod tracer;
mod tracker;
mod userfaultfd;

pub use block::{Block, PAGE_SIZE, PageId};
pub use digest::{is_zero, page_digest};
pub use error::PagesError;
pub use inject::{FaultSource, inject_close, inject_discard, inject_userfaultfd};
pub use keeper::{make_keeper, reap_keeper};
pub use memory::Memory;
pub use page_set::PageSet;
pub use process::find_userfaultfd;
pub use rustix::io::Errno;
pub use tracker::Tracker;
pub use userfaultfd::{FaultEvent, InstallError, Mode, Userfaultfd, features};
