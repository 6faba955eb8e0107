//! Descriptors of a file whose server does not answer: whoever closes one waits for that server, deaf to all signals.

use linux_raw_sys::general as g;
use peregrine_sys::descriptors::open_files;
use peregrine_sys::elsewhere::{Table, close_elsewhere};
use peregrine_sys::process::{self, ForkFlags, Forked, is_root};
use peregrine_sys::raw::{check, syscall6};
use peregrine_sys::rustix;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(30);

/// A file system of one file, `file`, whose server answers everything but that a descriptor of it is being closed (FLUSH).
struct Unanswered {
    at: CString,
    _dir: tempfile::TempDir,
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        // MNT_FORCE: whoever waits for the server is let go.
        // SAFETY: the path lives across the call.
        unsafe { syscall6(g::__NR_umount2, self.at.as_ptr() as usize, 1 | 2, 0, 0, 0, 0) };
    }
}

/// Mounts it; the server says each time that somebody closes. `None`: not permitted here.
fn mount() -> Option<(Unanswered, Receiver<()>)> {
    mount_at(tempfile::tempdir().unwrap(), Silent::WhenClosed)
}

/// What the server does not answer.
#[derive(Clone, Copy, PartialEq)]
enum Silent {
    WhenClosed,
    /// Nor what size a file has, and the like.
    WhenAsked,
}

fn mount_at(dir: tempfile::TempDir, silent: Silent) -> Option<(Unanswered, Receiver<()>)> {
    use rustix::fs::{Mode, OFlags};
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let at = CString::new(dir.path().as_os_str().as_bytes()).unwrap();
    let options =
        CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd())).unwrap();
    let (source, kind) = (c"peregrine-test", c"fuse");
    // SAFETY: all strings live across the call.
    let mounted = check(unsafe {
        syscall6(
            g::__NR_mount,
            source.as_ptr() as usize,
            at.as_ptr() as usize,
            kind.as_ptr() as usize,
            0,
            options.as_ptr() as usize,
            0,
        )
    });
    mounted.ok()?;
    let (tell, told) = channel();
    std::thread::spawn(move || serve(&device, silent, &tell));
    Some((Unanswered { at, _dir: dir }, told))
}

/// `struct fuse_attr` of the directory (1) and its file (2).
fn attributes(node: u64) -> Vec<u8> {
    let mut attributes = vec![0; 88];
    attributes[..8].copy_from_slice(&node.to_ne_bytes());
    let mode: u32 = if node == 1 { 0o40_755 } else { 0o100_644 };
    attributes[60..64].copy_from_slice(&mode.to_ne_bytes());
    attributes[64..68].copy_from_slice(&1u32.to_ne_bytes());
    attributes
}

fn serve(device: &OwnedFd, silent: Silent, tell: &Sender<()>) {
    // For how long the kernel need not ask again.
    let valid_s = if silent == Silent::WhenAsked { 0 } else { 1000 };
    let mut request = vec![0u8; 1 << 18];
    while let Ok(len) = rustix::io::read(device, &mut request) {
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        assert!(len >= 40);
        let words = |words: &[u64]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
        let (error, payload) = match word(4) {
            // LOOKUP, GETATTR, OPEN.
            1 => (0, [words(&[2, 0, valid_s, valid_s, 0]), attributes(2)].concat()),
            3 if silent == Silent::WhenAsked && long(16) == 2 => {
                let _ = tell.send(());
                continue;
            }
            3 => (0, [words(&[valid_s, 0]), attributes(long(16))].concat()),
            14 => (0, words(&[1, 0])),
            // INIT: version 7.31, and what may be asked for at once.
            26 => {
                (0, [words(&[7 | 31 << 32, 65_536, 12 | 10 << 16 | 65_536 << 32, 1]), vec![0; 32]].concat())
            }
            // FLUSH.
            25 => {
                let _ = tell.send(());
                continue;
            }
            // FORGET, INTERRUPT, BATCH_FORGET: nothing is expected.
            2 | 36 | 42 => continue,
            _ => (-38i32, Vec::new()),
        };
        let mut answer = (16 + payload.len() as u32).to_ne_bytes().to_vec();
        answer.extend(error.to_ne_bytes());
        answer.extend(long(8).to_ne_bytes());
        answer.extend(payload);
        let _ = rustix::io::write(device, &answer);
    }
}

