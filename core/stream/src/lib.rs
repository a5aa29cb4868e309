//! Pages on their way between two hosts: frames over TLS, a sender, a receiver with a fault
//! service. What is sent when is decided elsewhere.

mod answers;
mod batch;
mod bits;
mod channel;
mod codec;
mod demand;
mod error;
mod faults;
pub mod frame;
mod order;
mod rate;
mod receiver;
mod sender;
mod shared;
mod socket;
mod stats;
mod tls;

pub use channel::{Channel, Stream, Token};
pub use error::StreamError;
pub use receiver::Receiver;
pub use sender::Sender;
pub use shared::Progress;
pub use socket::SILENCE;
pub use stats::FaultStats;
pub use tls::{Credentials, HANDSHAKE_LIMIT};
