//! What happens while a client holds a server connection: frames both ways, until the transaction is over.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BytesMut;
use tokio::task::coop::unconstrained;
use tokio::time::Instant;

use crate::pool::connect::ServerConnection;
use crate::pool::defaults::Before;
use crate::pool::scope;

use super::watch::{Guard, Refused, attempt};
use super::*;
use crate::metrics::{self, PIN_REASONS};

/// See [`Session::is_in_doubt`].
fn copy_in_doubt() -> PgError {
    PgError::fatal(sqlstate::PROTOCOL_VIOLATION, "COPY failed with a Sync message among its data")
        .detail("A server that still reads the data ignores the Sync, and one that has failed answers it: which of the two happened cannot be told.")
        .hint("Send Sync after CopyDone or CopyFail.")
}

/// Longer than a cancel request may take.
const CANCEL_PATIENCE: Duration = Duration::from_secs(6);

/// See [`Relay::adopt_params`].
#[inline]
fn adopted(client: &Client, pool: &Pool, reported: &Arc<Params>) -> Arc<Params> {
    const NAME: &str = "application_name";
    let own = &client.application_name;
    if !own.is_empty() && client.params.get(NAME) == Some(own) && reported.get(NAME) == Some("") {
        return pool.intern_with(reported, NAME, own);
    }
    reported.clone()
}

/// Whether the time is over, also for a task that has used up its turn: one that always does would never be told.
fn rings(alarm: Pin<&mut Sleep>, cx: &mut Context<'_>) -> bool {
    Pin::new(&mut unconstrained(alarm)).poll(cx).is_ready()
}

impl Relay {
    /// Uses the server connection until the transaction, or the session, is over.
    pub(super) async fn lend(&mut self, mut lease: Lease) -> Lent {
        let conn = lease.conn();
        let same = Arc::ptr_eq(&conn.params, &self.client.params) && Arc::ptr_eq(&conn.applied, &self.carried);
        if !(same && conn.generation == self.generation)
            && let Err(why) = Box::pin(self.carry_settings(&mut lease)).await
        {
            return why;
        }
        if self.ears.is_some()
            && let Err(why) = Box::pin(self.double(&mut lease)).await
        {
            return why;
        }
        self.rescope();
        lease.conn().face().lend(self.client.key.pid);
        self.client.key.entry.bind(lease.conn().cancel_target());
        metrics::shift(&self.worker.stats.clients_active, 1);
        (self.waits, self.server_deaf, self.farewell, self.held) = (Waits::Nobody, false, false, false);
        (self.yields, self.newcomer) = (false, false);
        self.down.disarm();
        let mut outcome = poll_fn(|cx| self.poll_exchange(cx, &mut lease)).await;
        while matches!(outcome, Outcome::Done) && self.must_settle() {
            outcome = match Box::pin(self.settle(&mut lease)).await.map_err(Outcome::told) {
                Err(told) => told,
                Ok(()) if self.pinned.is_none() => break,
                Ok(()) => {
                    self.stand_by = None;
                    self.client.key.entry.bind(lease.conn().cancel_target());
                    // What was settled has been read past it.
                    self.down.disarm();
                    poll_fn(|cx| self.poll_exchange(cx, &mut lease)).await
                }
            };
        }
        metrics::shift(&self.worker.stats.clients_active, -1);
        if self.session.take_changes_logins() {
            // Nobody has asked what was before, or the client has gone before it was answered.
            self.pool.renew(None);
        }
        // It counts as one that gives way until it has.
        let _until_then = self.stand_by.take();
        self.client.key.entry.unbind();
        match outcome {
            Outcome::Done => {
                self.give_back(lease);
                if self.leaving { Lent::Ended(End::Left) } else { Lent::Done }
            }
            Outcome::ClientGone if self.session.is_idle() && self.up.is_empty() && !self.down.in_frame() => {
                self.give_back(lease);
                Lent::Ended(End::Left)
            }
            Outcome::ClientGone => {
                lease.abandon();
                Lent::Ended(End::Lost)
            }
            // Its own words, if it had any, are on their way to the client.
            Outcome::ServerGone if self.farewell && !self.down.in_frame() => {
                poll_fn(|cx| self.poll_send_down(cx)).await.ok();
                Lent::Ended(End::Server)
            }
            Outcome::ServerGone => Lent::Ended(End::Told(server_closed())),
            Outcome::Told(error) => {
                lease.abandon();
                Lent::Ended(End::Told(*error))
            }
        }
    }

