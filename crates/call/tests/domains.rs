//! What a domain promises to those who run it.

use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_call::{
    Access, Affinity, Attributes, Call, CallError, Client, Deadline, Domain, Failure, Invocation, Limits,
    Refusal, Wire, WiredCall, socket_pair,
};
use peregrine_sys::process::{self, CpuSet, ForkFlags, Forked};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

mod scene;
use scene::{serve, serve_with};

fn sleep_ms(call: &mut Invocation<'_>) -> Result<(), Failure> {
    std::thread::sleep(Duration::from_millis(u64::from(call.input(0)?[0])));
    Ok(())
}

/// A handler that comes to the gate twice, and waits there for whoever opens it.
fn holds() -> (impl peregrine_call::Handler, Arc<Barrier>) {
    let gate = Arc::new(Barrier::new(2));
    let inside = gate.clone();
    let handler = move |_: &mut Invocation<'_>| {
        inside.wait();
        inside.wait();
        Ok(())
    };
    (handler, gate)
}

fn path() -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    (dir, path)
}

fn the_last_activation_tells_the_domain_which_adds_more() -> testkit::Outcome {
    let (_dir, path) = path();
    let told = Arc::new(AtomicUsize::new(0));
    let counted = told.clone();
    let told_on: Arc<Mutex<Vec<String>>> = Arc::default();
    let said_by = told_on.clone();
    let (hold, gate) = holds();
    // Nobody returns before all six are there.
    let all = Barrier::new(6);
    let domain = Domain::builder()
        .activations(2)
        .portal("meet", 1, move |_: &mut Invocation<'_>| {
            all.wait();
            Ok(())
        })
        .portal("hold", 1, hold)
        .portal("name", 1, |call: &mut Invocation<'_>| {
            call.output(0)?.extend_from_slice(std::thread::current().name().unwrap().as_bytes());
            Ok(())
        })
        .on_last_activation(move |activations| {
            counted.fetch_add(1, Ordering::Relaxed);
            said_by.lock().unwrap().push(std::thread::current().name().unwrap().to_owned());
            if activations.total() < 6 {
                activations.add(2);
            }
        })
        .serve(&path)
        .unwrap();
    let client = Client::connect(&path).unwrap();
    let [meet, hold, name] = ["meet", "hold", "name"].map(|name| client.portal(name, 1).unwrap());
    let named = || {
        let mut out = Vec::new();
        client.call(name, Call::new().output(&mut out, 64)).unwrap();
        String::from_utf8(out).unwrap()
    };
    for _ in 0..10 {
        named();
    }
    assert_eq!(told.load(Ordering::Relaxed), 0, "there was always another");
    std::thread::scope(|scope| {
        scope.spawn(|| client.call(hold, Call::new()).unwrap());
        gate.wait();
        let last = named();
        assert_eq!(*told_on.lock().unwrap(), [last], "on the last activation itself, before the call");
        gate.wait();
    });
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| client.call(meet, Call::new()).unwrap());
        }
    });
    assert_eq!(domain.stats().activations, 6, "as many as were asked for");
    testkit::Outcome::Passed
}

fn without_a_free_activation_a_caller_waits_within_its_deadline() -> testkit::Outcome {
    let (_dir, path) = path();
    let (hold, gate) = holds();
    let domain = Domain::builder()
        .activations(1)
        .portal("sleep", 1, sleep_ms)
        .portal("hold", 1, hold)
        .serve(&path)
        .unwrap();
    let client = Client::connect(&path).unwrap();
    let (sleep, hold) = (client.portal("sleep", 1).unwrap(), client.portal("hold", 1).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| client.call(hold, Call::new()).unwrap());
        // Inside.
        gate.wait();
        let soon = Deadline::after(Duration::from_millis(40));
        assert_eq!(client.call(sleep, Call::new().input(&[0]).deadline(soon)), Err(CallError::Deadline));
        assert_eq!(domain.stats().running, 1, "the other call goes on");
        gate.wait();
        // Without one it gets its turn.
        client.call(sleep, Call::new().input(&[0])).unwrap();
    });
    let stats = domain.stats();
    assert_eq!((stats.running, stats.waiting, stats.activations), (0, 0, 1));
    testkit::Outcome::Passed
}

