//! Taking a call's arguments: each is copied once to private memory, or held, and checked.

use super::execute::{Wrong, about, malformed};
use super::invocation::{Arguments, Held};
use super::peer::Line;
use crate::line::{
    Descriptor, Header, Kind, MAX_ARGS, PAYLOAD_AT, ReplyHead, Status, align_argument, results_at,
};
use crate::memory::{Given, Lendable};
use crate::shared::Shared;
use std::sync::Arc;

/// Where a call's payload is and its results go.
pub(super) struct Home {
    /// The client's own buffer, if the line is too small.
    pub spill: Option<Arc<Lendable>>,
    pub payload_at: usize,
    pub results_at: usize,
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
        Ok(Self { spill, payload_at, results_at: results_at(payload_at, header.payload_bytes as usize) })
    }

    #[inline]
    pub fn memory<'a>(&'a self, line: &'a Line) -> &'a Shared {
        self.spill.as_ref().map_or(&line.shared, |spill| &spill.shared)
    }
}

impl Arguments {
    /// Copies the arguments to private memory and checks them.
    #[inline]
    pub(super) fn copy(&mut self, line: &Line, header: &Header) -> Result<Home, Wrong> {
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
            self.count = index + 1;
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
    Given::open(fd, len).map_err(|_| Status::GiftInUse.into())
}

/// Forgets the gifts of a call that is not executed: its caller has let go of them.
pub(super) fn drop_gifts(line: &Line, header: &Header) {
    for index in 0..usize::from(header.args).min(MAX_ARGS) {
        if let Some(Descriptor { kind: Kind::Give, id, .. }) = Descriptor::read(line.words(), index) {
            let mut buffers = line.peer.lock_buffers();
            if let Some((_, len)) = buffers.gifts.remove(&id) {
                buffers.total_bytes -= len as u64;
            }
        }
    }
}
