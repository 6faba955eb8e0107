//! What the loader has mapped, as its own list tells it: the executable first, then the shared libraries.

use core::ffi::{c_char, c_int, c_void};
use peregrine_sys::cpu::thread_pointer;

#[repr(C)]
pub(crate) struct DlPhdrInfo {
    pub(crate) addr: usize,
    pub(crate) name: *const c_char,
    pub(crate) phdr: *const Phdr,
    pub(crate) phnum: u16,
    pub(crate) adds: u64,
    pub(crate) subs: u64,
    pub(crate) tls_modid: usize,
    pub(crate) tls_data: *const c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Phdr {
    pub(crate) kind: u32,
    pub(crate) flags: u32,
    pub(crate) offset: u64,
    pub(crate) vaddr: usize,
    pub(crate) paddr: usize,
    pub(crate) filesz: u64,
    pub(crate) memsz: usize,
    pub(crate) align: u64,
}

unsafe extern "C" {
    fn dl_iterate_phdr(
        f: extern "C" fn(*const DlPhdrInfo, usize, *mut c_void) -> c_int,
        data: *mut c_void,
    ) -> c_int;
}

/// What the list says of the program's private data.
#[derive(Default)]
pub struct Seen {
    modules: usize,
    /// Writable data of the executable that stays writable: start and end, in whole lines.
    pub window: Option<(usize, usize)>,
    /// Whether there is more of it elsewhere.
    pub two_windows: bool,
    /// Where the lowest block of thread-locals begins that lies right below the thread pointer.
    pub tls_low: usize,
    /// The largest alignment that such a block asks for.
    pub tls_align: usize,
}

impl Seen {
    /// Looks at all that the loader has mapped so far.
    pub fn now() -> Self {
        let mut seen = Self { tls_low: usize::MAX, ..Self::default() };
        // SAFETY: the callback only reads.
        unsafe { dl_iterate_phdr(look, (&raw mut seen).cast()) };
        seen
    }
}

extern "C" fn look(info: *const DlPhdrInfo, _: usize, data: *mut c_void) -> c_int {
    const PT_LOAD: u32 = 1;
    const PT_TLS: u32 = 7;
    const PT_GNU_RELRO: u32 = 0x6474_e552;
    const PF_W: u32 = 2;
    // SAFETY: the loader's own list, during its own iteration.
    let (info, seen) = unsafe { (&*info, &mut *(data as *mut Seen)) };
    // SAFETY: as above.
    let headers = unsafe { core::slice::from_raw_parts(info.phdr, info.phnum as usize) };
    if seen.modules == 0 {
        // The executable comes first.
        let relro_end = headers
            .iter()
            .find(|h| h.kind == PT_GNU_RELRO)
            .map_or(0, |h| (info.addr + h.vaddr + h.memsz) & !4095);
        for h in headers.iter().filter(|h| h.kind == PT_LOAD && h.flags & PF_W != 0) {
            // Whole cache lines: what shares the first and the last with the window is padding of the same pages.
            let (start, end) = ((info.addr + h.vaddr).max(relro_end) & !63, info.addr + h.vaddr + h.memsz);
            if start >= end {
                continue;
            }
            seen.two_windows |= seen.window.is_some();
            seen.window = Some((start, end.next_multiple_of(64)));
        }
    }
    seen.modules += 1;
    if !info.tls_data.is_null() {
        let at = info.tls_data as usize;
        let tp = thread_pointer();
        // Modules loaded with the program have their block right below the thread pointer.
        if at < tp && tp - at < 1 << 20 {
            seen.tls_low = seen.tls_low.min(at);
            let asked = headers.iter().find(|h| h.kind == PT_TLS).map_or(1, |h| h.align as usize);
            seen.tls_align = seen.tls_align.max(asked);
        }
    }
    0
}

/// Calls `f` with each executable range of each shared library.
pub(crate) fn each_library_code(mut f: impl FnMut((usize, usize))) {
    struct Data<'a> {
        modules: usize,
        f: &'a mut dyn FnMut((usize, usize)),
    }
    extern "C" fn look(info: *const DlPhdrInfo, _: usize, data: *mut c_void) -> c_int {
        const PT_LOAD: u32 = 1;
        const PF_X: u32 = 1;
        // SAFETY: the loader's own list, during its own iteration; our own data.
        let (info, data) = unsafe { (&*info, &mut *data.cast::<Data<'_>>()) };
        // SAFETY: as above.
        let headers = unsafe { core::slice::from_raw_parts(info.phdr, info.phnum as usize) };
        // The executable comes first.
        if data.modules != 0 {
            for h in headers.iter().filter(|h| h.kind == PT_LOAD && h.flags & PF_X != 0) {
                (data.f)((info.addr + h.vaddr, info.addr + h.vaddr + h.memsz));
            }
        }
        data.modules += 1;
        0
    }
    let mut data = Data { modules: 0, f: &mut f };
    // SAFETY: the callback only reads and calls `f`.
    unsafe { dl_iterate_phdr(look, (&raw mut data).cast()) };
}
