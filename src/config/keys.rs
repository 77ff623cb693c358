//! The table of keys: the one place that says what may be written, what kind of value it takes, and what the manual
//! says about it. Defaults are those of `sections.rs`.

use super::Config;
use super::kind::Wrong;
use super::kind::{File, Flag, Hidden, Kind, ListOf, Mode, Number, OneOf, Optional, Raw, Size, SomeTime, Text, Time};

/// `[name]`, or `[[name]]` if there may be several.
pub(super) struct Section {
    pub(super) name: &'static str,
    pub(super) many: bool,
    /// What the manual says, by line.
    pub(super) about: &'static [&'static str],
    pub(super) keys: &'static [Key],
}

/// One key of a section.
pub(super) struct Key {
    pub(super) name: &'static str,
    /// What the manual says, by line.
    pub(super) about: &'static [&'static str],
    /// What the manual shows where there is no default; empty if there is always one.
    pub(super) example: &'static str,
    /// Whether `<name>_file` exists too.
    pub(super) secret: bool,
    /// Reads a value into the section, or into that element of a `[[section]]`.
    pub(super) set: fn(&mut Config, usize, &Raw) -> Result<(), Wrong>,
    /// The value as it would be written in a file; `None` if it would be left out.
    pub(super) write: fn(&Config, usize) -> Option<String>,
}

