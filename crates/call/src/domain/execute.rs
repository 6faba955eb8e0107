//! Executing one call: take what the client wrote, check it, run the handler, write what came of it.
//!
//! The order is what makes it safe against a client that rewrites its half meanwhile: header, descriptors and bytes are each
//! copied once to private memory; every check and every use is of the copy. Whatever the bits, the worst outcome is an error
//! status in that client's own line.

use super::Inner;
use super::activation::Place;
use super::adopted::Adopted;
use super::arguments::{Home, drop_gifts};
use super::invocation::{Arguments, Invocation};
use super::known::Known;
use super::peer::{Line, notify};
use crate::attributes::Affinity;
use crate::error::Failure;
use crate::gate::{NOTIFY, Tell};
use crate::line::{
    self, Few, Header, Kind, PAYLOAD_AT, RawHeader, ReplyHead, SHORT_PAYLOAD_AT, Status, Words,
    align_argument, write_charge,
};
use crate::shared::{Shared, sealed_memfd};
use crate::socket::{self, FromDomain};
use crate::step::reach;
use crate::usage::Account;
use crate::wire::{Wire, WiredCall};
use peregrine_base::Protection;
use peregrine_base::sync::Ordering;
use peregrine_sys::futex;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Private room above this is given back when the activation leaves its client.
const KEEP_BYTES: usize = 64 * 1024;

/// What an activation keeps between calls.
pub(crate) struct Executor<'a> {
    domain: &'a Inner,
    arguments: Arguments,
    place: Place,
    waits: Waits,
    heavy: bool,
    known: Option<Known<'a>>,
}

/// How an activation waits for the next call of who made the last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Waits {
    /// Asleep.
    Asleep,
    /// For a moment by giving the core away, for the caller runs there too.
    Sharing,
    /// For a moment by spinning, for the caller runs on another core on purpose.
    Spinning,
}

/// What is said of a call with the word that ends it: by [`answer`], for a caller that spins looks at the same cache line, and takes it
/// away between two stores that are not close together.
pub(crate) enum Reply {
    /// Done, and there are no results.
    Done,
    /// Done, and the results are few enough to go with the word.
    Here(Few),
    /// Anything else, and how many of the head's lengths mean something.
    Head(ReplyHead, usize),
}

/// What went wrong in the handler.
enum Fault {
    Failed(Failure),
    Panicked(String),
}

/// How a call goes wrong before its handler: what the caller is told.
pub(crate) struct Wrong(pub ReplyHead);

impl From<Status> for Wrong {
    fn from(status: Status) -> Self {
        Self(ReplyHead::new(status, 0))
    }
}

impl From<Wrong> for Reply {
    fn from(Wrong(head): Wrong) -> Self {
        Self::Head(head, 2)
    }
}

/// `code` of [`Status::Malformed`], and [`Status::TooLarge`]: what it is about.
pub(crate) mod about {
    pub const COUNT: u32 = 1;
    pub const KIND: u32 = 2;
    pub const PAYLOAD: u32 = 3;
    pub const PART: u32 = 4;
    pub const RESULT: u32 = 5;
    pub const ARGUMENTS: u32 = 6;

    pub const fn name(code: u32) -> &'static str {
        match code {
            COUNT => "number of arguments",
            KIND => "kind of an argument",
            PAYLOAD => "payload",
            PART => "part of a buffer",
            RESULT => "result",
            ARGUMENTS => "arguments",
            _ => "call",
        }
    }
}

pub(crate) fn malformed(code: u32) -> Wrong {
    Wrong(ReplyHead::new(Status::Malformed, code))
}

pub(crate) fn too_large(code: u32, asked: u64, limit: u64) -> Wrong {
    let mut head = ReplyHead::new(Status::TooLarge, code);
    head.lengths[0] = u32::try_from(asked).unwrap_or(u32::MAX);
    head.lengths[1] = u32::try_from(limit).unwrap_or(u32::MAX);
    Wrong(head)
}

impl<'a> Executor<'a> {
    pub fn new(domain: &'a Inner) -> Self {
        Self {
            domain,
            arguments: Arguments::default(),
            place: Place::new(domain.cpus),
            waits: Waits::Asleep,
            heavy: false,
            known: None,
        }
    }

    /// How to wait for the next call.
    pub const fn waits(&self) -> Waits {
        self.waits
    }

