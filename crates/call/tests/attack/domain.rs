//! Domains that do what no library would, against a client that uses this one.
//!
//! The oracle: each call ends, with some answer, and its caller sleeps no longer than its deadline allows; who waits for nothing does not sleep; no
//! result is longer than was declared; the client's process lives (a SIGBUS or a bad pointer would end it), and keeps no descriptor and no mapping of
//! a connection that it dropped.
//!
//! Sleep is what is left of the time when running and waiting for a core are taken away, so a busy machine makes it no longer (`Asleep`).

use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_call::chain::Caller;
use peregrine_call::{Affinity, Call, CallError, Client, Deadline, Gift, Pending};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::{futex, memfd, rustix};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use testkit::Rng;

use super::raw::{
    CALL, DONE, DONE_HERE, FromClient, FromDomain, HERE, LENGTHS, MODE, Memory, PAYLOAD_AT, REPLY, STATUS,
    Socket,
};

const LINE_BYTES: usize = 32 * 1024;

/// What sort of line memory a hostile domain hands out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LineKind {
    Right,
    Unsealed,
    Short,
    NotMemory,
    Missing,
}

fn line_memory(kind: LineKind) -> Option<OwnedFd> {
    use rustix::fs::SealFlags;
    let make = |bytes| {
        memfd::create(c"peregrine-line", peregrine_base::PageCount::for_bytes(bytes), memfd::Pages::Base)
    };
    match kind {
        LineKind::Missing => None,
        LineKind::NotMemory => tempfile::tempfile().ok().map(|f| {
            f.set_len(LINE_BYTES as u64).unwrap();
            f.into()
        }),
        LineKind::Unsealed => make(LINE_BYTES).ok(),
        LineKind::Short | LineKind::Right => {
            let fd = make(if kind == LineKind::Short { 4096 } else { LINE_BYTES }).ok()?;
            memfd::seal(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).ok()?;
            Some(fd)
        }
    }
}

/// Listens, and treats each client badly. `first` is what lines are at first; later ones are random.
pub fn hostile(path: &Path, seed: u64, first: Option<LineKind>) -> i32 {
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 16).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            process::die_with_parent();
            let mut rng = Rng::new(seed);
            while let Ok(socket) = rustix::net::accept(&listener) {
                mistreat(&Socket(socket), &mut rng, first);
            }
            process::exit_now(0);
        }
    }
}

fn mistreat(socket: &Socket, rng: &mut Rng, first: Option<LineKind>) {
    let mut lines: Vec<Memory> = Vec::new();
    let mut loot: Vec<OwnedFd> = Vec::new();
    let mut quiet = 0;
    while quiet < 200 {
        if let Some((message, fd)) = socket.receive::<FromClient>(Duration::from_micros(200)) {
            quiet = 0;
            if let Some(fd) = fd {
                examine(&fd);
                loot.push(fd);
            }
            if !answer(socket, rng, first, message, &mut lines) {
                return;
            }
        } else {
            quiet += 1;
        }
        for (index, line) in lines.iter().enumerate() {
            reply(socket, rng, index as u32, line, first.is_none());
        }
        if first.is_none() && rng.below(3000) == 0 {
            return;
        }
    }
}

/// What a domain may try with what it is given: nothing of it may work that hurts the client.
fn examine(fd: &OwnedFd) {
    assert!(rustix::fs::ftruncate(fd, 0).is_err(), "a client's memory could be truncated");
    let stat = rustix::fs::fstat(fd).unwrap();
    assert_eq!(stat.st_mode & 0o777, 0o600);
    let name = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(fd))).unwrap();
    let name = name.to_string_lossy().into_owned();
    assert!(name.contains("peregrine-buffer") || name.contains("peregrine-gift"), "{name}");
}

