//! The story of one client, start to end.
//!
//! ```text
//! open          TLS, startup packet                      ┐ one deadline,
//! identify      which login, which tenant                │ client_login_timeout
//! authenticate  SCRAM; unknown names cost the same       ┘
//! admit         the tenant exists (or is made), is active, may have what it asks for
//! ── hand over to the tenant's worker thread ──
//! greet         parameters as the server reports them, cancel key
//! relay
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::BytesMut;

use crate::client::auth::Exchange;
use crate::client::login::{self, Opened, Opening, Refused};
use crate::client::parameters::{ClientParameters, REPLICATION};
use crate::client::sessions::Registered;
use crate::client::signals::Signals;
use crate::config::{AuthType, GuardMode, PoolMode};
use crate::control::canary::WITHOUT_GUARD;
use crate::directory::{Directory, Tenant};
use crate::error::{PgError, Severity, sqlstate};
use crate::metrics::Present;
use crate::pool::lease::CheckIn;
use crate::pool::params::Params;
use crate::pool::{CheckoutError, DATABASE, Lease, Settings};
use crate::relay::{self, Client, End};
use crate::server::{self, Settled, Shared};
use crate::stream::{Moving, Stream};
use crate::tenant::credential::{Verifier, nonce};
use crate::tenant::identify::{self, Hello, Identity, Known, Login};
use crate::tenant::plan::Replication;
use crate::tenant::{Status, TenantId};
use crate::violation::{Action, Kind, Violation};
use crate::wire::Version;
use crate::wire::message;

/// How long a client that is to go may take to read why.
const GOODBYE: Duration = Duration::from_secs(2);

/// Where a client comes from.
#[derive(Debug, Clone, Copy)]
pub enum Peer {
    /// TCP
    Tcp(SocketAddr),
    /// The Unix socket
    Unix,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix socket"),
        }
    }
}

/// A client that is logged in, on its way to its tenant's worker.
pub struct Admitted {
    stream: Moving,
    input: BytesMut,
    /// What is to be sent before the greeting.
    unsent: BytesMut,
    version: Version,
    tenant: Arc<Tenant>,
    seen: u64,
    settings: Settings,
    application_name: Arc<str>,
    peer: Peer,
    user: String,
    id: u64,
    /// What was configured when it came.
    settled: Arc<Settled>,
    _counted: Counted,
}

impl Admitted {
    /// The tenant that it belongs to.
    pub fn tenant_id(&self) -> &TenantId {
        &self.tenant.id
    }

    /// Ready for another runtime; nothing, if the socket is lost.
    pub fn leaving(self) -> Option<Self> {
        let stream = Moving::Between(self.stream.arrive().ok()?.detach().ok()?);
        Some(Self { stream, ..self })
    }
}

/// One client more, as long as it lives.
struct Counted(Arc<Shared>);

