//! What TLS towards clients ([`crate::client::tls`]) and towards servers ([`crate::pool::tls`]) have in common.
//! A leaf: no configuration, no sockets.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, RootCertStore};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use x509_cert::Certificate;
use x509_cert::der::asn1::{ContextSpecific, ObjectIdentifier};
use x509_cert::der::oid::db::{rfc5912, rfc8410};
use x509_cert::der::{Decode as _, Encode as _, SliceReader, TagNumber};
use x509_cert::spki::AlgorithmIdentifierRef;

/// The protocol's name in ALPN ([direct TLS](https://www.postgresql.org/docs/current/protocol-flow.html)).
pub const ALPN: &[u8] = b"postgresql";

/// Why certificates cannot be used. Private keys do not appear in it.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A mode asks for a file that the configuration does not name.
    #[error("{mode} needs {key}")]
    Missing {
        /// The key that holds the mode.
        mode: &'static str,
        /// The key that is absent.
        key: &'static str,
    },
    /// A file is not there or is not PEM.
    #[error("cannot use {path:?}: {source}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: pem::Error,
    },
    /// A file holds no certificate.
    #[error("{0:?} holds no certificate")]
    NoCertificate(PathBuf),
    /// A certificate that cannot be a CA.
    #[error("cannot use {path:?}: {source}")]
    Authority {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// A certificate that cannot be shown, or a key that is not of a kind we know.
    #[error("cannot use {path:?}: {source}")]
    Certificate {
        /// The certificate's or the key's file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// A key that is not the certificate's.
    #[error("the key in {key:?} does not belong to the certificate in {certificate:?}")]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's file.
        key: PathBuf,
    },
    /// The verifier cannot be made.
    #[error("cannot verify certificates: {0}")]
    Verifier(String),
    /// rustls refuses something else.
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] rustls::Error),
}

/// The one implementation of cryptography that is used.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// A certificate chain, the own certificate first.
///
/// # Errors
/// If the file cannot be read or holds none.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |source| TlsError::Pem { path: path.to_owned(), source };
    let chain: Vec<_> = CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    if chain.is_empty() { Err(TlsError::NoCertificate(path.to_owned())) } else { Ok(chain) }
}

/// A private key: PKCS #8, PKCS #1 or SEC 1, not encrypted.
///
/// # Errors
/// If the file cannot be read or holds none.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|source| TlsError::Pem { path: path.to_owned(), source })
}

/// A certificate chain and its key, which belong together.
///
/// # Errors
/// If a file cannot be used or the key is another one's.
pub fn certified_key(cert_file: &Path, key_file: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = certificates(cert_file)?;
    let wrong = |path: &Path, source| TlsError::Certificate { path: path.to_owned(), source };
    let key = private_key(key_file)?;
    let key = provider().key_provider.load_private_key(key).map_err(|source| wrong(key_file, source))?;
    // rustls compares too, but only after it has parsed the certificate with webpki, which refuses X.509 version 1:
    // the certificates that PostgreSQL's manual makes.
    let own = chain.first().and_then(|certificate| Certificate::from_der(certificate).ok());
    let own = own.and_then(|certificate| certificate.tbs_certificate.subject_public_key_info.to_der().ok());
    match (own, key.public_key()) {
        (None, _) => Err(wrong(cert_file, CertificateError::BadEncoding.into())),
        (Some(certified), Some(held)) if certified != held.as_ref() => {
            Err(TlsError::Mismatch { certificate: cert_file.to_owned(), key: key_file.to_owned() })
        }
        (Some(_), _) => Ok(CertifiedKey::new(chain, key)),
    }
}

/// The certificates that others must be signed by.
///
/// # Errors
/// If the file cannot be read, holds none, or holds one that is none.
pub fn authorities(path: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|source| TlsError::Authority { path: path.to_owned(), source })?;
    }
    Ok(Arc::new(roots))
}

