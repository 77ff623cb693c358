//! A client of the proxy itself: through its listener, with a tenant's own login.

use std::future::poll_fn;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use parking_lot::Mutex;
use tokio_postgres::config::SslMode as Asked;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{AsyncMessage, Connection, NoTls, SimpleQueryMessage, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::attack::Heard;
use crate::config::{Config, SslMode, Tls};
use crate::pool::tls::ClientTls;

/// How to reach this proxy.
pub struct Front {
    host: String,
    port: u16,
    tls: Option<MakeRustlsConnect>,
}

impl Front {
    /// The Unix socket if there is one, else the first address; with TLS where clients must use it.
    pub fn new(config: &Config, tcp: Option<&SocketAddr>, unix: Option<&Path>) -> Option<Self> {
        if let Some(dir) = unix.and_then(Path::parent) {
            let port = unix?.extension()?.to_str()?.parse().ok()?;
            return Some(Self { host: dir.to_str()?.to_owned(), port, tls: None });
        }
        let address = tcp?;
        let host = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.to_string(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.to_string(),
            ip => ip.to_string(),
        };
        let plain = matches!(config.tls.client_tls_sslmode, SslMode::Disable | SslMode::Allow | SslMode::Prefer);
        // It talks to itself: there is no other side to be told apart by a certificate.
        let unverified = Tls { server_tls_sslmode: SslMode::Require, ..Tls::default() };
        let tls = if plain { None } else { Some(ClientTls::new(&unverified).ok()?.current().for_tokio_postgres()) };
        Some(Self { host, port: address.port(), tls })
    }

    /// Logs in.
    ///
    /// # Errors
    /// What the proxy said.
    pub(super) async fn connect(&self, who: &str, password: &str, name: &str) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host(&self.host).port(self.port).user(who).password(password).dbname(who).application_name(name);
        config.connect_timeout(Duration::from_secs(10));
        let heard = Arc::<Mutex<Vec<String>>>::default();
        let client = match &self.tls {
            Some(tls) => drive(config.ssl_mode(Asked::Require), tls.clone(), heard.clone()).await?,
            None => drive(config.ssl_mode(Asked::Disable), NoTls, heard.clone()).await?,
        };
        Ok(Client { client, heard })
    }
}

async fn drive<T>(
    config: &tokio_postgres::Config,
    tls: T,
    heard: Arc<Mutex<Vec<String>>>,
) -> Result<tokio_postgres::Client, tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket> + Send + 'static,
    T::Stream: Send + 'static,
    T::TlsConnect: Send,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let (client, connection) = config.connect(tls).await?;
    let mut connection: Connection<Socket, T::Stream> = connection;
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            match message {
                AsyncMessage::Notice(notice) => heard.lock().push(notice.message().to_owned()),
                AsyncMessage::Notification(news) => heard.lock().push(news.payload().to_owned()),
                _ => {}
            }
        }
    });
    Ok(client)
}

/// A connection through the proxy.
pub(super) struct Client {
    client: tokio_postgres::Client,
    /// Notices and notifications.
    heard: Arc<Mutex<Vec<String>>>,
}

impl Client {
    /// Runs statements; the first error ends it.
    ///
    /// # Errors
    /// What the server or the proxy said.
    pub(super) async fn run(&self, sql: &str) -> Result<Vec<Vec<String>>, tokio_postgres::Error> {
        let mut rows = Vec::new();
        for message in self.client.simple_query(sql).await? {
            if let SimpleQueryMessage::Row(row) = message {
                rows.push((0..row.len()).map(|at| row.get(at).unwrap_or_default().to_owned()).collect());
            }
        }
        Ok(rows)
    }

    /// Says one message and listens to whatever comes.
    pub(super) async fn say(&self, sql: &str, value: Option<&str>, heard: &mut Heard) {
        let said = match value {
            Some(value) => self.run_with(sql, value).await,
            None if sql.starts_with("COPY") && sql.ends_with("STDOUT") => self.copy_out(sql).await,
            None => self.run(sql).await,
        };
        match said {
            Ok(rows) => heard.values.extend(rows.into_iter().flatten()),
            Err(error) => {
                heard.failed += 1;
                match error.as_db_error() {
                    Some(db) => {
                        let parts = [Some(db.message()), db.detail(), db.hint(), db.where_()];
                        heard.all.extend(parts.into_iter().flatten().map(str::to_owned));
                    }
                    None => heard.all.push(error.to_string()),
                }
            }
        }
        heard.all.extend(heard.values.iter().cloned());
        heard.all.append(&mut self.heard.lock());
    }

    async fn run_with(&self, sql: &str, value: &str) -> Result<Vec<Vec<String>>, tokio_postgres::Error> {
        let rows = self.client.query(sql, &[&value]).await?;
        let cells = |row: &tokio_postgres::Row| {
            (0..row.len()).filter_map(|at| row.try_get::<_, Option<String>>(at).ok().flatten()).collect()
        };
        Ok(rows.iter().map(cells).collect())
    }

    async fn copy_out(&self, sql: &str) -> Result<Vec<Vec<String>>, tokio_postgres::Error> {
        let stream = self.client.copy_out(sql).await?;
        let parts: Vec<_> = stream.try_collect().await?;
        Ok(parts.iter().map(|part| vec![String::from_utf8_lossy(part).into_owned()]).collect())
    }
}
