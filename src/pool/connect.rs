//! Opens one server connection: socket, TLS, startup packet, authentication.
//!
//! Invariant: a server connection is authenticated as its tenant's role and nobody else, for its whole life. The server
//! reports `session_authorization` and `is_superuser`, at login and whenever they change; anything but the role and
//! `off` closes the connection and counts as a violation.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use dashmap::DashMap;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Instant;

use super::cancel::{Target, UnderWay};
use super::faces::{Face, Faces, Shown};
use super::params::Params;
use super::passwords::Passwords;
use super::recent::Recent;
use super::residue::Carried;
use super::scram::{CachedKeys, Scram, ServerProof};
use super::spare::{self, Spare};
use super::statements::Prepared;
use super::tls::ClientTls;
use super::{DATABASE, Settings, Slot};
use crate::directory::{Shard, Tenant};
use crate::error::{PgError, Severity, sqlstate};
use crate::metrics::Metrics;
use crate::stream::{Socket, Stream};
use crate::tenant::credential::nonce;
use crate::violation::{Action, Kind, Violation};
use crate::wire::Version;
use crate::wire::frame::{self, HEADER};
use crate::wire::message::{self, Authentication, Cursor, ErrorFields, Malformed};

/// A connection to a server, logged in as a tenant's role.
pub struct ServerConnection {
    /// The socket.
    pub stream: Stream,
    /// The startup settings it was opened with.
    pub settings: Arc<Settings>,
    /// What the server reported last.
    pub params: Arc<Params>,
    /// Settings made on it since, other than those of `params`.
    pub applied: Arc<Carried>,
    /// Prepared statements it has.
    pub prepared: Prepared,
    /// What was said on it since it last owed nothing.
    pub recent: Recent,
    /// Cancels under way for it.
    pub cancels: Arc<UnderWay>,
    /// How often what logins begin with had changed before it was opened; see [`Pool::renew`](super::Pool::renew).
    pub generation: u64,
    /// Not given out again after this.
    pub expires: Instant,
    /// When it was opened.
    pub opened: Instant,
    /// When it became idle last.
    pub last_used: Instant,
    /// Notifications that came while we asked something of our own: their bodies.
    pub heard: Vec<Vec<u8>>,
    shown: Shown,
    pub(super) slot: Slot,
    target: Arc<Target>,
    role: Role,
    /// The session runs as somebody else than `role`.
    disguised: bool,
}

/// Who a server connection must be.
#[derive(Debug, Clone)]
struct Role {
    name: Arc<str>,
    may_be_superuser: bool,
}

/// How to reach one shard.
pub struct Dialer {
    shard: Arc<Shard>,
    tls: Arc<ClientTls>,
    pub(super) spare: Spare,
}

/// What a test puts around the sockets of server connections.
#[cfg(test)]
pub(crate) type Wrap = Arc<dyn Fn(Stream) -> Stream + Send + Sync>;

/// What a test puts in the place of server connections.
#[cfg(test)]
pub(crate) type Dial = Arc<dyn Fn() -> Stream + Send + Sync>;

/// Opens server connections.
pub struct Connector {
    /// Longest time from dialling to the end of the login.
    pub server_connect_timeout: Duration,
    /// Longest life of a connection.
    pub server_lifetime: Duration,
    tls: Arc<ClientTls>,
    passwords: Passwords,
    /// Keys of the last login, by shard and role, so that a login costs no PBKDF2.
    keys: DashMap<(String, Arc<str>), CachedKeys>,
    dialers: DashMap<String, Arc<Dialer>>,
    metrics: Arc<Metrics>,
    #[cfg(test)]
    pub(crate) wrap: Option<Wrap>,
    #[cfg(test)]
    pub(crate) dial: Option<Dial>,
}

/// Why a conversation with a server failed.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The socket.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The server's own words.
    #[error("{0}")]
    Server(PgError),
    /// Something that does not follow the protocol.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// The proof of the password.
    #[error("{0}")]
    Scram(#[from] super::scram::ScramError),
    /// The server says that we are somebody else.
    #[error("the server reports {name} = {value:?}, which must never happen")]
    Identity {
        /// Parameter.
        name: &'static str,
        /// Its value.
        value: String,
    },
}

