//! Runs JavaScript files one after the other, each in a thread of its own, again and again until enough threads have crossed from
//! one node to another: `crossings COUNT FILE ARG [FILE ARG …]`. Says on standard error how often that was.
use peregrine::{Builder, tally};
use peregrine_js::Host;

const STACK: usize = 16 << 20;

fn run((file, argument): (String, String)) -> Result<(), String> {
    let source = std::fs::read_to_string(&file).map_err(|e| e.to_string())?;
    let host = Host { sleep: peregrine::sleep, stack_bytes: STACK - (1 << 20) };
    peregrine_js::run_script_on(host, std::path::Path::new(&file), &source, &[argument])
        .map_err(|e| e.to_string())
}

#[peregrine::main]
fn main() -> Result<(), String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (count, scripts) = args.split_first().ok_or("usage: crossings COUNT FILE ARG …")?;
    let count: u64 = count.parse().map_err(|e| format!("{count}: {e}"))?;
    let mut rounds = 0;
    while rounds == 0 || tally().moves < count {
        for script in scripts.chunks_exact(2) {
            let thread = Builder::new().name("script").stack_size(STACK);
            let script = (script[0].clone(), script[1].clone());
            thread.spawn(run, script).map_err(|e| e.to_string())?.join().map_err(|e| e.to_string())??;
        }
        rounds += 1;
    }
    eprintln!("{} crossings in {rounds} rounds", tally().moves);
    let again = std::env::var_os("PEREGRINE_FIXED_ADDRESSES").is_some();
    let persona = std::fs::read_to_string("/proc/self/personality").unwrap_or_default();
    eprintln!("executed again: {again}, personality {}", persona.trim());
    Ok(())
}
