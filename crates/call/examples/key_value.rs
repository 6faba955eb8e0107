//! A small key-value domain in a process of its own, and its client.
//!
//! ```sh
//! cargo run --example key_value
//! ```
//!
//! The program runs itself again as the domain, uses it, kills it, and shows what a caller sees.

use peregrine_call::{Call, CallError, Client, Deadline, Domain, Failure, Invocation};
use std::collections::BTreeMap;
use std::process::{Child, Command};
use std::sync::RwLock;
use std::time::Duration;

/// Changes when the meaning of the arguments does.
const VERSION: u64 = 1;
const MISSING: u32 = 1;

type Store = RwLock<BTreeMap<Vec<u8>, Vec<u8>>>;

fn serve(path: &str) -> Result<(), Box<dyn std::error::Error>> {
    let store: &'static Store = Box::leak(Box::default());
    let _domain = Domain::builder()
        .name("key-value")
        .activations(4)
        .stack_bytes(64 * 1024)
        .portal("put", VERSION, |call: &mut Invocation<'_>| {
            let (key, value) = (call.input(0)?.to_vec(), call.input(1)?.to_vec());
            store.write().expect("no handler panics").insert(key, value);
            Ok(())
        })
        .portal("get", VERSION, |call: &mut Invocation<'_>| {
            let store = store.read().expect("no handler panics");
            let value = store
                .get(call.input(0)?)
                .ok_or_else(|| Failure::new(MISSING, call.input(0).unwrap_or_default()))?;
            call.output(1)?.extend_from_slice(value);
            Ok(())
        })
        .portal("import", VERSION, |call: &mut Invocation<'_>| {
            // Lines of `key=value`, lent in place: one private copy of what is kept.
            let text = call.lent(0)?.to_vec();
            let mut store = store.write().expect("no handler panics");
            for line in text.split(|&b| b == b'\n') {
                if let Some(at) = line.iter().position(|&b| b == b'=') {
                    store.insert(line[..at].to_vec(), line[at + 1..].to_vec());
                }
            }
            call.output(1)?.extend_from_slice(store.len().to_string().as_bytes());
            Ok(())
        })
        .serve(path)?;
    loop {
        std::thread::park();
    }
}

fn connect(path: &str) -> Result<Client, CallError> {
    let begun = std::time::Instant::now();
    loop {
        match Client::connect(path) {
            Err(CallError::Unreachable { .. }) if begun.elapsed() < Duration::from_secs(5) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

fn run(path: &str, domain: &mut Child) -> Result<(), Box<dyn std::error::Error>> {
    let client = connect(path)?;
    let (put, get) = (client.portal("put", VERSION)?, client.portal("get", VERSION)?);
    client.call(put, Call::new().input(b"falcon").input(b"peregrine"))?;
    let mut value = Vec::new();
    client.call(get, Call::new().input(b"falcon").output(&mut value, 4096))?;
    println!("falcon is {}", String::from_utf8_lossy(&value));

    match client.call(get, Call::new().input(b"dodo").output(&mut value, 4096)) {
        Err(CallError::Callee(failure)) => {
            println!("{}: no such key (code {})", String::from_utf8_lossy(&failure.detail), failure.code);
        }
        other => println!("unexpected: {other:?}"),
    }

    let text: String = (0..10_000).map(|i| format!("key{i}={}\n", i * i)).collect();
    let buffer = client.buffer(text.len())?;
    buffer.write(0, text.as_bytes())?;
    let soon = Deadline::after(Duration::from_secs(5));
    let import = client.portal("import", VERSION)?;
    client.call(import, Call::new().lend(&buffer).output(&mut value, 32).deadline(soon))?;
    println!("{} keys after the import", String::from_utf8_lossy(&value));

    if let Err(e) = client.portal("get", VERSION + 1) {
        println!("{e}");
    }
    domain.kill()?;
    if let Err(e) = client.call(get, Call::new().input(b"falcon").output(&mut value, 4096)) {
        println!("{e}");
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(path) = std::env::args().nth(1) {
        return serve(&path);
    }
    let path = std::env::temp_dir().join(format!("key-value-{}", std::process::id())).display().to_string();
    let mut domain = Command::new(std::env::current_exe()?).arg(&path).spawn()?;
    let outcome = run(&path, &mut domain);
    let _ = domain.kill();
    domain.wait()?;
    std::fs::remove_file(&path)?;
    outcome
}
