//! Carried calls: a closure runs in another process on its caller's own stack and heap, and comes back or is rolled back.

use peregrine::{
    Builder, JoinError, MoveError, TrustedDomain, TrustedDomainError, channel, checkpoint, migrate_to,
    node_count, node_id, sleep, spawn, tally,
};
use peregrine_sys::signal::{kill, number};
use std::cell::Cell;
use std::os::unix::fs::MetadataExt;
use std::process::id;
use std::time::Duration;

fn nothing() {}

fn kill_this_process() {
    kill(id() as i32, number::KILL).unwrap();
    loop {
        std::hint::spin_loop();
    }
}

thread_local! {
    static MINE: Cell<u32> = const { Cell::new(0) };
}

#[peregrine::test(nodes = 2)]
fn a_closure_works_on_its_callers_locals_in_another_process() {
    let domain = TrustedDomain::open("scratch", nothing).unwrap();
    let here = (id(), node_id());
    let mut rows = vec![1u64, 2, 3];
    let local = 7u64;
    let address = &raw const local as usize;
    MINE.set(1);
    let (there, sum) = domain
        .run(|| {
            assert_eq!(&raw const local as usize, address, "the same address");
            MINE.set(MINE.get() + 1);
            rows.push(local);
            (id(), rows.iter().sum::<u64>())
        })
        .unwrap();
    assert_eq!((sum, rows), (13, vec![1, 2, 3, 7]));
    assert_eq!(MINE.get(), 2, "its thread-locals came along");
    assert_ne!(there, here.0);
    assert_eq!(there, domain.pid());
    assert_eq!((id(), node_id()), here, "it came back to where it was");
    assert_eq!(domain.run(id).unwrap(), there, "the domain is still the same process");
}

#[peregrine::test(nodes = 2)]
fn a_panic_in_the_closure_goes_on_at_home() {
    let domain = TrustedDomain::open("scratch", nothing).unwrap();
    let here = id();
    let caught = std::panic::catch_unwind(|| domain.run(|| panic!("{}", id())));
    let message = caught.unwrap_err().downcast::<String>().unwrap();
    assert_eq!(*message, domain.pid().to_string(), "it was raised there");
    assert_eq!(id(), here, "and caught here");
    assert_eq!(domain.run(|| 5).unwrap(), 5);
}

#[peregrine::test(nodes = 2)]
fn calls_nest_and_each_returns_to_where_it_was_made() {
    let a = TrustedDomain::open("a", nothing).unwrap();
    let b = TrustedDomain::open("b", nothing).unwrap();
    let home = id();
    let mut path = vec![id()];
    a.run(|| {
        path.push(id());
        b.run(|| {
            path.push(id());
            a.run(|| path.push(id())).unwrap();
            path.push(id());
        })
        .unwrap();
        path.push(id());
        a.run(|| path.push(id())).unwrap();
    })
    .unwrap();
    path.push(id());
    let (a, b) = (a.pid(), b.pid());
    assert_eq!(path, [home, a, b, a, b, a, a, home]);
}

fn moves_to_the_root() {
    std::env::set_current_dir("/").unwrap();
}

#[peregrine::test(nodes = 2)]
fn a_domain_is_set_up_before_its_first_call_and_again_when_it_is_replaced() {
    let domain = TrustedDomain::open("root", moves_to_the_root).unwrap();
    let place = || std::env::current_dir().unwrap();
    let home = place();
    assert_ne!(home.to_str(), Some("/"));
    assert_eq!(domain.run(place).unwrap().to_str(), Some("/"));
    checkpoint();
    if tally().rollbacks == 0 {
        domain.run(kill_this_process).unwrap();
    }
    assert_eq!(domain.run(place).unwrap().to_str(), Some("/"), "the new process too");
    assert_eq!(place(), home, "and nobody else");
    let e = TrustedDomain::open("root", nothing).unwrap_err();
    assert_eq!(e, TrustedDomainError::OtherSetup { name: "root".into() });
}

/// What this process runs, by file, and as whom: real, effective, saved and file-system user and group.
fn identity() -> (u64, u64, Vec<String>) {
    let program = std::fs::metadata("/proc/self/exe").unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ids = status.lines().filter(|line| line.starts_with("Uid:") || line.starts_with("Gid:"));
    (program.dev(), program.ino(), ids.map(str::to_owned).collect())
}

#[peregrine::test(nodes = 2)]
fn a_domain_is_of_its_callers_user_and_build_and_so_is_its_replacement() {
    let domain = TrustedDomain::open("twin", nothing).unwrap();
    let ours = identity();
    assert_eq!(ours.2.len(), 2);
    assert_eq!(domain.run(identity).unwrap(), ours);
    checkpoint();
    if tally().rollbacks == 0 {
        domain.run(kill_this_process).unwrap();
    }
    assert_eq!(domain.run(identity).unwrap(), ours, "forked from the same zygote");
}