/// The channel binding `tls-server-end-point` of a server's certificate
/// ([RFC 5929 §4.1](https://www.rfc-editor.org/rfc/rfc5929#section-4.1)): its hash, by the hash function that it was
/// signed with, except that MD5 and SHA-1 count as SHA-256.
///
/// `None` where the RFC does not define one (Ed25519 signs without a hash function): SCRAM-SHA-256-PLUS must then not
/// be offered. libpq cannot compute one either.
pub fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    let parsed = Certificate::from_der(certificate).ok()?;
    let algorithm = parsed.signature_algorithm;
    let parameters = algorithm.parameters.as_ref().map(|any| any.value());
    let hash = if algorithm.oid == rfc5912::ID_RSASSA_PSS {
        pss_hash(parameters.unwrap_or_default())?
    } else {
        signature_hash(algorithm.oid)?
    };
    Some(match hash {
        Hash::Sha256 => Sha256::digest(certificate).to_vec(),
        Hash::Sha384 => Sha384::digest(certificate).to_vec(),
        Hash::Sha512 => Sha512::digest(certificate).to_vec(),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

/// `ecdsa-with-SHA1` ([RFC 3279 §2.2.3](https://www.rfc-editor.org/rfc/rfc3279#section-2.2.3)).
const ECDSA_WITH_SHA_1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.1");

fn signature_hash(signature: ObjectIdentifier) -> Option<Hash> {
    match signature {
        rfc5912::MD_5_WITH_RSA_ENCRYPTION
        | rfc5912::SHA_1_WITH_RSA_ENCRYPTION
        | ECDSA_WITH_SHA_1
        | rfc5912::SHA_256_WITH_RSA_ENCRYPTION
        | rfc5912::ECDSA_WITH_SHA_256 => Some(Hash::Sha256),
        rfc5912::SHA_384_WITH_RSA_ENCRYPTION | rfc5912::ECDSA_WITH_SHA_384 => Some(Hash::Sha384),
        rfc5912::SHA_512_WITH_RSA_ENCRYPTION | rfc5912::ECDSA_WITH_SHA_512 => Some(Hash::Sha512),
        // Named, so that nobody adds it: there is no hash function to take.
        rfc8410::ID_ED_25519 => None,
        _ => None,
    }
}

/// The hash function in `RSASSA-PSS-params`, the first, tagged member; SHA-1 if it is absent
/// ([RFC 4055 §3.1](https://www.rfc-editor.org/rfc/rfc4055#section-3.1)).
fn pss_hash(parameters: &[u8]) -> Option<Hash> {
    let mut reader = SliceReader::new(parameters).ok()?;
    let tagged = ContextSpecific::<AlgorithmIdentifierRef<'_>>::decode_explicit(&mut reader, TagNumber::N0).ok()?;
    match tagged.map(|tagged| tagged.value.oid) {
        None | Some(rfc5912::ID_SHA_1 | rfc5912::ID_SHA_256) => Some(Hash::Sha256),
        Some(rfc5912::ID_SHA_384) => Some(Hash::Sha384),
        Some(rfc5912::ID_SHA_512) => Some(Hash::Sha512),
        Some(_) => None,
    }
}

/// Certificates made in memory, and handshakes without sockets, for the tests of both sides.
#[cfg(test)]
pub(crate) mod testing {
    use std::io::{Read as _, Write as _};
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

    use crate::pool::tls::server_name;

    /// A CA and a directory for what it signs.
    pub(crate) struct Ca {
        issuer: Issuer<'static, KeyPair>,
        directory: tempfile::TempDir,
        pub(crate) file: PathBuf,
    }

    impl Ca {
        pub(crate) fn new() -> Self {
            Self::with(|_| ())
        }

        pub(crate) fn with(change: impl FnOnce(&mut CertificateParams)) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let mut params = CertificateParams::new(vec![]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            change(&mut params);
            let key = KeyPair::generate().unwrap();
            let file = directory.path().join("ca.crt");
            std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
            Self { issuer: Issuer::new(params, key), directory, file }
        }

        pub(crate) fn key(&self) -> &KeyPair {
            self.issuer.key()
        }

        /// Files with a certificate for a host name or address, and its key.
        pub(crate) fn sign(&self, host: &str) -> (PathBuf, PathBuf) {
            self.sign_with(host, |_| ())
        }

        pub(crate) fn sign_with(&self, host: &str, change: impl FnOnce(&mut CertificateParams)) -> (PathBuf, PathBuf) {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
            change(&mut params);
            let certificate = params.signed_by(&key, &self.issuer).unwrap();
            let (crt, pem) = (self.path(&format!("{host}.crt")), self.path(&format!("{host}.key")));
            std::fs::write(&crt, certificate.pem()).unwrap();
            std::fs::write(&pem, key.serialize_pem()).unwrap();
            (crt, pem)
        }

        pub(crate) fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }
    }

    pub(crate) fn write(path: &Path, text: &str) {
        std::fs::write(path, text).unwrap();
    }

    /// Both ends after a handshake and a message each way.
    pub(crate) fn handshake(
        client: &Arc<ClientConfig>,
        host: &str,
        server: &Arc<ServerConfig>,
    ) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
        let mut client = ClientConnection::new(Arc::clone(client), server_name(host).unwrap())?;
        let mut server = ServerConnection::new(Arc::clone(server))?;
        client.writer().write_all(b"SELECT").unwrap();
        server.writer().write_all(b"DataRow").unwrap();
        for _ in 0..10 {
            carry(&mut client, &mut server)?;
            carry(&mut server, &mut client)?;
        }
        let (mut query, mut answer) = ([0; 6], [0; 7]);
        server.reader().read_exact(&mut query).unwrap();
        client.reader().read_exact(&mut answer).unwrap();
        assert_eq!((&query, &answer), (b"SELECT", b"DataRow"));
        Ok((client, server))
    }

    fn carry<A, B, X, Y>(from: &mut A, to: &mut B) -> Result<(), rustls::Error>
    where
        A: std::ops::DerefMut<Target = rustls::ConnectionCommon<X>>,
        B: std::ops::DerefMut<Target = rustls::ConnectionCommon<Y>>,
    {
        let mut bytes = Vec::new();
        while from.wants_write() {
            from.write_tls(&mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            to.read_tls(&mut rest).unwrap();
            to.process_new_packets()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, SignatureAlgorithm};

    use super::*;

    fn self_signed(algorithm: &'static SignatureAlgorithm) -> Vec<u8> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        CertificateParams::new(vec!["a".to_owned()]).unwrap().self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn the_end_point_is_hashed_as_it_was_signed() {
        let certificate = self_signed(&rcgen::PKCS_ECDSA_P256_SHA256);
        assert_eq!(server_end_point(&certificate), Some(Sha256::digest(&certificate).to_vec()));
        let certificate = self_signed(&rcgen::PKCS_ECDSA_P384_SHA384);
        assert_eq!(server_end_point(&certificate), Some(Sha384::digest(&certificate).to_vec()));
        for (signature, hash) in [
            (rfc5912::SHA_1_WITH_RSA_ENCRYPTION, Some(Hash::Sha256)),
            (rfc5912::SHA_512_WITH_RSA_ENCRYPTION, Some(Hash::Sha512)),
            (rfc8410::ID_ED_25519, None),
        ] {
            assert_eq!(signature_hash(signature), hash, "{signature}");
        }
        assert_eq!(server_end_point(&self_signed(&rcgen::PKCS_ED25519)), None);
        assert_eq!(server_end_point(b"no certificate"), None);
    }

    #[test]
    fn the_hash_of_rsa_pss_is_in_its_parameters() {
        let certificate = CertificateDer::from_pem_slice(RSA_PSS_SHA384.as_bytes()).unwrap();
        let hash: String = server_end_point(&certificate).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        // As `openssl x509 -outform der | sha384sum` says.
        assert_eq!(
            hash,
            "6820eff45e32adb7726374209854cf815d5ed40716f6b97c78b4a88f4ec8\
             1040f73cc37ed90c28632033a984732ecff9"
        );
        // No parameters mean SHA-1, which counts as SHA-256.
        assert_eq!(pss_hash(&[]), Some(Hash::Sha256));
    }

    const RSA_PSS_SHA384: &str = "\
-----BEGIN CERTIFICATE-----
MIIDaTCCAhygAwIBAgIUM9qgi3RBGYDQecyyJidiNSGfgjIwQgYJKoZIhvcNAQEK
MDWgDzANBglghkgBZQMEAgIFAKEcMBoGCSqGSIb3DQEBCDANBglghkgBZQMEAgIF
AKIEAgIAzjAOMQwwCgYDVQQDDANwc3MwIBcNMjYxMTIxMTkzNjQ1WhgPMjEyNjEw
MjgxOTM2NDVaMA4xDDAKBgNVBAMMA3BzczCCASIwDQYJKoZIhvcNAQEBBQADggEP
ADCCAQoCggEBAMd+YW8RTnvTeutQKcJfyya9B0TnZ4h8FHGtsOJyVwfkJEnDR1iL
SukdVcnaCG2YC7SMpTxUQls4N6X6YrLsfEcxNDIc0Bv6rrlzFPJAMcGClPmWDhqA
MshdfM5wdMCX+ZFJxx2OAMJgXVQ6pcTtbuovRZJmVVxjBfyNu1EVkX/dROjxquOC
bL65yCzsqycCed9X8TofZlYIhX04aAxTmRcAc5LoNMJbn9BGCtkqk8RWcPqv9kH8
HVMp6iewWJ6w3sQhcA5NZm7+HufgTCwflrGUucMsfVthRmzd6J7yxAnmS9a+29ot
4WZ4ISTf3ircYnLX1R7dOems1AOHYzEGsR0CAwEAAaNTMFEwHQYDVR0OBBYEFEbR
RR+w7CE/JJshNgXBFxZZUWaGMB8GA1UdIwQYMBaAFEbRRR+w7CE/JJshNgXBFxZZ
UWaGMA8GA1UdEwEB/wQFMAMBAf8wQgYJKoZIhvcNAQEKMDWgDzANBglghkgBZQME
AgIFAKEcMBoGCSqGSIb3DQEBCDANBglghkgBZQMEAgIFAKIEAgIAzgOCAQEApDAz
mGkILA52Lj7vQFQnndeI6wSBV7d4zgfFfcLbebD/a3WZS9R5XYlSikHFrGF5twZD
tuK2F6ESZ30m9zIhpoHFphUUYgTL23yWp9vLM6il2rLKfJe7zoZsU5iKYQ8e3Pvs
BBsCK2RaFpMUWa87tyvYeUJR1KzSAfRvytsY+McjvcyWgLuWgYbMm50HsTr7F1fh
aye4VdxfxAxj1ecKtYaAYNQkb5LBd1EqkCMz8oA2eQEO/LLqaudUbf5pCTd8k/6E
QRoHAY9NXlAts0Je8Y+KprturCNkvh+cF6BdVA7ro/nnE7A0erwdOV7S6pMDFm1C
GbWEjj47bYoM7KuCjA==
-----END CERTIFICATE-----
";
}
