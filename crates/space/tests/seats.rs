//! Seats over real processes: what is taken away is gone, whoever sleeps, is stopped or dead.

mod puppet;
mod revoke;

use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_space::process::{Config, Filling, FrameError, Ground, Lowering, PUNCH_PAGES};
use peregrine_sys::process::{ChildEnd, wait_for};
use peregrine_sys::signal::number;
use puppet::{Order, Puppet};
use revoke::{Plan, never_reached_again};
use std::os::unix::fs::FileExt;
use std::time::Duration;
use testkit::{Outcome, Rng};

const FILLINGS: [Filling; 3] = [Filling::Kernel, Filling::KernelTracked, Filling::Trap];

fn ground(pages: usize, filling: Filling) -> Ground {
    let config = Config { pages: PageCount::new(pages), filling, at: None };
    Ground::new(config, PageCount::new(1)).expect("shared memory")
}

fn part(ground: &Ground, first: usize, pages: usize) -> PageRange {
    let start = ground.region().start().as_usize() + first * PAGE_SIZE;
    PageRange::new(VirtAddr::new(start), PageCount::new(pages))
}

fn stress(filling: Filling) -> Outcome {
    let seed = u64::from(std::process::id());
    let plan = Plan { seed, time: Duration::from_millis(2500), filling };
    println!("{plan:?}");
    let outcome = never_reached_again(plan);
    println!("{outcome:?}");
    println!(
        "{} times a stopped member was cut off, {} times it held a lock; the longest took {:?}",
        outcome.overdue, outcome.skipped, outcome.longest
    );
    assert!(outcome.unmaps > 0 && outcome.writes > 0, "nothing was tried: {outcome:?}");
    Outcome::Passed
}

fn no_write_reaches_a_kernel_filled_frame_after_its_unmap_returned() -> Outcome {
    stress(Filling::Kernel)
}

fn no_write_reaches_a_tracked_frame_after_its_unmap_returned() -> Outcome {
    stress(Filling::KernelTracked)
}

fn no_write_reaches_a_trap_filled_frame_after_its_unmap_returned() -> Outcome {
    stress(Filling::Trap)
}

fn a_sleeping_member_is_signalled_and_the_own_view_asks_nobody() -> Outcome {
    for filling in FILLINGS {
        println!("{filling:?}");
        let ground = ground(4, filling);
        let seat = ground.join(0).expect("a seat");
        let puppet = Puppet::new(&ground, 1);
        let range = part(&ground, 0, 2);
        let at = range.start().as_usize();
        assert_eq!(puppet.does(Order::Open, at, 2), 0);
        puppet.does(Order::Store, at, 7);
        puppet.tell(Order::Sleep, 0, 0);
        puppet.until_asleep();
        seat.take_away(range, 0b10, Lowering::Close);
        let tally = seat.tally();
        assert_eq!((tally.requests, tally.asked, tally.overdue), (1, 1, 0), "{filling:?}");
        assert!(tally.signals >= 1, "{filling:?}: it can't have polled in its sleep");
        puppet.kill(false);
        seat.take_away(range, 0b01, Lowering::Close);
        assert_eq!(seat.tally().requests, 1, "nobody else is asked about the own view");
        ground.leave(seat);
    }
    Outcome::Passed
}

/// A signal too many harms nobody, but costs both sides seventy times a polled answer. The target may not be running just when it is asked, so
/// one request of many must do without.
fn a_polling_member_is_given_time_before_it_is_signalled() -> Outcome {
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        testkit::skip!("who asks and who polls need a processor each");
    }
    let ground = ground(4, Filling::Kernel);
    let seat = ground.join(0).expect("a seat");
    let range = part(&ground, 0, 2);
    // Each time another place, of which nobody knows yet whether it polls.
    let unsignalled = (1..40).find(|index| {
        let puppet = Puppet::new(&ground, *index);
        assert_eq!(puppet.does(Order::Open, range.start().as_usize(), 2), 0);
        puppet.tell(Order::PollOn, 0, 0);
        let before = seat.tally();
        seat.take_away(range, 1 << index, Lowering::Close);
        let after = seat.tally();
        assert_eq!((after.asked - before.asked, after.overdue), (1, 0));
        after.signals == before.signals
    });
    assert!(unsignalled.is_some(), "whoever was asked was signalled as well: {:?}", seat.tally());
    ground.leave(seat);
    Outcome::Passed
}

