//! Threads from birth to their last instruction: made, entered, run. What comes then is in `join`.

use crate::arena;
use crate::control::{
    JoinCell, NONE, WHY_WORDS, ending, imaged, mail, name_of, node, record, state, thread_link, world,
};
use crate::ends;
use crate::error::SpawnError;
use crate::killpoint::{Point, at};
use crate::local::Action;
use crate::{join, sched};
use peregrine_base::sync::{Ordering, compiler_fence};
use peregrine_thread::carrier::carrier;
use peregrine_thread::slot::{self, SlotHeader};
use peregrine_thread::stack_kind::{StackKind, is_windowed};
use peregrine_thread::template::template;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Names a thread for as long as the World lives: slot and how often that slot had been used.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
pub struct ThreadId {
    /// The slot.
    pub slot: u32,
    /// The use of that slot.
    pub generation: u32,
}

impl std::fmt::Display for ThreadId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.generation == 1 {
            write!(f, "{}", self.slot)
        } else {
            write!(f, "{}.{}", self.slot, self.generation)
        }
    }
}

/// What a thread runs: gets the function's address and the argument's bytes, gives the result's. The second list is the
/// channel ends that travel in each.
pub type Body = fn(usize, Vec<u8>, Vec<u32>) -> Result<(Vec<u8>, Vec<u32>), String>;

/// What a new thread is to be.
pub struct Start<'a> {
    /// Runs first and last.
    pub body: Body,
    /// Passed to `body`.
    pub function: usize,
    /// Passed to `body`.
    pub argument: &'a [u8],
    /// Channel ends in `argument`.
    pub ends: &'a [u32],
    /// Stack size in bytes.
    pub stack_bytes: usize,
    /// Where its memory lies.
    pub kind: StackKind,
    /// Name, at most 47 bytes are kept.
    pub name: &'a str,
}

/// Functions run at the start of each thread, before its body: `#[peregrine::init]`.
pub type Init = fn();

/// Makes a thread; it starts on node `on`.
///
/// # Safety
/// In a runtime section, or in the supervisor before the nodes run. `start.body` accepts the argument.
pub unsafe fn create(start: &Start<'_>, on: u32) -> Result<ThreadId, SpawnError> {
    // SAFETY: the World is made.
    let t = unsafe { template() };
    let stack_bytes = slot::check_stack_size(start.stack_bytes, t)?;
    // A windowed thread has nothing before it first runs.
    let fixed = if start.kind == StackKind::Isomalloc { stack_bytes / 8 + t.copy_len() + 8192 } else { 0 };
    if start.kind != StackKind::Isomalloc && stack_bytes > t.windows.stack_bytes {
        return Err(SpawnError::Window { asked: stack_bytes, most: t.windows.stack_bytes });
    }
    arena::charge(fixed)?;
    at(Point::CreateCharged);
    let give_back = || imaged().memory_used.fetch_sub(fixed as u64, Ordering::Relaxed);
    let argument = arena::write(start.argument, start.ends).inspect_err(|_| {
        give_back();
    })?;
    let most = match start.kind {
        StackKind::Isomalloc => world().slot_count.load(Ordering::Relaxed) as usize,
        other => crate::room::room().records(other),
    };
    let first_number = start.kind.first();
    let link = |i| thread_link(first_number + i);
    let Some(slot) = imaged().threads[start.kind as usize].with(|l| l.take(most, link)) else {
        give_back();
        // SAFETY: just written, unknown to anybody else. The ends stay the caller's.
        unsafe { arena::free(argument) };
        return Err(SpawnError::TooMany { most });
    };
    at(Point::CreateTaken);
    let slot = first_number + slot;
    let r = record(slot);
    // From here until it is whole, and in `bury` from the end on, nobody may take the slot's contents for a thread's.
    r.state.store(state::IN_TRANSIT, Ordering::Release);
    // SAFETY: the slot is ours: it was just taken off the free list. Its pages are zero (punched at burial).
    unsafe {
        if peregrine_thread::carrier::current_slot().is_some() {
            node(carrier().node).note_ran(slot);
        }
        if is_windowed(slot) {
            // Its window may be somebody's, even the caller's: it is prepared when it first comes there.
            r.stored.store(crate::windows::UNBORN, Ordering::Relaxed);
        } else {
            if !crate::address_space::take_slot(slot, r.generation.load(Ordering::Relaxed) + 1) {
                give_back();
                arena::free(argument);
                join::release(slot);
                return Err(SpawnError::NoRecord { slot });
            }
            SlotHeader::prepare(slot, t, stack_bytes, first);
        }
        at(Point::CreatePrepared);
        for (word, value) in r.entry.iter().zip([start.body as usize, start.function, argument]) {
            word.store(value, Ordering::Relaxed);
        }
        let mut name = [0u8; 48];
        let mut n = start.name.len().min(47);
        while !start.name.is_char_boundary(n) {
            n -= 1;
        }
        name[..n].copy_from_slice(&start.name.as_bytes()[..n]);
        *name_of(slot) = name;
        at(Point::CreateNamed);
    }
    let generation = r.generation.load(Ordering::Relaxed) + 1;
    r.generation.store(generation, Ordering::Relaxed);
    at(Point::CreateNumbered);
    r.join.with(|j| *j = JoinCell { how: 0, joiner: NONE, detached: 0, result: 0 });
    r.move_to.store(NONE, Ordering::Relaxed);
    r.reply.store(0, Ordering::Relaxed);
    r.stack_bytes.store(stack_bytes as u64, Ordering::Relaxed);
    r.granted.store(fixed as u64, Ordering::Relaxed);
    for zero in [&r.moves, &r.wake_at, &r.sent_at] {
        zero.store(0, Ordering::Relaxed);
    }
    for zero in [&r.waits, &r.waiting] {
        zero.store(0, Ordering::Relaxed);
    }
    // A post to the slot's last thread may still lie in an inbox: it must stay marked as posted, and mean nothing.
    r.mail.fetch_and(mail::POSTED, Ordering::AcqRel);
    r.node.store(on, Ordering::Relaxed);
    r.state.store(state::RUNNABLE, Ordering::Release);
    at(Point::CreateReady);
    Ok(ThreadId { slot, generation })
}

