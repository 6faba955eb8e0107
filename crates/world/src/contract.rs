//! The binary contract: what must be the same before memory of one process means anything in another.
//!
//! Nodes of one run are forked from one zygote and agree by construction. A process that resumes an image from disk must agree
//! with the one that wrote it: the build, where executable and libraries lie, the shape of libc's thread block, and what the
//! processor can do (code was compiled for it, and a preempted thread's frame holds its vector registers).
//!
//! **Fixed addresses.** A plain `cargo build` makes a position-independent, dynamically linked executable, because that is
//! what the toolchain does without being told; libraries too lie elsewhere in each process. So a program that keeps a store
//! executes itself once more with randomisation off ([`fix_addresses`]). An executable linked static and at a fixed address
//! needs no such step.

use peregrine_store::{BuildId, StoreError, build_id_of};
use peregrine_sys::process::{ADDR_NO_RANDOMIZE, personality, set_personality};
use peregrine_sys::raw::Errno;
use peregrine_thread::layout::{SLOT_BYTES, SLOTS};
use peregrine_thread::template::TemplateHeader;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Why images of this process would mean nothing elsewhere, or an image means nothing here.
#[derive(Debug, thiserror::Error)]
pub enum ContractError {
    /// Randomisation can't be turned off.
    #[error(
        "a World with a store needs fixed addresses, and personality(ADDR_NO_RANDOMIZE) was refused ({0}): allow personality(2) in the container's seccomp profile, or link the program static at a fixed address (cargo rustc --release -- -C relocation-model=static -C target-feature=+crt-static)"
    )]
    Personality(Errno),
    /// It was turned off and the address space is random all the same.
    #[error(
        "randomisation was turned off and is still on after executing {path} again; link the program static at a fixed address"
    )]
    StillRandom {
        /// The executable.
        path: PathBuf,
    },
    /// The executable can't be executed again.
    #[error(
        "a World with a store needs fixed addresses, and {path} could not be executed once more to have them ({source}): allow execve(2) in the sandbox's profile, or link the program static at a fixed address"
    )]
    Exec {
        /// The executable.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Something differs between the process that made the image and this one.
    #[error("this image can't be thawed here: {what} was {then} and is {now}; {remedy}")]
    Differs {
        /// What.
        what: String,
        /// In the process that made the image.
        then: String,
        /// Here.
        now: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The executable can't be read.
    #[error(transparent)]
    Build(#[from] StoreError),
}

/// What must agree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contract {
    /// Start of the slots and length of one; most threads; number, length and stack of the windows.
    layout: [usize; 6],
    /// Statics window, TLS and TCB.
    template: [usize; 6],
    /// Feature words of the processor.
    cpu: [u32; 12],
    /// Executable and libraries: path and load address; the executable's path is left out.
    modules: Vec<(String, usize)>,
    /// Range of the vDSO.
    vdso: [usize; 2],
    /// libc's version.
    libc: String,
}

unsafe extern "C" {
    fn gnu_get_libc_version() -> *const core::ffi::c_char;
}

impl Contract {
    /// This process's side.
    pub fn of_this_process(t: &TemplateHeader, vdso: [usize; 2]) -> Self {
        // SAFETY: returns a constant string.
        let libc = unsafe { core::ffi::CStr::from_ptr(gnu_get_libc_version()) };
        Self {
            layout: [
                SLOTS,
                SLOT_BYTES,
                peregrine_thread::stack_kind::MOST_THREADS,
                t.windows.count(),
                t.windows.bytes(),
                t.windows.stack_bytes,
            ],
            template: [t.statics_start, t.statics_len, t.tls_len, t.pthread_len, t.dtv_words, t.tid_offset],
            cpu: cpu_words(),
            modules: modules(),
            vdso,
            libc: libc.to_string_lossy().into_owned(),
        }
    }

    /// Whether an image made under `then` can be thawed in this process.
    ///
    /// # Errors
    /// [`ContractError::Differs`] names the first difference.
    pub fn check(&self, then: &Self) -> Result<(), ContractError> {
        fn same<T: PartialEq + std::fmt::Debug>(
            what: &str,
            then: &T,
            now: &T,
            remedy: &'static str,
        ) -> Result<(), ContractError> {
            if then == now {
                return Ok(());
            }
            let (then, now) = (format!("{then:x?}"), format!("{now:x?}"));
            Err(ContractError::Differs { what: what.to_owned(), then, now, remedy })
        }
        same(
            "the layout of slots and windows",
            &then.layout,
            &self.layout,
            "use the build that made the image, and its settings for windows (PEREGRINE_WINDOWS, PEREGRINE_WINDOW, PEREGRINE_WINDOW_STACK)",
        )?;
        same("the libc", &then.libc, &self.libc, "resume on a system with the same C library")?;
        same(
            "the layout of statics and thread-locals",
            &then.template,
            &self.template,
            "use the build and the C library that made the image",
        )?;
        same("the processor", &then.cpu, &self.cpu, "resume on a machine with the same processor features")?;
        same(
            "where the program and its libraries lie",
            &then.modules,
            &self.modules,
            "use the same libraries and stack limit (ulimit -s), or link the program static at a fixed address",
        )?;
        if is_fixed() {
            return Ok(());
        }
        same(
            "the kernel's vDSO",
            &then.vdso,
            &self.vdso,
            "resume under the same kernel and stack limit (ulimit -s)",
        )
    }

    /// Range of the vDSO in the process that this describes.
    pub fn vdso(&self) -> [usize; 2] {
        self.vdso
    }
}

/// What the processor can do; a test may have it say more.
fn cpu_words() -> [u32; 12] {
    let mut words = peregrine_sys::cpu::feature_words();
    if cfg!(feature = "killpoints") && std::env::var_os("PEREGRINE_PRETEND_CPU").is_some() {
        words[0] |= 1 << 31;
        words[0] ^= 1 << 30;
    }
    words
}

/// How the executable is called in a list of modules.
const EXECUTABLE: &str = "the executable";

/// Path and load address of each module, as `/proc/self/maps` shows them.
fn modules() -> Vec<(String, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let exe = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let mut list: Vec<(String, usize)> = Vec::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        // Executable mappings only: one for each module.
        let [range, rights, _, _, _, path @ ..] = fields.as_slice() else { continue };
        let path = path.join(" ");
        if !rights.contains('x') || !path.starts_with('/') {
            continue;
        }
        let Some(start) = range.split('-').next().and_then(|s| usize::from_str_radix(s, 16).ok()) else {
            continue;
        };
        let path = if exe.as_os_str() == path.as_str() { EXECUTABLE.to_owned() } else { path };
        list.push((path, start));
    }
    list.sort();
    list
}

