//! A thread whose child waits between its start and its program: it opens a named pipe first, that nobody writes to yet. A test
//! links it static, at a fixed address, where the child's stack lies in the thread's slot, and kills the node meanwhile.

use std::ffi::{CString, c_char};

/// glibc's `posix_spawn_file_actions_t`.
#[repr(C, align(8))]
struct Actions([u8; 80]);

unsafe extern "C" {
    fn posix_spawn_file_actions_init(actions: *mut Actions) -> i32;
    fn posix_spawn_file_actions_addopen(
        actions: *mut Actions,
        fd: i32,
        path: *const c_char,
        flags: i32,
        mode: u32,
    ) -> i32;
    fn posix_spawn(
        pid: *mut i32,
        path: *const c_char,
        actions: *const Actions,
        attributes: *const u8,
        argv: *const *const c_char,
        envp: *const *const c_char,
    ) -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
}

fn starts(fifo: String) -> i32 {
    let (fifo, program) = (CString::new(fifo).expect("no zeros"), c"/bin/true");
    let (mut actions, mut pid, mut status) = (Actions([0; 80]), 0, -1);
    let (argv, envp) = ([program.as_ptr(), std::ptr::null()], [std::ptr::null()]);
    // SAFETY: C's contract: all live through the calls, the lists end with null. 0 is O_RDONLY.
    unsafe {
        assert_eq!(posix_spawn_file_actions_init(&mut actions), 0);
        assert_eq!(posix_spawn_file_actions_addopen(&mut actions, 0, fifo.as_ptr(), 0, 0), 0);
        let (argv, envp) = (argv.as_ptr(), envp.as_ptr());
        assert_eq!(posix_spawn(&mut pid, program.as_ptr(), &actions, std::ptr::null(), argv, envp), 0);
        assert_eq!(waitpid(pid, &mut status, 0), pid);
    }
    status
}

#[peregrine::main]
fn main() {
    let fifo = std::env::args().nth(1).expect("a named pipe");
    let starter = peregrine::Builder::new().node(1).spawn(starts, fifo).expect("a thread");
    println!("status {}", starter.join().expect("the child became its program"));
}
