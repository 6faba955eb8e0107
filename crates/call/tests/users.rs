//! Domains and clients of different users, and sockets that were inherited: who is who is the kernel's word.

use peregrine_call::{Access, Call, CallError, Client, Domain, Gift, Invocation, Refusal};
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

mod scene;
use scene::{reap, serve, serve_with};

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
    as_nobody(|| {
        let refused = Client::connect(strict.path()).map(drop);
        assert_eq!(refused, Err(CallError::Refused(Refusal::NotAdmitted)));
        assert_eq!(use_it(&Client::connect(users.path()).unwrap()), Ok(NOBODY));
        assert_eq!(use_it(&Client::connect(groups.path()).unwrap()), Ok(NOBODY));
        let client = Client::connect(portal.path()).unwrap();
        assert!(matches!(client.portal("all", 1), Err(CallError::Refused(Refusal::Access(_)))));
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

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_domain_of_another_user_serves_root_and_nobody_else,
        a_client_of_another_user_is_served_if_a_rule_says_so,
        a_domain_over_an_inherited_listener_serves_whoever_connects,
        a_client_over_a_dead_path_is_told_so,
    ])
}
