//! The example runs, and says what the README says it does.

use std::process::Command;

#[test]
fn the_key_value_example_says_what_the_readme_shows() {
    let target = std::env::current_exe().unwrap();
    let example = target.parent().unwrap().parent().unwrap().join("examples/key_value");
    let output = Command::new(&example).output().unwrap_or_else(|e| panic!("{}: {e}", example.display()));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let readme = include_str!("../README.md");
    let shown = readme
        .split("```text\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next())
        .expect("the README shows it");
    assert_eq!(text, shown);
}
