//! The program's arguments and environment, which threads on every node, and after a resume, must find at one address.

use crate::memory::STRINGS;
use peregrine_thread::template;

/// Copies arguments and environment to World memory, and makes the template's pointers to them point there: so that they
/// mean the same on every node and after a resume. Returns how many bytes they take.
///
/// # Safety
/// The template is installed, and no node exists.
pub(super) unsafe fn move_to_world() -> usize {
    let (argc, argv, envp) = template::start_arguments();
    if argv == 0 {
        return 0;
    }
    // SAFETY: the loader's own vectors, terminated by null; STRINGS is mapped, fresh, and larger than the kernel lets a
    // process's arguments be (6 MiB by default).
    unsafe {
        let header = &*(peregrine_thread::layout::TEMPLATE as *const template::TemplateHeader);
        let mut place = STRINGS;
        let mut copy = |list: usize, n: usize| {
            let vector = place as *mut usize;
            place += (n + 1) * size_of::<usize>();
            for i in 0..n {
                let s = core::ffi::CStr::from_ptr((list as *const *const core::ffi::c_char).add(i).read());
                let bytes = s.to_bytes_with_nul();
                core::ptr::copy_nonoverlapping(bytes.as_ptr(), place as *mut u8, bytes.len());
                vector.add(i).write(place);
                place = (place + bytes.len()).next_multiple_of(8);
            }
            vector.add(n).write(0);
            vector as usize
        };
        let mut n_env = 0;
        while (envp as *const usize).add(n_env).read() != 0 {
            n_env += 1;
        }
        let (new_argv, new_envp) = (copy(argv, argc), copy(envp, n_env));
        let words = header.statics().cast::<usize>();
        for i in 0..header.statics_len / 8 {
            match words.add(i).read() {
                w if w == argv => words.add(i).write(new_argv),
                w if w == envp => words.add(i).write(new_envp),
                _ => {}
            }
        }
        place - STRINGS
    }
}