impl Counted {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.metrics.clients.fetch_add(1, Ordering::Relaxed);
        shared.metrics.clients_total.fetch_add(1, Ordering::Relaxed);
        Self(shared.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.metrics.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Known for Directory {
    fn is_app_user(&self, name: &str) -> bool {
        self.user(name).is_some()
    }

    fn may_use(&self, app_user: &str, tenant: &TenantId) -> bool {
        self.user(app_user).is_some_and(|user| user.may_use(tenant))
    }

    fn exists(&self, tenant: &TenantId) -> bool {
        self.find(tenant.as_str()).is_some()
    }

    fn chooses_database(&self, tenant: &TenantId) -> bool {
        self.find(tenant.as_str()).is_some_and(|tenant| tenant.plan.clients_choose_place())
    }
}

/// Takes a client from accept to its tenant's worker, which serves it to its end. One that has not logged in holds up
/// no shutdown.
pub async fn accept(stream: Stream, peer: Peer, shared: Arc<Shared>) {
    let stopping = shared.stopping();
    // In a box: the task would be as large as a login, and be moved whole several times.
    match stopping.run_until_cancelled(Box::pin(log_in(stream, peer, &shared))).await {
        Some(Some(admitted)) => shared.hand_over(admitted).await,
        Some(None) => {}
        None => tracing::debug!(%peer, "closed while logging in: shutting down"),
    }
}

/// Nothing, if the client was turned away, or wanted nothing more.
async fn log_in(stream: Stream, peer: Peer, shared: &Arc<Shared>) -> Option<Admitted> {
    let settled = shared.settled();
    let counted = Counted::new(shared);
    let tls = if matches!(peer, Peer::Unix) { None } else { shared.server_tls.current() };
    let timeout = settled.client_login_timeout;
    let deadline = tokio::time::Instant::now() + timeout;
    let Ok(opened) = tokio::time::timeout_at(deadline, login::open(stream, tls)).await else {
        tracing::debug!(%peer, "client_login_timeout before the startup packet");
        return None;
    };
    let mut opening = match opened {
        Opened::Session(opening) => opening,
        Opened::Cancel(mut stream, cancel) => {
            shared.cancels.cancel(cancel.process_id.cast_unsigned(), &cancel.secret_key).await;
            // Not before: clients wait for the end, and would meet a late cancel with their next query.
            let _ = tokio::time::timeout(GOODBYE, stream.shutdown()).await;
            return None;
        }
        Opened::Nothing => return None,
    };
    // As much as the greeting takes.
    let mut unsent = BytesMut::with_capacity(1000);
    let proof = prove(shared, &settled, &mut opening, &mut unsent);
    let refused = match tokio::time::timeout_at(deadline, proof).await {
        Ok(Ok(identity)) => match admit(shared, &identity, &opening, peer).await {
            Ok((tenant, settings, application_name)) => {
                shared.metrics.client_logins_ok.fetch_add(1, Ordering::Relaxed);
                let Opening { stream, input, startup, .. } = *opening;
                return Some(Admitted {
                    stream: Moving::Within(stream),
                    input,
                    unsent,
                    version: startup.version(),
                    seen: 0,
                    tenant,
                    settings,
                    application_name,
                    peer,
                    user: startup.user().to_owned(),
                    id: shared.next_client(),
                    settled,
                    _counted: counted,
                });
            }
            Err(error) => error,
        },
        Ok(Err(Refused::Told(error))) => error,
        Ok(Err(Refused::Gone)) => {
            tracing::debug!(%peer, "client left while logging in");
            return None;
        }
        Err(_) => PgError::fatal(sqlstate::INVALID_AUTHORIZATION, "client_login_timeout")
            .detail(format!("The login was not complete after {timeout:?}.")),
    };
    turn_away(shared, &mut opening, unsent, peer, refused).await;
    None
}

async fn turn_away(shared: &Shared, opening: &mut Opening, mut unsent: BytesMut, peer: Peer, mut error: PgError) {
    error.severity = Severity::Fatal;
    shared.metrics.client_logins_failed.fetch_add(1, Ordering::Relaxed);
    shared.metrics.count_error(&error.code, "proxy");
    tracing::info!(%peer, user = opening.startup.user(), code = %error.code, error = error.message, "login refused");
    message::error_response(&mut unsent, &error);
    let goodbye = async {
        if opening.stream.send_all(&unsent).await.is_ok() {
            let _ = opening.stream.shutdown().await;
        }
    };
    let _ = tokio::time::timeout(GOODBYE, goodbye).await;
}

/// Who is it? The answer to everything that is wrong before the proof is 28P01, at one cost.
async fn prove(
    shared: &Shared,
    settled: &Settled,
    opening: &mut Opening,
    unsent: &mut BytesMut,
) -> Result<Identity, Refused> {
    opening.negotiate(unsent);
    if shared.metrics.clients.load(Ordering::Relaxed) > settled.max_client_conn {
        let error = PgError::fatal(sqlstate::TOO_MANY_CONNECTIONS, "no more connections allowed (max_client_conn)")
            .detail(format!("The proxy serves {} clients.", settled.max_client_conn))
            .hint("Close connections that are not used, or raise max_client_conn.");
        return Err(Refused::Told(error));
    }
    let parameters = ClientParameters::read(&opening.startup);
    let hello = Hello {
        user: opening.startup.user(),
        database: opening.startup.database(),
        application_name: parameters.application_name.as_deref(),
        tenant_option: parameters.tenant.as_deref(),
        sni: opening.sni.as_deref(),
    };
    let identity = identify::identify(&settled.identify, &hello, &*shared.directory);
    let user = opening.startup.user().to_owned();
    match settled.auth_type {
        AuthType::ScramSha256 => {
            let verifier = verifier(&shared.directory, &identity.login);
            let end_point = opening.end_point.clone();
            let exchange = Exchange::new(&user, verifier.as_ref(), &shared.mock, end_point.as_deref(), nonce());
            opening.authenticate(exchange, unsent).await?;
        }
        AuthType::Trust if exists(&shared.directory, &identity.login) => {}
        AuthType::Trust => return Err(Refused::Told(crate::client::auth::wrong_password(&user))),
    }
    Ok(identity)
}

fn verifier(directory: &Directory, login: &Login) -> Option<Verifier> {
    match login {
        Login::Tenant(id) => directory.find(id.as_str())?.verifier.clone(),
        Login::AppUser(name) => directory.user(name)?.verifier.clone(),
        Login::Nobody => None,
    }
}

fn exists(directory: &Directory, login: &Login) -> bool {
    match login {
        Login::Tenant(id) => directory.find(id.as_str()).is_some(),
        Login::AppUser(name) => directory.user(name).is_some(),
        Login::Nobody => false,
    }
}

/// The tenant, made if it may be, and the settings that the client may have.
async fn admit(
    shared: &Shared,
    identity: &Identity,
    opening: &Opening,
    peer: Peer,
) -> Result<(Arc<Tenant>, Settings, Arc<str>), PgError> {
    let user = opening.startup.user();
    let report = |tenant: &str, error: &PgError| {
        let attempt = Violation::new(Kind::Startup, Action::Refused, tenant, user, peer);
        shared.metrics.report(attempt.what(error.message.as_str()));
    };
    let id = identity.tenant.as_ref().map_err(|error| {
        let told = PgError::from(error);
        if error.is_violation() {
            report(named(&identity.login), &told);
        }
        told
    })?;
    let tenant = match shared.directory.find(id.as_str()) {
        Some(tenant) => tenant,
        None => make(shared, &identity.login, id, user).await?,
    };
    if tenant.status != Status::Active {
        let text = format!("tenant \"{id}\" is {}", tenant.status.as_str());
        return Err(PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, text).hint("Ask whoever runs this service."));
    }
    let parameters = ClientParameters::read(&opening.startup);
    let chooses = tenant.plan.clients_choose_place();
    let (schema, replication) = ((!chooses).then(|| tenant.schema()), tenant.plan.replication());
    let mut settings = parameters.settings_for(schema, replication).map_err(|refusal| {
        if refusal.violation {
            report(id.as_str(), &refusal.error);
        }
        refusal.error
    })?;
    // The tenant's and the user's names stand for the tenant's first database, all others for themselves.
    let database = opening.startup.database().filter(|&name| name != id.as_str() && name != user);
    if let Some(database) = database.filter(|_| chooses) {
        let at = settings.partition_point(|(name, _)| name.as_str() < DATABASE);
        settings.insert(at, (DATABASE.to_owned(), database.to_owned()));
    }
    Ok((tenant, settings, parameters.application_name.unwrap_or_default().into()))
}

fn named(login: &Login) -> &str {
    match login {
        Login::Tenant(id) => id.as_str(),
        Login::AppUser(_) | Login::Nobody => "",
    }
}

async fn make(shared: &Shared, login: &Login, id: &TenantId, user: &str) -> Result<Arc<Tenant>, PgError> {
    let may = match login {
        Login::AppUser(name) => shared.directory.user(name).is_some_and(|user| user.auto_provision),
        Login::Tenant(_) | Login::Nobody => false,
    };
    if !may && !shared.directory.is_current() {
        return Err(PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, format!("tenant \"{id}\" is not known"))
            .detail("The catalog is not reachable, so that nobody can say whether the tenant exists.")
            .hint("Try again in a moment."));
    }
    if !may {
        return Err(PgError::fatal(sqlstate::UNKNOWN_DATABASE, format!("tenant \"{id}\" does not exist"))
            .hint("Create it first, or set auto_provision = true for the application user."));
    }
    shared.directory.ensure(id, user).await
}

