//! Domains and clients of different users, and sockets that were inherited: who is who is the kernel's word.

use peregrine_call::{Access, Call, CallError, Client, Domain, Gift, Invocation, Refusal};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use peregrine_sys::{memfd, rustix};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

mod attack;
use attack::raw::{FromClient, FromDomain, Memory, Socket};
use attack::scene::{self, reap, serve, serve_with};

const NOBODY: u32 = 65534;

/// Echoes argument 0, and adds the sums of what is lent and given: every way that bytes cross.
fn all_ways(call: &mut Invocation<'_>) -> Result<(), peregrine_call::Failure> {
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u64::from(b)).sum::<u64>();
    let total = sum(&call.lent(1)?.to_vec()) + sum(&call.take_given(2)?);
    let echo = call.input(0)?.to_vec();
    *call.output(3)? = echo;
    call.output(4)?.extend_from_slice(&total.to_ne_bytes());
    call.output(4)?.extend_from_slice(&call.caller().uid.to_ne_bytes());
    Ok(())
}

/// Calls `all` with arguments of all sizes; whom the domain takes us for.
fn use_it(client: &Client) -> Result<u32, CallError> {
    let all = client.portal("all", 1)?;
    let mut uid = None;
    for len in [1usize, 5000, 400_000] {
        let bytes = vec![3u8; len];
        let lent = client.buffer(len)?;
        lent.write(0, &bytes)?;
        let mut gift = Gift::new(len)?;
        gift.fill(4);
        let (mut echo, mut said) = (Vec::new(), Vec::new());
        let call =
            Call::new().input(&bytes).lend(&lent).give(gift).output(&mut echo, len).output(&mut said, 12);
        client.call(all, call)?;
        assert!(echo == bytes);
        let (total, who) = said.split_at(8);
        assert_eq!(total, (7 * len as u64).to_ne_bytes());
        uid = Some(u32::from_ne_bytes(who.try_into().unwrap()));
    }
    Ok(uid.unwrap())
}

fn open_to_all(path: &Path) {
    std::fs::set_permissions(path.parent().unwrap(), PermissionsExt::from_mode(0o777)).unwrap();
}

/// Runs `f` as an ordinary user in a process of its own.
fn as_nobody(f: impl FnOnce()) {
    // SAFETY: this process has one thread.
    match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Child => {
            process::die_with_parent();
            process::become_user(NOBODY).unwrap();
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
            process::exit_now(if done.is_ok() { 0 } else { 1 });
        }
        Forked::Parent(pid) => assert_eq!(reap(pid), Some(0), "what went wrong as nobody is above"),
    }
}

fn a_domain_of_another_user_serves_root_and_nobody_else() -> testkit::Outcome {
    if !process::is_root() {
        testkit::skip!("needs root, to have a second user");
    }
    let served = serve_with(
        |d| d.portal("all", 1, all_ways),
        |path| {
            open_to_all(path);
            process::become_user(NOBODY).unwrap();
        },
    );
    let client = served.connect();
    assert_eq!(client.domain_credentials().uid, NOBODY, "asked of the kernel");
    assert_eq!(use_it(&client), Ok(0));
    drop(client);
    // Its own user too; a third one not.
    as_nobody(|| assert_eq!(use_it(&Client::connect(served.path()).unwrap()), Ok(NOBODY)));
    testkit::Outcome::Passed
}

fn a_client_of_another_user_is_served_if_a_rule_says_so() -> testkit::Outcome {
    if !process::is_root() {
        testkit::skip!("needs root, to have a second user");
    }
    let open = |path: &Path| open_to_all(path);
    let strict = serve_with(|d| d.portal("all", 1, all_ways), open);
    let rules = |access| serve_with(move |d| d.access(access).portal("all", 1, all_ways), open);
    let (users, groups) = (rules(Access::Users(vec![NOBODY])), rules(Access::Groups(vec![NOBODY])));
    let portal = serve_with(
        |d| {
            d.access(Access::Everyone).portal_for("all", 1, Access::SameUser, all_ways).portal_for(
                "some",
                1,
                Access::Users(vec![NOBODY]),
                |_: &mut Invocation<'_>| Ok(()),
            )
        },
        open,
    );
    for domain in [&strict, &users, &groups, &portal] {
        // The socket itself lets every user write, as far as the file system is asked.
        std::fs::set_permissions(domain.path(), PermissionsExt::from_mode(0o777)).unwrap();
    }
    let all = portal.connect().portal("all", 1).unwrap();
    as_nobody(|| {
        let refused = Client::connect(strict.path()).map(drop);
        assert_eq!(refused, Err(CallError::Refused(Refusal::NotAdmitted)));
        assert_eq!(use_it(&Client::connect(users.path()).unwrap()), Ok(NOBODY));
        assert_eq!(use_it(&Client::connect(groups.path()).unwrap()), Ok(NOBODY));
        let client = Client::connect(portal.path()).unwrap();
        assert!(matches!(client.portal("all", 1), Err(CallError::Refused(Refusal::Access(_)))));
        // The rule is asked at the call, not when the number is told: another's number opens nothing.
        let forged = client.call(all, Call::new());
        assert_eq!(forged, Err(CallError::Refused(Refusal::Access(all))));
        client.call(client.portal("some", 1).unwrap(), Call::new()).unwrap();
    });
    testkit::Outcome::Passed
}

