//! How long everybody stops for an image of so many written pages, and how long going back to it takes.

use super::{columns, columns_without, in_world, middle, numbers, quiet_world};
use crate::measure::{Options, Samples, versus};
use crate::report::Report;
use peregrine_world::{Config, checkpoint, sleep};
use std::hint::black_box;
use std::time::{Duration, Instant};

const SIZES: [usize; 3] = [1, 10, 100];
const SAMPLES: usize = 9;
const KILLS: u64 = 5;

pub fn run(report: &mut Report, options: &Options) {
    report.section("Image and rollback over written pages, ms");
    for mib in SIZES {
        let case = format!("{mib} MiB written");
        if !options.wants(&case) {
            continue;
        }
        let rounds = super::rounds(options, 5);
        let copy = || middle(&format!("copy-once {mib}"));
        let mut part = Samples::default();
        let pause = versus(
            rounds,
            || {
                let c = columns(&format!("image {mib}"));
                part.push(c[1].median());
                c[0].median()
            },
            copy,
        );
        report.pair(
            &case,
            "pause of all threads for an image",
            "ms",
            "one memcpy of the bytes",
            SAMPLES,
            &pause,
        );
        report.single(&case, "of it, copying", "ms", SAMPLES, &part);
        let mut part = Samples::default();
        let back = versus(
            rounds,
            || {
                let c =
                    columns_without(&format!("rollback {mib}"), Some("a node died, and no images are taken"));
                part.push(c[1].median());
                c[0].median()
            },
            copy,
        );
        report.pair(
            &case,
            "kill -9 to all nodes running again",
            "ms",
            "one memcpy of the bytes",
            KILLS as usize,
            &back,
        );
        report.single(&case, "of it, restoring", "ms", KILLS as usize, &part);
    }
}

pub fn case(name: &str, words: &[&str]) -> bool {
    let mib = numbers(words).first().copied().unwrap_or(1);
    let ms = |ns: u64| ns as f64 / 1e6;
    match name {
        "image" => {
            let ended = in_world(quiet_world(1), write_and_image, words[0]);
            // Neither the first, of an empty World, nor the last, of a finished one.
            let n = ended.stats.pause_ns.len().saturating_sub(1).min(SAMPLES);
            let copies = &ended.stats.copy_ns[ended.stats.copy_ns.len() - 1 - n..];
            for (pause, copy) in ended.stats.pause_ns[..n].iter().zip(copies) {
                println!("{} {}", ms(*pause), ms(*copy));
            }
        }
        "rollback" => {
            let config =
                Config { kill_every: Some(Duration::from_millis(250)), most_kills: KILLS, ..quiet_world(1) };
            let ended = in_world(config, write_for_a_while, words[0]);
            for (all, restore) in ended.stats.recovery_ns.iter().zip(&ended.stats.restore_ns) {
                println!("{} {}", ms(*all), ms(*restore));
            }
        }
        "copy-once" => {
            let (from, mut to) = (vec![1u8; mib << 20], vec![2u8; mib << 20]);
            for _ in 0..SAMPLES {
                let begun = Instant::now();
                to.copy_from_slice(black_box(&from));
                println!("{}", begun.elapsed().as_nanos() as f64 / 1e6);
                black_box(&mut to);
            }
        }
        _ => return false,
    }
    true
}

fn write_and_image(mib: &str) {
    let mut bytes = vec![0u8; mib.parse::<usize>().unwrap_or(1) << 20];
    for round in 0..=SAMPLES {
        bytes.iter_mut().step_by(4096).for_each(|b| *b = round as u8 + 1);
        checkpoint();
    }
}

fn write_for_a_while(mib: &str) {
    let mut bytes = vec![1u8; mib.parse::<usize>().unwrap_or(1) << 20];
    let end = Instant::now() + Duration::from_millis(250 * (KILLS + 3) + 1500);
    checkpoint();
    while Instant::now() < end {
        assert!(bytes.iter().step_by(4096).all(|b| *b == bytes[0]), "half a rollback");
        bytes.iter_mut().step_by(4096).for_each(|b| *b = b.wrapping_add(1));
        sleep(Duration::from_millis(1));
    }
}
