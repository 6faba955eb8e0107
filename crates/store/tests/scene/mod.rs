//! A tiny world whose whole history is known: what it holds at image `n` is a function of `n`.
//!
//! That is the oracle of all tests here: whatever happened to a store, the image `n` that it gives back is
//! [`World::at`]`(n)`, to the byte.
#![allow(dead_code)] // each test uses its part

use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_store::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A directory for one test. In memory where there is such a place: these tests make thousands of files, and what a real
/// disk does with them is not their matter (`life.rs` runs on one).
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A page is its address and the byte that fills it.
pub type Pages = BTreeMap<usize, u8>;

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct World {
    pub threads: BTreeMap<u64, Pages>,
    pub output: Vec<u8>,
    pub control: Vec<u8>,
}

const THREADS: u64 = 4;
const PAGES: u64 = 5;

impl World {
    pub fn at(n: u64) -> Self {
        let mut world = Self::default();
        (1..=n).for_each(|n| world.step(n));
        world
    }

    /// From image `n - 1` to image `n`: some pages change, some become zero, thread 2 dies at 4 and comes back at 5.
    fn step(&mut self, n: u64) {
        for thread in 0..THREADS {
            if thread == 2 && n == 4 {
                self.threads.remove(&2);
                continue;
            }
            let is_new = !self.threads.contains_key(&thread);
            let pages = self.threads.entry(thread).or_default();
            for page in 0..PAGES {
                let address = 0x10_0000 * (thread as usize + 1) + 2 * PAGE_SIZE * page as usize;
                let changes = (n + thread + page).is_multiple_of(3) && (n + thread).is_multiple_of(2);
                if is_new || changes {
                    pages.insert(
                        address,
                        if (n + page).is_multiple_of(4) { 0 } else { (n * 7 + thread * 3 + page) as u8 },
                    );
                }
            }
        }
        self.output.extend_from_slice(format!("line {n}\n").as_bytes());
        self.control = format!("control {n}").into_bytes();
    }
}

/// Writes a file that stands for the program.
pub fn program(scratch: &Path) -> (PathBuf, BuildId) {
    let path = scratch.join("program");
    fs::write(&path, "#!/bin/true\n").unwrap();
    (path.clone(), build_id_of(&path).unwrap())
}

pub const WORLD: WorldId = WorldId::from_bytes([0x77; 16]);

pub fn create(scratch: &Path, dir: &Path) -> Result<Store> {
    let (program, build) = program(scratch);
    Store::create(dir, WORLD, &program, build)
}

/// A store with images 1 to `images`, closed.
pub fn store_with(scratch: &Path, images: u64) -> PathBuf {
    let dir = scratch.join("store");
    let mut store = create(scratch, &dir).unwrap();
    let generation = store.claim_generation(None).unwrap();
    for _ in 0..images {
        commit_next(&mut store, generation).unwrap();
    }
    dir
}

pub fn build(store: &Store) -> BuildId {
    store.executable().build
}

/// Opens the store at `dir` for a life that goes on from its latest image, if it has one.
pub fn go_on(dir: &Path) -> Result<(Store, Generation, u64)> {
    let mut store = Store::open(dir)?;
    let from = match store.latest(build(&store)) {
        Err(StoreError::NoImages { .. }) => None,
        other => Some(other?),
    };
    let generation = store.claim_generation(from.as_ref())?;
    Ok((store, generation, from.map_or(0, |from| from.sequence().get())))
}

pub fn commit_next(store: &mut Store, generation: Generation) -> Result<Committed> {
    let n = store.next_sequence()?.get();
    commit_from(store, generation, n - 1)
}

/// Commits the next image on top of image `previous`.
pub fn commit_from(store: &mut Store, generation: Generation, previous: u64) -> Result<Committed> {
    let sequence = store.next_sequence()?;
    let (old, new) = (World::at(previous), World::at(sequence.get()));
    let mut commit = store.begin(generation, sequence)?;
    for thread in old.threads.keys().filter(|thread| !new.threads.contains_key(thread)) {
        commit.forget(ThreadId::new(*thread))?;
    }
    for (&number, pages) in &new.threads {
        let thread = ThreadId::new(number);
        let before = old.threads.get(&number);
        let is_full = commit.wants_full(thread);
        let base = if is_full { None } else { commit.base_of(thread) };
        let changed =
            pages.iter().filter(|(address, fill)| before.and_then(|p| p.get(address)) != Some(fill));
        let listed: Vec<_> = if is_full { pages.iter().collect() } else { changed.collect() };
        if !listed.is_empty() {
            let listed: Vec<_> =
                listed.iter().map(|(address, fill)| (**address, [**fill; PAGE_SIZE])).collect();
            commit.thread(
                thread,
                base,
                listed.iter().map(|(address, page)| (VirtAddr::new(*address), page)),
            )?;
        }
    }
    commit.output(&new.output[old.output.len()..]);
    commit.finish(new.control)
}

/// All that an image gives back. Pages of zeros are left out by the store, so they are by the oracle.
pub fn read(store: &Store, image: &WorldImage) -> Result<World> {
    let mut world = World { control: image.control().to_vec(), ..World::default() };
    for thread in image.threads() {
        let mut pages = store.pages(image, thread)?;
        let mut read = Pages::new();
        while let Some((address, page)) = pages.next()? {
            assert!(page.iter().all(|byte| *byte == page[0]));
            read.insert(address.as_usize(), page[0]);
        }
        world.threads.insert(thread.get(), read);
    }
    Ok(world)
}

/// Checks that `image` is the world at its sequence, and that what is not released is the end of its output.
pub fn check(store: &Store, image: &WorldImage) -> Result<()> {
    let mut expected = World::at(image.sequence().get());
    let unreleased = store.unreleased(image)?;
    assert_eq!(image.output_end(), expected.output.len() as u64);
    assert_eq!(unreleased.bytes, expected.output[unreleased.offset as usize..], "unreleased output");
    for pages in expected.threads.values_mut() {
        pages.retain(|_, fill| *fill != 0);
    }
    expected.output.clear();
    assert_eq!(read(store, image)?, expected, "image {}", image.sequence());
    Ok(())
}

/// Opens the store, checks its latest image and every file, and returns the image's number (0 for none).
pub fn check_store(dir: &Path) -> Result<u64> {
    let store = Store::open(dir)?;
    let report = store.verify()?;
    assert!(report.damage.is_empty() && report.strange.is_empty(), "{report:#?}");
    match store.latest(build(&store)) {
        Err(StoreError::NoImages { .. }) => Ok(0),
        image => {
            let image = image?;
            check(&store, &image)?;
            Ok(image.sequence().get())
        }
    }
}

pub fn seq(n: u64) -> Sequence {
    Sequence::new(n).unwrap()
}

/// Every file under `dir`, sorted.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

/// Copies a directory.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}
