//! SCRAM-SHA-256 credentials: stored verifiers, and the passwords that pgusher derives for its own logins. No I/O.
//!
//! A tenant's server password is never stored: it is derived from the master secret each time, and the server is given
//! only the verifier, so that the password appears in no catalog and no log.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

/// Iterations of verifiers that pgusher makes; PostgreSQL's own default (`scram_iterations`).
pub const ITERATIONS: u32 = 4096;

/// Iterations for the roles that only pgusher logs in as. They slow down who guesses passwords, and [`server_password`]
/// has 256 bits that nobody guesses; here they would only make the first query of a tenant wait.
const ROLE_ITERATIONS: u32 = 1;

/// The stored half of a SCRAM-SHA-256 credential ([RFC 5803](https://www.rfc-editor.org/rfc/rfc5803)).
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// Salt, as many bytes as the credential has.
    pub salt: Salt,
    /// SHA-256 of the client key.
    pub stored_key: [u8; 32],
    /// Key of the server's signature.
    pub server_key: [u8; 32],
}

/// A salt. There is one for each tenant, so the usual one is kept in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Salt {
    /// As many bytes as PostgreSQL makes.
    Usual([u8; 16]),
    /// More or fewer.
    Other(Box<[u8]>),
}

impl From<&[u8]> for Salt {
    fn from(bytes: &[u8]) -> Self {
        bytes.try_into().map_or_else(|_| Self::Other(bytes.into()), Self::Usual)
    }
}

impl std::ops::Deref for Salt {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Usual(bytes) => bytes,
            Self::Other(bytes) => bytes,
        }
    }
}

/// The client's half of a SCRAM-SHA-256 credential, as PBKDF2 made it for one salt and iteration count.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientKeys {
    /// `HMAC(SaltedPassword, "Client Key")`
    pub client_key: [u8; 32],
    /// `HMAC(SaltedPassword, "Server Key")`
    pub server_key: [u8; 32],
}

/// A text that is not a `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>` verifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a SCRAM-SHA-256 verifier (SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>)")]
pub struct InvalidVerifier;

impl Verifier {
    /// Reads PostgreSQL's `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
    ///
    /// # Errors
    /// [`InvalidVerifier`] for anything else.
    pub fn parse(text: &str) -> Result<Self, InvalidVerifier> {
        let body = text.strip_prefix("SCRAM-SHA-256$").ok_or(InvalidVerifier)?;
        let (head, keys) = body.split_once('$').ok_or(InvalidVerifier)?;
        let (iterations, salt) = head.split_once(':').ok_or(InvalidVerifier)?;
        let (stored, server) = keys.split_once(':').ok_or(InvalidVerifier)?;
        let key = |text: &str| -> Result<[u8; 32], InvalidVerifier> {
            STANDARD.decode(text).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(InvalidVerifier)
        };
        let salt = STANDARD.decode(salt).map_err(|_| InvalidVerifier)?;
        let iterations = iterations.parse().map_err(|_| InvalidVerifier)?;
        if salt.is_empty() || salt.len() > 1024 || !(1..=10_000_000).contains(&iterations) {
            return Err(InvalidVerifier);
        }
        Ok(Self { iterations, salt: (&*salt).into(), stored_key: key(stored)?, server_key: key(server)? })
    }

    /// Makes the verifier of a password with a given salt.
    pub fn make(password: &str, salt: &[u8], iterations: u32) -> Self {
        let keys = ClientKeys::derive(password, salt, iterations);
        let stored_key = Sha256::digest(keys.client_key).into();
        Self { iterations, salt: salt.into(), stored_key, server_key: keys.server_key }
    }

    /// Makes the verifier of a password with a random salt.
    pub fn random(password: &str) -> Self {
        Self::make(password, &rand::random::<[u8; 16]>(), ITERATIONS)
    }