/// Greets a client that has been handed over, and leaves it to a task that holds no more than the relay needs. Runs on
/// the tenant's worker.
pub async fn serve(admitted: Admitted, shared: Arc<Shared>, worker: Arc<relay::Worker>) {
    let visit = Visit { began: tokio::time::Instant::now(), log: admitted.settled.log_connections };
    let (tenant, id) = (admitted.tenant.clone(), admitted.id);
    let (user, from): (Arc<str>, Arc<str>) = (admitted.user.as_str().into(), admitted.peer.to_string().into());
    match greet(admitted, &shared, &worker, (user.clone(), from.clone())).await {
        Ok((client, early, entries)) => {
            // At the end of the one future, not around it: a future that is passed on is kept twice.
            tokio::spawn(relay::run(client, &early, worker, entries, move |client, end| {
                visit.over(
                    &Who { tenant: &client.tenant.id, user: &client.user, from: &client.from, id: client.id },
                    &end,
                );
            }));
        }
        Err(reason) => {
            let end = reason.map_or(End::Lost, End::Told);
            visit.over(&Who { tenant: &tenant.id, user: &user, from: &from, id }, &end);
        }
    }
}

/// Who a line of the log is about.
struct Who<'a> {
    tenant: &'a TenantId,
    user: &'a str,
    from: &'a str,
    id: u64,
}

