//! The server's side of SCRAM-SHA-256 and SCRAM-SHA-256-PLUS ([RFC 5802][rfc5802], [RFC 7677][rfc7677]), as PostgreSQL
//! speaks it. No I/O; the nonce is given.
//!
//! ```text
//! client                                 Exchange
//!   SASLInitialResponse (client-first) →  initial  → Continue(server-first)
//!   SASLResponse        (client-final) →  respond  → Done(server-final) or Fail
//! ```
//!
//! Invariant: a login that does not exist looks exactly like a wrong password. It has a *mock* verifier, made from its
//! name and a secret, so that its salt is the same each time; the exchange does the same work and fails at the end.
//!
//! [rfc5802]: https://www.rfc-editor.org/rfc/rfc5802
//! [rfc7677]: https://www.rfc-editor.org/rfc/rfc7677

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};

use crate::error::{PgError, sqlstate};
use crate::tenant::credential::{ITERATIONS, Verifier, hmac};
use crate::wire::message::SaslInitialResponse;
use crate::wire::startup::excerpt;

/// The mechanism without channel binding.
pub const SCRAM_SHA_256: &str = "SCRAM-SHA-256";
/// The mechanism with channel binding.
pub const SCRAM_SHA_256_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// Key of mock verifiers. Every proxy of an installation should have the same one, and have it again after a restart:
/// a salt that changes would tell that a name does not exist.
#[derive(Clone)]
pub struct MockSecret([u8; 32]);

impl MockSecret {
    /// Derives the key from a secret of the installation.
    pub fn new(master_secret: &[u8]) -> Self {
        Self(hmac(master_secret, &[b"pgusher mock authentication v1"]))
    }

    fn verifier(&self, user: &str) -> Verifier {
        let part = |name: &[u8]| hmac(&self.0, &[name, b"\0", user.as_bytes()]);
        Verifier {
            iterations: ITERATIONS,
            salt: part(b"salt")[..16].into(),
            stored_key: part(b"stored key"),
            server_key: part(b"server key"),
        }
    }
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Send AuthenticationSASLContinue with this and read a SASLResponse.
    Continue(Vec<u8>),
    /// The client is who it says: send AuthenticationSASLFinal with this, then AuthenticationOk.
    Done(Vec<u8>),
    /// Tell the client and close.
    Fail(PgError),
}

/// One client's proof.
pub struct Exchange {
    user: String,
    verifier: Verifier,
    exists: Choice,
    end_point: Option<Vec<u8>>,
    nonce: String,
    state: State,
}

enum State {
    /// Nothing has been said.
    Start,
    /// The mechanism is chosen, its first message has not come.
    Chosen { plus: bool },
    /// The server has answered the client's first message.
    Challenged { bare: String, server_first: String, nonce: String, binding: String },
    /// It is over.
    Over,
}

impl Exchange {
    /// An exchange that has not begun. `user` is the name that the error names: the one in the startup packet.
    ///
    /// `verifier` is `None` when the login does not exist or has no password; `end_point` is the channel binding data
    /// `tls-server-end-point` ([RFC 5929](https://www.rfc-editor.org/rfc/rfc5929#section-4)), if the client came over
    /// TLS and the certificate has any; `nonce` is random (see [`crate::tenant::credential::nonce`]).
    pub fn new(
        user: &str,
        verifier: Option<&Verifier>,
        mock: &MockSecret,
        end_point: Option<&[u8]>,
        nonce: String,
    ) -> Self {
        // Made for everybody, so that it costs everybody the same.
        let mocked = mock.verifier(user);
        Self {
            user: user.to_owned(),
            exists: Choice::from(u8::from(verifier.is_some())),
            verifier: verifier.cloned().unwrap_or(mocked),
            end_point: end_point.map(<[u8]>::to_vec),
            nonce,
            state: State::Start,
        }
    }

