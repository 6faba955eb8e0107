//! The end of a World: by `main`, whose last image makes it certain, or by a signal.

use super::stats::Stats;
use super::{Resumed, Supervisor, WorldError, strays};
use crate::control::{imaged, world};
use crate::join;
use crate::killpoint::supervisor_at;
use peregrine_base::sync::Ordering;
use peregrine_sys::rustix;
use peregrine_sys::signal::{self, number};
use rustix::process::Pid;

/// How a World ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Exit code for the process.
    pub code: i32,
    /// What happened in between.
    pub stats: Stats,
    /// The signal that stopped it, if one did.
    pub stopped_by: Option<i32>,
    /// What it was resumed from, if it was.
    pub resumed: Option<Resumed>,
    /// What `main` left: its exit code, then its value as postcard has it. Empty if it did not return.
    pub result: Vec<u8>,
}

impl Supervisor {
    /// `main` has ended: one last image makes that certain.
    pub(super) fn try_finish(&mut self) -> Result<Option<i32>, WorldError> {
        supervisor_at("main has ended");
        let code = imaged().main_exit.load(Ordering::Acquire);
        // Nothing is taken back between here and the image: if it is complete, the end and all output are in it.
        let complete = self.image(true)?;
        if code == 0 || complete {
            return Ok((code != 0).then(|| code as i32 - 1));
        }
        if self.save_failing || self.stats.blocked_nodes.is_empty() {
            return Ok(None);
        }
        self.end_in_spite_of_blocked(code as i32 - 1)
    }

    pub(super) fn stop(mut self, signo: i32) -> Ended {
        self.kill_all();
        self.collect_stats();
        Ended {
            code: 128 + signo,
            stats: self.stats,
            stopped_by: Some(signo),
            resumed: self.resumed,
            result: Vec::new(),
        }
    }

    pub(super) fn finish(mut self, code: i32) -> Ended {
        supervisor_at("last image taken");
        self.kill_all();
        supervisor_at("nodes killed");
        self.outlet.flush_all();
        supervisor_at("last output out");
        self.note_released();
        supervisor_at("last output noted");
        self.collect_stats();
        Ended {
            code,
            stats: self.stats,
            stopped_by: None,
            resumed: self.resumed,
            result: join::result_of_main(),
        }
    }

    pub(super) fn collect_stats(&mut self) {
        self.stats.end(world().nodes.iter().take(self.nodes.len()));
    }

    pub(super) fn kill_all(&mut self) {
        for n in self.nodes.iter().flatten() {
            let _ = signal::kill(n.pid, number::KILL);
        }
        let _ = signal::kill(self.zygote.pid, number::KILL);
        let dead: Vec<_> = self.nodes.iter_mut().filter_map(Option::take).collect();
        for n in &dead {
            reap(n.pid);
        }
        reap(self.zygote.pid);
        for n in &dead {
            strays::end_those_of(n, &[]);
        }
    }
}

pub(super) fn reap(pid: i32) -> Option<rustix::process::WaitStatus> {
    let pid = Pid::from_raw(pid)?;
    loop {
        match rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()) {
            Ok(status) => return status.map(|(_, s)| s),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}
