//! A client that says exactly what it is told, right or wrong, and writes down all that it hears.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, BytesMut};
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::Error;
use super::corpus::Message;

/// What was heard.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// Rows (columns joined by `|`), COPY data, notices, payloads of notifications; a line each.
    pub text: String,
    /// Rows and COPY data alone.
    pub rows: String,
    pub tags: Vec<String>,
    pub errors: Vec<Said>,
    /// The connection was closed by the other side.
    pub closed: bool,
    /// Something that was to be answered was not, in time.
    pub stuck: bool,
}

/// An error.
#[derive(Debug, Clone)]
pub struct Said {
    pub code: String,
    pub message: String,
    pub detail: String,
    pub hint: String,
    /// PostgreSQL names the routine that failed; the proxy has none to name.
    pub by_server: bool,
}

impl Reply {
    /// Message, detail and hint of every error, a line each.
    pub fn error_text(&self) -> String {
        let lines = self.errors.iter().map(|e| format!("{}\n{}\n{}", e.message, e.detail, e.hint));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Whether one of these SQLSTATEs was heard. `CLOSED` is a connection that was closed, `INJECT` one that could not
    /// be made ready.
    pub fn has_code(&self, codes: &[String]) -> bool {
        codes.iter().any(|code| match code.as_str() {
            "CLOSED" => self.closed,
            code => self.errors.iter().any(|error| error.code == code),
        })
    }

    /// Adds what another connection heard.
    pub fn absorb(&mut self, other: Self) {
        self.text += &other.text;
        self.rows += &other.rows;
        self.tags.extend(other.tags);
        self.errors.extend(other.errors);
        self.closed |= other.closed;
        self.stuck |= other.stuck;
    }

    fn line(&mut self, text: &str) {
        self.text += text;
        self.text.push('\n');
    }

    fn row(&mut self, text: &str) {
        self.rows += text;
        self.rows.push('\n');
        self.line(text);
    }
}

/// Where to connect, as whom.
#[derive(Debug, Clone)]
pub struct Login {
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: String,
    pub database: String,
}

/// A connection.
pub struct Client {
    stream: TcpStream,
    login: Login,
    incoming: BytesMut,
    /// All that was heard, but for what [`Client::take`] took.
    reply: Reply,
    ready: usize,
    status: u8,
    key: (i32, i32),
    /// What answers a `CopyInResponse` by itself, if anything.
    copy_data: Option<String>,
}

impl Client {
    /// Connects and logs in; a refusal is in the reply, on a connection that is closed.
    ///
    /// # Errors
    /// Nobody listens.
    pub async fn connect(
        login: &Login,
        parameters: &BTreeMap<String, String>,
        patience: Duration,
    ) -> Result<Self, Error> {
        let stream = TcpStream::connect((login.host.as_str(), login.port)).await?;
        stream.set_nodelay(true)?;
        let mut client = Self {
            stream,
            login: login.clone(),
            incoming: BytesMut::new(),
            reply: Reply::default(),
            ready: 0,
            status: b'?',
            key: (0, 0),
            copy_data: None,
        };
        let mut all =
            BTreeMap::from([("user".to_owned(), login.user.clone()), ("database".to_owned(), login.database.clone())]);
        all.extend(parameters.clone());
        let mut body = BytesMut::new();
        body.put_u32(196_608);
        for (name, value) in &all {
            put_cstr(&mut body, name.as_bytes());
            put_cstr(&mut body, value.as_bytes());
        }
        body.put_u8(0);
        let mut packet = BytesMut::new();
        packet.put_u32(u32::try_from(body.len() + 4)?);
        packet.extend_from_slice(&body);
        client.write(&packet).await;
        client.log_in(Instant::now() + patience).await?;
        Ok(client)
    }

    async fn log_in(&mut self, deadline: Instant) -> Result<(), Error> {
        let mut scram = None;
        while self.ready == 0 && !self.reply.closed {
            let Some((tag, mut body)) = self.next_frame(deadline).await else { return Ok(()) };
            if tag != b'R' {
                self.hear(tag, body).await;
                continue;
            }
            match body.get_u32() {
                0 => {}
                3 => {
                    let password = self.login.password.clone();
                    let mut buf = BytesMut::new();
                    put_message(&mut buf, b'p', |b| put_cstr(b, password.as_bytes()));
                    self.write(&buf).await;
                }
                10 => {
                    let first = ScramSha256::new(self.login.password.as_bytes(), ChannelBinding::unsupported());
                    let mut buf = BytesMut::new();
                    put_message(&mut buf, b'p', |b| {
                        put_cstr(b, SCRAM_SHA_256.as_bytes());
                        b.put_u32(u32::try_from(first.message().len()).unwrap());
                        b.extend_from_slice(first.message());
                    });
                    self.write(&buf).await;
                    scram = Some(first);
                }
                11 => {
                    let scram = scram.as_mut().ok_or("SCRAM goes on before it began")?;
                    scram.update(&body)?;
                    let mut buf = BytesMut::new();
                    put_message(&mut buf, b'p', |b| b.extend_from_slice(scram.message()));
                    self.write(&buf).await;
                }
                12 => scram.as_mut().ok_or("SCRAM ends before it began")?.finish(&body)?,
                other => return Err(format!("authentication method {other} is not known here").into()),
            }
        }
        Ok(())
    }

