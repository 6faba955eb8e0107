//! The pool: which activation works for which line.
//!
//! ```text
//!            ring                       call done, nobody waits
//!  UNBOUND ───────▶ QUEUED ──▶ BOUND ◀──────────────┐
//!     ▲               ▲ free activation │            │ sleeps on the line
//!     └───────────────┴─────────────────┴────────────┘
//!       linger over, recalled, client gone (and, with a call pending, straight to QUEUED)
//! ```
//!
//! An activation that has served a call stays with its line for a while, so that the next call wakes it directly: no
//! dispatcher, no queue, no lock. Only a line without an activation goes through here, when its client rings over the socket.
//! When a line waits and no activation is free, one that sleeps on another line is *recalled*; when all are executing, each
//! looks at `wanted` after its call and comes here instead of staying.
//!
//! A client that works with as many activations as it may has its further lines set aside until one of them is let go; they
//! don't count as wanted, so they take nothing from other clients.
//!
//! **Lost wake-ups.** None: see `rest.rs` for an activation that is wanted while it goes to sleep, `gate.rs` for a call that comes while it
//! leaves. The keeper repeats a recall every millisecond until it is obeyed. A hostile client can move a sleeper to another futex, where no wake-up finds it (`FUTEX_CMP_REQUEUE`): an activation that does not obey for a while is
//! interrupted by a signal.

