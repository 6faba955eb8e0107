//! Executing one call: take what the client wrote, check it, run the handler, write what came of it.
//!
//! The order is what makes it safe against a client that rewrites its half meanwhile: header, descriptors and bytes are each
//! copied once to private memory; every check and every use is of the copy. Whatever the bits, the worst outcome is an error
//! status in that client's own line.

use super::Inner;
use super::activation::Place;
use super::invocation::{Arguments, Held, Invocation};
use super::peer::{Line, notify};
use crate::attributes::Affinity;
use crate::chain::{ChainLink, Entered};
use crate::error::Failure;
use crate::gate::{NOTIFY, Tell};
use crate::line::{
    self, Descriptor, Header, Kind, MAX_ARGS, PAYLOAD_AT, ReplyHead, Status, Words, align_argument,
    results_at, write_charge,
};
use crate::memory::{Given, Lendable};
use crate::shared::{Shared, sealed_memfd};
use crate::socket::{self, FromDomain};
use crate::step::reach;
use crate::usage::{self, Account};
use peregrine_base::Protection;
use peregrine_base::sync::Ordering;
use peregrine_sys::{futex, process};
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
pub(crate) struct Reply {
    head: ReplyHead,
    /// How many of the head's lengths mean something.
    lengths: usize,
}

/// How a call goes wrong before its handler: what the caller is told.
struct Wrong(ReplyHead);

