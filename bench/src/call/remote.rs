//! tarpc and tonic over a Unix socket, each on a single-threaded runtime on both sides.

use super::subject::{Bytes, Caller, Server, digest, server};
use bytes::{Buf, BufMut};
use futures_util::StreamExt;
use serde_bytes::ByteBuf;
use std::convert::Infallible;
use std::future::{Future, Ready, ready};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use tarpc::server::Channel as _;
use tarpc::tokio_serde::formats::Bincode;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::{Channel, Endpoint};

/// Room for an argument and its frame.
const FRAME: usize = 1 << 20;

/// A socket's path that goes with the case.
struct Socket(PathBuf);

impl Socket {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("peregrine-bench-{}", std::process::id())))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Serves `run` on a bound socket; returns once it is bound.
fn serve<F: Future>(cpu: usize, path: &Path, run: impl FnOnce(UnixListener) -> F) -> Server {
    let socket = std::os::unix::net::UnixListener::bind(path).expect("a socket");
    socket.set_nonblocking(true).expect("non-blocking");
    server(cpu, move || {
        runtime().block_on(async { run(UnixListener::from_std(socket).expect("a listener")).await });
    })
}

#[tarpc::service]
trait Digest {
    async fn digest(argument: ByteBuf) -> u64;
}

#[derive(Clone)]
struct Digester;

impl Digest for Digester {
    async fn digest(self, _: tarpc::context::Context, argument: ByteBuf) -> u64 {
        digest(&argument)
    }
}

struct Tarpc {
    client: DigestClient,
    runtime: Runtime,
    argument: Vec<u8>,
    _server: Server,
    _socket: Socket,
}

impl Caller for Tarpc {
    fn argument(&mut self) -> Bytes<'_> {
        Bytes::Own(&mut self.argument)
    }

    fn call(&mut self) -> u64 {
        let call = self.client.digest(tarpc::context::current(), ByteBuf::from(self.argument.clone()));
        self.runtime.block_on(call).expect("an answer")
    }
}

/// tarpc with bincode.
pub fn tarpc(len: usize, cpu: usize) -> Box<dyn Caller> {
    let socket = Socket::new();
    let server = serve(cpu, &socket.0, async move |listener: UnixListener| {
        let (stream, _) = listener.accept().await.expect("a client");
        let mut framing = tarpc::tokio_util::codec::LengthDelimitedCodec::builder();
        let framed = framing.max_frame_length(len + FRAME).new_framed(stream);
        let transport = tarpc::serde_transport::new(framed, Bincode::default());
        tarpc::server::BaseChannel::with_defaults(transport)
            .execute(Digester.serve())
            .for_each(async |answer| answer.await)
            .await;
    });
    let runtime = runtime();
    let client = runtime.block_on(async {
        let mut connect = tarpc::serde_transport::unix::connect(&socket.0, Bincode::default);
        connect.config_mut().max_frame_length(len + FRAME);
        DigestClient::new(tarpc::client::Config::default(), connect.await.expect("connected")).spawn()
    });
    Box::new(Tarpc { client, runtime, argument: vec![0; len], _server: server, _socket: socket })
}

/// Bytes as they are: what prost's generated code would add is not measured.
#[derive(Clone, Copy, Default)]
struct Plain;

impl Codec for Plain {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Plain {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Plain {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; from.remaining()];
        from.copy_to_slice(&mut bytes);
        Ok(Some(bytes))
    }
}

/// The method.
struct Unary;

impl tonic::server::UnaryService<Vec<u8>> for Unary {
    type Response = Vec<u8>;
    type Future = Ready<Result<tonic::Response<Vec<u8>>, Status>>;

    fn call(&mut self, request: tonic::Request<Vec<u8>>) -> Self::Future {
        ready(Ok(tonic::Response::new(digest(request.get_ref()).to_ne_bytes().to_vec())))
    }
}

/// The service, which has that method only.
#[derive(Clone)]
struct Service {
    most: usize,
}

impl tower::Service<http::Request<tonic::body::Body>> for Service {
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let most = self.most;
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Plain).max_decoding_message_size(most);
            Ok(grpc.unary(Unary, request).await)
        })
    }
}

struct Tonic {
    client: tonic::client::Grpc<Channel>,
    runtime: Runtime,
    argument: Vec<u8>,
    _server: Server,
    _socket: Socket,
}

impl Caller for Tonic {
    fn argument(&mut self) -> Bytes<'_> {
        Bytes::Own(&mut self.argument)
    }

    fn call(&mut self) -> u64 {
        let request = tonic::Request::new(self.argument.clone());
        let path = http::uri::PathAndQuery::from_static("/bench.Digest/Digest");
        let client = &mut self.client;
        let answer = self.runtime.block_on(async move {
            client.ready().await.expect("ready");
            client.unary(request, path, Plain).await.expect("an answer").into_inner()
        });
        u64::from_ne_bytes(answer[..].try_into().expect("a word"))
    }
}

/// tonic with bytes for messages.
pub fn tonic(len: usize, cpu: usize) -> Box<dyn Caller> {
    let socket = Socket::new();
    let server = serve(cpu, &socket.0, async move |listener: UnixListener| {
        let service = Service { most: len + FRAME };
        tonic::transport::Server::builder()
            .serve_with_incoming(service, UnixListenerStream::new(listener))
            .await
            .expect("served");
    });
    let runtime = runtime();
    let address = format!("unix://{}", socket.0.display());
    let channel = runtime.block_on(async {
        Endpoint::try_from(address).expect("an address").connect().await.expect("connected")
    });
    let client = tonic::client::Grpc::new(channel);
    Box::new(Tonic { client, runtime, argument: vec![0; len], _server: server, _socket: socket })
}