fn what_was_taken_away_traps_and_what_was_not_stays() -> Outcome {
    for filling in FILLINGS {
        println!("{filling:?}");
        let ground = ground(8, filling);
        let seat = ground.join(0).expect("a seat");
        let puppet = Puppet::new(&ground, 1);
        let (gone, kept) = (part(&ground, 0, 2), part(&ground, 2, 2));
        assert_eq!(puppet.does(Order::Open, gone.start().as_usize(), 4), 0);
        puppet.does(Order::Store, gone.start().as_usize(), 1);
        puppet.does(Order::Store, kept.start().as_usize(), 2);
        puppet.tell(Order::Sleep, 0, 0);
        seat.take_away(gone, 0b10, Lowering::Close);
        drop(puppet);
        let puppet = Puppet::new(&ground, 2);
        assert_eq!(puppet.does(Order::Open, kept.start().as_usize(), 2), 0);
        assert_eq!(puppet.does(Order::Load, kept.start().as_usize(), 0), 2, "{filling:?}: contents are kept");
        puppet.tell(Order::Load, gone.start().as_usize(), 0);
        let signal = if filling == Filling::Trap { number::BUS } else { number::SEGV };
        assert_eq!(wait_for(puppet.pid), Ok(ChildEnd::Killed(signal)), "{filling:?}");
        ground.leave(seat);
    }
    Outcome::Passed
}

/// Whether the page table of process `pid` shows a frame at `page`.
fn is_in_page_table(pid: i32, page: VirtAddr) -> bool {
    let table = std::fs::File::open(format!("/proc/{pid}/pagemap")).expect("a living child's");
    let mut entry = [0; 8];
    table.read_exact_at(&mut entry, (page.as_usize() / PAGE_SIZE * 8) as u64).expect("an entry");
    u64::from_ne_bytes(entry) >> 63 != 0
}

fn a_stopped_member_holds_up_no_unmap_and_its_pages_wait_for_its_answer() -> Outcome {
    for filling in FILLINGS {
        println!("{filling:?}");
        let ground = ground(4, filling);
        let seat = ground.join(0).expect("a seat");
        let puppet = Puppet::new(&ground, 1);
        let range = part(&ground, 1, 2);
        let at = range.start().as_usize();
        assert_eq!(puppet.does(Order::Open, at, 2), 0);
        puppet.does(Order::Store, at, 7);
        puppet.stop();
        assert!(is_in_page_table(puppet.pid, range.start()), "{filling:?}: it wrote there");
        seat.take_away(range, 0b10, Lowering::Close);
        assert_eq!(seat.tally().overdue, 1, "{filling:?}");
        assert!(!is_in_page_table(puppet.pid, range.start()), "{filling:?}: cut off while it stands still");
        let refused = seat.check_acknowledged(range);
        assert_eq!(
            refused,
            Err(FrameError::Unacknowledged { page: range.start(), members: 0b10 }),
            "{filling:?}: the pages are not free while it stands still"
        );
        seat.open(range, Protection::ReadWrite).expect_err("not free");
        assert_eq!(
            u64::from_ne_bytes(seat.peek(range.start())[..8].try_into().expect("a word")),
            7,
            "{filling:?}: the contents were moved, not lost"
        );
        puppet.go_on();
        puppet.does(Order::Poll, 0, 0);
        assert_eq!(seat.check_acknowledged(range), Ok(()), "{filling:?}: it has dropped its view");
        puppet.tell(Order::Store, at, 8);
        let signal = if filling == Filling::Trap { number::BUS } else { number::SEGV };
        assert_eq!(wait_for(puppet.pid), Ok(ChildEnd::Killed(signal)), "{filling:?}");
        ground.leave(seat);
    }
    Outcome::Passed
}

fn a_member_that_blocks_the_signal_gets_no_frame_of_the_next_owner() -> Outcome {
    for filling in [Filling::Kernel, Filling::Trap] {
        let ground = ground(4, filling);
        let seat = ground.join(0).expect("a seat");
        let puppet = Puppet::new(&ground, 1);
        let range = part(&ground, 0, 1);
        let at = range.start().as_usize();
        assert_eq!(puppet.does(Order::Open, at, 1), 0);
        puppet.does(Order::Store, at, 7);
        puppet.does(Order::BlockSignal, 0, 0);
        puppet.stop();
        seat.take_away(range, 0b10, Lowering::Close);
        puppet.go_on();
        assert!(
            !is_in_page_table(puppet.pid, range.start()),
            "{filling:?}: whatever it does about the signal"
        );
        if filling == Filling::Kernel {
            // It can still write: to a frame that nobody is given.
            puppet.does(Order::Store, at, 666);
        }
        assert!(seat.open(range, Protection::ReadWrite).is_err(), "{filling:?}: the page stays unused");
        puppet.does(Order::UnblockSignal, 0, 0);
        puppet.does(Order::Poll, 0, 0);
        seat.vacated(range);
        seat.open(range, Protection::ReadWrite).expect("free again");
        assert!(seat.peek(range.start()).iter().all(|b| *b == 0), "{filling:?}: zeroed between owners");
        ground.leave(seat);
    }
    Outcome::Passed
}

