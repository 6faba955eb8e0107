//! The carrier: what one node (one single-threaded process) knows of itself.
//!
//! It lies at one fixed address, [`CARRIER`], in memory private to each process. So the runtime finds it
//! without a static (the statics in place are the running thread's) and without a thread-local (so is the FS
//! base), and code suspended on one node and resumed on another finds the other's carrier.
//!
//! ```text
//!                 ┌────────────── runtime (depth > 0) ─────────────┐
//!  thread code ──▶│ enter: depth += 1      …      leave: depth -= 1 │──▶ thread code
//!                 └─────────▲──────────────────────────────┬───────┘
//!    signal with depth > 0: │ only notes `pending`         │ depth 0 and pending: act on it now
//! ```
//!
//! A signal that arrives with `depth == 0` acts at once, on the thread's own stack (`preempt`).

use crate::layout::CARRIER;
use peregrine_base::sync::{AtomicU32, Ordering, compiler_fence};
use peregrine_sys::raw::Errno;
use peregrine_sys::signal::Disposition;

/// No slot.
pub const NONE: u32 = u32::MAX;

/// Room up to a multiple of 128 bytes.
#[derive(Clone, Copy, Default)]
#[repr(C, align(128))]
pub struct Room;

/// What a node knows of itself. The fields are this process's alone, but a signal handler of the same process
/// may interrupt any access, so what both touch is atomic.
#[repr(C)]
pub struct Carrier {
    // What is seldom used comes first, so that what a switch writes has another place in its page than what it reads right after in
    // other tables (the World's and `Local` begin with such words): the processor would wait to see that they differ.
    /// What interposed libc functions call to reach the scheduler.
    pub hooks: Hooks,
    /// Room for the crate that schedules.
    pub user: [usize; 8],
    /// Range of the vDSO: code at an address that differs between processes.
    pub vdso: (usize, usize),
    /// Code of shared libraries, unused entries empty: see `preempt`.
    pub libraries: [(usize, usize); crate::preempt::MOST_LIBRARIES],
    /// How often in a row an interruption inside a library was put off.
    pub put_off: u32,
    /// Called on the thread's stack when a signal, or the end of a runtime section, finds something pending.
    pub on_preempt: fn(u32),
    /// Nothing: what a switch touches begins at a place of its own in the page (`world::control` asserts which).
    pub room: Room,
    /// How many nested sections of the runtime the running code is in; the scheduler itself counts as one.
    pub depth: AtomicU32,
    /// Why the runtime should take a look as soon as it may: bits of [`Pending`].
    pub pending: AtomicU32,
    /// Slot of the running thread, or [`NONE`].
    pub current: AtomicU32,
    /// Whose statics lie in the window, or [`NONE`].
    pub window_owner: AtomicU32,
    /// This node's number.
    pub node: u32,
    /// `wrfsbase` may be used.
    pub fast_fs: bool,
    /// AVX2 may be used to compare the window.
    pub wide_compare: bool,
    /// Granules of the statics window that may differ from the template, when it has no owner or just lost it.
    pub window_written: u64,
    /// [`SlotHeader::blocked`](crate::slot::SlotHeader::blocked) of the thread whose signal mask is in force; 0 in the scheduler.
    pub blocked: u64,
    /// Header of the running thread, while one runs.
    pub header: *mut crate::slot::SlotHeader,
    /// Saved stack pointer of the scheduler.
    pub scheduler_sp: usize,
    /// The process's own thread pointer.
    pub process_fs: usize,
    /// Times that an owner's statics were looked at and saved, for another came, or a pause.
    pub window_saves: u64,
    /// Which pages of the window need no look.
    pub seals: crate::seal::Seals,
}

