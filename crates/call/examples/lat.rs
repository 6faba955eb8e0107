#![allow(warnings, clippy::all, missing_docs, clippy::undocumented_unsafe_blocks)]
use peregrine_base::sync::{AtomicU32, Ordering};
use peregrine_call::*;
use peregrine_sys::process::{self, ForkFlags, Forked};
use peregrine_sys::rustix;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
fn med(mut v: Vec<f64>) -> (f64, f64) {
    v.sort_by(f64::total_cmp);
    (v[v.len() / 2], v[v.len() * 99 / 100])
}
fn main() {
    let mode = std::env::args().nth(1).unwrap_or("one".into());
    let cpu: usize = std::env::args().nth(2).map_or(0, |s| s.parse().unwrap());
    let cpus = process::CpuSet::current().unwrap();
    process::CpuSet::one(cpu).unwrap().bind().unwrap();
    // floor
    let fd = peregrine_sys::memfd::create(
        c"f",
        peregrine_base::PageCount::new(1),
        peregrine_sys::memfd::Pages::Base,
    )
    .unwrap();
    let map = unsafe {
        peregrine_sys::mem::map(
            peregrine_base::PageCount::new(1),
            peregrine_base::Protection::ReadWrite,
            peregrine_sys::mem::Source::Shared(
                std::os::fd::AsFd::as_fd(&fd),
                peregrine_base::PageCount::new(0),
            ),
            peregrine_sys::mem::Placement::Anywhere,
            Default::default(),
        )
        .unwrap()
    };
    let at = map.start().as_usize();
    let w = |off: usize| unsafe { AtomicU32::from_ptr(std::ptr::with_exposed_provenance_mut(at + off)) };
    let (req, rep) = (w(0), w(64));
    let ev = || rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let (a, b): (OwnedFd, OwnedFd) = (ev(), ev());
    let spin = mode == "two";
    if let Forked::Child = unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        process::die_with_parent();
        if spin {
            process::CpuSet::one(1 - cpu).unwrap().bind().unwrap();
        }
        let mut buf = [0u8; 8];
        let mut s = 1;
        loop {
            if spin {
                let begun = Instant::now();
                let mut n = 0u32;
                let mut asleep = false;
                while req.load(Ordering::Acquire) < s {
                    std::hint::spin_loop();
                    n += 1;
                    if n % 1024 == 0 && begun.elapsed() > Duration::from_micros(200) {
                        asleep = true;
                        std::thread::sleep(Duration::from_micros(50));
                    }
                }
                let _ = asleep;
            } else {
                while req.load(Ordering::Acquire) < s {
                    rustix::io::read(&a, &mut buf).unwrap();
                }
            }
            s = req.load(Ordering::Acquire);
            rep.store(s, Ordering::Release);
            s += 1;
            if !spin {
                rustix::io::write(&b, &1u64.to_ne_bytes()).unwrap();
            }
        }
    }
    let path = std::path::PathBuf::from(format!("/tmp/lat-{}", std::process::id()));
    if let Forked::Child = unsafe { process::fork_with(ForkFlags::default()) }.unwrap() {
        process::die_with_parent();
        if spin {
            cpus.bind().unwrap();
        }
        let d = Domain::builder()
            .activations(2)
            .limits(Limits { argument_stack_bytes: 1 << 20, ..Limits::default() })
            .portal("null", 1, |_: &mut Invocation<'_>| Ok(()))
            .portal("sum", 1, |c: &mut Invocation<'_>| {
                std::hint::black_box(c.lent(0)?.len_bytes());
                Ok(())
            })
            .portal("copy", 1, |c: &mut Invocation<'_>| {
                std::hint::black_box(c.lent(0)?.to_vec());
                Ok(())
            })
            .portal("echo", 1, |c: &mut Invocation<'_>| {
                let v = c.input(0)?;
                c.output(1)?.extend_from_slice(v);
                Ok(())
            })
            .serve(&path)
            .unwrap();
        std::mem::forget(d);
        loop {
            std::thread::park();
        }
    }
    let client = loop {
        if let Ok(c) = Client::connect(&path) {
            break c;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let _ = std::fs::remove_file(&path);
    let null = client.portal("null", 1).unwrap();
    let echo = client.portal("echo", 1).unwrap();
    let aff = if spin { Affinity::Apart } else { Affinity::Together };
    const N: usize = 2000;
    let mut seq = 0u32;
    let mut buf = [0u8; 8];
    let mut floor = |v: &mut Vec<f64>| {
        for i in 0..N + 50 {
            let t = Instant::now();
            seq += 1;
            req.store(seq, Ordering::Release);
            if !spin {
                rustix::io::write(&a, &1u64.to_ne_bytes()).unwrap();
            }
            while rep.load(Ordering::Acquire) != seq {
                if spin {
                    std::hint::spin_loop();
                } else {
                    rustix::io::read(&b, &mut buf).unwrap();
                }
            }
            if i >= 50 {
                v.push(t.elapsed().as_nanos() as f64);
            }
        }
    };
    let args = [5u8; 64];
    let mut out = Vec::with_capacity(64);
    let mut rows: Vec<(String, Vec<f64>, Vec<f64>, Vec<f64>)> = vec![];
    for name in ["null", "echo64", "null+deadline", "null+charge"] {
        rows.push((name.into(), vec![], vec![], vec![]));
    }
    let mut fl = vec![];
    let mut flp = vec![];
    for _ in 0..30 {
        let mut v = vec![];
        floor(&mut v);
        let f = med(v);
        fl.push(f.0);
        flp.push(f.1);
        for r in 0..rows.len() {
            let mut v = vec![];
            for i in 0..N + 50 {
                let t = Instant::now();
                let c = Call::new().affinity(aff);
                match r {
                    0 => client.call(null, c).unwrap(),
                    1 => client.call(echo, c.input(&args).output(&mut out, 64)).unwrap(),
                    2 => client.call(null, c.deadline(Deadline::after(Duration::from_secs(1)))).unwrap(),
                    _ => client
                        .call(
                            null,
                            c.attributes(Attributes { charge: true, affinity: aff, ..Default::default() }),
                        )
                        .unwrap(),
                }
                if i >= 50 {
                    v.push(t.elapsed().as_nanos() as f64);
                }
            }
            let m = med(v);
            rows[r].1.push(m.0);
            rows[r].2.push(m.1);
            rows[r].3.push(m.0 / f.0);
        }
    }
    println!("floor {:.0} p99 {:.0}", med(fl).0, med(flp).0);
    for (n, m, p, r) in rows {
        println!("{n:16} median {:.0} p99 {:.0} ratio {:.3}", med(m).0, med(p).0, med(r).0);
    }
    // large
    for len in [4096usize, 65536, 1 << 20] {
        let big = vec![1u8; len];
        let buffer = client.buffer(len).unwrap();
        buffer.write(0, &big).unwrap();
        let n = (40 << 20) / len / 4;
        let mut t1 = vec![];
        let mut t2 = vec![];
        let mut t3 = vec![];
        let mut t4 = vec![];
        let (sum, copy) = (client.portal("sum", 1).unwrap(), client.portal("copy", 1).unwrap());
        for _ in 0..n {
            let t = Instant::now();
            client.call(null, Call::new().affinity(aff).input(&big)).unwrap();
            t1.push(t.elapsed().as_nanos() as f64);
            let t = Instant::now();
            client.call(sum, Call::new().affinity(aff).lend(&buffer)).unwrap();
            t2.push(t.elapsed().as_nanos() as f64);
            let t = Instant::now();
            client.call(copy, Call::new().affinity(aff).lend(&buffer)).unwrap();
            t3.push(t.elapsed().as_nanos() as f64);
            let t = Instant::now();
            client.call(echo, Call::new().affinity(aff).input(&big).output(&mut out, len)).unwrap();
            t4.push(t.elapsed().as_nanos() as f64);
        }
        println!(
            "{len}: in {:.0} lend {:.0} lend+copy {:.0} echo {:.0}",
            med(t1).0,
            med(t2).0,
            med(t3).0,
            med(t4).0
        );
    }
}
