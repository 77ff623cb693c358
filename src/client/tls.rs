//! TLS towards clients: certificate, modes, reload.
//!
//! ALPN: a client that offers protocols must offer `postgresql`, else the handshake fails; one that offers none is
//! let in. Whether it may be let in is the handshake's decision, see [`is_postgresql`]: direct TLS requires it.

use std::sync::Arc;

use arc_swap::ArcSwapOption;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::{ServerConfig, ServerConnection};

use crate::config::{self, SslMode};
use crate::tls::{ALPN, TlsError, authorities, certified_key, provider, server_end_point};

/// TLS towards clients as it is configured now. Connections keep what they began with.
#[derive(Debug)]
pub struct ServerTls {
    current: ArcSwapOption<Accepting>,
}

/// One certificate with everything that belongs to it.
#[derive(Debug)]
pub struct Accepting {
    /// For `tokio_rustls::TlsAcceptor`.
    pub config: Arc<ServerConfig>,
    /// What SCRAM-SHA-256-PLUS binds to with this certificate; without it, it must not be offered.
    pub end_point: Option<Vec<u8>>,
    /// Whether a client without TLS is refused. Clients on a Unix socket are never asked for TLS.
    pub required: bool,
}

impl ServerTls {
    /// Reads certificate and key.
    ///
    /// # Errors
    /// [`TlsError`] if a file is missing or broken.
    pub fn new(tls: &config::Tls) -> Result<Self, TlsError> {
        Ok(Self { current: ArcSwapOption::new(accepting(tls)?) })
    }

    /// Reads certificate and key again, for connections from now on.
    ///
    /// # Errors
    /// [`TlsError`] if a file is missing or broken; what was in use stays in use.
    pub fn reload(&self, tls: &config::Tls) -> Result<(), TlsError> {
        self.current.store(accepting(tls)?);
        Ok(())
    }

    /// What a connection that arrives now gets; `None` if TLS is disabled.
    pub fn current(&self) -> Option<Arc<Accepting>> {
        self.current.load_full()
    }
}

/// Whether client and we have agreed on ALPN `postgresql`. A client that began with TLS instead of an SSLRequest
/// must have, so that no other protocol's client can be made to talk to us (the ALPACA attack).
pub fn is_postgresql(connection: &ServerConnection) -> bool {
    connection.alpn_protocol() == Some(ALPN)
}

fn accepting(tls: &config::Tls) -> Result<Option<Arc<Accepting>>, TlsError> {
    let mode = tls.client_tls_sslmode;
    if mode == SslMode::Disable {
        return Ok(None);
    }
    let needed = |key| TlsError::Missing { mode: "client_tls_sslmode", key };
    let cert_file = tls.client_tls_cert_file.as_ref().ok_or_else(|| needed("client_tls_cert_file"))?;
    let key_file = tls.client_tls_key_file.as_ref().ok_or_else(|| needed("client_tls_key_file"))?;
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let builder = if matches!(mode, SslMode::VerifyCa | SslMode::VerifyFull) {
        let ca_file = tls.client_tls_ca_file.as_ref().ok_or_else(|| needed("client_tls_ca_file"))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(authorities(ca_file)?, provider()).build();
        builder.with_client_cert_verifier(verifier.map_err(|error| TlsError::Verifier(error.to_string()))?)
    } else {
        builder.with_no_client_auth()
    };
    let certified = certified_key(cert_file, key_file)?;
    let end_point = certified.cert.first().and_then(|certificate| server_end_point(certificate));
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![ALPN.to_vec()];
    // As PostgreSQL: no resumption. Its clients do not use it, and a session must not outlive a change of CA.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let required = matches!(mode, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull);
    Ok(Some(Arc::new(Accepting { config: Arc::new(config), end_point, required })))
}

#[cfg(test)]
mod tests {
    use rustls::ClientConfig;

    use super::*;
    use crate::pool::tls::ClientTls;
    use crate::tls::testing::{Ca, handshake, write};

    const ALL: [SslMode; 6] =
        [SslMode::Disable, SslMode::Allow, SslMode::Prefer, SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull];

    fn tls(mode: SslMode, ca: &Ca) -> config::Tls {
        let (crt, key) = ca.sign("localhost");
        config::Tls {
            client_tls_sslmode: mode,
            client_tls_cert_file: Some(crt),
            client_tls_key_file: Some(key),
            client_tls_ca_file: Some(ca.file.clone()),
            ..config::Tls::default()
        }
    }

