//! What the structures cost (item 4): the mappings and resident pages of real processes, put into a radix array, beside what
//! Linux keeps for them: VMAs (counted, times the slab's object size) and page tables (`VmPTE`: those of all levels). Linux's maple nodes
//! (256 bytes for about ten VMAs) are left out, to our disadvantage; frames' descriptors are left out on both sides.
//!
//! Resident pages are those that the page table shows (`/proc/PID/pagemap`), shared ones too, as in the paper's table.
//!
//! Processes that run here are read from `/proc`; large programs were recorded with `bench space-record PID` (the files in
//! `recorded/`), one line a mapping: start, pages, `a`nonymous or `f`ile, and the runs of resident pages.

use crate::report::Report;
use peregrine_base::{PAGE_SIZE, PageCount, Protection, VirtAddr};
use peregrine_space::{
    Access, AddressSpace, Arena, Backing, FrameId, Frames, Mapping, MemberId, NoViews, Place, Sizes, SpaceId,
    Spaces,
};
use std::cell::Cell;
use std::fmt::Write;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::process::ExitCode;
use std::ptr::NonNull;

/// One mapping of a program.
struct Extent {
    start: usize,
    pages: usize,
    file: bool,
    /// Resident pages: first, count.
    resident: Vec<(usize, usize)>,
}

/// A program's memory at one moment.
struct Picture {
    name: String,
    extents: Vec<Extent>,
    page_table_bytes: usize,
}

/// Bytes of a VMA: the slab's object size, or what Linux 6.18 on x86-64 has.
fn vma_bytes() -> usize {
    let slabs = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
    let line = slabs.lines().find(|l| l.starts_with("vm_area_struct"));
    line.and_then(|l| l.split_whitespace().nth(3)?.parse().ok()).unwrap_or(192)
}

impl Picture {
    fn of_process(pid: u32) -> Option<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        let kib: usize = field("VmPTE:")?.split_whitespace().next()?.parse().ok()?;
        let mut pagemap = fs::File::open(format!("/proc/{pid}/pagemap")).ok()?;
        let mut extents = Vec::new();
        for line in maps.lines().filter(|l| !l.contains("[vsyscall]")) {
            let mut parts = line.split_whitespace();
            let (start, end) = parts.next()?.split_once('-')?;
            let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
            let inode = parts.nth(3)?;
            let pages = (end - start) / PAGE_SIZE;
            extents.push(Extent {
                start,
                pages,
                file: inode != "0",
                resident: resident(&mut pagemap, start, pages),
            });
        }
        Some(Self { name: field("Name:")?.to_owned(), extents, page_table_bytes: kib << 10 })
    }

    fn recorded(name: &str, text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let page_table_bytes = lines.next()?.strip_prefix("page tables ")?.parse().ok()?;
        let mut extents = Vec::new();
        for line in lines {
            let mut parts = line.split(' ');
            let start = usize::from_str_radix(parts.next()?, 16).ok()?;
            let pages = parts.next()?.parse().ok()?;
            let file = parts.next()? == "f";
            let run = |run: &str| {
                let (first, count) = run.split_once('+')?;
                Some((first.parse().ok()?, count.parse().ok()?))
            };
            extents.push(Extent { start, pages, file, resident: parts.map(run).collect::<Option<_>>()? });
        }
        Some(Self { name: format!("{name} (recorded)"), extents, page_table_bytes })
    }

    fn resident_pages(&self) -> usize {
        self.extents.iter().flat_map(|e| &e.resident).map(|(_, n)| n).sum()
    }
}

fn resident(pagemap: &mut fs::File, start: usize, pages: usize) -> Vec<(usize, usize)> {
    // Reservations of terabytes are not walked entry by entry: they are no memory.
    if pages > 1 << 22 || pagemap.seek(SeekFrom::Start((start / PAGE_SIZE * 8) as u64)).is_err() {
        return Vec::new();
    }
    let mut entries = vec![0u8; pages * 8];
    let Ok(got) = pagemap.read(&mut entries) else { return Vec::new() };
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (page, entry) in entries[..got].chunks_exact(8).enumerate() {
        let present = entry[7] & 0x80 != 0;
        match runs.last_mut() {
            Some((first, count)) if present && *first + *count == page => *count += 1,
            _ if present => runs.push((page, 1)),
            _ => {}
        }
    }
    runs
}

/// Prints a recording of a process.
pub fn record(arguments: &[String]) -> ExitCode {
    let picture = arguments.first().and_then(|a| a.parse().ok()).and_then(Picture::of_process);
    let Some(picture) = picture else {
        eprintln!("usage: bench space-record PID (a process whose /proc/PID/pagemap can be read)");
        return ExitCode::from(2);
    };
    let mut out = format!("page tables {}\n", picture.page_table_bytes);
    for e in &picture.extents {
        let _ = write!(out, "{:x} {} {}", e.start, e.pages, if e.file { 'f' } else { 'a' });
        for (first, count) in &e.resident {
            let _ = write!(out, " {first}+{count}");
        }
        out.push('\n');
    }
    print!("{out}");
    ExitCode::SUCCESS
}

