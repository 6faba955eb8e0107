//! Priority that follows the thread.

use peregrine_sys::process;

/// A caller's nice value, adopted for the length of a call.
pub(super) struct Adopted {
    before: i32,
    set: i32,
}

impl Adopted {
    /// Takes `nice` if it is more urgent than ours, not beyond `most_urgent`, and the kernel permits it.
    pub fn urgent(nice: i8, most_urgent: i32) -> Option<Self> {
        let wanted = i32::from(nice).max(most_urgent);
        let before = process::nice_of(0).ok()?;
        if wanted >= before {
            return None;
        }
        process::set_nice(0, wanted).ok()?;
        Some(Self { before, set: wanted })
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        // Somebody who changed it during the call meant it: then it stays.
        if process::nice_of(0) == Ok(self.set) {
            let _ = process::set_nice(0, self.before);
        }
    }
}
