//! What is left of a thread that has ended: its result in the join cell, until somebody takes it.
//!
//! ```text
//!   finish ──▶ join cell: how, result ──▶ wakes the joiner
//!   bury   ──▶ slot or block given back, state ENDED ──▶ record freed, if it was let go ──▶ wakes the joiner again
//!   join   ──▶ takes the result, frees the record            detach ──▶ lets it go
//! ```

use crate::arena;
use crate::control::{JoinCell, NONE, ending, imaged, record, state, thread_link, wait};
use crate::ends;
use crate::error::JoinError;
use crate::killpoint::{Point, at};
use crate::lock::Lock;
use crate::sched;
use crate::thread::{ThreadId, name, notify};
use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};
use peregrine_thread::stack_kind::{StackKind, is_windowed};

/// Publishes how a thread ended and wakes who waits for it.
///
/// # Safety
/// In a runtime section or the supervisor; called once a thread.
pub unsafe fn finish(slot: u32, how: u32, result: usize) {
    let joiner = record(slot).join.with(|j| {
        (j.how, j.result) = (how, result);
        at(Point::FinishSet);
        j.joiner
    });
    if imaged().main.load(Ordering::Relaxed) == slot {
        let code = exit_code(how, result);
        imaged().main_exit.store(code + 1, Ordering::Release);
        at(Point::MainEnded);
        notify(crate::control::request::MAIN_ENDED);
    }
    if joiner != NONE {
        at(Point::FinishBeforeWake);
        // SAFETY: as promised.
        unsafe { sched::wake(joiner) };
    }
}

fn exit_code(how: u32, result: usize) -> u32 {
    if how != ending::RETURNED {
        return 101;
    }
    // SAFETY: `main`'s body leaves its exit code as the first byte of the result.
    unsafe {
        let blob = result as *const arena::Blob;
        if (*blob).len == 0 { 0 } else { *((result + size_of::<arena::Blob>()) as *const u8) as u32 }
    }
}

/// The bytes that `main` left when it returned; empty if it did not. For the supervisor, once no node runs.
pub fn result_of_main() -> Vec<u8> {
    let main = imaged().main.load(Ordering::Relaxed);
    if imaged().main_exit.load(Ordering::Acquire) == 0
        || record(main).state.load(Ordering::Acquire) != state::ENDED
    {
        return Vec::new();
    }
    let cell = record(main).join.with(|j| *j);
    if cell.how != ending::RETURNED || cell.result == 0 {
        return Vec::new();
    }
    // SAFETY: nobody joins `main`, so its result is the supervisor's to read. It is not freed: a node may have been killed with
    // the arena's lock, and the World is over.
    unsafe { arena::read(cell.result).0 }
}

/// Frees the slot of an ended thread; its record stays until it is joined.
pub fn bury(slot: u32) {
    let r = record(slot);
    r.state.store(state::IN_TRANSIT, Ordering::Release);
    at(Point::BuryBegins);
    if is_windowed(slot) {
        crate::windows::bury(slot);
    } else {
        // SAFETY: nobody runs on this slot any more. Its frames go back zeroed (S2).
        unsafe { crate::address_space::give_slot(slot) };
    }
    at(Point::BuryPunched);
    imaged().memory_used.fetch_sub(r.granted.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    at(Point::BuryGivenBack);
    let gone = r.join.with(|j| {
        r.state.store(state::ENDED, Ordering::Release);
        j.detached != 0
    });
    at(Point::BuryEnded);
    if gone {
        drop_result(slot);
        release(slot);
    } else {
        let joiner = r.join.with(|j| j.joiner);
        if joiner != NONE {
            // The joiner may have looked before the state was ENDED.
            // SAFETY: the scheduler runs.
            unsafe { sched::wake(joiner) };
        }
    }
}

fn drop_result(slot: u32) {
    let result = record(slot).join.with(|j| core::mem::replace(&mut j.result, 0));
    at(Point::ResultDropped);
    if result != 0 {
        ends::release_blob(result);
    }
}

/// Gives record and slot back.
pub fn release(slot: u32) {
    record(slot).state.store(state::FREE, Ordering::Release);
    at(Point::ReleaseFree);
    let kind = StackKind::of(slot);
    imaged().threads[kind as usize].with(|l| l.give(slot - kind.first(), |i| thread_link(kind.first() + i)));
}

/// Waits until the thread has ended and takes its result. `Err` if it panicked or was quarantined.
pub fn join(id: ThreadId) -> Result<(Vec<u8>, Vec<u32>), JoinError> {
    let taken = sched::in_thread(|me| {
        let r = record(id.slot);
        loop {
            let ended = r.join.with(|j| {
                if j.how != 0 && r.state.load(Ordering::Acquire) == state::ENDED {
                    return Some(*j);
                }
                j.joiner = me;
                at(Point::JoinWaits);
                None
            });
            if let Some(j) = ended {
                let blob = if j.result == 0 {
                    (Vec::new(), Vec::new())
                } else {
                    // SAFETY: the result is ours: the record is freed here and only here.
                    unsafe { arena::take(j.result) }
                };
                at(Point::JoinTaken);
                ends::adopt(&blob.1, me);
                let name = name(id.slot);
                at(Point::JoinAdopted);
                release(id.slot);
                return (j.how, blob, name);
            }
            // SAFETY: in a section.
            unsafe { sched::park(0, wait::JOIN, id.slot) };
        }
    });
    let (how, blob, name) = taken.ok_or(JoinError::NoThread)?;
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    match how {
        ending::RETURNED => Ok(blob),
        ending::QUARANTINED => Err(JoinError::Quarantined { thread: id.slot, name, why: text(&blob.0) }),
        _ => Err(JoinError::Panicked { thread: id.slot, name, message: text(&blob.0) }),
    }
}

/// Lets a thread go: its result is dropped when it ends.
pub fn detach(id: ThreadId) {
    sched::in_thread(|_| {
        let r = record(id.slot);
        let ended = r.join.with(|j| {
            j.detached = 1;
            at(Point::Detached);
            r.state.load(Ordering::Acquire) == state::ENDED
        });
        if ended {
            at(Point::DetachedEnded);
            drop_result(id.slot);
            release(id.slot);
        }
    });
}

/// Whether the thread has ended.
pub fn is_finished(id: ThreadId) -> bool {
    sched::in_thread(|_| record(id.slot).join.with(|j| j.how != 0)).unwrap_or(false)
}

const _: fn() = || {
    // Locks and atomics in shared memory must be plain words.
    fn plain<T: Sync>() {}
    plain::<Lock<JoinCell>>();
    plain::<(AtomicU32, AtomicU64)>();
};
