//! An activation: an OS thread of the domain, pre-allocated, with a stack of the size that the domain chose.
//!
//! ```text
//! pool ──▶ bound to a line ──▶ serve ──▶ served; wanted elsewhere? ──yes──▶ leave ──▶ pool
//!                                ▲                  │ no
//!                                └── call ◀── spin or sleep ── recalled, client gone ──▶ leave
//! ```
//!
//! It sleeps by a shared futex, the line's `call` word: of the mechanisms measured the one that costs no more than an eventfd,
//! never makes the ringer wait whatever its peer does, and needs no descriptor (benchmark suite `call`). Without a timeout, which
//! would add a twentieth to a call: it stays with its line until it is recalled; only one that holds on to much memory, from large
//! arguments, leaves after a while.
//! It spins, for the domain's `spin` limit at most, only after a call that was made from another core on purpose
//! ([`Affinity::Apart`]): then the caller that calls again within that time pays no wake-up.

use super::Inner;
use super::execute::{Executor, answer, tell};
use super::peer::Line;
use super::pool::Activation;
use crate::attributes::Affinity;
use crate::step::reach;
use peregrine_base::sync::{Ordering, spin_loop};
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
    while let Some(line) = domain.pool.next(me) {
        me.bound_at_ns.store(timer::thread_cpu_ns(), Ordering::Relaxed);
        attend(domain, me, &mut executor, &line);
        executor.shrink();
        let used = timer::thread_cpu_ns().saturating_sub(me.bound_at_ns.load(Ordering::Relaxed));
        line.peer.cpu_ns.fetch_add(used, Ordering::Relaxed);
        me.rest.go_home();
        domain.pool.leave(me, &line);
    }
}

/// Serves the line until there is a reason to leave it.
fn attend(domain: &Inner, me: &Activation, executor: &mut Executor<'_>, line: &Arc<Line>) {
    me.rest.get_up();
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
        if executor.caller_is_apart() && spin(line, domain.limits.spin) {
            continue;
        }
        if !sleep(domain, me, line, executor.is_heavy()) {
            return;
        }
    }
}

fn serve(domain: &Inner, me: &Activation, executor: &mut Executor<'_>, line: &Arc<Line>, call: u32) {
    me.rest.execute();
    let counted = domain.is_the_last_taken();
    executor.execute(line, call);
    // Before the caller learns that it is over: one that looks at the domain's counts afterwards finds itself in none.
    me.rest.get_up();
    drop(counted);
    reach("domain: executed, before the reply");
    answer(line, call);
    // Who calls again has seen the reply, so a caller that spins need not be asked whether it sleeps.
    if !(executor.caller_is_apart() && look(line)) {
        tell(line);
    }
}

fn must_leave(domain: &Inner, me: &Activation, line: &Line) -> bool {
    me.rest.is_recalled() || line.peer.is_gone() || domain.pool.is_closing()
}

/// Looks for a call some times; whether one came.
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
}

impl Place {
    pub fn new(allowed: process::CpuSet) -> Self {
        Self { allowed, at: None }
    }

    /// Follows a caller that runs on `cpu`. A system call when that has changed since the last call, else nothing.
    pub fn follow(&mut self, affinity: Affinity, cpu: usize) {
        let target = match affinity {
            Affinity::Anywhere => return,
            Affinity::Together => cpu,
            Affinity::Apart if self.at.is_some_and(|at| at != cpu) => return,
            Affinity::Apart => {
                let other = self.allowed.iter().find(|&c| c > cpu);
                match other.or_else(|| self.allowed.iter().find(|&c| c != cpu)) {
                    Some(other) => other,
                    None => return,
                }
            }
        };
        if self.at == Some(target) || !self.allowed.contains(target) {
            return;
        }
        // A core that went away since: stay where we are, and don't ask again.
        let _ = process::CpuSet::one(target).and_then(|set| set.bind());
        self.at = Some(target);
    }
}
