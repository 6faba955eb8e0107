//! Domains that are stopped, or do not answer, or answer other things: nobody waits for them longer than he said, in any phase of a call.

use peregrine_call::{Call, CallError, Client, Deadline, Invocation, Limits, Refusal};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::rustix;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};
use testkit::Outcome;

mod attack;
use attack::raw::{FromClient, FromDomain, Memory, Socket, Why};
use attack::scene::{self, serve};

/// For a machine that is busy with other things. What is shown here waited for ever before.
const SOON: Duration = Duration::from_secs(15);

const LINE_BYTES: usize = 32 * 1024;

/// What `does` returns, and that it was done soon.
fn soon<T>(what: &str, does: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let outcome = does();
    assert!(begun.elapsed() < SOON, "{what} took {:?}", begun.elapsed());
    outcome
}

fn within(ms: u64) -> Deadline {
    Deadline::after(Duration::from_millis(ms))
}

/// A process that listens at `path` with a queue of `queue`, and deals with each connection as `deals` does.
fn other(path: &Path, queue: i32, deals: impl Fn(Socket)) -> i32 {
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, queue).unwrap();
    // SAFETY: a test's process has one thread until it makes another.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            process::die_with_parent();
            while let Ok(socket) = rustix::net::accept(&listener) {
                deals(Socket(socket));
            }
            process::exit_now(0);
        }
    }
}

fn who_is_stopped_is_unreachable_and_serves_on_afterwards() -> Outcome {
    let served = serve(|d| d.portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())));
    let before = served.connect();
    let nothing = before.portal("nothing", 1).unwrap();
    served.stop();
    // The kernel lets us in; nobody greets.
    let refused = soon("connecting", || Client::connect_within(served.path(), Duration::from_millis(50)));
    assert!(matches!(refused, Err(CallError::Unreachable { .. })), "{refused:?}");
    // A known portal, and no line yet: the question for one is not answered.
    for _ in 0..3 {
        let late = soon("opening a line", || before.call(nothing, Call::new().deadline(within(30))));
        assert_eq!(late, Err(CallError::Deadline));
        let late = soon("starting", || before.start(nothing, Call::new().deadline(within(30))).map(drop));
        assert_eq!(late, Err(CallError::Deadline));
    }
    served.go_on();
    // The questions were answered meanwhile, and those who asked are gone: the connection goes on.
    for _ in 0..100 {
        before.call(nothing, Call::new()).unwrap();
    }
    before.start(nothing, Call::new()).unwrap().wait().unwrap();
    Outcome::Passed
}

fn a_call_without_a_deadline_is_told_that_its_domain_is_stopped() -> Outcome {
    let portals = |d: peregrine_call::DomainBuilder, path: &Path| {
        let held = path.with_extension("held");
        d.activations(8).portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())).portal(
            "hold",
            1,
            move |_: &mut Invocation<'_>| {
                std::fs::write(&held, "").unwrap();
                loop {
                    std::thread::park();
                }
            },
        )
    };
    let (served, working) = (scene::serve_at(portals), scene::serve_at(portals));
    let patience = Duration::from_millis(1500);
    let portals_of = |served: &scene::Served| {
        let client = served.connect();
        client.set_patience(patience);
        let [hold, nothing] = ["hold", "nothing"].map(|name| client.portal(name, 1).unwrap());
        client.call(nothing, Call::new()).unwrap();
        (client, hold, nothing)
    };
    let (client, hold, nothing) = portals_of(&served);
    let (other, others_hold, others_nothing) = portals_of(&working);
    let stopped = Err(CallError::Stopped { pid: served.pid as u32, patience });
    let mut first = Duration::ZERO;
    std::thread::scope(|scope| {
        // In its handler for as long as it likes: who works is waited for.
        let long = scope.spawn(|| other.call(others_hold, Call::new()));
        let held = scope.spawn(|| client.call(hold, Call::new()));
        [&served, &working].iter().for_each(|served| scene::wait_for(&served.path().with_extension("held")));
        let stops = Instant::now();
        served.stop();
        assert_eq!(client.call(nothing, Call::new()), stopped, "on a line that is there");
        // Those that follow find patience at its end.
        first = stops.elapsed();
        assert_eq!(held.join().unwrap(), stopped, "in mid-call");
        assert_eq!(client.start(nothing, Call::new()).and_then(peregrine_call::Pending::wait), stopped);
        let large = vec![0; 4 << 20];
        assert_eq!(client.call(nothing, Call::new().input(&large)), stopped, "room is asked for");
        let limited = client.call(nothing, Call::new().deadline(within(50)));
        assert_eq!(limited, Err(CallError::Deadline), "who has a deadline has that");
        served.go_on();
        let begun = Instant::now();
        while client.call(nothing, Call::new()).is_err() {
            assert!(begun.elapsed() < SOON, "it serves on");
        }
        assert!(!long.is_finished(), "as long as it works");
        other.call(others_nothing, Call::new()).unwrap();
        working.kill();
        assert_eq!(long.join().unwrap(), Err(CallError::DomainDied));
    });
    assert!(first >= patience, "not at the first look: {first:?}");
    Outcome::Passed
}