impl ServerError {
    /// Whether the server connection has ended, as far as one can tell on its own account: the socket failed, or the
    /// server has said goodbye.
    pub fn is_the_end(&self) -> bool {
        match self {
            Self::Io(_) => true,
            Self::Server(error) => error.severity != Severity::Error,
            Self::Protocol(_) | Self::Scram(_) | Self::Identity { .. } => false,
        }
    }
}

/// Logins whose keys are kept (about 200 bytes each); beyond that all are forgotten, which costs a millisecond each.
const MAX_CACHED_KEYS: usize = 50_000;

/// Longest message that a server sends while we log in or reset (bytes).
const MAX_CONTROL_MESSAGE: usize = 1 << 20;

impl Connector {
    /// A connector for all shards.
    pub fn new(
        tls: Arc<ClientTls>,
        passwords: Passwords,
        server_connect_timeout: Duration,
        server_lifetime: Duration,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (keys, dialers) = (DashMap::new(), DashMap::new());
        Self {
            server_connect_timeout,
            server_lifetime,
            tls,
            passwords,
            keys,
            dialers,
            metrics,
            #[cfg(test)]
            wrap: None,
            #[cfg(test)]
            dial: None,
        }
    }

    fn dialer(&self, shard: &Arc<Shard>) -> Arc<Dialer> {
        if let Some(dialer) = self.dialers.get(&shard.name)
            && dialer.shard.host == shard.host
            && dialer.shard.port == shard.port
        {
            return dialer.clone();
        }
        let dialer = Arc::new(Dialer::new(shard.clone(), self.tls.clone()));
        self.dialers.insert(shard.name.clone(), dialer.clone());
        dialer
    }

    /// Opens a connection for the tenant of the slot's pool and logs in.
    ///
    /// # Errors
    /// What the client is told: the server's own words if there are any.
    pub async fn connect(
        self: Arc<Self>,
        slot: Slot,
        settings: Arc<Settings>,
        application_name: Arc<str>,
    ) -> Result<ServerConnection, PgError> {
        let tenant = slot.pool().tenant().clone();
        let work = self.login(slot, settings, application_name);
        let result = if self.server_connect_timeout.is_zero() {
            work.await
        } else {
            match tokio::time::timeout(self.server_connect_timeout, work).await {
                Ok(result) => result,
                Err(_) => {
                    return Err(unreachable(&tenant.shard).detail(format!(
                        "No login within server_connect_timeout = {:?}.",
                        self.server_connect_timeout
                    )));
                }
            }
        };
        result.map_err(|error| match error {
            ServerError::Server(error) => error,
            ServerError::Io(error) => unreachable(&tenant.shard).detail(format!("The connection failed: {error}.")),
            error @ ServerError::Identity { name, .. } => {
                let kind = if name == "is_superuser" { Kind::Superuser } else { Kind::Identity };
                // Nobody's doing but the administrator's, who has changed the role.
                let attempt = Violation::new(kind, Action::Closed, tenant.id.as_str(), "", "login to the server");
                self.metrics.report(attempt.what(error.to_string()));
                tracing::error!(tenant = %tenant.id, shard = tenant.shard.name, %error, "server connection closed");
                PgError::fatal(sqlstate::INTERNAL, "the server logged in as somebody else")
            }
            error @ (ServerError::Protocol(_) | ServerError::Scram(_)) => {
                tracing::warn!(tenant = %tenant.id, shard = tenant.shard.name, %error, "login to server failed");
                unreachable(&tenant.shard).detail(format!("{error}."))
            }
        })
    }

    /// Whether the sockets are the dialer's, and not what a test has put in their place.
    fn is_real(&self) -> bool {
        #[cfg(test)]
        if self.dial.is_some() || self.wrap.is_some() {
            return false;
        }
        true
    }

    async fn dial(&self, dialer: &Dialer) -> Result<Stream, ServerError> {
        #[cfg(test)]
        match (&self.dial, &self.wrap) {
            (Some(dial), _) => return Ok(dial()),
            (None, Some(wrap)) => return Ok(wrap(dialer.dial().await?)),
            (None, None) => {}
        }
        dialer.dial().await
    }

