//! What can be configured: sections, fields and their defaults. How they are written in a file is told by `keys.rs`.

use std::path::PathBuf;
use std::time::Duration;

use super::Secret;
pub use crate::tenant::identify::Source;

/// `[proxy]`: where clients arrive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Addresses to listen on, comma-separated; `*` is every one; empty for none.
    pub listen_addr: String,
    /// TCP port, and the number in the Unix socket's name.
    pub listen_port: u16,
    /// Directory of the Unix socket; none if absent.
    pub unix_socket_dir: Option<PathBuf>,
    /// Permissions of the Unix socket, octal.
    pub unix_socket_mode: u32,
    /// Threads that serve clients; 0 is one per core.
    pub workers: usize,
    /// Most clients at a time.
    pub max_client_conn: usize,
    /// From accept to the end of authentication.
    pub client_login_timeout: Duration,
    /// A client idle for longer is closed; zero is never.
    pub client_idle_timeout: Duration,
    /// A client idle in a transaction for longer is closed; zero is never.
    pub idle_transaction_timeout: Duration,
    /// A query that takes longer closes client and server connection; zero is never.
    pub query_timeout: Duration,
    /// Largest message of a client other than COPY data that is taken in whole (bytes).
    pub max_packet_size: usize,
    /// Size of a relay buffer (bytes).
    pub pkt_buf: usize,
    /// TCP keepalive: time before the first probe; zero leaves the system's default.
    pub tcp_keepidle: Duration,
    /// How long SIGTERM waits for transactions to end; zero is for ever.
    pub shutdown_timeout: Duration,
}

/// When a server connection goes back to the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// When the client leaves.
    Session,
    /// When the transaction ends; what cannot work so is refused or reset.
    Transaction,
    /// When the transaction ends, unless the client holds something that cannot be carried to another server connection.
    Auto,
}

/// `[pool]`: server connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// When a server connection goes back.
    pub pool_mode: PoolMode,
    /// Most server connections of one tenant (with one set of startup settings).
    pub default_pool_size: usize,
    /// Most server connections to one shard, all tenants together.
    pub max_db_connections: usize,
    /// How long a client waits for a server connection.
    pub query_wait_timeout: Duration,
    /// A client that keeps its server connection may be idle outside a transaction for so long; zero is for ever.
    pub pin_timeout: Duration,
    /// An idle server connection is closed after this.
    pub server_idle_timeout: Duration,
    /// A server connection older than this is closed when it becomes idle.
    pub server_lifetime: Duration,
    /// How long connecting and logging in to a server may take.
    pub server_connect_timeout: Duration,
    /// How long a reset between two clients may take.
    pub server_reset_timeout: Duration,
    /// Prepared statements kept per server connection; 0 turns tracking off.
    pub max_prepared_statements: usize,
    /// What a client's statements that have names may take of the proxy's memory.
    pub max_client_prepared_memory: usize,
}

/// PgBouncer's six values of `client_tls_sslmode` and `server_tls_sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    /// Plain only.
    Disable,
    /// TLS if the other side asks for it.
    Allow,
    /// TLS if possible.
    Prefer,
    /// TLS or nothing; certificates are not verified.
    Require,
    /// TLS, and the certificate is signed by our CA.
    VerifyCa,
    /// TLS, signed by our CA, and for the right name.
    VerifyFull,
}

/// `[tls]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// TLS towards clients.
    pub client_tls_sslmode: SslMode,
    /// Certificate chain shown to clients (PEM).
    pub client_tls_cert_file: Option<PathBuf>,
    /// Its key (PEM).
    pub client_tls_key_file: Option<PathBuf>,
    /// CA that clients' certificates are checked against (PEM).
    pub client_tls_ca_file: Option<PathBuf>,
    /// TLS towards servers.
    pub server_tls_sslmode: SslMode,
    /// CA that servers' certificates are checked against (PEM).
    pub server_tls_ca_file: Option<PathBuf>,
    /// Certificate shown to servers (PEM).
    pub server_tls_cert_file: Option<PathBuf>,
    /// Its key (PEM).
    pub server_tls_key_file: Option<PathBuf>,
}