fn a_call_whose_deadline_passes_in_the_queue_is_not_executed() -> testkit::Outcome {
    let (_dir, path) = path();
    let (hold, gate) = holds();
    let executed = Arc::new(AtomicUsize::new(0));
    let counted = executed.clone();
    let domain = Domain::builder()
        .activations(1)
        .portal("hold", 1, hold)
        .portal("count", 1, move |_: &mut Invocation<'_>| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .serve(&path)
        .unwrap();
    let client = Client::connect(&path).unwrap();
    let (hold, count) = (client.portal("hold", 1).unwrap(), client.portal("count", 1).unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| client.call(hold, Call::new()).unwrap());
        // Inside.
        gate.wait();
        // One whose caller says that it has given up, and two whose callers say nothing: they go by the deadline alone, and by the drop.
        let dropped = client.start(count, Call::new()).unwrap();
        // However slow the machine is, one of these is sent in time.
        let (soon, silent) = (5..)
            .find_map(|n| {
                let soon = Deadline::after(Duration::from_millis(1 << n));
                client.start(count, Call::new().deadline(soon)).ok().map(|silent| (soon, silent))
            })
            .unwrap();
        assert_eq!(client.call(count, Call::new().deadline(soon)), Err(CallError::Deadline));
        while soon.left().is_some() {
            std::thread::yield_now();
        }
        drop(dropped);
        gate.wait();
        // Behind the others in the queue.
        client.call(count, Call::new()).unwrap();
        assert_eq!(executed.load(Ordering::Relaxed), 1, "the last alone");
        assert_eq!(silent.wait(), Err(CallError::Deadline));
    });
    drop(domain);
    testkit::Outcome::Passed
}

fn shutdown_lets_running_calls_end_and_terminates_those_that_wait() -> testkit::Outcome {
    let (_dir, path) = path();
    let (hold, gate) = holds();
    let domain = Domain::builder()
        .activations(1)
        .portal("sleep", 1, sleep_ms)
        .portal("hold", 1, hold)
        .serve(&path)
        .unwrap();
    let client = Client::connect(&path).unwrap();
    let (sleep, hold) = (client.portal("sleep", 1).unwrap(), client.portal("hold", 1).unwrap());
    std::thread::scope(|scope| {
        let running = scope.spawn(|| client.call(hold, Call::new()));
        gate.wait();
        let waiting = scope.spawn(|| client.call(sleep, Call::new().input(&[0])));
        // One that nobody waits for in the call itself.
        let begun = client.start(sleep, Call::new().input(&[0])).unwrap();
        while domain.stats().waiting < 2 {
            std::thread::yield_now();
        }
        scope.spawn(|| {
            // Some time after the next line has begun, which waits for this one.
            std::thread::sleep(Duration::from_millis(100));
            gate.wait();
        });
        domain.shutdown();
        assert_eq!(running.join().unwrap(), Ok(()));
        assert_eq!(waiting.join().unwrap(), Err(CallError::Terminated));
        assert_eq!(begun.wait(), Err(CallError::Terminated));
    });
    assert_eq!(client.call(sleep, Call::new().input(&[0])), Err(CallError::DomainDied));
    assert!(!path.exists());
    testkit::Outcome::Passed
}