fn a_domain_over_an_inherited_listener_serves_whoever_connects() -> testkit::Outcome {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("activated");
    // As a supervisor does that starts its services with their sockets.
    let socket =
        net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    // SAFETY: this process has one thread.
    let Forked::Parent(pid) = (unsafe { process::fork_with(ForkFlags::default()) }).unwrap() else {
        process::die_with_parent();
        let _domain = Domain::builder().portal("all", 1, all_ways).serve_on(socket).unwrap();
        loop {
            std::thread::park();
        }
    };
    drop(socket);
    let connect = || loop {
        match Client::connect(&path) {
            Ok(client) => return client,
            Err(CallError::Unreachable { .. }) => std::thread::sleep(std::time::Duration::from_millis(1)),
            Err(e) => panic!("{e}"),
        }
    };
    let (one, other) = (connect(), connect());
    assert_eq!(one.domain_credentials().pid, pid as u32, "who listens, not who made the socket");
    let me = peregrine_sys::rustix::process::geteuid().as_raw();
    assert_eq!((use_it(&one), use_it(&other)), (Ok(me), Ok(me)));
    scene::kill(pid);
    assert_eq!(use_it(&one), Err(CallError::DomainDied));
    testkit::Outcome::Passed
}

fn a_client_over_a_dead_path_is_told_so() -> testkit::Outcome {
    let served = serve(|d| d.portal("all", 1, all_ways));
    served.kill();
    assert!(matches!(Client::connect(served.path()), Err(CallError::Unreachable { .. })));
    testkit::Outcome::Passed
}

fn a_priority_that_the_kernel_does_not_permit_is_not_adopted_and_the_call_is_made() -> testkit::Outcome {
    if !process::is_root() {
        testkit::skip!("needs root, to have a second user");
    }
    process::set_nice(0, 0).unwrap();
    // The domain would permit it; its user may not.
    let served = serve_with(
        |d| {
            d.activations(1).most_urgent_nice(-10).portal("nice", 1, |call: &mut Invocation<'_>| {
                call.output(0)?.push(process::nice_of(0).unwrap() as i8 as u8);
                Ok(())
            })
        },
        |path| {
            open_to_all(path);
            process::become_user(NOBODY).unwrap();
        },
    );
    let client = served.connect();
    let nice = client.portal("nice", 1).unwrap();
    process::set_nice(0, -5).unwrap();
    for _ in 0..2 {
        let mut out = Vec::new();
        let attributes = peregrine_call::Attributes { priority: true, ..Default::default() };
        client.call(nice, Call::new().output(&mut out, 1).attributes(attributes)).unwrap();
        assert_eq!(out, [0]);
    }
    testkit::Outcome::Passed
}

/// What a client lends has this in it, and nothing else.
const LENT: u8 = 0x5a;
const LENT_BYTES: usize = 5000;
const LINE_BYTES: usize = 64 * 1024;

/// A domain of another user that tries everything with what it is handed, and exits with the number of the first thing that works.
fn tries_everything(socket: &Socket, client: u32) -> i32 {
    let mut tried = [false; 2];
    while let Some((message, fd)) = socket.receive::<FromClient>(std::time::Duration::from_millis(999)) {
        let (results, len) = match message {
            FromClient::Hello { .. } => {
                let name = "other".into();
                let welcome =
                    FromDomain::Welcome { id: 1, name, calls_in_flight: 4, argument_bytes: 1 << 20 };
                socket.send(&welcome, None);
                continue;
            }
            FromClient::Resolve { .. } => {
                socket.send(&FromDomain::Portal { id: 0, version: 1 }, None);
                continue;
            }
            FromClient::OpenLine => {
                let pages = peregrine_base::PageCount::for_bytes(LINE_BYTES);
                let line = memfd::create(c"peregrine-line", pages, memfd::Pages::Base).unwrap();
                memfd::seal_size(&line).unwrap();
                socket.send(&FromDomain::Line { index: 0, len_bytes: LINE_BYTES as u64 }, Some(line.as_fd()));
                continue;
            }
            FromClient::AddBuffer { len_bytes, results } => (results, len_bytes as usize),
            // The client's test is over.
            FromClient::Usage => return if tried == [true; 2] { 0 } else { 80 },
            _ => continue,
        };
        let Some(fd) = fd else { return 1 };
        let what = attempts(&fd, results, len, client);
        if what != 0 {
            return what;
        }
        tried[usize::from(results)] = true;
        socket.send(&FromDomain::Buffer { id: 1 }, None);
    }
    90
}

