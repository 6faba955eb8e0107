//! Frames of the model: a word each, and the number of the life they are in.

use super::lock;
use crate::member::MemberId;
use crate::mmu::{Contents, FrameId, Frames, SpaceId};
use peregrine_base::VirtAddr;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::vec::Vec;

/// How often each frame has been given away.
#[derive(Clone, Debug)]
pub(super) struct Lives(Arc<Vec<Mutex<u32>>>);

impl Lives {
    pub(super) fn of(&self, frame: FrameId) -> u32 {
        *lock(&self.0[frame.get() as usize])
    }
}

/// A fixed number of frames, with a free list for each core. Pages of objects are made when they are asked for, and hold
/// `object * 1000 + index` first.
#[derive(Debug)]
pub struct ModelFrames {
    lives: Lives,
    words: Vec<Mutex<u64>>,
    home: Mutex<HashMap<u64, u64>>,
    free: Vec<Mutex<Vec<u32>>>,
    used: Vec<Mutex<bool>>,
    /// Pages of objects, and whether each was handed out since it was last asked for. The cache has no references.
    cached: Mutex<HashMap<(u64, u64), (FrameId, bool)>>,
}

impl ModelFrames {
    /// `frames` frames, dealt out evenly to `cores` cores.
    pub fn new(cores: usize, frames: usize) -> Self {
        let deal = |core: usize| (0..frames as u32).rev().filter(move |f| *f as usize % cores == core);
        Self {
            lives: Lives(Arc::new((0..frames).map(|_| Mutex::new(0)).collect())),
            words: (0..frames).map(|_| Mutex::new(0)).collect(),
            home: Mutex::default(),
            free: (0..cores).map(|c| Mutex::new(deal(c).collect())).collect(),
            used: (0..frames).map(|_| Mutex::new(false)).collect(),
            cached: Mutex::default(),
        }
    }

    pub(super) fn lives(&self) -> Lives {
        self.lives.clone()
    }

    /// Frames that are not free.
    pub fn in_use(&self) -> usize {
        self.words.len() - self.free.iter().map(|f| lock(f).len()).sum::<usize>()
    }

    pub(super) fn access(&self, contents: Contents, page: u64, value: Option<u64>) -> u64 {
        let mut home;
        let mut own;
        let word: &mut u64 = match contents {
            Contents::Frame(frame) => {
                own = lock(&self.words[frame.get() as usize]);
                &mut own
            }
            Contents::Home => {
                home = lock(&self.home);
                home.entry(page).or_default()
            }
        };
        let found = *word;
        if let Some(value) = value {
            *word = value;
        }
        found
    }

    fn take(&self, by: MemberId, word: u64) -> Option<FrameId> {
        let own = lock(&self.free[by.index()]).pop();
        let index = own.or_else(|| self.free.iter().find_map(|f| lock(f).pop()))?;
        *lock(&self.words[index as usize]) = word;
        let was_used = core::mem::replace(&mut *lock(&self.used[index as usize]), true);
        assert!(!was_used, "frame {index} has two owners");
        Some(FrameId::new(index))
    }

    /// Drops the cache's page of an object, as under memory pressure; its reference is the caller's to let go.
    pub fn forget_page(&self, object: u64, index: u64) -> Option<FrameId> {
        lock(&self.cached).remove(&(object, index)).map(|(frame, _)| frame)
    }
}

impl Frames for ModelFrames {
    fn zeroed(&self, _space: SpaceId, by: MemberId, _page: VirtAddr) -> Option<FrameId> {
        self.take(by, 0)
    }

    fn copied(&self, _space: SpaceId, by: MemberId, _page: VirtAddr, from: FrameId) -> Option<FrameId> {
        let word = *lock(&self.words[from.get() as usize]);
        self.take(by, word)
    }

    fn of_object(&self, by: MemberId, object: u64, index: u64) -> Option<FrameId> {
        let mut cached = lock(&self.cached);
        if let Some((frame, handed_out)) = cached.get_mut(&(object, index)) {
            *handed_out = true;
            return Some(*frame);
        }
        let frame = self.take(by, object * 1000 + index)?;
        cached.insert((object, index), (frame, true));
        Some(frame)
    }

    fn forget(&self, _by: MemberId, frame: FrameId) -> bool {
        let mut cached = lock(&self.cached);
        let found = cached.iter_mut().find(|(_, (f, _))| *f == frame);
        let Some((key, (_, handed_out))) = found else { return true };
        if core::mem::take(handed_out) {
            return false;
        }
        let key = *key;
        cached.remove(&key);
        true
    }

    fn release(&self, by: MemberId, frame: FrameId) {
        lock(&self.cached).retain(|_, (f, _)| *f != frame);
        *lock(&self.lives.0[frame.get() as usize]) += 1;
        let was_used = core::mem::replace(&mut *lock(&self.used[frame.get() as usize]), false);
        assert!(was_used, "frame {} was released twice", frame.get());
        lock(&self.free[by.index()]).push(frame.get());
    }

    fn rebuild(&self, by: MemberId, live: &dyn Fn(FrameId) -> bool) {
        for free in &self.free {
            lock(free).clear();
        }
        for index in 0..self.words.len() as u32 {
            let frame = FrameId::new(index);
            if live(frame) {
                assert!(*lock(&self.used[index as usize]), "frame {index} is in a record and was free");
                continue;
            }
            lock(&self.cached).retain(|_, (f, _)| *f != frame);
            if core::mem::replace(&mut *lock(&self.used[index as usize]), false) {
                *lock(&self.lives.0[index as usize]) += 1;
            }
            lock(&self.free[by.index()]).push(index);
        }
    }
}
