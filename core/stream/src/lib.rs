//! Pages on their way between two hosts: frames over TLS, a sender, a receiver with a fault
//! service. What is sent when is decided elsewhere.

mod answers;
mod batch;
mod bits;
mod channel;
mod codec;
mod error;
pub mod frame;
mod order;
mod rate;
mod sender;
mod shared;
mod socket;
mod tls;

pub use channel::{Channel, Stream, Token};
pub use error::StreamError;
pub use sender::Sender;
pub use shared::Progress;
pub use socket::SILENCE;
pub use tls::{Credentials, HANDSHAKE_LIMIT};
