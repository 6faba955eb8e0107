//! One call, as its handler sees it: arguments by position, and who calls.

use super::peer::Line;
use crate::chain::{ChainLink, Deadline};
use crate::credentials::Credentials;
use crate::error::Failure;
use crate::line::{Kind, MAX_ARGS};
use crate::memory::{Given, Lendable, Lent};
use std::cell::{Cell, RefCell, RefMut};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// One argument in private memory.
#[derive(Default)]
pub(crate) struct Slot {
    pub kind: Option<Kind>,
    /// Bytes of an `in` argument, in `Arguments::scratch`.
    pub range: Range<usize>,
    /// What an `out` or `inout` argument is and becomes. Its room is kept from call to call.
    pub result: RefCell<Vec<u8>>,
    /// The most that the caller takes of `result`.
    pub bound: u64,
    pub lent: Option<Held>,
    pub given: Cell<Option<Given>>,
}

/// Lent memory: where it begins, and its length in bytes, both checked.
pub(crate) enum Held {
    Buffer(Arc<Lendable>, usize, usize),
    /// In the line itself.
    Line(usize, usize),
}

/// A call's arguments: an activation has one of these and uses it again and again.
#[derive(Default)]
pub(crate) struct Arguments {
    /// All `in` bytes, copied once from the line.
    pub scratch: Vec<u8>,
    pub slots: [Slot; MAX_ARGS],
    pub count: usize,
}

/// A call that is being served.
///
/// Arguments are found by their position in the caller's list. `in` and `inout` are private copies, made before the handler began:
/// what the client does to shared memory meanwhile changes nothing. Results travel when the handler returns `Ok`.
pub struct Invocation<'a> {
    pub(crate) arguments: &'a Arguments,
    pub(crate) line: &'a Line,
    pub(crate) link: &'a ChainLink,
}

impl Invocation<'_> {
    #[inline]
    fn slot(&self, index: usize, kind: Kind) -> Result<&Slot, Failure> {
        let slots = &self.arguments.slots[..self.arguments.count];
        slots.get(index).filter(|slot| slot.kind == Some(kind)).ok_or_else(Failure::arguments)
    }

    /// How many arguments there are.
    #[inline]
    pub const fn len(&self) -> usize {
        self.arguments.count
    }

    /// Whether there are none.
    #[inline]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes of `in` argument `index`.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`]: it is something else.
    #[inline]
    pub fn input(&self, index: usize) -> Result<&[u8], Failure> {
        let slot = self.slot(index, Kind::In)?;
        self.arguments.scratch.get(slot.range.clone()).ok_or_else(Failure::arguments)
    }

    /// What `out` argument `index` will be: empty at first.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`]: it is something else.
    ///
    /// # Panics
    /// If the last one returned for the same index still lives.
    #[inline]
    pub fn output(&self, index: usize) -> Result<RefMut<'_, Vec<u8>>, Failure> {
        Ok(self.slot(index, Kind::Out)?.result.borrow_mut())
    }

    /// `inout` argument `index`: what came, and what will go back.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`]: it is something else.
    ///
    /// # Panics
    /// If the last one returned for the same index still lives.
    #[inline]
    pub fn inout(&self, index: usize) -> Result<RefMut<'_, Vec<u8>>, Failure> {
        Ok(self.slot(index, Kind::InOut)?.result.borrow_mut())
    }

    /// The most bytes that the caller takes as result `index` (`out` or `inout`). Beyond it the call fails.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`]: it is something else.
    pub fn bound_bytes(&self, index: usize) -> Result<u64, Failure> {
        let slot = self.slot(index, Kind::Out).or_else(|_| self.slot(index, Kind::InOut))?;
        Ok(slot.bound)
    }

    /// The memory lent as argument `index`: in place, and the client may change it at any moment.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`]: it is something else.
    #[inline]
    pub fn lent(&self, index: usize) -> Result<Lent<'_>, Failure> {
        let slot = self.slot(index, Kind::Lend)?;
        let lent = slot.lent.as_ref().and_then(|held| match held {
            Held::Buffer(buffer, offset, len) => Lent::new(&buffer.shared, *offset, *len),
            Held::Line(offset, len) => Lent::new(&self.line.shared, *offset, *len),
        });
        lent.ok_or_else(Failure::arguments)
    }

    /// Takes the memory given as argument `index`. What is not taken is freed when the call ends.
    ///
    /// # Errors
    /// [`Failure::ARGUMENTS`]: it is something else, or was taken.
    pub fn take_given(&self, index: usize) -> Result<Given, Failure> {
        self.slot(index, Kind::Give)?.given.take().ok_or_else(Failure::arguments)
    }

    /// Who calls, by the kernel's word.
    pub fn caller(&self) -> &Credentials {
        &self.line.peer.credentials
    }

    /// Whether the caller's process is gone, or has hung up: nobody will see the results.
    pub fn is_orphan(&self) -> bool {
        self.line.peer.is_gone()
    }

    /// When the call must be done. Nested calls inherit it.
    pub const fn deadline(&self) -> Option<Deadline> {
        self.link.deadline
    }

    /// This activation's place in the chain of its thread.
    pub const fn link(&self) -> ChainLink {
        *self.link
    }
}

impl fmt::Debug for Invocation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<_> = self.arguments.slots[..self.len()].iter().filter_map(|s| s.kind).collect();
        f.debug_struct("Invocation")
            .field("arguments", &kinds)
            .field("caller", self.caller())
            .field("link", &self.link)
            .finish()
    }
}
