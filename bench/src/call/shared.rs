//! Shared memory, and the ways to tell the other side that something is in it.
//!
//! ```text
//!   one page: request │ answer │ length │ stop          then the argument
//! ```
//!
//! *In place* the caller builds its argument in the shared memory and the callee reads it there: nothing is copied, nothing
//! is checked, so nobody who must not trust the other can do it; it is the floor. *Copied* is the least that a callee does
//! who doesn't trust its caller: one copy into the shared memory, one into the callee's own, both of the whole argument at each call.
//!
//! In either the callee reads one word of each page, and in place the caller writes one word of all before each call (`subject.rs`): so a large
//! argument that is in place costs the lines that are read, and one that is copied all of its lines, from one core to the other.

use super::subject::{Bytes, Caller, Server, digest, digest_at, server};
use peregrine_base::sync::{AtomicU64, AtomicUsize, Ordering, spin_loop};
use peregrine_sys::io::yield_now;
use peregrine_sys::rustix::event::{EventfdFlags, eventfd};
use peregrine_sys::rustix::io::{read, write};
use peregrine_sys::rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use std::os::fd::OwnedFd;
use std::sync::mpsc;

const HEAD: usize = 4096;

/// The head of the shared memory.
#[repr(C)]
pub struct Head {
    /// Number of the last request.
    request: AtomicU64,
    /// Number of the last request that was answered.
    done: AtomicU64,
    /// The answer.
    answer: AtomicU64,
    length: AtomicUsize,
}

/// Memory that both sides map.
#[derive(Clone, Copy)]
struct Shared {
    base: *mut u8,
    len: usize,
}

// SAFETY: a plain mapping, used by one side at a time as the head's words say.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(len: usize) -> Self {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        let all = HEAD + len.next_multiple_of(4096);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base =
            unsafe { mmap_anonymous(core::ptr::null_mut(), all, ProtFlags::READ | ProtFlags::WRITE, flags) }
                .expect("shared memory");
        Self { base: base.cast(), len }
    }

    fn head(&self) -> &Head {
        // SAFETY: mapped for the life of the process, zeroed; all fields are atomics (S1).
        unsafe { &*self.base.cast() }
    }

    fn bytes(&self) -> *mut u8 {
        // SAFETY: inside the mapping.
        unsafe { self.base.add(HEAD) }
    }

    /// The callee's part: `private` is where it copies the argument if it must not trust the caller.
    fn work(&self, private: &mut Option<Vec<u8>>) {
        let head = self.head();
        let len = head.length.load(Ordering::Relaxed).min(self.len);
        let answer = match private {
            // SAFETY: inside the mapping and aligned; S1: copied out through pointers, then private.
            Some(own) => unsafe {
                core::ptr::copy_nonoverlapping(self.bytes(), own.as_mut_ptr(), len);
                digest(&own[..len])
            },
            // SAFETY: as above.
            None => unsafe { digest_at(self.bytes(), len) },
        };
        head.answer.store(answer, Ordering::Relaxed);
    }
}

/// How the sides wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Asleep on an eventfd.
    Events,
    /// Looking at a word all the time.
    Spin,
    /// Looking at a word, and giving the core away after each look (`sched_yield`): two sides on one core take turns, and neither ever sleeps.
    Yield,
}

/// What a side needs for it.
enum Bell {
    Events { ring: OwnedFd, wait: OwnedFd },
    Spin,
    Yield,
}

/// The bells of the client and of the server.
fn bells(wait: Wait) -> (Bell, Bell) {
    match wait {
        Wait::Spin => return (Bell::Spin, Bell::Spin),
        Wait::Yield => return (Bell::Yield, Bell::Yield),
        Wait::Events => {}
    }
    let new = || eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
    let (to, from) = (new(), new());
    let dup = |fd: &OwnedFd| fd.try_clone().expect("dup");
    (Bell::Events { ring: dup(&to), wait: dup(&from) }, Bell::Events { ring: from, wait: to })
}

