//! A manifest to bytes and back.
//!
//! Reading takes the same steps as reading an image (`index.rs`): both ends, then the sum of the lengths, which bounds
//! every allocation by the length of the file, then each part's checksum, then what the numbers say.

use crate::error::{FileKind, ImageError, Part};
use crate::ids::{BuildId, Generation, Sequence, ThreadId, WorldId};
use crate::layout::{
    ChainEntry, ChunkEntry, FORMAT_VERSION, ManifestHeader, ManifestTrailer, MemberEntry, SelfChecked,
};
use crate::manifest::{Chain, ChunkRef, Manifest, Member};
use crate::open::{Ends, Starts, ends, starts, take};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

starts!(ManifestHeader, Manifest, b"PRGWORLD");
ends!(ManifestTrailer, Manifest, b"PRGWREND");

const FILE: FileKind = FileKind::Manifest;

impl Manifest {
    /// The bytes of its file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let members = self.chains.iter().map(|chain| chain.members.len()).sum::<usize>();
        let header = ManifestHeader {
            magic: <ManifestHeader as Starts>::MAGIC,
            version: U32::new(FORMAT_VERSION),
            crc: U32::ZERO,
            build: *self.build.as_bytes(),
            world: *self.world.as_bytes(),
            generation: U64::new(self.generation.get()),
            sequence: U64::new(self.sequence.get()),
            previous: U64::new(Sequence::encode(self.previous)),
            released: U64::new(self.released),
            output_end: U64::new(self.output_end),
            chain_count: U64::new(self.chains.len() as u64),
            member_count: U64::new(members as u64),
            chunk_count: U64::new(self.chunks.len() as u64),
            control_len: U64::new(self.control.len() as u64),
        }
        .sealed();
        let lists_len = self.chains.len() * ChainEntry::LEN
            + members * MemberEntry::LEN
            + self.chunks.len() * ChunkEntry::LEN;
        let total_len = ManifestHeader::LEN + lists_len + self.control.len() + ManifestTrailer::LEN;
        let mut bytes = Vec::with_capacity(total_len);
        bytes.extend_from_slice(header.as_bytes());
        self.write_lists(&mut bytes);
        let lists_crc = crc32c::crc32c(&bytes[ManifestHeader::LEN..]);
        bytes.extend_from_slice(&self.control);
        let trailer = ManifestTrailer {
            total_len: U64::new(total_len as u64),
            header_crc: header.crc,
            lists_crc: U32::new(lists_crc),
            control_crc: U32::new(crc32c::crc32c(&self.control)),
            crc: U32::ZERO,
            magic: <ManifestTrailer as Ends>::MAGIC,
        };
        bytes.extend_from_slice(trailer.sealed().as_bytes());
        bytes
    }

    fn write_lists(&self, bytes: &mut Vec<u8>) {
        for chain in &self.chains {
            let thread = U64::new(chain.thread.get());
            let member_count = U64::new(chain.members.len() as u64);
            bytes.extend_from_slice(ChainEntry { thread, member_count }.as_bytes());
        }
        for member in self.chains.iter().flat_map(|chain| &chain.members) {
            let entry = MemberEntry {
                generation: U64::new(member.generation.get()),
                sequence: U64::new(member.sequence.get()),
                len: U64::new(member.len_bytes),
                seal: U32::new(member.seal),
            };
            bytes.extend_from_slice(entry.as_bytes());
        }
        for chunk in &self.chunks {
            let entry = ChunkEntry {
                start: U64::new(chunk.start),
                len: U64::new(chunk.len_bytes),
                generation: U64::new(chunk.generation.get()),
                sequence: U64::new(chunk.sequence.get()),
                body_crc: U32::new(chunk.body_crc),
            };
            bytes.extend_from_slice(entry.as_bytes());
        }
    }

    /// Reads a manifest from all bytes of its file.
    ///
    /// # Errors
    /// [`ImageError`], which names the part that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        let have_bytes = bytes.len() as u64;
        let ends_len = (ManifestHeader::LEN + ManifestTrailer::LEN) as u64;
        if have_bytes < ends_len {
            return Err(ImageError::Truncated { file: FILE, have_bytes, need_bytes: ends_len });
        }
        let (header, rest) = take::<ManifestHeader>(FILE, bytes)?;
        let header = header.checked(Part::Header)?;
        let (inner, trailer) = rest.split_at(rest.len() - ManifestTrailer::LEN);
        let trailer = take::<ManifestTrailer>(FILE, trailer)?.0.checked(have_bytes, header.crc.get())?;

        let lists_len = header
            .chain_count
            .get()
            .saturating_mul(ChainEntry::LEN as u64)
            .saturating_add(header.member_count.get().saturating_mul(MemberEntry::LEN as u64))
            .saturating_add(header.chunk_count.get().saturating_mul(ChunkEntry::LEN as u64));
        let claimed = lists_len.saturating_add(header.control_len.get());
        ImageError::expect(FILE, Part::Header, "counts and lengths of", claimed, inner.len() as u64)?;
        // No truncation: `lists_len` is at most the length of a slice.
        let (lists, control) = inner.split_at(lists_len as usize);
        ImageError::check(FILE, Part::Lists, trailer.lists_crc.get(), crc32c::crc32c(lists))?;
        ImageError::check(FILE, Part::Control, trailer.control_crc.get(), crc32c::crc32c(control))?;

        let (chains, rest) = read_chains(&header, lists)?;
        Ok(Self {
            build: BuildId::from_bytes(header.build),
            world: WorldId::from_bytes(header.world),
            generation: Generation::new(header.generation.get()),
            sequence: Sequence::new(header.sequence.get()).ok_or(wrong_header("sequence", 0, 1))?,
            previous: read_previous(&header)?,
            released: header.released.get(),
            output_end: header.output_end.get(),
            chains,
            chunks: read_chunks(&header, rest)?,
            control: control.to_vec(),
        })
    }
}

