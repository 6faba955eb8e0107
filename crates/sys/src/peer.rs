//! The process at the other end of a Unix socket, as a descriptor.

use crate::raw::{Errno, check, syscall6};
use linux_raw_sys::general::__NR_getsockopt;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// A descriptor that becomes readable when the process that connected the other end of `socket`, or listened for it, has ended
/// (`SO_PEERPIDFD`, Linux 6.5). A hang-up says less: it waits for the last copy of the socket, wherever that is.
///
/// # Errors
/// ENOPROTOOPT: an older kernel. ESRCH, ENODATA: the process has been reaped, or there never was one. EMFILE, ENFILE.
pub fn process_of(socket: impl AsFd) -> Result<OwnedFd, Errno> {
    const SOL_SOCKET: usize = 1;
    const SO_PEERPIDFD: usize = 77;
    let mut fd = -1i32;
    let mut len = size_of::<i32>() as u32;
    // SAFETY: both pointers are live for the call and `len` is the room at the first.
    check(unsafe {
        syscall6(
            __NR_getsockopt,
            socket.as_fd().as_raw_fd() as usize,
            SOL_SOCKET,
            SO_PEERPIDFD,
            &raw mut fd as usize,
            &raw mut len as usize,
            0,
        )
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Process, user and group of whoever connected the other end of `socket`, or listened for it (`SO_PEERCRED`). The process is 0 if it
/// has no number in this process's namespace, which is why rustix's function is not used: its type of a process id can't be 0.
///
/// # Errors
/// ENOTSOCK, EBADF: not a socket.
pub fn credentials_of(socket: impl AsFd) -> Result<[u32; 3], Errno> {
    const SOL_SOCKET: usize = 1;
    const SO_PEERCRED: usize = 17;
    let mut credentials = [0u32; 3];
    let mut len = size_of_val(&credentials) as u32;
    // SAFETY: both pointers are live for the call and `len` is the room at the first: a `struct ucred`, three words.
    check(unsafe {
        syscall6(
            __NR_getsockopt,
            socket.as_fd().as_raw_fd() as usize,
            SOL_SOCKET,
            SO_PEERCRED,
            &raw mut credentials as usize,
            &raw mut len as usize,
            0,
        )
    })?;
    Ok(credentials)
}

/// Has the closing of `socket` wait for `time` at most until what was written has arrived (`SO_LINGER`).
///
/// # Errors
/// ENOTSOCK, EBADF: not a socket.
pub fn linger(socket: impl AsFd, time: std::time::Duration) -> Result<(), Errno> {
    let done = crate::rustix::net::sockopt::set_socket_linger(socket, Some(time));
    done.map_err(|e| Errno(e.raw_os_error()))
}

/// Whether the kernel answers [`process_of`].
pub fn is_supported() -> bool {
    use crate::rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    pair.is_ok_and(|(a, _b)| process_of(&a).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_other_end_of_a_pair_is_this_process() {
        use crate::rustix::process::{getegid, geteuid};
        let (a, _b) = UnixStream::pair().unwrap();
        let own = [std::process::id(), geteuid().as_raw(), getegid().as_raw()];
        assert_eq!(credentials_of(&a), Ok(own));
    }
}