fn one_caller_that_gives_up_takes_nothing_from_the_others() -> Outcome {
    let served = serve(|d| {
        d.activations(2).portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())).portal(
            "slow",
            1,
            |_: &mut Invocation<'_>| {
                std::thread::sleep(Duration::from_millis(300));
                Ok(())
            },
        )
    });
    let client = served.connect();
    let (nothing, slow) = (client.portal("nothing", 1).unwrap(), client.portal("slow", 1).unwrap());
    let patient = {
        let client = client.clone();
        std::thread::spawn(move || client.call(slow, Call::new()))
    };
    std::thread::sleep(Duration::from_millis(50));
    served.stop();
    let late = soon("a line", || client.call(nothing, Call::new().deadline(within(30))));
    assert_eq!(late, Err(CallError::Deadline));
    served.go_on();
    assert_eq!(patient.join().unwrap(), Ok(()), "a call under way on the same connection");
    Outcome::Passed
}

fn a_large_call_to_a_stopped_domain_ends_with_its_deadline() -> Outcome {
    let served = serve(|d| d.portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())));
    let client = served.connect();
    let nothing = client.portal("nothing", 1).unwrap();
    client.call(nothing, Call::new()).unwrap();
    let buffers: Vec<_> = (0..100).map(|_| client.buffer(4096).unwrap()).collect();
    served.stop();
    let large = vec![1; 4 << 20];
    for _ in 0..3 {
        let late = soon("room", || client.call(nothing, Call::new().input(&large).deadline(within(30))));
        assert_eq!(late, Err(CallError::Deadline));
        let gift = peregrine_call::Gift::new(4096).unwrap();
        let late = soon("a gift", || client.call(nothing, Call::new().give(gift).deadline(within(30))));
        assert_eq!(late, Err(CallError::Deadline));
    }
    soon("dropping buffers", || drop(buffers));
    served.go_on();
    client.call(nothing, Call::new().input(&large)).unwrap();
    // What was given up is not held on to.
    for _ in 0..300 {
        client.call(nothing, Call::new().give(peregrine_call::Gift::new(4096).unwrap())).unwrap();
        drop(client.buffer(4096).unwrap());
    }
    Outcome::Passed
}

fn gifts_of_calls_that_come_too_late_are_not_kept() -> Outcome {
    let limits = Limits { buffers: 4, ..Limits::default() };
    let served = serve(|d| {
        d.activations(1).limits(limits).portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())).portal(
            "slow",
            1,
            |_: &mut Invocation<'_>| {
                std::thread::sleep(Duration::from_millis(60));
                Ok(())
            },
        )
    });
    let client = served.connect();
    let (nothing, slow) = (client.portal("nothing", 1).unwrap(), client.portal("slow", 1).unwrap());
    for _ in 0..12 {
        let first = client.start(slow, Call::new()).unwrap();
        let gift = peregrine_call::Gift::new(4096).unwrap();
        let late = client.call(nothing, Call::new().give(gift).deadline(within(20)));
        // On a machine that is busy with other things it may come in time.
        assert!(matches!(late, Err(CallError::Deadline) | Ok(())), "{late:?}");
        first.wait().unwrap();
    }
    client.call(nothing, Call::new().give(&[1, 2, 3][..])).unwrap();
    Outcome::Passed
}

