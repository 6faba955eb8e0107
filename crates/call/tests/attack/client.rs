//! Clients that do what no library would, against a domain that others use.
//!
//! The oracle: an honest client's calls are right and in time throughout, handlers never see their private arguments change, the domain's
//! process lives, and when the hostile ones are gone it holds what it held before.

use peregrine_base::sync::AtomicU32;
use peregrine_call::{Call, Client, Deadline, DomainBuilder, Failure, Invocation, Limits};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::{futex, memfd, rustix};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};
use testkit::Rng;

use super::raw::{
    CALL, CANCEL, DEADLINE, DESCRIPTORS, FromClient, FromDomain, MODE, Memory, PARKED, PAYLOAD, PAYLOAD_AT,
    PLACE, REPLY, SHORT, STATUS, Socket, TARGET, WAIT,
};
use super::scene::{self, Served, serve};

/// A handler that checks that what it was given stands still, and ends the process if not, or if anything makes it panic: whatever a client
/// does, what reaches a handler was checked.
pub fn careful(call: &mut Invocation<'_>) -> Result<(), Failure> {
    let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| look_twice(call)));
    looked.unwrap_or_else(|_| process::exit_now(41))
}

fn look_twice(call: &Invocation<'_>) -> Result<(), Failure> {
    let sum = |bytes: &[u8]| bytes.iter().fold(7u64, |h, &b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    for index in 0..call.len() {
        if let Ok(bytes) = call.input(index) {
            let first = sum(bytes);
            std::thread::yield_now();
            if sum(bytes) != first {
                eprintln!("an argument changed under its handler");
                process::exit_now(42);
            }
        }
        if let Ok(lent) = call.lent(index) {
            let copy = lent.to_vec();
            assert_eq!(copy.len(), lent.len_bytes());
        }
        if let Ok(given) = call.take_given(index) {
            let first = sum(&given);
            std::thread::yield_now();
            if sum(&given) != first {
                process::exit_now(43);
            }
        }
        if let Ok(mut out) = call.output(index) {
            out.extend_from_slice(&[1; 100]);
        }
        if let Ok(mut inout) = call.inout(index) {
            let first = sum(&inout);
            std::thread::yield_now();
            if sum(&inout) != first {
                process::exit_now(47);
            }
            inout.push(1);
        }
    }
    Ok(())
}

/// What the domain under attack exports.
pub fn portals(d: DomainBuilder) -> DomainBuilder {
    let limits = Limits {
        calls_in_flight: 4,
        activations_per_client: 2,
        argument_stack_bytes: 16 * 1024,
        argument_bytes: 1 << 20,
        buffer_bytes: 4 << 20,
        buffers: 8,
        ..Limits::default()
    };
    d.activations(6)
        .limits(limits)
        .portal("echo", 1, |call: &mut Invocation<'_>| {
            let bytes = call.input(0)?;
            call.output(1)?.extend_from_slice(bytes);
            Ok(())
        })
        .portal("careful", 1, careful)
}

static NOWHERE: AtomicU32 = AtomicU32::new(0);

/// One hostile connection.
struct Hostile {
    socket: Socket,
    lines: Vec<Memory>,
    rng: Rng,
}

impl Hostile {
    fn connect(path: &Path, rng: &mut Rng) -> Option<Self> {
        let socket = Socket::greeted(path)?;
        Some(Self { socket, lines: Vec::new(), rng: Rng::new(rng.next_u64()) })
    }

    fn number(&mut self) -> u64 {
        let r = self.rng.next_u64();
        match r % 8 {
            0 => 0,
            1 => u64::MAX - (r >> 8) % 4,
            2 => u64::from(u32::MAX) - (r >> 8) % 4,
            3 => 1 << ((r >> 8) % 64),
            4 => (r >> 8) % 16,
            5 => (r >> 8) % 20_000,
            6 => 4096 * ((r >> 8) % 300),
            _ => r,
        }
    }

    fn some_fd(&mut self) -> Option<OwnedFd> {
        use rustix::fs::SealFlags;
        let pages = peregrine_base::PageCount::new(1 + self.rng.below(16));
        let file = || memfd::create(c"peregrine-hostile", pages, memfd::Pages::Base).ok();
        match self.rng.below(8) {
            0 => None,
            1 => file(),
            2 => {
                let fd = file()?;
                memfd::seal_size(&fd).ok()?;
                Some(fd)
            }
            3 => {
                let fd = file()?;
                memfd::seal(&fd, SealFlags::SHRINK | SealFlags::WRITE | SealFlags::SEAL).ok()?;
                Some(fd)
            }
            4 => rustix::pipe::pipe().ok().map(|p| p.0),
            5 => std::fs::File::open("/dev/zero").ok().map(Into::into),
            6 => std::fs::File::open("/proc/self/maps").ok().map(Into::into),
            _ => tempfile::tempfile().ok().map(Into::into),
        }
    }

