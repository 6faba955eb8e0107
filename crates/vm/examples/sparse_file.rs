//! A sparse-file pager: a file of a few blocks and many holes looks like one long piece of memory. Blocks are read when they
//! are touched, 64 KiB at a time; holes cost nothing.
//!
//! ```text
//!   memory   ▢▢▢▢▣▣▢▢▢▢▢▢▢▢▢▣▢▢     touched blocks are filled from the file, holes with the zero page
//!   file     ────██──────────█──     only the blocks with data take room
//! ```
//!
//! Where a userfaultfd may serve system calls, a pager thread answers, and the memory can be handed to `write(2)` as it is.
//! Elsewhere the same handler runs inline, and says so.

use peregrine_vm::{
    AltStack, Capabilities, Capability, Decision, Inline, Mapping, PAGE_SIZE, PageCount, Protection, Region,
    Trap, io,
};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

const BLOCK: PageCount = PageCount::new(16);
const PAGES: PageCount = PageCount::new(16 * 256);

/// Answers a trap: one block from the file. Allocates nothing and locks nothing, so that it may run inline too.
fn page_in(file: &File, trap: &Trap<'_>) -> Decision {
    let block = trap.block(BLOCK);
    let offset = (block.start().as_usize() - trap.region().range().start().as_usize()) as u64;
    let mut bytes = [0; BLOCK.bytes()];
    let bytes = &mut bytes[..block.len_bytes()];
    // `io` makes the bare call, which leaves `errno` alone.
    let mut filled = 0;
    while filled < bytes.len() {
        let (rest, at) = (bytes[filled..].as_mut_ptr(), offset + filled as u64);
        // SAFETY: the rest of the buffer, which is this function's.
        match unsafe { io::read_at_ptr(file.as_fd(), rest, bytes.len() - filled, at) } {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(_) => return Decision::Deny,
        }
    }
    if bytes.iter().all(|b| *b == 0) {
        trap.decide(trap.region().fill_zero(block, Protection::ReadWrite))
    } else {
        trap.decide(trap.region().fill_copy(block, bytes, Protection::ReadWrite))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let caps = Capabilities::probe();
    let file = tempfile::tempfile()?;
    file.set_len(PAGES.bytes() as u64)?;
    for block in [3u64, 100, 255] {
        file.write_at(format!("block {block}").as_bytes(), block * BLOCK.bytes() as u64)?;
    }

    let memory = Arc::new(Mapping::memfd(PAGES)?);
    let builder = Region::builder(memory.clone()).traps_absent(true).traps_writes(false);
    let region = if caps.has(Capability::Userfaultfd) && caps.has(Capability::UserfaultfdKernelFaults) {
        builder.pager(move |trap: &Trap<'_>| page_in(&file, trap)).build(&caps)?
    } else {
        // SAFETY: `page_in` makes system calls and nothing else; the alternate stack below has room for its block.
        let inline = unsafe { Inline::new(move |trap: &Trap<'_>| page_in(&file, trap)) };
        builder.inline(inline).build(&caps)?
    };
    let _stack = AltStack::install(4 * BLOCK.bytes())?;
    println!("paged by {}", region.choice());

    let mut text = [0; 9];
    memory.bytes().read(100 * BLOCK.bytes(), &mut text)?;
    assert_eq!(&text, b"block 100");
    assert_eq!(memory.bytes().load_u8(200 * BLOCK.bytes())?, 0, "a hole");

    // A page that is written stays as it is, though the file says otherwise.
    memory.bytes().write(3 * BLOCK.bytes(), b"BLOCK")?;
    memory.bytes().read(3 * BLOCK.bytes(), &mut text[..7])?;
    assert_eq!(&text[..7], b"BLOCK 3");

    if region.serves_system_calls() {
        // The kernel's own access traps, and is answered: no copy in between.
        let mut out = tempfile::tempfile()?;
        let from = memory.bytes().address(255 * BLOCK.bytes())?;
        // SAFETY: only the kernel reads the bytes.
        let n = unsafe { io::write_at_ptr(out.as_fd(), from.as_ptr(), PAGE_SIZE, 0) };
        assert_eq!(n, Ok(PAGE_SIZE));
        out.flush()?;
        out.read_exact_at(&mut text, 0)?;
        assert_eq!(&text, b"block 255");
        println!("write(2) from absent memory was served");
    } else {
        println!("write(2) from absent memory would fail with EFAULT here: touch it first");
    }
    Ok(())
}
