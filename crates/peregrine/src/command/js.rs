//! `peregrine run js`: a script in an unmodified JavaScript engine, in a thread.

use super::world_options::WorldOptions;
use clap::Args;
use std::path::PathBuf;
#[cfg(not(feature = "js"))]
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(super) struct JsOptions {
    /// The script
    file: PathBuf,
    /// What the script finds in `scriptArgs`; after `--` if one begins with a hyphen
    args: Vec<String>,
    /// Write the program's output to this file: after a resume it holds exactly what an uninterrupted run writes
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    world: WorldOptions,
}

#[cfg(not(feature = "js"))]
pub(super) fn run(options: &JsOptions) -> ExitCode {
    let JsOptions { file, args: _, out: _, world: _ } = options;
    super::fail(
        super::SYSTEM,
        format!(
            "this build has no JavaScript engine; `cargo run --release --features js -p peregrine -- run js {}` builds one",
            file.display()
        ),
    )
}

#[cfg(feature = "js")]
pub(super) use with_engine::run;

#[cfg(feature = "js")]
mod with_engine {
    use super::JsOptions;
    use crate::command::finished::{Finished, tell, tell_how_to_go_on};
    use crate::command::{SYSTEM, fail};
    use peregrine::run_with;
    use peregrine_js::{Host, run_script_on};
    use serde::{Deserialize, Serialize};
    use std::path::PathBuf;
    use std::process::ExitCode;

    /// Stack of a script's thread: what node's depth of recursion needs, of which only what is used is ever touched.
    const STACK_BYTES: usize = 32 << 20;
    /// Of it, what this program itself may use.
    const OWN_BYTES: usize = 1 << 20;

    #[derive(Serialize, Deserialize)]
    struct Script {
        path: PathBuf,
        source: String,
        args: Vec<String>,
    }

    pub(in crate::command) fn run(options: &JsOptions) -> ExitCode {
        let mut config = match options.world.config() {
            Ok(c) => c,
            Err(e) => return fail(2, e),
        };
        let source = match std::fs::read_to_string(&options.file) {
            Ok(s) => s,
            Err(e) => return fail(2, format!("cannot read {}: {e}", options.file.display())),
        };
        let script = Script { path: options.file.clone(), source, args: options.args.clone() };
        let with_costs = config.kill_every.is_some() || config.move_every.is_some();
        config.progress &= with_costs;
        config.main_stack_bytes = STACK_BYTES;
        config.output = options.out.clone();
        match run_with(config, execute, &script) {
            Ok(ended) => {
                let code = tell(&ended, options.world.json, options.world.quiet, with_costs);
                tell_how_to_go_on(&ended, options.world.store.as_deref());
                code
            }
            Err(e) => fail(SYSTEM, e),
        }
    }

    /// The World's main thread.
    fn execute(script: Script) -> Finished {
        let host = Host { stack_bytes: STACK_BYTES - OWN_BYTES, ..Host::default() };
        let ended = run_script_on(host, &script.path, &script.source, &script.args);
        Finished::Js(ended.err().map(|e| e.to_string()))
    }
}
