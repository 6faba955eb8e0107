//! What is said over a World's control socket: a line of JSON each way.

use serde::{Deserialize, Serialize};

/// What a command asks of a World.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Request {
    /// How are you?
    Status,
    /// Move a thread.
    Migrate {
        /// Its number (`3` or `3.2`) or its name.
        thread: String,
        /// Where to.
        node: u32,
    },
    /// Take an image now, on disk if there is a store.
    Checkpoint,
}

/// What the World answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<WorldStatus>),
    /// The thread is on its new node.
    Moved {
        /// Its number.
        thread: String,
        /// Where it was.
        from: u32,
        /// Where it is.
        to: u32,
    },
    /// The image is complete.
    Image {
        /// Its number.
        sequence: u64,
        /// Whether it is on disk.
        durable: bool,
        /// How long it took from the request on.
        milliseconds: f64,
    },
    /// It can't be done.
    Refused {
        /// Why, and what to do.
        why: String,
    },
}

/// A World.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorldStatus {
    /// Process id of its supervisor.
    pub pid: u32,
    /// Command line of the program.
    pub program: String,
    /// Since it began, or was resumed.
    pub seconds: f64,
    /// Sequence number of the last image.
    pub image: u64,
    /// Age of the last image in milliseconds.
    pub image_age_ms: f64,
    /// Directory of the store, if there is one.
    pub store: Option<String>,
    /// Images taken.
    pub images: u64,
    /// Images given up because a node did not pause.
    pub images_given_up: u64,
    /// Times that all threads went back to an image.
    pub rollbacks: u64,
    /// World memory in use and its limit, in bytes.
    pub memory: [u64; 2],
    /// The nodes, by number.
    pub nodes: Vec<NodeStatus>,
    /// The threads, by slot.
    pub threads: Vec<ThreadStatus>,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its process, or 0 while it is being replaced.
    pub pid: u32,
    /// `running`, `idle`, `blocked` or `starting`.
    pub state: String,
    /// The name of the domain that it is, if it is one and runs carried calls only.
    #[serde(default)]
    pub domain: Option<String>,
    /// The thread that runs.
    pub runs: Option<String>,
    /// Threads waiting to run.
    pub queued: u32,
    /// Switches between threads so far.
    pub switches: u64,
    /// Slots unmapped so far that it had in view.
    #[serde(default)]
    pub unmapped: u64,
    /// Program counters of a blocked node, innermost first; empty if it is not blocked or does not answer.
    pub trace: Vec<u64>,
}

/// A thread.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ThreadStatus {
    /// Its number: the slot, and how often that was used if more than once.
    pub id: String,
    /// Its name.
    pub name: String,
    /// `running`, `ready`, `waiting`, `sleeping` or `ended`.
    pub state: String,
    /// What it waits for.
    pub waits_for: Option<String>,
    /// The node it belongs to.
    pub node: u32,
    /// Bytes of its stack in use; not known while it runs.
    pub stack_bytes: Option<u64>,
    /// Bytes of World memory granted to it for stack, statics and heap.
    pub memory_bytes: u64,
    /// Moves so far.
    pub moves: u64,
    /// Age of the last image that holds it in milliseconds; `None` if no image does.
    pub image_age_ms: Option<f64>,
}
