//! Settings of a World: defaults, then the environment, then what the program sets.

use peregrine_thread::layout::SLOT_COUNT;
use peregrine_thread::stack_kind::StackKind;
use std::path::PathBuf;
use std::time::Duration;

/// How a World is to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Node processes. `PEREGRINE_NODES`; default: the number of processors.
    pub nodes: u32,
    /// Time between images. `PEREGRINE_IMAGE_INTERVAL` in milliseconds, 0 for none; default 40 ms.
    pub image_interval: Option<Duration>,
    /// Time slice of a thread. `PEREGRINE_SLICE` in microseconds; default 2 ms. One that has its node for itself is interrupted every eight slices,
    /// and whenever something comes for that node.
    pub slice: Duration,
    /// The longest that an idle node looks for work before it sleeps. `PEREGRINE_SPIN` in microseconds, 0 for never; default
    /// 50 us. It looks only while that has lately paid, and sleeps at once where there are more nodes than processors.
    pub spin: Duration,
    /// World memory that threads may use, in bytes. `PEREGRINE_MEMORY` in MiB; default 3/8 of what is available, for an image
    /// in memory doubles it.
    pub memory_bytes: u64,
    /// Directory for durable images. `PEREGRINE_STORE`.
    pub store: Option<PathBuf>,
    /// The image to go on from, if those after it in the store are damaged; else it is refused. What came after it is undone.
    /// `PEREGRINE_RESUME_IMAGE`; default the latest.
    pub resume_image: Option<u64>,
    /// Time between images written to the store. `PEREGRINE_STORE_INTERVAL` in milliseconds; default 200 ms.
    pub store_interval: Duration,
    /// A file for what the program writes to standard output; kept exact through deaths. `PEREGRINE_OUTPUT`.
    pub output: Option<PathBuf>,
    /// Kill a node with SIGKILL, each time this long after all nodes are up: a test of recovery.
    pub kill_every: Option<Duration>,
    /// Stop killing after this many.
    pub most_kills: u64,
    /// Move a random thread this often.
    pub move_every: Option<Duration>,
    /// Seed of the choices of `kill_every` and `move_every`.
    pub seed: u64,
    /// Show a status line on standard error.
    pub progress: bool,
    /// Stack of `main`, in bytes. `PEREGRINE_STACK` in KiB; default 8 MiB.
    pub main_stack_bytes: usize,
    /// Kind of the threads that ask for none. `PEREGRINE_STACK_KIND`: `isomalloc` (default), `alias` or `copy`.
    pub kind: StackKind,
    /// Windows of each kind, a power of two. `PEREGRINE_WINDOWS`; default 256.
    pub windows: usize,
    /// Bytes of a window, a power of two. `PEREGRINE_WINDOW` in KiB; default 2 MiB.
    pub window_bytes: usize,
    /// Bytes of a window that are stack; most of the rest is heap. `PEREGRINE_WINDOW_STACK` in KiB; default 1 MiB.
    pub window_stack_bytes: usize,
    /// How long a thread waits outside of a window before it is packed. `PEREGRINE_PACK_AFTER` in milliseconds; default 100 ms.
    /// `None`: never.
    pub pack_after: Option<Duration>,
    /// Slots: most isomalloc threads at a time, `main` among them; each reserves 1 GiB of addresses, and
    /// as much for its image in the supervisor; the last one less under a limit on address space (`ulimit -v`) of less than 5 GiB. With
    /// one slot a World runs under a limit of 1.5 GiB. `PEREGRINE_SLOTS`; default 32768.
    pub slots: usize,
    /// How long a program whose `main` has ended waits for a thread that keeps its node from pausing, by a system call that does
    /// not return for one, before it ends all the same. `PEREGRINE_END_PATIENCE` in milliseconds; default 5 s.
    pub end_patience: Duration,
    /// Use the kernel's write tracking if there is any; off: compare. `PEREGRINE_TRACK=0`.
    pub track: bool,
    /// Compares of the statics window, on one node, after which pages of it that nobody wrote may be sealed, so that they
    /// are not compared any more; 0: never. `PEREGRINE_SEAL_EVERY`; default 4096.
    pub seal_every: u32,
}

/// An environment variable that can't be understood.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
#[error("{name}={value} can't be used: {expected}")]
pub struct ConfigError {
    /// The variable.
    pub name: &'static str,
    /// Its value.
    pub value: String,
    /// What it should be.
    pub expected: &'static str,
}

impl Default for Config {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        Self {
            nodes: cores.clamp(1, crate::control::MAX_NODES as u32),
            image_interval: Some(Duration::from_millis(40)),
            slice: Duration::from_millis(2),
            spin: Duration::from_micros(50),
            memory_bytes: available_memory() / 8 * 3,
            store: None,
            resume_image: None,
            store_interval: Duration::from_millis(200),
            output: None,
            kill_every: None,
            most_kills: u64::MAX,
            move_every: None,
            seed: 1,
            progress: false,
            main_stack_bytes: 8 << 20,
            kind: StackKind::Isomalloc,
            windows: 256,
            window_bytes: 2 << 20,
            window_stack_bytes: 1 << 20,
            pack_after: Some(Duration::from_millis(100)),
            slots: SLOT_COUNT,
            end_patience: Duration::from_secs(5),
            track: true,
            seal_every: 4096,
        }
    }
}

