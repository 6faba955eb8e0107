//! Taking pages from other members' views, without ever waiting for one that can't answer.
//!
//! ```text
//!  asker                                              target
//!  request := (sequence, range, lowering)
//!  asked[target] |= me          ─────────────────▶    polls at its safepoints, while it waits, and in the signal's handler:
//!  (own view meanwhile)                               asked := 0; for each asker: read its request, lower own view
//!  wait for acked[me] ≥ sequence ◀────────────────    acked[asker] := max(…, sequence)
//!  │ ~3 µs, or ~20 if all of them polled lately:
//!  │        nobody polls ── signal ──▶                handler
//!  │ ~1 ms: look at the process
//!  ▼    dead: its view died with it │ stopped: overdue := overdue + 1, and the frames are cut off (`Frames::cut_off`)
//!                                                     when it runs again the signal comes first:
//!                                                     drops its *whole* view, flushed := overdue
//! ```
//!
//! **Why it can't be reached after the return.** A target that acknowledged has lowered its view and fills it again only under
//! the range's lock, which the asker holds. A dead one has no page table. A stopped one executes no user instruction before the
//! queued signal's handler, and its entries for the frames are gone besides, for punching the memfd removes them from every
//! page table; its page faults would find new, unowned frames, which nobody is given before it has flushed.
//!
//! **What can go wrong.** A member that blocks the signal and does not poll holds up an unmap for [`SILENCE_NS`] each time, and
//! lowered rights for as long as it likes. An asker that dies leaves its bit: the target lowers what the asker's recovery
//! then decides about; dropping a view is never wrong. Two signals may nest in a target: acknowledgements only grow.
//!
//! Everything here is trap code: it allocates nothing, locks nothing, panics never (S3).

use super::liveness::{self, Vigour};
use super::seat::Seat;
use super::table::{Counts, Lowering, MemberIndex, members_in};
use peregrine_base::PageRange;
use peregrine_base::sync::{AtomicI32, Ordering, spin_loop};
use peregrine_sys::other::Pidfd;
use peregrine_sys::signal::number;
use peregrine_sys::{futex, io, raw};
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

/// The signal by which a member that does not poll is told to look at its requests. Programs leave it alone.
pub const SIGNAL: i32 = number::RT_BASE + 9;

/// Spins before a signal is sent: a polled answer takes about 0.25 µs, a signal about 18.
const POLLED_SPINS: u32 = 600;
/// The same while all who are silent have lately answered at their safepoints: the next one is as far away as the longest thing
/// that they do between two, mapping 64 KiB for example, and a signal costs both sides more than that. About 20 µs.
const POLLERS_SPINS: u32 = 4000;
/// Time between the looks at a silent member.
const LOOK_NS: u64 = 500_000;
/// A member that is deaf or silent for so long is cut off from pages that are unmapped.
pub const SILENCE_NS: u64 = 300_000_000;

/// What became of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Outcome {
    /// Members that did not answer and may run again: frames must be cut off.
    pub(crate) overdue: u64,
}

impl Seat {
    /// A safepoint: obeys what others ask. Two loads of the member's own cache line when there is nothing to do.
    #[inline]
    pub fn poll(&self) {
        let record = self.record();
        // Relaxed: a request that is missed here is found at the next safepoint, or signalled.
        if record.asked.load(Ordering::Relaxed) != 0
            || record.overdue.load(Ordering::Relaxed) != record.flushed.load(Ordering::Relaxed)
        {
            let obeyed = self.serve();
            if obeyed {
                record.note_manner(true);
            }
        }
    }

    /// The same in the signal's handler.
    pub(crate) fn serve_signal(&self) {
        if self.serve() {
            self.record().note_manner(false);
        }
    }

    /// Obeys what others ask, and tells whether anybody asked. Also run in the signal's handler, between any two instructions, even of
    /// itself.
    #[cold]
    fn serve(&self) -> bool {
        if !self.is_mine() {
            // A child of the member must not answer for it.
            return false;
        }
        let mut obeyed = false;
        let record = self.record();
        // Acquire pairs with the Release half of the asker's increment.
        let overdue = record.overdue.load(Ordering::Acquire);
        if overdue != record.flushed.load(Ordering::Relaxed) {
            self.or_die(self.view.close_all(&self.frames));
            self.appetite.forget(self.region());
            // Release: whoever sees this sees the view closed (system calls are ordered before it). Max, for a nested run may
            // have answered a later one.
            record.flushed.fetch_max(overdue, Ordering::Release);
        }
        // AcqRel: takes the bits, and sees the requests written before they were set.
        for asker in members_in(record.asked.swap(0, Ordering::AcqRel)) {
            if let Some((sequence, range, lowering)) = self.table.member(asker).request.read() {
                self.or_die(self.view.lower(range, lowering, &self.frames));
                self.appetite.forget(range);
                Counts::bump(&record.counts.obeyed);
                // Release pairs with the asker's Acquire in `answered`.
                record.acked[asker.get()].fetch_max(sequence, Ordering::Release);
                obeyed = true;
            }
        }
        obeyed
    }

    /// A member that can't close its view would keep what is no longer its own: it ends instead, and others see it dead.
    fn or_die(&self, done: Result<(), raw::Errno>) {
        if done.is_err() {
            io::complain(
                b"peregrine-space: the kernel refuses to close a view (out of memory?): this member ends\n",
            );
            peregrine_sys::process::kill_self();
        }
    }

    fn answered(&self, target: MemberIndex, sequence: u64) -> bool {
        self.table.member(target).acked[self.index.get()].load(Ordering::Acquire) >= sequence
    }

