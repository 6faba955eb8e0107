//! Who waits for a record that another process has locked says so, once that takes longer than it can.
//!
//! The holder may be stopped (SIGSTOP, a debugger) in the middle of an operation. It can't be taken over, for what it is about to change
//! can't be known, and an operation of the runtime can't fail as one of a [`Space`](peregrine_space::process::Space) does: the wait goes
//! on. It ends when the holder goes on, or is killed, for then everybody is reset. Until then it is not silent: the holder is
//! named after [`PATIENCE`], and again whenever the wait has doubled.
//!
//! *Between two threads*: no static, no thread-local, no allocation, no panic.

use crate::control::{MAX_NODES, node};
use core::fmt::{self, Write};
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_space::MemberId;
use peregrine_sys::io;
use peregrine_sys::timer::monotonic_ns;

/// Time until the holder is named: that of spaces of processes.
const PATIENCE_NS: u64 = peregrine_space::process::PATIENCE.as_nanos() as u64;
/// Turns of waiting between two looks at the clock.
const LOOK_EVERY: u32 = 64;

/// The present wait of a process. Zeros at first.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Wait {
    since: AtomicU64,
    /// When the holder is to be named next.
    next: AtomicU64,
}

impl Wait {
    /// After the `turns`th turn of a wait: the nanoseconds that it has lasted, if the holder is to be named now.
    fn due(&self, turns: u32, now: impl FnOnce() -> u64) -> Option<u64> {
        if turns == 1 {
            let now = now();
            self.since.store(now, Ordering::Relaxed);
            self.next.store(now + PATIENCE_NS, Ordering::Relaxed);
            return None;
        }
        if !turns.is_multiple_of(LOOK_EVERY) {
            return None;
        }
        let now = now();
        if now < self.next.load(Ordering::Relaxed) {
            return None;
        }
        let lasted = now - self.since.load(Ordering::Relaxed);
        self.next.store(now + lasted, Ordering::Relaxed);
        Some(lasted)
    }

    /// Names `owner` to whoever looks at standard error, if it is time.
    pub(super) fn turn(&self, me: MemberId, owner: MemberId, turns: u32) {
        if let Some(lasted) = self.due(turns, monotonic_ns) {
            let mut line = Line::default();
            // What does not fit is left out.
            let _ = describe(&mut line, me, owner, process_of(owner), lasted);
            io::complain(line.bytes());
        }
    }
}

/// The process of a node, if it has one.
pub(super) fn process_of(member: MemberId) -> Option<u32> {
    let pid = match member.index() {
        i if i < MAX_NODES => node(i as u32).pid.load(Ordering::Relaxed),
        _ => crate::control::world().supervisor.load(Ordering::Relaxed),
    };
    (pid != 0).then_some(pid)
}

fn describe(
    to: &mut impl Write,
    me: MemberId,
    owner: MemberId,
    process: Option<u32>,
    lasted_ns: u64,
) -> fmt::Result {
    let name = |to: &mut dyn Write, who: MemberId| match who.index() {
        i if i < MAX_NODES => write!(to, "node {i}"),
        _ => write!(to, "the supervisor"),
    };
    write!(to, "peregrine: ")?;
    name(to, me)?;
    write!(to, " has waited {} s for a slot's record that ", lasted_ns / 1_000_000_000)?;
    name(to, owner)?;
    if let Some(process) = process {
        write!(to, " (process {process})")?;
    }
    writeln!(to, " has locked: let it go on if it is stopped, or kill it")
}

/// A line of text without an allocation.
struct Line {
    text: [u8; 200],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { text: [0; 200], len: 0 }
    }
}

impl Line {
    fn bytes(&self) -> &[u8] {
        self.text.get(..self.len).unwrap_or_default()
    }
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let end = self.len + s.len();
        self.text.get_mut(self.len..end).ok_or(fmt::Error)?.copy_from_slice(s.as_bytes());
        self.len = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_wait_is_told_of_after_the_patience_and_whenever_it_has_doubled() {
        let wait = Wait::default();
        let begun = 77;
        let mut told = Vec::new();
        // A turn each half second.
        for turns in 1..=LOOK_EVERY * 400 {
            let now = begun + u64::from(turns - 1) * 1_000_000_000 / u64::from(2 * LOOK_EVERY);
            told.extend(wait.due(turns, || now).map(|ns| ns / 1_000_000_000));
        }
        assert_eq!(told, [10, 20, 41, 83, 167], "each look comes a little late");
        // The next wait begins anew.
        let begun = 900_000_000_000;
        assert_eq!(wait.due(1, || begun), None);
        assert_eq!(wait.due(LOOK_EVERY, || begun + PATIENCE_NS - 1), None);
        assert_eq!(wait.due(LOOK_EVERY * 2, || begun + PATIENCE_NS), Some(PATIENCE_NS));
    }

    #[test]
    fn the_holder_is_named_with_its_process() {
        let mut line = Line::default();
        let of = MemberId::new;
        describe(&mut line, of(MAX_NODES), of(MAX_NODES - 1), Some(u32::MAX), u64::MAX)
            .expect("room for the longest");
        let mut line = Line::default();
        describe(&mut line, of(1), of(2), Some(4711), 12_345_678_901).expect("room");
        assert_eq!(
            core::str::from_utf8(line.bytes()),
            Ok(
                "peregrine: node 1 has waited 12 s for a slot's record that node 2 (process 4711) has locked: let it go on if \
                it is stopped, or kill it\n"
            )
        );
    }
}
