//! One thread in many domains: nesting, recursion, what it inherits, and whose error is whose.

use peregrine_call::chain::{self, ChainId};
use peregrine_call::{Attributes, Call, CallError, Client, Deadline, Failure, Invocation, Refusal, usage};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

mod scene;
use scene::{Served, serve};

/// What a nested call's failure becomes one level up.
const DIED: u32 = 1;
const LATE: u32 = 2;
const DEEP: u32 = 3;
const OTHER: u32 = 9;

fn to_failure(e: CallError) -> Failure {
    let code = match &e {
        CallError::DomainDied => DIED,
        CallError::Deadline => LATE,
        CallError::Refused(Refusal::Depth { .. }) => DEEP,
        CallError::Callee(inner) => return inner.clone(),
        _ => OTHER,
    };
    Failure::new(code, e.to_string())
}

/// A client of the domain at a path, made when it is first used.
struct Later(PathBuf, OnceLock<Client>);

impl Later {
    fn new(path: &Path) -> Self {
        Self(path.to_owned(), OnceLock::new())
    }

    fn get(&self) -> &Client {
        self.1.get_or_init(|| Client::connect(&self.0).expect("the next domain is up"))
    }
}

/// Calls itself, with one less each time, through its own front door; adds up the depths it saw.
fn recursion_through_ones_own_portal_counts_every_level() -> testkit::Outcome {
    let served = scene::serve_at(|d, path| {
        let me = Later::new(path);
        d.activations(40)
            .limits(peregrine_call::Limits { activations_per_client: 64, depth: 30, ..Default::default() })
            .portal("down", 1, move |call: &mut Invocation<'_>| {
                let left = call.input(0)?[0];
                let depth = call.link().depth;
                let mut sum = Vec::new();
                if left > 0 {
                    let down = me.get().portal("down", 1).map_err(to_failure)?;
                    me.get()
                        .call(down, Call::new().input(&[left - 1]).output(&mut sum, 8))
                        .map_err(to_failure)?;
                }
                let below = sum.try_into().map_or(0, u64::from_ne_bytes);
                call.output(1)?.extend_from_slice(&(below + u64::from(depth)).to_ne_bytes());
                Ok(())
            })
    });
    let client = served.connect();
    let down = client.portal("down", 1).unwrap();
    for levels in [0u8, 1, 7, 29] {
        let mut sum = Vec::new();
        client.call(down, Call::new().input(&[levels]).output(&mut sum, 8)).unwrap();
        let n = u64::from(levels) + 1;
        assert_eq!(sum, (n * (n + 1) / 2).to_ne_bytes(), "{levels} levels");
    }
    let deep = client.call(down, Call::new().input(&[30]).output(&mut Vec::new(), 8));
    assert!(matches!(&deep, Err(CallError::Callee(f)) if f.code == DEEP), "{deep:?}");
    testkit::Outcome::Passed
}

/// Goes on to the first of the paths that it was given, with the others; says in which processes, and how deep, it was served.
fn travel(call: &mut Invocation<'_>) -> Result<(), Failure> {
    let paths = call.input(0)?.to_vec();
    let mut said = format!("{}@{} ", std::process::id(), call.link().depth).into_bytes();
    let mut next = paths.splitn(2, |&b| b == b'\n');
    if let Some(path) = next.next().filter(|path| !path.is_empty()) {
        let client = Client::connect(std::str::from_utf8(path).unwrap()).map_err(to_failure)?;
        let travel = client.portal("travel", 1).map_err(to_failure)?;
        let mut beyond = Vec::new();
        let rest = next.next().unwrap_or_default();
        client.call(travel, Call::new().input(rest).output(&mut beyond, 4096)).map_err(to_failure)?;
        said.extend(beyond);
    }
    *call.output(1)? = said;
    Ok(())
}

