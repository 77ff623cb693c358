use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::*;
use crate::config::Config;
use crate::directory::Shard;
use crate::stream::{Socket, Stream};
use crate::tenant::{Plan, Status};
use passwords::Passwords;

const PATIENCE: Duration = Duration::from_secs(20);

/// A pool, and the far ends of the sockets of its server connections as they are opened.
fn pool() -> (Arc<Pool>, mpsc::UnboundedReceiver<DuplexStream>) {
    let tenant = Arc::new(Tenant {
        id: TenantId::parse("client_001").unwrap(),
        plan: Plan::parse("schema").unwrap(),
        shard: Arc::new(Shard { port: 1, max_db_connections: 100, ..Shard::for_tests("shard_1") }),
        status: Status::Active,
        epoch: 1,
        verifier: None,
        names: None,
        managed: true,
    });
    let metrics = Arc::new(Metrics::new(1));
    let tls = Arc::new(tls::ClientTls::new(&crate::config::Tls::default()).unwrap());
    let passwords = Passwords::new(&Config::default());
    let mut connector = Connector::new(tls, passwords, PATIENCE, Duration::ZERO, metrics.clone());
    let (dialled, far_ends) = mpsc::unbounded_channel();
    connector.dial = Some(Arc::new(move || {
        let (near, far) = tokio::io::duplex(1 << 16);
        dialled.send(far).unwrap();
        Stream::Plain(Socket::Other(Box::new(near)))
    }));
    let limits = Limits { default_pool_size: 50, server_idle_timeout: Duration::ZERO };
    let pools = Pools::new(Arc::new(connector), limits, metrics);
    (pools.get(&tenant), far_ends)
}

async fn next(far_ends: &mut mpsc::UnboundedReceiver<DuplexStream>) -> DuplexStream {
    tokio::time::timeout(PATIENCE, far_ends.recv()).await.unwrap().unwrap()
}

/// Lets whoever has dialled log in.
async fn let_in(far: &mut DuplexStream) {
    assert!(far.read(&mut [0; 1024]).await.unwrap() > 0);
    let mut said = b"R\0\0\0\x08\0\0\0\0".to_vec();
    for (name, value) in [("session_authorization", "client_001"), ("is_superuser", "off")] {
        let body = format!("{name}\0{value}\0");
        said.push(b'S');
        said.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        said.extend(body.as_bytes());
    }
    said.extend(b"K\0\0\0\x0c\0\0\0\x01\0\0\0\x02Z\0\0\0\x05I");
    far.write_all(&said).await.unwrap();
}

async fn lent(wait: Wait<'_>) -> Lease {
    tokio::time::timeout(PATIENCE, wait).await.unwrap().0.unwrap().unwrap()
}

fn give_back(lease: Lease) {
    lease.release(lease::CheckIn::Clean, PATIENCE, Instant::now());
}

#[tokio::test]
async fn a_pool_whose_connections_do_not_come_back_grows() {
    let (pool, mut far_ends) = pool();
    let wait = || pool.wait(&Arc::default(), None, Duration::ZERO, 0, None);
    let first = wait();
    let mut fars = vec![next(&mut far_ends).await];
    let_in(&mut fars[0]).await;
    let lease = lent(first).await;
    let came_back = Instant::now();
    give_back(lease);
    let mut leases = vec![lent(wait()).await];
    // One that has come back just now is waited for, and no longer: nobody else has to come for that.
    let waits = [wait(), wait(), wait()];
    fars.push(next(&mut far_ends).await);
    assert!(came_back.elapsed() >= pool.budget.patience(), "{:?}", came_back.elapsed());
    // Then it is known that none does. The others are there as soon as logins allow, and so are those who come later.
    fars.push(next(&mut far_ends).await);
    for far in &mut fars[1..] {
        let_in(far).await;
    }
    fars.push(next(&mut far_ends).await);
    let_in(&mut fars[3]).await;
    for wait in waits {
        leases.push(lent(wait).await);
    }
    let one_more = wait();
    fars.push(next(&mut far_ends).await);
    let_in(&mut fars[4]).await;
    leases.push(lent(one_more).await);
}

