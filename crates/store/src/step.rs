//! Every step that touches the disk, so that a test can stop the store there.
//!
//! The store's promise is about what a reader finds after the writer stopped *anywhere*. So each call that changes the
//! disk announces itself first; with the feature `killpoints` a test may then kill the process, fail the call, or look
//! at the directory. Without the feature the announcement compiles to nothing.
//!
//! ```text
//! commit ──▶ reach("rename", path) ──▶ watcher: count? kill -9? ENOSPC? ──▶ the call itself
//! ```
//!
//! A watcher belongs to one OS thread, so tests that run side by side don't see each other's steps.

use std::io;
use std::path::Path;

/// A call that is about to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step<'a> {
    /// What is done, always the same words at the same place in the code.
    pub name: &'static str,
    /// The file or directory it is done to; for a rename the new name.
    pub path: &'a Path,
}

#[cfg(feature = "killpoints")]
mod watched {
    use super::{Path, Step, io};
    use std::cell::RefCell;

    type Watcher = Box<dyn FnMut(&Step<'_>) -> io::Result<()>>;

    thread_local! {
        static WATCHER: RefCell<Option<Watcher>> = const { RefCell::new(None) };
    }

    /// Shows every step of this OS thread to `watcher`, which may fail it, until the returned value is dropped.
    pub fn watch(watcher: impl FnMut(&Step<'_>) -> io::Result<()> + 'static) -> Watching {
        WATCHER.with(|slot| *slot.borrow_mut() = Some(Box::new(watcher)));
        Watching(())
    }

    /// Ends [`watch`] when dropped.
    #[derive(Debug)]
    pub struct Watching(());

    impl Drop for Watching {
        fn drop(&mut self) {
            WATCHER.with(|slot| *slot.borrow_mut() = None);
        }
    }

    pub(crate) fn reach(name: &'static str, path: &Path) -> io::Result<()> {
        // Taken out for the call, so that a watcher which itself opens a store does not watch itself.
        let Some(mut watcher) = WATCHER.with(|slot| slot.borrow_mut().take()) else { return Ok(()) };
        let answer = watcher(&Step { name, path });
        WATCHER.with(|slot| *slot.borrow_mut() = Some(watcher));
        answer
    }
}

#[cfg(feature = "killpoints")]
pub(crate) use watched::reach;
#[cfg(feature = "killpoints")]
pub use watched::{Watching, watch};

#[cfg(not(feature = "killpoints"))]
#[inline(always)]
pub(crate) fn reach(_name: &'static str, _path: &Path) -> io::Result<()> {
    Ok(())
}
