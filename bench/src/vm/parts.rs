//! What a trap and an UNPROT are made of on this machine, and what else could open a write-protected page of a memfd: the
//! reasons for the rows above, by bare system calls.

use super::raw::{self, Bare};
use super::{Goals, Kind, Way};
use crate::measure::{Options, Rng, alone, time_ns};
use crate::report::Report;
use peregrine_base::sync::Ordering;
use peregrine_sys::fault::{self, Action, SIGSEGV};
use peregrine_sys::mem::{self, Advice};
use peregrine_sys::uffd::{Features, FillMode, RegisterMode, Uffd};
use peregrine_vm::{PAGE_SIZE, PageCount, PageRange, VirtAddr};
use std::ffi::c_void;

const COUNT: usize = 100;

/// Appel2 on a memfd by what else there is: what no way on this machine is better than.
pub const OTHER_WAYS: [&str; 4] = [
    "Appel2 by write-protect, as ever",
    "Appel2 by write-protect, back from the handler without the kernel (xrstor, iretq)",
    "Appel2 by absence (reads trap too): dropped, and mapped again in the trap (UFFDIO_CONTINUE)",
    "Appel2 by absence, back from the handler without the kernel",
];
const SIGTRAP: i32 = 5;
const FLAGS: u64 = fault::SA_ONSTACK | fault::SA_NODEFER;

unsafe extern "C" fn nothing(_: i32, _: *mut c_void, _: *mut c_void) {}

/// A memfd whose pages are write-protected and lifted one by one.
struct Shared {
    memory: peregrine_vm::Mapping,
    uffd: Uffd,
}

impl Shared {
    fn new(mode: RegisterMode) -> Self {
        let memory = Kind::Memfd.make(PageCount::new(COUNT));
        let features = Features::SIGBUS
            | Features::PAGEFAULT_FLAG_WP
            | Features::WP_HUGETLBFS_SHMEM
            | Features::MINOR_SHMEM;
        let uffd = Uffd::open(features).expect("userfaultfd");
        // SAFETY: the memory is this value's.
        unsafe { uffd.by_ref().register(memory.range(), mode).expect("register") };
        Self { memory, uffd }
    }

    fn page(&self, i: usize) -> PageRange {
        let start = self.memory.range().start().as_usize() + i * PAGE_SIZE;
        PageRange::new(VirtAddr::new(start), PageCount::new(1))
    }

    fn write_each(&self) {
        self.write_in(0..COUNT);
    }

    fn write_in(&self, order: impl IntoIterator<Item = usize>) {
        for i in order {
            // SAFETY: in the mapping, which is behind no reference.
            unsafe { self.page(i).start().as_ptr::<u8>().write_volatile(1) };
        }
    }

    /// Every page was really writable and is protected now.
    fn protected(&self) {
        self.lift(self.memory.range());
        self.write_each();
        self.uffd.by_ref().write_protect(self.memory.range(), true).expect("protect");
    }

    /// Every page can be written.
    fn lift_or_fill(&self, absence: bool) {
        if !absence {
            return self.lift(self.memory.range());
        }
        for i in 0..COUNT {
            // SAFETY: this value's memory; nobody relies on a page being absent. One that is there is no error here.
            let _ = unsafe { self.uffd.by_ref().continue_(self.page(i), FillMode::default()) };
        }
    }

    fn lift(&self, range: PageRange) {
        self.uffd.by_ref().write_protect(range, false).expect("lift");
    }
}