    /// Tells the callers of `line` on which core they find its activation.
    pub fn say_where(&self, line: &Line) {
        line.words().core().store(self.place.core(), Ordering::Relaxed);
    }

    /// Whether it holds memory that should not be kept for a client that is idle.
    pub const fn is_heavy(&self) -> bool {
        self.heavy
    }

    /// Forgets whose calls it executed: before the activation leaves its line, or runs anything that is not a call's.
    pub fn forget(&mut self) {
        self.known = None;
    }

    /// Leaves a line: lets go of what large arguments needed.
    pub fn leave(&mut self) {
        self.forget();
        self.heavy = false;
        self.arguments.scratch.clear();
        self.arguments.scratch.shrink_to(KEEP_BYTES);
        for slot in &mut self.arguments.slots {
            slot.result.get_mut().clear();
            slot.result.get_mut().shrink_to(KEEP_BYTES);
        }
    }

    /// Executes `call` and writes the domain's half of the line, all but what [`answer`] does.
    #[inline]
    pub fn execute(&mut self, line: &Arc<Line>, call: u32) -> Reply {
        let words = line.words();
        let raw = RawHeader::read(words);
        let is_cancelled = words.cancel().load(Ordering::Relaxed) == call;
        match &self.known {
            Some(known) if known.is(&raw) && !is_cancelled => {
                self.waits = waits(&known.header, &self.place, words);
                match &known.plan {
                    Some(plan) if plan.is_empty() && known.is_quick => {
                        self.arguments.count = 0;
                        reach("domain: arguments copied");
                        let outcome = run(self.domain, &self.arguments, line, known);
                        count(line);
                        return match outcome {
                            None => Reply::Done,
                            Some(fault) => put_fault(line, *fault, 0).unwrap_or_else(Reply::from),
                        };
                    }
                    Some(plan) if known.is_quick && self.arguments.fill(line, plan).is_some() => {
                        reach("domain: arguments copied");
                        let outcome = run(self.domain, &self.arguments, line, known);
                        count(line);
                        return self.reply_quickly(line, call, outcome);
                    }
                    // What was lent is gone, and there may be another of its number.
                    Some(_) => {
                        self.arguments.let_go();
                        self.forget();
                    }
                    None => {}
                }
            }
            _ => {}
        }
        self.execute_any(line, call, raw, is_cancelled).unwrap_or_else(Reply::from)
    }

    /// Writes what came of a call of the short form.
    #[inline]
    fn reply_quickly(&mut self, line: &Line, call: u32, outcome: Option<Box<Fault>>) -> Reply {
        let Some(plan) = self.known.as_ref().and_then(|known| known.plan.as_ref()) else {
            return Reply::from(malformed(about::KIND));
        };
        let (results_at, lends) = (plan.results_at, plan.lends);
        let few = if outcome.is_none() { self.few_results() } else { None };
        let reply = few.map_or_else(
            || {
                let home = Home { spill: None, payload_at: SHORT_PAYLOAD_AT, results_at, is_short: false };
                self.put_results(line, call, &home, outcome, 0).unwrap_or_else(Reply::from)
            },
            Reply::Here,
        );
        if lends {
            self.arguments.let_go();
        }
        reply
    }

    /// Executes a call that is not known to have nothing to it but its arguments and its handler.
    fn execute_any(
        &mut self,
        line: &Arc<Line>,
        call: u32,
        raw: RawHeader,
        is_cancelled: bool,
    ) -> Result<Reply, Wrong> {
        let words = line.words();
        if !self.known.as_ref().is_some_and(|known| known.is(&raw)) {
            // Before the next is met: each makes its thread the running one, and gives back what was there.
            self.known = None;
            let header = Header::of(raw);
            if self.place.follow(header.affinity, usize::from(header.cpu)) {
                self.say_where(line);
            }
            self.waits = waits(&header, &self.place, words);
            self.heavy |= header.spill != 0;
            match Known::meet(self.domain, line, raw, header) {
                Ok(known) => self.known = Some(known),
                Err(wrong) => {
                    drop_gifts(line, &header);
                    return Err(wrong);
                }
            }
        }
        let known = self.known.as_ref().expect("met above");
        let header = known.header;
        let late = is_cancelled || header.deadline.is_some_and(|d| d.left().is_none());
        let copied = if late { Err(Status::Late.into()) } else { self.arguments.take(line, known) };
        let reply = match copied {
            Err(wrong) => {
                drop_gifts(line, &header);
                Err(wrong)
            }
            Ok(home) => {
                reach("domain: arguments copied");
                let account = header.charge.then(Account::open);
                let adopted =
                    header.priority.then(|| Adopted::urgent(header.nice, self.domain.most_urgent)).flatten();
                let outcome = run(self.domain, &self.arguments, line, known);
                drop(adopted);
                let rows = account.map_or(0, |account| charge(words, self.domain.id, account));
                count(line);
                self.put_results(line, call, &home, outcome, rows)
            }
        };
        self.arguments.let_go();
        reply
    }

