//! The hot path: between an authenticated client and its tenant's server connections.
//!
//! One task per client. It waits without a server connection and without a buffer until a request begins, borrows a
//! connection, passes frames both ways as [`session::Session`] decides, and gives the connection back.

pub mod flow;
pub mod guard;
pub mod lex;
pub mod scan;
pub mod session;
pub mod settle;
pub mod track;

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{Instant, Sleep};

use crate::client::signals::{Signal, Signals};
use crate::config::{GuardMode, PoolMode};
use crate::directory::{Directory, Tenant};
use crate::error::{PgError, sqlstate};
use crate::metrics::{Metrics, TenantStats, WorkerStats};
use crate::pool::cancel::Key;
use crate::pool::connect::{ServerError, server_error};
use crate::pool::lease::CheckIn;
use crate::pool::params::Params;
use crate::pool::residue::Carried;
use crate::pool::{CheckoutError, Lease, Pool, Pools, Settings};
use crate::stream::{Buffers, Stream};
use crate::tenant::Status;
use crate::violation::{self, Action, Kind, Violation};
use crate::wire::frame::{self, HEADER};
use crate::wire::message;
use flow::Flow;
use guard::{Neighbours, Seat};
use lex::Lex;
use session::{Link, Session, Verdict, Ward};

/// What all clients of one worker thread share.
pub struct Worker {
    /// Where tenants live.
    pub directory: Arc<Directory>,
    /// Server connections.
    pub pools: Arc<Pools>,
    /// Everything that is counted.
    pub metrics: Arc<Metrics>,
    /// This worker's counters.
    pub stats: Arc<WorkerStats>,
    /// This worker's buffers.
    pub buffers: Buffers,
}

/// What the relay does, from `[proxy]` and `[pool]`.
#[derive(Debug, Clone)]
pub struct Rules {
    /// When a server connection goes back.
    pub pool_mode: PoolMode,
    /// Longest wait for a server connection.
    pub query_wait_timeout: Duration,
    /// Longest reset.
    pub server_reset_timeout: Duration,
    /// Prepared statements per server connection; 0 passes names through.
    pub max_prepared_statements: usize,
    /// Longest message that is taken in whole.
    pub max_packet_size: usize,
    /// Longest silence of a client outside a transaction; zero is for ever.
    pub client_idle_timeout: Duration,
    /// Longest silence of a client inside a transaction; zero is for ever.
    pub idle_transaction_timeout: Duration,
    /// Longest query; zero is for ever.
    pub query_timeout: Duration,
    /// What becomes of statements that reach for another tenant.
    pub guard: GuardMode,
}

impl Rules {
    /// How long the server may take to set or tell a session's settings.
    fn settle_timeout(&self) -> Duration {
        self.server_reset_timeout.max(Duration::from_secs(1))
    }
}

/// An authenticated client, greeted and ready for its first query.
pub struct Client {
    /// Number of the connection, never used twice.
    pub id: u64,
    /// Its socket.
    pub stream: Stream,
    /// What it may have sent already.
    pub early: Vec<u8>,
    /// Whom it belongs to.
    pub tenant: Arc<Tenant>,
    /// The directory's version that `tenant` was read at.
    pub seen: u64,
    /// Its startup settings.
    pub settings: Arc<Settings>,
    /// Its application_name at startup.
    pub application_name: Arc<str>,
    /// What it believes its settings to be.
    pub params: Arc<Params>,
    /// Its cancel key.
    pub key: Key,
    /// How to reach its task.
    pub signals: Arc<Signals>,
    /// Its tenant's counters.
    pub stats: Arc<TenantStats>,
    /// What to do.
    pub rules: Arc<Rules>,
    /// The name it logged in with.
    pub user: Arc<str>,
    /// Where it comes from.
    pub from: Arc<str>,
}

/// How a connection ended.
#[derive(Debug)]
pub enum End {
    /// The client said goodbye or went away between transactions.
    Left,
    /// The client went away, or its socket failed, in the middle of something.
    Lost,
    /// The client was told this.
    Told(PgError),
    /// The server ended it in its own words, which the client has got.
    Server,
}

/// Serves the client until it leaves. Dropping the future closes both connections.
pub fn run(client: Client, worker: Arc<Worker>) -> impl Future<Output = End> + Send {
    // An idle client costs little more than this future: what is rare is boxed where it happens.
    let mut relay = Relay::new(client, worker);
    async move {
        let end = relay.serve().await;
        match &end {
            End::Told(error) => Box::pin(relay.say_goodbye(error)).await,
            // TLS without a proper end is an error to OpenSSL, in the place of what the server said last.
            End::Server => drop(tokio::time::timeout(FAREWELL, relay.client.stream.shutdown()).await),
            End::Left | End::Lost => {}
        }
        end
    }
}