    /// A client that believes everything, with or without a certificate.
    fn client(ca: Option<&Ca>) -> Arc<ClientConfig> {
        let (crt, key) = ca.map(|ca| ca.sign("client")).unzip();
        let tls = config::Tls { server_tls_cert_file: crt, server_tls_key_file: key, ..config::Tls::default() };
        Arc::clone(&ClientTls::new(&tls).unwrap().current().config)
    }

    #[test]
    fn each_mode_asks_clients_for_as_much_as_it_says() {
        let (ca, other) = (Ca::new(), Ca::new());
        for mode in ALL {
            let server = ServerTls::new(&tls(mode, &ca)).unwrap().current();
            let Some(server) = server else {
                assert_eq!(mode, SslMode::Disable);
                continue;
            };
            let verifies = matches!(mode, SslMode::VerifyCa | SslMode::VerifyFull);
            assert_eq!(server.required, verifies || mode == SslMode::Require);
            for (client, is_welcome) in
                [(client(None), !verifies), (client(Some(&other)), !verifies), (client(Some(&ca)), true)]
            {
                assert_eq!(handshake(&client, "localhost", &server.config).is_ok(), is_welcome, "{mode:?}");
            }
        }
    }

    #[test]
    fn alpn_is_postgresql_or_absent() {
        let ca = Ca::new();
        let server = ServerTls::new(&tls(SslMode::Require, &ca)).unwrap().current().unwrap();
        let offering = |protocols: &[&[u8]]| {
            let mut client = ClientConfig::clone(&client(None));
            client.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
            handshake(&Arc::new(client), "localhost", &server.config).map(|(_, server)| is_postgresql(&server))
        };
        assert_eq!(offering(&[b"postgresql"]), Ok(true));
        assert_eq!(offering(&[b"h2", b"postgresql"]), Ok(true));
        assert_eq!(offering(&[]), Ok(false));
        assert_eq!(offering(&[b"h2"]), Err(rustls::Error::NoApplicationProtocol));
    }

    #[test]
    fn the_end_point_is_the_certificate_that_the_client_sees() {
        let ca = Ca::new();
        let mode = tls(SslMode::Require, &ca);
        let tls = ServerTls::new(&mode).unwrap();
        let before = tls.current().unwrap();
        let (seen, _) = handshake(&client(None), "localhost", &before.config).unwrap();
        let seen = server_end_point(&seen.peer_certificates().unwrap()[0]);
        assert!(seen.is_some());
        assert_eq!(seen, before.end_point);
        // A connection that began before a reload keeps the end point of its own certificate.
        ca.sign("localhost");
        tls.reload(&mode).unwrap();
        assert_ne!(tls.current().unwrap().end_point, before.end_point);
        assert_eq!(seen, before.end_point);
    }

    #[test]
    fn a_broken_file_leaves_the_old_certificate_in_use() {
        let ca = Ca::new();
        let good = tls(SslMode::Require, &ca);
        let server = ServerTls::new(&good).unwrap();
        let before = server.current().unwrap();
        let other = Ca::new();
        let (stranger, _) = other.sign("localhost");
        let stranger = std::fs::read_to_string(stranger).unwrap();
        let broken = ca.path("broken.crt");
        let with = |text: &str| {
            write(&broken, text);
            config::Tls { client_tls_cert_file: Some(broken.clone()), ..good.clone() }
        };
        for (text, problem) in [
            ("", "holds no certificate"),
            ("-----BEGIN CERTIFICATE-----\nAAAA", "cannot use"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "cannot use"),
            (stranger.as_str(), "does not belong to"),
        ] {
            let error = server.reload(&with(text)).unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains("broken.crt"), "{error}");
            assert!(Arc::ptr_eq(&before, &server.current().unwrap()));
        }
        let gone = config::Tls { client_tls_key_file: Some(ca.path("gone.key")), ..good.clone() };
        assert!(server.reload(&gone).unwrap_err().to_string().contains("gone.key"));
        let none = config::Tls { client_tls_key_file: None, ..good.clone() };
        assert_eq!(server.reload(&none).unwrap_err().to_string(), "client_tls_sslmode needs client_tls_key_file");
        assert!(Arc::ptr_eq(&before, &server.current().unwrap()));
        server.reload(&good).unwrap();
        assert!(!Arc::ptr_eq(&before, &server.current().unwrap()));
    }
}