    /// Writes status and results.
    #[inline]
    fn put_results(
        &mut self,
        line: &Line,
        call: u32,
        home: &Home,
        outcome: Option<Box<Fault>>,
        charge_rows: u32,
    ) -> Result<Reply, Wrong> {
        if let Some(fault) = outcome {
            return put_fault(line, *fault, charge_rows);
        }
        if home.is_short
            && charge_rows == 0
            && let Some(few) = self.few_results()
        {
            return Ok(Reply::Here(few));
        }
        let mut head = ReplyHead::new(Status::Done, 0);
        head.charge_rows = charge_rows;
        let count = self.arguments.count;
        let mut total = 0usize;
        for (index, slot) in self.arguments.slots[..count].iter_mut().enumerate() {
            let len = slot.result.get_mut().len();
            if len as u64 > slot.bound || len > u32::MAX as usize {
                return if matches!(slot.kind, Some(Kind::Out | Kind::InOut)) {
                    Err(too_large(about::RESULT, len as u64, slot.bound))
                } else {
                    Err(malformed(about::RESULT))
                };
            }
            head.lengths[index] = len as u32;
            total = align_argument(total) + len;
        }
        if total > 0 {
            let memory = home.memory(line);
            let writable = home.spill.as_ref().is_none_or(|spill| spill.results);
            let end = home.results_at.checked_add(total);
            if writable && end.is_some_and(|end| end <= memory.len_bytes()) {
                self.copy_results(memory, home.results_at).ok_or_else(|| malformed(about::RESULT))?;
            } else {
                self.send_results(line, call, total)?;
                head.status = Some(Status::DoneElsewhere);
            }
        }
        Ok(Reply::Head(head, count))
    }

    /// All results, if they are in order and few.
    #[inline]
    fn few_results(&mut self) -> Option<Few> {
        let mut few = Few::default();
        for (index, slot) in self.arguments.slots[..self.arguments.count].iter_mut().enumerate() {
            let result = slot.result.get_mut();
            if result.len() as u64 > slot.bound {
                return None;
            }
            few.push(index, result)?;
        }
        Some(few)
    }

    fn copy_results(&mut self, memory: &Shared, results_at: usize) -> Option<()> {
        let mut at = 0;
        for slot in &mut self.arguments.slots[..self.arguments.count] {
            let result = slot.result.get_mut();
            at = align_argument(at);
            memory.write(results_at + at, result)?;
            at += result.len();
        }
        Some(())
    }

    /// Results that nobody made room for go in a memfd of their own, for this client alone.
    fn send_results(&mut self, line: &Line, call: u32, total: usize) -> Result<(), Wrong> {
        let limit = self.domain.limits.argument_bytes;
        if total > limit {
            return Err(too_large(about::RESULT, total as u64, limit as u64));
        }
        let short = |_| too_large(about::RESULT, total as u64, 0);
        let fd = sealed_memfd(c"peregrine-results", total).map_err(short)?;
        let memory = Shared::map(&fd, total, Protection::ReadWrite).map_err(short)?;
        self.copy_results(&memory, 0).ok_or_else(|| malformed(about::RESULT))?;
        let message = FromDomain::Results { line: line.index, call, len_bytes: total as u64 };
        reach("domain: results in a memfd");
        if socket::send(&line.peer.socket, &message, Some(fd.as_fd())).is_err() {
            // A client that lets unread results pile up.
            return Err(too_large(about::RESULT, total as u64, 0));
        }
        Ok(())
    }
}

/// Runs the handler. What goes wrong is rare, and in a box: it must not be in the way of what goes right.
#[inline(always)]
fn run(domain: &Inner, arguments: &Arguments, line: &Line, known: &Known<'_>) -> Option<Box<Fault>> {
    let mut invocation = Invocation { arguments, line, link: &known.link };
    let mut serve = || {
        // The invocation is not used after a panic but to be dropped; its cells are refilled before the next call.
        match catch_unwind(AssertUnwindSafe(|| known.handler.serve(&mut invocation))) {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(Box::new(Fault::Failed(failure))),
            Err(panic) => Some(Box::new(Fault::Panicked(message_of(&*panic)))),
        }
    };
    match &domain.wire {
        None => serve(),
        Some(wire) => run_wired(&**wire, serve),
    }
}

