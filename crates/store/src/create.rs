//! Making a store. The file `format` is made last, so a directory is a store as a whole or not yet.
//!
//! A death half-way leaves a directory that only holds names of ours and no `format`; the next `create` goes on with it.
//! The lock is taken first, so two creators don't meet.

use crate::disk::{self, Writing};
use crate::error::{Result, StoreError};
use crate::format::{Format, executable_name};
use crate::lock::Lock;
use crate::paths::Paths;
use crate::store::{DEFAULT_MAX_DELTAS, Store};
use peregrine_image::{BuildId, Mark, WorldId};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

impl Store {
    /// Makes a store at `dir`, which must be new or empty, with a copy of `executable`, and opens it.
    ///
    /// # Errors
    /// [`StoreError::Exists`] and [`StoreError::NotEmpty`] for the directory; [`StoreError::InUse`] while another
    /// process creates it; [`StoreError::WrongExecutable`] if the hash of the copied bytes is not `build`;
    /// [`StoreError::Io`].
    ///
    /// # Examples
    /// ```
    /// use peregrine_store::{Store, WorldId, build_id_of};
    /// # let scratch = tempfile::tempdir()?;
    /// # let dir = scratch.path().join("store");
    /// let program = std::env::current_exe()?;
    /// let store = Store::create(&dir, WorldId::random()?, &program, build_id_of(&program)?)?;
    /// assert!(store.sequences()?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn create(dir: impl AsRef<Path>, world: WorldId, executable: &Path, build: BuildId) -> Result<Self> {
        let dir = std::path::absolute(&dir).map_err(StoreError::io("find", dir.as_ref()))?;
        let paths = Paths::new(dir);
        disk::make_directory(paths.root())?;
        refuse_foreign(&paths)?;
        let lock = Lock::take(&paths.lock(), paths.root())?;
        refuse_foreign(&paths)?;
        for name in Paths::DIRECTORIES {
            disk::make_directory(&paths.directory(name))?;
        }
        let format = Format { world, build, executable: executable_name(executable) };
        empty(&paths, "tmp")?;
        empty(&paths, "bin")?;
        disk::remove(&paths.released())?;

        copy_executable(&paths, &format, executable)?;
        let mark = Mark { world, count: 0, released: 0 };
        make(&paths, 1, &paths.released(), &mark.to_file())?;
        for name in Paths::DIRECTORIES {
            disk::sync_directory(&paths.directory(name))?;
        }
        disk::sync_directory(paths.root())?;
        make(&paths, 2, &paths.format(), format.to_text().as_bytes())?;
        disk::sync_directory(paths.root())?;
        if let Some(parent) = paths.root().parent() {
            disk::sync_directory(parent)?;
        }

        let mut store = Self { paths, format, held: None, max_deltas: DEFAULT_MAX_DELTAS };
        store.hold(lock)?;
        Ok(store)
    }
}

fn refuse_foreign(paths: &Paths) -> Result<()> {
    let names = disk::list(paths.root())?;
    let ours =
        |name: &&String| Paths::DIRECTORIES.contains(&name.as_str()) || Paths::FILES.contains(&name.as_str());
    if let Some(entry) = names.iter().find(|name| !ours(name)) {
        return Err(StoreError::NotEmpty { path: paths.root().to_path_buf(), entry: entry.clone() });
    }
    if names.iter().any(|name| name == "format") {
        let format = Format::parse(&paths.format(), &disk::read(&paths.format())?)?;
        return Err(StoreError::Exists { path: paths.root().to_path_buf(), world: format.world });
    }
    for directory in ["world", "threads", "output", "generation"] {
        let holds_something = names.iter().any(|name| name == directory)
            && !disk::list(&paths.directory(directory))?.is_empty();
        if holds_something {
            // A store that lost its `format`, perhaps: its images are not ours to build on.
            let entry = format!("{directory}/…");
            return Err(StoreError::NotEmpty { path: paths.root().to_path_buf(), entry });
        }
    }
    Ok(())
}

fn empty(paths: &Paths, directory: &str) -> Result<()> {
    for name in disk::list(&paths.directory(directory))? {
        disk::remove(&paths.directory(directory).join(name))?;
    }
    Ok(())
}

fn make(paths: &Paths, n: u64, name: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = Writing::create(paths.temporary(n), 0o600)?;
    file.write_all(bytes).map_err(StoreError::io("write", name))?;
    disk::sync_file(&file.file, &file.path)?;
    publish_new(&file.path, name)
}

fn publish_new(from: &Path, name: &Path) -> Result<()> {
    if disk::publish(from, name)? {
        return Ok(());
    }
    Err(StoreError::io("create", name)(io::ErrorKind::AlreadyExists.into()))
}

fn copy_executable(paths: &Paths, format: &Format, from: &Path) -> Result<()> {
    let reading = || StoreError::io("read the executable", from);
    let mut source = File::open(from).map_err(reading())?;
    let name = paths.executable(&format.executable);
    let mut copy = Writing::create(paths.temporary(0), 0o700)?;
    let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; 1 << 20]);
    loop {
        let n = source.read(&mut piece).map_err(reading())?;
        if n == 0 {
            break;
        }
        hasher.update(&piece[..n]);
        copy.write_all(&piece[..n]).map_err(StoreError::io("write", &name))?;
    }
    let found = BuildId::from_bytes(*hasher.finalize().as_bytes());
    if found != format.build {
        return Err(StoreError::WrongExecutable { path: from.to_path_buf(), found, expected: format.build });
    }
    disk::sync_file(&copy.file, &copy.path)?;
    publish_new(&copy.path, &name)
}
