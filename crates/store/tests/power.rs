//! Cut the power before every step, and look at what the disk may hold.
//!
//! A killed process loses nothing that it wrote; a machine without power loses what was not synced. The model keeps
//! what is durable, by inode, as POSIX promises it and no more:
//!
//! ```text
//! fsync(file)        its bytes are durable
//! fsync(directory)   its names are durable (the names, not what they lead to)
//! syncfs             everything is
//! ```
//!
//! A cut then leaves one of many disks. Bytes that were not synced never arrive; of the names that were not synced four
//! choices are tried: none, all (what a journal of metadata does), all but those in `world`, only those in `world`.
//! A store must open from each, with the image that was acknowledged or the one in the making, whole.

mod scene;

use peregrine_store::step;
use scene::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

type Inode = u64;

fn inode(path: &Path) -> Inode {
    fs::symlink_metadata(path).unwrap().ino()
}

fn entries(path: &Path) -> BTreeMap<String, (Inode, bool)> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                (entry.metadata().unwrap().ino(), entry.path().is_dir()),
            )
        })
        .collect()
}

/// What would still be there.
#[derive(Clone, Default)]
struct Durable {
    bytes: BTreeMap<Inode, Vec<u8>>,
    names: Live,
}

impl Durable {
    fn sync_file(&mut self, path: &Path) {
        self.bytes.insert(inode(path), fs::read(path).unwrap());
    }

    fn sync_directory(&mut self, path: &Path) {
        self.names.insert(inode(path), entries(path));
    }

    fn sync_all(&mut self, dir: &Path) {
        self.sync_directory(dir);
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { self.sync_all(&path) } else { self.sync_file(&path) }
        }
    }

    /// Makes a disk on which of each directory the names as they are arrived, or those that were synced, by `arrived`.
    fn disk(&self, live: &Live, directory: Inode, from: &str, to: &Path, arrived: Arrived) {
        fs::create_dir(to).unwrap();
        let as_it_is = live.get(&directory).filter(|_| arrived(from));
        for (name, (inode, is_directory)) in as_it_is.or(self.names.get(&directory)).into_iter().flatten() {
            if *is_directory {
                self.disk(live, *inode, name, &to.join(name), arrived);
            } else {
                fs::write(to.join(name), self.bytes.get(inode).map_or(&[][..], |bytes| bytes)).unwrap();
            }
        }
    }
}

/// The names as they are in every directory.
type Live = BTreeMap<Inode, BTreeMap<String, (Inode, bool)>>;

fn live(dir: &Path, found: &mut Live) {
    for (name, (_, is_directory)) in entries(dir) {
        if is_directory {
            live(&dir.join(name), found);
        }
    }
    found.insert(inode(dir), entries(dir));
}

/// Says of a directory's name whether the names in it arrived without a sync.
type Arrived = fn(&str) -> bool;

/// Which directories' names arrived without a sync.
const DISKS: [(&str, Arrived); 4] = [
    ("none", |_| false),
    ("all", |_| true),
    ("all but world", |directory| directory != "world"),
    ("only world", |directory| directory == "world"),
];

/// Everything that a cut could leave, four disks for each step.
struct Cuts {
    live: PathBuf,
    disks: PathBuf,
    durable: Durable,
    acknowledged: u64,
    /// Acknowledged images and description, one for each cut.
    made: Vec<(u64, String)>,
    /// The call that was announced and has been made by the next announcement.
    pending: Option<(&'static str, PathBuf)>,
}

impl Cuts {
    fn settle(&mut self) {
        match self.pending.take() {
            Some(("fsync", path)) => self.durable.sync_file(&path),
            Some(("fsync directory", path)) => self.durable.sync_directory(&path),
            Some(("syncfs", _)) => self.durable.sync_all(&self.live.clone()),
            Some(("create", path)) => drop(self.durable.bytes.remove(&inode(&path))),
            Some(("mkdir", path)) if path.is_dir() => {
                self.durable.names.entry(inode(&path)).or_default();
            }
            _ => {}
        }
    }