/// From the greeting to the end.
struct Visit {
    began: tokio::time::Instant,
    log: bool,
}

impl Visit {
    /// Logs that it is over.
    fn over(&self, who: &Who<'_>, end: &End) {
        if !self.log {
            return;
        }
        let seconds = self.began.elapsed().as_secs_f64();
        let why = match end {
            End::Lost => "client lost".to_owned(),
            End::Left => "client left".to_owned(),
            End::Server => "server closed".to_owned(),
            End::Told(error) => error.to_string(),
        };
        let Who { tenant, user, from: peer, id } = who;
        tracing::info!(%tenant, user, peer, id, seconds, why, "client disconnected");
    }
}

/// Tells the client that it is welcome, in the server's own words. What it has sent already comes along. `Err(None)`: it
/// went away.
async fn greet(
    admitted: Admitted,
    shared: &Arc<Shared>,
    worker: &Arc<relay::Worker>,
    (user, from): (Arc<str>, Arc<str>),
) -> Result<(Client, BytesMut, (Registered, Counted)), Option<PgError>> {
    let stats = Present::new(shared.metrics.tenant(admitted.tenant.id.as_str()));
    let mut stream = admitted.stream.arrive().map_err(|_| None)?;
    let signals = Arc::new(Signals::default());
    let registered = shared.sessions.register(&admitted.tenant.id, admitted.id, signals.clone());
    if shared.is_draining() {
        // It may have come too late to be told.
        signals.drain(server::shutting_down());
    }
    let settings = shared.settings.intern(admitted.settings);
    let name = admitted.application_name;
    let mut out = admitted.unsent;
    let (params, mut lease) = match welcome(worker, &admitted.tenant, &settings, &name, &admitted.settled).await {
        Ok(welcome) => welcome,
        Err(mut error) => {
            error.severity = Severity::Fatal;
            message::authentication_ok(&mut out);
            message::error_response(&mut out, &error);
            worker.metrics.count_error(&error.code, "proxy");
            let _ = stream.send_all(&out).await;
            let _ = stream.shutdown().await;
            return Err(Some(error));
        }
    };
    let params = worker.pools.get(&admitted.tenant).intern_with(&params, "application_name", &name);
    let secret_len = if admitted.version == Version::V3_2 { 32 } else { 4 };
    let pid = lease.as_mut().map(|lease| lease.conn().cancel_target().pid);
    let key = shared.cancels.issue(secret_len, pid, &admitted.tenant.id, signals.clone());
    message::authentication_ok(&mut out);
    params.put_statuses(&mut out);
    message::backend_key_data(&mut out, key.pid.cast_signed(), key.entry.secret());
    message::ready_for_query(&mut out, b'I');
    stream.send_all(&out).await.map_err(|_| None)?;
    if admitted.settled.log_connections {
        tracing::info!(tenant = %admitted.tenant.id, user = admitted.user, peer = %admitted.peer, id = admitted.id,
            tls = stream.is_tls(), shard = admitted.tenant.shard.name, "client connected");
    }
    let replicates = replicates(&settings);
    let rules = rules_for(&admitted.settled.relay, &admitted.tenant, &name, replicates);
    let client = Client {
        id: admitted.id,
        stream,
        stats,
        tenant: admitted.tenant,
        seen: admitted.seen,
        settings,
        application_name: name,
        params,
        key,
        lease,
        signals,
        rules,
        replicates,
        user,
        from,
    };
    Ok((client, admitted.input, (registered, admitted._counted)))
}

