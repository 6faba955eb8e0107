//! What a new thread starts from: the program's statics and thread-locals as they were before `main`.
//!
//! A constructor runs before Rust's own start-up, when both are pristine, and takes a copy. When a World is made
//! the copy moves to [`TEMPLATE`], in shared memory, with a header that says what it is a copy of:
//!
//! ```text
//!  TEMPLATE  │ header │ statics (the window's bytes) │ TLS blocks │ struct pthread │ dtv │
//!                      statics_len                    tls_len      pthread_len      dtv_words
//!                                                               ▲ the thread pointer points here
//! ```
//!
//! The *statics window* is the writable data of the executable less what the loader made read-only again
//! (RELRO): `.data` and `.bss`, and libc's as well when it is linked in. The TLS area is the static TLS block of
//! every module (they lie below the thread pointer) and glibc's `struct pthread` above it, whose size the library
//! itself tells (`_thread_db_sizeof_pthread`, kept for debuggers).

mod libc_facts;
mod loaded;

use crate::layout::{SLOTS, SLOTS_BYTES, TEMPLATE};
use core::ffi::{c_char, c_int};
use libc_facts::{kernels_word_on_tid, size_up_to_break};
use loaded::Seen;
pub(crate) use loaded::{DlPhdrInfo, Phdr, each_library_code};
use peregrine_base::{PageCount, Protection};
use peregrine_sys::cpu::thread_pointer;

/// Says what the bytes behind it are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct TemplateHeader {
    /// Start of the statics window in this executable.
    pub statics_start: usize,
    /// Its length in bytes.
    pub statics_len: usize,
    /// Bytes of a granule of the window (`statics`).
    pub granule: usize,
    /// The longest run of lines that are zero in the template: offsets of its start and end.
    pub zero: (usize, usize),
    /// Bytes of thread-locals below the thread pointer.
    pub tls_len: usize,
    /// Alignment that the program's thread-locals ask for, at least 64.
    pub tls_align: usize,
    /// Bytes of `struct pthread` at and above it.
    pub pthread_len: usize,
    /// The thread pointer of the process that the copy was taken in.
    pub maker_tp: usize,
    /// Words of the dtv, from its capacity entry on; 0 if there is none.
    pub dtv_words: usize,
    /// Offset of the thread id in `struct pthread`.
    pub tid_offset: usize,
    /// Offset of the rseq area from the thread pointer, or `isize::MIN` if unknown.
    pub rseq_offset: isize,
    /// Where the copy lies.
    pub bytes: usize,
    /// The World's windows; all zero before there is one.
    pub windows: crate::window::Windows,
    /// Where what is mapped of the slots ends.
    pub slots_end: usize,
}

impl TemplateHeader {
    /// Bytes of the copy.
    pub const fn copy_len(&self) -> usize {
        self.statics_len + self.tls_len + self.pthread_len + self.dtv_words * 8
    }
    /// The pristine statics.
    pub fn statics(&self) -> *mut u8 {
        self.bytes as *mut u8
    }
    /// The pristine TLS area, from its lowest byte.
    pub fn tls(&self) -> *mut u8 {
        (self.bytes + self.statics_len) as *mut u8
    }
    /// The dtv's words.
    pub fn dtv(&self) -> *mut usize {
        (self.bytes + self.statics_len + self.tls_len + self.pthread_len) as *mut usize
    }
    /// Bytes of a thread's TLS area: blocks, control block and dtv.
    pub fn tls_area_len(&self) -> usize {
        self.tls_len + self.pthread_len + self.dtv_words * 8
    }
}

/// The template of this World.
///
/// # Safety
/// [`TEMPLATE`] is mapped and [`install`]ed.
#[inline(always)]
pub unsafe fn template() -> &'static TemplateHeader {
    // SAFETY: written once, before any node exists, and read only after.
    unsafe { &*(TEMPLATE as *const TemplateHeader) }
}

/// Why no template can be had.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum TemplateError {
    /// The constructor found something it does not know.
    #[error(
        "cannot tell this program's private data apart: {0}; build with the GNU C library (glibc) 2.34 or later"
    )]
    Unknown(&'static str),
    /// The constructor never ran.
    #[error(
        "the start-up hook did not run; link the peregrine-thread crate into the executable itself, not into a shared object"
    )]
    NoConstructor,
}

/// The constructor's finding; only the process that makes the World reads it.
static mut TAKEN: Option<Result<TemplateHeader, TemplateError>> = None;
/// `argc`, `argv`, `envp` as the loader passed them.
static mut START: (usize, usize, usize) = (0, 0, 0);

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn(c_int, *const *const c_char, *const *const c_char) = constructor;

