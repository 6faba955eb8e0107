//! An activation: an OS thread of the domain, pre-allocated, with a stack of the size that the domain chose.
//!
//! ```text
//! pool ──▶ bound to a line ──▶ serve ──▶ served; wanted elsewhere? ──yes──▶ leave ──▶ pool
//!                                ▲                  │ no
//!                                └── call ◀── look, sleep ───── recalled, client gone ──▶ leave
//! ```
//!
//! It sleeps by a shared futex, the line's `call` word: of the mechanisms measured the one that costs no more than an eventfd,
//! never makes the ringer wait whatever its peer does, and needs no descriptor (benchmark suite `call`). Without a timeout, which
//! would add a twentieth to a call: it stays with its line until it is recalled; only one that holds on to much memory, from large
//! arguments, leaves after a while.
//! Before it sleeps it looks for the next call, for the domain's `spin` limit at most, so that the caller that calls again within that time pays no
//! wake-up. After a call that was made from another core on purpose ([`Affinity::Apart`]) it spins; after one from its own core it gives
//! that core away (`look.rs`); after any other it sleeps at once.

use super::Inner;
use super::execute::{Executor, Waits};
use super::outcome::tell;
use super::peer::Line;
use super::pool::Activation;
use crate::attributes::Affinity;
use crate::chain::now_ns;
use crate::look::Patience;
use crate::step::reach;
use peregrine_base::sync::{Ordering, spin_loop};
use peregrine_sys::io::yield_now;
use peregrine_sys::{futex, process, timer};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long an activation with much memory stays with a line that has no calls.
const LINGER: Duration = Duration::from_millis(100);
/// Looks between two readings of the clock while spinning.
const LOOKS: u32 = 64;

/// The body of an activation's thread.
pub(crate) fn run(domain: &Arc<Inner>, me: &Arc<Activation>) {
    // Relaxed: read for accounts only, after the activation was bound under the pool's lock.
    me.tid.store(process::thread_id(), Ordering::Relaxed);
    let mut executor = Executor::new(domain);
    let mut patience = Patience::default();
    while let Some(line) = domain.pool.next(me) {
        me.bound_at_ns.store(timer::thread_cpu_ns(), Ordering::Relaxed);
        attend(domain, me, &mut executor, &mut patience, &line);
        executor.leave();
        let used = timer::thread_cpu_ns().saturating_sub(me.bound_at_ns.load(Ordering::Relaxed));
        line.peer.cpu_ns.fetch_add(used, Ordering::Relaxed);
        me.rest.go_home();
        domain.pool.leave(me, &line);
    }
}

/// Serves the line until there is a reason to leave it.
fn attend(
    domain: &Inner,
    me: &Activation,
    executor: &mut Executor<'_>,
    patience: &mut Patience,
    line: &Arc<Line>,
) {
    me.rest.get_up();
    executor.say_where(line);
    line.words().gate().attend();
    loop {
        while let Some(call) = line.pending() {
            if line.peer.is_gone() || domain.pool.is_closing() {
                return;
            }
            reach("domain: took a call");
            serve(domain, me, executor, line, call);
            if domain.pool.is_wanted_from(line) {
                return;
            }
        }
        if must_leave(domain, me, line) {
            return;
        }
        let came = match executor.waits() {
            Waits::Asleep => false,
            Waits::Sharing => share(domain, me, line, patience),
            Waits::Spinning => spin(line, domain.limits.spin),
        };
        if came {
            continue;
        }
        executor.rest();
        if !sleep(domain, me, line, executor.is_heavy()) {
            return;
        }
    }
}

#[inline(always)]
fn serve(domain: &Inner, me: &Activation, executor: &mut Executor<'_>, line: &Arc<Line>, call: u32) {
    me.rest.execute();
    let counted = domain.is_the_last_taken(|| executor.forget());
    let reply = executor.execute(line, call);
    // Before the caller learns that it is over: one that looks at the domain's counts afterwards finds itself in none.
    me.rest.get_up();
    drop(counted);
    reach("domain: executed, before the reply");
    executor.answer(line, call, reply);
    // Who calls again has seen the reply, so a caller that spins need not be asked whether it sleeps.
    if !(executor.waits() == Waits::Spinning && look(line)) {
        tell(line);
    }
}

