//! Looking for a moment before sleeping, where caller and activation share a core: whether it pays, and when to stop.
//!
//! A sleep and a wake-up are two calls into the kernel, each way. Two threads that take turns on one core can do with one: who waits
//! gives the core away (`sched_yield`), and the other, which is runnable because it waits in the same manner, goes on at once.
//!
//! ```text
//! caller       publish ─ give way ┐                     ┌ reply there: go on ─ publish …
//! activation                      └ call there: execute ─ answer ─ give way
//! ```
//!
//! **It is no part of the protocol.** Who looks is `AWAKE` in the gate's words, as one that spins on another core; who has looked long
//! enough parks as the gate has it, fence and last look included (`gate.rs`). So nothing here can lose a wake-up.
//!
//! **It is a bet, and [`Patience`] keeps the book**, for each side of a line by itself, in time and not in calls, for what a lost bet
//! costs is time:
//!
//! | lost by | costs | then |
//! |---|---|---|
//! | nobody came within the time that is allowed for it (a caller 8 µs, an activation 12) | that time | sleeps at once for 1 ms, 2 ms … 128 ms, unless it won some twenty since |
//! | a third thread that was runnable on this core: the kernel gave it the slice that we forfeited | milliseconds | sleeps at once for 16 ms, 32 ms … 1 s |
//!
//! A wait that was long because the peer worked for so long counts as the second: then there is nothing to be gained either. A
//! pause is forgiven when nothing was lost for eight times as long.

/// A wait for the core that is longer was no hand-over: less than any slice that the kernel gives, more than the work of what calls often.
pub const LONG_NS: u64 = 500_000;
/// Of pauses after a look in vain: the shortest and the longest.
const IN_VAIN_NS: (u64, u64) = (1_000_000, 128_000_000);
/// The same after one that took long.
const TOO_LONG_NS: (u64, u64) = (16_000_000, 1_000_000_000);
/// Hand-overs that are worth one look in vain.
const WORTH: u32 = 20;

/// What one side of a line knows of looking.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Patience {
    /// Sleeps at once until then.
    not_before_ns: u64,
    /// The last pause.
    pause_ns: u64,
    /// Hand-overs since the last loss.
    won: u32,
}

impl Patience {
    /// Whether to look, at the time `now_ns`.
    pub const fn allows(&self, now_ns: u64) -> bool {
        now_ns >= self.not_before_ns
    }

    fn pause(&mut self, now_ns: u64, (least, most): (u64, u64)) {
        let quiet_ns = now_ns.saturating_sub(self.not_before_ns);
        let forgiven = quiet_ns > 8 * self.pause_ns;
        self.pause_ns = if forgiven { least } else { (2 * self.pause_ns).clamp(least, most) };
        self.not_before_ns = now_ns + self.pause_ns;
        self.won = 0;
    }

    /// Gives the core away until `is_there`, for `most_ns` at most, and no more once `must_go`; whether what is waited for is there. If not,
    /// the caller of this goes to sleep.
    ///
    /// `clock` counts nanoseconds; `give_way` lets others run on this core.
    #[inline]
    pub fn look(
        &mut self,
        most_ns: u64,
        clock: impl Fn() -> u64,
        give_way: impl Fn(),
        is_there: impl Fn() -> bool,
        must_go: impl Fn() -> bool,
    ) -> bool {
        if most_ns == 0 {
            return false;
        }
        let begun = clock();
        if !self.allows(begun) {
            return false;
        }
        let mut before = begun;
        loop {
            give_way();
            let there = is_there();
            let now = clock();
            if now.saturating_sub(before) >= LONG_NS {
                self.pause(now, TOO_LONG_NS);
                return there;
            }
            if there {
                self.won = self.won.saturating_add(1);
                return true;
            }
            if now.saturating_sub(begun) >= most_ns {
                if self.won < WORTH {
                    self.pause(now, IN_VAIN_NS);
                }
                self.won = 0;
                return false;
            }
            if must_go() {
                return false;
            }
            before = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const MOST_NS: u64 = 20_000;

    /// A core on which nobody else comes before so many looks, each of which takes so long; whether it came, and how many looks there were.
    fn look(patience: &mut Patience, at_ns: u64, after: u32, each_ns: u64) -> (bool, u32) {
        let (now_ns, looks) = (Cell::new(at_ns), Cell::new(0));
        let give_way = || {
            now_ns.set(now_ns.get() + each_ns);
            looks.set(looks.get() + 1);
        };
        let came = patience.look(MOST_NS, || now_ns.get(), give_way, || looks.get() >= after, || false);
        (came, looks.get())
    }

    #[test]
    fn what_comes_in_time_is_looked_for_again() {
        let mut patience = Patience::default();
        for i in 0..100 {
            assert_eq!(look(&mut patience, i * 10_000, 1 + i as u32 % 3, 1_000), (true, 1 + i as u32 % 3));
        }
    }

    #[test]
    fn looks_in_vain_end_in_time_and_grow_rare() {
        let mut patience = Patience::default();
        let mut looks_ns = 0;
        // A call each millisecond for ten seconds, to a peer that never comes in time.
        for ms in 0..10_000 {
            let (came, looks) = look(&mut patience, ms * 1_000_000, u32::MAX, 1_000);
            assert!(!came && looks <= 20);
            looks_ns += u64::from(looks) * 1_000;
        }
        assert!(looks_ns < 100 * MOST_NS, "{looks_ns} ns");
    }

    #[test]
    fn a_look_in_vain_now_and_then_is_paid_by_those_that_were_not() {
        let mut patience = Patience::default();
        for i in 0..WORTH {
            assert!(look(&mut patience, u64::from(i) * 2_000, 1, 1_000).0);
        }
        assert_eq!(look(&mut patience, 1_000_000, u32::MAX, 1_000), (false, 20));
        assert!(patience.allows(1_030_000), "earned");
        assert_eq!(look(&mut patience, 1_030_000, u32::MAX, 1_000), (false, 20));
        assert!(!patience.allows(1_060_000), "a second one was not");
    }

    #[test]
    fn a_third_thread_on_the_core_costs_a_slice_a_second() {
        let (mut patience, mut now_ns, mut lost) = (Patience::default(), 0, 0);
        while now_ns < 60_000_000_000 {
            let (came, looks) = look(&mut patience, now_ns, 1, 3_000_000);
            lost += looks;
            now_ns += if looks == 0 { 100_000 } else { 3_000_000 };
            assert_eq!(came, looks == 1, "what came meanwhile is taken");
        }
        assert!(lost < 70, "{lost} slices in a minute");
        // It has gone: forgiven after a while.
        now_ns += 10_000_000_000;
        assert!(look(&mut patience, now_ns, 1, 1_000).0);
        assert_eq!(look(&mut patience, now_ns + 5_000, 1, 3_000_000), (true, 1));
        assert!(patience.allows(now_ns + 30_000_000), "as the first time");
    }

    #[test]
    fn who_must_go_looks_once() {
        let (mut patience, looks) = (Patience::default(), Cell::new(0));
        let came = patience.look(MOST_NS, || 0, || looks.set(looks.get() + 1), || looks.get() > 1, || true);
        assert!(!came && looks.get() == 1 && patience.allows(0));
    }
}
