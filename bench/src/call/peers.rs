//! ipc-channel and iceoryx2.

use super::subject::{Bytes, Caller, Server, digest, server};
use iceoryx2::port::client::Client;
use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::prelude::*;
use iceoryx2::service::port_factory::event::PortFactory;
use ipc_channel::ipc::{self, IpcBytesReceiver, IpcBytesSender};
use std::hint::spin_loop;

struct IpcChannel {
    to: IpcBytesSender,
    from: IpcBytesReceiver,
    argument: Vec<u8>,
    _server: Server,
}

impl Caller for IpcChannel {
    fn argument(&mut self) -> Bytes<'_> {
        Bytes::Own(&mut self.argument)
    }

    fn call(&mut self) -> u64 {
        self.to.send(&self.argument).expect("send");
        let answer = self.from.recv().expect("an answer");
        u64::from_ne_bytes(answer[..].try_into().expect("a word"))
    }
}

/// Servo's ipc-channel, by its byte channels.
pub fn ipc_channel(len: usize, cpu: usize) -> Box<dyn Caller> {
    let (to, requests) = ipc::bytes_channel().expect("a channel");
    let (answers, from) = ipc::bytes_channel().expect("a channel");
    let server = server(cpu, move || {
        while let Ok(request) = requests.recv() {
            if answers.send(&digest(&request).to_ne_bytes()).is_err() {
                return;
            }
        }
    });
    Box::new(IpcChannel { to, from, argument: vec![0; len], _server: server })
}

/// How an iceoryx2 server learns of a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Notice {
    /// By an event.
    Event,
    /// It looks all the time.
    Poll,
}

type Zero = iceoryx2::prelude::ipc::Service;

/// A request this much longer than agreed tells the server to end: killed, it would leave files behind.
const STOP: usize = 16;

struct Iceoryx {
    client: Client<Zero, [u8], (), u64, ()>,
    bells: Option<(Notifier<Zero>, Listener<Zero>)>,
    argument: Vec<u8>,
    server: Option<Server>,
    id: i32,
}

/// A node of the run `id`, whose files have names of their own, so that they can be taken away.
fn node(id: i32) -> Node<Zero> {
    set_log_level(LogLevel::Fatal);
    let mut config = Config::default();
    config.global.prefix = FileName::new(prefix(id).as_bytes()).expect("a file name");
    config.global.set_root_path(&Path::new(root(id).as_bytes()).expect("a path"));
    NodeBuilder::new().config(&config).create::<Zero>().expect("an iceoryx2 node")
}

fn prefix(id: i32) -> String {
    format!("peregrine-bench-{id}-")
}

fn root(id: i32) -> String {
    std::env::temp_dir().join(prefix(id)).display().to_string()
}

/// Takes away what iceoryx2 leaves when its last process has ended.
fn sweep(id: i32) {
    let _ = std::fs::remove_dir_all(root(id));
    for file in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        if file.file_name().to_string_lossy().starts_with(&prefix(id)) {
            let _ = std::fs::remove_file(file.path());
        }
    }
}

fn name(what: &str, id: i32) -> ServiceName {
    format!("peregrine-bench/{id}/{what}").as_str().try_into().expect("a service name")
}

fn event(node: &Node<Zero>, what: &str, id: i32) -> PortFactory<Zero> {
    node.service_builder(&name(what, id)).event().open_or_create().expect("an event service")
}

/// iceoryx2's request and response, with one copy into the loaned request.
pub fn iceoryx(len: usize, cpu: usize, notice: Notice) -> Box<dyn Caller> {
    let id = peregrine_sys::process::pid();
    let (ready_read, ready_write) = std::io::pipe().expect("a pipe");
    let server = server(cpu, move || serve_iceoryx(len, id, notice, ready_write));
    use std::io::Read;
    (&ready_read).read_exact(&mut [0]).expect("the server is up");
    let node = node(id);
    let service = node
        .service_builder(&name("call", id))
        .request_response::<[u8], u64>()
        .open()
        .expect("the server's service");
    let client = service.client_builder().initial_max_slice_len(len + STOP).create().expect("a client");
    let bells = (notice == Notice::Event).then(|| {
        let (to, from) = (event(&node, "to", id), event(&node, "from", id));
        (
            to.notifier_builder().create().expect("notifier"),
            from.listener_builder().create().expect("listener"),
        )
    });
    Box::new(Iceoryx { client, bells, argument: vec![0; len], server: Some(server), id })
}

fn serve_iceoryx(len: usize, id: i32, notice: Notice, ready: std::io::PipeWriter) {
    let node = node(id);
    let service =
        node.service_builder(&name("call", id)).request_response::<[u8], u64>().create().expect("a service");
    let server = service.server_builder().create().expect("a server");
    let bells = (notice == Notice::Event).then(|| {
        let (to, from) = (event(&node, "to", id), event(&node, "from", id));
        (
            from.notifier_builder().create().expect("notifier"),
            to.listener_builder().create().expect("listener"),
        )
    });
    use std::io::Write;
    (&ready).write_all(&[1]).expect("the client waits");
    loop {
        match &bells {
            Some((_, listener)) => {
                listener.blocking_wait(|_| {}).expect("an event");
            }
            None => spin_loop(),
        }
        while let Some(request) = server.receive().expect("a request") {
            if request.payload().len() == len + STOP {
                return;
            }
            request.send_copy(digest(request.payload())).expect("an answer sent");
            if let Some((notifier, _)) = &bells {
                notifier.notify().expect("notify");
            }
        }
    }
}

impl Iceoryx {
    fn notify(&self) {
        if let Some((notifier, _)) = &self.bells {
            notifier.notify().expect("notify");
        }
    }
}

impl Caller for Iceoryx {
    fn argument(&mut self) -> Bytes<'_> {
        Bytes::Own(&mut self.argument)
    }

    fn call(&mut self) -> u64 {
        let request = self.client.loan_slice_uninit(self.argument.len()).expect("a loan");
        let pending = request.write_from_slice(&self.argument).send().expect("sent");
        self.notify();
        loop {
            match &self.bells {
                Some((_, listener)) => {
                    listener.blocking_wait(|_| {}).expect("an event");
                }
                None => spin_loop(),
            }
            if let Some(answer) = pending.receive().expect("an answer") {
                return *answer;
            }
        }
    }
}

impl Drop for Iceoryx {
    fn drop(&mut self) {
        let request = self.client.loan_slice_uninit(self.argument.len() + STOP).expect("a loan");
        let _pending = request.write_from_fn(|_| 0).send().expect("sent");
        self.notify();
        if let Some(server) = self.server.take() {
            server.wait();
        }
        sweep(self.id);
    }
}
