//! Fresh calls to domains that are stopped, or silent, or hostile: the caller is told in time, and nobody else on its node notices.

#![allow(missing_docs)]

use peregrine::testing::Program;
use peregrine::{FreshCallError, Portal, checkpoint, sleep, spawn, tally};
use peregrine_call::{Domain, Invocation, Limits};
use peregrine_sys::other::Condition;
use peregrine_sys::rustix;
use peregrine_sys::signal::{self, number};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

#[path = "../../call/tests/raw/mod.rs"]
mod raw;

use raw::{FromClient, FromDomain};

const WHERE: &str = "PEREGRINE_TEST_DIR";
const SERVE: &str = "PEREGRINE_TEST_SERVE";

fn domain() -> Domain {
    let path = PathBuf::from(std::env::var(SERVE).unwrap());
    Domain::builder()
        .activations(40)
        .limits(Limits { activations_per_client: 40, ..Limits::default() })
        .portal("pid", 1, |call: &mut Invocation<'_>| {
            call.output(1)?.extend_from_slice(&std::process::id().to_ne_bytes());
            Ok(())
        })
        .portal("count", 1, |call: &mut Invocation<'_>| {
            let len = call.input(0)?.len() as u64;
            call.output(1)?.extend_from_slice(&len.to_ne_bytes());
            Ok(())
        })
        .portal("slow", 1, |_: &mut Invocation<'_>| {
            std::thread::sleep(Duration::from_secs(3));
            Ok(())
        })
        .portal("holds", 1, |call: &mut Invocation<'_>| {
            std::fs::write(std::str::from_utf8(call.input(0)?).unwrap(), "").unwrap();
            loop {
                std::thread::park();
            }
        })
        .serve(path)
        .unwrap()
}

/// Not a test: what [`process`] runs.
#[test]
#[ignore = "serves a domain for the others"]
fn serves_until_it_is_killed() {
    if std::env::var_os(SERVE).is_some() {
        let _domain = domain();
        loop {
            std::thread::park();
        }
    }
}

/// A domain in a process of its own.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn process(path: &Path) -> Process {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "serves_until_it_is_killed"]).env(SERVE, path);
    let process = Process(command.stdout(std::process::Stdio::null()).spawn().unwrap());
    let begun = Instant::now();
    while peregrine_call::Client::connect(path).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(20), "the domain did not come up");
        sleep_os(5);
    }
    process
}

fn sleep_os(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

/// When this returns, no thread of the process runs.
fn stop(pid: i32) {
    signal::kill(pid, number::STOP).unwrap();
    let is_stopped = |task: std::io::Result<std::fs::DirEntry>| {
        let tid = task.unwrap().file_name().to_str().unwrap().parse().unwrap();
        peregrine_sys::other::stat(tid).is_none_or(|stat| stat.condition == Condition::Stopped)
    };
    while !std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(is_stopped) {
        sleep_os(1);
    }
}

/// A socket that somebody listens at, and nothing more.
fn listener(path: &Path, queue: i32) -> OwnedFd {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, queue).unwrap();
    socket
}

fn at(name: &str) -> PathBuf {
    PathBuf::from(std::env::var(WHERE).unwrap()).join(name)
}

