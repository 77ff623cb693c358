//! The sockets that clients come to, and who accepts on them: one worker at a time, [`Steer`](crate::steer::Steer) says
//! which.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connection::{self, Peer};
use crate::server::Shared;
use crate::stream::{Socket, Stream};

/// Clients that may wait for accept.
const BACKLOG: i32 = 4096;

/// After an accept that failed, for want of descriptors mostly.
const PAUSE: Duration = Duration::from_millis(50);

/// A socket that listens. It belongs to no runtime, so that each worker can accept on it in its turn.
#[derive(Debug)]
pub enum Listening {
    /// TCP
    Tcp(std::net::TcpListener),
    /// The Unix socket
    Unix(std::os::unix::net::UnixListener),
}

/// A listening socket in the runtime of who accepts.
enum Listener {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

impl Listening {
    /// Listens on an address; on IPv4 alone, where the machine has no IPv6 and any address will do.
    ///
    /// # Errors
    /// Those of the system: the address is in use, or not this machine's.
    pub fn tcp(address: SocketAddr, keepidle: Duration) -> io::Result<Self> {
        tcp(address, keepidle)
            .or_else(|error| {
                let v4 = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), address.port());
                if address.is_ipv6() && address.ip().is_unspecified() { tcp(v4, keepidle) } else { Err(error) }
            })
            .map(Self::Tcp)
    }

    /// Listens on a Unix socket. One that was left behind is taken away first.
    ///
    /// # Errors
    /// Those of the system; `AddrInUse` where somebody answers on it.
    pub fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => return Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // Nobody answers: it was left behind.
            Err(_) => std::fs::remove_file(path)?,
        }
        let listener = std::os::unix::net::UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(listener))
    }

    /// The address, if it is TCP.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(listener) => listener.local_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// For the runtime of the calling task.
    fn attach(&self) -> io::Result<Listener> {
        Ok(match self {
            Self::Tcp(listener) => Listener::Tcp(tokio::net::TcpListener::from_std(listener.try_clone()?)?),
            Self::Unix(listener) => Listener::Unix(tokio::net::UnixListener::from_std(listener.try_clone()?)?),
        })
    }
}

fn tcp(address: SocketAddr, keepidle: Duration) -> io::Result<std::net::TcpListener> {
    use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // `*` means both families.
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?;
    // Both are inherited by the sockets that accept returns.
    socket.set_tcp_nodelay(true)?;
    if !keepidle.is_zero() {
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(keepidle))?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&SockAddr::from(address))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

impl Listener {
    async fn accept(&self) -> io::Result<(Stream, Peer)> {
        Ok(match self {
            Self::Tcp(listener) => {
                let (socket, address) = listener.accept().await?;
                (Stream::Plain(Socket::tcp(socket, address.ip())), Peer::Tcp(address))
            }
            Self::Unix(listener) => (Stream::Plain(Socket::Unix(listener.accept().await?.0)), Peer::Unix),
        })
    }
}

/// What it takes to accept, wherever.
#[derive(Clone)]
pub struct Acceptor {
    /// Where clients come to.
    pub listening: Arc<Listening>,
    /// What connections share.
    pub shared: Arc<Shared>,
    /// Cancelled when no more clients are wanted.
    pub stop: CancellationToken,
    /// The tasks that accept, which hold the socket.
    pub tasks: TaskTracker,
}

impl Acceptor {
    /// Accepts on this worker, for its turn; and then has the next one accept.
    pub fn accept_on(self, worker: usize) {
        let (tasks, shared) = (self.tasks.clone(), self.shared.clone());
        let Some(handle) = shared.handle(worker) else { return };
        let turn = async move {
            if let Some(next) = self.turn(worker).await {
                self.accept_on(next);
            }
        };
        tasks.spawn_on(turn, handle);
    }

    /// Who is next; nobody, if it is to stop.
    async fn turn(&self, worker: usize) -> Option<usize> {
        let listener = self.attached().await?;
        let mut accepted = 0;
        loop {
            match self.stop.run_until_cancelled(listener.accept()).await? {
                Ok((stream, peer)) => {
                    tokio::spawn(connection::accept(stream, peer, self.shared.clone()));
                    accepted += 1;
                }
                Err(error) => pause(&error).await,
            }
            let next = self.shared.next_to_accept(worker, accepted);
            if next != worker {
                return Some(next);
            }
        }
    }

    /// Nothing, if it is to stop.
    async fn attached(&self) -> Option<Listener> {
        loop {
            match self.listening.attach() {
                Ok(listener) => return Some(listener),
                Err(error) => self.stop.run_until_cancelled(pause(&error)).await?,
            }
        }
    }
}

async fn pause(error: &io::Error) {
    tracing::warn!(%error, "cannot accept a client");
    tokio::time::sleep(PAUSE).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_proxy_is_told_that_the_address_is_in_use() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let first = Listening::tcp(any, Duration::ZERO).unwrap();
        let second = Listening::tcp(first.address().unwrap(), Duration::ZERO);
        assert_eq!(second.unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
