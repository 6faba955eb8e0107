//! Traps, protection and fills as a descriptor alone: served in a signal handler, on a thread, and by another process.

#[macro_use]
mod common;

use common::page;
use peregrine_base::sync::{AtomicUsize, Ordering};
use peregrine_sys::io;
use peregrine_sys::other::Pidfd;
use peregrine_sys::process::{ChildEnd, ForkFlags, Forked, exit_now, fork_with, wait_for, write_all};
use peregrine_vm::Errno;
use peregrine_vm::dirty::{DirtyRun, RawTracker};
use peregrine_vm::region::{Answered, RawRegion, RawRegionRef, RawTraps};
use peregrine_vm::trap::{Cause, Fault, Registration, RemoteFault, RemotePager, SignalHandler};
use peregrine_vm::{
    Access, Capabilities, Capability, Decision, Mapping, PAGE_SIZE, PageCount, Protection, guard,
};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use testkit::{Outcome, skip};

const PAGES: usize = 64;

fn index_of(memory: &Mapping, fault: RemoteFault) -> usize {
    (fault.address.as_usize() - memory.range().start().as_usize()) / PAGE_SIZE
}

/// Runs `touch` in a child whose memory `traps`, and `answer` here with each of its faults, until the child has ended well.
fn served(
    memory: &Mapping,
    traps: RawTraps,
    before: impl Fn(RawRegionRef<'_>),
    touch: impl Fn(&Mapping) -> bool,
    mut answer: impl FnMut(RawRegionRef<'_>, RemoteFault),
) {
    let (mut from_child, to_parent) = std::io::pipe().unwrap();
    let (taken, take) = std::io::pipe().unwrap();
    // SAFETY: this process has one thread.
    let pid = match unsafe { fork_with(ForkFlags::default()).unwrap() } {
        Forked::Child => {
            drop(take);
            let region = RawRegion::open(traps).unwrap();
            // SAFETY: the child's own memory; the parent answers.
            unsafe { region.watch(memory.range()).unwrap() };
            before(region.by_ref());
            write_all(to_parent.as_raw_fd(), &region.as_fd().as_raw_fd().to_ne_bytes());
            // The parent has its copy when the pipe ends.
            let _ = (&taken).read(&mut [0]);
            exit_now(i32::from(!touch(memory)))
        }
        Forked::Parent(pid) => pid,
    };
    let mut number = [0; 4];
    from_child.read_exact(&mut number).unwrap();
    let pidfd = Pidfd::open(pid as u32).unwrap();
    let pager = RemotePager::of_process(pidfd.as_fd(), i32::from_ne_bytes(number)).unwrap();
    drop(take);
    loop {
        let ready = io::wait_readable(&[pager.as_fd(), pidfd.as_fd()], None).unwrap();
        match pager.read(|fault| answer(pager.by_ref(), fault)) {
            Ok(_) | Err(Errno::EAGAIN) => {}
            Err(e) => panic!("{e}"),
        }
        if ready & 2 != 0 {
            break;
        }
    }
    assert_eq!(wait_for(pid), Ok(ChildEnd::Exited(0)));
    assert_eq!(pager.by_ref().unprotect(memory.range()), Err(Errno::ESRCH), "the process is gone");
    assert_eq!(pager.read(|_| {}), Err(Errno::EAGAIN));
    assert_eq!(pager.wait(Some(0)), Ok(false));
}

fn another_process_answers_writes_to_protected_pages_and_those_of_system_calls() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtect, UserfaultfdKernelFaults);
    for shared in [false, true] {
        if shared {
            need!(caps, WriteProtectShared);
        }
        let count = PageCount::new(PAGES);
        let memory = if shared { Mapping::memfd(count) } else { Mapping::anonymous(count) }.unwrap();
        // There before the fork: a protection of private pages that are nowhere would protect nothing on an old kernel.
        (0..PAGES).for_each(|i| memory.bytes().store_u64(i * PAGE_SIZE, 1).unwrap());
        let traps = RawTraps { answered: Answered::Pager, absent: false, writes: true, shared };
        let mut seen = vec![0; PAGES];
        served(
            &memory,
            traps,
            |region| region.protect(memory.range()).unwrap(),
            |memory| {
                let mut well = true;
                for i in (0..PAGES).rev() {
                    let at = i * PAGE_SIZE;
                    well &= memory.bytes().load_u64(at) == Ok(1);
                    if i % 2 == 0 {
                        well &= memory.bytes().store_u64(at, 7).is_ok();
                        continue;
                    }
                    let source = Mapping::memfd(PageCount::new(1)).unwrap();
                    source.bytes().store_u64(0, 7).unwrap();
                    let to = memory.bytes().address(at).unwrap();
                    // SAFETY: bytes of the mapping, which is reached by copies only.
                    let read = unsafe { io::read_at_ptr(source.object_fd().unwrap(), to.as_ptr(), 8, 0) };
                    well &= read == Ok(8);
                }
                well && (0..PAGES).all(|i| memory.bytes().load_u64(i * PAGE_SIZE) == Ok(7))
            },
            |region, fault| {
                assert_eq!((fault.access, fault.cause), (Access::Write, Cause::WriteProtected));
                let i = index_of(&memory, fault);
                seen[i] += 1;
                region.unprotect(page(&memory, i)).unwrap();
            },
        );
        assert!(seen.iter().all(|n| *n == 1), "each page trapped once: {seen:?}");
    }
    Outcome::Passed
}

