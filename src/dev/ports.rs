//! Free TCP ports on loopback.

use std::io;
use std::net::{Ipv4Addr, TcpListener};

/// Below the range from which Linux takes ports for outgoing connections, so that a remembered port is still free at the
/// next start.
const RANGE: std::ops::Range<u16> = 15_000..32_000;

/// Whether somebody could listen on `port` now.
pub(super) fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// A port on which nobody listens now. Somebody may take it before it is used: whoever binds it tries again.
///
/// # Errors
/// None of many was free.
pub(super) fn pick() -> io::Result<u16> {
    let random = || RANGE.start + rand::random::<u16>() % (RANGE.end - RANGE.start);
    std::iter::repeat_with(random)
        .take(1000)
        .find(|&port| is_free(port))
        .ok_or_else(|| io::Error::new(io::ErrorKind::AddrInUse, "found no free port on 127.0.0.1"))
}

/// `preferred` if it is free, else port 0 (the system chooses). An address that is not loopback `host:port` is kept: the
/// operator wrote it, and is to be told if it is taken.
pub(super) fn preferred_or_any(listen: &str) -> String {
    match listen.parse::<std::net::SocketAddr>() {
        Ok(address) if address.ip().is_loopback() && TcpListener::bind(address).is_err() => {
            std::net::SocketAddr::new(address.ip(), 0).to_string()
        }
        _ => listen.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_taken_port_gives_way() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = taken.local_addr().unwrap().to_string();
        assert!(!is_free(taken.local_addr().unwrap().port()));
        assert_eq!(preferred_or_any(&address), "127.0.0.1:0");
        drop(taken);
        assert_eq!(preferred_or_any(&address), address);
        assert_eq!(preferred_or_any(""), "");
    }

    #[test]
    fn picked_ports_are_below_the_ephemeral_range() {
        assert!(RANGE.contains(&pick().unwrap()));
    }
}
