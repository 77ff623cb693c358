//! Notifications on their way to the client: those of its own server connection, and in `pool_mode = "auto"` those of
//! the tenant's [listener](crate::pool::listener).
//!
//! Like PostgreSQL, the client gets them outside transactions only: just before a ReadyForQuery, or while it is idle.
//! A client that listens gets its ReadyForQuery when all notifications that were sent before have been delivered, its
//! own among them.

use std::fmt::Write as _;
use std::pin::pin;

use super::*;
use crate::client::signals::Letter;
use crate::pool::connect::ServerConnection;
use crate::pool::faces::Heard;
use crate::pool::listener::{Channels, Subscription};
use crate::tenant::sql::Name;

/// What a client listens to, while it has no server connection of its own for that.
pub(super) struct Ears {
    subscription: Subscription,
    /// The server connection that it has now listens as well: what the client says means what it means anywhere.
    doubled: bool,
}

impl Ears {
    fn has(&self, channel: &[u8]) -> bool {
        is_among(self.subscription.channels(), channel)
    }
}

/// A connection used by somebody else so recently may not be recognized as the client's yet.
const RECENT: Duration = Duration::from_secs(1);

impl Relay {
    /// Decides about a notification that the client's own server connection got, given its body. What is to be sent is
    /// appended to `out`.
    pub(super) fn hear(&self, conn: &ServerConnection, body: &[u8], out: &mut BytesMut) -> Result<(), Outcome> {
        let (pid, channel, text) =
            message::read_notification(body).map_err(|_| out_of_step(&"malformed notification"))?;
        if self.ears.as_ref().is_some_and(|ears| ears.has(channel)) {
            // The listener has got it, too.
            return Ok(());
        }
        let waited = self.waited();
        let letter = |told| Letter { from: pid, pid: told, text: text.to_vec().into() };
        let (tenant, faces, signals) = (&self.client.tenant, conn.faces(), &self.client.signals);
        match faces.judge(tenant, pid, waited) {
            Heard::Pass(pid) if signals.is_mailbox_empty() => {
                message::notification_response(out, pid.cast_signed(), text);
                self.worker.metrics.notified.delivered.fetch_add(1, Ordering::Relaxed);
            }
            Heard::Pass(pid) => drop(signals.deliver(letter(Some(pid)))),
            Heard::Foreign => {}
            Heard::Ask => {
                let number = signals.deliver(letter(None));
                let (tenant, faces, signals) = (tenant.clone(), faces.clone(), signals.clone());
                tokio::spawn(async move {
                    let own = faces.is_own(&tenant, pid, waited).await;
                    signals.vouch(number, own.then_some(pid));
                });
            }
        }
        Ok(())
    }

    /// For how long a notification may have been waiting to be read.
    fn waited(&self) -> Duration {
        let began = self.transaction_since.into_iter().chain(self.stalled_since).min();
        began.map_or(Duration::ZERO, |began| began.elapsed())
    }

    /// Puts the notifications that wait for the client into its stream; the caller knows that it is their turn.
    pub(super) fn take_mail(&mut self) {
        if self.client.signals.has_mail() {
            let out = self.down.out(&self.worker.buffers);
            let taken = self.client.signals.take_mail(out);
            self.worker.metrics.notified.delivered.fetch_add(taken, Ordering::Relaxed);
        }
    }

    /// Whether notifications may go to a client that keeps its server connection.
    pub(super) fn may_take_mail(&self) -> bool {
        self.client.signals.has_mail() && self.session.is_idle() && !self.down.has_output() && !self.down.in_frame()
    }

    /// Whether the client gets its ReadyForQuery only when what it listens to is settled, or what logins begin with.
    #[inline]
    pub(super) fn holds_ready(&self) -> bool {
        (self.ears.is_some() || self.session.may_listen() || self.session.changes_logins())
            && self.client.rules.pool_mode == PoolMode::Auto
    }

    /// Whether the client's next message has to wait for the answer to the last one, because only the last
    /// ReadyForQuery of several can be held back.
    pub(super) fn must_wait(&self) -> bool {
        let copies = matches!(self.up.unseen().first(), None | Some(b'd' | b'c' | b'f' | b'X'));
        !copies && self.session.owes_ready_to_client()
    }

