//! What can go wrong with a store, each with its numbers and its remedy.

use peregrine_image::{BuildId, Generation, ImageError, Sequence, ThreadId, WorldId, WriteError};
use std::io;
use std::path::PathBuf;

/// The result of an operation on a store.
pub type Result<T, E = StoreError> = core::result::Result<T, E>;

/// Why an operation on a store failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The kernel refused. The message says what to do about the common causes.
    #[error("cannot {doing} {}: {source}; {}", path.display(), remedy(source))]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The directory is not a store.
    #[error("{} is not a store: {why}; create one with a run that names it as its store", path.display())]
    NotAStore {
        /// The directory.
        path: PathBuf,
        /// How that was seen.
        why: &'static str,
    },
    /// A store is already there.
    #[error("{} is a store already (world {world}); resume it, or name another directory", path.display())]
    Exists {
        /// The directory.
        path: PathBuf,
        /// The world in it.
        world: WorldId,
    },
    /// The directory holds something else.
    #[error(
        "{} is not empty (it holds {entry:?}) and not a store; name a new or an empty directory", path.display()
    )]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One of its entries.
        entry: String,
    },
    /// A life of this world runs.
    #[error(
        "{} is in use by {}: a world runs in one place only; stop that life, or wait: the kernel ends its hold \
         when the last of its processes is gone", path.display(),
        pid.map_or("a process that has not yet written its id".into(), |pid| format!("process {pid} or one that it started"))
    )]
    InUse {
        /// The store.
        path: PathBuf,
        /// The process that took the lock, if it had written its id yet.
        pid: Option<u32>,
    },
    /// The file that says what the store is can't be read as such.
    #[error("{} is damaged ({why}); restore it from a copy: the images are not touched by this", path.display())]
    FormatDamaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The store has another format than this build knows.
    #[error("{} says store format {found}, this build knows {supported}; use the build that wrote it", path.display())]
    FormatVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version of this build.
        supported: u32,
    },
    /// The executable was not what its build id says.
    #[error(
        "{} has build id {found}, not {expected}: it was replaced or damaged; start again from the right one",
        path.display()
    )]
    WrongExecutable {
        /// The executable.
        path: PathBuf,
        /// Hash of the file.
        found: BuildId,
        /// Hash that it should have.
        expected: BuildId,
    },
    /// A file is damaged.
    #[error("{}: {source}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// A file is intact and is not the one that the manifest means.
    #[error(
        "{} is not the file that image {sequence} was committed with: its {field} is {found}, not {expected}; \
         restore it from a copy of the same store", path.display()
    )]
    Replaced {
        /// The file.
        path: PathBuf,
        /// The world image that names it.
        sequence: Sequence,
        /// What differs.
        field: &'static str,
        /// Its value in the file.
        found: String,
        /// Its value in the manifest.
        expected: String,
    },
    /// An image of another world lies in the store.
    #[error("{} belongs to world {found}, the store to world {expected}; put it back where it came from", path.display())]
    ForeignWorld {
        /// The file.
        path: PathBuf,
        /// Its world.
        found: WorldId,
        /// The store's world.
        expected: WorldId,
    },
    /// The image was written by another build.
    #[error(
        "{} was written by build {image}, this is build {this}: its memory means nothing here; run {} instead",
        path.display(), executable.display()
    )]
    ForeignBuild {
        /// The image.
        path: PathBuf,
        /// The build that wrote it.
        image: BuildId,
        /// The build that was to read it.
        this: BuildId,
        /// The store's copy of the right executable.
        executable: PathBuf,
    },
    /// Nothing was committed yet.
    #[error("{} holds no image yet: there is nothing to resume; run the program from its start", path.display())]
    NoImages {
        /// The store.
        path: PathBuf,
    },
    /// There is no such image.
    #[error("{} holds no image {sequence}; it holds {held}", path.display())]
    NoSuchImage {
        /// The store.
        path: PathBuf,
        /// The image that was asked for.
        sequence: Sequence,
        /// The images that are there.
        held: String,
    },
    /// The world went on after this image.
    #[error(
        "image {sequence} has a successor, image {successor}: the world went on from it, and others may have seen \
         that; resume the latest image"
    )]
    HasSuccessor {
        /// The image that was asked for.
        sequence: Sequence,
        /// A later, whole image.
        successor: Sequence,
    },
    /// The latest image is damaged. Going back to an older one undoes what the world did since, so it is not done unasked.
    #[error(
        "the latest image {sequence} is damaged: {source}. {}",
        go_back.map_or("No older image is left".into(), |older| format!(
            "Restore that file, or go back explicitly, with `peregrine resume --image {older}` or PEREGRINE_RESUME_IMAGE={older}: \
             what came after it is then undone, and nothing is deleted"))
    )]
    LatestDamaged {
        /// The latest image.
        sequence: Sequence,
        /// The next older image that the store holds.
        go_back: Option<Sequence>,
        /// The damage.
        source: Box<StoreError>,
    },
    /// Another life took this generation.
    #[error("generation {generation} was taken by another life of this world ({}); stop, it goes on there", path.display())]
    GenerationTaken {
        /// The generation.
        generation: Generation,
        /// Its name on disk.
        path: PathBuf,
    },
    /// Another life has a higher generation.
    #[error("generation {mine} was superseded by generation {by}; stop: the world goes on there")]
    Superseded {
        /// This life.
        mine: Generation,
        /// The life that took over.
        by: Generation,
    },
    /// Another life committed this image first.
    #[error("image {sequence} was committed by another life of this world ({}); stop: the world goes on there", path.display())]
    Lost {
        /// The image.
        sequence: Sequence,
        /// Its name on disk.
        path: PathBuf,
    },
    /// The commit has become visible and the kernel could not say that it is durable.
    #[error(
        "image {sequence} is in doubt: it is visible, and making it durable failed ({source}); stop, and open the \
         store again: it then holds that image whole or not at all"
    )]
    InDoubt {
        /// The image.
        sequence: Sequence,
        /// What failed.
        source: Box<StoreError>,
    },
    /// An earlier error left this store unable to say what is on disk.
    #[error("this store takes no more commits, because {why}; open it again")]
    Stopped {
        /// The earlier error.
        why: String,
    },
    /// The call does not fit what the store holds; a fault of the caller.
    #[error("{0}")]
    Misuse(#[from] Misuse),
    /// A page of a thread could not be written.
    #[error("thread {thread}: {source}")]
    Page {
        /// The thread.
        thread: ThreadId,
        /// Why.
        source: WriteError,
    },
}

