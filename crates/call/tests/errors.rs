//! Whoever is not there is unreachable, whatever is left of him; each limit that is reached says which it is and what to do; what can't be
//! said is told by whose side it is.

#![allow(missing_docs)]

use peregrine_call::interface::Error;
use peregrine_call::{
    Call, CallError, Client, Domain, DomainError, Failure, Gift, Invocation, Limits, Refusal, socket_pair,
};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use testkit::Outcome;

mod scene;
use scene::serve;

fn echo(call: &mut Invocation<'_>) -> Result<(), Failure> {
    let bytes = call.input(0)?;
    call.output(1)?.extend_from_slice(bytes);
    Ok(())
}

/// A socket that is bound to `path`, at which nobody listens yet.
fn bound(path: &Path) -> OwnedFd {
    let socket =
        net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

/// Connecting to `path` fails at once, with an error that names the path, the kernel's or our reason, and what to do.
fn is_unreachable(path: &Path, why: &str) {
    let begun = Instant::now();
    let e = Client::connect(path).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(8), "{path:?}: it waited: {:?}", begun.elapsed());
    let CallError::Unreachable { at, reason } = &e else { panic!("{path:?}: {e:?}") };
    assert_eq!(at, path);
    assert!(reason.contains(why), "{path:?}: {reason}");
    let said = e.to_string();
    assert!(said.contains(path.to_str().unwrap()) && said.contains("start it, or check the path"), "{said}");
}

fn nobody_at_the_path_is_unreachable_whatever_is_there_instead() -> Outcome {
    let served = serve(|d| d.portal("echo", 1, echo));
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    is_unreachable(&at("missing"), "No such file");
    is_unreachable(&at("no/directory/for/it"), "No such file");
    is_unreachable(&at(&"x".repeat(200)), "");
    std::fs::write(at("file"), "of words").unwrap();
    is_unreachable(&at("file"), "Connection refused");
    // A socket of another kind.
    let _stream = std::os::unix::net::UnixListener::bind(at("stream")).unwrap();
    is_unreachable(&at("stream"), "");
    // Bound, and nobody listens; and then there is no process any more.
    let socket = bound(&at("bound"));
    is_unreachable(&at("bound"), "Connection refused");
    drop(socket);
    is_unreachable(&at("bound"), "Connection refused");
    // The domain's process, gone between two connections: its socket is still there.
    let client = served.connect();
    let echo = client.portal("echo", 1).unwrap();
    served.kill();
    assert!(served.path().exists());
    is_unreachable(&served.path(), "Connection refused");
    assert_eq!(
        client.call(echo, Call::new()),
        Err(CallError::DomainDied),
        "the old connection is no new one"
    );
    Outcome::Passed
}

fn who_hangs_up_before_his_greeting_is_unreachable() -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let listener = bound(&path);
    net::listen(&listener, 4).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Child => {
            process::die_with_parent();
            drop(net::accept(&listener));
            // The second is still in the queue when it ends.
            std::thread::sleep(Duration::from_millis(300));
            process::exit_now(0);
        }
        Forked::Parent(pid) => {
            drop(listener);
            is_unreachable(&path, "");
            is_unreachable(&path, "");
            assert_eq!(scene::reap(pid), Some(0));
        }
    }
    // An inherited descriptor whose other end is closed.
    let (ours, theirs) = socket_pair().unwrap();
    drop(theirs);
    let e = Client::over(ours).unwrap_err();
    assert!(matches!(&e, CallError::Unreachable { at, .. } if at == &PathBuf::from("descriptor")), "{e:?}");
    Outcome::Passed
}

fn a_path_that_this_user_may_not_use_is_unreachable_and_says_so() -> Outcome {
    if !process::is_root() {
        testkit::skip!("needs root, to have a second user");
    }
    let served = serve(|d| d.access(peregrine_call::Access::Everyone).portal("echo", 1, echo));
    let directory = served.path().parent().unwrap().to_owned();
    std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o711)).unwrap();
    std::fs::set_permissions(served.path(), PermissionsExt::from_mode(0o600)).unwrap();
    // SAFETY: this process has one thread.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Child => {
            process::die_with_parent();
            process::become_user(65534).unwrap();
            let outcome = std::panic::catch_unwind(|| is_unreachable(&served.path(), "Permission denied"));
            process::exit_now(i32::from(outcome.is_err()));
        }
        Forked::Parent(pid) => assert_eq!(scene::reap(pid), Some(0), "what went wrong is above"),
    }
    Outcome::Passed
}

const SMALL: Limits = Limits {
    clients: 1,
    calls_in_flight: 1,
    activations_per_client: 1,
    argument_stack_bytes: 16 * 1024,
    argument_bytes: 8000,
    buffer_bytes: 64 * 1024,
    buffers: 2,
    depth: 1,
    spin: Duration::ZERO,
};