    fn cut(&mut self, what: String) {
        let n = self.made.len();
        let mut names = Live::new();
        live(&self.live, &mut names);
        for (disk, arrived) in DISKS {
            self.durable.disk(
                &names,
                inode(&self.live),
                "",
                &self.disks.join(format!("{n}.{disk}")),
                arrived,
            );
        }
        self.made.push((self.acknowledged, what));
    }
}

fn cut_everywhere(images: u64, max_deltas: usize, extra_threads: u64) {
    cut_after(images, max_deltas, extra_threads, false);
}

/// `a_commit_fails`: when the names of its images are to be made durable; then it is made again.
fn cut_after(images: u64, max_deltas: usize, extra_threads: u64, a_commit_fails: bool) {
    let scratch = scratch();
    let live = store_with(scratch.path(), images);
    let disks = scratch.path().join("disks");
    fs::create_dir(&disks).unwrap();
    let mut durable = Durable::default();
    durable.sync_all(&live);
    let cuts = Cuts {
        live: live.clone(),
        disks: disks.clone(),
        durable,
        acknowledged: images,
        made: vec![],
        pending: None,
    };
    let cuts = Rc::new(RefCell::new(cuts));

    let (mut store, generation, _) = go_on(&live).unwrap();
    store.set_max_deltas(max_deltas);
    cuts.borrow_mut().durable.sync_all(&live);
    let (watched, fails) = (cuts.clone(), Cell::new(a_commit_fails));
    let watching = step::watch(move |step| {
        let mut cuts = watched.borrow_mut();
        cuts.settle();
        cuts.cut(format!("before {} {}", step.name, step.path.display()));
        if fails.get() && step.name == "fsync directory" {
            fails.set(false);
            return Err(std::io::Error::other("the disk"));
        }
        cuts.pending = Some((step.name, step.path.to_path_buf()));
        Ok(())
    });
    if a_commit_fails {
        commit_with_threads(&mut store, generation, extra_threads).unwrap_err();
    }
    for _ in 0..3 {
        let committed = if extra_threads == 0 {
            commit_next(&mut store, generation).unwrap()
        } else {
            commit_with_threads(&mut store, generation, extra_threads).unwrap()
        };
        {
            let mut cuts = cuts.borrow_mut();
            cuts.settle();
            cuts.acknowledged = committed.sequence.get();
            cuts.cut(format!("after image {} was acknowledged", committed.sequence));
        }
        // Not durable: after a cut the mark may be older than the image that goes by it.
        store.mark_released(committed.output_end).unwrap();
    }
    store.prune().unwrap();
    drop((watching, store));

    let cuts = cuts.borrow();
    for (n, (acknowledged, what)) in cuts.made.iter().enumerate() {
        for (disk, _) in DISKS {
            let dir = disks.join(format!("{n}.{disk}"));
            let found = if extra_threads == 0 {
                check_store(&dir)
            } else {
                check_threads(&dir, extra_threads, images)
            };
            let found = found.unwrap_or_else(|error| panic!("cut {what}, {disk}: {error}"));
            let range = *acknowledged..=acknowledged + 1;
            assert!(range.contains(&found), "cut {what}, {disk}: {acknowledged} acknowledged, {found} found");
            if extra_threads == 0 {
                let (mut store, generation, _) = go_on(&dir).unwrap();
                commit_next(&mut store, generation).unwrap();
                drop(store);
                assert_eq!(check_store(&dir).unwrap(), found + 1);
            }
        }
    }
    println!("{} cuts, four disks each", cuts.made.len());
    assert!(cuts.made.len() > 30);
}

use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_store::{Committed, Generation, Result, Store, StoreError, ThreadId};

/// So many threads that the store syncs the whole filesystem at once, or so few that it syncs one by one.
fn commit_with_threads(store: &mut Store, generation: Generation, threads: u64) -> Result<Committed> {
    let sequence = store.next_sequence().unwrap();
    let mut commit = store.begin(generation, sequence).unwrap();
    for thread in (100..100 + threads).map(ThreadId::new) {
        let page = [sequence.get() as u8; PAGE_SIZE];
        commit.thread(thread, commit.base_of(thread), [(VirtAddr::new(0x1000), &page)])?;
    }
    commit.finish(Vec::new())
}

fn check_threads(dir: &Path, threads: u64, before: u64) -> Result<u64> {
    let store = Store::open(dir)?;
    let report = store.verify()?;
    assert!(report.damage.is_empty(), "{report:#?}");
    let image = match store.latest(build(&store)) {
        Err(StoreError::NoImages { .. }) => return Ok(0),
        image => image?,
    };
    let found = image.sequence().get();
    for thread in (100..100 + threads).map(ThreadId::new).filter(|_| found > before) {
        let mut pages = store.pages(&image, thread)?;
        assert_eq!(pages.next()?, Some((VirtAddr::new(0x1000), &[found as u8; PAGE_SIZE])));
    }
    Ok(found)
}

#[test]
fn a_power_cut_anywhere_leaves_the_old_image_or_the_new_one_whole() {
    cut_everywhere(3, 1, 0);
}

#[test]
fn a_power_cut_in_the_first_commits_leaves_no_image_or_a_whole_one() {
    cut_everywhere(0, 16, 0);
}

#[test]
fn a_power_cut_in_a_commit_of_many_threads_leaves_the_old_image_or_the_new_one_whole() {
    cut_everywhere(1, 16, 17);
}

#[test]
fn a_power_cut_in_the_first_commits_of_two_threads_leaves_no_image_or_a_whole_one() {
    cut_everywhere(0, 16, 2);
}

#[test]
fn a_power_cut_after_a_commit_that_failed_and_was_made_again_leaves_a_whole_one() {
    cut_after(0, 16, 2, true);
}
