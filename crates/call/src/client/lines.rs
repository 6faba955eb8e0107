//! The lines of a connection: which are free, who gets one, and where new ones come from.
//!
//! The line that was used last waits in a place of its own, which takes no lock, and which a hot call keeps for it meanwhile; the others in a stack,
//! the warmest on top. A line whose call was given up is *abandoned* until its reply comes, for until then the domain may still write it.

use super::connection::{ANOTHER_ANSWER, Connection};
use super::line::{Guard, Line};
use super::questions::{Answer, Inquiry};
use crate::chain::Deadline;
use crate::error::CallError;
use crate::line::PAYLOAD_AT;
use crate::shared::map_from_peer;
use crate::socket::{FromClient, FromDomain};
use crate::step::reach;
use crate::strays;
use peregrine_base::Protection;
use peregrine_base::sync::Ordering;
use peregrine_sys::raw::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Default)]
#[expect(clippy::vec_box, reason = "a line is handed about at each call: as a pointer")]
pub(super) struct Lines {
    pub free: Vec<Box<Line>>,
    pub abandoned: Vec<Box<Line>>,
    open: usize,
    full: bool,
}

impl Lines {
    /// One that nobody uses, or whose given-up call is over.
    fn take(&mut self) -> Option<Box<Line>> {
        self.free.pop().or_else(|| {
            let at = self.abandoned.iter().position(|line| line.is_over())?;
            Some(self.abandoned.swap_remove(at))
        })
    }
}

impl Connection {
    /// Puts a line back in the place that was kept for it, its call over.
    #[inline(always)]
    pub(super) fn put_back_reserved(&self, line: Box<Line>) {
        if self.contended.load(Ordering::Relaxed) {
            self.warm.put_back_reserved_in_order(line);
            self.tell_waiter();
        } else {
            // A waiter that comes at this moment, the first of the connection, may not be told: it looks again soon (`nap`).
            self.warm.put_back_reserved(line);
        }
    }

