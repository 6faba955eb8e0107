//! What the machine refuses, for real: system calls that a container forbids, a foreign C library, a disk that fills up, becomes
//! read-only or goes away under a running World. Each gets one line that says what to do, and nothing is lost.
//!
//! Each test runs an example program as a user would. Where the machine does not grant what a test needs, it says so.

mod examples;

use examples::example;
use peregrine_sys::linux_raw_sys::general::{__NR_execve, __NR_execveat, __NR_personality};
use peregrine_sys::process::{CALL_USERFAULTFD, forbid_call, ignore_call};
use std::ffi::{CStr, CString, OsStr};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, CommandArgs, Output, Stdio};
use std::time::{Duration, Instant};

fn steps(rounds: &str) -> Command {
    let mut c = Command::new(example("steps"));
    c.arg(rounds).env("PEREGRINE_NODES", "2").env("PEREGRINE_STORE_INTERVAL", "20").stdin(Stdio::null());
    // A test that fails leaves nothing running.
    // SAFETY: one system call.
    unsafe {
        c.pre_exec(|| {
            peregrine_sys::process::die_with_parent();
            Ok(())
        })
    };
    c
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Lines of the World's own, all told.
fn own_lines(o: &Output) -> Vec<String> {
    text(&o.stderr).lines().filter(|l| l.starts_with("peregrine: ")).map(str::to_owned).collect()
}

/// Forbids a system call to the command, as a container's seccomp filter does.
fn without(mut c: Command, call: u32) -> Command {
    // SAFETY: two system calls, nothing is allocated.
    unsafe { c.pre_exec(move || forbid_call(call).map_err(|e| std::io::Error::from_raw_os_error(e.0))) };
    c
}

#[test]
fn a_container_that_forbids_personality_gets_one_line_that_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let mut c = without(steps("1"), __NR_personality);
    let o = c.env("PEREGRINE_STORE", &store).output().unwrap();
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(lines[0].contains("allow personality(2) in the container's seccomp profile"), "{lines:?}");
    assert!(lines[0].contains("relocation-model=static"), "{lines:?}");
    assert!(!store.exists(), "refused before anything was made");
    // Without a store no address need be fixed.
    let o = without(steps("1"), __NR_personality).output().unwrap();
    assert!(o.status.success(), "{}", text(&o.stderr));
}

/// Becomes `program` by `execveat`, with `execve` forbidden to it.
fn become_without_execve(program: &CStr, env: &CStr) -> std::io::Error {
    let failed = |e: peregrine_sys::raw::Errno| std::io::Error::from_raw_os_error(e.0);
    if let Err(e) = forbid_call(__NR_execve) {
        return failed(e);
    }
    const HERE: isize = -100;
    let (args, env) = ([program.as_ptr(), c"1".as_ptr(), std::ptr::null()], [env.as_ptr(), std::ptr::null()]);
    // SAFETY: strings and lists that end with null, as execveat(2) wants them.
    let r = unsafe {
        let [program, args, env] = [program.as_ptr() as usize, args.as_ptr() as usize, env.as_ptr() as usize];
        peregrine_sys::raw::syscall6(__NR_execveat, HERE as usize, program, args, env, 0, 0)
    };
    failed(peregrine_sys::raw::check(r).expect_err("it has come back"))
}

#[test]
fn a_sandbox_in_which_no_program_executes_another_gets_one_line_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let c_string = |text: String| CString::new(text).unwrap();
    let program = c_string(example("steps").display().to_string());
    let env = c_string(format!("PEREGRINE_STORE={}", store.display()));
    let mut c = Command::new("true");
    // SAFETY: system calls only.
    unsafe { c.pre_exec(move || Err(become_without_execve(&program, &env))) };
    let o = c.stdin(Stdio::null()).output().unwrap();
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(lines[0].contains("steps could not be executed once more"), "{lines:?}");
    assert!(
        lines[0].contains("allow execve(2)") && lines[0].contains("static at a fixed address"),
        "{lines:?}"
    );
    assert!(!store.exists(), "refused before anything was made");
}

#[test]
fn a_sandbox_that_accepts_personality_and_ignores_it_gets_one_line_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let mut c = steps("1");
    // SAFETY: as in `without`.
    unsafe {
        c.pre_exec(|| ignore_call(__NR_personality).map_err(|e| std::io::Error::from_raw_os_error(e.0)))
    };
    let o = c.env("PEREGRINE_STORE", &store).output().unwrap();
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(lines[0].contains("randomisation was turned off and is still on"), "{lines:?}");
    assert!(lines[0].contains("link the program static at a fixed address"), "{lines:?}");
    assert!(!store.exists(), "refused before anything was made");
}

