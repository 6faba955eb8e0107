//! A domain's place in the file system: a socket at a path, of which exactly one living domain is the owner.
//!
//! ```text
//! bind and listen at  .peregrine-{random}  in the same directory      nobody looks for it there
//!   rename to the path, if nothing is there          ──▶ done
//!   else, under a lock of the directory:
//!     somebody listens there, or it is no socket     ──▶ PathInUse
//!     nobody does: it is a dead domain's             ──▶ rename over it: done
//! ```
//!
//! **Only listening sockets are ever seen at the path**, so one that refuses connections is dead and not about to listen. Takers take turns
//! by `flock` of the directory, which the kernel gives back if they die; the path is never empty meanwhile, so who finds it free does not
//! need the lock. Somebody who may read the directory can hold that lock: then nobody takes over, and is told so after a while.
//!
//! **The end.** A domain removes its path while it still listens, and only if the path is still its own: otherwise it could remove that of
//! a successor.

use crate::error::DomainError;
use crate::socket::new_socket;
use peregrine_sys::raw::Errno as RawErrno;
use peregrine_sys::rustix;
use peregrine_sys::rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use peregrine_sys::rustix::io::Errno;
use peregrine_sys::rustix::net::{self, SocketAddrUnix};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// How long takers wait for each other. Each needs microseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// A path that is a domain's own: removed when dropped, if it still is.
pub(crate) struct Place {
    path: PathBuf,
    /// Device and inode of the socket's file.
    file: (u64, u64),
}

impl Drop for Place {
    fn drop(&mut self) {
        if file_at(&self.path) == Some(self.file) {
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

fn file_at(path: &Path) -> Option<(u64, u64)> {
    rustix::fs::lstat(path).ok().map(|s| (s.st_dev, s.st_ino))
}

/// A listening socket at `path`. A socket that nobody serves any more is taken over; any other file is left alone.
pub(crate) fn listen(path: &Path) -> Result<(OwnedFd, Place), DomainError> {
    // What clients will need.
    let address = SocketAddrUnix::new(path).map_err(|_| DomainError::PathTooLong(path.to_owned()))?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory =
        rustix::fs::open(parent, flags, Mode::empty()).map_err(place(path, "open of its directory"))?;
    let (socket, hidden) = listen_hidden(&directory, parent, path)?;
    let placed = put(&directory, &hidden, path, &address);
    if placed.is_err() {
        let _ = rustix::fs::unlinkat(&directory, &hidden, AtFlags::empty());
    }
    placed?;
    // Nobody replaces what a living domain listens at.
    let file = file_at(path).ok_or_else(|| place(path, "lstat of the socket")(Errno::NOENT))?;
    Ok((socket, Place { path: path.to_owned(), file }))
}

fn place<'a>(path: &'a Path, what: &'static str) -> impl Fn(Errno) -> DomainError + 'a {
    move |e| DomainError::Place { path: path.to_owned(), what, errno: RawErrno(e.raw_os_error()) }
}

/// A socket that listens at a name of its own.
fn listen_hidden(directory: &OwnedFd, parent: &Path, path: &Path) -> Result<(OwnedFd, String), DomainError> {
    let mut random = [0; 8];
    peregrine_sys::random::fill(&mut random);
    let name = format!(".peregrine-{:016x}", u64::from_ne_bytes(random));
    // By the directory's descriptor: its path may be too long for a name like this behind it.
    let short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())).join(&name);
    let socket = new_socket().map_err(place(path, "socket"))?;
    let address =
        |path: &Path| SocketAddrUnix::new(path).map_err(|_| DomainError::PathTooLong(path.to_owned()));
    match net::bind(&socket, &address(&short)?) {
        // Without /proc.
        Err(Errno::NOENT) => net::bind(&socket, &address(&parent.join(&name))?),
        other => other,
    }
    .map_err(place(path, "bind"))?;
    net::listen(&socket, BACKLOG).map_err(place(path, "listen"))?;
    Ok((socket, name))
}

/// Gives the hidden socket its name.
fn put(directory: &OwnedFd, hidden: &str, path: &Path, address: &SocketAddrUnix) -> Result<(), DomainError> {
    let in_use = || DomainError::PathInUse(path.to_owned());
    if rename_if_free(directory, hidden, path).map_err(place(path, "rename"))? {
        return Ok(());
    }
    if !is_stale(path, address) {
        return Err(in_use());
    }
    lock(directory, path)?;
    // Somebody may have taken it over before we had the lock, or removed it.
    if rename_if_free(directory, hidden, path).map_err(place(path, "rename"))? {
        return Ok(());
    }
    if !is_stale(path, address) {
        return Err(in_use());
    }
    rustix::fs::renameat(directory, hidden, CWD, path)
        .map_err(place(path, "rename over a dead domain's socket"))
}

/// Whether nothing was there, and it is there now.
fn rename_if_free(directory: &OwnedFd, hidden: &str, path: &Path) -> Result<bool, Errno> {
    match rustix::fs::renameat_with(directory, hidden, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        // A file system that can't: a second name can't replace anything either.
        Err(Errno::INVAL | Errno::NOSYS) => {
            match rustix::fs::linkat(directory, hidden, CWD, path, AtFlags::empty()) {
                Ok(()) => rustix::fs::unlinkat(directory, hidden, AtFlags::empty()).map(|()| true),
                Err(Errno::EXIST) => Ok(false),
                Err(e) => Err(e),
            }
        }
        Err(e) => Err(e),
    }
}

/// Takes the directory's lock; it is given back with the descriptor.
fn lock(directory: &OwnedFd, path: &Path) -> Result<(), DomainError> {
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(place(path, "flock of its directory, whose lock somebody holds")(e)),
        }
    }
}