    /// A line that nobody uses.
    #[inline]
    pub fn acquire(self: &Arc<Self>, deadline: Option<Deadline>) -> Result<Guard<'_>, CallError> {
        match self.warm.take() {
            Some(line) => Ok(Guard::new(self, line)),
            None => self.acquire_cold(deadline),
        }
    }

    #[cold]
    fn acquire_cold(self: &Arc<Self>, deadline: Option<Deadline>) -> Result<Guard<'_>, CallError> {
        let mut lines = self.lock_lines();
        let mut slept = 0;
        loop {
            if let Some(line) = self.warm.take() {
                return Ok(Guard::new(self, line));
            }
            if let Some(line) = lines.take() {
                return Ok(Guard::new(self, line));
            }
            if self.dead.load(Ordering::Relaxed) {
                return Err(CallError::DomainDied);
            }
            if lines.open < self.most_lines && !lines.full {
                lines.open += 1;
                drop(lines);
                match self.open_line(deadline) {
                    Ok(line) => return Ok(Guard::new(self, line)),
                    Err(e) if !self.line_failed(&e) => return Err(e),
                    Err(_) => {}
                }
                lines = self.lock_lines();
                continue;
            }
            lines = self.wait_for_line(lines, deadline, slept)?;
            slept = (slept + 1).min(LONGEST_NAP);
        }
    }

    fn wait_for_line<'a>(
        &self,
        lines: MutexGuard<'a, Lines>,
        deadline: Option<Deadline>,
        slept: u32,
    ) -> Result<MutexGuard<'a, Lines>, CallError> {
        // An abandoned line becomes free without anybody telling us: look now and then.
        let mut slice = nap(if lines.abandoned.is_empty() { slept } else { 0 });
        match deadline {
            Some(deadline) => slice = slice.min(deadline.left().ok_or(CallError::Deadline)?),
            None => self.see_whether_it_works()?,
        }
        // SeqCst, as in `Warm::put_back`: who puts a line back sees the waiter, or the waiter its line.
        self.waiters.fetch_add(1, Ordering::SeqCst);
        self.contended.store(true, Ordering::SeqCst);
        if self.warm.has_one() {
            self.waiters.fetch_sub(1, Ordering::Relaxed);
            return Ok(lines);
        }
        let woken = self.freed.wait_timeout(lines, slice).unwrap_or_else(PoisonError::into_inner);
        self.waiters.fetch_sub(1, Ordering::Relaxed);
        if woken.1.timed_out() && !self.is_alive() {
            return Err(CallError::DomainDied);
        }
        Ok(woken.0)
    }

    pub(super) fn lock_lines(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a line back, with its call over or not.
    #[inline]
    pub fn put_back(&self, line: Box<Line>) {
        if line.is_over() {
            return self.put_back_over(line);
        }
        self.lock_lines().abandoned.push(line);
        self.tell_waiter();
    }

    /// Takes a line back whose call is over.
    #[inline(always)]
    pub fn put_back_over(&self, line: Box<Line>) {
        if let Err(line) = self.warm.put_back(line) {
            self.lock_lines().free.push(line);
        }
        self.tell_waiter();
    }

    #[inline(always)]
    fn tell_waiter(&self) {
        if self.waiters.load(Ordering::SeqCst) > 0 {
            // Under the lock: a waiter that has looked waits by now.
            let _lines = self.lock_lines();
            self.freed.notify_one();
        }
    }

    fn open_line(&self, deadline: Option<Deadline>) -> Result<Box<Line>, CallError> {
        let answer = self.question(Inquiry::new(FromClient::OpenLine, None), deadline)?;
        self.line_of(answer)
    }

    /// The line that an answer brought.
    pub(super) fn line_of(&self, answer: Answer) -> Result<Box<Line>, CallError> {
        let (FromDomain::Line { index, len_bytes }, fd) = answer else { return Err(ANOTHER_ANSWER) };
        let fd = fd.ok_or(CallError::BadReply("a line without memory"))?;
        let len_bytes = usize::try_from(len_bytes).ok().filter(|&len| len > PAYLOAD_AT && len < 1 << 40);
        let len_bytes = len_bytes.ok_or(CallError::BadReply("a line of impossible size"))?;
        let shared = map_from_peer(fd.as_fd(), len_bytes, Protection::ReadWrite).map_err(|e| match e {
            Errno::EINVAL => CallError::BadReply("a line that could be taken away again"),
            errno => CallError::System { what: "mapping a line", errno },
        })?;
        let shared = Arc::new(shared);
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner).push(shared.clone());
        reach("client: mapped a line");
        Ok(Line::new(index, shared))
    }

    /// Takes in a line that somebody asked for who has gone.
    pub(super) fn keep_line(&self, answer: Answer) {
        if let Ok(line) = self.line_of(answer) {
            let mut lines = self.lock_lines();
            lines.open += 1;
            lines.free.push(line);
            self.freed.notify_one();
        }
    }

    /// A line that nobody uses, of those that are open.
    pub(super) fn take_free(&self) -> Option<Box<Line>> {
        self.warm.take().or_else(|| self.lock_lines().take())
    }

    /// For who must not wait: a line that nobody uses, or what asks for one, or neither as long as all are in use.
    pub(super) fn try_acquire(&self) -> Result<Result<Box<Line>, Option<Inquiry>>, CallError> {
        if let Some(line) = self.take_free() {
            return Ok(Ok(line));
        }
        let mut lines = self.lock_lines();
        if self.dead.load(Ordering::Relaxed) {
            return Err(CallError::DomainDied);
        }
        if lines.open < self.most_lines && !lines.full {
            lines.open += 1;
            return Ok(Err(Some(Inquiry::new(FromClient::OpenLine, None))));
        }
        Ok(Err(None))
    }

    /// The line that was asked for is not coming; whether to wait for another.
    pub(super) fn line_failed(&self, why: &CallError) -> bool {
        let mut lines = self.lock_lines();
        lines.open -= 1;
        let is_limit = matches!(why, CallError::TooLarge { .. });
        lines.full |= is_limit;
        is_limit && lines.open > 0
    }
}

/// Sleeps after which the next is as long as any.
const LONGEST_NAP: u32 = 6;

/// How long to sleep for a line after having slept so often: who puts one back, has not seen that anybody waits, and loses its processor before it does
/// tells nobody. It is not known how long it is away, so the looks grow rarer, and its waiter is late by no more than that time.
fn nap(slept: u32) -> Duration {
    Duration::from_millis(1 << slept.min(LONGEST_NAP)).min(Duration::from_millis(50))
}

/// What asks for the read end of a line's pipe.
pub(super) fn asks_for_pipe(line: u32) -> Inquiry {
    Inquiry::new(FromClient::OpenPipe { line }, None)
}

/// The read end that the domain sent, if it is a pipe's.
pub(super) fn pipe_of(answer: Answer) -> Result<OwnedFd, CallError> {
    match answer {
        (FromDomain::Pipe, Some(fd)) if strays::is_pipe(&fd) => Ok(fd),
        _ => Err(ANOTHER_ANSWER),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_not_told_is_late_by_no_more_than_the_other_was_away() {
        for away_ms in 0..1_000 {
            let away = Duration::from_millis(away_ms);
            let mut now = Duration::ZERO;
            let looks = (0..).map(|slept| {
                now += nap(slept);
                now
            });
            let (at, before) = looks.zip(0..100).find(|&(at, _)| at > away).unwrap();
            let late = at - away;
            assert!(late <= away + Duration::from_millis(1), "{late:?} after {away:?}");
            assert!(late <= Duration::from_millis(50) && before < 30, "{late:?}, {before} looks");
        }
    }
}
