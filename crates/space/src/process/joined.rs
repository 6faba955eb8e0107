//! The spaces that this process is a member of, found by signal handlers.

use super::ground::GroundJoinError;
use super::seat::Seat;
use super::shootdown::SIGNAL;
use peregrine_base::sync::{AtomicPtr, Ordering};
use peregrine_sys::signal::{self, HandlerFlags, SigInfo, Signo, UContext};

/// Spaces that one process can be a member of.
const SPACES: usize = 8;

static JOINED: [AtomicPtr<Seat>; SPACES] = [const { AtomicPtr::new(core::ptr::null_mut()) }; SPACES];

/// Obeys what is asked, in every space. Trap code (S3).
extern "C" fn on_signal(_: Signo, _: *mut SigInfo, _: *mut UContext) {
    for place in &JOINED {
        // SAFETY: null, or a seat that `remove` takes out before it is dropped; handlers run on the one thread that does
        // both, so none is running while it is dropped.
        if let Some(seat) = unsafe { place.load(Ordering::Acquire).as_ref() } {
            seat.serve_signal();
        }
    }
}

pub(crate) fn add(seat: &Seat) -> Result<(), GroundJoinError> {
    let flags = HandlerFlags::ON_ALTSTACK;
    // SAFETY: the handler is sound at every instruction: it touches atomics and makes system calls (S3); it does not nest.
    unsafe { signal::install_masked(SIGNAL, on_signal, flags, signal::bit(SIGNAL)) }
        .map_err(GroundJoinError::Signal)?;
    let mine = core::ptr::from_ref(seat).cast_mut();
    for place in &JOINED {
        if place.compare_exchange(core::ptr::null_mut(), mine, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            return Ok(());
        }
    }
    Err(GroundJoinError::TooManySpaces(SPACES))
}

pub(crate) fn remove(seat: &Seat) {
    let mine = core::ptr::from_ref(seat).cast_mut();
    for place in &JOINED {
        let _ = place.compare_exchange(mine, core::ptr::null_mut(), Ordering::AcqRel, Ordering::Relaxed);
    }
}
