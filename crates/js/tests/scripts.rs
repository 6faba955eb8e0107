//! The scripts of `scripts/`, and what a run does besides them, as a process sees it.
//!
//! The expected outputs, in `tests/expected`, were written by node 20.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn crate_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The example of that name, which cargo builds beside this test.
fn js_alone() -> std::path::PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let profile = test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps");
    profile.join("examples").join("js-alone")
}

/// Runs `js-alone` in the directory of the scripts, so that errors name a file as it was given.
fn js(file: &str, args: &[&str]) -> Output {
    Command::new(js_alone())
        .current_dir(crate_file("scripts"))
        .arg(file)
        .args(args)
        .output()
        .expect("the program starts")
}

/// Runs `source` as a file of its own and returns exit code, standard output and standard error.
fn run(name: &str, source: &str, args: &[&str]) -> (i32, String, String) {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&directory).expect("a directory for the script");
    std::fs::write(directory.join("script.js"), source).expect("the script is written");
    let output = Command::new(js_alone())
        .current_dir(directory)
        .arg("script.js")
        .args(args)
        .output()
        .expect("the program starts");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code().expect("an exit code"), text(output.stdout), text(output.stderr))
}

fn prints_as_in_node(script: &str, sizes: &[&str]) {
    let expected = crate_file(&format!("tests/expected/{script}-{}.txt", sizes.join("-")));
    let expected = std::fs::read_to_string(expected).unwrap();
    let output = js(&format!("{script}.js"), sizes);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    assert!(output.status.success());
}

#[test]
fn sudoku_prints_what_node_prints() {
    prints_as_in_node("sudoku", &["2", "30"]);
}

#[test]
fn identity_passes_its_checks_and_prints_what_node_prints() {
    prints_as_in_node("identity", &["6"]);
}

#[test]
fn two_prints_what_node_prints() {
    prints_as_in_node("two", &["1"]);
}

#[test]
fn an_uncaught_error_gives_name_message_and_the_way_to_it() {
    let source = "class Sad extends TypeError { get name() { return 'Sad'; } }\n\
                  function inner() { throw new Sad('no luck'); }\n\
                  console.log('before');\n\
                  [1].map(() => inner());\n\
                  console.log('never');\n";
    let (code, stdout, stderr) = run("uncaught", source, &[]);
    assert_eq!((code, stdout.as_str()), (1, "before\n"));
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines[0], "uncaught Sad: no luck");
    assert!(lines[1..].contains(&"    at inner (script.js:2:26)"), "{stderr}");
    assert!(lines[1..].contains(&"    at map (native)"), "{stderr}");
    assert_eq!(lines.last(), Some(&"    at <main> (script.js:4:8)"));
}

#[test]
fn a_syntax_error_names_file_and_line_and_nothing_runs() {
    let (code, stdout, stderr) = run("syntax", "console.log('never');\nlet x = (1 + ;\n", &[]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(stderr, "script.js:2:14: SyntaxError: unexpected token ';', primary expression\n");
}

#[test]
fn turns_are_taken_in_the_order_of_browsers() {
    let source = "
        setTimeout(() => { print('timer 1'); Promise.resolve().then(() => print('its microtask')); }, 1);
        setTimeout(() => print('timer 0'), 0);
        const later = () => setTimeout((...args) => print('later', ...args), 1, 'a', 'b');
        const cancelled = setTimeout(() => print('never'), 2);
        let n = 0;
        const interval = setInterval(() => { print('interval', ++n); if (n === 2) { clearInterval(interval); later(); } }, 3);
        queueMicrotask(() => print('microtask'));
        (async () => { print('sync'); await null; print('awaited'); })();
        clearTimeout(cancelled);
        print('end of script');
    ";
    let (code, stdout, stderr) = run("turns", source, &[]);
    let expected = [
        "sync",
        "end of script",
        "microtask",
        "awaited",
        "timer 1",
        "its microtask",
        "timer 0",
        "interval 1",
        "interval 2",
        "later a b",
    ];
    assert_eq!((stdout.lines().collect::<Vec<_>>(), code, stderr.as_str()), (expected.to_vec(), 0, ""));
}

#[test]
fn a_rejection_ends_the_run_unless_it_is_handled_in_the_same_turn() {
    let handled =
        "const p = Promise.reject(1); Promise.resolve().then(() => p.catch(e => print('caught', e)));";
    assert_eq!(run("handled", handled, &[]), (0, "caught 1\n".to_owned(), String::new()));

    let source = "async function f() { await null; throw new RangeError('far'); }\nf(); setTimeout(print, 1, 'never');";
    let (code, stdout, stderr) = run("rejected", source, &[]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(
        stderr.starts_with("unhandled rejection of a promise: RangeError: far\n    at f (script.js:1:"),
        "{stderr}"
    );
}

#[test]
fn arguments_arrive_in_the_manner_of_shells_and_of_node() {
    let source = "print(JSON.stringify([scriptArgs, process.argv]));";
    let expected = "[[\"a\",\"b c\"],[\"peregrine\",\"script.js\",\"a\",\"b c\"]]\n";
    assert_eq!(run("args", source, &["a", "b c"]), (0, expected.to_owned(), String::new()));
}

#[test]
fn errors_and_warnings_go_to_standard_error_and_groups_indent_each_line() {
    let source = "console.group('a'); console.log('x\\ny'); console.error('bad'); console.groupEnd();
                  console.warn('careful'); console.info('note');";
    let (code, stdout, stderr) = run("streams", source, &[]);
    assert_eq!((code, stdout.as_str()), (0, "group: a\n  x\n  y\nnote\n"));
    assert_eq!(stderr, "  bad\ncareful\n");
}

#[test]
fn the_names_of_the_table_in_the_documentation_exist() {
    let source = "
        const text = new TextDecoder().decode(new TextEncoder().encode('h\u{e9}'));
        const times = [performance.now(), performance.now()];
        print(text, structuredClone({ a: [1] }).a[0], atob(btoa('x')), times[0] >= 0 && times[1] >= times[0]);
        print(typeof Intl, typeof Temporal, typeof require, escape('\u{e4}'));
    ";
    let expected = "h\u{e9} 1 x true\nundefined undefined undefined %E4\n";
    assert_eq!(run("names", source, &[]), (0, expected.to_owned(), String::new()));
}
