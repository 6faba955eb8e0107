//! Who is at the other end, by the kernel's word (`SO_PEERCRED`).

use peregrine_sys::rustix;
use std::os::fd::AsFd;

/// Process, user and group of a peer, fixed by the kernel when the connection was made.
///
/// For a client these are its credentials at `connect(2)`; a process that is handed a connected descriptor keeps
/// those of the one who connected, which is what handing it over means.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Credentials {
    /// Process id, as seen from this process's namespace; 0 if it has none there.
    pub pid: u32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
}

impl Credentials {
    /// Those of the process at the other end of a Unix socket.
    pub(crate) fn of_peer(socket: impl AsFd) -> rustix::io::Result<Self> {
        let [pid, uid, gid] = peregrine_sys::peer::credentials_of(socket)
            .map_err(|e| rustix::io::Errno::from_raw_os_error(e.0))?;
        Ok(Self { pid, uid, gid })
    }
}
