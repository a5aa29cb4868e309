//! Page sets, memory and dirty tracking, as Python sees them.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_pages as core;
use ferry_pages::{PAGE_SIZE, PagesError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::failure::Failure;

/// Adds this part to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("PAGE_SIZE", PAGE_SIZE)?;
    module.add_class::<Block>()?;
    module.add_class::<PageSet>()?;
    module.add_class::<Memory>()?;
    module.add_class::<Tracker>()?;
    module.add_function(wrap_pyfunction!(differing_pages, module)?)?;
    module.add_function(wrap_pyfunction!(count_differing, module)?)
}

/// Most indices that `differing_pages` names.
const NAMED: usize = 64;

fn differing<'a>(a: &'a [u8], b: &'a [u8]) -> Result<impl Iterator<Item = usize> + 'a, Failure> {
    if a.len() != b.len() || a.len() % 8 != 0 {
        return Err(argument(format!(
            "digests of {} and {} bytes do not compare",
            a.len(),
            b.len()
        )));
    }
    let pairs = a.chunks_exact(8).zip(b.chunks_exact(8));
    Ok(pairs
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(index, _)| index))
}

#[pyfunction]
fn differing_pages(a: &[u8], b: &[u8]) -> Result<Vec<usize>, Failure> {
    Ok(differing(a, b)?.take(NAMED).collect())
}

#[pyfunction]
fn count_differing(py: Python<'_>, a: &[u8], b: &[u8]) -> Result<usize, Failure> {
    py.detach(|| Ok(differing(a, b)?.count()))
}

#[pyclass(frozen, eq, module = "vmferry._core")]
#[derive(Clone, PartialEq)]
pub struct Block(core::Block);

#[pymethods]
impl Block {
    #[new]
    #[pyo3(signature = (name, address, length, page_size = 4096, shared = false))]
    fn new(name: String, address: u64, length: u64, page_size: u64, shared: bool) -> Self {
        Self(core::Block {
            name,
            address,
            length,
            page_size,
            shared,
        })
    }

    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    #[getter]
    fn address(&self) -> u64 {
        self.0.address
    }

    #[getter]
    fn length(&self) -> u64 {
        self.0.length
    }

    #[getter]
    fn page_size(&self) -> u64 {
        self.0.page_size
    }

    #[getter]
    fn shared(&self) -> bool {
        self.0.shared
    }

    #[getter]
    fn pages(&self) -> u32 {
        self.0.pages()
    }

    fn __repr__(&self) -> String {
        let core::Block {
            name,
            address,
            length,
            page_size,
            shared,
        } = &self.0;
        let shared = if *shared { "True" } else { "False" };
        format!("Block({name:?}, {address:#x}, {length}, {page_size}, {shared})")
    }
}

/// Frozen but for `add` and `discard`, so the core may keep reading a clone.
#[pyclass(module = "vmferry._core")]
#[derive(Clone)]
pub struct PageSet(pub core::PageSet);

impl PageSet {
    fn with(
        &self,
        other: &Self,
        combine: fn(&mut core::PageSet, &core::PageSet),
    ) -> Result<Self, Failure> {
        if !self.0.same_shape(&other.0) {
            return Err(unlike(&self.0, other.0.shape()));
        }
        let mut result = self.0.clone();
        combine(&mut result, &other.0);
        Ok(Self(result))
    }

    fn check_range(&self, block: u16, start: u32, stop: u32) -> Result<(), Failure> {
        match self.0.shape().get(usize::from(block)) {
            Some(pages) if start <= stop && stop <= *pages => Ok(()),
            Some(pages) => Err(argument(format!(
                "pages {start} to {stop} are not inside block {block} of {pages} pages"
            ))),
            None => Err(no_block(block)),
        }
    }

    fn check_block(&self, block: u16) -> Result<(), Failure> {
        self.check_range(block, 0, 0)
    }
}

fn argument(text: String) -> Failure {
    PagesError::Argument(text).into()
}

fn no_block(block: u16) -> Failure {
    argument(format!("there is no block {block}"))
}

/// The error for a set that is not over these blocks.
pub fn unlike(set: &core::PageSet, shape: &[u32]) -> Failure {
    argument(format!(
        "a page set over blocks of {:?} pages does not fit {shape:?}",
        set.shape()
    ))
}

#[pymethods]
impl PageSet {
    #[new]
    fn new(shape: Vec<u32>) -> Result<Self, Failure> {
        if shape.len() > usize::from(u16::MAX) {
            return Err(argument("more than 65,535 blocks".into()));
        }
        Ok(Self(core::PageSet::new(&shape)))
    }