impl Bell {
    fn ring(&self) {
        if let Self::Events { ring, .. } = self {
            write(ring, &1u64.to_ne_bytes()).expect("eventfd");
        }
    }

    /// Waits until `word` is `value`; it is rung after that, and acquires what came before.
    fn wait_for(&self, word: &AtomicU64, value: u64) {
        match self {
            Self::Events { wait, .. } => {
                let mut count = [0; 8];
                read(wait, &mut count).expect("eventfd");
                assert_eq!(word.load(Ordering::Acquire), value);
            }
            Self::Spin => {
                while word.load(Ordering::Acquire) != value {
                    spin_loop();
                }
            }
            Self::Yield => {
                while word.load(Ordering::Acquire) != value {
                    yield_now();
                }
            }
        }
    }
}

struct SharedCaller {
    shared: Shared,
    bell: Bell,
    /// Where the argument is if it is copied.
    own: Option<Vec<u8>>,
    number: u64,
    _server: Server,
}

impl Caller for SharedCaller {
    fn argument(&mut self) -> Bytes<'_> {
        match &mut self.own {
            Some(own) => Bytes::Own(own),
            None => Bytes::Shared(self.shared.bytes(), self.shared.len),
        }
    }

    fn call(&mut self) -> u64 {
        let head = self.shared.head();
        if let Some(own) = &self.own {
            // SAFETY: as long as the shared part; the server is idle.
            unsafe { core::ptr::copy_nonoverlapping(own.as_ptr(), self.shared.bytes(), own.len()) };
        }
        head.length.store(self.shared.len, Ordering::Relaxed);
        self.number += 1;
        // Release: pairs with the server's acquire in `wait_for`, as its store of `done` does with ours.
        head.request.store(self.number, Ordering::Release);
        self.bell.ring();
        self.bell.wait_for(&head.done, self.number);
        head.answer.load(Ordering::Relaxed)
    }
}

/// What the server does with a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The thread that waited does the work, on the argument in place.
    InPlace,
    /// The same, on a copy of its own of what the client copied in.
    Copied,
    /// A new OS thread for each request, on a copy.
    FreshThread,
    /// A dispatcher hands it to a thread of a pool, which answers; on a copy.
    Pool,
}

/// A server that waits as `wait` says and works in `form`.
pub fn start(len: usize, cpu: usize, form: Form, wait: Wait) -> Box<dyn Caller> {
    let shared = Shared::new(len);
    let (ours, theirs) = bells(wait);
    let copied = form != Form::InPlace;
    let server = server(cpu, move || serve(shared, &theirs, form));
    Box::new(SharedCaller {
        shared,
        bell: ours,
        own: copied.then(|| vec![0; len]),
        number: 0,
        _server: server,
    })
}

fn serve(shared: Shared, bell: &Bell, form: Form) {
    let mut own = (form != Form::InPlace).then(|| vec![0; shared.len]);
    let finish = |number| {
        shared.head().done.store(number, Ordering::Release);
        bell.ring();
    };
    let next = |number| bell.wait_for(&shared.head().request, number);
    match form {
        Form::InPlace | Form::Copied => {
            for number in 1.. {
                next(number);
                shared.work(&mut own);
                finish(number);
            }
        }
        Form::FreshThread => {
            for number in 1.. {
                next(number);
                std::thread::scope(|s| {
                    s.spawn(|| {
                        shared.work(&mut own);
                        finish(number);
                    });
                });
            }
        }
        Form::Pool => std::thread::scope(|s| {
            let (to_worker, requests) = mpsc::sync_channel::<u64>(16);
            let finish = &finish;
            let shared = &shared;
            s.spawn(move || {
                for number in requests {
                    shared.work(&mut own);
                    finish(number);
                }
            });
            for number in 1.. {
                next(number);
                to_worker.send(number).expect("the worker lives");
            }
        }),
    }
}
