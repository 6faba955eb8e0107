//! A crate outside the workspace that has this crate and `tempfile` and nothing else: the README's programs and the examples
//! are built and run in it, as whoever copies them would.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

fn here(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The README's programs, in order: what a documentation test hides is part of them.
fn readme_programs() -> Vec<String> {
    let page = read(&here("README.md"));
    let blocks = page.split("```rust\n").skip(1).map(|rest| {
        let code = rest.split("```").next().unwrap_or_default();
        let mut program = String::from("fn main() -> Result<(), Box<dyn std::error::Error>> {\n");
        for line in code.lines() {
            writeln!(program, "{}", line.strip_prefix("# ").unwrap_or(line)).unwrap();
        }
        program + "}\n"
    });
    blocks.collect()
}

/// The version of `tempfile` that this crate is tested with.
fn tempfile_version(lock: &str) -> &str {
    let rest = lock.split("name = \"tempfile\"\nversion = \"").nth(1).expect("in the lock file");
    rest.split('"').next().expect("quoted")
}

struct Outside {
    directory: PathBuf,
}

impl Outside {
    fn with(programs: &[(String, String)]) -> Self {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm-outside");
        let bins = directory.join("src/bin");
        // Programs of an earlier run that the README no longer has must not be built.
        let _ = std::fs::remove_dir_all(&bins);
        std::fs::create_dir_all(&bins).unwrap();
        let lock = read(&here("../../Cargo.lock"));
        let manifest = format!(
            "[package]\nname = \"vm-outside\"\nversion = \"0.0.0\"\nedition = \"2024\"\npublish = false\n\n[workspace]\n\n\
             [dependencies]\nperegrine-vm = {{ path = {:?} }}\ntempfile = \"={}\"\n",
            here("."),
            tempfile_version(&lock),
        );
        std::fs::write(directory.join("Cargo.toml"), manifest).unwrap();
        // The same versions of everything, so that nothing need be fetched.
        std::fs::write(directory.join("Cargo.lock"), lock).unwrap();
        for (name, text) in programs {
            std::fs::write(bins.join(format!("{name}.rs")), text).unwrap();
        }
        Self { directory }
    }

    fn cargo(&self, args: &[&str]) -> String {
        let mut command = Command::new(env!("CARGO"));
        command.args(args).args(["--quiet", "--offline"]).current_dir(&self.directory);
        // What cargo sets for tests is not for the crate built here.
        for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("CARGO_") && n != "CARGO_HOME") {
            command.env_remove(name);
        }
        let output = command.env("RUSTFLAGS", "-D warnings").output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(
            output.status.success(),
            "{args:?}: {}\n{}{}",
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        );
        text(&output.stdout)
    }
}

#[test]
fn the_readme_and_the_examples_stand_alone() {
    let mut programs: Vec<(String, String)> = Vec::new();
    for (i, text) in readme_programs().into_iter().enumerate() {
        programs.push((format!("readme_{}", i + 1), text));
    }
    assert_eq!(programs.len(), 2, "the README's programs");
    let readme = read(&here("README.md"));
    let mut examples = 0;
    for entry in std::fs::read_dir(here("examples")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        assert!(readme.contains(&format!("- `{name}`: ")), "the README does not say what {name} is");
        programs.push((name, read(&path)));
        examples += 1;
    }
    assert_eq!(readme.matches("\n- `").count(), examples, "each example that the README names is there");
    let outside = Outside::with(&programs);
    outside.cargo(&["build", "--bins"]);
    for (name, _) in &programs {
        let said = outside.cargo(&["run", "--bin", name]);
        println!("== {name}\n{said}");
        match name.as_str() {
            "readme_1" => {}
            // What the README says that it prints.
            "readme_2" => assert!(
                said.contains("(not PAGEMAP_SCAN+WP_ASYNC: write-protect-async is missing: "),
                "{said}"
            ),
            _ => assert!(!said.is_empty(), "{name} says something"),
        }
    }
}