/// What a call may be dropped in the middle of: the questions for a line, for its pipe, for room, for the number of a gift.
fn a_call_that_is_dropped_while_it_is_set_up_leaves_nothing() -> Outcome {
    let limits = Limits { calls_in_flight: 2, buffers: 3, ..Limits::default() };
    let served = serve(|d| {
        let both = std::sync::Barrier::new(2);
        d.activations(2).limits(limits).portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())).portal(
            "meet",
            1,
            move |_: &mut Invocation<'_>| {
                both.wait();
                Ok(())
            },
        )
    });
    let bound = || Deadline::after(SOON);
    let large: &'static [u8] = vec![1; 1 << 20].leak();
    let gift = || peregrine_call::Gift::new(4096).unwrap();
    for round in 0..4 {
        // The first call of each has no line yet, and the first that is started no pipe.
        let (new, client) = (served.connect(), served.connect());
        let [nothing, meet] = ["nothing", "meet"].map(|name| client.portal(name, 1).unwrap());
        client.call(nothing, Call::new()).unwrap();
        let drops = |what: &str, client: &Client, call: &dyn Fn() -> Call<'static>| {
            served.stop();
            for _ in 0..3 {
                let pending = client.begin(nothing, call()).unwrap();
                assert!(!pending.is_sent(), "{what}: round {round}");
            }
            served.go_on();
            // Its answer comes behind all others.
            client.usage().unwrap();
            client
                .call(nothing, call().deadline(bound()))
                .unwrap_or_else(|e| panic!("{what}, round {round}: {e}"));
            let two = [(), ()].map(|()| client.start(meet, Call::new().deadline(bound())).unwrap());
            for one in two {
                assert_eq!(one.wait(), Ok(()), "{what}: both lines are there, round {round}");
            }
        };
        drops("a line", &new, &Call::new);
        drops("a pipe", &client, &Call::new);
        drops("room", &new, &|| Call::new().input(large));
        for _ in 0..3 {
            drops("a gift", &client, &|| Call::new().give(gift()));
        }
        // Between two gifts, wherever that is.
        for n in 0..60u64 {
            let mut pending =
                client.begin(nothing, Call::new().give(gift()).give(gift()).give(gift())).unwrap();
            let until = Instant::now() + Duration::from_micros(n * 5);
            let mut outcome = None;
            while outcome.is_none() && !pending.is_sent() && Instant::now() < until {
                outcome = pending.try_finish();
            }
            if outcome.is_none() && pending.is_sent() {
                // Its gifts are the domain's until it is executed.
                outcome = Some(pending.wait());
            }
            assert!(matches!(outcome, None | Some(Ok(()))), "{outcome:?}");
        }
        client.usage().unwrap();
        client.call(nothing, Call::new().give(gift()).give(gift()).give(gift()).deadline(bound())).unwrap();
    }
    Outcome::Passed
}

fn who_accepts_and_is_silent_or_talks_nonsense_is_unreachable() -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let silent = dir.path().join("silent");
    let talks = dir.path().join("talks");
    let full = dir.path().join("full");
    let pids = [
        other(&silent, 16, std::mem::forget),
        other(&talks, 16, |socket| {
            // A byte at a time, of what could be a welcome.
            while socket.send_bytes(&[0], None) {
                std::thread::sleep(Duration::from_millis(100));
            }
        }),
        other(&full, 0, |_| std::thread::sleep(Duration::from_secs(600))),
    ];
    let time = Duration::from_millis(50);
    for (path, says) in [(&silent, "did not answer"), (&full, "")] {
        for _ in 0..4 {
            let refused = soon("connecting", || Client::connect_within(path, time)).unwrap_err();
            assert!(matches!(refused, CallError::Unreachable { .. }), "{refused}");
            assert!(refused.to_string().contains(says), "{refused}");
        }
    }
    let filled: Vec<_> = (0..4).map(|_| Client::open(&full, Duration::from_secs(1)).unwrap()).collect();
    let refused = soon("knocking", || Client::connect_within(&full, time)).unwrap_err();
    assert!(refused.to_string().contains("queue"), "{refused}");
    drop(filled);
    let refused = soon("connecting", || Client::connect_within(&talks, Duration::from_secs(2))).unwrap_err();
    assert!(matches!(refused, CallError::Refused(_)), "{refused}");
    pids.into_iter().for_each(scene::kill);
    Outcome::Passed
}

fn who_speaks_another_version_of_the_protocol_is_refused_by_name() -> Outcome {
    // A domain that speaks a later one, and says so.
    let dir = tempfile::tempdir().unwrap();
    let later = dir.path().join("later");
    let pid = other(&later, 16, |socket| {
        let _ = socket.receive::<FromClient>(Duration::from_millis(900));
        socket.send(&FromDomain::Refused(Why::Protocol { theirs: 6 }), None);
    });
    let refused = soon("connecting", || Client::connect(&later)).unwrap_err();
    assert!(matches!(refused, CallError::Refused(Refusal::Protocol(_))), "{refused}");
    assert!(refused.to_string().contains("version 5, the domain 6"), "{refused}");
    scene::kill(pid);
    // Clients that speak an earlier or a later one: each is told which the domain speaks, and nothing else it says is heard.
    let served = serve(|d| d.portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())));
    for protocol in [0, 4, 6, u32::MAX] {
        let socket = Socket::connect(&served.path()).unwrap();
        let (answer, _) = socket.ask(&FromClient::Hello { protocol }, None).unwrap();
        assert!(matches!(answer, FromDomain::Refused(Why::Protocol { theirs: 5 })), "{protocol}: {answer:?}");
        assert!(socket.ask(&FromClient::OpenLine, None).is_none(), "{protocol}");
    }
    assert!(Client::connect(served.path()).is_ok());
    Outcome::Passed
}

