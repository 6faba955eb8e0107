//! The floor: the same work by bare system calls and a bare signal handler, as a careful C program would do it.

use peregrine_base::sync::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use peregrine_sys::fault::{self, Action, Frame, SIGBUS, SIGSEGV};
use peregrine_sys::uffd::{Features, FillMode, RegisterMode, Uffd, UffdRef};
use peregrine_sys::{guard, mem};
use peregrine_vm::{PAGE_SIZE, PageCount, PageRange, Protection, VirtAddr};
use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use super::{Kind, Way};

// What the handler needs, set before each sample; relaxed loads cost what plain ones do.
static FD: AtomicI32 = AtomicI32::new(0);
static WAY: AtomicUsize = AtomicUsize::new(0);
static UNIT_BYTES: AtomicUsize = AtomicUsize::new(PAGE_SIZE);
static START: AtomicUsize = AtomicUsize::new(0);
/// Traps to answer by doing nothing, before the page is opened.
pub static IDLE: AtomicUsize = AtomicUsize::new(0);
/// Appel1: the unit to protect next, or 0 for none.
pub static LAST: AtomicUsize = AtomicUsize::new(0);
/// The handler goes back without the kernel.
pub static LEAVE: AtomicBool = AtomicBool::new(false);
/// A pager's: lift first, wake after it, as whoever has books to close between the two must.
pub static LIFT_QUIETLY: AtomicBool = AtomicBool::new(false);
pub static REPROTECT: AtomicUsize = AtomicUsize::new(0);
/// Where a byte for each unit is set when it is opened, or 0: what a program that wants to know what was written keeps.
pub static BOOKS: AtomicUsize = AtomicUsize::new(0);
static SOURCE: AtomicUsize = AtomicUsize::new(0);

/// In the handler there is nobody to tell.
fn ignore<T, E>(_: Result<T, E>) {}

/// # Safety
/// The range is the benchmark's.
// Into its callers, as a C program would write the call itself.
#[inline(always)]
unsafe fn set(way: usize, fd: i32, range: PageRange, access: Protection) {
    // SAFETY: the caller's promise; the descriptor is a userfaultfd that outlives the sample.
    unsafe {
        match way {
            WP => {
                let _ = UffdRef::new(BorrowedFd::borrow_raw(fd))
                    .write_protect(range, access != Protection::ReadWrite);
            }
            GUARD if access == Protection::ReadWrite => ignore(guard::remove(range)),
            GUARD => ignore(guard::install(range)),
            _ => ignore(mem::protect(range, access)),
        }
    }
}

/// Notes that a unit was opened, if books are kept.
#[inline(always)]
fn note(unit: usize) {
    let books = BOOKS.load(Ordering::Relaxed);
    if books != 0 {
        // SAFETY: a byte for every unit of what is aimed at lies there (`Floor::write`), which is read and cleared when no
        // handler runs.
        unsafe { VirtAddr::new(books + unit).as_ptr::<u8>().write_volatile(1) };
    }
}

const WP: usize = 1;
const GUARD: usize = 2;
const READ: usize = 3;
const NONE: usize = 4;
const FILL_COPY: usize = 5;
const FILL_ZERO: usize = 6;
const FILL_CONTINUE: usize = 7;
const FILL_MOVE: usize = 8;

fn closed(way: usize) -> Protection {
    if way == NONE || way == GUARD { Protection::None } else { Protection::Read }
}