fn a_call_that_comes_back_to_where_it_started_is_served_there_again() -> testkit::Outcome {
    let domains = [(); 3].map(|()| serve(|d| d.activations(2).portal("travel", 1, travel)));
    let paths = domains.each_ref().map(|d| d.path().to_str().unwrap().to_owned());
    let client = domains[0].connect();
    let travel = client.portal("travel", 1).unwrap();
    // A, then B, C, and A again, on its second activation.
    let way = [&*paths[1], &*paths[2], &*paths[0]].join("\n");
    let mut said = Vec::new();
    client.call(travel, Call::new().input(way.as_bytes()).output(&mut said, 4096)).unwrap();
    let [a, b, c] = domains.each_ref().map(|d| d.pid);
    assert_eq!(String::from_utf8(said).unwrap(), format!("{a}@1 {b}@2 {c}@3 {a}@4 "));
    testkit::Outcome::Passed
}

/// Three domains in a row, each of which calls the next with what it was given; the last does what the bytes say.
struct Row {
    domains: Vec<Served>,
    client: Client,
}

fn act(call: &Invocation<'_>) -> Result<(), Failure> {
    let what = call.input(0)?;
    match what.first() {
        Some(b'd') => peregrine_sys::process::exit_now(7),
        Some(b's') => scene::wait_for(GO.get().unwrap()),
        Some(b'b') => {
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(20) {}
        }
        _ => {}
    }
    let link = call.link();
    let chain = format!("{:?} {} {}", link.chain, link.depth, link.deadline.is_some());
    call.output(1)?.extend_from_slice(chain.as_bytes());
    Ok(())
}

/// Where the file appears that `s` waits for.
static GO: std::sync::OnceLock<std::path::PathBuf> = std::sync::OnceLock::new();

fn row() -> Row {
    GO.get_or_init(|| std::env::temp_dir().join(format!("peregrine-go-{}", std::process::id())));
    let mut domains: Vec<Served> = Vec::new();
    for level in 0..3 {
        let next = domains.last().map(|d: &Served| d.path());
        domains.push(serve(|d| {
            let next = next.map(|path| Later::new(&path));
            d.name(&format!("level {level}")).portal("pass", 1, move |call: &mut Invocation<'_>| {
                let Some(next) = &next else { return act(call) };
                if call.input(0)?.first() == Some(&b'0') {
                    return act(call);
                }
                if call.input(0)?.first() == Some(&b'D') && level == 1 {
                    peregrine_sys::process::exit_now(7);
                }
                let pass = next.get().portal("pass", 1).map_err(to_failure)?;
                let mut out = call.output(1)?;
                next.get()
                    .call(pass, Call::new().input(call.input(0)?).output(&mut out, 4096))
                    .map_err(to_failure)
            })
        }));
    }
    let client = domains[2].connect();
    Row { domains, client }
}

impl Row {
    fn pass(&self, what: &[u8], attributes: Attributes) -> Result<String, CallError> {
        let pass = self.client.portal("pass", 1)?;
        let mut out = Vec::new();
        self.client.call(pass, Call::new().input(what).output(&mut out, 4096).attributes(attributes))?;
        Ok(String::from_utf8(out).unwrap())
    }
}

fn identity_depth_and_deadline_go_along() -> testkit::Outcome {
    let row = row();
    let mine: ChainId = chain::current().chain;
    assert_eq!(row.pass(b"x", Attributes::default()).unwrap(), format!("{mine:?} 3 false"));
    let deadline = Some(Deadline::after(Duration::from_secs(5)));
    let seen = row.pass(b"x", Attributes { deadline, ..Attributes::default() }).unwrap();
    assert_eq!(seen, format!("{mine:?} 3 true"));
    let other =
        std::thread::spawn(move || (row.pass(b"x", Attributes::default()).unwrap(), chain::current().chain));
    let (seen, theirs) = other.join().unwrap();
    assert_eq!(seen, format!("{theirs:?} 3 false"));
    assert_ne!(mine, theirs);
    testkit::Outcome::Passed
}

