//! Ordinary SQL connections to the catalog and, as administrator, to shards: the one place where they are opened.
//!
//! Every connection notices a silently dead peer by itself (keepalives, `tcp_user_timeout`) and starts with an empty
//! `search_path`, so that no name in our SQL can be captured by an object that a tenant made.

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_postgres::{AsyncMessage, Client, Connection, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::{Secret, SslMode};

/// Where and as whom to log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Host name, address, or directory of a Unix socket (starts with `/`).
    pub host: String,
    /// Port.
    pub port: u16,
    /// Database.
    pub database: String,
    /// User.
    pub user: String,
    /// Its password; empty for none.
    pub password: Secret,
}

impl Endpoint {
    /// The same server and user, another database.
    #[must_use]
    pub fn database(&self, database: &str) -> Self {
        Self { database: database.to_owned(), ..self.clone() }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{} as {}", self.host, self.port, self.database, self.user)
    }
}

/// Opens connections.
#[derive(Clone)]
pub struct Connector {
    /// How long connecting and logging in may take.
    pub connect_timeout: Duration,
    /// How long one statement may take.
    pub statement_timeout: Duration,
    /// TLS, and whether it is asked for; `None` is plain.
    pub tls: Option<(MakeRustlsConnect, SslMode)>,
}

impl Connector {
    /// A connector without TLS.
    pub fn plain(connect_timeout: Duration) -> Self {
        Self { connect_timeout, statement_timeout: Duration::from_secs(60), tls: None }
    }

    /// The same, with another limit for statements.
    #[must_use]
    pub fn statement_timeout(&self, statement_timeout: Duration) -> Self {
        Self { statement_timeout, ..self.clone() }
    }

    /// Connects and logs in. A task drives the connection until it closes or the client is dropped.
    ///
    /// # Errors
    /// What PostgreSQL or the network said; an error that says "timed out" when `connect_timeout` is over.
    pub async fn connect(&self, at: &Endpoint) -> Result<Client, ConnectError> {
        self.open(at, Arc::new(Notify::new())).await
    }

    /// Like [`Connector::connect`], and `news` is notified on every notification and when the connection closes.
    ///
    /// # Errors
    /// See [`Connector::connect`].
    pub async fn open(&self, at: &Endpoint, news: Arc<Notify>) -> Result<Client, ConnectError> {
        let config = self.parameters(at);
        let limit = self.connect_timeout;
        let connecting = async {
            match &self.tls {
                Some((tls, mode)) if *mode != SslMode::Disable && !at.host.starts_with('/') => {
                    let (client, connection) = config.connect(tls.clone()).await?;
                    tokio::spawn(drive(connection, news));
                    Ok(client)
                }
                _ => {
                    let (client, connection) = config.connect(NoTls).await?;
                    tokio::spawn(drive(connection, news));
                    Ok(client)
                }
            }
        };
        match tokio::time::timeout(limit, connecting).await {
            Ok(done) => done.map_err(ConnectError::Postgres),
            Err(_) => Err(ConnectError::TimedOut(limit)),
        }
    }

    fn parameters(&self, at: &Endpoint) -> tokio_postgres::Config {
        use tokio_postgres::config::SslMode as Asked;
        let asked = match self.tls.as_ref().map(|(_, mode)| *mode) {
            None | Some(SslMode::Disable | SslMode::Allow) => Asked::Disable,
            Some(SslMode::Prefer) => Asked::Prefer,
            Some(SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => Asked::Require,
        };
        let mut config = tokio_postgres::Config::new();
        config
            .host(&at.host)
            .port(at.port)
            .dbname(&at.database)
            .user(&at.user)
            .application_name("pgusher")
            .options(format!(
                "-c search_path= -c statement_timeout={} -c idle_in_transaction_session_timeout={0} -c lock_timeout={0}",
                self.statement_timeout.as_millis()
            ))
            .ssl_mode(if at.host.starts_with('/') { Asked::Disable } else { asked })
            .keepalives(true)
            .keepalives_idle(Duration::from_secs(15))
            .keepalives_interval(Duration::from_secs(5))
            .keepalives_retries(3)
            .tcp_user_timeout(Duration::from_secs(30));
        if !at.password.expose().is_empty() {
            config.password(at.password.expose());
        }
        config
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The server refused, or the network failed.
    #[error("{}", explain(.0))]
    Postgres(#[source] tokio_postgres::Error),
    /// Nothing came of it in time.
    #[error("timed out after {0:?}")]
    TimedOut(Duration),
}

impl ConnectError {
    /// SQLSTATE of the server's refusal.
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Postgres(error) => error.code().map(|code| code.code()),
            Self::TimedOut(_) => None,
        }
    }
}

/// The message of an error with its cause: the driver's own text is often only "db error".
pub fn explain(error: &tokio_postgres::Error) -> String {
    match (error.as_db_error(), std::error::Error::source(error)) {
        (Some(db), _) => format!("{} ({})", db.message(), db.code().code()),
        (None, Some(cause)) => format!("{error}: {cause}"),
        (None, None) => error.to_string(),
    }
}

async fn drive<S, T>(mut connection: Connection<S, T>, news: Arc<Notify>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    loop {
        match poll_fn(|cx| connection.poll_message(cx)).await {
            Some(Ok(AsyncMessage::Notification(_))) => news.notify_one(),
            Some(Ok(AsyncMessage::Notice(notice))) => tracing::trace!(message = notice.message(), "notice"),
            Some(Ok(_)) => {}
            // Whoever uses the client gets the error from its own call.
            Some(Err(_)) | None => break,
        }
    }
    news.notify_one();
}
