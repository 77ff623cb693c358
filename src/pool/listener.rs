//! `pool_mode = "auto"`: one server connection that listens for all of a tenant's clients.
//!
//! A client's `LISTEN` runs on the connection that it has borrowed, where it means what it always means. What that
//! connection listens to afterwards is taken over here, before the client has its answer; then the connection goes back.
//!
//! The listener's connection is one of the tenant's pool, or is opened where its clients would have none beside it and the
//! shard has room. It does not count for `default_pool_size`: clients that have all of that may wait for one another. It is
//! opened when the first client listens and goes back when nobody does; after a loss it is opened again with its channels.
//! Notifications that were sent in between are lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use ahash::HashMap;
use bytes::{Buf as _, Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::connect::ServerConnection;
use super::faces::Heard;
use super::{DATABASE, Lease, Pool, Settings};
use crate::client::signals::{Letter, Signals};
use crate::error::{PgError, sqlstate};
use crate::metrics::Notified;
use crate::tenant::sql::{Literal, Name};
use crate::wire::frame::{self, HEADER};
use crate::wire::message;

/// Names of channels.
pub type Channels = BTreeSet<Box<str>>;

/// How long a client that listens waits for the tenant's listener to have a connection; then it keeps its own.
const WAIT: Duration = Duration::from_secs(1);

/// How long the listener waits for a connection, and who holds none for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long the server may take to answer the listener.
const ANSWER: Duration = Duration::from_secs(10);

/// Between two attempts to connect again; grows up to [`MAX_PAUSE`].
const PAUSE: Duration = Duration::from_millis(100);

/// See [`PAUSE`].
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// A tenant's listeners; there is one as long as its clients use one database and one encoding.
#[derive(Default)]
pub(super) struct Listeners(Mutex<Vec<Arc<Listener>>>);

impl Listeners {
    /// The clients' tenant lives elsewhere, or nowhere: they are told to go when their transactions are over.
    pub(super) fn retire(&self) {
        for listener in std::mem::take(&mut *self.0.lock()) {
            listener.retire();
        }
    }
}

/// What a listener's connection must have in common with those of its clients.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    /// The database, where clients choose it.
    settings: Arc<Settings>,
    /// `client_encoding`, which names and payloads come in.
    encoding: Box<str>,
}

/// Listens for clients.
pub struct Listener {
    place: Place,
    state: Mutex<State>,
    /// There is something to do.
    wake: Notify,
}

#[derive(Default)]
struct State {
    clients: HashMap<u64, Client>,
    /// Clients by channel.
    channels: BTreeMap<Box<str>, Vec<Member>>,
    /// How often the server was asked, the last time that it answered, and the one that somebody waits for.
    asked: u64,
    answered: u64,
    awaited: u64,
    /// Told when the server has carried out what was wanted at this moment, and all notifications sent before it have
    /// been delivered.
    errands: Vec<oneshot::Sender<bool>>,
    /// Its task has ended, or is about to.
    ended: bool,
}

struct Client {
    signals: Arc<Signals>,
    channels: Channels,
}

/// A client of a channel.
struct Member {
    client: u64,
    /// It gets what is sent after the server has answered for this time: what was sent before is not for it.
    from: u64,
}

/// What a client listens to. Dropping it ends that.
pub struct Subscription {
    listener: Arc<Listener>,
    client: u64,
    channels: Channels,
}

impl Pool {
    /// Listens for a client, until the subscription is dropped. When this returns every notification that is sent from
    /// now on reaches the client. `None` if there is no connection for it.
    pub async fn listen(
        self: &Arc<Self>,
        client: u64,
        signals: &Arc<Signals>,
        (settings, encoding): (&Settings, &str),
        channels: Channels,
    ) -> Option<Subscription> {
        self.subscribe(client, signals, (settings, encoding), channels, WAIT).await
    }

