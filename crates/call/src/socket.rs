//! The connection's socket: everything that is not a call on an open line.
//!
//! A Unix `SOCK_SEQPACKET` socket, one small message at a time, with at most one descriptor. The client asks and the domain
//! answers in order, but for two messages without an answer: `Ring`, which says that a line without an activation has a call,
//! and `Forget`. The domain sends one message unasked: `Results`, the memfd with results too large for a line.
//!
//! Neither side waits for the other's buffer: what can't be sent at once from the domain closes the connection, for a client
//! that asks one question at a time always has room for the answer.

use crate::error::CallError;
use peregrine_sys::rustix;
use peregrine_sys::rustix::io::Errno;
use peregrine_sys::rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Changes with every incompatible change of messages or line.
pub(crate) const PROTOCOL: u32 = 1;

/// No message is longer.
const MAX_MESSAGE: usize = 1024;

/// The longest portal name that fits a message.
pub(crate) const MAX_NAME: usize = 200;

/// What a client says.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
pub(crate) enum FromClient {
    Hello {
        protocol: u32,
    },
    Resolve {
        name: String,
    },
    OpenLine,
    Ring {
        line: u32,
    },
    /// With a pipe's read end in the answer.
    OpenPipe {
        line: u32,
    },
    /// With the memfd. `results`: the domain writes results into it.
    AddBuffer {
        len_bytes: u64,
        results: bool,
    },
    /// With the memfd.
    AddGift {
        len_bytes: u64,
    },
    Forget {
        buffer: u32,
    },
    Usage,
}

/// What a domain says.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
pub(crate) enum FromDomain {
    Welcome {
        id: u64,
        name: String,
        calls_in_flight: u32,
        argument_bytes: u64,
    },
    Refused(Why),
    Portal {
        id: u32,
        version: u64,
    },
    /// With the memfd.
    Line {
        index: u32,
        len_bytes: u64,
    },
    /// With the read end.
    Pipe,
    Buffer {
        id: u32,
    },
    /// With the memfd, unasked.
    Results {
        line: u32,
        call: u32,
        len_bytes: u64,
    },
    Usage {
        cpu_ns: u64,
        calls: u64,
    },
}

/// Why a request was refused.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug, Clone)]
pub(crate) enum Why {
    NotAdmitted,
    Clients {
        limit: u64,
    },
    Protocol {
        theirs: u32,
    },
    NoPortal,
    Access {
        id: u32,
    },
    Lines {
        limit: u64,
    },
    Buffers {
        asked: u64,
        limit: u64,
    },
    /// A descriptor is missing, not sealed, or not of the size named.
    BadMemory,
    /// The domain lacks memory or descriptors.
    Short {
        errno: i32,
    },
    Unexpected,
}

/// Why nothing was received.
#[derive(Debug)]
pub(crate) enum RecvError {
    /// The peer is gone.
    Closed,
    /// Nothing there (yet).
    Nothing,
    /// Not a message of this protocol.
    Garbage,
    Kernel(Errno),
}

/// Sends without waiting for room.
pub(crate) fn send<T: Serialize>(
    socket: impl AsFd,
    message: &T,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let mut bytes = [0; MAX_MESSAGE];
    let bytes = postcard::to_slice(message, &mut bytes).map_err(|_| Errno::MSGSIZE)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.as_slice();
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            other => return other.map(drop),
        }
    }
}

