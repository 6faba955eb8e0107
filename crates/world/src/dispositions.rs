//! What the program does about signals: one table for all nodes, part of every image.
//!
//! ```text
//!   a thread: sigaction ──▶ this node's kernel, and if that takes it ──▶ table, version + 1
//!   each node, when it looks for work, and before a thread that has come runs: version is another? ──▶ tells its kernel
//! ```
//!
//! The kernel has such a table for each process. With that alone a thread that has installed a handler would lose it with its first
//! move, and the signal, mostly, its node. So a handler that any thread installs is in force on the node at once, on another one by
//! the time that any thread comes there, and within a slice in any case; and again after a rollback or a resume. It runs on the thread
//! that the signal interrupts.
//!
//! What no thread has asked for is as the node has it: the runtime's handlers, and what the program had before `main`.

use crate::control::imaged;
use crate::killpoint::{Point, at};
use crate::local::{Local, local};
use crate::lock::Lock;
use crate::sched;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_sys::raw::Errno;
use peregrine_sys::signal::{self, Disposition, bit};
use peregrine_thread::carrier::carrier;
use peregrine_thread::mask::RUNTIME;

const SIGNALS: usize = 64;

/// The table.
#[repr(C)]
pub struct Dispositions {
    /// Bumped by each change.
    version: AtomicU64,
    asked: Lock<Asked>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Asked {
    /// Signals that a thread has asked something about.
    set: u64,
    list: [Disposition; SIGNALS],
}

impl Dispositions {
    /// Nobody has asked for anything.
    pub const fn none() -> Self {
        let list = [Disposition::NONE; SIGNALS];
        Self { version: AtomicU64::new(0), asked: Lock::new(Asked { set: 0, list }) }
    }
}

/// A node's part.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct InForce {
    /// Version of the table that the kernel was told last.
    version: u64,
    /// Signals about which it was told what the table says.
    told: u64,
    /// What it did about these before.
    before: [Disposition; SIGNALS],
}

/// What the kernel is told: a handler may not block the runtime's signals, as no thread may.
fn for_kernel(d: &Disposition) -> Disposition {
    let mut d = *d;
    d.mask &= !RUNTIME;
    d
}

impl InForce {
    fn tell(&mut self, signo: i32, d: &Disposition) -> Result<Disposition, Errno> {
        if self.told & bit(signo) == 0 {
            // Noted first: a reset may come in between.
            // SAFETY: nothing is changed.
            self.before[signo as usize - 1] = unsafe { signal::change(signo, None) }?;
            self.told |= bit(signo);
        }
        // SAFETY: the thread that installs a handler answers for it; its code lies at the same address on every node.
        unsafe { signal::change(signo, Some(&for_kernel(d))) }
    }

    /// Tells the kernel all that the table says, and takes back what it does not say any more.
    #[cold]
    #[inline(never)]
    fn follow(&mut self) {
        let table = &imaged().dispositions;
        let (asked, version) = table.asked.with(|a| (*a, table.version.load(Ordering::Relaxed)));
        for signo in 1..=SIGNALS as i32 {
            let place = signo as usize - 1;
            if asked.set & bit(signo) != 0 {
                let _ = self.tell(signo, &asked.list[place]);
                at(Point::DispositionFollowed);
            } else if self.told & bit(signo) != 0 {
                // SAFETY: it was in force here before.
                let _ = unsafe { signal::change(signo, Some(&self.before[place])) };
                self.told &= !bit(signo);
            }
        }
        self.version = version;
    }
}

/// Has this node do what the program wants about signals.
#[inline(always)]
pub fn look(l: &mut Local) {
    if imaged().dispositions.version.load(Ordering::Acquire) != l.in_force.version {
        l.in_force.follow();
    }
}

/// Whether [`look`] would find anything.
pub fn has_changed(l: &Local) -> bool {
    imaged().dispositions.version.load(Ordering::Acquire) != l.in_force.version
}

/// As [`look`], after a rollback, when versions tell nothing: the next change gets the number of one that was lost, and a node that was
/// reset in the middle of a change, or of following one, has told its kernel more than its version says.
pub fn look_again(l: &mut Local) {
    l.in_force.follow();
}

/// What interposed functions ask for, in a section of the running thread.
pub fn disposition(signo: i32, new: Option<Disposition>) -> Result<Disposition, Errno> {
    let place = signo as usize - 1;
    let table = &imaged().dispositions;
    // SAFETY: on a node, in a section.
    let l = unsafe { local() };
    look(l);
    let Some(new) = new else {
        let asked = table.asked.with(|a| (a.set & bit(signo) != 0).then(|| a.list[place]));
        // SAFETY: nothing is changed.
        return asked.map_or_else(|| unsafe { signal::change(signo, None) }, Ok);
    };
    let was = table.asked.with(|a| {
        let was = l.in_force.tell(signo, &new)?;
        at(Point::DispositionTold);
        let was = if a.set & bit(signo) != 0 { a.list[place] } else { was };
        a.set |= bit(signo);
        a.list[place] = new;
        at(Point::DispositionSet);
        // Release: who sees the version and takes the lock sees the entry.
        let version = table.version.load(Ordering::Relaxed);
        table.version.store(version + 1, Ordering::Release);
        at(Point::DispositionCounted);
        // Another thread may have been quicker with another entry: then the next look is not spared.
        if l.in_force.version == version {
            l.in_force.version = version + 1;
        }
        Ok(was)
    });
    // Who is seldom interrupted would see it late.
    // SAFETY: on a node, in a section.
    sched::nudge_lone(unsafe { carrier() }.node);
    was
}
