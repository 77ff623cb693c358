//! The packets that have no tag: SSLRequest, GSSENCRequest, CancelRequest, StartupMessage, and what is in `options`.
//!
//! [`packet_len`] says where a packet ends, [`parse`] reads exactly that much.

use super::{CANCEL_KEY_LEN, MAX_STARTUP_BYTES, Version};
use crate::error::{PgError, sqlstate};

/// A packet that arrives before authentication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Startup {
    /// The client asks for TLS.
    Ssl,
    /// The client asks for GSSAPI encryption.
    GssEnc,
    /// The client asks to cancel a query of another connection.
    Cancel(CancelRequest),
    /// The client wants a session.
    Session(StartupMessage),
}

/// A CancelRequest. `Debug` does not show the key.
#[derive(Clone, PartialEq, Eq)]
pub struct CancelRequest {
    /// The process id that BackendKeyData named.
    pub process_id: i32,
    /// The key that BackendKeyData named: four bytes in protocol 3.0, up to 256 in 3.2.
    pub secret_key: Box<[u8]>,
}

impl std::fmt::Debug for CancelRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelRequest").field("process_id", &self.process_id).finish_non_exhaustive()
    }
}

/// A StartupMessage of protocol 3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartupMessage {
    /// The version that the client asked for; its major number is 3.
    pub requested: Version,
    /// Parameters in the order sent, names spelled as sent; `user` is there exactly once and not empty.
    pub parameters: Vec<(String, String)>,
    /// Names of protocol options (`_pq_.…`), in the order sent. None is known to us.
    pub protocol_options: Vec<String>,
}

impl StartupMessage {
    /// The value of a parameter that the protocol itself names (`user`, `database`, `options`, `replication`): these
    /// are compared exactly, as in PostgreSQL.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The user name; not empty.
    pub fn user(&self) -> &str {
        self.get("user").unwrap_or_default()
    }

    /// The database name, if the client gave one.
    pub fn database(&self) -> Option<&str> {
        self.get("database").filter(|name| !name.is_empty())
    }

    /// The version in force from here on.
    pub fn version(&self) -> Version {
        self.requested.min(Version::V3_2)
    }

    /// Whether NegotiateProtocolVersion has to say that the client asked for more than there is.
    pub fn needs_negotiation(&self) -> bool {
        self.requested > Version::V3_2 || !self.protocol_options.is_empty()
    }
}

/// How long the packet at the front of `input` is, its length word included; `None` if not even that has arrived.
///
/// # Errors
/// 08P01 for a length that no packet has.
pub fn packet_len(input: &[u8]) -> Result<Option<usize>, PgError> {
    let Some(word) = input.first_chunk::<4>() else { return Ok(None) };
    match usize::try_from(u32::from_be_bytes(*word)) {
        Ok(len @ 8..=MAX_STARTUP_BYTES) => Ok(Some(len)),
        _ => Err(violation("invalid length of startup packet")),
    }
}

/// Reads one whole packet, as long as [`packet_len`] said.
///
/// # Errors
/// What PostgreSQL says about it: 08P01, 28000 (no user name) or 0A000 (another protocol).
pub fn parse(packet: &[u8]) -> Result<Startup, PgError> {
    let short = || violation("invalid length of startup packet");
    if packet_len(packet)? != Some(packet.len()) {
        return Err(short());
    }
    let code = packet.get(4..).and_then(|rest| rest.first_chunk::<4>()).ok_or_else(short)?;
    let (code, body) = (u32::from_be_bytes(*code), &packet[8..]);
    match code {
        SSL_REQUEST if body.is_empty() => Ok(Startup::Ssl),
        GSSENC_REQUEST if body.is_empty() => Ok(Startup::GssEnc),
        SSL_REQUEST | GSSENC_REQUEST => Err(violation("invalid length of encryption request")),
        CANCEL_REQUEST => parse_cancel(body).map(Startup::Cancel),
        code if Version(code).major() == 3 => parse_session(Version(code), body).map(Startup::Session),
        code => Err(unsupported_protocol(Version(code))),
    }
}

/// PostgreSQL's answer to a protocol that it does not speak.
pub fn unsupported_protocol(version: Version) -> PgError {
    PgError::fatal(
        sqlstate::FEATURE_NOT_SUPPORTED,
        format!("unsupported frontend protocol {version}: server supports {} to {}", Version::V3_0, Version::V3_2),
    )
}

