//! TLS towards servers: the six modes of `server_tls_sslmode`, reload, and the same for `tokio_postgres`.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{
    CryptoProvider, verify_tls12_signature, verify_tls13_signature, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::sign::SingleCertAndKey;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio_postgres_rustls::MakeRustlsConnect;
use x509_cert::Certificate;
use x509_cert::der::oid::db::{rfc4519, rfc5912};
use x509_cert::der::{Decode as _, Encode as _, Tag, Tagged as _};

use crate::config::{self, SslMode};
use crate::tls::{ALPN, TlsError, authorities, certificates, certified_key, provider};

pub use crate::tls::server_end_point;

/// TLS towards servers as it is configured now. Connections keep what they began with.
#[derive(Debug)]
pub struct ClientTls {
    current: ArcSwap<Connecting>,
}

/// How a server connection that is opened now does TLS.
#[derive(Debug)]
pub struct Connecting {
    /// Whether to ask for TLS, and what to do if the server has none. No mode asks for it on a Unix socket.
    pub mode: SslMode,
    /// For `tokio_rustls::TlsConnector`; verifies as much as `mode` says. Not to be used in mode `disable`.
    pub config: Arc<ClientConfig>,
}

impl ClientTls {
    /// Reads CA, certificate and key.
    ///
    /// # Errors
    /// [`TlsError`] if a file is missing or broken.
    pub fn new(tls: &config::Tls) -> Result<Self, TlsError> {
        Ok(Self { current: ArcSwap::from_pointee(connecting(tls)?) })
    }

    /// Reads CA, certificate and key again, for connections from now on.
    ///
    /// # Errors
    /// [`TlsError`] if a file is missing or broken; what was in use stays in use.
    pub fn reload(&self, tls: &config::Tls) -> Result<(), TlsError> {
        self.current.store(Arc::new(connecting(tls)?));
        Ok(())
    }

    /// How a connection that is opened now does TLS.
    pub fn current(&self) -> Arc<Connecting> {
        self.current.load_full()
    }
}

impl Connecting {
    /// Whether the server is asked for TLS first. (`allow` tries without first.)
    pub fn asks(&self) -> bool {
        !matches!(self.mode, SslMode::Disable | SslMode::Allow)
    }

    /// Whether a server without TLS is refused.
    pub fn requires(&self) -> bool {
        matches!(self.mode, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull)
    }

    /// The same for `tokio_postgres::Config::connect`; goes with [`Self::ssl_mode`].
    pub fn for_tokio_postgres(&self) -> MakeRustlsConnect {
        MakeRustlsConnect::new(ClientConfig::clone(&self.config))
    }

    /// The mode for `tokio_postgres::Config::ssl_mode` and this host. It does not know `allow`, for which `prefer` is
    /// at least as safe and reaches the same servers. A Unix socket (a host that is a directory) has no TLS.
    pub fn ssl_mode(&self, host: &str) -> tokio_postgres::config::SslMode {
        match self.mode {
            _ if host.starts_with('/') => tokio_postgres::config::SslMode::Disable,
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Allow | SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => tokio_postgres::config::SslMode::Require,
        }
    }
}

/// The name that a server's certificate must be for: a host name or an IP address.
///
/// # Errors
/// If it can be neither, as a socket's directory.
pub fn server_name(host: &str) -> Result<ServerName<'static>, InvalidDnsNameError> {
    ServerName::try_from(host).map(|name| name.to_owned())
}