    /// Before a client that listens uses a server connection: lets that listen, too, if what the client says could
    /// depend on it. Happens outside any transaction.
    pub(super) async fn double(&mut self, lease: &mut Lease) -> Result<(), Lent> {
        let plain = self.is_plain();
        let Some(ears) = &mut self.ears else { return Ok(()) };
        let conn = lease.conn();
        if conn.face().client() != self.client.key.pid && conn.last_used.elapsed() < RECENT {
            // What the one before has sent must not look like the client's own.
            ears.subscription.sync(self.client.rules.settle_timeout()).await;
        }
        ears.doubled = !plain;
        if plain {
            return Ok(());
        }
        let listen = listen(ears.subscription.channels());
        let done = tokio::time::timeout(self.client.rules.settle_timeout(), conn.simple_queries(&[&listen])).await;
        conn.heard.clear();
        match done {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) if error.is_the_end() => Err(Lent::Dead),
            _ => Err(Lent::Unfit(PgError::fatal(
                sqlstate::CONNECTION_FAILURE,
                "could not restore what the session listens to",
            ))),
        }
    }

    /// Whether the request at hand is a `LISTEN`, of a client that does not listen yet.
    #[inline]
    pub(super) fn begins_to_listen(&self) -> bool {
        if self.ears.is_some() || self.client.rules.pool_mode != PoolMode::Auto {
            return false;
        }
        let unseen = self.up.unseen();
        let Ok(Some(header)) = frame::header(unseen) else { return false };
        let body = &unseen[HEADER..unseen.len().min(header.total)];
        let text = match header.tag {
            b'Q' => Some(body),
            b'P' => frame::cstr(body).map(|(_, rest)| rest),
            _ => None,
        };
        // One look at the first letter for all others.
        let may = |text: &[u8]| !text.first().is_some_and(|b| b.is_ascii_alphabetic() && b | 0x20 != b'l');
        text.is_some_and(|text| may(text) && scan::begins_with(until_nul(text), b"listen"))
    }

    /// See [`Pool::listener_first`]. `Ok(false)`: the request was answered with an error and the client goes on.
    pub(super) async fn listener_first(&mut self) -> Result<bool, End> {
        let client = &self.client;
        let place = (&*client.settings, client.params.get("client_encoding").unwrap_or("UTF8"));
        let patience = client.rules.query_wait_timeout;
        let found = {
            let mut work = pin!(self.pool.listener_first(client.id, &client.signals, place, patience));
            poll_fn(|cx| match client.signals.poll(cx) {
                Poll::Ready(signal) => Poll::Ready(Err(signal)),
                Poll::Pending => work.as_mut().poll(cx).map(Ok),
            })
            .await
        };
        match found {
            Ok(()) => Ok(true),
            Err(signal) => self.stop_waiting(signal).await.map(|()| false),
        }
    }

    /// Whether the request at hand is of statements that end their own transaction and cannot know about channels: all
    /// of its group, which usually arrives at once.
    fn is_plain(&self) -> bool {
        let is_plain = |text: &[u8]| !scan::leaves_state(text) && !scan::may_begin(text);
        let (mut rest, mut parsed) = (self.up.unseen(), Vec::new());
        while let Ok(Some(header)) = frame::header(rest) {
            let Some(body) = rest.get(HEADER..header.total) else { return false };
            rest = &rest[header.total..];
            match header.tag {
                b'Q' => return is_plain(until_nul(body)),
                b'P' => {
                    let name = until_nul(body);
                    let text = body.get(name.len() + 1..).unwrap_or_default();
                    if !is_plain(until_nul(text)) {
                        return false;
                    }
                    parsed.push(name);
                }
                b'B' => {
                    let portal = until_nul(body);
                    let name = until_nul(body.get(portal.len() + 1..).unwrap_or_default());
                    if !parsed.contains(&name) && !self.session.text_of(name).is_some_and(is_plain) {
                        return false;
                    }
                    parsed.push(name);
                }
                b'D' | b'E' | b'C' | b'H' if !parsed.is_empty() => {}
                b'S' => return !parsed.is_empty(),
                _ => return false,
            }
        }
        // What has not come yet may be anything.
        false
    }

    /// After a transaction: brings what the client listens to in line with what its server connection does. `listed` is
    /// what the server says, if it was asked; `held` whether the client waits for its ReadyForQuery. Returns why the client
    /// has to keep its server connection.
    pub(super) async fn settle_ears(
        &mut self,
        conn: &mut ServerConnection,
        listed: Option<Channels>,
        pinned: Option<settle::Reason>,
        held: bool,
    ) -> Result<Option<settle::Reason>, ServerError> {
        let listens = listed.as_ref().is_some_and(|listed| !listed.is_empty());
        if self.ears.is_none() && !listens {
            return Ok(pinned);
        }
        let stays = self.pinned == Some(settle::LISTEN);
        if self.ears.is_none() && (stays || !held) {
            // The client has seen the end of the transaction in which it began: there is no moment to take it over in.
            return Ok(pinned.or(Some(settle::LISTEN)));
        }
        let changed = match (listed, &self.ears) {
            (Some(listed), Some(ears)) if !ears.doubled => {
                // A group of messages that did not look like this one.
                (!listed.is_subset(ears.subscription.channels()))
                    .then(|| listed.union(ears.subscription.channels()).cloned().collect())
            }
            (Some(listed), Some(ears)) => (listed != *ears.subscription.channels()).then_some(listed),
            (listed, None) => listed,
            (None, Some(_)) => None,
        };
        let doubled = self.ears.as_ref().is_none_or(|ears| ears.doubled) || listens;
        let fresh: Channels = match (&changed, &self.ears) {
            (Some(channels), Some(ears)) => channels.difference(ears.subscription.channels()).cloned().collect(),
            (channels, _) => channels.clone().unwrap_or_default(),
        };
        match changed {
            Some(channels) if !self.subscribe(channels.clone()).await => {
                // No connection for the listener: the client's own does it.
                self.ears = None;
                conn.simple_queries(&[&listen(&channels)]).await?;
                return Ok(pinned.or(Some(settle::LISTEN)));
            }
            Some(_) => {}
            None => {
                if let Some(ears) = &self.ears {
                    ears.subscription.sync(self.client.rules.settle_timeout()).await;
                }
            }
        }
        if let Some(ears) = &mut self.ears {
            ears.doubled = pinned.is_some();
            if pinned.is_some() && !doubled {
                conn.simple_queries(&[&listen(ears.subscription.channels())]).await?;
            }
        }
        if pinned.is_none() && doubled {
            conn.simple_queries(&["UNLISTEN *"]).await?;
        }
        if !fresh.is_empty() && doubled {
            if pinned.is_some() {
                // Behind the answer is all that it has heard so far.
                conn.simple_queries(&[""]).await?;
            }
            if let Some(ears) = &self.ears {
                // What the connection has heard the listener has then, too, as far as it was there to hear it.
                ears.subscription.sync(self.client.rules.settle_timeout()).await;
            }
            let (waited, tenant) = (self.waited(), self.client.tenant.clone());
            let earlier = take_heard(conn, &fresh, &tenant, waited).await;
            self.client.signals.deliver_before(earlier, |channel| is_among(&fresh, channel));
        }
        Ok(pinned)
    }

    /// Makes the channels those that the tenant's listener knows for the client.
    async fn subscribe(&mut self, channels: Channels) -> bool {
        let signals = &self.client.signals;
        if channels.is_empty() {
            self.ears = None;
            return true;
        }
        let encoding = self.client.params.get("client_encoding").unwrap_or("UTF8");
        if encoding != "UTF8" && channels.iter().any(|channel| !channel.is_ascii()) {
            return false;
        }
        if let Some(ears) = &mut self.ears {
            return ears.subscription.change(signals, channels).await;
        }
        let place = (&*self.client.settings, encoding);
        let subscription = self.pool.listen(self.client.id, signals, place, channels).await;
        self.ears = subscription.map(|subscription| Box::new(Ears { subscription, doubled: true }));
        self.ears.is_some()
    }

    /// Whether the server connection listens although its client does not keep it.
    pub(super) fn is_doubled(&self) -> bool {
        self.ears.as_ref().is_some_and(|ears| ears.doubled)
    }
}

