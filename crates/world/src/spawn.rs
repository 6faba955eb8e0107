//! Starting threads and waiting for them.

use crate::control::world;
use crate::error::{JoinError, SpawnError};
use crate::join;
use crate::sched::with_room;
use crate::thread::{self, Start, ThreadId};
use crate::transit;
use peregrine_base::sync::Ordering;
use peregrine_thread::carrier::carrier;
use peregrine_thread::slot::DEFAULT_STACK_BYTES;
use peregrine_thread::stack_kind::StackKind;
use peregrine_thread::template::template;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};
use std::cell::Cell;
use std::marker::PhantomData;

/// Starts a thread that runs `entry(argument)`.
///
/// The argument is serialised, for the new thread shares nothing with this one; so is the result when it is joined. Channel
/// ends may be part of both.
///
/// # Panics
/// If no thread can be made; use [`Builder::spawn`] for a `Result`.
pub fn spawn<A, R>(entry: fn(A) -> R, argument: A) -> JoinHandle<R>
where
    A: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
{
    Builder::new().spawn(entry, argument).unwrap_or_else(|e| panic!("cannot spawn a thread: {e}"))
}

/// Settings of a new thread.
///
/// # Examples
/// ```no_run
/// let twice = peregrine_world::Builder::new().name("twice").stack_size(256 << 10).spawn(|n: u32| 2 * n, 21).unwrap();
/// assert_eq!(twice.join().unwrap(), 42);
/// ```
#[derive(Clone, Debug)]
pub struct Builder {
    name: String,
    stack_bytes: Option<usize>,
    node: Option<u32>,
    kind: Option<StackKind>,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// No name, a stack of 1 MiB (in a window: the window's), started on the calling thread's node.
    pub fn new() -> Self {
        Self { name: String::new(), stack_bytes: None, node: None, kind: None }
    }

    /// A name for people: shown by `peregrine ps` and in errors; 47 bytes are kept.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = name.into();
        self
    }

    /// Stack size in bytes, 64 KiB to 512 MiB.
    pub fn stack_size(mut self, bytes: usize) -> Self {
        self.stack_bytes = Some(bytes);
        self
    }

    /// Starts on `node` instead of the calling thread's.
    pub fn node(mut self, node: u32) -> Self {
        self.node = Some(node);
        self
    }

    /// Where its memory lies; what [`Config::kind`](crate::Config::kind) says if this is not called.
    ///
    /// A thread in a window costs no address space and can be packed while it is idle; it has the stack that the windows have,
    /// or less, and its heap ends where the window does.
    pub fn kind(mut self, kind: StackKind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// [`SpawnError`].
    pub fn spawn<A, R>(self, entry: fn(A) -> R, argument: A) -> Result<JoinHandle<R>, SpawnError>
    where
        A: Serialize + DeserializeOwned,
        R: Serialize + DeserializeOwned,
    {
        let (bytes, ends) = transit::pack(&argument).map_err(|e| SpawnError::Argument(e.to_string()))?;
        drop(argument);
        let made = with_room(|_| {
            let kind = self.kind.unwrap_or_else(default_kind);
            // SAFETY: a thread runs, so there is a World.
            let windows = unsafe { template() }.windows;
            let usual = match kind {
                StackKind::Isomalloc => DEFAULT_STACK_BYTES,
                _ => windows.stack_bytes,
            };
            let stack = self.stack_bytes.unwrap_or(usual);
            let start = Start {
                body: body::<A, R>,
                function: entry as usize,
                argument: &bytes,
                ends: &ends,
                stack_bytes: stack,
                kind,
                name: &self.name,
            };
            // SAFETY: in a section, on a node; the body fits the argument.
            unsafe {
                let here = carrier().node;
                let on = self.node.filter(|n| *n < crate::node_count()).unwrap_or(here);
                let id = thread::create(&start, here)?;
                crate::sched::launch(id.slot, on);
                Ok(id)
            }
        });
        match made.unwrap_or(Err(SpawnError::NoThread)) {
            Ok(id) => Ok(JoinHandle { id, joined: Cell::new(false), of: PhantomData }),
            Err(e) => {
                transit::release(&ends);
                Err(e)
            }
        }
    }
}

fn default_kind() -> StackKind {
    StackKind::ALL[world().default_kind.load(Ordering::Relaxed) as usize % 3]
}

/// What a thread made by [`spawn`] runs.
pub(crate) fn body<A, R>(
    function: usize,
    bytes: Vec<u8>,
    ends: Vec<u32>,
) -> Result<(Vec<u8>, Vec<u32>), String>
where
    A: DeserializeOwned,
    R: Serialize,
{
    let argument: A =
        transit::unpack(&bytes, ends).map_err(|e| format!("the argument can't be deserialised: {e}"))?;
    drop(bytes);
    // SAFETY: `function` is the address of a `fn(A) -> R`, cast in `spawn` for this very `body::<A, R>`.
    let entry = unsafe { core::mem::transmute::<usize, fn(A) -> R>(function) };
    let result = entry(argument);
    transit::pack(&result).map_err(|e| format!("the result can't be serialised: {e}"))
}

/// Waits for a thread's result. Dropping it lets the thread go on alone.
///
/// It can be sent to other threads, and stays valid through moves and recoveries.
#[derive(Debug)]
pub struct JoinHandle<R> {
    id: ThreadId,
    /// Joined, or sent to another thread: dropping this value means nothing then.
    joined: Cell<bool>,
    of: PhantomData<fn() -> R>,
}

impl<R> Serialize for JoinHandle<R> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        use serde::ser::Error;
        if self.joined.replace(true) {
            return Err(S::Error::custom("this handle was sent away before"));
        }
        self.id.serialize(s)
    }
}

impl<'de, R> Deserialize<'de> for JoinHandle<R> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Ok(Self { id: ThreadId::deserialize(d)?, joined: Cell::new(false), of: PhantomData })
    }
}

impl<R: DeserializeOwned> JoinHandle<R> {
    /// Waits for the end of the thread.
    ///
    /// # Errors
    /// [`JoinError`]: it panicked, was quarantined, or its result can't be read.
    pub fn join(self) -> Result<R, JoinError> {
        self.joined.set(true);
        let (bytes, ends) = join::join(self.id)?;
        transit::unpack(&bytes, ends).map_err(|e| JoinError::Result(e.to_string()))
    }
}

impl<R> JoinHandle<R> {
    /// Whether the thread has ended; [`JoinHandle::join`] won't wait then.
    pub fn is_finished(&self) -> bool {
        join::is_finished(self.id)
    }

    /// The thread.
    pub fn thread(&self) -> ThreadId {
        self.id
    }
}

impl<R> Drop for JoinHandle<R> {
    fn drop(&mut self) {
        if !self.joined.get() {
            join::detach(self.id);
        }
    }
}
