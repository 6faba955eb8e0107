//! Where running Worlds are found: one socket each, in a directory that is this user's alone.
//!
//! ```text
//!   $XDG_RUNTIME_DIR/peregrine, or /tmp/peregrine-UID      mode 0700, owned by the user, not a symbolic link
//!     1234.sock     the World whose supervisor is process 1234
//!     .1234         the same before it listens: a name without a listener is never visible
//! ```
//!
//! A name whose World is gone is inert: nobody accepts, so whoever comes across it removes it.

use peregrine_sys::rustix;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why the directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RendezvousError {
    /// It can't be made or looked at.
    #[error("cannot use {path}: {source}; set XDG_RUNTIME_DIR to a directory of your own", path = path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Somebody else could put names there.
    #[error("{path} is not safe: {why}; remove it, or set XDG_RUNTIME_DIR to a directory of your own", path = path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
}

/// This user's directory, made if there is none.
pub(crate) fn directory() -> Result<PathBuf, RendezvousError> {
    let uid = rustix::process::getuid().as_raw();
    let path = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if Path::new(&dir).is_absolute() => Path::new(&dir).join("peregrine"),
        _ => PathBuf::from(format!("/tmp/peregrine-{uid}")),
    };
    match fs::DirBuilder::new().mode(0o700).create(&path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(RendezvousError::Directory { path, source: e });
        }
        _ => {}
    }
    // Not following a link: its target would be somebody else's choice.
    let meta = match fs::symlink_metadata(&path) {
        Ok(m) => m,
        Err(source) => return Err(RendezvousError::Directory { path, source }),
    };
    let why = if !meta.is_dir() {
        "it is not a directory"
    } else if meta.uid() != uid {
        "it belongs to another user"
    } else if meta.mode() & 0o077 != 0 {
        "others may enter it (its mode must be 0700)"
    } else {
        return Ok(path);
    };
    Err(RendezvousError::Unsafe { path, why })
}

/// A name in the directory, and the socket behind it.
#[derive(Debug)]
pub(crate) struct Place {
    path: PathBuf,
    pub listener: UnixListener,
}

impl Place {
    /// Listens under the name of process `pid`.
    pub(crate) fn take(pid: u32) -> Result<Self, RendezvousError> {
        let dir = directory()?;
        drop(listening(&dir));
        let (hidden, path) = (dir.join(format!(".{pid}")), dir.join(format!("{pid}.sock")));
        // Whatever has our own process id in its name is not alive.
        let _ = fs::remove_file(&hidden);
        let failed = |source| RendezvousError::Directory { path: dir.clone(), source };
        let listener = UnixListener::bind(&hidden).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        fs::rename(&hidden, &path).map_err(failed)?;
        Ok(Self { path, listener })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Connections to this user's Worlds, by process id. Names of Worlds that are gone are removed. A World that is stopped, and has
/// more connections waiting than the kernel keeps, is left out.
///
/// # Errors
/// [`RendezvousError`].
pub fn connect_all() -> Result<Vec<(u32, UnixStream)>, RendezvousError> {
    Ok(listening(&directory()?))
}

fn listening(dir: &Path) -> Vec<(u32, UnixStream)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name.strip_prefix('.').is_some_and(is_of_nobody) {
            // Its World was killed before it had its name.
            let _ = fs::remove_file(entry.path());
        }
        let Some(pid) = name.strip_suffix(".sock").and_then(|n| n.parse::<u32>().ok()) else { continue };
        match connect(&entry.path()) {
            Ok(stream) if is_mine(&stream) => {
                let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
                found.push((pid, stream));
            }
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                let _ = fs::remove_file(entry.path());
            }
            Err(_) => {}
        }
    }
    found.sort_by_key(|(pid, _)| *pid);
    found
}

/// Whether this is the number of a process that is gone.
fn is_of_nobody(pid: &str) -> bool {
    pid.parse::<u32>().is_ok_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// Connects without waiting: the queue of a World that is stopped fills up, and then `connect(2)` would wait for it.
fn connect(path: &Path) -> io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Whether the process at the other end is this user's (`SO_PEERCRED`).
pub(crate) fn is_mine(stream: &UnixStream) -> bool {
    let peer = peregrine_sys::peer::credentials_of(stream);
    peer.is_ok_and(|[_, uid, _]| uid == rustix::process::getuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};

    #[test]
    fn a_world_that_is_stopped_holds_nobody_up_and_one_that_is_gone_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let serve = |name: &str, queue: i32| {
            let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
            bind(&listener, &SocketAddrUnix::new(dir.path().join(name)).unwrap()).unwrap();
            listen(&listener, queue).unwrap();
            listener
        };
        let (_stopped, _alive) = (serve("1.sock", 0), serve("2.sock", 8));
        drop(serve("3.sock", 8));
        // Beyond the largest number that a process can have; and this one's.
        let (gone, mine) = (dir.path().join(".4194305"), dir.path().join(format!(".{}", std::process::id())));
        fs::write(&gone, b"").unwrap();
        fs::write(&mine, b"").unwrap();
        // The kernel keeps one connection more than it is told.
        let _waiting = UnixStream::connect(dir.path().join("1.sock")).unwrap();
        let (told, found) = std::sync::mpsc::channel();
        let path = dir.path().to_owned();
        std::thread::spawn(move || told.send(listening(&path).iter().map(|w| w.0).collect::<Vec<_>>()));
        let found =
            found.recv_timeout(Duration::from_secs(10)).expect("it waits for a World that is stopped");
        assert_eq!(found, [2]);
        assert!(dir.path().join("1.sock").exists() && !dir.path().join("3.sock").exists());
        assert!(mine.exists() && !gone.exists());
    }
}