/// A text that listens to all of them.
fn listen(channels: &Channels) -> String {
    let mut sql = String::new();
    for channel in channels {
        // Writing to a String cannot fail.
        let _ = write!(sql, "LISTEN {};", Name(channel));
    }
    sql
}

/// Takes what the client's own connection has heard on these channels, which the listener has now: what was sent between
/// the `LISTEN` and then nobody else has heard.
async fn take_heard(conn: &mut ServerConnection, fresh: &Channels, tenant: &Tenant, waited: Duration) -> Vec<Letter> {
    let faces = conn.faces().clone();
    let (mut letters, mut others) = (Vec::new(), Vec::new());
    for body in std::mem::take(&mut conn.heard) {
        let read = message::read_notification(&body).ok();
        let Some((from, _, text)) = read.filter(|(_, channel, _)| is_among(fresh, channel)) else {
            others.push(body);
            continue;
        };
        let told = match faces.judge(tenant, from, waited) {
            Heard::Pass(pid) => pid,
            Heard::Ask if faces.is_own(tenant, from, waited).await => from,
            Heard::Ask | Heard::Foreign => continue,
        };
        letters.push(Letter { from, pid: Some(told), text: text.to_vec().into() });
    }
    conn.heard = others;
    letters
}

fn is_among(channels: &Channels, channel: &[u8]) -> bool {
    std::str::from_utf8(channel).is_ok_and(|channel| channels.contains(channel))
}