    /// What AuthenticationSASL offers.
    pub fn mechanisms(&self) -> &'static [&'static str] {
        match self.end_point {
            Some(_) => &[SCRAM_SHA_256_PLUS, SCRAM_SHA_256],
            None => &[SCRAM_SHA_256],
        }
    }

    /// Takes the answer to AuthenticationSASL.
    pub fn initial(&mut self, response: &SaslInitialResponse<'_>) -> Step {
        if !matches!(self.state, State::Start) || !self.mechanisms().contains(&response.mechanism) {
            self.state = State::Over;
            return Step::Fail(violation("client selected an invalid SASL authentication mechanism"));
        }
        let plus = response.mechanism == SCRAM_SHA_256_PLUS;
        self.state = State::Chosen { plus };
        match response.data {
            // A client may choose first and speak later; it is then asked to.
            None => Step::Continue(Vec::new()),
            Some(data) => self.respond(data),
        }
    }

    /// Takes a SASLResponse.
    pub fn respond(&mut self, data: &[u8]) -> Step {
        let state = std::mem::replace(&mut self.state, State::Over);
        let step = match text(data) {
            Err(error) => Err(error),
            Ok(message) => match state {
                State::Chosen { plus } => self.client_first(message, plus),
                State::Challenged { bare, server_first, nonce, binding } => {
                    self.client_final(message, &bare, &server_first, &nonce, &binding)
                }
                State::Start | State::Over => Err(violation("unexpected SASL response")),
            },
        };
        step.unwrap_or_else(Step::Fail)
    }

    /// `gs2-cbind-flag "," [authzid] "," "n=" user ",r=" nonce ["," extensions]`
    fn client_first(&mut self, message: &str, plus: bool) -> Result<Step, PgError> {
        let (flag, rest) = message.split_once(',').ok_or_else(|| malformed("Comma expected."))?;
        let binding = self.check_binding_flag(flag, plus)?;
        let (authzid, bare) = rest.split_once(',').ok_or_else(|| malformed("Comma expected."))?;
        if !authzid.is_empty() {
            return Err(PgError::fatal(
                sqlstate::FEATURE_NOT_SUPPORTED,
                "client uses authorization identity, but it is not supported",
            ));
        }
        if bare.starts_with("m=") {
            return Err(PgError::fatal(
                sqlstate::FEATURE_NOT_SUPPORTED,
                "client requires an unsupported SCRAM extension",
            ));
        }
        let mut attributes = bare.split(',');
        // The name in here is not looked at: PostgreSQL takes the one in the startup packet, and libpq leaves it empty.
        attribute(attributes.next(), "n=")?;
        let client_nonce = attribute(attributes.next(), "r=")?;
        if !client_nonce.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(malformed("Nonce contains characters that are not printable."));
        }
        let nonce = format!("{client_nonce}{}", self.nonce);
        let salt = STANDARD.encode(&*self.verifier.salt);
        let server_first = format!("r={nonce},s={salt},i={}", self.verifier.iterations);
        let answer = server_first.clone().into_bytes();
        self.state = State::Challenged { bare: bare.to_owned(), server_first, nonce, binding };
        Ok(Step::Continue(answer))
    }

    /// Answers with what the client's last message has to say about the channel.
    fn check_binding_flag(&self, flag: &str, plus: bool) -> Result<String, PgError> {
        match (flag, plus) {
            ("p=tls-server-end-point", true) => {
                let header = [b"p=tls-server-end-point,,", self.end_point.as_deref().unwrap_or_default()].concat();
                Ok(STANDARD.encode(header))
            }
            (flag, true) if flag.starts_with("p=") => Err(violation(format!(
                "unsupported SCRAM channel-binding type \"{}\"",
                excerpt(flag.strip_prefix("p=").unwrap_or_default())
            ))),
            (flag, false) if flag.starts_with("p=") => Err(malformed(
                "The client selected SCRAM-SHA-256 without channel binding, but the SCRAM message includes channel \
                 binding data.",
            )),
            ("n" | "y", true) => Err(malformed(
                "The client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include channel binding data.",
            )),
            ("n", false) => Ok(STANDARD.encode("n,,")),
            // Somebody in the middle has taken the mechanism with channel binding off our list.
            ("y", false) if self.end_point.is_some() => Err(PgError::fatal(
                sqlstate::INVALID_AUTHORIZATION,
                "SCRAM channel binding negotiation error",
            )
            .detail(
                "The client supports SCRAM channel binding but thinks the server does not. However, this server does \
                 support channel binding.",
            )),
            ("y", false) => Ok(STANDARD.encode("y,,")),
            _ => Err(malformed("Unexpected channel-binding flag.")),
        }
    }

    /// `"c=" binding ",r=" nonce ["," extensions] ",p=" proof`
    fn client_final(
        &self,
        message: &str,
        bare: &str,
        server_first: &str,
        nonce: &str,
        binding: &str,
    ) -> Result<Step, PgError> {
        let (without_proof, proof) = message.rsplit_once(",p=").ok_or_else(|| malformed("Attribute p= expected."))?;
        let mut attributes = without_proof.split(',');
        if attribute(attributes.next(), "c=")? != binding {
            return Err(match self.end_point {
                Some(_) => PgError::fatal(sqlstate::INVALID_AUTHORIZATION, "SCRAM channel binding check failed"),
                None => violation("unexpected SCRAM channel-binding attribute in client-final-message"),
            });
        }
        if attribute(attributes.next(), "r=")? != nonce {
            return Err(malformed("Nonce does not match."));
        }
        let proof: Option<[u8; 32]> = STANDARD.decode(proof).ok().and_then(|bytes| bytes.try_into().ok());
        let proof = proof.ok_or_else(|| malformed("Malformed proof in client-final-message."))?;
        let said: [&[u8]; 5] = [bare.as_bytes(), b",", server_first.as_bytes(), b",", without_proof.as_bytes()];
        let signature = hmac(&self.verifier.stored_key, &said);
        let client_key: Vec<u8> = proof.iter().zip(signature).map(|(p, s)| p ^ s).collect();
        let stored_key: [u8; 32] = Sha256::digest(client_key).into();
        let answer = format!("v={}", STANDARD.encode(hmac(&self.verifier.server_key, &said)));
        let proven = stored_key.ct_eq(&self.verifier.stored_key) & self.exists;
        Ok(if bool::from(proven) { Step::Done(answer.into_bytes()) } else { Step::Fail(wrong_password(&self.user)) })
    }
}