unsafe extern "C" fn on_signal(_: i32, info: *mut c_void, context: *mut c_void) {
    // SAFETY: a fault handler's own arguments.
    let address = unsafe { Frame::new(info, context) }.address().as_usize();
    let idle = IDLE.load(Ordering::Relaxed);
    if idle > 0 {
        IDLE.store(idle - 1, Ordering::Relaxed);
        return;
    }
    let unit_bytes = UNIT_BYTES.load(Ordering::Relaxed);
    let start = START.load(Ordering::Relaxed);
    let unit = start + (address - start) / unit_bytes * unit_bytes;
    let range = PageRange::new(VirtAddr::new(unit), PageCount::new(unit_bytes / PAGE_SIZE));
    let (way, fd) = (WAY.load(Ordering::Relaxed), FD.load(Ordering::Relaxed));
    // SAFETY: the ranges are the benchmark's; the descriptor lives as long as the sample.
    unsafe {
        let uffd = UffdRef::new(BorrowedFd::borrow_raw(fd));
        let source = SOURCE.load(Ordering::Relaxed);
        match way {
            FILL_COPY => ignore(uffd.copy(range, source as *const u8, FillMode::default())),
            FILL_ZERO => ignore(uffd.zeropage(range, FillMode::default())),
            FILL_CONTINUE => ignore(uffd.continue_(range, FillMode::default())),
            FILL_MOVE => {
                ignore(uffd.move_(range, VirtAddr::new(source + unit - start), false, FillMode::default()))
            }
            _ => {
                if REPROTECT.load(Ordering::Relaxed) != 0 {
                    let last = LAST.swap(unit, Ordering::Relaxed);
                    if last != 0 {
                        let other = PageRange::new(VirtAddr::new(last), range.pages());
                        set(way, fd, other, closed(way));
                    }
                }
                note((unit - start) / unit_bytes);
                set(way, fd, range, Protection::ReadWrite);
            }
        }
        if LEAVE.load(Ordering::Relaxed) {
            // Nothing here needs to be dropped.
            super::leave::leave(context);
        }
    }
}

/// Runs `f` with the bare handler in place of whatever is installed.
pub fn with_handler<T>(f: impl FnOnce() -> T) -> T {
    let action = Action::run(on_signal, fault::SA_ONSTACK | fault::SA_NODEFER);
    // SAFETY: the handler serves the benchmark's own faults; what was installed is put back.
    let before = [SIGSEGV, SIGBUS].map(|s| unsafe { fault::action(s, Some(&action)).expect("sigaction") });
    let result = f();
    for (signal, action) in [SIGSEGV, SIGBUS].into_iter().zip(before) {
        // SAFETY: as it was.
        unsafe { fault::action(signal, Some(&action)).expect("sigaction") };
    }
    result
}

/// Memory protected by bare calls. Where it can it shares memory and descriptor with our side: which frames and page
/// tables a mapping happens to get makes more difference than any layer.
pub struct Bare {
    pub memory: Arc<peregrine_vm::Mapping>,
    uffd: Option<Uffd>,
    fd: i32,
    way: usize,
    unit: PageCount,
    pager: Option<(std::thread::JoinHandle<()>, std::io::PipeWriter)>,
}

impl Bare {
    const fn number(way: Way) -> usize {
        match way {
            Way::WriteProtect | Way::Pager => WP,
            Way::Guard => GUARD,
            Way::MprotectRead => READ,
            Way::MprotectNone => NONE,
        }
    }

    /// On the memory and through the descriptor of a region or a tracker, which outlives this value's use.
    pub fn beside(
        way: Way,
        uffd: Option<BorrowedFd<'_>>,
        memory: &Arc<peregrine_vm::Mapping>,
        unit: PageCount,
    ) -> Self {
        let fd = uffd.map_or(0, |fd| fd.as_raw_fd());
        Self { memory: memory.clone(), uffd: None, fd, way: Self::number(way), unit, pager: None }
    }

    /// On memory of its own.
    pub fn apart(way: Way, kind: Kind, units: usize, unit: PageCount) -> Self {
        Self::on(way, Arc::new(kind.make(PageCount::new(units * unit.get()))), unit)
    }

    /// On an alias, through a descriptor of its own: a pager's messages go to one reader only.
    pub fn behind(way: Way, memory: &peregrine_vm::Mapping, unit: PageCount) -> Self {
        Self::on(way, Arc::new(memory.alias(Protection::ReadWrite).expect("alias")), unit)
    }

    fn on(way: Way, memory: Arc<peregrine_vm::Mapping>, unit: PageCount) -> Self {
        let mut bare = Self { memory, uffd: None, fd: 0, way: Self::number(way), unit, pager: None };
        if way == Way::Pager {
            let features =
                Features::PAGEFAULT_FLAG_WP | Features::WP_HUGETLBFS_SHMEM | Features::WP_UNPOPULATED;
            let uffd = Uffd::open(features).expect("userfaultfd");
            // SAFETY: the memory is this value's.
            unsafe { uffd.by_ref().register(bare.memory.range(), RegisterMode::WP).expect("register") };
            bare.fd = uffd.as_fd().as_raw_fd();
            bare.uffd = Some(uffd);
            bare.start_pager();
        }
        bare
    }

