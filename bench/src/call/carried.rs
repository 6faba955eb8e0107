//! Our carried call: the closure reads the caller's argument where it is, from another process.

use super::subject::{Bytes, Caller, Timed, digest, time};
use super::ways::Cores;
use peregrine_sys::process::pin_to_cpu;
use peregrine_world::{Config, TrustedDomain};

struct Carried {
    domain: TrustedDomain,
    argument: Vec<u8>,
}

impl Caller for Carried {
    fn argument(&mut self) -> Bytes<'_> {
        Bytes::Own(&mut self.argument)
    }

    fn call(&mut self) -> u64 {
        let argument = &self.argument;
        self.domain.run(|| digest(argument)).expect("the domain")
    }
}

/// One node, one domain, and no images: what other ways don't do is not measured here.
pub fn run(bytes: usize, cores: Cores, calls: usize) -> Timed {
    if cores == Cores::One {
        // Inherited by all processes of the World, which then don't spin.
        pin_to_cpu(cores.processors().0).expect("a processor");
    }
    let config = Config { nodes: 1, image_interval: None, ..Config::default() };
    let ended =
        peregrine_world::run_with(config, main, &(bytes, cores == Cores::Two, calls)).expect("a World");
    let [min, median, p99] = ended.value().expect("the times");
    Timed { min, median, p99 }
}

fn main((bytes, two, calls): (usize, bool, usize)) -> [f64; 3] {
    let cores = if two { Cores::Two } else { Cores::One };
    pin_to_cpu(cores.processors().0).expect("a processor for the node");
    let domain = TrustedDomain::open("callee", if two { on_its_own } else { || () }).expect("a domain");
    let timed = time(&mut Carried { domain, argument: vec![0; bytes] }, calls);
    [timed.min, timed.median, timed.p99]
}

fn on_its_own() {
    pin_to_cpu(Cores::Two.processors().1).expect("a processor for the domain");
}
