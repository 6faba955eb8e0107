//! The event loop: what runs after the script's last statement.
//!
//! The engine's own executor runs all due timers before any promise, forgets rejected promises, and waits for a timer
//! by asking for the time without pause. This one does what browsers and node do:
//!
//! ```text
//!        ┌──▶ microtasks, until there are none ──▶ an unhandled rejection? ──▶ Failure::Rejected
//!        │      (promise reactions)
//!        │    engine futures: poll each once; progress? ────────────────┐
//!        │    one task (FIFO), else one due timer (by time, then age) ──┤
//!        │    none due, but some waiting: sleep until the first ────────┤
//!        ╰──────────────────────────────────────────────────────────────╯
//!             nothing left: done
//! ```
//!
//! A future that stays pending when nothing else is left can't be woken any more, for this thread is the only one
//! that the script has; so it doesn't keep the loop alive. Neither do the engine's clean-up futures for
//! `FinalizationRegistry`, which wait as long as there is a registry.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as PollContext, Poll, Waker};
use std::time::Duration;

use boa_engine::builtins::promise::{OperationType, Promise, PromiseState};
use boa_engine::context::HostHooks;
use boa_engine::context::time::{JsDuration, JsInstant};
use boa_engine::job::{GenericJob, IntervalJob, Job, JobExecutor, NativeAsyncJob, PromiseJob, TimeoutJob};
use boa_engine::object::builtins::JsPromise;
use boa_engine::{Context, JsError, JsObject, JsResult, JsValue};

/// Why a run ended before its end.
pub(crate) enum Failure {
    /// An exception that nobody caught.
    Thrown(JsError),
    /// A promise was rejected with this, and nobody handles it.
    Rejected(JsValue),
}

enum Timer {
    Once(TimeoutJob),
    Every(IntervalJob),
}

impl Timer {
    fn cancelled(&self) -> bool {
        match self {
            Timer::Once(job) => job.cancelled(),
            Timer::Every(job) => job.cancelled(),
        }
    }
}

type EngineFuture<'a> = Pin<Box<dyn Future<Output = JsResult<JsValue>> + 'a>>;

/// The queues of one script.
pub(crate) struct EventLoop {
    sleep: fn(Duration),
    microtasks: RefCell<VecDeque<PromiseJob>>,
    tasks: RefCell<VecDeque<GenericJob>>,
    /// By due time, then in the order in which they were set.
    timers: RefCell<BTreeMap<(JsInstant, u64), Timer>>,
    /// The number of timers ever set.
    timers_set: Cell<u64>,
    /// Not yet started: a future borrows the engine, so it is made in [`EventLoop::run`].
    futures: RefCell<Vec<NativeAsyncJob>>,
    cleanups: RefCell<Vec<NativeAsyncJob>>,
    /// Promises that were rejected while nobody handled them.
    rejected: RefCell<Vec<JsObject<Promise>>>,
}

impl EventLoop {
    pub(crate) fn new(sleep: fn(Duration)) -> Self {
        Self {
            sleep,
            microtasks: RefCell::default(),
            tasks: RefCell::default(),
            timers: RefCell::default(),
            timers_set: Cell::new(0),
            futures: RefCell::default(),
            cleanups: RefCell::default(),
            rejected: RefCell::default(),
        }
    }