fn a_limit_that_is_reached_is_named_with_its_remedy() -> Outcome {
    let served = serve(|d| d.limits(SMALL).portal("echo", 1, echo));
    let client = served.connect();
    let echo = client.portal("echo", 1).unwrap();
    let says = |e: CallError, what: &[&str]| {
        let said = e.to_string();
        assert!(what.iter().all(|w| said.contains(w)), "{said:?} is to say {what:?}");
    };
    let call = |client: &Client, bytes: &[u8], most: usize| {
        client.call(echo, Call::new().input(bytes).output(&mut Vec::new(), most))
    };
    let most = |what: &str| format!("the domain's `Limits::{what}`");

    assert_eq!(call(&client, &[1; 8000], 8000), Ok(()));
    let e = call(&client, &[1; 8001], 8001).unwrap_err();
    says(e, &["arguments: 8001 bytes", "the limit is 8000", &most("argument_bytes"), "send less"]);
    let e = call(&client, &[1; 50], 49).unwrap_err();
    says(e, &["result: 50 bytes", "the limit is 49", "declare more room for it in the call"]);

    // Memory to lend: too large, too many; what is given is counted with it.
    let first = client.buffer(40_000).unwrap();
    let e = client.buffer(40_000).unwrap_err();
    says(
        e,
        &[
            "buffers and room for large arguments: 80000 bytes",
            "the limit is 65536",
            &most("buffer_bytes"),
            "drop some",
        ],
    );
    let second = client.buffer(10).unwrap();
    let e = client.buffer(10).unwrap_err();
    says(e, &["buffers: 3 asked for", "the limit is 2", &most("buffers"), "drop some"]);
    let e = client.call(echo, Call::new().give(Gift::new(10).unwrap())).unwrap_err();
    says(e, &["buffers: 3 asked for"]);
    let e = first.write(39_999, &[1; 2]).unwrap_err();
    says(e, &["access to a buffer: 40001 bytes", "the limit is 40000", "stay within it"]);
    drop((first, second));
    drop(client.buffer(40_000).unwrap());

    let e = Client::connect(served.path()).unwrap_err();
    assert_eq!(e, CallError::Refused(Refusal::Clients { limit: 1 }));
    says(e, &["1 clients", "raise its `Limits::clients`", "close connections"]);
    Outcome::Passed
}

fn a_chain_that_is_too_deep_is_told_how_deep_it_may_be() -> Outcome {
    let far = serve(|d| d.limits(SMALL).portal("echo", 1, echo));
    let near = {
        let path = far.path();
        serve(move |d| {
            d.portal("pass", 1, move |call: &mut Invocation<'_>| {
                let to_failure = |e: CallError| Failure::new(7, e.to_string());
                let client = Client::connect(&path).map_err(to_failure)?;
                let echo = client.portal("echo", 1).map_err(to_failure)?;
                client
                    .call(echo, Call::new().input(call.input(0)?).output(&mut Vec::new(), 8))
                    .map_err(to_failure)
            })
        })
    };
    let client = near.connect();
    let e = client.call(client.portal("pass", 1).unwrap(), Call::new().input(b"deep")).unwrap_err();
    let CallError::Callee(Failure { code: 7, detail }) = e else { panic!("{e:?}") };
    let said = String::from_utf8(detail).unwrap();
    for what in ["2 deep", "limit is 1", "raise it (`Limits::depth`)"] {
        assert!(said.contains(what), "{said}");
    }
    Outcome::Passed
}

fn a_handler_beyond_its_stack_ends_its_domain_and_nobody_else() -> Outcome {
    #[inline(never)]
    fn down(levels: u64) -> u64 {
        let here = std::hint::black_box([levels; 64]);
        if levels == 0 { here[0] } else { down(levels - 1) + here[1] }
    }
    let served = serve(|d| {
        d.activations(1).stack_bytes(64 * 1024).portal("down", 1, |call: &mut Invocation<'_>| {
            let levels = u64::from_ne_bytes(call.input(0)?.try_into().unwrap());
            let sum = down(levels);
            call.output(1)?.extend_from_slice(&sum.to_ne_bytes());
            Ok(())
        })
    });
    let client = served.connect();
    let down = client.portal("down", 1).unwrap();
    let call = |levels: u64| {
        let mut sum = Vec::new();
        let call = Call::new();
        client.call(down, call.input(&levels.to_ne_bytes()).output(&mut sum, 8)).map(|()| sum)
    };
    assert_eq!(call(20), Ok(210u64.to_ne_bytes().to_vec()));
    assert_eq!(call(20_000), Err(CallError::DomainDied), "its guard was hit, or its memory was another's");
    let status = served.wait().unwrap();
    assert!(status.exit_status().is_none(), "by a signal: {status:?}");
    Outcome::Passed
}

