//! One commit: many files, one name that makes them count.
//!
//! ```text
//!  thread(), output()     tmp/…            written, nobody sees them
//!  finish():
//!    1 fsync / syncfs     tmp/…            durable
//!    2 rename, exclusive  threads/…, output/…   complete and durable before they have their names
//!    3 fsync / syncfs     the directories  their names are durable
//!    4 write, fsync       tmp/…            the manifest that lists them
//!    5 rename, exclusive  world/{sequence} ◀── THE COMMIT: before it the old image holds, after it the new one
//!    6 fsync              world            durable; only now does `finish` return
//! ```
//!
//! A failure before 5 takes back what was made; what a *death* before 5 leaves is listed by no manifest, has a name that
//! no other life uses, and is removed by [`prune`](crate::Store::prune). A failure of 6 leaves the commit visible and perhaps not
//! durable: nothing may be released on its word, so the store stops ([`StoreError::InDoubt`]).

use crate::disk::{self, Writing};
use crate::error::{Misuse, Result, StoreError};
use crate::paths::parse_number;
use crate::stage::Staging;
use crate::store::{Held, Life, Store};
use crate::thread_image::ThreadImage;
use peregrine_base::{PAGE_SIZE, VirtAddr};
use peregrine_image::{Chain, Chunk, ChunkRef, Generation, ImageInfo, Manifest, Member, Sequence, ThreadId};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;

/// How many times the size of the full image all deltas on top of it may have.
const MAX_DELTA_SHARE: u64 = 4;

/// A commit that is being put together. Dropped without [`finish`](Self::finish) it never was.
#[derive(Debug)]
pub struct Commit<'a> {
    store: &'a mut Store,
    generation: Generation,
    sequence: Sequence,
    chains: BTreeMap<ThreadId, Vec<Member>>,
    passed: BTreeSet<ThreadId>,
    output: Vec<u8>,
    staging: Staging,
    bytes: u64,
}

/// What a commit wrote.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Committed {
    /// Its sequence.
    pub sequence: Sequence,
    /// Files made, the manifest included.
    pub files: usize,
    /// Bytes in them.
    pub bytes: u64,
    /// Bytes of output that may leave now.
    pub output_end: u64,
}

impl Store {
    /// Begins the commit of image `sequence` by the life `generation`.
    ///
    /// # Errors
    /// [`Misuse`] if no generation was claimed, or this is not the one, or `sequence` is not
    /// [`next_sequence`](Self::next_sequence); [`StoreError::Stopped`] after an error that left the store in doubt.
    pub fn begin(&mut self, generation: Generation, sequence: Sequence) -> Result<Commit<'_>> {
        let held = self.held()?;
        if let Some(why) = &held.stopped {
            return Err(StoreError::Stopped { why: why.clone() });
        }
        let life = held.life()?;
        if life.generation != generation {
            return Err(Misuse::NotYourGeneration { given: generation, claimed: life.generation }.into());
        }
        if life.next != sequence {
            return Err(Misuse::NotNext { given: sequence, next: life.next }.into());
        }
        let chains = life.chains.clone();
        Ok(Commit {
            store: self,
            generation,
            sequence,
            chains,
            passed: BTreeSet::new(),
            output: Vec::new(),
            staging: Staging::default(),
            bytes: 0,
        })
    }

    /// The sequence of the next commit.
    ///
    /// # Errors
    /// [`Misuse::NoGeneration`], [`Misuse::ReadOnly`].
    pub fn next_sequence(&self) -> Result<Sequence> {
        Ok(self.held()?.life()?.next)
    }
}

impl<'a> Commit<'a> {
    /// Whether all pages of `thread` are wanted and not a delta: it has no image yet, or its chain has more deltas than
    /// [`Store::set_max_deltas`] allows, or they are together more than four times as large as the full image, so that
    /// writing that again costs less than keeping and reading them.
    pub fn wants_full(&self, thread: ThreadId) -> bool {
        let Some((full, deltas)) = self.chains.get(&thread).and_then(|members| members.split_first()) else {
            return true;
        };
        let delta_bytes = deltas.iter().fold(0, |sum: u64, delta| sum.saturating_add(delta.len_bytes));
        deltas.len() >= self.store.max_deltas || delta_bytes / MAX_DELTA_SHARE > full.len_bytes
    }

    /// The last image of `thread`: what a delta in this commit is relative to.
    pub fn base_of(&self, thread: ThreadId) -> Option<Sequence> {
        self.chains.get(&thread)?.last().map(|member| member.sequence)
    }