fn a_dead_member_holds_up_nothing_whether_reaped_or_not() -> Outcome {
    for filling in FILLINGS {
        println!("{filling:?}");
        for reap in [false, true] {
            let ground = ground(2, filling);
            let seat = ground.join(0).expect("a seat");
            let puppet = Puppet::new(&ground, 1);
            let range = ground.region();
            assert_eq!(puppet.does(Order::Open, range.start().as_usize(), 2), 0);
            puppet.does(Order::Store, range.start().as_usize(), 7);
            puppet.stop();
            puppet.kill(reap);
            seat.take_away(range, 0b10, Lowering::Close);
            assert!(seat.is_gone(1));
            seat.vacated(range);
            seat.open(range, Protection::ReadWrite).expect("a dead member's page is free");
            assert!(seat.peek(range.start()).iter().all(|b| *b == 0), "zeroed between owners");
            ground.leave(seat);
        }
    }
    Outcome::Passed
}

fn mappings_of_this_process() -> usize {
    std::fs::read_to_string("/proc/self/maps").expect("/proc").lines().count()
}

fn however_much_is_opened_and_closed_no_mapping_is_split() -> Outcome {
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    for filling in FILLINGS {
        println!("{filling:?}");
        let mut rng = Rng::new(seed);
        let ground = ground(1024, filling);
        let before = mappings_of_this_process();
        let seat = ground.join(0).expect("a seat");
        // The region takes the place of its reservation; the frames' alias and the page that a fork wipes are two more.
        let bound = before + 2;
        for i in 0..3000 {
            let first = rng.below(1000);
            let range = part(&ground, first, 1 + rng.below(24));
            if rng.below(2) == 0 {
                seat.open(range, Protection::ReadWrite).expect("open");
            } else {
                let what = if filling == Filling::Trap && rng.below(2) == 0 {
                    Lowering::ReadOnly
                } else {
                    Lowering::Close
                };
                seat.take_away(range, 1, what);
            }
            if i % 500 == 0 {
                assert!(mappings_of_this_process() <= bound, "{filling:?}: a mapping was split");
            }
        }
        assert!(mappings_of_this_process() <= bound, "{filling:?}: a mapping was split");
        ground.leave(seat);
        assert!(mappings_of_this_process() <= before, "{filling:?}: something is left");
    }
    Outcome::Passed
}

fn written_pages_are_the_union_over_members_and_closing_forgets_none() -> Outcome {
    let ground = ground(16, Filling::KernelTracked);
    let seat = ground.join(0).expect("a seat");
    let puppet = Puppet::new(&ground, 1);
    let all = ground.region();
    let at = |page: usize| all.start().as_usize() + page * PAGE_SIZE;
    seat.open(all, Protection::ReadWrite).expect("open");
    assert_eq!(puppet.does(Order::Open, at(0), 16), 0);
    for page in [2, 3, 9] {
        puppet.does(Order::Store, at(page), 1);
    }
    for page in [3, 12] {
        // SAFETY: opened above; S1.
        unsafe { VirtAddr::new(at(page)).as_ptr::<u64>().write_volatile(5) };
    }
    // Pages 8 to 11 are taken from both views before anybody was asked what was written.
    let taken = part(&ground, 8, 4);
    puppet.tell(Order::Sleep, 0, 0);
    seat.take_away(taken, 0b11, Lowering::Close);
    seat.note_written(all).expect("a scan");
    let read = |seat: &peregrine_space::process::Seat| {
        let mut found = Vec::new();
        seat.take_written(all, |page| found.push((page.as_usize() - at(0)) / PAGE_SIZE));
        found
    };
    // The puppet has not been asked yet: what it wrote outside the taken part is its own knowledge.
    assert_eq!(read(&seat), [3, 9, 12]);
    drop(puppet);
    assert_eq!(read(&seat), [] as [usize; 0], "each once");
    // A guard over a page that is still write-protected would never return.
    for _ in 0..50 {
        seat.open(taken, Protection::ReadWrite).expect("open");
        // SAFETY: opened above; S1.
        unsafe { VirtAddr::new(at(10)).as_ptr::<u64>().write_volatile(5) };
        seat.take_away(taken, 0b01, Lowering::Close);
    }
    assert_eq!(read(&seat), [10]);
    ground.leave(seat);
    Outcome::Passed
}