fn a_wired_domain_runs_each_call_on_a_thread_of_its_own_library() -> testkit::Outcome {
    struct Library(Arc<AtomicUsize>);
    impl Wire for Library {
        fn run(&self, call: WiredCall<'_>) {
            // A user-level thread for real: another stack, on this OS thread.
            let stack = corosensei::stack::DefaultStack::new(128 * 1024).unwrap();
            let thread = corosensei::ScopedCoroutine::<(), (), (), _>::with_stack(stack, |_, ()| call.run());
            thread.scope(|mut thread| {
                thread.as_mut().resume(());
            });
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
    let (_dir, path) = path();
    let wired = Arc::new(AtomicUsize::new(0));
    let domain = Domain::builder()
        .wire(Library(wired.clone()))
        .portal("sleep", 1, sleep_ms)
        .portal("panic", 1, |_: &mut Invocation<'_>| panic!("wired"))
        .serve(&path)
        .unwrap();
    let client = Client::connect(&path).unwrap();
    for _ in 0..5 {
        client.call(client.portal("sleep", 1).unwrap(), Call::new().input(&[0])).unwrap();
        let panic = client.call(client.portal("panic", 1).unwrap(), Call::new());
        assert_eq!(panic, Err(CallError::Panicked("wired".into())));
    }
    assert_eq!(wired.load(Ordering::Relaxed), 10);
    drop(domain);
    testkit::Outcome::Passed
}

fn code_of_the_domains_own_may_panic_and_costs_neither_caller_nor_activation() -> testkit::Outcome {
    /// Runs every third call, drops every third, and panics with every third after it has run.
    struct Unreliable(AtomicUsize);
    impl Wire for Unreliable {
        fn run(&self, call: WiredCall<'_>) {
            match self.0.fetch_add(1, Ordering::Relaxed) % 3 {
                0 => call.run(),
                1 => drop(call),
                _ => {
                    call.run();
                    panic!("lost its way");
                }
            }
        }
    }
    let (_dir, path) = path();
    let executed = Arc::new(AtomicUsize::new(0));
    let counted = executed.clone();
    let told = Arc::new(AtomicUsize::new(0));
    let tells = told.clone();
    let domain = Domain::builder()
        .activations(1)
        .wire(Unreliable(AtomicUsize::new(0)))
        .on_last_activation(move |_| {
            tells.fetch_add(1, Ordering::Relaxed);
            panic!("on the last activation");
        })
        .portal("count", 1, move |_: &mut Invocation<'_>| {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok(())
        })
        .serve(&path)
        .unwrap();
    let client = Client::connect(&path).unwrap();
    let count = client.portal("count", 1).unwrap();
    for n in 1..=5 {
        let call = || client.call(count, Call::new().deadline(Deadline::after(Duration::from_secs(30))));
        assert_eq!(call(), Ok(()));
        let dropped = "the domain's wire did not run the call".to_owned();
        assert_eq!(call(), Err(CallError::Panicked(dropped)));
        assert_eq!(call(), Err(CallError::Panicked("in the domain's wire: lost its way".to_owned())));
        assert_eq!(executed.load(Ordering::Relaxed), 2 * n, "each at most once");
        assert_eq!(told.load(Ordering::Relaxed), 3 * n);
    }
    assert_eq!(domain.stats().activations, 1);
    testkit::Outcome::Passed
}

fn the_activation_runs_on_the_callers_core_and_not_outside_its_own_set() -> testkit::Outcome {
    let all = CpuSet::current().unwrap();
    let cpus: Vec<usize> = all.iter().collect();
    if cpus.len() < 2 {
        testkit::skip!("needs two processors");
    }
    let where_am_i = |call: &mut Invocation<'_>| {
        call.output(0)?.push(process::current_cpu() as u8);
        Ok(())
    };
    let free = serve(|d| d.portal("where", 1, where_am_i));
    let first = cpus[0];
    let bound =
        serve_with(|d| d.portal("where", 1, where_am_i), |_| CpuSet::one(first).unwrap().bind().unwrap());
    let ask = |client: &Client, affinity| {
        let mut out = Vec::new();
        let call = Call::new().output(&mut out, 1).affinity(affinity);
        client.call(client.portal("where", 1).unwrap(), call).unwrap();
        usize::from(out[0])
    };
    let (free, bound) = (free.connect(), bound.connect());
    for &cpu in &[cpus[1], cpus[0], cpus[1]] {
        CpuSet::one(cpu).unwrap().bind().unwrap();
        assert_eq!(ask(&free, Affinity::Together), cpu);
        assert_ne!(ask(&free, Affinity::Apart), cpu);
        assert_eq!(ask(&free, Affinity::Together), cpu, "it comes back");
        assert_eq!(ask(&bound, Affinity::Together), first);
    }
    testkit::Outcome::Passed
}

fn a_call_that_may_run_anywhere_is_not_bound_by_those_before_it() -> testkit::Outcome {
    let all = CpuSet::current().unwrap();
    if all.iter().count() < 2 {
        testkit::skip!("needs two processors");
    }
    let served = serve(|d| {
        d.activations(1).portal("may", 1, |call: &mut Invocation<'_>| {
            call.output(0)?.extend(CpuSet::current().unwrap().iter().map(|cpu| cpu as u8));
            Ok(())
        })
    });
    let client = served.connect();
    let may = client.portal("may", 1).unwrap();
    let cpus = |affinity| {
        let mut out = Vec::new();
        client.call(may, Call::new().output(&mut out, 256).affinity(affinity)).unwrap();
        out.into_iter().map(usize::from).collect::<Vec<_>>()
    };
    let everywhere: Vec<usize> = all.iter().collect();
    assert_eq!(cpus(Affinity::Anywhere), everywhere);
    for bound in [Affinity::Together, Affinity::Apart, Affinity::Together] {
        assert_eq!(cpus(bound).len(), 1);
        assert_eq!(cpus(Affinity::Anywhere), everywhere, "after {bound:?}");
    }
    testkit::Outcome::Passed
}

