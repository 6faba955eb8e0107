//! The signal handlers for SIGSEGV and SIGBUS. **Trap code: allocates nothing, locks nothing, panics never (S3).**
//!
//! ```text
//!   fault ─▶ on_signal ─▶ registrations of the address, innermost first ─▶ Filled / Retry: return, the access repeats
//!                               │ Deny (or none)
//!                               ▼
//!                  the handler installed before ours (Rust's overflow handler, a JIT's) ─▶ it decides
//!                               │ it was the default, or "ignore" (which the kernel does not do for a fault)
//!                               ▼
//!                  the default is restored and the access repeats: the process dies of the signal it earned
//! ```
//!
//! The handlers run on the thread's alternate stack if it has one (Rust gives every thread that it starts one of 8 KiB or
//! more; `AltStack` gives a larger one) and with the signal unblocked, so that a handler may fault in another
//! region. A handler that touches the very page it is called for would recurse for ever; it is found by a mark that each
//! running handler leaves on its stack, and denied.

use super::registry::Inside;
use super::{Access, Cause, Decision, Fault};
use core::ffi::c_void;
use peregrine_base::VirtAddr;
use peregrine_base::sync::{AtomicU64, AtomicUsize, Ordering};
use peregrine_sys::fault::{self as signal, Action, Frame, MaskChange, SIGBUS, SIGSEGV};
use peregrine_sys::raw::Errno;
use std::sync::{Mutex, PoisonError};

/// The action that was there before ours, word by word: written once, before our handler can run.
struct Previous {
    handler: AtomicUsize,
    flags: AtomicU64,
    mask: AtomicU64,
}

impl Previous {
    const fn none() -> Self {
        Self { handler: AtomicUsize::new(0), flags: AtomicU64::new(0), mask: AtomicU64::new(0) }
    }

    fn set(&self, action: &Action) {
        self.flags.store(action.flags, Ordering::Relaxed);
        self.mask.store(action.mask, Ordering::Relaxed);
        // Release pairs with the Acquire in `chain`.
        self.handler.store(action.handler, Ordering::Release);
    }
}

static BEFORE_SEGV: Previous = Previous::none();
static BEFORE_BUS: Previous = Previous::none();

const FLAGS: u64 = signal::SA_ONSTACK | signal::SA_NODEFER | signal::SA_RESTART;

/// Installs our handlers where they are not, keeping what was there to chain to. Not trap code.
///
/// They stay for the life of the process: taking them out could not be told from undoing somebody's later installation.
pub(super) fn install() -> Result<(), Errno> {
    static INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    if *installed {
        return Ok(());
    }
    for (number, previous) in [(SIGSEGV, &BEFORE_SEGV), (SIGBUS, &BEFORE_BUS)] {
        // SAFETY: asks only.
        previous.set(&unsafe { signal::action(number, None)? });
        // SAFETY: `on_signal` is sound whenever either signal comes: it touches the registry by its protocol, and what is
        // not ours goes where it would have gone.
        unsafe { signal::action(number, Some(&Action::run(on_signal, FLAGS)))? };
    }
    *installed = true;
    Ok(())
}

unsafe extern "C" fn on_signal(number: i32, info: *mut c_void, context: *mut c_void) {
    // SAFETY: these are the arguments that the kernel gave this handler, which is installed for fault signals only.
    let frame = unsafe { Frame::new(info, context) };
    // Sent by somebody (kill, sigqueue): there is no address. `DENIED_BY_PAGER` is our own pager's answer and goes on to
    // the chain like a fault that nobody wanted.
    if frame.code() > 0 {
        let address = frame.address();
        let mark = Mark::new(address);
        if let Some(inside) = Inside::enter(&raw const mark as usize) {
            let entries = inside.find(address);
            if !entries.is_empty() && !mark.is_recursion(&frame) {
                let fault = Fault {
                    address,
                    access: if frame.is_write() { Access::Write } else { Access::Read },
                    cause: if number == SIGSEGV { Cause::Segv } else { Cause::Bus },
                    instruction: frame.instruction(),
                };
                for entry in entries {
                    if entry.handler.on_fault(&fault) != Decision::Deny {
                        return;
                    }
                }
            }
            if inside.may_be_late(address) {
                return;
            }
        }
    }
    // SAFETY: the arguments are this handler's own.
    unsafe { chain(number, info, context) };
}

