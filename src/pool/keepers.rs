//! Clients that keep a server connection for nothing but the state of sequences: others that wait may have it. No I/O.

use std::task::Waker;
use std::time::Duration;

use slab::Slab;
use tokio::time::Instant;

/// For so long after its last answer a client is left alone: who inserts, and asks for the number in another transaction,
/// asks at once.
const REST: Duration = Duration::from_millis(100);

/// Those who never rest are not left alone when somebody has waited for so long.
const fn patience(claim: Claim) -> Duration {
    Duration::from_millis(match claim {
        Claim::Unused => 500,
        Claim::Asked => 2_000,
        Claim::New | Claim::Due => 5_000,
    })
}

/// Those who have asked before, and so ask again, are not called sooner: others may rest by then, who have not.
const fn least(claim: Claim) -> Duration {
    Duration::from_millis(match claim {
        Claim::Unused | Claim::New => 0,
        Claim::Asked | Claim::Due => 1_000,
    })
}

/// How much a client would miss its state, from little to much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Claim {
    /// It has never asked for any, as others have, and goes on without.
    Unused,
    /// It has done something for the first time, and may ask.
    New,
    /// It has asked for the last that it did.
    Asked,
    /// It asks, and has not asked for the last that it did.
    Due,
}

/// Those who are idle.
#[derive(Default)]
pub(super) struct Keepers {
    places: Slab<Keeper>,
    called: usize,
}

struct Keeper {
    /// When they became idle.
    since: Instant,
    claim: Claim,
    called: bool,
    waker: Waker,
}

impl Keepers {
    /// Whether there is nobody.
    pub(super) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// One more. The key must be given to [`Keepers::leave`] in the end.
    pub(super) fn join(&mut self, since: Instant, claim: Claim, waker: &Waker) -> usize {
        self.places.insert(Keeper { since, claim, called: false, waker: waker.clone() })
    }

    /// One has given way, or has something to do.
    pub(super) fn leave(&mut self, key: usize) {
        let called = self.places.try_remove(key).is_some_and(|keeper| keeper.called);
        self.called -= usize::from(called);
    }

    /// Whether it was called; otherwise its task is woken when it is.
    pub(super) fn is_called(&mut self, key: usize, waker: &Waker) -> bool {
        let Some(keeper) = self.places.get_mut(key) else { return false };
        keeper.waker.clone_from(waker);
        keeper.called
    }

    /// How many were called and have not left yet.
    pub(super) fn called(&self) -> usize {
        self.called
    }

    /// Calls the one that misses its state least, or has been idle for longest, for somebody who waits since `waiting`.
    /// Returns whom to wake.
    pub(super) fn call(&mut self, waiting: Instant, now: Instant) -> Option<Waker> {
        let key = self.next_free(waiting, now)?;
        let keeper = self.places.get_mut(key)?;
        keeper.called = true;
        self.called += 1;
        Some(keeper.waker.clone())
    }

    /// Since when the one is idle that [`Keepers::call`] would call.
    pub(super) fn resting(&self, waiting: Instant, now: Instant) -> Option<Instant> {
        self.next_free(waiting, now).and_then(|key| self.places.get(key)).map(|keeper| keeper.since)
    }

    fn next_free(&self, waiting: Instant, now: Instant) -> Option<usize> {
        let waited = now.duration_since(waiting);
        let free = self.places.iter().filter(|(_, keeper)| keeper.is_free(waited, now));
        free.min_by_key(|(_, keeper)| (keeper.claim, keeper.since)).map(|(key, _)| key)
    }

    /// When another one may be free.
    pub(super) fn next(&self, waiting: Instant, now: Instant) -> Option<Instant> {
        let idle = self.places.iter().filter(|(_, keeper)| !keeper.called);
        let rested = idle.map(|(_, keeper)| keeper.since + REST).min()?;
        let claims = [Claim::Unused, Claim::New, Claim::Asked, Claim::Due];
        let waits = claims.into_iter().flat_map(|claim| [waiting + least(claim), waiting + patience(claim)]);
        waits.chain([rested]).filter(|at| *at > now).min()
    }
}

impl Keeper {
    fn is_free(&self, waited: Duration, now: Instant) -> bool {
        let rested = now.duration_since(self.since) >= REST && waited >= least(self.claim);
        !self.called && (rested || waited >= patience(self.claim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[tokio::test]
    async fn who_misses_its_state_least_is_called_first() {
        let (mut keepers, start, waker) = (Keepers::default(), Instant::now(), Waker::noop());
        let at = |ms| at(start, ms);
        let joined = [(0, Claim::Due), (20, Claim::New), (10, Claim::Unused), (5, Claim::Asked)];
        let [due, late, early, asked] = joined.map(|(ms, claim)| keepers.join(at(ms), claim, waker));
        assert!(
            keepers.call(at(90), at(99)).is_none() && keepers.resting(at(90), at(99)).is_none(),
            "they may ask yet"
        );
        assert_eq!(keepers.next(at(90), at(99)), Some(at(100)));
        assert_eq!(keepers.resting(at(90), at(120)), Some(at(10)));
        let called = |keepers: &mut Keepers| [early, late, asked, due].map(|key| keepers.is_called(key, waker));
        for expected in [[true, false, false, false], [true, true, false, false]] {
            assert!(keepers.call(at(90), at(120)).is_some());
            assert_eq!(called(&mut keepers), expected);
        }
        // Those who ask are not called before somebody has waited for a while.
        assert!(keepers.call(at(90), at(1_089)).is_none());
        assert_eq!(keepers.next(at(90), at(1_089)), Some(at(1_090)));
        for expected in [[true, true, true, false], [true; 4]] {
            assert!(keepers.call(at(90), at(1_090)).is_some());
            assert_eq!(called(&mut keepers), expected);
        }
        assert!(keepers.call(at(90), at(1_090)).is_none() && keepers.next(at(90), at(1_090)).is_none());
        assert_eq!(keepers.called(), 4);
        keepers.leave(asked);
        keepers.leave(asked);
        assert_eq!(keepers.called(), 3);
    }

    #[tokio::test]
    async fn who_never_rests_gives_way_in_the_end() {
        let (start, waker) = (Instant::now(), Waker::noop());
        let at = |ms| at(start, ms);
        for (claim, patience) in [(Claim::Unused, 500), (Claim::New, 5_000), (Claim::Asked, 2_000), (Claim::Due, 5_000)]
        {
            let mut keepers = Keepers::default();
            keepers.join(at(patience - 1), claim, waker);
            assert!(keepers.call(start, at(patience - 1)).is_none());
            assert_eq!(keepers.next(start, at(patience - 1)), Some(at(patience)));
            assert!(keepers.call(start, at(patience)).is_some());
        }
    }
}
