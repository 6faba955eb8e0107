//! Whether a member is alive, runs, or is stopped: asked of the kernel, for a dead member can't tell.

use super::table::{Life, MemberRecord};
use peregrine_base::sync::Ordering;
use peregrine_sys::other::{self, Condition};

/// What a member can do next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Vigour {
    /// It runs, or will when it gets a processor or a signal.
    Able,
    /// In the kernel, deaf to signals for now.
    Deaf,
    /// Stopped: a signal sent now is delivered before its next instruction.
    Stopped,
    /// Its process is dead, or nobody has the place.
    Gone,
}

/// Looks at the process of `record`. Trap code; about 15 µs.
pub(crate) fn of(record: &MemberRecord) -> Vigour {
    let who = record.who();
    if !matches!(who.life(), Life::Live | Life::Joining) {
        return Vigour::Gone;
    }
    let Some(stat) = other::stat(who.pid()) else { return Vigour::Gone };
    let born = record.born.load(Ordering::Relaxed);
    // A process that died while joining may not have said when it was born: then its id must do.
    if born != 0 && born != stat.born {
        return Vigour::Gone;
    }
    match stat.condition {
        Condition::Dead => Vigour::Gone,
        Condition::Stopped => Vigour::Stopped,
        Condition::Uninterruptible => Vigour::Deaf,
        Condition::Running | Condition::Sleeping => Vigour::Able,
    }
}

/// Whether the member is not dead.
pub(crate) fn may_run_again(record: &MemberRecord) -> bool {
    of(record) != Vigour::Gone
}
