//! Checked readers for the few bodies we look into, and encoders for what we say ourselves
//! ([message formats](https://www.postgresql.org/docs/current/protocol-message-formats.html)).
//!
//! A [`Cursor`] sees the body of one message and nothing behind it. Encoders append whole messages to a buffer.

use std::borrow::Cow;

use bytes::{BufMut as _, BytesMut};

use super::{Version, backend, frontend, startup};
use crate::error::{PgError, Severity, sqlstate};

/// A body that is not what its tag promises. The texts are PostgreSQL's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends too early.
    #[error("insufficient data left in message")]
    Short,
    /// A string has no terminator.
    #[error("invalid string in message")]
    String,
    /// A string is not UTF-8 where it has to be.
    #[error("invalid byte sequence for encoding \"UTF8\" in message")]
    Encoding,
    /// Something is left over, or a field has a value that it cannot have.
    #[error("invalid message format")]
    Format,
}

impl From<Malformed> for PgError {
    fn from(error: Malformed) -> Self {
        Self::fatal(sqlstate::PROTOCOL_VIOLATION, error.to_string())
    }
}

/// Reads the body of one message from front to back.
#[derive(Debug, Clone, Copy)]
pub struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    /// A cursor at the start of a body.
    pub fn new(body: &'a [u8]) -> Self {
        Self { rest: body }
    }

    /// The next byte.
    ///
    /// # Errors
    /// [`Malformed::Short`] if there is none.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        let (&[byte], rest) = self.rest.split_first_chunk().ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(byte)
    }

    /// The next Int16.
    ///
    /// # Errors
    /// [`Malformed::Short`] if there is none.
    pub fn i16(&mut self) -> Result<i16, Malformed> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(i16::from_be_bytes(*bytes))
    }

    /// The next Int32.
    ///
    /// # Errors
    /// [`Malformed::Short`] if there is none.
    pub fn i32(&mut self) -> Result<i32, Malformed> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(i32::from_be_bytes(*bytes))
    }

    /// The next `len` bytes.
    ///
    /// # Errors
    /// [`Malformed::Short`] if there are fewer.
    pub fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(Malformed::Short)?;
        self.rest = rest;
        Ok(bytes)
    }

    /// The next String, without its terminator, in whatever encoding the client speaks.
    ///
    /// # Errors
    /// [`Malformed::String`] if no terminator follows.
    pub fn cstr(&mut self) -> Result<&'a [u8], Malformed> {
        let end = memchr::memchr(0, self.rest).ok_or(Malformed::String)?;
        let text = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        Ok(text)
    }

    /// The next String, which has to be UTF-8.
    ///
    /// # Errors
    /// [`Malformed::String`] or [`Malformed::Encoding`].
    pub fn str(&mut self) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.cstr()?).map_err(|_| Malformed::Encoding)
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Ends the body.
    ///
    /// # Errors
    /// [`Malformed::Format`] if something is left.
    pub fn finish(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed::Format) }
    }
}

/// A SASLInitialResponse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaslInitialResponse<'a> {
    /// The mechanism that the client chose.
    pub mechanism: &'a str,
    /// Its first message, if it came along.
    pub data: Option<&'a [u8]>,
}

impl<'a> SaslInitialResponse<'a> {
    /// Reads the body of a `p` message that answers AuthenticationSASL.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn read(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(body);
        let mechanism = cursor.str()?;
        let data = match cursor.i32()? {
            -1 => None,
            len => Some(cursor.bytes(usize::try_from(len).map_err(|_| Malformed::Format)?)?),
        };
        cursor.finish()?;
        Ok(Self { mechanism, data })
    }
}

