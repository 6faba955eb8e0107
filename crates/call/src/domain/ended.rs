//! What has come to its end, for good: a client that is gone, a domain that closes.
//!
//! ```text
//! keeper                                        activation                    caller
//! end                                           lie_down, park                publish, bell
//! recall, wake, and again until it has left     ended? recalled? leave        answered, or hung up?
//! (all have left) a call that nobody served:    called? serve                   neither: sleep
//!   answered as terminated
//! hang up: whoever still sleeps is woken
//! ```
//!
//! **Each call has one outcome.** Nobody answers for an activation before it has left its line, so a call is executed or terminated, never
//! both; and a call that comes after the last look finds the connection hung up. The model is `tests/loom_closing.rs`.

use peregrine_base::sync::{AtomicBool, Ordering};

/// Whether it has ended. The default has not.
#[derive(Default, Debug)]
pub struct Ended(AtomicBool);

impl Ended {
    /// Ends it.
    pub fn end(&self) {
        // Release: who sees it sees what was taken away before.
        self.0.store(true, Ordering::Release);
    }

    /// Whether it has.
    #[inline]
    pub fn has(&self) -> bool {
        // Acquire pairs with the Release in `end`.
        self.0.load(Ordering::Acquire)
    }
}