fn a_more_urgent_caller_lends_its_priority_for_the_call() -> testkit::Outcome {
    if !process::is_root() {
        testkit::skip!("a nice value below 0 needs root or RLIMIT_NICE");
    }
    // Whatever the tests were started with.
    process::set_nice(0, 0).unwrap();
    let portals = |d: peregrine_call::DomainBuilder| {
        d.activations(1)
            .portal("nice", 1, |call: &mut Invocation<'_>| {
                call.output(0)?.push(process::nice_of(0).unwrap() as i8 as u8);
                Ok(())
            })
            .portal("change", 1, |_: &mut Invocation<'_>| {
                process::set_nice(0, 3).unwrap();
                Ok(())
            })
    };
    // Whoever runs the tests may be nicer than usual.
    process::set_nice(0, 0).unwrap();
    let generous = serve(|d| portals(d).most_urgent_nice(-5));
    let strict = serve(portals);
    let nice = |client: &Client, priority| {
        let mut out = Vec::new();
        let attributes = Attributes { priority, ..Attributes::default() };
        client
            .call(client.portal("nice", 1).unwrap(), Call::new().output(&mut out, 1).attributes(attributes))
            .unwrap();
        i32::from(out[0] as i8)
    };
    let (generous, strict) = (generous.connect(), strict.connect());
    assert_eq!(nice(&generous, true), 0, "an equal one changes nothing");
    process::set_nice(0, 5).unwrap();
    assert_eq!(nice(&generous, true), 0, "nor does one that is less urgent");
    process::set_nice(0, -3).unwrap();
    assert_eq!((nice(&generous, true), nice(&generous, false)), (-3, 0), "adopted, and restored");
    process::set_nice(0, -15).unwrap();
    assert_eq!((nice(&generous, true), nice(&generous, false)), (-5, 0), "up to the domain's bound");
    assert_eq!(nice(&strict, true), 0);
    let attributes = Attributes { priority: true, ..Attributes::default() };
    generous.call(generous.portal("change", 1).unwrap(), Call::new().attributes(attributes)).unwrap();
    assert_eq!(nice(&generous, false), 3, "what the callee changed meanwhile stays");
    testkit::Outcome::Passed
}

