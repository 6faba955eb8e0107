//! Taking a call's arguments: each is copied once to private memory, or held, and checked.

use super::arrival::Arrival;
use super::invocation::{Arguments, Held};
use super::known::Known;
use super::outcome::{Wrong, about, malformed, short};
use super::peer::Line;
use crate::header::Header;
use crate::line::{Descriptor, Kind, MAX_ARGS, PAYLOAD_AT, SHORT_PAYLOAD_AT, align_argument, results_at};
use crate::memory::{Given, Lendable};
use crate::reply::{ReplyHead, Status};
use crate::shared::Shared;
use crate::short::{Short, WORDS};
use peregrine_sys::raw::Errno;
use std::sync::{Arc, Weak};

/// Where a call's payload is and its results go.
pub(super) struct Home {
    /// The client's own buffer, if the line is too small.
    pub spill: Option<Arc<Lendable>>,
    pub payload_at: usize,
    pub results_at: usize,
    /// Whether the caller looks for few results in the domain's half itself.
    pub is_short: bool,
}

impl Home {
    #[inline]
    fn of(line: &Line, header: &Header) -> Result<Self, Wrong> {
        let (spill, payload_at) = match header.spill {
            0 => (None, PAYLOAD_AT),
            id => {
                let spill = line.peer.lock_buffers().lent.get(&id).cloned();
                let spill = spill.ok_or_else(|| Wrong(ReplyHead::new(Status::NoBuffer, id)))?;
                (Some(spill), 0)
            }
        };
        let results_at = results_at(payload_at, header.payload_bytes as usize);
        Ok(Self { spill, payload_at, results_at, is_short: false })
    }

    #[inline]
    pub fn memory<'a>(&'a self, line: &'a Line) -> &'a Shared {
        self.spill.as_ref().map_or(&line.shared, |spill| &spill.shared)
    }
}

/// The arguments of a call of the short form, all of it checked that depends on its header alone.
pub(super) struct Plan {
    args: [Planned; WORDS],
    count: usize,
    pub results_at: usize,
    /// Where the first bytes lie that come with the call, if any do.
    first: Option<usize>,
}

/// One of them.
#[derive(Default)]
struct Planned {
    kind: Option<Kind>,
    /// Where its bytes are: of the line, or of what is lent.
    begin: usize,
    len: usize,
    bound: u64,
    /// What is lent.
    lent: Weak<Lendable>,
}

impl Plan {
    pub(super) fn of(line: &Line, header: &Header, short: Short) -> Result<Self, Wrong> {
        let results_at = results_at(SHORT_PAYLOAD_AT, header.payload_bytes as usize);
        let count = usize::from(header.args);
        let mut this = Self { args: Default::default(), count, results_at, first: None };
        let (mut descriptors, mut at) = (short.descriptors(), SHORT_PAYLOAD_AT);
        if count > WORDS {
            return Err(malformed(about::COUNT));
        }
        for planned in &mut this.args[..count] {
            let d = descriptors.next().ok_or_else(|| malformed(about::KIND))?;
            let len = d.len as usize;
            *planned = Planned { kind: Some(d.kind), len, bound: d.bound, ..Planned::default() };
            match d.kind {
                Kind::In | Kind::InOut => {
                    planned.begin = align_argument(at);
                    at = planned.begin + len;
                    if at > line.shared.len_bytes() {
                        return Err(malformed(about::PAYLOAD));
                    }
                    this.first = this.first.or_else(|| line.shared.address(planned.begin, len));
                }
                Kind::Lend => {
                    let Held::Buffer(buffer, begin, _) = lent(line, &d)? else {
                        return Err(malformed(about::KIND));
                    };
                    this.first = this.first.or_else(|| buffer.shared.address(begin, len));
                    planned.lent = Arc::downgrade(&buffer);
                    planned.begin = begin;
                }
                Kind::Out | Kind::Give => {}
            }
        }
        Ok(this)
    }

    /// Whether there are no arguments.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Begins to fetch the first bytes of the next call, which its caller's core has: they come while the rest of it is looked at. That may be a
    /// call that brings others, or what was lent may be gone: then it was in vain.
    #[inline(always)]
    pub(super) fn fetch(&self) {
        if let Some(at) = self.first {
            fetch(at);
        }
    }
}

impl Planned {
    /// What is lent, if there still is such a thing.
    #[cold]
    fn find_lent(&self) -> Option<Held> {
        Some(Held::Buffer(self.lent.upgrade()?, self.begin, self.len))
    }
}

