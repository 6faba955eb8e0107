//! [`run_script`] called from a program.

use std::path::Path;

use peregrine_js::{Host, ScriptError, run_script, run_script_on};

fn run(source: &str) -> Result<(), ScriptError> {
    run_script(Path::new("dir/s.js"), source, &[])
}

/// A run that fails unless the expression is true.
fn holds(expression: &str) {
    run(&format!("if (!({expression})) throw new Error('false')")).unwrap();
}

#[test]
fn each_run_starts_with_a_fresh_engine() {
    run("globalThis.left = 1; var mine = Symbol.for('x'); Array.prototype.more = 2").unwrap();
    holds("typeof left + typeof mine + [].more === 'undefinedundefinedundefined'");
}

#[test]
fn scripts_run_on_several_threads_at_once() {
    let source = "let sum = 0; for (let i = 0; i < 3000; i++) sum += new Set([i, Symbol(), {}]).size;
                  if (sum !== 9000) throw new Error(sum)";
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| run(source))).collect();
        for thread in threads {
            thread.join().expect("no panic").unwrap();
        }
    });
}

#[test]
fn what_is_thrown_need_not_be_an_error() {
    assert_eq!(run("throw 42").unwrap_err().to_string(), "uncaught 42\n    at <main> (dir/s.js:1:7)");
    let ScriptError::Unhandled { name, message, .. } = run("Promise.reject('why')").unwrap_err() else {
        panic!()
    };
    assert_eq!((name.as_str(), message.as_str()), ("", "\"why\""));
}

#[test]
fn an_error_in_a_timer_or_a_microtask_ends_the_run() {
    for source in
        ["setTimeout(() => { throw new URIError('t') })", "queueMicrotask(() => { throw new URIError('t') })"]
    {
        let ScriptError::Uncaught { name, message, .. } = run(source).unwrap_err() else {
            panic!("{source}")
        };
        assert_eq!((name.as_str(), message.as_str()), ("URIError", "t"));
    }
}

#[test]
fn a_syntax_error_has_a_place_even_where_the_file_just_ends() {
    let place = |source| match run(source).unwrap_err() {
        ScriptError::Syntax { file, line, column, .. } => (file.display().to_string(), line, column),
        other => panic!("{other}"),
    };
    assert_eq!(place("let a;\n  1 2;"), ("dir/s.js".to_owned(), 2, 5));
    assert_eq!(place("f(\n{"), ("dir/s.js".to_owned(), 2, 2));
    assert_eq!(place("'open"), ("dir/s.js".to_owned(), 1, 6));
}

#[test]
fn a_syntax_error_of_a_running_script_is_its_exception() {
    let ScriptError::Uncaught { name, .. } = run("new Function('(')").unwrap_err() else { panic!() };
    assert_eq!(name, "SyntaxError");
}

#[test]
fn a_module_is_told_what_to_do() {
    for source in ["import x from 'y';", "const x = await 1;", "export default 1;"] {
        let error = run(source).unwrap_err().to_string();
        assert!(error.contains("the file is a module: wrap"), "{error}");
    }
    assert!(!run("let = ;").unwrap_err().to_string().contains("module"));
}

#[test]
fn errors_survive_serialisation() {
    for source in ["throw new Error('x')", "Promise.reject()", "(", "(function f() { f(); })()"] {
        let error = run(source).unwrap_err();
        let bytes = postcard::to_stdvec(&error).unwrap();
        assert_eq!(postcard::from_bytes::<ScriptError>(&bytes).unwrap(), error);
    }
}

#[test]
fn a_run_waits_for_its_timers_with_the_sleep_it_was_given() {
    // Returns at once, as a sleep that was interrupted: the loop must ask again, and not run the timer early.
    let host = Host { sleep: |_| std::thread::yield_now(), ..Host::default() };
    let source = "const start = performance.now();
                  setTimeout(() => { if (performance.now() - start < 20) throw new Error('early') }, 20)";
    run_script_on(host, Path::new("s.js"), source, &[]).unwrap();

    let host = Host { sleep: |time| panic!("nothing to wait {time:?} for"), ..Host::default() };
    let source = "clearTimeout(setTimeout(() => {}, 1e9)); Promise.resolve()";
    run_script_on(host, Path::new("s.js"), source, &[]).unwrap();
}

#[test]
fn what_nobody_can_wake_does_not_keep_the_run_alive() {
    run("new FinalizationRegistry(() => {}).register({}); new Promise(() => {}); (async () => await new Promise(() => {}))()")
        .unwrap();
    run("const a = new Int32Array(new SharedArrayBuffer(4)); Atomics.waitAsync(a, 0, 0)").unwrap();
    // With a time limit it wakes by itself.
    let source = "const a = new Int32Array(new SharedArrayBuffer(4));
                  Atomics.waitAsync(a, 0, 0, 5).value.then(how => { throw how })";
    let ScriptError::Unhandled { message, .. } = run(source).unwrap_err() else { panic!() };
    assert_eq!(message, "\"timed-out\"");
}

#[test]
fn recursion_ends_with_an_error_before_the_stack_does() {
    let ways = [
        "(function f() { f(); })()",
        "(function f() { [1].map(f); })()",
        "(function f() { JSON.parse('[1]', f); })()",
        "(function f() { 'a'.replace(/a/, f); })()",
        "(function f() { [2, 1].sort(f); })()",
        "const o = { get then() { return Promise.resolve(o); } }; Promise.resolve(o)",
        "const o = { toJSON() { return JSON.stringify(o); } }; JSON.stringify(o)",
        "const p = new Proxy({}, { ownKeys() { return Object.keys(p); } }); Object.keys(p)",
        "class A extends Array { static get [Symbol.species]() { return new A(1).map(x => x); } } new A(1).map(x => x)",
        "function* g() { yield* g(); } [...g()]",
    ];
    for way in ways {
        let host = Host { stack_bytes: 2 << 20, ..Host::default() };
        let thread = std::thread::Builder::new()
            .stack_size(host.stack_bytes)
            .spawn(move || run_script_on(host, Path::new("s.js"), way, &[]))
            .unwrap();
        let error = thread.join().expect("no panic").unwrap_err();
        assert!(matches!(error, ScriptError::Limit { .. }), "{way}: {error}");
    }
}

#[test]
fn with_more_stack_a_script_may_recurse_as_deep_as_in_node() {
    let host = Host { stack_bytes: 11_000 * (10 << 10), ..Host::default() };
    let source = "function f(n) { return n === 0 ? 0 : 1 + f(n - 1); } if (f(10000) !== 10000) throw new Error('short')";
    // Plain calls take no stack of the thread, so here a small one is enough.
    run_script_on(host, Path::new("s.js"), source, &[]).unwrap();
}
