//! The protocol once more, written against `line.rs` and `socket.rs` as a stranger would: no type of the library is used, so a peer
//! made of this can say and write anything.

#![allow(dead_code)]

use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering};
use peregrine_base::{PageCount, PageRange, Protection};
use peregrine_sys::mem::{self, MapOptions, Placement, Source};
use peregrine_sys::rustix;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

pub const CALL: usize = 0x00;
pub const WAIT: usize = 0x04;
pub const TARGET: usize = 0x40;
pub const DEADLINE: usize = 0x48;
pub const PLACE: usize = 0x60;
pub const PAYLOAD: usize = 0x68;
pub const CANCEL: usize = 0x70;
pub const REPLY: usize = 0x08;
pub const MODE: usize = 0x0c;
pub const STATUS: usize = 0x10;
pub const LENGTHS: usize = 0x18;
pub const DESCRIPTORS: usize = 0x80;
pub const PAYLOAD_AT: usize = 0x200;
pub const PARKED: u32 = 1;
/// In `TARGET`: the call has the short form, with its descriptors in `DEADLINE` and `PAYLOAD`.
pub const SHORT: u64 = 1 << 42;
/// Where the payload of a call of the short form begins.
pub const SHORT_PAYLOAD_AT: usize = 0x80;
/// Where few results lie.
pub const HERE: usize = 0x18;
/// Results are in the line.
pub const DONE: u32 = 1;
pub const DONE_HERE: u32 = 14;

#[derive(Serialize, Deserialize, Debug)]
pub enum FromClient {
    Hello { protocol: u32 },
    Resolve { name: String },
    OpenLine,
    Ring { line: u32 },
    OpenPipe { line: u32 },
    AddBuffer { len_bytes: u64, results: bool },
    AddGift { len_bytes: u64 },
    Forget { buffer: u32 },
    Usage,
    Lost { line: u32 },
}

#[derive(Serialize, Deserialize, Debug)]
pub enum FromDomain {
    Welcome { id: u64, name: String, calls_in_flight: u32, argument_bytes: u64 },
    Refused(Why),
    Portal { id: u32, version: u64 },
    Line { index: u32, len_bytes: u64 },
    Pipe,
    Buffer { id: u32 },
    Results { line: u32, call: u32, len_bytes: u64 },
    Usage { cpu_ns: u64, calls: u64 },
}

#[derive(Serialize, Deserialize, Debug)]
pub enum Why {
    NotAdmitted,
    Clients { limit: u64 },
    Protocol { theirs: u32 },
    NoPortal,
    Access { id: u32 },
    Lines { limit: u64 },
    Buffers { asked: u64, limit: u64 },
    BadMemory,
    Short { errno: i32 },
    Unexpected,
    BufferBytes { asked: u64, limit: u64 },
}

pub struct Socket(pub OwnedFd);

impl Socket {
    pub fn connect(path: &Path) -> Option<Self> {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .ok()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path).ok()?).ok()?;
        Some(Self(socket))
    }

    pub fn send_bytes(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> bool {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if fd.is_some() {
            control.push(SendAncillaryMessage::ScmRights(fd.as_slice()));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags).is_ok()
    }

    pub fn send(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> bool {
        self.send_bytes(&postcard::to_stdvec(message).unwrap(), fd)
    }

    /// The next message within `timeout`.
    pub fn receive<T: for<'de> Deserialize<'de>>(&self, timeout: Duration) -> Option<(T, Option<OwnedFd>)> {
        use rustix::event::{PollFd, PollFlags, poll};
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: timeout.as_nanos() as i64 };
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&timeout)).ok()?;
        let mut bytes = [0; 2048];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let got = rustix::net::recvmsg(&self.0, &mut parts, &mut control, flags).ok()?.bytes;
        let fd = control.drain().find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        postcard::from_bytes(&bytes[..got]).ok().map(|m| (m, fd))
    }

    pub fn ask(
        &self,
        question: &FromClient,
        fd: Option<BorrowedFd<'_>>,
    ) -> Option<(FromDomain, Option<OwnedFd>)> {
        self.send(question, fd).then(|| self.receive(Duration::from_millis(500)))?
    }
}

impl Socket {
    /// Connected, and made welcome.
    pub fn greeted(path: &Path) -> Option<Self> {
        let socket = Self::connect(path)?;
        match socket.ask(&FromClient::Hello { protocol: 5 }, None)? {
            (FromDomain::Welcome { .. }, _) => Some(socket),
            _ => None,
        }
    }

    /// A line, all of it, and its descriptor.
    pub fn open_line(&self) -> Option<(Memory, OwnedFd)> {
        match self.ask(&FromClient::OpenLine, None)? {
            (FromDomain::Line { len_bytes, .. }, Some(fd)) => {
                Some((Memory::map(&fd, len_bytes as usize)?, fd))
            }
            _ => None,
        }
    }
}

impl Socket {
    /// Hands the first line over with call number `call`, of which all else is written, and does something until the reply is there; its status.
    pub fn call(&self, line: &Memory, call: u32, mut meanwhile: impl FnMut()) -> u32 {
        line.set(CALL, call);
        let _ = peregrine_sys::futex::wake(line.word(CALL), 1);
        if line.get(MODE) != PARKED {
            self.send(&FromClient::Ring { line: 0 }, None);
        }
        let begun = Instant::now();
        while line.get(REPLY) != call {
            assert!(begun.elapsed() < Duration::from_secs(10), "no reply");
            meanwhile();
        }
        line.get(STATUS)
    }
}

/// A mapping to do anything to.
pub struct Memory(pub PageRange);

// SAFETY: reached by atomics only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn map(fd: impl AsFd, len_bytes: usize) -> Option<Self> {
        let source = Source::Shared(fd.as_fd(), PageCount::new(0));
        let pages = PageCount::for_bytes(len_bytes);
        // SAFETY: a new place disturbs nobody.
        let range = unsafe {
            mem::map(pages, Protection::ReadWrite, source, Placement::Anywhere, MapOptions::default())
        };
        range.ok().map(Self)
    }

    pub fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at + 4 <= self.0.len_bytes());
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(std::ptr::with_exposed_provenance_mut(self.0.start().as_usize() + at)) }
    }

    pub fn word64(&self, at: usize) -> &AtomicU64 {
        assert!(at + 8 <= self.0.len_bytes());
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(self.0.start().as_usize() + at)) }
    }

    pub fn set(&self, at: usize, value: u32) {
        self.word(at).store(value, Ordering::SeqCst);
    }

    pub fn set64(&self, at: usize, value: u64) {
        self.word64(at).store(value, Ordering::SeqCst);
    }

    pub fn get(&self, at: usize) -> u32 {
        self.word(at).load(Ordering::SeqCst)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping.
        let _ = unsafe { mem::unmap(self.0) };
    }
}
