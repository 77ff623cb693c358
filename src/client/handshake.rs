//! From a client's first byte to its StartupMessage or CancelRequest: a state machine fed with bytes. No I/O.
//!
//! ```text
//!            SSLRequest → 'N' ⟲   GSSENCRequest → 'N' ⟲
//!  plain ──┬─ SSLRequest → 'S' ──┬─→ encrypted ──┬─→ Session
//!          ├─ 0x16 (direct TLS) ─┘               └─→ Cancel
//!          └─→ Session (unless TLS is required), Cancel
//! ```
//!
//! Invariants: no byte that arrived in plaintext survives an upgrade; at most [`MAX_STARTUP_BYTES`] are taken before
//! authentication, and none is waited for that would exceed them.

use bytes::{Buf as _, BytesMut};

use crate::error::{PgError, sqlstate};
use crate::wire::MAX_STARTUP_BYTES;
use crate::wire::startup::{self, CancelRequest, Startup, StartupMessage};

/// The protocol that a client names by ALPN ([SSL session encryption, direct][manual]).
///
/// [manual]: https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL
pub const ALPN: &[u8] = b"postgresql";

/// Whether clients can or have to use TLS. CancelRequests never have to: libpq's `PQcancel` sends them in the clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsPolicy {
    /// There is no certificate, or the client came over a Unix socket.
    Unavailable,
    /// The client may choose.
    Available,
    /// A session without is refused.
    Required,
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Read more.
    NeedMore,
    /// Write this byte (`N`) and call [`Handshake::feed`] again.
    Reply(u8),
    /// Write `reply` if there is one, run the TLS handshake, then call [`Handshake::tls_established`].
    StartTls {
        /// `S`, in answer to an SSLRequest: the input is empty. With direct TLS nothing is written, and the input holds
        /// the first bytes of the TLS handshake.
        reply: Option<u8>,
    },
    /// The client wants a session. The packet has been taken from the input; what is left belongs to authentication.
    Session(StartupMessage),
    /// The client wants a query of another connection cancelled, and no answer.
    Cancel(CancelRequest),
    /// The client has changed its mind: close without a word.
    Leave,
    /// Tell the client and close.
    Refuse(PgError),
}

/// The beginning of a Terminate message, and of no startup packet. PostgreSQL answers neither this nor any other length
/// that is none.
const TERMINATE: &[u8] = b"X\0\0\0";

/// How far TLS has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tls {
    Plain,
    /// Under way.
    Starting {
        direct: bool,
    },
    Established,
}

/// The state of one client's handshake.
#[derive(Debug)]
pub struct Handshake {
    policy: TlsPolicy,
    tls: Tls,
    taken: usize,
}

impl Handshake {
    /// A client that has sent nothing.
    pub fn new(policy: TlsPolicy) -> Self {
        Self { policy, tls: Tls::Plain, taken: 0 }
    }

