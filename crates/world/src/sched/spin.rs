//! How long a node without work looks around before it sleeps.
//!
//! ```text
//!   something came within `most` of the last idle spell's start   ──▶ look for `most` the next time
//!   nothing did, `n` times in a row                               ──▶ for `most` / 2^n, and from the fourth time on not at all
//! ```
//!
//! To wake a process that sleeps takes 20 to 45 us where processors are virtual, and whoever looks around is there at once, but
//! keeps a processor busy. So a node looks only while that has lately paid. What comes to one that sleeps is counted too: if it
//! would have paid to look, the node does so again. A node that nothing comes to wastes less than twice `most` before it stops.
//!
//! `most` is `Config::spin`; it is 0 where there are more nodes than processors, for then whoever looks around keeps off the one
//! that it waits for.

/// Idle spells in a row without anything in time, after which there is no looking any more.
const GIVE_UP: u32 = 4;

/// What a node knows of its last idle spells. Zero at first: looking may pay.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Spin {
    /// Idle spells in a row in which nothing came in time.
    in_vain: u32,
}

impl Spin {
    /// How long to look now, in ns, if `most_ns` is the longest that is allowed.
    pub const fn budget(self, most_ns: u64) -> u64 {
        if self.in_vain < GIVE_UP { most_ns >> self.in_vain } else { 0 }
    }

    /// Notes that an idle spell took `waited_ns`.
    pub const fn note(&mut self, waited_ns: u64, most_ns: u64) {
        if waited_ns <= most_ns {
            self.in_vain = 0;
        } else if self.in_vain < GIVE_UP {
            self.in_vain += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_stops_looking_when_nothing_comes_in_time_and_looks_again_when_something_does() {
        const MOST: u64 = 50_000;
        let mut spin = Spin::default();
        let mut wasted = 0;
        for _ in 0..100 {
            wasted += spin.budget(MOST);
            spin.note(MOST + 1, MOST);
        }
        assert!(wasted < 2 * MOST, "{wasted} ns");
        assert_eq!(spin.budget(MOST), 0);
        spin.note(MOST, MOST);
        assert_eq!(spin.budget(MOST), MOST);
        assert_eq!(spin.budget(0), 0, "switched off");
    }
}
