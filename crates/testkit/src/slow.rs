//! Descriptors that are slow to close: what a hostile peer sends.

use peregrine_sys::peer::linger;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// A connection with unsent bytes: closing its last descriptor takes a minute, or until the other end, which comes with it, goes.
pub fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut ours = TcpStream::connect(listener.local_addr().expect("its address")).expect("a connection");
    let (theirs, _) = listener.accept().expect("the other end");
    ours.set_nonblocking(true).expect("non-blocking");
    while ours.write(&[0; 65536]).is_ok() {}
    ours.set_nonblocking(false).expect("blocking");
    linger(&ours, Duration::from_secs(60)).expect("SO_LINGER");
    (ours.into(), theirs)
}