    fn give_back(&mut self, mut lease: Lease) {
        let untidy = self.session.take_untidy() || self.is_doubled();
        let clean = self.session.take_residue().is_none() && self.pinned.is_none() && !untidy;
        self.pin(None);
        if self.client.replicates {
            // A server has few places for these, and nobody else can use one.
            return;
        }
        if self.seeded {
            // Nothing makes a session's random numbers unpredictable again.
            lease.abandon();
            return;
        }
        if !std::mem::take(&mut self.has_params) {
            self.adopt_params(&mut lease);
        }
        self.rescope();
        let check_in = if clean { CheckIn::Clean } else { CheckIn::Reset };
        lease.release(check_in, self.client.rules.server_reset_timeout, self.ready_at);
    }

    /// Makes the server's settings the client's, where they differ. Happens outside any transaction, before the
    /// client's first byte is sent.
    async fn carry_settings(&mut self, lease: &mut Lease) -> Result<(), Lent> {
        let conn = lease.conn();
        let script = settle::script(conn, &self.client.params, &self.carried);
        let mut before = Carried::new();
        if conn.generation != self.generation {
            before = self.pool.began_with(self.generation, &self.client.settings);
            before.retain(|name, _| !self.carried.contains_key(name));
        }
        if script.is_some() || !before.is_empty() {
            let work = async {
                if let Some(script) = &script {
                    conn.simple_queries(&[script]).await?;
                }
                if before.is_empty() { Ok(Carried::new()) } else { settle::keep(conn, &before).await }
            };
            let failed = |detail: String| {
                let text = "could not restore the session's settings";
                Lent::Unfit(PgError::fatal(sqlstate::CONNECTION_FAILURE, text).detail(detail))
            };
            match tokio::time::timeout(self.client.rules.settle_timeout(), work).await {
                Ok(Ok(kept)) if kept.is_empty() => {}
                Ok(Ok(kept)) => {
                    let all = self.carried.iter().map(|(name, value)| (name.clone(), value.clone())).chain(kept);
                    self.carried = self.pool.intern_carried(Arc::new(all.collect()));
                }
                Ok(Err(error)) if error.is_the_end() => return Err(Lent::Dead),
                // What was on the connection before may be in the way: `temp_buffers`, for one.
                Ok(Err(error)) => return Err(failed(format!("{error}."))),
                Err(_) => return Err(failed("The server did not answer in time.".to_owned())),
            }
        }
        conn.applied = self.carried.clone();
        self.generation = conn.generation;
        self.client.params = conn.params.clone();
        Ok(())
    }

    /// Whether something may be left on the server connection that has to be found out before it can go back, or stay.
    fn must_settle(&self) -> bool {
        let may_hold = self.session.has_residue() || self.held || self.yields;
        self.client.rules.pool_mode == PoolMode::Auto && may_hold && !self.leaving
    }

