//! The floors: the same mechanisms by bare calls in processes (each does its own part when it comes to it, and nobody is told: until then
//! it reaches pages that another one unmapped), and Linux threads, whose one page table the kernel looks after.

use super::stage::{PAGES, Worker};
use peregrine_base::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use peregrine_space::process::PUNCH_PAGES;
use peregrine_sys::mem::{self, Advice, MapOptions, Placement, Source};
use peregrine_sys::uffd::{Features, FillMode, RegisterMode, Uffd};
use peregrine_sys::{guard, memfd};
use peregrine_vm::trap::{Fault, Registration, SignalHandler};
use peregrine_vm::{AltStack, Decision};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// How pages are opened and closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    Guard,
    Continue,
    DontNeed,
}

impl Way {
    pub const ALL: [Self; 3] = [Self::Guard, Self::Continue, Self::DontNeed];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Guard => "guard",
            Self::Continue => "trap-filled",
            Self::DontNeed => "DONTNEED (enforces nothing)",
        }
    }
}

fn whole() -> PageCount {
    PageCount::new(PAGES)
}

fn options() -> MapOptions {
    MapOptions { no_reserve: true, ..MapOptions::default() }
}

fn new_mapping(source: Source<'_>, access: Protection) -> PageRange {
    // SAFETY: a new mapping at a place of the kernel's choice.
    unsafe { mem::map(whole(), access, source, Placement::Anywhere, options()) }.expect("memory")
}

/// As a space's region lies: it begins where a page of the page table does.
fn aligned_mapping(source: Source<'_>, access: Protection) -> PageRange {
    const ALIGN: usize = 2 << 20;
    let room = PageCount::new(PAGES + ALIGN / PAGE_SIZE);
    // SAFETY: a new mapping at a place of the kernel's choice, which the process keeps, and another in a part of it.
    unsafe {
        let room = mem::map(room, Protection::None, Source::Anonymous, Placement::Anywhere, options());
        let start = room.expect("addresses").start().as_usize().next_multiple_of(ALIGN);
        let place = Placement::Replace(VirtAddr::new(start));
        mem::map(whole(), access, source, place, options()).expect("memory")
    }
}

fn part(range: PageRange, first: usize, pages: usize) -> PageRange {
    PageRange::new(VirtAddr::new(range.start().as_usize() + first * PAGE_SIZE), PageCount::new(pages))
}

/// The frames that bare processes share.
pub fn frames() -> OwnedFd {
    memfd::create(c"bench-space", whole(), memfd::Pages::Base).expect("memfd")
}

struct View {
    way: Way,
    range: PageRange,
    uffd: Option<Uffd>,
    /// Pages opened by one trap.
    unit: usize,
}

impl View {
    fn open(&self, first: usize, pages: usize) {
        let range = part(self.range, first, pages);
        // SAFETY: the bench's own mapping.
        unsafe {
            match &self.uffd {
                Some(uffd) => {
                    let _ = uffd.by_ref().continue_(range, FillMode::default());
                }
                None if self.way == Way::Guard => guard::remove(range).expect("guard remove"),
                None => {}
            }
        }
    }

    fn close(&self, first: usize, pages: usize) {
        let range = part(self.range, first, pages);
        // SAFETY: the bench's own mapping.
        unsafe {
            match self.way {
                Way::Guard => guard::install(range).expect("guard install"),
                _ => mem::advise(range, Advice::DontNeed).expect("DONTNEED"),
            }
        }
    }
}

/// Opens the unit around a touch of a page that another process mapped.
struct Opener(Arc<View>);

// SAFETY: one system call on memory that outlives the handler.
unsafe impl SignalHandler for Opener {
    fn on_fault(&self, fault: &Fault) -> Decision {
        let view = &self.0;
        let page = (fault.address.as_usize() - view.range.start().as_usize()) / PAGE_SIZE;
        view.open(page / view.unit * view.unit, view.unit);
        Decision::Filled
    }
}

/// A process that does all by bare calls.
pub struct Bare {
    frames: OwnedFd,
    view: Arc<View>,
    alias: PageRange,
    used: Vec<bool>,
    /// Whether a used frame is zeroed for its next owner.
    zeroes: bool,
    _registration: Registration,
    _stack: AltStack,
}