extern "C" fn constructor(argc: c_int, argv: *const *const c_char, envp: *const *const c_char) {
    // SAFETY: runs once, before main, in a process of one thread.
    unsafe {
        TAKEN = Some(take());
        START = (argc as usize, argv as usize, envp as usize);
    }
    for run in starters() {
        run();
    }
}

/// Functions that take over the process before `main`, when the template has been taken: `#[peregrine::test]` enters a test
/// here, in a process that has one thread and nothing of the test harness in it. Their addresses lie in a section of their own.
fn starters() -> impl Iterator<Item = fn()> {
    unsafe extern "C" {
        #[link_name = "__start_peregrine_start"]
        static START: [usize; 0];
        #[link_name = "__stop_peregrine_start"]
        static STOP: [usize; 0];
    }
    #[used]
    #[unsafe(link_section = "peregrine_start")]
    static NOTHING: usize = 0;
    // SAFETY: the linker defines both ends of the section, which holds function addresses and zeroes only.
    let list = unsafe {
        let (start, stop) = ((&raw const START).cast::<usize>(), (&raw const STOP).cast::<usize>());
        core::slice::from_raw_parts(start, stop.offset_from(start) as usize)
    };
    // SAFETY: a non-zero entry is a `fn()` put there by the attribute.
    list.iter().filter(|a| **a != 0).map(|a| unsafe { core::mem::transmute::<usize, fn()>(*a) })
}

/// `(argc, argv, envp)` as the loader passed them to this process.
pub fn start_arguments() -> (usize, usize, usize) {
    // SAFETY: written before main only.
    unsafe { (&raw const START).read() }
}

/// What the constructor found.
pub fn taken() -> Result<TemplateHeader, TemplateError> {
    // SAFETY: written before main only.
    let taken = unsafe { (&raw const TAKEN).as_ref() };
    taken.cloned().flatten().unwrap_or(Err(TemplateError::NoConstructor))
}

/// Copies the template to [`TEMPLATE`], where all nodes see it.
///
/// # Safety
/// [`TEMPLATE`] is mapped, large enough (a page for the header, then [`TemplateHeader::copy_len`] bytes), and no
/// node exists yet.
pub unsafe fn install() -> Result<TemplateHeader, TemplateError> {
    let mut t = taken()?;
    let to = TEMPLATE + 4096;
    // SAFETY: the caller mapped it; source and target do not overlap.
    unsafe {
        core::ptr::copy_nonoverlapping(t.bytes as *const u8, to as *mut u8, t.copy_len());
        t.bytes = to;
        // Words that are patched later (the program's arguments) are not zero here and stay so.
        t.zero = crate::statics::zero_run(core::slice::from_raw_parts(to as *const u8, t.statics_len));
        (TEMPLATE as *mut TemplateHeader).write(t);
    }
    Ok(t)
}

/// Notes where what is mapped of the slots ends: in the last of them, which then is smaller than the others.
///
/// # Safety
/// As [`set_windows`].
pub unsafe fn set_slots_end(end: usize) {
    // SAFETY: as promised.
    unsafe { (*(TEMPLATE as *mut TemplateHeader)).slots_end = end };
}

/// Notes the shape of the World's windows where all nodes see it.
///
/// # Safety
/// After [`install`], before any node exists.
pub unsafe fn set_windows(windows: crate::window::Windows) {
    // SAFETY: mapped, and nobody else looks yet.
    unsafe { (*(TEMPLATE as *mut TemplateHeader)).windows = windows };
}