use super::ended::Ended;
use super::peer::{Line, Peer};
use super::rest::Rest;
use peregrine_base::sync::{AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// `Line::binding`: nobody has it.
pub(crate) const FREE_LINE: u32 = 0;
/// `Line::binding`: it waits for an activation.
pub(crate) const QUEUED: u32 = 1;
/// `Line::binding`: an activation has it.
pub(crate) const BOUND: u32 = 2;

/// Recalls in vain, one a millisecond, after which a sleeping activation is interrupted by a signal.
const PATIENCE: u32 = 20;

/// One activation: an OS thread with a stack of its own.
pub(crate) struct Activation {
    pub index: usize,
    /// Its thread id, once it runs.
    pub tid: AtomicI32,
    /// Whether it sleeps, and whether it was asked to leave its line.
    pub rest: Rest,
    /// How often the recall was repeated.
    pub repeats: AtomicU32,
    /// Processor time before it was bound to its line, for live accounts.
    pub bound_at_ns: AtomicU64,
    /// The line that it was given; taken out when it leaves.
    pub line: Mutex<Option<Arc<Line>>>,
    given: Condvar,
}

impl Activation {
    pub fn new(index: usize) -> Self {
        Self {
            index,
            tid: AtomicI32::new(0),
            rest: Rest::default(),
            repeats: AtomicU32::new(0),
            bound_at_ns: AtomicU64::new(0),
            line: Mutex::new(None),
            given: Condvar::new(),
        }
    }

    pub fn lock_line(&self) -> MutexGuard<'_, Option<Arc<Line>>> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct State {
    all: Vec<Arc<Activation>>,
    /// Most recently used last: its stack and caches are warm.
    free: Vec<Arc<Activation>>,
    queue: VecDeque<Arc<Line>>,
    /// By client: activations at work, and lines set aside for its limit.
    peers: HashMap<u64, PeerShare>,
}

#[derive(Default)]
struct PeerShare {
    active: usize,
    aside: VecDeque<Arc<Line>>,
}

/// Activations: all, in the pool, asleep on a line, executing a call.
pub(crate) struct Counts {
    pub activations: usize,
    pub idle: usize,
    pub parked: usize,
    pub running: usize,
}

/// See the top of the file.
pub(crate) struct Pool {
    state: Mutex<State>,
    /// Lines in the queue.
    pub wanted: AtomicUsize,
    /// Calls being executed, if the domain wants to be told of the last activation.
    pub running: AtomicUsize,
    pub total: AtomicUsize,
    closing: Ended,
    /// Activations that the domain asked for and the keeper has yet to start.
    pub asked: AtomicUsize,
    per_peer: usize,
}

impl Pool {
    pub fn new(per_peer: usize) -> Self {
        Self {
            state: Mutex::default(),
            wanted: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            total: AtomicUsize::new(0),
            closing: Ended::default(),
            asked: AtomicUsize::new(0),
            per_peer: per_peer.max(1),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a new activation in; `None` when the domain is closing.
    pub fn enlist(&self) -> Option<Arc<Activation>> {
        let mut state = self.lock();
        if self.is_closing() {
            return None;
        }
        let activation = Arc::new(Activation::new(state.all.len()));
        state.all.push(activation.clone());
        self.total.store(state.all.len(), Ordering::Relaxed);
        Some(activation)
    }

    /// See [`super::Activations::add`].
    pub fn ask_for(&self, count: usize) {
        self.asked.fetch_add(count, Ordering::Relaxed);
    }

    /// How many were asked for, and have not been started.
    pub fn asked_for(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    /// `count` of those asked for were started, or can't be.
    pub fn have_started(&self, count: usize) {
        self.asked.fetch_sub(count, Ordering::Relaxed);
    }

    /// The client rang for `line`. False: there was nothing to do, which an honest client rarely causes.
    pub fn ring(&self, line: &Arc<Line>) -> bool {
        let mut state = self.lock();
        // Relaxed: `binding` changes under this lock only.
        if line.binding.load(Ordering::Relaxed) != FREE_LINE || line.pending().is_none() {
            return false;
        }
        self.want(&mut state, line.clone());
        true
    }

    /// Gives `line` to a free activation, or queues it.
    fn want(&self, state: &mut State, line: Arc<Line>) {
        line.binding.store(QUEUED, Ordering::Relaxed);
        let share = state.peers.entry(line.peer.token).or_default();
        if share.active >= self.per_peer {
            let token = line.peer.token;
            line.peer.aside.fetch_add(1, Ordering::Relaxed);
            share.aside.push_back(line);
            fence(Ordering::SeqCst);
            self.recall(state, |bound| bound.peer.token == token);
            return;
        }
        share.active += 1;
        if let Some(activation) = state.free.pop() {
            give(&activation, line);
            return;
        }
        state.queue.push_back(line);
        self.wanted.fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence of an activation on its way to sleep: see `rest.rs`.
        fence(Ordering::SeqCst);
        self.recall(state, |_| true);
    }

    /// Asks one activation that sleeps on a line with `of` to leave it.
    fn recall(&self, state: &State, of: impl Fn(&Line) -> bool) {
        for activation in &state.all {
            if !activation.rest.is_parked() || activation.rest.is_recalled() {
                continue;
            }
            // Never waits: the activation holds this lock for moments only, and never while it takes ours.
            let bound = activation.lock_line();
            if let Some(line) = bound.as_ref().filter(|line| of(line)) {
                activation.rest.recall();
                let _ = peregrine_sys::futex::wake(line.words().gate().call, u32::MAX);
                return;
            }
        }
    }

    /// Wakes again who was recalled and still sleeps; whether there is anybody.
    pub fn repeat_recalls(&self) -> bool {
        let state = self.lock();
        let mut any = false;
        for activation in &state.all {
            if activation.rest.is_recalled() {
                any = true;
                if let Some(line) = activation.lock_line().as_ref() {
                    let _ = peregrine_sys::futex::wake(line.words().gate().call, u32::MAX);
                }
                let repeats = activation.repeats.fetch_add(1, Ordering::Relaxed);
                if repeats >= PATIENCE && activation.rest.is_parked() {
                    let _ = peregrine_sys::signal::interrupt_thread(activation.tid.load(Ordering::Relaxed));
                }
            }
        }
        any
    }

    /// Waits in the pool until there is a line to serve; `None` when the domain is closing.
    pub fn next(&self, me: &Arc<Activation>) -> Option<Arc<Line>> {
        let mut state = self.lock();
        if let Some(line) = self.pop(&mut state) {
            *me.lock_line() = Some(line.clone());
            return Some(line);
        }
        if self.is_closing() {
            return None;
        }
        state.free.push(me.clone());
        drop(state);
        let mut given = me.lock_line();
        loop {
            if let Some(line) = &*given {
                return Some(line.clone());
            }
            if self.is_closing() {
                return None;
            }
            // The timeout only bounds how late a closing is seen that fell between the two lines above.
            given = me
                .given
                .wait_timeout(given, Duration::from_secs(1))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn pop(&self, state: &mut State) -> Option<Arc<Line>> {
        while let Some(line) = state.queue.pop_front() {
            self.wanted.fetch_sub(1, Ordering::Relaxed);
            if line.peer.is_gone() {
                self.let_go(state, &line);
                continue;
            }
            line.binding.store(BOUND, Ordering::Relaxed);
            return Some(line);
        }
        None
    }

    /// Whether somebody else waits for the activation that works on `line`.
    #[inline]
    pub fn is_wanted_from(&self, line: &Line) -> bool {
        // Relaxed: who goes to sleep fences before it asks (`activation::sleep`), who wants fences after it said so.
        self.wanted.load(Ordering::Relaxed) > 0 || line.peer.aside.load(Ordering::Relaxed) > 0
    }

    /// The activation leaves `line`; a call that came meanwhile is queued.
    pub fn leave(&self, me: &Activation, line: &Arc<Line>) {
        let mut state = self.lock();
        *me.lock_line() = None;
        me.rest.obey();
        me.repeats.store(0, Ordering::Relaxed);
        line.words().gate().leave();
        self.let_go(&mut state, line);
        if line.pending().is_some() && !line.peer.is_gone() && !self.is_closing() {
            self.want(&mut state, line.clone());
        }
    }

    fn let_go(&self, state: &mut State, line: &Arc<Line>) {
        line.binding.store(FREE_LINE, Ordering::Relaxed);
        let token = line.peer.token;
        let Some(share) = state.peers.get_mut(&token) else { return };
        share.active = share.active.saturating_sub(1);
        let next = share.aside.pop_front();
        if share.active == 0 && next.is_none() {
            state.peers.remove(&token);
        }
        if let Some(next) = next {
            next.peer.aside.fetch_sub(1, Ordering::Relaxed);
            self.want(state, next);
        }
    }

    /// Forgets a client that is gone: its queued lines, and activations that sleep on its lines.
    pub fn forget(&self, peer: &Peer) {
        let mut state = self.lock();
        if let Some(share) = state.peers.get_mut(&peer.token) {
            share.aside.clear();
        }
        for activation in &state.all {
            let bound = activation.lock_line();
            if let Some(line) = bound.as_ref().filter(|line| line.peer.token == peer.token) {
                activation.rest.recall();
                let _ = peregrine_sys::futex::wake(line.words().gate().call, u32::MAX);
            }
        }
        let queued = std::mem::take(&mut state.queue);
        for line in queued {
            if line.peer.token == peer.token {
                self.wanted.fetch_sub(1, Ordering::Relaxed);
                self.let_go(&mut state, &line);
            } else {
                state.queue.push_back(line);
            }
        }
    }

    #[inline]
    pub fn is_closing(&self) -> bool {
        // Not under the lock: `next` asks while it holds its own.
        self.closing.has()
    }

    /// Lets every activation end after the call it executes, and forgets the lines that wait for one.
    pub fn close(&self) {
        let mut state = self.lock();
        self.closing.end();
        state.queue.clear();
        self.wanted.store(0, Ordering::Relaxed);
        for share in state.peers.values_mut() {
            share.aside.clear();
        }
        for activation in &state.all {
            activation.rest.recall();
            let bound = activation.lock_line();
            if let Some(line) = bound.as_ref() {
                let _ = peregrine_sys::futex::wake(line.words().gate().call, u32::MAX);
            }
            activation.given.notify_all();
        }
    }

    /// What the activations do.
    pub fn count(&self) -> Counts {
        let state = self.lock();
        let count = |what: fn(&Rest) -> bool| state.all.iter().filter(|a| what(&a.rest)).count();
        Counts {
            activations: state.all.len(),
            idle: state.free.len(),
            parked: count(Rest::is_parked),
            running: count(Rest::is_executing),
        }
    }

    /// Processor time of activations that are this client's right now.
    pub fn live_cpu_ns(&self, peer: &Peer) -> u64 {
        let state = self.lock();
        let mine = state.all.iter().filter(|activation| {
            activation.lock_line().as_ref().is_some_and(|line| line.peer.token == peer.token)
        });
        mine.map(|activation| {
            let now = peregrine_sys::timer::cpu_ns_of_thread(activation.tid.load(Ordering::Relaxed));
            now.unwrap_or(0).saturating_sub(activation.bound_at_ns.load(Ordering::Relaxed))
        })
        .sum()
    }
}

fn give(activation: &Activation, line: Arc<Line>) {
    line.binding.store(BOUND, Ordering::Relaxed);
    *activation.lock_line() = Some(line);
    activation.given.notify_one();
}