/// Calls from interposed libc functions into whoever schedules. Each runs in ordinary thread context.
#[derive(Clone, Copy)]
pub struct Hooks {
    /// Sleep until the monotonic deadline (ns).
    pub sleep_until: fn(u64),
    /// Let others run.
    pub yield_now: fn(),
    /// Program output on descriptor 1 or 2; `false`: not taken, write it yourself.
    pub output: fn(i32, &[u8]) -> bool,
    /// May the slot heap grow by this many bytes?
    pub grant: fn(usize) -> bool,
    /// The slot heap has no room, for this reason: whoever allocates is told so in a moment.
    pub refused: fn(Refusal),
    /// Move the running thread to the next node; `false` if there is no other.
    pub next_node: fn() -> bool,
    /// How many nodes there are.
    pub node_count: fn() -> u32,
    /// What the program does about a signal from now on, if anything is given; what it did.
    pub disposition: fn(i32, Option<Disposition>) -> Result<Disposition, Errno>,
    /// A signal of the runtime has come in the middle of a library: the next one finds the running thread there or elsewhere.
    pub put_off: fn(),
}

/// Why a heap does not grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Refusal {
    /// Its slot or window ends.
    Range = 1,
    /// [`Hooks::grant`] said no.
    Grant = 2,
}

/// Reasons to take a look at the scheduler.
#[allow(non_snake_case)]
pub mod Pending {
    /// The time slice is over.
    pub const TICK: u32 = 1;
    /// Somebody asks every node to pause.
    pub const STOP: u32 = 2;
}

/// This process's carrier.
///
/// # Safety
/// The process is a node: [`CARRIER`] is mapped and initialised.
#[inline(always)]
pub unsafe fn carrier() -> &'static mut Carrier {
    // SAFETY: mapped for the life of a node; the process is single-threaded, and code that can be interrupted
    // between two accesses touches shared fields through atomics only (S9).
    unsafe { &mut *(CARRIER as *mut Carrier) }
}

/// Number of the running thread: `None` in a process, or on a stack, that is no thread's.
///
/// Decided by the thread pointer, so it is right on any stack that the thread made for itself too.
#[inline(always)]
pub fn current_slot() -> Option<u32> {
    // SAFETY: a thread pointer in a window is that of the thread in it, which runs.
    unsafe { crate::window::number_at(peregrine_sys::cpu::thread_pointer()) }
}

/// A section in which the running thread is neither suspended nor moved.
///
/// Taken by every call into the runtime; dropping the last one acts on what became pending meanwhile.
pub struct RuntimeSection(());

impl RuntimeSection {
    /// Enters.
    ///
    /// # Safety
    /// A Peregrine thread or the scheduler runs.
    #[inline(always)]
    pub unsafe fn enter() -> Self {
        // SAFETY: the caller runs on a node.
        let c = unsafe { carrier() };
        // A plain add in one place: nobody else writes it but handlers that restore what they found.
        c.depth.store(c.depth.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        Self(())
    }
}

impl Drop for RuntimeSection {
    #[inline(always)]
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        // SAFETY: a section exists only on a node. Read anew: the thread may have changed nodes inside.
        let c = unsafe { carrier() };
        let depth = c.depth.load(Ordering::Relaxed) - 1;
        c.depth.store(depth, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        if depth == 0 && c.pending.load(Ordering::Relaxed) != 0 {
            act_on_pending();
        }
    }
}

#[cold]
#[inline(never)]
fn act_on_pending() {
    // SAFETY: called on a node, by a thread outside the runtime.
    unsafe {
        loop {
            let c = carrier();
            let why = c.pending.load(Ordering::Relaxed);
            if why == 0 || c.depth.load(Ordering::Relaxed) != 0 {
                return;
            }
            // A handler on the alternate stack, which is the node's, may come through here too: whoever is suspended there is lost.
            let stack = (&raw const why) as usize;
            if !crate::window::holds(c.current.load(Ordering::Relaxed), stack) {
                return;
            }
            c.depth.store(1, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
            c.pending.store(0, Ordering::Relaxed);
            // The section may have been entered from C code, through its allocator for one.
            let words = crate::arch::ControlWords::aside();
            (c.on_preempt)(why);
            drop(words);
            compiler_fence(Ordering::SeqCst);
            carrier().depth.store(0, Ordering::Relaxed);
            compiler_fence(Ordering::SeqCst);
        }
    }
}
