//! The address space over real processes.

mod killed;

use killed::{Scene, at_every_step, at_random_instructions};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_space::process::{
    BLOCK_PAGES, Config, Filling, MAP_PAGES, MapRangeError, Member, OPEN_PAGES, SIGNAL, Space,
};
use peregrine_space::{MapError, OperationKind, Step, UnmapError};
use peregrine_sys::process::{ChildEnd, ForkFlags, Forked, die_with_parent, exit_now, fork_with, wait_for};
use peregrine_sys::signal::{self, number};
use peregrine_sys::{io, other, timer};
use peregrine_vm::Mapping;
use std::cell::Cell;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use testkit::{Outcome, Rng, run_helper};

fn space(filling: Filling) -> Space {
    Space::create(Config { pages: PageCount::new(2048), filling, at: None }).expect("a space")
}

fn part(space: &Space, first: usize, pages: usize) -> PageRange {
    let start = space.region().start().as_usize() + first * PAGE_SIZE;
    PageRange::new(VirtAddr::new(start), PageCount::new(pages))
}

/// Words that parent and child talk through.
fn board() -> Mapping {
    Mapping::memfd(PageCount::new(1)).expect("memory")
}

fn wait_until(board: &Mapping, word: usize, value: u64, mut meanwhile: impl FnMut()) {
    let deadline = timer::monotonic_ns() + 20_000_000_000;
    while board.bytes().load_u64(word * 8).expect("in bounds") < value {
        assert!(timer::monotonic_ns() < deadline, "word {word} never becomes {value}");
        meanwhile();
        io::yield_now();
    }
}

fn tell(board: &Mapping, word: usize, value: u64) {
    board.bytes().store_u64(word * 8, value).expect("in bounds");
}

/// A member in a process of its own.
fn fork_member(space: &Space, f: impl FnOnce(&mut Member<'_>)) -> i32 {
    // SAFETY: the tests' processes have one thread.
    match unsafe { fork_with(ForkFlags::default()) }.expect("fork") {
        Forked::Child => {
            die_with_parent();
            f(&mut space.join().expect("a member"));
            exit_now(0)
        }
        Forked::Parent(pid) => pid,
    }
}

fn what_one_member_unmaps_no_other_reaches() -> Outcome {
    for filling in [Filling::Kernel, Filling::KernelTracked, Filling::Trap] {
        let (space, board) = (space(filling), board());
        let range = part(&space, 3, 20);
        let child = fork_member(&space, |member| {
            tell(&board, 0, 1);
            wait_until(&board, 1, 1, || member.poll());
            // Trap: the page is mapped, and is opened here.
            let found = member.bytes(range).load_u64(PAGE_SIZE).expect("in bounds");
            tell(&board, 0, 2 + found);
            wait_until(&board, 1, 2, || member.poll());
            let _ = member.bytes(range).load_u64(PAGE_SIZE);
        });
        wait_until(&board, 0, 1, || ());
        let mut member = space.join().expect("a member");
        member.map_at(range, Protection::ReadWrite).expect("map");
        member.bytes(range).store_u64(PAGE_SIZE, 40).expect("in bounds");
        tell(&board, 1, 1);
        wait_until(&board, 0, 42, || member.poll());
        member.unmap(range).expect("unmap");
        assert_eq!(member.tally().asked, 1, "{filling:?}: the one that touched it");
        tell(&board, 1, 2);
        let signal = if filling == Filling::Trap { number::BUS } else { number::SEGV };
        assert_eq!(wait_for(child), Ok(ChildEnd::Killed(signal)), "{filling:?}");
        assert_eq!(member.reap().len(), 1);
        member.map_at(range, Protection::ReadWrite).expect("map");
        assert_eq!(member.bytes(range).load_u64(PAGE_SIZE), Ok(0), "{filling:?}: zeroed between owners");
    }
    Outcome::Passed
}

fn lowered_rights_reach_every_member_and_contents_stay() -> Outcome {
    let (space, board) = (space(Filling::Trap), board());
    let range = part(&space, 0, 4);
    let child = fork_member(&space, |member| {
        tell(&board, 0, 1);
        wait_until(&board, 1, 1, || member.poll());
        member.bytes(range).store_u64(8, 7).expect("in bounds");
        tell(&board, 0, 2);
        wait_until(&board, 1, 2, || member.poll());
        assert_eq!(member.bytes(range).load_u64(8), Ok(7), "reading is allowed");
        tell(&board, 0, 3);
        let _ = member.bytes(range).store_u64(8, 8);
    });
    wait_until(&board, 0, 1, || ());
    let mut member = space.join().expect("a member");
    member.map_at(range, Protection::ReadWrite).expect("map");
    tell(&board, 1, 1);
    wait_until(&board, 0, 2, || member.poll());
    member.protect(range, Protection::Read).expect("protect");
    tell(&board, 1, 2);
    wait_until(&board, 0, 3, || member.poll());
    assert_eq!(wait_for(child), Ok(ChildEnd::Killed(number::BUS)));
    assert_eq!(member.bytes(range).load_u64(8), Ok(7));
    member.protect(range, Protection::ReadWrite).expect("protect");
    member.bytes(range).store_u64(8, 9).expect("in bounds");
    assert_eq!(member.bytes(range).load_u64(8), Ok(9), "raised rights are found by a trap");
    Outcome::Passed
}

fn members_that_share_nothing_ask_nobody() -> Outcome {
    for filling in [Filling::Kernel, Filling::KernelTrusting, Filling::Trap] {
        let (space, board) = (space(filling), board());
        let work = |member: &mut Member<'_>, first: usize| {
            for i in 0..500 {
                let range = part(&space, first + i % 7, 1 + i % 3);
                member.map_at(range, Protection::ReadWrite).expect("map");
                member.bytes(range).store_u64(0, 1).expect("in bounds");
                member.unmap(range).expect("unmap");
                member.poll();
            }
            let tally = member.tally();
            assert_eq!((tally.requests, tally.asked, tally.signals), (0, 0, 0), "{filling:?}");
        };
        let child = fork_member(&space, |member| {
            tell(&board, 0, 1);
            work(member, 1024);
        });
        wait_until(&board, 0, 1, || ());
        work(&mut space.join().expect("a member"), 0);
        assert_eq!(wait_for(child), Ok(ChildEnd::Exited(0)));
    }
    Outcome::Passed
}