fn take() -> Result<TemplateHeader, TemplateError> {
    if cfg!(target_arch = "aarch64") {
        // Thread-locals above the thread pointer, `struct pthread` below it: the other way round than all that follows.
        return Err(TemplateError::Unknown(
            "thread-locals above the thread pointer, as on aarch64, are not ported yet",
        ));
    }
    let seen = Seen::now();
    let (start, end) = seen.window.ok_or(TemplateError::Unknown("no writable data in the executable"))?;
    if seen.two_windows {
        return Err(TemplateError::Unknown("writable data in more than one piece"));
    }
    let tp = thread_pointer();
    let tls_len = (tp - seen.tls_low.min(tp)).next_multiple_of(64);
    let pthread_len = libc_facts::sizeof_pthread()
        .or_else(|| size_up_to_break(tp))
        .ok_or(TemplateError::Unknown("size of libc's struct pthread"))?;
    if !(512..16384).contains(&pthread_len) {
        return Err(TemplateError::Unknown("implausible size of libc's struct pthread"));
    }
    let pthread_len = pthread_len.next_multiple_of(64);
    let tid = peregrine_sys::process::pid() as u32;
    // SAFETY: inside this thread's own control block.
    let is_tid = |off: &usize| unsafe { ((tp + off) as *const u32).read() } == tid;
    let tid_offset = match kernels_word_on_tid(tp).or_else(libc_facts::offset_of_tid) {
        Some(told) => Some(told).filter(|off| off + 4 <= pthread_len && off.is_multiple_of(4) && is_tid(off)),
        // Behind what the ABI lays down, in one place only: another word may have this value by chance.
        None => {
            let mut found = (16..pthread_len / 4).map(|i| i * 4).filter(is_tid);
            found.next().filter(|_| found.next().is_none())
        }
    };
    let tid_offset = tid_offset.ok_or(TemplateError::Unknown("thread id in libc's struct pthread"))?;
    // SAFETY: glibc keeps the dtv's address in the second word; the entry before it holds the capacity.
    let dtv_words = unsafe {
        let dtv = *((tp + 8) as *const usize);
        if dtv == 0 { 0 } else { (*((dtv - 16) as *const usize) + 2) * 2 }
    };
    if dtv_words > 4096 {
        return Err(TemplateError::Unknown("implausible size of libc's dtv"));
    }
    let mut t = TemplateHeader {
        statics_start: start,
        statics_len: end - start,
        granule: crate::statics::granule_bytes(end - start),
        zero: (0, 0),
        tls_len,
        tls_align: seen.tls_align.max(64).next_power_of_two(),
        pthread_len,
        maker_tp: tp,
        dtv_words,
        tid_offset,
        rseq_offset: libc_facts::rseq_offset().unwrap_or(isize::MIN),
        bytes: 0,
        windows: crate::window::Windows::default(),
        slots_end: SLOTS + SLOTS_BYTES,
    };
    // The copy goes to fresh pages, not the heap: nothing may be allocated this early.
    t.bytes = fresh_pages(t.copy_len()).ok_or(TemplateError::Unknown("no memory for the copy"))?;
    // SAFETY: sources are this process's mapped data, the target was just mapped. The window's last bytes, up to
    // the multiple of 64, lie in the same page.
    unsafe {
        core::ptr::copy_nonoverlapping(start as *const u8, t.statics(), t.statics_len);
        core::ptr::copy_nonoverlapping((tp - tls_len) as *const u8, t.tls(), tls_len + pthread_len);
        if dtv_words != 0 {
            let dtv = *((tp + 8) as *const usize);
            core::ptr::copy_nonoverlapping((dtv - 16) as *const usize, t.dtv(), dtv_words);
        }
    }
    Ok(t)
}

fn fresh_pages(len_bytes: usize) -> Option<usize> {
    use peregrine_sys::mem::{MapOptions, Placement, Source, map};
    let pages = PageCount::for_bytes(len_bytes);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let made = unsafe {
        map(pages, Protection::ReadWrite, Source::Anonymous, Placement::Anywhere, MapOptions::default())
    };
    made.ok().map(|range| range.start().as_usize())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found in the thread that ran the constructor, the place must hold for every thread's `struct pthread`.
    #[test]
    fn libc_keeps_every_threads_id_where_the_template_says() {
        let at = taken().expect("the constructor ran").tid_offset;
        for _ in 0..4 {
            let (word, id, told) = std::thread::spawn(move || {
                let tp = thread_pointer();
                // SAFETY: inside this thread's own control block.
                let word = unsafe { ((tp + at) as *const i32).read() };
                (word, peregrine_sys::process::thread_id(), kernels_word_on_tid(tp))
            })
            .join()
            .expect("it only reads");
            assert_eq!(word, id, "{at}");
            // The kernel may have been built without the question.
            assert!(told.is_none_or(|told| told == at), "{told:?}, not {at}");
        }
        assert!(libc_facts::offset_of_tid().is_none_or(|told| told == at), "{at}");
    }

    /// An id that no process has: to libc's recursive locks two threads of one node would else be one.
    #[test]
    fn a_copy_of_the_thread_locals_has_an_id_of_its_own_there() {
        let t = taken().expect("the constructor ran");
        let mut area = vec![0u128; t.tls_area_len().div_ceil(16) + 4];
        let start = (area.as_mut_ptr() as usize).next_multiple_of(64);
        let id_of = |index: u32| {
            // SAFETY: 64-byte aligned, and the area is as long as asked for, with 64 bytes to spare.
            let tp = unsafe { crate::tls::build(&t, start, index) };
            // SAFETY: inside the copy.
            unsafe { ((tp + t.tid_offset) as *const u32).read() }
        };
        // Above the kernel's largest process id.
        assert!(id_of(0) > 1 << 22 && id_of(1) > 1 << 22 && id_of(0) != id_of(1));
    }
}