    /// Whether the connection is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.tls == Tls::Established
    }

    /// Bytes that may still arrive before authentication: what to bound the next read by.
    pub fn budget(&self) -> usize {
        MAX_STARTUP_BYTES - self.taken
    }

    /// Looks at everything that has arrived and takes at most one packet from it.
    pub fn feed(&mut self, input: &mut BytesMut) -> Step {
        self.step(input).unwrap_or_else(Step::Refuse)
    }

    fn step(&mut self, input: &mut BytesMut) -> Result<Step, PgError> {
        if matches!(self.tls, Tls::Starting { .. }) {
            return Err(violation("received unencrypted data during TLS negotiation"));
        }
        // No length of a startup packet begins with 0x16, a TLS handshake record does.
        if self.tls == Tls::Plain && self.taken == 0 && input.first() == Some(&0x16) {
            if self.policy == TlsPolicy::Unavailable {
                return Err(violation("received direct SSL connection request, but TLS is not available"));
            }
            self.tls = Tls::Starting { direct: true };
            return Ok(Step::StartTls { reply: None });
        }
        if input.starts_with(TERMINATE) {
            return Ok(Step::Leave);
        }
        let Some(len) = startup::packet_len(input)? else { return Ok(Step::NeedMore) };
        if len > self.budget() {
            return Err(violation("too many bytes before authentication")
                .detail(format!("A client may send {MAX_STARTUP_BYTES} bytes before it is authenticated.")));
        }
        if input.len() < len {
            return Ok(Step::NeedMore);
        }
        let packet = startup::parse(&input[..len])?;
        input.advance(len);
        self.taken += len;
        match packet {
            Startup::Ssl => self.ssl_request(input),
            Startup::GssEnc => self.gssenc_request(input),
            Startup::Cancel(cancel) => Ok(Step::Cancel(cancel)),
            Startup::Session(_) if self.policy == TlsPolicy::Required && self.tls == Tls::Plain => {
                Err(PgError::fatal(sqlstate::INVALID_AUTHORIZATION, "SSL required")
                    .hint("Connect with sslmode=require."))
            }
            Startup::Session(message) => Ok(Step::Session(message)),
        }
    }

    fn ssl_request(&mut self, input: &BytesMut) -> Result<Step, PgError> {
        self.refuse_inside_tls(startup::SSL_REQUEST)?;
        refuse_early_data(input, "SSL")?;
        if self.policy == TlsPolicy::Unavailable {
            return Ok(Step::Reply(b'N'));
        }
        self.tls = Tls::Starting { direct: false };
        Ok(Step::StartTls { reply: Some(b'S') })
    }

    fn gssenc_request(&self, input: &BytesMut) -> Result<Step, PgError> {
        self.refuse_inside_tls(startup::GSSENC_REQUEST)?;
        refuse_early_data(input, "GSSAPI encryption")?;
        Ok(Step::Reply(b'N'))
    }

    /// To PostgreSQL a second layer of encryption is just a protocol version that does not exist.
    fn refuse_inside_tls(&self, code: u32) -> Result<(), PgError> {
        if self.is_encrypted() { Err(startup::unsupported_protocol(crate::wire::Version(code))) } else { Ok(()) }
    }

    /// The TLS handshake is over; `alpn` is the protocol it settled on.
    ///
    /// # Errors
    /// 08P01 when the client did not say that it means PostgreSQL: always with direct TLS, and when it named another
    /// protocol otherwise. A browser talked into connecting here would not know (the ALPACA attack).
    pub fn tls_established(&mut self, alpn: Option<&[u8]>) -> Result<(), PgError> {
        let direct = self.tls == Tls::Starting { direct: true };
        self.tls = Tls::Established;
        match alpn {
            Some(ALPN) => Ok(()),
            None if !direct => Ok(()),
            None => {
                Err(violation("received direct SSL connection request without ALPN protocol negotiation extension"))
            }
            Some(_) => Err(violation("received SSL connection request with unexpected ALPN protocol")),
        }
    }
}

/// What came behind the request in plaintext may have been put there by somebody in the middle, to be taken for the
/// client's own once encryption is up.
fn refuse_early_data(input: &BytesMut, request: &str) -> Result<(), PgError> {
    if input.is_empty() {
        return Ok(());
    }
    Err(violation(format!("received unencrypted data after {request} request"))
        .detail("This could be either a client-software bug or evidence of an attempted man-in-the-middle attack."))
}