/// First function on a new thread's stack.
pub(crate) extern "C" fn first() -> ! {
    // SAFETY: the scheduler entered this thread; its runtime section ends here.
    let (body, function, argument) = unsafe {
        let slot = carrier().current.load(Ordering::Relaxed);
        let [body, function, argument] = [0, 1, 2].map(|i| record(slot).entry[i].load(Ordering::Relaxed));
        compiler_fence(Ordering::SeqCst);
        carrier().depth.store(0, Ordering::Relaxed);
        (core::mem::transmute::<usize, Body>(body), function, argument)
    };
    let ended = run(body, function, argument);
    end(ended)
}

/// Drops the argument of a thread that has not taken it, and never will: whoever waits at the other end of a channel in it must
/// learn so.
pub fn drop_argument(slot: u32) {
    let argument = record(slot).entry[2].swap(0, Ordering::Relaxed);
    if argument != 0 {
        ends::release_blob(argument);
    }
}

/// Ends a thread that must not run, before it is given a window or guards: these may be what it brought down its nodes for. Whether it
/// was one.
///
/// # Safety
/// On the scheduler's stack; the thread is this node's and not in its queue.
pub unsafe fn end_doomed(slot: u32) -> bool {
    let Some(why) = why_doomed(slot) else { return false };
    let len = why.iter().position(|b| *b == 0).unwrap_or(why.len());
    drop_argument(slot);
    // SAFETY: it has not begun, and will not.
    unsafe { join::finish(slot, ending::QUARANTINED, arena::write(&why[..len], &[]).unwrap_or(0)) };
    join::bury(slot);
    true
}

/// Why this thread must not run, if it brought down its nodes before an image held it; ends with zeros.
fn why_doomed(slot: u32) -> Option<[u8; WHY_WORDS * 8]> {
    let w = world();
    // All of it is written while this node is paused.
    let count = w.doomed_count.load(Ordering::Relaxed) as usize;
    if count == 0 {
        return None;
    }
    let id = identity(slot);
    let i = w.doomed.iter().take(count).position(|d| d.load(Ordering::Relaxed) == id)?;
    let mut text = [0; WHY_WORDS * 8];
    for (bytes, word) in text.as_chunks_mut().0.iter_mut().zip(&w.doomed_why[i]) {
        *bytes = word.load(Ordering::Relaxed).to_le_bytes();
    }
    Some(text)
}

