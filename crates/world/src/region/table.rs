//! The table of names: which region is where, and the records that say so.

use super::{MAX_REGIONS, NAME_BYTES, RegionError};
use crate::address_space;
use crate::control::imaged;
use crate::killpoint::{Point, at as kill_point};
use crate::sched::in_thread;
use peregrine_base::{PageRange, VirtAddr};

/// One region in the World's tables.
#[repr(C)]
struct Entry {
    name: [u8; NAME_BYTES],
    /// First address, 0 if the entry is free.
    at: usize,
    /// Bytes asked for.
    len: usize,
    handles: u32,
    /// How often the entry was used.
    generation: u32,
}

impl Entry {
    fn pages(&self) -> PageRange {
        PageRange::covering(VirtAddr::new(self.at), self.len)
    }
}

/// All regions.
#[repr(C)]
pub struct Table {
    entries: [Entry; MAX_REGIONS],
}

/// A region that was found: its entry, its first address, its bytes.
pub type Place = (usize, usize, usize);

/// Why an entry was not made.
pub enum Refused {
    /// One of that name exists, of so many bytes.
    Exists(usize),
    /// The table is full.
    Full,
    /// The pages find no room among the records.
    NoRecord,
}

impl Table {
    /// No region.
    pub const EMPTY: Self = Self {
        entries: [const { Entry { name: [0; NAME_BYTES], at: 0, len: 0, handles: 0, generation: 0 } };
            MAX_REGIONS],
    };

    fn find(&mut self, name: &[u8; NAME_BYTES]) -> Option<(usize, &mut Entry)> {
        self.entries.iter_mut().enumerate().find(|(_, e)| e.at != 0 && e.name == *name)
    }

    /// Enters a region with one handle, and maps its pages.
    pub fn make(&mut self, name: &[u8; NAME_BYTES], at: usize, len: usize) -> Result<Place, Refused> {
        if let Some((_, entry)) = self.find(name) {
            return Err(Refused::Exists(entry.len));
        }
        let free = self.entries.iter_mut().enumerate().find(|(_, e)| e.at == 0);
        let Some((i, entry)) = free else { return Err(Refused::Full) };
        let generation = entry.generation.wrapping_add(1);
        let new = Entry { name: *name, at, len, handles: 1, generation };
        // SAFETY: in a runtime section (`with_table`); the pages are the caller's.
        if !unsafe { address_space::take_region(new.pages(), i as u32, generation) } {
            return Err(Refused::NoRecord);
        }
        kill_point(Point::RegionRecorded);
        *entry = new;
        kill_point(Point::RegionEntered);
        Ok((i, at, len))
    }

    /// One more handle on the region of that name.
    pub fn open(&mut self, name: &[u8; NAME_BYTES]) -> Option<Place> {
        self.find(name).map(|(i, e)| {
            e.handles += 1;
            kill_point(Point::RegionCounted);
            (i, e.at, e.len)
        })
    }

    /// One more handle, or one less.
    pub fn count(&mut self, entry: usize, one_more: bool) {
        let handles = &mut self.entries[entry].handles;
        *handles = if one_more { *handles + 1 } else { handles.saturating_sub(1) };
    }

    /// Takes the region of that name out and unmaps its pages: first address and bytes. `Err`: the handles that are open, or `None`
    /// if there is no such region.
    pub fn take(&mut self, name: &[u8; NAME_BYTES]) -> Result<(usize, usize), Option<u32>> {
        match self.find(name) {
            None => Err(None),
            Some((_, entry)) if entry.handles != 0 => Err(Some(entry.handles)),
            Some((_, entry)) => {
                // SAFETY: in a runtime section (`with_table`); nobody has a handle.
                unsafe { address_space::give_region(entry.pages()) };
                kill_point(Point::RegionUnmapped);
                let was = (entry.at, entry.len);
                entry.at = 0;
                kill_point(Point::RegionTaken);
                Ok(was)
            }
        }
    }
}

/// All regions: pages, entry, generation. In the supervisor, while every node is paused and the table is an image's.
pub fn all() -> Vec<(PageRange, u32, u32)> {
    imaged().regions.with(|table| {
        let used = table.entries.iter().enumerate().filter(|(_, e)| e.at != 0);
        used.map(|(i, e)| (e.pages(), i as u32, e.generation)).collect()
    })
}

/// A name as the table holds it.
pub fn padded(name: &str) -> Result<[u8; NAME_BYTES], RegionError> {
    let bytes = name.as_bytes();
    if bytes.is_empty() || bytes.len() > NAME_BYTES || bytes.contains(&0) {
        return Err(RegionError::Name { name: name.to_owned() });
    }
    let mut padded = [0; NAME_BYTES];
    padded[..bytes.len()].copy_from_slice(bytes);
    Ok(padded)
}

/// Runs `f` on the table, in a runtime section: it allocates nothing and does not panic.
pub fn with_table<R>(f: impl FnOnce(&mut Table) -> R) -> Result<R, RegionError> {
    in_thread(|_| imaged().regions.with(f)).ok_or(RegionError::NoThread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_table_can_t_hold_are_refused() {
        for bad in ["", "a\0b", &"x".repeat(NAME_BYTES + 1)] {
            assert!(matches!(padded(bad), Err(RegionError::Name { .. })), "{bad:?}");
        }
        assert!(padded(&"x".repeat(NAME_BYTES)).is_ok());
    }
}