/// The one answer to unknown users, unknown tenants and wrong passwords.
pub fn wrong_password(user: &str) -> PgError {
    PgError::fatal(sqlstate::INVALID_PASSWORD, format!("password authentication failed for user \"{}\"", excerpt(user)))
}

fn text(data: &[u8]) -> Result<&str, PgError> {
    match std::str::from_utf8(data) {
        Ok("") => Err(malformed("The message is empty.")),
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(malformed("The message is not text.")),
    }
}

fn attribute<'a>(part: Option<&'a str>, name: &str) -> Result<&'a str, PgError> {
    part.and_then(|part| part.strip_prefix(name)).ok_or_else(|| malformed(format!("Attribute {name} expected.")))
}

fn malformed(detail: impl Into<String>) -> PgError {
    violation("malformed SCRAM message").detail(detail)
}

fn violation(message: impl Into<String>) -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
    use proptest::prelude::*;

    fn mock() -> MockSecret {
        MockSecret::new(b"secret")
    }

    fn exchange(verifier: Option<&Verifier>, end_point: Option<&[u8]>) -> Exchange {
        Exchange::new("app", verifier, &mock(), end_point, "SERVERNONCE".into())
    }

    fn initial<'a>(mechanism: &'a str, data: &'a str) -> SaslInitialResponse<'a> {
        SaslInitialResponse { mechanism, data: Some(data.as_bytes()) }
    }

    /// Lets the client of `postgres-protocol` prove `password`.
    fn prove(server: &mut Exchange, password: &str, binding: ChannelBinding, plus: bool) -> Step {
        let mut client = ScramSha256::new(password.as_bytes(), binding);
        let mechanism = if plus { SCRAM_SHA_256_PLUS } else { SCRAM_SHA_256 };
        let first = SaslInitialResponse { mechanism, data: Some(client.message()) };
        let Step::Continue(challenge) = server.initial(&first) else { panic!("no challenge") };
        client.update(&challenge).unwrap();
        let step = server.respond(client.message());
        if let Step::Done(answer) = &step {
            client.finish(answer).unwrap();
        }
        step
    }

    #[test]
    fn rfc_7677_section_3() {
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let verifier = Verifier::make("pencil", &salt, 4096);
        let nonce = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0".to_owned();
        let mut server = Exchange::new("user", Some(&verifier), &mock(), None, nonce);
        assert_eq!(
            server.initial(&initial(SCRAM_SHA_256, "n,,n=user,r=rOprNGfwEbeRWgbNEkqO")),
            Step::Continue(
                b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096".to_vec()
            )
        );
        assert_eq!(
            server.respond(
                b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                  p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
            ),
            Step::Done(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=".to_vec())
        );
    }

    #[test]
    fn passwords_are_proven_with_and_without_channel_binding() {
        let verifier = Verifier::make("right", b"0123456789abcdef", 4096);
        let end_point = vec![7_u8; 32];
        for (password, binding, tls, plus, good) in [
            ("right", ChannelBinding::unsupported(), None, false, true),
            ("wrong", ChannelBinding::unsupported(), None, false, false),
            ("right", ChannelBinding::unrequested(), None, false, true),
            ("right", ChannelBinding::unsupported(), Some(&end_point), false, true),
            ("right", ChannelBinding::tls_server_end_point(end_point.clone()), Some(&end_point), true, true),
            ("wrong", ChannelBinding::tls_server_end_point(end_point.clone()), Some(&end_point), true, false),
        ] {
            let mut server = exchange(Some(&verifier), tls.map(Vec::as_slice));
            match prove(&mut server, password, binding, plus) {
                Step::Done(_) => assert!(good),
                Step::Fail(error) => assert!(!good && error == wrong_password("app"), "{error}"),
                Step::Continue(_) => panic!(),
            }
        }
        // Another certificate: somebody in the middle.
        let mut server = exchange(Some(&verifier), Some(&end_point));
        let step = prove(&mut server, "right", ChannelBinding::tls_server_end_point(vec![8; 32]), true);
        let Step::Fail(error) = step else { panic!() };
        assert_eq!((&*error.code, &*error.message), ("28000", "SCRAM channel binding check failed"));
    }

    #[test]
    fn an_unknown_login_looks_like_a_wrong_password() {
        let verifier = Verifier::make("right", b"0123456789abcdef", 4096);
        let shape = |verifier: Option<&Verifier>| {
            let mut server = exchange(verifier, None);
            let Step::Continue(challenge) = server.initial(&initial(SCRAM_SHA_256, "n,,n=,r=abc")) else { panic!() };
            let text = String::from_utf8(challenge).unwrap();
            let proof = STANDARD.encode([0; 32]);
            let end = server.respond(format!("c=biws,r=abcSERVERNONCE,p={proof}").as_bytes());
            (text.len(), text.ends_with(",i=4096"), end, text)
        };
        let (known, unknown, again) = (shape(Some(&verifier)), shape(None), shape(None));
        assert_eq!((known.0, known.1, &known.2), (unknown.0, unknown.1, &unknown.2));
        assert_eq!(unknown.3, again.3, "the salt of a name is stable");
        assert_ne!(mock().verifier("a").salt, mock().verifier("b").salt);
        // Whoever guesses the password of a mock verifier has no login either.
        let mut server = Exchange { verifier: verifier.clone(), ..exchange(None, None) };
        assert_eq!(
            prove(&mut server, "right", ChannelBinding::unsupported(), false),
            Step::Fail(wrong_password("app"))
        );
    }

    #[test]
    fn first_messages_are_checked() {
        let end_point: Option<&[u8]> = Some(b"hash");
        for (mechanism, tls, message, code) in [
            (SCRAM_SHA_256, None, "n,,n=,r=abc", ""),
            (SCRAM_SHA_256, None, "n,,n=somebody,r=abc,x=extension", ""),
            (SCRAM_SHA_256, None, "y,,n=,r=abc", ""),
            (SCRAM_SHA_256, end_point, "y,,n=,r=abc", "28000"),
            (SCRAM_SHA_256, end_point, "n,,n=,r=abc", ""),
            (SCRAM_SHA_256, end_point, "p=tls-server-end-point,,n=,r=abc", "08P01"),
            (SCRAM_SHA_256_PLUS, end_point, "p=tls-server-end-point,,n=,r=abc", ""),
            (SCRAM_SHA_256_PLUS, end_point, "p=tls-unique,,n=,r=abc", "08P01"),
            (SCRAM_SHA_256_PLUS, end_point, "n,,n=,r=abc", "08P01"),
            (SCRAM_SHA_256_PLUS, end_point, "y,,n=,r=abc", "08P01"),
            (SCRAM_SHA_256_PLUS, None, "p=tls-server-end-point,,n=,r=abc", "08P01"),
            ("PLAIN", None, "n,,n=,r=abc", "08P01"),
            (SCRAM_SHA_256, None, "n,a=admin,n=,r=abc", "0A000"),
            (SCRAM_SHA_256, None, "n,,m=x,n=,r=abc", "0A000"),
            (SCRAM_SHA_256, None, "", "08P01"),
            (SCRAM_SHA_256, None, "n", "08P01"),
            (SCRAM_SHA_256, None, "n,,", "08P01"),
            (SCRAM_SHA_256, None, "n,,n=", "08P01"),
            (SCRAM_SHA_256, None, "n,,r=abc,n=", "08P01"),
            (SCRAM_SHA_256, None, "n,,n=,r=a\tb", "08P01"),
            (SCRAM_SHA_256, None, "n,,n=,r=a\0b", "08P01"),
            (SCRAM_SHA_256, None, "x,,n=,r=abc", "08P01"),
        ] {
            match exchange(None, tls).initial(&initial(mechanism, message)) {
                Step::Continue(_) => assert_eq!(code, "", "{message:?}"),
                Step::Fail(error) => assert_eq!(error.code, code, "{message:?}"),
                Step::Done(_) => panic!(),
            }
        }
    }

    #[test]
    fn last_messages_are_checked() {
        let proof = STANDARD.encode([0; 32]);
        for (message, code) in [
            (format!("c=biws,r=abcSERVERNONCE,p={proof}"), "28P01"),
            (format!("c=biws,r=abcSERVERNONCE,x=y,p={proof}"), "28P01"),
            (format!("c=eSws,r=abcSERVERNONCE,p={proof}"), "08P01"),
            (format!("c=biws,r=SERVERNONCE,p={proof}"), "08P01"),
            (format!("c=biws,r=abcSERVERNONC,p={proof}"), "08P01"),
            (format!("r=abcSERVERNONCE,c=biws,p={proof}"), "08P01"),
            ("c=biws,r=abcSERVERNONCE".to_owned(), "08P01"),
            ("c=biws,r=abcSERVERNONCE,p=AAAA".to_owned(), "08P01"),
            ("c=biws,r=abcSERVERNONCE,p=*".to_owned(), "08P01"),
            (String::new(), "08P01"),
        ] {
            let mut server = exchange(None, None);
            server.initial(&initial(SCRAM_SHA_256, "n,,n=,r=abc"));
            let Step::Fail(error) = server.respond(message.as_bytes()) else { panic!("{message}") };
            assert_eq!(error.code, code, "{message}");
            // It is over: a second try needs a second connection.
            assert!(matches!(server.respond(message.as_bytes()), Step::Fail(e) if e.code == "08P01"));
        }
    }

    #[test]
    fn a_client_may_choose_first_and_speak_later() {
        let mut server = exchange(None, None);
        let response = SaslInitialResponse { mechanism: SCRAM_SHA_256, data: None };
        assert_eq!(server.initial(&response), Step::Continue(Vec::new()));
        assert!(matches!(server.respond(b"n,,n=,r=abc"), Step::Continue(_)));
    }

    proptest! {
        #[test]
        fn no_message_panics_or_succeeds(
            first in "(n,,|y,,|p=tls-server-end-point,,|.{0,4})(n=.{0,3},)?(r=.{0,8})?", last in "(c=biws,)?(r=.{0,8})?(,p=.{0,50})?",
            noise in prop::collection::vec(any::<u8>(), 0..60), tls in any::<bool>(),
        ) {
            let verifier = Verifier::make("right", b"0123456789abcdef", 1);
            for last in [last.as_bytes(), &noise] {
                let mut server = exchange(Some(&verifier), tls.then_some(&b"hash"[..]));
                let mechanism = server.mechanisms()[0];
                server.initial(&initial(mechanism, &first));
                prop_assert!(!matches!(server.respond(last), Step::Done(_)));
            }
        }
    }
}