fn a_deadline_ends_every_level_of_the_chain() -> testkit::Outcome {
    let row = row();
    row.pass(b"x", Attributes::default()).unwrap();
    // The far end goes on until we let it.
    let deadline = Some(Deadline::after(Duration::from_millis(50)));
    let late = row.pass(b"s", Attributes { deadline, ..Attributes::default() }).unwrap_err();
    // Which level says so first is a matter of microseconds: ours, or the middle one's as its callee's.
    let said =
        matches!(&late, CallError::Deadline) || matches!(&late, CallError::Callee(f) if f.code == LATE);
    assert!(said, "{late:?}");
    std::fs::write(GO.get().unwrap(), "").unwrap();
    row.pass(b"x", Attributes::default()).unwrap();
    std::fs::remove_file(GO.get().unwrap()).unwrap();
    testkit::Outcome::Passed
}

fn death_at_the_far_end_is_the_error_of_the_one_who_called_it() -> testkit::Outcome {
    let row = row();
    row.pass(b"x", Attributes::default()).unwrap();
    let died = row.pass(b"d", Attributes::default()).unwrap_err();
    assert!(
        matches!(&died, CallError::Callee(f) if f.code == DIED),
        "the far end's death two levels up: {died:?}"
    );
    assert!(row.domains[0].wait().is_some_and(|s| s.exit_status() == Some(7)));
    assert_eq!(
        row.pass(b"0", Attributes::default()).unwrap().split(' ').nth_back(1),
        Some("1"),
        "the near end serves on"
    );
    testkit::Outcome::Passed
}

fn death_in_the_middle_is_the_near_ends_callee_dying() -> testkit::Outcome {
    let row = row();
    row.pass(b"x", Attributes::default()).unwrap();
    let before = row.domains[0].holdings();
    let died = row.pass(b"D", Attributes::default()).unwrap_err();
    assert!(matches!(&died, CallError::Callee(f) if f.code == DIED), "{died:?}");
    row.domains[1].wait();
    // The far end lost its client and keeps nothing of it.
    let begun = Instant::now();
    while row.domains[0].holdings().0 >= before.0 || row.domains[0].holdings().1 >= before.1 {
        assert!(begun.elapsed() < Duration::from_secs(30), "{before:?} {:?}", row.domains[0].holdings());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(row.domains[0].holdings().2, before.2, "no activation is lost");
    testkit::Outcome::Passed
}

fn charges_name_every_domain_that_the_thread_was_in() -> testkit::Outcome {
    let row = row();
    row.pass(b"x", Attributes::default()).unwrap();
    assert!(usage::charges().is_empty());
    let before: Vec<u64> = row.domains.iter().map(Served::cpu_ns).collect();
    for _ in 0..3 {
        row.pass(b"b", Attributes { charge: true, ..Attributes::default() }).unwrap();
    }
    let charges = usage::charges();
    assert_eq!(charges.len(), 3, "{charges:?}");
    let by_kernel: Vec<u64> = row.domains.iter().zip(&before).map(|(d, b)| d.cpu_ns() - b).collect();
    println!("charged {charges:?}, the kernel counted {by_kernel:?}");
    let far = Client::connect(row.domains[0].path()).unwrap().domain_id();
    let spun = charges.iter().find(|row| row.0 == far).unwrap().1;
    // 60 ms by the clock on the wall; the kernel says how many of them it ran.
    assert!(spun <= by_kernel[0] && spun * 10 >= by_kernel[0] * 8, "{spun} of {}", by_kernel[0]);
    for (id, ns) in &charges {
        if *id != far {
            assert!(*ns <= by_kernel[1].max(by_kernel[2]), "those that only pass on are charged little");
        }
    }
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        recursion_through_ones_own_portal_counts_every_level,
        a_call_that_comes_back_to_where_it_started_is_served_there_again,
        identity_depth_and_deadline_go_along,
        a_deadline_ends_every_level_of_the_chain,
        death_at_the_far_end_is_the_error_of_the_one_who_called_it,
        death_in_the_middle_is_the_near_ends_callee_dying,
        charges_name_every_domain_that_the_thread_was_in,
    ])
}
