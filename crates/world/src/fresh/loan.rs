//! Memory that a thread lends to a domain in place.
//!
//! ```text
//!   thread                             node that the loan was made on                      domain
//!   Loan ─ write, read ──moves there──▶ mapping of a memfd of this domain's alone ◀── mapped, for reading
//!        ─ lend in a call ────────────▶ its number
//! ```
//!
//! What a thread owns lies in the World's memory, which no domain is ever given. So what it lends without a copy is memory apart: a
//! [`Buffer`](peregrine_call::Buffer) of its node's connection. A thread may be moved, and a mapping is one process's; whoever uses a loan
//! goes where it was made, and all loans of a thread are made on one node, so that one call can lend several.
//!
//! **It is in no image.** After a rollback, a resume, or the domain's death it is gone, and each use says so
//! ([`FreshCallError::LoanLost`]): make it anew and fill it. So no thread ever finds in it what it has not written in the life that it lives.

use super::{AGAIN, DONE, FAILED, FreshCallError, Portal, Request, What, ask, flights, life};
use crate::context::{current, go_to, node_id};
use crate::control::is_domain;
use crate::local::local;
use crate::sched;
use peregrine_base::sync::Ordering;
use peregrine_call::{Buffer, CallError, Lending};
use peregrine_thread::carrier::carrier;
use std::cell::Cell;
use std::fmt;
use std::path::{Path, PathBuf};

/// Bytes that are copied before the node looks at anything else.
const PIECE: usize = 256 << 10;

/// Where loans are: on a node, in a life.
#[derive(Clone, Copy)]
pub(super) struct Home {
    pub life: u64,
    pub node: u32,
    /// How many the thread has there.
    kept: u32,
}

thread_local! {
    /// Where this thread's loans are, or were.
    static HOME: Cell<Option<Home>> = const { Cell::new(None) };
}

/// Memory that a Peregrine thread lends to one domain, call after call, without copying.
///
/// It is not part of images: after a rollback, a resume from disk, or the death of the domain each use is
/// [`FreshCallError::LoanLost`]. Using it moves the thread to the node that it was made on. Dropping it gives it back.
///
/// # Examples
/// ```no_run
/// use peregrine_call::Call;
/// # fn f() -> Result<(), peregrine_world::FreshCallError> {
/// let samples = peregrine_world::Loan::new("/run/dsp.sock", 1 << 20)?;
/// samples.write(0, &[1, 2, 3])?;
/// let mean = peregrine_world::Portal::new("/run/dsp.sock", "mean", 1);
/// for _ in 0..100 {
///     let mut result = Vec::new();
///     mean.invoke(Call::new().lend(&samples).output(&mut result, 8))?;
/// }
/// # Ok(())
/// # }
/// ```
pub struct Loan {
    path: PathBuf,
    number: u64,
    home: Home,
    len_bytes: usize,
}

impl Loan {
    /// `len_bytes` zeros to be lent to the domain that serves the socket at `path`, in calls of whichever portal of it.
    ///
    /// # Errors
    /// [`FreshCallError`]: the domain can't be reached, does not admit us or allows no more buffers; the thread is on a carried call.
    pub fn new(path: impl AsRef<Path>, len_bytes: usize) -> Result<Self, FreshCallError> {
        let path = path.as_ref().to_owned();
        if current().is_none() {
            return Err(FreshCallError::NoThread);
        }
        if is_domain(node_id()) {
            return Err(on_a_carried_call());
        }
        let home = HOME.get().filter(|home| home.kept > 0 && home.life == life());
        let portal = Portal::new(&path, "", 0);
        let (mut bytes, made) = ask_at(home, &Request::of(&portal, What::Lend(len_bytes)))?;
        let number = bytes.split_off(bytes.len().saturating_sub(8));
        let number = u64::from_ne_bytes(number.try_into().expect("the node wrote a number"));
        HOME.set(Some(Home { kept: home.map_or(0, |home| home.kept) + 1, ..made }));
        Ok(Self { path, number, home: made, len_bytes })
    }

    /// Bytes that were asked for.
    pub const fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Copies `from` in at `offset_bytes`.
    ///
    /// # Errors
    /// [`FreshCallError::LoanLost`]; [`FreshCallError::Other`]: beyond the end, or on a carried call.
    pub fn write(&self, offset_bytes: usize, from: &[u8]) -> Result<(), FreshCallError> {
        self.check(offset_bytes, from.len())?;
        for (index, piece) in from.chunks(PIECE).enumerate() {
            self.with(|buffer| buffer.write(offset_bytes + index * PIECE, piece))?;
        }
        Ok(())
    }