/// What a server asks for or tells during authentication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authentication<'a> {
    /// AuthenticationOk
    Ok,
    /// AuthenticationCleartextPassword
    CleartextPassword,
    /// AuthenticationMD5Password, with its salt
    Md5Password([u8; 4]),
    /// AuthenticationSASL, with the mechanisms on offer
    Sasl(Vec<&'a str>),
    /// AuthenticationSASLContinue
    SaslContinue(&'a [u8]),
    /// AuthenticationSASLFinal
    SaslFinal(&'a [u8]),
    /// A method that pgusher does not know: GSSAPI, SSPI and what may come.
    Other(i32),
}

impl<'a> Authentication<'a> {
    /// Reads the body of an `R` message.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn read(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(body);
        let request = match cursor.i32()? {
            0 => Self::Ok,
            3 => Self::CleartextPassword,
            5 => Self::Md5Password(cursor.bytes(4)?.try_into().map_err(|_| Malformed::Short)?),
            10 => {
                let mut mechanisms = Vec::new();
                loop {
                    match cursor.str()? {
                        "" => break Self::Sasl(mechanisms),
                        name => mechanisms.push(name),
                    }
                }
            }
            11 => Self::SaslContinue(cursor.rest()),
            12 => Self::SaslFinal(cursor.rest()),
            other => {
                cursor.rest();
                Self::Other(other)
            }
        };
        cursor.finish()?;
        Ok(request)
    }
}

/// Reads the body of a ParameterStatus: name and value.
///
/// # Errors
/// [`Malformed`].
pub fn read_parameter_status(body: &[u8]) -> Result<(&str, &[u8]), Malformed> {
    let mut cursor = Cursor::new(body);
    let pair = (cursor.str()?, cursor.cstr()?);
    cursor.finish()?;
    Ok(pair)
}

/// Reads the body of a BackendKeyData: process id and secret key.
///
/// # Errors
/// [`Malformed`], also for a key of a length that no key has.
pub fn read_backend_key_data(body: &[u8]) -> Result<(i32, &[u8]), Malformed> {
    let mut cursor = Cursor::new(body);
    let (process_id, key) = (cursor.i32()?, cursor.rest());
    if super::CANCEL_KEY_LEN.contains(&key.len()) { Ok((process_id, key)) } else { Err(Malformed::Format) }
}

/// The fields of an ErrorResponse or NoticeResponse that pgusher has a use for. Text that is not UTF-8 is shown as far
/// as it can be: before a session's encoding is known a server may speak its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ErrorFields<'a> {
    /// `ERROR`, `FATAL`, `PANIC`, `WARNING`, … never translated if the server is 9.6 or newer.
    pub severity: Cow<'a, str>,
    /// The SQLSTATE.
    pub code: Cow<'a, str>,
    /// What happened.
    pub message: Cow<'a, str>,
    /// DETAIL
    pub detail: Option<Cow<'a, str>>,
    /// HINT
    pub hint: Option<Cow<'a, str>>,
}

impl<'a> ErrorFields<'a> {
    /// Reads the body of an `E` or `N` message.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn read(body: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Self::default();
        let mut cursor = Cursor::new(body);
        loop {
            let tag = cursor.u8()?;
            if tag == 0 {
                break;
            }
            let text = String::from_utf8_lossy(cursor.cstr()?);
            match tag {
                b'V' => fields.severity = text,
                b'S' if fields.severity.is_empty() => fields.severity = text,
                b'C' => fields.code = text,
                b'M' => fields.message = text,
                b'D' => fields.detail = Some(text),
                b'H' => fields.hint = Some(text),
                // Fields that are not known are to be ignored, says the manual.
                _ => {}
            }
        }
        cursor.finish()?;
        Ok(fields)
    }

    /// Whether the server closes the connection after this.
    pub fn is_fatal(&self) -> bool {
        matches!(&*self.severity, "FATAL" | "PANIC")
    }
}

impl From<ErrorFields<'_>> for PgError {
    fn from(fields: ErrorFields<'_>) -> Self {
        Self {
            severity: if fields.is_fatal() { Severity::Fatal } else { Severity::Error },
            code: Cow::Owned(fields.code.into_owned()),
            message: fields.message.into_owned(),
            detail: fields.detail.map(Cow::into_owned),
            hint: fields.hint.map(Cow::into_owned),
            routine: None,
        }
    }
}

/// Appends one message: the tag, the length, and what `body` writes.
pub fn put_message(buf: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    buf.put_u8(tag);
    put_untagged(buf, body);
}