    fn start_pager(&mut self) {
        let (reader, writer) = std::io::pipe().expect("pipe");
        let fd = self.fd;
        let (start, unit) = (self.memory.range().start().as_usize(), self.unit);
        let thread = std::thread::spawn(move || {
            // SAFETY: the descriptor is closed after this thread has ended (`drop`).
            let uffd = UffdRef::new(unsafe { BorrowedFd::borrow_raw(fd) });
            let mut messages = [const { std::mem::MaybeUninit::uninit() }; 16];
            loop {
                match peregrine_sys::io::wait_readable(&[uffd.as_fd(), reader.as_fd()], None) {
                    Ok(ready) if ready & 2 != 0 => return,
                    _ => {}
                }
                let count = uffd.read(&mut messages).unwrap_or(0);
                for message in &messages[..count] {
                    // SAFETY: `read` wrote it.
                    let event = unsafe { message.assume_init_ref() }.event();
                    if let peregrine_sys::uffd::Event::PageFault { address, .. } = event {
                        let idle = IDLE.load(Ordering::Relaxed);
                        let page = PageRange::covering(address.page_floor(), PAGE_SIZE);
                        if idle > 0 {
                            IDLE.store(idle - 1, Ordering::Relaxed);
                            ignore(uffd.wake(page));
                            continue;
                        }
                        let at = start + (address.as_usize() - start) / unit.bytes() * unit.bytes();
                        if REPROTECT.load(Ordering::Relaxed) != 0 {
                            let last = LAST.swap(at, Ordering::Relaxed);
                            if last != 0 {
                                ignore(uffd.write_protect(PageRange::new(VirtAddr::new(last), unit), true));
                            }
                        }
                        note((at - start) / unit.bytes());
                        let opened = PageRange::new(VirtAddr::new(at), unit);
                        if LIFT_QUIETLY.load(Ordering::Relaxed) {
                            ignore(uffd.lift_without_waking(opened));
                            ignore(uffd.wake(opened));
                        } else {
                            ignore(uffd.write_protect(opened, false));
                        }
                    }
                }
            }
        });
        self.pager = Some((thread, writer));
    }

    /// Points the handler at this memory.
    pub fn aim(&self) {
        FD.store(self.fd, Ordering::Relaxed);
        WAY.store(self.way, Ordering::Relaxed);
        UNIT_BYTES.store(self.unit.bytes(), Ordering::Relaxed);
        START.store(self.memory.range().start().as_usize(), Ordering::Relaxed);
    }

    #[inline(always)]
    pub fn close(&self, range: PageRange) {
        // SAFETY: a part of this value's memory.
        unsafe { set(self.way, self.fd, range, closed(self.way)) };
    }

    #[inline(always)]
    pub fn open(&self, range: PageRange) {
        // SAFETY: a part of this value's memory.
        unsafe { set(self.way, self.fd, range, Protection::ReadWrite) };
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        if let Some((thread, writer)) = self.pager.take() {
            drop(writer);
            let _ = thread.join();
        }
    }
}

/// How a bare fill fills.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    Copy,
    Zero,
    Continue,
    Move,
}

/// Points the handler at memory to fill from `source` in units of `unit`.
pub fn aim_fill(uffd: BorrowedFd<'_>, memory: PageRange, unit: PageCount, fill: Fill, source: usize) {
    FD.store(uffd.as_raw_fd(), Ordering::Relaxed);
    let way = match fill {
        Fill::Copy => FILL_COPY,
        Fill::Zero => FILL_ZERO,
        Fill::Continue => FILL_CONTINUE,
        Fill::Move => FILL_MOVE,
    };
    WAY.store(way, Ordering::Relaxed);
    UNIT_BYTES.store(unit.bytes(), Ordering::Relaxed);
    START.store(memory.start().as_usize(), Ordering::Relaxed);
    SOURCE.store(source, Ordering::Relaxed);
}

/// Points the handler at memory that is write-protected, or absent and in its memfd.
pub fn aim_at(uffd: &Uffd, memory: PageRange, absent: bool) {
    aim_fill(uffd.as_fd(), memory, PageCount::new(1), Fill::Continue, 0);
    if !absent {
        WAY.store(WP, Ordering::Relaxed);
    }
    IDLE.store(0, Ordering::Relaxed);
}