/// Counts how often it was woken.
struct Woken(std::sync::atomic::AtomicUsize);

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn who_waits_is_woken_also_before_it_has_looked_for_the_first_time() {
    let (pool, mut far_ends) = pool();
    let woken = Arc::new(Woken(0.into()));
    let waker = Waker::from(woken.clone());
    let mut wait = pool.wait(&Arc::default(), None, Duration::ZERO, 0, Some(&waker));
    let mut far = next(&mut far_ends).await;
    let_in(&mut far).await;
    let patience = Instant::now() + PATIENCE;
    while woken.0.load(Ordering::SeqCst) == 0 && Instant::now() < patience {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut cx = Context::from_waker(&waker);
    assert!(Pin::new(&mut wait).poll(&mut cx).is_pending());
    assert!(matches!(Pin::new(&mut wait).poll(&mut cx), Poll::Ready((Ok(Some(_)), _))));
    assert_eq!((woken.0.load(Ordering::SeqCst), pool.waiting()), (1, 0));
}

#[tokio::test]
async fn a_connection_that_will_be_back_before_a_new_one_is_waited_for() {
    let (known, ms) = (Arc::<Settings>::default(), Duration::from_millis);
    let (start, patience) = (Instant::now(), ms(10));
    let at = |after: u64| start + ms(after);
    // Three connections, of which one came back after 100 ms; when the next login begins for who has come at `since`.
    let pool = |settings: &Arc<Settings>, since: u64, change: fn(&mut State)| {
        let mut state = State { open: 3, came_back: Some(at(100)), ..State::default() };
        state.logged_in(&(known.clone(), 0));
        for _ in 0..2 {
            state.waiters.join(Place::new(settings, None, at(since), None, 0, None));
        }
        change(&mut state);
        state.opens_at(patience, at(105)).duration_since(start)
    };
    // Not before it is clear that none comes back.
    assert_eq!(pool(&known, 101, |_| {}), ms(110));
    // Who comes then waits until what has arrived is read.
    assert_eq!(pool(&known, 112, |_| {}), ms(112) + AT_LEAST);
    // Who has waited for long, though connections come and go.
    assert_eq!(pool(&known, 88, |_| {}), ms(108));
    // If there was always somebody who waited, one at a time.
    let pressed = |state: &mut State| state.pressed_since = state.came_back.map(|at| at - Duration::from_millis(72));
    assert_eq!(pool(&known, 99, pressed), ms(108));
    let and_connects = |state: &mut State| {
        state.pressed_since = state.came_back.map(|at| at - Duration::from_millis(72));
        state.connecting = 1;
    };
    assert_eq!(pool(&known, 99, and_connects), ms(110));
    // At once, if nobody has one that could come back, or one like that.
    assert_eq!(pool(&known, 104, |state| state.open = 0), ms(105));
    assert_eq!(pool(&known, 104, |state| state.came_back = None), ms(105));
    let others = Arc::new(vec![("work_mem".to_owned(), "64kB".to_owned())]);
    assert_eq!(pool(&others, 104, |_| {}), ms(105));
    // Also if there was one.
    let has_gone = |state: &mut State| {
        let kind = (state.waiters.at(0).unwrap().settings.clone(), 0);
        state.welcome.note(&kind.0, &Arc::default());
        state.logged_in(&kind);
        state.logged_out(&kind);
    };
    assert_eq!(pool(&others, 104, has_gone), ms(105));
}

#[tokio::test]
async fn a_failed_login_is_told_to_those_who_waited_when_it_began() {
    let (pool, mut far_ends) = pool();
    let wait = || pool.wait(&Arc::default(), None, PATIENCE, 0, None);
    let gone = wait();
    let first = next(&mut far_ends).await;
    drop(gone);
    let mut late = wait();
    drop(first);
    let second = tokio::select! {
        (answer, _) = &mut late => panic!("{:?}", answer.err()),
        far = next(&mut far_ends) => far,
    };
    drop(second);
    let (answer, _) = tokio::time::timeout(PATIENCE, late).await.unwrap();
    assert!(matches!(answer, Err(CheckoutError::Failed(_))));
}

/// A server refuses settings that it does not know: that is for who asked for them, whoever else waits, and came before.
#[tokio::test]
async fn a_failed_login_is_told_to_who_wanted_its_settings() {
    let (pool, mut far_ends) = pool();
    let (plain, odd) = (Arc::<Settings>::default(), Arc::new(vec![("no_such_thing".to_owned(), "1".to_owned())]));
    let mut first = pool.wait(&plain, None, PATIENCE, 0, None);
    let own = next(&mut far_ends).await;
    let second = pool.wait(&odd, None, PATIENCE, 0, None);
    drop(next(&mut far_ends).await);
    let (answer, _) = tokio::select! {
        (answer, _) = &mut first => panic!("{:?}", answer.err()),
        answer = second => answer,
    };
    assert!(matches!(answer, Err(CheckoutError::Failed(_))));
    drop(own);
    assert!(matches!(first.await.0, Err(CheckoutError::Failed(_))));
}

#[test]
fn a_pool_that_is_larger_than_needed_does_not_grow_the_faster_for_it() {
    let at_once = |open, connecting| State { open, connecting, ..State::default() }.at_once();
    // From nothing, two at a time: 50 take 25 times as long as one login.
    assert_eq!([at_once(0, 0), at_once(2, 2), at_once(9, 1), at_once(24, 0)], [2; 4]);
    assert_eq!(at_once(200, 8), 12);
}
