//! A client made of bytes: sends what it is told, whether or not a driver would.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// How long a test waits for something that must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

/// A message from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) tag: u8,
    pub(crate) body: Vec<u8>,
}

impl Message {
    /// A field of an ErrorResponse or NoticeResponse.
    pub(crate) fn field(&self, code: u8) -> String {
        let fields = self.body.split(|&b| b == 0);
        let found = fields.filter_map(|f| f.split_first()).find(|(c, _)| **c == code);
        found.map(|(_, text)| String::from_utf8_lossy(text).into_owned()).unwrap_or_default()
    }

    /// SQLSTATE
    pub(crate) fn code(&self) -> String {
        assert_eq!(self.tag, b'E', "{self:?}");
        self.field(b'C')
    }

    /// All values of a DataRow, as text.
    pub(crate) fn values(&self) -> Vec<String> {
        assert_eq!(self.tag, b'D', "{self:?}");
        let (mut rest, mut values) = (&self.body[2..], Vec::new());
        while rest.len() >= 4 {
            let length = i32::from_be_bytes(rest[..4].try_into().unwrap());
            let length = usize::try_from(length).unwrap_or(0);
            values.push(String::from_utf8_lossy(&rest[4..4 + length]).into_owned());
            rest = &rest[4 + length..];
        }
        values
    }
}

/// A connection to the proxy (or to a server).
pub(crate) struct Raw {
    stream: Box<dyn Socket>,
    input: Vec<u8>,
    pub(crate) params: BTreeMap<String, String>,
    pub(crate) pid: i32,
    pub(crate) secret: Vec<u8>,
}

/// What a login ended with when it did not succeed: the error, and the messages before it.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) error: Message,
    /// Tags of all messages up to the error, authentication requests with their kind.
    pub(crate) transcript: String,
}

pub(crate) const V3_0: u32 = 0x0003_0000;
pub(crate) const V3_2: u32 = 0x0003_0002;

pub(crate) fn startup_packet(version: u32, parameters: &[(&str, &str)]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    for (name, value) in parameters {
        body.extend_from_slice(name.as_bytes());
        body.push(0);
        body.extend_from_slice(value.as_bytes());
        body.push(0);
    }
    body.push(0);
    let mut packet = u32::try_from(body.len() + 4).unwrap().to_be_bytes().to_vec();
    packet.extend(body);
    packet
}