/// The number of the first attempt that works; 0 if none does.
fn attempts(fd: &OwnedFd, results: bool, len: usize, client: u32) -> i32 {
    use rustix::fs::{Mode, OFlags};
    let same = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let open = |path: &str, flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).is_ok();
    let size = rustix::fs::fstat(fd).unwrap().st_size as usize;
    // Beyond what it is given, all is zeros: of the last page too.
    let mut all = vec![1; size + 4096];
    let read = rustix::io::pread(fd, &mut all, 0).unwrap();
    let others = if results { 0 } else { len };
    // It may be asked to write results; then it may write them and nothing more.
    let writable = rustix::io::pwrite(fd, &[LENT], 0).is_ok() || Memory::map(fd, len).is_some();
    let tries = [
        open(&same, OFlags::RDWR),
        open(&same, OFlags::WRONLY | OFlags::TRUNC),
        open(&same, OFlags::RDONLY),
        rustix::fs::ftruncate(fd, 0).is_ok(),
        rustix::fs::ftruncate(fd, size as u64 + 4096).is_ok(),
        rustix::fs::fchmod(fd, Mode::from_raw_mode(0o666)).is_ok(),
        rustix::fs::fchown(fd, Some(rustix::fs::Uid::from_raw(NOBODY)), None).is_ok(),
        rustix::fs::fcntl_add_seals(fd, rustix::fs::SealFlags::WRITE).is_ok(),
        // The one that is granted though the client has it mapped, unless no seal is any more.
        rustix::fs::fcntl_add_seals(fd, rustix::fs::SealFlags::FUTURE_WRITE).is_ok(),
        writable && !results,
        read != size || size > len.next_multiple_of(4096),
        all[others..read].iter().any(|&b| b != 0),
        open(&format!("/proc/{client}/mem"), OFlags::RDONLY),
        std::fs::read_dir(format!("/proc/{client}/fd")).is_ok(),
        std::fs::read(format!("/proc/{client}/maps")).is_ok_and(|maps| !maps.is_empty()),
    ];
    tries.iter().position(|&works| works).map_or(0, |at| at as i32 + 2)
}

fn a_hostile_domain_of_another_user_can_do_nothing_with_what_it_is_lent_but_read_it() -> testkit::Outcome {
    if !process::is_root() {
        testkit::skip!("needs root, to have a second user");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let listener =
        net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    net::listen(&listener, 4).unwrap();
    let me = std::process::id();
    // SAFETY: this process has one thread.
    let Forked::Parent(pid) = (unsafe { process::fork_with(ForkFlags::default()) }).unwrap() else {
        process::die_with_parent();
        process::become_user(NOBODY).unwrap();
        let socket = Socket(net::accept(&listener).unwrap());
        process::exit_now(tries_everything(&socket, me));
    };
    drop(listener);
    let client = Client::connect(&path).unwrap();
    let portal = client.portal("any", 1).unwrap();
    for _ in 0..2 {
        // Its attempts are over when it answers; it does not if one of them worked.
        let Ok(lent) = client.buffer(LENT_BYTES) else { panic!("attempt {:?} worked", reap(pid)) };
        lent.write(0, &[LENT; LENT_BYTES]).unwrap();
    }
    // Room for large arguments and results.
    let soon = peregrine_call::Deadline::after(std::time::Duration::from_millis(300));
    let large = vec![0; 900_000];
    let _ = client.call(portal, Call::new().input(&large).output(&mut Vec::new(), 1 << 20).deadline(soon));
    let _ = client.usage();
    assert_eq!(reap(pid), Some(0), "the attempt of that number, less two, worked");
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_domain_of_another_user_serves_root_and_nobody_else,
        a_client_of_another_user_is_served_if_a_rule_says_so,
        a_domain_over_an_inherited_listener_serves_whoever_connects,
        a_client_over_a_dead_path_is_told_so,
        a_priority_that_the_kernel_does_not_permit_is_not_adopted_and_the_call_is_made,
        a_hostile_domain_of_another_user_can_do_nothing_with_what_it_is_lent_but_read_it,
    ])
}
