//! `DIR/format`: what the directory is, in a form that a person can read too.
//!
//! ```text
//! peregrine store 1
//! world 00112233445566778899aabbccddeeff
//! build 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
//! executable cg
//! crc32c 1a2b3c4d
//! ```
//!
//! Read by taking the values out and writing the text anew: it must be the same to the byte.

use crate::error::{Result, StoreError};
use peregrine_image::{BuildId, WorldId};
use std::path::Path;

/// The version of the directory's layout.
pub(crate) const STORE_VERSION: u32 = 1;

/// What a store is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Format {
    pub(crate) world: WorldId,
    pub(crate) build: BuildId,
    /// Name of the executable in `DIR/bin`.
    pub(crate) executable: String,
}

impl Format {
    pub(crate) fn to_text(&self) -> String {
        let Self { world, build, executable } = self;
        let text = format!(
            "peregrine store {STORE_VERSION}\nworld {world}\nbuild {build}\nexecutable {executable}\n"
        );
        let crc = crc32c::crc32c(text.as_bytes());
        text + &format!("crc32c {crc:08x}\n")
    }

    pub(crate) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let damaged = |why| StoreError::FormatDamaged { path: path.to_path_buf(), why };
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
        let mut lines = text.lines();
        let mut value = |key: &str, why| {
            lines.next().and_then(|line| line.strip_prefix(key)?.strip_prefix(' ')).ok_or(damaged(why))
        };
        let version = value("peregrine store", "its first line is not \"peregrine store\" and a version")?;
        let version: u32 = version.parse().map_err(|_| damaged("the version is not a number"))?;
        let world = value("world", "its second line is not the world")?.parse();
        let build = value("build", "its third line is not the build")?.parse();
        let executable = value("executable", "its fourth line is not the executable")?.to_owned();
        let (Ok(world), Ok(build)) = (world, build) else { return Err(damaged("an id is not hexadecimal")) };
        let format = Self { world, build, executable };
        if format.to_text() == text {
            return Ok(format);
        }
        if version != STORE_VERSION && text.replacen(&version.to_string(), "1", 1) != format.to_text() {
            let path = path.to_path_buf();
            return Err(StoreError::FormatVersion { path, found: version, supported: STORE_VERSION });
        }
        Err(damaged("its checksum does not match"))
    }
}

/// A name for the executable that is safe as a line of text and as a file name.
pub(crate) fn executable_name(path: &Path) -> String {
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let name = real.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let plain = !name.starts_with('.') && !name.chars().any(char::is_control);
    if plain && !name.is_empty() { name.to_owned() } else { "program".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flip_of_any_bit_and_a_cut_at_any_byte_is_refused() {
        let (world, build) = (WorldId::from_bytes([7; 16]), BuildId::from_bytes([9; 32]));
        let format = Format { world, build, executable: "cg 1".into() };
        let text = format.to_text().into_bytes();
        let path = Path::new("format");
        assert_eq!(Format::parse(path, &text).unwrap(), format);
        for len in 0..text.len() {
            Format::parse(path, &text[..len]).unwrap_err();
        }
        for bit in 0..text.len() * 8 {
            let mut damaged = text.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let error = Format::parse(path, &damaged).unwrap_err();
            assert!(matches!(error, StoreError::FormatDamaged { .. }), "bit {bit}: {error}");
        }
    }

    #[test]
    fn names_that_would_break_the_text_are_replaced() {
        assert_eq!(executable_name(Path::new("/x/cg")), "cg");
        assert_eq!(executable_name(Path::new("/x/a\nb")), "program");
        assert_eq!(executable_name(Path::new("/x/.hidden")), "program");
        assert_eq!(executable_name(Path::new("/")), "program");
    }
}
