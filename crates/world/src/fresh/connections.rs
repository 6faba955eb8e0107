//! A node's connections to domains: made without waiting, kept as long as their domains live, and no more of them than the supervisor
//! can close after the node.

use super::FreshCallError;
use crate::control::MOST_CALL_FDS;
use peregrine_call::{CallError, Client, Deadline, Opening, PortalId};
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a domain may take to say anything that a call needs before it can be sent, if the caller does not say it.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// Calls of one connection under way at once; more wait their turn. Below the least that a domain allows by default.
pub(super) const MOST_FLIGHTS: usize = 24;
/// Descriptors that a call may need in addition: socket, process and pipe.
const FOR_A_CALL: usize = 3;

/// A thread that waits for its turn. Nothing of its call is held here: it asks once more.
pub(super) struct Waiter {
    pub slot: u32,
    pub deadline: Option<Deadline>,
}

enum Door {
    Opening(Opening),
    Open(Client),
    /// It did not become one.
    Failed(CallError),
}

pub(super) struct Connection {
    /// Empty: found by nobody any more, for its domain died.
    path: PathBuf,
    door: Door,
    portals: Vec<(String, u64, PortalId)>,
    pub flights: usize,
    /// Memory that is lent by it.
    pub loans: usize,
    /// Tells it from others of its place.
    pub serial: u64,
    pub waiters: VecDeque<Waiter>,
    /// Counts up, for the one that was used longest ago.
    used: u64,
}

impl Connection {
    /// The client, once there is one. Never waits.
    pub fn client(&mut self) -> Result<Option<&Client>, CallError> {
        if let Door::Opening(opening) = &mut self.door {
            match opening.try_finish() {
                None => return Ok(None),
                Some(Ok(client)) => self.door = Door::Open(client),
                Some(Err(e)) => self.door = Door::Failed(e),
            }
        }
        match &self.door {
            Door::Open(client) => Ok(Some(client)),
            Door::Failed(e) => Err(e.clone()),
            Door::Opening(_) => Ok(None),
        }
    }

    pub fn portal(&self, name: &str, version: u64) -> Option<PortalId> {
        self.portals.iter().find(|p| p.0 == name && p.1 == version).map(|p| p.2)
    }

