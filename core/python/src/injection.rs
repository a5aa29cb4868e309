//! Calls made inside another process, and its keeper, as Python sees them.

use std::os::fd::IntoRawFd;

use ferry_pages as core;
use ferry_pages::FaultSource;
use pyo3::prelude::*;

use crate::failure::Failure;

/// Adds this part to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(inject_userfaultfd, module)?)?;
    module.add_function(wrap_pyfunction!(inject_userfaultfd_from, module)?)?;
    module.add_function(wrap_pyfunction!(inject_close, module)?)?;
    module.add_function(wrap_pyfunction!(inject_discard, module)?)?;
    module.add_function(wrap_pyfunction!(find_userfaultfd, module)?)?;
    module.add_function(wrap_pyfunction!(make_keeper, module)?)?;
    module.add_function(wrap_pyfunction!(reap_keeper, module)?)
}

/// (our descriptor, its number there or -1)
fn inject(
    py: Python<'_>,
    pid: i32,
    source: FaultSource,
    keep_open: bool,
) -> Result<(i32, i32), Failure> {
    let (ours, theirs) = py.detach(|| core::inject_userfaultfd(pid, source, keep_open))?;
    Ok((ours.into_raw_fd(), theirs.unwrap_or(-1)))
}

#[pyfunction]
#[pyo3(signature = (pid, *, user_mode_only, keep_open))]
fn inject_userfaultfd(
    py: Python<'_>,
    pid: i32,
    user_mode_only: bool,
    keep_open: bool,
) -> Result<(i32, i32), Failure> {
    let source = if user_mode_only {
        FaultSource::UserMode
    } else {
        FaultSource::AnyMode
    };
    inject(py, pid, source, keep_open)
}

#[pyfunction]
#[pyo3(signature = (pid, device, *, keep_open))]
fn inject_userfaultfd_from(
    py: Python<'_>,
    pid: i32,
    device: i32,
    keep_open: bool,
) -> Result<(i32, i32), Failure> {
    inject(py, pid, FaultSource::Device(device), keep_open)
}

#[pyfunction]
fn inject_close(py: Python<'_>, pid: i32, descriptor: i32) -> Result<(), Failure> {
    Ok(py.detach(|| core::inject_close(pid, descriptor))?)
}

#[pyfunction]
fn inject_discard(py: Python<'_>, pid: i32, address: u64, length: u64) -> Result<(), Failure> {
    Ok(py.detach(|| core::inject_discard(pid, address, length))?)
}

#[pyfunction]
fn find_userfaultfd(pid: i32) -> Result<Vec<i32>, Failure> {
    Ok(core::find_userfaultfd(pid)?)
}

#[pyfunction]
fn make_keeper(py: Python<'_>, pid: i32) -> Result<i32, Failure> {
    Ok(py.detach(|| core::make_keeper(pid))?)
}

#[pyfunction]
fn reap_keeper(py: Python<'_>, pid: i32, keeper: i32) -> Result<(), Failure> {
    Ok(py.detach(|| core::reap_keeper(pid, keeper))?)
}
