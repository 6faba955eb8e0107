//! Atomics that note which cache line each access touches, and for whom.
//!
//! Scalability is proved by counting: if operations of different members write no line that another one touches, no machine
//! can make them wait for each other (the commutativity test of sv6). So the members' operations are run one after the
//! other on one thread, each under [`as_core`], and the recording is then searched for lines that one core wrote and another touched.
//!
//! A compare-and-swap counts as a write even when it fails: the processor takes the line for itself all the same.
//!
//! **Interruptions.** [`before_each`] has something done before every access: what others may do while a member stands still there, between
//! any two of its steps. With one thread that is every interleaving in which one member is interrupted once (or, if
//! what is done is interrupted in turn, nested ones); a model checker sees reorderings, too, but no histories of that length.
//!
//! What is not atomic is not seen. Structures that are to be counted keep their shared words in atomics only, and a memory
//! trace of the real code is compared with a recording of the same run (`bench space`), so that a plain store can't escape.

extern crate std;

use core::sync::atomic as real;
use real::Ordering;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::vec::Vec;

/// Bytes in a cache line.
pub const LINE_BYTES: usize = 64;

/// One access to an atomic.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Access {
    /// Who: the argument of [`as_core`].
    pub core: u32,
    /// Where: an address.
    pub addr: usize,
    /// Whether it took the line for writing.
    pub write: bool,
}

impl Access {
    /// The cache line's number.
    pub const fn line(&self) -> usize {
        self.addr / LINE_BYTES
    }
}

std::thread_local! {
    static CORE: Cell<Option<u32>> = const { Cell::new(None) };
    static LOG: RefCell<Vec<Access>> = const { RefCell::new(Vec::new()) };
    static BEFORE: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
}

/// Runs `f`, and `hook` before each access that this thread makes to one of these atomics meanwhile, those of the hook itself included:
/// it says for itself when it has had enough.
pub fn before_each<R>(hook: impl Fn() + 'static, f: impl FnOnce() -> R) -> R {
    let before = BEFORE.replace(Some(Rc::new(hook)));
    let result = f();
    BEFORE.replace(before);
    result
}

/// An access to one of these atomics.
fn touch<T: ?Sized>(place: *const T, write: bool) {
    let hook = BEFORE.with_borrow(Clone::clone);
    if let Some(hook) = hook {
        hook();
    }
    note(place, write);
}

/// Runs `f` with this thread's accesses noted as those of `core`.
pub fn as_core<R>(core: u32, f: impl FnOnce() -> R) -> R {
    let before = CORE.replace(Some(core));
    let result = f();
    CORE.set(before);
    result
}

/// As [`as_core`], if anything is noted at present.
pub fn on_behalf_of<R>(core: u32, f: impl FnOnce() -> R) -> R {
    if CORE.get().is_some() { as_core(core, f) } else { f() }
}

/// Runs `f` with nothing noted.
pub fn unrecorded<R>(f: impl FnOnce() -> R) -> R {
    let before = CORE.take();
    let result = f();
    CORE.set(before);
    result
}

/// What this thread noted since the last call.
pub fn take() -> Vec<Access> {
    LOG.take()
}

/// Notes an access that is none of these atomics': for baselines whose plain memory is to be counted too.
pub fn note<T: ?Sized>(place: *const T, write: bool) {
    if let Some(core) = CORE.get() {
        LOG.with_borrow_mut(|log| log.push(Access { core, addr: place.cast::<u8>() as usize, write }));
    }
}

/// A line that one core wrote and another touched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SharedLine {
    /// Address of its first byte.
    pub addr: usize,
    /// Cores that wrote it, in order.
    pub writers: Vec<u32>,
    /// Cores that read or wrote it.
    pub cores: Vec<u32>,
}

