//! Crates of their own that know this one by its path alone, built as their users would: one that runs, and one full of interfaces that
//! must not compile.
//!
//! The second is compiled once, with a module for each interface, and the compiler's messages are read as JSON: each must be an error of the kind
//! that is expected, at the type that can't cross. (`compile_fail,E0277` does not show that: a stable rustdoc takes any error for it.)

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Runs cargo for another crate.
fn cargo(args: &[&str], manifest: &Path) -> Output {
    let mut command = Command::new(env!("CARGO"));
    command.args(args).arg("--offline").arg("--manifest-path").arg(manifest);
    command.arg("--target-dir").arg(root().join("target/outside")).current_dir(root());
    // What cargo sets for tests is not for the crate built here.
    for (name, _) in std::env::vars().filter(|(n, _)| n.starts_with("CARGO_") && n != "CARGO_HOME") {
        command.env_remove(name);
    }
    command.output().unwrap()
}

const DARKROOM: &str = "\
in and out: mean 75, 2 black
the callee's own error: Err(Callee(Empty)); still 2 black
inout: [f, f, f, f, f], Ok(3) lines, then Err(Callee(TooLong { by: 1 })); falcon has 3
lend: 2.5 in place, 4.5 of a slice
give: 77 grains are not black
awaited, side by side: 1 and 2
a deadline: true
its death: the domain died before it replied; the call may or may not have been executed
and then: unreachable true
";

#[test]
fn a_crate_of_its_own_passes_arguments_in_every_mode_and_awaits_calls() {
    let output = cargo(&["run", "--quiet", "--locked"], &root().join("examples/darkroom/Cargo.toml"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), DARKROOM, "{said}");
}

