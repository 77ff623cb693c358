//! A socket, plain or TLS, and the buffers that bytes in flight live in.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{BufMut as _, BytesMut};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;
use thread_local::ThreadLocal;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::coop::{has_budget_remaining, poll_proceed};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};
use tokio_util::io::poll_read_buf;

/// A connected socket.
#[derive(Debug)]
pub enum Socket {
    /// TCP, with `TCP_NODELAY`.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// Anything else that carries bytes: how tests look at every single step.
    Other(Box<dyn Duplex>),
    /// Between two runtimes, see [`Stream::detach`]; every use fails.
    Detached,
}

/// Both directions of something that is no socket.
pub trait Duplex: AsyncRead + AsyncWrite + std::fmt::Debug + Send + Sync + Unpin {}
impl<T: AsyncRead + AsyncWrite + std::fmt::Debug + Send + Sync + Unpin> Duplex for T {}

/// A socket with or without TLS.
#[derive(Debug)]
pub enum Stream {
    /// Bytes as they are.
    Plain(Socket),
    /// TLS on top.
    Tls(Box<TlsStream<Carrier>>),
}

/// A stream on its way from one task to another.
#[derive(Debug)]
pub enum Moving {
    /// In the same runtime.
    Within(Stream),
    /// To another one.
    Between(Detached),
}

impl Moving {
    /// Puts the stream into the runtime of the calling task, if it is not there.
    ///
    /// # Errors
    /// Those of registering the socket.
    pub fn arrive(self) -> io::Result<Stream> {
        match self {
            Self::Within(stream) => Ok(stream),
            Self::Between(detached) => detached.attach(),
        }
    }
}

/// A stream that belongs to no runtime.
#[derive(Debug)]
pub struct Detached {
    socket: DetachedSocket,
    tls: Option<Box<TlsStream<Carrier>>>,
}

#[derive(Debug)]
enum DetachedSocket {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Socket {
    /// A TCP socket. Between two ends of one machine the plainest congestion control does: one that models the path and
    /// paces (BBR, where it is the system's default) costs a tenth of the processor time of a short query.
    pub fn tcp(socket: TcpStream, peer: IpAddr) -> Self {
        #[cfg(target_os = "linux")]
        if peer.to_canonical().is_loopback() {
            // A kernel that does not have it keeps its default.
            let _ = SockRef::from(&socket).set_tcp_congestion(b"reno");
        }
        Self::Tcp(socket)
    }