    /// Finds out what the transaction has left behind, while the client already has its answer, unless it listens.
    async fn settle(&mut self, lease: &mut Lease) -> Result<(), PgError> {
        if !self.held {
            poll_fn(|cx| {
                // As much of it as it takes: whether it has gone is found out later.
                let _ = self.poll_send_down(cx);
                Poll::Ready(())
            })
            .await;
        }
        let held = std::mem::take(&mut self.held);
        let conn = lease.conn();
        let timeout = self.client.rules.settle_timeout();
        let lost = |why: String| {
            let text = "lost track of the session's state";
            PgError::fatal(sqlstate::CONNECTION_FAILURE, text).detail(why).hint("Connect again.")
        };
        let slow = |_| lost("The server did not say in time what the session holds.".to_owned());
        let failed = |error| lost(format!("{error}."));
        // A cancel that is late should not stop what is asked now. Somebody who names this process in a statement that
        // takes long may hold it for longer than that: what is stopped then counts as state that nobody knows.
        self.client.key.entry.unbind();
        let _ = tokio::time::timeout(CANCEL_PATIENCE, conn.cancels.settled()).await;
        let mut residue = self.session.take_residue();
        // It may have come to hold something else since, which was not asked for as long as it kept the connection anyway.
        let yields = std::mem::take(&mut self.yields);
        residue.unknown |= yields;
        let (mut listens, mut pinned) = (None, self.pinned);
        if !residue.is_none() {
            let work = settle::settle(conn, &residue, &self.carried, self.pinned, self.ears.is_some());
            let settled = tokio::time::timeout(timeout, work).await.map_err(slow)?.map_err(failed)?;
            self.carried = self.pool.intern_carried(settled.carried);
            (pinned, listens) = (settled.pinned, settled.listens);
        }
        conn.applied = self.carried.clone();
        if self.session.changes_logins() {
            // Without an answer it is made good when the connection has gone.
            let work = settle::begun_with(conn);
            let values = tokio::time::timeout(timeout, work).await.map_err(slow)?.map_err(failed)?;
            self.session.take_changes_logins();
            let settings = self.client.settings.clone();
            self.pool.renew(values.map(|values| (conn.generation, Before { settings, values })));
        }
        self.seeded |= residue.seeds;
        self.known_by_process |= residue.stores_process;
        self.doubtful |= settle::has_doubtful_names(&residue, &conn.params);
        let sequences = self.session.keeps_sequences(&conn.prepared) && !yields;
        // These are not asked of the server: they come and go with what the client says.
        pinned = pinned.filter(|reason| ![settle::SEQUENCE, settle::SEED, settle::PROCESS].contains(reason));
        pinned = pinned.or(sequences.then_some(settle::SEQUENCE)).or(self.seeded.then_some(settle::SEED));
        pinned =
            pinned.or(self.known_by_process.then_some(settle::PROCESS)).or(self.doubtful.then_some(settle::UNKNOWN));
        if self.ears.is_some() || listens.is_some() {
            // The listener has patience of its own.
            let work = self.settle_ears(conn, listens, pinned, held);
            pinned = tokio::time::timeout(timeout * 4, work).await.map_err(slow)?.map_err(failed)?;
        }
        self.pin(pinned);
        self.adopt_params(lease);
        if pinned.is_none() && residue.unknown {
            // A setting with a prefix of its own is in no list: whoever comes next is not to find it.
            let work = lease.conn().simple_queries(&["RESET ALL"]);
            tokio::time::timeout(timeout, work).await.map_err(slow)?.map_err(failed)?;
            lease.conn().applied = self.pool.intern_carried(Arc::default());
            self.has_params = true;
        }
        if pinned.is_some() && !Arc::ptr_eq(&lease.conn().params, &self.client.params) {
            self.carry_settings(lease).await.map_err(|_| lost("Its settings could not be restored.".to_owned()))?;
        }
        self.rescope();
        self.give_answer(lease.conn(), held)
    }

    /// Tells the session in what scope the client's statements are from now on, if its settings have changed.
    #[inline]
    fn rescope(&mut self) {
        let (params, carried) = &self.scoped;
        if Arc::ptr_eq(params, &self.client.params) && Arc::ptr_eq(carried, &self.carried) {
            return;
        }
        let scope = scope::of(&self.base, &self.client.params, &self.carried);
        self.session.set_scope(scope, &self.pool.statements);
        self.scoped = (self.client.params.clone(), self.carried.clone());
    }

    /// Sends what was held back, and the notifications that came in the meantime.
    fn give_answer(&mut self, conn: &mut ServerConnection, held: bool) -> Result<(), PgError> {
        let mut heard = BytesMut::new();
        for body in std::mem::take(&mut conn.heard) {
            if self.hear(conn, &body, &mut heard).is_err() {
                return Err(PgError::fatal(sqlstate::PROTOCOL_VIOLATION, "malformed notification from the server"));
            }
        }
        if !heard.is_empty() {
            self.down.out(&self.worker.buffers).extend_from_slice(&heard);
        }
        if held {
            self.take_mail();
            message::ready_for_query(self.down.out(&self.worker.buffers), b'I');
        }
        Ok(())
    }

    /// What the server connection says of the client's settings, but for the name that the client has by resetting it.
    fn adopt_params(&mut self, lease: &mut Lease) {
        let reported = &lease.conn().params;
        if !Arc::ptr_eq(reported, &self.client.params) {
            self.client.params = adopted(&self.client, &self.pool, reported);
        }
    }