impl Bare {
    pub fn new(frames: &OwnedFd, way: Way, unit: usize) -> Self {
        let shared = || Source::Shared(frames.as_fd(), PageCount::new(0));
        let range = aligned_mapping(shared(), Protection::ReadWrite);
        let alias = new_mapping(shared(), Protection::ReadWrite);
        let uffd = (way == Way::Continue).then(|| {
            let features = Features::SIGBUS
                .union(Features::MINOR_SHMEM)
                .union(Features::MISSING_SHMEM)
                .union(Features::PAGEFAULT_FLAG_WP)
                .union(Features::WP_HUGETLBFS_SHMEM);
            let uffd = Uffd::open(features).expect("userfaultfd");
            let mode = RegisterMode::MISSING.union(RegisterMode::MINOR).union(RegisterMode::WP);
            // SAFETY: the mapping was made above.
            unsafe { uffd.by_ref().register(range, mode) }.expect("register");
            uffd
        });
        if way == Way::Guard {
            // SAFETY: the mapping was made above.
            unsafe { guard::install(range) }.expect("guards");
        }
        let view = Arc::new(View { way, range, uffd, unit });
        let registration = Registration::new(range, Opener(view.clone())).expect("handlers");
        let stack = AltStack::install(64 << 10).expect("a stack");
        let frames = frames.try_clone().expect("a descriptor");
        Self {
            frames,
            view,
            alias,
            used: vec![false; PAGES],
            zeroes: true,
            _registration: registration,
            _stack: stack,
        }
    }

    /// Leaves in used frames what their owners wrote: what the rest costs.
    pub fn without_zeroing(self) -> Self {
        Self { zeroes: false, ..self }
    }

    /// Takes pages out of this process's view.
    pub fn close(&self, first: usize, pages: usize) {
        self.view.close(first, pages);
    }

    /// Whether a page must be zeroed before it is opened: its frame was used, or must be mapped by hand, and so has to exist.
    fn is_due(&self, page: usize) -> bool {
        if self.used[page] { self.zeroes } else { self.view.way == Way::Continue }
    }

    fn zero(&mut self, first: usize, pages: usize) {
        let (mut page, end) = (first, first + pages);
        while page < end {
            let due = (page..end).take_while(|page| self.is_due(*page)).count();
            if due != 0 {
                let at = part(self.alias, page, due).start().as_ptr::<u8>();
                // SAFETY: the bench's own alias. As a space does, a run at once.
                unsafe { at.write_bytes(0, due * PAGE_SIZE) };
            }
            page += due + 1;
        }
        self.used[first..end].fill(true);
    }
}

impl Worker for Bare {
    fn map(&mut self, first: usize, pages: usize) {
        self.zero(first, pages);
        self.view.open(first, pages);
    }
    fn unmap(&mut self, first: usize, pages: usize) {
        self.view.close(first, pages);
        if pages >= PUNCH_PAGES {
            // As a space does: memory of that size goes back to the kernel.
            memfd::punch(self.frames.as_fd(), PageCount::new(first), PageCount::new(pages)).expect("punch");
            self.used[first..first + pages].fill(false);
        }
    }
    fn gone(&mut self, first: usize, pages: usize) {
        self.view.close(first, pages);
    }
    fn at(&self, page: usize) -> *mut u64 {
        part(self.view.range, page, 1).start().as_ptr()
    }
}

/// Threads of one process.
pub enum Thread {
    /// `mmap`, touch, `munmap`.
    Map(PageRange),
    /// Touch and DONTNEED in a reservation.
    DontNeed(PageRange),
}

impl Thread {
    /// Addresses that the threads share.
    pub fn reservation() -> PageRange {
        new_mapping(Source::Anonymous, Protection::ReadWrite)
    }
}

impl Worker for Thread {
    fn map(&mut self, first: usize, pages: usize) {
        if let Self::Map(range) = self {
            let range = part(*range, first, pages);
            // SAFETY: a part of the bench's own reservation.
            unsafe {
                mem::map(
                    range.pages(),
                    Protection::ReadWrite,
                    Source::Anonymous,
                    Placement::Replace(range.start()),
                    MapOptions::default(),
                )
            }
            .expect("mmap");
        }
    }
    fn unmap(&mut self, first: usize, pages: usize) {
        // SAFETY: a part of the bench's own reservation, in which nobody else maps anything.
        unsafe {
            match self {
                Self::Map(range) => mem::unmap(part(*range, first, pages)).expect("munmap"),
                Self::DontNeed(range) => {
                    mem::advise(part(*range, first, pages), Advice::DontNeed).expect("DONTNEED");
                }
            }
        }
    }
    fn at(&self, page: usize) -> *mut u64 {
        match self {
            Self::Map(range) | Self::DontNeed(range) => part(*range, page, 1).start().as_ptr(),
        }
    }
}
