//! `pgusher health`: a HEALTHCHECK for containers that have no curl.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::Duration;

/// The most that is read of an answer.
const ANSWER_LIMIT: u64 = 64 << 10;

/// Why pgusher is not healthy, as far as one can tell from here.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// Not `http://host:port/path`.
    #[error("{0:?} is not an address such as http://127.0.0.1:6490/readyz")]
    BadUrl(String),
    /// Nobody answers.
    #[error("{url}: {source}")]
    Unreachable {
        /// Who was asked.
        url: String,
        /// What happened.
        source: io::Error,
    },
    /// It answers, but not with 200.
    #[error("{url}: {answer}")]
    NotReady {
        /// Who was asked.
        url: String,
        /// Status line and body.
        answer: String,
    },
}

/// Asks `url` and returns the body of a 200.
///
/// # Errors
/// [`HealthError`]
pub fn probe(url: &str, timeout: Duration) -> Result<String, HealthError> {
    ask("GET", url, "", timeout)
}

/// Asks `url` with this method, and with this bearer token unless it is empty; returns the body of a 200.
///
/// # Errors
/// [`HealthError`]
pub fn ask(method: &str, url: &str, token: &str, timeout: Duration) -> Result<String, HealthError> {
    let (host, path) = parse(url).ok_or_else(|| HealthError::BadUrl(url.to_owned()))?;
    let unreachable = |source| HealthError::Unreachable { url: url.to_owned(), source };
    let answer = send(method, host, path, token, timeout).map_err(unreachable)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) == Some("200") {
        Ok(body.trim().to_owned())
    } else {
        Err(HealthError::NotReady { url: url.to_owned(), answer: format!("{status} {}", body.trim()) })
    }
}

/// `http://host:port/path` → (`host:port`, `/path`)
fn parse(url: &str) -> Option<(&str, &str)> {
    let rest = url.strip_prefix("http://")?;
    let slash = rest.find('/').unwrap_or(rest.len());
    let (host, path) = rest.split_at(slash);
    let (_, port) = host.rsplit_once(':')?;
    port.parse::<u16>().ok()?;
    // A line break would end the request line.
    let printable = url.bytes().all(|byte| byte.is_ascii_graphic());
    printable.then_some((host, if path.is_empty() { "/" } else { path }))
}

/// HTTP/1.0, so that the end of the connection is the end of the answer.
fn send(method: &str, host: &str, path: &str, token: &str, timeout: Duration) -> io::Result<String> {
    let address = host.to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let bearer = if token.is_empty() { String::new() } else { format!("Authorization: Bearer {token}\r\n") };
    let head =
        format!("{method} {path} HTTP/1.0\r\nHost: {host}\r\n{bearer}Content-Length: 0\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_LIMIT).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn answering(answer: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/readyz", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(answer.as_bytes()).unwrap();
        });
        url
    }

    #[test]
    fn only_200_is_healthy() {
        let second = Duration::from_secs(1);
        assert_eq!(probe(&answering("HTTP/1.1 200 OK\r\nA: b\r\n\r\nready\n"), second).unwrap(), "ready");
        let error = probe(&answering("HTTP/1.1 503 Service Unavailable\r\n\r\ncatalog away"), second).unwrap_err();
        assert!(error.to_string().ends_with("HTTP/1.1 503 Service Unavailable catalog away"), "{error}");
        assert!(matches!(probe(&answering(""), second), Err(HealthError::NotReady { .. })));
        assert!(matches!(probe("http://127.0.0.1:1/", second), Err(HealthError::Unreachable { .. })));
    }

    #[test]
    fn urls_are_plain_http_with_a_port() {
        assert_eq!(parse("http://[::1]:6490/readyz"), Some(("[::1]:6490", "/readyz")));
        assert_eq!(parse("http://h:1"), Some(("h:1", "/")));
        for bad in ["https://h:1/", "h:1", "http://h/", "http://h:x/", "http://h:1/a\r\nb"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
