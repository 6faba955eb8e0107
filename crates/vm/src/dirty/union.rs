//! DIRTY of an object: the union over the views through which it may be written.

use super::{ObjectDirty, ObjectRun, TrackError, Tracker, ViewDirty};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange};

/// A view can't be part of a union.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnionError {
    /// It shows another object than the first view, or none.
    #[error(
        "{range:?} does not show the object of the union's other views (memfd or file): only aliases can be united"
    )]
    OtherObject {
        /// The view.
        range: PageRange,
    },
}

/// Watches one memfd or file through several views of this process; views of other processes send their sets
/// ([`UnionTracker::absorb`]).
///
/// ```
/// use peregrine_vm::{Capabilities, Mapping, PageCount, Protection, Tracker, UnionTracker};
/// use std::sync::Arc;
/// let caps = Capabilities::probe();
/// let one = Arc::new(Mapping::memfd(PageCount::new(8))?);
/// let two = Arc::new(one.alias(Protection::ReadWrite)?);
/// let mut union = UnionTracker::new();
/// union.add(Tracker::of(one.clone()).start(&caps)?)?;
/// union.add(Tracker::of(two.clone()).start(&caps)?)?;
/// one.bytes().write(0, b"first page, through one")?;
/// two.bytes().write(4096 * 5, b"sixth page, through two")?;
/// let pages: Vec<usize> = union.take_dirty()?.pages().map(PageCount::get).collect();
/// assert_eq!(pages, [0, 5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Default)]
pub struct UnionTracker {
    views: Vec<Tracker>,
    /// What removed views and other processes left to be reported.
    pending: ObjectDirty,
}

impl UnionTracker {
    /// A union of no view yet.
    pub const fn new() -> Self {
        Self { views: Vec::new(), pending: ObjectDirty::new() }
    }

    /// Adds a view; returns its number.
    ///
    /// # Errors
    /// [`UnionError::OtherObject`].
    pub fn add(&mut self, view: Tracker) -> Result<usize, UnionError> {
        let range = view.range();
        let same = match self.views.first() {
            Some(first) => first.mapping().shares_object_with(view.mapping()),
            None => view.mapping().object().is_some(),
        };
        if !same {
            return Err(UnionError::OtherObject { range });
        }
        self.views.push(view);
        Ok(self.views.len() - 1)
    }

    /// Takes a view out, after its last dirty set, which the next [`UnionTracker::take_dirty`] reports: a view that was
    /// dropped without this would take its writes with it. The numbers of later views fall by one.
    ///
    /// # Errors
    /// [`TrackError`]; the view stays.
    ///
    /// # Panics
    /// If there is no such view.
    pub fn remove(&mut self, view: usize) -> Result<(), TrackError> {
        let last = self.views[view].take_dirty()?;
        self.pending.absorb(&in_object(&self.views[view], &last));
        self.views.remove(view);
        Ok(())
    }

    /// Adds what another process's view of the same object reported.
    pub fn absorb(&mut self, other: &ObjectDirty) {
        self.pending.absorb(other);
    }

    /// The pages of the object written through any view since the last call.
    ///
    /// # Errors
    /// [`TrackError`]; what had been taken is reported by the next call.
    pub fn take_dirty(&mut self) -> Result<ObjectDirty, TrackError> {
        for view in &mut self.views {
            let set = view.take_dirty()?;
            self.pending.absorb(&in_object(view, &set));
        }
        Ok(std::mem::take(&mut self.pending))
    }
}

/// The pages of a view's set as offsets in its object.
pub(super) fn in_object(view: &Tracker, set: &ViewDirty) -> ObjectDirty {
    let mapping = view.mapping();
    let start = mapping.range().start().as_usize();
    ObjectDirty::from_runs(set.runs().iter().map(|run| ObjectRun {
        first: PageCount::new(mapping.object_offset().get() + (run.start().as_usize() - start) / PAGE_SIZE),
        pages: run.pages(),
    }))
}