impl Raw {
    pub(crate) async fn tcp(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream)
    }

    pub(crate) fn over(stream: impl Socket + 'static) -> Self {
        let stream = Box::new(stream);
        Self { stream, input: Vec::new(), params: BTreeMap::new(), pid: 0, secret: Vec::new() }
    }

    /// Logs in over TCP.
    pub(crate) async fn login(port: u16, parameters: &[(&str, &str)], password: &str) -> Result<Self, Refused> {
        let mut raw = Self::tcp(port).await;
        raw.start(V3_0, parameters, password).await?;
        Ok(raw)
    }

    /// Startup packet, authentication, parameters, up to the first ReadyForQuery.
    pub(crate) async fn start(
        &mut self,
        version: u32,
        parameters: &[(&str, &str)],
        password: &str,
    ) -> Result<String, Refused> {
        self.send(&startup_packet(version, parameters)).await;
        let mut transcript = String::new();
        let mut scram: Option<ScramSha256> = None;
        loop {
            let Some(message) = self.next().await else { panic!("closed during login after {transcript:?}") };
            transcript.push(message.tag as char);
            let mut out = BytesMut::new();
            match message.tag {
                b'R' => {
                    let kind = u32::from_be_bytes(message.body[..4].try_into().unwrap());
                    transcript.push_str(&kind.to_string());
                    match kind {
                        0 => {}
                        10 => {
                            let names = String::from_utf8_lossy(&message.body[4..]).into_owned();
                            transcript.push_str(&format!("({})", names.trim_end_matches('\0').replace('\0', ",")));
                            let exchange = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
                            frontend::sasl_initial_response(SCRAM_SHA_256, exchange.message(), &mut out).unwrap();
                            scram = Some(exchange);
                        }
                        11 => {
                            let exchange = scram.as_mut().unwrap();
                            exchange.update(&message.body[4..]).unwrap();
                            frontend::sasl_response(exchange.message(), &mut out).unwrap();
                        }
                        12 => scram.as_mut().unwrap().finish(&message.body[4..]).unwrap(),
                        _ => panic!("authentication request {kind}"),
                    }
                }
                b'S' => self.note(&message),
                b'K' => {
                    self.pid = i32::from_be_bytes(message.body[..4].try_into().unwrap());
                    self.secret = message.body[4..].to_vec();
                }
                b'Z' => return Ok(transcript),
                b'E' => return Err(Refused { error: message, transcript }),
                b'v' | b'N' => {}
                tag => panic!("message {:?} during login", tag as char),
            }
            self.send(&out).await;
        }
    }

    fn note(&mut self, message: &Message) {
        let mut parts = message.body.split(|&b| b == 0).map(|p| String::from_utf8_lossy(p).into_owned());
        self.params.insert(parts.next().unwrap(), parts.next().unwrap());
    }

    /// Sends bytes; a connection that is closed already shows when reading.
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    /// Sends what the closure composes.
    pub(crate) async fn compose(&mut self, compose: impl FnOnce(&mut Batch)) {
        let mut batch = Batch::default();
        compose(&mut batch);
        self.send(&batch.0).await;
    }

    /// The next message; `None` when the connection was closed.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        let read = async {
            loop {
                if let Some(length) = self.input.get(1..5) {
                    let length = u32::from_be_bytes(length.try_into().unwrap()) as usize;
                    if self.input.len() > length {
                        let rest = self.input.split_off(length + 1);
                        let frame = std::mem::replace(&mut self.input, rest);
                        return Some(Message { tag: frame[0], body: frame[5..].to_vec() });
                    }
                }
                match self.stream.read_buf(&mut self.input).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        };
        let message = tokio::time::timeout(PATIENCE, read).await.expect("the proxy says nothing")?;
        if message.tag == b'S' {
            self.note(&message);
        }
        Some(message)
    }

    /// Reads one byte, the answer to an SSLRequest.
    pub(crate) async fn byte(&mut self) -> u8 {
        let mut byte = [0];
        tokio::time::timeout(PATIENCE, self.stream.read_exact(&mut byte)).await.unwrap().unwrap();
        byte[0]
    }

    /// Everything up to ReadyForQuery, or to the end of the connection.
    pub(crate) async fn until_ready(&mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(message) = self.next().await {
            let ready = message.tag == b'Z';
            messages.push(message);
            if ready {
                break;
            }
        }
        messages
    }

    /// Everything up to a message with this tag.
    pub(crate) async fn until(&mut self, tag: u8) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let message = self.next().await.unwrap_or_else(|| panic!("closed after {messages:?}"));
            let there = message.tag == tag;
            messages.push(message);
            if there {
                return messages;
            }
        }
    }

    /// Whether the other side has closed the connection, possibly after some last words.
    pub(crate) async fn is_closed(&mut self) -> bool {
        while self.next().await.is_some() {}
        true
    }

    /// Runs a simple query.
    pub(crate) async fn query(&mut self, sql: &str) -> Vec<Message> {
        self.compose(|b| b.query(sql)).await;
        self.until_ready().await
    }

    /// First value of the first row of a simple query; fails on an error.
    pub(crate) async fn value(&mut self, sql: &str) -> String {
        let messages = self.query(sql).await;
        let row = messages.iter().find(|m| m.tag == b'D').unwrap_or_else(|| panic!("{sql}: {}", show(&messages)));
        row.values().swap_remove(0)
    }

    /// SQLSTATE of a simple query that must fail.
    pub(crate) async fn error(&mut self, sql: &str) -> Message {
        let messages = self.query(sql).await;
        let error = messages.iter().find(|m| m.tag == b'E');
        error.unwrap_or_else(|| panic!("{sql} did not fail: {}", show(&messages))).clone()
    }

    /// Says goodbye.
    pub(crate) async fn terminate(mut self) {
        self.send(b"X\0\0\0\x04").await;
        let _ = self.stream.shutdown().await;
    }
}