fn a_large_run_goes_back_to_the_kernel_and_a_small_one_when_trimmed() -> Outcome {
    for filling in FILLINGS {
        println!("{filling:?}");
        let ground = ground(4 * PUNCH_PAGES, filling);
        let seat = ground.join(0).expect("a seat");
        let all = ground.region();
        seat.open(all, Protection::ReadWrite).expect("open");
        let fill = |range: PageRange| {
            for page in 0..range.pages().get() {
                let at = VirtAddr::new(range.start().as_usize() + page * PAGE_SIZE);
                // SAFETY: opened above; S1.
                unsafe { at.as_ptr::<u64>().write_volatile(1) };
            }
        };
        fill(all);
        assert_eq!(seat.resident().get(), 4 * PUNCH_PAGES, "{filling:?}");
        let large = part(&ground, 0, PUNCH_PAGES);
        seat.take_away(large, 1, Lowering::Close);
        seat.vacated(large);
        assert_eq!(seat.resident().get(), 3 * PUNCH_PAGES, "{filling:?}");
        let small = part(&ground, PUNCH_PAGES, 3);
        seat.take_away(small, 1, Lowering::Close);
        seat.vacated(small);
        assert_eq!(seat.resident().get(), 3 * PUNCH_PAGES, "{filling:?}: a few are kept warm");
        assert_eq!(seat.trim(all).expect("trim").get(), 3);
        assert_eq!(seat.resident().get(), 3 * PUNCH_PAGES - 3, "{filling:?}");
        ground.leave(seat);
    }
    Outcome::Passed
}

fn a_page_that_can_only_be_read_traps_on_a_write_alone() -> Outcome {
    let ground = ground(4, Filling::Trap);
    let seat = ground.join(0).expect("a seat");
    let puppet = Puppet::new(&ground, 1);
    let at = ground.region().start().as_usize();
    assert_eq!(puppet.does(Order::Open, at, 4), 0);
    puppet.does(Order::Store, at, 11);
    puppet.tell(Order::Sleep, 0, 0);
    seat.take_away(part(&ground, 0, 1), 0b10, Lowering::ReadOnly);
    drop(puppet);
    let puppet = Puppet::new(&ground, 1);
    assert_eq!(puppet.does(Order::Open, at, 1), 0);
    puppet.tell(Order::Sleep, 0, 0);
    seat.take_away(part(&ground, 0, 1), 0b10, Lowering::ReadOnly);
    seat.open(part(&ground, 0, 1), Protection::Read).expect("open");
    // SAFETY: opened above; S1.
    assert_eq!(unsafe { VirtAddr::new(at).as_ptr::<u64>().read_volatile() }, 11);
    drop(puppet);
    ground.leave(seat);
    let kernel = ground_of_kernel_refuses_read_only();
    assert!(kernel.contains("Filling::Trap"), "{kernel}");
    Outcome::Passed
}

fn ground_of_kernel_refuses_read_only() -> String {
    let ground = ground(1, Filling::Kernel);
    let seat = ground.join(0).expect("a seat");
    let refused = seat.open(ground.region(), Protection::Read).expect_err("guards stop reads too");
    ground.leave(seat);
    refused.to_string()
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        a_sleeping_member_is_signalled_and_the_own_view_asks_nobody,
        a_polling_member_is_given_time_before_it_is_signalled,
        what_was_taken_away_traps_and_what_was_not_stays,
        a_stopped_member_holds_up_no_unmap_and_its_pages_wait_for_its_answer,
        a_member_that_blocks_the_signal_gets_no_frame_of_the_next_owner,
        a_dead_member_holds_up_nothing_whether_reaped_or_not,
        however_much_is_opened_and_closed_no_mapping_is_split,
        written_pages_are_the_union_over_members_and_closing_forgets_none,
        a_large_run_goes_back_to_the_kernel_and_a_small_one_when_trimmed,
        a_page_that_can_only_be_read_traps_on_a_write_alone,
        no_write_reaches_a_kernel_filled_frame_after_its_unmap_returned,
        no_write_reaches_a_tracked_frame_after_its_unmap_returned,
        no_write_reaches_a_trap_filled_frame_after_its_unmap_returned,
    ])
}