/// A call that does not fit what the store holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Misuse {
    /// The store was opened without its lock.
    #[error("this store was opened read-only; open it with Store::open to write")]
    ReadOnly,
    /// No generation was claimed.
    #[error("no generation was claimed; call claim_generation before begin")]
    NoGeneration,
    /// A generation was claimed already.
    #[error("this life is generation {0} already; a life has one generation")]
    HasGeneration(Generation),
    /// A life is to start from nothing in a store that holds images.
    #[error(
        "the store holds images up to {latest}; claim a generation from the image that the life starts from"
    )]
    HasImages {
        /// The latest image.
        latest: Sequence,
    },
    /// Another generation than the claimed one.
    #[error("generation {given} is not this life's, which is {claimed}")]
    NotYourGeneration {
        /// The generation that was given.
        given: Generation,
        /// The generation of this life.
        claimed: Generation,
    },
    /// Another sequence than the next one.
    #[error("the next image is {next}, not {given}")]
    NotNext {
        /// The sequence that was given.
        given: Sequence,
        /// The next sequence.
        next: Sequence,
    },
    /// A delta to an image that is not the thread's last.
    #[error(
        "thread {thread}: a delta to {given:?} does not fit, its last image is {last:?}; pass that, or all pages with no base"
    )]
    WrongBase {
        /// The thread.
        thread: ThreadId,
        /// The base that was given.
        given: Option<Sequence>,
        /// The thread's last image.
        last: Option<Sequence>,
    },
    /// A thread twice in one commit.
    #[error("thread {thread} was passed twice in one commit")]
    ThreadTwice {
        /// The thread.
        thread: ThreadId,
    },
    /// A thread that the image does not hold.
    #[error("image {sequence} holds no thread {thread}")]
    NoSuchThread {
        /// The image.
        sequence: Sequence,
        /// The thread.
        thread: ThreadId,
    },
    /// Output that never was committed is said to have left.
    #[error("{given} bytes of output can't have left the store: {committed} are committed")]
    ReleasedBeyondCommit {
        /// The mark that was given.
        given: u64,
        /// Bytes of output committed.
        committed: u64,
    },
    /// Output that has left is said not to have left.
    #[error(
        "{released} bytes of output have left the store already; {given} is fewer, and what has left can't come back"
    )]
    ReleasedBackwards {
        /// The mark that was given.
        given: u64,
        /// The mark that holds.
        released: u64,
    },
    /// No number is left.
    #[error("the store has used up all its sequence or generation numbers")]
    NumbersUsedUp,
}

impl StoreError {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// Whether there was no room on the disk: [`Store::prune`](crate::Store::prune) may make some.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }

    pub(crate) fn damaged(path: impl Into<PathBuf>) -> impl FnOnce(ImageError) -> Self {
        let path = path.into();
        move |source| Self::Damaged { path, source }
    }
}

/// What to do about the kernel's answer.
fn remedy(source: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match source.kind() {
        Kind::StorageFull => {
            "the disk is full: free some space (a running World has done its part; for other stores that is `prune`)"
        }
        Kind::QuotaExceeded => "the quota is used up: free some space or raise it",
        Kind::FileTooLarge => {
            "the file would exceed a size limit: raise `ulimit -f` or use another filesystem"
        }
        Kind::PermissionDenied => {
            "the store must belong to this user, with read, write and search permission"
        }
        Kind::ReadOnlyFilesystem => "the filesystem is read-only: remount it or name another directory",
        Kind::NotFound => "there is no such path: name the right one, or restore what is missing from a copy",
        Kind::NotADirectory => "a part of this path is a file: name a directory",
        Kind::IsADirectory => "a directory is where a file should be: move it away",
        Kind::AlreadyExists => "something else put it there: move it away",
        Kind::OutOfMemory => "memory is used up: free some or raise the limit",
        _ => "see the system's log for the device; the last commit is untouched",
    }
}
