//! Questions to the domain, over the socket: one is under way at a time, and nobody needs to wait for its answer.
//!
//! ```text
//! Inquiry ──pursue──▶ its turn? ──no──▶ later        the answer is the next message that is not `Results`;
//!                      │ yes                         whoever reads the socket puts it where its asker finds it
//!                      ▼
//!                     sent ──pursue──▶ answer? ──no──▶ later; forsaken: the answer is seen to when it comes
//! ```
//!
//! A thread that may wait pursues its question in slices ([`Connection::question`]); a runtime whose threads must not looks again when it
//! likes. A question that its asker gives up is answered nevertheless, and what the answer brings (a line, a number of a buffer) is put
//! where it is of use; the connection goes on.
//!
//! **What a hostile domain can make of it.** Results are taken for lines that were opened only, and one for each, so that the unasked
//! messages that are kept are no more than the lines; they are read some at a time, with a look at the deadline between.

use super::connection::{Connection, refusal};
use crate::chain::Deadline;
use crate::error::{CallError, Refusal, system};
use crate::socket::{self, Came, FromClient, FromDomain, RecvError};
use crate::step::reach;
use peregrine_sys::raw::Errno;
use peregrine_sys::rustix;
use peregrine_sys::rustix::event::{PollFd, PollFlags, poll};
use peregrine_sys::rustix::net::RecvFlags;
use peregrine_sys::rustix::time::Timespec;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

/// What came, and the descriptor with it.
pub(super) type Answer = (FromDomain, Option<OwnedFd>);

/// Messages read before somebody looks at the clock.
const AT_A_TIME: usize = 64;

/// More messages than a socket's queue holds: results that a reply speaks of were sent before it.
const MOST_QUEUED: usize = 4096;

/// How long to sleep between two looks: an answer may have been read by somebody else.
const SLICE: Duration = Duration::from_millis(10);

/// How long a domain is waited for where no caller's deadline says it: a greeting, a portal's number.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// What has come and what is awaited.
#[derive(Default)]
pub(super) struct Mail {
    /// Results that nobody has fetched yet: one for a line at most.
    results: Vec<Results>,
    /// The lines that were opened, by the domain's numbers.
    lines: Vec<u32>,
    /// The number of the question asked last.
    asked: u64,
    /// The one that has no answer yet; 0 for none.
    under_way: u64,
    /// Answers that their askers have yet to fetch.
    answers: Vec<(u64, Result<Answer, CallError>)>,
    /// What the domain had no room to be told, and need not answer.
    owed: Vec<FromClient>,
}

struct Results {
    line: u32,
    call: u32,
    len_bytes: u64,
    /// `None`: this process had no room for it.
    fd: Option<OwnedFd>,
}

/// A question on its way.
pub(super) struct Inquiry {
    what: FromClient,
    fd: Option<OwnedFd>,
    /// 0 until it is sent.
    number: u64,
}

impl Inquiry {
    pub const fn new(what: FromClient, fd: Option<OwnedFd>) -> Self {
        Self { what, fd, number: 0 }
    }

    /// What goes with it, as long as it is not sent.
    pub fn descriptor(&self) -> Option<RawFd> {
        self.fd.as_ref().map(AsRawFd::as_raw_fd)
    }
}

/// A descriptor came that this process has no room for.
const fn no_room_for(what: &'static str) -> CallError {
    CallError::System { what, errno: Errno::EMFILE }
}

impl Mail {
    /// What has come, and nobody has fetched yet.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> + '_ {
        let answers = self.answers.iter().filter_map(|(_, answer)| answer.as_ref().ok()?.1.as_ref());
        answers.chain(self.results.iter().filter_map(|results| results.fd.as_ref())).map(AsRawFd::as_raw_fd)
    }
}

