//! Closing descriptors in processes of their own.
//!
//! ```text
//! this process ─▶ keeper: a copy of the table, of which it closes all but `fds`; waits for the others, and exits
//!              └▶ closer: shares the table; closes `fds` there, which are not the last copies, and exits
//!              └▶ sweeper, if it is known who outlives all that share the table: waits for the closer, or for that one; then closes the rest
//! ```
//!
//! To close what a stranger made can take as long as he likes, in two ways. The last copy is *released*: a socket that lingers waits then for a
//! reader. And each copy is *flushed*: a file whose server, in user space, does not answer keeps whoever closes it, deaf to all signals. A process
//! with threads to spare has one of them do it. One that must have no other thread leaves it to two processes that have nothing else to do.
//!
//! The keeper has the last copies, no memory when it exits (the kernel lets go of that first), and no other descriptor; and the kernel lingers
//! for none of an exiting process. The closer can be held up by a server only, for as long as that lives.
//!
//! **Held beyond the end of all others that share the table**, the closer would keep open what else is in it: nobody but who shares a table can
//! take anything out of it, and the kernel lets whoever does that wait for the server. So others would wait for the end of a pipe, or find a lock
//! taken, long after the last who used them. Where one process is known to outlive all others of the table ([`Table::EndsWithParent`]), the
//! sweeper closes all but `fds` when that one ends. What the closer still keeps is its copy of this process's memory.

use crate::descriptors::{PROGRAMS_BELOW, out_of_the_way};
use crate::process::{exit_now, parent_pid, set_name};
use crate::raw::{Errno, check, syscall6};
use crate::rustix::event::{PollFd, PollFlags, poll};
use crate::rustix::io::fcntl_dupfd_cloexec;
use crate::rustix::pipe::{PipeFlags, pipe_with};
use linux_raw_sys::general as k;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

/// What the processes made here are called, in `/proc/PID/comm`: who looks for a program's processes can tell them from others.
pub const NAME: &core::ffi::CStr = c"closes-files";

/// Until when the table of the calling process is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Table {
    /// Nobody says.
    #[default]
    EndsSometime,
    /// Until the parent of the calling process ends: all that share the table end with it (`PR_SET_PDEATHSIG`).
    EndsWithParent,
}

/// Has `fds` closed, and waits for none of it. They leave this process's table soon after.
///
/// # Errors
/// No processes are to be had, or no descriptors for a pipe (EAGAIN, ENOMEM, EMFILE); `fds` are given back, open.
pub fn close_elsewhere(fds: Vec<OwnedFd>, table: Table) -> Result<(), (Errno, Vec<OwnedFd>)> {
    if fds.is_empty() {
        return Ok(());
    }
    let (go_on, hold) = match pipe_with(PipeFlags::CLOEXEC) {
        // Whoever looks at the table meanwhile is not to take them for the program's.
        Ok((go_on, hold)) => (out_of_the_way(go_on), out_of_the_way(hold)),
        Err(e) => return Err((Errno(e.raw_os_error()), fds)),
    };
    // The processes made here allocate nothing: other threads of this one may hold the allocator.
    let mut kept: Vec<RawFd> = fds.iter().chain([&go_on]).map(AsRawFd::as_raw_fd).collect();
    kept.sort_unstable();
    let keeper = || {
        close_all_but(&kept);
        let mut byte = 0u8;
        // SAFETY: the kernel writes one byte at most.
        while unsafe {
            syscall6(k::__NR_read, go_on.as_raw_fd() as usize, (&raw mut byte) as usize, 1, 0, 0, 0)
        } == -4
        {}
    };
    if let Err(e) = start(0, keeper) {
        return Err((e, fds));
    }
    // The keeper goes when the last of these does.
    let mut numbers: Vec<RawFd> = fds.into_iter().map(IntoRawFd::into_raw_fd).collect();
    numbers.sort_unstable();
    // Open as long as `numbers` are.
    let pipe = [go_on, hold].map(IntoRawFd::into_raw_fd);
    let closer = || {
        for &fd in numbers.iter().chain(&pipe) {
            close(fd);
        }
    };
    let sweeping = match table {
        Table::EndsSometime => None,
        Table::EndsWithParent => Sweeping::new(&pipe[0]),
    };
    let started = start(k::CLONE_FILES as usize, closer);
    if started.is_ok()
        && let Some(sweeping) = sweeping
    {
        sweeping.start(&numbers);
    }
    started.map_err(|e| {
        // SAFETY: given up above, and closed by nobody.
        let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
        drop(pipe.map(own));
        (e, numbers.iter().copied().map(own).collect())
    })
}

