//! Other processes: are they alive, do they run, and a signal that can't reach the wrong one.
//!
//! A process id is used again after its process was reaped, so it names a process only together with the time of its
//! birth; a descriptor ([`Pidfd`]) names one for good. All calls here allocate nothing and touch no `errno`.

use crate::raw::{Errno, check, syscall6};
use linux_raw_sys::general as g;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What a process is doing (`/proc/PID/stat`, third field).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    /// On a processor, or ready to be.
    Running,
    /// Asleep until something happens or a signal comes.
    Sleeping,
    /// Asleep in the kernel, deaf to signals.
    Uninterruptible,
    /// Stopped by a signal or a debugger: no user instruction runs.
    Stopped,
    /// Dead; its parent may not know yet.
    Dead,
}

/// A process at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stat {
    /// What it does.
    pub condition: Condition,
    /// When it was born, in clock ticks since boot: with the process id, its name for ever.
    pub born: u64,
}

/// Looks at process `pid`. `None`: there is none, not even a zombie.
pub fn stat(pid: u32) -> Option<Stat> {
    let mut path = [0u8; 32];
    let mut len = 0;
    let mut put = |bytes: &[u8]| {
        path[len..len + bytes.len()].copy_from_slice(bytes);
        len += bytes.len();
    };
    put(b"/proc/");
    let (mut digits, mut at, mut rest) = ([0u8; 10], 10, pid);
    while at == 10 || rest != 0 {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    put(&digits[at..]);
    put(b"/stat\0");
    let mut text = [0u8; 512];
    // SAFETY: the path is NUL-terminated and live; the kernel writes at most the buffer; the descriptor is ours.
    let read = unsafe {
        let flags = (g::O_RDONLY | g::O_CLOEXEC) as usize;
        let here = g::AT_FDCWD as isize as usize;
        let fd = check(syscall6(g::__NR_openat, here, path.as_ptr() as usize, flags, 0, 0, 0)).ok()?;
        let read =
            check(syscall6(g::__NR_read, fd, text.as_mut_ptr() as usize, text.len(), 0, 0, 0)).unwrap_or(0);
        syscall6(g::__NR_close, fd, 0, 0, 0, 0, 0);
        read
    };
    parse(text.get(..read)?)
}

/// `PID (NAME) STATE PPID …`; a name may hold spaces and parentheses, so the fields are counted from the last one.
fn parse(text: &[u8]) -> Option<Stat> {
    let after = text.iter().rposition(|b| *b == b')')? + 1;
    let mut fields = text[after..].split(|b| *b == b' ').filter(|f| !f.is_empty());
    let condition = match fields.next()?.first()? {
        b'R' => Condition::Running,
        b'S' | b'I' => Condition::Sleeping,
        b'D' => Condition::Uninterruptible,
        b'T' | b't' => Condition::Stopped,
        _ => Condition::Dead,
    };
    let born = fields.nth(18)?.iter().take_while(|b| b.is_ascii_digit());
    Some(Stat { condition, born: born.fold(0, |n, d| n.wrapping_mul(10).wrapping_add(u64::from(d - b'0'))) })
}

/// A descriptor of a process: whatever becomes of its id, it names that process.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// `pidfd_open(2)`.
    ///
    /// # Errors
    /// ESRCH: no such process. EMFILE. ENOSYS: a kernel before 5.3.
    pub fn open(pid: u32) -> Result<Self, Errno> {
        // SAFETY: takes numbers; the result is a descriptor that nobody else owns.
        unsafe {
            let fd = check(syscall6(g::__NR_pidfd_open, pid as usize, 0, 0, 0, 0, 0))?;
            Ok(Self(OwnedFd::from_raw_fd(fd as i32)))
        }
    }

    /// `pidfd_send_signal(2)`.
    ///
    /// # Errors
    /// ESRCH: it is dead. EPERM: another user's.
    pub fn signal(&self, signo: i32) -> Result<(), Errno> {
        Self::signal_raw(self.0.as_raw_fd(), signo)
    }

    /// As [`Pidfd::signal`], for a descriptor kept as a number.
    ///
    /// # Errors
    /// As [`Pidfd::signal`]; EBADF: not such a descriptor.
    pub fn signal_raw(fd: RawFd, signo: i32) -> Result<(), Errno> {
        // SAFETY: no siginfo is passed; on anything but a pidfd the call fails.
        check(unsafe { syscall6(g::__NR_pidfd_send_signal, fd as usize, signo as usize, 0, 0, 0, 0) })
            .map(drop)
    }
}

/// `pidfd_getfd(2)`: a copy of descriptor number `fd` of the process behind `pidfd`, close-on-exec.
///
/// # Errors
/// EPERM: not allowed to trace that process. EBADF: it has no such descriptor, or `pidfd` is none. ESRCH: it is gone.
/// ENOSYS: a kernel before 5.6.
pub fn descriptor_of(pidfd: BorrowedFd<'_>, fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: takes numbers; the result is a descriptor that nobody else owns.
    unsafe {
        let (pidfd, fd) = (pidfd.as_raw_fd() as usize, fd as usize);
        let copy = check(syscall6(g::__NR_pidfd_getfd, pidfd, fd, 0, 0, 0, 0))?;
        Ok(OwnedFd::from_raw_fd(copy as i32))
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Pidfd> for OwnedFd {
    fn from(pidfd: Pidfd) -> Self {
        pidfd.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs_and_was_born_once() {
        let a = stat(std::process::id()).expect("a running process");
        assert_ne!(a.condition, Condition::Dead);
        assert_eq!(stat(std::process::id()).map(|s| s.born), Some(a.born));
    }

    #[test]
    fn a_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let text = b"17 (a b) c)) T 1 17 17 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 98765 2 3";
        assert_eq!(parse(text), Some(Stat { condition: Condition::Stopped, born: 98765 }));
    }

    #[test]
    fn a_stopped_child_and_a_dead_one_are_told_apart() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let pidfd = Pidfd::open(child.id()).expect("a descriptor");
        let until = |wanted: Condition| {
            for _ in 0..2000 {
                if stat(child.id()).map(|s| s.condition) == Some(wanted) {
                    return;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            panic!("not {wanted:?} but {:?}", stat(child.id()));
        };
        pidfd.signal(crate::signal::number::STOP).expect("stop");
        until(Condition::Stopped);
        pidfd.signal(crate::signal::number::KILL).expect("kill");
        until(Condition::Dead);
        child.wait().expect("reaped");
        assert_eq!(pidfd.signal(0), Err(Errno(linux_raw_sys::errno::ESRCH as i32)));
    }
}