/// What an argument or result must not hold: the name of the case, its type, and what the refusal says.
///
/// What is an address on its face is refused by the attribute in words of its own; what hides one in a type of the user's or of std, by
/// the compiler, for nothing makes it into bytes.
const UNFIT: [(&str, &str, Says); 12] = [
    ("raw", "*const u8", Says::Words("a raw pointer means nothing in another process")),
    ("raw_inside", "Vec<(u8, *mut u8)>", Says::Words("a raw pointer means nothing in another process")),
    ("function", "fn(u32) -> u32", Says::Words("a function's address means nothing in another process")),
    ("object", "Box<dyn Fn()>", Says::Words("a trait object means nothing in another process")),
    ("reference", "Option<&'static str>", Says::Words("a reference inside a value can't cross")),
    ("reference_in_tuple", "(u8, &'static str)", Says::Words("a reference inside a value can't cross")),
    ("reference_in_array", "[&'static u64; 2]", Says::Words("a reference inside a value can't cross")),
    ("counted", "std::rc::Rc<u32>", Says::Code("E0277")),
    ("cell", "Vec<std::sync::Arc<std::sync::Mutex<u32>>>", Says::Code("E0277")),
    ("named", "Node", Says::Code("E0277")),
    ("alias", "Address", Says::Code("E0277")),
    ("borrowed", "Name<'static>", Says::At("implementation of `Deserialize` is not general enough")),
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Says {
    /// The attribute's own words.
    Words(&'static str),
    /// The compiler's, which have no number, at the type.
    At(&'static str),
    /// The compiler's error of this number, at the type.
    Code(&'static str),
}

/// Where in a method the type stands; `TYPE` is put in.
const PLACES: [(&str, &str); 7] = [
    ("in", "fn f(&self, a: TYPE);"),
    ("in_by_reference", "fn f(&self, a: &TYPE);"),
    ("out", "fn f(&self, #[out] a: &mut TYPE);"),
    ("inout", "fn f(&self, #[inout] a: &mut TYPE);"),
    ("result", "fn f(&self) -> TYPE;"),
    ("result_inside", "fn f(&self) -> Result<TYPE, String>;"),
    ("error", "fn f(&self) -> Result<u32, TYPE>;"),
];

/// Other cases, each with its method and where the error is.
const OTHERS: [(&str, &str, &str, Says); 9] = [
    ("lend_raw", "fn f(&self, #[lend] a: *const u8);", "*const u8", Says::Code("E0277")),
    (
        "lend_raw_inside",
        "fn f(&self, #[lend] a: LentSlice<'_, *const u8>);",
        "LentSlice<'_, *const u8>",
        Says::Code("E0277"),
    ),
    (
        "lend_references",
        "fn f(&self, #[lend] a: LentSlice<'_, &'static u8>);",
        "LentSlice<'_, &'static u8>",
        Says::Code("E0277"),
    ),
    (
        "lend_functions",
        "fn f(&self, #[lend] a: LentSlice<'_, fn()>);",
        "LentSlice<'_, fn()>",
        Says::Code("E0277"),
    ),
    (
        "lend_counted",
        "fn f(&self, #[lend] a: LentSlice<'_, std::rc::Rc<u32>>);",
        "LentSlice<'_, std::rc::Rc<u32>>",
        Says::Code("E0277"),
    ),
    (
        "lend_named",
        "fn f(&self, #[lend] a: LentSlice<'_, Node>);",
        "LentSlice<'_, Node>",
        Says::Code("E0277"),
    ),
    ("give_raw", "fn f(&self, #[give] a: *mut u8);", "*mut u8", Says::Code("E0277")),
    ("give_counted", "fn f(&self, #[give] a: std::rc::Rc<u32>);", "std::rc::Rc<u32>", Says::Code("E0277")),
    ("give_named", "fn f(&self, #[give] a: Node);", "Node", Says::Code("E0277")),
];

/// A module with one interface.
fn module(name: &str, method: &str) -> String {
    format!(
        "mod {name} {{ #[allow(unused_imports)] use super::*;\n#[peregrine_call::interface] pub trait I {{ {method} }}\n}}\n"
    )
}

/// One error of the compiler's, and the module that it is in.
#[derive(Debug)]
struct Said {
    code: Option<String>,
    message: String,
    /// What it points to.
    at: Vec<String>,
}

/// What the compiler says of the crate `name` with this source, which knows ours by the name `ours`: the line that each error points to, and
/// the error.
fn errors_of(name: &str, source: &str, ours: &str) -> Vec<(usize, Said)> {
    // Always the same place, so that cargo keeps one of its kind.
    let dir = root().join("target/outside/sources").join(name);
    std::fs::create_dir_all(dir.join("src")).unwrap();
    // The same dependencies as the crate that runs: they are built once.
    let darkroom = root().join("examples/darkroom");
    let manifest = std::fs::read_to_string(darkroom.join("Cargo.toml")).unwrap();
    let path = root().join("crates/call");
    let manifest = manifest
        .replace("../../crates/call", path.to_str().unwrap())
        .replace("peregrine-call = {", &format!("{ours} = {{ package = \"peregrine-call\","))
        .replace("darkroom", name);
    std::fs::write(dir.join("Cargo.toml"), manifest).unwrap();
    std::fs::copy(darkroom.join("Cargo.lock"), dir.join("Cargo.lock")).unwrap();
    std::fs::write(dir.join("src/lib.rs"), source).unwrap();
    let output = cargo(&["build", "--quiet", "--message-format=json"], &dir.join("Cargo.toml"));
    let messages = String::from_utf8(output.stdout).unwrap();
    let mut errors = Vec::new();
    for line in messages.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        let message = &value["message"];
        if message["level"] != "error" {
            continue;
        }
        let spans: Vec<_> =
            message["spans"].as_array().into_iter().flatten().filter(|s| s["is_primary"] == true).collect();
        let Some(first) = spans.first() else { continue };
        let said = Said {
            code: message["code"]["code"].as_str().map(str::to_owned),
            message: message["message"].as_str().unwrap_or_default().to_owned(),
            at: spans.iter().filter_map(|s| pointed_at(s)).collect(),
        };
        errors.push((first["line_start"].as_u64().unwrap() as usize, said));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.success(),
        errors.is_empty(),
        "what it says is not all about the source: {said}"
    );
    errors
}

/// The text that a span marks.
fn pointed_at(span: &serde_json::Value) -> Option<String> {
    let text = &span["text"][0];
    let column = |name: &str| text[name].as_u64().map(|c| c as usize - 1);
    let (from, to) = (column("highlight_start")?, column("highlight_end")?);
    Some(text["text"].as_str()?.chars().skip(from).take(to - from).collect())
}

#[test]
fn what_holds_an_address_is_refused_by_the_compiler_in_every_mode() {
    let mut cases = Vec::new();
    for (place, method) in PLACES {
        for (what, ty, says) in UNFIT {
            cases.push((format!("{place}_{what}"), method.replace("TYPE", ty), ty, says));
        }
    }
    cases.extend(OTHERS.map(|(name, method, ty, says)| (name.to_owned(), method.to_owned(), ty, says)));
    let mut source = "#![allow(dead_code)]
use peregrine_call::{Given, LentSlice};
#[derive(Clone, Copy)] pub struct Node { pub next: *const Node }
pub type Address = *const u8;
#[derive(serde::Serialize, serde::Deserialize, Default)] pub struct Name<'a> { pub text: &'a str }
mod fine { use super::*;
#[peregrine_call::interface] pub trait I { fn f(&self, a: &[String], #[out] b: &mut Vec<Box<u8>>, #[inout] c: &mut Option<u32>, #[lend] d: LentSlice<'_, f64>, #[give] e: Given) -> Result<(u8, String), String>; }
}
"
    .to_owned();
    let mut of_line = BTreeMap::new();
    for (name, method, ..) in &cases {
        let from = source.lines().count() + 1;
        source += &module(name, method);
        (from..=source.lines().count())
            .for_each(|line| assert!(of_line.insert(line, name.as_str()).is_none()));
    }
    let mut said: BTreeMap<&str, Vec<Said>> = BTreeMap::new();
    for (line, error) in errors_of("unfit", &source, "peregrine-call") {
        let name = of_line.get(&line).unwrap_or_else(|| panic!("an error elsewhere: {line}: {error:?}"));
        said.entry(name).or_default().push(error);
    }
    let wrong: Vec<String> = cases
        .iter()
        .filter(|(name, _, ty, says)| {
            let errors = said.get(name.as_str()).map_or(&[][..], Vec::as_slice);
            let right = |e: &Said| match says {
                Says::Words(words) => e.code.is_none() && e.message.contains(words),
                Says::At(words) => e.message.contains(words) && e.at.iter().any(|at| ty.starts_with(at)),
                Says::Code(code) => e.code.as_deref() == Some(code) && e.at.iter().any(|at| at == ty),
            };
            !errors.iter().any(right)
        })
        .map(|(name, method, _, says)| format!("{name}: `{method}`: {says:?}: {:?}", said.get(name.as_str())))
        .collect();
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn who_knows_the_crate_by_another_name_says_so() {
    let source = "#![deny(warnings)]
//! By another name.
use calls::{Given, Invocation, LentSlice};
/// One of each.
#[calls::interface(crate = \"calls\", version = 2, name = \"each\", reply_bytes = 1 << 10)]
pub trait Each {
    /// In every mode.
    fn all(&self, #[context] call: &Invocation<'_>, a: &str, b: &[u8], #[out] c: &mut u32, #[out(bytes = 9)] d: &mut Vec<u8>, #[inout] e: &mut String, #[inout(bytes = 9)] f: &mut Vec<u8>, #[lend] g: LentSlice<'_, f64>, #[give] h: Given) -> Result<u8, String>;
    /// Nothing.
    fn none(&self);
}
/// Uses it.
pub async fn uses(each: &EachClient) -> Result<(), calls::CallError> {
    let _ = each.none();
    let _ = each.none_async().await;
    let [mut d, mut f] = [vec![], vec![]];
    let _ = each.all_async(\"a\", b\"b\", &mut 0, &mut d, &mut String::new(), &mut f, &[0.5f64], b\"h\").await;
    Ok(())
}
/// Serves it.
pub fn serves(each: impl Each) -> calls::DomainBuilder {
    calls::Domain::builder().interface(EachPortal(each))
}
";
    let errors = errors_of("renamed", source, "calls");
    assert!(errors.is_empty(), "{errors:?}");
    assert!(
        !errors_of("renamed", &source.replace("crate = \"calls\", ", ""), "calls").is_empty(),
        "the default is another"
    );
}