fn parse_cancel(body: &[u8]) -> Result<CancelRequest, PgError> {
    match body.split_first_chunk::<4>() {
        Some((process_id, key)) if CANCEL_KEY_LEN.contains(&key.len()) => {
            Ok(CancelRequest { process_id: i32::from_be_bytes(*process_id), secret_key: key.into() })
        }
        _ => Err(violation("invalid length of query cancel packet")),
    }
}

/// The body is `name 0 value 0 … 0`.
fn parse_session(requested: Version, mut body: &[u8]) -> Result<StartupMessage, PgError> {
    let mut message = StartupMessage { requested, parameters: Vec::new(), protocol_options: Vec::new() };
    loop {
        let name = take_cstr(&mut body)?;
        if name.is_empty() {
            break;
        }
        let value = take_cstr(&mut body)?;
        let name = String::from_utf8(name.to_vec()).map_err(|_| not_utf8("a parameter name"))?;
        if name.starts_with("_pq_.") {
            message.protocol_options.push(name);
            continue;
        }
        if ONCE.contains(&name.as_str()) && message.get(&name).is_some() {
            return Err(violation(format!("parameter \"{name}\" appears twice in startup packet")));
        }
        let value = match std::str::from_utf8(value) {
            Ok(value) => value.to_owned(),
            // PostgreSQL replaces what is not ASCII in it anyway.
            Err(_) if name.eq_ignore_ascii_case("application_name") => String::from_utf8_lossy(value).into_owned(),
            Err(_) => return Err(not_utf8(&format!("the value of parameter \"{}\"", excerpt(&name)))),
        };
        message.parameters.push((name, value));
    }
    if !body.is_empty() {
        return Err(bad_layout());
    }
    if message.user().is_empty() {
        return Err(PgError::fatal(
            sqlstate::INVALID_AUTHORIZATION,
            "no PostgreSQL user name specified in startup packet",
        ));
    }
    Ok(message)
}

fn take_cstr<'a>(body: &mut &'a [u8]) -> Result<&'a [u8], PgError> {
    let end = body.iter().position(|&b| b == 0).ok_or_else(bad_layout)?;
    let (text, rest) = (&body[..end], &body[end + 1..]);
    *body = rest;
    Ok(text)
}

/// Reads the `options` parameter as PostgreSQL does (`pg_split_opts`, then the switches `-c` and `--`): a list of
/// settings in the order given, `-` in names turned into `_`.
///
/// # Errors
/// 42601 for every other switch or word. PostgreSQL has some more (`-B`, `-e`, `-S` …), all of which are spellings of
/// settings; they are refused rather than guessed at.
pub fn parse_options(options: &str) -> Result<Vec<(String, String)>, PgError> {
    let mut settings = Vec::new();
    let mut words = split_options(options).into_iter();
    while let Some(word) = words.next() {
        let (switch, setting) = if word == "-c" {
            ("-c ", words.next().ok_or_else(|| bad_option("-c requires a value"))?)
        } else if let Some(rest) = word.strip_prefix("-c") {
            ("-c ", rest.to_owned())
        } else if let Some(rest) = word.strip_prefix("--").filter(|rest| !rest.is_empty()) {
            ("--", rest.to_owned())
        } else {
            let word = excerpt(&word);
            return Err(bad_option(format!("invalid command-line argument for server process: {word}")));
        };
        match setting.split_once('=') {
            Some((name, value)) if !name.is_empty() => settings.push((name.replace('-', "_"), value.to_owned())),
            _ => return Err(bad_option(format!("{switch}{} requires a name and a value", excerpt(&setting)))),
        }
    }
    Ok(settings)
}

/// Words are separated by white space; a backslash takes away the meaning of the next character.
fn split_options(options: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut escaped = false;
    for c in options.chars() {
        let space = matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c');
        if escaped {
            word.get_or_insert_default().push(c);
            escaped = false;
        } else if c == '\\' {
            word.get_or_insert_default();
            escaped = true;
        } else if space {
            words.extend(word.take());
        } else {
            word.get_or_insert_default().push(c);
        }
    }
    words.extend(word);
    words
}

