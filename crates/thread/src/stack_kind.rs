//! Where a thread's memory lies while it runs and while it does not: the three kinds of Zheng, Lawlor and Kalé.
//!
//! ```text
//!              while it runs                      while it does not                     address space of its own
//!   Isomalloc  its own slot                       its own slot                          a slot (1 GiB)
//!   Alias      a window, its frames mapped there  its frames, in a file (mapped         none
//!                                                 nowhere if the window went on)
//!   Copy       a window, its bytes copied there   its live bytes, in the arena          none
//! ```
//!
//! A thread's *number* tells its kind, and the window that it is bound to, without a look at any table:
//!
//! ```text
//!   0 ─ isomalloc ─ FIRST_ALIAS ─ alias ─ FIRST_COPY ─ copy ─ MOST_THREADS
//!       = its slot               window = (number - FIRST) mod W, of its kind's W windows
//! ```

use crate::layout::SLOT_COUNT;

/// How a thread's stack, heap and thread-locals are kept.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(u32)]
pub enum StackKind {
    /// A range of addresses of its own, for ever. The fastest switch; costs a gigabyte of addresses.
    #[default]
    Isomalloc = 0,
    /// Frames of its own, mapped over a window that it shares with others.
    Alias = 1,
    /// Live bytes of its own, copied into a window that it shares with others.
    Copy = 2,
}

/// Most alias threads, and most copy threads.
pub const MOST_WINDOWED: usize = 1 << 20;
/// Number of the first alias thread.
pub const FIRST_ALIAS: u32 = SLOT_COUNT as u32;
/// Number of the first copy thread.
pub const FIRST_COPY: u32 = FIRST_ALIAS + MOST_WINDOWED as u32;
/// Numbers from here on name no thread.
pub const MOST_THREADS: usize = FIRST_COPY as usize + MOST_WINDOWED;

impl StackKind {
    /// All kinds, in the order of their numbers.
    pub const ALL: [StackKind; 3] = [StackKind::Isomalloc, StackKind::Alias, StackKind::Copy];

    /// The kind of thread `number`.
    #[inline(always)]
    pub const fn of(number: u32) -> Self {
        if number < FIRST_ALIAS {
            StackKind::Isomalloc
        } else if number < FIRST_COPY {
            StackKind::Alias
        } else {
            StackKind::Copy
        }
    }

    /// Number of this kind's first thread.
    pub const fn first(self) -> u32 {
        [0, FIRST_ALIAS, FIRST_COPY][self as usize]
    }

    /// Most threads of this kind.
    pub const fn most(self) -> usize {
        [SLOT_COUNT, MOST_WINDOWED, MOST_WINDOWED][self as usize]
    }
}

impl std::fmt::Display for StackKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(["isomalloc", "alias", "copy"][*self as usize])
    }
}

impl std::str::FromStr for StackKind {
    type Err = ();
    fn from_str(s: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|k| k.to_string() == s).ok_or(())
    }
}

/// Whether thread `number` lives in a window.
#[inline(always)]
pub const fn is_windowed(number: u32) -> bool {
    number >= FIRST_ALIAS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_tells_its_kind_at_both_ends_of_each_range() {
        for kind in StackKind::ALL {
            assert_eq!(StackKind::of(kind.first()), kind);
            assert_eq!(StackKind::of(kind.first() + kind.most() as u32 - 1), kind);
            assert_eq!(kind.to_string().parse(), Ok(kind));
        }
        assert_eq!(StackKind::Copy.first() as usize + StackKind::Copy.most(), MOST_THREADS);
    }
}
