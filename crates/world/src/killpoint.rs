//! Kill points: every step of the runtime at which a dead node leaves a shared structure changed, and not yet right.
//!
//! ```text
//!   push ──▶ lock ──▶ tail linked ──▶ at(ChannelLinked): hits += 1; due? kill -9 myself ──▶ count raised ──▶ unlock
//! ```
//!
//! Without the feature `killpoints` a point compiles to nothing. With it, each counts who comes by, and when the program was
//! started with `PEREGRINE_KILL_POINTS=N`, kills its own node N times: each time the n-th visitor after the last kill, n at
//! random. `count` instead of N only counts. The table lies in the part of the control memory that no rollback takes
//! back, so it tells the whole story at the end: which structure was left half done how often.
//!
//! `N@NAME,NAME` has kills at these places only. `others-N` kills *another* node each time, and keeps the visitor where it is until the
//! rollback resets it: what a survivor holds of its own (what its kernel was told, windows, guards) is then left half changed too.
//!
//! Between two kills the World has time for an image, else it would never advance; but points of the recovery itself kill at
//! any time, so that a second node dies while the first is being mourned.
//!
//! The supervisor has points of its own, by name, for it is killed once a life: `PEREGRINE_KILL_SUPERVISOR=NAME:N` kills it
//! the N-th time it comes by.

#[cfg(feature = "killpoints")]
pub use armed::*;

#[cfg(not(feature = "killpoints"))]
pub use unarmed::*;

macro_rules! points {
    ($($structure:literal { $($name:ident),* $(,)? })*) => {
        /// A place in the runtime.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(usize)]
        #[allow(missing_docs, dead_code)]
        pub enum Point { $($($name),*),* }

        /// Structure and name of each point, by number.
        #[cfg(feature = "killpoints")]
        const NAMES: &[(&str, &str)] = &[$($(($structure, stringify!($name))),*),*];
    };
}

points! {
    "locks" { LockTaken, LockChanged, LockFreed }
    "free lists" { ListPopped, ListRaised, ListLinked, ListGiven }
    "thread records" {
        CreateCharged, CreateTaken, CreatePrepared, CreateNamed, CreateNumbered, CreateReady, LaunchedElsewhere,
        BuryBegins, BuryPunched, BuryGivenBack, BuryEnded, ReleaseFree,
    }
    "join cells" { FinishSet, FinishBeforeWake, MainEnded, JoinWaits, JoinTaken, JoinAdopted, Detached, DetachedEnded, ResultDropped }
    "channels" {
        ChannelTaken, ChannelReset, ChannelMade, PushWritten, PushLinked, PushCounted, PushUnlocked,
        PopWaits, PopUnlinked, PopCounted, PopTaken, CloseCounted, CloseUnqueued, CloseWakes, CloseFreed, CloseQueue,
    }
    "channel ends" { EndTaken, EndSet, EndCounted, EndUnset, EndGiven, EndAdopted, EndTravels }
    "message arena" { ArenaAllocated, ArenaFilled, ArenaFreed, ArenaCharged, ArenaExtended, ArenaGrown, BlobCopied }
    "address space" {
        RecordIntended, RecordLocked, RecordShotDown, RecordCommitted, RecordChanged, RecordDropped, RecordAdmitted,
        RecordUnlocked, RecordCounted,
    }
    "memory budget" { ChargeAdded, ChargeRefused }
    "output ring" { OutputHead, OutputBytes, OutputTail, OutputWritten }
    "inboxes" {
        PostMarked, PostLinked, PostPushed, NudgeBumped, DrainTaken, DrainTurned, MailTaken, MailForwarded, MailKept, MailMoves,
    }
    "run queue" { Woken, WokenQueued, Requeued, SwitchEntered, SettleLeft, SettleRequeued, Stepped, QueueStale }
    "timers" { TimerSet, TimerDue, TimerQueued }
    "moves" { SendEvicted, SendCounted, SendMarked, SendHanded, DonateTaken, ArriveCounted, MoveAsked, LendClaimed, LendBound, LendTakenBack }
    "statics window" { WindowBrought }
    "thread windows" { WindowLeft, WindowFreed, WindowMade, WindowMapped, WindowEntered, BirthPrepared, BirthCharged }
    "copy blocks" { BlockMade, BlockKnown, BlockFilled, BlockBuried }
    "packed threads" { ModelMade, ModelKnown, PackMade, PackKnown, PackGivenBack, Unpacked, UnpackGivenBack, UnpackCharged }
    "archive" { ArchiveTaken, ArchiveWritten, ArchiveGivenBack }
    "frames" { FramesPunched }
    "shared regions" { RegionRecorded, RegionEntered, RegionCounted, RegionUnmapped, RegionTaken }
    "signals" { DispositionTold, DispositionSet, DispositionCounted, DispositionFollowed }
    "domains" { DomainEntered, DomainListed, DomainAsked, CallLeaves, CallReturns }
    "dirty reports" { ReportBegins, ReportScanned, ReportCounted }
    "image handshake" { PauseSeen, PauseSaved, PauseReported, PauseAnswered, PauseAcked, PauseOver, CheckpointAsked }
    "rollback handshake" { ResetHeard, ResetCleared }
    "rebuild" { RebuildBegins, RebuildHalf, RebuildDone }
    "node start" { NodeBorn, NodeCarried, NodeTracks, NodeReady }
    "blocked wait" { IdleBegins, IdleSleeps }
}