    /// Runs until nothing is left to do, or something fails.
    pub(crate) fn run(&self, context: &mut Context) -> Result<(), Failure> {
        let context = &RefCell::new(context);
        let (mut futures, mut cleanups) = (Vec::new(), Vec::new());
        loop {
            self.run_microtasks(*context.borrow_mut())?;
            self.check_rejections()?;
            context.borrow_mut().clear_kept_objects();

            // Polling may start further futures, so the queues are emptied into the lists first.
            futures.extend(
                self.futures
                    .take()
                    .into_iter()
                    .map(|job| -> EngineFuture<'_> { Box::pin(job.call(context)) }),
            );
            cleanups.extend(
                self.cleanups
                    .take()
                    .into_iter()
                    .map(|job| -> EngineFuture<'_> { Box::pin(job.call(context)) }),
            );
            if poll_all(&mut futures)? || poll_all(&mut cleanups)? || self.has_microtasks() {
                continue;
            }
            if self.run_task(*context.borrow_mut())? {
                continue;
            }
            if !self.run_or_await_timer(*context.borrow_mut())? {
                return Ok(());
            }
        }
    }

    fn has_microtasks(&self) -> bool {
        !self.microtasks.borrow().is_empty()
    }

    fn run_microtasks(&self, context: &mut Context) -> Result<(), Failure> {
        // No borrow is held during a call: a job enqueues others.
        while let Some(job) = { self.microtasks.borrow_mut().pop_front() } {
            job.call(context).map_err(Failure::Thrown)?;
        }
        Ok(())
    }

    fn check_rejections(&self) -> Result<(), Failure> {
        for promise in self.rejected.take() {
            if let Ok(promise) = JsPromise::from_object(promise.upcast())
                && let PromiseState::Rejected(reason) = promise.state()
            {
                return Err(Failure::Rejected(reason));
            }
        }
        Ok(())
    }

    /// Runs one task; false if there is none.
    fn run_task(&self, context: &mut Context) -> Result<bool, Failure> {
        let Some(job) = ({ self.tasks.borrow_mut().pop_front() }) else {
            return Ok(false);
        };
        job.call(context).map_err(Failure::Thrown)?;
        Ok(true)
    }

    /// Runs the first timer if it is due, or else sleeps until it is; false if there is none.
    fn run_or_await_timer(&self, context: &mut Context) -> Result<bool, Failure> {
        let timer = {
            let mut timers = self.timers.borrow_mut();
            timers.retain(|_, timer| !timer.cancelled());
            let Some(first) = timers.first_entry() else {
                return Ok(false);
            };
            let now = context.clock().now();
            let due = first.key().0;
            if due > now {
                drop(timers);
                (self.sleep)((due - now).into());
                return Ok(true);
            }
            first.remove()
        };
        match timer {
            Timer::Once(job) => job.call(context).map(drop),
            Timer::Every(job) => {
                let result = job.call(context).map(drop);
                self.set_timer(job.interval(), Timer::Every(job), context);
                result
            }
        }
        .map_err(Failure::Thrown)?;
        Ok(true)
    }

    /// A delay below a millisecond counts as one, as in node: so timers of 0 and 1 keep their order.
    fn set_timer(&self, delay: JsDuration, timer: Timer, context: &Context) {
        let due = context.clock().now() + delay.max(JsDuration::from_millis(1));
        let number = self.timers_set.get();
        self.timers_set.set(number + 1);
        self.timers.borrow_mut().insert((due, number), timer);
    }
}

/// Polls each future once and drops those that are done; whether there was one.
fn poll_all(futures: &mut Vec<EngineFuture<'_>>) -> Result<bool, Failure> {
    let before = futures.len();
    let mut result = Ok(());
    futures.retain_mut(|future| match future.as_mut().poll(&mut PollContext::from_waker(Waker::noop())) {
        Poll::Pending => true,
        Poll::Ready(done) => {
            if let (Err(error), true) = (done, result.is_ok()) {
                result = Err(Failure::Thrown(error));
            }
            false
        }
    });
    result.map(|()| futures.len() < before)
}

impl JobExecutor for EventLoop {
    fn enqueue_job(self: Rc<Self>, job: Job, context: &mut Context) {
        match job {
            Job::PromiseJob(job) => self.microtasks.borrow_mut().push_back(job),
            Job::GenericJob(job) => self.tasks.borrow_mut().push_back(job),
            Job::AsyncJob(job) => self.futures.borrow_mut().push(job),
            Job::FinalizationRegistryCleanupJob(job) => self.cleanups.borrow_mut().push(job),
            Job::TimeoutJob(job) => self.set_timer(job.timeout(), Timer::Once(job), context),
            Job::IntervalJob(job) => self.set_timer(job.interval(), Timer::Every(job), context),
            other => unreachable!("the engine has a new kind of job: {other:?}"),
        }
    }

    fn run_jobs(self: Rc<Self>, context: &mut Context) -> JsResult<()> {
        self.run(context).map_err(|failure| match failure {
            Failure::Thrown(error) => error,
            Failure::Rejected(reason) => JsError::from_opaque(reason),
        })
    }
}

impl HostHooks for EventLoop {
    fn promise_rejection_tracker(
        &self,
        promise: &JsObject<Promise>,
        operation: OperationType,
        _context: &mut Context,
    ) {
        let mut rejected = self.rejected.borrow_mut();
        match operation {
            OperationType::Reject => rejected.push(promise.clone()),
            OperationType::Handle => rejected.retain(|other| !JsObject::equals(other, promise)),
        }
    }
}
