#![doc = include_str!("../README.md")]

mod args;
pub mod attributes;
pub mod chain;
mod client;
mod credentials;
mod domain;
mod error;
mod limits;
mod line;
mod memory;
mod portal;
pub mod runtime;
mod shared;
mod socket;
pub mod step;
pub mod usage;

pub use args::Call;
pub use attributes::{Affinity, Attributes};
pub use chain::Deadline;
pub use client::{Client, Pending};
pub use credentials::Credentials;
pub use domain::{Activations, Domain, DomainBuilder, DomainStats, Invocation};
pub use error::{CallError, DomainError, Failure, Refusal};
pub use limits::Limits;
pub use memory::{Buffer, Gift, Given, Lent, Part};
pub use portal::{Access, Handler, PortalId};
pub use socket::pair as socket_pair;
