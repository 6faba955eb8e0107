//! Questions to the domain whose askers wait for nothing: where a portal is, and what number a buffer has.

use super::connection::{Connection, asks_for, buffer_of, offers_buffer, portal_of};
use super::questions::Inquiry;
use crate::error::CallError;
use crate::memory::Buffer;
use crate::portal::PortalId;
use crate::shared::Shared;
use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;

/// A portal that is being looked for.
#[must_use = "what is dropped is not found"]
pub struct Finding {
    connection: Arc<Connection>,
    /// Taken when there is an outcome.
    inquiry: Option<Inquiry>,
    name: String,
    version: u64,
}

impl Finding {
    pub(super) fn begin(connection: Arc<Connection>, name: &str, version: u64) -> Result<Self, CallError> {
        Ok(Self { connection, inquiry: Some(asks_for(name)?), name: name.into(), version })
    }

    /// What was found, if the domain has answered. Never waits.
    pub fn try_finish(&mut self) -> Option<Result<PortalId, CallError>> {
        let inquiry = self.inquiry.as_mut()?;
        let answer = self.connection.pursue(inquiry).transpose();
        if answer.is_none() {
            return (!self.connection.is_alive()).then_some(Err(CallError::DomainDied));
        }
        self.inquiry = None;
        answer.map(|answer| portal_of(answer, self.connection.id, &self.name, self.version))
    }
}

impl Drop for Finding {
    fn drop(&mut self) {
        if let Some(inquiry) = self.inquiry.take() {
            self.connection.forsake(inquiry);
        }
    }
}

impl fmt::Debug for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Finding")
            .field("name", &self.name)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// A [`Buffer`] that the domain has been told of, or is about to be: see [`Client::offer`](crate::Client::offer). Dropping it takes it back.
#[must_use = "what is dropped is taken back"]
pub struct Offering {
    connection: Arc<Connection>,
    len_bytes: usize,
    /// Taken when there is an outcome.
    offered: Option<(Shared, Inquiry)>,
}

impl Offering {
    pub(super) fn begin(connection: Arc<Connection>, len_bytes: usize) -> Result<Self, CallError> {
        let offered = Some(offers_buffer(len_bytes, false)?);
        Ok(Self { connection, len_bytes, offered })
    }

    /// The buffer, if the domain has answered. Never waits.
    ///
    /// # Errors
    /// As [`Client::buffer`](crate::Client::buffer).
    pub fn try_finish(&mut self) -> Option<Result<Buffer, CallError>> {
        let (_, inquiry) = self.offered.as_mut()?;
        let answer = match self.connection.pursue(inquiry) {
            Ok(None) => return (!self.connection.is_alive()).then_some(Err(CallError::DomainDied)),
            Ok(Some(answer)) => buffer_of(&answer),
            Err(e) => Err(e),
        };
        let (shared, _) = self.offered.take()?;
        let home = self.connection.clone();
        Some(answer.map(|id| Buffer { shared, id, len_bytes: self.len_bytes, home }))
    }
}

impl Offering {
    /// The descriptor of the memory, until the domain has been told.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.offered.as_ref().and_then(|(_, inquiry)| inquiry.descriptor())
    }
}

impl Drop for Offering {
    fn drop(&mut self) {
        if let Some((_, inquiry)) = self.offered.take() {
            self.connection.forsake(inquiry);
        }
    }
}

impl fmt::Debug for Offering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offering").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}