/// What a sweeper watches. Opened here, not by the sweeper: the kernel gives the lowest number that is free, and nobody else is to see
/// that come and go.
struct Sweeping {
    /// At its end when the closer has closed the other end of the pipe.
    is_closed: OwnedFd,
    /// None if the parent has ended already.
    of_parent: Option<OwnedFd>,
}

impl Sweeping {
    /// None if there is no telling when the parent ends: then nobody sweeps. `go_on` is open.
    fn new(go_on: &RawFd) -> Option<Self> {
        // SAFETY: takes numbers.
        let of_parent = check(unsafe { syscall6(k::__NR_pidfd_open, parent_pid() as usize, 0, 0, 0, 0, 0) });
        let of_parent = match of_parent {
            // SAFETY: just opened.
            Ok(fd) => Some(out_of_the_way(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })),
            Err(Errno::ESRCH) => None,
            Err(_) => return None,
        };
        // SAFETY: open, as promised.
        let go_on = unsafe { BorrowedFd::borrow_raw(*go_on) };
        let is_closed = fcntl_dupfd_cloexec(go_on, PROGRAMS_BELOW).ok()?;
        Some(Self { is_closed, of_parent })
    }

    /// Has a process close all but `kept`, which is sorted, if the parent ends before the closer is done: nobody uses anything of the table
    /// any more. Without a process to be had, nobody does.
    fn start(self, kept: &[RawFd]) {
        let [is_closed, of_parent] =
            [Some(self.is_closed), self.of_parent].map(|fd| fd.map(IntoRawFd::into_raw_fd));
        let mine = [is_closed, of_parent].into_iter().flatten();
        let sweeper = || {
            let is_in_time =
                of_parent.zip(is_closed).is_some_and(|(parent, closed)| is_first_to_end(closed, parent));
            mine.clone().for_each(close);
            if !is_in_time {
                close_all_but(kept);
            }
        };
        if start(k::CLONE_FILES as usize, sweeper).is_err() {
            mine.for_each(close);
        }
    }
}

/// Waits until one of two is at its end; whether the first is.
fn is_first_to_end(first: RawFd, second: RawFd) -> bool {
    // SAFETY: both are this process's, which closes them afterwards.
    let [first, second] = [first, second].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
    let mut fds =
        [PollFd::from_borrowed_fd(first, PollFlags::IN), PollFd::from_borrowed_fd(second, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Err(crate::rustix::io::Errno::INTR) => {}
            Err(_) => return true,
            Ok(_) if !fds[0].revents().is_empty() => return true,
            Ok(_) if !fds[1].revents().is_empty() => return false,
            Ok(_) => {}
        }
    }
}

fn close(fd: RawFd) {
    // SAFETY: called for what nobody has any more, or the caller's own.
    unsafe { syscall6(k::__NR_close, fd as usize, 0, 0, 0, 0, 0) };
}

/// Starts a process that does something, and that nobody here needs to wait for: a child of a child, which is waited for. That one shares the
/// table whatever `flags` say, for the end of a copy of the table closes what is in it.
fn start(flags: usize, does: impl FnOnce()) -> Result<(), Errno> {
    // SAFETY: the child makes system calls and nothing else.
    match unsafe { fork_unseen(k::CLONE_FILES as usize) }? {
        0 => {
            set_name(NAME);
            // SAFETY: as above.
            match unsafe { fork_unseen(flags) } {
                Ok(0) => {
                    does();
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

/// A copy of this process that no ordinary `wait` and no SIGCHLD tells of; 0 in the copy. `flags` as of `clone(2)`.
///
/// # Safety
/// The copy makes system calls and nothing else: what other threads held is held in it for ever.
unsafe fn fork_unseen(flags: usize) -> Result<i32, Errno> {
    // SAFETY: with stack 0 and no CLONE_VM the child runs on its copy of this stack.
    check(unsafe { syscall6(k::__NR_clone, flags, 0, 0, 0, 0, 0) }).map(|pid| pid as i32)
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
        close_elsewhere(vec![slow, end], Table::EndsSometime).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(40), "it waited: {:?}", begun.elapsed());
        while std::fs::read_link(&at).ok().as_ref() == Some(&was) {
            assert!(begun.elapsed() < Duration::from_secs(50), "it is still here");
            std::thread::sleep(Duration::from_millis(1));
        }
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
        close_elsewhere(Vec::new(), Table::EndsWithParent).unwrap();
    }
}