    async fn login(
        &self,
        slot: Slot,
        settings: Arc<Settings>,
        application_name: Arc<str>,
    ) -> Result<ServerConnection, ServerError> {
        let (tenant, generation) = (slot.pool().tenant().clone(), slot.pool().generation());
        let role = Role { name: tenant.role().into(), may_be_superuser: tenant.plan.may_be_superuser() };
        let dialer = self.dialer(&tenant.shard);
        let mut out = BytesMut::with_capacity(256);
        let ours = tenant.startup_settings();
        // Among the settings there is a database only where the plan lets clients choose it.
        let chosen = settings.iter().find(|(name, _)| name == DATABASE && tenant.plan.clients_choose_place());
        let database = chosen.map_or(tenant.database(), |(_, database)| database);
        let identity = [("user", &*role.name), ("database", database)];
        let names = settings.iter().filter(|(name, _)| name != DATABASE).chain(&ours);
        let names = names.map(|(name, value)| (name.as_str(), value.as_str()));
        // Of a setting that is named twice the last one counts.
        let names = tenant.plan.startup_defaults().iter().copied().chain(names);
        let application = Some(("application_name", &*application_name)).filter(|(_, name)| !name.is_empty());
        message::startup_message(&mut out, Version::V3_0, identity.into_iter().chain(names).chain(application));
        let entered = match dialer.spare.take() {
            // Its process may be older than a restart, or than a lack of room: who is refused on it tries once more.
            Some(spare) => match self.enter(dialer.secure(spare).await, &tenant, &role, &out).await {
                Err(ServerError::Io(_) | ServerError::Server(_)) => None,
                other => Some(other?),
            },
            None => None,
        };
        let (stream, params, pid, secret) = match entered {
            Some(entered) => entered,
            None => self.enter(self.dial(&dialer).await, &tenant, &role, &out).await?,
        };
        if self.is_real() {
            spare::leave(&dialer, spare::KEPT);
        }
        let cancels = Arc::new(UnderWay::default());
        let target = Target { dialer, pid, secret: secret.into(), under_way: cancels.clone() };
        let now = Instant::now();
        let lifetime =
            if self.server_lifetime.is_zero() { Duration::from_secs(10 * 365 * 86_400) } else { self.server_lifetime };
        Ok(ServerConnection {
            stream,
            settings,
            params: slot.pool().intern(Arc::new(params)),
            applied: slot.pool().intern_carried(Arc::default()),
            prepared: Prepared::default(),
            recent: Recent::default(),
            cancels,
            generation,
            expires: now + lifetime,
            opened: now,
            last_used: now,
            heard: Vec::new(),
            shown: slot.pool().faces().show(pid, &tenant.id),
            slot,
            target: Arc::new(target),
            role,
            disguised: false,
        })
    }

    /// Logs in with that startup packet.
    async fn enter(
        &self,
        stream: Result<Stream, ServerError>,
        tenant: &Tenant,
        role: &Role,
        startup: &[u8],
    ) -> Result<Entered, ServerError> {
        let mut stream = stream?;
        stream.send_all(startup).await?;
        let mut login = Login { stream, buf: BytesMut::new(), read: 0 };
        let password = self.passwords.of(tenant);
        let known = (tenant.shard.name.clone(), role.name.clone());
        let cached = self.keys.get(&known).map(|keys| keys.clone());
        if let Some(keys) = login.authenticate(&role.name, password.expose(), cached).await? {
            if self.keys.len() >= MAX_CACHED_KEYS {
                self.keys.clear();
            }
            self.keys.insert(known, keys);
        }
        let (params, pid, secret) = login.finish(role).await?;
        Ok((login.stream, params, pid, secret))
    }
}

type Entered = (Stream, Params, u32, Vec<u8>);

fn unreachable(shard: &Shard) -> PgError {
    PgError::fatal(sqlstate::CANNOT_CONNECT, format!("cannot connect to shard \"{}\"", shard.name))
        .hint("The database server is down or unreachable; try again when it is back.")
}

impl Dialer {
    pub(super) fn new(shard: Arc<Shard>, tls: Arc<ClientTls>) -> Self {
        Self { shard, tls, spare: Spare::default() }
    }

