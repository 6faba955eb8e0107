//! What the test programs of this crate share: memory, handlers, and a region that counts its traps.

#![allow(dead_code, unused_macros)] // Each program uses a part of it.

use peregrine_base::sync::{AtomicU64, AtomicUsize, Ordering};
use peregrine_sys::fault::{self, Action};
use peregrine_sys::{io, mem};
use peregrine_vm::Errno;
use peregrine_vm::region::Builder;
use peregrine_vm::trap::{Fault, SignalHandler};
use peregrine_vm::{
    Access, BuildError, Capabilities, Decision, Inline, Mapping, Mechanism, PageCount, PageRange, Protection,
    Region, Trap, ViewDirty,
};
use std::ffi::c_void;
use std::sync::Arc;

/// Skips the test unless there are all of these capabilities; it names the missing one.
macro_rules! need {
    ($caps:expr, $($what:ident),*) => {
        $(if let Err(lack) = $caps.require(Capability::$what) { skip!("{lack}") })*
    };
}

pub fn open_page(fault: &Fault) -> Decision {
    // SAFETY: a page of a mapping that the test owns.
    match unsafe { mem::protect(fault.page(), Protection::ReadWrite) } {
        Ok(()) => Decision::Filled,
        Err(_) => Decision::Deny,
    }
}

/// How often the handler of [`replace_pages_on`] ran.
pub static REPLACED: AtomicUsize = AtomicUsize::new(0);

/// The handler that was there before ours: lays a fresh page over the one that was touched, so that the access can end.
pub fn replace_pages_on(signals: &[i32]) {
    unsafe extern "C" fn replace(_: i32, info: *mut c_void, context: *mut c_void) {
        // SAFETY: a fault handler's own arguments.
        let frame = unsafe { fault::Frame::new(info, context) };
        REPLACED.fetch_add(1, Ordering::SeqCst);
        let at = mem::Placement::Replace(frame.address().page_floor());
        let (one, options) = (PageCount::new(1), mem::MapOptions::default());
        // SAFETY: the page is the test's.
        let _ = unsafe { mem::map(one, Protection::ReadWrite, mem::Source::Anonymous, at, options) };
    }
    for &signal in signals {
        // SAFETY: `replace` makes system calls only.
        unsafe { fault::action(signal, Some(&Action::run(replace, fault::SA_ONSTACK))).unwrap() };
    }
}

pub fn inline(
    f: impl Fn(&Trap<'_>) -> Decision + Send + Sync + 'static,
) -> Inline<impl Fn(&Trap<'_>) -> Decision> {
    // SAFETY: the closures below use atomics and the trap's operations only.
    unsafe { Inline::new(f) }
}

pub fn page(memory: &Mapping, n: usize) -> PageRange {
    memory.pages(n, 1).unwrap()
}

/// A handler of a closure.
pub struct On<F>(pub F);

// SAFETY: each closure below keeps the promise: atomics and system calls.
unsafe impl<F: Fn(&Fault) -> Decision + Send + Sync + 'static> SignalHandler for On<F> {
    fn on_fault(&self, fault: &Fault) -> Decision {
        (self.0)(fault)
    }
}

pub fn memfd(pages: usize) -> Arc<Mapping> {
    Arc::new(Mapping::memfd(PageCount::new(pages)).unwrap())
}

pub fn anonymous(pages: usize) -> Arc<Mapping> {
    Arc::new(Mapping::anonymous(PageCount::new(pages)).unwrap())
}

pub fn indices(memory: &Mapping, set: &ViewDirty) -> Vec<usize> {
    set.indices(memory.range()).collect()
}

/// `pwrite` of eight bytes from the memory to a file.
pub fn write_from(memory: &Mapping, offset: usize) -> Result<usize, Errno> {
    let sink = Mapping::memfd(PageCount::new(1)).unwrap();
    let from = memory.bytes().address(offset).unwrap();
    // SAFETY: the sink is nobody else's.
    unsafe { io::write_at_ptr(sink.object_fd().unwrap(), from.as_ptr(), 8, 0) }
}

/// `pread` of eight bytes into the memory.
pub fn read_into(memory: &Mapping, offset: usize) -> Result<usize, Errno> {
    let source = Mapping::memfd(PageCount::new(1)).unwrap();
    source.bytes().store_u64(0, 0x0101_0101_0101_0101).unwrap();
    let to = memory.bytes().address(offset).unwrap();
    // SAFETY: bytes of the mapping, which is reached by copies only.
    unsafe { io::read_at_ptr(source.object_fd().unwrap(), to.as_ptr(), 8, 0) }
}

/// What a handler saw, written without a lock.
#[derive(Default)]
pub struct Seen {
    pub traps: AtomicUsize,
    pub last: AtomicU64,
    pub writes: AtomicUsize,
}

impl Seen {
    pub fn note(&self, trap: &Trap<'_>) {
        self.traps.fetch_add(1, Ordering::SeqCst);
        self.last.store(trap.address().as_usize() as u64, Ordering::SeqCst);
        self.writes.fetch_add(usize::from(trap.access() == Access::Write), Ordering::SeqCst);
    }
    pub fn traps(&self) -> usize {
        self.traps.load(Ordering::SeqCst)
    }
}

/// A region whose handler notes the trap and then does what `answer` says.
pub fn noting(
    memory: &Arc<Mapping>,
    mechanism: Mechanism,
    caps: &Capabilities,
    shape: impl FnOnce(Builder) -> Builder,
    answer: fn(&Trap<'_>) -> Decision,
) -> Result<(Region, Arc<Seen>), BuildError> {
    let seen = Arc::new(Seen::default());
    let noted = seen.clone();
    let handler = move |trap: &Trap<'_>| {
        noted.note(trap);
        answer(trap)
    };
    let builder = shape(Region::builder(memory.clone())).force(mechanism);
    let builder = match mechanism.is_inline() {
        // SAFETY: atomics and the trap's own operations only.
        true => builder.inline(unsafe { Inline::new(handler) }),
        false => builder.pager(handler),
    };
    builder.build(caps).map(|region| (region, seen))
}

pub fn unprotect(trap: &Trap<'_>) -> Decision {
    trap.unprotect()
}