struct Relay {
    client: Client,
    worker: Arc<Worker>,
    pool: Arc<Pool>,
    session: Session,
    /// Client to server.
    up: Flow,
    /// Server to client.
    down: Flow,
    /// Armed only where a timeout is configured.
    alarm: Option<Pin<Box<Sleep>>>,
    waits: Waits,
    query_since: Option<Instant>,
    transaction_since: Option<Instant>,
    ready_at: Instant,
    /// Settings that the client takes along, other than those that the server reports.
    carried: Arc<Carried>,
    /// Why the client keeps its server connection between transactions.
    pinned: Option<settle::Reason>,
    /// The client has said goodbye; what it asked for before is still carried out.
    leaving: bool,
    /// The server takes no more.
    server_deaf: bool,
    /// The server has said why it closes.
    farewell: bool,
    /// The guard has counted the last text and let it through: what the server says to it is not counted again.
    observed: Cell<bool>,
}

/// What a client does next.
enum Next {
    Request,
    Leave(End),
}

/// Why an exchange with a server connection ended.
enum Outcome {
    /// The transaction is over (in session mode: the client leaves).
    Done,
    ClientGone,
    ServerGone,
    Told(PgError),
}

impl Relay {
    fn new(mut client: Client, worker: Arc<Worker>) -> Self {
        let session = Session::new(client.id, client.rules.pool_mode, client.rules.max_prepared_statements);
        let pool = worker.pools.get(&client.tenant);
        let carried = pool.intern_carried(Arc::default());
        let up = Flow::preload(&std::mem::take(&mut client.early));
        Self {
            client,
            worker,
            pool,
            session,
            up,
            down: Flow::default(),
            alarm: None,
            waits: Waits::Nobody,
            query_since: None,
            transaction_since: None,
            ready_at: Instant::now(),
            carried,
            pinned: None,
            leaving: false,
            server_deaf: false,
            farewell: false,
            observed: Cell::new(false),
        }
    }

    async fn serve(&mut self) -> End {
        loop {
            match self.next_request().await {
                Next::Request => {}
                Next::Leave(end) => return end,
            }
            if let Err(error) = self.route() {
                return End::Told(error);
            }
            let lease = match self.pool.try_checkout(&self.client.settings) {
                Some(lease) => lease,
                None => match Box::pin(self.checkout()).await {
                    Ok(Some(lease)) => lease,
                    Ok(None) => continue,
                    Err(end) => return end,
                },
            };
            if let Some(end) = self.lend(lease).await {
                return end;
            }
        }
    }

