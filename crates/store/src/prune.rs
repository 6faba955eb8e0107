//! Removing what no image needs any more.
//!
//! The last two whole images stay, with everything that they name: the latest to go on from, the one before to go back
//! to. A damaged image among or after them stays too, with all that it may name, for somebody may repair it. The rest
//! goes: older images, and what a life that died or failed left without a commit.
//!
//! ```text
//! world   7  8  9  10x 11        9 and 11 are the last two whole ones; 10 is damaged
//!         ▔▔▔▔▔                  7 and 8 go, and then every file that neither 9 nor 11 names and whose sequence is below 10
//! ```
//!
//! Manifests go first, durably, then the files: no manifest is ever seen that names a file which was pruned.

use crate::disk;
use crate::error::Result;
use crate::paths::{parse_chunk, parse_image, parse_number};
use crate::store::Store;
use peregrine_image::{Manifest, Sequence};
use std::collections::BTreeSet;
use std::path::PathBuf;

/// Whole images that are kept.
const KEPT_IMAGES: usize = 2;

/// What [`Store::prune`] removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pruned {
    /// Images of the world.
    pub images: usize,
    /// Files of threads and of output.
    pub files: usize,
}

/// What stays.
struct Kept {
    oldest: Sequence,
    /// Files that a whole image names.
    named: BTreeSet<PathBuf>,
    /// A file of this sequence or a later one may be named by a damaged image.
    doubtful_from: Option<Sequence>,
}

impl Kept {
    fn keeps(&self, path: &PathBuf, sequence: Sequence) -> bool {
        self.doubtful_from.is_some_and(|from| sequence >= from) || self.named.contains(path)
    }
}

impl Store {
    /// Removes what neither the last two whole images nor a damaged image needs. Call it now and then.
    ///
    /// # Errors
    /// What is wrong with the latest image, if it can't be read: nothing is removed then;
    /// [`Misuse::ReadOnly`](crate::Misuse::ReadOnly); [`StoreError::Io`](crate::StoreError::Io).
    pub fn prune(&mut self) -> Result<Pruned> {
        self.held()?;
        let sequences = self.sequences()?;
        let Some(latest) = sequences.last() else { return Ok(Pruned::default()) };
        self.read_manifest(*latest)?;
        let kept = self.kept(&sequences);
        let mut pruned = Pruned::default();
        for &sequence in sequences.iter().filter(|sequence| **sequence < kept.oldest) {
            disk::remove(&self.paths.world(sequence))?;
            pruned.images += 1;
        }
        if pruned.images > 0 {
            disk::sync_directory(&self.paths.directory("world"))?;
        }
        pruned.files += self.prune_threads(&kept)?;
        pruned.files += self.prune_output(&kept)?;
        self.prune_generations()?;
        Ok(pruned)
    }

    fn kept(&self, sequences: &[Sequence]) -> Kept {
        let mut whole = Vec::new();
        let mut oldest = Sequence::FIRST;
        let mut doubtful_from = None;
        for &sequence in sequences.iter().rev() {
            match self.read_manifest(sequence) {
                Ok(manifest) => whole.push(manifest),
                Err(_) => doubtful_from = Some(sequence),
            }
            if whole.len() == KEPT_IMAGES {
                oldest = sequence;
                break;
            }
        }
        if doubtful_from.is_some() && whole.len() < KEPT_IMAGES {
            // Then what the damaged image builds on is unknown as well.
            doubtful_from = Some(Sequence::FIRST);
        }
        Kept { oldest, named: self.files_named_by(&whole), doubtful_from }
    }

    fn files_named_by(&self, manifests: &[Manifest]) -> BTreeSet<PathBuf> {
        let images = manifests.iter().flat_map(|manifest| &manifest.chains).flat_map(|chain| {
            chain.members.iter().map(|m| self.paths.image(chain.thread, m.generation, m.sequence))
        });
        let chunks =
            manifests.iter().flat_map(|manifest| &manifest.chunks).map(|chunk| self.paths.chunk(chunk));
        images.chain(chunks).collect()
    }

    fn prune_threads(&self, kept: &Kept) -> Result<usize> {
        let mut removed = 0;
        let threads = self.paths.directory("threads");
        for thread in disk::list(&threads)?.iter().filter(|name| parse_number(name).is_some()) {
            let directory = threads.join(thread);
            let mut left = false;
            for name in disk::list(&directory)? {
                let path = directory.join(&name);
                match parse_image(&name) {
                    Some((_, sequence)) if !kept.keeps(&path, sequence) => {
                        disk::remove(&path)?;
                        removed += 1;
                    }
                    _ => left = true,
                }
            }
            if !left {
                disk::remove_directory(&directory)?;
            }
        }
        Ok(removed)
    }

    fn prune_output(&self, kept: &Kept) -> Result<usize> {
        let mut removed = 0;
        let directory = self.paths.directory("output");
        for name in disk::list(&directory)? {
            let path = directory.join(&name);
            if parse_chunk(&name).is_some_and(|(_, _, sequence)| !kept.keeps(&path, sequence)) {
                disk::remove(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// The highest generation tells all lower ones that they are superseded, so one name is enough.
    fn prune_generations(&self) -> Result<()> {
        let directory = self.paths.directory("generation");
        let mut names = disk::list(&directory)?;
        names.retain(|name| parse_number(name).is_some());
        let highest = names.iter().filter_map(|name| parse_number(name)).max();
        let mut lower = names.iter().filter(|name| parse_number(name) < highest);
        lower.try_for_each(|name| disk::remove(&directory.join(name)))
    }
}