#[test]
fn a_store_that_can_t_be_made_gets_one_line_that_says_what_to_do() {
    // Nobody makes directories there, root included.
    let o = steps("1").env("PEREGRINE_STORE", "/proc/peregrine-store").output().unwrap();
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(
        lines[0].contains("/proc/peregrine-store") && lines[0].contains("name the right one"),
        "{lines:?}"
    );
    assert_eq!(text(&o.stdout), "", "nothing has run");
}

#[test]
fn a_world_that_another_ones_thread_has_started_has_its_addresses_fixed_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut c = steps("1");
    // As a child of a World with a store inherits it.
    c.env("PEREGRINE_FIXED_ADDRESSES", std::process::id().to_string());
    let o = c.env("PEREGRINE_STORE", dir.path().join("store")).output().unwrap();
    assert!(o.status.success(), "{}", text(&o.stderr));
}

/// The command where the other door to userfaultfd, which no filter on the call closes, is not there; `None` if that can't be had.
fn without_the_device(c: Command) -> Option<Command> {
    const DEVICE: &str = "/dev/userfaultfd";
    if !Path::new(DEVICE).exists() {
        return Some(c);
    }
    let in_a_place_of_its_own = |program: &OsStr, args: CommandArgs<'_>| {
        let mut c = Command::new("unshare");
        c.args(if peregrine_sys::process::is_root() { &["-m"][..] } else { &["-r", "-m"] });
        c.args(["sh", "-c", &format!("mount --bind /dev/null {DEVICE} && exec \"$@\""), "sh"]);
        c.arg(program).args(args);
        c
    };
    let may = in_a_place_of_its_own(OsStr::new("true"), Command::new("true").get_args()).output();
    if !may.is_ok_and(|o| o.status.success()) {
        return None;
    }
    let mut wrapped = in_a_place_of_its_own(c.get_program(), c.get_args());
    wrapped.envs(c.get_envs().filter_map(|(name, value)| Some((name, value?)))).stdin(Stdio::null());
    Some(wrapped)
}

#[test]
fn a_container_that_forbids_userfaultfd_is_served_by_comparing_and_told_so() {
    let expected = steps("30").output().unwrap();
    assert!(expected.status.success() && own_lines(&expected).is_empty(), "{}", text(&expected.stderr));
    for kind in ["isomalloc", "alias", "copy"] {
        let mut c = steps("30");
        c.env("PEREGRINE_STACK_KIND", kind).env("PEREGRINE_WINDOW", "8192").env("PEREGRINE_WINDOWS", "1");
        c.env("PEREGRINE_KILL_EVERY", "60").env("PEREGRINE_MOVE_EVERY", "3");
        let Some(c) = without_the_device(c) else {
            println!("SKIPPED: needs a mount namespace (unshare -m) to be without /dev/userfaultfd");
            return;
        };
        let o = without(c, CALL_USERFAULTFD).output().unwrap();
        assert!(o.status.success(), "{kind}: {}", text(&o.stderr));
        assert_eq!(text(&o.stdout), text(&expected.stdout), "{kind}");
        let lines = own_lines(&o);
        let told = lines.iter().any(|l| l.contains("compared") && l.contains("peregrine doctor"));
        assert!(told, "{kind}: {lines:?}");
    }
}

/// A shared object made from C source, to be loaded before libc.
fn preload(dir: &Path, source: &str) -> PathBuf {
    let (c, so) = (dir.join("preload.c"), dir.join("preload.so"));
    fs::write(&c, source).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&so).arg(&c).output().unwrap();
    assert!(built.status.success(), "{}", text(&built.stderr));
    so
}

#[test]
fn a_libc_whose_thread_block_is_unknown_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let so = preload(dir.path(), "const unsigned _thread_db_sizeof_pthread = 77;");
    let o = steps("1").env("LD_PRELOAD", so).output().unwrap();
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(lines[0].contains("size of libc's struct pthread") && lines[0].contains("glibc"), "{lines:?}");
}

#[test]
fn an_image_is_not_thawed_under_another_libc() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let o = steps("1").env("PEREGRINE_STORE", &store).output().unwrap();
    assert!(o.status.success(), "{}", text(&o.stderr));
    let so = preload(dir.path(), "const char *gnu_get_libc_version(void) { return \"2.99\"; }");
    let o = steps("1").env("LD_PRELOAD", so).env("PEREGRINE_RESUME", &store).output().unwrap();
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(lines[0].contains("the libc was") && lines[0].contains("is \"2.99\""), "{lines:?}");
    assert!(lines[0].contains("resume on a system with the same C library"), "{lines:?}");
}