fn another_process_fills_absent_pages_by_copy_zeros_and_from_the_memfd() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, UserfaultfdKernelFaults, MissingShared, MinorShared, WriteProtectShared);
    let memory = Mapping::memfd(PageCount::new(PAGES)).unwrap();
    // Every third page is in the memfd, and in no page table.
    for i in (0..PAGES).step_by(3) {
        memory.bytes().store_u64(i * PAGE_SIZE, 100 + i as u64).unwrap();
    }
    memory.evict(memory.range()).unwrap();
    let traps = RawTraps { answered: Answered::Pager, absent: true, writes: true, shared: true };
    let contents = |i: usize| match i % 3 {
        0 => 100 + i as u64,
        1 => 200 + i as u64,
        _ => 0,
    };
    let mut writes = 0;
    served(
        &memory,
        traps,
        |_| {},
        |memory| {
            let right = |i: usize| memory.bytes().load_u64(i * PAGE_SIZE) == Ok(contents(i));
            (0..PAGES).all(right)
                && (0..PAGES).all(|i| memory.bytes().store_u64(i * PAGE_SIZE + 8, 9).is_ok())
                && (0..PAGES).all(right)
        },
        |region, fault| {
            let i = index_of(&memory, fault);
            let touched = page(&memory, i);
            match fault.cause {
                Cause::Minor => {
                    assert_eq!(i % 3, 0);
                    // SAFETY: absent pages of the child's, which waits for them.
                    unsafe { region.fill_continue(touched, Protection::Read).unwrap() };
                }
                Cause::Missing if i % 3 == 1 => {
                    let mut bytes = [0u64; PAGE_SIZE / 8];
                    bytes[0] = contents(i);
                    // SAFETY: as above; the source is a page long.
                    let filled =
                        unsafe { region.fill_copy(touched, bytes.as_ptr().cast(), Protection::ReadWrite) };
                    assert_eq!(filled, Ok(PageCount::new(1)));
                }
                // SAFETY: as above.
                Cause::Missing => unsafe { region.fill_zero(touched).map(drop).unwrap() },
                _ => {
                    assert_eq!(i % 3, 0, "the others arrived writable");
                    writes += 1;
                    region.unprotect(touched).unwrap();
                }
            }
        },
    );
    assert_eq!(writes, PAGES.div_ceil(3), "what arrived protected trapped at its first write");
    Outcome::Passed
}

fn threads_that_sleep_go_on_over_plain_memory_when_the_last_descriptor_is_closed() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtect);
    let memory = Arc::new(Mapping::anonymous(PageCount::new(1)).unwrap());
    memory.bytes().store_u8(0, 1).unwrap();
    let traps = RawTraps { answered: Answered::Pager, absent: false, writes: true, shared: false };
    let region = RawRegion::open(traps).unwrap();
    // SAFETY: the mapping outlives the region.
    unsafe { region.watch(memory.range()).unwrap() };
    region.by_ref().protect(memory.range()).unwrap();
    let pager = RemotePager::of(OwnedFd::from(region));
    let theirs = memory.clone();
    let writer = std::thread::spawn(move || theirs.bytes().store_u8(0, 2));
    while !pager.wait(Some(1000)).unwrap() {}
    assert_eq!(memory.bytes().load_u8(0), Ok(1), "the writer sleeps");
    drop(pager);
    writer.join().unwrap().unwrap();
    assert_eq!(memory.bytes().load_u8(0), Ok(2));
    Outcome::Passed
}

/// Maps sixteen pages around the touched one, as far as the memfd has them.
struct Blocks {
    region: RawRegion,
    memory: Arc<Mapping>,
    traps: AtomicUsize,
}

// SAFETY: system calls and an atomic only.
unsafe impl SignalHandler for Blocks {
    fn on_fault(&self, fault: &Fault) -> Decision {
        self.traps.fetch_add(1, Ordering::SeqCst);
        let index = (fault.address.as_usize() - self.memory.range().start().as_usize()) / PAGE_SIZE;
        let Ok(block) = self.memory.pages(index / 16 * 16, 16) else { return Decision::Deny };
        // SAFETY: absent pages of the test's memory.
        match unsafe { self.region.by_ref().fill_continue(block, Protection::ReadWrite) } {
            Ok(_) => Decision::Filled,
            Err(_) => Decision::Deny,
        }
    }
}