    /// Adds the pages of `thread` that changed since image `base`, or all its pages if there is none, in ascending
    /// order. A page that is no longer in use is passed as zeros, in a full image it is left out. A thread that is not
    /// passed has not changed.
    ///
    /// # Errors
    /// [`Misuse`] if `base` is not the thread's last image or the thread was passed already;
    /// [`StoreError::Page`] for pages out of order; [`StoreError::Io`].
    pub fn thread<'p>(
        &mut self,
        thread: ThreadId,
        base: Option<Sequence>,
        pages: impl IntoIterator<Item = (VirtAddr, &'p [u8; PAGE_SIZE])>,
    ) -> Result<()> {
        let mut image = self.thread_image(thread, base)?;
        for (address, page) in pages {
            image.page(address, page)?;
        }
        image.finish()
    }

    /// As [`thread`](Self::thread), for a caller that has one page at a time.
    ///
    /// # Errors
    /// As [`thread`](Self::thread).
    pub fn thread_image(&mut self, thread: ThreadId, base: Option<Sequence>) -> Result<ThreadImage<'_, 'a>> {
        let last = self.base_of(thread);
        if base.is_some() && base != last {
            return Err(Misuse::WrongBase { thread, given: base, last }.into());
        }
        if self.passed.contains(&thread) {
            return Err(Misuse::ThreadTwice { thread }.into());
        }
        let info = ImageInfo {
            build: self.store.format.build,
            world: self.store.format.world,
            thread,
            generation: self.generation,
            sequence: self.sequence,
            base,
        };
        let name = self.store.paths.image(thread, self.generation, self.sequence);
        let file = self.create_temporary()?;
        ThreadImage::begin(self, info, file, name)
    }

    /// Says that `thread` is gone: the image does not hold it.
    ///
    /// # Errors
    /// [`Misuse::ThreadTwice`] if it was passed in this commit.
    pub fn forget(&mut self, thread: ThreadId) -> Result<()> {
        if self.passed.contains(&thread) {
            return Err(Misuse::ThreadTwice { thread }.into());
        }
        self.chains.remove(&thread);
        Ok(())
    }

