//! Pictures are developed in a process of its own, so that one that kills it costs its own call and nothing else.
//!
//! `cargo run` is all it takes: the program runs itself again as the darkroom, uses it in every way that an argument can cross, and
//! shows what a caller sees when the darkroom dies.

use futures_lite::future::{block_on, zip};
use peregrine_call::interface::Error;
use peregrine_call::{CallError, Domain, Gift, Given, LentSlice, interface};
use serde::{Deserialize, Serialize};
use std::process::Command;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// What is written below a picture.
#[derive(Serialize, Deserialize, Debug, PartialEq)]
pub struct Card {
    title: String,
    lines: Vec<Option<Box<str>>>,
}

/// Why a picture can't be used.
#[derive(Serialize, Deserialize, Debug, PartialEq)]
pub enum Spoilt {
    Empty,
    TooLong { by: usize },
}

/// The darkroom, as both processes know it.
#[interface(version = 1)]
pub trait Darkroom {
    /// The mean of a picture, and how many of its grains are black.
    fn measure(&self, picture: &[u8], #[out] black: &mut u64) -> Result<f64, Spoilt>;
    /// Turns a negative into a positive.
    fn invert(&self, #[inout(bytes = 1 << 20)] picture: &mut Vec<u8>);
    /// Adds a line to a card, which has three at most.
    fn write(&self, line: &str, #[inout] card: &mut Card) -> Result<usize, Spoilt>;
    /// The brightest of some lights.
    fn brightest(&self, #[lend] lights: LentSlice<'_, f32>) -> f32;
    /// Keeps a picture; how many grains are not black.
    fn hang(&self, #[give] picture: Given) -> usize;
    /// Returns when two pictures are in the bath.
    fn develop(&self, number: u32) -> u32;
    /// Ends the darkroom.
    fn spill(&self);
}

struct Bath(Barrier);

impl Darkroom for Bath {
    fn measure(&self, picture: &[u8], black: &mut u64) -> Result<f64, Spoilt> {
        *black = picture.iter().filter(|grain| **grain == 0).count() as u64;
        let sum: u64 = picture.iter().map(|grain| u64::from(*grain)).sum();
        if picture.is_empty() { Err(Spoilt::Empty) } else { Ok(sum as f64 / picture.len() as f64) }
    }

    fn invert(&self, picture: &mut Vec<u8>) {
        picture.iter_mut().for_each(|grain| *grain = !*grain);
    }

    fn write(&self, line: &str, card: &mut Card) -> Result<usize, Spoilt> {
        card.lines.push(Some(line.into()));
        match card.lines.len() {
            n @ 0..=3 => Ok(n),
            n => Err(Spoilt::TooLong { by: n - 3 }),
        }
    }

    fn brightest(&self, lights: LentSlice<'_, f32>) -> f32 {
        lights.iter().fold(0.0, f32::max)
    }

    fn hang(&self, picture: Given) -> usize {
        picture.iter().filter(|grain| **grain != 0).count()
    }

    fn develop(&self, number: u32) -> u32 {
        self.0.wait();
        number
    }

    fn spill(&self) {
        std::process::exit(1);
    }
}

fn serve(path: &str) -> Result<(), Box<dyn std::error::Error>> {
    let _domain =
        Domain::builder().name("darkroom").interface(DarkroomPortal(Bath(Barrier::new(2)))).serve(path)?;
    loop {
        std::thread::park();
    }
}

/// Connects when the other process is up.
fn connect(path: &str) -> Result<DarkroomClient, CallError> {
    let begun = Instant::now();
    loop {
        match DarkroomClient::connect(path) {
            Err(CallError::Unreachable { .. }) if begun.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

fn run(path: &str) -> Result<(), Box<dyn std::error::Error>> {
    let darkroom = connect(path)?;

    let mut black = 7;
    let mean = darkroom.measure(&[0, 100, 200, 0], &mut black).map_err(|e| format!("{e:?}"))?;
    println!("in and out: mean {mean}, {black} black");
    let spoilt = darkroom.measure(&[], &mut black);
    println!("the callee's own error: {spoilt:?}; still {black} black");

    let mut picture = vec![0xf0; 5];
    darkroom.invert(&mut picture)?;
    let mut card = Card { title: "falcon".into(), lines: vec![None, Some("on a cliff".into())] };
    let lines = darkroom.write("at dusk", &mut card);
    let full = darkroom.write("and later", &mut card);
    println!("inout: {picture:x?}, {lines:?} lines, then {full:?}; {} has {}", card.title, card.lines.len());

    let lights = darkroom.connection().buffer(3 * size_of::<f32>())?;
    for (at, light) in [0.5f32, 2.5, 1.0].iter().enumerate() {
        lights.write(at * size_of::<f32>(), &light.to_ne_bytes())?;
    }
    let (in_place, copied) = (darkroom.brightest(&lights)?, darkroom.brightest(&[4.5f32, 3.0])?);
    println!("lend: {in_place} in place, {copied} of a slice");

    let mut page = Gift::new(10_000)?;
    page[..77].fill(1);
    println!("give: {} grains are not black", darkroom.hang(page)?);

    // Neither returns before the other is there.
    let (one, two) = block_on(zip(darkroom.develop_async(1), darkroom.develop_async(2)));
    println!("awaited, side by side: {} and {}", one?, two?);
    let late = block_on(darkroom.clone().within(Duration::from_millis(20)).develop_async(3));
    println!("a deadline: {}", late == Err(Error::Call(CallError::Deadline)));

    println!("its death: {}", darkroom.spill().unwrap_err());
    let again = DarkroomClient::connect(path).map(drop);
    println!("and then: unreachable {}", matches!(again, Err(CallError::Unreachable { .. })));
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(path) = std::env::args().nth(1) {
        return serve(&path);
    }
    let path = std::env::temp_dir().join(format!("darkroom-{}", std::process::id())).display().to_string();
    let mut process = Command::new(std::env::current_exe()?).arg(&path).spawn()?;
    let outcome = run(&path);
    let _ = process.kill();
    process.wait()?;
    std::fs::remove_file(&path)?;
    outcome
}