fn answer(
    socket: &Socket,
    rng: &mut Rng,
    first: Option<LineKind>,
    message: FromClient,
    lines: &mut Vec<Memory>,
) -> bool {
    let wild = first.is_none() && rng.below(8) == 0;
    if wild {
        let n = rng.next_u64();
        match rng.below(7) {
            0 => {
                let bytes: Vec<u8> = (0..rng.below(40)).map(|_| rng.next_u64() as u8).collect();
                socket.send_bytes(&bytes, None);
            }
            1 => drop(socket.send(&FromDomain::Pipe, None)),
            2 => drop(socket.send(&FromDomain::Buffer { id: n as u32 }, None)),
            3 => drop(socket.send(&FromDomain::Results { line: 0, call: n as u32 % 4, len_bytes: n }, None)),
            4 => drop(socket.send(&FromDomain::Portal { id: n as u32, version: 1 }, None)),
            5 => {}
            _ => return false,
        }
        return true;
    }
    match message {
        FromClient::Hello { .. } => {
            let argument_bytes = if rng.below(4) == 0 { rng.next_u64() } else { 1 << 20 };
            let welcome = FromDomain::Welcome {
                id: 1,
                name: "hostile".into(),
                calls_in_flight: 1 + rng.below(4) as u32,
                argument_bytes,
            };
            socket.send(&welcome, None);
        }
        FromClient::Resolve { .. } => drop(socket.send(&FromDomain::Portal { id: 0, version: 1 }, None)),
        FromClient::OpenLine => {
            let kinds = [
                LineKind::Right,
                LineKind::Right,
                LineKind::Right,
                LineKind::Unsealed,
                LineKind::Short,
                LineKind::NotMemory,
                LineKind::Missing,
            ];
            let kind = first.unwrap_or_else(|| kinds[rng.below(kinds.len())]);
            let fd = line_memory(kind);
            if kind == LineKind::Right {
                lines.extend(fd.as_ref().and_then(|fd| Memory::map(fd, LINE_BYTES)));
            }
            let len_bytes =
                if first.is_none() && rng.below(5) == 0 { rng.next_u64() } else { LINE_BYTES as u64 };
            let index = if first.is_none() { rng.below(3) as u32 } else { 0 };
            socket.send(&FromDomain::Line { index, len_bytes }, fd.as_ref().map(AsFd::as_fd));
            if kind == LineKind::Unsealed
                && first.is_none()
                && let Some(fd) = fd
            {
                // The classic: hand it over, then pull it away. Not if it is to be refused by its looks.
                let _ = rustix::fs::ftruncate(&fd, 0);
            }
        }
        FromClient::OpenPipe { .. } => {
            let pipe = rustix::pipe::pipe().ok();
            socket.send(&FromDomain::Pipe, pipe.as_ref().map(|p| p.0.as_fd()));
        }
        FromClient::AddBuffer { .. } | FromClient::AddGift { .. } => {
            socket.send(&FromDomain::Buffer { id: rng.next_u64() as u32 }, None);
        }
        FromClient::Usage => drop(socket.send(&FromDomain::Usage { cpu_ns: 1, calls: 1 }, None)),
        FromClient::Ring { .. } | FromClient::Forget { .. } | FromClient::Lost { .. } => {}
    }
    true
}

