//! An activation that sleeps on its line, and whoever wants it elsewhere: neither misses the other.
//!
//! ```text
//! activation                        pool (holds its lock)
//! state = PARKED    lie_down        wanted += 1
//! fence  (of `Gate::park`)          fence
//! wanted? recalled? leave           state == PARKED? recalled = true, wake   recall
//! ```
//!
//! Either the activation sees that it is wanted, or the pool sees it parked and recalls it. Between its look and its sleep a recall's wake-up
//! can still come too early: the keeper repeats it every millisecond until it is obeyed.

use peregrine_base::sync::{AtomicBool, AtomicU32, Ordering};

/// In the pool, or on its way in or out: the default.
const IDLE: u32 = 0;
/// Sleeps on its line.
const PARKED: u32 = 1;
/// On its line, between calls.
const BUSY: u32 = 2;
/// Executes a call.
const EXECUTING: u32 = 3;

/// What an activation does, for the pool to see. The default is in the pool.
#[derive(Default, Debug)]
pub struct Rest {
    state: AtomicU32,
    recalled: AtomicBool,
}

impl Rest {
    /// About to sleep. [`Gate::park`](crate::gate::Gate::park) follows, whose fence is this one's too.
    #[inline]
    pub fn lie_down(&self) {
        self.state.store(PARKED, Ordering::Relaxed);
    }

    /// Awake on its line.
    #[inline]
    pub fn get_up(&self) {
        self.state.store(BUSY, Ordering::Relaxed);
    }

    /// Begins to execute a call. Seen by whoever sees the call's reply: ended by [`get_up`](Self::get_up) before that.
    #[inline]
    pub fn execute(&self) {
        self.state.store(EXECUTING, Ordering::Relaxed);
    }

    /// Whether it executes a call.
    pub fn is_executing(&self) -> bool {
        self.state.load(Ordering::Relaxed) == EXECUTING
    }

    /// Off its line.
    pub fn go_home(&self) {
        self.state.store(IDLE, Ordering::Relaxed);
    }

    /// Whether it sleeps, or is about to. Asked after a full fence by whoever wants it.
    pub fn is_parked(&self) -> bool {
        self.state.load(Ordering::Relaxed) == PARKED
    }

    /// Asks it to leave its line; a wake-up follows.
    pub fn recall(&self) {
        // SeqCst as the wake-up that follows is a full barrier in the kernel: the woken one sees it.
        self.recalled.store(true, Ordering::SeqCst);
    }

    /// Whether it was asked to leave.
    #[inline]
    pub fn is_recalled(&self) -> bool {
        self.recalled.load(Ordering::Relaxed)
    }

    /// It left.
    pub fn obey(&self) {
        self.recalled.store(false, Ordering::Relaxed);
    }
}