#[peregrine::test(nodes = 2, image_interval_ms = 2000)]
fn a_domain_killed_during_a_call_leaves_its_caller_at_the_last_image_with_whole_memory() {
    let domain = TrustedDomain::open("fragile", nothing).unwrap();
    let mut rows: Vec<u64> = (0..10_000).collect();
    let mut runs = 0;
    let first = domain.pid();
    checkpoint();
    let sum: u64 = domain
        .run(|| {
            runs += 1;
            // Torn, if anybody could see it.
            rows.iter_mut().take(5_000).for_each(|r| *r += 1);
            if tally().rollbacks == 0 {
                kill_this_process();
            }
            rows.iter_mut().skip(5_000).for_each(|r| *r += 1);
            rows.iter().sum()
        })
        .unwrap();
    assert_eq!(runs, 1, "the first run never was");
    assert_eq!(sum, (1..=10_000).sum::<u64>());
    assert_eq!(tally().rollbacks, 1);
    assert_ne!(domain.pid(), first);
}

#[peregrine::test(nodes = 2, image_interval_ms = 2000)]
fn an_image_taken_during_a_call_resumes_in_the_middle_of_it() {
    let domain = TrustedDomain::open("fragile", nothing).unwrap();
    let home = id();
    let mut steps = Vec::new();
    let (before, after) = domain
        .run(|| {
            steps.push(1);
            let before = id();
            checkpoint();
            steps.push(2);
            if tally().rollbacks == 0 {
                kill_this_process();
            }
            (before, id())
        })
        .unwrap();
    assert_eq!(steps, [1, 2], "the first step was not made again");
    assert_ne!(before, after, "begun in one process, ended in its replacement");
    assert_eq!(id(), home);
}

#[peregrine::test(nodes = 2, kill_every_ms = 60, least_kills = 5, timeout_s = 60)]
fn threads_that_call_all_the_time_end_right_though_nodes_and_domains_are_killed() {
    let callers: Vec<_> = (0..6u64)
        .map(|i| {
            spawn(
                |i: u64| {
                    let name = if i.is_multiple_of(2) { "even" } else { "odd" };
                    let domain = TrustedDomain::open(name, nothing).unwrap();
                    let mut total = 0u64;
                    let mut seen = Vec::new();
                    for n in 0..400 {
                        seen.push(domain.run(|| {
                            total += n;
                            n
                        }));
                        if n % 40 == 0 {
                            sleep(Duration::from_millis(3));
                        }
                    }
                    let seen: u64 = seen.into_iter().map(Result::unwrap).sum();
                    (total, seen)
                },
                i,
            )
        })
        .collect();
    for caller in callers {
        assert_eq!(caller.join().unwrap(), (79_800, 79_800));
    }
    // Long enough for the kills that the test counts with.
    while tally().kills < 5 {
        sleep(Duration::from_millis(20));
    }
}

#[peregrine::test(nodes = 2, move_every_ms = 1)]
fn nobody_moves_a_thread_out_of_its_call_or_another_into_the_domain() {
    let domain = TrustedDomain::open("scratch", nothing).unwrap();
    let (node, busy) = domain
        .run(|| {
            let first = node_id();
            assert_eq!(migrate_to(0), Err(MoveError::Carried));
            let child = spawn(
                |_: ()| {
                    let begun = std::time::Instant::now();
                    let mut all_ordinary = true;
                    while begun.elapsed() < Duration::from_millis(60) {
                        all_ordinary &= node_id() < node_count();
                    }
                    all_ordinary
                },
                (),
            );
            let begun = std::time::Instant::now();
            while begun.elapsed() < Duration::from_millis(60) {
                assert_eq!(node_id(), first);
            }
            sleep(Duration::from_millis(5));
            assert_eq!(node_id(), first);
            (first, child)
        })
        .unwrap();
    assert!(node >= node_count());
    assert!(busy.join().unwrap(), "a thread spawned there runs on ordinary nodes");
    assert!(node_id() < node_count());
}

#[peregrine::test(nodes = 2)]
fn a_node_runs_other_threads_while_one_is_away() {
    let domain = TrustedDomain::open("slow", nothing).unwrap();
    let (tx, rx) = channel::<u32>();
    let other = Builder::new()
        .node(node_id())
        .spawn(
            |rx: peregrine::Receiver<u32>| {
                let n = rx.recv().unwrap();
                (n, node_id())
            },
            rx,
        )
        .unwrap();
    let answer = domain
        .run(|| {
            tx.send(&9).unwrap();
            let done = || other.is_finished();
            while !done() {
                sleep(Duration::from_millis(1));
            }
            other.join().unwrap().0
        })
        .unwrap();
    assert_eq!(answer, 9);
}

fn fails() {
    panic!("no such device");
}

fn dies() {
    kill_this_process();
}