/// Replies to whatever call is on the line, with whatever comes to mind.
fn reply(socket: &Socket, rng: &mut Rng, index: u32, line: &Memory, wild: bool) {
    let call = line.get(CALL);
    if call == line.get(REPLY) {
        return;
    }
    if !wild {
        line.set(STATUS, 1);
    } else {
        for _ in 0..rng.below(40) {
            let at = 8 * rng.below(PAYLOAD_AT / 8 + 100);
            line.set64(at, rng.next_u64());
        }
        line.set(STATUS, rng.below(16) as u32);
        for i in 0..8 {
            let len = match rng.below(4) {
                0 => u32::MAX,
                1 => rng.next_u64() as u32,
                _ => rng.below(100) as u32,
            };
            line.set(LENGTHS + 4 * i, len);
        }
        if rng.below(3) == 0 {
            let kind = if rng.below(2) == 0 { LineKind::Right } else { LineKind::Unsealed };
            if let Some(fd) = line_memory(kind) {
                let len_bytes = if rng.below(2) == 0 { rng.next_u64() } else { LINE_BYTES as u64 };
                socket.send(&FromDomain::Results { line: index, call, len_bytes }, Some(fd.as_fd()));
                let _ = rustix::fs::ftruncate(&fd, 0);
            }
        }
        if rng.below(4) == 0 {
            // Few results, of any lengths.
            line.set64(
                STATUS,
                u64::from(DONE_HERE) | rng.next_u64() << 32 & [u64::MAX, 0x0f0f_0f0f << 32][rng.below(2)],
            );
        } else if rng.below(3) == 0 {
            // Nearly right.
            line.set(STATUS, 1);
            for i in 0..8 {
                line.set(LENGTHS + 4 * i, [0, 40, 30, 0, 0, 0, 0, 0][i]);
            }
        }
        if rng.below(10) == 0 {
            return;
        }
    }
    line.set(REPLY, call);
    if rng.below(4) > 0 || !wild {
        let _ = futex::wake(line.word(REPLY), u32::MAX);
    }
    if wild && rng.below(2) == 0 {
        // And change it all while the client copies.
        for _ in 0..200 {
            line.set(LENGTHS + 4 * rng.below(8), rng.next_u64() as u32);
            line.set(STATUS, rng.below(16) as u32);
        }
    }
}

pub fn holdings() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mappings = maps.lines().filter(|l| l.contains("peregrine-")).count();
    (std::fs::read_dir("/proc/self/fd").unwrap().count(), mappings)
}

/// What a caller may oversleep: a timer of the kernel's, an account that is a tick behind, a lock that somebody holds.
const A_LITTLE: Duration = Duration::from_millis(50);

/// How often somebody slept for longer than that beyond what was allowed.
static OVERSLEPT: AtomicUsize = AtomicUsize::new(0);

/// Measures how long this thread sleeps.
struct Asleep {
    begun: Instant,
    awake: Duration,
}

impl Asleep {
    fn begin() -> Self {
        Self { begun: Instant::now(), awake: Self::awake() }
    }

    /// For how long this thread has run, or waited for a core to run on.
    fn awake() -> Duration {
        let accounts = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        let waited: u64 = accounts.split(' ').nth(1).unwrap().parse().unwrap();
        Duration::from_nanos(peregrine_sys::timer::thread_cpu_ns() + waited)
    }

