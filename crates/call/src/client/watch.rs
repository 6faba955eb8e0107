//! The watch: one thread of a client's process that sees domains die, and wakes who waits for them.
//!
//! A caller sleeps on a futex, and the kernel wakes nobody when the process dies that would have. So a caller looks for itself, in slices.
//! A call that outlasts its first slice has its connection put under watch: a thread waits for the hang-up of the socket and the end of the
//! domain's process, with `epoll`, and wakes all callers of that connection at once. Short calls never start it, and runtimes that
//! wait by `poll` don't need it.
//!
//! **It may be absent.** No thread may be had, or the process was forked since: then callers go on looking in slices. It may be outwitted:
//! a hostile domain can move a sleeper to another futex before it dies (`FUTEX_REQUEUE`): then the sleeper's own slice ends its sleep.

use super::connection::Connection;
use peregrine_base::sync::{AtomicU64, Ordering};
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::epoll::{self, EventData, EventFlags};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

/// How often, a millisecond apart, the callers of a dead domain are woken: one that looked before the death and sleeps after is met again.
const WAKES: u32 = 20;

struct Watch {
    /// Of the process whose thread watches; a forked one has none.
    process: i32,
    epoll: OwnedFd,
    connections: Mutex<HashMap<u64, Weak<Connection>>>,
}

static WATCH: OnceLock<Option<Watch>> = OnceLock::new();
static NEXT: AtomicU64 = AtomicU64::new(1);

/// A connection's number under watch; 0 for none yet.
#[derive(Default)]
pub(crate) struct Watched(AtomicU64);

/// Puts the connection under watch; whether it is.
pub(crate) fn watch(connection: &Arc<Connection>) -> bool {
    let Some(watch) = WATCH.get_or_init(start) else { return false };
    if watch.process != peregrine_sys::process::pid() {
        return false;
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    // AcqRel: one of several callers registers it. One that finds it being registered has a slice that is longer than that.
    if connection.watched.0.compare_exchange(0, number, Ordering::AcqRel, Ordering::Acquire).is_err() {
        return true;
    }
    watch.lock().insert(number, Arc::downgrade(connection));
    // Told once: the socket of a connection that is gone may live on in a forked child, whose hang-up would be told for ever.
    let added = connection.watch_by(|fd, flags| {
        epoll::add(&watch.epoll, fd, EventData::new_u64(number), flags | EventFlags::ONESHOT)
    });
    if added.is_err() {
        watch.lock().remove(&number);
        connection.watched.0.store(0, Ordering::Release);
    }
    added.is_ok()
}

/// The connection is being dropped; its descriptors leave the set when they are closed.
pub(crate) fn forget(connection: &Connection) {
    let number = connection.watched.0.load(Ordering::Acquire);
    if number != 0
        && let Some(Some(watch)) = WATCH.get()
        && watch.process == peregrine_sys::process::pid()
    {
        watch.lock().remove(&number);
    }
}

fn start() -> Option<Watch> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).ok()?;
    let thread = std::thread::Builder::new().name("peregrine-watch".into()).stack_size(64 * 1024);
    thread.spawn(|| WATCH.wait().as_ref().map(Watch::run)).ok()?;
    Some(Watch { process: peregrine_sys::process::pid(), epoll, connections: Mutex::default() })
}

impl Watch {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Weak<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut events = Vec::with_capacity(16);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => panic!("epoll_wait on our own descriptor: {e}"),
            }
            let numbers = events.iter().map(|event| event.data.u64());
            let dying: Vec<_> = numbers.filter_map(|number| self.lock().remove(&number)).collect();
            // Held for a moment each time, so that a connection goes when its last user does.
            let living = || dying.iter().filter_map(Weak::upgrade);
            for connection in living() {
                let _ = connection.watch_by(|fd, _| epoll::delete(&self.epoll, fd));
            }
            for _ in 0..WAKES {
                let mut any = false;
                for connection in living() {
                    connection.wake_all();
                    any = true;
                }
                if !any {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::line::Words;
    use crate::{Call, Client, Domain, Invocation};
    use std::time::Instant;

    /// What the kernel says that a thread of this process does.
    fn condition(tid: i32) -> char {
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat")).unwrap();
        stat.rsplit(')').next().unwrap().trim_start().chars().next().unwrap()
    }

    #[test]
    fn who_sleeps_is_woken_by_the_watch_alone_when_the_domain_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("domain");
        let domain =
            Domain::builder().portal("nothing", 1, |_: &mut Invocation<'_>| Ok(())).serve(&path).unwrap();
        let client = Client::connect(&path).unwrap();
        client.call(client.portal("nothing", 1).unwrap(), Call::new()).unwrap();
        let connection = client.0.clone();
        assert!(watch(&connection));
        let line = connection.mapped.lock().unwrap()[0].clone();
        let (to, from) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            to.send(peregrine_sys::process::thread_id()).unwrap();
            let reply = Words(&line).gate().reply;
            let begun = Instant::now();
            peregrine_sys::futex::wait(reply, reply.load(Ordering::Relaxed), Some(100_000_000_000));
            begun.elapsed()
        });
        let tid = from.recv().unwrap();
        while condition(tid) != 'S' {
            std::thread::yield_now();
        }
        domain.shutdown();
        let slept = sleeper.join().unwrap();
        assert!(slept < Duration::from_secs(90), "nobody woke it: {slept:?}");
        assert!(connection.dead.load(Ordering::Relaxed));
    }
}
