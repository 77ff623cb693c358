//! How pgusher proves itself to a server: the client's side of SCRAM-SHA-256 and SCRAM-SHA-256-PLUS, and the two older
//! ways. No I/O; the nonce is given.
//!
//! A login costs PBKDF2, about a millisecond, unless the keys of the last one are at hand: [`CachedKeys`] are good as
//! long as the role's salt and iteration count stay what they were.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::tenant::credential::{ClientKeys, hmac};

/// Most PBKDF2 iterations that a server can make us do: about a quarter of a second. PostgreSQL's default is 4,096.
pub const MAX_ITERATIONS: u32 = 1_000_000;

/// Keys that PBKDF2 made, and what it made them of besides the password.
#[derive(Clone, PartialEq, Eq)]
pub struct CachedKeys {
    salt: Box<[u8]>,
    iterations: u32,
    keys: ClientKeys,
}

/// Why authentication towards a server failed on our side.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// None of the mechanisms on offer is SCRAM-SHA-256.
    #[error("server offers no SASL mechanism that pgusher knows")]
    NoMechanism,
    /// A message cannot be read.
    #[error("malformed SCRAM message of server: {0}")]
    Malformed(&'static str),
    /// The nonce does not begin with ours.
    #[error("server did not repeat the SCRAM nonce")]
    Nonce,
    /// The iteration count would burn processor time.
    #[error("server asks for {0} SCRAM iterations, more than {MAX_ITERATIONS}")]
    Iterations(u32),
    /// The server reports an error.
    #[error("server reported SCRAM error {0:?}")]
    Refused(String),
    /// The server does not know the password's verifier: it is not the one we mean.
    #[error("server could not prove that it knows the role's password")]
    Impostor,
}

/// A proof under way.
pub struct Scram {
    password: String,
    cached: Option<CachedKeys>,
    mechanism: &'static str,
    /// `n,,`, `y,,` or `p=tls-server-end-point,,` and the binding data.
    header: String,
    binding: Vec<u8>,
    bare: String,
    nonce: String,
}

impl Scram {
    /// Chooses among the server's `mechanisms`. With `end_point`, the channel binding data `tls-server-end-point` of
    /// the server's certificate, the proof is tied to this TLS connection if the server can do that; if it cannot it
    /// is told that we could, so that nobody in the middle can have hidden the better mechanism.
    ///
    /// # Errors
    /// [`ScramError::NoMechanism`]
    pub fn new(
        mechanisms: &[&str],
        password: &str,
        cached: Option<CachedKeys>,
        end_point: Option<&[u8]>,
        nonce: String,
    ) -> Result<Self, ScramError> {
        let offers = |name| mechanisms.contains(&name);
        let (mechanism, flag, data) = match end_point {
            Some(data) if offers("SCRAM-SHA-256-PLUS") => ("SCRAM-SHA-256-PLUS", "p=tls-server-end-point,,", data),
            _ if !offers("SCRAM-SHA-256") => return Err(ScramError::NoMechanism),
            Some(_) => ("SCRAM-SHA-256", "y,,", &[][..]),
            None => ("SCRAM-SHA-256", "n,,", &[][..]),
        };
        Ok(Self {
            password: password.to_owned(),
            cached,
            mechanism,
            header: flag.to_owned(),
            binding: [flag.as_bytes(), data].concat(),
            // PostgreSQL takes the name from the startup packet.
            bare: format!("n=,r={nonce}"),
            nonce,
        })
    }

    /// Mechanism and data of the SASLInitialResponse.
    pub fn initial(&self) -> (&'static str, Vec<u8>) {
        (self.mechanism, format!("{}{}", self.header, self.bare).into_bytes())
    }

    /// Takes AuthenticationSASLContinue; gives the SASLResponse, and what then waits for the server's own proof.
    /// Runs PBKDF2 if the cached keys do not fit.
    ///
    /// # Errors
    /// [`ScramError`]
    pub fn respond(self, server_first: &[u8]) -> Result<(Vec<u8>, ServerProof), ScramError> {
        let challenge = Challenge::read(server_first, &self.nonce)?;
        let keys = match self.cached {
            Some(cached) if *cached.salt == *challenge.salt && cached.iterations == challenge.iterations => cached,
            _ => CachedKeys {
                keys: ClientKeys::derive(&self.password, &challenge.salt, challenge.iterations),
                salt: challenge.salt.into(),
                iterations: challenge.iterations,
            },
        };
        let without_proof = format!("c={},r={}", STANDARD.encode(&self.binding), challenge.nonce);
        let said: [&[u8]; 5] = [self.bare.as_bytes(), b",", server_first, b",", without_proof.as_bytes()];
        let stored_key: [u8; 32] = Sha256::digest(keys.keys.client_key).into();
        let signature = hmac(&stored_key, &said);
        let proof: Vec<u8> = keys.keys.client_key.iter().zip(signature).map(|(k, s)| k ^ s).collect();
        let expected = hmac(&keys.keys.server_key, &said);
        let response = format!("{without_proof},p={}", STANDARD.encode(proof)).into_bytes();
        Ok((response, ServerProof { expected, keys }))
    }
}