    /// Before a client that is going to listen has a connection: lets the tenant's listener have one, and keep it for a while,
    /// until the client has its own, too. If many begin together, each holding a connection of its own, there is none left for
    /// it. For a while only: where there is one for the listener and none for the client, nobody would get any further. Not
    /// where the last one is free: the client can listen on that, and the listener could do nothing for it. Who waits holds
    /// nothing, at most as long as it may wait for a connection (zero: for ever). Cancel safe.
    pub async fn listener_first(
        self: &Arc<Self>,
        client: u64,
        signals: &Arc<Signals>,
        place: (&Settings, &str),
        query_wait_timeout: Duration,
    ) {
        let size = self.limits.default_pool_size;
        let (free, apart) = {
            let state = self.state.lock();
            (state.free(size), state.may_be_apart(size))
        };
        if (size < 2 || free == 1) && !(apart && self.budget.has_room()) {
            return;
        }
        let patience = if query_wait_timeout.is_zero() { PATIENCE } else { query_wait_timeout.min(PATIENCE) };
        // Under a number that no client has.
        if let Some(kept) = self.subscribe(!client, signals, place, Channels::new(), patience).await {
            self.worker.spawn(async move {
                tokio::time::sleep(WAIT).await;
                drop(kept);
            });
        }
    }

    async fn subscribe(
        self: &Arc<Self>,
        client: u64,
        signals: &Arc<Signals>,
        (settings, encoding): (&Settings, &str),
        channels: Channels,
        patience: Duration,
    ) -> Option<Subscription> {
        let settings = settings.iter().filter(|(name, _)| name == DATABASE).cloned().collect();
        let listener = self.listener(&Place { settings: Arc::new(settings), encoding: encoding.into() });
        listener.put(client, signals, &channels);
        let subscription = Subscription { listener, client, channels };
        subscription.sync(patience).await.then_some(subscription)
    }

    fn listener(self: &Arc<Self>, place: &Place) -> Arc<Listener> {
        let mut listeners = self.listeners.0.lock();
        listeners.retain(|listener| !listener.state.lock().ended);
        if let Some(listener) = listeners.iter().find(|listener| listener.place == *place) {
            return listener.clone();
        }
        let listener = Arc::new(Listener { place: place.clone(), state: Mutex::default(), wake: Notify::new() });
        listeners.push(listener.clone());
        self.worker.spawn(listener.clone().run(self.clone()));
        listener
    }
}

impl Subscription {
    /// The channels.
    pub fn channels(&self) -> &Channels {
        &self.channels
    }

    /// Changes the channels. `false` if there is no connection now: nothing has changed then.
    pub async fn change(&mut self, signals: &Arc<Signals>, channels: Channels) -> bool {
        self.listener.put(self.client, signals, &channels);
        let done = self.sync(WAIT).await;
        if done {
            self.channels = channels;
        } else {
            self.listener.put(self.client, signals, &self.channels);
            self.listener.wake.notify_one();
        }
        done
    }

    /// Waits until every notification sent before has been delivered. `false` if that cannot be said.
    pub async fn sync(&self, patience: Duration) -> bool {
        let (done, answer) = oneshot::channel();
        {
            let mut state = self.listener.state.lock();
            if state.ended {
                return false;
            }
            state.errands.push(done);
        }
        self.listener.wake.notify_one();
        tokio::time::timeout(patience, answer).await.is_ok_and(|answer| answer.unwrap_or(false))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.listener.state.lock().remove(self.client);
        self.listener.wake.notify_one();
    }
}

impl State {
    fn remove(&mut self, number: u64) -> Option<Client> {
        let client = self.clients.remove(&number)?;
        for channel in &client.channels {
            if let Some(clients) = self.channels.get_mut(channel) {
                clients.retain(|member| member.client != number);
                if clients.is_empty() {
                    self.channels.remove(channel);
                }
            }
        }
        Some(client)
    }

    /// Since when a client is on a channel.
    fn since(&self, number: u64, channel: &str) -> Option<u64> {
        self.channels.get(channel)?.iter().find(|member| member.client == number).map(|member| member.from)
    }

    fn wanted(&self) -> Channels {
        self.channels.keys().cloned().collect()
    }

    fn fail_errands(&mut self) {
        tell(std::mem::take(&mut self.errands), false);
    }
}

fn tell(errands: Vec<oneshot::Sender<bool>>, done: bool) {
    for errand in errands {
        // Whoever waited may have given up.
        let _ = errand.send(done);
    }
}

/// How a connection of the listener's ended.
enum Ended {
    /// Nobody listens any more: it is as good as new, once it is reset.
    Unused,
    Lost,
}

/// A connection that listens.
struct Ear<'a> {
    pool: &'a Arc<Pool>,
    lease: Lease,
    buf: BytesMut,
    listening: Channels,
    /// Whether all that had arrived was read, and since when what is being read may have been waiting.
    dry: bool,
    since: Instant,
    _counted: Counted,
}