    fn message(&mut self) {
        let n = self.number();
        let message = match self.rng.below(11) {
            0 => FromClient::Hello { protocol: n as u32 },
            1 => FromClient::Resolve { name: "x".repeat((n % 300) as usize) },
            2 => FromClient::OpenLine,
            3 => FromClient::Ring { line: n as u32 },
            4 => FromClient::OpenPipe { line: (n % 5) as u32 },
            5 => FromClient::AddBuffer { len_bytes: n, results: n.is_multiple_of(2) },
            6 => FromClient::AddGift { len_bytes: n },
            7 => FromClient::Forget { buffer: (n % 12) as u32 },
            8 => FromClient::Usage,
            9 => FromClient::Lost { line: (n % 5) as u32 },
            _ => {
                let bytes: Vec<u8> = (0..self.rng.below(64)).map(|_| self.rng.next_u64() as u8).collect();
                self.socket.send_bytes(&bytes, None);
                return;
            }
        };
        let fd = self.some_fd();
        self.socket.send(&message, fd.as_ref().map(AsFd::as_fd));
        // Sometimes it does not care for the answer, and lets answers pile up.
        if self.rng.below(4) > 0
            && let Some((FromDomain::Line { len_bytes, .. }, Some(fd))) =
                self.socket.receive(Duration::from_millis(5))
        {
            self.lines.extend(Memory::map(&fd, len_bytes as usize));
            // What the domain sealed stays sealed.
            assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        }
    }

    /// A call that was right once, with some words wrong.
    fn call(&mut self) {
        if self.lines.is_empty() {
            return;
        }
        let at = self.rng.below(self.lines.len());
        let args = self.rng.below(5) as u64;
        let portal = if self.rng.below(4) == 0 { self.number() } else { 1 };
        let payload = if self.rng.below(3) == 0 { self.number() } else { 4096 };
        let spill = if self.rng.below(3) == 0 { self.rng.below(12) as u64 } else { 0 };
        let depth = if self.rng.below(5) == 0 { self.number() } else { 1 };
        let count = if self.rng.below(5) == 0 { self.number() } else { args };
        let mut words = vec![
            (TARGET, portal & 0xffff_ffff | count << 32),
            (DEADLINE, if self.rng.below(4) == 0 { self.number() } else { 0 }),
            (PLACE, depth & 0xffff_ffff | (self.rng.below(3) as u64 * (7 << 32))),
            (PAYLOAD, payload & 0xffff_ffff | spill << 32),
        ];
        // The short form, nearly right or not at all.
        if self.rng.below(2) == 0 {
            let mut descriptors = || match self.rng.below(4) {
                0 => self.rng.next_u64() as u32,
                _ => (1 + self.rng.below(4) as u32) | (self.rng.below(1500) as u32) << 3,
            };
            let [a, b, c, d] = [(); 4].map(|()| u64::from(descriptors()));
            words[0].1 |= SHORT;
            words[1].1 = a | b << 32;
            words[3].1 = c | d << 32;
        }
        for i in 0..8 {
            let kind = self.rng.below(7) as u64;
            let id = self.rng.below(12) as u64;
            let (len, bound) = match self.rng.below(3) {
                0 => (self.number(), self.number()),
                _ => (self.rng.below(900) as u64, self.rng.below(5000) as u64),
            };
            let d = DESCRIPTORS + 24 * i;
            words.extend([(d, kind | id << 32), (d + 8, len), (d + 16, bound)]);
        }
        let scribbles: Vec<(usize, u64)> = (0..200)
            .map(|_| (8 * self.rng.below(PAYLOAD_AT / 8 + 500), self.rng.next_u64()))
            .filter(|&(at, _)| at != CALL)
            .collect();
        let wait = self.rng.below(5) as u32;
        let number = self.number() as u32;
        let then = self.rng.below(4);
        let ring_anyway = self.rng.below(8) == 0;
        let line = &self.lines[at];
        for (at, word) in words {
            line.set64(at, word);
        }
        line.set(WAIT, wait);
        let call = line.get(CALL).wrapping_add(1);
        line.set(CALL, call);
        let _ = futex::wake(line.word(CALL), 1);
        if line.get(MODE) != PARKED || ring_anyway {
            self.socket.send(&FromClient::Ring { line: at as u32 }, None);
        }
        // While it runs: rewrite everything, its half and ours.
        match then {
            0 => scribbles
                .iter()
                .for_each(|&(at, word)| self.lines[at_of(self.lines.len(), word)].set64(at, word)),
            1 => {
                self.lines[at].set(CANCEL, call);
                self.lines[at].set(REPLY, call);
                self.lines[at].set(STATUS, number);
            }
            2 => {
                // Sleep on our half as if we were the activation, and move its sleepers elsewhere.
                self.lines[at].set(MODE, number);
                // Where no wake-up finds them: a word of this process alone.
                let _ = futex::requeue(self.lines[at].word(CALL), &NOWHERE, u32::MAX);
                for _ in 0..3 {
                    let _ = futex::wake(self.lines[at].word(REPLY), u32::MAX);
                }
            }
            _ => {
                let begun = Instant::now();
                while self.lines[at].get(REPLY) != call && begun.elapsed() < Duration::from_millis(2) {
                    std::thread::yield_now();
                }
            }
        }
    }
}

