//! Every step of a call, announced, so that a test can end the process there.
//!
//! The promise is about what one side sees when the other is killed *anywhere* between two instructions that the other can
//! observe: stores to the line, wake-ups, messages. So each of them announces itself first. With the feature `killpoints` a watcher is
//! called; without it nothing is compiled.

#[cfg(feature = "killpoints")]
mod watched {
    use std::sync::OnceLock;

    type Watcher = Box<dyn Fn(&'static str) + Send + Sync>;

    static WATCHER: OnceLock<Watcher> = OnceLock::new();

    /// Calls `watcher` before every step of this process, with the step's name, from whatever thread makes it. Once a process.
    ///
    /// # Panics
    /// If there is a watcher already.
    pub fn watch(watcher: impl Fn(&'static str) + Send + Sync + 'static) {
        assert!(WATCHER.set(Box::new(watcher)).is_ok(), "one watcher a process");
    }

    pub(crate) fn reach(name: &'static str) {
        if let Some(watcher) = WATCHER.get() {
            watcher(name);
        }
    }
}

#[cfg(feature = "killpoints")]
pub(crate) use watched::reach;
#[cfg(feature = "killpoints")]
pub use watched::watch;

#[cfg(not(feature = "killpoints"))]
#[inline(always)]
pub(crate) fn reach(_name: &'static str) {}
