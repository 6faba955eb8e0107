//! Options of every program that `peregrine run` starts: what its World is like, and what is done to it.

use clap::Args;
use peregrine::{Config, ConfigError};
use std::path::PathBuf;
use std::time::Duration;

/// Fastest that images, kills and moves may follow each other: below it the World does nothing else.
const LEAST: Duration = Duration::from_millis(1);

#[derive(Debug, Args)]
pub(super) struct WorldOptions {
    /// Node processes that the threads run on, 1 to 64
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub nodes: u32,
    /// Kill a node with SIGKILL, each time this long after all nodes are up (such as 50ms; 0 for never)
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub kill_every: Option<Duration>,
    /// Move a random thread to another node this often [default: 10ms with --kill-every, else never]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub move_every: Option<Duration>,
    /// Take an image of all threads this often; 0 for never. A kill loses what was done since the last image, so this
    /// must be shorter than --kill-every [default: 40ms, at most 20ms with --kill-every]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub image_interval: Option<Duration>,
    /// Keep images in this directory too, so that `peregrine resume DIR` goes on after everything was killed
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Seed of the choices of whom to kill and move
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print the report as one line of JSON on standard output, and nothing else
    #[arg(long)]
    pub json: bool,
    /// Print the verdict only
    #[arg(long, short)]
    pub quiet: bool,
}

/// A duration as people write it; a bare 0 needs no unit.
fn time(text: &str) -> Result<Duration, String> {
    let time = if text == "0" { Ok(Duration::ZERO) } else { humantime::parse_duration(text) };
    match time {
        Ok(t) if t.is_zero() || t >= LEAST => Ok(t),
        Ok(_) => Err("the shortest is 1ms".to_owned()),
        Err(e) => Err(format!("{e}; write for example 50ms or 2s")),
    }
}

/// The time between images where nodes are killed, if nobody says otherwise.
const OFTEN: Duration = Duration::from_millis(20);

/// Why these options can't be used together.
#[derive(Debug)]
pub(super) struct Clash(String);

impl std::fmt::Display for Clash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<ConfigError> for Clash {
    fn from(e: ConfigError) -> Self {
        Self(e.to_string())
    }
}

impl WorldOptions {
    /// The World's settings: what the environment says, changed by these options.
    pub(super) fn config(&self) -> Result<Config, Clash> {
        let given = |t: Duration| (!t.is_zero()).then_some(t);
        let mut config = Config::from_env()?;
        config.nodes = self.nodes;
        config.seed = self.seed;
        config.kill_every = self.kill_every.and_then(given);
        config.image_interval = match self.image_interval {
            Some(t) => given(t),
            None if config.kill_every.is_some() => config.image_interval.map(|t| t.min(OFTEN)),
            None => config.image_interval,
        };
        config.move_every = match self.move_every {
            Some(t) => given(t),
            None => (config.kill_every.is_some() && self.nodes > 1).then_some(Duration::from_millis(10)),
        };
        config.progress = !self.quiet && !self.json;
        if self.store.is_some() {
            config.store.clone_from(&self.store);
        }
        if config.move_every.is_some() && self.nodes == 1 {
            return Err(Clash(
                "threads can't move with one node; use --nodes 2 or more, or drop --move-every".into(),
            ));
        }
        if let Some(kill) = config.kill_every {
            match config.image_interval {
                None => {
                    return Err(Clash(
                        "with kills and no images every kill starts the program over; give --image-interval"
                            .into(),
                    ));
                }
                Some(image) if image >= kill => {
                    return Err(Clash(format!(
                        "an image every {} and a kill every {}: a kill loses what was done since the last image, so \
                         the program would hardly advance; make --image-interval the shorter one",
                        humantime::format_duration(image),
                        humantime::format_duration(kill)
                    )));
                }
                Some(_) => {}
            }
        }
        Ok(config)
    }
}