fn must_leave(domain: &Inner, me: &Activation, line: &Line) -> bool {
    me.rest.is_recalled() || line.peer.is_gone() || domain.pool.is_closing()
}

/// Looks for a call some times; whether one came.
#[inline]
fn look(line: &Line) -> bool {
    (0..LOOKS).any(|_| {
        let came = line.pending().is_some();
        if !came {
            spin_loop();
        }
        came
    })
}

/// Looks for a call for a moment; whether one came.
fn spin(line: &Line, most: Duration) -> bool {
    let begun = Instant::now();
    loop {
        if look(line) {
            return true;
        }
        if begun.elapsed() >= most {
            return false;
        }
    }
}

/// Gives the core to the caller for a moment, until it calls; whether it did.
fn share(domain: &Inner, me: &Activation, line: &Line, patience: &mut Patience) -> bool {
    reach("domain: looks");
    let most_ns = domain.limits.spin.as_nanos() as u64;
    let is_there = || line.pending().is_some();
    let must_go = || must_leave(domain, me, line) || domain.pool.is_wanted_from(line);
    patience.look(most_ns, now_ns, yield_now, is_there, must_go)
}

/// Sleeps until there may be a call; false when the activation is to leave.
fn sleep(domain: &Inner, me: &Activation, line: &Line, is_heavy: bool) -> bool {
    let gate = line.words().gate();
    // The gate's fence is for three pairs: with the caller's in `bell`, with those of `Pool::want` and `Pool::recall`.
    me.rest.lie_down();
    gate.park();
    reach("domain: parked");
    let served = line.served.load(Ordering::Relaxed);
    let mut stay = true;
    if gate.called() == served {
        if domain.pool.is_wanted_from(line) || must_leave(domain, me, line) {
            stay = false;
        } else if is_heavy {
            let in_vain = futex::wait_timed(gate.call, served, LINGER.as_nanos() as u64);
            stay = !in_vain || line.pending().is_some();
        } else {
            futex::wait(gate.call, served, None);
        }
    }
    me.rest.get_up();
    gate.attend();
    stay && !must_leave(domain, me, line)
}

/// Puts the calling thread where its caller wants it. What the domain was not allowed to use at its start stays out of reach.
pub(crate) struct Place {
    allowed: process::CpuSet,
    at: Option<usize>,
    /// The binding succeeded.
    bound: bool,
    /// There is no core apart from the caller's.
    is_alone: bool,
}

impl Place {
    pub fn new(allowed: process::CpuSet) -> Self {
        Self { allowed, at: None, bound: false, is_alone: false }
    }

    /// The core that the thread is bound to, plus one; 0 for none.
    #[inline]
    pub fn core(&self) -> u32 {
        self.at.filter(|_| self.bound).map_or(0, |at| at as u32 + 1)
    }

    /// Follows a caller that runs on `cpu`; whether that changed anything. A system call when the caller's core has changed since the last
    /// call, else nothing.
    pub fn follow(&mut self, affinity: Affinity, cpu: usize) -> bool {
        let target = match affinity {
            Affinity::Anywhere => return self.set_free(),
            Affinity::Together => cpu,
            Affinity::Apart if self.at.is_some_and(|at| at != cpu) => return false,
            Affinity::Apart => {
                if self.at.is_some() && self.is_alone {
                    return false;
                }
                let other = self.allowed.iter().find(|&c| c > cpu);
                let other = other.or_else(|| self.allowed.iter().find(|&c| c != cpu));
                self.is_alone = other.is_none();
                other.unwrap_or(cpu)
            }
        };
        if self.at == Some(target) || !self.allowed.contains(target) {
            return false;
        }
        // A core that went away since: stay where we are, and don't ask again.
        self.bound = process::CpuSet::one(target).and_then(|set| set.bind()).is_ok();
        self.at = Some(target);
        true
    }

    /// Undoes what earlier calls asked for; whether there was anything.
    fn set_free(&mut self) -> bool {
        if self.at.take().is_none() {
            return false;
        }
        // If that fails it stays where it is, which is somewhere.
        self.bound &= self.allowed.bind().is_err();
        true
    }
}
