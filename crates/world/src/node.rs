//! A node: one single-threaded process, forked from the zygote, that runs threads until it is killed.

use crate::control::{Lack, NONE, PauseKind, node, record, world};
use crate::killpoint::{Point, at};
use crate::local::{ALTSTACK_BYTES, Tick, altstack_base, local, stack_top};
use crate::{context, dirty, output, sched};
use peregrine_base::sync::{AtomicU32, Ordering};
use peregrine_sys::raw::Errno;
use peregrine_sys::signal::{self, HandlerFlags, SigInfo, Signo, UContext, number};
use peregrine_sys::{cpu, futex, process, timer};
use peregrine_thread::carrier::{Carrier, Hooks, Refusal, Room, carrier};
use peregrine_thread::layout::{CARRIER, slot_index_of};
use peregrine_thread::preempt::{self, SIG_RESET, SIG_TRACE};
use peregrine_thread::seal::Seals;
use peregrine_thread::slot::SlotHeader;
use peregrine_thread::stack_kind::is_windowed;
use peregrine_thread::template::template;
use peregrine_thread::{arch, statics, window};

/// Becomes node `index`. Never returns.
///
/// # Safety
/// In a fresh child of the zygote; the World's memory is mapped.
pub unsafe fn become_node(index: u32) -> ! {
    process::die_with_parent();
    if process::parent_pid() as u32 != world().supervisor.load(Ordering::Relaxed) {
        process::exit_now(0);
    }
    at(Point::NodeBorn);
    let fast_fs = cpu_flag(0);
    // SAFETY: the carrier's page is this process's own copy; nothing runs here yet.
    unsafe {
        (CARRIER as *mut Carrier).write(Carrier {
            depth: AtomicU32::new(1),
            pending: AtomicU32::new(0),
            current: AtomicU32::new(NONE),
            window_owner: AtomicU32::new(NONE),
            node: index,
            fast_fs,
            wide_compare: cpu_flag(1),
            window_written: u64::MAX,
            window_saves: 0,
            blocked: 0,
            header: core::ptr::null_mut(),
            scheduler_sp: 0,
            process_fs: cpu::thread_pointer(),
            vdso: (world().vdso[0].load(Ordering::Relaxed), world().vdso[1].load(Ordering::Relaxed)),
            libraries: preempt::libraries(),
            put_off: 0,
            room: Room,
            seals: Seals::new(
                template(),
                &node(index).window_open,
                &node(index).seals_answered,
                &node(index).seals_answering,
                world().seal_every.load(Ordering::Relaxed),
            ),
            on_preempt: sched::on_preempt,
            hooks: Hooks {
                sleep_until: context::sleep_until,
                yield_now: context::yield_now,
                output: output::write,
                grant,
                refused,
                next_node: context::next_node,
                node_count: context::node_count,
                disposition: crate::dispositions::disposition,
                put_off: sched::on_put_off,
            },
            user: [0; 8],
        });
        if let Some(fd) = carrier().seals.prepare() {
            node(index).fds[2].store(fd as u32 + 1, Ordering::Relaxed);
        }
        statics::forget(carrier());
        at(Point::NodeCarried);
        crate::address_space::become_node(index);
        local().clear();
        let l = local();
        l.tick = timer::Timer::new(preempt::SIG_TICK).ok();
        l.ticking = Tick::Off;
        if install_handlers().is_err() || l.tick.is_none() {
            process::write_all(2, b"peregrine: a node cannot install its timer or signal handlers\n");
            process::exit_now(70);
        }
        signal::set_mask(0);
    }
    if world().track.load(Ordering::Relaxed) && !dirty::start(index) {
        world().track.store(false, Ordering::Relaxed);
    }
    at(Point::NodeTracks);
    let me = node(index);
    me.pid.store(process::pid() as u32, Ordering::Relaxed);
    crate::carried::set_up(index);
    // Release: the supervisor sees the descriptors and the pid.
    me.ready.store(1, Ordering::Release);
    at(Point::NodeReady);
    world().acks.fetch_add(1, Ordering::Release);
    let _ = futex::wake(&world().acks, 1);
    // SAFETY: the zygote's stack frames are not needed any more.
    unsafe { arch::jump_to(stack_top(), sched::scheduler) }
}

