//! What can go wrong on a page stream.

use ferry_pages::PagesError;

/// Kinds that a caller must tell apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The stream ended or broke before its work was done.
    #[error("{0}")]
    Closed(String),
    /// What arrived is not what a peer of this version sends, or its checksum is wrong.
    #[error("{0}")]
    Corrupt(String),
    /// Somebody asked for it.
    #[error("cancelled")]
    Cancelled,
    /// The kernel, or the state things are in, does not allow it.
    #[error("{0}")]
    Refused(String),
    /// An argument makes no sense; nothing was done.
    #[error("{0}")]
    Argument(String),
}

impl From<PagesError> for StreamError {
    fn from(error: PagesError) -> Self {
        match error {
            PagesError::Argument(text) => Self::Argument(text),
            other => Self::Refused(other.to_string()),
        }
    }
}

impl StreamError {
    pub(crate) fn closed(what: impl Into<String>) -> Self {
        Self::Closed(what.into())
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }
}