/// How clients prove who they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthType {
    /// SCRAM-SHA-256, and SCRAM-SHA-256-PLUS over TLS.
    ScramSha256,
    /// No proof is asked for.
    Trust,
}

/// `[auth]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    /// How clients prove who they are.
    pub auth_type: AuthType,
}

/// `[identify]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identify {
    /// Places, the first that names a tenant wins; two that disagree are an error.
    pub order: Vec<Source>,
    /// A regular expression with groups `tenant` and, optionally, `user`.
    pub username_regex: Option<String>,
    /// `client_001.<suffix>` names `client_001`.
    pub sni_suffix: Option<String>,
}

/// `[[users]]`: an application user.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: String,
    /// A `SCRAM-SHA-256$…` verifier or a password.
    pub password: Secret,
    /// Tenants it may use: names, or patterns with `*`.
    pub tenants: Vec<String>,
    /// Whether it may make a tenant by connecting.
    pub auto_provision: bool,
}

/// `[catalog]`: the control database. With no `host` it is database `pgusher` on the first shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Catalog {
    /// Host name, address or socket directory.
    pub host: Option<String>,
    /// Port.
    pub port: u16,
    /// Database; created if the user may.
    pub database: String,
    /// User.
    pub user: String,
    /// Its password.
    pub password: Secret,
    /// Where a snapshot of it is kept, to start from while it is away; none if absent.
    pub snapshot_file: Option<PathBuf>,
}

/// `[[shards]]`: one PostgreSQL cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardConfig {
    /// Its name.
    pub name: String,
    /// Host name, address or socket directory.
    pub host: String,
    /// Port.
    pub port: u16,
    /// The database that holds tenants of plan `schema`; created if missing.
    pub database: String,
    /// The database that holds tenants of plan `rls`; created if missing.
    pub rls_database: String,
    /// The one tenant of plan `cluster` that has this shard to itself.
    pub dedicated_to: Option<String>,
    /// A role that this tenant uses, which was there before; pgusher makes one if absent.
    pub tenant_role: Option<String>,
    /// Its password.
    pub tenant_password: Secret,
    /// A superuser, for provisioning only.
    pub admin_user: String,
    /// Its password.
    pub admin_password: Secret,
    /// Weight on the ring; 0 takes no new tenants.
    pub weight: u32,
    /// Where it stands.
    pub region: String,
    /// Most server connections of this proxy to it; `[pool] max_db_connections` if absent.
    pub max_db_connections: Option<usize>,
}

/// `[provision]`: how a tenant is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provision {
    /// Plan of new tenants.
    pub plan: crate::tenant::Plan,
    /// How much of PostgreSQL's catalogs and functions tenants may use.
    pub hardening: crate::tenant::plan::Hardening,
    /// Directory of `.sql` files, run in order as the tenant; none if absent.
    pub template_dir: Option<PathBuf>,
    /// Server passwords are derived from it. At least 32 characters.
    pub master_secret: Secret,
    /// Superuser for shards that have none of their own in this file (those added at run time).
    pub admin_user: String,
    /// Its password.
    pub admin_password: Secret,
    /// CONNECTION LIMIT of a tenant's role.
    pub role_connection_limit: i32,
    /// How long making one tenant may take.
    pub provision_timeout: Duration,
}

/// What becomes of statements that plainly reach for another tenant or another identity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GuardMode {
    /// They are refused.
    #[default]
    Enforce,
    /// They are counted and let through.
    Observe,
    /// Nobody looks.
    Off,
}

/// `[guard]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Guard {
    /// What becomes of such statements.
    pub mode: GuardMode,
}

/// `[audit]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Audit {
    /// The audit log; none if absent.
    pub file: Option<PathBuf>,
}

/// `[canary]`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Canary {
    /// How often it runs; zero is never.
    pub interval: Duration,
}