/// As much of a client's text as an error message repeats.
pub(crate) fn excerpt(text: &str) -> String {
    const MOST: usize = 63;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn violation(message: impl Into<String>) -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, message)
}

fn bad_layout() -> PgError {
    violation("invalid startup packet layout: expected terminator as last byte")
}

fn not_utf8(what: &str) -> PgError {
    violation(format!("invalid startup packet: {what} is not UTF-8"))
}

fn bad_option(message: impl Into<String>) -> PgError {
    PgError::fatal(sqlstate::SYNTAX_ERROR, message)
        .hint("Startup option \"options\" takes -c name=value and --name=value.")
}

/// `1234.5679`
pub(crate) const SSL_REQUEST: u32 = 0x04d2_162f;
/// `1234.5680`
pub(crate) const GSSENC_REQUEST: u32 = 0x04d2_1630;
/// `1234.5678`
pub(crate) const CANCEL_REQUEST: u32 = 0x04d2_162e;

/// Parameters that say who and where. PostgreSQL lets the last one win; two of them in one packet are more likely an
/// attempt to be read differently by two readers.
const ONCE: [&str; 4] = ["user", "database", "options", "replication"];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(super) fn packet(code: u32, body: &[u8]) -> Vec<u8> {
        let mut packet = u32::try_from(body.len() + 8).unwrap().to_be_bytes().to_vec();
        packet.extend(code.to_be_bytes());
        packet.extend(body);
        packet
    }

    fn session(version: u32, body: &[u8]) -> Result<StartupMessage, PgError> {
        match parse(&packet(version, body))? {
            Startup::Session(message) => Ok(message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn parameters_keep_order_and_spelling() {
        let body = b"user\0app\0DateStyle\0ISO, MDY\0database\0\0_pq_.x\0on\0some.var\0\0application_name\0\xff\0\0";
        let message = session(0x0003_0000, body).unwrap();
        let names: Vec<&str> = message.parameters.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["user", "DateStyle", "database", "some.var", "application_name"]);
        assert_eq!((message.user(), message.database()), ("app", None));
        assert_eq!(message.protocol_options, ["_pq_.x"]);
        assert!(message.needs_negotiation());
    }

    #[test]
    fn versions() {
        for (asked, got, negotiate) in [
            (0x0003_0000, Version::V3_0, false),
            (0x0003_0001, Version(0x0003_0001), false),
            (0x0003_0002, Version::V3_2, false),
            (0x0003_0003, Version::V3_2, true),
            (0x0003_270f, Version::V3_2, true),
        ] {
            let message = session(asked, b"user\0a\0\0").unwrap();
            assert_eq!((message.version(), message.needs_negotiation()), (got, negotiate), "{asked:x}");
        }
        for (asked, name) in [(0x0002_0000, "2.0"), (0x0004_0000, "4.0"), (0, "0.0"), (u32::MAX, "65535.65535")] {
            let error = parse(&packet(asked, b"user\0a\0\0")).unwrap_err();
            assert_eq!(error.code, "0A000");
            assert_eq!(error.message, format!("unsupported frontend protocol {name}: server supports 3.0 to 3.2"));
        }
    }

    #[test]
    fn broken_packets_are_named() {
        for (body, code, message) in [
            (&b""[..], "08P01", "terminator"),
            (b"\0", "28000", "no PostgreSQL user name"),
            (b"database\0x\0\0", "28000", "no PostgreSQL user name"),
            (b"user\0\0\0", "28000", "no PostgreSQL user name"),
            (b"USER\0a\0\0", "28000", "no PostgreSQL user name"),
            (b"user\0a\0", "08P01", "terminator"),
            (b"user\0a", "08P01", "terminator"),
            (b"user\0", "08P01", "terminator"),
            (b"user\0a\0\0x", "08P01", "terminator"),
            (b"user\0a\0user\0b\0\0", "08P01", "twice"),
            (b"user\0a\0options\0\0options\0\0\0", "08P01", "twice"),
            (b"user\0\xff\0\0", "08P01", "not UTF-8"),
            (b"\xff\0a\0\0", "08P01", "not UTF-8"),
        ] {
            let error = session(0x0003_0000, body).unwrap_err();
            assert_eq!(error.code, code, "{body:?}");
            assert!(error.message.contains(message), "{body:?}: {}", error.message);
        }
    }

    #[test]
    fn lengths_are_checked_before_anything_else() {
        assert_eq!(packet_len(&[0, 0, 0]).unwrap(), None);
        for len in [8_u32, 10_000] {
            assert_eq!(packet_len(&len.to_be_bytes()).unwrap(), Some(len as usize));
        }
        for len in [0_u32, 4, 7, 10_001, 0x4745_5420, u32::MAX] {
            assert_eq!(packet_len(&len.to_be_bytes()).unwrap_err().code, "08P01", "{len}");
        }
    }

    #[test]
    fn cancel_keys_have_4_to_256_bytes() {
        for (len, good) in [(0, false), (3, false), (4, true), (32, true), (256, true), (257, false)] {
            let body = [&7_i32.to_be_bytes()[..], &vec![1; len]].concat();
            match parse(&packet(CANCEL_REQUEST, &body)) {
                Ok(Startup::Cancel(cancel)) => {
                    assert!(good, "{len}");
                    assert_eq!((cancel.process_id, cancel.secret_key.len()), (7, len));
                    assert!(!format!("{cancel:?}").contains("key: "));
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) => assert!(!good && error.code == "08P01", "{len}"),
            }
        }
        assert_eq!(parse(&packet(SSL_REQUEST, b"")).unwrap(), Startup::Ssl);
        assert_eq!(parse(&packet(GSSENC_REQUEST, b"")).unwrap(), Startup::GssEnc);
        assert!(parse(&packet(SSL_REQUEST, b"x")).is_err());
    }

    #[test]
    fn options_are_read_as_postgresql_reads_them() {
        for (options, expected) in [
            ("", &[][..]),
            ("  \t", &[]),
            ("-c a=b", &[("a", "b")]),
            ("-ca=b", &[("a", "b")]),
            ("-c\ta=b\n--c-d=e=f", &[("a", "b"), ("c_d", "e=f")]),
            ("-c DateStyle=ISO,\\ MDY", &[("DateStyle", "ISO, MDY")]),
            ("-c a=\\\\x", &[("a", "\\x")]),
            ("-c a=", &[("a", "")]),
            ("--a-b.c=ü", &[("a_b.c", "ü")]),
            ("-c a=1 -c a=2", &[("a", "1"), ("a", "2")]),
            ("-c a=b\\", &[("a", "b")]),
        ] {
            let got = parse_options(options).unwrap();
            let got: Vec<(&str, &str)> = got.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            assert_eq!(got, expected, "{options:?}");
        }
        for options in ["-c", "-c a", "-c=", "-c =b", "--", "--a", "--=b", "a=b", "-d 5", "-e", "\\", "-", "-C a=b"] {
            assert_eq!(parse_options(options).unwrap_err().code, "42601", "{options:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), code in prop_oneof![
            Just(0x0003_0000), Just(SSL_REQUEST), Just(CANCEL_REQUEST), any::<u32>()]) {
            let _ = parse(&bytes);
            let _ = parse(&packet(code, &bytes));
            let _ = parse_options(&String::from_utf8_lossy(&bytes));
        }

        #[test]
        fn options_survive_escaping(settings in prop::collection::vec(("[a-z_]{1,8}", "[ -~\t]{0,12}"), 0..5)) {
            let escape = |v: &str| v.chars().fold(String::new(), |s, c| s + "\\" + &c.to_string());
            let text: String = settings.iter().map(|(n, v)| format!(" -c {n}={}", escape(v))).collect();
            prop_assert_eq!(parse_options(&text).unwrap(), settings);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1_000))]
        #[test]
        fn mutated_startups_end_in_a_message_or_an_error(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut in 0_usize..80,
        ) {
            let mut bytes = packet(0x0003_0000, b"user\0app.client_001\0database\0client_001\0options\0-c a=b\0\0");
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(bytes.len() - cut.saturating_sub(40));
            match parse(&bytes) {
                Ok(Startup::Session(message)) => prop_assert!(!message.user().is_empty()),
                Ok(_) => {}
                Err(error) => prop_assert!(["08P01", "28000", "0A000"].contains(&error.code.as_ref())),
            }
        }
    }
}