    /// It has slept, for no longer than `allowed`; if it has not, that is counted, and told.
    fn end(self, allowed: Duration, what: &dyn std::fmt::Debug) {
        let took = self.begun.elapsed();
        let slept = took.saturating_sub(Self::awake().saturating_sub(self.awake));
        assert!(slept < allowed + Duration::from_secs(10), "it hangs: asleep for {slept:?}: {what:?}");
        if slept > allowed + A_LITTLE {
            println!("asleep for {slept:?} of {took:?}, {allowed:?} allowed: {what:?}");
            OVERSLEPT.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// One connection's worth of calls; how many ended in which way.
pub fn use_it(path: &Path, rng: &mut Rng) -> [usize; 3] {
    let mut ended = [0; 3];
    let Ok(client) = Client::connect(path) else { return ended };
    let Ok(portal) = client.portal("anything", 1) else { return ended };
    let mut buffer = None;
    for _ in 0..30 {
        let len = [0, 10, 3000, 40_000][rng.below(4)];
        let input = vec![3u8; len];
        let (mut out, mut inout) = (Vec::new(), vec![1; 10]);
        let bound = rng.below(200);
        let limit = Duration::from_millis(20);
        let mut call = Call::new()
            .input(&input)
            .output(&mut out, bound)
            .inout(&mut inout, 50)
            .deadline(Deadline::after(limit));
        if rng.below(4) == 0 {
            call = call.give(Gift::new(5000).unwrap());
        }
        if rng.below(4) == 0 {
            if buffer.is_none() {
                buffer = client.buffer(10_000).ok();
            }
            if let Some(buffer) = &buffer {
                call = call.lend(buffer);
            }
        }
        let asleep = Asleep::begin();
        let outcome = match rng.below(4) {
            0 => client.start(portal, call).and_then(peregrine_call::Pending::wait),
            _ => client.call(portal, call),
        };
        asleep.end(limit, &outcome);
        assert!(out.len() <= bound && inout.len() <= 50, "results beyond what was declared");
        match outcome {
            Ok(()) => ended[0] += 1,
            Err(CallError::Deadline) => ended[1] += 1,
            Err(CallError::DomainDied) => return ended,
            Err(_) => ended[2] += 1,
        }
    }
    ended
}

/// Asks until there is an outcome, or nobody cares any more.
fn ask<T>(rng: &mut Rng, time: Duration, mut question: impl FnMut() -> Option<T>) -> Option<T> {
    let begun = Instant::now();
    while begun.elapsed() < time && rng.below(500) > 0 {
        let asleep = Asleep::begin();
        let answer = question();
        asleep.end(Duration::ZERO, &"a question that waits for nothing");
        if answer.is_some() {
            return answer;
        }
        std::thread::sleep(Duration::from_micros(20));
    }
    None
}

/// As [`use_it`], by the way of those who wait for nothing: what is asked for, offered and called is looked at again and again, some calls
/// are under way at once, and any of it may be dropped at any moment.
pub fn poll_it(path: &Path, rng: &mut Rng) -> [usize; 3] {
    const AT_ONCE: usize = 4;
    let mut ended = [0; 3];
    let time = Duration::from_millis(20);
    let Ok(mut opening) = Client::open(path, time) else { return ended };
    let Some(Ok(client)) = ask(rng, time, || opening.try_finish()) else { return ended };
    let Ok(mut finding) = client.look_for("anything", 1) else { return ended };
    let Some(Ok(portal)) = ask(rng, time, || finding.try_finish()) else { return ended };
    for _ in 0..8 {
        let mut lent = None;
        if rng.below(3) == 0
            && let Ok(mut offering) = client.offer(10_000)
        {
            lent = ask(rng, time, || offering.try_finish()).and_then(Result::ok);
        }
        let input = vec![3u8; [0, 10, 3000, 40_000][rng.below(4)]];
        let bounds: [usize; AT_ONCE] = core::array::from_fn(|_| rng.below(200));
        let mut results: [_; AT_ONCE] = core::array::from_fn(|_| (Vec::new(), vec![1; 10]));
        let mut calls: Vec<Pending<'_>> = Vec::new();
        for ((out, inout), bound) in results.iter_mut().zip(bounds) {
            let affinity = [Affinity::Together, Affinity::Apart, Affinity::Anywhere][rng.below(3)];
            let mut call = Call::new().input(&input).output(out, bound).inout(inout, 50).affinity(affinity);
            if rng.below(2) == 0 {
                call = call.deadline(Deadline::after(time));
            }
            if rng.below(4) == 0 {
                call = call.give(Gift::new(5000).unwrap());
            }
            if let Some(lent) = &lent {
                call = call.lend(lent);
            }
            let begun = match rng.below(3) {
                0 => client.start_at_once(Caller::current(), portal, call).and_then(|begun| match begun {
                    Ok(pending) => Ok(pending),
                    Err(call) => client.start_for(Caller::current(), portal, call),
                }),
                1 => client.start_for(Caller::current(), portal, call),
                _ => client.begin(portal, call),
            };
            calls.extend(begun.inspect_err(|_| ended[2] += 1));
        }
        let mut died = false;
        while let Some(mut pending) = calls.pop() {
            match ask(rng, 2 * time, || pending.try_finish()) {
                Some(Ok(())) => ended[0] += 1,
                None | Some(Err(CallError::Deadline)) => ended[1] += 1,
                Some(Err(e)) => {
                    ended[2] += 1;
                    died |= e == CallError::DomainDied;
                }
            }
        }
        drop(calls);
        for ((out, inout), bound) in results.iter().zip(bounds) {
            assert!(out.len() <= bound && inout.len() <= 50, "results beyond what was declared");
        }
        if died {
            break;
        }
    }
    ended
}

/// A domain that answers each call at once, with results of any lengths and bits, most of them few; so its callers are hot.
pub fn forger(path: &Path, seed: u64) -> i32 {
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 16).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            process::die_with_parent();
            let mut rng = Rng::new(seed);
            let socket = Socket(rustix::net::accept(&listener).unwrap());
            let mut lines: Vec<Memory> = Vec::new();
            loop {
                if let Some((message, _)) = socket.receive::<FromClient>(Duration::ZERO) {
                    answer(&socket, &mut rng, Some(LineKind::Right), message, &mut lines);
                }
                for line in &lines {
                    // Awake: the client need not ring.
                    line.set(MODE, 2);
                    for _ in 0..1000 {
                        let call = line.get(CALL);
                        if call != line.get(REPLY) {
                            for at in (HERE..HERE + 40).step_by(8) {
                                line.set64(at, rng.next_u64());
                            }
                            let lengths =
                                rng.next_u64() & [u64::MAX, 0x0f0f_0f0f, 0x0a00, 0x2800][rng.below(4)];
                            line.set64(STATUS, u64::from(DONE_HERE) | lengths << 32);
                            if rng.below(3) == 0 {
                                // In the client's half; the last of them beyond its end, and beyond any.
                                line.set(STATUS, DONE);
                                let last = [rng.below(60), LINE_BYTES, u32::MAX as usize][rng.below(3)];
                                for (i, len) in [0, rng.below(12), last].into_iter().enumerate() {
                                    line.set(LENGTHS + 4 * i, len as u32);
                                }
                            }
                            line.set(REPLY, call);
                            let _ = futex::wake(line.word(REPLY), 1);
                        }
                    }
                }
            }
        }
    }
}