/// What tells a thread from the one that is made in its place after a rollback: slot and generation alone may then belong to
/// another, so its function and name count as well (FNV-1a; never 0).
pub fn identity(slot: u32) -> u64 {
    let r = record(slot);
    // SAFETY: a thread's name is written before it is known, and not changed.
    let name = unsafe { name_of(slot).read() };
    let function = r.entry[1].load(Ordering::Relaxed) as u64;
    let place = [u64::from(slot), u64::from(r.generation.load(Ordering::Relaxed)), function];
    let bytes = place.iter().flat_map(|w| w.to_ne_bytes()).chain(name);
    bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)) | 1
}

/// Runs the thread's code to its end, destructors of thread-locals included.
#[inline(never)]
fn run(body: Body, function: usize, argument: usize) -> (u32, Vec<u8>, Vec<u32>) {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        for init in inits() {
            init();
        }
        // SAFETY: the argument was written for this thread.
        let (bytes, ends) = sched::in_thread(|slot| unsafe {
            let taken = arena::take(argument);
            record(slot).entry[2].store(0, Ordering::Relaxed);
            ends::adopt(&taken.1, slot);
            taken
        })
        .expect("a thread runs");
        body(function, bytes, ends)
    }));
    let ended = match outcome {
        Ok(Ok((bytes, ends))) => (ending::RETURNED, bytes, ends),
        Ok(Err(message)) => (ending::PANICKED, message.into_bytes(), Vec::new()),
        Err(panic) => (ending::PANICKED, panic_text(&*panic).into_bytes(), Vec::new()),
    };
    use std::io::Write;
    let _ = std::io::stdout().flush();
    // SAFETY: last of the thread's own code; a panic in a destructor aborts, as in std.
    unsafe { peregrine_thread::interpose::run_destructors() };
    ended
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

fn end((how, bytes, ends): (u32, Vec<u8>, Vec<u32>)) -> ! {
    // A result that finds no room becomes a panic with a shorter message.
    let written = sched::with_room(|_| arena::write(&bytes, &ends));
    let (how, result) = match written {
        Some(Ok(at)) => (how, at),
        _ => (ending::PANICKED, 0),
    };
    drop((bytes, ends));
    // SAFETY: a thread runs; it is never resumed after this.
    unsafe {
        core::mem::forget(peregrine_thread::carrier::RuntimeSection::enter());
        // What the thread's code left in force ends with it.
        core::mem::forget(peregrine_thread::arch::ControlWords::aside());
        let c = carrier();
        c.depth.store(c.depth.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        let slot = c.current.load(Ordering::Relaxed);
        join::finish(slot, how, result);
        sched::reschedule(Action::Ended);
    }
    unreachable!("an ended thread is not resumed")
}

/// Tells the supervisor to look at `bits`.
pub fn notify(bits: u32) {
    let w = world();
    w.requests.fetch_or(bits, Ordering::AcqRel);
    let pid = w.supervisor.load(Ordering::Relaxed) as i32;
    let _ = peregrine_sys::signal::kill(pid, crate::SIG_NOTIFY);
}

/// Name of the thread in `slot`.
pub fn name(slot: u32) -> String {
    // SAFETY: written before the thread was known.
    let bytes = unsafe { *name_of(slot) };
    let n = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..n]).into_owned()
}

/// The program's `#[peregrine::init]` functions: their addresses lie in a section of their own.
pub fn inits() -> impl Iterator<Item = Init> {
    unsafe extern "C" {
        #[link_name = "__start_peregrine_init"]
        static START: [usize; 0];
        #[link_name = "__stop_peregrine_init"]
        static STOP: [usize; 0];
    }
    #[used]
    #[unsafe(link_section = "peregrine_init")]
    static NOTHING: usize = 0;
    // SAFETY: the linker defines both ends of the section, which holds function addresses and zeroes only.
    let list = unsafe {
        let (start, stop) = ((&raw const START).cast::<usize>(), (&raw const STOP).cast::<usize>());
        core::slice::from_raw_parts(start, stop.offset_from(start) as usize)
    };
    // SAFETY: a non-zero entry is a `fn()` put there by the attribute.
    list.iter().filter(|a| **a != 0).map(|a| unsafe { core::mem::transmute::<usize, Init>(*a) })
}