    /// Connects, with TLS as `server_tls_sslmode` wants it.
    ///
    /// # Errors
    /// Those of the socket and of TLS.
    pub async fn dial(&self) -> Result<Stream, ServerError> {
        self.secure(self.reach().await?).await
    }

    /// Connects, and says nothing.
    pub(super) async fn reach(&self) -> std::io::Result<Stream> {
        let (host, port) = (self.shard.host.as_str(), self.shard.port);
        if host.starts_with('/') {
            let socket = UnixStream::connect(format!("{host}/.s.PGSQL.{port}")).await?;
            return Ok(Stream::Plain(Socket::Unix(socket)));
        }
        let socket = TcpStream::connect((host, port)).await?;
        socket.set_nodelay(true)?;
        let peer = socket.peer_addr()?.ip();
        Ok(Stream::Plain(Socket::tcp(socket, peer)))
    }

    /// Begins TLS on a connection, if `server_tls_sslmode` wants it.
    async fn secure(&self, mut stream: Stream) -> Result<Stream, ServerError> {
        let tls = self.tls.current();
        let host = self.shard.host.as_str();
        if host.starts_with('/') || !tls.asks() {
            return Ok(stream);
        }
        let mut request = BytesMut::new();
        message::ssl_request(&mut request);
        stream.send_all(&request).await?;
        let mut answer = BytesMut::new();
        // One byte and no more: what follows it belongs to TLS.
        if stream.read_some(&mut answer, 1).await? == 0 {
            return Err(ServerError::Protocol("connection closed after SSLRequest"));
        }
        match answer[0] {
            b'S' => {
                let name = super::tls::server_name(host)
                    .map_err(|_| ServerError::Protocol("the host is not a name that TLS knows"))?;
                Ok(stream.connect_tls(tls.config.clone(), name).await?)
            }
            b'N' if tls.requires() => {
                Err(ServerError::Protocol("the server does not support TLS, but server_tls_sslmode requires it"))
            }
            b'N' => Ok(stream),
            _ => Err(ServerError::Protocol("unexpected answer to SSLRequest")),
        }
    }
}

const OUT_OF_ORDER: ServerError = ServerError::Protocol("authentication messages out of order");

/// A server connection that is still logging in.
struct Login {
    stream: Stream,
    buf: BytesMut,
    /// Bytes of `buf` already looked at.
    read: usize,
}

impl Login {
    /// The next message: tag and body.
    async fn next(&mut self) -> Result<(u8, Vec<u8>), ServerError> {
        next_message(&mut self.stream, &mut self.buf, &mut self.read).await
    }

    /// Proves that we know the role's password. Returns the keys with which the next proof is cheaper.
    async fn authenticate(
        &mut self,
        role: &str,
        password: &str,
        mut cached: Option<CachedKeys>,
    ) -> Result<Option<CachedKeys>, ServerError> {
        let mut scram: Option<Scram> = None;
        let mut proof: Option<ServerProof> = None;
        let mut learnt = None;
        loop {
            let (tag, body) = self.next().await?;
            match tag {
                b'R' => {}
                b'v' | b'N' => continue,
                _ => return Err(ServerError::Protocol("unexpected message during authentication")),
            }
            let request =
                Authentication::read(&body).map_err(|_| ServerError::Protocol("malformed authentication request"))?;
            let mut out = BytesMut::new();
            match request {
                Authentication::Ok if scram.is_some() || proof.is_some() => return Err(OUT_OF_ORDER),
                Authentication::Ok => return Ok(learnt),
                Authentication::CleartextPassword if self.stream.is_tls() => message::password(&mut out, password),
                Authentication::CleartextPassword => {
                    return Err(ServerError::Protocol("it asks for a password in clear text without TLS"));
                }
                Authentication::Md5Password(salt) => {
                    message::password(&mut out, &super::scram::md5_password(role, password, salt));
                }
                Authentication::Sasl(mechanisms) => {
                    let end_point = self.stream.server_end_point();
                    let exchange = Scram::new(&mechanisms, password, cached.take(), end_point.as_deref(), nonce())?;
                    let (mechanism, first) = exchange.initial();
                    message::sasl_initial_response(&mut out, mechanism, &first);
                    scram = Some(exchange);
                }
                Authentication::SaslContinue(data) => {
                    let (last, expected) = scram.take().ok_or(OUT_OF_ORDER)?.respond(data)?;
                    message::sasl_response(&mut out, &last);
                    proof = Some(expected);
                }
                Authentication::SaslFinal(data) => {
                    learnt = Some(proof.take().ok_or(OUT_OF_ORDER)?.verify(data)?);
                    continue;
                }
                Authentication::Other(_) => {
                    return Err(ServerError::Protocol("it asks for a kind of authentication that is not supported"));
                }
            }
            self.stream.send_all(&out).await?;
        }
    }

