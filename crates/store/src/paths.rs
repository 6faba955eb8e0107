//! The names in a store, both ways.
//!
//! ```text
//! DIR/format                                     what this is; its creation makes the directory a store
//! DIR/lock                                       held by the running life
//! DIR/released                                   how much output has left
//! DIR/bin/{name}                                 the executable
//! DIR/generation/{generation}                    one empty file for each life
//! DIR/world/{sequence}                           one manifest for each commit: THE commit
//! DIR/threads/{thread}/{generation}.{sequence}   images of one thread
//! DIR/output/{start}.{generation}.{sequence}     chunks of output
//! DIR/tmp/…                                      what is not finished; emptied by the next life
//! ```
//!
//! Numbers are written with at least 16 decimal digits, so that a listing sorts, and a name is read only if it is
//! exactly what would be written: no two names mean one thing. Images and chunks carry the generation because a life
//! that died before its commit leaves some behind; the next life commits the same sequence and must not meet them.

use peregrine_image::{ChunkRef, Generation, Sequence, ThreadId};
use std::path::{Path, PathBuf};

#[derive(Clone, Debug)]
pub(crate) struct Paths {
    root: PathBuf,
}

impl Paths {
    pub(crate) const DIRECTORIES: [&'static str; 6] =
        ["bin", "generation", "output", "threads", "tmp", "world"];
    pub(crate) const FILES: [&'static str; 3] = ["format", "lock", "released"];

    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn format(&self) -> PathBuf {
        self.root.join("format")
    }

    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(crate) fn released(&self) -> PathBuf {
        self.root.join("released")
    }

    pub(crate) fn directory(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn executable(&self, name: &str) -> PathBuf {
        self.root.join("bin").join(name)
    }

    pub(crate) fn temporary(&self, n: u64) -> PathBuf {
        self.root.join("tmp").join(format!("{n:016}"))
    }

    pub(crate) fn generation(&self, generation: Generation) -> PathBuf {
        self.root.join("generation").join(number(generation.get()))
    }

    pub(crate) fn world(&self, sequence: Sequence) -> PathBuf {
        self.root.join("world").join(number(sequence.get()))
    }

    pub(crate) fn thread(&self, thread: ThreadId) -> PathBuf {
        self.root.join("threads").join(number(thread.get()))
    }

    pub(crate) fn image(&self, thread: ThreadId, generation: Generation, sequence: Sequence) -> PathBuf {
        self.thread(thread).join(image_name(generation, sequence))
    }

    pub(crate) fn chunk(&self, chunk: &ChunkRef) -> PathBuf {
        let name = format!("{:016}.{}", chunk.start, image_name(chunk.generation, chunk.sequence));
        self.root.join("output").join(name)
    }
}

fn number(n: u64) -> String {
    format!("{n:016}")
}

fn image_name(generation: Generation, sequence: Sequence) -> String {
    format!("{:016}.{:016}", generation.get(), sequence.get())
}

/// Reads a number that [`number`] wrote.
pub(crate) fn parse_number(name: &str) -> Option<u64> {
    let n = name.parse().ok()?;
    (number(n) == name).then_some(n)
}

/// Reads the name of a manifest.
pub(crate) fn parse_sequence(name: &str) -> Option<Sequence> {
    parse_number(name).and_then(Sequence::new)
}

/// Reads the name of an image in its thread's directory.
pub(crate) fn parse_image(name: &str) -> Option<(Generation, Sequence)> {
    let (generation, sequence) = name.split_once('.')?;
    Some((Generation::new(parse_number(generation)?), parse_sequence(sequence)?))
}

/// Reads the name of a chunk.
pub(crate) fn parse_chunk(name: &str) -> Option<(u64, Generation, Sequence)> {
    let (start, image) = name.split_once('.')?;
    let (generation, sequence) = parse_image(image)?;
    Some((parse_number(start)?, generation, sequence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_only_if_it_is_exactly_what_would_be_written() {
        let generation = Generation::new(3);
        let sequence = Sequence::new(u64::MAX).unwrap();
        let name = image_name(generation, sequence);
        assert_eq!(parse_image(&name), Some((generation, sequence)));
        assert_eq!(parse_chunk(&format!("{:016}.{name}", 0)), Some((0, generation, sequence)));
        for wrong in
            ["", "1", "+000000000000001", "0000000000000000", "00000000000000001", "000000000000000x"]
        {
            assert_eq!(parse_sequence(wrong), None, "{wrong}");
        }
        for wrong in ["0000000000000001", "0000000000000001.", "0000000000000001.0000000000000002.0"] {
            assert_eq!(parse_image(wrong), None, "{wrong}");
        }
    }
}
