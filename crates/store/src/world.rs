//! Finding the image to go on from, and taking possession of it.
//!
//! Going back is refused unless it can hide nothing. An image that has a successor is not thawed: the world went on
//! from it, and what happened since may have been seen. If the latest image is *damaged* the store does not quietly
//! take the one before; it says so, and [`Store::go_back_to`] then does it, but only over images that are damaged
//! indeed. The damaged ones keep their names (the life that goes on takes the next free sequence), so they can still
//! be repaired from a copy and nothing is lost.
//!
//! ```text
//! world/10  whole                  latest() → LatestDamaged { 11, go_back: 10 }
//! world/11  damaged                go_back_to(10) → the image 10; the next commit is 12, with previous = 10
//! ```

use crate::disk;
use crate::error::{Misuse, Result, StoreError};
use crate::step::reach;
use crate::store::{Life, Store};
use peregrine_image::{BuildId, Generation, Manifest, Sequence, ThreadId};
use std::fs::OpenOptions;
use std::io;

/// One commit of the world, read and checked but for its threads' pages.
#[derive(Clone, Debug)]
pub struct WorldImage {
    pub(crate) manifest: Manifest,
}

impl WorldImage {
    /// Its place in line.
    pub fn sequence(&self) -> Sequence {
        self.manifest.sequence
    }

    /// The life that wrote it.
    pub fn generation(&self) -> Generation {
        self.manifest.generation
    }

    /// The control state that was passed to [`finish`](crate::Commit::finish).
    pub fn control(&self) -> &[u8] {
        &self.manifest.control
    }

    /// The threads that have an image, in ascending order.
    pub fn threads(&self) -> impl Iterator<Item = ThreadId> {
        self.manifest.chains.iter().map(|chain| chain.thread)
    }

    /// Bytes of output that are committed with it and before it: a file that the output goes to is cut to this length.
    pub fn output_end(&self) -> u64 {
        self.manifest.output_end
    }

    /// Everything that was committed.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

impl Store {
    /// The latest image, for `build` to thaw.
    ///
    /// # Errors
    /// [`StoreError::NoImages`]; [`StoreError::ForeignBuild`] if another build wrote it;
    /// [`StoreError::LatestDamaged`], which says what to go back to. Threads' pages are checked by
    /// [`pages`](Self::pages).
    pub fn latest(&self, build: BuildId) -> Result<WorldImage> {
        let sequences = self.sequences()?;
        let latest =
            *sequences.last().ok_or_else(|| StoreError::NoImages { path: self.path().to_path_buf() })?;
        let manifest = self.read_manifest(latest).map_err(|source| match source {
            StoreError::Damaged { .. } | StoreError::Replaced { .. } => self.latest_damaged(latest, source),
            other => other,
        })?;
        self.for_build(manifest, build)
    }

    /// What is to be said if the latest image, `latest`, turns out to be damaged when its [`pages`](Self::pages) are read:
    /// [`StoreError::LatestDamaged`] around `source`, with the image to go back to.
    pub fn latest_damaged(&self, latest: Sequence, source: StoreError) -> StoreError {
        let held = self.sequences().unwrap_or_default();
        let go_back = held.into_iter().rfind(|s| *s < latest);
        StoreError::LatestDamaged { sequence: latest, go_back, source: Box::new(source) }
    }

    /// The image `sequence`, which must be the latest.
    ///
    /// # Errors
    /// As [`latest`](Self::latest); [`StoreError::NoSuchImage`]; [`StoreError::HasSuccessor`].
    pub fn load_sequence(&self, sequence: Sequence, build: BuildId) -> Result<WorldImage> {
        match self.successors(sequence)?.last() {
            Some(&successor) => Err(StoreError::HasSuccessor { sequence, successor }),
            None => self.latest(build),
        }
    }

    /// The image `sequence`, all of whose successors are damaged: what came after it is undone.
    ///
    /// # Errors
    /// [`StoreError::NoSuchImage`]; [`StoreError::HasSuccessor`] names a successor that is whole;
    /// [`StoreError::Damaged`] if `sequence` is damaged itself; [`StoreError::ForeignBuild`].
    pub fn go_back_to(&self, sequence: Sequence, build: BuildId) -> Result<WorldImage> {
        for successor in self.successors(sequence)?.into_iter().rev() {
            if self.check_world(successor).is_empty() {
                return Err(StoreError::HasSuccessor { sequence, successor });
            }
        }
        let manifest = self.read_manifest(sequence)?;
        self.for_build(manifest, build)
    }