    /// Copies `into.len()` bytes out from `offset_bytes`: what was written, for the domain can't write it.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn read(&self, offset_bytes: usize, into: &mut [u8]) -> Result<(), FreshCallError> {
        self.check(offset_bytes, into.len())?;
        for (index, piece) in into.chunks_mut(PIECE).enumerate() {
            self.with(|buffer| buffer.read(offset_bytes + index * PIECE, piece))?;
        }
        Ok(())
    }

    /// A part of it, to be lent alone.
    ///
    /// # Errors
    /// [`FreshCallError::Other`]: beyond the end.
    pub fn part(&self, offset_bytes: usize, len_bytes: usize) -> Result<Lending<'_>, FreshCallError> {
        self.check(offset_bytes, len_bytes)?;
        Ok(Lending::elsewhere(self, offset_bytes, len_bytes))
    }

    fn check(&self, offset_bytes: usize, len_bytes: usize) -> Result<(), FreshCallError> {
        match offset_bytes.checked_add(len_bytes) {
            Some(end) if end <= self.len_bytes => Ok(()),
            _ => Err(FreshCallError::Other(format!(
                "{len_bytes} bytes from {offset_bytes} of a loan that has {}",
                self.len_bytes
            ))),
        }
    }

    /// Does something with the memory where it is. `f` neither allocates nor waits.
    fn with(&self, f: impl FnOnce(&Buffer) -> Result<(), CallError>) -> Result<(), FreshCallError> {
        at_home(Some(self.home), || {
            // SAFETY: on a node, in a section: the scheduler, which is all that changes them, does not run.
            let buffer = unsafe { flights::lent(local(), self.number) }.ok_or(FreshCallError::LoanLost)?;
            f(buffer).map_err(|_| FreshCallError::LoanLost)
        })?
    }

    pub(super) const fn number(&self) -> u64 {
        self.number
    }

    pub(super) const fn home(&self) -> Home {
        self.home
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn on_a_carried_call() -> FreshCallError {
    FreshCallError::Other("a loan is made and used outside of carried calls".to_owned())
}

/// Runs `f` in a section of the running thread; where its loans are, and in the life that they were made in, if it has any.
fn at_home<R>(home: Option<Home>, f: impl FnOnce() -> R) -> Result<R, FreshCallError> {
    sched::in_thread(|_| {
        if let Some(home) = home {
            // In another life there may be no such node.
            if life() != home.life {
                return Err(FreshCallError::LoanLost);
            }
            // SAFETY: in a section; the node was there, or one of its number is.
            unsafe {
                if is_domain(carrier().node) {
                    return Err(on_a_carried_call());
                }
                // On its way it may be moved on, before it runs there; or go back to an image.
                while carrier().node != home.node {
                    go_to(home.node);
                    if life() != home.life {
                        return Err(FreshCallError::LoanLost);
                    }
                }
            }
        }
        Ok(f())
    })
    .unwrap_or(Err(FreshCallError::NoThread))
}

/// Asks the node, this one or where the loans are; its answer, and where and when that was.
pub(super) fn ask_at(home: Option<Home>, request: &Request) -> Result<(Vec<u8>, Home), FreshCallError> {
    loop {
        let (bytes, asked) = at_home(home, || {
            // SAFETY: in a section of the running thread, which stays here until it is answered, in this life or not at all.
            unsafe {
                let c = carrier();
                let asked = Home { life: life(), node: c.node, kept: 0 };
                ask(c.current.load(Ordering::Relaxed), request).map(|bytes| (bytes, asked))
            }
        })??;
        match bytes.first() {
            Some(&DONE) => return Ok((bytes, asked)),
            Some(&AGAIN) => {}
            Some(&FAILED) => {
                return Err(postcard::from_bytes(&bytes[1..])
                    .unwrap_or_else(|e| FreshCallError::Other(format!("an unreadable error: {e}"))));
            }
            _ => return Err(FreshCallError::Other("an outcome of no kind".to_owned())),
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(home) = HOME.get().filter(|home| home.life == self.home.life) {
            HOME.set(Some(Home { kept: home.kept.saturating_sub(1), ..home }));
        }
        let portal = Portal::new(&self.path, "", 0);
        // One that is lost is gone already.
        let _ = ask_at(Some(self.home), &Request::of(&portal, What::Return(self.number)));
    }
}

impl<'a> From<&'a Loan> for Lending<'a> {
    fn from(loan: &'a Loan) -> Self {
        Self::elsewhere(loan, 0, loan.len_bytes)
    }
}

impl fmt::Debug for Loan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Loan({}, {} bytes)", self.path.display(), self.len_bytes)
    }
}