fn a_domain_over_an_inherited_pair_serves_one_client() -> testkit::Outcome {
    let (ours, theirs) = socket_pair().unwrap();
    // SAFETY: this process has one thread yet.
    let Forked::Parent(pid) = (unsafe { process::fork_with(ForkFlags::default()) }).unwrap() else {
        process::die_with_parent();
        drop(ours);
        let _domain = Domain::builder().portal("sleep", 1, sleep_ms).serve_pair(theirs).unwrap();
        loop {
            std::thread::park();
        }
    };
    drop(theirs);
    let client = Client::over(ours).unwrap();
    let sleep = client.portal("sleep", 1).unwrap();
    client.call(sleep, Call::new().input(&[1])).unwrap();
    scene::kill(pid);
    let begun = Instant::now();
    assert_eq!(client.call(sleep, Call::new().input(&[1])), Err(CallError::DomainDied));
    assert!(begun.elapsed() < Duration::from_secs(15));
    testkit::Outcome::Passed
}

/// A call that waits long is watched: whoever waits is woken when its domain dies.
fn a_death_in_a_long_call_wakes_all_its_callers() -> testkit::Outcome {
    let served = serve(|d| {
        d.activations(4).portal("hold", 1, |_: &mut Invocation<'_>| {
            loop {
                std::thread::park();
            }
        })
    });
    let client = served.connect();
    let hold = client.portal("hold", 1).unwrap();
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..3).map(|_| scope.spawn(|| client.call(hold, Call::new()))).collect();
        let is_watch = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.unwrap().path().join("comm"))
                .is_ok_and(|name| name == "peregrine-watch\n")
        };
        let begun = Instant::now();
        while !std::fs::read_dir("/proc/self/task").unwrap().any(is_watch) {
            assert!(begun.elapsed() < Duration::from_secs(30), "nobody watches");
            std::thread::sleep(Duration::from_millis(1));
        }
        served.kill();
        for caller in callers {
            assert_eq!(caller.join().unwrap(), Err(CallError::DomainDied));
        }
    });
    testkit::Outcome::Passed
}

/// Bytes of the mapping that the running thread's stack is, and whether nobody can reach what is right below.
fn stack() -> (u64, bool) {
    let local = 0u8;
    let here = (&raw const local).addr() as u64;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut below = (0, false);
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').unwrap();
        let (from, to) = range.split_once('-').unwrap();
        let [from, to] = [from, to].map(|at| u64::from_str_radix(at, 16).unwrap());
        if (from..to).contains(&here) {
            return (to - from, below.0 == from && below.1);
        }
        below = (to, rest.starts_with("---p"));
    }
    panic!("the stack is not mapped");
}

fn activations_have_stacks_of_the_domains_size_with_a_guard_below() -> testkit::Outcome {
    for kib in [64u64, 256, 3072] {
        let served = serve(|d| {
            d.activations(2).stack_bytes(kib as usize * 1024).portal(
                "stack",
                1,
                |call: &mut Invocation<'_>| {
                    let (bytes, is_guarded) = stack();
                    call.output(0)?.extend_from_slice(&bytes.to_ne_bytes());
                    call.output(1)?.push(u8::from(is_guarded));
                    Ok(())
                },
            )
        });
        let client = served.connect();
        let (mut bytes, mut is_guarded) = (Vec::new(), Vec::new());
        let call = Call::new().output(&mut bytes, 8).output(&mut is_guarded, 1);
        client.call(client.portal("stack", 1).unwrap(), call).unwrap();
        let bytes = u64::from_ne_bytes(bytes.try_into().unwrap());
        // What a thread has beside its frames, a page or two, comes on top.
        assert!((kib * 1024..kib * 1024 + 64 * 1024).contains(&bytes), "{bytes} bytes for {kib} KiB");
        assert_eq!(is_guarded, [1], "{kib} KiB");
    }
    testkit::Outcome::Passed
}

