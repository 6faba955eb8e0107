//! Images on disk: a world of threads that is killed goes on from its last commit.
//!
//! The world is paused, its control state and the pages that changed since the last image are handed to the store, and
//! when [`Commit::finish`] returns they survive. A commit is the exclusive creation of one name, complete and durable
//! before it is visible:
//!
//! ```text
//! DIR/format                                     what this is; made last by `create`
//! DIR/lock                                       held by the running life, dropped by the kernel when it is dead
//! DIR/released                                   how much of the output has left
//! DIR/bin/{name}                                 the executable, without which the images mean nothing
//! DIR/generation/{generation}                    one name for each life, created exclusively
//! DIR/world/{sequence}                           one manifest for each commit; its creation IS the commit
//! DIR/threads/{thread}/{generation}.{sequence}   images of one thread: a full one, then deltas
//! DIR/output/{start}.{generation}.{sequence}     output that became visible with a commit
//! DIR/tmp/                                       unfinished; emptied by the next life
//! ```
//!
//! # What it promises
//!
//! * **Complete or invisible.** Killed at any point, or cut from power, the store holds the old image or the new one.
//! * **One life.** While one runs no other opens the store. Should two believe that they run (a lock that a network
//!   filesystem lost), no clock decides: the generation, and each image, is a name that one of them creates.
//! * **No way around damage.** A flipped bit or a cut is found before a byte is used, and the error names the file, the
//!   part and the remedy. An older image is never taken instead without being asked for.
//! * **No second past.** An image that has a successor is not thawed again; the latest may be, any number of times.
//!
//! The bytes themselves are [`peregrine_image`]'s. The disk must keep what `fsync` returned for.
//!
//! # Examples
//!
//! A world of one thread lives, dies, and goes on:
//!
//! ```
//! use peregrine_base::VirtAddr;
//! use peregrine_store::{Store, ThreadId, WorldId, build_id_of};
//! # let scratch = tempfile::tempdir()?;
//! # let dir = scratch.path().join("store");
//! let program = std::env::current_exe()?;
//! let build = build_id_of(&program)?;
//! let thread = ThreadId::new(0);
//!
//! let mut store = Store::create(&dir, WorldId::random()?, &program, build)?;
//! let generation = store.claim_generation(None)?;
//! let mut commit = store.begin(generation, store.next_sequence()?)?;
//! commit.thread(thread, None, [(VirtAddr::new(0x10_0000), &[7; 4096])])?;
//! commit.output(b"hello\n");
//! commit.finish(b"control state".to_vec())?;
//! drop(store); // killed
//!
//! let mut store = Store::open(&dir)?;
//! let image = store.latest(build)?;
//! assert_eq!(image.control(), b"control state");
//! let mut pages = store.pages(&image, thread)?;
//! while let Some((address, page)) = pages.next()? {
//!     assert_eq!((address, page), (VirtAddr::new(0x10_0000), &[7; 4096]));
//! }
//! assert_eq!(store.unreleased(&image)?.bytes, b"hello\n");
//! let next = store.claim_generation(Some(&image))?;
//! assert!(next > generation);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod commit;
mod create;
mod disk;
mod error;
mod format;
mod load;
mod lock;
mod output;
mod paths;
mod prune;
mod released;
mod stage;
pub mod step;
mod store;
mod thread_image;
mod verify;
mod world;

pub use commit::{Commit, Committed};
pub use error::{Misuse, Result, StoreError};
pub use load::ThreadPages;
pub use output::Unreleased;
pub use peregrine_image::{BuildId, Generation, Sequence, ThreadId, WorldId};
pub use prune::Pruned;
pub use store::{DEFAULT_MAX_DELTAS, Executable, Store, build_id_of};
pub use thread_image::ThreadImage;
pub use verify::Report;
pub use world::WorldImage;
