//! Closing descriptors in a process of its own.
//!
//! ```text
//! this process ──fork──▶ first ──fork──▶ second: closes all but `fds`, waits
//!      │ waits for the first     exits        │
//!      │ closes `fds`: not the last copies    │
//!      └──── closes the pipe ────────────────▶ exits, and so is the last to close them
//! ```
//!
//! To close what a stranger made can take as long as he likes: a socket that lingers, a file whose server does not answer. A process with
//! threads to spare has one of them do it. One that must have no other thread leaves it to the exit of a process that has nothing else: no
//! memory (the kernel lets go of that first), no other descriptor, and nobody who waits for it. A socket's lingering is over at once
//! then, for the kernel waits for none of an exiting process.

use crate::process::exit_now;
use crate::raw::{Errno, check, syscall6};
use crate::rustix::pipe::{PipeFlags, pipe_with};
use linux_raw_sys::general as k;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// Closes `fds` and waits for none of it. They are no longer in this process's table when it returns.
///
/// # Errors
/// No process is to be had, or no descriptors for a pipe (EAGAIN, ENOMEM, EMFILE); `fds` are given back, open.
pub fn close_elsewhere(fds: Vec<OwnedFd>) -> Result<(), (Errno, Vec<OwnedFd>)> {
    if fds.is_empty() {
        return Ok(());
    }
    let (go_on, hold) = match pipe_with(PipeFlags::CLOEXEC) {
        Ok(ends) => ends,
        Err(e) => return Err((Errno(e.raw_os_error()), fds)),
    };
    // The processes made here allocate nothing: other threads of this one may hold the allocator.
    let mut kept: Vec<RawFd> = fds.iter().chain([&go_on]).map(AsRawFd::as_raw_fd).collect();
    kept.sort_unstable();
    match keep(&kept, go_on.as_raw_fd()) {
        Ok(()) => {
            drop(go_on);
            drop(fds);
            drop(hold);
            Ok(())
        }
        Err(e) => Err((e, fds)),
    }
}

/// Starts the process that keeps `kept` until everybody has closed the other end of `go_on`.
fn keep(kept: &[RawFd], go_on: RawFd) -> Result<(), Errno> {
    // SAFETY: the child makes system calls and nothing else.
    match unsafe { fork_unseen() }? {
        0 => {
            // SAFETY: as above.
            match unsafe { fork_unseen() } {
                Ok(0) => {
                    close_all_but(kept);
                    let mut byte = 0u8;
                    // SAFETY: the kernel writes one byte at most.
                    while unsafe {
                        syscall6(k::__NR_read, go_on as usize, (&raw mut byte) as usize, 1, 0, 0, 0)
                    } == -4
                    {}
                    exit_now(0)
                }
                Ok(_) => exit_now(0),
                Err(e) => exit_now(e.0),
            }
        }
        first => {
            let mut status = 0i32;
            const WALL: usize = 0x4000_0000;
            loop {
                // SAFETY: the kernel writes one word.
                let done = check(unsafe {
                    syscall6(k::__NR_wait4, first as usize, (&raw mut status) as usize, WALL, 0, 0, 0)
                });
                match done {
                    Err(Errno::EINTR) => {}
                    Err(e) => return Err(e),
                    Ok(_) => break,
                }
            }
            match status {
                0 => Ok(()),
                status if status & 0x7f == 0 => Err(Errno(status >> 8 & 0xff)),
                _ => Err(Errno::EAGAIN),
            }
        }
    }
}

/// A copy of this process that no ordinary `wait` and no SIGCHLD tells of; 0 in the copy.
///
/// # Safety
/// The copy makes system calls and nothing else: what other threads held is held in it for ever.
unsafe fn fork_unseen() -> Result<i32, Errno> {
    // SAFETY: with stack 0 and no CLONE_VM the child runs on its copy of this stack.
    check(unsafe { syscall6(k::__NR_clone, 0, 0, 0, 0, 0, 0) }).map(|pid| pid as i32)
}

/// Closes what this process does not need, so that nobody waits for the end of something because of it. `kept` is sorted.
fn close_all_but(kept: &[RawFd]) {
    let close = |from: u32, to: u32| {
        // SAFETY: this process uses none of them. Before Linux 5.9 they stay open.
        unsafe { syscall6(k::__NR_close_range, from as usize, to as usize, 0, 0, 0, 0) };
    };
    let mut next = 0;
    for &fd in kept {
        let fd = fd as u32;
        if fd > next {
            close(next, fd - 1);
        }
        next = fd + 1;
    }
    close(next, u32::MAX);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rustix;
    use std::time::{Duration, Instant};

    #[test]
    fn what_lingers_is_closed_and_nobody_waits_for_it() {
        let begun = Instant::now();
        let (slow, reader) = testkit::lingering();
        let (end, other) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (bystander, its_other) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let at = format!("/proc/self/fd/{}", end.as_raw_fd());
        let was = std::fs::read_link(&at).unwrap();
        close_elsewhere(vec![slow, end]).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(40), "it waited: {:?}", begun.elapsed());
        assert!(std::fs::read_link(&at).ok() != Some(was), "it is still here");
        // Somebody else did close it.
        loop {
            match rustix::io::write(&other, &[1]) {
                Err(rustix::io::Errno::PIPE) => break,
                _ => assert!(begun.elapsed() < Duration::from_secs(60), "it was never closed"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // The end of what it had no part in is seen.
        drop(its_other);
        assert_eq!(rustix::io::read(&bystander, &mut [0; 1]), Ok(0));
        drop(reader);
    }

    #[test]
    fn nothing_is_nothing() {
        close_elsewhere(Vec::new()).unwrap();
    }
}