    /// Makes the verifier of a [`server_password`] with a random salt.
    pub fn of_role(password: &str) -> Self {
        Self::make(password, &rand::random::<[u8; 16]>(), ROLE_ITERATIONS)
    }

    /// PostgreSQL's spelling, accepted by `CREATE ROLE … PASSWORD`.
    pub fn to_text(&self) -> String {
        let encode = |bytes: &[u8]| STANDARD.encode(bytes);
        format!(
            "SCRAM-SHA-256${}:{}${}:{}",
            self.iterations,
            encode(&self.salt),
            encode(&self.stored_key),
            encode(&self.server_key)
        )
    }
}

impl ClientKeys {
    /// Runs PBKDF2 (about a millisecond at 4,096 iterations). The password is used as given: pgusher's own are ASCII,
    /// and verifiers of others are made by PostgreSQL or from configuration.
    pub fn derive(password: &str, salt: &[u8], iterations: u32) -> Self {
        let prepared = prepare(password);
        let salted = pbkdf2::pbkdf2_hmac_array::<Sha256, 32>(prepared.as_bytes(), salt, iterations);
        Self { client_key: hmac(&salted, &[b"Client Key"]), server_key: hmac(&salted, &[b"Server Key"]) }
    }
}

/// SASLprep as far as it matters without tables: ASCII is unchanged by it, and PostgreSQL uses other text raw when
/// SASLprep fails.
fn prepare(password: &str) -> &str {
    password
}

/// HMAC-SHA-256 over the concatenation of the parts.
pub fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    // HMAC takes keys of every length, so this cannot fail.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return [0; 32] };
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// A nonce for a SCRAM exchange: 18 random bytes in base64, as PostgreSQL makes them.
pub fn nonce() -> String {
    STANDARD.encode(rand::random::<[u8; 18]>())
}

/// The password with which pgusher logs in as `role`: 256 bits derived from the master secret.
pub fn server_password(master_secret: &str, role: &str) -> String {
    URL_SAFE_NO_PAD.encode(hmac(master_secret.as_bytes(), &[b"pgusher server password v1\0", role.as_bytes()]))
}

/// The password of a tenant's own login (username = tenant), likewise derived, so that
/// `GET /tenant/{id}/database-url` answers the same DSN each time without storing it.
pub fn client_password(master_secret: &str, tenant: &str) -> String {
    URL_SAFE_NO_PAD.encode(hmac(master_secret.as_bytes(), &[b"pgusher client password v1\0", tenant.as_bytes()]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verifiers_are_those_of_postgresql() {
        // SELECT rolpassword FROM pg_authid after CREATE ROLE … PASSWORD 'foo' on PostgreSQL 15 has this shape.
        let made = Verifier::make("foo", b"0123456789abcdef", 4096);
        let text = made.to_text();
        assert!(text.starts_with("SCRAM-SHA-256$4096:MDEyMzQ1Njc4OWFiY2RlZg==$"));
        assert!(Verifier::parse(&text).unwrap() == made);
        // RFC 7677 section 3: password "pencil".
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let keys = ClientKeys::derive("pencil", &salt, 4096);
        let message = "n=user,r=rOprNGfwEbeRWgbNEkqO,\
                       r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,\
                       c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        assert_eq!(
            STANDARD.encode(hmac(&keys.server_key, &[message.as_bytes()])),
            "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
        );
    }

    #[test]
    fn nonsense_is_not_a_verifier() {
        for text in
            ["", "md5abc", "SCRAM-SHA-256$4096:$a:b", "SCRAM-SHA-256$x:AA==$AA==:AA==", "SCRAM-SHA-256$0:AAAA$a:b"]
        {
            assert!(Verifier::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn derived_passwords_differ_by_role_and_purpose() {
        assert_ne!(server_password("m", "a"), server_password("m", "b"));
        assert_ne!(server_password("m", "a"), client_password("m", "a"));
        assert_eq!(server_password("m", "a").len(), 43);
    }
}
