//! The gate of a line: four words by which caller and activation pass a call to and fro, and never wait for each other in vain.
//!
//! **Two words count calls.** The caller fills its half of the line, then stores the next number in `call`; the domain fills its
//! half, then stores the same number in `reply`. Between the two the line is the domain's, otherwise the caller's. Both words are
//! futexes.
//!
//! **Two words say how to wake.** Who is about to sleep says so (`mode` for the activation, `wait` for the caller), then looks
//! again at the word it waits for; who has stored `call` or `reply` looks at the other's word. Each puts a full fence between
//! its store and its load, so at least one of the two sees the other:
//!
//! ```text
//! caller                       activation
//! call = n        publish      mode = PARKED     park, leave
//! fence           bell         fence
//! mode == PARKED? wake         call == n? go on : FUTEX_WAIT(call, old)
//!
//! wait = PARKED   doze         reply = n         answer
//! fence                        fence             whom_to_tell
//! reply == n? go on : sleep    wait == PARKED? wake
//! ```
//!
//! | `mode` | the activation | a caller with a call |
//! |---|---|---|
//! | `UNBOUND` | there is none on this line | rings over the connection's socket |
//! | `PARKED` | sleeps on `call` | wakes `call` |
//! | `AWAKE` | runs, spins or gives way | does nothing |
//!
//! **Looking comes before sleeping**, and is no state of its own. Who spins, or gives away the core that both run on (`look.rs`), is `AWAKE`: nobody
//! wakes it, for it looks at the word itself before it sleeps, and on its way to sleep does what the table says.
//!
//! **Between two cores that both spin** a fence costs what a cache line's journey costs, twice a call. There the looks that need
//! it are put off: the caller guesses first ([`Gate::guess`]) and asks properly before it sleeps, or after a moment without a reply; the
//! activation looks for the next call first, for who calls again has seen the reply, and tells the caller after that.
//!
//! Every order of these steps is tried by a model checker: `tests/loom_gate.rs`, with the fences and without each of them.
//! What the checker can't see is the kernel's part: a sleep that begins only if the word is unchanged, by one lock for sleepers and wakers.

use peregrine_base::sync::{AtomicU32, Ordering, fence};

/// `mode`: no activation is bound to the line.
pub const UNBOUND: u32 = 0;
/// `mode`: the activation sleeps on `call`. `wait`: the caller sleeps on `reply`.
pub const PARKED: u32 = 1;
/// `mode`, `wait`: running, spinning or giving way, and will look by itself.
pub const AWAKE: u32 = 2;
/// `wait`: the caller wants a byte in the line's pipe.
pub const NOTIFY: u32 = 3;

/// The four words.
#[derive(Clone, Copy, Debug)]
pub struct Gate<'a> {
    /// The caller's: number of the last call.
    pub call: &'a AtomicU32,
    /// The caller's: how it waits.
    pub wait: &'a AtomicU32,
    /// The domain's: number of the last call that was answered.
    pub reply: &'a AtomicU32,
    /// The domain's: how its activation waits.
    pub mode: &'a AtomicU32,
}

/// What a caller does for the activation to notice its call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bell {
    /// It will look by itself.
    Nothing,
    /// Wake the futex `call`.
    Wake,
    /// Ring over the socket: the line has no activation.
    Ring,
}

/// What the domain does for the caller to notice its reply.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tell {
    /// It will look by itself.
    Nothing,
    /// Wake the futex `reply`.
    Wake,
    /// Write a byte into the line's pipe.
    Pipe,
}

/// The caller's side.
impl Gate<'_> {
    /// Hands the line over with call number `call`; `wait` says how the reply is awaited for now.
    #[inline]
    pub fn publish(self, call: u32, wait: u32) {
        // Relaxed: published by the store that follows.
        self.wait.store(wait, Ordering::Relaxed);
        // Release: the Acquire load in `called` sees the caller's half.
        self.call.store(call, Ordering::Release);
    }

    /// What to do for the activation, after [`publish`](Self::publish).
    #[inline]
    pub fn bell(self) -> Bell {
        // Pairs with the fences in `park` and `leave`.
        fence(Ordering::SeqCst);
        self.guess()
    }

    /// As [`bell`](Self::bell) without its fence: an activation that is just going to sleep may look awake. Who believes that asks again
    /// before sleeping.
    #[inline]
    pub fn guess(self) -> Bell {
        match self.mode.load(Ordering::Relaxed) {
            PARKED => Bell::Wake,
            AWAKE => Bell::Nothing,
            _ => Bell::Ring,
        }
    }

    /// Whether call number `call` is answered.
    #[inline]
    pub fn is_answered(self, call: u32) -> bool {
        // Acquire pairs with the Release in `answer`: the domain's half is read after this.
        self.reply.load(Ordering::Acquire) == call
    }

    /// Says that from now on the reply is awaited by `how`. The caller then looks once more before it sleeps.
    #[inline]
    pub fn doze(self, how: u32) {
        self.wait.store(how, Ordering::Relaxed);
        // Pairs with the fence in `whom_to_tell`.
        fence(Ordering::SeqCst);
    }
}

/// The domain's side.
impl Gate<'_> {
    /// The number of the last call.
    #[inline]
    pub fn called(self) -> u32 {
        // Acquire pairs with the Release in `publish`: the caller's half is read after this.
        self.call.load(Ordering::Acquire)
    }

    /// Says that the activation is awake, and on this line.
    #[inline]
    pub fn attend(self) {
        // Relaxed: a caller that still sees it parked wakes it in vain.
        self.mode.store(AWAKE, Ordering::Relaxed);
    }

    /// Says that the activation sleeps. It then looks once more at [`called`](Self::called).
    #[inline]
    pub fn park(self) {
        self.mode.store(PARKED, Ordering::Relaxed);
        // Pairs with the fence in `bell`.
        fence(Ordering::SeqCst);
    }

    /// Says that the activation leaves the line. It then looks once more at [`called`](Self::called).
    #[inline]
    pub fn leave(self) {
        self.mode.store(UNBOUND, Ordering::Relaxed);
        // Pairs with the fence in `bell`.
        fence(Ordering::SeqCst);
    }

    /// Gives the line back: call number `call` is answered.
    #[inline]
    pub fn answer(self, call: u32) {
        // Release: the Acquire load in `is_answered` sees the domain's half.
        self.reply.store(call, Ordering::Release);
    }

    /// What to do for the caller, after [`answer`](Self::answer).
    #[inline]
    pub fn whom_to_tell(self) -> Tell {
        // Pairs with the fence in `doze`.
        fence(Ordering::SeqCst);
        match self.wait.load(Ordering::Relaxed) {
            PARKED => Tell::Wake,
            NOTIFY => Tell::Pipe,
            _ => Tell::Nothing,
        }
    }
}
