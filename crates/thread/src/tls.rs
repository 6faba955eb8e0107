//! A thread's own thread-locals: a copy of the template's TLS area, at home in the slot.
//!
//! ```text
//!   slot  … │ TLS blocks (tls_len) │ struct pthread (pthread_len) │ dtv │ …
//!                                  ▲ fs base while the thread runs
//! ```
//!
//! Every word of the copy that pointed into the maker's area is rebased: the two self pointers, the dtv's address
//! and entries, the robust list's head, the first block of key values. Stack-protector canary and pointer guard are
//! kept: all nodes are forked from one zygote, so frames of C code check out everywhere. What the kernel knows by
//! address (tid, robust list, rseq) stays with the process; the copy gets a thread id of its own, which no process
//! has, so that libc's recursive locks tell threads of one node apart.

use crate::template::TemplateHeader;

/// First of the thread ids given to threads; above the kernel's largest process id (2^22).
const TID_BASE: u32 = 1 << 24;

/// Builds thread-locals for slot `index` in the bytes from `area` on; returns the thread pointer.
///
/// # Safety
/// `area` is 64-byte aligned and has [`TemplateHeader::tls_area_len`] writable bytes that nobody uses.
pub unsafe fn build(t: &TemplateHeader, area: usize, index: u32) -> usize {
    // SAFETY: the caller's promise.
    unsafe { build_for(t, area, area, index) }
}

/// As [`build`], but writes to `area` what belongs at `home`.
///
/// # Safety
/// As [`build`].
pub unsafe fn build_for(t: &TemplateHeader, area: usize, home: usize, index: u32) -> usize {
    let away = area.wrapping_sub(home);
    let tp = home + t.tls_len;
    let dtv = tp + t.pthread_len;
    let maker = (t.maker_tp - t.tls_len)..(t.maker_tp + t.pthread_len);
    // SAFETY: the areas have the template's sizes; the caller owns the target.
    unsafe {
        core::ptr::copy_nonoverlapping(t.tls(), area as *mut u8, t.tls_area_len());
        let words = area as *mut usize;
        for i in 0..t.tls_area_len() / 8 {
            let w = words.add(i).read();
            if maker.contains(&w) {
                words.add(i).write(w.wrapping_sub(t.maker_tp).wrapping_add(tp));
            }
        }
        if t.dtv_words != 0 {
            (tp.wrapping_add(away + 8) as *mut usize).write(dtv + 16);
        }
        (tp.wrapping_add(away + t.tid_offset) as *mut u32).write(TID_BASE + index);
        // In the control block, or, of a newer libc, among the thread-locals below it.
        let inside = -(t.tls_len as isize)..=t.pthread_len as isize - 32;
        if t.rseq_offset != isize::MIN && inside.contains(&t.rseq_offset) {
            // cpu_id_start and cpu_id: "registration failed", so libc asks the kernel which CPU this is.
            let area = tp.wrapping_add(away).wrapping_add_signed(t.rseq_offset) as *mut u32;
            area.write(0);
            area.add(1).write((-2i32) as u32);
        }
    }
    tp
}