#[cfg(not(feature = "killpoints"))]
mod unarmed {
    /// Here a test kills the node.
    #[inline(always)]
    pub fn at(_: super::Point) {}
    /// Here a test kills the supervisor.
    #[inline(always)]
    pub fn supervisor_at(_: &'static str) {}
    /// From the start of a recovery, until it is over.
    #[inline(always)]
    pub fn hold_fire(_: bool) {}
    /// Whether the node that was found dead died at a kill point.
    #[inline(always)]
    pub fn was_ours() -> bool {
        false
    }
}

#[cfg(feature = "killpoints")]
mod armed {
    use super::{NAMES, Point};
    use crate::control::{node, world};
    use peregrine_base::sync::{AtomicU32, AtomicU64, Ordering, spin_loop};
    use peregrine_sys::signal::{self, number};
    use peregrine_sys::{process, timer::monotonic_ns};

    /// How many points there are.
    const COUNT: usize = NAMES.len();
    /// Time for an image between two kills.
    const PEACE_NS: u64 = 7_000_000;

    /// How long a visitor waits at most to be reset.
    const LINGERS_NS: u64 = 3_000_000_000;

    /// Counts of all points, in the control memory.
    #[repr(C)]
    pub struct Table {
        /// No kill before this time (monotonic ns); 0: never.
        not_before: AtomicU64,
        random: AtomicU64,
        /// Nodes killed that the supervisor has not buried yet.
        unburied: AtomicU32,
        /// Not 0: another node is killed, and the visitor reset.
        others: AtomicU32,
        points: [Counts; COUNT],
    }

    #[repr(C)]
    struct Counts {
        hits: AtomicU64,
        kills: AtomicU32,
        /// Kills still to come.
        left: AtomicU32,
        /// Visitors to pass before the next.
        pass: AtomicU32,
    }

    /// What happened at one point.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Tallied {
        /// The structure it belongs to.
        pub structure: &'static str,
        /// Its name.
        pub name: &'static str,
        /// How often a node came by.
        pub hits: u64,
        /// How often it was killed there.
        pub kills: u32,
    }

    /// `main` ends once; there are so many domains and no more.
    const FEWEST: [Point; 4] =
        [Point::MainEnded, Point::DomainEntered, Point::DomainListed, Point::DomainAsked];

    /// Whether a node in recovery, or just born, comes by here.
    fn is_of_recovery(p: Point) -> bool {
        p as usize >= Point::ResetHeard as usize && p as usize <= Point::NodeReady as usize
    }

    /// Whether a node comes by here in every pause, those of recovery too.
    fn is_of_pause(p: Point) -> bool {
        p as usize >= Point::PauseSeen as usize && p as usize <= Point::PauseAcked as usize
    }