/// `[api]`: the admin HTTP API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Api {
    /// Address and port; empty turns it off.
    pub listen: String,
    /// Bearer token; required beyond loopback and for everything that changes something.
    pub token: Secret,
    /// Host and port that DSNs handed out contain; the proxy's own if absent.
    pub public_host: Option<String>,
    /// Port that DSNs handed out contain.
    pub public_port: Option<u16>,
}

/// `[metrics]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metrics {
    /// Address and port of `/metrics`, `/healthz`, `/readyz`; empty turns it off.
    pub listen: String,
    /// Tenants that get a label of their own.
    pub metrics_top_tenants: usize,
    /// How often storage is measured; zero is never.
    pub storage_interval: Duration,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter such as `info,pgusher::pool=debug`.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
    /// A line when a client connects and goes.
    pub log_connections: bool,
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

impl Default for Proxy {
    fn default() -> Self {
        Self {
            listen_addr: "127.0.0.1".into(),
            listen_port: 6432,
            unix_socket_dir: None,
            unix_socket_mode: 0o777,
            workers: 0,
            max_client_conn: 10_000,
            client_login_timeout: secs(60),
            client_idle_timeout: secs(0),
            idle_transaction_timeout: secs(0),
            query_timeout: secs(0),
            max_packet_size: 64 << 20,
            pkt_buf: 16 << 10,
            tcp_keepidle: secs(0),
            shutdown_timeout: secs(60),
        }
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            pool_mode: PoolMode::Auto,
            default_pool_size: 50,
            max_db_connections: 80,
            query_wait_timeout: secs(120),
            pin_timeout: Duration::ZERO,
            server_idle_timeout: secs(600),
            server_lifetime: secs(3600),
            server_connect_timeout: secs(15),
            server_reset_timeout: secs(1),
            max_prepared_statements: 200,
            max_client_prepared_memory: 16 << 20,
        }
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            client_tls_sslmode: SslMode::Disable,
            client_tls_cert_file: None,
            client_tls_key_file: None,
            client_tls_ca_file: None,
            server_tls_sslmode: SslMode::Prefer,
            server_tls_ca_file: None,
            server_tls_cert_file: None,
            server_tls_key_file: None,
        }
    }
}

impl Default for Auth {
    fn default() -> Self {
        Self { auth_type: AuthType::ScramSha256 }
    }
}

impl Default for Identify {
    fn default() -> Self {
        use Source::{ApplicationName, Database, Options, Sni, Username};
        Self { order: vec![Username, Options, Sni, Database, ApplicationName], username_regex: None, sni_suffix: None }
    }
}

impl Default for Catalog {
    fn default() -> Self {
        Self {
            host: None,
            port: 5432,
            database: "pgusher".into(),
            user: "postgres".into(),
            password: Secret::default(),
            snapshot_file: None,
        }
    }
}

impl Default for ShardConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            host: "127.0.0.1".into(),
            port: 5432,
            database: "tenants".into(),
            rls_database: "shared".into(),
            dedicated_to: None,
            tenant_role: None,
            tenant_password: Secret::default(),
            admin_user: "postgres".into(),
            admin_password: Secret::default(),
            weight: 100,
            region: String::new(),
            max_db_connections: None,
        }
    }
}

impl Default for Provision {
    fn default() -> Self {
        Self {
            plan: crate::tenant::Plan::Schema,
            hardening: crate::tenant::plan::Hardening::Compat,
            template_dir: None,
            master_secret: Secret::default(),
            admin_user: "postgres".into(),
            admin_password: Secret::default(),
            role_connection_limit: -1,
            provision_timeout: secs(60),
        }
    }
}

impl Default for Api {
    fn default() -> Self {
        Self { listen: "127.0.0.1:6480".into(), token: Secret::default(), public_host: None, public_port: None }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { listen: "127.0.0.1:6490".into(), metrics_top_tenants: 100, storage_interval: secs(60) }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text, log_connections: true }
    }
}