fn violation(message: impl Into<String>) -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SSL: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x2f";
    const GSS: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x30";
    const CANCEL: &[u8] = b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x05abcd";
    const SESSION: &[u8] = b"\0\0\0\x10\0\x03\0\0user\0a\0\0";

    /// Sends packets one after the other, each in pieces of `piece` bytes, as a client does that waits for answers.
    fn talk(policy: TlsPolicy, packets: &[&[u8]], piece: usize) -> String {
        let mut handshake = Handshake::new(policy);
        let mut input = BytesMut::new();
        let mut story = String::new();
        for packet in packets {
            for bytes in packet.chunks(piece) {
                input.extend_from_slice(bytes);
                match handshake.feed(&mut input) {
                    Step::NeedMore => {}
                    Step::Reply(byte) => story.push(byte as char),
                    Step::StartTls { reply } => {
                        story += reply.map_or("direct ", |_| "S ");
                        input.clear();
                        handshake.tls_established(reply.map_or(Some(ALPN), |_| None)).unwrap();
                        break;
                    }
                    Step::Session(message) => story += message.user(),
                    Step::Cancel(cancel) => story += &format!("cancel {}", cancel.process_id),
                    Step::Leave => return story + "left",
                    Step::Refuse(error) => return story + &error.code,
                }
            }
        }
        story
    }

    #[test]
    fn requests_come_in_any_order_and_number() {
        use TlsPolicy::{Available, Required, Unavailable};
        for (policy, packets, expected) in [
            (Unavailable, &[SESSION][..], "a"),
            (Unavailable, &[SSL, SESSION], "Na"),
            (Unavailable, &[GSS, SSL, GSS, SSL, SSL, SESSION], "NNNNNa"),
            (Unavailable, &[SSL, CANCEL], "Ncancel 5"),
            (Unavailable, &[b"\x16"], "08P01"),
            (Unavailable, &[b"X\0\0\0\x04"], "left"),
            (Unavailable, &[SSL, b"X\0\0\0\x04"], "Nleft"),
            (Required, &[SSL, b"X\0\0\0\x04"], "S left"),
            (Available, &[b"Y\0\0\0\x04"], "08P01"),
            (Available, &[SESSION], "a"),
            (Available, &[SSL, SESSION], "S a"),
            (Available, &[GSS, SSL, SESSION], "NS a"),
            (Available, &[SSL, CANCEL], "S cancel 5"),
            (Available, &[SSL, SSL], "S 0A000"),
            (Available, &[SSL, GSS], "S 0A000"),
            (Available, &[SSL, b"\x16\x03\x01\0"], "S 08P01"),
            (Available, &[GSS, b"\x16\x03\x01\0"], "N08P01"),
            (Available, &[b"\x16\x03\x01", SESSION], "direct a"),
            (Available, &[b"\x16", SSL], "direct 0A000"),
            (Required, &[SESSION], "28000"),
            (Required, &[GSS, SESSION], "N28000"),
            (Required, &[SSL, SESSION], "S a"),
            (Required, &[CANCEL], "cancel 5"),
        ] {
            for piece in [1, 3, 10_000] {
                assert_eq!(talk(policy, packets, piece), expected, "{policy:?} {packets:?} {piece}");
            }
        }
    }

    #[test]
    fn no_plaintext_byte_survives_an_upgrade() {
        for (policy, request) in
            [(TlsPolicy::Available, SSL), (TlsPolicy::Available, GSS), (TlsPolicy::Unavailable, SSL)]
        {
            for behind in [&b"\x16"[..], SESSION, b"\0"] {
                let mut input = BytesMut::from(&[request, behind].concat()[..]);
                let Step::Refuse(error) = Handshake::new(policy).feed(&mut input) else { panic!() };
                assert!(error.message.starts_with("received unencrypted data after"), "{error}");
            }
        }
        let mut handshake = Handshake::new(TlsPolicy::Available);
        assert_eq!(handshake.feed(&mut SSL.into()), Step::StartTls { reply: Some(b'S') });
        assert!(matches!(handshake.feed(&mut SESSION.into()), Step::Refuse(_)));
    }

    #[test]
    fn direct_tls_says_that_it_means_postgresql() {
        for (first, alpn, good) in [
            (&b"\x16"[..], Some(ALPN), true),
            (b"\x16", None, false),
            (b"\x16", Some(b"http/1.1"), false),
            (SSL, None, true),
            (SSL, Some(ALPN), true),
            (SSL, Some(b"h2"), false),
        ] {
            let mut handshake = Handshake::new(TlsPolicy::Available);
            assert!(matches!(handshake.feed(&mut first.into()), Step::StartTls { .. }));
            assert_eq!(handshake.tls_established(alpn).is_ok(), good, "{alpn:?}");
        }
    }

    #[test]
    fn the_bytes_before_authentication_are_bounded() {
        let mut handshake = Handshake::new(TlsPolicy::Unavailable);
        for _ in 0..1_250 {
            assert_eq!(handshake.feed(&mut SSL.into()), Step::Reply(b'N'));
        }
        assert_eq!(handshake.budget(), 0);
        assert!(matches!(handshake.feed(&mut SSL.into()), Step::Refuse(_)));
        // A length that would not fit is refused at once, not waited for.
        let mut handshake = Handshake::new(TlsPolicy::Unavailable);
        handshake.feed(&mut SSL.into());
        assert!(matches!(handshake.feed(&mut (&10_000_u32.to_be_bytes()[..]).into()), Step::Refuse(_)));
    }

    #[test]
    fn bytes_behind_the_startup_packet_are_left() {
        let mut input = BytesMut::from(&[SESSION, b"p\0\0"].concat()[..]);
        assert!(matches!(Handshake::new(TlsPolicy::Unavailable).feed(&mut input), Step::Session(_)));
        assert_eq!(&input[..], b"p\0\0");
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_splits_do_not_matter(
            bytes in prop::collection::vec(any::<u8>(), 0..64), valid in any::<bool>(), piece in 1_usize..9,
        ) {
            let mut packet = SESSION.to_vec();
            if !valid {
                let len = packet.len().min(bytes.len());
                packet[8..len.max(8)].copy_from_slice(&bytes[8.min(len)..len]);
            }
            for policy in [TlsPolicy::Unavailable, TlsPolicy::Available, TlsPolicy::Required] {
                prop_assert_eq!(talk(policy, &[&packet], piece), talk(policy, &[&packet], 10_000));
                talk(policy, &[&bytes], piece);
                talk(policy, &[SSL, &bytes], piece);
            }
        }
    }
}