    fn detached<T>() -> Poll<io::Result<T>> {
        Poll::Ready(Err(io::ErrorKind::NotConnected.into()))
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_read(cx, buf),
            Self::Other(s) => Pin::new(s).poll_read(cx, buf),
            Self::Detached => Self::detached(),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Self::Unix(s) => Pin::new(s).poll_write(cx, buf),
            Self::Other(s) => Pin::new(s).poll_write(cx, buf),
            Self::Detached => Self::detached(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Self::Unix(s) => Pin::new(s).poll_shutdown(cx),
            Self::Other(s) => Pin::new(s).poll_shutdown(cx),
            Self::Detached => Self::detached(),
        }
    }
}

/// What TLS runs on: a socket, and what was read from it before TLS was known to begin.
#[derive(Debug)]
pub struct Carrier {
    socket: Socket,
    early: Vec<u8>,
}

impl AsyncRead for Carrier {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.socket).poll_read(cx, buf);
        }
        let n = self.early.len().min(buf.remaining());
        buf.put_slice(&self.early[..n]);
        self.early.drain(..n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Carrier {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

impl Stream {
    /// Whether TLS is up.
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// Whether a read may find something, without a buffer at hand. What is no plain socket cannot tell and says yes.
    ///
    /// Cancel safe; the task is woken when the answer changes.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(Socket::Tcp(s)) => s.poll_read_ready(cx),
            Self::Plain(Socket::Unix(s)) => s.poll_read_ready(cx),
            Self::Plain(Socket::Detached) => Socket::detached(),
            Self::Plain(Socket::Other(_)) | Self::Tls(_) => Poll::Ready(Ok(())),
        }
    }

    /// Whether a read may find something, as [`Stream::poll_readable`]; nobody is woken when the answer changes. One load.
    #[inline]
    pub fn may_read(&self) -> bool {
        match self {
            Self::Plain(Socket::Tcp(s)) => s.try_io(Interest::READABLE, || Ok(())).is_ok(),
            Self::Plain(Socket::Unix(s)) => s.try_io(Interest::READABLE, || Ok(())).is_ok(),
            Self::Plain(Socket::Other(_) | Socket::Detached) | Self::Tls(_) => true,
        }
    }

    /// Whether nothing has arrived that was not read yet, the end of the stream included. Costs no system call while
    /// the socket is known to be drained.
    pub fn is_quiet(&mut self) -> bool {
        let mut byte = [0; 1];
        let read = match self {
            Self::Plain(Socket::Tcp(s)) => s.try_read(&mut byte),
            Self::Plain(Socket::Unix(s)) => s.try_read(&mut byte),
            Self::Plain(Socket::Detached) => return false,
            Self::Plain(Socket::Other(_)) | Self::Tls(_) => {
                return self.poll_fill(&mut Context::from_waker(Waker::noop()), &mut byte).is_pending();
            }
        };
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Reads into the free part of a buffer. `Ok(0)` is the end of the stream.
    ///
    /// A small read that does not fill the buffer leaves the socket marked as drained, so that the next call costs no system
    /// call that could only answer EAGAIN. After [`MUCH`] it is asked once more.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, free: &mut [u8]) -> Poll<io::Result<usize>> {
        if let Self::Plain(Socket::Tcp(s)) = self
            && has_budget_remaining()
            && let Some(done) =
                attempt(s, Interest::READABLE, free.len(), || Ok(recv(&*s, &mut *free, RecvFlags::empty())?.1))
        {
            count_turn(cx, matches!(done, Ok(n) if n >= MUCH.min(free.len())));
            return Poll::Ready(done);
        }
        let mut buf = ReadBuf::new(free);
        let done = match self {
            Self::Plain(s) => Pin::new(s).poll_read(cx, &mut buf),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_read(cx, &mut buf),
        };
        done.map_ok(|()| buf.filled().len())
    }

    /// Writes some of the bytes.
    #[inline]
    pub fn poll_send(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Self::Plain(Socket::Tcp(s)) = self
            && let Some(done) =
                attempt(s, Interest::WRITABLE, bytes.len(), || Ok(send(&*s, bytes, SendFlags::empty())?))
        {
            count_turn(cx, matches!(done, Ok(n) if n >= MUCH));
            return Poll::Ready(done);
        }
        match self {
            Self::Plain(s) => Pin::new(s).poll_write(cx, bytes),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_write(cx, bytes),
        }
    }

    /// Pushes out what TLS has sealed but the socket not yet taken.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_flush(cx),
        }
    }

    /// Appends what arrives to `buf`, at most `limit` bytes at once. `Ok(0)` is the end of the stream. Cancel safe.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn read_some(&mut self, buf: &mut BytesMut, limit: usize) -> io::Result<usize> {
        // In place: an array here would live in the future of every caller.
        poll_fn(|cx| {
            buf.reserve(limit.min(4096));
            let mut room = (&mut *buf).limit(limit.min(4096));
            match self {
                Self::Plain(s) => poll_read_buf(Pin::new(s), cx, &mut room),
                Self::Tls(s) => poll_read_buf(Pin::new(s.as_mut()), cx, &mut room),
            }
        })
        .await
    }

    /// Writes all of the bytes. Not cancel safe.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn send_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match poll_fn(|cx| self.poll_send(cx, bytes)).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => bytes = &bytes[n..],
            }
        }
        poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Says goodbye as TLS wants it and closes the sending side.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        poll_fn(|cx| match self {
            Self::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s.as_mut()).poll_shutdown(cx),
        })
        .await
    }

    /// TLS as the server side. `early` is what has been read of the client's hello.
    ///
    /// # Errors
    /// A handshake that failed, or TLS being up already.
    pub async fn accept_tls(self, config: Arc<rustls::ServerConfig>, early: Vec<u8>) -> io::Result<Self> {
        let Self::Plain(socket) = self else { return Err(io::ErrorKind::InvalidInput.into()) };
        let tls = TlsAcceptor::from(config).accept(Carrier { socket, early }).await?;
        Ok(Self::Tls(Box::new(TlsStream::Server(tls))))
    }

    /// TLS as the client side.
    ///
    /// # Errors
    /// A handshake that failed, or TLS being up already.
    pub async fn connect_tls(
        self,
        config: Arc<rustls::ClientConfig>,
        name: rustls::pki_types::ServerName<'static>,
    ) -> io::Result<Self> {
        let Self::Plain(socket) = self else { return Err(io::ErrorKind::InvalidInput.into()) };
        let tls = TlsConnector::from(config).connect(name, Carrier { socket, early: Vec::new() }).await?;
        Ok(Self::Tls(Box::new(TlsStream::Client(tls))))
    }

    /// The server's side of TLS, to read the name that the client asked for and the protocol agreed on.
    pub fn tls_session(&self) -> Option<&rustls::ServerConnection> {
        match self {
            Self::Tls(tls) => match tls.as_ref() {
                TlsStream::Server(tls) => Some(tls.get_ref().1),
                TlsStream::Client(_) => None,
            },
            Self::Plain(_) => None,
        }
    }

    /// The channel binding data of the certificate that the other side has shown.
    pub fn server_end_point(&self) -> Option<Vec<u8>> {
        let Self::Tls(tls) = self else { return None };
        let certificate = tls.get_ref().1.peer_certificates()?.first()?;
        crate::tls::server_end_point(certificate)
    }

    /// Takes the stream out of this runtime, so that another one can [attach](Detached::attach) it.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn detach(self) -> io::Result<Detached> {
        let (socket, tls) = match self {
            Self::Plain(socket) => (socket, None),
            Self::Tls(mut tls) => (std::mem::replace(&mut tls.get_mut().0.socket, Socket::Detached), Some(tls)),
        };
        let socket = match socket {
            Socket::Tcp(s) => DetachedSocket::Tcp(s.into_std()?),
            Socket::Unix(s) => DetachedSocket::Unix(s.into_std()?),
            Socket::Other(_) | Socket::Detached => return Err(io::ErrorKind::NotConnected.into()),
        };
        Ok(Detached { socket, tls })
    }
}