/// Whether this executable lies at a fixed address and brings its libraries with it.
pub fn is_fixed() -> bool {
    // Asked of the process, not of the compiler: whoever links the program static tells its last crate alone.
    !is_position_independent() && modules().iter().all(|(path, _)| path == EXECUTABLE)
}

fn is_position_independent() -> bool {
    // e_type of the ELF header: 3 is a shared object, which a position-independent executable is.
    let mut head = [0u8; 18];
    let read =
        std::fs::File::open("/proc/self/exe").and_then(|mut f| std::io::Read::read_exact(&mut f, &mut head));
    read.is_err() || u16::from_le_bytes([head[16], head[17]]) == 3
}

/// Holds the id of the process that executes itself once more, which it keeps: a program that a thread starts, and that inherits the
/// variable, is not meant.
const AGAIN: &str = "PEREGRINE_FIXED_ADDRESSES";

/// Makes sure that addresses in this process are those that a later process will have: executes the program once more with
/// randomisation off, unless it is linked at a fixed address. Called first thing in `main`.
///
/// # Errors
/// [`ContractError`], if that can't be done.
pub fn fix_addresses() -> Result<(), ContractError> {
    use std::os::unix::process::CommandExt;
    if is_fixed() {
        return Ok(());
    }
    let persona = personality().map_err(ContractError::Personality)?;
    let path = std::env::current_exe().unwrap_or_else(|_| "/proc/self/exe".into());
    let own = std::process::id().to_string();
    let again = std::env::var_os(AGAIN).is_some_and(|id| id == own.as_str());
    if persona & ADDR_NO_RANDOMIZE != 0 {
        if again {
            // Programs that the threads start are to be random again.
            let _ = set_personality(persona & !ADDR_NO_RANDOMIZE);
        }
        return Ok(());
    }
    if again {
        return Err(ContractError::StillRandom { path });
    }
    set_personality(persona | ADDR_NO_RANDOMIZE).map_err(ContractError::Personality)?;
    let mut args = std::env::args_os();
    let mut command = std::process::Command::new("/proc/self/exe");
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    let source = command.args(args).env(AGAIN, own).exec();
    Err(ContractError::Exec { path, source })
}

/// Build id of the running executable.
///
/// # Errors
/// If it can't be read.
pub fn build_id() -> Result<BuildId, ContractError> {
    Ok(build_id_of(std::path::Path::new("/proc/self/exe"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Contract {
        let template = peregrine_thread::template::taken().expect("a known libc");
        Contract::of_this_process(&template, [0x7fff_0000, 0x7fff_2000])
    }

    #[test]
    fn a_difference_in_any_part_is_named_in_one_line_with_what_to_do() {
        here().check(&here()).expect("the same process");
        // Whoever adds a part adds a line below.
        let Contract { layout: _, template: _, cpu: _, modules: _, vdso: _, libc: _ } = here();
        type Change = fn(&mut Contract);
        let changes: [(Change, &str, &str); 7] = [
            (|c| c.layout[3] += 1, "the layout of slots and windows was", "PEREGRINE_WINDOWS"),
            (|c| c.template[1] += 64, "the layout of statics and thread-locals was", "use the build"),
            (|c| c.cpu[11] ^= 1, "the processor was", "the same processor features"),
            (|c| c.modules[0].1 += 4096, "where the program and its libraries lie was", "(ulimit -s)"),
            (
                |c| c.modules.truncate(1),
                "where the program and its libraries lie was",
                "use the same libraries",
            ),
            (|c| c.vdso[0] -= 4096, "the kernel's vDSO was", "under the same kernel"),
            (|c| c.libc.push('9'), "the libc was", "the same C library"),
        ];
        for (change, what, remedy) in changes {
            let mut then = here();
            change(&mut then);
            let refused = here().check(&then).expect_err(what).to_string();
            assert!(refused.contains(what) && refused.contains(remedy), "{refused}");
            assert_eq!(refused.lines().count(), 1, "{refused}");
        }
    }
}
