//! Every order of calls, replies, sleeps, recalls and leavings on one line: nobody sleeps for ever, and what was written before
//! is read after.
//!
//! A futex is a word and a lock under which sleepers look at it, as in the kernel. A lost wake-up ends a model run with every thread
//! asleep, which loom reports. Each fence of the protocol is also left out once, by a copy of the step without it: then loom must
//! find the sleeper.

mod futex;

use call_loom::gate::{AWAKE, Bell, Gate, NOTIFY, PARKED, Tell};
use call_loom::look::Patience;
use call_loom::rest::Rest;
use futex::Futex;
use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// Bytes in a pipe, or messages in a socket.
struct Bytes {
    count: Mutex<u32>,
    more: Condvar,
}

impl Bytes {
    fn new() -> Self {
        Self { count: Mutex::new(0), more: Condvar::new() }
    }

    fn write(&self) {
        *self.count.lock().unwrap() += 1;
        self.more.notify_all();
    }

    fn read(&self) {
        let mut count = self.count.lock().unwrap();
        while *count == 0 {
            count = self.more.wait(count).unwrap();
        }
        *count = 0;
    }
}

struct Line {
    call: AtomicU32,
    wait: AtomicU32,
    reply: AtomicU32,
    mode: AtomicU32,
    on_call: Futex,
    on_reply: Futex,
    pipe: Bytes,
    socket: Bytes,
    /// A word of each half.
    argument: AtomicU32,
    result: AtomicU32,
}

impl Line {
    fn new(mode: u32) -> Arc<Self> {
        Arc::new(Self {
            call: AtomicU32::new(0),
            wait: AtomicU32::new(AWAKE),
            reply: AtomicU32::new(0),
            mode: AtomicU32::new(mode),
            on_call: Futex::new(),
            on_reply: Futex::new(),
            pipe: Bytes::new(),
            socket: Bytes::new(),
            argument: AtomicU32::new(0),
            result: AtomicU32::new(0),
        })
    }

    fn gate(&self) -> Gate<'_> {
        Gate { call: &self.call, wait: &self.wait, reply: &self.reply, mode: &self.mode }
    }

    fn ring(&self, bell: Bell) {
        match bell {
            Bell::Nothing => {}
            Bell::Wake => self.on_call.wake(),
            Bell::Ring => self.socket.write(),
        }
    }

    fn tell(&self, tell: Tell) {
        match tell {
            Tell::Nothing => {}
            Tell::Wake => self.on_reply.wake(),
            Tell::Pipe => self.pipe.write(),
        }
    }

    /// The caller's sleep.
    fn sleep_for_reply(&self, call: u32) {
        self.gate().doze(PARKED);
        while !self.gate().is_answered(call) {
            self.on_reply.wait(&self.reply, call - 1);
        }
    }

    fn check_result(&self, call: u32) {
        assert_eq!(self.result.load(Ordering::Relaxed), call * 2, "the domain's half of this call");
    }

    fn serve(&self, call: u32) {
        assert_eq!(self.argument.load(Ordering::Relaxed), call, "the caller's half of this call");
        self.result.store(call * 2, Ordering::Relaxed);
        self.gate().answer(call);
    }

    /// The activation's sleep.
    fn sleep_for_call(&self, served: u32) {
        self.gate().park();
        if self.gate().called() == served {
            self.on_call.wait(&self.call, served);
        }
        self.gate().attend();
    }
}

