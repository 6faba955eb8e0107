//! Who changes the protection of which range, so that two don't undo each other's work.
//!
//! Two userfaultfds on one range are refused by the kernel (EBUSY); two users of `mprotect`, or one of each, are not, and
//! would quietly lift each other's protection: a tracker would miss writes. So every region and tracker claims its range.

use peregrine_base::PageRange;
use std::sync::{Mutex, PoisonError};

static CLAIMS: Mutex<Vec<(PageRange, &'static str)>> = Mutex::new(Vec::new());

/// The range is in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{asked:?} overlaps {held:?}, whose protection a {by} changes already: drop that first, or use DirtyMechanism::Compare, which changes none"
)]
pub struct Claimed {
    /// What was asked for.
    pub asked: PageRange,
    /// What is held.
    pub held: PageRange,
    /// By a "region" or a "tracker".
    pub by: &'static str,
}

/// The right to change the protection of a range, until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim(PageRange);

impl Claim {
    pub(crate) fn take(range: PageRange, by: &'static str) -> Result<Self, Claimed> {
        let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&(held, by)) = claims.iter().find(|(held, _)| held.overlaps(range)) {
            return Err(Claimed { asked: range, held, by });
        }
        claims.push((range, by));
        Ok(Self(range))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = CLAIMS.lock().unwrap_or_else(PoisonError::into_inner);
        // Claims don't overlap, so the range names one.
        claims.retain(|(held, _)| *held != self.0);
    }
}