fn a_path_is_taken_over_from_the_dead_and_not_from_the_living() -> testkit::Outcome {
    let served = serve(|d| d.portal("sleep", 1, sleep_ms));
    let taken = Domain::builder().serve(served.path());
    assert!(matches!(taken, Err(peregrine_call::DomainError::PathInUse(_))), "{taken:?}");
    served.kill();
    let _mine = Domain::builder().portal("sleep", 1, sleep_ms).serve(served.path()).unwrap();
    served.connect().portal("sleep", 1).unwrap();
    testkit::Outcome::Passed
}

fn a_domain_whose_child_holds_its_sockets_is_dead_all_the_same() -> testkit::Outcome {
    let served = serve(|d| {
        d.portal("fork", 1, |call: &mut Invocation<'_>| {
            // SAFETY: the child makes one system call after another and touches nothing of the other threads'.
            match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
                Forked::Child => {
                    std::thread::sleep(Duration::from_secs(20));
                    process::exit_now(0);
                }
                Forked::Parent(pid) => call.output(0)?.extend_from_slice(&pid.to_ne_bytes()),
            }
            Ok(())
        })
        .portal("sleep", 1, sleep_ms)
    });
    if !peregrine_sys::peer::is_supported() {
        testkit::skip!("SO_PEERPIDFD is of Linux 6.5");
    }
    let client = served.connect();
    let mut child = Vec::new();
    client.call(client.portal("fork", 1).unwrap(), Call::new().output(&mut child, 4)).unwrap();
    let sleep = client.portal("sleep", 1).unwrap();
    served.kill();
    let begun = Instant::now();
    assert_eq!(client.call(sleep, Call::new().input(&[1])), Err(CallError::DomainDied));
    assert!(begun.elapsed() < Duration::from_secs(15));
    scene::kill(i32::from_ne_bytes(child.try_into().unwrap()));
    testkit::Outcome::Passed
}

fn a_client_whose_child_holds_its_sockets_is_gone_all_the_same() -> testkit::Outcome {
    if !peregrine_sys::peer::is_supported() {
        testkit::skip!("SO_PEERPIDFD is of Linux 6.5");
    }
    let (dir, path) = path();
    let (served, connected) = (dir.path().join("served"), dir.path().join("connected"));
    // Before this process has threads.
    // SAFETY: one thread.
    let client = match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        Forked::Parent(pid) => pid,
        Forked::Child => {
            process::die_with_parent();
            scene::wait_for(&served);
            let client = Client::connect(&path).unwrap();
            // SAFETY: one thread.
            match unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
                Forked::Child => loop {
                    std::thread::park();
                },
                Forked::Parent(child) => std::fs::write(&connected, child.to_string()).unwrap(),
            }
            client.call(client.portal("sleep", 1).unwrap(), Call::new().input(&[0])).unwrap();
            loop {
                std::thread::park();
            }
        }
    };
    let domain = Domain::builder().portal("sleep", 1, sleep_ms).serve(&path).unwrap();
    std::fs::write(&served, "").unwrap();
    let begun = Instant::now();
    let soon = |what: &str| {
        assert!(begun.elapsed() < Duration::from_secs(50), "{what}: {:?}", domain.stats());
        std::thread::sleep(Duration::from_millis(1));
    };
    while domain.stats().lines == 0 {
        soon("it calls");
    }
    let holder: i32 = std::fs::read_to_string(&connected).unwrap().parse().unwrap();
    scene::kill(client);
    while domain.stats().clients != 0 || domain.stats().lines != 0 {
        soon("it is gone");
    }
    let _ = peregrine_sys::signal::kill(holder, peregrine_sys::signal::number::KILL);
    testkit::Outcome::Passed
}

