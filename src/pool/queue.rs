//! Those who wait for a connection of one pool: first come, first served.
//!
//! Waiting is part of the hot path as soon as there are more clients than server connections: it allocates nothing once
//! the pool has been as busy as this before, sends nothing through a channel, and arms one timer per pool, not one per
//! wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Poll, Waker};

use slab::Slab;
use tokio::time::Instant;

use super::connect::ServerConnection;
use super::shard::Ticket;
use super::{CheckoutError, Settings};

/// What a wait ends with.
pub(super) type Answer = Result<Box<ServerConnection>, CheckoutError>;

/// Everybody in line, and those who have an answer and not yet taken it.
#[derive(Default)]
pub(super) struct Queue {
    places: Slab<Place>,
    /// Keys of places without an answer, the oldest first.
    line: VecDeque<usize>,
}

/// Somebody who waits.
pub(super) struct Place {
    /// Startup settings that the connection must have.
    pub(super) settings: Arc<Settings>,
    /// For a connection that is opened on their behalf.
    pub(super) application_name: Option<Arc<str>>,
    /// When they came.
    pub(super) since: Instant,
    /// When they give up.
    pub(super) deadline: Option<Instant>,
    /// The earliest that the connection may be of; see [`Pool::renew`](super::Pool::renew).
    generation: u64,
    /// Made when they stand in the shard's queue as well; dropped with their wait.
    alive: Option<Arc<()>>,
    answer: Option<(Answer, Instant)>,
    waker: Option<Waker>,
}

impl Place {
    /// A place at the end of the line.
    pub(super) fn new(
        settings: &Arc<Settings>,
        application_name: Option<&Arc<str>>,
        since: Instant,
        deadline: Option<Instant>,
        generation: u64,
        waker: Option<Waker>,
    ) -> Self {
        Self {
            settings: settings.clone(),
            application_name: application_name.cloned(),
            since,
            deadline,
            generation,
            alive: None,
            answer: None,
            waker,
        }
    }

    /// Whether it can use a connection with these settings and of this generation.
    pub(super) fn takes(&self, settings: &Arc<Settings>, generation: u64) -> bool {
        self.settings == *settings && self.generation <= generation
    }

    /// For a turn in the shard's queue; void as soon as the wait is over.
    pub(super) fn ticket(&mut self) -> Ticket {
        Arc::downgrade(self.alive.get_or_insert_default())
    }

    /// Whether a turn in the shard's queue stands for this wait.
    fn has_turn(&self) -> bool {
        self.alive.as_ref().is_some_and(|alive| Arc::weak_count(alive) > 0)
    }
}

impl Queue {
    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.line.len()
    }

    /// Whether nobody waits.
    pub(super) fn is_empty(&self) -> bool {
        self.line.is_empty()
    }

    /// Joins the line. The key must be given to [`Queue::leave`] in the end, unless [`Queue::poll`] has answered.
    pub(super) fn join(&mut self, place: Place) -> usize {
        let key = self.places.insert(place);
        self.line.push_back(key);
        key
    }

    /// When the one who has waited longest came.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.line.front().and_then(|key| self.places.get(*key)).map(|place| place.since)
    }

    /// The one at a position in the line.
    pub(super) fn at(&mut self, position: usize) -> Option<&mut Place> {
        self.line.get(position).and_then(|key| self.places.get_mut(*key))
    }

    /// Who needs a turn in the shard's queue next: the one at `position`, or the one who has come last. Those between
    /// them have one, or get it as the line moves on.
    pub(super) fn first_without_turn(&mut self, position: usize) -> Option<&mut Place> {
        let last = self.line.len().checked_sub(1)?;
        let at = [position, last].into_iter().find(|at| self.at(*at).is_some_and(|place| !place.has_turn()))?;
        self.at(at)
    }

    /// Gives a connection to the first in line who can use it. Hands it back if there is none; else whom to wake.
    pub(super) fn give(
        &mut self,
        conn: Box<ServerConnection>,
        now: Instant,
    ) -> Result<Option<Waker>, Box<ServerConnection>> {
        match self.position(|place| place.takes(&conn.settings, conn.generation)) {
            Some(position) => Ok(self.answer(position, Ok(conn), now)),
            None => Err(conn),
        }
    }

    /// Where in the line the first one is of whom this is true.
    pub(super) fn position(&self, mut wanted: impl FnMut(&Place) -> bool) -> Option<usize> {
        self.line.iter().position(|key| self.places.get(*key).is_some_and(&mut wanted))
    }

    /// Answers the one at a position in the line and returns whom to wake.
    pub(super) fn answer(&mut self, position: usize, answer: Answer, now: Instant) -> Option<Waker> {
        let key = self.line.remove(position)?;
        let place = self.places.get_mut(key)?;
        place.alive = None;
        place.answer = Some((answer, now));
        place.waker.take()
    }

    /// Answers everybody who has waited too long, and returns whom to wake and when to look again.
    pub(super) fn expire(
        &mut self,
        now: Instant,
        why: impl Fn(&Place) -> CheckoutError,
    ) -> (Vec<Waker>, Option<Instant>) {
        let (mut wake, mut next, mut position) = (Vec::new(), None, 0);
        while let Some(place) = self.at(position) {
            match place.deadline {
                Some(deadline) if deadline <= now => {
                    let error = why(place);
                    wake.extend(self.answer(position, Err(error), now));
                    continue;
                }
                Some(deadline) => next = Some(next.map_or(deadline, |next: Instant| next.min(deadline))),
                None => {}
            }
            position += 1;
        }
        (wake, next)
    }

    /// The answer, if there is one, and when it was given: the place is free then. Otherwise the task is woken when it comes.
    pub(super) fn poll(&mut self, key: usize, waker: &Waker) -> Poll<(Answer, Instant)> {
        let Some(place) = self.places.get_mut(key) else {
            return Poll::Ready((Err(CheckoutError::Retired), Instant::now()));
        };
        if let Some(answer) = place.answer.take() {
            self.places.remove(key);
            return Poll::Ready(answer);
        }
        match &mut place.waker {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        Poll::Pending
    }

    /// Ends a wait. Returns a connection that was given to it and not taken.
    pub(super) fn leave(&mut self, key: usize) -> Option<Box<ServerConnection>> {
        let place = self.places.try_remove(key)?;
        match place.answer {
            Some((answer, _)) => answer.ok(),
            None => {
                if let Some(position) = self.line.iter().position(|waiting| *waiting == key) {
                    self.line.remove(position);
                }
                None
            }
        }
    }
}
