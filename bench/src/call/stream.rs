//! Bytes through the kernel: a pipe pair, and a Unix stream.
//!
//! A request is its length and its bytes in one write; the server reads whatever has come and goes on until it has all. The
//! answer is one word.

use super::subject::{Bytes, Caller, Server, digest, server};
use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;

struct Stream<R, W> {
    read: R,
    write: W,
    argument: Vec<u8>,
    _server: Server,
}

impl<R: Read, W: Write> Caller for Stream<R, W> {
    fn argument(&mut self) -> Bytes<'_> {
        Bytes::Own(&mut self.argument)
    }

    fn call(&mut self) -> u64 {
        let length = (self.argument.len() as u64).to_ne_bytes();
        let total = length.len() + self.argument.len();
        let mut done =
            self.write.write_vectored(&[IoSlice::new(&length), IoSlice::new(&self.argument)]).expect("write");
        while done < total {
            done += self.write.write(&self.argument[done - length.len()..]).expect("write");
        }
        let mut answer = [0; 8];
        self.read.read_exact(&mut answer).expect("an answer");
        u64::from_ne_bytes(answer)
    }
}

fn serve(mut read: impl Read, mut write: impl Write, len: usize) {
    let mut buffer = vec![0; 8 + len];
    loop {
        let mut have = 0;
        let mut wanted = 8;
        while have < wanted {
            match read.read(&mut buffer[have..]) {
                Ok(n) if n > 0 => have += n,
                _ => return,
            }
            if let Some(length) = buffer[..have].first_chunk() {
                wanted = 8 + u64::from_ne_bytes(*length) as usize;
                assert!(wanted <= buffer.len(), "the request is longer than agreed");
            }
        }
        if write.write_all(&digest(&buffer[8..wanted]).to_ne_bytes()).is_err() {
            return;
        }
    }
}

/// Two pipes.
pub fn pipes(len: usize, cpu: usize) -> Box<dyn Caller> {
    let (their_read, write) = std::io::pipe().expect("a pipe");
    let (read, their_write) = std::io::pipe().expect("a pipe");
    let server = server(cpu, || serve(&their_read, &their_write, len));
    Box::new(Stream { read, write, argument: vec![0; len], _server: server })
}

/// A connected pair of stream sockets.
pub fn unix(len: usize, cpu: usize) -> Box<dyn Caller> {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let server = server(cpu, || serve(&theirs, &theirs, len));
    let read = ours.try_clone().expect("dup");
    Box::new(Stream { read, write: ours, argument: vec![0; len], _server: server })
}
