//! Awaiting a call, under any executor.
//!
//! A pending call has a descriptor that becomes readable when there is an outcome. The reactor of `async-io` watches it on a thread of
//! its own, so the future does not care which executor polls it, and no thread is blocked for a call. A deadline is watched by the
//! same reactor. A future that is dropped gives its call up, as [`Pending`] does.

use crate::{CallError, Pending};
use async_io::{Async, Timer};
use std::future::Future;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

/// How long a call that is being set up is left alone at first, and in the end.
const SHORTEST: Duration = Duration::from_micros(50);
const LONGEST: Duration = Duration::from_millis(10);

impl Pending<'_> {
    /// Waits for the outcome without blocking the thread.
    ///
    /// # Errors
    /// As [`Client::call`](crate::Client::call).
    pub async fn finished(mut self) -> Result<(), CallError> {
        let mut nap = SHORTEST;
        loop {
            if let Some(outcome) = self.try_finish() {
                return outcome;
            }
            if self.is_sent() {
                break;
            }
            // Its answers may be read by whoever else asks the same domain: no descriptor tells.
            let left = self.deadline().map(|d| d.left().unwrap_or_default());
            Timer::after(left.unwrap_or(nap).min(nap)).await;
            nap = (nap * 2).min(LONGEST);
        }
        // The reactor keeps the descriptor that it watches: it gets one of its own.
        let own = self.as_fd().try_clone_to_owned().map_err(system)?;
        let readable = Async::new_nonblocking(Watched(own)).map_err(system)?;
        loop {
            // One that is still to be rung for wakes nobody.
            let most = self.owes_ring().then_some(LONGEST);
            let left = self.deadline().map_or(Self::LOOK_AGAIN, |d| d.left().unwrap_or_default());
            let timer = Timer::after(most.map_or(left, |most| left.min(most)));
            either(readable.readable(), timer).await?;
            if let Some(outcome) = self.try_finish() {
                return outcome;
            }
        }
    }
}

/// Ready when the descriptor is, or the time has come.
async fn either(
    readable: impl Future<Output = std::io::Result<()>>,
    mut timer: Timer,
) -> Result<(), CallError> {
    let mut readable = pin!(readable);
    std::future::poll_fn(|context| {
        if let Poll::Ready(r) = readable.as_mut().poll(context) {
            return Poll::Ready(r.map_err(system));
        }
        pin!(&mut timer).poll(context).map(|_| Ok(()))
    })
    .await
}

fn system(e: std::io::Error) -> CallError {
    CallError::System {
        what: "watching a call's descriptor",
        errno: peregrine_sys::raw::Errno(e.raw_os_error().unwrap_or(0)),
    }
}

#[derive(Debug)]
struct Watched(OwnedFd);

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