/// Waits until this process holds what it held before, but for the set of descriptors by which domains are watched, which stays.
fn back_to(before: (usize, usize), what: &str) {
    let begun = Instant::now();
    loop {
        let now = holdings();
        if now.1 == before.1 && (before.0..=before.0 + 1).contains(&now.0) {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "{what} left something: {before:?} became {now:?}"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Uses a hostile domain for a while, connection after connection.
pub fn fuzz(seed: u64, time: Duration) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let pid = hostile(&path, seed, None);
    let mut rng = Rng::new(!seed);
    let before = holdings();
    let mut ended = [[0; 3]; 2];
    let begun = Instant::now();
    let mut connections = 0;
    while begun.elapsed() < time {
        let now = [use_it, poll_it][connections % 2](&path, &mut rng);
        ended[connections % 2].iter_mut().zip(now).for_each(|(sum, n)| *sum += n);
        back_to(before, &format!("seed {seed:#x}, connection {connections}"));
        connections += 1;
    }
    for (how, [returned, late, wrong]) in ["who waits", "who waits for nothing"].iter().zip(ended) {
        println!("calls of {how}: {returned} returned, {late} late, {wrong} with other errors");
    }
    println!("{connections} connections");
    let calls: usize = ended.iter().flatten().sum();
    // A host that stops this machine for a moment does so now and then; who waits where it should not does so again and again.
    let overslept = OVERSLEPT.swap(0, Ordering::Relaxed);
    assert!(overslept <= 2 + calls / 1000, "seed {seed:#x}: {overslept} of {calls} calls slept for too long");
    let reached = |what: usize| ended.iter().map(|by| by[what]).sum::<usize>() > 0;
    assert!((0..3).all(reached), "the fuzzer reaches all of them: {ended:?}");
    assert!(ended.iter().all(|by| by.iter().sum::<usize>() > 0), "in both ways: {ended:?}");
    super::scene::kill(pid);
}