/// Keys of a section, each written as a field: what the manual says, name, kind, example.
macro_rules! keys {
    (one $section:ident: $($(#[doc = $about:literal])+ $name:ident: $kind:ty $(, $example:literal)?;)+) => {
        &[$(Key {
            name: stringify!($name),
            about: &[$($about),+],
            example: concat!("" $(, $example)?),
            secret: <$kind as Kind>::SECRET,
            set: |config, _, raw| {
                config.$section.$name = <$kind>::read(raw)?;
                Ok(())
            },
            write: |config, _| <$kind>::write(&config.$section.$name),
        }),+]
    };
    (many $section:ident: $($(#[doc = $about:literal])+ $name:ident: $kind:ty $(, $example:literal)?;)+) => {
        &[$(Key {
            name: stringify!($name),
            about: &[$($about),+],
            example: concat!("" $(, $example)?),
            secret: <$kind as Kind>::SECRET,
            set: |config, index, raw| {
                let value = <$kind>::read(raw)?;
                if let Some(element) = config.$section.get_mut(index) {
                    element.$name = value;
                }
                Ok(())
            },
            write: |config, index| config.$section.get(index).and_then(|element| <$kind>::write(&element.$name)),
        }),+]
    };
}

type Port = Number<u16, 1, 65_535>;
type Connections = Number<usize, 1, 1_000_000>;

/// Every section, in the order of the manual.
pub(super) const SECTIONS: &[Section] = &[
    Section { name: "proxy", many: false, about: &["Where clients arrive, and how long they may take."], keys: PROXY },
    Section {
        name: "pool",
        many: false,
        about: &["Server connections. Each belongs to one tenant for its life."],
        keys: POOL,
    },
    Section { name: "tls", many: false, about: TLS_ABOUT, keys: TLS },
    Section { name: "auth", many: false, about: &["How clients prove who they are."], keys: AUTH },
    Section { name: "identify", many: false, about: &["Which tenant a client is."], keys: IDENTIFY },
    Section { name: "users", many: true, about: USERS_ABOUT, keys: USERS },
    Section { name: "catalog", many: false, about: CATALOG_ABOUT, keys: CATALOG },
    Section { name: "shards", many: true, about: SHARDS_ABOUT, keys: SHARDS },
    Section { name: "provision", many: false, about: &["How a tenant is made."], keys: PROVISION },
    Section { name: "guard", many: false, about: GUARD_ABOUT, keys: GUARD },
    Section { name: "audit", many: false, about: AUDIT_ABOUT, keys: AUDIT },
    Section { name: "canary", many: false, about: CANARY_ABOUT, keys: CANARY },
    Section { name: "api", many: false, about: &["The admin HTTP API."], keys: API },
    Section { name: "metrics", many: false, about: &["Numbers for Prometheus."], keys: METRICS },
    Section { name: "log", many: false, about: &["Log lines, on standard error."], keys: LOG },
];

const PROXY: &[Key] = keys! { one proxy:
    /// Addresses to listen on, comma-separated; "*" is every one, "" is none (Unix socket only).
    listen_addr: Text;
    /// TCP port, and the number in the Unix socket's name.
    listen_port: Port;
    /// Directory of the Unix socket .s.PGSQL.<listen_port>. There is none unless this is set.
    unix_socket_dir: Optional<File>, "\"/run/pgusher\"";
    /// Permissions of the Unix socket, octal.
    unix_socket_mode: Mode;
    /// Threads that serve clients; 0 is one per core.
    workers: Number<usize, 0, 1024>;
    /// Most clients at a time. The next one is refused with 53300.
    max_client_conn: Connections;
    /// From accepting a connection to the end of authentication.
    client_login_timeout: SomeTime;
    /// A client that sends nothing for longer, outside a transaction, is disconnected; 0 is never.
    client_idle_timeout: Time;
    /// A client that sends nothing for longer, inside a transaction, is disconnected; 0 is never.
    idle_transaction_timeout: Time;
    /// A query that takes longer ends its client and its server connection; 0 is never.
    query_timeout: Time;
    /// Largest message of a client, COPY data aside, that is held in whole.
    max_packet_size: Size<{ 64 << 10 }, { 1 << 30 }>;
    /// Size of a buffer that bytes are relayed through.
    pkt_buf: Size<{ 4 << 10 }, { 1 << 20 }>;
    /// TCP keepalive: silence before the first probe; 0 leaves it to the operating system.
    tcp_keepidle: Time;
    /// How long SIGTERM waits for transactions to end; 0 is for ever.
    shutdown_timeout: Time;
};

const POOL: &[Key] = keys! { one pool:
    /// When a server connection goes back to its pool:
    /// "auto" when the transaction ends, unless the client holds something that cannot be carried over (temporary
    /// tables, session locks, LISTEN, …); "session" when the client leaves; "transaction" always when the transaction
    /// ends, and what a client leaves behind is reset.
    pool_mode: OneOf<super::PoolMode>;
    /// Most server connections of one tenant (with one set of startup settings). One more listens for its clients, in
    /// "auto", while they have all of these.
    default_pool_size: Connections;
    /// Most server connections to one shard, all tenants together. Keep it below the shard's max_connections.
    max_db_connections: Connections;
    /// How long a client waits for a server connection.
    query_wait_timeout: SomeTime;
    /// A client that keeps its server connection ("auto") and is idle outside a transaction for longer is closed; 0 is never.
    /// One that keeps it only for currval and lastval gives it back instead.
    pin_timeout: Time;
    /// A server connection idle for longer is closed.
    server_idle_timeout: SomeTime;
    /// A server connection older than this is closed as soon as it is idle.
    server_lifetime: SomeTime;
    /// How long connecting and logging in to a server may take.
    server_connect_timeout: SomeTime;
    /// How long the reset between two clients of a tenant may take.
    server_reset_timeout: SomeTime;
    /// Prepared statements kept per server connection; 0 turns their tracking off.
    max_prepared_statements: Number<usize, 0, 100_000>;
    /// How much of the proxy's memory a client's prepared statements may take that have names; more is refused (53400).
    max_client_prepared_memory: Size<{ 64 << 10 }, { 1 << 30 }>;
};

const TLS_ABOUT: &[&str] = &[
    "TLS on both sides. Certificates and keys are PEM files, read again on SIGHUP.",
    "The modes are PgBouncer's: disable, allow, prefer, require, verify-ca, verify-full.",
];

const TLS: &[Key] = keys! { one tls:
    /// TLS towards clients. "allow" and "prefer" leave it to the client, "require" refuses those without;
    /// "verify-ca" and "verify-full" also ask for a certificate that client_tls_ca_file has signed.
    client_tls_sslmode: OneOf<super::SslMode>;
    /// Certificate chain shown to clients, the server's own first.
    client_tls_cert_file: Optional<File>, "\"/etc/pgusher/server.crt\"";
    /// Private key of that certificate.
    client_tls_key_file: Optional<File>, "\"/etc/pgusher/server.key\"";
    /// CA that clients' certificates are checked against.
    client_tls_ca_file: Optional<File>, "\"/etc/pgusher/clients-ca.crt\"";
    /// TLS towards shards and catalog. "prefer" uses it where the server has it, "require" insists;
    /// "verify-ca" checks who signed the certificate, "verify-full" also that it is for that host.
    server_tls_sslmode: OneOf<super::SslMode>;
    /// CA that servers' certificates are checked against.
    server_tls_ca_file: Optional<File>, "\"/etc/pgusher/shards-ca.crt\"";
    /// Certificate shown to servers that ask for one.
    server_tls_cert_file: Optional<File>, "\"/etc/pgusher/proxy.crt\"";
    /// Private key of that certificate.
    server_tls_key_file: Optional<File>, "\"/etc/pgusher/proxy.key\"";
};

const AUTH: &[Key] = keys! { one auth:
    /// "scram-sha-256" (with channel binding over TLS), or "trust": no proof is asked for.
    auth_type: OneOf<super::AuthType>;
};

const IDENTIFY: &[Key] = keys! { one identify:
    /// Places where a client may name its tenant. The first that names one wins; two that disagree are an error.
    /// username: client_001, app.client_001, app@client_001; options: -c pgusher.tenant=client_001;
    /// sni: client_001.<sni_suffix>; database: client_001; application_name: tenant=client_001, client_001/worker.
    order: ListOf<OneOf<super::Source>>;
    /// How to read other user names: a regular expression with a group "tenant" and perhaps a group "user".
    username_regex: Optional<Text>, "'^(?<user>[a-z]+)\\+(?<tenant>[a-z0-9_-]+)$'";
    /// What follows the tenant in the TLS server name. Without it server names are not looked at.
    sni_suffix: Optional<Text>, "\"db.example.com\"";
};

const USERS_ABOUT: &[&str] = &[
    "Application users: logins that serve several tenants, and say which one as [identify] tells.",
    "(A tenant's own login is not written here: it is made with the tenant and kept in the catalog.)",
];

const USERS: &[Key] = keys! { many users:
    /// Its name.
    name: Text, "\"app\"";
    /// Its password, or a SCRAM-SHA-256$… verifier (as in pg_authid.rolpassword).
    password: Hidden, "\"…\"";
    /// Tenants it may use: names, or patterns in which * stands for any characters.
    tenants: ListOf<Text>, "[\"*\"]";
    /// Whether a tenant that does not exist is made when this user connects for it.
    auto_provision: Flag;
};

const CATALOG_ABOUT: &[&str] =
    &["The control database: tenants, shards, events. Without host it is database \"pgusher\" on the first shard."];

const CATALOG: &[Key] = keys! { one catalog:
    /// Host name, address, or directory of a Unix socket.
    host: Optional<Text>, "\"127.0.0.1\"";
    /// Port.
    port: Port;
    /// Database; made at the start if the user may.
    database: Text;
    /// User.
    user: Text;
    /// Its password.
    password: Hidden, "\"…\"";
    /// File in which what is known of the catalog is kept, so that pgusher can start while the catalog is away. It
    /// holds verifiers: the directory should be pgusher's own. There is none unless this is set.
    snapshot_file: Optional<File>, "\"/var/lib/pgusher/catalog.snapshot\"";
};

const SHARDS_ABOUT: &[&str] = &[
    "PostgreSQL clusters that tenants live on. They are written into the catalog at the start;",
    "shards that the catalog knows already need not be here.",
];

const SHARDS: &[Key] = keys! { many shards:
    /// Its name: letters, digits, '_', '-', '.'.
    name: Text, "\"shard_1\"";
    /// Host name, address, or directory of a Unix socket.
    host: Text;
    /// Port.
    port: Port;
    /// The database that tenants' schemas are made in; made at the start if it is missing.
    database: Text;
    /// The database that tenants of plan "rls" share; made with the first of them.
    rls_database: Text;
    /// The one tenant that has this shard to itself (plan "cluster"); it takes no other.
    dedicated_to: Optional<Text>, "\"client_001\"";
    /// A role that exists there and that this tenant is to use, superuser or not. Absent: pgusher makes one.
    tenant_role: Optional<Text>, "\"app\"";
    /// Its password. Absent: it is derived like all others.
    tenant_password: Hidden, "\"…\"";
    /// A superuser. It makes and removes tenants and never runs a client's statement.
    admin_user: Text;
    /// Its password.
    admin_password: Hidden, "\"…\"";
    /// Share of new tenants, relative to the other shards; 0 takes none.
    weight: Number<u32, 0, 10_000>;
    /// Where it stands.
    region: Text;
    /// Most server connections to it, if not [pool] max_db_connections.
    max_db_connections: Optional<Connections>, "100";
};

const PROVISION: &[Key] = keys! { one provision:
    /// Plan of new tenants: "rls" is rows of shared tables, "schema" a schema of its own in a shared database,
    /// "database" a database of its own, "cluster" a shard of its own (one that is dedicated_to it).
    plan: OneOf<crate::tenant::Plan>;
    /// "compat": psql, introspection and pg_dump work as everywhere. "strict": whatever grants can close is closed,
    /// which breaks them. Can be changed; databases are brought to it at the start.
    hardening: OneOf<crate::tenant::plan::Hardening>;
    /// Directory of .sql files that every new tenant starts with, run in order of their names, as the tenant.
    template_dir: Optional<File>, "\"/etc/pgusher/template\"";
    /// Tenants' passwords towards the shards are derived from it, so that none is stored. At least 32 characters,
    /// such as `openssl rand -hex 32` prints. Whoever has it can be any tenant; whoever loses it must reset them all.
    master_secret: Hidden, "\"…\"";
    /// Superuser of shards that are not in this file (those added later).
    admin_user: Text;
    /// Its password.
    admin_password: Hidden, "\"…\"";
    /// CONNECTION LIMIT of a tenant's role, over all proxies; -1 is none.
    role_connection_limit: Number<i32, { -1 }, 262_143>;
    /// How long making one tenant may take.
    provision_timeout: SomeTime;
};

const GUARD_ABOUT: &[&str] = &[
    "Statements that plainly reach for another tenant or another identity. What a tenant's role may not do, it cannot do",
    "without the guard either; the guard says so earlier, and every attempt is counted.",
];

const GUARD: &[Key] = keys! { one guard:
    /// "enforce" refuses such statements, "observe" counts them and lets them through, "off" does not look.
    mode: OneOf<super::GuardMode>;
};

const AUDIT_ABOUT: &[&str] = &[
    "The audit log: a line for every violation and for every change to tenants and shards, append-only. Each line carries",
    "the hash of the one before it, under a key derived from master_secret; `pgusher audit verify` checks them.",
];

const AUDIT: &[Key] = keys! { one audit:
    /// The file. There is no audit log unless this is set.
    file: Optional<File>, "\"/var/lib/pgusher/audit.log\"";
};

const CANARY_ABOUT: &[&str] = &[
    "The canary: on every shard the proxy makes two throwaway tenants and has one attack the other, through its own",
    "listener. `pgusher canary` runs it now. It makes and drops roles, schemas, and with plan \"database\" databases.",
];

const CANARY: &[Key] = keys! { one canary:
    /// How often it runs by itself, "1h" for instance; 0 is never.
    interval: Time;
};

const API: &[Key] = keys! { one api:
    /// Address and port; "" turns it off.
    listen: Text;
    /// Bearer token. Needed for every call that changes something, and for all of them beyond loopback.
    token: Hidden, "\"…\"";
    /// Host in the DSNs that are handed out, if not the one that clients see as listen_addr.
    public_host: Optional<Text>, "\"db.example.com\"";
    /// Port in the DSNs that are handed out, if not listen_port.
    public_port: Optional<Port>, "5432";
};

const METRICS: &[Key] = keys! { one metrics:
    /// Address and port of /metrics, /healthz and /readyz; "" turns them off.
    listen: Text;
    /// Tenants that get a label of their own, the busiest first; /metrics/tenant/<id> knows them all.
    metrics_top_tenants: Number<usize, 0, 10_000>;
    /// How often the tenants' storage is measured; 0 is never.
    storage_interval: Time;
};

const LOG: &[Key] = keys! { one log:
    /// "error", "warn", "info", "debug", "trace", or by module: "info,pgusher::pool=debug".
    level: Text;
    /// "text" for people, "json" for machines.
    format: OneOf<super::LogFormat>;
    /// A line when a client has connected and one when it has gone.
    log_connections: Flag;
};

impl Section {
    /// The section of that name.
    pub(super) fn find(name: &str) -> Option<&'static Self> {
        SECTIONS.iter().find(|section| section.name == name)
    }

    /// The key that is written so, and whether it names a file that holds the value.
    pub(super) fn key(&self, written: &str) -> Option<(&'static Key, bool)> {
        self.keys.iter().find_map(|key| match written.strip_prefix(key.name)? {
            "" => Some((key, false)),
            "_file" if key.secret => Some((key, true)),
            _ => None,
        })
    }

    /// Every name that [`Self::key`] knows.
    pub(super) fn names(&self) -> impl Iterator<Item = String> {
        self.keys.iter().flat_map(|key| {
            [Some(key.name.to_owned()), key.secret.then(|| format!("{}_file", key.name))].into_iter().flatten()
        })
    }
}
