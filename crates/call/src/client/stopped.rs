//! Waiting for a domain that is stopped.
//!
//! A call lasts as long as its callee works, and nobody can tell one that works for long from one that never ends: for that there are
//! deadlines. A process that is *stopped*, by SIGSTOP, a terminal or a debugger, does not work, and of that the kernel tells
//! (`/proc/PID/stat`). So whoever waits without a deadline looks about once a second, and gives up when the domain has been found stopped, time
//! after time, for as long as the connection has patience.
//!
//! Patience is counted in looks, each of which stands for the time since the one before, but for no more than a second and a half: a client that was stopped
//! along with its domain, and goes on first, must not find that an hour has passed. What can't be seen counts as working: a domain over a
//! pair of sockets, whose process the kernel does not name, one in another process namespace or behind `hidepid`, one in a frozen cgroup.

use super::connection::Connection;
use crate::chain::now_ns;
use crate::error::CallError;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_sys::other::{self, Condition};
use std::sync::{Mutex, TryLockError};
use std::time::Duration;

/// Between two looks, however many callers wait.
const INTERVAL_NS: u64 = 500_000_000;
/// The most time that one look stands for.
const MOST_NS: u64 = 1_500_000_000;

/// What a connection knows of its domain's being stopped.
pub(crate) struct Stopped {
    /// How long it may be.
    patience_ns: AtomicU64,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    /// 0: never.
    looked_ns: u64,
    /// For how long it has been found stopped; `None` if the last look found otherwise.
    still_ns: Option<u64>,
}

impl Stopped {
    pub fn with_patience(patience: Duration) -> Self {
        let this = Self { patience_ns: AtomicU64::new(0), book: Mutex::default() };
        this.set_patience(patience);
        this
    }

    pub fn set_patience(&self, patience: Duration) {
        let ns = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        self.patience_ns.store(ns, Ordering::Relaxed);
    }
}

impl Book {
    /// Notes what a look found; for how long the domain has been stopped, if it is.
    fn note(&mut self, now_ns: u64, is_stopped: bool) -> Option<u64> {
        let since = now_ns.saturating_sub(self.looked_ns).min(MOST_NS);
        self.still_ns = is_stopped.then(|| self.still_ns.map_or(0, |still| still.saturating_add(since)));
        self.looked_ns = now_ns;
        self.still_ns
    }
}

impl Connection {
    /// For who waits without a deadline, and has waited for a while: an error if the domain has been stopped for too long.
    pub fn see_whether_it_works(&self) -> Result<(), CallError> {
        let Some(pid) = self.pid else { return Ok(()) };
        let patience_ns = self.stopped.patience_ns.load(Ordering::Relaxed);
        let mut book = match self.stopped.book.try_lock() {
            Ok(book) => book,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Somebody else is looking.
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        let now = now_ns();
        if now.saturating_sub(book.looked_ns) < INTERVAL_NS {
            return Ok(());
        }
        let is_stopped = other::stat(pid).is_some_and(|stat| stat.condition == Condition::Stopped);
        // Of a process that lives it was its own number.
        let still = book.note(now, is_stopped && self.is_alive());
        match still {
            Some(still) if still >= patience_ns && patience_ns != u64::MAX => {
                Err(CallError::Stopped { pid, patience: Duration::from_nanos(patience_ns) })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn only_what_is_stopped_at_every_look_adds_up() {
        let mut book = Book::default();
        assert_eq!(book.note(50 * SECOND, true), Some(0), "what was before nobody has seen");
        assert_eq!(book.note(51 * SECOND, true), Some(SECOND));
        assert_eq!(book.note(52 * SECOND, true), Some(2 * SECOND));
        assert_eq!(book.note(53 * SECOND, false), None);
        assert_eq!(book.note(54 * SECOND, true), Some(0));
    }

    #[test]
    fn a_client_that_was_stopped_itself_has_seen_next_to_nothing() {
        let mut book = Book::default();
        book.note(SECOND, true);
        assert_eq!(book.note(3_600 * SECOND, true), Some(MOST_NS));
    }
}
