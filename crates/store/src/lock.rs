//! One life at a time: a lock that the kernel drops when the life is dead, and no clock.
//!
//! The lock is `flock` on `DIR/lock`. It belongs to the open file, so every process that inherits the descriptor holds it too:
//! one that was forked after the lock was taken keeps the store locked until it is gone. A World forks its nodes before, so that a
//! supervisor that was killed leaves the store to the next life at once; nodes write nothing there. The descriptor is close-on-exec.
//! The file's text is the process that took the lock, for the error message only.

use crate::error::{Result, StoreError};
use crate::step::reach;
use peregrine_sys::rustix::fs::{FlockOperation, flock};
use peregrine_sys::rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Holding it is being the life that runs.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of the store at `store`.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if a life holds it.
    pub(crate) fn take(path: &Path, store: &Path) -> Result<Self> {
        let open = || {
            reach("open lock", path)?;
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
        };
        let mut file = open().map_err(StoreError::io("open the lock", path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(StoreError::InUse { path: store.to_path_buf(), pid: read_pid(&mut file) });
            }
            Err(e) => return Err(StoreError::io("lock", path)(e.into())),
        }
        let mut sign = || -> io::Result<()> {
            reach("sign lock", path)?;
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        sign().map_err(StoreError::io("write the lock", path))?;
        Ok(Self { _file: file })
    }
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.strip_suffix('\n')?.parse().ok()
}
