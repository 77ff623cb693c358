//! TLS towards clients, as drivers and bytes see it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgusher::config::{Config, SslMode};
use rustls::RootCertStore;
use rustls::pki_types::ServerName;
use tokio_postgres::config::{ChannelBinding, SslMode as ClientMode, SslNegotiation};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::postgres::Cluster;
use crate::raw::{PATIENCE, Raw, V3_0};
use crate::world::{APP_PASSWORD, Setup, World};

/// Makes a certificate for these names and writes it; whom a client has to trust.
fn certificate(dir: &Path, names: &[&str]) -> rustls::pki_types::CertificateDer<'static> {
    let names: Vec<String> = names.iter().map(|&n| n.to_owned()).collect();
    let made = rcgen::generate_simple_self_signed(names).unwrap();
    std::fs::write(dir.join("server.crt"), made.cert.pem()).unwrap();
    std::fs::write(dir.join("server.key"), made.signing_key.serialize_pem()).unwrap();
    made.cert.der().clone()
}

fn trusting(certificate: &rustls::pki_types::CertificateDer<'static>, alpn: Option<&[u8]>) -> rustls::ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.map(<[u8]>::to_vec).into_iter().collect();
    config
}

async fn world(dir: &Path, change: impl FnOnce(&mut Config)) -> World {
    World::start(|config| {
        config.tls.client_tls_sslmode = SslMode::Require;
        config.tls.client_tls_cert_file = Some(dir.join("server.crt"));
        config.tls.client_tls_key_file = Some(dir.join("server.key"));
        config.identify.sni_suffix = Some("db.example.com".into());
        change(config);
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn drivers_over_tls_with_channel_binding_and_server_name() {
    let dir = tempfile::tempdir().unwrap();
    let trusted = certificate(dir.path(), &["client_001.db.example.com", "client_002.db.example.com", "localhost"]);
    let world = world(dir.path(), |_| {}).await;
    let connect = async |host: &str, user: &str, change: &dyn Fn(&mut tokio_postgres::Config)| {
        let mut config = tokio_postgres::Config::new();
        config.hostaddr("127.0.0.1".parse().unwrap()).host(host).port(world.port).user(user).password(APP_PASSWORD);
        config.dbname("postgres").ssl_mode(ClientMode::Require);
        change(&mut config);
        let alpn = (config.get_ssl_negotiation() == SslNegotiation::Direct).then_some(&b"postgresql"[..]);
        let (client, connection) = config.connect(MakeRustlsConnect::new(trusting(&trusted, alpn))).await?;
        tokio::spawn(connection);
        let row = client.query_one("SELECT current_user::text", &[]).await?;
        Ok::<String, tokio_postgres::Error>(row.get(0))
    };
    let plain = |_: &mut tokio_postgres::Config| {};
    assert_eq!(connect("localhost", "app.client_009", &plain).await.unwrap(), "client_009");
    // The server name says who it is; two names that differ are an error.
    assert_eq!(connect("client_001.db.example.com", "app", &plain).await.unwrap(), "client_001");
    assert_eq!(connect("client_002.db.example.com", "app", &plain).await.unwrap(), "client_002");
    let error = connect("client_001.db.example.com", "app.client_002", &plain).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "28000");
    // SCRAM-SHA-256-PLUS, and TLS from the first byte.
    let bound = |config: &mut tokio_postgres::Config| {
        config.channel_binding(ChannelBinding::Require);
    };
    assert_eq!(connect("localhost", "app.client_001", &bound).await.unwrap(), "client_001");
    let direct = |config: &mut tokio_postgres::Config| {
        config.ssl_negotiation(SslNegotiation::Direct);
    };
    assert_eq!(connect("localhost", "app.client_001", &direct).await.unwrap(), "client_001");
    // A wrong password is no other error here.
    let wrong = |config: &mut tokio_postgres::Config| {
        config.password("wrong");
    };
    assert_eq!(connect("localhost", "app.client_001", &wrong).await.unwrap_err().code().unwrap().code(), "28P01");
    // Without TLS: refused, in the clear.
    let refused = Raw::login(world.port, &[("user", "app.client_001")], APP_PASSWORD).await.err().unwrap();
    assert_eq!((refused.error.code().as_str(), refused.error.field(b'M').as_str()), ("28000", "SSL required"));
}

async fn tls(port: u16, config: rustls::ClientConfig, ask: bool) -> std::io::Result<Raw> {
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    if ask {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        socket.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await.unwrap();
        assert_eq!(socket.read_u8().await.unwrap(), b'S');
    }
    let name = ServerName::try_from("localhost").unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, socket).await?;
    Ok(Raw::over(stream))
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let trusted = certificate(dir.path(), &["localhost"]);
    let world = world(dir.path(), |config| config.tls.client_tls_sslmode = SslMode::Prefer).await;
    let who = [("user", "app.client_001")];
    // The mechanisms on offer: PLUS with TLS only.
    let mut raw = tls(world.port, trusting(&trusted, None), true).await.unwrap();
    let transcript = raw.start(V3_0, &who, APP_PASSWORD).await.unwrap();
    assert!(transcript.starts_with("R10(SCRAM-SHA-256-PLUS,SCRAM-SHA-256)"), "{transcript}");
    let mut plain = Raw::tcp(world.port).await;
    assert!(plain.start(V3_0, &who, APP_PASSWORD).await.unwrap().starts_with("R10(SCRAM-SHA-256)"));
    // Direct TLS needs ALPN, and the right one.
    let mut direct = tls(world.port, trusting(&trusted, Some(b"postgresql")), false).await.unwrap();
    direct.start(V3_0, &who, APP_PASSWORD).await.unwrap();
    for (alpn, ask) in [(None, false), (Some(&b"h2"[..]), false), (Some(&b"h2"[..]), true)] {
        if let Ok(mut raw) = tls(world.port, trusting(&trusted, alpn), ask).await {
            raw.send(&crate::raw::startup_packet(V3_0, &who)).await;
            let answer = raw.next().await;
            assert!(answer.is_none_or(|m| m.tag == b'E' && m.code() == "08P01"), "{alpn:?} {ask}");
        }
    }
    // A cancel over TLS.
    raw.compose(|b| b.query("SELECT pg_sleep(30)")).await;
    world.admin_until("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'", 1).await;
    let mut cancel = tls(world.port, trusting(&trusted, None), true).await.unwrap();
    let mut packet = b"\0\0\0\x10\x04\xd2\x16\x2e".to_vec();
    packet.extend(raw.pid.to_be_bytes());
    packet.extend(&raw.secret);
    cancel.send(&packet).await;
    assert_eq!(crate::raw::show(&raw.until_ready().await), "E(57014) Z(I)");
    // Much data, both ways.
    raw.compose(|b| b.query(&format!("SELECT repeat('x', 5000000), length('{}')", "y".repeat(3_000_000)))).await;
    let said = raw.until_ready().await;
    let values = said.iter().find(|m| m.tag == b'D').unwrap().values();
    assert_eq!((values[0].len(), values[1].as_str()), (5_000_000, "3000000"));
    // What comes in the clear behind an SSLRequest is never looked at.
    let mut sneaky = Raw::tcp(world.port).await;
    let mut bytes = b"\0\0\0\x08\x04\xd2\x16\x2f".to_vec();
    bytes.extend(crate::raw::startup_packet(V3_0, &who));
    sneaky.send(&bytes).await;
    let answer = sneaky.until(b'E').await;
    assert_eq!(answer.last().unwrap().code(), "08P01");
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_shows_a_new_certificate() {
    let clusters = vec![tokio::task::spawn_blocking(|| Arc::new(Cluster::start())).await.unwrap()];
    let keys = tempfile::tempdir().unwrap();
    let old = certificate(keys.path(), &["localhost"]);
    let toml = format!(
        "[tls]\nclient_tls_sslmode = \"require\"\nclient_tls_cert_file = \"{0}/server.crt\"\nclient_tls_key_file = \"{0}/server.key\"\n",
        keys.path().display()
    );
    let setup = Setup::new(&clusters, &toml);
    let process = setup.start().await;
    let mut open = tls(setup.port, trusting(&old, None), true).await.unwrap();
    open.start(V3_0, &[("user", "app.client_001")], APP_PASSWORD).await.unwrap();
    let new = certificate(keys.path(), &["localhost"]);
    assert!(tls(setup.port, trusting(&new, None), true).await.is_err());
    process.signal(nix::sys::signal::Signal::SIGHUP);
    let began = Instant::now();
    while tls(setup.port, trusting(&new, None), true).await.is_err() {
        assert!(began.elapsed() < PATIENCE, "{}", process.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(open.value("SELECT 1").await, "1");
}