impl Config {
    /// Defaults, changed by the environment.
    ///
    /// # Errors
    /// [`ConfigError`] names the variable and what it takes.
    pub fn from_env() -> Result<Self, ConfigError> {
        let mut c = Self::default();
        if let Some(n) = number("PEREGRINE_NODES", "a number of nodes from 1 to 64", 1, 64)? {
            c.nodes = n as u32;
        }
        if let Some(ms) =
            number("PEREGRINE_IMAGE_INTERVAL", "milliseconds between images, 0 for none", 0, 86_400_000)?
        {
            c.image_interval = (ms != 0).then(|| Duration::from_millis(ms));
        }
        if let Some(us) = number("PEREGRINE_SLICE", "microseconds from 100 to 1000000", 100, 1_000_000)? {
            c.slice = Duration::from_micros(us);
        }
        if let Some(us) =
            number("PEREGRINE_SPIN", "microseconds from 0 (sleep at once) to 1000000", 0, 1_000_000)?
        {
            c.spin = Duration::from_micros(us);
        }
        if let Some(mib) = number("PEREGRINE_MEMORY", "MiB of World memory, at least 16", 16, 1 << 30)? {
            c.memory_bytes = mib << 20;
        }
        if let Some(kib) = number("PEREGRINE_STACK", "KiB of main's stack, 64 to 524288", 64, 524_288)? {
            c.main_stack_bytes = (kib as usize) << 10;
        }
        if let Some(ms) = number("PEREGRINE_KILL_EVERY", "milliseconds between kills", 1, 86_400_000)? {
            c.kill_every = Some(Duration::from_millis(ms));
        }
        if let Some(ms) = number("PEREGRINE_MOVE_EVERY", "milliseconds between forced moves", 1, 86_400_000)?
        {
            c.move_every = Some(Duration::from_millis(ms));
        }
        c.resume_image = number("PEREGRINE_RESUME_IMAGE", "the number of an image", 1, u64::MAX)?;
        if let Some(seed) = number("PEREGRINE_SEED", "a number", 0, u64::MAX)? {
            c.seed = seed;
        }
        if let Some(ms) = number("PEREGRINE_END_PATIENCE", "milliseconds", 0, 86_400_000)? {
            c.end_patience = Duration::from_millis(ms);
        }
        if let Some(t) = number("PEREGRINE_TRACK", "0 or 1", 0, 1)? {
            c.track = t == 1;
        }
        if let Some(n) = number("PEREGRINE_SEAL_EVERY", "a number of compares, 0 for never", 0, 1 << 30)? {
            c.seal_every = n as u32;
        }
        if let Some(value) = std::env::var_os("PEREGRINE_STACK_KIND") {
            let value = value.to_string_lossy().into_owned();
            let expected = "isomalloc, alias or copy";
            c.kind =
                value.parse().map_err(|()| ConfigError { name: "PEREGRINE_STACK_KIND", value, expected })?;
        }
        if let Some(n) = number("PEREGRINE_WINDOWS", "a number of windows, a power of two", 1, 1 << 16)? {
            c.windows = n as usize;
        }
        if let Some(kib) =
            number("PEREGRINE_WINDOW", "KiB of a window, a power of two from 512 on", 512, 1 << 20)?
        {
            c.window_bytes = (kib as usize) << 10;
        }
        if let Some(kib) =
            number("PEREGRINE_WINDOW_STACK", "KiB of a window's stack, at least 64", 64, 1 << 20)?
        {
            c.window_stack_bytes = (kib as usize) << 10;
        }
        if let Some(ms) = number(
            "PEREGRINE_PACK_AFTER",
            "milliseconds before an idle thread is packed",
            0,
            u64::MAX / 2_000_000,
        )? {
            c.pack_after = Some(Duration::from_millis(ms));
        }
        if let Some(n) = number("PEREGRINE_SLOTS", "a number of slots from 1 to 32768", 1, SLOT_COUNT as u64)?
        {
            c.slots = n as usize;
        }
        if let Some(ms) =
            number("PEREGRINE_STORE_INTERVAL", "milliseconds between stored images", 0, 86_400_000)?
        {
            c.store_interval = Duration::from_millis(ms);
        }
        c.output = std::env::var_os("PEREGRINE_OUTPUT").map(PathBuf::from);
        c.store = std::env::var_os("PEREGRINE_STORE").map(PathBuf::from);
        Ok(c)
    }
}

fn number(
    name: &'static str,
    expected: &'static str,
    least: u64,
    most: u64,
) -> Result<Option<u64>, ConfigError> {
    let Some(value) = std::env::var_os(name) else { return Ok(None) };
    let value = value.to_string_lossy().into_owned();
    match value.trim().parse::<u64>() {
        Ok(n) if (least..=most).contains(&n) => Ok(Some(n)),
        _ => Err(ConfigError { name, value, expected }),
    }
}

fn available_memory() -> u64 {
    let kib = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|l| l.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    kib.map_or(2 << 30, |k| k << 10)
}