/// Can't be made into bytes if its number is odd.
#[derive(Debug, PartialEq, Clone, Copy)]
pub struct Shy(u8);

impl Serialize for Shy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 % 2 {
            0 => serializer.serialize_u8(self.0),
            _ => Err(serde::ser::Error::custom("odd")),
        }
    }
}

impl<'de> Deserialize<'de> for Shy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u8::deserialize(deserializer).map(Self)
    }
}

#[peregrine_call::interface(reply_bytes = 100)]
pub trait Says {
    fn more(&self, shy: Shy, by: u8) -> Shy;
    fn fails(&self, shy: Shy, by: u8) -> Result<(), Shy>;
    fn fill(&self, len: usize) -> Vec<u8>;
}

struct Said;

impl Says for Said {
    fn more(&self, shy: Shy, by: u8) -> Shy {
        Shy(shy.0 + by)
    }

    fn fails(&self, shy: Shy, by: u8) -> Result<(), Shy> {
        Err(Shy(shy.0 + by))
    }

    fn fill(&self, len: usize) -> Vec<u8> {
        vec![1; len]
    }
}

fn what_can_not_be_said_is_told_by_whose_side_it_is() -> Outcome {
    let served = serve(|d| d.interface(SaysPortal(Said)));
    let says = SaysClient::connect(served.path()).unwrap();
    assert_eq!(says.more(Shy(2), 4), Ok(Shy(6)));
    let before = says.connection().usage().unwrap().calls;
    let e = says.more(Shy(3), 1).unwrap_err();
    assert!(matches!(e, Error::Call(CallError::BadArgument(_))), "{e:?}");
    assert_eq!(says.connection().usage().unwrap().calls, before, "nothing was executed");
    let is_of_the_reply = |e: &CallError| {
        let CallError::Callee(Failure { code: Failure::REPLY, .. }) = e else { panic!("{e:?}") };
        assert!(e.to_string().contains("reply can't be passed"), "{e}");
    };
    let Error::Call(e) = says.more(Shy(2), 1).unwrap_err();
    is_of_the_reply(&e);
    assert_eq!(says.fails(Shy(2), 2), Err(Error::Callee(Shy(4))));
    let Error::Call(e) = says.fails(Shy(2), 1).unwrap_err() else { panic!("it could be said") };
    is_of_the_reply(&e);
    // One byte says how many.
    assert_eq!(says.fill(99), Ok(vec![1; 99]));
    let e = says.fill(100).unwrap_err().to_string();
    assert!(
        e.contains("result: 101 bytes asked for, and the limit is 100") && e.contains("`reply_bytes`"),
        "{e}"
    );
    assert_eq!(says.more(Shy(2), 4), Ok(Shy(6)), "it serves on");
    Outcome::Passed
}

fn limits_under_which_nothing_could_be_called_are_refused_at_once() -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let with = |limits: Limits| Domain::builder().limits(limits).serve(&path).map(drop);
    let default = Limits::default;
    for (limits, what) in [
        (Limits { calls_in_flight: 0, ..default() }, "calls_in_flight"),
        (Limits { calls_in_flight: 1 << 32, ..default() }, "calls_in_flight"),
        (Limits { argument_bytes: 1 << 32, ..default() }, "argument_bytes"),
        (Limits { argument_stack_bytes: usize::MAX, ..default() }, "argument_stack_bytes"),
    ] {
        match with(limits) {
            Err(DomainError::Config(said)) => assert!(said.contains(what), "{said}"),
            other => panic!("{limits:?}: {other:?}"),
        }
        assert!(!path.exists());
    }
    with(default()).unwrap();
    let portal = |d: peregrine_call::DomainBuilder, name: &str| d.portal(name, 1, echo);
    let build = Domain::builder;
    for (domain, what) in [
        (build().activations(0), "needs an activation"),
        (portal(portal(build(), "one"), "one"), "two portals are called one"),
        (portal(build(), &"x".repeat(1000)), "portal name of 1000 bytes, at most"),
    ] {
        let e = domain.serve(&path).unwrap_err();
        assert!(matches!(e, DomainError::Config(_)) && e.to_string().contains(what), "{e}");
        assert!(!path.exists());
    }
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        nobody_at_the_path_is_unreachable_whatever_is_there_instead,
        who_hangs_up_before_his_greeting_is_unreachable,
        a_path_that_this_user_may_not_use_is_unreachable_and_says_so,
        a_limit_that_is_reached_is_named_with_its_remedy,
        a_chain_that_is_too_deep_is_told_how_deep_it_may_be,
        a_handler_beyond_its_stack_ends_its_domain_and_nobody_else,
        what_can_not_be_said_is_told_by_whose_side_it_is,
        limits_under_which_nothing_could_be_called_are_refused_at_once,
    ])
}