    /// Sends messages, without waiting for anything.
    pub async fn send(&mut self, messages: &[Message]) {
        let mut buf = BytesMut::new();
        messages.iter().for_each(|message| encode(&mut buf, message));
        self.write(&buf).await;
    }

    /// Sends a query and waits for its end.
    pub async fn query(&mut self, sql: &str, copy_data: &str, patience: Duration) {
        self.copy_data = Some(copy_data.to_owned());
        self.send(&[Message::Query(sql.to_owned())]).await;
        self.receive(1, patience).await;
        self.copy_data = None;
    }

    /// The same by the extended protocol.
    pub async fn execute(&mut self, sql: &str, patience: Duration) {
        let none = String::new;
        self.send(&[
            Message::Parse { statement: none(), sql: sql.to_owned() },
            Message::Bind { portal: none(), statement: none(), values: Vec::new() },
            Message::Execute { portal: none() },
            Message::Sync,
        ])
        .await;
        self.receive(1, patience).await;
    }

    /// Waits for so many `ReadyForQuery`.
    pub async fn receive(&mut self, ready: usize, patience: Duration) {
        let (deadline, wanted) = (Instant::now() + patience, self.ready + ready);
        while self.ready < wanted && !self.reply.closed {
            match self.next_frame(deadline).await {
                Some((tag, body)) => self.hear(tag, body).await,
                None => {
                    self.reply.stuck |= !self.reply.closed;
                    return;
                }
            }
        }
    }

    /// Listens for a while.
    pub async fn poll(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while let Some((tag, body)) = self.next_frame(deadline).await {
            self.hear(tag, body).await;
        }
    }

    /// What was heard so far; it is heard no second time.
    pub fn take(&mut self) -> Reply {
        let rest = Reply { closed: self.reply.closed, ..Reply::default() };
        std::mem::replace(&mut self.reply, rest)
    }

    pub fn is_closed(&self) -> bool {
        self.reply.closed
    }

    /// Whether the last `ReadyForQuery` said that no transaction is open.
    pub fn is_idle(&self) -> bool {
        self.status == b'I'
    }

    /// Asks, on a connection of its own, to cancel what this one does.
    ///
    /// # Errors
    /// Nobody listens.
    pub async fn cancel(&self) -> Result<(), Error> {
        let mut stream = TcpStream::connect((self.login.host.as_str(), self.login.port)).await?;
        let mut packet = BytesMut::new();
        packet.put_u32(16);
        packet.put_u32(80_877_102);
        packet.put_i32(self.key.0);
        packet.put_i32(self.key.1);
        stream.write_all(&packet).await?;
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        Ok(())
    }

    /// Says goodbye and waits until the other side has closed. What was heard before that.
    pub async fn leave(mut self, patience: Duration) -> Reply {
        let reply = self.take();
        self.send(&[Message::Terminate]).await;
        self.poll(patience).await;
        reply
    }

    async fn write(&mut self, bytes: &[u8]) {
        if self.stream.write_all(bytes).await.is_err() {
            // What was said before it closed can still be read.
            self.poll(Duration::from_millis(50)).await;
            self.reply.closed = true;
        }
    }

    /// The next whole message; `None` when it is late, or the connection closed.
    async fn next_frame(&mut self, deadline: Instant) -> Option<(u8, BytesMut)> {
        loop {
            if let Some(header) = self.incoming.get(..5) {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
                if self.incoming.len() > length {
                    let mut frame = self.incoming.split_to(length + 1);
                    let tag = frame.get_u8();
                    frame.advance(4);
                    return Some((tag, frame));
                }
            }
            match timeout_at(deadline, self.stream.read_buf(&mut self.incoming)).await {
                Err(_) => return None,
                Ok(Ok(n)) if n > 0 => {}
                Ok(_) => {
                    self.reply.closed = true;
                    return None;
                }
            }
        }
    }