    fn successors(&self, sequence: Sequence) -> Result<Vec<Sequence>> {
        let held = self.sequences()?;
        match held.binary_search(&sequence) {
            Ok(at) => Ok(held[at + 1..].to_vec()),
            Err(_) => {
                let held = match (held.first(), held.last()) {
                    (Some(first), Some(last)) => format!("{} images from {first} to {last}", held.len()),
                    _ => "none".into(),
                };
                Err(StoreError::NoSuchImage { path: self.path().to_path_buf(), sequence, held })
            }
        }
    }

    /// Reads the manifest `sequence` and checks that it is this store's.
    pub(crate) fn read_manifest(&self, sequence: Sequence) -> Result<Manifest> {
        let path = self.paths.world(sequence);
        let manifest = Manifest::parse(&disk::read(&path)?).map_err(StoreError::damaged(&path))?;
        if manifest.world != self.format.world {
            return Err(StoreError::ForeignWorld {
                path,
                found: manifest.world,
                expected: self.format.world,
            });
        }
        if manifest.sequence != sequence {
            let (found, expected) = (manifest.sequence.to_string(), sequence.to_string());
            return Err(StoreError::Replaced { path, sequence, field: "sequence", found, expected });
        }
        Ok(manifest)
    }

    fn for_build(&self, manifest: Manifest, build: BuildId) -> Result<WorldImage> {
        if manifest.build == build {
            return Ok(WorldImage { manifest });
        }
        let path = self.paths.world(manifest.sequence);
        let executable = self.executable().path;
        Err(StoreError::ForeignBuild { path, image: manifest.build, this: build, executable })
    }

    /// Begins a life that goes on from `from`, or from nothing in a store without images. From here on it may commit,
    /// and every life of a lower generation is superseded. Of two lives that race for a generation one gets it.
    ///
    /// A mark of output released beyond `from` is set back to its end: what left after it was undone.
    ///
    /// # Errors
    /// [`StoreError::GenerationTaken`]; [`StoreError::HasSuccessor`] if the world went on from `from` meanwhile;
    /// [`Misuse`]; [`StoreError::Io`].
    pub fn claim_generation(&mut self, from: Option<&WorldImage>) -> Result<Generation> {
        let latest = self.sequences()?.last().copied();
        match (from, latest) {
            (None, Some(latest)) => return Err(Misuse::HasImages { latest }.into()),
            (Some(from), _) => {
                for successor in self.successors(from.sequence())? {
                    if self.check_world(successor).is_empty() {
                        return Err(StoreError::HasSuccessor { sequence: from.sequence(), successor });
                    }
                }
            }
            (None, None) => {}
        }
        let free = self.held()?.free_generation;
        if let Some(life) = &self.held()?.life {
            return Err(Misuse::HasGeneration(life.generation).into());
        }
        // Durable names of lives go missing only by force; a commit's own record counts too.
        let above = from.map_or(0, |from| from.generation().get());
        let generation = Generation::new(free.get().max(above.checked_add(1).ok_or(Misuse::NumbersUsedUp)?));
        let next = latest.map_or(Some(Sequence::FIRST), Sequence::next).ok_or(Misuse::NumbersUsedUp)?;
        self.create_generation(generation)?;
        let manifest = from.map(|from| &from.manifest);
        let life = Life {
            generation,
            previous: from.map(WorldImage::sequence),
            next,
            chains: manifest.map_or_else(Default::default, |m| {
                m.chains.iter().map(|chain| (chain.thread, chain.members.clone())).collect()
            }),
            chunks: manifest.map_or_else(Vec::new, |m| m.chunks.clone()),
            output_end: manifest.map_or(0, |m| m.output_end),
        };
        let held = self.held_mut()?;
        // A mark beyond the image speaks of output that is undone; one below what the image recorded is older than it.
        let recorded = manifest.map_or(0, |m| m.released);
        let released = held.mark.released().clamp(recorded, life.output_end);
        if released != held.mark.released() {
            held.mark.set(released)?;
        }
        held.life = Some(life);
        Ok(generation)
    }

    fn create_generation(&self, generation: Generation) -> Result<()> {
        let path = self.paths.generation(generation);
        let claim = || {
            reach("claim generation", &path)?;
            OpenOptions::new().write(true).create_new(true).open(&path)
        };
        match claim() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(StoreError::GenerationTaken { generation, path })
            }
            other => {
                other.map_err(StoreError::io("create", &path))?;
                disk::sync_directory(&self.paths.directory("generation"))
            }
        }
    }
}