/// What was configured; for the canary, which wants to see the wall behind the guard, without the guard; for a client that
/// replicates, which keeps its server connection and whose command never ends, as it must be. (Beside others it is known
/// which command that is.)
fn rules_for(
    rules: &Arc<relay::Rules>,
    tenant: &Tenant,
    application_name: &str,
    replicates: bool,
) -> Arc<relay::Rules> {
    if replicates {
        let alone = tenant.plan.replication() == Replication::Everything;
        let query_timeout = if alone { Duration::ZERO } else { rules.query_timeout };
        let rules = relay::Rules { pool_mode: PoolMode::Session, query_timeout, ..relay::Rules::clone(rules) };
        return Arc::new(rules);
    }
    if tenant.id.is_canary() && application_name == WITHOUT_GUARD {
        return Arc::new(relay::Rules { guard: GuardMode::Off, ..relay::Rules::clone(rules) });
    }
    rules.clone()
}

/// Whether it is a replication connection.
fn replicates(settings: &Settings) -> bool {
    settings.iter().any(|(name, _)| name == REPLICATION)
}

/// What the server reports at login. Asked of a server only if no connection with these settings was opened before:
/// the connection is then there for the client's first query. A client that keeps its connection to the end gets it now, if
/// it need not wait for it, and so the true process id.
async fn welcome(
    worker: &relay::Worker,
    tenant: &Arc<Tenant>,
    settings: &Arc<Settings>,
    application_name: &Arc<str>,
    settled: &Settled,
) -> Result<(Arc<Params>, Option<Lease>), PgError> {
    let keeps = settled.relay.pool_mode == PoolMode::Session || replicates(settings);
    loop {
        let pool = worker.pools.get(tenant);
        if let Some(params) = pool.welcome(settings)
            && !(keeps && pool.has_room(settings))
        {
            return Ok((params, None));
        }
        let name = if keeps { application_name.clone() } else { Arc::default() };
        let mut lease = match pool.checkout(settings, &name, settled.relay.query_wait_timeout).await {
            Ok(lease) => lease,
            Err(CheckoutError::Failed(error)) => return Err(error),
            Err(CheckoutError::Retired)
                if worker.directory.find(tenant.id.as_str()).is_some_and(|t| t.epoch == tenant.epoch) =>
            {
                continue;
            }
            Err(CheckoutError::Retired) => {
                return Err(PgError::fatal(sqlstate::CANNOT_CONNECT_NOW, "the tenant is being moved or deleted")
                    .hint("Connect again."));
            }
        };
        let params = lease.conn().params.clone();
        if keeps {
            return Ok((params, Some(lease)));
        }
        let now = tokio::time::Instant::now();
        lease.release(CheckIn::Clean, settled.relay.server_reset_timeout, now);
        return Ok((params, None));
    }
}