pub fn run(report: &mut Report, options: &Options, goals: &mut Goals) {
    if !options.wants("part of") {
        return;
    }
    report.section("What a trap and an UNPROT are made of here (bare system calls); ns each");
    let rounds = options.rounds(200);
    let mut row = |name: &str, subject: &mut dyn FnMut() -> f64| {
        let samples = alone(rounds, subject);
        let name = format!("part of: {name}");
        report.single(&name, "each", "ns", COUNT, &samples);
        goals.number(&name, samples.median());
    };
    row("a system call that does nothing", &mut || {
        time_ns(|| (0..COUNT).for_each(|_| _ = std::hint::black_box(peregrine_sys::process::parent_pid())))
            / COUNT as f64
    });
    // No page fault: an exception, the signal's delivery and the return.
    row("a trap that concerns no memory (int3), handled", &mut || {
        // SAFETY: `nothing` is sound whenever it runs; what was there before is put back.
        let before = unsafe { fault::action(SIGTRAP, Some(&Action::run(nothing, FLAGS))).expect("handler") };
        let ns = time_ns(|| {
            (0..COUNT).for_each(|_| {
                // SAFETY: raises SIGTRAP, which `nothing` answers; the next instruction goes on.
                unsafe { core::arch::asm!("int3") }
            })
        }) / COUNT as f64;
        // SAFETY: as above.
        unsafe { fault::action(SIGTRAP, Some(&before)).expect("handler") };
        ns
    });
    // No exception: what remains is sending, delivering, saving the registers and coming back.
    let bare = Bare::apart(Way::MprotectRead, Kind::Anonymous, 1, PageCount::new(1));
    bare.aim();
    let me = fault::current_thread_id();
    row("a signal to itself, handled", &mut || {
        raw::with_handler(|| {
            raw::IDLE.store(COUNT, Ordering::Relaxed);
            let send =
                |_| fault::queue_to_thread(me, SIGSEGV, -1, bare.memory.range().start()).expect("queued");
            time_ns(|| (0..COUNT).for_each(send)) / COUNT as f64
        })
    });
    let shared = Shared::new(RegisterMode::WP);
    row("UNPROT of a memfd page (write-protect lifted)", &mut || {
        shared.protected();
        time_ns(|| (0..COUNT).for_each(|i| shared.lift(shared.page(i)))) / COUNT as f64
    });
    row("the write after it (a second, silent fault)", &mut || {
        shared.protected();
        (0..COUNT).for_each(|i| shared.lift(shared.page(i)));
        time_ns(|| shared.write_each()) / COUNT as f64
    });
    row("instead of that fault: MADV_POPULATE_WRITE", &mut || {
        shared.protected();
        (0..COUNT).for_each(|i| shared.lift(shared.page(i)));
        // SAFETY: this value's memory; populating changes no contents.
        let populate = |i| unsafe { mem::advise(shared.page(i), Advice::PopulateWrite).expect("populate") };
        time_ns(|| (0..COUNT).for_each(populate)) / COUNT as f64
    });
    row("instead of both: MADV_DONTNEED and UFFDIO_CONTINUE", &mut || {
        shared.protected();
        let again = |i| {
            // SAFETY: this value's memory, whose contents stay in the memfd; nobody relies on the page being absent.
            unsafe {
                mem::advise(shared.page(i), Advice::DontNeed).expect("drop");
                shared.uffd.by_ref().continue_(shared.page(i), FillMode::default()).expect("continue");
            }
        };
        time_ns(|| (0..COUNT).for_each(again)) / COUNT as f64
    });
    let anonymous = Bare::apart(Way::MprotectRead, Kind::Anonymous, COUNT, PageCount::new(1));
    row("UNPROT of an anonymous page (mprotect)", &mut || {
        let all = anonymous.memory.range();
        anonymous.aim();
        anonymous.open(all);
        let page =
            |i| PageRange::new(VirtAddr::new(all.start().as_usize() + i * PAGE_SIZE), PageCount::new(1));
        for i in 0..COUNT {
            // SAFETY: in the mapping, which is behind no reference.
            unsafe { page(i).start().as_ptr::<u8>().write_volatile(1) };
        }
        anonymous.close(all);
        // Every third first, so that mappings split as they do in random order.
        let order = (0..3).flat_map(|first| (first..COUNT).step_by(3));
        time_ns(|| order.for_each(|i| anonymous.open(page(i)))) / COUNT as f64
    });
    let absent = Shared::new(RegisterMode::MINOR);
    let order = Rng(0xa11).permutation(COUNT);
    for (way, name) in OTHER_WAYS.iter().enumerate() {
        let (absence, leave) = (way >= 2, way % 2 == 1);
        row(name, &mut || {
            let pages = if absence { &absent } else { &shared };
            let all = pages.memory.range();
            pages.lift_or_fill(absence);
            pages.write_each();
            raw::aim_at(&pages.uffd, all, absence);
            raw::LEAVE.store(leave, Ordering::Relaxed);
            let ns = raw::with_handler(|| {
                time_ns(|| {
                    match absence {
                        // SAFETY: this benchmark's memory, whose contents stay in the memfd.
                        true => unsafe { mem::advise(all, Advice::DontNeed).expect("drop") },
                        false => pages.uffd.by_ref().write_protect(all, true).expect("protect"),
                    }
                    pages.write_in(order.iter().copied());
                })
            });
            raw::LEAVE.store(false, Ordering::Relaxed);
            ns / COUNT as f64
        });
    }
}
