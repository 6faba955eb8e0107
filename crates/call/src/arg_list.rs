//! The arguments of a call in their order: room for eight, of which only those that there are cost anything.

use crate::args::Arg;
use crate::line::MAX_ARGS;
use std::fmt;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};

/// See the top of the file. A slice of what was pushed.
pub(crate) struct ArgList<'a> {
    /// The first `count` are there.
    room: [MaybeUninit<Arg<'a>>; MAX_ARGS],
    count: usize,
}

impl<'a> ArgList<'a> {
    #[inline(always)]
    pub const fn new() -> Self {
        Self { room: [const { MaybeUninit::uninit() }; MAX_ARGS], count: 0 }
    }

    #[inline(always)]
    pub const fn len(&self) -> usize {
        self.count
    }

    /// # Panics
    /// If there are eight already.
    #[inline]
    pub fn push(&mut self, arg: Arg<'a>) {
        assert!(self.count < MAX_ARGS, "a call has {MAX_ARGS} arguments at most: put several in one");
        self.room[self.count].write(arg);
        self.count += 1;
    }
}

impl<'a> Deref for ArgList<'a> {
    type Target = [Arg<'a>];
    #[inline]
    fn deref(&self) -> &[Arg<'a>] {
        // SAFETY: the first `count` were written by `push`, and `count` never exceeds the room.
        unsafe { std::slice::from_raw_parts(self.room.as_ptr().cast(), self.count) }
    }
}

impl DerefMut for ArgList<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Self::Target {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.room.as_mut_ptr().cast(), self.count) }
    }
}

impl Drop for ArgList<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.count != 0 {
            // SAFETY: those are there, and nobody uses them after this.
            unsafe { std::ptr::drop_in_place(&raw mut **self) };
        }
    }
}

impl fmt::Debug for ArgList<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Give;
    use crate::memory::Gift;

    #[test]
    fn what_was_pushed_is_there_and_is_dropped_once() {
        let mut list = ArgList::new();
        assert!(list.is_empty());
        list.push(Arg::In(b"a"));
        list.push(Arg::Give(Give::Gift(Gift::new(10).unwrap())));
        assert!(matches!(&*list, [Arg::In(b"a"), Arg::Give(_)]));
        // Its memory is unmapped here, and the argument that took its place is dropped with the list.
        list[1] = Arg::Given(3, 10);
        assert!(matches!(list[1], Arg::Given(3, 10)));
        assert_eq!(list.len(), 2);
    }

    #[test]
    #[should_panic(expected = "8 arguments at most")]
    fn a_ninth_is_refused() {
        let mut list = ArgList::new();
        for _ in 0..=MAX_ARGS {
            list.push(Arg::In(b""));
        }
    }
}
