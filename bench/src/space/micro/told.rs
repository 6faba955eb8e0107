//! The floor of what must be enforced: the bare calls of `bare`, by processes that close their views when they are told, and wait until
//! they were. A word for each pair of processes, and no more: no records, no sets, no locks, and nobody may stop or die.
//!
//! ```text
//!  unmap: word[me][other] := pages ─▶ own view closed ─▶ wait until every word is 0, closing what is asked of this one
//!  safepoint: each word[other][me] that is not 0: closed, then 0
//! ```

use super::bare::{Bare, Way};
use super::stage::{MEMBERS, Program, Worker};
use peregrine_base::sync::{AtomicU64, Ordering, spin_loop};
use peregrine_base::{PageCount, PageRange, Protection};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use std::os::fd::OwnedFd;

/// What one process asks of the others: first page and number of pages, plus one, or 0.
#[repr(C, align(128))]
struct Asked {
    of: [AtomicU64; MEMBERS],
    /// Closes nothing any more: its view goes with it.
    left: AtomicU64,
}

/// The words of all pairs, in shared memory.
#[derive(Clone, Copy)]
pub struct Mail(PageRange);

impl Mail {
    pub fn new() -> Self {
        let pages = PageCount::for_bytes(size_of::<[Asked; MEMBERS]>());
        let (rights, source) = (Protection::ReadWrite, Source::SharedAnonymous);
        // SAFETY: a new mapping at a place of the kernel's choice.
        let memory = unsafe { mem::map(pages, rights, source, Placement::Anywhere, MapOptions::default()) };
        Self(memory.expect("memory"))
    }

    fn of(&self, member: usize) -> &Asked {
        assert!(member < MEMBERS);
        // SAFETY: mapped until `free`; atomics, and zeros are their initial state.
        unsafe { &*self.0.start().as_ptr::<Asked>().add(member) }
    }

    /// # Safety
    /// Nobody uses it any more.
    pub unsafe fn free(self) {
        // SAFETY: the caller's promise.
        let _ = unsafe { mem::unmap(self.0) };
    }
}

/// A process that does all by bare calls, and tells those that must do their part.
pub struct Told {
    bare: Bare,
    mail: Mail,
    program: Program,
    members: usize,
    index: usize,
}

impl Told {
    pub fn new(frames: &OwnedFd, way: Way, unit: usize, mail: Mail, who: (Program, usize, usize)) -> Self {
        let (program, members, index) = who;
        Self { bare: Bare::new(frames, way, unit), mail, program, members, index }
    }

    /// Who has the pages in view beside this one: in the pipeline the one before it, who mapped them.
    fn others(&self) -> impl Iterator<Item = usize> {
        let (me, members) = (self.index, self.members);
        let before = (me + members - 1) % members;
        let pipeline = self.program == Program::Pipeline;
        (0..members).filter(move |m| *m != me && (!pipeline || *m == before))
    }

    fn obey(&self) {
        for asker in (0..self.members).filter(|m| *m != self.index) {
            let word = &self.mail.of(asker).of[self.index];
            let asked = word.load(Ordering::Acquire);
            if asked != 0 {
                self.bare.close((asked >> 32) as usize, (asked as u32 - 1) as usize);
                word.store(0, Ordering::Release);
            }
        }
    }
}

impl Worker for Told {
    fn map(&mut self, first: usize, pages: usize) {
        self.bare.map(first, pages);
    }
    fn unmap(&mut self, first: usize, pages: usize) {
        let mine = self.mail.of(self.index);
        for other in self.others() {
            mine.of[other].store((first as u64) << 32 | (pages as u64 + 1), Ordering::Release);
        }
        self.bare.close(first, pages);
        for other in self.others() {
            while mine.of[other].load(Ordering::Acquire) != 0
                && self.mail.of(other).left.load(Ordering::Acquire) == 0
            {
                self.obey();
                spin_loop();
            }
        }
    }
    fn poll(&self) {
        self.obey();
    }
    fn at(&self, page: usize) -> *mut u64 {
        self.bare.at(page)
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.mail.of(self.index).left.store(1, Ordering::Release);
    }
}