/// Passes the signal to whoever had it before us.
///
/// # Safety
/// The arguments are those of the running handler.
unsafe fn chain(number: i32, info: *mut c_void, context: *mut c_void) {
    let previous = if number == SIGSEGV { &BEFORE_SEGV } else { &BEFORE_BUS };
    // Acquire pairs with the Release in `Previous::set`.
    let handler = previous.handler.load(Ordering::Acquire);
    let flags = previous.flags.load(Ordering::Relaxed);
    if handler == Action::DEFAULT || handler == Action::IGNORE {
        // SAFETY: the default action is always sound to set; the access repeats and the process dies of this signal.
        let _ = unsafe { signal::action(number, Some(&Action::default_action())) };
        // SAFETY: these are the running handler's arguments.
        if unsafe { Frame::new(info, context) }.code() <= 0 {
            // It was sent, so no access will repeat: send it once more, now to the default.
            let tid = signal::current_thread_id();
            let _ = signal::queue_to_thread(tid, number, -1, VirtAddr::new(0));
        }
        return;
    }
    if flags & signal::SA_RESETHAND != 0 {
        previous.handler.store(Action::DEFAULT, Ordering::Release);
    }
    let mut block = previous.mask.load(Ordering::Relaxed);
    if flags & signal::SA_NODEFER == 0 {
        block |= signal::set_of(number);
    }
    let before = signal::mask(MaskChange::Block, block);
    // SAFETY: the address is the handler that was installed for this signal, of the kind its flags say; it is called with
    // the arguments and the mask that the kernel would have given it. (That it runs on our alternate stack rather than
    // its own choice is the one difference, and only if it had not asked for SA_ONSTACK.)
    unsafe {
        if flags & signal::SA_SIGINFO != 0 {
            let f: signal::Handler = core::mem::transmute(handler);
            f(number, info, context);
        } else {
            let f: unsafe extern "C" fn(i32) = core::mem::transmute(handler);
            f(number);
        }
    }
    signal::mask(MaskChange::Set, before);
}

/// What a running handler leaves on its stack, so that a fault inside it can be told from any other.
#[repr(C)]
struct Mark {
    magic: [usize; 2],
    page: usize,
}

const MAGIC: [usize; 2] = [0x5045_5245_4752_494e, 0x4520_5452_4150_2121];

impl Mark {
    #[inline(always)]
    fn new(address: VirtAddr) -> Self {
        let mark = Self { magic: [0; 2], page: address.page_floor().as_usize() };
        // Set by volatile writes: nothing else reads them on the way that the compiler can see.
        for (i, word) in MAGIC.iter().enumerate() {
            // SAFETY: a field of a live local.
            unsafe { (&raw const mark.magic[i]).cast_mut().write_volatile(*word) };
        }
        mark
    }

    /// Whether a handler for the same page is running further up this alternate stack. Cheap unless the fault came from
    /// code on the alternate stack, that is, from a handler.
    #[inline]
    fn is_recursion(&self, frame: &Frame) -> bool {
        let stack = frame.alt_stack();
        let interrupted = frame.stack_pointer();
        if !stack.contains(interrupted) {
            return false;
        }
        self.search(interrupted, &stack)
    }

    #[cold]
    fn search(&self, from: VirtAddr, stack: &signal::AltStack) -> bool {
        let Some(base) = stack.base() else { return false };
        let end = base.as_usize() + stack.len_bytes();
        let mut at = from.as_usize().next_multiple_of(8);
        while at + size_of::<Self>() <= end {
            let words = VirtAddr::new(at).as_ptr::<usize>();
            // SAFETY: `at` and the mark's words beyond it lie in this thread's alternate stack, above the interrupted stack
            // pointer: live frames of this very thread, read as plain words.
            let found = unsafe {
                [words.read_volatile(), words.add(1).read_volatile(), words.add(2).read_volatile()]
            };
            if found == [MAGIC[0], MAGIC[1], self.page] {
                return true;
            }
            at += 8;
        }
        false
    }
}

impl Drop for Mark {
    #[inline(always)]
    fn drop(&mut self) {
        // A dead mark must not be found by a later handler whose frame leaves these bytes unwritten.
        // SAFETY: a field of `self`.
        unsafe { (&raw mut self.magic[0]).write_volatile(0) };
    }
}