/// Has the processor fetch the cache line at an address, whatever is there, if anything is.
#[inline(always)]
fn fetch(at: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch(std::ptr::without_provenance(at), _MM_HINT_T0);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

impl Arguments {
    /// Takes the arguments, as `copy` or as was planned.
    #[inline]
    pub(super) fn take(
        &mut self,
        line: &Line,
        known: &Known<'_>,
        arrival: &mut Arrival<'_>,
    ) -> Result<Home, Wrong> {
        let Some(plan) = &known.plan else { return self.copy(line, &known.header, arrival) };
        self.fill(line, plan).ok_or_else(|| malformed(about::PAYLOAD))?;
        Ok(Home { spill: None, payload_at: SHORT_PAYLOAD_AT, results_at: plan.results_at, is_short: true })
    }

    /// Copies the arguments to private memory, as was planned. `None` if what was lent has been taken back. What is lent stays with its slot for the
    /// next call of the same plan, so that it is not counted each time: [`let_go`](Self::let_go) comes before any other, and before the activation sleeps.
    #[inline(always)]
    pub(super) fn fill(&mut self, line: &Line, plan: &Plan) -> Option<()> {
        self.count = plan.count;
        self.scratch.clear();
        for (slot, planned) in self.slots.iter_mut().zip(&plan.args[..plan.count]) {
            let &Planned { kind, begin, len, bound, .. } = planned;
            slot.kind = kind;
            slot.bound = bound;
            let result = slot.result.get_mut();
            result.clear();
            match kind? {
                Kind::In => {
                    let start = self.scratch.len();
                    line.shared.append_to(begin, len, &mut self.scratch)?;
                    slot.range = start..start + len;
                }
                Kind::InOut => line.shared.append_to(begin, len, result)?,
                Kind::Lend => {
                    if slot.lent.is_none() {
                        slot.lent = Some(planned.find_lent()?);
                    }
                    // Its client may have taken it back since it was found.
                    if let Some(Held::Buffer(lent, ..)) = &slot.lent
                        && lent.is_forgotten()
                    {
                        return None;
                    }
                }
                Kind::Out | Kind::Give => {}
            }
        }
        Some(())
    }

    /// Lets go of what the last call lent and gave. What a call brought that was found malformed goes too: its client may be gone before this
    /// activation has another call.
    #[inline]
    pub(super) fn let_go(&mut self) {
        for slot in &mut self.slots[..self.count] {
            slot.lent = None;
            slot.given.set(None);
        }
        self.count = 0;
    }

    /// Copies the arguments to private memory, as they arrive, and checks them.
    #[inline]
    fn copy(&mut self, line: &Line, header: &Header, arrival: &mut Arrival<'_>) -> Result<Home, Wrong> {
        self.count = 0;
        let home = Home::of(line, header)?;
        let memory = home.memory(line);
        self.scratch.clear();
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
            let slot = &mut self.slots[index];
            slot.kind = Some(d.kind);
            slot.bound = d.bound;
            slot.result.get_mut().clear();
            match d.kind {
                Kind::In | Kind::InOut => {
                    let (begin, len) = next(&d)?;
                    let target = if d.kind == Kind::In {
                        let start = self.scratch.len();
                        slot.range = start..start + len;
                        &mut self.scratch
                    } else {
                        slot.result.get_mut()
                    };
                    let came = arrival.append(memory, home.payload_at, (begin, len), target);
                    came.ok_or_else(|| malformed(about::PAYLOAD))?;
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
                // A call that may be taken up once more must find it again.
                Kind::Give if header.in_pieces => return Err(malformed(about::KIND)),
                Kind::Give => slot.given.set(Some(given(line, &d)?)),
            }
            self.count = index + 1;
        }
        // What is lent is not copied, and is there in time all the same.
        if !arrival.until(header.payload_bytes as usize) {
            return Err(malformed(about::PAYLOAD));
        }
        Ok(home)
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
    Given::open(fd, len).map_err(|e| match e {
        Errno::ENOMEM => short(about::GIFT, e),
        _ => Status::GiftInUse.into(),
    })
}

/// Forgets the gifts of a call that is not executed: its caller has let go of them.
pub(super) fn drop_gifts(line: &Line, header: &Header) {
    // A call of the short form gives nothing.
    let args = if header.short.is_some() { 0 } else { usize::from(header.args).min(MAX_ARGS) };
    for index in 0..args {
        if let Some(Descriptor { kind: Kind::Give, id, .. }) = Descriptor::read(line.words(), index) {
            let mut buffers = line.peer.lock_buffers();
            if let Some((_, len)) = buffers.gifts.remove(&id) {
                buffers.total_bytes -= len as u64;
            }
        }
    }
}
