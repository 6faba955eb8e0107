//! Sizes that no memory has, asked for through C's functions: refused as C says, and nothing of the thread's is touched.

use std::ffi::c_void;
use std::ptr::null_mut;

unsafe extern "C" {
    fn pvalloc(size: usize) -> *mut c_void;
    fn memalign(align: usize, size: usize) -> *mut c_void;
    fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn mremap(old: *mut c_void, old_len: usize, new_len: usize, flags: i32, ...) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> i32;
}

const READ_WRITE: i32 = 3;
const PRIVATE_ANONYMOUS: i32 = 0x22;
const FIXED: i32 = 0x10;
const MAY_MOVE: i32 = 1;
const FAILED: *mut c_void = usize::MAX as *mut c_void;

#[peregrine::test(nodes = 1)]
fn sizes_that_wrap_around_when_they_are_rounded_up_are_refused() {
    // SAFETY: what is refused gives nothing; what is mapped is this test's own.
    unsafe {
        for size in [usize::MAX, usize::MAX - 4094, isize::MAX as usize] {
            assert_eq!(pvalloc(size), null_mut());
            assert_eq!(memalign(size, 16), null_mut());
            assert_eq!(mmap(null_mut(), size, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0), FAILED);
        }
        let len = 3 * 4096;
        let own = mmap(null_mut(), len, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0);
        assert_ne!(own, FAILED);
        own.cast::<u8>().write_bytes(7, len);
        for size in [usize::MAX, usize::MAX - 4094] {
            assert_eq!(mmap(own, size, READ_WRITE, PRIVATE_ANONYMOUS | FIXED, -1, 0), FAILED);
            assert_eq!(mremap(own, len, size, MAY_MOVE), FAILED);
            assert_eq!(mremap(own, size, len, MAY_MOVE), FAILED);
        }
        assert!(std::slice::from_raw_parts(own.cast::<u8>(), len).iter().all(|b| *b == 7));
        assert_eq!(munmap(own, len), 0);
    }
}