impl Connection {
    pub(super) fn mail(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the question a step on; its answer, if that is there. Never waits.
    pub(super) fn pursue(&self, inquiry: &mut Inquiry) -> Result<Option<Answer>, CallError> {
        let mut mail = self.mail();
        self.collect(&mut mail)?;
        if inquiry.number == 0 {
            if mail.under_way != 0 || !self.pay(&mut mail)? {
                return Ok(None);
            }
            if !self.post(&inquiry.what, inquiry.fd.as_ref().map(AsFd::as_fd))? {
                return Ok(None);
            }
            mail.asked += 1;
            (mail.under_way, inquiry.number, inquiry.fd) = (mail.asked, mail.asked, None);
            reach("client: asked");
            self.collect(&mut mail)?;
        }
        let Some(at) = mail.answers.iter().position(|a| a.0 == inquiry.number) else { return Ok(None) };
        match mail.answers.swap_remove(at).1? {
            (FromDomain::Refused(why), _) => Err(refusal(why)),
            answer => Ok(Some(answer)),
        }
    }

    /// The asker is no longer interested.
    pub(super) fn forsake(&self, inquiry: Inquiry) {
        if inquiry.number == 0 {
            return;
        }
        let mut mail = self.mail();
        match mail.answers.iter().position(|a| a.0 == inquiry.number) {
            Some(at) => {
                if let (_, Ok(answer)) = mail.answers.swap_remove(at) {
                    self.adopt(&mut mail, answer);
                }
            }
            // The number of nobody: what comes for it is adopted.
            None if mail.under_way == inquiry.number => mail.under_way = u64::MAX,
            None => {}
        }
    }

    /// Reads what is there, but not without end; how many messages.
    fn collect(&self, mail: &mut Mail) -> Result<usize, CallError> {
        for read in 0..AT_A_TIME {
            match socket::receive(&self.socket, RecvFlags::DONTWAIT, self.strays) {
                Ok((FromDomain::Results { line, call, len_bytes }, came @ (Came::With(_) | Came::Short))) => {
                    let fd = came.with();
                    if !mail.lines.contains(&line) {
                        return Err(self.break_with("results of a line that was never opened"));
                    }
                    mail.results.retain(|r| r.line != line);
                    mail.results.push(Results { line, call, len_bytes, fd });
                }
                Ok(_) if mail.under_way == 0 => {
                    return Err(self.break_with("an answer to no question"));
                }
                Ok((what, came)) => {
                    let answer = match (came, &what) {
                        (Came::Short, what) => {
                            if let &FromDomain::Line { index, .. } = what {
                                mail.owed.push(FromClient::Lost { line: index });
                            }
                            Err(no_room_for("what the domain sent along"))
                        }
                        (came, what) => {
                            if let &FromDomain::Line { index, .. } = what {
                                mail.lines.push(index);
                            }
                            Ok(came.with())
                        }
                    }
                    .map(|fd| (what, fd));
                    match (std::mem::take(&mut mail.under_way), answer) {
                        (u64::MAX, Ok(answer)) => self.adopt(mail, answer),
                        (u64::MAX, Err(_)) => {}
                        (number, answer) => mail.answers.push((number, answer)),
                    }
                }
                Err(RecvError::Nothing) => return Ok(read),
                Err(RecvError::Closed | RecvError::Kernel(_)) => {
                    self.give_up();
                    return Err(CallError::DomainDied);
                }
                // Nothing that follows can be understood either.
                Err(RecvError::Garbage) => return Err(self.break_with("a message of no known kind")),
            }
        }
        Ok(AT_A_TIME)
    }

    /// The domain does not keep to the protocol: nothing more is expected of it.
    fn break_with(&self, why: &'static str) -> CallError {
        self.give_up();
        CallError::BadReply(why)
    }

    /// Sees to the answer of a question whose asker has gone.
    fn adopt(&self, mail: &mut Mail, answer: Answer) {
        match answer {
            (FromDomain::Line { .. }, _) => self.keep_line(answer),
            (FromDomain::Buffer { id: buffer }, _) => mail.owed.push(FromClient::Forget { buffer }),
            _ => {}
        }
    }

    /// Has the domain forget a buffer, now or when it reads again.
    pub(super) fn owe(&self, buffer: u32) {
        let mut mail = self.mail();
        mail.owed.push(FromClient::Forget { buffer });
        // An error is for the next who asks.
        let _ = self.pay(&mut mail);
    }

    /// Whether nothing is owed any more.
    fn pay(&self, mail: &mut Mail) -> Result<bool, CallError> {
        while let Some(message) = mail.owed.last() {
            if !self.post(message, None)? {
                return Ok(false);
            }
            mail.owed.pop();
        }
        Ok(true)
    }

    /// Sends what there is room for; false if there is none.
    pub(super) fn post(&self, message: &FromClient, fd: Option<BorrowedFd<'_>>) -> Result<bool, CallError> {
        match socket::send(&self.socket, message, fd) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::AGAIN) => Ok(false),
            Err(rustix::io::Errno::MSGSIZE) => Err(Refusal::Protocol("message too long".into()).into()),
            Err(_) => {
                self.give_up();
                Err(CallError::DomainDied)
            }
        }
    }

    /// Sends what needs no answer, as soon as there is room.
    pub fn tell(&self, message: &FromClient, deadline: Option<Deadline>) -> Result<(), CallError> {
        while !self.post(message, None)? {
            // The domain does not read: wait a moment for it, as long as it lives.
            if !self.is_alive() {
                return Err(CallError::DomainDied);
            }
            let left = deadline.map_or(Some(SLICE), Deadline::left).ok_or(CallError::Deadline)?;
            if deadline.is_none() {
                self.see_whether_it_works()?;
            }
            std::thread::sleep(left.min(Duration::from_micros(200)));
        }
        Ok(())
    }

    /// Asks and waits for the answer, at most until `deadline`.
    pub(super) fn question(
        &self,
        mut inquiry: Inquiry,
        deadline: Option<Deadline>,
    ) -> Result<Answer, CallError> {
        loop {
            if let Some(answer) = self.pursue(&mut inquiry)? {
                return Ok(answer);
            }
            let works = if deadline.is_none() { self.see_whether_it_works() } else { Ok(()) };
            match works.and_then(|()| self.wait_a_moment(deadline)) {
                Ok(true) => {}
                // Dead, with nothing to read a moment ago: what it had sent before it died is there now.
                Ok(false) => {
                    return self.pursue(&mut inquiry)?.ok_or_else(|| {
                        self.give_up();
                        CallError::DomainDied
                    });
                }
                Err(e) => {
                    self.forsake(inquiry);
                    return Err(e);
                }
            }
        }
    }

    /// Sleeps until the socket has something, or for a slice; whether the domain lives.
    pub(super) fn wait_a_moment(&self, deadline: Option<Deadline>) -> Result<bool, CallError> {
        let left = deadline.map_or(Some(SLICE), Deadline::left).ok_or(CallError::Deadline)?.min(SLICE);
        let timeout = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
        let [_, process] = self.signs_of_death();
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN | PollFlags::RDHUP), process];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => Ok(!fds[0].revents().is_empty() || fds[1].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(e) => Err(system("poll")(e)),
        }
    }

    /// The memfd with the results of a call on a line, which the domain sent before it replied.
    pub fn results_of(&self, line: u32, call: u32) -> Result<(u64, OwnedFd), CallError> {
        let mut mail = self.mail();
        let mut read = 0;
        loop {
            if let Some(at) = mail.results.iter().position(|r| (r.line, r.call) == (line, call)) {
                let Results { len_bytes, fd, .. } = mail.results.swap_remove(at);
                return Ok((len_bytes, fd.ok_or_else(|| no_room_for("results that the domain sent"))?));
            }
            let more = self.collect(&mut mail)?;
            read += more;
            if more == 0 || read > MOST_QUEUED {
                return Err(CallError::BadReply("results that never came"));
            }
        }
    }
}