    /// Reads up to the first ReadyForQuery: parameters and cancel key.
    async fn finish(&mut self, role: &Role) -> Result<(Params, u32, Vec<u8>), ServerError> {
        let mut params = Params::default();
        let (mut pid, mut secret) = (0, Vec::new());
        loop {
            let (tag, body) = self.next().await?;
            match tag {
                b'S' => {
                    let (name, value) = parameter(&body)?;
                    check_identity(role, name, &value)?;
                    params.set(name, &value);
                }
                b'K' => {
                    let (id, key) = message::read_backend_key_data(&body)
                        .map_err(|_| ServerError::Protocol("malformed BackendKeyData"))?;
                    (pid, secret) = (id.cast_unsigned(), key.to_vec());
                }
                b'N' => {}
                b'Z' => break,
                _ => return Err(ServerError::Protocol("unexpected message after authentication")),
            }
        }
        if self.read < self.buf.len() {
            return Err(ServerError::Protocol("bytes after the first ReadyForQuery"));
        }
        // Both are reported by every server since 7.4; without them there is no check.
        for name in ["session_authorization", "is_superuser"] {
            if params.get(name).is_none() {
                return Err(ServerError::Protocol("it does not report session_authorization and is_superuser"));
            }
        }
        Ok((params, pid, secret))
    }
}

