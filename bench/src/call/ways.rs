//! All ways to call, by name.

use super::shared::{Form, Wait, start};
use super::subject::{Caller, Timed, time};
use super::{carried, ours, peers, remote, stream};
use peregrine_sys::process::pin_to_cpu;

/// On how many processors client and server run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Cores {
    /// Both on one.
    One,
    /// Each on its own.
    Two,
}

impl Cores {
    /// As an argument and in a table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Two => "two",
        }
    }

    /// The processors of client and server.
    pub const fn processors(self) -> (usize, usize) {
        match self {
            Self::One => (1, 1),
            Self::Two => (1, 0),
        }
    }
}

/// Makes the client's side for so many bytes; its server runs on the processor given.
type Start = fn(usize, usize) -> Box<dyn Caller>;

/// How a way is set up.
#[derive(Clone, Copy)]
pub enum How {
    /// A client that forks its server.
    Forked(Start),
    /// Our fresh call.
    Fresh(ours::Form, ours::Place),
    /// A whole World.
    World,
}

/// One way.
pub struct Way {
    /// As an argument.
    pub name: &'static str,
    /// In the table.
    pub title: &'static str,
    /// It means something on so many processors alone: who spins on two, who gives its core away on one.
    pub only: Option<Cores>,
    how: How,
}

impl Way {
    /// Times so many calls of it in this process.
    pub fn time(&self, bytes: usize, cores: Cores, calls: usize) -> Timed {
        let (ours, theirs) = cores.processors();
        match self.how {
            How::Forked(start) => {
                pin_to_cpu(ours).expect("a processor for the client");
                time(&mut *start(bytes, theirs), calls)
            }
            How::Fresh(form, place) => time(&mut ours::start(bytes, cores, form, place), calls),
            How::World => carried::run(bytes, cores, calls),
        }
    }
}

/// The floor of a run on one core.
pub const FLOOR: &str = "eventfd";
/// The floor of a run on two cores, for who reads the argument where its caller built it.
pub const SPINNING_FLOOR: &str = "spin";
/// The same for who has a private copy of it.
pub const SPINNING_COPIED_FLOOR: &str = "spin-copied";

/// The way that does the same work as `way`, on so many bytes, with nothing around it: what it is compared with. On two cores our hot call
/// whose argument the domain copies has the floor that copies; without an argument there is nothing to copy.
pub fn floor_of(way: &str, cores: Cores, bytes: usize) -> &'static str {
    match cores {
        Cores::One => FLOOR,
        Cores::Two if way == OURS_HOT && bytes != 0 => SPINNING_COPIED_FLOOR,
        Cores::Two => SPINNING_FLOOR,
    }
}

/// Our call at default attributes.
pub const OURS: &str = "call";
/// With its argument lent.
pub const OURS_LEND: &str = "call-lend";
/// On two cores, both awake.
pub const OURS_HOT: &str = "call-hot";
/// The same with its argument lent.
pub const OURS_HOT_LEND: &str = "call-hot-lend";

const BOTH: Option<Cores> = None;
const ONE: Option<Cores> = Some(Cores::One);
const TWO: Option<Cores> = Some(Cores::Two);

const fn fresh(
    name: &'static str,
    title: &'static str,
    only: Option<Cores>,
    form: ours::Form,
    place: ours::Place,
) -> Way {
    Way { name, title, only, how: How::Fresh(form, place) }
}

const fn way(name: &'static str, title: &'static str, only: Option<Cores>, start: Start) -> Way {
    Way { name, title, only, how: How::Forked(start) }
}

/// Ours, and what it is compared with.
pub const WAYS: &[Way] = &[
    fresh(OURS, "our call", BOTH, ours::Form::In, ours::Place::Default),
    fresh(OURS_LEND, "our call, argument lent in place", BOTH, ours::Form::Lend, ours::Place::Default),
    fresh(OURS_HOT, "our call, hot on another core", TWO, ours::Form::In, ours::Place::Apart),
    fresh(OURS_HOT_LEND, "our call, hot on another core, lent", TWO, ours::Form::Lend, ours::Place::Apart),
    fresh(
        "static-thread",
        "static thread over our transport",
        BOTH,
        ours::Form::StaticThread,
        ours::Place::Default,
    ),
    Way { name: "carried", title: "our carried call", only: BOTH, how: How::World },
    way(FLOOR, "eventfd + shared memory, in place", BOTH, |n, cpu| {
        start(n, cpu, Form::InPlace, Wait::Events)
    }),
    way("eventfd-copied", "eventfd + shared memory, copied", BOTH, |n, cpu| {
        start(n, cpu, Form::Copied, Wait::Events)
    }),
    way(SPINNING_FLOOR, "spinning shared memory, in place", TWO, |n, cpu| {
        start(n, cpu, Form::InPlace, Wait::Spin)
    }),
    way(SPINNING_COPIED_FLOOR, "spinning shared memory, copied", TWO, |n, cpu| {
        start(n, cpu, Form::Copied, Wait::Spin)
    }),
    way("yield", "sched_yield + shared memory, in place", ONE, |n, cpu| {
        start(n, cpu, Form::InPlace, Wait::Yield)
    }),
    way("pipe", "pipe pair", BOTH, stream::pipes),
    way("unix", "Unix stream", BOTH, stream::unix),
    way("pool", "dispatcher and pool, eventfd + shared memory", BOTH, |n, cpu| {
        start(n, cpu, Form::Pool, Wait::Events)
    }),
    way("fresh-thread", "fresh OS thread a call", BOTH, |n, cpu| {
        start(n, cpu, Form::FreshThread, Wait::Events)
    }),
    way("iceoryx2", "iceoryx2, events", BOTH, |n, cpu| peers::iceoryx(n, cpu, peers::Notice::Event)),
    way("iceoryx2-poll", "iceoryx2, busy poll", TWO, |n, cpu| peers::iceoryx(n, cpu, peers::Notice::Poll)),
    way("ipc-channel", "ipc-channel", BOTH, peers::ipc_channel),
    way("tarpc", "tarpc over a Unix socket", BOTH, remote::tarpc),
    way("tonic", "tonic over a Unix socket", BOTH, remote::tonic),
];
