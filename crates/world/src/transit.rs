//! Values on their way between threads: serialised with postcard, with the channel ends that they hold listed apart.
//!
//! While a value is serialised a thread-local list collects the ends met; each became an end of its own, held by nobody,
//! so the original may be dropped after. While a value is read the list hands them out again in order.

use std::cell::RefCell;

thread_local! {
    static TRANSIT: RefCell<Transit> = const { RefCell::new(Transit { active: false, ends: Vec::new() }) };
}

struct Transit {
    active: bool,
    ends: Vec<u32>,
}

/// A list of ends in place of the one that was there, which comes back when this is dropped: a value may panic while it is
/// serialised or read, and its thread may go on. Ends that are still in the list then are nobody's.
struct Listed(Option<Transit>);

impl Listed {
    fn new(ends: Vec<u32>) -> Self {
        Self(Some(TRANSIT.with_borrow_mut(|t| core::mem::replace(t, Transit { active: true, ends }))))
    }

    /// The ends in the list, which are the caller's now.
    fn take(&self) -> Vec<u32> {
        TRANSIT.with_borrow_mut(|t| core::mem::take(&mut t.ends))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some(outer) = self.0.take() {
            let mine = TRANSIT.with_borrow_mut(|t| core::mem::replace(t, outer));
            release(&mine.ends.into_iter().filter(|e| *e != TAKEN).collect::<Vec<_>>());
        }
    }
}

/// Serialises `value`; the bytes, and the ends in them.
pub fn pack<T: serde::Serialize>(value: &T) -> Result<(Vec<u8>, Vec<u32>), postcard::Error> {
    let listed = Listed::new(Vec::new());
    let bytes = postcard::to_allocvec(value)?;
    Ok((bytes, listed.take()))
}

/// Reads a value back.
pub fn unpack<T: serde::de::DeserializeOwned>(bytes: &[u8], ends: Vec<u32>) -> Result<T, postcard::Error> {
    // Ends that nobody claimed are given back: they would be held for ever.
    let _listed = Listed::new(ends);
    postcard::from_bytes(bytes)
}

const TAKEN: u32 = u32::MAX;

/// Gives ends back that nobody will hold.
pub fn release(ends: &[u32]) {
    crate::sched::in_thread(|_| ends.iter().for_each(|e| crate::ends::release(*e)));
}

/// Adds an end to the value being packed; its place in the list. `None` outside of [`pack`].
pub fn send_end(e: u32) -> Option<u32> {
    TRANSIT.with_borrow_mut(|t| {
        t.active.then(|| {
            t.ends.push(e);
            t.ends.len() as u32 - 1
        })
    })
}

/// Takes the end at `place` of the value being unpacked.
pub fn take_end(place: u32) -> Option<u32> {
    TRANSIT.with_borrow_mut(|t| {
        let e = t.ends.get_mut(place as usize)?;
        let taken = core::mem::replace(e, TAKEN);
        (taken != TAKEN).then_some(taken)
    })
}