fn a_signal_handler_maps_pages_of_the_memfd_in_blocks_and_lifts_protection() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, UserfaultfdSigbus, MissingShared, MinorShared, WriteProtectShared);
    let memory = Arc::new(Mapping::memfd(PageCount::new(PAGES)).unwrap());
    (0..PAGES).for_each(|i| memory.bytes().store_u64(i * PAGE_SIZE, i as u64).unwrap());
    memory.evict(memory.range()).unwrap();
    let traps = RawTraps { answered: Answered::Inline, absent: true, writes: true, shared: true };
    let region = RawRegion::open(traps).unwrap();
    assert!(!region.serves_system_calls());
    let fd = region.as_fd().try_clone_to_owned().unwrap();
    // SAFETY: the mapping outlives the region; the handler below serves it.
    unsafe { region.watch(memory.range()).unwrap() };
    let blocks = Arc::new(Blocks { region, memory: memory.clone(), traps: AtomicUsize::new(0) });
    struct Shared(Arc<Blocks>);
    // SAFETY: as `Blocks`.
    unsafe impl SignalHandler for Shared {
        fn on_fault(&self, fault: &Fault) -> Decision {
            self.0.on_fault(fault)
        }
    }
    let _registration = Registration::new(memory.range(), Shared(blocks.clone())).unwrap();
    for i in 0..PAGES {
        assert_eq!(memory.bytes().load_u64(i * PAGE_SIZE), Ok(i as u64));
    }
    assert_eq!(blocks.traps.swap(0, Ordering::SeqCst), PAGES / 16, "one trap a block");
    // One page is there and protected, its neighbours are absent: the block opens all of them.
    let one = page(&memory, 20);
    memory.evict(memory.pages(16, 4).unwrap()).unwrap();
    blocks.region.by_ref().protect(one).unwrap();
    memory.bytes().store_u64(20 * PAGE_SIZE, 77).unwrap();
    assert_eq!(memory.bytes().load_u64(17 * PAGE_SIZE), Ok(17));
    assert_eq!(memory.bytes().load_u64(20 * PAGE_SIZE), Ok(77), "a fill undoes no write");
    assert_eq!(blocks.traps.load(Ordering::SeqCst), 1);
    // Nothing can be read from a descriptor that raises signals, and what the memfd has not is told.
    assert_eq!(RemotePager::of(fd).read(|_| {}), Err(Errno::EAGAIN));
    memory.discard(one).unwrap();
    // SAFETY: a page of the test's.
    let absent = unsafe { blocks.region.by_ref().fill_continue(one, Protection::ReadWrite) };
    assert_eq!(absent, Err(Errno::EFAULT));
    // SAFETY: as above.
    let without = unsafe { blocks.region.by_ref().fill_continue(one, Protection::None) };
    assert_eq!(without, Err(Errno::EINVAL));
    Outcome::Passed
}

fn guards_are_not_reported_as_written_and_a_look_changes_nothing() -> Outcome {
    let caps = Capabilities::probe();
    need!(caps, WriteProtectAsync, PagemapScan, WriteProtectShared, GuardShared);
    let memory = Mapping::memfd(PageCount::new(8)).unwrap();
    let tracker = RawTracker::open().unwrap();
    // SAFETY: the mapping outlives the tracker; the guard is laid over pages that are not protected.
    unsafe {
        tracker.watch(memory.range()).unwrap();
        guard::install_markers(memory.pages(4, 4).unwrap()).unwrap();
    }
    let tracker = tracker.by_ref();
    let mut found = [DirtyRun::default(); 8];
    let open = memory.pages(0, 4).unwrap();
    tracker.arm(open).unwrap();
    memory.bytes().store_u8(2 * PAGE_SIZE, 1).unwrap();
    for _ in 0..2 {
        let seen = tracker.peek_unguarded_into(memory.range(), &mut found).unwrap();
        assert_eq!((seen.runs, found[0].range()), (1, page(&memory, 2)));
    }
    let taken = tracker.take_unguarded_into(memory.range(), &mut found).unwrap();
    assert_eq!((taken.runs, found[0].range(), taken.rest.is_empty()), (1, page(&memory, 2), true));
    assert_eq!(tracker.take_unguarded_into(memory.range(), &mut found).unwrap().runs, 0);
    // Dropped from the page table after it was written, as reclaim would: still found.
    memory.bytes().store_u8(3 * PAGE_SIZE, 1).unwrap();
    memory.evict(page(&memory, 3)).unwrap();
    let taken = tracker.take_unguarded_into(memory.range(), &mut found).unwrap();
    assert_eq!((taken.runs, found[0].range()), (1, page(&memory, 3)));
    // SAFETY: the test's own pages.
    unsafe { guard::remove_markers(memory.range()).unwrap() };
    assert_eq!(memory.bytes().load_u8(5 * PAGE_SIZE), Ok(0));
    Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        another_process_answers_writes_to_protected_pages_and_those_of_system_calls,
        another_process_fills_absent_pages_by_copy_zeros_and_from_the_memfd,
        threads_that_sleep_go_on_over_plain_memory_when_the_last_descriptor_is_closed,
        a_signal_handler_maps_pages_of_the_memfd_in_blocks_and_lifts_protection,
        guards_are_not_reported_as_written_and_a_look_changes_nothing,
    ])
}