    /// How many visitors to let pass until the next kill: about as many as there are between two images, and fewer where few
    /// come by.
    fn to_pass(t: &Table, point: usize) -> u32 {
        let few = [
            Point::ArenaCharged,
            Point::ArenaExtended,
            Point::ArenaGrown,
            Point::CheckpointAsked,
            Point::ListRaised,
            Point::ArchiveTaken,
            Point::ArchiveWritten,
            Point::ArchiveGivenBack,
            // Once for each function.
            Point::ModelMade,
            Point::ModelKnown,
        ];
        let is_one_of = |list: &[Point]| list.iter().any(|p| *p as usize == point);
        let bound = if is_one_of(&FEWEST) {
            1
        } else if is_one_of(&few) {
            2
        } else {
            12
        };
        (random(t) % bound) as u32
    }

    fn random(t: &Table) -> u64 {
        let mut x = t.random.load(Ordering::Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        // Nodes that draw at once may draw the same: a test's dice, no more.
        t.random.store(x, Ordering::Relaxed);
        x >> 16
    }

    /// Counts, and kills if it is time.
    #[inline(never)]
    pub fn at(p: Point) {
        // SAFETY: the carrier's page is mapped in the supervisor too, where it is zero; there `depth` is 0.
        let inside = unsafe { peregrine_thread::carrier::carrier() }.depth.load(Ordering::Relaxed) != 0;
        if !inside && !is_of_recovery(p) {
            return;
        }
        let t = &world().kill_points;
        let c = &t.points[p as usize];
        c.hits.fetch_add(1, Ordering::Relaxed);
        if c.left.load(Ordering::Relaxed) == 0 {
            return;
        }
        let gate = t.not_before.load(Ordering::Relaxed);
        let closed = gate == 0 || monotonic_ns() < gate;
        if closed && !is_of_recovery(p) && !(is_of_pause(p) && random(t) & 3 == 0) {
            return;
        }
        if c.pass.load(Ordering::Relaxed) != 0 {
            c.pass.fetch_sub(1, Ordering::Relaxed);
            return;
        }
        if process::pid() as u32 == world().supervisor.load(Ordering::Relaxed) {
            return;
        }
        let others = t.others.load(Ordering::Relaxed) != 0;
        let victim = if others { another_node() } else { Some(process::pid()) };
        let Some(victim) = victim else { return };
        // Another node may have taken the last.
        let take = |n: u32| n.checked_sub(1);
        if c.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return;
        }
        c.pass.store(to_pass(t, p as usize), Ordering::Relaxed);
        c.kills.fetch_add(1, Ordering::Relaxed);
        t.not_before.store(0, Ordering::Relaxed);
        t.unburied.fetch_add(1, Ordering::Relaxed);
        let _ = signal::kill(victim, number::KILL);
        // For longer than any rollback takes to begin; if none does, for the victim was another's or the World ends, it goes on.
        let until = monotonic_ns() + LINGERS_NS;
        while others && monotonic_ns() < until {
            spin_loop();
        }
    }

    /// Process of a living node other than this one.
    fn another_node() -> Option<i32> {
        let w = world();
        // SAFETY: on a node.
        let me = unsafe { peregrine_thread::carrier::carrier() }.node;
        let nodes = (0..w.node_count.load(Ordering::Relaxed)).filter(|n| *n != me).map(node);
        let pids =
            nodes.filter(|n| n.ready.load(Ordering::Acquire) != 0).map(|n| n.pid.load(Ordering::Relaxed));
        pids.map(|pid| pid as i32).find(|pid| *pid > 0)
    }

    /// Whether a node that comes by is killed now, if there are kills left for the place: a program that comes by few times waits
    /// for it.
    pub fn is_open() -> bool {
        let gate = world().kill_points.not_before.load(Ordering::Relaxed);
        gate != 0 && monotonic_ns() >= gate
    }