/// Runs the program with all sorts of domains.
fn with_domains(program: Program) {
    let dir = tempfile::tempdir().unwrap();
    let (good, stopped) = (process(&dir.path().join("good")), process(&dir.path().join("stopped")));
    signal::kill(stopped.0.id() as i32, number::STOP).unwrap();
    let _silent = listener(&dir.path().join("silent"), 16);
    let full = dir.path().join("full");
    let _full = listener(&full, 0);
    let _waiting: Vec<_> = (0..2).map(|_| fill(&full)).collect();
    let talks = listener(&dir.path().join("talks"), 16);
    // Until the test's process ends.
    std::thread::spawn(move || {
        while let Ok(socket) = rustix::net::accept(&talks) {
            // A byte a second, each of which is a message.
            std::thread::spawn(move || {
                sleep_os(1000);
                while rustix::net::send(&socket, &[5], rustix::net::SendFlags::NOSIGNAL).is_ok() {
                    sleep_os(1000);
                }
            });
        }
    });
    for (name, when) in [("lingers", Lingers::InAnswer), ("queues", Lingers::Unasked)] {
        let (socket, sent) = (listener(&dir.path().join(name), 16), dir.path().join("sent"));
        std::thread::spawn(move || {
            while let Ok(socket) = rustix::net::accept(&socket) {
                let sent = sent.clone();
                std::thread::spawn(move || linger(&raw::Socket(socket), when, &sent));
            }
        });
    }
    let floods = listener(&dir.path().join("floods"), 16);
    std::thread::spawn(move || {
        while let Ok(socket) = rustix::net::accept(&floods) {
            std::thread::spawn(move || flood(&raw::Socket(socket)));
        }
    });
    let outcome = program.run_with(&[(WHERE, dir.path().to_str().unwrap())]);
    assert!(outcome.success(), "{outcome}");
    drop((good, stopped));
}

/// Takes calls, tells of their outcomes all the time, and has none.
fn flood(socket: &raw::Socket) {
    const LINE_BYTES: usize = 64 * 1024;
    while let Some((question, _)) = socket.receive::<FromClient>(Duration::from_millis(999)) {
        match question {
            FromClient::Hello { .. } => {
                let name = "floods".into();
                let welcome =
                    FromDomain::Welcome { id: 1, name, calls_in_flight: 4, argument_bytes: 1 << 20 };
                socket.send(&welcome, None);
            }
            FromClient::OpenLine => {
                let pages = peregrine_base::PageCount::for_bytes(LINE_BYTES);
                let fd =
                    peregrine_sys::memfd::create(c"peregrine-line", pages, peregrine_sys::memfd::Pages::Base)
                        .unwrap();
                peregrine_sys::memfd::seal_size(&fd).unwrap();
                socket.send(&FromDomain::Line { index: 0, len_bytes: LINE_BYTES as u64 }, Some(fd.as_fd()));
            }
            FromClient::OpenPipe { .. } => {
                let (reader, writer) = rustix::pipe::pipe().unwrap();
                socket.send(&FromDomain::Pipe, Some(reader.as_fd()));
                drop(reader);
                // Until the node has closed its end.
                std::thread::spawn(move || while rustix::io::write(&writer, &[1; 4096]).is_ok() {});
            }
            FromClient::Resolve { .. } => {
                socket.send(&FromDomain::Portal { id: 0, version: 1 }, None);
            }
            _ => {}
        }
    }
    sleep_os(100_000);
}

/// When a domain sends descriptors that take a minute to close.
#[derive(Clone, Copy)]
enum Lingers {
    InAnswer,
    Unasked,
}

/// Knows every portal, and then sends such descriptors: as the answer to what is asked next, or when nobody reads any more.
fn linger(socket: &raw::Socket, when: Lingers, sent: &Path) {
    let mut readers = Vec::new();
    let mut burden = |message: &FromDomain| {
        let (slow, reader) = testkit::lingering();
        // Stopped until we have let go of it: the last to close it is who waits.
        let node = rustix::net::sockopt::socket_peercred(&socket.0).unwrap().pid.as_raw_nonzero().get();
        stop(node);
        socket.send(message, Some(slow.as_fd()));
        drop(slow);
        signal::kill(node, number::CONT).unwrap();
        readers.push(reader);
    };
    while let Some((question, _)) = socket.receive::<FromClient>(Duration::from_millis(999)) {
        match (question, when) {
            (FromClient::Hello { .. }, _) => {
                let name = "slow".into();
                let welcome =
                    FromDomain::Welcome { id: 1, name, calls_in_flight: 4, argument_bytes: 1 << 20 };
                socket.send(&welcome, None);
            }
            (FromClient::Resolve { .. }, _) => {
                socket.send(&FromDomain::Portal { id: 0, version: 1 }, None);
            }
            (_, Lingers::InAnswer) => burden(&FromDomain::Pipe),
            // Its asker gives up meanwhile.
            (_, Lingers::Unasked) => {
                sleep_os(2000);
                burden(&FromDomain::Pipe);
                std::fs::write(sent, "").unwrap();
            }
        }
    }
    // Whoever closes what was sent waits for these, or for a minute.
    sleep_os(200_000);
}