/// Receives one message, with the descriptor that came with it; `flags` says whether to wait.
pub(crate) fn receive<T: for<'de> Deserialize<'de>>(
    socket: impl AsFd,
    flags: RecvFlags,
) -> Result<(T, Option<OwnedFd>), RecvError> {
    let mut bytes = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match net::recvmsg(&socket, &mut parts, &mut control, flags | RecvFlags::CMSG_CLOEXEC) {
            // CONNRESET: the peer closed without reading all that we sent. It is told once, before what the peer had still sent.
            Err(Errno::INTR | Errno::CONNRESET) => {}
            other => break other,
        }
    };
    let len = match got {
        Ok(got) => got.bytes,
        Err(Errno::AGAIN) => return Err(RecvError::Nothing),
        Err(Errno::PIPE) => return Err(RecvError::Closed),
        Err(e) => return Err(RecvError::Kernel(e)),
    };
    // Whatever came beyond one descriptor is closed when it is dropped here.
    let fd = control.drain().find_map(|m| match m {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if len == 0 {
        return Err(RecvError::Closed);
    }
    let message = postcard::from_bytes(bytes.get(..len).ok_or(RecvError::Garbage)?);
    message.map(|m| (m, fd)).map_err(|_| RecvError::Garbage)
}

/// A listening socket at `path`. A socket that nobody serves any more is taken over; any other file is left alone.
pub(crate) fn listen(path: &Path) -> Result<OwnedFd, crate::DomainError> {
    use crate::error::{DomainError, setup};
    let address = SocketAddrUnix::new(path).map_err(|_| DomainError::PathTooLong(path.to_owned()))?;
    let socket = new_socket().map_err(setup("socket"))?;
    match net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            if !is_stale(path, &address) {
                return Err(DomainError::PathInUse(path.to_owned()));
            }
            rustix::fs::unlink(path).map_err(setup("unlink of a stale socket"))?;
            net::bind(&socket, &address).map_err(setup("bind"))?;
        }
        other => other.map_err(setup("bind"))?,
    }
    net::listen(&socket, 1024).map_err(setup("listen"))?;
    Ok(socket)
}

/// Whether `path` is a socket that nobody listens at. Any other file, a link, and a socket that we can't ask, is somebody's.
fn is_stale(path: &Path, address: &SocketAddrUnix) -> bool {
    let is_socket = rustix::fs::lstat(path)
        .is_ok_and(|s| rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::Socket);
    // Not waiting: a listener that is stopped may have its queue full, and lives.
    let asked = || -> Result<(), Errno> {
        let socket = new_socket()?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        net::connect(&socket, address)
    };
    is_socket && asked() == Err(Errno::CONNREFUSED)
}

fn new_socket() -> Result<OwnedFd, Errno> {
    net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

fn connect_once(address: &SocketAddrUnix) -> Result<OwnedFd, Errno> {
    let socket = new_socket()?;
    net::connect(&socket, address)?;
    Ok(socket)
}

/// A connection to the socket at `path`.
pub(crate) fn connect(path: &Path) -> Result<OwnedFd, CallError> {
    let unreachable = |reason: String| CallError::Unreachable { at: path.to_owned(), reason };
    let address = SocketAddrUnix::new(path).map_err(|e| unreachable(e.to_string()))?;
    connect_once(&address).map_err(|e| unreachable(e.to_string()))
}

/// Two connected sockets, for a domain that is a child: one end is inherited.
///
/// # Errors
/// [`CallError::System`]: no descriptors left.
pub fn pair() -> Result<(OwnedFd, OwnedFd), CallError> {
    net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(crate::error::system("socketpair"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_travels_with_its_descriptor() {
        let (a, b) = pair().unwrap();
        let sent = FromClient::AddBuffer { len_bytes: 1 << 40, results: true };
        send(&a, &sent, Some(b.as_fd())).unwrap();
        let (got, fd) = receive::<FromClient>(&b, RecvFlags::empty()).unwrap();
        assert_eq!(got, sent);
        assert!(fd.is_some());
        assert!(matches!(receive::<FromClient>(&b, RecvFlags::DONTWAIT), Err(RecvError::Nothing)));
        net::send(&a, &[255; 40], SendFlags::empty()).unwrap();
        assert!(matches!(receive::<FromClient>(&b, RecvFlags::empty()), Err(RecvError::Garbage)));
        drop((a, fd));
        assert!(matches!(receive::<FromClient>(&b, RecvFlags::empty()), Err(RecvError::Closed)));
    }

    #[test]
    fn only_a_socket_that_nobody_listens_at_is_taken_over() {
        use std::os::unix::net::UnixListener;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "precious").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        let other_kind = UnixListener::bind(at("stream")).unwrap();
        for name in ["file", "link", "stream"] {
            assert!(matches!(listen(&at(name)), Err(crate::DomainError::PathInUse(_))), "{name}");
        }
        assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
        drop(other_kind);
        let living = listen(&at("stream")).unwrap();
        assert!(matches!(listen(&at("stream")), Err(crate::DomainError::PathInUse(_))));
        drop(living);
        listen(&at("stream")).unwrap();
    }

    #[test]
    fn the_longest_name_fits_a_message() {
        let (a, _b) = pair().unwrap();
        send(&a, &FromClient::Resolve { name: "x".repeat(MAX_NAME) }, None).unwrap();
    }
}