    /// Whether the node that was found dead died at a kill point: nobody is to blame for that, though on a slow machine
    /// thirty may die so between two images.
    pub fn was_ours() -> bool {
        let take = |n: u32| n.checked_sub(1);
        world().kill_points.unburied.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// No kills from the start of a recovery until a while after its end, but at the points of recovery itself.
    pub fn hold_fire(hold: bool) {
        let gate = if hold { 0 } else { monotonic_ns() + PEACE_NS };
        world().kill_points.not_before.store(gate, Ordering::Relaxed);
    }

    /// Whether this run was started to be killed, or to count where it could be.
    pub fn armed() -> bool {
        static ARMED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        let asked = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        *ARMED.get_or_init(|| asked("PEREGRINE_KILL_POINTS") || asked("PEREGRINE_KILL_SUPERVISOR"))
    }

    static DIFFERENCES: AtomicU64 = AtomicU64::new(0);

    /// Tells of memory that is not what the image says it is.
    pub(crate) fn differs(what: std::fmt::Arguments<'_>) {
        DIFFERENCES.fetch_add(1, Ordering::Relaxed);
        eprintln!("peregrine: not as in the image: {what}");
    }

    /// How often memory was found to be other than the image says, by the supervisor of this process.
    pub fn differences() -> u64 {
        DIFFERENCES.load(Ordering::Relaxed)
    }

    /// Reads `PEREGRINE_KILL_POINTS`.
    pub(crate) fn prepare(seed: u64) {
        let t = &world().kill_points;
        t.random.store(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1, Ordering::Relaxed);
        let text = std::env::var("PEREGRINE_KILL_POINTS").unwrap_or_default();
        let (kills, places) = text.split_once('@').map_or((&*text, None), |(n, names)| (n, Some(names)));
        let others = kills.strip_prefix("others-");
        t.others.store(others.is_some().into(), Ordering::Relaxed);
        let kills: u32 = others.unwrap_or(kills).parse().unwrap_or(0);
        let is_meant = |i: usize| places.is_none_or(|p| p.split(',').any(|name| name == NAMES[i].1));
        let is_of_recovery = |i: usize| (Point::ResetHeard as usize..=Point::NodeReady as usize).contains(&i);
        for (i, c) in t.points.iter().enumerate() {
            // A World gives up when too many nodes in a row die before they can run.
            let before_ready = (Point::NodeBorn as usize..=Point::NodeTracks as usize).contains(&i);
            let kills = if before_ready { kills.min(5) } else { kills };
            // Who is reset already is not reset by the death of another.
            let kills = if is_meant(i) && !(others.is_some() && is_of_recovery(i)) { kills } else { 0 };
            c.left.store(kills, Ordering::Relaxed);
            c.pass.store(to_pass(t, i), Ordering::Relaxed);
        }
    }

    /// Kills that are still to come while `main` runs, over all points but those that need not be reached. It grows less; a
    /// rollback does not take it back.
    pub fn left() -> u64 {
        let points = world().kill_points.points.iter().enumerate();
        let need_not = |i: usize| i == Point::QueueStale as usize || FEWEST.iter().any(|p| *p as usize == i);
        let counted = points.filter(|(i, _)| !need_not(*i));
        counted.map(|(_, c)| u64::from(c.left.load(Ordering::Relaxed))).sum()
    }

    /// What has happened at each point in the World of this process.
    pub fn table() -> Vec<Tallied> {
        let points = NAMES.iter().zip(&world().kill_points.points);
        points
            .map(|((structure, name), c)| Tallied {
                structure,
                name,
                hits: c.hits.load(Ordering::Relaxed),
                kills: c.kills.load(Ordering::Relaxed),
            })
            .collect()
    }

    /// Counts who comes by in the supervisor, and kills it at the place that `PEREGRINE_KILL_SUPERVISOR` names.
    pub fn supervisor_at(name: &'static str) {
        use std::cell::RefCell;
        use std::collections::HashMap;
        thread_local! {
            static SEEN: RefCell<HashMap<&'static str, u64>> = RefCell::new(HashMap::new());
        }
        let times = SEEN.with_borrow_mut(|seen| {
            let n = seen.entry(name).or_default();
            *n += 1;
            *n
        });
        let Ok(wanted) = std::env::var("PEREGRINE_KILL_SUPERVISOR") else { return };
        if wanted == "count" {
            eprintln!("supervisor at {name}");
        } else if wanted.rsplit_once(':').is_some_and(|(n, k)| n == name && k.parse() == Ok(times)) {
            eprintln!("supervisor dies at {name}");
            let _ = signal::kill(process::pid(), number::KILL);
        }
    }
}
