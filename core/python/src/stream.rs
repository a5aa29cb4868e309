//! Page streams, as Python sees them.

use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use ferry_stream as core;
use ferry_stream::{StreamError, Token};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::failure::{Cancelled, CoreError, Failure, PageCorrupt, StreamClosed};
use crate::pages::{Memory, PageSet};

impl From<StreamError> for Failure {
    fn from(error: StreamError) -> Self {
        let text = error.to_string();
        Self(match error {
            StreamError::Closed(_) => StreamClosed::new_err(text),
            StreamError::Corrupt(_) => PageCorrupt::new_err(text),
            StreamError::Cancelled => Cancelled::new_err(text),
            StreamError::Refused(_) => CoreError::new_err(text),
            StreamError::Argument(_) => PyValueError::new_err(text),
        })
    }
}

/// Adds this part to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Credentials>()?;
    module.add_class::<Stream>()?;
    module.add_class::<Progress>()?;
    module.add_class::<Sender>()?;
    module.add_class::<FaultStats>()?;
    module.add_class::<Receiver>()
}

/// Takes over a descriptor that Python gives up.
fn taken(descriptor: RawFd) -> Result<OwnedFd, Failure> {
    if descriptor < 0 {
        return Err(Failure(PyValueError::new_err("not a descriptor")));
    }
    // SAFETY: the caller gives it up, as `_core.pyi` says of each method that takes one.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[pyclass(frozen, module = "vmferry._core")]
pub struct Credentials(core::Credentials);

#[pymethods]
impl Credentials {
    #[new]
    fn new(certificate: &[u8], key: &[u8], peers: Vec<Vec<u8>>) -> Result<Self, Failure> {
        Ok(Self(core::Credentials::new(certificate, key, &peers)?))
    }
}

/// Empty once a sender or receiver has taken it, or it was closed.
#[pyclass(frozen, module = "vmferry._core")]
pub struct Stream(Mutex<Option<core::Channel>>);

impl Stream {
    fn take(&self) -> Result<core::Channel, Failure> {
        let mut held = self.0.lock().expect("nobody panics inside");
        held.take()
            .ok_or_else(|| Failure(PyValueError::new_err("the stream is in use or closed")))
    }

    fn over(channel: core::Channel) -> Self {
        Self(Mutex::new(Some(channel)))
    }
}

fn take_all(streams: &[PyRef<'_, Stream>]) -> Result<Vec<core::Channel>, Failure> {
    streams.iter().map(|stream| stream.take()).collect()
}

#[pymethods]
impl Stream {
    #[staticmethod]
    fn connect(
        py: Python<'_>,
        socket: RawFd,
        credentials: &Credentials,
        token: &[u8],
        urgent: bool,
    ) -> Result<Self, Failure> {
        let socket = taken(socket)?;
        let token: Token = token
            .try_into()
            .map_err(|_| Failure(PyValueError::new_err("a token has 16 bytes")))?;
        let connect = || core::Channel::connect(socket, &credentials.0, token, urgent);
        Ok(Self::over(py.detach(connect)?))
    }

    #[staticmethod]
    fn accept<'py>(
        py: Python<'py>,
        socket: RawFd,
        credentials: &Credentials,
    ) -> Result<(Bound<'py, PyBytes>, bool, Self), Failure> {
        let socket = taken(socket)?;
        let accepted = py.detach(|| core::Channel::accept(socket, &credentials.0))?;
        let (token, urgent, channel) = accepted;
        Ok((PyBytes::new(py, &token), urgent, Self::over(channel)))
    }

    fn close(&self) {
        self.0.lock().expect("nobody panics inside").take();
    }
}

#[pyclass(frozen, get_all, module = "vmferry._core")]
pub struct Progress {
    pages: u64,
    zero_pages: u64,
    payload_bytes: u64,
    wire_bytes: u64,
    remaining: u64,
    by_encoding: HashMap<&'static str, u64>,
}

#[pyclass(frozen, module = "vmferry._core")]
pub struct Sender(core::Sender);

#[pymethods]
impl Sender {
    #[new]
    fn new(
        memory: &Memory,
        bulk: Vec<PyRef<'_, Stream>>,
        urgent: &Stream,
    ) -> Result<Self, Failure> {
        let bulk = take_all(&bulk)?;
        Ok(Self(core::Sender::new(
            memory.0.clone(),
            bulk,
            urgent.take()?,
        )?))
    }

    fn push(&self, py: Python<'_>, pages: PyRef<'_, PageSet>) -> Result<(), Failure> {
        let pages = pages.0.clone();
        Ok(py.detach(|| self.0.push(&pages))?)
    }

    fn discard(&self, py: Python<'_>, pages: PyRef<'_, PageSet>) -> Result<(), Failure> {
        let pages = pages.0.clone();
        Ok(py.detach(|| self.0.discard(&pages))?)
    }

    fn serve(&self, py: Python<'_>, missing: PyRef<'_, PageSet>) -> Result<(), Failure> {
        let missing = missing.0.clone();
        Ok(py.detach(|| self.0.serve(&missing))?)
    }

    fn pull(&self, py: Python<'_>) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.pull())?)
    }

    fn set_rate(&self, bytes_per_second: u64) {
        self.0.set_rate(bytes_per_second);
    }

    fn set_memory(&self, memory: &Memory) -> Result<(), Failure> {
        Ok(self.0.set_memory(memory.0.clone())?)
    }

    fn progress(&self) -> Progress {
        let read = self.0.progress();
        let names = ["raw", "lz4", "zstd", "zero"];
        Progress {
            pages: read.pages,
            zero_pages: read.zero_pages,
            payload_bytes: read.payload_bytes,
            wire_bytes: read.wire_bytes,
            remaining: read.remaining,
            by_encoding: names.into_iter().zip(read.by_encoding).collect(),
        }
    }

    fn cancel(&self) {
        self.0.cancel();
    }

    fn finish(&self, py: Python<'_>) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.finish())?)
    }
}

#[pyclass(frozen, get_all, module = "vmferry._core")]
pub struct FaultStats {
    network_faults: u64,
    served_under_way: u64,
    zero_faults: u64,
    latency_us_p50: f64,
    latency_us_p99: f64,
    latency_us_max: f64,
    stall_ms: f64,
    discarded_pages: u64,
}

impl From<core::FaultStats> for FaultStats {
    fn from(stats: core::FaultStats) -> Self {
        Self {
            network_faults: stats.network_faults,
            served_under_way: stats.served_under_way,
            zero_faults: stats.zero_faults,
            latency_us_p50: stats.latency_us_p50,
            latency_us_p99: stats.latency_us_p99,
            latency_us_max: stats.latency_us_max,
            stall_ms: stats.stall_ms,
            discarded_pages: stats.discarded_pages,
        }
    }
}

#[pyclass(frozen, module = "vmferry._core")]
pub struct Receiver(core::Receiver);

#[pymethods]
impl Receiver {
    #[new]
    fn new(
        py: Python<'_>,
        memory: &Memory,
        bulk: Vec<PyRef<'_, Stream>>,
        urgent: &Stream,
    ) -> Result<Self, Failure> {
        let bulk = take_all(&bulk)?;
        let urgent = urgent.take()?;
        let memory = memory.0.clone();
        let receiver = py.detach(|| core::Receiver::new(memory, bulk, urgent))?;
        Ok(Self(receiver))
    }

    fn serve_faults(
        &self,
        py: Python<'_>,
        userfaultfd: RawFd,
        blocks: Vec<u16>,
        record_digests: bool,
    ) -> Result<(), Failure> {
        let descriptor = taken(userfaultfd)?;
        Ok(py.detach(|| self.0.serve_faults(descriptor, &blocks, record_digests))?)
    }

    fn wait(&self, py: Python<'_>) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.wait())?)
    }

    #[getter]
    fn missing(&self) -> usize {
        self.0.missing()
    }

    #[getter]
    fn pages_installed(&self) -> u64 {
        self.0.pages_installed()
    }

    fn fault_stats(&self, py: Python<'_>) -> FaultStats {
        py.detach(|| self.0.fault_stats()).into()
    }

    fn installed_digests<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let digests = py.detach(|| self.0.installed_digests());
        PyBytes::new(py, &digests)
    }

    fn discarded(&self) -> PageSet {
        PageSet(self.0.discarded())
    }

    fn release(&self, py: Python<'_>) -> Result<(), Failure> {
        Ok(py.detach(|| self.0.release())?)
    }

    fn cancel(&self) {
        self.0.cancel();
    }
}
