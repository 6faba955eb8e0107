//! Looking at every byte of a store.

use crate::disk;
use crate::error::{Result, StoreError};
use crate::load::Expected;
use crate::paths::{parse_chunk, parse_image, parse_number, parse_sequence};
use crate::store::{Store, build_id_of};
use peregrine_base::PAGE_SIZE;
use peregrine_image::{Chunk, ImageIndex, Manifest, Mark, Sequence, Source};
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

/// What [`Store::verify`] found.
#[derive(Debug, Default)]
pub struct Report {
    /// Files that were read to the end.
    pub files: usize,
    /// Everything that is wrong; each names its file. Empty for a store that is whole.
    pub damage: Vec<StoreError>,
    /// What lies in the store and is not its own.
    pub strange: Vec<PathBuf>,
}

impl Store {
    /// Checks every file, whether or not an image needs it: all checksums, and each manifest against the files that it
    /// names. A running life may go on meanwhile; what it prunes is not missed.
    ///
    /// # Errors
    /// If a directory can't be listed. Damage is no error here: it is the result.
    pub fn verify(&self) -> Result<Report> {
        let mut report = Report::default();
        self.verify_executable(&mut report);
        self.verify_mark(&mut report);
        self.verify_images(&mut report)?;
        self.verify_chunks(&mut report)?;
        self.verify_worlds(&mut report)?;
        self.look_for_strangers(&mut report)?;
        Ok(report)
    }

    /// Everything that keeps image `sequence` from being thawed. Empty if it is whole.
    pub fn check_world(&self, sequence: Sequence) -> Vec<StoreError> {
        match self.read_manifest(sequence) {
            Ok(manifest) => self.check_files_of(&manifest, Depth::Pages),
            Err(error) => vec![error],
        }
    }

    /// What `manifest` names and is missing, damaged or not what was committed.
    fn check_files_of(&self, manifest: &Manifest, depth: Depth) -> Vec<StoreError> {
        let mut damage = Vec::new();
        for chain in &manifest.chains {
            let mut base = None;
            for member in &chain.members {
                let expected = Expected {
                    thread: chain.thread,
                    build: manifest.build,
                    base,
                    named_by: manifest.sequence,
                };
                let checked =
                    self.open_member(member, &expected).and_then(|(path, file, index)| match depth {
                        Depth::Pages => check_pages(&path, &file, &index),
                        Depth::Tables => Ok(()),
                    });
                damage.extend(checked.err());
                base = Some(member.sequence);
            }
        }
        damage.extend(manifest.chunks.iter().filter_map(|c| self.read_chunk(c, manifest.sequence).err()));
        damage
    }

    fn verify_executable(&self, report: &mut Report) {
        let executable = self.executable();
        report.files += 2;
        match build_id_of(&executable.path) {
            Ok(found) if found == executable.build => {}
            Ok(found) => report.damage.push(StoreError::WrongExecutable {
                path: executable.path,
                found,
                expected: executable.build,
            }),
            Err(error) => report.damage.push(error),
        }
    }

    fn verify_mark(&self, report: &mut Report) {
        let path = self.paths.released();
        report.files += 1;
        let slots =
            disk::read(&path).and_then(|bytes| Mark::parse_slots(&bytes).map_err(StoreError::damaged(&path)));
        match slots {
            Ok(slots) => {
                let damaged = slots.into_iter().filter_map(|slot| slot.err());
                report
                    .damage
                    .extend(damaged.map(|source| StoreError::Damaged { path: path.clone(), source }));
            }
            Err(error) => report.damage.push(error),
        }
    }

    fn verify_images(&self, report: &mut Report) -> Result<()> {
        let threads = self.paths.directory("threads");
        for thread in disk::list(&threads)? {
            let directory = threads.join(&thread);
            if parse_number(&thread).is_none() {
                report.strange.push(directory);
                continue;
            }
            for name in disk::list(&directory)? {
                let path = directory.join(&name);
                match parse_image(&name) {
                    Some(_) => report.look_at(&path, check_image(&path)),
                    None => report.strange.push(path),
                }
            }
        }
        Ok(())
    }

    fn verify_chunks(&self, report: &mut Report) -> Result<()> {
        let directory = self.paths.directory("output");
        for name in disk::list(&directory)? {
            let path = directory.join(&name);
            match parse_chunk(&name) {
                Some(_) => report.look_at(&path, check_chunk(&path)),
                None => report.strange.push(path),
            }
        }
        Ok(())
    }

    fn verify_worlds(&self, report: &mut Report) -> Result<()> {
        let directory = self.paths.directory("world");
        // What many manifests name is said once, by the first of them.
        let mut said: BTreeSet<String> = report.damage.iter().map(|error| error.to_string()).collect();
        for name in disk::list(&directory)? {
            let path = directory.join(&name);
            let Some(sequence) = parse_sequence(&name) else {
                report.strange.push(path);
                continue;
            };
            let damage = match self.read_manifest(sequence) {
                Ok(manifest) => self.check_files_of(&manifest, Depth::Tables),
                Err(error) => vec![error],
            };
            if !path.exists() {
                continue;
            }
            report.files += 1;
            for error in damage {
                if said.insert(error.to_string()) {
                    report.damage.push(error);
                }
            }
        }
        Ok(())
    }

    fn look_for_strangers(&self, report: &mut Report) -> Result<()> {
        let ours = crate::paths::Paths::DIRECTORIES.iter().chain(&crate::paths::Paths::FILES);
        let ours: Vec<&str> = ours.copied().collect();
        let root = disk::list(self.path())?.into_iter().filter(|name| !ours.contains(&name.as_str()));
        report.strange.extend(root.map(|name| self.path().join(name)));
        let bin = self.paths.directory("bin");
        let others = disk::list(&bin)?.into_iter().filter(|name| *name != self.format.executable);
        report.strange.extend(others.map(|name| bin.join(name)));
        Ok(())
    }
}

impl Report {
    fn look_at(&mut self, path: &Path, found: Result<()>) {
        match found {
            // Pruned between the listing and the reading.
            Err(_) if !path.exists() => {}
            Err(error) => {
                self.files += 1;
                self.damage.push(error);
            }
            Ok(()) => self.files += 1,
        }
    }
}

/// How far down a check goes.
#[derive(Clone, Copy)]
enum Depth {
    Tables,
    Pages,
}

/// Checks an image and all its pages.
fn check_image(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(StoreError::io("open", path))?;
    let index = ImageIndex::read(&file).map_err(StoreError::damaged(path))?;
    check_pages(path, &file, &index)
}

fn check_pages(path: &Path, file: &File, index: &ImageIndex) -> Result<()> {
    let mut bytes = [0; PAGE_SIZE];
    for page in index.pages() {
        if let Some(offset) = page.offset_bytes() {
            Source::read_exact_at(file, &mut bytes, offset).map_err(StoreError::io("read", path))?;
            page.check(&bytes).map_err(StoreError::damaged(path))?;
        }
    }
    Ok(())
}

fn check_chunk(path: &Path) -> Result<()> {
    Chunk::parse(&disk::read(path)?).map(drop).map_err(StoreError::damaged(path))
}