    pub fn learn(&mut self, name: &str, version: u64, id: PortalId) {
        if self.portal(name, version).is_none() {
            self.portals.push((name.to_owned(), version, id));
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the domain is gone, or never came.
    pub fn has_failed(&self) -> bool {
        match &self.door {
            Door::Opening(_) => false,
            Door::Open(client) => !client.is_alive(),
            Door::Failed(_) => true,
        }
    }

    fn is_lost(&self) -> bool {
        self.path.as_os_str().is_empty()
    }

    fn is_idle(&self) -> bool {
        // Of one that is lost the loans are lost too.
        self.flights == 0 && self.waiters.is_empty() && (self.loans == 0 || self.is_lost())
    }

    fn descriptors(&self) -> Vec<RawFd> {
        match &self.door {
            Door::Opening(opening) => opening.descriptor().into_iter().collect(),
            Door::Open(client) => client.descriptors(),
            Door::Failed(_) => Vec::new(),
        }
    }
}

/// All of them. A place stays a connection's; one that is gone is `None`.
#[derive(Default)]
pub(super) struct Connections {
    places: Vec<Option<Connection>>,
    used: u64,
}

impl Connections {
    pub fn get(&mut self, at: usize) -> Option<&mut Connection> {
        self.places.get_mut(at)?.as_mut()
    }

    pub fn all(&mut self) -> impl Iterator<Item = &mut Connection> {
        self.places.iter_mut().flatten()
    }

    /// The place of the connection to `path`, which may just have been begun. `open` descriptors are in use, by connections and calls.
    pub fn to(&mut self, path: &Path, open: usize) -> Result<usize, FreshCallError> {
        self.used += 1;
        let known = self.places.iter().position(|c| c.as_ref().is_some_and(|c| c.path == path));
        self.make_room(open, known)?;
        let at = match known {
            Some(at) => at,
            None => {
                // As all nodes do, this one shares the zygote's table and ends with the supervisor.
                let opening = Client::open(path, PATIENCE)?.table_ends_with_parent();
                let free = self.places.iter().position(Option::is_none);
                let at = free.unwrap_or(self.places.len());
                if free.is_none() {
                    self.places.push(None);
                }
                self.places[at] = Some(Connection {
                    path: path.to_owned(),
                    door: Door::Opening(opening),
                    portals: Vec::new(),
                    flights: 0,
                    loans: 0,
                    serial: self.used,
                    waiters: VecDeque::new(),
                    used: 0,
                });
                at
            }
        };
        let used = self.used;
        if let Some(connection) = self.get(at) {
            connection.used = used;
        }
        Ok(at)
    }

    /// Sees to it that what one more call may open can be published, by closing connections that nobody uses, but for `keep`.
    fn make_room(&mut self, mut open: usize, keep: Option<usize>) -> Result<(), FreshCallError> {
        while open + FOR_A_CALL > MOST_CALL_FDS {
            let idle = self.places.iter().enumerate().filter_map(|(at, c)| Some((at, c.as_ref()?)));
            let idle = idle.filter(|(at, c)| c.is_idle() && Some(*at) != keep);
            let Some((at, connection)) = idle.min_by_key(|(_, c)| c.used) else {
                return Err(FreshCallError::TooMany { open, most: MOST_CALL_FDS });
            };
            open = open.saturating_sub(connection.descriptors().len());
            self.places[at] = None;
        }
        Ok(())
    }

    /// A call of the connection at `at` has ended, or came to nothing; whoever is next in turn.
    pub fn leave(&mut self, at: usize, failed: bool, mut next: impl FnMut(u32)) {
        let Some(connection) = self.get(at) else { return };
        connection.flights = connection.flights.saturating_sub(1);
        if failed && connection.has_failed() {
            // The next call connects anew.
            connection.path = PathBuf::new();
        }
        // All of them, if it is lost: they ask for the new one.
        let turns = if connection.is_lost() { usize::MAX } else { 1 };
        for waiter in connection.waiters.drain(..turns.min(connection.waiters.len())) {
            next(waiter.slot);
        }
        if connection.is_lost() && connection.is_idle() {
            self.places[at] = None;
        }
    }

    /// A loan by the connection `serial` at `at` was given back.
    pub fn return_loan(&mut self, at: usize, serial: u64) {
        if let Some(connection) = self.get(at).filter(|c| c.serial == serial) {
            connection.loans = connection.loans.saturating_sub(1);
        }
    }

    /// Forgets who uses them.
    pub fn abandon(&mut self) {
        for place in &mut self.places {
            if let Some(connection) = place {
                (connection.flights, connection.loans) = (0, 0);
                connection.waiters.clear();
                // One that is being made may be so slow that its time is over for the next who wants it.
                if connection.is_lost() || !matches!(connection.door, Door::Open(_)) {
                    *place = None;
                }
            }
        }
    }

    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        self.places.iter().flatten().flat_map(Connection::descriptors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_opened_than_can_be_closed() {
        let mut connections = Connections::default();
        let path = Path::new("/nowhere/at/all");
        let full = connections.to(path, MOST_CALL_FDS - FOR_A_CALL + 1);
        assert!(matches!(full, Err(FreshCallError::TooMany { most: MOST_CALL_FDS, .. })), "{full:?}");
        assert_eq!(connections.to(path, MOST_CALL_FDS - FOR_A_CALL), Ok(0));
        // It is in nobody's use yet, so it makes way for another.
        let other = Path::new("/nowhere/else");
        assert_eq!(connections.to(other, MOST_CALL_FDS - FOR_A_CALL + 1), Ok(0));
        connections.get(0).unwrap().flights = 1;
        assert!(connections.to(path, MOST_CALL_FDS - FOR_A_CALL + 1).is_err());
    }
}
