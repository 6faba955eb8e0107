//! The forms: tests, how they are told to be long, and where cargo put their executables.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One test, told how much to do.
pub(super) struct Form {
    pub(super) name: &'static str,
    /// The test's executable, and the test.
    pub(super) test: (&'static str, &'static str),
    settings: &'static [(&'static str, &'static str)],
    /// Broken off when the time is up.
    pub(super) long: bool,
}

const fn short(name: &'static str, test: (&'static str, &'static str)) -> Form {
    Form { name, test, settings: &[], long: false }
}

const fn long(name: &'static str, test: (&'static str, &'static str)) -> Form {
    Form { name, test, settings: &[], long: true }
}

const AT_ANY_STEP: (&str, &str) =
    ("kill", "a_node_killed_at_any_step_leaves_every_structure_to_be_put_right");
const SUPERVISOR: (&str, &str) =
    ("supervisor", "a_world_killed_at_any_step_of_its_supervisor_goes_on_from_its_store");

/// All of them.
pub(super) const FORMS: &[Form] = &[
    short("nodes killed at each step", AT_ANY_STEP),
    short("survivors reset at each step", ("kill", "a_node_reset_at_any_step_holds_what_the_image_says")),
    short("supervisors killed at each step", SUPERVISOR),
    short(
        "resumes killed at each step",
        ("supervisor", "a_resume_killed_at_any_of_its_steps_can_be_resumed"),
    ),
    short(
        "one image resumed twenty times",
        ("supervisor", "an_image_is_resumed_after_twenty_kills_each_before_the_next_image"),
    ),
    short("nodes killed in a storm of moves", ("storm", "kills_in_a_storm_of_moves_change_no_result")),
    short(
        "nodes killed beneath messages",
        ("messages", "messages_arrive_once_and_in_order_while_nodes_are_killed"),
    ),
    short(
        "everything killed, every kind of value",
        ("durable", "every_kind_of_value_is_held_through_kills_of_everything"),
    ),
    short(
        "everything killed, kinds of stack",
        ("durable", "threads_of_all_kinds_go_on_after_kills_of_everything_in_windows_and_packed"),
    ),
    short(
        "everything killed, a script",
        ("durable", "an_unmodified_javascript_engine_goes_on_after_kills_of_everything"),
    ),
    Form {
        name: "nodes killed at each step, six times each",
        test: AT_ANY_STEP,
        settings: &[("PEREGRINE_KILL_POINTS", "6")],
        long: true,
    },
    long("ten thousand moves", ("storm", "ten_thousand_moves_change_no_result")),
    long(
        "hundreds of kills beneath messages",
        ("messages", "messages_arrive_once_through_hundreds_of_kills"),
    ),
    Form {
        name: "supervisors killed at each step, three times each",
        test: SUPERVISOR,
        settings: &[("PEREGRINE_TIMES", "3")],
        long: true,
    },
    long(
        "scripts that cross a thousand times",
        ("durable", "scripts_that_cross_a_thousand_times_print_what_they_print_alone"),
    ),
    long("a million messages", ("messages", "a_million_messages_arrive_once_and_in_order")),
];

/// What a test's own time-out is set to: hanging is judged by the soak.
const NO_TIME_OUT: &str = "3600";

impl Form {
    /// Its command, with `seed`.
    pub(super) fn command(&self, seed: u64, binaries: &Binaries) -> Command {
        let mut command = Command::new(binaries.of(self));
        command.args(["--exact", self.test.1, "--include-ignored", "--nocapture"]);
        command.env("PEREGRINE_SEED", seed.to_string()).envs(self.settings.iter().copied());
        command.env("TESTKIT_LIMIT", NO_TIME_OUT).current_dir(workspace());
        command
    }

    /// What a user types to try it again.
    pub(super) fn again(&self, seed: u64, binaries: &Binaries) -> String {
        let settings: String = self.settings.iter().map(|(name, value)| format!("{name}={value} ")).collect();
        let (program, test) = (binaries.of(self).display(), self.test.1);
        format!("PEREGRINE_SEED={seed} {settings}{program} --exact {test} --include-ignored --nocapture")
    }
}

fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The tests' executables, by name.
pub(super) struct Binaries(BTreeMap<String, PathBuf>);

impl Binaries {
    /// Has cargo build them, in release form.
    pub(super) fn build() -> Result<Self, String> {
        let mut found = BTreeMap::new();
        // One after the other: together, the command's crate would be built with kill points too.
        cargo(
            &["test", "--no-run", "-p", "peregrine-world", "--test", "kill", "--test", "supervisor"],
            &mut found,
        )?;
        let of_threads = ["--test", "storm", "--test", "messages", "--test", "durable"];
        cargo(&[&["test", "--no-run", "-p", "peregrine"][..], &of_threads].concat(), &mut found)?;
        cargo(&["build", "-p", "peregrine", "--examples"], &mut BTreeMap::new())?;
        let missing = FORMS.iter().map(|f| f.test.0).find(|name| !found.contains_key(*name));
        missing
            .map_or(Ok(Self(found)), |name| Err(format!("cargo told of no executable for the test {name}")))
    }

    fn of(&self, form: &Form) -> &Path {
        &self.0[form.test.0]
    }
}

/// Runs cargo and notes the executables of tests that it tells of.
fn cargo(arguments: &[&str], found: &mut BTreeMap<String, PathBuf>) -> Result<(), String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments).args(["--release", "--message-format=json-render-diagnostics"]);
    let output = cargo
        .current_dir(workspace())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| format!("cargo: {e}"))?;
    if !output.status.success() {
        return Err(format!("cargo {}: {}", arguments.join(" "), output.status));
    }
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        if let (true, Some(name), Some(executable)) = (
            message["profile"]["test"] == true,
            message["target"]["name"].as_str(),
            message["executable"].as_str(),
        ) {
            found.insert(name.to_owned(), executable.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A form whose test is gone would pass: a test executable that finds nothing to run is content.
    #[test]
    fn every_form_names_a_test_that_is_there() {
        for form in FORMS {
            let (executable, test) = form.test;
            let file = |package: &str| workspace().join(format!("crates/{package}/tests/{executable}.rs"));
            let source = ["world", "peregrine"].iter().find_map(|p| std::fs::read_to_string(file(p)).ok());
            let source = source.unwrap_or_else(|| panic!("no test called {executable}"));
            assert!(source.contains(&format!("fn {test}(")), "{executable} has no {test}");
        }
    }
}
