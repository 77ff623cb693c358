//! Who sent a notification: server processes of a shard and the tenants behind them.
//!
//! `LISTEN` and `NOTIFY` know no privileges, and the tenants of a shared database share its channels. A notification
//! says which server process sent it; each process serves one tenant for life. So a notification is delivered only if
//! its process is known to be the tenant's own, and with the process id that the sending client was told.
//!
//! Invariant: what cannot be shown to come from the same tenant is dropped. The number of a process that has ended is
//! trusted for [`PID_SAFE`] at most: within that time no system gives it to another one. A notification that was waiting
//! for longer is delivered only if its process is older than the wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::directory::Tenant;
use crate::metrics::Notified;
use crate::tenant::TenantId;

/// No system gives the number of a process to another one sooner: that would take 10,000 processes a second.
const PID_SAFE: Duration = Duration::from_secs(3);

/// How long whoever is asked about a process may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Questions that may wait; the notifications behind others are dropped.
const QUESTIONS: usize = 1024;

/// A server process of ours.
#[derive(Debug)]
pub struct Face {
    tenant: TenantId,
    /// The process id that the client which used it last was told.
    client: AtomicU32,
    /// The process id that the client was told which asked the server for this one last; 0 is nobody.
    known_to: AtomicU32,
    since: Instant,
    gone: Mutex<Option<Instant>>,
}

impl Face {
    /// The connection is lent to the client that was told this process id.
    #[inline]
    pub fn lend(&self, pid: u32) {
        self.client.store(pid, Ordering::Relaxed);
    }

    /// The client that was told this process id asks the server for the process's own.
    pub fn show_to(&self, pid: u32) {
        self.known_to.store(pid, Ordering::Relaxed);
    }

    /// The process id that the client which used it last was told.
    pub fn client(&self) -> u32 {
        self.client.load(Ordering::Relaxed)
    }
}

/// Keeps a process known while its connection is open.
#[derive(Debug)]
pub(super) struct Shown(Arc<Face>);

impl Shown {
    pub(super) fn face(&self) -> &Face {
        &self.0
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        *self.0.gone.lock() = Some(Instant::now());
    }
}

/// A process that is not ours, as the server describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    /// Its role.
    pub role: String,
    /// How long it has been there.
    pub age: Duration,
}

/// Asks who a process is.
#[derive(Debug)]
pub struct Question {
    /// Where.
    pub shard: String,
    /// Which one.
    pub pid: u32,
    /// The answer; `None` if there is no such process.
    pub reply: oneshot::Sender<Option<Stranger>>,
}

/// The way to whoever answers.
#[derive(Debug)]
pub(super) struct Questions {
    sender: mpsc::Sender<Question>,
    receiver: Mutex<Option<mpsc::Receiver<Question>>>,
}

impl Default for Questions {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel(QUESTIONS);
        Self { sender, receiver: Mutex::new(Some(receiver)) }
    }
}

impl Questions {
    pub(super) fn open(&self) -> Option<mpsc::Receiver<Question>> {
        self.receiver.lock().take()
    }
}

/// What becomes of a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// It is delivered, as coming from this process.
    Pass(u32),
    /// Another tenant's: dropped.
    Foreign,
    /// Not one of our processes: ask.
    Ask,
}

/// The server processes of one shard.
pub struct Faces {
    shard: String,
    ours: DashMap<u32, Arc<Face>>,
    /// Others, as they were described, and when.
    others: DashMap<u32, (Option<Stranger>, Instant)>,
    questions: mpsc::Sender<Question>,
    /// Counts.
    pub notified: Arc<Notified>,
}

impl Faces {
    pub(super) fn new(shard: &str, questions: &Questions, notified: Arc<Notified>) -> Self {
        let (ours, others) = (DashMap::new(), DashMap::new());
        Self { shard: shard.to_owned(), ours, others, questions: questions.sender.clone(), notified }
    }

    /// A process of ours, which serves this tenant.
    pub(super) fn show(&self, pid: u32, tenant: &TenantId) -> Shown {
        let gone = Mutex::new(None);
        let face = Arc::new(Face {
            tenant: tenant.clone(),
            client: pid.into(),
            known_to: 0.into(),
            since: Instant::now(),
            gone,
        });
        self.ours.insert(pid, face.clone());
        self.others.remove(&pid);
        Shown(face)
    }

    /// What the clients were told that have asked for a process of this tenant's, and that have used it last.
    pub fn known_to(&self, tenant: &TenantId, pid: u32) -> Option<(u32, u32)> {
        let face = self.ours.get(&pid)?;
        let known_to = face.known_to.load(Ordering::Relaxed);
        (face.tenant == *tenant && known_to != 0).then(|| (known_to, face.client()))
    }

    /// Forgets what may not be trusted any longer.
    pub(super) fn sweep(&self) {
        self.ours.retain(|_, face| face.gone.lock().is_none_or(|gone| gone.elapsed() < PID_SAFE));
        self.others.retain(|_, (_, at)| at.elapsed() < PID_SAFE);
    }