/// Takes a place in the queue of a listener, if there is one.
fn fill(path: &Path) -> OwnedFd {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::io::ioctl_fionbio(&socket, true).unwrap();
    let _ = rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap());
    socket
}

fn portal(domain: &str, name: &str) -> Portal {
    Portal::new(at(domain), name, 1)
}

/// Calls of a domain that answers, made while the caller of this waits for one that does not.
fn busy() -> peregrine::JoinHandle<u32> {
    spawn(
        |_: ()| {
            for n in 0..30u64 {
                let len = if n % 10 == 0 { 1 << 20 } else { n };
                let count = portal("good", "count").call(&vec![1; len as usize], 8).unwrap();
                assert_eq!(count, len.to_ne_bytes());
                sleep(Duration::from_millis(1));
            }
            30
        },
        (),
    )
}

#[peregrine::test(program, nodes = 1, timeout_s = 120)]
fn waits_for_nobody() {
    for to in ["silent", "stopped", "full", "talks"] {
        let other = busy();
        let call = portal(to, "count").within(Duration::from_secs(3)).call(&[1; 5000], 8);
        if to == "talks" {
            assert!(matches!(call, Err(FreshCallError::Refused(_))), "{to}: {call:?}");
        } else {
            assert_eq!(call, Err(FreshCallError::Deadline), "{to}");
            assert!(other.is_finished(), "{to}: the node was held up");
        }
        assert_eq!(other.join().unwrap(), 30);
    }
    // Without a deadline: as long as a call that could not be sent is waited for. (Not sooner: calls of one domain wait for one connection,
    // and end together when it can't be had.)
    let patient = ["silent", "stopped", "full"]
        .map(|to| spawn(|to: String| portal(&to, "count").call(b"", 8), to.to_owned()));
    for thread in patient {
        let outcome = thread.join().unwrap();
        assert!(matches!(outcome, Err(FreshCallError::Unreachable(_))), "{outcome:?}");
    }
}

#[test]
fn a_node_is_held_up_by_no_domain_that_does_not_answer() {
    with_domains(waits_for_nobody());
}

#[peregrine::test(program, nodes = 1, timeout_s = 120)]
fn stopped_in_between() {
    let _ = portal("stopped", "pid").within(Duration::from_millis(20)).call(b"", 4);
    // It was stopped before it accepted us: from here on it is the other way round.
    let pid = portal("good", "pid").call(b"", 4).unwrap();
    let pid = i32::from_ne_bytes(pid.try_into().unwrap());
    for _ in 0..3 {
        signal::kill(pid, number::STOP).unwrap();
        sleep(Duration::from_millis(20));
        let late = |name: &str, len: usize| {
            let call = portal("good", name).within(Duration::from_millis(50)).call(&vec![1; len], 8);
            assert_eq!(call, Err(FreshCallError::Deadline), "{name}, {len} bytes");
        };
        late("pid", 0);
        // A portal whose number is not known, and room that is not there.
        late("count", 0);
        late("pid", 1 << 20);
        let others: Vec<_> =
            (0..40).map(|_| spawn(|_: ()| portal("good", "count").call(b"abc", 8), ())).collect();
        sleep(Duration::from_millis(20));
        assert!(others.iter().all(|o| !o.is_finished()), "they have all the time");
        signal::kill(pid, number::CONT).unwrap();
        for other in others {
            assert_eq!(other.join().unwrap(), Ok(3u64.to_ne_bytes().to_vec()), "and are served in the end");
        }
        assert_eq!(
            portal("good", "count").call(&vec![1; 1 << 20], 8),
            Ok((1u64 << 20).to_ne_bytes().to_vec())
        );
    }
}

#[test]
fn a_domain_that_is_stopped_for_a_while_costs_the_late_their_calls_and_nobody_else() {
    with_domains(stopped_in_between());
}