impl Detached {
    /// Whether nothing has arrived, the end of the stream included. One system call; what has arrived is spoilt by it.
    pub fn is_quiet(&self) -> bool {
        let mut byte = [0; 1];
        let read = match &self.socket {
            DetachedSocket::Tcp(s) => (&*s).read(&mut byte),
            DetachedSocket::Unix(s) => (&*s).read(&mut byte),
        };
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Puts the stream into the runtime of the calling task.
    ///
    /// # Errors
    /// Those of registering the socket.
    pub fn attach(self) -> io::Result<Stream> {
        let socket = match self.socket {
            DetachedSocket::Tcp(s) => Socket::Tcp(TcpStream::from_std(s)?),
            DetachedSocket::Unix(s) => Socket::Unix(UnixStream::from_std(s)?),
        };
        Ok(match self.tls {
            None => Stream::Plain(socket),
            Some(mut tls) => {
                tls.get_mut().0.socket = socket;
                Stream::Tls(tls)
            }
        })
    }
}

/// So much at once is a stream that goes on, see [`attempt`].
const MUCH: usize = 8192;

/// One system call on a socket that is ready; `None` if it is not, and then its own `poll_read` or `poll_write` has the task
/// woken when it is. Where it is, they do the same in three times the instructions, but for the turn that they
/// [count](count_turn). `whole` is how much could be moved.
#[inline]
fn attempt(
    socket: &TcpStream,
    interest: Interest,
    whole: usize,
    call: impl FnOnce() -> io::Result<usize>,
) -> Option<io::Result<usize>> {
    let mut moved = 0;
    let done = socket.try_io(interest, || {
        moved = call()?;
        // Less than it could: it is drained, or full. The runtime learns it in these words. Where much was moved there is
        // likely more, and to ask again costs less than to be told by the runtime.
        if (1..whole.min(MUCH)).contains(&moved) { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    });
    match done {
        _ if moved > 0 => Some(Ok(moved)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        done => Some(done.map(|()| 0)),
    }
}

/// Has the runtime count a turn of the task, of which it grants so many before others have theirs. Only where `much` was
/// moved: after little, the socket is drained or full, and the turns are over.
#[inline]
fn count_turn(cx: &mut Context<'_>, much: bool) {
    if much && let Poll::Ready(turn) = poll_proceed(cx) {
        turn.made_progress();
    }
}

/// Relay buffers. A connection holds one only while bytes are in flight; free ones are kept by each thread for itself, so
/// that to take one costs neither a lock nor a system call.
#[derive(Debug)]
pub struct Buffers {
    free: ThreadLocal<RefCell<Vec<Box<[u8]>>>>,
    large: ThreadLocal<RefCell<Vec<Box<[u8]>>>>,
    texts: ThreadLocal<RefCell<Vec<BytesMut>>>,
    size: usize,
}

/// Free buffers kept for the next taker.
const KEEP: usize = 64;

/// The same of large ones, which only those have who move a lot.
const KEEP_LARGE: usize = 8;

/// A large buffer is so many times the size of others.
const LARGE: usize = 4;

impl Buffers {
    /// Buffers of `size` bytes.
    pub fn new(size: usize) -> Self {
        Self { free: ThreadLocal::new(), large: ThreadLocal::new(), texts: ThreadLocal::new(), size }
    }

    /// Size of a buffer in bytes.
    #[inline]
    pub fn size(&self) -> usize {
        self.size
    }

    /// A buffer; its content is whatever the last user left.
    #[inline]
    pub fn take(&self) -> Box<[u8]> {
        let free = self.free.get_or_default().borrow_mut().pop();
        free.unwrap_or_else(|| vec![0; self.size].into_boxed_slice())
    }

    /// A larger one, for who receives more at once than others hold: fewer system calls for the same bytes.
    pub fn take_large(&self) -> Box<[u8]> {
        let free = self.large.get_or_default().borrow_mut().pop();
        free.unwrap_or_else(|| vec![0; self.size * LARGE].into_boxed_slice())
    }

    /// Takes a buffer back; one that has grown is freed.
    #[inline]
    pub fn give(&self, buffer: Box<[u8]>) {
        if buffer.len() == self.size {
            keep(&self.free, buffer, KEEP);
        } else if buffer.len() == self.size * LARGE {
            keep(&self.large, buffer, KEEP_LARGE);
        }
    }

    /// An empty buffer to write messages into.
    #[inline]
    pub fn take_text(&self) -> BytesMut {
        let free = self.texts.get_or_default().borrow_mut().pop();
        free.unwrap_or_else(|| BytesMut::with_capacity(1024))
    }

    /// Takes it back; one that has grown large is freed.
    #[inline]
    pub fn give_text(&self, mut text: BytesMut) {
        text.clear();
        if (1..=self.size).contains(&text.capacity()) {
            keep(&self.texts, text, KEEP);
        }
    }
}

#[inline]
fn keep<T: Send>(shelf: &ThreadLocal<RefCell<Vec<T>>>, item: T, most: usize) {
    let mut shelf = shelf.get_or_default().borrow_mut();
    if shelf.len() < most {
        shelf.push(item);
    }
}