/// Whether `path` is a socket that nobody listens at. Any other file, a link, and a socket that we can't ask, is somebody's.
fn is_stale(path: &Path, address: &SocketAddrUnix) -> bool {
    let is_socket =
        rustix::fs::lstat(path).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Socket);
    // Not waiting: a listener that is stopped may have its queue full, and lives.
    let asked = || -> Result<(), Errno> {
        let socket = new_socket()?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        net::connect(&socket, address)
    };
    is_socket && asked() == Err(Errno::CONNREFUSED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_nobody_listens_at_is_taken_over() {
        use std::os::unix::net::UnixListener;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "precious").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        let other_kind = UnixListener::bind(at("stream")).unwrap();
        for name in ["file", "link", "stream"] {
            assert!(matches!(listen(&at(name)), Err(DomainError::PathInUse(_))), "{name}");
        }
        assert_eq!(std::fs::read(at("file")).unwrap(), b"precious");
        drop(other_kind);
        let living = listen(&at("stream")).unwrap();
        assert!(matches!(listen(&at("stream")), Err(DomainError::PathInUse(_))));
        std::mem::forget(living.1);
        drop(living.0);
        let (_, place) = listen(&at("stream")).unwrap();
        drop(place);
        assert!(!at("stream").exists(), "its own path is removed");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "and nothing else is left");
    }

    #[test]
    fn who_ends_does_not_remove_its_successors_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("domain");
        let (_old, place) = listen(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let (_new, successor) = listen(&path).unwrap();
        drop(place);
        assert!(path.exists());
        drop(successor);
        assert!(!path.exists());
    }

    #[test]
    fn where_no_socket_can_be_made_the_error_names_the_path_and_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no/such/directory/d.sock");
        let said = listen(&missing).map(drop).unwrap_err().to_string();
        assert!(
            said.contains(missing.to_str().unwrap()) && said.contains("make its directory first"),
            "{said}"
        );
        std::fs::write(dir.path().join("file"), "").unwrap();
        let said = listen(&dir.path().join("file/d.sock")).map(drop).unwrap_err().to_string();
        assert!(said.contains("make its directory first"), "{said}");
        // Root may write anywhere but here.
        let said = listen(Path::new("/proc/d.sock")).map(drop).unwrap_err().to_string();
        assert!(said.contains("/proc/d.sock: bind"), "{said}");
    }

    #[test]
    fn a_directory_with_a_long_name_has_room_for_a_domain() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(104 - dir.path().as_os_str().len()));
        std::fs::create_dir(&long).unwrap();
        listen(&long.join("d")).unwrap();
        assert!(matches!(listen(&long.join("dom")), Err(DomainError::PathTooLong(_))));
    }

    #[test]
    fn who_holds_the_lock_of_the_directory_keeps_nobody_from_a_free_path() {
        let dir = tempfile::tempdir().unwrap();
        let holder = std::fs::File::open(dir.path()).unwrap();
        rustix::fs::flock(&holder, FlockOperation::LockExclusive).unwrap();
        let (socket, place) = listen(&dir.path().join("domain")).unwrap();
        std::mem::forget(place);
        drop(socket);
        // Taking over needs it: refused after a while, and nothing is left behind.
        let refused = listen(&dir.path().join("domain"));
        assert!(matches!(refused, Err(DomainError::Place { .. })));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(holder);
        listen(&dir.path().join("domain")).unwrap();
    }
}
