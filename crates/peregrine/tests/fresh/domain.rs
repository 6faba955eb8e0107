//! The domain, and what all programs use of it.

use peregrine::testing::Program;
use peregrine::{Builder, Portal, checkpoint, sleep, tally};
use peregrine_call::{Domain, Failure, Given, Invocation, LentSlice};
use std::process::id;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

pub const WHERE: &str = "PEREGRINE_TEST_DOMAIN";

/// Slow calls that the domain executes, and the most of them that it did.
static SLOW: Mutex<(u8, u8)> = Mutex::new((0, 0));

/// Whether `open` was called since `gate` returned last.
static OPENED: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

pub fn portal(name: &str) -> Portal {
    Portal::new(std::env::var(WHERE).unwrap(), name, 1)
}

#[derive(serde::Serialize, serde::Deserialize, Debug, PartialEq)]
pub struct Overfull {
    pub by: usize,
}

/// What the typed calls go through.
#[peregrine_call::interface]
pub trait Kitchen {
    fn add(&self, what: &str, #[inout] bowl: &mut Vec<String>) -> Result<usize, Overfull>;
    fn weigh(&self, #[lend] grams: LentSlice<'_, u32>, #[out] heaviest: &mut u32) -> u32;
    fn reverse(&self, #[inout(bytes = 100)] bytes: &mut Vec<u8>);
    /// Bytes and their sum; waits for so many ms first.
    fn eat(&self, #[give] meal: Given, ms: u64) -> (u64, u64);
    /// Uses the processor for a while; how long, by the kernel's clock of this thread, in ns.
    fn cook(&self) -> u64;
    /// The chain that the call belongs to, its depth, and whether it has a deadline.
    fn link(&self, #[context] call: &Invocation<'_>) -> (String, u32, bool);
}

pub struct Cook;

impl Kitchen for Cook {
    fn add(&self, what: &str, bowl: &mut Vec<String>) -> Result<usize, Overfull> {
        bowl.push(what.to_owned());
        if bowl.len() > 2 { Err(Overfull { by: bowl.len() - 2 }) } else { Ok(bowl.len()) }
    }

    fn weigh(&self, grams: LentSlice<'_, u32>, heaviest: &mut u32) -> u32 {
        *heaviest = grams.iter().max().unwrap_or(0);
        grams.iter().sum()
    }

    fn reverse(&self, bytes: &mut Vec<u8>) {
        bytes.reverse();
    }

    fn eat(&self, meal: Given, ms: u64) -> (u64, u64) {
        std::thread::sleep(Duration::from_millis(ms));
        (meal.len() as u64, meal.iter().map(|&b| u64::from(b)).sum())
    }

    fn cook(&self) -> u64 {
        let now = peregrine_sys::timer::thread_cpu_ns;
        let begun = now();
        while now() - begun < 20_000_000 {
            std::hint::spin_loop();
        }
        now() - begun
    }

    fn link(&self, call: &Invocation<'_>) -> (String, u32, bool) {
        (format!("{:?}", call.link().chain), call.link().depth, call.deadline().is_some())
    }
}

/// Runs the program with a domain in this process.
fn with_domain(program: Program) -> (peregrine::testing::Outcome, Domain) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain");
    let domain = Domain::builder()
        .activations(64)
        .limits(peregrine_call::Limits {
            activations_per_client: 64,
            // Less than what is lent in place.
            argument_bytes: 2 << 20,
            ..Default::default()
        })
        .portal("add", 1, |call: &mut Invocation<'_>| {
            let bytes: Vec<u8> = call.input(0)?.iter().map(|b| b.wrapping_add(1)).collect();
            *call.output(1)? = bytes;
            Ok(())
        })
        .portal("joins", 1, |call: &mut Invocation<'_>| {
            let mut joined = call.input(0)?.to_vec();
            (1..4).try_for_each(|index| {
                call.lent(index)?.append_to(&mut joined);
                Ok::<(), Failure>(())
            })?;
            *call.output(4)? = joined;
            Ok(())
        })
        .portal("gate", 1, |_: &mut Invocation<'_>| {
            let opened = OPENED.0.lock().unwrap();
            *OPENED.1.wait_while(opened, |opened| !*opened).unwrap() = false;
            Ok(())
        })
        .portal("open", 1, |_: &mut Invocation<'_>| {
            *OPENED.0.lock().unwrap() = true;
            OPENED.1.notify_all();
            Ok(())
        })
        .portal("most", 1, |call: &mut Invocation<'_>| {
            call.output(1)?.push(SLOW.lock().unwrap().1);
            Ok(())
        })
        .portal("slow", 1, |call: &mut Invocation<'_>| {
            let ms = u64::from(call.input(0)?[0]);
            let enter = |(now, most): (u8, u8)| (now + 1, most.max(now + 1));
            let change = |how: &dyn Fn((u8, u8)) -> (u8, u8)| {
                let mut slow = SLOW.lock().unwrap();
                *slow = how(*slow);
            };
            change(&enter);
            std::thread::sleep(Duration::from_millis(ms));
            change(&|(now, most)| (now - 1, most));
            call.output(1)?.extend_from_slice(&std::process::id().to_ne_bytes());
            Ok(())
        })
        .portal("burn", 1, |call: &mut Invocation<'_>| {
            call.output(0)?.extend_from_slice(&Cook.cook().to_ne_bytes());
            Ok(())
        })
        .portal("fails", 1, |call: &mut Invocation<'_>| {
            let detail = call.input(0)?.to_vec();
            Err(Failure::new(7, detail))
        })
        .portal("panics", 1, |_: &mut Invocation<'_>| panic!("burnt"))
        .portal("sees", 1, crate::sees::look)
        .interface(KitchenPortal(Cook))
        .serve(&path)
        .unwrap();
    let outcome = program.run_with(&[(WHERE, path.to_str().unwrap())]);
    (outcome, domain)
}

pub fn kitchen() -> KitchenClient<Portal> {
    let path = std::env::var(WHERE).unwrap();
    KitchenClient::by(|name, version| Portal::new(&path, name, version))
}

/// A thread that takes an image while others call, and then kills its node, once.
pub fn kills_node_1() -> peregrine::JoinHandle<()> {
    Builder::new()
        .node(1)
        .spawn(
            |_: ()| {
                // Long enough for an image that holds the call below.
                sleep(Duration::from_millis(100));
                checkpoint();
                if tally().rollbacks == 0 {
                    let me = id() as i32;
                    peregrine_sys::signal::kill(me, peregrine_sys::signal::number::KILL).unwrap();
                    loop {
                        std::hint::spin_loop();
                    }
                }
            },
            (),
        )
        .unwrap()
}

/// The program does what it promises, with a domain in this process.
pub fn holds(program: Program) {
    let (outcome, _) = with_domain(program);
    assert!(outcome.success(), "{outcome}");
}

/// The same, and the domain is left with no client that is dead.
pub fn holds_and_leaves_no_client(program: Program) {
    let (outcome, domain) = with_domain(program);
    assert!(outcome.success(), "{outcome}");
    let begun = Instant::now();
    while domain.stats().clients != 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", domain.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}
