//! The connection's socket: everything that is not a call on an open line.
//!
//! A Unix `SOCK_SEQPACKET` socket, one small message at a time, with at most one descriptor. The client asks and the domain
//! answers in order, but for three messages without an answer: `Ring`, which says that a line without an activation has a call,
//! `Forget`, and `Lost`. The domain sends one message unasked: `Results`, the memfd with results too large for a line.
//!
//! Neither side waits for the other's buffer: what can't be sent at once from the domain closes the connection, for a client
//! that asks one question at a time always has room for the answer.

use crate::error::CallError;
use crate::strays::{self, Strays};
use peregrine_sys::rustix;
use peregrine_sys::rustix::io::Errno;
use peregrine_sys::rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Changes with every incompatible change of messages or line.
pub(crate) const PROTOCOL: u32 = 5;

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
    /// The line's memfd found no room in the client's process: the next `OpenLine` brings that line anew, and no other.
    Lost {
        line: u32,
    },
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
    BufferBytes {
        asked: u64,
        limit: u64,
    },
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

/// What came with a message.
#[derive(Debug)]
pub(crate) enum Came {
    Alone,
    With(OwnedFd),
    /// A descriptor that was sent was lost: this process has room for no more.
    Short,
}

impl Came {
    pub fn with(self) -> Option<OwnedFd> {
        match self {
            Self::With(fd) => Some(fd),
            Self::Alone | Self::Short => None,
        }
    }
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
///
/// A descriptor is memory or a pipe: a message that brings anything else, or more than one, is garbage.
pub(crate) fn receive<T: for<'de> Deserialize<'de>>(
    socket: impl AsFd,
    flags: RecvFlags,
    strays: Strays,
) -> Result<(T, Came), RecvError> {
    let mut bytes = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(strays::MOST_IN_A_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        match net::recvmsg(&socket, &mut parts, &mut control, flags | RecvFlags::CMSG_CLOEXEC) {
            // CONNRESET: the peer closed without reading all that we sent. It is told once, before what the peer had still sent.
            Err(Errno::INTR | Errno::CONNRESET) => {}
            other => break other,
        }
    };
    let (len, is_short) = match got {
        Ok(got) => (got.bytes, got.flags.contains(ReturnFlags::CTRUNC)),
        Err(Errno::AGAIN) => return Err(RecvError::Nothing),
        Err(Errno::PIPE) => return Err(RecvError::Closed),
        Err(e) => return Err(RecvError::Kernel(e)),
    };
    let (mut sent, mut astray) = (None, Vec::new());
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            for fd in fds {
                if sent.is_none() && strays::closes_at_once(&fd) {
                    sent = Some(fd);
                } else {
                    astray.push(fd);
                }
            }
        }
    }
    if !astray.is_empty() {
        strays.take(astray);
        return Err(RecvError::Garbage);
    }
    if len == 0 {
        return Err(RecvError::Closed);
    }
    let message = postcard::from_bytes(bytes.get(..len).ok_or(RecvError::Garbage)?);
    // There is room for as many as a message brings, so nothing else cuts them off.
    let came = match sent {
        Some(fd) => Came::With(fd),
        None if is_short => Came::Short,
        None => Came::Alone,
    };
    message.map(|m| (m, came)).map_err(|_| RecvError::Garbage)
}

/// Ends a connection on both sides, and leaves nothing in it that could make its closing block.
pub(crate) fn hang_up(socket: impl AsFd, strays: Strays) {
    let _ = net::shutdown(&socket, net::Shutdown::Both);
    strays::empty(&socket, strays);
}

/// A socket of this protocol's kind.
pub(crate) fn new_socket() -> Result<OwnedFd, Errno> {
    net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
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
        let memory = crate::shared::sealed_memfd(c"test", 4096).unwrap();
        send(&a, &sent, Some(memory.as_fd())).unwrap();
        let (got, fd) = receive::<FromClient>(&b, RecvFlags::empty(), Strays::Thread).unwrap();
        assert_eq!(got, sent);
        assert!(matches!(fd, Came::With(_)));
        assert!(matches!(
            receive::<FromClient>(&b, RecvFlags::DONTWAIT, Strays::Thread),
            Err(RecvError::Nothing)
        ));
        net::send(&a, &[255; 40], SendFlags::empty()).unwrap();
        assert!(matches!(
            receive::<FromClient>(&b, RecvFlags::empty(), Strays::Thread),
            Err(RecvError::Garbage)
        ));
        send(&a, &sent, Some(b.as_fd())).unwrap();
        assert!(
            matches!(receive::<FromClient>(&b, RecvFlags::empty(), Strays::Thread), Err(RecvError::Garbage)),
            "a socket is not memory"
        );
        drop((a, fd));
        assert!(matches!(
            receive::<FromClient>(&b, RecvFlags::empty(), Strays::Thread),
            Err(RecvError::Closed)
        ));
    }

    #[test]
    fn the_longest_name_fits_a_message() {
        let (a, _b) = pair().unwrap();
        send(&a, &FromClient::Resolve { name: "x".repeat(MAX_NAME) }, None).unwrap();
    }
}
