//! `peregrine resume`: a World goes on from its last image on disk.

use super::finished::{tell, tell_how_to_go_on};
use super::{SYSTEM, fail};
use clap::Args;
use peregrine::Config;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, Args)]
pub(super) struct ResumeOptions {
    /// The directory that was given to `run … --store`
    dir: PathBuf,
    /// Node processes; may differ from before
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    nodes: u32,
    /// Go on with this image, if the latest is damaged: what came after it is undone. Refused if a later one is whole
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    image: Option<u64>,
    /// Print the verdict only
    #[arg(long, short)]
    quiet: bool,
}

pub(super) fn run(options: &ResumeOptions) -> ExitCode {
    let mut config = match Config::from_env() {
        Ok(c) => c,
        Err(e) => return fail(2, e),
    };
    config.nodes = options.nodes;
    config.store = Some(options.dir.clone());
    config.resume_image = options.image.or(config.resume_image);
    let quiet = options.quiet;
    let ended = peregrine::resume(config, |r| {
        if !quiet {
            eprintln!(
                "peregrine: going on with image {} (life {}): {:.2} s of work are kept; {} threads, {:.1} MiB read in {:.1} ms",
                r.sequence,
                r.generation,
                r.kept_ns as f64 / 1e9,
                r.threads,
                r.pages as f64 / 256.0,
                r.load_ns as f64 / 1e6
            );
            if r.repeated_bytes > 0 {
                eprintln!("peregrine: the last {} bytes of output are repeated", r.repeated_bytes);
            }
        }
    });
    match ended {
        Ok(ended) => {
            let code = tell(&ended, false, quiet, false);
            tell_how_to_go_on(&ended, Some(&options.dir));
            code
        }
        Err(e) => fail(SYSTEM, e),
    }
}