#[test]
fn an_image_is_not_thawed_where_libraries_lie_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let o = steps("1").env("PEREGRINE_STORE", &store).output().unwrap();
    assert!(o.status.success(), "{}", text(&o.stderr));
    let so = preload(dir.path(), "int one_more_library(void) { return 1; }");
    let o = steps("1").env("LD_PRELOAD", so).env("PEREGRINE_RESUME", &store).output().unwrap();
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(lines[0].contains("where the program and its libraries lie was"), "{lines:?}");
    assert!(lines[0].contains("use the same libraries and stack limit"), "{lines:?}");
    let o = steps("1").env("PEREGRINE_RESUME", &store).output().unwrap();
    assert!(o.status.success(), "it is as good as before: {}", text(&o.stderr));
}

/// The example, by a shell with these limits.
fn steps_under(limits: &str) -> Command {
    let mut c = Command::new("sh");
    c.args(["-c", &format!("{limits} && exec \"$0\" 1")]).arg(example("steps"));
    c.env("PEREGRINE_NODES", "2").stdin(Stdio::null());
    c
}

#[test]
fn where_too_few_files_may_be_open_one_line_names_the_limit_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let (store, output) = (dir.path().join("store"), dir.path().join("output"));
    let mut c = steps_under("ulimit -n 256");
    let o = c.env("PEREGRINE_STORE", &store).env("PEREGRINE_OUTPUT", &output).output().unwrap();
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(lines[0].contains("open files is 256") && lines[0].contains("needs 801"), "{lines:?}");
    assert!(lines[0].contains("ulimit -Hn 1024") && lines[0].contains("LimitNOFILE=1024"), "{lines:?}");
    assert!(!store.exists() && !output.exists(), "refused before anything was made");
    // The least that will do.
    let o = steps_under("ulimit -n 801").output().unwrap();
    assert!(o.status.success() && own_lines(&o).is_empty(), "{}", text(&o.stderr));
    let o = steps_under("ulimit -n 800").output().unwrap();
    assert_eq!(o.status.code(), Some(70), "{}", text(&o.stderr));
}

#[test]
fn an_image_is_not_thawed_under_a_stack_limit_that_moves_libraries() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let o = steps("1").env("PEREGRINE_STORE", &store).output().unwrap();
    assert!(o.status.success(), "{}", text(&o.stderr));
    // Below 128 MiB the kernel leaves libraries where they are.
    let mut c = Command::new("sh");
    c.args(["-c", "ulimit -s 1000000 || exit 9; exec \"$@\"", "sh"]).arg(example("steps")).arg("1");
    let o = c.env("PEREGRINE_RESUME", &store).stdin(Stdio::null()).output().unwrap();
    if o.status.code() == Some(9) {
        println!("SKIPPED: needs a hard limit on stacks of a gigabyte or more (ulimit -Hs)");
        return;
    }
    let lines = own_lines(&o);
    assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{}", text(&o.stderr));
    assert!(lines[0].contains("libraries lie was") && lines[0].contains("(ulimit -s)"), "{lines:?}");
}