fn a_stopped_member_never_stalls_an_epoch() -> Outcome {
    let (space, board) = (space(Filling::Kernel), board());
    let child = fork_member(&space, |member| {
        // In the epoch: it has ticked, and will not again.
        member.tick();
        tell(&board, 0, 1);
        loop {
            io::yield_now();
        }
    });
    wait_until(&board, 0, 1, || ());
    signal::kill(child, number::STOP).expect("alive");
    while other::stat(child as u32).map(|s| s.condition) != Some(other::Condition::Stopped) {
        io::yield_now();
    }
    let mut member = space.join().expect("a member");
    let floor = member.spaces().nodes_in_use();
    let range = part(&space, 700, 1);
    member.map_at(range, Protection::ReadWrite).expect("map");
    assert!(member.spaces().nodes_in_use() > floor, "a page of its own needs nodes");
    member.unmap(range).expect("unmap");
    let deadline = timer::monotonic_ns() + 20_000_000_000;
    while member.spaces().nodes_in_use() > floor {
        assert!(timer::monotonic_ns() < deadline, "the epoch stands still");
        member.tick();
    }
    signal::kill(child, number::KILL).expect("alive");
    assert_eq!(wait_for(child), Ok(ChildEnd::Killed(number::KILL)));
    assert_eq!(member.reap().len(), 1);
    Outcome::Passed
}

fn however_much_a_member_maps_no_mapping_is_split() -> Outcome {
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mappings = || std::fs::read_to_string("/proc/self/maps").expect("/proc").lines().count();
    for filling in [Filling::Kernel, Filling::KernelTracked, Filling::KernelTrusting, Filling::Trap] {
        let mut rng = Rng::new(seed);
        let before_all = mappings();
        let space = space(filling);
        assert!(mappings() <= before_all + 2, "the table, and the region's reservation");
        let mut member = space.join().expect("a member");
        // The alias, the page that a fork wipes, and a stack for signals with its guard.
        let bound = before_all + 2 + 2 + 2;
        for i in 0..2000 {
            let range = part(&space, rng.below(2000), 1 + rng.below(40));
            let _ = member.unmap(range);
            if rng.below(3) != 0 {
                member.map_at(range, Protection::ReadWrite).expect("nothing is there");
                member.bytes(range).store_u64(0, 1).expect("in bounds");
            }
            if i % 250 == 0 {
                assert!(mappings() <= bound, "{filling:?}: {} mappings", mappings());
            }
        }
        drop(member);
    }
    Outcome::Passed
}