    pub(super) fn pin(&mut self, reason: Option<settle::Reason>) {
        let pinned = &self.worker.stats.clients_pinned;
        if let Some(old) = self.pinned {
            metrics::shift(&pinned[old], -1);
        }
        if let Some(new) = reason {
            metrics::shift(&pinned[new], 1);
        }
        self.pinned = reason;
    }

    fn poll_exchange(&mut self, cx: &mut Context<'_>, lease: &mut Lease) -> Poll<Outcome> {
        let mut registered = false;
        loop {
            if !std::mem::replace(&mut registered, true) || self.client.signals.is_raised() {
                match self.client.signals.poll(cx) {
                    Poll::Ready(Signal::Kill(reason)) => return Poll::Ready(Outcome::told(reason)),
                    Poll::Ready(Signal::Drain(reason)) if self.session.is_idle() && !self.up.in_frame() => {
                        return Poll::Ready(Outcome::told(reason));
                    }
                    // A wait that was cancelled too late: the request is at the server now, and is left alone.
                    Poll::Ready(Signal::CancelWait) => continue,
                    _ => {}
                }
            }
            let up = self.poll_up(cx, lease);
            if let Poll::Ready(Some(outcome)) = up {
                return Poll::Ready(outcome);
            }
            if self.held_up && self.memory.named.is_missing() {
                std::task::ready!(self.poll_stand_in(cx));
                continue;
            }
            if self.memory.named.is_asking() {
                std::task::ready!(self.memory.named.poll_told(cx));
                if let Err(outcome) = self.scan_server(lease) {
                    return Poll::Ready(outcome);
                }
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
            if self.may_take_mail() {
                self.take_mail();
                continue;
            }
            // What `up` has moved, `down` has seen the consequences of: it was asked later.
            if down.is_pending() {
                if self.pinned == Some(settle::SEQUENCE) && self.gives_way(cx) {
                    self.yields = true;
                    return Poll::Ready(Outcome::Done);
                }
                if !self.is_too_slow(cx) {
                    return Poll::Pending;
                }
                if self.waits == Waits::Pinned && self.pinned == Some(settle::SEQUENCE) && self.is_between() {
                    // It may be told that there is no number; that is no reason to end it.
                    self.yields = true;
                    return Poll::Ready(Outcome::Done);
                }
                return Poll::Ready(self.too_slow());
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
        (wanted || self.held) && self.is_between()
    }

    /// Whether nothing is under way.
    #[inline]
    fn is_between(&self) -> bool {
        !self.held_up
            && self.session.is_idle()
            && !self.up.has_output()
            && !self.up.mid_frame()
            && !self.down.in_frame()
    }

    /// Whether others wait for the server connection, which the client keeps for nothing but the state of sequences.
    fn gives_way(&mut self, cx: &Context<'_>) -> bool {
        if !self.is_between() {
            self.stand_by = None;
            return false;
        }
        let (pool, since, claim) = (&self.pool, self.ready_at, self.session.claim());
        let stand_by = self.stand_by.get_or_insert_with(|| pool.stand_by(since, claim, cx.waker()));
        stand_by.is_called(cx.waker())
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
                metrics::count(&self.worker.stats.server_out, self.up.take_sent());
                continue;
            }
            if self.leaving || self.held_up || self.is_over() && moved || (self.holds_ready() && self.must_wait()) {
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
        self.held_up = false;
        if self.leaving || self.up.unseen().is_empty() {
            return Ok(());
        }
        let mut scratch = self.worker.buffers.take_text();
        let result = self.scan_frames(lease, &mut scratch);
        self.worker.buffers.give_text(scratch);
        result
    }

    fn scan_frames(&mut self, lease: &mut Lease, scratch: &mut BytesMut) -> Result<(), Outcome> {
        let (limit, max) = (self.worker.buffers.size(), self.client.rules.max_packet_size);
        loop {
            let unseen = self.up.unseen();
            if self.leaving || unseen.is_empty() {
                return Ok(());
            }
            let header = frame::header(unseen).map_err(|e| Outcome::told(invalid_length(e)))?;
            let Some(header) = header else { return Ok(()) };
            if self.holds_ready() && self.must_wait() {
                return Ok(());
            }
            if header.tag == b'X' {
                self.leaving = true;
                return Ok(());
            }
            if unseen.len() < self.session.needs(header, unseen, limit, max).map_err(Outcome::told)? {
                return Ok(());
            }
            if self.session.must_wait(header, unseen) {
                self.held_up = true;
                if self.session.must_flush() {
                    message::flush(self.up.out(&self.worker.buffers));
                }
                return Ok(());
            }
            if self.query_since.is_none() {
                let now = Instant::now();
                self.query_since = Some(now);
                self.transaction_since.get_or_insert(now);
            }
            let seen = unseen.len().min(header.total);
            self.session.note(&unseen[..seen], &mut lease.conn().recent);
            let ward = Guard { worker: &self.worker, client: &self.client, memory: &self.memory };
            let mut link = Link { prepared: &mut lease.conn().prepared, registry: &self.pool.statements, ward: &ward };
            let verdict = self.session.on_client(header, &unseen[..seen], &mut link, scratch);
            if self.session.needs_database_alone() {
                self.pool.make_way();
            }
            if self.session.asks_for_process() {
                lease.conn().face().show_to(self.client.key.pid);
            }
            match verdict.map_err(Outcome::told)? {
                Verdict::Forward => self.up.approve(header.total),
                Verdict::Swallow => self.up.swallow(header.total),
                Verdict::Later => {
                    lease.conn().recent.forget_last();
                    scratch.clear();
                    self.held_up = true;
                    return Ok(());
                }
                Verdict::Ahead => {
                    lease.conn().recent.forget_last();
                    self.up.out(&self.worker.buffers).extend_from_slice(scratch);
                    scratch.clear();
                    self.held_up = true;
                    return Ok(());
                }
                Verdict::Replace => {
                    self.up.out(&self.worker.buffers).extend_from_slice(scratch);
                    scratch.clear();
                    self.up.replace(seen, header.total - seen);
                }
                Verdict::Instead => {
                    self.up.out(&self.worker.buffers).extend_from_slice(scratch);
                    scratch.clear();
                    self.up.swallow(header.total);
                }
            }
            self.give_our_answers();
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
        Outcome::told(PgError::fatal(sqlstate::INSUFFICIENT_PRIVILEGE, message))
    }

    /// Server to client. `Ready(None)`: something moved.
    fn poll_down(&mut self, cx: &mut Context<'_>, lease: &mut Lease) -> Poll<Option<Outcome>> {
        let mut moved = false;
        loop {
            if self.down.has_output() {
                match self.poll_send_down(cx) {
                    Poll::Ready(Ok(())) => moved = true,
                    Poll::Ready(Err(_)) => return Poll::Ready(Some(Outcome::ClientGone)),
                    Poll::Pending => {
                        self.stalled_since.get_or_insert_with(Instant::now);
                        break;
                    }
                }
            }
            if moved && self.is_over() {
                break;
            }
            match self.down.poll_fill(cx, &mut lease.conn().stream, &self.worker.buffers) {
                Poll::Ready(Ok(0)) | Poll::Ready(Err(_)) => return Poll::Ready(Some(Outcome::ServerGone)),
                Poll::Ready(Ok(n)) => {
                    metrics::count(&self.worker.stats.server_in, n as u64);
                    moved = true;
                    if let Err(outcome) = self.scan_server(lease) {
                        return Poll::Ready(Some(outcome));
                    }
                    // The server connection is free: the client need not have read its answer for that.
                    if self.is_over() {
                        break;
                    }
                }
                Poll::Pending => {
                    self.stalled_since = None;
                    break;
                }
            }
        }
        if moved { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Decides about what the server has sent.
    fn scan_server(&mut self, lease: &mut Lease) -> Result<(), Outcome> {
        self.down.continue_frame();
        let mut scratch = BytesMut::new();
        loop {
            self.give_our_answers();
            self.down.approve_rows();
            let unseen = self.down.unseen();
            let Some(header) = frame::header(unseen).map_err(|_| out_of_step(&"invalid message length"))? else {
                return Ok(());
            };
            if unseen.len() < self.session.needs_of_server(header, self.worker.buffers.size()) {
                return Ok(());
            }
            if header.tag == b'Z' && self.must_ask() {
                return Ok(());
            }
            let seen = unseen.len().min(header.total);
            let frame = &unseen[..seen];
            match header.tag {
                b'S' => {
                    let conn = lease.conn();
                    match conn.note_parameter(&frame[HEADER..]) {
                        Ok(()) => {}
                        Err(error @ ServerError::Identity { .. }) => return Err(self.stranger(&error)),
                        Err(error) => return Err(out_of_step(&error)),
                    }
                    let own_name = self.is_own_name_again(frame);
                    let reported = &lease.conn().params;
                    if !Arc::ptr_eq(reported, &self.client.params) {
                        self.client.params = adopted(&self.client, &self.pool, reported);
                    }
                    if own_name {
                        self.down.swallow(header.total);
                        let name = self.client.application_name.clone();
                        message::parameter_status(
                            self.down.out(&self.worker.buffers),
                            "application_name",
                            name.as_bytes(),
                        );
                        self.client.params = self.client.params.with("application_name", &name);
                        continue;
                    }
                }
                b'A' => {
                    if frame.len() < header.total {
                        return Err(out_of_step(&"notification too long"));
                    }
                    self.hear(lease.conn(), &frame[HEADER..], &mut scratch)?;
                    self.down.out(&self.worker.buffers).extend_from_slice(&scratch);
                    scratch.clear();
                    self.down.swallow(header.total);
                    continue;
                }
                b'E' => {
                    let guard = Guard { worker: &self.worker, client: &self.client, memory: &self.memory };
                    let refused = Refused { guard, session: &self.session, recent: &lease.conn().recent };
                    self.farewell |= refused.note(frame);
                }
                _ => {}
            }
            let verdict = self.session.on_server(header, frame, &mut lease.conn().prepared, &mut scratch);
            if header.tag == b'Z' && self.session.is_in_doubt() {
                // In the place of a ReadyForQuery that may not be the last.
                return Err(Outcome::told(copy_in_doubt()));
            }
            match verdict.map_err(|desync| out_of_step(&desync))? {
                Verdict::Forward if header.tag == b'Z' && self.holds_ready() && self.session.is_idle() => {
                    self.held = true;
                    self.down.swallow(header.total);
                }
                Verdict::Forward => self.down.approve(header.total),
                Verdict::Swallow | Verdict::Later | Verdict::Ahead => self.down.swallow(header.total),
                Verdict::Replace | Verdict::Instead => {
                    self.down.out(&self.worker.buffers).extend_from_slice(&scratch);
                    scratch.clear();
                    self.down.swallow(header.total);
                }
            }
            if header.tag == b'Z' {
                self.account();
            }
        }
    }

    /// Answers of ours whose turn it is. A message of the server's that is half way through comes first, whole.
    #[inline]
    fn give_our_answers(&mut self) {
        if self.session.owes_answer() && !self.down.mid_frame() {
            self.session.flush_ours(self.down.out(&self.worker.buffers));
        }
    }

    /// Whether the client's application_name has been reset. The server connection's own is empty, and the client's is
    /// the one that it came with.
    fn is_own_name_again(&self, frame: &[u8]) -> bool {
        !self.client.application_name.is_empty()
            && self.client.rules.pool_mode != PoolMode::Session
            && frame[HEADER..] == *b"application_name\0\0"
            && self.session.may_reset("application_name")
    }

    /// Whether a ReadyForQuery has to wait until those that the client has ended know it: whoever uses them all would find one
    /// that still answers.
    #[inline]
    fn must_ask(&self) -> bool {
        let named = &self.memory.named;
        if named.is_any() && self.session.owes_one_ready() {
            named.ask(self.client.rules.settle_timeout());
        }
        named.is_asking()
    }

    /// A ReadyForQuery has come: counts and times.
    #[inline]
    fn account(&mut self) {
        let now = Instant::now();
        self.memory.answered();
        if self.memory.named.is_any() && !self.session.owes_ready() {
            self.memory.named.let_go(self.client.rules.settle_timeout());
        }
        let stats = &self.worker.stats;
        if self.session.take_altered() {
            self.pool.statements.forget();
        }
        if self.client.rules.pool_mode != PoolMode::Auto
            && self.session.status() == b'I'
            && self.session.take_changes_logins()
        {
            self.pool.renew(None);
        }
        let queries = self.session.take_queries();
        if queries > 0 {
            metrics::count(&stats.queries, u64::from(queries));
            self.client.stats.count_queries(queries, self.worker.metrics.second(now.into_std()));
        }
        if let Some(since) = self.query_since.take() {
            stats.query_time.observe(now.duration_since(since));
        }
        if self.session.status() == b'I'
            && let Some(since) = self.transaction_since.take()
        {
            metrics::count(&stats.transactions, 1);
            metrics::count(&self.client.stats.transactions, 1);
            stats.transaction_time.observe(now.duration_since(since));
        }
        self.ready_at = now;
    }

    #[inline]
    pub(super) fn poll_send_down(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        let result = self.down.poll_send(cx, &mut self.client.stream, &self.worker.buffers);
        let sent = self.down.take_sent();
        metrics::count(&self.worker.stats.client_out, sent);
        metrics::count(&self.client.stats.client_out, sent);
        result
    }

    #[inline]
    pub(super) fn count_client_in(&self, n: usize) {
        metrics::count(&self.worker.stats.client_in, n as u64);
        metrics::count(&self.client.stats.client_in, n as u64);
    }

    pub(super) fn arm(&mut self, timeout: Duration) {
        self.alarm = (!timeout.is_zero()).then(|| Box::pin(tokio::time::sleep(timeout)));
    }

    pub(super) fn alarm_rings(&mut self, cx: &mut Context<'_>) -> bool {
        self.alarm.as_mut().is_some_and(|alarm| rings(alarm.as_mut(), cx))
    }

    /// Whether a query, or the client in its transaction, has taken longer than it may. Arms no timer unless the
    /// configuration has such a limit.
    fn is_too_slow(&mut self, cx: &mut Context<'_>) -> bool {
        let rules = &self.client.rules;
        let idle = if self.pinned.is_some() { rules.pin_timeout } else { rules.client_idle_timeout };
        if rules.idle_transaction_timeout.is_zero() && rules.query_timeout.is_zero() && idle.is_zero() {
            return false;
        }
        let waiting_for = if self.session.may_stream() {
            Waits::Nobody
        } else if self.session.is_idle_in_transaction() {
            Waits::Client
        } else if self.session.is_idle() {
            let keeps = self.pinned.is_some() || rules.pool_mode == PoolMode::Session;
            if keeps { Waits::Pinned } else { Waits::Nobody }
        } else {
            Waits::Server
        };
        if self.waits != waiting_for {
            self.waits = waiting_for;
            let timeout = match waiting_for {
                Waits::Client => rules.idle_transaction_timeout,
                Waits::Server => rules.query_timeout,
                Waits::Pinned => idle,
                Waits::Nobody => Duration::ZERO,
            };
            self.arm(timeout);
        }
        self.alarm_rings(cx)
    }

    fn too_slow(&self) -> Outcome {
        Outcome::told(if let (Waits::Pinned, Some(reason)) = (self.waits, self.pinned) {
            PgError::fatal(sqlstate::IDLE_SESSION_TIMEOUT, "pin_timeout")
                .detail(format!(
                    "The client kept a server connection ({}) and was idle for longer than the proxy allows.",
                    PIN_REASONS[reason]
                ))
                .hint("End what keeps it: drop temporary tables, close cursors, release advisory locks, DEALLOCATE, or DISCARD ALL.")
        } else if self.waits == Waits::Pinned {
            PgError::fatal(sqlstate::IDLE_SESSION_TIMEOUT, "client_idle_timeout")
        } else if self.session.is_idle_in_transaction() {
            PgError::fatal(sqlstate::IDLE_IN_TRANSACTION_TIMEOUT, "idle_transaction_timeout")
                .detail("The transaction was idle for longer than the proxy allows.")
        } else {
            PgError::fatal(sqlstate::QUERY_CANCELED, "query_timeout")
                .detail("The query took longer than the proxy allows.")
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::coop::poll_proceed;

    use super::*;

    #[tokio::test]
    async fn an_alarm_rings_at_the_end_of_a_turn() {
        let mut alarm = Box::pin(tokio::time::sleep(Duration::from_millis(1)));
        tokio::time::sleep(Duration::from_millis(20)).await;
        let rang = poll_fn(|cx| {
            while let Poll::Ready(turn) = poll_proceed(cx) {
                turn.made_progress();
            }
            assert!(alarm.as_mut().poll(cx).is_pending());
            Poll::Ready(rings(alarm.as_mut(), cx))
        });
        assert!(rang.await);
    }
}