    /// Waits for the beginning of a request, holding nothing.
    async fn next_request(&mut self) -> Next {
        self.arm(self.client.rules.client_idle_timeout);
        poll_fn(|cx| self.poll_request(cx)).await
    }

    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        loop {
            match self.client.signals.poll(cx) {
                Poll::Ready(Signal::Kill(reason) | Signal::Drain(reason)) => {
                    return Poll::Ready(Next::Leave(End::Told(reason)));
                }
                Poll::Ready(Signal::CancelWait) => continue,
                Poll::Pending => {}
            }
            match self.look_for_request() {
                Ok(Some(next)) => return Poll::Ready(next),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Next::Leave(End::Told(error))),
            }
            if self.down.has_output() && matches!(self.poll_send_down(cx), Poll::Ready(Err(_))) {
                return Poll::Ready(Next::Leave(End::Lost));
            }
            match self.up.poll_fill(cx, &mut self.client.stream, &self.worker.buffers) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Next::Leave(End::Left)),
                Poll::Ready(Ok(n)) => self.count_client_in(n),
                Poll::Ready(Err(_)) => return Poll::Ready(Next::Leave(End::Lost)),
                Poll::Pending if self.alarm_rings(cx) => {
                    let error = PgError::fatal(sqlstate::IDLE_SESSION_TIMEOUT, "client_idle_timeout");
                    return Poll::Ready(Next::Leave(End::Told(error)));
                }
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Whether what has arrived is worth a server connection: so much of a frame that it can be decided about.
    fn look_for_request(&mut self) -> Result<Option<Next>, PgError> {
        loop {
            self.up.continue_frame();
            let unseen = self.up.unseen();
            let Some(header) = frame::header(unseen).map_err(invalid_length)? else { return Ok(None) };
            match header.tag {
                b'X' => return Ok(Some(Next::Leave(End::Left))),
                // What is left of a COPY that the server has broken off.
                b'd' | b'c' | b'f' => self.up.swallow(header.total),
                _ => {
                    if header.tag == b'P' && self.prepare_alone() {
                        continue;
                    }
                    let unseen = self.up.unseen();
                    let limit = self.worker.buffers.size();
                    let needed = self.session.needs(header, unseen, limit, self.client.rules.max_packet_size)?;
                    return Ok((unseen.len() >= needed).then_some(Next::Request));
                }
            }
        }
    }

    /// See [`Session::prepare_alone`].
    fn prepare_alone(&mut self) -> bool {
        let mut answers = BytesMut::new();
        let ward = Guard { worker: &self.worker, client: &self.client, observed: &self.observed };
        let registry = &self.pool.statements;
        let Some(done) = self.session.prepare_alone(self.up.unseen(), registry, &ward, &mut answers) else {
            return false;
        };
        self.up.swallow(done);
        self.down.out(&self.worker.buffers).extend_from_slice(&answers);
        true
    }

    /// Borrows a server connection. `Ok(None)`: the request was answered with an error and the client goes on.
    async fn checkout(&mut self) -> Result<Option<Lease>, End> {
        loop {
            self.route().map_err(End::Told)?;
            if let Some(lease) = self.pool.try_checkout(&self.client.settings) {
                return Ok(Some(lease));
            }
            let waiting = Waiting::new(&self.worker.stats);
            let since = Instant::now();
            let (pool, signals) = (self.pool.clone(), self.client.signals.clone());
            let (settings, name) = (self.client.settings.clone(), self.client.application_name.clone());
            let mut checkout = std::pin::pin!(pool.checkout(&settings, &name, self.client.rules.query_wait_timeout));
            let found = poll_fn(|cx| {
                if let Poll::Ready(signal) = signals.poll(cx) {
                    return Poll::Ready(Err(signal));
                }
                checkout.as_mut().poll(cx).map(Ok)
            })
            .await;
            drop(waiting);
            self.worker.stats.wait_time.observe(since.elapsed());
            match found {
                Ok(Ok(lease)) => return Ok(Some(lease)),
                Ok(Err(CheckoutError::Retired)) => {}
                Ok(Err(CheckoutError::Failed(error))) => return self.refuse_request(error).await.map(|()| None),
                Err(Signal::Kill(reason) | Signal::Drain(reason)) => return Err(End::Told(reason)),
                Err(Signal::CancelWait) => {
                    let error = PgError::error(sqlstate::QUERY_CANCELED, "canceling statement due to user request");
                    return self.refuse_request(error).await.map(|()| None);
                }
            }
        }
    }

    /// Looks again where the tenant lives, if anything has changed in the directory.
    #[inline]
    fn route(&mut self) -> Result<(), PgError> {
        let version = self.worker.directory.version();
        if version == self.client.seen && !self.pool.is_retired() {
            return Ok(());
        }
        let id = &self.client.tenant.id;
        let tenant = self.worker.directory.find(id.as_str()).ok_or_else(|| gone(id.as_str()))?;
        if tenant.status != Status::Active {
            return Err(gone(id.as_str()));
        }
        self.pool = self.worker.pools.get(&tenant);
        self.client.tenant = tenant;
        self.client.seen = version;
        Ok(())
    }

    /// Answers the request at hand with an error, skipping all of it: up to the Query or Sync that ends it. The error
    /// goes out at once: a driver that sends Flush waits for it before it sends Sync.
    async fn refuse_request(&mut self, mut error: PgError) -> Result<(), End> {
        self.worker.metrics.count_error(&error.code, "proxy");
        error.severity = crate::error::Severity::Error;
        // At once: a client that has sent a Flush sends its Sync only when it has seen the error.
        message::error_response(self.down.out(&self.worker.buffers), &error);
        poll_fn(|cx| self.poll_skip_request(cx)).await?;
        message::ready_for_query(self.down.out(&self.worker.buffers), b'I');
        Ok(())
    }

    fn poll_skip_request(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let mut ended = false;
        loop {
            self.up.continue_frame();
            if ended && !self.up.mid_frame() {
                return Poll::Ready(Ok(()));
            }
            let header = match frame::header(self.up.unseen()) {
                Ok(header) => header,
                Err(error) => return Poll::Ready(Err(End::Told(invalid_length(error)))),
            };
            if let Some(header) = header.filter(|_| !ended) {
                match header.tag {
                    b'X' => return Poll::Ready(Err(End::Left)),
                    tag => ended = matches!(tag, b'Q' | b'S' | b'F'),
                }
                self.up.swallow(header.total);
                continue;
            }
            if let Poll::Ready(Signal::Kill(reason) | Signal::Drain(reason)) = self.client.signals.poll(cx) {
                return Poll::Ready(Err(End::Told(reason)));
            }
            if self.down.has_output() && matches!(self.poll_send_down(cx), Poll::Ready(Err(_))) {
                return Poll::Ready(Err(End::Lost));
            }
            match std::task::ready!(self.up.poll_fill(cx, &mut self.client.stream, &self.worker.buffers)) {
                Ok(0) => return Poll::Ready(Err(End::Left)),
                Ok(n) => self.count_client_in(n),
                Err(_) => return Poll::Ready(Err(End::Lost)),
            }
        }
    }

    /// Uses the server connection until the transaction, or the session, is over. `Some` ends the connection.
    async fn lend(&mut self, mut lease: Lease) -> Option<End> {
        let conn = lease.conn();
        let same = Arc::ptr_eq(&conn.params, &self.client.params) && Arc::ptr_eq(&conn.applied, &self.carried);
        if !same && let Err(end) = Box::pin(self.carry_settings(&mut lease)).await {
            return Some(end);
        }
        self.client.key.entry.bind(lease.conn().cancel_target());
        self.worker.stats.clients_active.fetch_add(1, Ordering::Relaxed);
        (self.waits, self.server_deaf, self.farewell) = (Waits::Nobody, false, false);
        let mut outcome = poll_fn(|cx| self.poll_exchange(cx, &mut lease)).await;
        while matches!(outcome, Outcome::Done) && self.must_settle() {
            outcome = match Box::pin(self.settle(&mut lease)).await {
                Err(error) => Outcome::Told(error),
                Ok(()) if self.pinned.is_none() => break,
                Ok(()) => poll_fn(|cx| self.poll_exchange(cx, &mut lease)).await,
            };
        }
        self.worker.stats.clients_active.fetch_sub(1, Ordering::Relaxed);
        self.client.key.entry.unbind();
        match outcome {
            Outcome::Done => {
                self.give_back(lease);
                self.leaving.then_some(End::Left)
            }
            Outcome::ClientGone if self.session.is_idle() && self.up.is_empty() && !self.down.in_frame() => {
                self.give_back(lease);
                Some(End::Left)
            }
            Outcome::ClientGone => {
                lease.abandon();
                Some(End::Lost)
            }
            // Its own words, if it had any, are on their way to the client.
            Outcome::ServerGone if self.farewell && !self.down.in_frame() => {
                poll_fn(|cx| self.poll_send_down(cx)).await.ok();
                Some(End::Server)
            }
            Outcome::ServerGone => Some(End::Told(
                PgError::fatal(sqlstate::CONNECTION_FAILURE, "the server closed the connection unexpectedly")
                    .hint("The server process ended, or the server went down; connect again."),
            )),
            Outcome::Told(error) => {
                lease.abandon();
                Some(End::Told(error))
            }
        }
    }

    fn give_back(&mut self, mut lease: Lease) {
        let clean = self.session.take_residue().is_none() && self.pinned.is_none();
        self.pin(None);
        self.client.params = lease.conn().params.clone();
        let check_in = if clean { CheckIn::Clean } else { CheckIn::Reset };
        lease.release(check_in, self.client.rules.server_reset_timeout, self.ready_at);
    }

    /// Makes the server's settings the client's, where they differ. Happens outside any transaction, before the
    /// client's first byte is sent.
    async fn carry_settings(&mut self, lease: &mut Lease) -> Result<(), End> {
        let conn = lease.conn();
        if let Some(script) = settle::script(conn, &self.client.params, &self.carried) {
            let statements = [script.as_str()];
            let work = conn.simple_queries(&statements);
            let failed = |detail: String| {
                let text = "could not restore the session's settings";
                End::Told(PgError::fatal(sqlstate::CONNECTION_FAILURE, text).detail(detail))
            };
            match tokio::time::timeout(self.client.rules.settle_timeout(), work).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(failed(format!("{error}."))),
                Err(_) => return Err(failed("The server did not answer in time.".to_owned())),
            }
        }
        conn.applied = self.carried.clone();
        self.client.params = conn.params.clone();
        Ok(())
    }

    /// Whether something may be left on the server connection that has to be found out before it can go back, or stay.
    fn must_settle(&self) -> bool {
        self.client.rules.pool_mode == PoolMode::Auto && self.session.has_residue() && !self.leaving
    }

    /// Finds out what the transaction has left behind, while the client already has its answer.
    async fn settle(&mut self, lease: &mut Lease) -> Result<(), PgError> {
        poll_fn(|cx| {
            // As much of it as it takes: whether it has gone is found out later.
            let _ = self.poll_send_down(cx);
            Poll::Ready(())
        })
        .await;
        let residue = self.session.take_residue();
        let conn = lease.conn();
        let failed = |detail: String| {
            let text = "lost track of the session's state";
            PgError::fatal(sqlstate::CONNECTION_FAILURE, text).detail(detail).hint("Connect again.")
        };
        let work = settle::settle(conn, &residue, &self.carried);
        let settled = tokio::time::timeout(self.client.rules.settle_timeout(), work).await;
        let settled = settled
            .map_err(|_| failed("The server did not say in time what the session holds.".to_owned()))?
            .map_err(|error| failed(format!("{error}.")))?;
        self.carried = self.pool.intern_carried(settled.carried);
        conn.applied = self.carried.clone();
        self.client.params = conn.params.clone();
        self.pin(settled.pinned);
        Ok(())
    }

    fn pin(&mut self, reason: Option<settle::Reason>) {
        let pinned = &self.worker.stats.clients_pinned;
        if let Some(old) = self.pinned {
            pinned[old].fetch_sub(1, Ordering::Relaxed);
        }
        if let Some(new) = reason {
            pinned[new].fetch_add(1, Ordering::Relaxed);
        }
        self.pinned = reason;
    }

    fn poll_exchange(&mut self, cx: &mut Context<'_>, lease: &mut Lease) -> Poll<Outcome> {
        loop {
            match self.client.signals.poll(cx) {
                Poll::Ready(Signal::Kill(reason)) => return Poll::Ready(Outcome::Told(reason)),
                Poll::Ready(Signal::Drain(reason)) if self.session.is_idle() && !self.up.in_frame() => {
                    return Poll::Ready(Outcome::Told(reason));
                }
                // A wait that was cancelled too late: the request is at the server now, and is left alone.
                Poll::Ready(Signal::CancelWait) => continue,
                _ => {}
            }
            let up = self.poll_up(cx, lease);
            if let Poll::Ready(Some(outcome)) = up {
                return Poll::Ready(outcome);
            }
            let down = self.poll_down(cx, lease);
            if let Poll::Ready(Some(outcome)) = down {
                return Poll::Ready(outcome);
            }
            if self.is_over() {
                return Poll::Ready(Outcome::Done);
            }
            if self.leaving && self.session.waits_for_client() {
                return Poll::Ready(Outcome::ClientGone);
            }
            if down.is_pending() && up.is_pending() {
                return if self.is_too_slow(cx) { Poll::Ready(self.too_slow()) } else { Poll::Pending };
            }
        }
    }

    /// Whether the server connection has done its work for this client.
    #[inline]
    fn is_over(&self) -> bool {
        let wanted = match self.client.rules.pool_mode {
            PoolMode::Transaction => true,
            PoolMode::Auto => self.pinned.is_none() || self.session.has_residue() || self.leaving,
            PoolMode::Session => self.leaving,
        };
        wanted && self.session.is_idle() && !self.up.has_output() && !self.up.mid_frame() && !self.down.in_frame()
    }

    /// Client to server. `Ready(None)`: something moved.
    fn poll_up(&mut self, cx: &mut Context<'_>, lease: &mut Lease) -> Poll<Option<Outcome>> {
        let mut moved = false;
        loop {
            if !self.up.has_output()
                && let Err(outcome) = self.scan_client(lease)
            {
                return Poll::Ready(Some(outcome));
            }
            if self.up.has_output() {
                let conn = lease.conn();
                match self.up.poll_send(cx, &mut conn.stream, &self.worker.buffers) {
                    Poll::Ready(Ok(())) => moved = true,
                    // The server may have said why before it closed: that is read first.
                    Poll::Ready(Err(_)) if !self.server_deaf => {
                        self.server_deaf = true;
                        return Poll::Ready(None);
                    }
                    _ => break,
                }
                self.worker.stats.server_out.fetch_add(self.up.take_sent(), Ordering::Relaxed);
                continue;
            }
            if self.leaving || self.is_over() && moved {
                break;
            }
            match self.up.poll_fill(cx, &mut self.client.stream, &self.worker.buffers) {
                Poll::Ready(Ok(0)) | Poll::Ready(Err(_)) => return Poll::Ready(Some(Outcome::ClientGone)),
                Poll::Ready(Ok(n)) => {
                    self.count_client_in(n);
                    moved = true;
                }
                Poll::Pending => break,
            }
        }
        if moved { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Decides about what the client has sent.
    fn scan_client(&mut self, lease: &mut Lease) -> Result<(), Outcome> {
        self.up.continue_frame();
        let (limit, max) = (self.worker.buffers.size(), self.client.rules.max_packet_size);
        let mut scratch = BytesMut::new();
        loop {
            let unseen = self.up.unseen();
            if self.leaving || unseen.is_empty() {
                return Ok(());
            }
            let header = frame::header(unseen).map_err(|e| Outcome::Told(invalid_length(e)))?;
            let Some(header) = header else { return Ok(()) };
            if header.tag == b'X' {
                self.leaving = true;
                return Ok(());
            }
            if unseen.len() < self.session.needs(header, unseen, limit, max).map_err(Outcome::Told)? {
                return Ok(());
            }
            if self.query_since.is_none() {
                let now = Instant::now();
                self.query_since = Some(now);
                self.transaction_since.get_or_insert(now);
            }
            let seen = unseen.len().min(header.total);
            let ward = Guard { worker: &self.worker, client: &self.client, observed: &self.observed };
            let mut link = Link { prepared: &mut lease.conn().prepared, registry: &self.pool.statements, ward: &ward };
            let verdict = self.session.on_client(header, &unseen[..seen], &mut link, &mut scratch);
            match verdict.map_err(Outcome::Told)? {
                Verdict::Forward => self.up.approve(header.total),
                Verdict::Swallow => self.up.swallow(header.total),
                Verdict::Replace => {
                    self.up.out(&self.worker.buffers).extend_from_slice(&scratch);
                    scratch.clear();
                    self.up.replace(seen, header.total - seen);
                }
                Verdict::Instead => {
                    self.up.out(&self.worker.buffers).extend_from_slice(&scratch);
                    scratch.clear();
                    self.up.swallow(header.total);
                }
            }
            if self.session.owes_answer() {
                self.session.flush_ours(self.down.out(&self.worker.buffers));
            }
        }
    }

    /// The server says that its connection is somebody else's now.
    fn stranger(&self, error: &ServerError) -> Outcome {
        let kind = match error {
            ServerError::Identity { name: "is_superuser", .. } => Kind::Superuser,
            _ => Kind::Identity,
        };
        self.worker.metrics.report(attempt(&self.client, kind, Action::Closed).what(error.to_string()));
        let message = "connection closed: the session's identity changed";
        Outcome::Told(PgError::fatal(sqlstate::INSUFFICIENT_PRIVILEGE, message))
    }

    /// Server to client. `Ready(None)`: something moved.
    fn poll_down(&mut self, cx: &mut Context<'_>, lease: &mut Lease) -> Poll<Option<Outcome>> {
        let mut moved = false;
        loop {
            if self.down.has_output() {
                match self.poll_send_down(cx) {
                    Poll::Ready(Ok(())) => moved = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(Some(Outcome::ClientGone)),
                    Poll::Pending => break,
                }
            }
            if moved && self.is_over() {
                break;
            }
            match self.down.poll_fill(cx, &mut lease.conn().stream, &self.worker.buffers) {
                Poll::Ready(Ok(0)) | Poll::Ready(Err(_)) => return Poll::Ready(Some(Outcome::ServerGone)),
                Poll::Ready(Ok(n)) => {
                    self.worker.stats.server_in.fetch_add(n as u64, Ordering::Relaxed);
                    moved = true;
                    if let Err(outcome) = self.scan_server(lease) {
                        return Poll::Ready(Some(outcome));
                    }
                    // The server connection is free: the client need not have read its answer for that.
                    if self.is_over() {
                        break;
                    }
                }
                Poll::Pending => break,
            }
        }
        if moved { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Decides about what the server has sent.
    fn scan_server(&mut self, lease: &mut Lease) -> Result<(), Outcome> {
        self.down.continue_frame();
        let mut scratch = BytesMut::new();
        loop {
            let unseen = self.down.unseen();
            let Some(header) = frame::header(unseen).map_err(|_| out_of_step(&"invalid message length"))? else {
                return Ok(());
            };
            if unseen.len() < Session::needs_of_server(header, self.worker.buffers.size()) {
                return Ok(());
            }
            let seen = unseen.len().min(header.total);
            let frame = &unseen[..seen];
            match header.tag {
                b'S' => {
                    let conn = lease.conn();
                    if let Err(error) = conn.note_parameter(&frame[HEADER..]) {
                        return Err(self.stranger(&error));
                    }
                    self.client.params = conn.params.clone();
                }
                b'E' => self.farewell |= note_error(&self.worker, &self.client, &self.observed, frame),
                _ => {}
            }
            let verdict = self.session.on_server(header, frame, &mut lease.conn().prepared, &mut scratch);
            match verdict.map_err(|desync| out_of_step(&desync))? {
                Verdict::Forward => self.down.approve(header.total),
                Verdict::Swallow => self.down.swallow(header.total),
                Verdict::Replace | Verdict::Instead => {
                    self.down.out(&self.worker.buffers).extend_from_slice(&scratch);
                    scratch.clear();
                    self.down.swallow(header.total);
                }
            }
            if self.session.owes_answer() {
                self.session.flush_ours(self.down.out(&self.worker.buffers));
            }
            if header.tag == b'Z' {
                self.account();
            }
        }
    }

    /// A ReadyForQuery has come: counts and times.
    #[inline]
    fn account(&mut self) {
        let now = Instant::now();
        let stats = &self.worker.stats;
        let queries = self.session.take_queries();
        if queries > 0 {
            stats.queries.fetch_add(u64::from(queries), Ordering::Relaxed);
            self.client.stats.count_queries(queries, self.worker.metrics.second(now.into_std()));
        }
        if let Some(since) = self.query_since.take() {
            stats.query_time.observe(now.duration_since(since));
        }
        if self.session.status() == b'I'
            && let Some(since) = self.transaction_since.take()
        {
            stats.transactions.fetch_add(1, Ordering::Relaxed);
            self.client.stats.transactions.fetch_add(1, Ordering::Relaxed);
            stats.transaction_time.observe(now.duration_since(since));
        }
        self.ready_at = now;
    }

    #[inline]
    fn poll_send_down(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let result = self.down.poll_send(cx, &mut self.client.stream, &self.worker.buffers);
        let sent = self.down.take_sent();
        self.worker.stats.client_out.fetch_add(sent, Ordering::Relaxed);
        self.client.stats.client_out.fetch_add(sent, Ordering::Relaxed);
        result
    }

    #[inline]
    fn count_client_in(&self, n: usize) {
        self.worker.stats.client_in.fetch_add(n as u64, Ordering::Relaxed);
        self.client.stats.client_in.fetch_add(n as u64, Ordering::Relaxed);
    }

    fn arm(&mut self, timeout: Duration) {
        self.alarm = (!timeout.is_zero()).then(|| Box::pin(tokio::time::sleep(timeout)));
    }

    fn alarm_rings(&mut self, cx: &mut Context<'_>) -> bool {
        self.alarm.as_mut().is_some_and(|alarm| alarm.as_mut().poll(cx).is_ready())
    }

    /// Whether a query, or the client in its transaction, has taken longer than it may. Arms no timer unless the
    /// configuration has such a limit.
    fn is_too_slow(&mut self, cx: &mut Context<'_>) -> bool {
        let rules = &self.client.rules;
        if rules.idle_transaction_timeout.is_zero() && rules.query_timeout.is_zero() {
            return false;
        }
        let waiting_for = if self.session.is_idle_in_transaction() {
            Waits::Client
        } else if self.session.is_idle() {
            Waits::Nobody
        } else {
            Waits::Server
        };
        if self.waits != waiting_for {
            self.waits = waiting_for;
            let timeout = match waiting_for {
                Waits::Client => rules.idle_transaction_timeout,
                Waits::Server => rules.query_timeout,
                Waits::Nobody => Duration::ZERO,
            };
            self.arm(timeout);
        }
        self.alarm_rings(cx)
    }

    fn too_slow(&self) -> Outcome {
        Outcome::Told(if self.session.is_idle_in_transaction() {
            PgError::fatal(sqlstate::IDLE_IN_TRANSACTION_TIMEOUT, "idle_transaction_timeout")
                .detail("The transaction was idle for longer than the proxy allows.")
        } else {
            PgError::fatal(sqlstate::QUERY_CANCELED, "query_timeout")
                .detail("The query took longer than the proxy allows.")
        })
    }

    /// Tells the client why its connection ends, if it still listens.
    async fn say_goodbye(&mut self, error: &PgError) {
        self.worker.metrics.count_error(&error.code, "proxy");
        let mut farewell = error.clone();
        farewell.severity = crate::error::Severity::Fatal;
        let buffers = &self.worker.buffers;
        if !self.down.mid_frame() {
            message::error_response(self.down.out(buffers), &farewell);
        }
        let goodbye = async {
            poll_fn(|cx| self.down.poll_send(cx, &mut self.client.stream, buffers)).await?;
            self.client.stream.shutdown().await
        };
        // It is going anyway.
        let _ = tokio::time::timeout(FAREWELL, goodbye).await;
    }
}

/// How long a client may take to read why its connection ends.
const FAREWELL: Duration = Duration::from_secs(2);

impl Drop for Relay {
    fn drop(&mut self) {
        self.pin(None);
    }
}

/// Whom an exchange waits for, as far as timeouts are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    Nobody,
    Client,
    Server,
}

/// Counts a client as waiting while it exists.
struct Waiting<'a>(&'a WorkerStats);

impl<'a> Waiting<'a> {
    fn new(stats: &'a WorkerStats) -> Self {
        stats.clients_waiting.fetch_add(1, Ordering::Relaxed);
        Self(stats)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.clients_waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

fn invalid_length(_: frame::InvalidLength) -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, "invalid message length")
}

fn gone(tenant: &str) -> PgError {
    PgError::fatal(sqlstate::ADMIN_SHUTDOWN, format!("tenant \"{tenant}\" is not available"))
        .detail("It was suspended or deleted while this connection was open.")
}

fn out_of_step(what: &dyn std::fmt::Display) -> Outcome {
    tracing::warn!(%what, "server connection closed: out of step");
    Outcome::Told(
        PgError::fatal(sqlstate::PROTOCOL_VIOLATION, "the conversation with the server is out of step")
            .detail(format!("{what}.")),
    )
}

/// An attempt of this client's.
fn attempt(client: &Client, kind: Kind, action: Action) -> Violation {
    Violation::new(kind, action, client.tenant.id.as_str(), &client.user, &client.from)
}

/// Whether the name is that of a tenant, and not of the client's own.
fn is_other_tenant(worker: &Worker, client: &Client, name: &str) -> bool {
    name != client.tenant.id.as_str()
        && worker.directory.may_have(name.as_bytes())
        && worker.directory.find(name).is_some()
}

/// Looks after what a client says, see [`guard`].
struct Guard<'a> {
    worker: &'a Worker,
    client: &'a Client,
    observed: &'a Cell<bool>,
}

