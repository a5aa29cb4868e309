//! `vmferry._core`: the Rust core as Python sees it. `_core.pyi` says what each part means.

mod failure;
mod injection;
mod pages;
mod stream;

use pyo3::prelude::*;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    failure::register(module)?;
    injection::register(module)?;
    pages::register(module)?;
    stream::register(module)
}