fn of_a_large_trap_filled_mapping_only_what_is_touched_or_asked_for_takes_memory() -> Outcome {
    let space = space(Filling::Trap);
    let range = part(&space, 100, 1500);
    let mut member = space.join().expect("a member");
    // Frames that a former owner wrote, so that the next one finds any that is not zeroed.
    member.map_at(range, Protection::ReadWrite).expect("map");
    member.open(range).expect("open");
    let end = range.pages().bytes();
    (0..end).step_by(PAGE_SIZE).for_each(|at| member.bytes(range).store_u64(at, 7).expect("in bounds"));
    assert_eq!(member.seat().resident().get(), 1500);
    for first in (0..1500).step_by(50) {
        // In parts too small to be given back to the kernel.
        member.unmap(part(&space, 100 + first, 50)).expect("unmap");
    }
    member.seat().trim(range).expect("nobody has it open");
    assert_eq!(member.seat().resident().get(), 0);

    member.map_at(range, Protection::ReadWrite).expect("map");
    assert_eq!(member.seat().resident().get(), MAP_PAGES, "no more than that is zeroed and mapped at once");
    let last = end - PAGE_SIZE;
    assert_eq!(member.bytes(range).load_u64(last).expect("in bounds"), 0, "opened by the touch");
    let pages = member.seat().resident().get();
    assert!(pages > MAP_PAGES && pages < 1500, "{pages} pages for a touch of one");
    // The kernel does not take the trap for this process: what it is to write to is opened first.
    let zeros = std::fs::File::open("/dev/zero").expect("/dev/zero");
    let into = part(&space, 800, 1).start().as_ptr();
    // SAFETY: a page of the region, to whose bytes nothing refers (S1).
    let read = || unsafe { io::read_at_ptr(zeros.as_fd(), into, 64, 0) };
    assert!(read().is_err(), "an absent page");
    member.open(range).expect("open");
    assert_eq!(read(), Ok(64));
    assert_eq!(member.seat().resident().get(), 1500);
    Outcome::Passed
}

fn kill_at_steps(filling: Filling) -> Outcome {
    let mut scene = Scene::new(filling);
    let kills = at_every_step(&mut scene);
    println!("{kills} kills at steps");
    assert!(kills > 50, "the deeds have more steps than {kills}");
    Outcome::Passed
}

fn kill_at_instructions(filling: Filling) -> Outcome {
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let kills = at_random_instructions(&mut Scene::new(filling), &mut Rng::new(seed), 60);
    println!("{kills} kills between instructions");
    Outcome::Passed
}

fn a_member_of_a_kernel_filled_space_can_be_killed_at_every_step() -> Outcome {
    kill_at_steps(Filling::Kernel)
}

fn a_member_of_a_trap_filled_space_can_be_killed_at_every_step() -> Outcome {
    kill_at_steps(Filling::Trap)
}

fn a_member_of_a_kernel_filled_space_can_be_killed_between_any_two_instructions() -> Outcome {
    kill_at_instructions(Filling::Kernel)
}

fn a_member_of_a_trap_filled_space_can_be_killed_between_any_two_instructions() -> Outcome {
    kill_at_instructions(Filling::Trap)
}

/// Stops its own process where it holds the lock of what it is about to map.
fn stop_when_locked(step: Step) {
    if step == Step::Locked {
        signal::kill(std::process::id() as i32, number::STOP).expect("oneself");
    }
}

fn until(pid: i32, condition: other::Condition) {
    let deadline = timer::monotonic_ns() + 20_000_000_000;
    while other::stat(pid as u32).map(|s| s.condition) != Some(condition) {
        assert!(timer::monotonic_ns() < deadline, "process {pid} never becomes {condition:?}");
        io::yield_now();
    }
}