    /// Decides about a notification for a tenant that may have been waiting for so long.
    pub fn judge(&self, tenant: &Tenant, pid: u32, waited: Duration) -> Heard {
        let known = self.ours.get(&pid).map(|face| face.clone());
        let known = known.filter(|face| face.gone.lock().is_none_or(|gone| gone.elapsed() < PID_SAFE));
        match known {
            Some(face) if face.tenant == tenant.id => {
                if !tenant.plan.shares_channels() || is_old_enough(face.since.elapsed(), waited) {
                    Heard::Pass(face.client())
                } else {
                    self.foreign()
                }
            }
            _ if !tenant.plan.shares_channels() => Heard::Pass(pid),
            Some(_) => self.foreign(),
            None => Heard::Ask,
        }
    }

    fn foreign(&self) -> Heard {
        self.notified.foreign.fetch_add(1, Ordering::Relaxed);
        Heard::Foreign
    }

    /// Asks the server whose process it is, and counts what cannot be delivered. Whether it is the tenant's.
    pub async fn is_own(&self, tenant: &Tenant, pid: u32, waited: Duration) -> bool {
        let own = self.belongs(tenant, pid, waited).await;
        if !own {
            self.notified.unknown.fetch_add(1, Ordering::Relaxed);
        }
        own
    }

    async fn belongs(&self, tenant: &Tenant, pid: u32, waited: Duration) -> bool {
        let began = Instant::now();
        let known = self.others.get(&pid).filter(|known| known.1.elapsed() < PID_SAFE).map(|known| known.0.clone());
        let stranger = match known {
            Some(stranger) => stranger,
            None => {
                let (reply, answer) = oneshot::channel();
                let question = Question { shard: self.shard.clone(), pid, reply };
                if self.questions.try_send(question).is_err() {
                    return false;
                }
                let Ok(Ok(stranger)) = tokio::time::timeout(PATIENCE, answer).await else { return false };
                self.others.insert(pid, (stranger.clone(), Instant::now()));
                stranger
            }
        };
        stranger.is_some_and(|stranger| {
            stranger.role == tenant.role() && is_old_enough(stranger.age, waited + began.elapsed())
        })
    }
}

/// Whether a process of this age, or one whose number it could have, sent what has been waiting for so long.
fn is_old_enough(age: Duration, waited: Duration) -> bool {
    waited < PID_SAFE || age >= waited
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::Shard;
    use crate::tenant::{Plan, Status};

    fn tenant(id: &str, plan: Plan) -> Tenant {
        Tenant {
            id: TenantId::parse(id).unwrap(),
            plan,
            shard: Arc::new(Shard::for_tests("s")),
            status: Status::Active,
            epoch: 1,
            verifier: None,
            names: None,
            managed: true,
        }
    }

    #[test]
    fn only_the_tenants_own_processes_are_heard() {
        let questions = Questions::default();
        let faces = Faces::new("s", &questions, Arc::default());
        let (a, b) = (tenant("a", Plan::Schema), tenant("b", Plan::Schema));
        let shown = faces.show(7, &a.id);
        shown.face().lend(1007);
        assert_eq!(faces.judge(&a, 7, Duration::ZERO), Heard::Pass(1007));
        assert_eq!(faces.judge(&b, 7, Duration::ZERO), Heard::Foreign);
        assert_eq!(faces.judge(&b, 8, Duration::ZERO), Heard::Ask);
        // Where nobody else is, everything passes.
        assert_eq!(faces.judge(&tenant("b", Plan::Database), 8, Duration::ZERO), Heard::Pass(8));
        // It may have been sent by a process that had the number before.
        assert_eq!(faces.judge(&a, 7, Duration::from_secs(60)), Heard::Foreign);
        let known = |age: u64, gone: Option<u64>| {
            let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            let (since, gone) = (ago(age), Mutex::new(gone.map(ago)));
            faces.ours.insert(
                7,
                Arc::new(Face { tenant: a.id.clone(), client: 1007.into(), known_to: 0.into(), since, gone }),
            );
        };
        known(61, None);
        assert_eq!(faces.judge(&a, 7, Duration::from_secs(60)), Heard::Pass(1007));
        // One that has gone is trusted for a moment.
        known(61, Some(1));
        faces.sweep();
        assert_eq!(faces.judge(&a, 7, Duration::ZERO), Heard::Pass(1007));
        known(61, Some(4));
        assert_eq!(faces.judge(&a, 7, Duration::ZERO), Heard::Ask);
        faces.sweep();
        assert!(faces.ours.is_empty());
    }

    #[tokio::test]
    async fn others_are_asked_for_and_remembered_for_a_moment() {
        let questions = Questions::default();
        let mut asked = questions.open().unwrap();
        let faces = Faces::new("s", &questions, Arc::default());
        let (a, b) = (tenant("a", Plan::Schema), tenant("b", Plan::Schema));
        let answering = tokio::spawn(async move {
            let question = asked.recv().await.unwrap();
            assert_eq!((question.shard.as_str(), question.pid), ("s", 9));
            let stranger = Stranger { role: "a".into(), age: Duration::from_secs(5) };
            question.reply.send(Some(stranger)).unwrap();
            asked
        });
        assert!(faces.is_own(&a, 9, Duration::ZERO).await);
        // No second question.
        let asked = answering.await.unwrap();
        assert!(!faces.is_own(&b, 9, Duration::ZERO).await);
        assert!(!faces.is_own(&a, 9, Duration::from_secs(6)).await, "too young");
        // Nobody answers: nothing is delivered.
        drop(asked);
        assert!(!faces.is_own(&a, 10, Duration::ZERO).await);
    }
}
