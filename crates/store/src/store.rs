//! Opening a store, and what an open one knows.
//!
//! ```text
//! create ──┐
//!          ├─▶ Store (lock held) ── latest() ──▶ WorldImage ──▶ pages(), unreleased()
//! open  ───┘        │                                │
//!                   └── claim_generation(from) ◀─────┘ ──▶ begin ─ … ─ finish, begin ─ … ─ finish, …
//! ```
//!
//! Opening reads only `DIR/format`. An image is read when asked for, and a life can commit only after it has said which
//! image it goes on from: that is what the chains of its first commit build on.

use crate::disk;
use crate::error::{Misuse, Result, StoreError};
use crate::format::Format;
use crate::lock::Lock;
use crate::paths::{Paths, parse_number, parse_sequence};
use crate::released::ReleasedMark;
use peregrine_image::{BuildId, ChunkRef, Generation, Member, Sequence, ThreadId, WorldId};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// How many deltas a thread's chain may have before the store asks for all pages.
pub const DEFAULT_MAX_DELTAS: usize = 16;

/// A directory of images, held by one life, or open for reading only.
#[derive(Debug)]
pub struct Store {
    pub(crate) paths: Paths,
    pub(crate) format: Format,
    pub(crate) held: Option<Held>,
    pub(crate) max_deltas: usize,
}

/// What comes with the lock.
#[derive(Debug)]
pub(crate) struct Held {
    _lock: Lock,
    /// The store's directory, open since the life began: `syncfs` reports what failed to be written since then.
    pub(crate) root: File,
    pub(crate) mark: ReleasedMark,
    /// The generation that a life may claim, as seen at opening: of two that saw the same number one gets it.
    pub(crate) free_generation: Generation,
    pub(crate) life: Option<Life>,
    pub(crate) next_temporary: u64,
    /// Why no commit may follow.
    pub(crate) stopped: Option<String>,
}

/// A life that may commit.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) generation: Generation,
    pub(crate) previous: Option<Sequence>,
    pub(crate) next: Sequence,
    pub(crate) chains: BTreeMap<ThreadId, Vec<Member>>,
    pub(crate) chunks: Vec<ChunkRef>,
    pub(crate) output_end: u64,
}

/// The store's copy of the program that wrote its images.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Executable {
    /// Where it lies.
    pub path: PathBuf,
    /// Hash of its bytes, as recorded when the store was created.
    pub build: BuildId,
}

/// The build id of the executable at `path`: the BLAKE3 hash of its bytes.
///
/// # Errors
/// If it can't be read.
pub fn build_id_of(path: &Path) -> Result<BuildId> {
    let hash = || -> io::Result<BuildId> {
        let mut file = File::open(path)?;
        let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut piece)? {
                0 => return Ok(BuildId::from_bytes(*hasher.finalize().as_bytes())),
                n => hasher.update(&piece[..n]),
            };
        }
    };
    hash().map_err(StoreError::io("read", path))
}

impl Store {
    /// Opens the store at `dir` for a life of its world, and removes what earlier lives left unfinished.
    ///
    /// # Errors
    /// [`StoreError::NotAStore`]; [`StoreError::InUse`] while a life runs; [`StoreError::FormatDamaged`] and
    /// [`StoreError::FormatVersion`]; [`StoreError::Damaged`] for the released mark; [`StoreError::Io`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let mut store = Self::open_read_only(dir)?;
        let lock = Lock::take(&store.paths.lock(), store.paths.root())?;
        store.hold(lock)?;
        Ok(store)
    }

    /// Opens the store at `dir` to look at it, whether or not a life runs. What such a life prunes meanwhile is gone.
    ///
    /// # Errors
    /// As [`open`](Self::open), without `InUse`.
    pub fn open_read_only(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = std::path::absolute(&dir).map_err(StoreError::io("find", dir.as_ref()))?;
        let not_a_store = |why| StoreError::NotAStore { path: dir.clone(), why };
        match std::fs::metadata(&dir) {
            Ok(found) if !found.is_dir() => return Err(not_a_store("it is not a directory")),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(not_a_store("there is nothing")),
            Err(e) => return Err(StoreError::io("open", &dir)(e)),
            Ok(_) => {}
        }
        let paths = Paths::new(dir.clone());
        let bytes = match std::fs::read(paths.format()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(not_a_store(
                    "it has no file named format, so its creation was not finished, or never begun",
                ));
            }
            other => other.map_err(StoreError::io("read", paths.format()))?,
        };
        let format = Format::parse(&paths.format(), &bytes)?;
        Ok(Self { paths, format, held: None, max_deltas: DEFAULT_MAX_DELTAS })
    }

    /// Takes possession of the store under `lock`.
    pub(crate) fn hold(&mut self, lock: Lock) -> Result<()> {
        let root = self.paths.root();
        let held = Held {
            _lock: lock,
            root: File::open(root).map_err(StoreError::io("open", root))?,
            mark: ReleasedMark::open(self.paths.released(), self.format.world)?,
            free_generation: self.first_free_generation()?,
            life: None,
            next_temporary: 0,
            stopped: None,
        };
        for name in disk::list(&self.paths.directory("tmp"))? {
            disk::remove(&self.paths.directory("tmp").join(name))?;
        }
        // A life that died in a commit may have made directories there, whose names nobody has made durable.
        disk::sync_directory(&self.paths.directory("threads"))?;
        self.held = Some(held);
        Ok(())
    }

    fn first_free_generation(&self) -> Result<Generation> {
        let names = disk::list(&self.paths.directory("generation"))?;
        let highest = names.iter().filter_map(|name| parse_number(name)).max().unwrap_or(0);
        let free = highest.checked_add(1).ok_or(Misuse::NumbersUsedUp)?;
        Ok(Generation::new(free))
    }

    /// The store's directory.
    pub fn path(&self) -> &Path {
        self.paths.root()
    }

    /// The world whose images these are.
    pub fn world(&self) -> WorldId {
        self.format.world
    }

    /// The executable that wrote the images, to be run by a resume.
    pub fn executable(&self) -> Executable {
        let path = self.paths.executable(&self.format.executable);
        Executable { path, build: self.format.build }
    }

    /// The sequences of all images of the world, in rising order, damaged ones included.
    ///
    /// # Errors
    /// If the directory can't be listed.
    pub fn sequences(&self) -> Result<Vec<Sequence>> {
        let names = disk::list(&self.paths.directory("world"))?;
        let mut sequences: Vec<_> = names.iter().filter_map(|name| parse_sequence(name)).collect();
        sequences.sort_unstable();
        Ok(sequences)
    }

    /// Sets after how many deltas [`wants_full`](crate::Commit::wants_full) asks for all pages of a thread.
    pub fn set_max_deltas(&mut self, deltas: usize) {
        self.max_deltas = deltas;
    }

    pub(crate) fn held(&self) -> Result<&Held> {
        self.held.as_ref().ok_or(StoreError::Misuse(Misuse::ReadOnly))
    }

    pub(crate) fn held_mut(&mut self) -> Result<&mut Held> {
        self.held.as_mut().ok_or(StoreError::Misuse(Misuse::ReadOnly))
    }
}

impl Held {
    pub(crate) fn life(&self) -> Result<&Life> {
        self.life.as_ref().ok_or(StoreError::Misuse(Misuse::NoGeneration))
    }
}