impl Ward for Guard<'_> {
    fn looks(&self) -> bool {
        self.observed.set(false);
        self.client.rules.guard != GuardMode::Off
    }

    fn lex(&self) -> Lex {
        let params = &self.client.params;
        Lex::new(params.get("standard_conforming_strings"), params.get("client_encoding"))
    }

    fn may_be_tenant(&self, name: &[u8]) -> bool {
        self.worker.directory.may_have(name) && name != self.client.tenant.id.as_str().as_bytes()
    }

    fn judge(&self, text: &[u8], lex: Lex) -> Option<PgError> {
        let (tenant, role) = (&self.client.tenant, self.client.tenant.role());
        let is_tenant = |name: &str| name != role && is_other_tenant(self.worker, self.client, name);
        let seat = Seat { role, neighbours: Neighbours::of(tenant.plan), is_tenant: &is_tenant };
        let refusal = guard::judge(text, lex, &seat)?;
        let refused = self.client.rules.guard == GuardMode::Enforce;
        let action = if refused { Action::Refused } else { Action::Observed };
        let attempt = attempt(self.client, Kind::Guard, action).what(refusal.what());
        self.worker.metrics.report(attempt.statement(guard::fingerprint(text, lex)));
        self.observed.set(!refused);
        refused.then(|| refusal.error())
    }

    fn function_call_refused(&self) {
        let attempt = attempt(self.client, Kind::FunctionCall, Action::Refused);
        self.worker.metrics.report(attempt.what("FunctionCall message"));
    }
}

/// Counts a server's error; `true` if it is the server's farewell. What is denied because it belongs to another tenant
/// is an attempt to cross, blocked by the wall.
fn note_error(worker: &Worker, client: &Client, observed: &Cell<bool>, frame: &[u8]) -> bool {
    let error = server_error(&frame[HEADER..]);
    worker.metrics.count_error(&error.code, "server");
    client.stats.errors.fetch_add(1, Ordering::Relaxed);
    let neighbours = Neighbours::of(client.tenant.plan);
    if neighbours != Neighbours::None
        && !observed.get()
        && violation::is_denial(&error, neighbours == Neighbours::Rows, |name| is_other_tenant(worker, client, name))
    {
        // The message is the server's about names, without values.
        worker.metrics.report(attempt(client, Kind::PermissionDenied, Action::Blocked).what(error.message));
    }
    error.severity == crate::error::Severity::Fatal
}
