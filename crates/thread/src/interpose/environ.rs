//! The environment: a static like any other, so each thread has its own.
//!
//! libc keeps `environ` in its own data, which is the process's, and so does `setenv` with a tree of every string it ever made.
//! A thread's strings would be seen by whoever else runs on its node and would dangle when it leaves. Here the variable lies
//! in the executable, hence in the statics window (libc itself finds it there, as it finds a copy-relocated one), and what
//! changes it allocates in the slot. Strings replaced are not freed: C lets a caller keep what `getenv` gave it.

use super::errno::{EINVAL, ENOMEM};
use super::fail;
use core::ffi::{CStr, c_char};
use core::ptr::null_mut;

// One variable with libc's three names.
core::arch::global_asm!(
    ".pushsection .bss.peregrine_environ,\"aw\",@nobits",
    ".p2align 3",
    ".globl environ",
    ".globl _environ",
    ".globl __environ",
    ".type environ,@object",
    ".type _environ,@object",
    ".type __environ,@object",
    "environ:",
    "_environ:",
    "__environ:",
    ".zero 8",
    ".size environ,8",
    ".size _environ,8",
    ".size __environ,8",
    ".popsection",
);

unsafe extern "C" {
    static mut environ: *mut *mut c_char;
    fn malloc(size: usize) -> *mut core::ffi::c_void;
}

/// The value in `entry` if it is `name=value`.
unsafe fn value_of(entry: *mut c_char, name: &[u8]) -> Option<*mut c_char> {
    // SAFETY: entries are C strings; the comparison stops at the first difference, at the latest at the NUL.
    unsafe {
        for (i, b) in name.iter().enumerate() {
            if *entry.add(i) as u8 != *b {
                return None;
            }
        }
        (*entry.add(name.len()) as u8 == b'=').then(|| entry.add(name.len() + 1))
    }
}

/// Place of the entry for `name`, or the number of entries.
unsafe fn find(name: &[u8]) -> Result<usize, usize> {
    // SAFETY: a null-terminated vector of C strings, or null.
    unsafe {
        let mut n = 0;
        while !environ.is_null() && !(*environ.add(n)).is_null() {
            if value_of(*environ.add(n), name).is_some() {
                return Ok(n);
            }
            n += 1;
        }
        Err(n)
    }
}

unsafe fn name_of<'a>(name: *const c_char) -> Option<&'a [u8]> {
    if name.is_null() {
        return None;
    }
    // SAFETY: C's contract.
    let bytes = unsafe { CStr::from_ptr(name) }.to_bytes();
    (!bytes.is_empty() && !bytes.contains(&b'=')).then_some(bytes)
}

/// Puts `entry` in the place of `name`'s, or at the end, in a new vector: the old one may be the one that all threads
/// started with.
unsafe fn put(name: &[u8], entry: *mut c_char) -> i32 {
    // SAFETY: the new vector has room for the old entries, a new one and the terminator.
    unsafe {
        let at = find(name);
        let mut n = at.unwrap_or_else(|n| n);
        while !environ.is_null() && !(*environ.add(n)).is_null() {
            n += 1;
        }
        let vector: *mut *mut c_char = malloc((n + 2) * size_of::<*mut c_char>()).cast();
        if vector.is_null() {
            return fail(ENOMEM) as i32;
        }
        if n != 0 {
            core::ptr::copy_nonoverlapping(environ, vector, n);
        }
        *vector.add(n) = null_mut();
        *vector.add(n + 1) = null_mut();
        *vector.add(at.unwrap_or(n)) = entry;
        environ = vector;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn getenv(name: *const c_char) -> *mut c_char {
    // SAFETY: C's contract.
    unsafe {
        let Some(name) = name_of(name) else { return null_mut() };
        find(name).ok().and_then(|at| value_of(*environ.add(at), name)).unwrap_or(null_mut())
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn setenv(name: *const c_char, value: *const c_char, overwrite: i32) -> i32 {
    // SAFETY: C's contract; the copy fits the block: name, '=', value, NUL.
    unsafe {
        let Some(name) = name_of(name) else { return fail(EINVAL) as i32 };
        if overwrite == 0 && find(name).is_ok() {
            return 0;
        }
        let value = CStr::from_ptr(value).to_bytes_with_nul();
        let entry: *mut c_char = malloc(name.len() + 1 + value.len()).cast();
        if entry.is_null() {
            return fail(ENOMEM) as i32;
        }
        core::ptr::copy_nonoverlapping(name.as_ptr().cast(), entry, name.len());
        *entry.add(name.len()) = b'=' as c_char;
        core::ptr::copy_nonoverlapping(value.as_ptr().cast(), entry.add(name.len() + 1), value.len());
        put(name, entry)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn unsetenv(name: *const c_char) -> i32 {
    // SAFETY: C's contract. Entries move down within their vector, which a new thread shares with the World's copy of the
    // environment: so the first change makes a vector of the thread's own.
    unsafe {
        let Some(name) = name_of(name) else { return fail(EINVAL) as i32 };
        if find(name).is_err() {
            return 0;
        }
        let mut n = 0;
        while !(*environ.add(n)).is_null() {
            n += 1;
        }
        let vector: *mut *mut c_char = malloc((n + 1) * size_of::<*mut c_char>()).cast();
        if vector.is_null() {
            return fail(ENOMEM) as i32;
        }
        let mut kept = 0;
        for i in 0..n {
            let entry = *environ.add(i);
            if value_of(entry, name).is_none() {
                *vector.add(kept) = entry;
                kept += 1;
            }
        }
        *vector.add(kept) = null_mut();
        environ = vector;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn putenv(entry: *mut c_char) -> i32 {
    // SAFETY: C's contract: the string stays the caller's and stays alive.
    unsafe {
        let bytes = CStr::from_ptr(entry).to_bytes();
        match bytes.iter().position(|b| *b == b'=') {
            Some(0) => fail(EINVAL) as i32,
            Some(at) => put(&bytes[..at], entry),
            None => unsetenv(entry),
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn clearenv() -> i32 {
    // SAFETY: the running thread's own variable.
    unsafe { environ = null_mut() };
    0
}
