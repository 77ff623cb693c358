//! Which worker accepts the next client. A client is served by its tenant's worker, but its tenant is known only from what it
//! says after it was accepted; whoever logs in elsewhere has to be moved, which wakes two threads in the place of one. So
//! one worker accepts at a time. Where all the clients that came lately belonged to the same worker (one busy tenant that
//! connects anew again and again), it is that one; else the workers take turns, to share the work of logins.

use std::sync::atomic::{AtomicU64, Ordering};

/// So many in a row make a habit. With two workers and clients of many tenants, one in 32,768 runs of so many looks like one
/// by chance; what is lost then is one move more.
const HABIT: u64 = 16;

/// So many clients are accepted in a turn.
const TURN: u64 = 32;

/// The low half.
const LOW: u64 = 0xffff_ffff;

/// Where the clients that logged in lately belonged: the worker in the low half, how many in a row in the high half.
#[derive(Debug, Default)]
pub struct Steer(AtomicU64);

impl Steer {
    /// A client belonged to this worker.
    pub fn note(&self, worker: usize) {
        let seen = self.0.load(Ordering::Relaxed);
        let next = match (of(seen) == worker, run(seen)) {
            (true, HABIT..) => return,
            (true, run) => run + 1,
            (false, _) => 1,
        };
        // Two at once may lose one of them: it is a guess.
        self.0.store(next << 32 | worker as u64 & LOW, Ordering::Relaxed);
    }

    /// Who accepts next, one of `workers`, if this one has accepted so many in its turn.
    pub fn next(&self, this: usize, accepted: u64, workers: usize) -> usize {
        let seen = self.0.load(Ordering::Relaxed);
        match run(seen) >= HABIT {
            true => of(seen),
            false if accepted >= TURN => (this + 1) % workers.max(1),
            false => this,
        }
    }
}

/// The low half.
fn of(seen: u64) -> usize {
    usize::try_from(seen & LOW).unwrap_or_default()
}

/// The high half.
fn run(seen: u64) -> u64 {
    seen >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_of_one_worker_are_accepted_there() {
        let steer = Steer::default();
        assert_eq!(steer.next(0, 1, 4), 0);
        for _ in 0..2 * HABIT {
            steer.note(3);
        }
        assert_eq!(steer.next(0, 1, 4), 3);
        assert_eq!(steer.next(3, 10 * TURN, 4), 3);
        steer.note(1);
        assert_eq!(steer.next(3, 1, 4), 3, "no habit any more: the turn goes on");
        assert_eq!(steer.next(3, TURN, 4), 0);
    }

    #[test]
    fn workers_take_turns_for_clients_of_many() {
        let steer = Steer::default();
        for n in 0..100 {
            steer.note(n % 2);
            assert_eq!(steer.next(1, TURN - 1, 2), 1);
            assert_eq!(steer.next(1, TURN, 2), 0);
        }
        assert_eq!(steer.next(0, TURN, 1), 0);
    }
}