/// Greets, knows every portal, hands out a line, and then does something else.
fn until_a_line(socket: &Socket) -> Option<Memory> {
    loop {
        match socket.receive::<FromClient>(Duration::from_millis(900))?.0 {
            FromClient::Hello { .. } => {
                let name = "other".into();
                let welcome =
                    FromDomain::Welcome { id: 1, name, calls_in_flight: u32::MAX, argument_bytes: 1 << 20 };
                socket.send(&welcome, None);
            }
            FromClient::Resolve { .. } => {
                socket.send(&FromDomain::Portal { id: 0, version: 1 }, None);
            }
            FromClient::OpenLine => {
                let pages = peregrine_base::PageCount::for_bytes(LINE_BYTES);
                let fd =
                    peregrine_sys::memfd::create(c"peregrine-line", pages, peregrine_sys::memfd::Pages::Base)
                        .unwrap();
                peregrine_sys::memfd::seal_size(&fd).unwrap();
                socket.send(&FromDomain::Line { index: 0, len_bytes: LINE_BYTES as u64 }, Some(fd.as_fd()));
                return Memory::map(&fd, LINE_BYTES);
            }
            _ => return None,
        }
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn results_without_end_are_neither_kept_nor_waited_for() -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let flood = |line: u32| {
        move |socket: Socket| {
            let Some(_line) = until_a_line(&socket) else { return };
            let pages = peregrine_base::PageCount::new(1);
            let fd =
                peregrine_sys::memfd::create(c"peregrine-results", pages, peregrine_sys::memfd::Pages::Base)
                    .unwrap();
            peregrine_sys::memfd::seal_size(&fd).unwrap();
            let begun = Instant::now();
            let mut call = 0;
            while begun.elapsed() < Duration::from_secs(20) {
                call += 1;
                socket.send(&FromDomain::Results { line, call, len_bytes: 4096 }, Some(fd.as_fd()));
            }
        }
    };
    let (ours, unknown) = (dir.path().join("ours"), dir.path().join("unknown"));
    let pids = [other(&ours, 16, flood(0)), other(&unknown, 16, flood(7))];
    let client = Client::connect(&ours).unwrap();
    let portal = client.portal("any", 1).unwrap();
    let before = descriptors();
    // Each opens a line, which reads the socket: the first line is answered, later questions are drowned.
    for _ in 0..6 {
        let outcome = soon("a call", || client.call(portal, Call::new().deadline(within(60))));
        assert!(matches!(outcome, Err(CallError::Deadline)), "{outcome:?}");
    }
    let held = descriptors() - before;
    assert!(held < 8, "{held} descriptors are held for a hostile domain");
    let client = Client::connect(&unknown).unwrap();
    let portal = client.portal("any", 1).unwrap();
    let mut outcomes = Vec::new();
    for _ in 0..6 {
        outcomes.push(soon("a call", || client.call(portal, Call::new().deadline(within(60)))).unwrap_err());
    }
    assert!(
        outcomes.contains(&CallError::BadReply("results of a line that was never opened")),
        "{outcomes:?}"
    );
    pids.into_iter().for_each(scene::kill);
    Outcome::Passed
}

fn a_pipe_that_would_block_does_not_block_its_caller() -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let pid = other(&path, 16, |socket| {
        let Some(_line) = until_a_line(&socket) else { return };
        // It can be written and read, and waits, and its other end stays open.
        let Some((FromClient::OpenPipe { .. }, _)) = socket.receive(Duration::from_millis(900)) else {
            return;
        };
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        socket.send(&FromDomain::Pipe, Some(reader.as_fd()));
        rustix::io::write(&writer, &[1; 200]).unwrap();
        std::mem::forget((reader, writer, socket));
    });
    let client = Client::connect(&path).unwrap();
    let portal = client.portal("any", 1).unwrap();
    let late = soon("a call", || client.start(portal, Call::new().deadline(within(200))).unwrap().wait());
    assert_eq!(late, Err(CallError::Deadline));
    scene::kill(pid);
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        who_is_stopped_is_unreachable_and_serves_on_afterwards,
        a_call_without_a_deadline_is_told_that_its_domain_is_stopped,
        one_caller_that_gives_up_takes_nothing_from_the_others,
        a_large_call_to_a_stopped_domain_ends_with_its_deadline,
        gifts_of_calls_that_come_too_late_are_not_kept,
        a_call_that_is_dropped_while_it_is_set_up_leaves_nothing,
        who_accepts_and_is_silent_or_talks_nonsense_is_unreachable,
        who_speaks_another_version_of_the_protocol_is_refused_by_name,
        results_without_end_are_neither_kept_nor_waited_for,
        a_pipe_that_would_block_does_not_block_its_caller,
    ])
}