#[peregrine::test(nodes = 2)]
fn a_set_up_that_fails_makes_an_unusable_domain_and_harms_nobody_else() {
    let failed = |name: &str| Err(TrustedDomainError::SetupFailed { name: name.into() });
    assert_eq!(TrustedDomain::open("panics", fails), failed("panics"));
    assert_eq!(TrustedDomain::open("dies", dies), failed("dies"));
    assert_eq!(TrustedDomain::open("well", nothing).unwrap().run(|| 3).unwrap(), 3);
    assert_eq!(TrustedDomain::open("", nothing), Err(TrustedDomainError::Name { len: 0 }));
    assert_eq!(tally().rollbacks, 0);
}

/// Where it is noted that set-ups are to fail from now on: outside of the World, which goes back.
fn broken() -> std::path::PathBuf {
    std::env::temp_dir().join(format!("peregrine-broken-{}", peregrine_sys::process::parent_pid()))
}

fn fails_once_broken() {
    assert!(!broken().exists(), "broken meanwhile");
}

#[peregrine::test(nodes = 2, image_interval_ms = 2000)]
fn no_call_is_made_into_a_domain_that_could_not_be_set_up_again() {
    let domain = TrustedDomain::open("brittle", fails_once_broken).unwrap();
    assert_eq!(domain.run(|| 3).unwrap(), 3);
    // On a call when its domain dies for good.
    let inside = Builder::new()
        .name("inside")
        .spawn(
            |_: ()| {
                let domain = TrustedDomain::open("brittle", fails_once_broken).unwrap();
                domain
                    .run(|| {
                        checkpoint();
                        if tally().rollbacks == 0 {
                            std::fs::write(broken(), "").unwrap();
                            kill_this_process();
                        }
                        "it went on in a process without a set-up".to_owned()
                    })
                    .unwrap()
            },
            (),
        )
        .unwrap();
    let e = inside.join().unwrap_err();
    assert!(matches!(&e, JoinError::Quarantined { name, .. } if name == "inside"), "{e}");
    assert!(e.to_string().contains("set up again"), "{e}");
    let failed = TrustedDomainError::SetupFailed { name: "brittle".into() };
    assert_eq!(domain.run(|| 4), Err(failed.clone()));
    assert_eq!(TrustedDomain::open("brittle", fails_once_broken), Err(failed));
    assert_eq!(TrustedDomain::open("well", nothing).unwrap().run(|| 3).unwrap(), 3);
    std::fs::remove_file(broken()).unwrap();
}

#[peregrine::test(nodes = 2, image_interval_ms = 2000)]
fn a_value_that_names_no_domain_of_this_world_is_refused() {
    // As it would come from another World.
    let value = |place: u8| postcard::from_bytes::<TrustedDomain>(&[place]).unwrap();
    let unknown = |place, domains| Err(TrustedDomainError::Unknown { place, domains });
    assert_eq!(value(5).run(|| 3), unknown(5, 0));
    checkpoint();
    if tally().rollbacks == 0 {
        let late = TrustedDomain::open("late", nothing).unwrap();
        assert_eq!(late, value(0));
        assert_eq!(value(0).run(|| 4), Ok(4));
        assert_eq!(value(1).run(|| 4), unknown(1, 1));
        kill_this_process();
    }
    // Taken back, though its process may still be there.
    assert_eq!(value(0).run(|| 4), unknown(0, 0));
    let other = TrustedDomain::open("other", nothing).unwrap();
    assert_eq!(value(0).run(id), Ok(other.pid()), "who has its number now");
    for name in ["", "a\0b", &"x".repeat(33)] {
        let refused = TrustedDomain::open(name, nothing);
        assert_eq!(refused, Err(TrustedDomainError::Name { len: name.len() }));
    }
}

#[peregrine::test(nodes = 1)]
fn there_is_a_bound_on_domains() {
    for i in 0..8 {
        TrustedDomain::open(&format!("d{i}"), nothing).unwrap();
    }
    let e = TrustedDomain::open("d8", nothing).unwrap_err();
    assert_eq!(e, TrustedDomainError::TooMany { domains: 8, nodes: 1 });
}

#[peregrine::test(nodes = 2, timeout_s = 60)]
fn a_thread_that_crashes_its_domain_each_time_is_taken_away() {
    let bad = Builder::new()
        .name("bad")
        .spawn(
            |_: ()| {
                let domain = TrustedDomain::open("victim", nothing).unwrap();
                domain.run(|| std::process::abort()).unwrap();
            },
            (),
        )
        .unwrap();
    let e = bad.join().unwrap_err();
    assert!(matches!(&e, JoinError::Quarantined { name, .. } if name == "bad"), "{e}");
    assert_eq!(TrustedDomain::open("victim", nothing).unwrap().run(|| 1).unwrap(), 1, "the domain serves on");
}

#[test]
fn outside_a_world_a_domain_is_refused() {
    assert_eq!(TrustedDomain::open("any", nothing), Err(TrustedDomainError::NoThread));
}