/// Steps that a model may replace.
#[derive(Clone, Copy)]
struct Steps {
    bell: fn(Gate<'_>) -> Bell,
    tell: fn(Gate<'_>) -> Tell,
    park: fn(Gate<'_>),
    doze: fn(Gate<'_>),
}

const RIGHT: Steps = Steps {
    bell: |gate| gate.bell(),
    tell: |gate| gate.whom_to_tell(),
    park: |gate| gate.park(),
    doze: |gate| gate.doze(PARKED),
};

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(check);
}

/// Two calls from one caller to an activation that sleeps between them.
fn two_calls(steps: Steps) {
    model(move || {
        let line = Line::new(AWAKE);
        let other = line.clone();
        let activation = thread::spawn(move || {
            let line = other;
            let mut served = 0;
            while served < 2 {
                let call = line.gate().called();
                if call != served {
                    line.serve(call);
                    served = call;
                    line.tell((steps.tell)(line.gate()));
                    continue;
                }
                (steps.park)(line.gate());
                if line.gate().called() == served {
                    line.on_call.wait(&line.call, served);
                }
                line.gate().attend();
            }
        });
        for call in 1..=2 {
            line.argument.store(call, Ordering::Relaxed);
            line.gate().publish(call, AWAKE);
            line.ring((steps.bell)(line.gate()));
            if !line.gate().is_answered(call) {
                (steps.doze)(line.gate());
                while !line.gate().is_answered(call) {
                    line.on_reply.wait(&line.reply, call - 1);
                }
            }
            line.check_result(call);
        }
        activation.join().unwrap();
    });
}

#[test]
fn caller_and_activation_never_sleep_at_once() {
    two_calls(RIGHT);
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn without_the_callers_fence_an_activation_oversleeps() {
    two_calls(Steps { bell: |gate| gate.guess(), ..RIGHT });
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn without_the_activations_fence_it_oversleeps() {
    two_calls(Steps { park: |gate| gate.mode.store(PARKED, Ordering::Relaxed), ..RIGHT });
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn without_the_fence_before_telling_a_caller_oversleeps() {
    let tell = |gate: Gate<'_>| match gate.wait.load(Ordering::Relaxed) {
        PARKED => Tell::Wake,
        _ => Tell::Nothing,
    };
    two_calls(Steps { tell, ..RIGHT });
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn without_the_fence_before_dozing_a_caller_oversleeps() {
    two_calls(Steps { doze: |gate| gate.wait.store(PARKED, Ordering::Relaxed), ..RIGHT });
}

/// Both sides put their fences off: the caller guesses, looks once, asks properly; the activation looks for the next call once, then tells.
#[test]
fn fences_that_are_put_off_still_come_before_a_sleep() {
    model(|| {
        let line = Line::new(AWAKE);
        let other = line.clone();
        let activation = thread::spawn(move || {
            let line = other;
            let mut served = 0;
            while served < 2 {
                let call = line.gate().called();
                if call != served {
                    line.serve(call);
                    served = call;
                    if line.gate().called() == served {
                        line.tell(line.gate().whom_to_tell());
                    }
                } else {
                    line.sleep_for_call(served);
                }
            }
        });
        for call in 1..=2 {
            line.argument.store(call, Ordering::Relaxed);
            line.gate().publish(call, AWAKE);
            line.ring(line.gate().guess());
            if !line.gate().is_answered(call) {
                line.ring(line.gate().bell());
                line.sleep_for_reply(call);
            }
            line.check_result(call);
        }
        activation.join().unwrap();
    });
}

/// Looks until `is_there`, or the model's clock, which goes on with each look, says that it was long enough; whether it is there. Whether others
/// run between two looks is the model's to try: a `yield_now` of its own would have the other side always come in time.
fn look(patience: &mut Patience, is_there: impl Fn() -> bool) -> bool {
    let now_ns = std::cell::Cell::new(0);
    let clock = || now_ns.replace(now_ns.get() + 10);
    patience.look(15, clock, || (), is_there, || false)
}

/// Both sides share a core: each looks for a moment, by giving way, and then sleeps, by the steps given.
fn two_calls_with_looks(park: fn(Gate<'_>), doze: fn(Gate<'_>)) {
    model(move || {
        let line = Line::new(AWAKE);
        let other = line.clone();
        let activation = thread::spawn(move || {
            let line = other;
            let mut served = 0;
            while served < 2 {
                let call = line.gate().called();
                if call != served {
                    line.serve(call);
                    served = call;
                    line.tell(line.gate().whom_to_tell());
                    continue;
                }
                if look(&mut Patience::default(), || line.gate().called() != served) {
                    continue;
                }
                park(line.gate());
                if line.gate().called() == served {
                    line.on_call.wait(&line.call, served);
                }
                line.gate().attend();
            }
        });
        for call in 1..=2 {
            line.argument.store(call, Ordering::Relaxed);
            line.gate().publish(call, AWAKE);
            line.ring(line.gate().bell());
            if !look(&mut Patience::default(), || line.gate().is_answered(call)) {
                doze(line.gate());
                while !line.gate().is_answered(call) {
                    line.on_reply.wait(&line.reply, call - 1);
                }
            }
            line.check_result(call);
        }
        activation.join().unwrap();
    });
}

#[test]
fn who_has_looked_in_vain_is_woken_all_the_same() {
    two_calls_with_looks(|gate| gate.park(), |gate| gate.doze(PARKED));
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn an_activation_that_sleeps_as_if_it_looked_oversleeps() {
    two_calls_with_looks(|_| {}, |gate| gate.doze(PARKED));
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn a_caller_that_sleeps_as_if_it_looked_oversleeps() {
    two_calls_with_looks(|gate| gate.park(), |_| {});
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn an_activation_that_has_looked_needs_its_fence() {
    two_calls_with_looks(|gate| gate.mode.store(PARKED, Ordering::Relaxed), |gate| gate.doze(PARKED));
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn a_caller_that_has_looked_needs_its_fence() {
    two_calls_with_looks(|gate| gate.park(), |gate| gate.wait.store(PARKED, Ordering::Relaxed));
}

/// A caller that slept on the futex goes over to the pipe, and sleeps there.
#[test]
fn a_caller_that_changes_how_it_waits_is_told_all_the_same() {
    model(|| {
        let line = Line::new(AWAKE);
        let other = line.clone();
        let activation = thread::spawn(move || {
            while other.gate().called() == 0 {
                other.sleep_for_call(0);
            }
            other.serve(1);
            other.tell(other.gate().whom_to_tell());
        });
        line.argument.store(1, Ordering::Relaxed);
        line.gate().publish(1, AWAKE);
        line.ring(line.gate().bell());
        // The first slice is over at once.
        line.gate().doze(PARKED);
        line.gate().doze(NOTIFY);
        while !line.gate().is_answered(1) {
            line.pipe.read();
        }
        line.check_result(1);
        activation.join().unwrap();
    });
}

/// An activation leaves after its first call; a second one comes meanwhile. Whoever sees it has it served.
fn leaving(leave: fn(Gate<'_>)) {
    model(move || {
        let line = Line::new(AWAKE);
        let other = line.clone();
        let activation = thread::spawn(move || {
            while other.gate().called() == 0 {
                other.sleep_for_call(0);
            }
            other.serve(1);
            other.tell(other.gate().whom_to_tell());
            leave(other.gate());
            if other.gate().called() != 1 {
                // Straight back into the queue.
                other.socket.write();
            }
            // The keeper: hears the ring, or sees the queue, and gives the line to an activation. A ring may also come late, for the call before:
            // the rare one in vain that an honest client causes.
            while other.gate().called() != 2 {
                other.socket.read();
            }
            other.gate().attend();
            other.serve(2);
            other.tell(other.gate().whom_to_tell());
        });
        for call in 1..=2 {
            line.argument.store(call, Ordering::Relaxed);
            line.gate().publish(call, AWAKE);
            line.ring(line.gate().bell());
            if !line.gate().is_answered(call) {
                line.sleep_for_reply(call);
            }
            line.check_result(call);
        }
        activation.join().unwrap();
    });
}

#[test]
fn a_call_that_comes_while_its_activation_leaves_is_served() {
    leaving(|gate| gate.leave());
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn without_the_fence_before_leaving_a_call_is_forgotten() {
    leaving(|gate| gate.mode.store(call_loom::gate::UNBOUND, Ordering::Relaxed));
}

/// The pool wants the activation while it goes to sleep on a line without calls.
fn recalling(park: fn(Gate<'_>)) {
    model(move || {
        let line = Line::new(AWAKE);
        let rest = Arc::new(Rest::default());
        let wanted = Arc::new(AtomicUsize::new(0));
        let left = Arc::new(AtomicBool::new(false));
        rest.get_up();
        let pool = {
            let (line, rest, wanted, left) = (line.clone(), rest.clone(), wanted.clone(), left.clone());
            thread::spawn(move || {
                wanted.fetch_add(1, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if rest.is_parked() {
                    rest.recall();
                    line.on_call.wake();
                    // The keeper's repetition, which finds a sleeper whose sleep began after the first.
                    while !left.load(Ordering::Acquire) {
                        line.on_call.wake();
                        thread::yield_now();
                    }
                }
            })
        };
        rest.lie_down();
        park(line.gate());
        if wanted.load(Ordering::Relaxed) == 0 && !rest.is_recalled() && line.gate().called() == 0 {
            line.on_call.wait(&line.call, 0);
        }
        rest.get_up();
        line.gate().attend();
        rest.obey();
        left.store(true, Ordering::Release);
        pool.join().unwrap();
    });
}

#[test]
fn an_activation_that_is_wanted_does_not_sleep_on() {
    recalling(|gate| gate.park());
}

#[test]
#[ignore = "a planted fault: run by `every_fence_is_needed`"]
fn without_a_fence_a_wanted_activation_sleeps_on() {
    recalling(|gate| gate.mode.store(PARKED, Ordering::Relaxed));
}

/// Each planted fault in a process of its own, for a model that ends with everybody asleep may end its process.
#[test]
fn every_fence_is_needed() {
    for fault in [
        "without_the_callers_fence_an_activation_oversleeps",
        "without_the_activations_fence_it_oversleeps",
        "without_the_fence_before_telling_a_caller_oversleeps",
        "without_the_fence_before_dozing_a_caller_oversleeps",
        "without_the_fence_before_leaving_a_call_is_forgotten",
        "without_a_fence_a_wanted_activation_sleeps_on",
        "an_activation_that_sleeps_as_if_it_looked_oversleeps",
        "a_caller_that_sleeps_as_if_it_looked_oversleeps",
        "an_activation_that_has_looked_needs_its_fence",
        "a_caller_that_has_looked_needs_its_fence",
    ] {
        let this = std::env::current_exe().unwrap();
        let run = std::process::Command::new(this)
            .args([fault, "--exact", "--ignored", "--nocapture"])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success() && said.contains("deadlock; threads"), "not found: {fault}\n{said}");
    }
}