#[peregrine::test(program, nodes = 1, timeout_s = 110)]
fn told_all_the_time() {
    let used = peregrine_sys::timer::thread_cpu_ns;
    for _ in 0..2 {
        let (begun, before) = (Instant::now(), used());
        let call = portal("floods", "count").within(Duration::from_secs(3)).call(b"", 8);
        assert_eq!(call, Err(FreshCallError::Deadline));
        let (took, used) = (begun.elapsed().as_nanos() as u64, used() - before);
        println!("{used} ns of {took}");
        assert!(used < took / 2, "the node ran for {used} ns of {took}, for nothing");
    }
}

#[test]
fn a_node_sleeps_though_a_domain_tells_of_outcomes_all_the_time() {
    with_domains(told_all_the_time());
}

/// Less than a descriptor that lingers does.
const NOT_HELD_UP: Duration = Duration::from_secs(45);

#[peregrine::test(program, nodes = 1, timeout_s = 110)]
fn closes_nothing_slow() {
    let begun = Instant::now();
    for _ in 0..3 {
        let open = descriptors();
        let call = portal("lingers", "count").call(b"", 8);
        assert!(matches!(call, Err(FreshCallError::Other(_))), "{call:?}");
        while descriptors() > open + 1 {
            assert!(begun.elapsed() < NOT_HELD_UP, "what it sent stays open");
            sleep(Duration::from_millis(1));
        }
    }
    portal("good", "count").call(b"", 8).unwrap();
    assert!(begun.elapsed() < NOT_HELD_UP, "the node waited: {:?}", begun.elapsed());
}

#[test]
fn a_node_keeps_nothing_of_what_a_domain_sent_and_waits_for_none_of_it() {
    with_domains(closes_nothing_slow());
}

#[peregrine::test(program, nodes = 1, timeout_s = 110)]
fn dies_with_a_full_queue() {
    checkpoint();
    let begun = Instant::now();
    if tally().rollbacks == 0 {
        let call = portal("queues", "count").within(Duration::from_secs(1)).call(b"", 8);
        assert_eq!(call, Err(FreshCallError::Deadline));
        while !at("sent").exists() {
            sleep(Duration::from_millis(5));
        }
        if tally().rollbacks == 0 {
            signal::kill(std::process::id() as i32, number::KILL).unwrap();
            loop {
                std::hint::spin_loop();
            }
        }
    }
    portal("good", "count").call(b"", 8).unwrap();
    assert_eq!(tally().rollbacks, 1);
    assert!(begun.elapsed() < NOT_HELD_UP, "the recovery waited: {:?}", begun.elapsed());
}

#[test]
fn a_node_is_replaced_without_waiting_for_the_closing_of_what_a_domain_sent() {
    with_domains(dies_with_a_full_queue());
}

#[peregrine::test(program, nodes = 1, timeout_s = 110)]
fn stopped_for_good() {
    let pid = portal("good", "pid").call(b"", 4).unwrap();
    let pid = i32::from_ne_bytes(pid.try_into().unwrap());
    stop(pid);
    let patient = portal("good", "pid").call(b"", 4);
    assert_eq!(patient, Err(FreshCallError::Stopped { pid: pid as u32 }));
    signal::kill(pid, number::CONT).unwrap();
    while portal("good", "pid").call(b"", 4).is_err() {}
}

#[test]
fn who_calls_a_domain_that_is_stopped_for_good_is_told_so() {
    with_domains(stopped_for_good());
}

#[peregrine::test(program, nodes = 2, timeout_s = 110)]
fn dies_under_its_callers() {
    const CALLERS: u32 = 20;
    let held = |i: u32| at(&format!("held{i}"));
    let pid = portal("good", "pid").call(b"", 4).unwrap();
    let callers: Vec<_> = (0..CALLERS)
        .map(|i| {
            let call = |path: PathBuf| portal("good", "holds").call(path.to_str().unwrap().as_bytes(), 0);
            peregrine::Builder::new().node(i % 2).spawn(call, held(i)).unwrap()
        })
        .collect();
    while !(0..CALLERS).all(|i| held(i).exists()) {
        sleep(Duration::from_millis(1));
    }
    signal::kill(i32::from_ne_bytes(pid.try_into().unwrap()), number::KILL).unwrap();
    for caller in callers {
        assert_eq!(caller.join().unwrap(), Err(FreshCallError::DomainDied));
    }
    // Its socket is still there, and nobody behind it.
    let next = portal("good", "pid").call(b"", 4);
    assert!(matches!(next, Err(FreshCallError::Unreachable(_))), "{next:?}");
    assert_eq!(tally().rollbacks, 0);
}