/// Ends this node, which can't run thread `slot` for lack of something: the supervisor says so, goes back to the last image, and takes
/// the thread away when that does not help.
pub fn give_up(slot: u32, lack: Lack) -> ! {
    // SAFETY: on a node.
    let me = node(unsafe { carrier() }.node);
    for (word, value) in me.gave_up.iter().zip([slot + 1, lack as u32]) {
        word.store(value, Ordering::Relaxed);
    }
    process::exit_now(70)
}

fn cpu_flag(bit: u64) -> bool {
    world().cpu.load(Ordering::Relaxed) >> bit & 1 != 0
}

/// What this processor and kernel allow, as bits for [`World`](crate::control::World)`::cpu`.
pub fn cpu_flags() -> u64 {
    cpu::has_fsgsbase() as u64 | (std::is_x86_feature_detected!("avx2") as u64) << 1
}

fn grant(bytes: usize) -> bool {
    if crate::arena::charge(bytes).is_err() {
        return false;
    }
    sched::in_thread(|slot| record(slot).granted.fetch_add(bytes as u64, Ordering::Relaxed));
    true
}

/// Leaves word of it, for the caller may end its node with SIGABRT now, as Rust's collections do.
fn refused(why: Refusal) {
    sched::in_thread(|slot| {
        // SAFETY: on a node.
        let me = node(unsafe { carrier() }.node);
        let words = [crate::thread::identity(slot), why as u64];
        me.refused.iter().zip(words).for_each(|(word, value)| word.store(value, Ordering::Relaxed));
    });
}

extern "C" fn ignore(_: Signo, _: *mut SigInfo, _: *mut UContext) {}

/// Makes the terminal's signals harmless here: the supervisor acts on them. A handler, not SIG_IGN: programs that the
/// thread starts must have the default again.
pub fn shield_from_terminal() {
    let signals = [number::INT, number::QUIT, number::HUP, number::TERM];
    // Blocked while a handler runs: its frame is on a thread's stack, and a flood of them must not nest there.
    let mask = signals.iter().fold(0, |mask, &signo| mask | signal::bit(signo));
    for signo in signals {
        // SAFETY: does nothing.
        let _ = unsafe { signal::install_masked(signo, ignore, HandlerFlags::RESTART_NODEFER, mask) };
    }
}

unsafe fn install_handlers() -> Result<(), Errno> {
    shield_from_terminal();
    // SAFETY: this node's own memory; handlers as documented on each.
    unsafe {
        signal::set_altstack(altstack_base(), ALTSTACK_BYTES)?;
        preempt::install()?;
        // Each blocked while it runs: they are queued while the process is stopped, and then come all at once.
        for (signo, handler) in [(SIG_RESET, on_reset as signal::Handler), (SIG_TRACE, on_trace)] {
            signal::install_masked(signo, handler, HandlerFlags::ON_ALTSTACK, signal::bit(signo))?;
        }
        preempt::install_on_altstack(number::SEGV, on_fault)?;
        preempt::install_on_altstack(number::BUS, on_fault)
    }
}

/// Drops everything and starts over: all that this process holds is about to be replaced or rebuilt. A reset that comes late,
/// when the rollback it was for is over, must not drop what runs now.
extern "C" fn on_reset(_: Signo, _: *mut SigInfo, _: *mut UContext) {
    let w = world();
    let rolling_back = w.pause.load(Ordering::Acquire) & 1 != 0
        && w.pause_kind.load(Ordering::Relaxed) == PauseKind::Rollback as u32;
    if !rolling_back {
        return;
    }
    at(Point::ResetHeard);
    // SAFETY: the alternate stack is left for good; no frame below is returned to.
    unsafe { arch::jump_to(stack_top(), sched::scheduler) }
}

/// Whether the thread met the guard of its stack, or would have: the kernel gives no address when there is no room there for the frame
/// of a signal, be it the tick's or one that comes while that is dealt with.
fn has_overflowed(current: u32, header: &SlotHeader, info: &SigInfo, sp: usize) -> bool {
    let is_guard = |addr| {
        if is_windowed(current) {
            // SAFETY: on a node, which has a template.
            window::is_guard(unsafe { &template().windows }, current, addr)
        } else {
            slot_index_of(addr) == Some(current) && header.is_guard(addr)
        }
    };
    let no_frame = info.code == signal::SI_KERNEL && info.addr == 0;
    is_guard(info.addr) || (no_frame && is_guard(sp.saturating_sub(signal::frame_bytes())))
}

