//! Whoever looks at a table of descriptors while others close some of it. One test, for the numbers of its process are at stake.

use linux_raw_sys::general as k;
use peregrine_sys::descriptors::out_of_the_way;
use peregrine_sys::elsewhere::{Table, close_elsewhere};
use peregrine_sys::raw::{check, syscall6};
use peregrine_sys::rustix;
use std::os::fd::AsRawFd;

/// A number that comes and goes would be taken for a program's, and be closed when it is a program's.
#[test]
fn those_who_close_use_no_numbers_of_programs() {
    for round in 0..300 {
        let (end, _other) = rustix::pipe::pipe().unwrap();
        // The one that the kernel gives next.
        let free = end.as_raw_fd();
        close_elsewhere(vec![out_of_the_way(end)], Table::EndsWithParent).unwrap();
        for _ in 0..2000 {
            // SAFETY: takes numbers.
            let used =
                check(unsafe { syscall6(k::__NR_fcntl, free as usize, k::F_GETFD as usize, 0, 0, 0, 0) });
            assert!(used.is_err(), "round {round}: {free} is open");
        }
    }
}