async fn next_message(stream: &mut Stream, buf: &mut BytesMut, read: &mut usize) -> Result<(u8, Vec<u8>), ServerError> {
    loop {
        let rest = &buf[*read..];
        let header = frame::header(rest).map_err(|_| ServerError::Protocol("invalid message length"))?;
        if let Some(header) = header {
            if header.total > MAX_CONTROL_MESSAGE {
                return Err(ServerError::Protocol("message too long"));
            }
            if rest.len() >= header.total {
                let body = rest[HEADER..header.total].to_vec();
                *read += header.total;
                if *read == buf.len() {
                    buf.clear();
                    *read = 0;
                }
                if header.tag == b'E' {
                    return Err(ServerError::Server(server_error(&body)));
                }
                return Ok((header.tag, body));
            }
        }
        if stream.read_some(buf, 4096).await? == 0 {
            return Err(ServerError::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// The server's error in our own terms, all fields that a client reads kept.
pub fn server_error(body: &[u8]) -> PgError {
    let Ok(fields) = ErrorFields::read(body) else {
        return PgError::fatal(sqlstate::PROTOCOL_VIOLATION, "the server sent a malformed error");
    };
    fields.into()
}

/// Name and value. What is not ASCII is not what it seems where the client's encoding is another one: see
/// [`Params::can_be_carried`].
fn parameter(body: &[u8]) -> Result<(&str, Cow<'_, str>), ServerError> {
    let (name, value) =
        message::read_parameter_status(body).map_err(|_| ServerError::Protocol("malformed ParameterStatus"))?;
    Ok((name, String::from_utf8_lossy(value)))
}

/// The free check: it is the tenant's role, and no superuser where there are others. After the login it is made of those
/// who share a server.
fn check_identity(role: &Role, name: &str, value: &str) -> Result<(), ServerError> {
    let wrong = |name| Err(ServerError::Identity { name, value: value.to_owned() });
    match name {
        "session_authorization" if value != &*role.name => wrong("session_authorization"),
        "is_superuser" if value != "off" && !role.may_be_superuser => wrong("is_superuser"),
        _ => Ok(()),
    }
}

impl ServerConnection {
    /// What a cancel of the running query needs.
    pub fn cancel_target(&self) -> Arc<Target> {
        self.target.clone()
    }

    /// Who its server process is, for those who listen.
    #[inline]
    pub fn face(&self) -> &Face {
        self.shown.face()
    }

    /// Whose the server processes of its shard are.
    pub fn faces(&self) -> &Arc<Faces> {
        self.slot.pool().faces()
    }

    /// Notes a ParameterStatus, given its body.
    ///
    /// # Errors
    /// [`ServerError::Identity`]: the connection must be closed at once.
    pub fn note_parameter(&mut self, body: &[u8]) -> Result<(), ServerError> {
        let (name, value) = parameter(body)?;
        if !self.role.may_be_superuser {
            check_identity(&self.role, name, &value)?;
        } else if name == "session_authorization" {
            // On a server of its own a tenant may have other roles, and be them for a while.
            self.disguised = *value != *self.role.name;
        }
        self.params = self.slot.pool().intern_with(&self.params, name, &value);
        Ok(())
    }

    /// Whether the session has the identity that it logged in with.
    #[inline]
    pub fn is_itself(&self) -> bool {
        !self.disguised
    }

    /// Whether the server has said nothing since it became idle. One that has is shutting down, or in doubt.
    pub fn is_quiet(&mut self) -> bool {
        self.stream.is_quiet()
    }

    /// Runs statements of ours, each as a simple Query, outside a transaction. Not cancel safe: a connection on which
    /// this did not return `Ok` or [`ServerError::Server`] with severity ERROR must be closed.
    ///
    /// # Errors
    /// Those of the socket; the server's, if a statement fails; a protocol that is out of step.
    pub async fn simple_queries(&mut self, statements: &[&str]) -> Result<(), ServerError> {
        self.rows(statements).await.map(drop)
    }

    /// Like [`Self::simple_queries`], and returns the rows that come: texts, or NULL. Both ways it is the client's encoding that
    /// counts, whichever that is: ask for ASCII, in ASCII.
    ///
    /// # Errors
    /// See there.
    pub async fn rows(&mut self, statements: &[&str]) -> Result<Vec<Vec<Option<String>>>, ServerError> {
        let mut out = BytesMut::with_capacity(64);
        for sql in statements {
            debug_assert!(sql.is_ascii(), "{sql}");
            message::query(&mut out, sql);
        }
        self.prepared.unnamed = None;
        self.stream.send_all(&out).await?;
        let (mut buf, mut read) = (BytesMut::new(), 0);
        let (mut ready, mut rows, mut failed) = (0, Vec::new(), None);
        // A notification may follow the last answer closely, or be half here.
        while ready < statements.len() || buf.get(read) == Some(&b'A') {
            let (tag, body) = match next_message(&mut self.stream, &mut buf, &mut read).await {
                // The statement failed; its ReadyForQuery comes all the same.
                Err(ServerError::Server(error)) if error.severity == Severity::Error => {
                    failed.get_or_insert(error);
                    continue;
                }
                other => other?,
            };
            match tag {
                b'S' => self.note_parameter(&body)?,
                b'D' => rows.push(row(&body).map_err(|_| ServerError::Protocol("malformed DataRow"))?),
                b'A' => self.heard.push(body),
                b'Z' if body == b"I" => ready += 1,
                b'Z' => return Err(ServerError::Protocol("in a transaction where none was begun")),
                _ => {}
            }
        }
        match failed {
            _ if read < buf.len() => Err(ServerError::Protocol("bytes after the last ReadyForQuery")),
            Some(error) => Err(ServerError::Server(error)),
            None => Ok(rows),
        }
    }
}

/// The values of a DataRow in text format.
fn row(body: &[u8]) -> Result<Vec<Option<String>>, Malformed> {
    let mut cursor = Cursor::new(body);
    let columns = cursor.i16()?;
    let mut values = Vec::new();
    for _ in 0..columns {
        let length = cursor.i32()?;
        let value = match usize::try_from(length) {
            Err(_) => None,
            Ok(length) => Some(str::from_utf8(cursor.bytes(length)?).map_err(|_| Malformed::Encoding)?.to_owned()),
        };
        values.push(value);
    }
    cursor.finish()?;
    Ok(values)
}
