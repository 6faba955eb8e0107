//! Our fresh call, in its forms.
//!
//! | way | argument | callee |
//! |---|---|---|
//! | in | copied into the line or a buffer | works on the domain's private copy |
//! | lend | built in a buffer that both map | reads it in place |
//! | static thread | as in | a static server thread: the activation hands the call over and waits for it |
//!
//! The last is the paper's own comparison: everything is the same but that the caller's thread does not go on in the domain.

use super::subject::{Bytes, Caller, Server, digest, server};
use super::ways::Cores;
use peregrine_call::{
    Affinity, Attributes, Buffer, Call, Client, Domain, DomainBuilder, Failure, Invocation, Limits, PortalId,
    socket_pair,
};
use peregrine_sys::process::{CpuSet, pin_to_cpu};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Arguments above the default limit would be refused.
const ROOM: usize = 64 << 20;

/// The nice value of a caller that lends its activation a priority.
pub const URGENT: i32 = -5;

/// What the portal does, and where.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    In,
    Lend,
    StaticThread,
}

/// Where client and activation run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// As a call does by default: the activation comes to the caller's core.
    Default,
    /// On another core, which both keep awake for a moment.
    Apart,
}

/// The portal of who is lent its argument.
fn digest_lent(call: &mut Invocation<'_>) -> Result<(), Failure> {
    if call.is_empty() {
        return Ok(());
    }
    let lent = call.lent(0)?;
    let mut sum = 0u64;
    for page in (0..lent.len_bytes()).step_by(4096) {
        sum = sum.wrapping_add(lent.load_u64(page)?);
    }
    call.output(1)?.extend_from_slice(&sum.to_ne_bytes());
    Ok(())
}

/// The portal of who has a copy of its argument.
fn digest_copied(call: &mut Invocation<'_>) -> Result<(), Failure> {
    if call.is_empty() {
        return Ok(());
    }
    let sum = digest(call.input(0)?);
    call.output(1)?.extend_from_slice(&sum.to_ne_bytes());
    Ok(())
}

/// A request to the static thread, and the way back. The bytes stay the activation's, which waits meanwhile.
struct Request {
    bytes: *const [u8],
    answer: SyncSender<u64>,
}

// SAFETY: the activation that owns the bytes waits for the answer before it touches them.
unsafe impl Send for Request {}

fn with_static_thread(builder: DomainBuilder) -> DomainBuilder {
    let (to, requests): (SyncSender<Request>, Receiver<Request>) = sync_channel(16);
    std::thread::spawn(move || {
        for request in requests {
            // SAFETY: see `Request`.
            let _ = request.answer.send(digest(unsafe { &*request.bytes }));
        }
    });
    let to = Mutex::new(to);
    builder.portal("digest", 1, move |call: &mut Invocation<'_>| {
        let bytes = if call.is_empty() { &[][..] } else { call.input(0)? };
        let (answer, answered) = sync_channel(1);
        let to = to.lock().map_err(|_| Failure::new(1, *b"lock"))?.clone();
        to.send(Request { bytes, answer }).map_err(|_| Failure::new(1, *b"gone"))?;
        let sum = answered.recv().map_err(|_| Failure::new(1, *b"gone"))?;
        if !call.is_empty() {
            call.output(1)?.extend_from_slice(&sum.to_ne_bytes());
        }
        Ok(())
    })
}

/// Serves the portal `digest` on a socket of a pair, for ever.
pub fn serve(socket: std::os::fd::OwnedFd, form: Form, limits: Limits) {
    // Nothing is adopted of a caller that does not ask for it.
    let builder = Domain::builder().name("bench").activations(2).limits(limits).most_urgent_nice(URGENT);
    let builder = match form {
        Form::StaticThread => with_static_thread(builder),
        Form::In => builder.portal("digest", 1, digest_copied),
        Form::Lend => builder.portal("digest", 1, digest_lent),
    };
    let builder = builder.portal("clock", 1, |call: &mut Invocation<'_>| {
        let used_ns = peregrine_sys::timer::thread_cpu_ns();
        call.output(0)?.extend_from_slice(&used_ns.to_ne_bytes());
        Ok(())
    });
    let _domain = builder.serve_pair(socket).expect("a domain");
    loop {
        std::thread::park();
    }
}

/// The client's side.
pub struct Ours {
    client: Client,
    portal: PortalId,
    clock: PortalId,
    attributes: Attributes,
    own: Vec<u8>,
    lent: Option<Buffer>,
    answer: Vec<u8>,
    _server: Server,
}

impl Caller for Ours {
    fn argument(&mut self) -> Bytes<'_> {
        match &self.lent {
            Some(buffer) => {
                let at = buffer.bytes().address(0).expect("its first byte").as_ptr();
                Bytes::Shared(at, buffer.len_bytes())
            }
            None => Bytes::Own(&mut self.own),
        }
    }

    fn call(&mut self) -> u64 {
        let call = Call::new().attributes(self.attributes);
        // Each as its caller would write it: what a call holds is not moved about for the sake of the others.
        let done = match &self.lent {
            Some(buffer) => self.client.call(self.portal, call.lend(buffer).output(&mut self.answer, 8)),
            None if self.own.is_empty() => {
                self.client.call(self.portal, call).expect("a call");
                return 0;
            }
            None => self.client.call(self.portal, call.input(&self.own).output(&mut self.answer, 8)),
        };
        done.expect("a call");
        u64::from_ne_bytes(self.answer[..].try_into().expect("a word"))
    }
}

/// Starts a domain and connects to it.
pub fn start(bytes: usize, cores: Cores, form: Form, place: Place) -> Ours {
    start_with(bytes, cores, form, place, Limits::default())
}

/// As [`start`], with limits of the domain.
pub fn start_with(bytes: usize, cores: Cores, form: Form, place: Place, limits: Limits) -> Ours {
    assert!(bytes <= ROOM);
    let (ours, theirs) = cores.processors();
    let all = CpuSet::current().expect("a set of processors");
    if cores == Cores::One {
        pin_to_cpu(ours).expect("a processor");
    }
    let (socket, socket_of_domain) = socket_pair().expect("a pair of sockets");
    let server = server(theirs, move || {
        if cores == Cores::Two {
            // It may go where it will: that is for its calls to say.
            all.bind().expect("all processors");
        }
        serve(socket_of_domain, form, limits);
    });
    pin_to_cpu(ours).expect("a processor");
    let client = Client::over(socket).expect("a connection");
    let portal = client.portal("digest", 1).expect("the portal");
    let clock = client.portal("clock", 1).expect("the portal");
    let affinity = if place == Place::Apart { Affinity::Apart } else { Affinity::default() };
    let lent = (form == Form::Lend && bytes != 0).then(|| client.buffer(bytes).expect("a buffer"));
    let own = if lent.is_some() { Vec::new() } else { vec![0; bytes] };
    let attributes = Attributes { affinity, ..Attributes::default() };
    Ours { client, portal, clock, attributes, own, lent, answer: Vec::new(), _server: server }
}

impl Ours {
    /// The processor time, in ns, that the activation which serves this has used when it does.
    pub fn clock_of_activation(&mut self) -> u64 {
        let call = Call::new().attributes(self.attributes).output(&mut self.answer, 8);
        self.client.call(self.clock, call).expect("a call");
        u64::from_ne_bytes(self.answer[..].try_into().expect("a word"))
    }

    /// The same with other attributes.
    pub fn with(mut self, attributes: Attributes) -> Self {
        self.attributes = attributes;
        self
    }
}
