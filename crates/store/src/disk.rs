//! The few things that a store does to a disk, each announced ([`step`](crate::step)) and each with an error that names
//! the path.
//!
//! A file is made in three moves, and nobody can see it before the last:
//!
//! ```text
//! tmp/7 ── write ──▶ tmp/7, whole ── fsync ──▶ tmp/7, durable ── rename, refusing to replace ──▶ world/12
//! ```
//!
//! The rename is `renameat2(RENAME_NOREPLACE)`; where a filesystem does not know that flag it is `link` and `unlink`,
//! which is as exclusive (a death between the two leaves a second name in `tmp`, which the next life removes).

use crate::error::{Result, StoreError};
use crate::step::reach;
use peregrine_sys::rustix::fs::{CWD, RenameFlags, renameat_with, syncfs};
use peregrine_sys::rustix::io::Errno;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file that is being written under a temporary name.
#[derive(Debug)]
pub(crate) struct Writing {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    /// Whether the last write was cut to its first half, as every second one is under test.
    torn: bool,
}

impl Writing {
    pub(crate) fn create(path: PathBuf, mode: u32) -> Result<Self> {
        let create = || {
            reach("create", &path)?;
            OpenOptions::new().write(true).create_new(true).mode(mode).open(&path)
        };
        let file = create().map_err(StoreError::io("create", &path))?;
        Ok(Self { file, path, torn: false })
    }
}

impl Write for Writing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        reach("write", &self.path)?;
        // Under test a write is torn in two, so that a death can fall between the halves.
        self.torn = cfg!(feature = "killpoints") && !self.torn;
        self.file.write(if self.torn { &bytes[..bytes.len().div_ceil(2)] } else { bytes })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes a directory for this user alone. One that is there already is as good; says whether it is new.
pub(crate) fn make_directory(path: &Path) -> Result<bool> {
    let make = || {
        reach("mkdir", path)?;
        DirBuilder::new().mode(0o700).create(path)
    };
    match make() {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(false),
        Err(e) => Err(StoreError::io("make the directory", path)(e)),
    }
}

/// Makes what was written to `file` durable.
pub(crate) fn sync_file(file: &File, path: &Path) -> Result<()> {
    reach("fsync", path).and_then(|()| file.sync_all()).map_err(StoreError::io("make durable", path))
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    let sync = || {
        reach("fsync directory", path)?;
        File::open(path)?.sync_all()
    };
    sync().map_err(StoreError::io("make durable the directory", path))
}

/// Makes everything on the filesystem of `file` durable.
pub(crate) fn sync_filesystem(file: &File, path: &Path) -> Result<()> {
    let sync = || {
        reach("syncfs", path)?;
        Ok(syncfs(file)?)
    };
    sync().map_err(StoreError::io("make durable the filesystem of", path))
}

/// Gives `from` the name `to`. Says `false`, and leaves `from`, if that name is taken.
pub(crate) fn publish(from: &Path, to: &Path) -> Result<bool> {
    let rename = || {
        reach("rename", to)?;
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => link_instead(from, to),
            other => Ok(other?),
        }
    };
    match rename() {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(StoreError::io("create", to)(e)),
    }
}

fn link_instead(from: &Path, to: &Path) -> io::Result<()> {
    fs::hard_link(from, to)?;
    // The name is there, so this has succeeded whatever becomes of the other one, which the next life removes.
    let _ = reach("unlink", from).and_then(|()| fs::remove_file(from));
    Ok(())
}

/// Removes a file; one that is gone already is as good.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match reach("unlink", path).and_then(|()| fs::remove_file(path)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Removes an empty directory.
pub(crate) fn remove_directory(path: &Path) -> Result<()> {
    reach("rmdir", path)
        .and_then(|()| fs::remove_dir(path))
        .map_err(StoreError::io("remove the directory", path))
}

/// All bytes of a file.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(StoreError::io("read", path))
}

/// The names in a directory, sorted. A name that is not UTF-8 is nobody's here and comes with its bytes replaced.
pub(crate) fn list(path: &Path) -> Result<Vec<String>> {
    let list = || -> io::Result<Vec<String>> {
        fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    let mut names = list().map_err(StoreError::io("list", path))?;
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "killpoints")]
    #[test]
    fn a_name_that_was_given_counts_though_the_old_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, "x").unwrap();
        let watching = crate::step::watch(|step| match step.name {
            "unlink" => Err(Errno::ROFS.into()),
            _ => Ok(()),
        });
        link_instead(&from, &to).unwrap();
        drop(watching);
        assert_eq!(list(dir.path()).unwrap(), ["from", "to"]);
    }

    #[test]
    fn both_ways_of_publishing_refuse_a_name_that_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        fs::write(&a, "a").unwrap();
        fs::write(&b, "b").unwrap();
        assert!(!publish(&a, &b).unwrap());
        assert_eq!(link_instead(&a, &b).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        link_instead(&a, &c).unwrap();
        assert!(publish(&c, &a).unwrap());
        assert_eq!(list(dir.path()).unwrap(), ["a", "b"]);
        assert_eq!((fs::read(&a).unwrap(), fs::read(&b).unwrap()), (b"a".to_vec(), b"b".to_vec()));
    }
}