    /// Lowers `range` in the views of `targets` and returns when none of them can reach beyond that, but those in the outcome.
    #[inline]
    pub(crate) fn shoot_down(&self, targets: u64, range: PageRange, lowering: Lowering) -> Outcome {
        let me = self.record();
        let mut waiting = 0;
        let others = targets & !self.index.bit();
        if others != 0 {
            let sequence = me.request.last.load(Ordering::Relaxed) + 1;
            me.request.last.store(sequence, Ordering::Relaxed);
            me.request.write(sequence, range, lowering);
            for target in members_in(others) {
                let record = self.table.member(target);
                if matches!(record.who().life(), super::table::Life::Live) {
                    // AcqRel: the request is written before the bit is seen.
                    record.asked.fetch_or(self.index.bit(), Ordering::AcqRel);
                    waiting |= target.bit();
                    Counts::bump(&me.counts.asked);
                }
            }
            if waiting != 0 {
                Counts::bump(&me.counts.requests);
            }
        }
        if targets & self.index.bit() != 0 {
            self.or_die(self.view.lower(range, lowering, &self.frames));
            self.appetite.forget(range);
        }
        if waiting == 0 {
            return Outcome { overdue: 0 };
        }
        let sequence = me.request.last.load(Ordering::Relaxed);
        for spin in 0..POLLERS_SPINS {
            waiting = self.still_silent(waiting, sequence);
            if waiting == 0 {
                return Outcome { overdue: 0 };
            }
            if spin == POLLED_SPINS && !members_in(waiting).all(|m| self.table.member(m).is_polling()) {
                break;
            }
            // Two that ask each other would wait for ever otherwise.
            self.poll();
            spin_loop();
        }
        self.shoot_down_by_signal(waiting, sequence, lowering)
    }

    fn still_silent(&self, waiting: u64, sequence: u64) -> u64 {
        members_in(waiting).filter(|m| !self.answered(*m, sequence)).fold(0, |set, m| set | m.bit())
    }

    #[cold]
    fn shoot_down_by_signal(&self, mut waiting: u64, sequence: u64, lowering: Lowering) -> Outcome {
        for target in members_in(waiting) {
            self.signal(target);
        }
        let mut outcome = Outcome { overdue: 0 };
        let begun = now_ns();
        let mut looked = begun;
        let mut rounds = 0u32;
        loop {
            waiting = self.still_silent(waiting, sequence);
            if waiting == 0 {
                return outcome;
            }
            self.poll();
            rounds += 1;
            if rounds < 64 {
                // The target may need this very processor to run its handler.
                io::yield_now();
            } else {
                pause_ns(50_000);
            }
            let now = now_ns();
            if now - looked < LOOK_NS {
                continue;
            }
            looked = now;
            for target in members_in(waiting) {
                let record = self.table.member(target);
                let give_up = match liveness::of(record) {
                    Vigour::Gone => {
                        waiting &= !target.bit();
                        false
                    }
                    // The signal was queued while it was stopped, or before: it comes first when it goes on. Send it again,
                    // for the first may have come and gone between the request and the stop.
                    Vigour::Stopped => {
                        self.signal(target);
                        liveness::of(record) == Vigour::Stopped
                    }
                    Vigour::Deaf | Vigour::Able => lowering == Lowering::Close && now - begun > SILENCE_NS,
                };
                if give_up && !self.answered(target, sequence) {
                    // Release: whoever answers this drops everything that was asked before it.
                    record.overdue.fetch_add(1, Ordering::AcqRel);
                    Counts::bump(&self.record().counts.overdue);
                    self.signal(target);
                    waiting &= !target.bit();
                    outcome.overdue |= target.bit();
                }
            }
        }
    }

    /// Queues the signal for `target`, if it is the process that it is taken for.
    fn signal(&self, target: MemberIndex) {
        let record = self.table.member(target);
        let who = record.who();
        let cached = &self.pidfds[target.get()];
        let tag = &self.pidfd_owners[target.get()];
        // Only this process's one thread and its handlers get here; a handler that interrupts between the two stores finds a
        // tag that does not match and opens one more descriptor, which the outer run then replaces and closes.
        if tag.load(Ordering::Relaxed) != who.0 {
            let Ok(fresh) = Pidfd::open(who.pid()) else { return };
            // The descriptor names whoever had the id when it was opened: was that the member?
            if liveness::of(record) == Vigour::Gone || record.who() != who {
                return;
            }
            let fd = OwnedFd::from(fresh).into_raw_fd();
            close(cached.swap(fd + 1, Ordering::AcqRel));
            tag.store(who.0, Ordering::Relaxed);
        }
        let fd = cached.load(Ordering::Relaxed) - 1;
        if fd >= 0 && Pidfd::signal_raw(fd, SIGNAL).is_ok() {
            Counts::bump(&self.record().counts.signals);
        }
    }

    pub(crate) fn close_pidfds(&self) {
        for cached in &self.pidfds {
            close(cached.swap(0, Ordering::AcqRel));
        }
    }
}

fn close(fd_plus_one: i32) {
    if fd_plus_one > 0 {
        // SAFETY: it came from `into_raw_fd` in `signal`, and was taken out of its place by a swap.
        drop(unsafe { OwnedFd::from_raw_fd(fd_plus_one - 1) });
    }
}

/// Places for descriptors: plus one, 0 for none.
pub(crate) fn no_pidfds() -> [AtomicI32; super::table::MEMBERS] {
    std::array::from_fn(|_| AtomicI32::new(0))
}

pub(crate) fn pause_ns(ns: u64) {
    let never = peregrine_base::sync::AtomicU32::new(0);
    futex::wait(&never, 0, Some(ns));
}

pub(crate) fn now_ns() -> u64 {
    peregrine_sys::timer::monotonic_ns()
}
