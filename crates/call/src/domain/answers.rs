//! What a client may ask of the keeper, and the answers: its portals, lines, pipes and buffers, and what it has used.
//!
//! Each question is one message, and takes a bounded time and, by the domain's limits, a bounded part of what it has. Whoever asks before it has
//! greeted, does not take its answers, or rings for nothing again and again is dismissed.

use super::Inner;
use super::peer::{Buffers, Line, Peer};
use super::pool::{BOUND, QUEUED};
use crate::line::{MAX_ARGS, PAYLOAD_AT};
use crate::memory::Lendable;
use crate::shared::{Shared, map_from_peer, sealed_memfd};
use crate::socket::{self, Came, FromClient, FromDomain, PROTOCOL, Why};
use crate::step::reach;
use peregrine_base::Protection;
use peregrine_base::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use peregrine_sys::raw::Errno;
use peregrine_sys::rustix;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

/// Rings without a call that a client may send, beyond one for each call that it made.
const RINGS_IN_VAIN: u64 = 1000;

/// How a client behaves.
#[derive(Default)]
pub(super) struct Manners {
    greeted: bool,
    in_vain: u64,
}

impl Inner {
    /// Answers one message; false if the client is to be dismissed.
    pub(super) fn answer(
        &self,
        peer: &Arc<Peer>,
        manners: &mut Manners,
        message: FromClient,
        came: Came,
    ) -> bool {
        if !manners.greeted && !matches!(message, FromClient::Hello { .. }) {
            return false;
        }
        let say = |answer: &FromDomain, fd: Option<&OwnedFd>| {
            reach("domain: answers a question");
            socket::send(&peer.socket, answer, fd.map(AsFd::as_fd)).is_ok()
        };
        let fd = match came {
            Came::With(fd) => Ok(fd),
            Came::Alone => Err(Why::BadMemory),
            Came::Short => Err(Why::Short { errno: Errno::EMFILE.0 }),
        };
        match message {
            FromClient::Hello { protocol: PROTOCOL } => {
                manners.greeted = true;
                say(
                    &FromDomain::Welcome {
                        id: self.id,
                        name: self.name.clone(),
                        calls_in_flight: self.limits.calls_in_flight as u32,
                        argument_bytes: self.limits.argument_bytes as u64,
                    },
                    None,
                )
            }
            FromClient::Hello { .. } => {
                say(&FromDomain::Refused(Why::Protocol { theirs: PROTOCOL }), None);
                false
            }
            FromClient::Resolve { name } => say(&self.resolve(peer, &name), None),
            FromClient::OpenLine => match self.open_line(peer) {
                Ok((index, fd)) => {
                    say(&FromDomain::Line { index, len_bytes: self.line_bytes() as u64 }, Some(&fd))
                }
                Err(why) => say(&FromDomain::Refused(why), None),
            },
            FromClient::Ring { line } => {
                let line = peer.lock_lines().get(line as usize).cloned();
                let useful = line.is_some_and(|line| {
                    let waits = matches!(line.binding.load(Ordering::Relaxed), QUEUED | BOUND);
                    self.pool.ring(&line) || waits
                });
                manners.in_vain += u64::from(!useful);
                manners.in_vain <= RINGS_IN_VAIN || manners.in_vain <= RINGS_IN_VAIN + peer.calls()
            }
            FromClient::OpenPipe { line } => {
                let line = peer.lock_lines().get(line as usize).cloned();
                match line.ok_or(Why::Unexpected).and_then(|line| open_pipe(&line)) {
                    Ok(read_end) => say(&FromDomain::Pipe, Some(&read_end)),
                    Err(why) => say(&FromDomain::Refused(why), None),
                }
            }
            FromClient::AddBuffer { len_bytes, results } => {
                let added = self.add_buffer(&mut peer.lock_buffers(), len_bytes, results, fd);
                say(&added.map_or_else(FromDomain::Refused, |id| FromDomain::Buffer { id }), None)
            }
            FromClient::AddGift { len_bytes } => {
                let added = self.add_gift(&mut peer.lock_buffers(), len_bytes, fd);
                say(&added.map_or_else(FromDomain::Refused, |id| FromDomain::Buffer { id }), None)
            }
            FromClient::Forget { buffer } => {
                let mut buffers = peer.lock_buffers();
                if let Some(lent) = buffers.lent.remove(&buffer) {
                    lent.forgotten.store(true, Ordering::Relaxed);
                    buffers.total_bytes -= lent.len_bytes;
                } else if let Some((_, len)) = buffers.gifts.remove(&buffer) {
                    buffers.total_bytes -= len as u64;
                }
                true
            }
            FromClient::Lost { line } => {
                if let Some(line) = peer.lock_lines().get(line as usize) {
                    line.lost.store(true, Ordering::Relaxed);
                }
                true
            }
            FromClient::Usage => {
                let cpu_ns = peer.cpu_ns.load(Ordering::Relaxed) + self.pool.live_cpu_ns(peer);
                say(&FromDomain::Usage { cpu_ns, calls: peer.calls() }, None)
            }
        }
    }

