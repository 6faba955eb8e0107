//! Names of functions in another process: from its map of memory to the files, and their debug information.

use gimli::{EndianSlice, RunTimeEndian};
use object::read::{CompressionFormat, Object, ObjectSection, ObjectSegment, SymbolMap, SymbolMapName};
use std::collections::HashMap;

/// A piece of a file in the process's memory.
struct Mapping {
    start: u64,
    end: u64,
    offset: u64,
    file: String,
}

/// A line for each program counter in process `pid`, innermost first; inlined functions have lines of their own.
pub(super) fn describe(pid: u32, pcs: &[u64]) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let maps: Vec<Mapping> = maps.lines().filter_map(parse).collect();
    let wanted = |m: &&Mapping| pcs.iter().any(|pc| (m.start..=m.end).contains(pc));
    let bytes: HashMap<&str, Vec<u8>> =
        maps.iter().filter(wanted).filter_map(|m| Some((m.file.as_str(), read(pid, &m.file)?))).collect();
    let files: HashMap<&str, File<'_>> =
        bytes.iter().filter_map(|(name, bytes)| Some((*name, File::parse(bytes)?))).collect();
    let mut lines = Vec::new();
    for (i, pc) in pcs.iter().enumerate() {
        // All but the innermost are return addresses: the call is before.
        let at = if i == 0 { *pc } else { pc.wrapping_sub(1) };
        let mapping = maps.iter().find(|m| (m.start..m.end).contains(&at));
        let names = mapping.and_then(|m| files.get(m.file.as_str())?.names(at - m.start + m.offset));
        match names {
            Some(names) => lines.extend(names),
            None => lines.push(format!("{pc:#x}")),
        }
    }
    lines
}

fn parse(line: &str) -> Option<Mapping> {
    let mut parts = line.split_whitespace();
    let (start, end) = parts.next()?.split_once('-')?;
    let offset = parts.nth(1)?;
    let file = parts.nth(2)?;
    let hex = |s| u64::from_str_radix(s, 16).ok();
    file.starts_with('/').then_some(())?;
    Some(Mapping { start: hex(start)?, end: hex(end)?, offset: hex(offset)?, file: file.to_owned() })
}

fn read(pid: u32, path: &str) -> Option<Vec<u8>> {
    // The process's own executable, even if the file has been replaced since.
    let exe = format!("/proc/{pid}/exe");
    let is_exe = std::fs::read_link(&exe).is_ok_and(|p| p.as_os_str() == path);
    std::fs::read(if is_exe { exe.as_str() } else { path }).ok()
}

/// A file's symbols.
struct File<'a> {
    lines: addr2line::Context<EndianSlice<'a, RunTimeEndian>>,
    symbols: SymbolMap<SymbolMapName<'a>>,
    /// File offset, length and address of each segment.
    segments: Vec<(u64, u64, u64)>,
}

impl<'a> File<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let object = object::read::File::parse(bytes).ok()?;
        let segments = object.segments().map(|s| (s.file_range().0, s.file_range().1, s.address())).collect();
        let endian = if object.is_little_endian() { RunTimeEndian::Little } else { RunTimeEndian::Big };
        // A section that is missing, or compressed, tells nothing: names come from the table of symbols then.
        let section = |id: gimli::SectionId| {
            let section = object.section_by_name(id.name());
            let data = section.and_then(|s| s.compressed_data().ok());
            let plain = data.filter(|d| d.format == CompressionFormat::None).map(|d| d.data);
            Ok::<_, gimli::Error>(EndianSlice::new(plain.unwrap_or_default(), endian))
        };
        let lines = addr2line::Context::from_dwarf(gimli::Dwarf::load(section).ok()?).ok()?;
        Some(Self { lines, symbols: object.symbol_map(), segments })
    }

    /// What lies at this offset of the file.
    fn names(&self, offset: u64) -> Option<Vec<String>> {
        let (start, _, address) = self.segments.iter().find(|(s, len, _)| (*s..s + len).contains(&offset))?;
        let probe = offset - start + address;
        let mut names = Vec::new();
        if let Ok(mut frames) = self.lines.find_frames(probe).skip_all_loads() {
            while let Ok(Some(frame)) = frames.next() {
                let Some(name) =
                    frame.function.as_ref().and_then(|f| f.demangle().ok().map(|n| n.into_owned()))
                else {
                    continue;
                };
                let place = frame.location.and_then(|l| Some(format!(" ({}:{})", l.file?, l.line?)));
                names.push(format!("{name}{}", place.unwrap_or_default()));
            }
        }
        if names.is_empty() {
            let symbol = self.symbols.get(probe)?.name();
            names.push(addr2line::demangle_auto(symbol.into(), None).into_owned());
        }
        Some(names)
    }
}