/// Frames without memory.
struct Numbers(Cell<u32>);
impl Numbers {
    fn next(&self) -> Option<FrameId> {
        self.0.set(self.0.get() + 1);
        Some(FrameId::new(self.0.get() - 1))
    }
}
impl Frames for Numbers {
    fn zeroed(&self, _: SpaceId, _: MemberId, _: VirtAddr) -> Option<FrameId> {
        self.next()
    }
    fn copied(&self, _: SpaceId, _: MemberId, _: VirtAddr, _: FrameId) -> Option<FrameId> {
        self.next()
    }
    fn of_object(&self, _: MemberId, _: u64, _: u64) -> Option<FrameId> {
        self.next()
    }
}

/// Bytes of the radix array with all of `picture` mapped, and each of its resident pages faulted in by so many members.
fn radix_bytes(picture: &Picture, members: usize) -> Result<usize, String> {
    let pages = picture.resident_pages();
    let sizes = Sizes {
        members,
        spaces: 1,
        nodes: 4 * picture.extents.len() + pages / 16 + 4096,
        regions: picture.extents.len() + 1,
        frames: pages + 16,
    };
    let memory =
        peregrine_vm::Mapping::memfd(PageCount::for_bytes(sizes.bytes())).map_err(|e| e.to_string())?;
    let base = NonNull::new(memory.range().start().as_ptr::<u8>()).ok_or("no memory")?;
    // SAFETY: fresh zeros that the mapping keeps until this function returns, used by this arena alone.
    let spaces = unsafe { Spaces::create(&Arena::new(base, memory.range().len_bytes()), &sizes) }
        .map_err(|e| e.to_string())?;
    let mut me = spaces.join().map_err(|e| e.to_string())?;
    let mut others = Vec::new();
    for _ in 1..members {
        others.push(spaces.join().map_err(|e| e.to_string())?);
    }
    let space = AddressSpace::create(&mut me, NoViews, Numbers(Cell::new(0))).map_err(|e| e.to_string())?;
    for (i, e) in picture.extents.iter().enumerate() {
        let backing = if e.file {
            Backing::ObjectPrivate { object: i as u64 + 1, first: 0 }
        } else {
            Backing::Anonymous
        };
        let mapping = Mapping { backing, rights: Protection::ReadWrite };
        space
            .map(&mut me, Place::Fixed(VirtAddr::new(e.start)), PageCount::new(e.pages), &mapping)
            .map_err(|e| e.to_string())?;
    }
    for e in &picture.extents {
        for page in e.resident.iter().flat_map(|(first, count)| *first..first + count) {
            let at = VirtAddr::new(e.start + page * PAGE_SIZE);
            space.fault(&mut me, at, Access::Read).map_err(|e| e.to_string())?;
            for other in &mut others {
                space.fault(other, at, Access::Read).map_err(|e| e.to_string())?;
            }
        }
    }
    Ok(spaces.touched_bytes())
}

/// Every readable process, and the recordings.
pub fn run(report: &mut Report) {
    report.section("memory: radix array beside Linux's VMAs and page tables");
    let vma = vma_bytes();
    let mut pictures: Vec<Picture> = [
        ("rustc", include_str!("recorded/rustc.maps")),
        ("cargo", include_str!("recorded/cargo.maps")),
        ("node", include_str!("recorded/node.maps")),
    ]
    .iter()
    .filter_map(|(name, text)| Picture::recorded(name, text))
    .collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    // A process of a few pages tells nothing; nor does this one.
    let here = pids.filter(|pid| *pid != std::process::id()).filter_map(Picture::of_process);
    pictures.extend(here.filter(|p| p.resident_pages() > 256));
    let (mut worst_ratio, mut worst_share) = (0.0f64, 0.0f64);
    for picture in &pictures {
        let radix = match radix_bytes(picture, 1) {
            Ok(bytes) => bytes,
            Err(why) => {
                report.note(&format!("{}: left out: {why}", picture.name));
                continue;
            }
        };
        let linux = picture.extents.len() * vma + picture.page_table_bytes;
        let resident = picture.resident_pages() * PAGE_SIZE;
        let kib = |bytes: usize| bytes as f64 / 1024.0;
        let case = format!(
            "{} ({} mappings, {:.0} MiB)",
            picture.name,
            picture.extents.len(),
            kib(resident) / 1024.0
        );
        report.value(&case, "radix", "KiB", kib(radix), Some(("VMAs and page tables", kib(linux))));
        let share = |bytes: usize| 100.0 * bytes as f64 / resident as f64;
        let linuxs = Some(("VMAs and page tables", share(linux)));
        report.value(&case, "share of resident memory", "%", share(radix), linuxs);
        // Not what the paper's table has (one process, read at one moment), and no goal: the most that it can be.
        if picture.name.ends_with("(recorded)")
            && let Ok(both) = radix_bytes(picture, 2)
        {
            let case = format!("{case}, every page touched by two members");
            let tables = linux + picture.page_table_bytes;
            report.value(&case, "radix", "KiB", kib(both), Some(("VMAs and two page tables", kib(tables))));
        }
        worst_ratio = worst_ratio.max(radix as f64 / linux as f64);
        worst_share = worst_share.max(100.0 * radix as f64 / resident as f64);
    }
    let verdict = |met: bool| if met { "met" } else { "MISSED" };
    report.note(&format!(
        "radix over VMAs and page tables, the worst: {worst_ratio:.2} (at most 2.7): {}",
        verdict(worst_ratio <= 2.7)
    ));
    report.note(&format!(
        "radix of resident memory, the worst: {worst_share:.2} % (at most 3.7): {}",
        verdict(worst_share <= 3.7)
    ));
}
