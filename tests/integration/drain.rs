//! Signals: SIGTERM lets work end, SIGHUP takes over what has changed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::postgres::Cluster;
use crate::raw::{PATIENCE, Raw, show};
use crate::world::{self, Setup};

async fn cluster() -> Vec<Arc<Cluster>> {
    vec![tokio::task::spawn_blocking(|| Arc::new(Cluster::start())).await.unwrap()]
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_transactions_end() {
    for mode in ["session", "transaction"] {
        let clusters = cluster().await;
        let setup = Setup::new(&clusters, &format!("[pool]\npool_mode = \"{mode}\"\n"));
        let mut process = setup.start().await;
        let raw = async || world::raw(setup.port, "client_001", &[]).await.ok().unwrap();
        let (mut idle, mut fresh, mut working, mut sleeping) = (raw().await, raw().await, raw().await, raw().await);
        let nobody = Raw::tcp(setup.port).await;
        idle.query("SELECT 1").await;
        working.query("BEGIN; INSERT INTO bookings (note) VALUES ('kept')").await;
        sleeping.compose(|b| b.query("SELECT pg_sleep(1)")).await;
        let admin = clusters[0].admin("tenants").await;
        let running = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'";
        while admin.query(running, &[]).await.unwrap().is_empty() {}
        process.signal(Signal::SIGTERM);
        for client in [&mut idle, &mut fresh] {
            let last = client.until(b'E').await;
            assert_eq!(
                (last.last().unwrap().code().as_str(), last.last().unwrap().field(b'S')),
                ("57P01", "FATAL".into())
            );
            assert!(client.is_closed().await);
        }
        assert!(tokio::net::TcpStream::connect(("127.0.0.1", setup.port)).await.is_err(), "it takes new clients");
        assert_eq!(show(&sleeping.until_ready().await), "D() C(SELECT 1) Z(I)");
        assert_eq!(show(&working.query("INSERT INTO bookings (note) VALUES ('too')").await), "C(INSERT 0 1) Z(T)");
        assert!(process.runs());
        assert_eq!(show(&working.query("COMMIT").await), "C(COMMIT) Z(I)");
        for client in [&mut working, &mut sleeping] {
            assert_eq!(client.until(b'E').await.last().unwrap().code(), "57P01");
        }
        // Who has not even said who it is holds up nothing.
        assert_eq!(process.exit_code().await, Some(0));
        drop(nobody);
        let kept: i64 = clusters[0]
            .admin("tenants")
            .await
            .query_one("SELECT count(*) FROM client_001.bookings", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(kept, 2);
        assert!(!process.log().contains("panicked"), "{}", process.log());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sigterm_does_not_wait() {
    let clusters = cluster().await;
    let setup = Setup::new(&clusters, "");
    let mut process = setup.start().await;
    let mut working = world::raw(setup.port, "client_001", &[]).await.ok().unwrap();
    let mut idle = world::raw(setup.port, "client_001", &[]).await.ok().unwrap();
    working.query("BEGIN").await;
    process.signal(Signal::SIGTERM);
    // The first one has arrived.
    assert_eq!(idle.until(b'E').await.last().unwrap().code(), "57P01");
    assert!(process.runs());
    process.signal(Signal::SIGTERM);
    process.exit_code().await;
    assert!(working.is_closed().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_timeout_ends_the_wait() {
    let clusters = cluster().await;
    let setup = Setup::new(&clusters, "[proxy]\nshutdown_timeout = \"1s\"\n");
    let mut process = setup.start().await;
    let mut working = world::raw(setup.port, "client_001", &[]).await.ok().unwrap();
    working.query("BEGIN").await;
    process.signal(Signal::SIGTERM);
    assert_eq!(process.exit_code().await, Some(0));
    assert!(working.is_closed().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_takes_over_users_and_keeps_what_is_good() {
    let clusters = cluster().await;
    let setup = Setup::new(&clusters, "");
    let mut process = setup.start().await;
    let mut open = world::raw(setup.port, "client_001", &[]).await.ok().unwrap();
    let login = async || Raw::login(setup.port, &[("user", "second.client_001")], "another-secret").await;
    assert_eq!(login().await.err().unwrap().error.code(), "28P01");
    let text = std::fs::read_to_string(setup.file()).unwrap();
    // A mistake changes nothing.
    std::fs::write(setup.file(), format!("{text}\n[[users]]\nname = \"second\"\npasword = \"x\"\n")).unwrap();
    process.signal(Signal::SIGHUP);
    let began = Instant::now();
    while !process.log().contains("pasword") {
        assert!(began.elapsed() < PATIENCE, "{}", process.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(process.runs());
    assert_eq!(login().await.err().unwrap().error.code(), "28P01");
    let user = "[[users]]\nname = \"second\"\npassword = \"another-secret\"\ntenants = [\"client_001\"]\n";
    std::fs::write(setup.file(), format!("{text}\n{user}")).unwrap();
    process.signal(Signal::SIGHUP);
    let began = Instant::now();
    while login().await.is_err() {
        assert!(began.elapsed() < PATIENCE, "{}", process.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(open.value("SELECT 1").await, "1");
    // And gone again.
    std::fs::write(setup.file(), text).unwrap();
    process.signal(Signal::SIGHUP);
    let began = Instant::now();
    while login().await.is_ok() {
        assert!(began.elapsed() < PATIENCE, "{}", process.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
