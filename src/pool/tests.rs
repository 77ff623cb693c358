use tokio::io::DuplexStream;

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

#[tokio::test]
async fn a_failed_login_is_told_to_those_who_waited_when_it_began() {
    let (pool, mut far_ends) = pool();
    let wait = |pool: &Arc<Pool>| pool.wait(&Arc::default(), &"".into(), PATIENCE);
    let gone = wait(&pool);
    let first = next(&mut far_ends).await;
    drop(gone);
    let mut late = wait(&pool);
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
    let mut first = pool.wait(&plain, &"".into(), PATIENCE);
    let own = next(&mut far_ends).await;
    let second = pool.wait(&odd, &"".into(), PATIENCE);
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
