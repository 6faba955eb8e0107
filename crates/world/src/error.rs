//! Errors that programs see. Each says what happened, with numbers, and what to do.

use crate::arena::OutOfMemory;
use crate::sched::LacksMemory;
use peregrine_thread::slot::StackSizeError;

/// Why no thread was made.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum SpawnError {
    /// The call came from outside.
    #[error("not in a Peregrine thread: start the program with #[peregrine::main]")]
    NoThread,
    /// All slots are taken.
    #[error("all {most} slots of the World are taken; join or drop the handles of threads that have ended")]
    TooMany {
        /// How many there are.
        most: usize,
    },
    /// The slot's record finds no room: a defect of the runtime, for there is room for every slot's.
    #[error("the record of slot {slot} finds no room in the World's address space: please report this")]
    NoRecord {
        /// The slot.
        slot: u32,
    },
    /// The stack is too large or too small.
    #[error(transparent)]
    Stack(#[from] StackSizeError),
    /// The stack does not fit into a window.
    #[error(
        "a stack of {asked} bytes does not fit into a window: at most {most} do (PEREGRINE_WINDOW_STACK)"
    )]
    Window {
        /// What was asked for.
        asked: usize,
        /// The stack that each window has.
        most: usize,
    },
    /// No memory for the argument or the slot.
    #[error(transparent)]
    Memory(#[from] OutOfMemory),
    /// The argument can't be serialised.
    #[error("the argument can't be serialised: {0}")]
    Argument(String),
}

impl LacksMemory for SpawnError {
    fn lacks_memory(&self) -> bool {
        matches!(self, Self::Memory(_))
    }
}

/// Why a join gave no value.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum JoinError {
    /// The call came from outside.
    #[error("not in a Peregrine thread: start the program with #[peregrine::main]")]
    NoThread,
    /// The thread panicked.
    #[error("thread {thread} '{name}' panicked: {message}")]
    Panicked {
        /// Its slot.
        thread: u32,
        /// Its name.
        name: String,
        /// The panic's message.
        message: String,
    },
    /// The thread crashed each node it ran on and was taken away.
    #[error("thread {thread} '{name}' was quarantined: {why}")]
    Quarantined {
        /// Its slot.
        thread: u32,
        /// Its name.
        name: String,
        /// What it did.
        why: String,
    },
    /// The result can't be read.
    #[error("the result can't be deserialised: {0}")]
    Result(String),
}
