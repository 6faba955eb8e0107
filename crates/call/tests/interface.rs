//! Typed calls between two real processes: what a trait says is what crosses.

#![allow(missing_docs)]

use peregrine_call::interface::Error;
use peregrine_call::{CallError, Domain, Failure, Gift, Given, Invocation, Lent, LentSlice, interface};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

mod scene;
use scene::{Served, serve};

/// A value with pointers inside: all that they point to must cross.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Default)]
pub struct Tree {
    name: String,
    children: Vec<Tree>,
    notes: BTreeMap<String, Option<Box<Tree>>>,
}

#[derive(Serialize, Deserialize, Clone, Debug, PartialEq)]
pub enum Wrong {
    Empty,
    Because(String),
}

#[interface(version = 3)]
pub trait Forest {
    fn depth(&self, tree: &Tree) -> u32;
    fn rename(&self, name: &str, #[inout] tree: &mut Tree) -> Result<u32, Wrong>;
    fn describe(
        &self,
        tree: Tree,
        #[out] words: &mut Vec<String>,
        #[out] letters: &mut usize,
    ) -> Result<(), Wrong>;
    fn reverse(&self, bytes: &[u8], #[out(bytes = 2 << 20)] reversed: &mut Vec<u8>);
    fn append(&self, more: &[u8], #[inout(bytes = 64)] bytes: &mut Vec<u8>) -> Result<(), Wrong>;
    fn sum(&self, #[lend] numbers: LentSlice<'_, f64>, #[lend] bytes: Lent<'_>) -> (f64, u64);
    fn keep(&self, #[give] page: Given) -> usize;
    fn who(&self, #[context] call: &Invocation<'_>) -> (u32, Option<Duration>);
    fn all(
        &self,
        numbers: &[u32],
        pair: (i8, char),
        list: Vec<Option<String>>,
    ) -> (u64, (i8, char), Vec<Option<String>>);
    fn wait(&self, ms: u64) -> u64;
    fn huge_error(&self) -> Result<(), String>;
}

struct Real;

impl Forest for Real {
    fn depth(&self, tree: &Tree) -> u32 {
        1 + tree.children.iter().map(|t| self.depth(t)).max().unwrap_or(0)
    }

    fn rename(&self, name: &str, tree: &mut Tree) -> Result<u32, Wrong> {
        tree.name = name.to_owned();
        tree.notes.clear();
        if name.is_empty() { Err(Wrong::Empty) } else { Ok(std::process::id()) }
    }

    fn describe(&self, tree: Tree, words: &mut Vec<String>, letters: &mut usize) -> Result<(), Wrong> {
        assert!(words.is_empty(), "an out argument begins empty whatever the caller had in it");
        words.extend(tree.children.iter().map(|t| t.name.clone()));
        *letters = words.iter().map(String::len).sum();
        if words.is_empty() { Err(Wrong::Because("no children".into())) } else { Ok(()) }
    }

    fn reverse(&self, bytes: &[u8], reversed: &mut Vec<u8>) {
        reversed.extend(bytes.iter().rev());
    }

    fn append(&self, more: &[u8], bytes: &mut Vec<u8>) -> Result<(), Wrong> {
        bytes.extend(more);
        if more.is_empty() { Err(Wrong::Empty) } else { Ok(()) }
    }

    fn sum(&self, numbers: LentSlice<'_, f64>, bytes: Lent<'_>) -> (f64, u64) {
        assert_eq!(numbers.to_vec().len(), numbers.len());
        assert_eq!(numbers.get(numbers.len()), None);
        (numbers.iter().sum(), bytes.to_vec().iter().map(|b| u64::from(*b)).sum())
    }

    fn keep(&self, page: Given) -> usize {
        page.iter().filter(|b| **b == 7).count()
    }

    fn who(&self, call: &Invocation<'_>) -> (u32, Option<Duration>) {
        (call.caller().pid, call.deadline().and_then(|d| d.left()))
    }

    fn all(
        &self,
        numbers: &[u32],
        pair: (i8, char),
        list: Vec<Option<String>>,
    ) -> (u64, (i8, char), Vec<Option<String>>) {
        (numbers.iter().map(|n| u64::from(*n)).sum(), pair, list)
    }

    fn wait(&self, ms: u64) -> u64 {
        std::thread::sleep(Duration::from_millis(ms));
        ms
    }

    fn huge_error(&self) -> Result<(), String> {
        Err("x".repeat(1 << 20))
    }
}

fn forest() -> (Served, ForestClient) {
    let served = serve(|d| d.interface(ForestPortal(Real)));
    let client = ForestClient::connect(served.path()).unwrap();
    (served, client)
}

fn tree() -> Tree {
    let leaf = |name: &str| Tree { name: name.into(), ..Tree::default() };
    Tree {
        name: "root".into(),
        children: vec![leaf("ash"), Tree { children: vec![leaf("oak")], ..leaf("elm") }],
        notes: [("n".to_owned(), Some(Box::new(leaf("birch"))))].into(),
    }
}

fn values_with_pointers_are_copied_deeply() -> testkit::Outcome {
    let (served, client) = forest();
    assert_eq!(client.depth(&tree()).unwrap(), 3);
    let list = vec![Some("a".to_owned()), None];
    let back = client.all(&[1, 2, u32::MAX], (-3, 'ü'), list.clone()).unwrap();
    assert_eq!(back, (u64::from(u32::MAX) + 3, (-3, 'ü'), list));
    let mut t = tree();
    assert_eq!(client.rename("beech", &mut t).unwrap(), served.pid as u32, "another process did it");
    assert_eq!(t, Tree { name: "beech".into(), notes: BTreeMap::new(), ..tree() });
    testkit::Outcome::Passed
}

fn a_failed_call_changes_no_argument_of_its_caller() -> testkit::Outcome {
    let (_served, client) = forest();
    let mut t = tree();
    assert_eq!(client.rename("", &mut t), Err(Error::Callee(Wrong::Empty)));
    assert_eq!(t, tree());
    let mut bytes = b"so far".to_vec();
    assert_eq!(client.append(b"", &mut bytes), Err(Error::Callee(Wrong::Empty)));
    assert_eq!(bytes, b"so far");
    client.append(b" good", &mut bytes).unwrap();
    assert_eq!(bytes, b"so far good");
    let (mut words, mut letters) = (vec!["mine".to_owned()], 9);
    let failed = client.describe(Tree::default(), &mut words, &mut letters);
    assert_eq!(failed, Err(Error::Callee(Wrong::Because("no children".into()))));
    assert_eq!((words.clone(), letters), (vec!["mine".to_owned()], 9));
    client.describe(tree(), &mut words, &mut letters).unwrap();
    assert_eq!((words, letters), (vec!["ash".to_owned(), "elm".to_owned()], 6));
    testkit::Outcome::Passed
}

fn bytes_of_all_sizes_cross_both_ways() -> testkit::Outcome {
    let (_served, client) = forest();
    for len in [0usize, 1, 100, 5000, 300_000, 2 << 20] {
        let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let mut reversed = vec![1, 2, 3];
        client.reverse(&bytes, &mut reversed).unwrap();
        assert!(reversed.iter().rev().eq(bytes.iter()), "{len} bytes");
    }
    let mut reversed = vec![1];
    let e = client.reverse(&vec![0; (2 << 20) + 1], &mut reversed).unwrap_err();
    assert!(!matches!(e, Error::Callee(_)), "{e:?}");
    assert_eq!(reversed, [1], "what is beyond the bound does not come");
    testkit::Outcome::Passed
}

fn lent_memory_is_read_in_place_and_given_memory_changes_hands() -> testkit::Outcome {
    let (_served, client) = forest();
    let numbers = client.connection().buffer(1000 * 8).unwrap();
    for i in 0..1000usize {
        numbers.write(i * 8, &(i as f64 / 2.0).to_ne_bytes()).unwrap();
    }
    let bytes = client.connection().buffer(10).unwrap();
    bytes.write(0, &[3; 10]).unwrap();
    assert_eq!(client.sum(&numbers, &bytes).unwrap(), (249_750.0, 30));
    let half = numbers.part(0, 4000).unwrap();
    assert_eq!(client.sum(half, bytes.part(2, 3).unwrap()).unwrap(), (62_375.0, 9));
    // Seven bytes are no whole number of f64.
    let torn = client.sum(numbers.part(0, 7).unwrap(), &bytes);
    assert!(
        matches!(&torn, Err(Error::Call(CallError::Callee(f))) if f.code == Failure::ARGUMENTS),
        "{torn:?}"
    );
    let mut gift = Gift::new(10_000).unwrap();
    gift[..77].fill(7);
    assert_eq!(client.keep(gift).unwrap(), 77);
    testkit::Outcome::Passed
}

fn the_callee_sees_who_calls_and_until_when() -> testkit::Outcome {
    let (_served, client) = forest();
    let (pid, left) = client.who().unwrap();
    assert_eq!((pid, left), (std::process::id(), None));
    let hasty = client.clone().within(Duration::from_secs(5));
    let (_, left) = hasty.who().unwrap();
    assert!(left.is_some_and(|l| l <= Duration::from_secs(5)), "{left:?}");
    let late = client.within(Duration::from_millis(20)).wait(400);
    assert_eq!(late, Err(Error::Call(CallError::Deadline)));
    testkit::Outcome::Passed
}

fn the_callees_error_is_told_from_the_calls() -> testkit::Outcome {
    let (served, client) = forest();
    let e = client.huge_error().unwrap_err();
    assert!(
        matches!(&e, Error::Call(CallError::Callee(f)) if f.code == Failure::REPLY),
        "too large to travel: {e:?}"
    );
    served.kill();
    let e = client.depth(&tree()).unwrap_err();
    assert_eq!(e, Error::Call(CallError::DomainDied));
    testkit::Outcome::Passed
}

/// The interface as an old client knows it: the same name, other text.
#[allow(dead_code)]
mod old {
    #[peregrine_call::interface(version = 3)]
    pub trait Forest {
        fn depth(&self, tree: &str) -> u32;
    }
}

/// The same text, counted up.
mod newer {
    #[peregrine_call::interface(version = 2, name = "Counted")]
    pub trait Counted {
        fn one(&self) -> u32;
    }
}

#[allow(dead_code)]
mod older {
    #[peregrine_call::interface(version = 1, name = "Counted")]
    pub trait Counted {
        fn one(&self) -> u32;
    }
}

struct One;
impl newer::Counted for One {
    fn one(&self) -> u32 {
        1
    }
}

fn an_old_client_is_told_of_the_mismatch_before_any_call() -> testkit::Outcome {
    let served = serve(|d| d.interface(ForestPortal(Real)).interface(newer::CountedPortal(One)));
    let e = old::ForestClient::connect(served.path()).unwrap_err();
    assert!(
        matches!(&e, CallError::Version { portal, ours, theirs } if portal == "Forest" && ours != theirs),
        "{e:?}"
    );
    let e = older::CountedClient::connect(served.path()).unwrap_err();
    assert!(matches!(&e, CallError::Version { portal, .. } if portal == "Counted"), "{e:?}");
    assert_eq!(newer::CountedClient::connect(served.path()).unwrap().one().unwrap(), 1);
    testkit::Outcome::Passed
}

/// An executor of ten lines, to show that any will do: a task is polled when it is woken, on this thread.
struct Woken(Sender<usize>, usize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        let _ = self.0.send(self.1);
    }
}

fn run_all<T>(futures: Vec<impl Future<Output = T>>) -> Vec<T> {
    let (to, woken): (Sender<usize>, Receiver<usize>) = channel();
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    let mut futures: Vec<_> = futures.into_iter().map(|f| Some(Box::pin(f))).collect();
    (0..futures.len()).for_each(|i| to.send(i).unwrap());
    while results.iter().any(Option::is_none) {
        let i = woken.recv_timeout(Duration::from_secs(20)).expect("a task is woken");
        let Some(future) = &mut futures[i] else { continue };
        let waker = Waker::from(Arc::new(Woken(to.clone(), i)));
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            results[i] = Some(value);
            futures[i] = None;
        }
    }
    results.into_iter().map(Option::unwrap).collect()
}

/// Returns when eight are there.
#[peregrine_call::interface]
pub trait Table {
    fn meet(&self, number: u64) -> u64;
}

impl Table for Barrier {
    fn meet(&self, number: u64) -> u64 {
        self.wait();
        number
    }
}

fn many_calls_are_awaited_at_once_on_one_thread() -> testkit::Outcome {
    let served =
        serve(|d| d.activations(8).interface(ForestPortal(Real)).interface(TablePortal(Barrier::new(8))));
    let client = ForestClient::connect(served.path()).unwrap();
    // None returns before all are there.
    let table = TableClient::connect(served.path()).unwrap();
    let results = run_all((0..8).map(|i| table.meet_async(i)).collect());
    assert!(results.iter().map(|r| *r.as_ref().unwrap()).eq(0..8), "{results:?}");
    // Out arguments and the callee's errors come the same way.
    let bytes = vec![5u8; 100_000];
    let mut reversed = Vec::new();
    run_all(vec![client.reverse_async(&bytes, &mut reversed)]).pop().unwrap().unwrap();
    assert_eq!(reversed, bytes);
    let mut t = tree();
    let failed = run_all(vec![client.rename_async("", &mut t)]).pop().unwrap();
    assert_eq!(failed, Err(Error::Callee(Wrong::Empty)));
    testkit::Outcome::Passed
}

fn an_awaited_call_ends_with_its_deadline_or_its_domain() -> testkit::Outcome {
    let (served, client) = forest();
    let hasty = client.clone().within(Duration::from_millis(30));
    let late = run_all(vec![hasty.wait_async(500)]).pop().unwrap();
    assert_eq!(late, Err(Error::Call(CallError::Deadline)));
    // Dropped after its first poll: given up, and the connection serves on.
    {
        let mut dropped = pin!(client.wait_async(50));
        let _ = dropped.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    }
    assert_eq!(run_all(vec![client.wait_async(1)]).pop().unwrap(), Ok(1));
    let pid = served.pid;
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        let _ = peregrine_sys::signal::kill(pid, peregrine_sys::signal::number::KILL);
    });
    let died = run_all(vec![client.wait_async(10_000)]).pop().unwrap();
    assert_eq!(died, Err(Error::Call(CallError::DomainDied)));
    killer.join().unwrap();
    testkit::Outcome::Passed
}

/// A future that nobody tells of its reply finds it all the same, when it looks by itself after a second: many in a row show who told.
fn an_awaited_call_is_woken_by_its_reply() -> testkit::Outcome {
    let (_served, client) = forest();
    let (done, is_done) = channel();
    std::thread::spawn(move || {
        for _ in 0..60 {
            assert_eq!(run_all(vec![client.wait_async(5)]).pop().unwrap(), Ok(5));
        }
        done.send(()).unwrap();
    });
    is_done.recv_timeout(Duration::from_secs(40)).expect("the reactor is told of replies");
    testkit::Outcome::Passed
}

fn wild_bytes_in_place_of_arguments_are_refused() -> testkit::Outcome {
    use peregrine_call::Call;
    use peregrine_call::interface::Interface;
    let (_served, forest) = forest();
    let client = forest.connection();
    let portal = client.portal(ForestClient::NAME, ForestClient::VERSION).unwrap();
    let mut seed = 0x5eed_u64;
    for round in 0..3000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let len = (seed >> 59) as usize + usize::from(round % 3 == 0) * 200;
        let mut bytes: Vec<u8> = (0..len).map(|i| (seed >> (i % 8 * 7)) as u8).collect();
        if let Some(first) = bytes.first_mut() {
            *first %= 12;
            // `wait` would do what the bytes say, for up to half a million years.
            if *first == 9 {
                *first = 0;
            }
        }
        let mut out = Vec::new();
        let call = Call::new().input(&bytes).output(&mut out, 4096);
        match client.call(portal, call) {
            Ok(()) | Err(CallError::Callee(_)) => {}
            Err(e) => panic!("round {round}, {bytes:?}: {e:?}"),
        }
    }
    assert_eq!(forest.depth(&tree()).unwrap(), 3, "the domain serves on");
    testkit::Outcome::Passed
}

fn plain_data_anywhere_can_be_lent() -> testkit::Outcome {
    let (_served, forest) = forest();
    // In the line, and in memory of its own when it is too large for that; none at all.
    for len in [0usize, 1, 3, 1000, 200_000] {
        let numbers: Vec<f64> = (0..len).map(|n| n as f64).collect();
        let bytes = vec![2u8; len / 2];
        let (sum, small) = forest.sum(&numbers, &bytes).unwrap();
        let expected = (len * len.saturating_sub(1) / 2) as f64;
        assert!((sum - expected).abs() < 0.5 && small == len as u64 / 2 * 2, "{len}: {sum} {small}");
    }
    assert_eq!(forest.sum(&[1.5f64, 2.0], &[9u8]).unwrap(), (3.5, 9));
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    let _ = Domain::builder;
    testkit::main(testkit::tests![
        values_with_pointers_are_copied_deeply,
        a_failed_call_changes_no_argument_of_its_caller,
        bytes_of_all_sizes_cross_both_ways,
        lent_memory_is_read_in_place_and_given_memory_changes_hands,
        plain_data_anywhere_can_be_lent,
        the_callee_sees_who_calls_and_until_when,
        the_callees_error_is_told_from_the_calls,
        an_old_client_is_told_of_the_mismatch_before_any_call,
        many_calls_are_awaited_at_once_on_one_thread,
        an_awaited_call_ends_with_its_deadline_or_its_domain,
        an_awaited_call_is_woken_by_its_reply,
        wild_bytes_in_place_of_arguments_are_refused,
    ])
}
