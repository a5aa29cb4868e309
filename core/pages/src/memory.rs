//! Reading and writing another process's RAM blocks.

use std::io::{IoSlice, IoSliceMut};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use rustix::io::Errno;

use crate::{Block, PAGE_SIZE, PageId, PagesError};

/// Pieces a call; above 64 it no longer matters, and the kernel takes at most 1024.
const PIECES: usize = 512;

/// The RAM blocks of one process.
#[derive(Debug)]
pub struct Memory {
    pid: i32,
    blocks: Vec<Block>,
    shape: Vec<u32>,
    /// (first address, index) of the blocks in ascending order.
    by_address: Vec<(u64, u16)>,
}

impl Memory {
    /// Describes the memory; touches nothing.
    ///
    /// # Errors
    /// `Argument` when blocks are misaligned, overlap, or are too many.
    pub fn new(pid: i32, blocks: Vec<Block>) -> Result<Self, PagesError> {
        if pid <= 0 {
            return Err(PagesError::Argument(format!("{pid} is no process id")));
        }
        let mut by_address = Vec::with_capacity(blocks.len());
        for (index, block) in blocks.iter().enumerate() {
            block.check()?;
            let index = u16::try_from(index)
                .map_err(|_| PagesError::Argument("more than 65,536 RAM blocks".into()))?;
            by_address.push((block.address, index));
        }
        by_address.sort_unstable();
        for pair in by_address.windows(2) {
            let (low, high) = (
                &blocks[usize::from(pair[0].1)],
                &blocks[usize::from(pair[1].1)],
            );
            if low.end() > high.address {
                return Err(PagesError::Argument(format!(
                    "RAM blocks {:?} and {:?} overlap",
                    low.name, high.name
                )));
            }
        }
        let shape = blocks.iter().map(Block::pages).collect();
        Ok(Self {
            pid,
            blocks,
            shape,
            by_address,
        })
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its blocks.
    #[must_use]
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Pages of each block: the shape of its page sets.
    #[must_use]
    pub fn shape(&self) -> &[u32] {
        &self.shape
    }

    /// Where a page lies in the process. Panics for a page that it does not have.
    #[must_use]
    pub fn address_of(&self, id: PageId) -> u64 {
        let block = usize::from(id.block);
        assert!(
            id.page < self.shape[block],
            "page {} is outside block {block}",
            id.page
        );
        self.blocks[block].address + u64::from(id.page) * PAGE_SIZE as u64
    }

    /// Which page an address of the process lies in.
    #[must_use]
    pub fn page_at(&self, address: u64) -> Option<PageId> {
        let after = self
            .by_address
            .partition_point(|(start, _)| *start <= address);
        let (start, block) = *self.by_address.get(after.checked_sub(1)?)?;
        let page = (address - start) / PAGE_SIZE as u64;
        (page < u64::from(self.shape[usize::from(block)])).then_some(PageId {
            block,
            page: page as u32,
        })
    }

    /// Copies pages out, in the order given; `out` has 4096 bytes for each.
    ///
    /// Reading a page that was never touched populates it in the process.
    ///
    /// # Errors
    /// `Gone`, `Kernel`; `Argument` when `out` has the wrong length.
    pub fn read_pages(&self, pages: &[PageId], out: &mut [u8]) -> Result<(), PagesError> {
        fits(pages, out.len())?;
        self.read_pieces(self.pieces(pages), out)
    }

    /// Copies pages in, in the order given; `data` has 4096 bytes for each.
    ///
    /// # Errors
    /// As `read_pages`.
    pub fn write_pages(&self, pages: &[PageId], data: &[u8]) -> Result<(), PagesError> {
        fits(pages, data.len())?;
        self.write_pieces(self.pieces(pages), data)
    }

    /// Copies bytes out of a block.
    ///
    /// # Errors
    /// `Gone`, `Kernel`; `Argument` when the range is not inside the block.
    pub fn read(&self, block: u16, offset: u64, out: &mut [u8]) -> Result<(), PagesError> {
        let piece = self.piece(block, offset, out.len())?;
        self.read_pieces(vec![piece], out)
    }

    /// Copies bytes into a block.
    ///
    /// # Errors
    /// As `read`.
    pub fn write(&self, block: u16, offset: u64, data: &[u8]) -> Result<(), PagesError> {
        let piece = self.piece(block, offset, data.len())?;
        self.write_pieces(vec![piece], data)
    }

    /// Whether a range of bytes lies inside a block.
    ///
    /// # Errors
    /// `Argument` when it does not.
    pub fn check_range(&self, block: u16, offset: u64, length: usize) -> Result<(), PagesError> {
        self.piece(block, offset, length).map(drop)
    }

    fn piece(&self, block: u16, offset: u64, length: usize) -> Result<RemoteIoVec, PagesError> {
        let found = self
            .blocks
            .get(usize::from(block))
            .ok_or_else(|| PagesError::Argument(format!("there is no RAM block {block}")))?;
        if offset
            .checked_add(length as u64)
            .is_none_or(|end| end > found.length)
        {
            return Err(PagesError::Argument(format!(
                "{length} bytes at {offset} are not inside RAM block {:?} of {} bytes",
                found.name, found.length
            )));
        }
        Ok(RemoteIoVec {
            base: (found.address + offset) as usize,
            len: length,
        })
    }

    /// Neighbours in the list that are neighbours in memory become one piece.
    fn pieces(&self, pages: &[PageId]) -> Vec<RemoteIoVec> {
        let mut pieces: Vec<RemoteIoVec> = Vec::with_capacity(pages.len().min(PIECES));
        for id in pages {
            let base = self.address_of(*id) as usize;
            match pieces.last_mut() {
                Some(last) if last.base + last.len == base => last.len += PAGE_SIZE,
                _ => pieces.push(RemoteIoVec {
                    base,
                    len: PAGE_SIZE,
                }),
            }
        }
        pieces
    }

    fn read_pieces(&self, pieces: Vec<RemoteIoVec>, out: &mut [u8]) -> Result<(), PagesError> {
        let mut done = 0;
        self.each_call(pieces, "process_vm_readv", |batch, length| {
            let mut local = [IoSliceMut::new(&mut out[done..done + length])];
            let moved = process_vm_readv(Pid::from_raw(self.pid), &mut local, batch)?;
            done += moved;
            Ok(moved)
        })
    }

    fn write_pieces(&self, pieces: Vec<RemoteIoVec>, data: &[u8]) -> Result<(), PagesError> {
        let mut done = 0;
        self.each_call(pieces, "process_vm_writev", |batch, length| {
            let local = [IoSlice::new(&data[done..done + length])];
            let moved = process_vm_writev(Pid::from_raw(self.pid), &local, batch)?;
            done += moved;
            Ok(moved)
        })
    }

    /// Calls `transfer` on batches of pieces until all is moved. A call may move less than it was
    /// asked for, even in the middle of a piece: it goes on from there, and a page that truly
    /// cannot be reached then fails as the first of its call.
    fn each_call(
        &self,
        mut pieces: Vec<RemoteIoVec>,
        name: &str,
        mut transfer: impl FnMut(&[RemoteIoVec], usize) -> nix::Result<usize>,
    ) -> Result<(), PagesError> {
        let mut at = 0;
        while at < pieces.len() {
            let batch = &pieces[at..pieces.len().min(at + PIECES)];
            let wanted: usize = batch.iter().map(|piece| piece.len).sum();
            let mut moved = match transfer(batch, wanted) {
                Ok(0) if wanted > 0 => Err(Errno::FAULT),
                Ok(moved) => Ok(moved),
                Err(nix::Error::EINTR) => continue,
                Err(errno) => Err(Errno::from_raw_os_error(errno as i32)),
            }
            .map_err(|errno| PagesError::of_process(self.pid, name, errno))?;
            while at < pieces.len() && moved >= pieces[at].len {
                moved -= pieces[at].len;
                at += 1;
            }
            if moved > 0 {
                pieces[at].base += moved;
                pieces[at].len -= moved;
            }
        }
        Ok(())
    }
}

fn fits(pages: &[PageId], bytes: usize) -> Result<(), PagesError> {
    if pages.len() * PAGE_SIZE == bytes {
        return Ok(());
    }
    Err(PagesError::Argument(format!(
        "{bytes} bytes are not {} pages",
        pages.len()
    )))
}