/// Messages of a client, one after the other.
#[derive(Default)]
pub(crate) struct Batch(pub(crate) BytesMut);

impl Batch {
    pub(crate) fn query(&mut self, sql: &str) {
        frontend::query(sql, &mut self.0).unwrap();
    }

    pub(crate) fn parse(&mut self, name: &str, sql: &str) {
        frontend::parse(name, sql, [], &mut self.0).unwrap();
    }

    /// With text parameters, and text results.
    pub(crate) fn bind(&mut self, portal: &str, statement: &str, values: &[&str]) {
        let put = |value: &&str, out: &mut BytesMut| {
            out.put_slice(value.as_bytes());
            Ok(postgres_protocol::IsNull::No)
        };
        let bound = frontend::bind(portal, statement, [], values, put, [], &mut self.0);
        bound.map_err(|_| "bind").unwrap();
    }

    pub(crate) fn describe(&mut self, kind: u8, name: &str) {
        frontend::describe(kind, name, &mut self.0).unwrap();
    }

    pub(crate) fn execute(&mut self, portal: &str) {
        frontend::execute(portal, 0, &mut self.0).unwrap();
    }

    pub(crate) fn close(&mut self, kind: u8, name: &str) {
        frontend::close(kind, name, &mut self.0).unwrap();
    }

    pub(crate) fn sync(&mut self) {
        frontend::sync(&mut self.0);
    }

    pub(crate) fn flush(&mut self) {
        frontend::flush(&mut self.0);
    }

    pub(crate) fn copy_data(&mut self, data: &[u8]) {
        self.message(b'd', data);
    }

    pub(crate) fn copy_done(&mut self) {
        self.message(b'c', b"");
    }

    pub(crate) fn message(&mut self, tag: u8, body: &[u8]) {
        self.0.put_u8(tag);
        self.0.put_u32(u32::try_from(body.len() + 4).unwrap());
        self.0.put_slice(body);
    }

    /// Parse, Bind, Execute, Sync of the unnamed statement.
    pub(crate) fn extended(&mut self, sql: &str, values: &[&str]) {
        self.parse("", sql);
        self.bind("", "", values);
        self.execute("");
        self.sync();
    }
}

/// The messages in short: `1 2 D(7) C(SELECT 1) Z(I)`; notices and parameters are left out.
pub(crate) fn show(messages: &[Message]) -> String {
    let shown = messages.iter().filter(|m| !matches!(m.tag, b'N' | b'S' | b'T' | b't'));
    let one = |message: &Message| match message.tag {
        b'D' => format!("D({})", message.values().join(",")),
        b'C' => format!("C({})", String::from_utf8_lossy(&message.body[..message.body.len() - 1])),
        b'E' => format!("E({})", message.field(b'C')),
        b'Z' => format!("Z({})", message.body[0] as char),
        tag => (tag as char).to_string(),
    };
    shown.map(one).collect::<Vec<_>>().join(" ")
}

/// Sends a CancelRequest and waits until it has been carried out.
pub(crate) async fn cancel(port: u16, pid: i32, secret: &[u8]) {
    let mut raw = Raw::tcp(port).await;
    let length = u32::try_from(12 + secret.len()).unwrap();
    let mut packet = length.to_be_bytes().to_vec();
    packet.extend(80_877_102_u32.to_be_bytes());
    packet.extend(pid.to_be_bytes());
    packet.extend(secret);
    raw.send(&packet).await;
    assert!(raw.next().await.is_none(), "a cancel request has no answer");
}
