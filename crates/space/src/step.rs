//! The steps of an operation that others can see: where a member's death would leave something to mend.

/// A step. After each of these, the member holds a lock, or has changed something that it has not finished.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Step {
    /// A delta left the cache and is not in its object yet.
    DeltaTaken,
    /// A delta reached its object.
    DeltaGiven,
    /// An object's count reached zero, and the object is in no queue yet.
    Zero,
    /// An object is dying: the mark is set, the queue does not have it yet.
    Marked,
    /// The review has taken a queue and holds it.
    QueueTaken,
    /// An object under review was taken off the list.
    Reviewing,
    /// A weak link was cut, the parent's count not yet changed.
    Severed,
    /// A dead object was taken from the queue and not yet given back.
    Dead,
    /// A member was marked as being expelled.
    Expelling,
    /// The epoch was moved on.
    Advanced,
    /// Memory was taken from a pool and is in no structure yet.
    Allocated,
    /// Memory was given back to a pool.
    Freed,
    /// A frame was taken from the embedder and is in no record yet.
    FrameTaken,
    /// A slot was locked.
    Locked,
    /// A node was made and linked, or a slot moved to a line of its own.
    Expanded,
    /// The operation's intent was written.
    Intended,
    /// Views were emptied.
    ShotDown,
    /// The operation took effect; its records are still to be changed.
    Committed,
    /// What a mapping replaces is gone; its own records are still to be written, and its member's view to be filled.
    Planting,
    /// A record was changed, its old references not yet dropped.
    Changed,
    /// A reference was dropped for good.
    Dropped,
    /// A view was filled.
    Filled,
    /// A page was copied to the child of a fork.
    Copied,
    /// A slot was unlocked.
    Unlocked,
}

/// Called at every step. A test dies in it, or lets another member go first.
pub type Hook = fn(Step);