/// Says what crashed, then lets the kernel do what it would have done.
extern "C" fn on_fault(signo: Signo, info: *mut SigInfo, context: *mut UContext) {
    // SAFETY: the kernel's own structures; S3: this allocates nothing and locks nothing.
    unsafe {
        let addr = (*info).addr;
        let me = node(carrier().node);
        let current = me.current.load(Ordering::Relaxed);
        let mut line = Line::new();
        line.text("peregrine: ");
        if current == NONE {
            line.text("a node crashed in the runtime itself");
        } else {
            let header = &*SlotHeader::of(current);
            line.text("thread ").number(current as usize).text(" '");
            let name = &*crate::control::name_of(current);
            line.bytes(&name[..name.iter().position(|b| *b == 0).unwrap_or(0)]);
            if has_overflowed(current, header, &*info, (*context).sp()) {
                line.text("' has overflowed its stack of ").number(header.stack_pages() as usize * 4096);
                line.text(" bytes; give it more with Builder::stack_size");
            } else {
                line.text(if signo == number::BUS {
                    "' crashed with SIGBUS"
                } else {
                    "' crashed with SIGSEGV"
                });
            }
        }
        line.text(" (address ").hex(addr).text(", at ").hex((*context).ip()).text(")\n");
        process::write_all(2, line.as_bytes());
        me.crash_addr.store(addr, Ordering::Relaxed);
        me.crash_signal.store(signo as u32, Ordering::Relaxed);
        let _ = signal::set_default(signo);
    }
}

/// Leaves the program counters of what runs in the node's record.
extern "C" fn on_trace(_: Signo, _: *mut SigInfo, context: *mut UContext) {
    // SAFETY: on a node; the walk reads frames of this process only.
    unsafe {
        let me = node(carrier().node);
        let mut walk = Walk { n: 0, from: (*context).ip(), to: &me.trace };
        me.trace[0].store((*context).ip(), Ordering::Relaxed);
        _Unwind_Backtrace(step, (&raw mut walk).cast());
        me.trace_len.store(walk.n.max(1) as u32, Ordering::Release);
        world().acks.fetch_add(1, Ordering::Release);
        let _ = futex::wake(&world().acks, 1);
    }
}

#[repr(C)]
struct Walk<'a> {
    n: usize,
    /// Where the thread was interrupted: the frames before it are the handler's own.
    from: usize,
    to: &'a [peregrine_base::sync::AtomicUsize; 64],
}

unsafe extern "C" {
    fn _Unwind_Backtrace(f: extern "C" fn(*mut u8, *mut Walk<'_>) -> i32, arg: *mut Walk<'_>) -> i32;
    fn _Unwind_GetIP(context: *mut u8) -> usize;
}

extern "C" fn step(context: *mut u8, walk: *mut Walk<'_>) -> i32 {
    // SAFETY: called by the unwinder with its context and our pointer.
    unsafe {
        let w = &mut *walk;
        if w.n == w.to.len() {
            return 5;
        }
        let pc = _Unwind_GetIP(context);
        if pc == 0 || (w.n == 0 && pc != w.from) {
            return 0;
        }
        w.to[w.n].store(pc, Ordering::Relaxed);
        w.n += 1;
    }
    0
}

/// A line of text without allocation.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn new() -> Self {
        Self { bytes: [0; 256], len: 0 }
    }
    fn bytes(&mut self, more: &[u8]) -> &mut Self {
        let n = more.len().min(self.bytes.len() - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&more[..n]);
        self.len += n;
        self
    }
    fn text(&mut self, more: &str) -> &mut Self {
        self.bytes(more.as_bytes())
    }
    fn digits(&mut self, mut n: usize, base: usize) -> &mut Self {
        let (mut buf, mut i) = ([0u8; 20], 20);
        loop {
            i -= 1;
            buf[i] = b"0123456789abcdef"[n % base];
            n /= base;
            if n == 0 {
                return self.bytes(&buf[i..]);
            }
        }
    }
    fn number(&mut self, n: usize) -> &mut Self {
        self.digits(n, 10)
    }
    fn hex(&mut self, n: usize) -> &mut Self {
        self.text("0x").digits(n, 16)
    }
    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
