//! Executing one call: take what the client wrote, check it, run the handler, write what came of it.
//!
//! The order is what makes it safe against a client that rewrites its half meanwhile: header, descriptors and bytes are each
//! copied once to private memory; every check and every use is of the copy. Whatever the bits, the worst outcome is an error
//! status in that client's own line.

use super::Inner;
use super::activation::Place;
use super::adopted::Adopted;
use super::arguments::{Home, drop_gifts};
use super::arrival::Arrival;
use super::invocation::{Arguments, Invocation};
use super::known::Known;
use super::outcome::{
    Fault, Reply, Wrong, about, give_back, malformed, message_of, put_fault, short, too_large,
};
use super::peer::Line;
use crate::attributes::Affinity;
use crate::gate::NOTIFY;
use crate::header::{Header, RawHeader};
use crate::line::{Kind, SHORT_PAYLOAD_AT, Words, align_argument};
use crate::reply::{self, HERE, HERE_ARGS, Here, ReplyHead, Status, write_charge};
use crate::shared::{Shared, sealed_memfd};
use crate::socket::{self, FromDomain};
use crate::step::reach;
use crate::usage::Account;
use crate::wire::{Wire, WiredCall};
use peregrine_base::Protection;
use peregrine_base::sync::Ordering;
use peregrine_sys::raw::Errno;
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
    /// What [`Reply::Head`] says.
    head: ReplyHead,
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

impl<'a> Executor<'a> {
    pub fn new(domain: &'a Inner) -> Self {
        Self {
            domain,
            arguments: Arguments::default(),
            place: Place::new(domain.cpus),
            waits: Waits::Asleep,
            heavy: false,
            known: None,
            head: ReplyHead::new(Status::Done, 0),
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
        self.arguments.let_go();
    }

    /// Before the activation sleeps: lets go of what a client may want back meanwhile.
    pub fn rest(&mut self) {
        self.arguments.let_go();
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

    /// Executes `call` and writes the domain's half of the line, all but what [`answer`](Self::answer) does.
    #[inline]
    pub fn execute(&mut self, line: &Arc<Line>, call: u32) -> Reply {
        if let Some(plan) = self.known.as_ref().and_then(|known| known.plan.as_ref()) {
            plan.fetch();
        }
        let words = line.words();
        let raw = RawHeader::read(words);
        let is_cancelled = words.cancel().load(Ordering::Relaxed) == call;
        if let Some(known) = &self.known
            && known.is(&raw)
            && !is_cancelled
        {
            self.waits = waits(&known.header, &self.place, words);
            if known.is_quick
                && let Some(plan) = &known.plan
            {
                let is_empty = plan.is_empty();
                if self.arguments.fill(line, plan).is_some() {
                    reach("domain: arguments copied");
                    let outcome = run(self.domain, &self.arguments, line, known);
                    count(line);
                    if is_empty && outcome.is_none() {
                        return Reply::Done;
                    }
                    return self.reply_quickly(line, call, outcome);
                }
                // What was lent is gone, and there may be another of its number.
                self.forget();
            }
        }
        match self.execute_any(line, call, raw, is_cancelled) {
            Ok(reply) => reply,
            Err(Wrong(head)) => self.says(head),
        }
    }

    /// The reply that `head` says all of. Two lengths are enough for whatever went wrong.
    const fn says(&mut self, head: ReplyHead) -> Reply {
        self.head = head;
        Reply::Head(2)
    }

    /// Writes what is left to write of the domain's half, and gives the line back to its caller.
    #[inline(always)]
    pub fn answer(&mut self, line: &Line, call: u32, reply: Reply) {
        let words = line.words();
        match reply {
            Reply::Done => ReplyHead::write_done(words),
            Reply::Here(lengths) => {
                let (lengths, mut at) = (Here(lengths), HERE);
                for (index, slot) in self.arguments.slots[..HERE_ARGS].iter_mut().enumerate() {
                    // There is room for them all: `few_results`.
                    if let Some(result @ [_, ..]) = slot.result.get_mut().get(..lengths.len(index)) {
                        let _ = line.shared.write(at, result);
                        at = align_argument(at + result.len());
                    }
                }
                lengths.write(words);
            }
            Reply::Head(lengths) => self.head.write(words, lengths as usize),
        }
        give_back(line, call);
    }

    /// Writes what came of a call of the short form.
    #[inline]
    fn reply_quickly(&mut self, line: &Line, call: u32, outcome: Option<Box<Fault>>) -> Reply {
        let Some(plan) = self.known.as_ref().and_then(|known| known.plan.as_ref()) else {
            return self.says(ReplyHead::new(Status::Malformed, about::KIND));
        };
        let results_at = plan.results_at;
        let few = if outcome.is_none() { self.few_results() } else { None };
        few.map_or_else(
            || {
                let home = Home { spill: None, payload_at: SHORT_PAYLOAD_AT, results_at, is_short: false };
                self.put_results(line, call, &home, outcome, 0).unwrap_or_else(|Wrong(head)| self.says(head))
            },
            |Here(lengths)| Reply::Here(lengths),
        )
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
            self.forget();
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
        let mut arrival = Arrival::of(self.domain, line, &header);
        let mut copied =
            if late { Err(Status::Late.into()) } else { self.arguments.take(line, known, &mut arrival) };
        if arrival.has_stalled() {
            copied = Err(Status::Stalled.into());
        }
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
            return Ok(self.says(put_fault(line, *fault, charge_rows)?));
        }
        if home.is_short
            && charge_rows == 0
            && let Some(Here(lengths)) = self.few_results()
        {
            return Ok(Reply::Here(lengths));
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
        self.head = head;
        Ok(Reply::Head(count as u32))
    }

    /// The lengths of all results, if they are in order and few.
    #[inline]
    fn few_results(&mut self) -> Option<Here> {
        let (mut here, mut end) = (Here::default(), 0);
        for (index, slot) in self.arguments.slots[..self.arguments.count].iter_mut().enumerate() {
            let result = slot.result.get_mut();
            if result.len() as u64 > slot.bound {
                return None;
            }
            here.push(index, result.len(), &mut end)?;
        }
        Some(here)
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
        let lacking = |errno| short(about::RESULT, errno);
        let fd = sealed_memfd(c"peregrine-results", total).map_err(lacking)?;
        let memory = Shared::map(&fd, total, Protection::ReadWrite).map_err(lacking)?;
        self.copy_results(&memory, 0).ok_or_else(|| malformed(about::RESULT))?;
        let message = FromDomain::Results { line: line.index, call, len_bytes: total as u64 };
        reach("domain: results in a memfd");
        // No room in the queue: a client that lets unread results pile up.
        socket::send(&line.peer.socket, &message, Some(fd.as_fd()))
            .map_err(|e| short(about::SENDING, Errno(e.raw_os_error())))
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

fn charge(words: Words<'_>, domain: u64, account: Account) -> u32 {
    let (own_ns, rows) = account.close();
    reply::cpu_ns(words).store(own_ns, Ordering::Relaxed);
    // A recursion into this domain is the thread's, but not this activation's own: it has its row as any other.
    let _ = domain;
    for (i, &(id, ns)) in rows.iter().enumerate() {
        write_charge(words, i, id, ns);
    }
    rows.len() as u32
}
