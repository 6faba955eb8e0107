//! The copy of one table of the control memory, as it was when the image was taken.
//!
//! ```text
//!   table   │ used entries                                          │ never used
//!           │ chunk │ chunk │ chunk │ …                       │ rest │
//!   copy      plain   lz4     lz4                               plain
//! ```
//!
//! A record of a thread is mostly zeros, and those of a million parked threads do not change from image to image. So a chunk that was the
//! same in some images is kept compressed, and looked at by unpacking it, which is as fast as reading it. Chunks are allocations of
//! their own: a table that grows is not copied to a larger place.

/// Bytes that are compressed together.
const CHUNK: usize = 64 << 10;
/// Images without a change after which a chunk is compressed.
const PATIENCE: u32 = 3;

/// Bytes that lay at `addr`.
#[derive(Debug)]
pub struct Table {
    addr: usize,
    len: usize,
    chunks: Vec<Chunk>,
}

#[derive(Debug)]
enum Chunk {
    /// As they are, and in how many images they have not changed.
    Plain(Box<[u8]>, u32),
    /// Compressed.
    Packed(Box<[u8]>),
}

impl Chunk {
    fn new(bytes: &[u8]) -> Self {
        Self::Plain(bytes.into(), 0)
    }

    /// Calls `f` with the bytes; `room` is working memory for a chunk.
    fn with<R>(&self, room: &mut [u8; CHUNK], f: impl FnOnce(&[u8]) -> R) -> R {
        match self {
            Self::Plain(bytes, _) => f(bytes),
            Self::Packed(bytes) => {
                let len = lz4_flex::block::decompress_into(bytes, room);
                // This process compressed them, and nobody else can write them.
                f(&room[..len.expect("a chunk that was compressed is whole")])
            }
        }
    }

    /// Becomes `now`.
    fn take(&mut self, now: &[u8], room: &mut [u8; CHUNK]) {
        let same = self.with(room, |then| then == now);
        match self {
            Self::Packed(_) if same => {}
            Self::Plain(_, images) if same => {
                *images += 1;
                // One that can still grow stays as it is.
                if *images >= PATIENCE && now.len() == CHUNK {
                    let mut packed = vec![0; lz4_flex::block::get_maximum_output_size(CHUNK)];
                    match lz4_flex::block::compress_into(now, &mut packed) {
                        Ok(len) if len < CHUNK / 2 => *self = Self::Packed(packed[..len].into()),
                        _ => *images = 0,
                    }
                }
            }
            Self::Plain(bytes, images) if bytes.len() == now.len() => {
                bytes.copy_from_slice(now);
                *images = 0;
            }
            _ => *self = Self::new(now),
        }
    }
}

impl Table {
    /// A copy of the bytes at `addr`.
    pub fn new(addr: usize, now: &[u8]) -> Self {
        Self { addr, len: now.len(), chunks: now.chunks(CHUNK).map(Chunk::new).collect() }
    }

    /// Where the table lies.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// Bytes of it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Becomes a copy of `now`.
    pub fn take(&mut self, now: &[u8]) {
        let mut room = room();
        self.len = now.len();
        self.chunks.truncate(now.len().div_ceil(CHUNK));
        for (i, bytes) in now.chunks(CHUNK).enumerate() {
            match self.chunks.get_mut(i) {
                Some(chunk) => chunk.take(bytes, &mut room),
                None => self.chunks.push(Chunk::new(bytes)),
            }
        }
    }

    /// Calls `f` with the bytes, piece by piece, and where each belongs.
    pub fn for_each(&self, mut f: impl FnMut(usize, &[u8])) {
        let mut room = room();
        for (i, chunk) in self.chunks.iter().enumerate() {
            chunk.with(&mut room, |bytes| f(self.addr + i * CHUNK, bytes));
        }
    }

    /// All bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len);
        self.for_each(|_, bytes| all.extend_from_slice(bytes));
        all
    }

    /// The eight bytes at offset `at`, if the table has them. Entries do not cross chunks, of which their size is a divisor.
    pub fn word(&self, at: usize) -> Option<[u8; 8]> {
        let chunk = self.chunks.get(at / CHUNK)?;
        chunk.with(&mut room(), |bytes| bytes.get(at % CHUNK..at % CHUNK + 8)?.try_into().ok())
    }
}

/// Working memory for a chunk.
fn room() -> Box<[u8; CHUNK]> {
    vec![0; CHUNK].into_boxed_slice().try_into().expect("it is as long as asked for")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries of 256 bytes, mostly zeros.
    fn entries(count: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; count * 256];
        for (i, entry) in bytes.chunks_mut(256).enumerate() {
            entry[..8].copy_from_slice(&(i as u64 * 3).to_ne_bytes());
            entry[128..136].copy_from_slice(&(i as u64 ^ seed).to_ne_bytes());
        }
        bytes
    }

    fn holds(copy: &Table, now: &[u8]) {
        assert!(copy.bytes() == now);
        assert_eq!(copy.len(), now.len());
        for at in (0..now.len()).step_by(8 * 251) {
            assert_eq!(copy.word(at).unwrap(), now[at..at + 8]);
        }
        assert_eq!(copy.word(now.len()), None);
        let mut next = copy.addr();
        copy.for_each(|at, bytes| {
            assert_eq!(at, next);
            next += bytes.len();
        });
        assert_eq!(next, copy.addr() + now.len());
    }

    fn memory(copy: &Table) -> usize {
        let of = |c: &Chunk| match c {
            Chunk::Plain(bytes, _) | Chunk::Packed(bytes) => bytes.len(),
        };
        copy.chunks.iter().map(of).sum()
    }

    #[test]
    fn a_copy_is_what_the_table_was_whatever_changed_and_takes_little_where_nothing_does() {
        let mut now = entries(2000, 1);
        let mut copy = Table::new(4096, &now);
        holds(&copy, &now);
        for _ in 0..PATIENCE + 1 {
            copy.take(&now);
            holds(&copy, &now);
        }
        // All but the last chunk, which is not full.
        assert!(memory(&copy) < now.len() / 4 + CHUNK, "{} of {}", memory(&copy), now.len());
        for changed in [0, CHUNK - 1, CHUNK, 3 * CHUNK + 77, now.len() - 1] {
            now[changed] ^= 0x55;
            copy.take(&now);
            holds(&copy, &now);
        }
        // It grows, shrinks, and changes altogether.
        for (count, seed) in [(2001, 1), (4000, 1), (4000, 2), (256, 2), (3, 9), (0, 0), (700, 3)] {
            now = entries(count, seed);
            for _ in 0..PATIENCE + 2 {
                copy.take(&now);
                holds(&copy, &now);
            }
        }
    }
}