fn put_untagged(buf: &mut BytesMut, body: impl FnOnce(&mut BytesMut)) {
    let start = buf.len();
    buf.put_i32(0);
    body(buf);
    // Nothing that pgusher says comes near 2 GB: what it repeats of a client's was bounded by `max_packet_size`.
    let len = u32::try_from(buf.len() - start).unwrap_or(u32::MAX);
    buf[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

/// Appends a String. A NUL would end it early and let the rest pass for other fields, so NULs are left out.
pub fn put_cstr(buf: &mut BytesMut, text: &[u8]) {
    for part in text.split(|&b| b == 0) {
        buf.put_slice(part);
    }
    buf.put_u8(0);
}

/// AuthenticationOk
pub fn authentication_ok(buf: &mut BytesMut) {
    put_message(buf, backend::AUTHENTICATION, |b| b.put_i32(0));
}

/// AuthenticationSASL, the preferred mechanism first.
pub fn authentication_sasl(buf: &mut BytesMut, mechanisms: &[&str]) {
    put_message(buf, backend::AUTHENTICATION, |b| {
        b.put_i32(10);
        mechanisms.iter().for_each(|name| put_cstr(b, name.as_bytes()));
        b.put_u8(0);
    });
}

/// AuthenticationSASLContinue
pub fn authentication_sasl_continue(buf: &mut BytesMut, data: &[u8]) {
    put_message(buf, backend::AUTHENTICATION, |b| {
        b.put_i32(11);
        b.put_slice(data);
    });
}

/// AuthenticationSASLFinal
pub fn authentication_sasl_final(buf: &mut BytesMut, data: &[u8]) {
    put_message(buf, backend::AUTHENTICATION, |b| {
        b.put_i32(12);
        b.put_slice(data);
    });
}

/// NegotiateProtocolVersion: the newest version there is, and the protocol options that are not known.
pub fn negotiate_protocol_version(buf: &mut BytesMut, newest: Version, unknown_options: &[String]) {
    put_message(buf, backend::NEGOTIATE_PROTOCOL_VERSION, |b| {
        // PostgreSQL sends the whole version, not, as its manual has it, the minor number alone; libpq expects it.
        b.put_u32(newest.0);
        // A startup packet of 10,000 bytes holds fewer.
        b.put_i32(i32::try_from(unknown_options.len()).unwrap_or(i32::MAX));
        unknown_options.iter().for_each(|name| put_cstr(b, name.as_bytes()));
    });
}

/// ParameterStatus
pub fn parameter_status(buf: &mut BytesMut, name: &str, value: &[u8]) {
    put_message(buf, backend::PARAMETER_STATUS, |b| {
        put_cstr(b, name.as_bytes());
        put_cstr(b, value);
    });
}

/// BackendKeyData. A key longer than four bytes is only for clients of protocol 3.2.
pub fn backend_key_data(buf: &mut BytesMut, process_id: i32, secret_key: &[u8]) {
    put_message(buf, backend::BACKEND_KEY_DATA, |b| {
        b.put_i32(process_id);
        b.put_slice(secret_key);
    });
}

/// NotificationResponse; `text` is channel and payload, each with its NUL.
pub fn notification_response(buf: &mut BytesMut, process_id: i32, text: &[u8]) {
    put_message(buf, b'A', |b| {
        b.put_i32(process_id);
        b.extend_from_slice(text);
    });
}

/// Reads a NotificationResponse: process id, channel, and channel with payload as in the message.
///
/// # Errors
/// It is none.
pub fn read_notification(body: &[u8]) -> Result<(u32, &[u8], &[u8]), Malformed> {
    let mut cursor = Cursor::new(body);
    let pid = cursor.i32()?.cast_unsigned();
    let text = &body[4..];
    let channel = cursor.cstr()?;
    cursor.cstr()?;
    cursor.finish()?;
    Ok((pid, channel, text))
}

/// ReadyForQuery with transaction status `I`, `T` or `E`.
pub fn ready_for_query(buf: &mut BytesMut, status: u8) {
    put_message(buf, backend::READY_FOR_QUERY, |b| b.put_u8(status));
}

/// ErrorResponse
pub fn error_response(buf: &mut BytesMut, error: &PgError) {
    put_error(buf, backend::ERROR_RESPONSE, error.severity.as_str(), error);
}

/// NoticeResponse; `severity` is `WARNING`, `NOTICE`, `DEBUG`, `INFO` or `LOG`.
pub fn notice_response(buf: &mut BytesMut, severity: &str, notice: &PgError) {
    put_error(buf, backend::NOTICE_RESPONSE, severity, notice);
}

fn put_error(buf: &mut BytesMut, tag: u8, severity: &str, error: &PgError) {
    put_message(buf, tag, |b| {
        let mut field = |tag: u8, text: &str| {
            b.put_u8(tag);
            put_cstr(b, text.as_bytes());
        };
        field(b'S', severity);
        field(b'V', severity);
        field(b'C', &error.code);
        field(b'M', &error.message);
        error.detail.iter().for_each(|text| field(b'D', text));
        error.hint.iter().for_each(|text| field(b'H', text));
        error.routine.iter().for_each(|routine| field(b'R', routine.as_str()));
        b.put_u8(0);
    });
}

/// CommandComplete
pub fn command_complete(buf: &mut BytesMut, tag: &str) {
    put_message(buf, backend::COMMAND_COMPLETE, |b| put_cstr(b, tag.as_bytes()));
}

/// EmptyQueryResponse
pub fn empty_query_response(buf: &mut BytesMut) {
    put_message(buf, backend::EMPTY_QUERY_RESPONSE, |_| {});
}

/// SSLRequest
pub fn ssl_request(buf: &mut BytesMut) {
    put_untagged(buf, |b| b.put_u32(startup::SSL_REQUEST));
}

/// StartupMessage with its parameters, `user` among them.
pub fn startup_message<'a>(
    buf: &mut BytesMut,
    version: Version,
    parameters: impl IntoIterator<Item = (&'a str, &'a str)>,
) {
    put_untagged(buf, |b| {
        b.put_u32(version.0);
        for (name, value) in parameters {
            put_cstr(b, name.as_bytes());
            put_cstr(b, value.as_bytes());
        }
        b.put_u8(0);
    });
}

/// CancelRequest
pub fn cancel_request(buf: &mut BytesMut, process_id: i32, secret_key: &[u8]) {
    put_untagged(buf, |b| {
        b.put_u32(startup::CANCEL_REQUEST);
        b.put_i32(process_id);
        b.put_slice(secret_key);
    });
}

/// PasswordMessage
pub fn password(buf: &mut BytesMut, password: &str) {
    put_message(buf, frontend::PASSWORD, |b| put_cstr(b, password.as_bytes()));
}

/// SASLInitialResponse
pub fn sasl_initial_response(buf: &mut BytesMut, mechanism: &str, data: &[u8]) {
    put_message(buf, frontend::PASSWORD, |b| {
        put_cstr(b, mechanism.as_bytes());
        // A first message is a few dozen bytes.
        b.put_i32(i32::try_from(data.len()).unwrap_or(i32::MAX));
        b.put_slice(data);
    });
}

/// SASLResponse
pub fn sasl_response(buf: &mut BytesMut, data: &[u8]) {
    put_message(buf, frontend::PASSWORD, |b| b.put_slice(data));
}

/// Query
pub fn query(buf: &mut BytesMut, sql: &str) {
    put_message(buf, frontend::QUERY, |b| put_cstr(b, sql.as_bytes()));
}

/// Query of a text that need not be UTF-8.
pub fn query_bytes(buf: &mut BytesMut, sql: &[u8]) {
    put_message(buf, frontend::QUERY, |b| put_cstr(b, sql));
}

/// Bind without parameters, results as text.
pub fn bind(buf: &mut BytesMut, portal: &[u8], statement: &[u8]) {
    put_message(buf, frontend::BIND, |b| {
        put_cstr(b, portal);
        put_cstr(b, statement);
        b.put_slice(&[0; 6]);
    });
}

/// Execute, to its end.
pub fn execute(buf: &mut BytesMut, portal: &[u8]) {
    put_message(buf, frontend::EXECUTE, |b| {
        put_cstr(b, portal);
        b.put_u32(0);
    });
}

/// Sync
pub fn sync(buf: &mut BytesMut) {
    put_message(buf, frontend::SYNC, |_| {});
}

/// Flush
pub fn flush(buf: &mut BytesMut) {
    put_message(buf, frontend::FLUSH, |_| {});
}

/// Parse. `types` is the rest of the body as the client sent it: the count and the OIDs.
pub fn parse(buf: &mut BytesMut, name: &[u8], sql: &[u8], types: &[u8]) {
    put_message(buf, frontend::PARSE, |b| {
        put_cstr(b, name);
        put_cstr(b, sql);
        b.put_slice(types);
    });
}

/// Parse; `body` is what follows the name: text, NUL, number and OIDs of the parameter types.
pub fn parse_with(buf: &mut BytesMut, name: &[u8], body: &[u8]) {
    put_message(buf, frontend::PARSE, |b| {
        put_cstr(b, name);
        b.put_slice(body);
    });
}

/// Describe; `kind` is `S` (statement) or `P` (portal).
pub fn describe(buf: &mut BytesMut, kind: u8, name: &[u8]) {
    put_message(buf, frontend::DESCRIBE, |b| {
        b.put_u8(kind);
        put_cstr(b, name);
    });
}

/// Close; `kind` is `S` (statement) or `P` (portal).
pub fn close(buf: &mut BytesMut, kind: u8, name: &[u8]) {
    put_message(buf, frontend::CLOSE, |b| {
        b.put_u8(kind);
        put_cstr(b, name);
    });
}

/// Terminate
pub fn terminate(buf: &mut BytesMut) {
    put_message(buf, frontend::TERMINATE, |_| {});
}

#[cfg(test)]
mod tests {
    use super::*;
    use postgres_protocol::message::frontend as theirs;
    use proptest::prelude::*;

    fn made(encode: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
        let mut buf = BytesMut::from(&b"before"[..]);
        encode(&mut buf);
        buf[6..].to_vec()
    }

    #[test]
    fn what_we_say_to_servers_is_what_postgres_protocol_says() {
        type Encode = fn(&mut BytesMut);
        let pairs: [(Vec<u8>, Encode); 11] = [
            (made(|b| query(b, "SELECT 1")), |b| theirs::query("SELECT 1", b).unwrap()),
            (made(|b| parse(b, b"s", b"SELECT $1", &[0, 1, 0, 0, 0, 23])), |b| {
                theirs::parse("s", "SELECT $1", [23], b).unwrap();
            }),
            (made(|b| describe(b, b'S', b"s")), |b| theirs::describe(b'S', "s", b).unwrap()),
            (made(|b| close(b, b'P', b"p")), |b| theirs::close(b'P', "p", b).unwrap()),
            (made(sync), theirs::sync),
            (made(terminate), theirs::terminate),
            (made(ssl_request), theirs::ssl_request),
            (made(|b| cancel_request(b, 7, &9_i32.to_be_bytes())), |b| theirs::cancel_request(7, 9, b)),
            (made(|b| password(b, "secret")), |b| theirs::password_message(b"secret", b).unwrap()),
            (made(|b| sasl_initial_response(b, "X", b"data")), |b| {
                theirs::sasl_initial_response("X", b"data", b).unwrap();
            }),
            (made(|b| sasl_response(b, b"data")), |b| theirs::sasl_response(b"data", b).unwrap()),
        ];
        for (ours, encode) in pairs {
            let mut buf = BytesMut::new();
            encode(&mut buf);
            assert_eq!(ours, buf);
        }
        let parameters = [("user", "a"), ("search_path", "\"a\"")];
        let ours = made(|b| startup_message(b, Version::V3_0, parameters));
        let startup::Startup::Session(read) = startup::parse(&ours).unwrap() else { panic!() };
        assert_eq!(read.parameters, parameters.map(|(n, v)| (n.to_owned(), v.to_owned())));
    }

    #[test]
    fn what_we_say_to_clients_is_read_by_postgres_protocol() {
        use postgres_protocol::message::backend::Message;
        let mut buf = BytesMut::new();
        authentication_ok(&mut buf);
        authentication_sasl(&mut buf, &["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"]);
        authentication_sasl_continue(&mut buf, b"abc");
        authentication_sasl_final(&mut buf, b"def");
        parameter_status(&mut buf, "TimeZone", b"UTC");
        backend_key_data(&mut buf, 5, &6_i32.to_be_bytes());
        ready_for_query(&mut buf, b'T');
        command_complete(&mut buf, "SET");
        empty_query_response(&mut buf);
        error_response(&mut buf, &PgError::fatal("28000", "no").detail("d\0D").hint("h"));
        notice_response(&mut buf, "WARNING", &PgError::error("01000", "careful"));
        let mut next = || Message::parse(&mut buf).unwrap().unwrap();
        assert!(matches!(next(), Message::AuthenticationOk));
        assert!(matches!(next(), Message::AuthenticationSasl(_)));
        assert!(matches!(next(), Message::AuthenticationSaslContinue(m) if m.data() == b"abc"));
        assert!(matches!(next(), Message::AuthenticationSaslFinal(m) if m.data() == b"def"));
        assert!(matches!(next(), Message::ParameterStatus(m) if m.name().unwrap() == "TimeZone"));
        assert!(matches!(next(), Message::BackendKeyData(m) if m.process_id() == 5 && m.secret_key() == 6));
        assert!(matches!(next(), Message::ReadyForQuery(m) if m.status() == b'T'));
        assert!(matches!(next(), Message::CommandComplete(m) if m.tag().unwrap() == "SET"));
        assert!(matches!(next(), Message::EmptyQueryResponse));
        assert!(matches!(next(), Message::ErrorResponse(_)));
        assert!(matches!(next(), Message::NoticeResponse(_)));
        let error = made(|b| error_response(b, &PgError::fatal("28000", "no").detail("d\0D").hint("h")));
        assert_eq!(error, b"E\0\0\0\x25SFATAL\0VFATAL\0C28000\0Mno\0DdD\0Hh\0\0");
    }

    #[test]
    fn negotiation_names_the_version_whole() {
        let bytes = made(|b| negotiate_protocol_version(b, Version::V3_2, &["_pq_.x".into()]));
        assert_eq!(bytes, b"v\0\0\0\x13\0\x03\0\x02\0\0\0\x01_pq_.x\0");
    }

    #[test]
    fn errors_survive_the_wire() {
        let error = PgError::fatal("53300", "sorry, too many").detail("d").hint("h");
        let bytes = made(|b| error_response(b, &error));
        let fields = ErrorFields::read(&bytes[5..]).unwrap();
        assert!(fields.is_fatal());
        assert_eq!(PgError::from(fields), error);
        let with_others = b"SERREUR\0VERROR\0C42P01\0Mm\0Fparse.c\0L1\0Rr\0\0";
        let fields = ErrorFields::read(with_others).unwrap();
        assert_eq!((&*fields.severity, &*fields.code, &*fields.message), ("ERROR", "42P01", "m"));
        for bad in [&b""[..], b"S", b"SERROR", b"SERROR\0", b"\0x"] {
            assert!(ErrorFields::read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn bodies_are_read_to_their_end_and_not_beyond() {
        let mut cursor = Cursor::new(b"\0\x01\0\0\0\x02ab\0\x07xyz");
        assert_eq!((cursor.i16(), cursor.i32(), cursor.str()), (Ok(1), Ok(2), Ok("ab")));
        assert_eq!((cursor.u8(), cursor.bytes(4)), (Ok(7), Err(Malformed::Short)));
        assert_eq!(cursor.finish(), Err(Malformed::Format));
        assert_eq!((cursor.cstr(), cursor.i32()), (Err(Malformed::String), Err(Malformed::Short)));
        assert_eq!((cursor.rest(), cursor.finish()), (&b"xyz"[..], Ok(())));
        let read = SaslInitialResponse::read(b"SCRAM-SHA-256\0\0\0\0\x03n,,").unwrap();
        assert_eq!((read.mechanism, read.data), ("SCRAM-SHA-256", Some(&b"n,,"[..])));
        assert_eq!(SaslInitialResponse::read(b"X\0\xff\xff\xff\xff").unwrap().data, None);
        for bad in [&b"X\0\xff\xff\xff\xfe"[..], b"X\0\0\0\0\x01", b"X\0\0\0\0\0x", b"X", b"X\0\x7f\xff\xff\xff"] {
            assert!(SaslInitialResponse::read(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn requests_of_servers() {
        for (body, expected) in [
            (&b"\0\0\0\0"[..], Some(Authentication::Ok)),
            (b"\0\0\0\x03", Some(Authentication::CleartextPassword)),
            (b"\0\0\0\x05abcd", Some(Authentication::Md5Password(*b"abcd"))),
            (b"\0\0\0\x0aA\0B\0\0", Some(Authentication::Sasl(vec!["A", "B"]))),
            (b"\0\0\0\x0bx", Some(Authentication::SaslContinue(b"x"))),
            (b"\0\0\0\x0cx", Some(Authentication::SaslFinal(b"x"))),
            (b"\0\0\0\x07x", Some(Authentication::Other(7))),
            (b"\0\0\0\0x", None),
            (b"\0\0\0\x05abc", None),
            (b"\0\0\0\x0aA\0", None),
            (b"\0\0", None),
        ] {
            assert_eq!(Authentication::read(body).ok(), expected, "{body:?}");
        }
        assert_eq!(read_parameter_status(b"a\0b\0"), Ok(("a", &b"b"[..])));
        assert_eq!(read_backend_key_data(b"\0\0\0\x01key!"), Ok((1, &b"key!"[..])));
        assert!(read_parameter_status(b"a\0b").is_err() && read_backend_key_data(b"\0\0\0\x01key").is_err());
    }

    proptest! {
        #[test]
        fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..120)) {
            let _ = SaslInitialResponse::read(&body);
            let _ = Authentication::read(&body);
            let _ = ErrorFields::read(&body);
            let _ = read_parameter_status(&body);
            let _ = read_backend_key_data(&body);
        }

        #[test]
        fn a_string_cannot_smuggle_a_field(text in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut buf = BytesMut::new();
            put_cstr(&mut buf, &text);
            let mut cursor = Cursor::new(&buf);
            prop_assert!(cursor.cstr().is_ok() && cursor.finish().is_ok());
        }
    }
}