fn who_waits_for_a_stopped_holder_is_told_its_name_and_who_waits_for_a_dead_one_takes_over() -> Outcome {
    for filling in [Filling::Kernel, Filling::Trap] {
        for dies in [false, true] {
            println!("{filling:?}, dies: {dies}");
            let (space, board) = (space(filling), board());
            let range = part(&space, 3, 2);
            let child = fork_member(&space, |member| {
                wait_until(&board, 1, 1, || member.poll());
                member.on_step(Some(stop_when_locked));
                member.map_at(range, Protection::ReadWrite).expect("map");
            });
            let mut member = space.join().expect("a member");
            // So that the range has slots of its own: a lock on nothing at all is as wide as the slot that holds it.
            member.map_at(part(&space, 9, 1), Protection::ReadWrite).expect("map");
            tell(&board, 1, 1);
            until(child, other::Condition::Stopped);
            member.set_patience(Some(std::time::Duration::from_millis(30)));
            let unmapped = member.unmap(range);
            let Err(UnmapError::Held(holder)) = unmapped else {
                panic!("somebody holds the range: {unmapped:?}")
            };
            assert_eq!(holder.process, Some(child as u32));
            assert_eq!(holder.doing, Some((OperationKind::Map, range)));
            assert!(holder.to_string().contains(&child.to_string()), "{holder}");
            let mapped = member.map_at(range, Protection::ReadWrite);
            assert_eq!(mapped, Err(MapRangeError::Space(MapError::Held(holder))));
            assert_eq!(member.stopped_holders(), [holder]);
            // It held up nobody elsewhere.
            let elsewhere = part(&space, 10, 2);
            member.map_at(elsewhere, Protection::ReadWrite).expect("map");
            member.bytes(elsewhere).store_u64(0, 1).expect("in bounds");
            signal::kill(child, if dies { number::KILL } else { number::CONT }).expect("a child");
            if dies {
                until(child, other::Condition::Dead);
                // Nobody has called `reap`.
                assert_eq!(member.unmap(range), Ok(()));
                assert!(member.reap().is_empty(), "mended already");
                assert!(matches!(wait_for(child), Ok(ChildEnd::Killed(number::KILL))));
            } else {
                // It stops at each page's lock.
                while !matches!(
                    other::stat(child as u32).map(|s| s.condition),
                    None | Some(other::Condition::Dead)
                ) {
                    let _ = signal::kill(child, number::CONT);
                    io::yield_now();
                }
                assert_eq!(wait_for(child), Ok(ChildEnd::Exited(0)));
                assert_eq!(member.unmap(range), Ok(()));
            }
            assert!(member.stopped_holders().is_empty());
            assert!(member.query(range.start()).is_none());
            member.map_at(range, Protection::ReadWrite).expect("the range is free again");
            assert_eq!(member.bytes(range).load_u64(0).expect("in bounds"), 0);
        }
    }
    Outcome::Passed
}

/// Stops its own process where it has filled its view, and holds the lock of all that it has filled.
fn stop_when_filled(step: Step) {
    if step == Step::Filled {
        signal::kill(std::process::id() as i32, number::STOP).expect("oneself");
    }
}

fn a_touch_of_a_closed_page_locks_the_pages_that_it_opens_and_no_more() -> Outcome {
    for (filling, block) in [(Filling::Kernel, OPEN_PAGES), (Filling::Trap, BLOCK_PAGES)] {
        let (space, board) = (space(filling), board());
        let touched = part(&space, block + 3, 1);
        // Mapped one by one: the pages from the block's first to the one after that which is touched, one on either side, and more
        // of the block behind a hole.
        let inside = [0, 1, 2, 4].map(|page| part(&space, block + page, 1));
        let outside = [block - 1, block + 6, 2 * block - 1, 2 * block].map(|page| part(&space, page, 1));
        let child = fork_member(&space, |member| {
            tell(&board, 0, 1);
            wait_until(&board, 1, 1, || member.poll());
            member.on_step(Some(stop_when_filled));
            member.bytes(touched).store_u64(0, 7).expect("in bounds");
        });
        wait_until(&board, 0, 1, || ());
        let mut member = space.join().expect("a member");
        for page in inside.into_iter().chain(outside).chain([touched]) {
            member.map_at(page, Protection::ReadWrite).expect("map");
        }
        tell(&board, 1, 1);
        until(child, other::Condition::Stopped);
        member.set_patience(Some(std::time::Duration::from_millis(30)));
        for page in inside {
            let Err(UnmapError::Held(holder)) = member.unmap(page) else { panic!("{filling:?}: {page:?}") };
            let doing = Some((OperationKind::Fill, part(&space, block, 5)));
            assert_eq!((holder.process, holder.doing), (Some(child as u32), doing), "{filling:?}");
        }
        for page in outside {
            assert_eq!(member.unmap(page), Ok(()), "{filling:?}: what it does not open");
        }
        signal::kill(child, number::CONT).expect("a child");
        assert_eq!(wait_for(child), Ok(ChildEnd::Exited(0)));
        for page in inside {
            assert_eq!(member.unmap(page), Ok(()), "{filling:?}: it has gone on");
        }
        assert_eq!(member.bytes(touched).load_u64(0), Ok(7));
    }
    Outcome::Passed
}

/// Lets the other process go where this one holds the lock.
fn tell_when_locked(step: Step) {
    thread_local!(static TOLD: Cell<bool> = const { Cell::new(false) });
    if step == Step::Locked && !TOLD.replace(true) {
        tell(BELL.get().expect("hung up"), 1, 2);
    }
}