impl From<Status> for Wrong {
    fn from(status: Status) -> Self {
        Self(ReplyHead::new(status, 0))
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

fn malformed(code: u32) -> Wrong {
    Wrong(ReplyHead::new(Status::Malformed, code))
}

fn too_large(code: u32, asked: u64, limit: u64) -> Wrong {
    let mut head = ReplyHead::new(Status::TooLarge, code);
    head.lengths[0] = u32::try_from(asked).unwrap_or(u32::MAX);
    head.lengths[1] = u32::try_from(limit).unwrap_or(u32::MAX);
    Wrong(head)
}

/// Where a call's payload is and its results go.
struct Home {
    /// The client's own buffer, if the line is too small.
    spill: Option<Arc<Lendable>>,
    payload_at: usize,
    results_at: usize,
}

impl Home {
    fn memory<'a>(&'a self, line: &'a Line) -> &'a Shared {
        self.spill.as_ref().map_or(&line.shared, |spill| &spill.shared)
    }
}

impl<'a> Executor<'a> {
    pub fn new(domain: &'a Inner) -> Self {
        Self {
            domain,
            arguments: Arguments::default(),
            place: Place::new(domain.cpus),
            waits: Waits::Asleep,
            heavy: false,
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

    /// Lets go of what large arguments needed.
    pub fn shrink(&mut self) {
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
        let header = Header::read(words);
        if self.place.follow(header.affinity, usize::from(header.cpu)) {
            self.say_where(line);
        }
        let together = self.place.core() == u32::from(header.cpu) + 1;
        self.waits = match header.affinity {
            Affinity::Anywhere => Waits::Asleep,
            // Who waits by `poll` does not look by itself.
            _ if together && words.gate().wait.load(Ordering::Relaxed) != NOTIFY => Waits::Sharing,
            Affinity::Apart if !together => Waits::Spinning,
            _ => Waits::Asleep,
        };
        self.heavy |= header.spill != 0;
        let results = match self.prepare(line, &header, call) {
            Err(wrong) => {
                drop_gifts(line, &header);
                Err(wrong)
            }
            Ok(home) => {
                reach("domain: arguments copied");
                let account = (header.charge || usage::inherited()).then(Account::open);
                let adopted =
                    header.priority.then(|| Adopted::urgent(header.nice, self.domain.most_urgent)).flatten();
                let outcome = self.run(line, &header);
                drop(adopted);
                let rows = account.map_or(0, |account| charge(words, self.domain.id, account));
                // Not atomic as a whole: the line is this activation's alone.
                line.calls.store(line.calls.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                self.put_results(line, call, &home, outcome, rows)
            }
        };
        // What a call brought that was found malformed goes too: its client may be gone before this activation has another call.
        for slot in &mut self.arguments.slots[..self.arguments.count] {
            slot.lent = None;
            slot.given.set(None);
        }
        results.unwrap_or_else(|Wrong(head)| Reply { head, lengths: 2 })
    }

    /// Copies the arguments to private memory and checks them.
    #[inline]
    fn prepare(&mut self, line: &Line, header: &Header, call: u32) -> Result<Home, Wrong> {
        let domain = self.domain;
        let limits = &domain.limits;
        self.arguments.count = 0;
        if domain.portals.get(header.portal as usize).is_none() {
            return Err(Status::NoPortal.into());
        }
        if line.peer.may_call.get(header.portal as usize) != Some(&true) {
            return Err(Status::Access.into());
        }
        if header.depth > limits.depth {
            return Err(Wrong(ReplyHead::new(Status::Depth, limits.depth)));
        }
        let cancelled = line.words().cancel().load(Ordering::Relaxed) == call;
        if cancelled || header.deadline.is_some_and(|d| d.left().is_none()) {
            return Err(Status::Late.into());
        }
        if usize::from(header.args) > MAX_ARGS {
            return Err(malformed(about::COUNT));
        }
        let home = self.home(line, header)?;
        let memory = home.memory(line);
        self.arguments.scratch.clear();
        let payload_end = home.payload_at + header.payload_bytes as usize;
        let mut at = home.payload_at;
        // The next bytes of the payload: where they begin, and how many.
        let mut next = |d: &Descriptor| {
            let begin = align_argument(at);
            let len = usize::try_from(d.len).map_err(|_| malformed(about::PAYLOAD))?;
            let end = begin.checked_add(len).filter(|&end| end <= payload_end);
            at = end.ok_or_else(|| malformed(about::PAYLOAD))?;
            Ok::<_, Wrong>((begin, len))
        };
        for index in 0..usize::from(header.args) {
            let d = Descriptor::read(line.words(), index).ok_or_else(|| malformed(about::KIND))?;
            let slot = &mut self.arguments.slots[index];
            slot.kind = Some(d.kind);
            slot.bound = d.bound;
            slot.result.get_mut().clear();
            match d.kind {
                Kind::In | Kind::InOut => {
                    let (begin, len) = next(&d)?;
                    let target = if d.kind == Kind::In {
                        let start = self.arguments.scratch.len();
                        slot.range = start..start + len;
                        &mut self.arguments.scratch
                    } else {
                        slot.result.get_mut()
                    };
                    memory.append_to(begin, len, target).ok_or_else(|| malformed(about::PAYLOAD))?;
                }
                Kind::Out => {}
                Kind::Lend if d.id == 0 => {
                    let (begin, len) = next(&d)?;
                    // Nothing is copied here, so nothing else notices a payload that is longer than its memory.
                    if begin + len > memory.len_bytes() {
                        return Err(malformed(about::PAYLOAD));
                    }
                    slot.lent = Some(match &home.spill {
                        Some(spill) => Held::Buffer(spill.clone(), begin, len),
                        None => Held::Line(begin, len),
                    });
                }
                Kind::Lend => slot.lent = Some(lent(line, &d)?),
                Kind::Give => slot.given.set(Some(given(line, &d)?)),
            }
            self.arguments.count = index + 1;
        }
        Ok(home)
    }

    #[inline]
    fn home(&self, line: &Line, header: &Header) -> Result<Home, Wrong> {
        let payload_bytes = header.payload_bytes as usize;
        let limit = self.domain.limits.argument_bytes;
        if payload_bytes > limit {
            return Err(too_large(about::ARGUMENTS, payload_bytes as u64, limit as u64));
        }
        let (spill, payload_at) = match header.spill {
            0 => (None, PAYLOAD_AT),
            id => {
                let spill = line.peer.lock_buffers().lent.get(&id).cloned();
                let spill = spill.ok_or_else(|| Wrong(ReplyHead::new(Status::NoBuffer, id)))?;
                (Some(spill), 0)
            }
        };
        Ok(Home { spill, payload_at, results_at: results_at(payload_at, payload_bytes) })
    }

    #[inline]
    fn run(&mut self, line: &Line, header: &Header) -> Result<Result<(), Failure>, String> {
        let domain = self.domain;
        let link = ChainLink { chain: header.chain, depth: header.depth, deadline: header.deadline };
        let _entered = Entered::new(link);
        let mut invocation = Invocation { arguments: &self.arguments, line, link };
        let portal = &domain.portals[header.portal as usize];
        let mut outcome = None;
        let mut serve = || {
            // The invocation is not used after a panic but to be dropped; its cells are refilled before the next call.
            let served = catch_unwind(AssertUnwindSafe(|| portal.handler.serve(&mut invocation)));
            outcome = Some(served.map_err(|panic| message_of(&*panic)));
        };
        match &domain.wire {
            None => serve(),
            Some(wire) => wire.run(&mut || serve()),
        }
        outcome.unwrap_or_else(|| Err("the domain's wire did not run the call".into()))
    }

    /// Writes status and results.
    #[inline]
    fn put_results(
        &mut self,
        line: &Line,
        call: u32,
        home: &Home,
        outcome: Result<Result<(), Failure>, String>,
        charge_rows: u32,
    ) -> Result<Reply, Wrong> {
        let (mut head, detail) = match outcome {
            Ok(Ok(())) => (ReplyHead::new(Status::Done, 0), None),
            Ok(Err(failure)) => (ReplyHead::new(Status::Failed, failure.code), Some(failure.detail)),
            Err(message) => (ReplyHead::new(Status::Panicked, 0), Some(message.into_bytes())),
        };
        head.charge_rows = charge_rows;
        if let Some(mut detail) = detail {
            // Always into the line itself, whose argument stack has room for it by construction.
            detail.truncate(Failure::MAX_DETAIL.min(line.shared.len_bytes() - PAYLOAD_AT));
            head.lengths[0] = detail.len() as u32;
            line.shared.write(PAYLOAD_AT, &detail).ok_or_else(|| malformed(about::RESULT))?;
            return Ok(Reply { head, lengths: 1 });
        }
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
        Ok(Reply { head, lengths: count })
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

fn lent(line: &Line, d: &Descriptor) -> Result<Held, Wrong> {
    let buffer = line.peer.lock_buffers().lent.get(&d.id).cloned();
    let buffer = buffer.ok_or_else(|| Wrong(ReplyHead::new(Status::NoBuffer, d.id)))?;
    match d.bound.checked_add(d.len) {
        Some(end) if end <= buffer.len_bytes => Ok(Held::Buffer(buffer, d.bound as usize, d.len as usize)),
        _ => Err(malformed(about::PART)),
    }
}

fn given(line: &Line, d: &Descriptor) -> Result<Given, Wrong> {
    let mut buffers = line.peer.lock_buffers();
    let Some((fd, len)) = buffers.gifts.remove(&d.id) else {
        return Err(Wrong(ReplyHead::new(Status::NoBuffer, d.id)));
    };
    buffers.total_bytes -= len as u64;
    drop(buffers);
    Given::open(fd, len).map_err(|_| Status::GiftInUse.into())
}

/// Forgets the gifts of a call that is not executed: its caller has let go of them.
fn drop_gifts(line: &Line, header: &Header) {
    for index in 0..usize::from(header.args).min(MAX_ARGS) {
        if let Some(Descriptor { kind: Kind::Give, id, .. }) = Descriptor::read(line.words(), index) {
            let mut buffers = line.peer.lock_buffers();
            if let Some((_, len)) = buffers.gifts.remove(&id) {
                buffers.total_bytes -= len as u64;
            }
        }
    }
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
#[inline]
pub(crate) fn answer(line: &Line, call: u32, reply: &Reply) {
    // Relaxed: read by whoever has the line, under the binding's handing over.
    line.served.store(call, Ordering::Relaxed);
    reply.head.write(line.words(), reply.lengths);
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
    answer(line, call, &Reply { head: ReplyHead::new(Status::Terminated, 0), lengths: 0 });
    tell(line);
}

/// A caller's nice value, adopted for the length of a call.
struct Adopted {
    before: i32,
    set: i32,
}

impl Adopted {
    /// Takes `nice` if it is more urgent than ours, not beyond `most_urgent`, and the kernel permits it.
    fn urgent(nice: i8, most_urgent: i32) -> Option<Self> {
        let wanted = i32::from(nice).max(most_urgent);
        let before = process::nice_of(0).ok()?;
        if wanted >= before {
            return None;
        }
        process::set_nice(0, wanted).ok()?;
        Some(Self { before, set: wanted })
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        // Somebody who changed it during the call meant it: then it stays.
        if process::nice_of(0) == Ok(self.set) {
            let _ = process::set_nice(0, self.before);
        }
    }
}