/// What AuthenticationSASLContinue says: `r=nonce,s=salt,i=iterations`.
struct Challenge<'a> {
    nonce: &'a str,
    salt: Vec<u8>,
    iterations: u32,
}

impl<'a> Challenge<'a> {
    fn read(message: &'a [u8], our_nonce: &str) -> Result<Self, ScramError> {
        let text = std::str::from_utf8(message).map_err(|_| ScramError::Malformed("not text"))?;
        let mut attributes = text.split(',');
        let mut attribute = |name: &'static str| {
            attributes.next().and_then(|part| part.strip_prefix(name)).ok_or(ScramError::Malformed(name))
        };
        let nonce = attribute("r=")?;
        // The server has to add something of its own, or an old answer of ours could be played again.
        if nonce.strip_prefix(our_nonce).is_none_or(str::is_empty) {
            return Err(ScramError::Nonce);
        }
        let salt = STANDARD.decode(attribute("s=")?).map_err(|_| ScramError::Malformed("s="))?;
        let iterations = attribute("i=")?.parse().map_err(|_| ScramError::Malformed("i="))?;
        match iterations {
            0 => Err(ScramError::Malformed("i=")),
            n if n > MAX_ITERATIONS => Err(ScramError::Iterations(n)),
            _ => Ok(Self { nonce, salt, iterations }),
        }
    }
}

/// Waits for the server to prove that it knows the verifier.
pub struct ServerProof {
    expected: [u8; 32],
    keys: CachedKeys,
}

impl ServerProof {
    /// Takes AuthenticationSASLFinal. Gives the keys to keep for the next login as the same role.
    ///
    /// # Errors
    /// [`ScramError`]; the server is then not to be trusted, even if it says AuthenticationOk.
    pub fn verify(self, server_final: &[u8]) -> Result<CachedKeys, ScramError> {
        let text = std::str::from_utf8(server_final).map_err(|_| ScramError::Malformed("not text"))?;
        let first = text.split(',').next().unwrap_or_default();
        if let Some(error) = first.strip_prefix("e=") {
            return Err(ScramError::Refused(crate::wire::startup::excerpt(error)));
        }
        let signature = first.strip_prefix("v=").ok_or(ScramError::Malformed("v="))?;
        let signature = STANDARD.decode(signature).map_err(|_| ScramError::Malformed("v="))?;
        if bool::from(signature.ct_eq(&self.expected[..])) { Ok(self.keys) } else { Err(ScramError::Impostor) }
    }
}