fn wrong(field: &'static str, found: u64, expected: u64) -> ImageError {
    ImageError::Inconsistent { file: FILE, part: Part::Lists, field, found, expected }
}

fn wrong_header(field: &'static str, found: u64, expected: u64) -> ImageError {
    ImageError::Inconsistent { file: FILE, part: Part::Header, field, found, expected }
}

fn read_previous(header: &ManifestHeader) -> Result<Option<Sequence>, ImageError> {
    let (previous, sequence) = (header.previous.get(), header.sequence.get());
    if previous >= sequence {
        return Err(wrong_header("previous", previous, sequence.saturating_sub(1)));
    }
    Ok(Sequence::new(previous))
}

/// Reads chains and members; returns the bytes of the chunks that follow.
fn read_chains<'a>(header: &ManifestHeader, lists: &'a [u8]) -> Result<(Vec<Chain>, &'a [u8]), ImageError> {
    let short = || wrong("length", lists.len() as u64, u64::MAX);
    // No truncation: the caller checked that this many entries lie in `lists`.
    let (chain_count, member_count) = (header.chain_count.get() as usize, header.member_count.get() as usize);
    let (entries, rest) =
        <[ChainEntry]>::ref_from_prefix_with_elems(lists, chain_count).map_err(|_| short())?;
    let (mut members, rest) =
        <[MemberEntry]>::ref_from_prefix_with_elems(rest, member_count).map_err(|_| short())?;
    let mut chains: Vec<Chain> = Vec::with_capacity(chain_count);
    for entry in entries {
        let thread = ThreadId::new(entry.thread.get());
        if let Some(before) = chains.last().filter(|before| before.thread >= thread) {
            return Err(wrong("thread", thread.get(), before.thread.get().saturating_add(1)));
        }
        let count = entry.member_count.get();
        let own = usize::try_from(count).ok().filter(|count| (1..=members.len()).contains(count));
        let own = own.ok_or(wrong("member_count", count, members.len() as u64))?;
        let (own, others) = members.split_at(own);
        members = others;
        chains.push(Chain { thread, members: read_members(header, own)? });
    }
    if members.is_empty() {
        Ok((chains, rest))
    } else {
        Err(wrong("members too many", members.len() as u64, 0))
    }
}

fn read_members(header: &ManifestHeader, entries: &[MemberEntry]) -> Result<Vec<Member>, ImageError> {
    let mut members: Vec<Member> = Vec::with_capacity(entries.len());
    for entry in entries {
        let least = members.last().map_or(1, |before| before.sequence.get().saturating_add(1));
        let number = entry.sequence.get();
        if number < least || number > header.sequence.get() {
            return Err(wrong("member sequence", number, least));
        }
        let sequence = Sequence::new(number).ok_or(wrong("member sequence", number, least))?;
        members.push(Member {
            generation: Generation::new(entry.generation.get()),
            sequence,
            len_bytes: entry.len.get(),
            seal: entry.seal.get(),
        });
    }
    Ok(members)
}

fn read_chunks(header: &ManifestHeader, bytes: &[u8]) -> Result<Vec<ChunkRef>, ImageError> {
    let (released, end) = (header.released.get(), header.output_end.get());
    if released > end {
        return Err(wrong_header("released", released, end));
    }
    let mut chunks: Vec<ChunkRef> = Vec::with_capacity(bytes.len() / ChunkEntry::LEN);
    let mut next = None;
    for entry in bytes.chunks_exact(ChunkEntry::LEN) {
        let (entry, _) = ChunkEntry::read_from_prefix(entry).map_err(|_| wrong("length", 0, 1))?;
        let (start, len_bytes) = (entry.start.get(), entry.len.get());
        if start != next.unwrap_or(start.min(released)) {
            return Err(wrong("chunk start", start, next.unwrap_or(released)));
        }
        next = Some(start.checked_add(len_bytes).ok_or(wrong("chunk length", len_bytes, end))?);
        chunks.push(ChunkRef {
            start,
            len_bytes,
            generation: Generation::new(entry.generation.get()),
            sequence: Sequence::new(entry.sequence.get()).ok_or(wrong("chunk sequence", 0, 1))?,
            body_crc: entry.body_crc.get(),
        });
    }
    match next.unwrap_or(released) {
        reached if reached == end => Ok(chunks),
        reached => Err(wrong("end of chunks", reached, end)),
    }
}