/// Has the domain's own library run the handler. A panic of its own must not cost the activation: the caller would wait for ever.
#[cold]
fn run_wired(wire: &dyn Wire, mut serve: impl FnMut() -> Option<Box<Fault>>) -> Option<Box<Fault>> {
    let mut outcome = None;
    let mut once = || outcome = Some(serve());
    let ran = catch_unwind(AssertUnwindSafe(|| wire.run(WiredCall::new(&mut once))));
    match ran {
        Ok(()) => outcome.unwrap_or_else(|| {
            Some(Box::new(Fault::Panicked("the domain's wire did not run the call".into())))
        }),
        Err(panic) => {
            Some(Box::new(Fault::Panicked(format!("in the domain's wire: {}", message_of(&*panic)))))
        }
    }
}

/// How to wait for the next call of who makes one with this header.
#[inline]
fn waits(header: &Header, place: &Place, words: Words<'_>) -> Waits {
    let together = place.core() == u32::from(header.cpu) + 1;
    match header.affinity {
        Affinity::Apart if !together => Waits::Spinning,
        // Who waits by `poll` does not look by itself.
        Affinity::Together | Affinity::Apart
            if together && words.gate().wait.load(Ordering::Relaxed) != NOTIFY =>
        {
            Waits::Sharing
        }
        _ => Waits::Asleep,
    }
}

/// Counts a call.
#[inline]
fn count(line: &Line) {
    // Not atomic as a whole: the line is this activation's alone.
    line.calls.store(line.calls.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

/// Writes what went wrong in the handler.
#[cold]
fn put_fault(line: &Line, fault: Fault, charge_rows: u32) -> Result<Reply, Wrong> {
    let (mut head, mut detail) = match fault {
        Fault::Failed(failure) => (ReplyHead::new(Status::Failed, failure.code), failure.detail),
        Fault::Panicked(message) => (ReplyHead::new(Status::Panicked, 0), message.into_bytes()),
    };
    head.charge_rows = charge_rows;
    // Always into the line itself, whose argument stack has room for it by construction.
    detail.truncate(Failure::MAX_DETAIL.min(line.shared.len_bytes() - PAYLOAD_AT));
    head.lengths[0] = detail.len() as u32;
    line.shared.write(PAYLOAD_AT, &detail).ok_or_else(|| malformed(about::RESULT))?;
    Ok(Reply::Head(head, 1))
}

fn charge(words: Words<'_>, domain: u64, account: Account) -> u32 {
    let (own_ns, rows) = account.close();
    line::cpu_ns(words).store(own_ns, Ordering::Relaxed);
    // A recursion into this domain is the thread's, but not this activation's own: it has its row as any other.
    let _ = domain;
    for (i, &(id, ns)) in rows.iter().enumerate() {
        write_charge(words, i, id, ns);
    }
    rows.len() as u32
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// Gives the line back to its caller. [`tell`] follows, unless the caller is known to be awake.
#[inline(always)]
pub(crate) fn answer(line: &Line, call: u32, reply: &Reply) {
    // Relaxed: read by whoever has the line, under the binding's handing over.
    line.served.store(call, Ordering::Relaxed);
    match reply {
        Reply::Done => ReplyHead::write_done(line.words()),
        Reply::Here(few) => few.write(line.words()),
        Reply::Head(head, lengths) => head.write(line.words(), *lengths),
    }
    line.words().gate().answer(call);
    reach("domain: replied, before the wake-up");
}

/// Tells the caller, if it sleeps, that the reply is there.
#[inline]
pub(crate) fn tell(line: &Line) {
    let gate = line.words().gate();
    match gate.whom_to_tell() {
        Tell::Nothing => {}
        Tell::Wake => {
            let _ = futex::wake(gate.reply, 1);
        }
        Tell::Pipe => notify(line),
    }
    reach("domain: woke the caller");
}

/// Answers a call that will not be executed.
pub(crate) fn terminate(line: &Line, call: u32) {
    answer(line, call, &Reply::Head(ReplyHead::new(Status::Terminated, 0), 0));
    tell(line);
}