/// The answer to AuthenticationMD5Password, for servers that still have such roles.
pub fn md5_password(user: &str, password: &str, salt: [u8; 4]) -> String {
    postgres_protocol::authentication::md5_hash(user.as_bytes(), password.as_bytes(), salt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::auth::{Exchange, MockSecret, Step};
    use crate::tenant::credential::Verifier;
    use crate::wire::message::SaslInitialResponse;
    use proptest::prelude::*;

    fn plain(password: &str, cached: Option<CachedKeys>) -> Scram {
        Scram::new(&["SCRAM-SHA-256"], password, cached, None, "abc".into()).unwrap()
    }

    /// Our client against our server.
    fn login(client: Scram, verifier: &Verifier, end_point: Option<&[u8]>) -> Result<CachedKeys, String> {
        let mut server = Exchange::new("app", Some(verifier), &MockSecret::new(b"x"), end_point, "SERVERNONCE".into());
        let (mechanism, data) = client.initial();
        let challenge = match server.initial(&SaslInitialResponse { mechanism, data: Some(&data) }) {
            Step::Continue(challenge) => challenge,
            other => return Err(format!("{other:?}")),
        };
        let (response, proof) = client.respond(&challenge).map_err(|e| e.to_string())?;
        match server.respond(&response) {
            Step::Done(answer) => proof.verify(&answer).map_err(|e| e.to_string()),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn rfc_7677_section_3() {
        let nonce = "rOprNGfwEbeRWgbNEkqO".to_owned();
        let mut client = Scram::new(&["SCRAM-SHA-256"], "pencil", None, None, nonce).unwrap();
        client.bare = "n=user,r=rOprNGfwEbeRWgbNEkqO".to_owned();
        assert_eq!(client.initial().1, b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let challenge = b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let (response, proof) = client.respond(challenge).unwrap();
        assert_eq!(
            String::from_utf8(response).unwrap(),
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
             p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        assert!(proof.verify(b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").is_ok());
    }

    #[test]
    fn our_client_logs_in_to_our_server() {
        let verifier = Verifier::make("right", b"0123456789abcdef", 4096);
        let both = ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"];
        let client = |password, end_point| Scram::new(&both, password, None, end_point, "abc".into()).unwrap();
        let end_point: Option<&[u8]> = Some(b"hash");
        assert!(login(client("right", end_point), &verifier, end_point).is_ok());
        assert!(login(client("right", None), &verifier, end_point).is_ok());
        assert!(login(client("wrong", end_point), &verifier, end_point).is_err());
        assert!(login(client("right", Some(b"other")), &verifier, end_point).is_err());
        assert!(login(plain("right", None), &verifier, None).is_ok());
    }

    #[test]
    fn a_hidden_mechanism_is_noticed() {
        let verifier = Verifier::make("right", b"0123456789abcdef", 4096);
        let client = Scram::new(&["SCRAM-SHA-256"], "right", None, Some(b"hash"), "abc".into()).unwrap();
        assert!(client.initial().1.starts_with(b"y,,"));
        assert!(login(client, &verifier, Some(b"hash")).is_err_and(|e| e.contains("negotiation error")));
        assert_eq!(Scram::new(&["PLAIN"], "", None, None, String::new()).err(), Some(ScramError::NoMechanism));
    }

    #[test]
    fn cached_keys_are_used_as_long_as_they_fit() {
        let verifier = Verifier::make("right", b"0123456789abcdef", 4096);
        let keys = login(plain("right", None), &verifier, None).unwrap();
        // With the cache the password is not looked at …
        assert!(login(plain("no longer known", Some(keys.clone())), &verifier, None).unwrap() == keys);
        // … but a new salt needs it again.
        let renewed = Verifier::make("right", b"fedcba9876543210", 4096);
        assert!(login(plain("no longer known", Some(keys.clone())), &renewed, None).is_err());
        assert!(login(plain("right", Some(keys.clone())), &renewed, None).unwrap() != keys);
    }

    #[test]
    fn hostile_servers_are_refused() {
        for (challenge, error) in [
            ("r=abcX,s=AAAA,i=4294967295", ScramError::Iterations(u32::MAX)),
            ("r=abcX,s=AAAA,i=1000001", ScramError::Iterations(1_000_001)),
            ("r=abcX,s=AAAA,i=0", ScramError::Malformed("i=")),
            ("r=abcX,s=AAAA,i=-1", ScramError::Malformed("i=")),
            ("r=abcX,s=AAAA", ScramError::Malformed("i=")),
            ("r=abcX,s=*,i=1", ScramError::Malformed("s=")),
            ("r=abc,s=AAAA,i=1", ScramError::Nonce),
            ("r=abX,s=AAAA,i=1", ScramError::Nonce),
            ("m=x,r=abcX,s=AAAA,i=1", ScramError::Malformed("r=")),
            ("", ScramError::Malformed("r=")),
        ] {
            assert_eq!(plain("p", None).respond(challenge.as_bytes()).err(), Some(error), "{challenge}");
        }
        for (answer, error) in [
            ("v=AAAA", ScramError::Impostor),
            ("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=", ScramError::Impostor),
            ("e=other-error", ScramError::Refused("other-error".into())),
            ("v=*", ScramError::Malformed("v=")),
            ("", ScramError::Malformed("v=")),
        ] {
            let (_, proof) = plain("p", None).respond(b"r=abcX,s=AAAA,i=1").unwrap();
            assert_eq!(proof.verify(answer.as_bytes()).err(), Some(error), "{answer}");
        }
    }

    proptest! {
        #[test]
        fn no_message_panics(first in prop::collection::vec(any::<u8>(), 0..60), last in prop::collection::vec(any::<u8>(), 0..60),
                             text in "r=abc.{0,3},s=.{0,4},i=[0-9]{0,2}") {
            let _ = plain("p", None).respond(&first);
            if let Ok((_, proof)) = plain("p", None).respond(text.as_bytes()) {
                prop_assert!(proof.verify(&last).is_err());
            }
        }
    }
}