    #[getter]
    fn shape(&self) -> Vec<u32> {
        self.0.shape().to_vec()
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __bool__(&self) -> bool {
        !self.0.is_empty()
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    fn __or__(&self, other: &Self) -> Result<Self, Failure> {
        self.with(other, core::PageSet::union_with)
    }

    fn __and__(&self, other: &Self) -> Result<Self, Failure> {
        self.with(other, core::PageSet::intersect_with)
    }

    fn __sub__(&self, other: &Self) -> Result<Self, Failure> {
        self.with(other, core::PageSet::subtract)
    }

    fn add(&mut self, block: u16, start: u32, stop: u32) -> Result<(), Failure> {
        self.check_range(block, start, stop)?;
        self.0.insert_range(block, start, stop);
        Ok(())
    }

    fn discard(&mut self, block: u16, start: u32, stop: u32) -> Result<(), Failure> {
        self.check_range(block, start, stop)?;
        self.0.remove_range(block, start, stop);
        Ok(())
    }

    fn contains(&self, block: u16, page: u32) -> bool {
        self.0.contains(core::PageId { block, page })
    }

    fn count(&self, block: u16) -> Result<u32, Failure> {
        self.check_block(block)?;
        Ok(self.0.count(block))
    }

    fn ranges(&self, block: u16) -> Result<Vec<(u32, u32)>, Failure> {
        self.check_block(block)?;
        Ok(self.0.ranges(block))
    }

    fn __repr__(&self) -> String {
        let all: usize = self.0.shape().iter().map(|pages| *pages as usize).sum();
        format!("<PageSet: {} of {all} pages>", self.0.len())
    }
}

#[pyclass(frozen, module = "vmferry._core")]
pub struct Memory(pub Arc<core::Memory>);

#[pymethods]
impl Memory {
    #[new]
    fn new(pid: i32, blocks: Vec<PyRef<'_, Block>>) -> Result<Self, Failure> {
        let blocks = blocks.iter().map(|block| block.0.clone()).collect();
        Ok(Self(Arc::new(core::Memory::new(pid, blocks)?)))
    }

    #[getter]
    fn pid(&self) -> i32 {
        self.0.pid()
    }

    #[getter]
    fn blocks(&self) -> Vec<Block> {
        self.0.blocks().iter().cloned().map(Block).collect()
    }

    #[getter]
    fn shape(&self) -> Vec<u32> {
        self.0.shape().to_vec()
    }

    fn read<'py>(
        &self,
        py: Python<'py>,
        block: u16,
        offset: u64,
        length: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        self.0
            .check_range(block, offset, length)
            .map_err(Failure::from)?;
        PyBytes::new_with(py, length, |data| {
            py.detach(|| self.0.read(block, offset, data))
                .map_err(|error| Failure::from(error).into())
        })
    }

    fn write(&self, py: Python<'_>, block: u16, offset: u64, data: &[u8]) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.write(block, offset, data))?)
    }

    fn populated(&self, py: Python<'_>) -> Result<PageSet, Failure> {
        Ok(PageSet(py.detach(|| self.0.populated())?))
    }

    fn digests<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyBytes>, Failure> {
        let digests = py.detach(|| self.0.digests())?;
        Ok(PyBytes::new(py, &digests))
    }
}

#[pyclass(frozen, module = "vmferry._core")]
pub struct Tracker(Mutex<core::Tracker>);

impl Tracker {
    /// A call that panicked cannot have left it half done: what it found is kept inside.
    fn lock(&self) -> MutexGuard<'_, core::Tracker> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Tracker {
    #[new]
    fn new(py: Python<'_>, memory: &Memory, userfaultfd: i32) -> Result<Self, Failure> {
        let memory = Arc::clone(&memory.0);
        let userfaultfd = take_over(userfaultfd)?;
        let tracker = py.detach(|| core::Tracker::new(memory, userfaultfd.into()))?;
        Ok(Self(Mutex::new(tracker)))
    }

    fn scan(&self, py: Python<'_>) -> Result<PageSet, Failure> {
        Ok(PageSet(py.detach(|| self.lock().scan())?))
    }

    fn close(&self, py: Python<'_>) -> Result<(), Failure> {
        Ok(py.detach(|| self.lock().close())?)
    }
}

/// Ownership of a descriptor that Python hands over.
pub fn take_over(descriptor: i32) -> Result<OwnedFd, Failure> {
    if descriptor < 0 {
        return Err(argument(format!("{descriptor} is no descriptor")));
    }
    // SAFETY: not -1, and the caller gives it up; the interface says so.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