/// One connection that listens, as long as it lives.
struct Counted(Arc<Notified>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.listeners.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Listener {
    fn put(&self, number: u64, signals: &Arc<Signals>, channels: &Channels) {
        let mut state = self.state.lock();
        let next = state.asked + 1;
        let since: Vec<u64> = channels.iter().map(|channel| state.since(number, channel).unwrap_or(next)).collect();
        state.remove(number);
        for (channel, from) in channels.iter().zip(since) {
            state.awaited = state.awaited.max(from);
            state.channels.entry(channel.clone()).or_default().push(Member { client: number, from });
        }
        state.clients.insert(number, Client { signals: signals.clone(), channels: channels.clone() });
    }

    fn retire(&self) {
        let mut state = self.state.lock();
        state.ended = true;
        state.fail_errands();
        // Who has no channels does not listen yet, and goes where the tenant is.
        for client in state.clients.values().filter(|client| !client.channels.is_empty()) {
            let error =
                PgError::fatal(sqlstate::ADMIN_SHUTDOWN, "terminating connection: the tenant's home has changed")
                    .detail("The connection was listening for notifications.");
            client.signals.drain(error.hint("Connect again."));
        }
        drop(state);
        self.wake.notify_one();
    }

    async fn run(self: Arc<Self>, pool: Arc<Pool>) {
        let mut pause = PAUSE;
        loop {
            match self.connect(&pool).await {
                Ok(mut ear) => {
                    pause = PAUSE;
                    let ended = ear.attend(&self).await;
                    if matches!(ended, Ended::Unused) && self.may_end() {
                        ear.give_back();
                        return;
                    }
                    tracing::debug!(tenant = %pool.tenant().id, "the listener's connection was lost");
                    self.state.lock().fail_errands();
                }
                Err(error) => {
                    tracing::debug!(tenant = %pool.tenant().id, error, "no connection for the listener");
                    // Those that have just come are told; those that were there hope.
                    self.state.lock().fail_errands();
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
            if self.may_end() {
                return;
            }
        }
    }

    /// Whether nobody needs it; then nobody comes any more either.
    fn may_end(&self) -> bool {
        let mut state = self.state.lock();
        state.ended |= state.clients.is_empty() && state.errands.is_empty();
        state.ended
    }

    async fn connect<'a>(&self, pool: &'a Arc<Pool>) -> Result<Ear<'a>, String> {
        let name = Arc::from("pgusher listener");
        let mut lease = match pool.checkout_apart(&self.place.settings, &name).await {
            Some(lease) => lease,
            None => {
                let lease = pool.checkout(&self.place.settings, &name, PATIENCE).await;
                let mut lease = lease.map_err(|error| format!("{error:?}"))?;
                pool.set_apart(&mut lease);
                lease
            }
        };
        let conn = lease.conn();
        // It may have been used: and what it inherits of its role's settings must not close it.
        let set = format!(
            "SELECT pg_catalog.set_config('client_encoding', {}, false), \
               pg_catalog.set_config('idle_session_timeout', '0', false), \
               pg_catalog.set_config('statement_timeout', '0', false), \
               pg_catalog.set_config('application_name', 'pgusher listener', false)",
            Literal(&self.place.encoding)
        );
        let ready = ["RESET ALL", "DISCARD ALL", set.as_str()];
        let done = tokio::time::timeout(ANSWER, conn.simple_queries(&ready)).await;
        done.map_err(|_| "no answer".to_owned())?.map_err(|error| error.to_string())?;
        conn.prepared.clear();
        conn.prepared.forget_sequences();
        pool.faces().notified.listeners.fetch_add(1, Ordering::Relaxed);
        Ok(Ear {
            pool,
            lease,
            _counted: Counted(pool.faces().notified.clone()),
            buf: BytesMut::new(),
            listening: Channels::new(),
            dry: true,
            since: Instant::now(),
        })
    }

    fn deliver(&self, channel: &str, letter: &Letter) {
        let state = self.state.lock();
        for member in state.channels.get(channel).into_iter().flatten().filter(|member| member.from <= state.answered) {
            if let Some(client) = state.clients.get(&member.client) {
                client.signals.deliver(letter.clone());
            }
        }
    }
}

impl Ear<'_> {
    /// Serves the clients until nobody listens or the connection is lost.
    async fn attend(&mut self, listener: &Listener) -> Ended {
        loop {
            let (wanted, errands, asked) = {
                let mut state = listener.state.lock();
                if state.ended || (state.clients.is_empty() && state.errands.is_empty()) {
                    return Ended::Unused;
                }
                let wanted = state.wanted();
                let asks = wanted != self.listening || !state.errands.is_empty() || state.awaited > state.answered;
                state.asked += u64::from(asks);
                (wanted, std::mem::take(&mut state.errands), asks.then_some(state.asked))
            };
            if let Some(asked) = asked {
                let answer = tokio::time::timeout(ANSWER, self.ask(listener, wanted)).await;
                let done = matches!(answer, Ok(Some(true)));
                if done {
                    listener.state.lock().answered = asked;
                }
                tell(errands, done);
                if !done {
                    return Ended::Lost;
                }
                continue;
            }
            tokio::select! {
                () = listener.wake.notified() => {}
                more = self.fill() => if more.is_none() || self.take(listener).await.is_none() {
                    return Ended::Lost;
                }
            }
        }
    }

    /// Has the server listen to what is wanted, which it answers behind all notifications that were sent before.
    /// `Some(false)` if it refused, `None` if the connection is lost.
    async fn ask(&mut self, listener: &Listener, wanted: Channels) -> Option<bool> {
        let mut sql = String::new();
        for channel in wanted.difference(&self.listening) {
            // Writing to a String cannot fail.
            let _ = write!(sql, "LISTEN {};", Name(channel));
        }
        for channel in self.listening.difference(&wanted) {
            let _ = write!(sql, "UNLISTEN {};", Name(channel));
        }
        self.listening = wanted;
        let mut out = BytesMut::new();
        message::query(&mut out, &sql);
        self.lease.conn().stream.send_all(&out).await.ok()?;
        loop {
            self.fill().await?;
            if let Some(done) = self.take(listener).await? {
                return Some(done);
            }
        }
    }

    /// Reads what has arrived. Cancel safe. `None`: the connection is lost.
    async fn fill(&mut self) -> Option<()> {
        let Self { lease, buf, dry, since, .. } = self;
        let conn = lease.conn();
        let mut chunk = [0; 4096];
        let read = std::future::poll_fn(|cx| {
            let read = conn.stream.poll_fill(cx, &mut chunk);
            if let (Poll::Ready(_), true) = (&read, *dry) {
                *since = Instant::now();
            }
            *dry = read.is_pending();
            read
        });
        let n = read.await.ok().filter(|n| *n > 0)?;
        buf.extend_from_slice(&chunk[..n]);
        Some(())
    }

    /// Takes in what has been read. `Some(Some(whether it went well))` at a ReadyForQuery, `None` if the server is out of
    /// step or says goodbye.
    async fn take(&mut self, listener: &Listener) -> Option<Option<bool>> {
        let mut ready = None;
        while let Some(header) = frame::header(&self.buf).ok()? {
            if header.total > MAX_MESSAGE {
                return None;
            }
            if self.buf.len() < header.total {
                break;
            }
            let mut body = self.buf.split_to(header.total).freeze();
            body.advance(HEADER);
            match header.tag {
                b'A' => self.hear(listener, &body).await?,
                b'S' => self.lease.conn().note_parameter(&body).ok()?,
                b'E' => ready = Some(false),
                b'Z' => ready = Some(ready != Some(false)),
                _ => {}
            }
            if header.tag == b'Z' {
                return Some(ready);
            }
        }
        Some(None)
    }

    /// A notification has come.
    async fn hear(&self, listener: &Listener, body: &Bytes) -> Option<()> {
        let (pid, channel, text) = message::read_notification(body).ok()?;
        let channel = std::str::from_utf8(channel).ok()?;
        let (tenant, faces) = (self.pool.tenant(), self.pool.faces());
        let waited = self.since.elapsed();
        let told = match faces.judge(tenant, pid, waited) {
            Heard::Pass(pid) => pid,
            Heard::Ask if faces.is_own(tenant, pid, waited).await => pid,
            Heard::Ask | Heard::Foreign => return Some(()),
        };
        listener.deliver(channel, &Letter { from: pid, pid: Some(told), text: body.slice_ref(text) });
        Some(())
    }

    fn give_back(mut self) {
        let conn: &mut ServerConnection = self.lease.conn();
        conn.heard.clear();
        self.lease.release(super::lease::CheckIn::Reset, ANSWER, Instant::now());
    }
}

/// Longer than any notification (8,000 bytes), notice or error.
const MAX_MESSAGE: usize = 1 << 20;