thread_local!(static BELL: Cell<Option<&'static Mapping>> = const { Cell::new(None) });

/// Where it can't be signalled, nobody but itself can see to it: else it would wait for the holder, and the holder for it.
fn who_waits_for_a_lock_obeys_its_holder_meanwhile() -> Outcome {
    let (space, board) = (space(Filling::Trap), &*Box::leak(Box::new(board())));
    let range = part(&space, 3, 1);
    let child = fork_member(&space, |member| {
        tell(board, 0, 1);
        wait_until(board, 1, 1, || member.poll());
        member.bytes(range).store_u64(0, 7).expect("in bounds");
        signal::set_mask(signal::bit(SIGNAL));
        tell(board, 0, 2);
        wait_until(board, 1, 2, || ());
        member.set_patience(Some(std::time::Duration::from_secs(3)));
        if member.protect(range, Protection::ReadWrite).is_err() {
            exit_now(3);
        }
    });
    wait_until(board, 0, 1, || ());
    let mut member = space.join().expect("a member");
    member.map_at(range, Protection::ReadWrite).expect("map");
    tell(board, 1, 1);
    wait_until(board, 0, 2, || member.poll());
    BELL.set(Some(board));
    member.on_step(Some(tell_when_locked));
    // Lowered rights wait for the answer of whoever has the page in view, as long as it lives.
    member.protect(range, Protection::Read).expect("protect");
    member.on_step(None);
    assert_eq!(wait_for(child), Ok(ChildEnd::Exited(0)), "3: each waited for the other");
    assert_eq!(member.tally().asked, 1);
    Outcome::Passed
}

/// Dies of a touch in the middle of an operation, as by a signal handler of the program that came in between.
fn helper_touches_a_closed_page_in_an_operation() -> Outcome {
    thread_local!(static CLOSED: Cell<usize> = const { Cell::new(0) });
    for signal in [number::SEGV, number::BUS] {
        signal::set_default(signal).expect("the default action");
    }
    let filling = if std::env::var_os("TRAP_FILLED").is_some() { Filling::Trap } else { Filling::Kernel };
    let space = space(filling);
    let mut member = space.join().expect("a member");
    let range = part(&space, 3, 4);
    member.map_at(range, Protection::ReadWrite).expect("map");
    member.bytes(range).store_u64(0, 1).expect("in bounds");
    let closed = part(&space, 40, 1).start();
    println!("touching {closed}");
    CLOSED.set(closed.as_usize());
    member.on_step(Some(|step| {
        if step == Step::Locked {
            // SAFETY: an address of the region, which is mapped without rights: the access traps, and the process dies of it.
            unsafe { VirtAddr::new(CLOSED.get()).as_ptr::<u64>().read_volatile() };
        }
    }));
    let _ = member.unmap(range);
    panic!("the access got through")
}

fn a_handler_that_touches_a_closed_page_in_an_operation_is_told_why_it_dies() -> Outcome {
    for (trap_filled, signal) in [(false, number::SEGV), (true, number::BUS)] {
        if trap_filled {
            // SAFETY: this process has one thread.
            unsafe { std::env::set_var("TRAP_FILLED", "1") };
        }
        let ended = run_helper("helper_touches_a_closed_page_in_an_operation");
        assert_eq!(ended.status.and_then(|s| s.signal()), Some(signal), "{ended:?}");
        let address = ended.output.lines().find_map(|l| l.strip_prefix("touching ")).expect("it said where");
        let said = format!(
            "a signal handler touched {address}, a closed page, while its thread was in an operation"
        );
        assert!(ended.output.contains(&said), "{ended:?}");
        assert!(ended.output.contains("Member::open opened\n"), "the whole message: {ended:?}");
    }
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        who_waits_for_a_stopped_holder_is_told_its_name_and_who_waits_for_a_dead_one_takes_over,
        who_waits_for_a_lock_obeys_its_holder_meanwhile,
        a_touch_of_a_closed_page_locks_the_pages_that_it_opens_and_no_more,
        a_handler_that_touches_a_closed_page_in_an_operation_is_told_why_it_dies,
        helper_touches_a_closed_page_in_an_operation,
        what_one_member_unmaps_no_other_reaches,
        lowered_rights_reach_every_member_and_contents_stay,
        members_that_share_nothing_ask_nobody,
        a_stopped_member_never_stalls_an_epoch,
        however_much_a_member_maps_no_mapping_is_split,
        of_a_large_trap_filled_mapping_only_what_is_touched_or_asked_for_takes_memory,
        a_member_of_a_kernel_filled_space_can_be_killed_at_every_step,
        a_member_of_a_trap_filled_space_can_be_killed_at_every_step,
        a_member_of_a_kernel_filled_space_can_be_killed_between_any_two_instructions,
        a_member_of_a_trap_filled_space_can_be_killed_between_any_two_instructions,
    ])
}