    async fn hear(&mut self, tag: u8, mut body: BytesMut) {
        match tag {
            b'Z' => {
                self.ready += 1;
                self.status = body.get_u8();
            }
            b'D' => {
                let columns = body.get_i16();
                let values: Vec<String> = (0..columns).map(|_| value(&mut body)).collect();
                self.reply.row(&values.join("|"));
            }
            b'V' => {
                let value = value(&mut body);
                self.reply.row(&value);
            }
            b'd' => self.reply.row(String::from_utf8_lossy(&body).trim_end_matches('\n')),
            b'C' => self.reply.tags.push(cstr(&mut body)),
            b'E' => self.reply.errors.push(said(&mut body)),
            b'N' => {
                let notice = said(&mut body);
                self.reply.line(&format!("{}\n{}\n{}", notice.message, notice.detail, notice.hint));
            }
            b'A' => {
                body.advance(4);
                let (channel, payload) = (cstr(&mut body), cstr(&mut body));
                self.reply.line(&format!("{channel}|{payload}"));
            }
            b'K' => self.key = (body.get_i32(), body.get_i32()),
            b'G' => {
                if let Some(data) = self.copy_data.take() {
                    let end = match data.as_str() {
                        "" => Message::CopyFail("nothing to copy".to_owned()),
                        _ => Message::CopyDone,
                    };
                    Box::pin(self.send(&[Message::CopyData(data), end])).await;
                }
            }
            _ => {}
        }
    }
}

fn value(body: &mut BytesMut) -> String {
    match usize::try_from(body.get_i32()) {
        Ok(length) => String::from_utf8_lossy(&body.split_to(length)).into_owned(),
        Err(_) => String::new(),
    }
}

fn cstr(body: &mut BytesMut) -> String {
    let end = body.iter().position(|&b| b == 0).unwrap_or(body.len());
    let text = String::from_utf8_lossy(&body.split_to(end)).into_owned();
    if !body.is_empty() {
        body.advance(1);
    }
    text
}

fn said(body: &mut BytesMut) -> Said {
    let mut fields = BTreeMap::new();
    while body.len() > 1 {
        let tag = body.get_u8();
        fields.insert(tag, cstr(body));
    }
    let mut take = |tag| fields.remove(&tag).unwrap_or_default();
    Said {
        code: take(b'C'),
        message: take(b'M'),
        detail: take(b'D'),
        hint: take(b'H'),
        by_server: !take(b'R').is_empty(),
    }
}

fn put_cstr(buf: &mut BytesMut, text: &[u8]) {
    buf.extend_from_slice(text);
    buf.put_u8(0);
}

fn put_message(buf: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    buf.put_u8(tag);
    let start = buf.len();
    buf.put_u32(0);
    body(buf);
    let length = u32::try_from(buf.len() - start).unwrap();
    buf[start..start + 4].copy_from_slice(&length.to_be_bytes());
}

fn put_values(buf: &mut BytesMut, values: &[String]) {
    buf.put_u16(u16::try_from(values.len()).unwrap());
    for value in values {
        buf.put_u32(u32::try_from(value.len()).unwrap());
        buf.extend_from_slice(value.as_bytes());
    }
}

fn encode(buf: &mut BytesMut, message: &Message) {
    match message {
        Message::Query(sql) => put_message(buf, b'Q', |b| put_cstr(b, sql.as_bytes())),
        Message::Parse { statement, sql } => put_message(buf, b'P', |b| {
            put_cstr(b, statement.as_bytes());
            put_cstr(b, sql.as_bytes());
            b.put_u16(0);
        }),
        Message::Bind { portal, statement, values } => put_message(buf, b'B', |b| {
            put_cstr(b, portal.as_bytes());
            put_cstr(b, statement.as_bytes());
            b.put_u16(0);
            put_values(b, values);
            b.put_u16(0);
        }),
        Message::Describe { what, name } | Message::Close { what, name } => {
            let tag = if matches!(message, Message::Close { .. }) { b'C' } else { b'D' };
            put_message(buf, tag, |b| {
                b.put_u8(*what);
                put_cstr(b, name.as_bytes());
            });
        }
        Message::Execute { portal } => put_message(buf, b'E', |b| {
            put_cstr(b, portal.as_bytes());
            b.put_u32(0);
        }),
        Message::Sync => put_message(buf, b'S', |_| {}),
        Message::Flush => put_message(buf, b'H', |_| {}),
        Message::FunctionCall { oid, arguments } => put_message(buf, b'F', |b| {
            b.put_u32(*oid);
            b.put_u16(0);
            put_values(b, arguments);
            b.put_u16(0);
        }),
        Message::CopyData(data) => put_message(buf, b'd', |b| b.extend_from_slice(data.as_bytes())),
        Message::CopyDone => put_message(buf, b'c', |_| {}),
        Message::CopyFail(reason) => put_message(buf, b'f', |b| put_cstr(b, reason.as_bytes())),
        Message::Terminate => put_message(buf, b'X', |_| {}),
        Message::Raw(bytes) => buf.extend_from_slice(bytes),
    }
}