fn nobody_here_waits_for_a_server_that_does_not_answer() -> testkit::Outcome {
    if !is_root() {
        testkit::skip!("needs root, to mount a file system in user space");
    }
    let Some((files, told)) = mount() else { testkit::skip!("needs /dev/fuse, and to be allowed to mount") };
    let path = Path::new(std::ffi::OsStr::from_bytes(files.at.as_bytes())).join("file");
    let file = OwnedFd::from(std::fs::File::open(&path).unwrap());
    let (here, begun) = (format!("/proc/self/fd/{}", file.as_raw_fd()), Instant::now());
    close_elsewhere(vec![file], Table::EndsSometime).unwrap();
    told.recv_timeout(LONG).expect("somebody closes it");
    assert!(begun.elapsed() < LONG, "it was waited for");
    assert!(std::fs::read_link(&here).ok().as_deref() != Some(&path), "it is in our table still");
    // That it would have been: a thread that closes one does not come back before the server is gone.
    let (done, is_done) = channel();
    std::thread::spawn(move || {
        // Not before: the process that keeps the last copy of the first would close its copy of this one, and the server would tell of that.
        drop(std::fs::File::open(&path).unwrap());
        let _ = done.send(());
    });
    told.recv_timeout(LONG).expect("the thread closes it");
    assert!(is_done.try_recv().is_err(), "the thread waits");
    drop(files);
    is_done.recv_timeout(LONG).expect("let go with the mount");
    testkit::Outcome::Passed
}

/// A process of the shape of a node: it shares its table with another, and both end with their parent. What the closer is held by keeps nothing else
/// open beyond that.
fn what_else_is_open_ends_with_those_who_share_the_table() -> testkit::Outcome {
    if !is_root() {
        testkit::skip!("needs root, to mount a file system in user space");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let ((go, goes), (ended, open)) = (pipe(), pipe());
    // SAFETY: this process has one thread yet, and so have its copies.
    let fork = |flags| unsafe { process::fork_with(flags) }.unwrap();
    let Forked::Parent(parent) = fork(ForkFlags::default()) else {
        process::die_with_parent();
        drop((goes, ended));
        if let Forked::Child = fork(ForkFlags::default()) {
            process::die_with_parent();
            // The second shares the table of the first, whose sibling it is.
            if let Forked::Child = fork(ForkFlags { share_files: true, sibling: true }) {
                process::die_with_parent();
                rustix::io::read(&go, &mut [0]).unwrap();
                let slow = OwnedFd::from(std::fs::File::open(&path).unwrap());
                close_elsewhere(vec![slow], Table::EndsWithParent).unwrap();
            }
        } else {
            drop((go, open));
        }
        loop {
            std::thread::park();
        }
    };
    drop((go, open));
    let Some((files, told)) = mount_at(dir, Silent::WhenClosed) else {
        testkit::skip!("needs /dev/fuse, and to be allowed to mount")
    };
    drop(goes);
    told.recv_timeout(LONG).expect("somebody closes it");
    let is_over = |wait: Duration| {
        let mut fds = [rustix::event::PollFd::new(&ended, rustix::event::PollFlags::IN)];
        let wait = rustix::time::Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&wait)).unwrap() > 0
    };
    assert!(!is_over(Duration::from_secs(1)), "all that share the table live");
    peregrine_sys::signal::kill(parent, peregrine_sys::signal::number::KILL).unwrap();
    process::wait_for(parent).unwrap();
    assert!(is_over(LONG), "the pipe is open though all who had it are gone");
    drop(files);
    testkit::Outcome::Passed
}

/// Who lists descriptors is told about each, and waits for nobody.
fn who_lists_what_is_open_asks_no_server() -> testkit::Outcome {
    if !is_root() {
        testkit::skip!("needs root, to mount a file system in user space");
    }
    let Some((files, told)) = mount_at(tempfile::tempdir().unwrap(), Silent::WhenAsked) else {
        testkit::skip!("needs /dev/fuse, and to be allowed to mount")
    };
    let path = Path::new(std::ffi::OsStr::from_bytes(files.at.as_bytes())).join("file");
    // Not closed if this fails: that would wait.
    let number = std::fs::File::open(&path).unwrap().into_raw_fd();
    let (done, is_done) = channel();
    std::thread::spawn(move || {
        let table = std::fs::File::open("/proc/self/fd").unwrap();
        let _ = done.send(open_files(table.as_fd()).unwrap());
    });
    let listed = is_done.recv_timeout(LONG).expect("it waits for the server");
    assert!(listed.iter().any(|(n, _)| *n == number), "{number} is open");
    assert!(told.try_recv().is_err(), "the server was asked");
    // SAFETY: opened above, and nobody else's.
    close_elsewhere(vec![unsafe { OwnedFd::from_raw_fd(number) }], Table::EndsSometime).unwrap();
    told.recv_timeout(LONG).expect("somebody closes it");
    drop(files);
    testkit::Outcome::Passed
}

fn main() -> std::process::ExitCode {
    testkit::main(testkit::tests![
        nobody_here_waits_for_a_server_that_does_not_answer,
        what_else_is_open_ends_with_those_who_share_the_table,
        who_lists_what_is_open_asks_no_server,
    ])
}
