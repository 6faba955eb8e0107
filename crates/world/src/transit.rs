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

/// Serialises `value`; the bytes, and the ends in them.
pub fn pack<T: serde::Serialize>(value: &T) -> Result<(Vec<u8>, Vec<u32>), postcard::Error> {
    let outer =
        TRANSIT.with_borrow_mut(|t| core::mem::replace(t, Transit { active: true, ends: Vec::new() }));
    let bytes = postcard::to_allocvec(value);
    let mine = TRANSIT.with_borrow_mut(|t| core::mem::replace(t, outer));
    match bytes {
        Ok(bytes) => Ok((bytes, mine.ends)),
        Err(e) => {
            release(&mine.ends);
            Err(e)
        }
    }
}

/// Reads a value back.
pub fn unpack<T: serde::de::DeserializeOwned>(bytes: &[u8], ends: Vec<u32>) -> Result<T, postcard::Error> {
    let outer = TRANSIT.with_borrow_mut(|t| core::mem::replace(t, Transit { active: true, ends }));
    let value = postcard::from_bytes(bytes);
    let mine = TRANSIT.with_borrow_mut(|t| core::mem::replace(t, outer));
    // Ends that nobody claimed would be held for ever.
    release(&mine.ends.into_iter().filter(|e| *e != TAKEN).collect::<Vec<_>>());
    value
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