/// What the World of the example `holds` says that is resumed with these settings, once an image has what it holds: one line.
fn resume_of_one_that_holds(what: &str, settings: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (store, output) = (dir.path().join("store"), dir.path().join("output"));
    let life = |settings: &str, variable: &str| {
        let mut c = Command::new("sh");
        c.args(["-c", &format!("{settings} exec \"$0\" \"$@\"")]).arg(example("holds")).arg(what);
        c.env(variable, &store).env("PEREGRINE_OUTPUT", &output).env("PEREGRINE_STORE_INTERVAL", "20");
        c.env("PEREGRINE_NODES", "1").env("PEREGRINE_MEMORY", "2048").stdin(Stdio::null());
        c
    };
    let mut first = life("", "PEREGRINE_STORE").spawn().unwrap();
    // What it writes is shown when an image is stored that has it.
    let begun = Instant::now();
    while !fs::read_to_string(&output).is_ok_and(|said| said.contains("holds")) {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing is shown within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
    first.kill().unwrap();
    first.wait().unwrap();
    loop {
        let o = life(settings, "PEREGRINE_RESUME").output().unwrap();
        let lines = own_lines(&o);
        // The last of its processes may still be ending.
        if !text(&o.stderr).contains("in use by") || begun.elapsed() > Duration::from_secs(120) {
            assert_eq!((o.status.code(), lines.len()), (Some(70), 1), "{what}: {}", text(&o.stderr));
            return lines[0].clone();
        }
    }
}

#[test]
fn an_image_that_is_too_large_for_the_limit_on_address_space_is_refused_with_what_is_too_large() {
    for (what, named) in [
        ("heap", "more of a thread's stack and heap than"),
        ("arena", "more messages, regions and suspended threads than"),
    ] {
        let line = resume_of_one_that_holds(what, "ulimit -v 1572864; PEREGRINE_SLOTS=1");
        assert!(line.contains(named) && line.contains("the limit on address space (1572864 KiB)"), "{line}");
        assert!(line.contains("or a wider one (ulimit -v)"), "{line}");
    }
}

#[test]
fn an_image_with_more_slots_than_the_world_is_refused_with_the_number_that_would_do() {
    let line = resume_of_one_that_holds("slots", "PEREGRINE_SLOTS=2");
    assert!(line.contains("set PEREGRINE_SLOTS to at least 4"), "{line}");
}

/// What a scene on a disk of its own finds.
const SCENE: &str = "PEREGRINE_TEST_DISK";

/// Room for the images that a World keeps, which are two and what they build on, some 30 MiB.
const ROOM: u64 = 64 << 20;

/// Runs this test again with a directory on a small disk of its own; `false` if this machine grants none.
fn on_a_small_disk(test: &str) -> bool {
    if std::env::var_os(SCENE).is_some() {
        return true;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = peregrine_sys::process::is_root();
    let unshare: &[&str] = if root { &["-m"] } else { &["-r", "-m"] };
    // The store keeps the executable.
    let bytes = fs::metadata(example("steps")).unwrap().len() + ROOM;
    let script = format!("mount -t tmpfs -o size={bytes} none '{}' && exec \"$@\"", dir.path().display());
    let wrapped = |program: &str| {
        let mut c = Command::new("unshare");
        c.args(unshare).args(["sh", "-c", &script, "sh", program]);
        c
    };
    if !wrapped("true").output().is_ok_and(|o| o.status.success()) {
        println!("SKIPPED: needs a mount namespace (unshare -m) to have a small disk");
        return false;
    }
    let me = std::env::current_exe().unwrap();
    let mut c = wrapped(me.to_str().unwrap());
    let o = c.args(["--exact", test, "--nocapture"]).env(SCENE, dir.path()).output().unwrap();
    assert!(o.status.success(), "{}{}", text(&o.stdout), text(&o.stderr));
    println!("{}", text(&o.stdout));
    false
}

/// So many that they take some seconds on this machine: disks are filled meanwhile.
fn some_seconds_of_rounds() -> String {
    let begun = Instant::now();
    assert!(steps("20").output().unwrap().status.success());
    let seconds = begun.elapsed().as_secs_f64();
    ((20.0 * 3.0 / seconds) as u64).max(150).to_string()
}

struct Scene {
    rounds: String,
    disk: PathBuf,
    said: PathBuf,
    output: PathBuf,
}

impl Scene {
    fn of_this_process() -> Self {
        let disk = PathBuf::from(std::env::var_os(SCENE).unwrap());
        // What the program writes lies elsewhere: only the store is on the small disk.
        let elsewhere = std::env::temp_dir().join(format!("peregrine-disk-{}", std::process::id()));
        fs::create_dir_all(&elsewhere).unwrap();
        Self {
            rounds: some_seconds_of_rounds(),
            disk,
            said: elsewhere.join("said"),
            output: elsewhere.join("output"),
        }
    }

    fn start(&self, variable: &str) -> Child {
        let mut c = steps(&self.rounds);
        let open = |p| fs::OpenOptions::new().create(true).append(true).open(p).unwrap();
        c.env(variable, self.disk.join("store")).stdout(open(&self.output)).stderr(open(&self.said));
        c.spawn().unwrap()
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }

    fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    fn wait_for_images(&self) {
        wait("an image", || fs::read_dir(self.disk.join("store/world")).map_or(0, Iterator::count) > 1);
    }

    fn ends_as_undisturbed(&self, mut child: Child) {
        let status = child.wait().unwrap();
        assert!(status.success(), "{}", self.said());
        let expected = steps(&self.rounds).output().unwrap();
        assert!(self.output() == text(&expected.stdout), "{}", self.output());
        let _ = fs::remove_dir_all(self.output.parent().unwrap());
    }
}

fn wait(what: &str, mut happened: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !happened() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it did not happen: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Fills the disk to the last byte, again and again, for a World removes old images first, until it finds no more to remove.
fn fill(scene: &Scene) -> PathBuf {
    let filler = scene.disk.join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    wait("the World says so", || {
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
        scene.said().contains("could not be stored")
    });
    filler
}

#[test]
fn a_disk_that_fills_up_holds_the_output_until_there_is_room_again() {
    if !on_a_small_disk("a_disk_that_fills_up_holds_the_output_until_there_is_room_again") {
        return;
    }
    let scene = Scene::of_this_process();
    let child = scene.start("PEREGRINE_STORE");
    scene.wait_for_images();
    let filler = fill(&scene);
    println!("{}", scene.said());
    assert!(scene.said().contains("its output is held until an image can be stored"), "{}", scene.said());
    let held = scene.output();
    // Time in which it would write many lines.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(scene.output(), held, "nothing leaves that is not on disk");
    fs::remove_file(filler).unwrap();
    scene.ends_as_undisturbed(child);
}

/// Old images go when there is no room for a new one, and not only now and then.
#[test]
fn a_disk_that_holds_few_images_is_enough() {
    if !on_a_small_disk("a_disk_that_holds_few_images_is_enough") {
        return;
    }
    let scene = Scene { rounds: "1000000".to_owned(), ..Scene::of_this_process() };
    let mut child = scene.start("PEREGRINE_STORE");
    let latest = || {
        let names = fs::read_dir(scene.disk.join("store/world")).into_iter().flatten().flatten();
        names.filter_map(|n| n.file_name().to_str()?.parse::<u32>().ok()).max().unwrap_or(0)
    };
    // Their pages are some 100 MB, and it would be another 24 images before old ones go unasked.
    wait("40 images", || latest() >= 40 || !scene.said().is_empty());
    assert_eq!(scene.said(), "");
    child.kill().unwrap();
    child.wait().unwrap();
    let _ = fs::remove_dir_all(scene.output.parent().unwrap());
}

#[test]
fn after_a_disk_filled_up_and_everything_was_killed_the_images_before_it_resume() {
    if !on_a_small_disk("after_a_disk_filled_up_and_everything_was_killed_the_images_before_it_resume") {
        return;
    }
    let scene = Scene::of_this_process();
    let mut child = scene.start("PEREGRINE_STORE");
    scene.wait_for_images();
    let filler = fill(&scene);
    child.kill().unwrap();
    child.wait().unwrap();
    fs::remove_file(filler).unwrap();
    let child = scene.start("PEREGRINE_RESUME");
    scene.ends_as_undisturbed(child);
}

#[test]
fn a_store_that_becomes_read_only_is_named_and_its_images_resume() {
    if !on_a_small_disk("a_store_that_becomes_read_only_is_named_and_its_images_resume") {
        return;
    }
    let scene = Scene::of_this_process();
    let mut child = scene.start("PEREGRINE_STORE");
    scene.wait_for_images();
    // The kernel refuses to make a whole disk read-only while the store's lock is open, so its part for new files is.
    let part = scene.disk.join("store/tmp");
    let o = Command::new("mount").args(["-t", "tmpfs", "-o", "ro", "none"]).arg(&part).output().unwrap();
    assert!(o.status.success(), "{}", text(&o.stderr));
    wait("the World says so", || scene.said().contains("read-only"));
    println!("{}", scene.said());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(Command::new("umount").arg(&part).status().unwrap().success());
    let child = scene.start("PEREGRINE_RESUME");
    scene.ends_as_undisturbed(child);
}

#[test]
fn a_store_that_is_taken_away_ends_the_world_or_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let said = dir.path().join("said");
    let mut c = steps("100000");
    let mut child = c
        .env("PEREGRINE_STORE", &store)
        .stdout(Stdio::null())
        .stderr(fs::File::create(&said).unwrap())
        .spawn()
        .unwrap();
    wait("an image", || fs::read_dir(store.join("world")).map_or(0, Iterator::count) > 1);
    // A commit may be putting files there.
    while fs::remove_dir_all(&store).is_err() && store.exists() {}
    wait("the World says so", || !fs::read_to_string(&said).unwrap().is_empty());
    let text = fs::read_to_string(&said).unwrap();
    println!("{text}");
    assert!(text.contains("peregrine: "), "{text}");
    assert!(text.contains("store"), "{text}");
    let _ = child.kill();
    child.wait().unwrap();
}