    fn resolve(&self, peer: &Peer, name: &str) -> FromDomain {
        match self.portals.iter().position(|p| p.name == name) {
            None => FromDomain::Refused(Why::NoPortal),
            Some(id) if !peer.may_call[id] => FromDomain::Refused(Why::Access { id: id as u32 }),
            Some(id) => FromDomain::Portal { id: id as u32, version: self.portals[id].version },
        }
    }

    /// Bytes of a line's memory.
    fn line_bytes(&self) -> usize {
        PAYLOAD_AT + self.limits.argument_stack_bytes.max(crate::Failure::MAX_DETAIL) + 8 * MAX_ARGS
    }

    fn open_line(&self, peer: &Arc<Peer>) -> Result<(u32, OwnedFd), Why> {
        let mut lines = peer.lock_lines();
        let limit = self.limits.calls_in_flight;
        // A client that says so of one that it uses has a new one in its place.
        let lost = lines.iter().position(|line| line.is_lost());
        if lost.is_none() && lines.len() >= limit {
            return Err(Why::Lines { limit: limit as u64 });
        }
        let short = |e: Errno| Why::Short { errno: e.0 };
        let fd = sealed_memfd(c"peregrine-line", self.line_bytes()).map_err(short)?;
        let shared = Shared::map(&fd, self.line_bytes(), Protection::ReadWrite).map_err(short)?;
        let index = lost.unwrap_or(lines.len()) as u32;
        let line = Arc::new(Line {
            peer: peer.clone(),
            index,
            shared,
            served: AtomicU32::new(0),
            calls: AtomicU64::new(0),
            binding: AtomicU32::new(0),
            lost: AtomicBool::new(false),
            pipe: Mutex::new(None),
        });
        match lost {
            Some(at) => lines[at] = line,
            None => {
                lines.push(line);
                self.lines.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok((index, fd))
    }

    fn add_buffer(
        &self,
        buffers: &mut Buffers,
        len_bytes: u64,
        results: bool,
        fd: Result<OwnedFd, Why>,
    ) -> Result<u32, Why> {
        self.check_room(buffers, len_bytes)?;
        let fd = fd?;
        let access = if results { Protection::ReadWrite } else { Protection::Read };
        let shared = map_from_peer(fd.as_fd(), len_bytes as usize, access).map_err(|e| match e {
            Errno::ENOMEM => Why::Short { errno: e.0 },
            _ => Why::BadMemory,
        })?;
        let id = buffers.number();
        buffers
            .lent
            .insert(id, Arc::new(Lendable { shared, results, len_bytes, forgotten: AtomicBool::new(false) }));
        buffers.total_bytes += len_bytes;
        Ok(id)
    }

    fn add_gift(&self, buffers: &mut Buffers, len_bytes: u64, fd: Result<OwnedFd, Why>) -> Result<u32, Why> {
        self.check_room(buffers, len_bytes)?;
        let fd = fd?;
        // What is no memory at all is not kept until a call comes for it.
        if peregrine_sys::memfd::size_if_safe(&fd).map_err(|_| Why::BadMemory)? < len_bytes {
            return Err(Why::BadMemory);
        }
        let id = buffers.number();
        buffers.gifts.insert(id, (fd, len_bytes as usize));
        buffers.total_bytes += len_bytes;
        Ok(id)
    }

    fn check_room(&self, buffers: &Buffers, len_bytes: u64) -> Result<(), Why> {
        let limits = &self.limits;
        if buffers.count() >= limits.buffers {
            return Err(Why::Buffers { asked: buffers.count() as u64 + 1, limit: limits.buffers as u64 });
        }
        let asked = buffers.total_bytes.saturating_add(len_bytes);
        if len_bytes == 0 {
            return Err(Why::BadMemory);
        }
        if asked > limits.buffer_bytes {
            return Err(Why::BufferBytes { asked, limit: limits.buffer_bytes });
        }
        Ok(())
    }
}

/// Makes the line's pipe: we keep the write end, non-blocking and nobody else's, and hand out the read end, which is
/// then the client's alone, so that it hangs up when we die.
fn open_pipe(line: &Line) -> Result<OwnedFd, Why> {
    let short = |e: rustix::io::Errno| Why::Short { errno: e.raw_os_error() };
    let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
    let (read_end, write_end) = rustix::pipe::pipe_with(flags).map_err(short)?;
    // One page is plenty for bells; less of the user's allowance is taken.
    let _ = rustix::pipe::fcntl_setpipe_size(&write_end, 4096);
    *line.pipe.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(write_end);
    Ok(read_end)
}