fn clients_beyond_the_limit_are_refused_and_room_is_made_by_leaving() -> testkit::Outcome {
    let (_dir, path) = path();
    let limits = Limits { clients: 3, ..Limits::default() };
    let domain = Domain::builder().limits(limits).access(Access::Everyone).serve(&path).unwrap();
    let clients: Vec<_> = (0..3).map(|_| Client::connect(&path).unwrap()).collect();
    assert_eq!(Client::connect(&path).unwrap_err(), Refusal::Clients { limit: 3 }.into());
    drop(clients);
    let begun = Instant::now();
    while domain.stats().clients > 0 {
        assert!(begun.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(1));
    }
    Client::connect(&path).unwrap();
    testkit::Outcome::Passed
}

/// Two thousand here; ten thousand in `soak call`.
fn idle_clients_cost_descriptors_and_little_else() -> testkit::Outcome {
    let many = 2000usize;
    let need = 2 * many as u64 + 200;
    if process::raise_descriptor_limit(need).is_err() {
        testkit::skip!("needs {need} descriptors a process");
    }
    let served =
        serve(|d| d.portal("sleep", 1, sleep_ms).limits(Limits { clients: 1 << 20, ..Limits::default() }));
    let before = served.resident_bytes();
    let clients: Vec<_> = (0..many).map(|_| served.connect()).collect();
    for client in &clients {
        client.call(client.portal("sleep", 1).unwrap(), Call::new().input(&[0])).unwrap();
    }
    let each = (served.resident_bytes() - before) / many;
    println!("{each} bytes resident in the domain for each idle client that has called");
    assert!(each < 16 * 1024, "{each} bytes");
    // All are still served, and the activations are as many as ever.
    for client in clients.iter().step_by(97) {
        client.call(client.portal("sleep", 1).unwrap(), Call::new().input(&[0])).unwrap();
    }
    assert_eq!(served.holdings().2, 6, "four activations, the keeper, the main thread");
    testkit::Outcome::Passed
}

fn sixty_four_clients_call_at_once() -> testkit::Outcome {
    let served = serve(|d| {
        d.activations(8).portal("echo", 1, |call: &mut Invocation<'_>| {
            let bytes = call.input(0)?;
            call.output(1)?.extend_from_slice(bytes);
            Ok(())
        })
    });
    let barrier = Barrier::new(64);
    std::thread::scope(|scope| {
        for t in 0..64u32 {
            let (served, barrier) = (&served, &barrier);
            scope.spawn(move || {
                let client = served.connect();
                let echo = client.portal("echo", 1).unwrap();
                barrier.wait();
                for i in 0..200 {
                    let bytes = (t * 1000 + i).to_ne_bytes();
                    let mut out = Vec::new();
                    let soon = Deadline::after(Duration::from_secs(20));
                    client.call(echo, Call::new().input(&bytes).output(&mut out, 4).deadline(soon)).unwrap();
                    assert_eq!(out, bytes);
                }
            });
        }
    });
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        the_last_activation_tells_the_domain_which_adds_more,
        without_a_free_activation_a_caller_waits_within_its_deadline,
        a_call_whose_deadline_passes_in_the_queue_is_not_executed,
        shutdown_lets_running_calls_end_and_terminates_those_that_wait,
        a_wired_domain_runs_each_call_on_a_thread_of_its_own_library,
        code_of_the_domains_own_may_panic_and_costs_neither_caller_nor_activation,
        the_activation_runs_on_the_callers_core_and_not_outside_its_own_set,
        a_call_that_may_run_anywhere_is_not_bound_by_those_before_it,
        a_more_urgent_caller_lends_its_priority_for_the_call,
        a_domain_over_an_inherited_pair_serves_one_client,
        a_death_in_a_long_call_wakes_all_its_callers,
        activations_have_stacks_of_the_domains_size_with_a_guard_below,
        a_path_is_taken_over_from_the_dead_and_not_from_the_living,
        a_domain_whose_child_holds_its_sockets_is_dead_all_the_same,
        a_client_whose_child_holds_its_sockets_is_gone_all_the_same,
        clients_beyond_the_limit_are_refused_and_room_is_made_by_leaving,
        idle_clients_cost_descriptors_and_little_else,
        sixty_four_clients_call_at_once,
    ])
}