#[test]
fn a_domain_that_dies_under_its_callers_is_the_error_of_each_and_of_nobody_else() {
    with_domains(dies_under_its_callers());
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Kills this node.
fn die() -> ! {
    signal::kill(std::process::id() as i32, number::KILL).unwrap();
    loop {
        std::hint::spin_loop();
    }
}

#[peregrine::test(program, nodes = 1, timeout_s = 60)]
fn many_descriptors() {
    // Four names of one domain, and so four connections.
    for i in 0..4 {
        let _ = std::os::unix::fs::symlink(at("good"), at(&format!("name{i}")));
    }
    checkpoint();
    let before = descriptors();
    let callers: Vec<_> = (0..80)
        .map(|i| {
            let call = |i: u32| {
                // What it calls in a life after the death stays open, and should.
                if tally().rollbacks == 0 {
                    let _ = portal(&format!("name{}", i % 4), "slow").call(b"", 0);
                }
            };
            spawn(call, i)
        })
        .collect();
    // Until their pipes are open.
    while tally().rollbacks == 0 && descriptors() < before + 88 {
        sleep(Duration::from_millis(5));
    }
    if tally().rollbacks == 0 {
        die();
    }
    callers.into_iter().for_each(|c| c.join().unwrap());
    assert_eq!(tally().rollbacks, 1);
    let begun = Instant::now();
    while descriptors() > before + 10 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{before} descriptors became {}", descriptors());
        sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_killed_node_leaves_none_of_the_many_descriptors_of_its_calls() {
    with_domains(many_descriptors());
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: nothing is done with what it stands for.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) }).is_ok()
}

#[peregrine::test(program, nodes = 1, timeout_s = 60, image_interval_ms = 3_600_000)]
fn numbers_change_hands() {
    /// All to the same image. Who closes what a dead node had is rarely slower than the rollback.
    const DEATHS: u64 = 8;
    let numbers: Vec<RawFd> = (0..12).map(|_| File::open("/dev/null").unwrap().into_raw_fd()).collect();
    checkpoint();
    // A thread that goes back to the image has these numbers, whoever had them since; nobody closes them under its hands.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(if tally().rollbacks < DEATHS { 5 } else { 300 }) {
        for &fd in &numbers {
            assert!(is_open(fd), "number {fd} is another's to give away");
        }
        sleep(Duration::from_millis(1));
    }
    if tally().rollbacks < DEATHS {
        // SAFETY: of this function alone.
        numbers.iter().for_each(|&fd| drop(unsafe { File::from_raw_fd(fd) }));
        for i in 0..20 {
            spawn(|_: u32| drop(portal("good", "slow").call(b"", 0)), i);
        }
        while !numbers.iter().all(|&fd| is_open(fd)) {
            sleep(Duration::from_millis(1));
        }
        die();
    }
}

#[test]
fn a_number_that_a_call_had_is_held_for_who_had_it_in_the_image() {
    with_domains(numbers_change_hands());
}

#[peregrine::test(program, nodes = 1, timeout_s = 120)]
fn more_connections_than_descriptors() {
    for i in 0..500 {
        let name = format!("link{i}");
        std::os::unix::fs::symlink(at("good"), at(&name)).unwrap();
        let count = portal(&name, "count").call(b"abcd", 8);
        assert_eq!(count, Ok(4u64.to_ne_bytes().to_vec()), "domain {i}");
    }
    let open = descriptors();
    assert!(open < 1024 + 100, "{open} descriptors are open");
    assert!(portal("link0", "count").call(b"", 8).is_ok(), "one that was closed is made anew");
}

#[test]
fn connections_that_nobody_uses_make_way_for_others() {
    with_domains(more_connections_than_descriptors());
}