fn connecting(tls: &config::Tls) -> Result<Connecting, TlsError> {
    let mode = tls.server_tls_sslmode;
    let verify = match mode {
        SslMode::Disable | SslMode::Allow | SslMode::Prefer | SslMode::Require => Verify::Nothing,
        SslMode::VerifyCa | SslMode::VerifyFull => {
            let missing = TlsError::Missing { mode: "server_tls_sslmode", key: "server_tls_ca_file" };
            let ca_file = tls.server_tls_ca_file.as_ref().ok_or(missing)?;
            let trusted = Trusted { roots: authorities(ca_file)?, certificates: certificates(ca_file)? };
            if mode == SslMode::VerifyFull { Verify::Full(trusted) } else { Verify::Chain(trusted) }
        }
    };
    let provider = provider();
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { verify, provider }));
    let mut config = match (&tls.server_tls_cert_file, &tls.server_tls_key_file) {
        (Some(cert_file), Some(key_file)) => {
            let certified = certified_key(cert_file, key_file)?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
        (None, None) => builder.with_no_client_auth(),
        (Some(_), None) => {
            return Err(TlsError::Missing { mode: "server_tls_cert_file", key: "server_tls_key_file" });
        }
        (None, Some(_)) => {
            return Err(TlsError::Missing { mode: "server_tls_key_file", key: "server_tls_cert_file" });
        }
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    // PostgreSQL does not resume sessions.
    config.resumption = Resumption::disabled();
    Ok(Connecting { mode, config: Arc::new(config) })
}

/// How much of a server's certificate is believed only after a look.
#[derive(Debug)]
enum Verify {
    /// Anything goes: `require` and below protect from listening, not from a false server. Still the server must
    /// hold the certificate's key, so that channel binding means something.
    Nothing,
    /// Signed by one of these, for whatever name.
    Chain(Trusted),
    /// Signed by one of these, for the host that was asked for.
    Full(Trusted),
}

/// What `server_tls_ca_file` holds.
#[derive(Debug)]
struct Trusted {
    roots: Arc<RootCertStore>,
    certificates: Vec<CertificateDer<'static>>,
}

/// libpq's and PgBouncer's steps of verification. As in both without a CRL file, revocation is not looked up.
/// Of X.509 version 1 certificates webpki verifies none.
#[derive(Debug)]
struct Verifier {
    verify: Verify,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn chain(
        &self,
        trusted: &Trusted,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        // A self-signed certificate that is itself in the CA file, which is how most begin. OpenSSL makes it a CA's,
        // and webpki would not take that for a server's.
        if trusted.certificates.contains(end_entity) {
            return in_time(end_entity, now);
        }
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &trusted.roots, intermediates, now, algorithms)
    }
}

fn broken() -> rustls::Error {
    CertificateError::BadEncoding.into()
}

fn in_time(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    let validity = Certificate::from_der(certificate).map_err(|_| broken())?.tbs_certificate.validity;
    let now = Duration::from_secs(now.as_secs());
    if now < validity.not_before.to_unix_duration() {
        Err(CertificateError::NotValidYet.into())
    } else if now > validity.not_after.to_unix_duration() {
        Err(CertificateError::Expired.into())
    } else {
        Ok(())
    }
}

