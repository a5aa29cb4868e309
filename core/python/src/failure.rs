//! The core's errors on their way to Python.

use ferry_pages::PagesError;
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyOSError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    vmferry._core,
    CoreError,
    PyException,
    "Something the kernel or the peer refused; the message says what."
);
create_exception!(
    vmferry._core,
    StreamClosed,
    CoreError,
    "A page stream ended or broke before its work was done."
);
create_exception!(
    vmferry._core,
    PageCorrupt,
    CoreError,
    "A batch whose checksum does not match its content arrived."
);
create_exception!(
    vmferry._core,
    Cancelled,
    CoreError,
    "`cancel()` was called while the call was running."
);

/// What every method returns as its error; each crate's error has one `From` into it.
pub struct Failure(pub PyErr);

impl From<PagesError> for Failure {
    fn from(error: PagesError) -> Self {
        let text = error.to_string();
        Self(match error {
            PagesError::Injected { errno, .. } => PyOSError::new_err((errno.raw_os_error(), text)),
            PagesError::Argument(_) => PyValueError::new_err(text),
            PagesError::Gone { .. } | PagesError::Kernel { .. } => CoreError::new_err(text),
        })
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

/// Adds the exceptions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("CoreError", py.get_type::<CoreError>())?;
    module.add("StreamClosed", py.get_type::<StreamClosed>())?;
    module.add("PageCorrupt", py.get_type::<PageCorrupt>())?;
    module.add("Cancelled", py.get_type::<Cancelled>())
}