/// The lines that were written by one core and read or written by another: what makes cores wait for each other.
pub fn shared_lines(log: &[Access]) -> Vec<SharedLine> {
    let mut lines = std::collections::BTreeMap::<usize, (Vec<u32>, Vec<u32>)>::new();
    for access in log {
        let (writers, cores) = lines.entry(access.line()).or_default();
        if access.write {
            writers.push(access.core);
        }
        cores.push(access.core);
    }
    let shared = lines.into_iter().map(|(line, (mut writers, mut cores))| {
        for set in [&mut writers, &mut cores] {
            set.sort_unstable();
            set.dedup();
        }
        SharedLine { addr: line * LINE_BYTES, writers, cores }
    });
    shared.filter(|l| !l.writers.is_empty() && l.cores.len() > 1).collect()
}

macro_rules! recorded {
    ($name:ident, $value:ty, [$($op:ident),*]) => {
        #[doc = concat!("`core`'s `", stringify!($name), "`, recorded.")]
        #[derive(Default, Debug)]
        #[repr(transparent)]
        pub struct $name(real::$name);

        #[allow(missing_docs, reason = "as core's")]
        impl $name {
            pub const fn new(value: $value) -> Self {
                Self(real::$name::new(value))
            }
            pub fn load(&self, order: Ordering) -> $value {
                touch(self, false);
                self.0.load(order)
            }
            pub fn store(&self, value: $value, order: Ordering) {
                touch(self, true);
                self.0.store(value, order);
            }
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                touch(self, true);
                self.0.swap(value, order)
            }
            /// # Errors
            /// The value found, if it is not `current`.
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                touch(self, true);
                self.0.compare_exchange(current, new, success, failure)
            }
            /// # Errors
            /// The value found, if it is not `current`, or by chance.
            pub fn compare_exchange_weak(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                touch(self, true);
                self.0.compare_exchange_weak(current, new, success, failure)
            }
            $(pub fn $op(&self, value: $value, order: Ordering) -> $value {
                touch(self, true);
                self.0.$op(value, order)
            })*
        }
    };
}

recorded!(AtomicBool, bool, [fetch_and, fetch_or, fetch_xor]);
recorded!(AtomicU8, u8, [fetch_add, fetch_sub, fetch_and, fetch_or, fetch_xor, fetch_max, fetch_min]);
recorded!(AtomicU16, u16, [fetch_add, fetch_sub, fetch_and, fetch_or, fetch_xor, fetch_max, fetch_min]);
recorded!(AtomicU32, u32, [fetch_add, fetch_sub, fetch_and, fetch_or, fetch_xor, fetch_max, fetch_min]);
recorded!(AtomicU64, u64, [fetch_add, fetch_sub, fetch_and, fetch_or, fetch_xor, fetch_max, fetch_min]);
recorded!(AtomicUsize, usize, [fetch_add, fetch_sub, fetch_and, fetch_or, fetch_xor, fetch_max, fetch_min]);
recorded!(AtomicI32, i32, [fetch_add, fetch_sub, fetch_and, fetch_or, fetch_xor, fetch_max, fetch_min]);
recorded!(AtomicI64, i64, [fetch_add, fetch_sub, fetch_and, fetch_or, fetch_xor, fetch_max, fetch_min]);

/// `core`'s `AtomicPtr`, recorded.
#[derive(Debug)]
#[repr(transparent)]
pub struct AtomicPtr<T>(real::AtomicPtr<T>);

#[allow(missing_docs, reason = "as core's")]
impl<T> AtomicPtr<T> {
    pub const fn new(value: *mut T) -> Self {
        Self(real::AtomicPtr::new(value))
    }
    pub fn load(&self, order: Ordering) -> *mut T {
        touch(self, false);
        self.0.load(order)
    }
    pub fn store(&self, value: *mut T, order: Ordering) {
        touch(self, true);
        self.0.store(value, order);
    }
    pub fn swap(&self, value: *mut T, order: Ordering) -> *mut T {
        touch(self, true);
        self.0.swap(value, order)
    }
    /// # Errors
    /// The value found, if it is not `current`.
    pub fn compare_exchange(
        &self,
        current: *mut T,
        new: *mut T,
        success: Ordering,
        failure: Ordering,
    ) -> Result<*mut T, *mut T> {
        touch(self, true);
        self.0.compare_exchange(current, new, success, failure)
    }
}