    /// Adds output, which becomes visible with this commit.
    pub fn output(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    /// Commits. When this returns `Ok` the image survives everything that the disk survives, and is the latest.
    ///
    /// After an error the image before is untouched and is the latest; the pages that were passed are still unsaved.
    ///
    /// # Errors
    /// [`StoreError::Lost`] and [`StoreError::Superseded`] if another life goes on with this world: stop;
    /// [`StoreError::InDoubt`]: stop; [`StoreError::Io`]: the caller may mend its cause and commit this sequence again.
    pub fn finish(mut self, control: Vec<u8>) -> Result<Committed> {
        let chunk = self.stage_output()?;
        let (root, path) = (&self.store.held()?.root, self.store.paths.root());
        self.staging.make_durable(root, path)?;
        if let Some(path) = self.staging.publish(root, path)? {
            // Another life with our generation: impossible unless it forged one. Stop rather than guess.
            return Err(StoreError::Lost { sequence: self.sequence, path });
        }
        let manifest = self.manifest(chunk, control)?;
        let files = self.staging.len() + 1;
        self.publish_manifest(&manifest)?;

        let held = self.store.held_mut()?;
        if let Some(life) = &mut held.life {
            life.previous = Some(self.sequence);
            life.output_end = manifest.output_end;
            life.chunks = manifest.chunks;
            life.chains = std::mem::take(&mut self.chains);
            match self.sequence.next() {
                Some(next) => life.next = next,
                None => held.stopped = Some("its sequence numbers are used up".into()),
            }
        }
        Ok(Committed { sequence: self.sequence, files, bytes: self.bytes, output_end: manifest.output_end })
    }

    /// Takes over a finished image.
    pub(crate) fn add_image(&mut self, info: &ImageInfo, member: Member, file: Writing, name: PathBuf) {
        self.passed.insert(info.thread);
        self.bytes += member.len_bytes;
        let members = self.chains.entry(info.thread).or_default();
        if info.base.is_none() {
            members.clear();
        }
        members.push(member);
        self.staging.add(file, name);
    }

    fn held(&self) -> Result<&Held> {
        self.store.held()
    }

    fn life(&self) -> Result<&Life> {
        self.held()?.life()
    }

    fn create_temporary(&mut self) -> Result<Writing> {
        let held = self.store.held_mut()?;
        let n = held.next_temporary;
        held.next_temporary = n.wrapping_add(1);
        Writing::create(self.store.paths.temporary(n), 0o600)
    }

    fn stage_output(&mut self) -> Result<Option<ChunkRef>> {
        if self.output.is_empty() {
            return Ok(None);
        }
        let start = self.life()?.output_end;
        let output = std::mem::take(&mut self.output);
        let chunk = Chunk::new(self.store.format.world, self.generation, self.sequence, start, &output);
        let name = self.store.paths.chunk(&chunk.place);
        self.stage_bytes(&[&chunk.header_bytes(), &output], name)?;
        Ok(Some(chunk.place))
    }

    /// Writes a file of `parts` that is to be called `name`.
    fn stage_bytes(&mut self, parts: &[&[u8]], name: PathBuf) -> Result<()> {
        let mut file = self.create_temporary()?;
        let written =
            parts.iter().try_for_each(|part| file.write_all(part)).map_err(StoreError::io("write", &name));
        self.bytes += parts.iter().map(|part| part.len() as u64).sum::<u64>();
        // Taken over even if it is not whole, so that it is taken back.
        self.staging.add(file, name);
        written
    }

    fn manifest(&self, chunk: Option<ChunkRef>, control: Vec<u8>) -> Result<Manifest> {
        let (held, life) = (self.held()?, self.life()?);
        let released = held.mark.released();
        let unreleased = life.chunks.iter().filter(|chunk| chunk.start + chunk.len_bytes > released);
        let chain = |(thread, members): (&ThreadId, &Vec<Member>)| Chain {
            thread: *thread,
            members: members.clone(),
        };
        Ok(Manifest {
            build: self.store.format.build,
            world: self.store.format.world,
            generation: self.generation,
            sequence: self.sequence,
            previous: life.previous,
            released,
            output_end: chunk.map_or(life.output_end, |chunk| chunk.start + chunk.len_bytes),
            chains: self.chains.iter().map(chain).collect(),
            chunks: unreleased.copied().chain(chunk).collect(),
            control,
        })
    }

    /// Makes the commit. Once the manifest has its name there is no way back.
    fn publish_manifest(&mut self, manifest: &Manifest) -> Result<()> {
        let name = self.store.paths.world(self.sequence);
        let bytes = manifest.to_bytes();
        // The old image holds until the new one can be read: should a fault of ours make one that can't, it is not made.
        Manifest::parse(&bytes).map_err(StoreError::damaged(&name))?;
        let mut file = self.create_temporary()?;
        let temporary = file.path.clone();
        let ready = file
            .write_all(&bytes)
            .map_err(StoreError::io("write", &name))
            .and_then(|()| disk::sync_file(&file.file, &temporary))
            .and_then(|()| self.refuse_if_superseded())
            .and_then(|()| disk::publish(&temporary, &name));
        match ready {
            Ok(true) => self.staging.keep(),
            Ok(false) => {
                let _ = disk::remove(&temporary);
                return Err(StoreError::Lost { sequence: self.sequence, path: name });
            }
            Err(error) => {
                let _ = disk::remove(&temporary);
                return Err(error);
            }
        }
        self.bytes += bytes.len() as u64;
        let durable = disk::sync_directory(&self.store.paths.directory("world"));
        // A name is exclusive only while it exists: the winner may have pruned it meanwhile. Ask again.
        let durable = durable.and_then(|()| self.refuse_if_superseded());
        durable.map_err(|source| {
            let error = match source {
                StoreError::Superseded { .. } => source,
                _ => StoreError::InDoubt { sequence: self.sequence, source: Box::new(source) },
            };
            self.stop(&error);
            error
        })
    }

    /// Who wins is decided by the name of the image; this tells a life that lost, early and late.
    fn refuse_if_superseded(&self) -> Result<()> {
        let names = disk::list(&self.store.paths.directory("generation"))?;
        match names.iter().filter_map(|name| parse_number(name)).max() {
            Some(highest) if highest > self.generation.get() => {
                Err(StoreError::Superseded { mine: self.generation, by: Generation::new(highest) })
            }
            _ => Ok(()),
        }
    }

    fn stop(&mut self, why: &StoreError) {
        if let Some(held) = &mut self.store.held {
            held.stopped = Some(why.to_string());
        }
    }
}

impl Drop for Commit<'_> {
    /// Takes back what a commit that did not happen has made.
    fn drop(&mut self) {
        if let Err(error) = self.staging.take_back() {
            self.stop(&error);
        }
    }
}