/// Whether a certificate is for a host. One without any subject alternative name is for its common name, as in libpq:
/// the certificates of PostgreSQL's manual are such.
fn for_host(certificate: &CertificateDer<'_>, host: &ServerName<'_>) -> Result<(), rustls::Error> {
    let parsed = Certificate::from_der(certificate).map_err(|_| broken())?;
    let extensions = parsed.tbs_certificate.extensions.unwrap_or_default();
    if extensions.iter().any(|extension| extension.extn_id == rfc5912::ID_CE_SUBJECT_ALT_NAME) {
        return verify_server_name(&ParsedCertificate::try_from(certificate)?, host);
    }
    let attributes = parsed.tbs_certificate.subject.0.iter().flat_map(|name| name.0.iter());
    let mut names = attributes.filter(|attribute| attribute.oid == rfc4519::CN).filter_map(|attribute| {
        // The kinds of string that a name is written in; all have their text as bytes.
        let is_text = matches!(attribute.value.tag(), Tag::Utf8String | Tag::PrintableString | Tag::Ia5String);
        is_text.then(|| attribute.value.value())
    });
    let host = host.to_str();
    // No wildcards: who has those has subject alternative names too.
    if names.any(|name| name.eq_ignore_ascii_case(host.as_bytes())) {
        Ok(())
    } else {
        Err(CertificateError::NotValidForName.into())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match &self.verify {
            Verify::Nothing => {}
            Verify::Chain(trusted) => self.chain(trusted, end_entity, intermediates, now)?,
            Verify::Full(trusted) => {
                self.chain(trusted, end_entity, intermediates, now)?;
                for_host(end_entity, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        match self.verify {
            // Certificates of X.509 version 1, which `openssl x509 -req` makes in PostgreSQL's manual, are refused by
            // webpki. Where the certificate is not believed anyway its key is enough.
            Verify::Nothing => {
                let parsed = Certificate::from_der(cert).map_err(|_| broken())?;
                let key = parsed.tbs_certificate.subject_public_key_info.to_der().map_err(|_| broken())?;
                verify_tls13_signature_with_raw_key(message, &SubjectPublicKeyInfoDer::from(key), dss, algorithms)
            }
            Verify::Chain(_) | Verify::Full(_) => verify_tls13_signature(message, cert, dss, algorithms),
        }
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SigningKey as _};
    use rustls::ServerConfig;
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
    use rustls::sign::CertifiedKey;
    use x509_cert::certificate::Version;
    use x509_cert::der::asn1::BitString;

    use super::*;
    use crate::client::tls::ServerTls;
    use crate::tls::testing::{Ca, handshake, write};

    fn server(ca: &Ca, host: &str) -> Arc<ServerConfig> {
        let (crt, key) = ca.sign(host);
        let tls = config::Tls {
            client_tls_sslmode: SslMode::Require,
            client_tls_cert_file: Some(crt),
            client_tls_key_file: Some(key),
            ..config::Tls::default()
        };
        Arc::clone(&ServerTls::new(&tls).unwrap().current().unwrap().config)
    }

    fn tls(mode: SslMode, ca: &Ca) -> config::Tls {
        config::Tls { server_tls_sslmode: mode, server_tls_ca_file: Some(ca.file.clone()), ..config::Tls::default() }
    }

    #[test]
    fn each_mode_verifies_as_much_as_it_says() {
        let (ours, other) = (Ca::new(), Ca::new());
        let right = server(&ours, "db.example.com");
        let wrong_ca = server(&other, "db.example.com");
        let wrong_name = server(&ours, "elsewhere.example.com");
        // Whether it connects to: ours, wrong CA, wrong name; whether it asks for TLS, and insists.
        for (mode, expected) in [
            (SslMode::Disable, [true, true, true, false, false]),
            (SslMode::Allow, [true, true, true, false, false]),
            (SslMode::Prefer, [true, true, true, true, false]),
            (SslMode::Require, [true, true, true, true, true]),
            (SslMode::VerifyCa, [true, false, true, true, true]),
            (SslMode::VerifyFull, [true, false, false, true, true]),
        ] {
            let client = ClientTls::new(&tls(mode, &ours)).unwrap().current();
            let connects = |server| handshake(&client.config, "db.example.com", server).is_ok();
            let seen = [connects(&right), connects(&wrong_ca), connects(&wrong_name), client.asks(), client.requires()];
            assert_eq!(seen, expected, "{mode:?}");
        }
    }

    #[test]
    fn verify_full_knows_addresses() {
        let ca = Ca::new();
        let client = ClientTls::new(&tls(SslMode::VerifyFull, &ca)).unwrap().current();
        let server = server(&ca, "127.0.0.1");
        assert!(handshake(&client.config, "127.0.0.1", &server).is_ok());
        assert!(handshake(&client.config, "127.0.0.2", &server).is_err());
    }

    /// A server with a certificate as `openssl req -x509` makes it: self-signed, a CA's, without alternative names.
    fn self_signed(days: std::ops::Range<i32>) -> (Ca, Arc<ServerConfig>) {
        let ca = Ca::with(|params| {
            let mut name = DistinguishedName::new();
            name.push(DnType::CommonName, "db.example.com");
            params.distinguished_name = name;
            params.not_before = rcgen::date_time_ymd(days.start, 1, 1);
            params.not_after = rcgen::date_time_ymd(days.end, 1, 1);
        });
        let server = server_with(certificates(&ca.file).unwrap(), ca.key());
        (ca, server)
    }

    #[test]
    fn a_self_signed_certificate_can_be_its_own_ca() {
        let (ca, server) = self_signed(2000..2500);
        let (_, other) = self_signed(2000..2500);
        let (expired_ca, expired) = self_signed(2000..2001);
        let (early_ca, early) = self_signed(2400..2500);
        for (mode, ca, host, server, expected) in [
            (SslMode::VerifyCa, &ca, "localhost", &server, true),
            (SslMode::VerifyFull, &ca, "DB.example.com", &server, true),
            (SslMode::VerifyFull, &ca, "localhost", &server, false),
            (SslMode::VerifyFull, &ca, "db.example.com", &other, false),
            (SslMode::VerifyCa, &ca, "db.example.com", &other, false),
            (SslMode::VerifyCa, &expired_ca, "db.example.com", &expired, false),
            (SslMode::VerifyCa, &early_ca, "db.example.com", &early, false),
            (SslMode::Require, &ca, "localhost", &expired, true),
        ] {
            let client = ClientTls::new(&tls(mode, ca)).unwrap().current();
            assert_eq!(handshake(&client.config, host, server).is_ok(), expected, "{mode:?} {host}");
        }
    }

    #[test]
    fn a_common_name_does_not_count_beside_alternative_names() {
        let ca = Ca::new();
        let (crt, key) = ca.sign_with("elsewhere.example.com", |params| {
            params.distinguished_name.push(DnType::CommonName, "db.example.com");
        });
        let key = KeyPair::from_pem(&std::fs::read_to_string(key).unwrap()).unwrap();
        let server = server_with(certificates(&crt).unwrap(), &key);
        let client = ClientTls::new(&tls(SslMode::VerifyFull, &ca)).unwrap().current();
        assert!(handshake(&client.config, "elsewhere.example.com", &server).is_ok());
        assert!(handshake(&client.config, "db.example.com", &server).is_err());
    }

    #[test]
    fn alpn_is_offered() {
        let ca = Ca::new();
        let client = ClientTls::new(&tls(SslMode::Require, &ca)).unwrap().current();
        let (client, _) = handshake(&client.config, "localhost", &server(&ca, "localhost")).unwrap();
        assert_eq!(client.alpn_protocol(), Some(ALPN));
    }

    /// A server with a certificate of X.509 version 1.
    fn version_1() -> Arc<ServerConfig> {
        let key = KeyPair::generate().unwrap();
        let signed = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
        let mut certificate = Certificate::from_der(signed.der()).unwrap();
        certificate.tbs_certificate.version = Version::V1;
        certificate.tbs_certificate.extensions = None;
        let signature = key.sign(&certificate.tbs_certificate.to_der().unwrap()).unwrap();
        certificate.signature = BitString::from_bytes(&signature).unwrap();
        server_with(vec![CertificateDer::from(certificate.to_der().unwrap())], &key)
    }

    fn server_with(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Arc<ServerConfig> {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = provider().key_provider.load_private_key(key).unwrap();
        let resolver = SingleCertAndKey::from(CertifiedKey::new(chain, key));
        let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
        Arc::new(builder.with_no_client_auth().with_cert_resolver(Arc::new(resolver)))
    }

    #[test]
    fn who_does_not_hold_the_key_is_refused_in_every_mode() {
        let ca = Ca::new();
        let (crt, _) = ca.sign("localhost");
        let thief = server_with(certificates(&crt).unwrap(), &KeyPair::generate().unwrap());
        for mode in [SslMode::Allow, SslMode::Prefer, SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull] {
            let client = ClientTls::new(&tls(mode, &ca)).unwrap().current();
            assert!(handshake(&client.config, "localhost", &thief).is_err(), "{mode:?}");
        }
    }

    #[test]
    fn a_server_with_an_old_certificate_can_be_used_without_verification() {
        let ca = Ca::new();
        let old = version_1();
        let connects = |mode| {
            let client = ClientTls::new(&tls(mode, &ca)).unwrap().current();
            handshake(&client.config, "localhost", &old).is_ok()
        };
        assert!(connects(SslMode::Require));
        assert!(!connects(SslMode::VerifyCa));
    }

    #[test]
    fn a_broken_file_leaves_the_old_one_in_use() {
        let ca = Ca::new();
        let good = tls(SslMode::VerifyFull, &ca);
        let client = ClientTls::new(&good).unwrap();
        let before = client.current();
        let broken = ca.path("broken.crt");
        write(&broken, "nonsense");
        let bad = config::Tls { server_tls_ca_file: Some(broken), ..good.clone() };
        assert!(client.reload(&bad).unwrap_err().to_string().contains("holds no certificate"));
        let none = config::Tls { server_tls_ca_file: None, ..good.clone() };
        assert_eq!(client.reload(&none).unwrap_err().to_string(), "server_tls_sslmode needs server_tls_ca_file");
        let half = config::Tls { server_tls_cert_file: Some(ca.file.clone()), ..good.clone() };
        assert_eq!(client.reload(&half).unwrap_err().to_string(), "server_tls_cert_file needs server_tls_key_file");
        assert!(Arc::ptr_eq(&before, &client.current()));
        // A new CA counts from now on.
        let other = Ca::new();
        client.reload(&tls(SslMode::VerifyFull, &other)).unwrap();
        let server = server(&ca, "localhost");
        assert!(handshake(&before.config, "localhost", &server).is_ok());
        assert!(handshake(&client.current().config, "localhost", &server).is_err());
    }

    #[test]
    fn tokio_postgres_asks_for_as_much() {
        use tokio_postgres::config::SslMode as Theirs;

        let ca = Ca::new();
        for (mode, host, expected) in [
            (SslMode::Disable, "localhost", Theirs::Disable),
            (SslMode::Prefer, "localhost", Theirs::Prefer),
            (SslMode::Require, "localhost", Theirs::Require),
            (SslMode::VerifyFull, "10.0.0.1", Theirs::Require),
            (SslMode::VerifyFull, "/run/postgresql", Theirs::Disable),
        ] {
            let client = ClientTls::new(&tls(mode, &ca)).unwrap().current();
            assert_eq!(client.ssl_mode(host), expected, "{mode:?} {host}");
        }
    }
}