fn at_of(lines: usize, word: u64) -> usize {
    (word % lines as u64) as usize
}

/// Runs `iterations` of hostile acts in a process of its own; the process is killed at a random moment if `kill`.
fn hostile_process(path: &Path, seed: u64, iterations: usize) -> i32 {
    // SAFETY: this process has one thread.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            process::die_with_parent();
            let mut rng = Rng::new(seed);
            let mut hostile: Vec<Hostile> = Vec::new();
            for i in 0..iterations {
                if hostile.is_empty() || (hostile.len() < 3 && rng.below(50) == 0) {
                    hostile.extend(Hostile::connect(path, &mut rng));
                    continue;
                }
                let at = rng.below(hostile.len());
                match rng.below(10) {
                    0..3 => hostile[at].message(),
                    9 if rng.below(40) == 0 => drop(hostile.swap_remove(at)),
                    _ => hostile[at].call(),
                }
                // A domain that dismissed us does not answer: come back.
                if i % 64 == 0 {
                    hostile.retain(|h| h.socket.send(&FromClient::Usage, None));
                    hostile
                        .iter()
                        .for_each(|h| while h.socket.receive::<FromDomain>(Duration::ZERO).is_some() {});
                }
            }
            process::exit_now(0);
        }
    }
}

/// Right answers in time; the longest that one took.
pub fn honest_calls(client: &Client, rounds: u32) -> Duration {
    let echo = client.portal("echo", 1).unwrap();
    let mut worst = Duration::ZERO;
    for i in 0..rounds {
        let bytes = vec![i as u8; 1 + (i as usize * 37) % 3000];
        let mut out = Vec::new();
        let soon = Deadline::after(Duration::from_secs(10));
        let begun = Instant::now();
        client.call(echo, Call::new().input(&bytes).output(&mut out, 4096).deadline(soon)).unwrap();
        worst = worst.max(begun.elapsed());
        assert!(out == bytes);
    }
    worst
}

/// Waits until the domain holds what it held before.
pub fn back_to(served: &Served, before: (usize, usize, usize)) {
    let begun = Instant::now();
    while served.holdings() != before {
        assert!(begun.elapsed() < Duration::from_secs(30), "{before:?} became {:?}", served.holdings());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Hostile processes by pairs, `rounds` times, beside an honest client.
pub fn fuzz(seed: u64, rounds: usize, iterations: usize) {
    let served = serve(portals);
    let honest = served.connect();
    honest_calls(&honest, 10);
    let before = served.holdings();
    let mut rng = Rng::new(seed);
    for round in 0..rounds {
        let seed = rng.next_u64();
        let (a, b) = (
            hostile_process(&served.path(), seed, iterations),
            hostile_process(&served.path(), !seed, iterations),
        );
        let worst = honest_calls(&honest, 400);
        // One is killed in whatever it does, the other ends by itself.
        scene::kill(a);
        let ended = scene::reap(b);
        assert_eq!(ended, Some(0), "round {round}: the hostile client itself");
        assert!(!served.has_ended(), "round {round}, seed {seed:#x}: the domain died");
        honest_calls(&honest, 20);
        println!("round {round}: seed {seed:#x}, worst honest call {worst:?}");
        back_to(&served, before);
    }
    let resident = served.resident_bytes();
    assert!(resident < 128 << 20, "{resident} bytes resident");
}
