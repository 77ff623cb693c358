//! From a client's first byte to its greeting.

use std::time::{Duration, Instant};

use pgusher::config::AuthType;

use crate::raw::{Raw, V3_0, V3_2, show, startup_packet};
use crate::world::{APP_PASSWORD, World, told};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_before_the_proof_is_one_answer() {
    let world = World::start(|_| {}).await;
    world.client("client_001").await;
    let mut answers = Vec::new();
    for user in ["app.client_001", "app", "client_001", "client_999", "nobody", "nobody.client_001", "app.UPPER CASE!"]
    {
        let parameters = [("user", user), ("database", "client_001")];
        let refused = Raw::login(world.port, &parameters, "wrong").await.err().unwrap();
        assert_eq!(refused.error.field(b'M'), format!("password authentication failed for user \"{user}\""));
        let others = b"SVCDHWR".map(|field| refused.error.field(field));
        answers.push((refused.transcript, others));
    }
    assert_eq!(answers[0].0, "R10(SCRAM-SHA-256)R11E");
    assert_eq!(answers[0].1[..3], ["FATAL", "FATAL", "28P01"]);
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:?}");

    // After the proof, errors are precise.
    for (user, database, code) in
        [("app", "postgres", "28000"), ("app.client_001", "elsewhere", "3D000"), ("app.no such", "postgres", "28P01")]
    {
        let refused = Raw::login(world.port, &[("user", user), ("database", database)], APP_PASSWORD).await.err();
        let refused = refused.unwrap_or_else(|| panic!("{user} was let in"));
        assert_eq!(refused.error.code(), code, "{user} {}", refused.error.field(b'M'));
    }
}

/// The challenge for a name that does not exist is as constant as a stored verifier's.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_users_challenge_is_the_same_each_time() {
    let world = World::start(|_| {}).await;
    let challenge = async |user: &str| {
        let mut raw = Raw::tcp(world.port).await;
        raw.send(&startup_packet(V3_0, &[("user", user), ("database", "x")])).await;
        raw.next().await.unwrap();
        let mut first = b"SCRAM-SHA-256\0".to_vec();
        let client_first = b"n,,n=,r=abcdefghijklmnopqrstuvwx";
        first.extend(u32::try_from(client_first.len()).unwrap().to_be_bytes());
        first.extend(client_first);
        raw.compose(|b| b.message(b'p', &first)).await;
        let answer = raw.next().await.unwrap();
        let text = String::from_utf8(answer.body[4..].to_vec()).unwrap();
        text.split_once(",s=").unwrap().1.to_owned()
    };
    let (one, two) = (challenge("nobody").await, challenge("somebody").await);
    assert_eq!(one, challenge("nobody").await);
    assert_ne!(one, two);
    // As long a salt and as many rounds as a real one.
    let real = challenge("app").await;
    let shape = |text: &str| text.split(",i=").map(|p| p.len()).collect::<Vec<_>>();
    assert_eq!(shape(&one), shape(&real));
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_asks_for_no_proof_and_still_knows_who_exists() {
    let world = World::start(|config| config.auth.auth_type = AuthType::Trust).await;
    let mut raw = Raw::tcp(world.port).await;
    let transcript = raw.start(V3_0, &[("user", "app.client_001"), ("database", "client_001")], "").await.unwrap();
    assert!(transcript.starts_with("R0S"), "{transcript}");
    assert_eq!(raw.value("SELECT current_user").await, "client_001");
    let refused = Raw::login(world.port, &[("user", "nobody")], "").await.err().unwrap();
    assert_eq!((refused.error.code().as_str(), refused.transcript.as_str()), ("28P01", "E"));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_beyond_the_limit_are_told_so_and_places_become_free() {
    let world = World::start(|config| config.proxy.max_client_conn = 2).await;
    let one = world.raw("client_001").await;
    let _two = world.raw("client_001").await;
    let refused = crate::world::raw(world.port, "client_001", &[]).await.err().unwrap();
    assert_eq!(refused.error.code(), "53300");
    assert!(refused.error.field(b'H').contains("max_client_conn"));
    one.terminate().await;
    world.metric_until("pgusher_clients{state=\"idle\"}", 1.0).await;
    world.raw("client_001").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_slow_to_log_in_is_gone_in_time() {
    let timeout = Duration::from_millis(1500);
    let world = World::start(|config| config.proxy.client_login_timeout = timeout).await;
    let packet = startup_packet(V3_0, &[("user", "app.client_001"), ("database", "client_001")]);
    let began = Instant::now();
    // Nothing at all; a byte now and then; a startup packet and then nothing; and then a byte now and then.
    let mut silent = Raw::tcp(world.port).await;
    let mut dripping = Raw::tcp(world.port).await;
    let mut half = Raw::tcp(world.port).await;
    half.send(&packet).await;
    let mut dripping_later = Raw::tcp(world.port).await;
    dripping_later.send(&packet).await;
    let drip = async {
        for byte in packet.iter().take(50) {
            dripping.send(&[*byte]).await;
            dripping_later.send(b"p").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let ends = async { (silent.is_closed().await, half.until(b'E').await, half.is_closed().await) };
    let ((_, last, _), ()) = tokio::join!(ends, drip);
    assert_eq!(last.last().unwrap().code(), "28000", "{}", show(&last));
    assert!(dripping.is_closed().await && dripping_later.is_closed().await);
    assert!(began.elapsed() >= timeout);
    world.metric_until("pgusher_clients{state=\"idle\"}", 0.0).await;
    world.client("client_001").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn newer_protocols_are_negotiated() {
    let world = World::start(|_| {}).await;
    let who = [("user", "app.client_001"), ("database", "client_001")];
    let with_option = [who[0], who[1], ("_pq_.unheard_of", "1")];
    // 3.0: 4 bytes of secret, as ever. 3.2: more.
    let mut old = Raw::tcp(world.port).await;
    assert!(!old.start(V3_0, &who, APP_PASSWORD).await.unwrap().contains('v'));
    assert_eq!(old.secret.len(), 4);
    let mut new = Raw::tcp(world.port).await;
    assert!(!new.start(V3_2, &who, APP_PASSWORD).await.unwrap().contains('v'));
    assert!(new.secret.len() > 4);
    // Newer than we know, and options that we do not know.
    for (version, parameters) in [(0x0003_0009, &who[..]), (V3_2, &with_option), (V3_0, &with_option)] {
        let mut raw = Raw::tcp(world.port).await;
        let transcript = raw.start(version, parameters, APP_PASSWORD).await.unwrap();
        assert!(transcript.starts_with('v'), "{version:x} {transcript}");
        assert_eq!(raw.value("SELECT 1").await, "1");
    }
    for version in [0x0002_0000, 0x0004_0000] {
        let mut raw = Raw::tcp(world.port).await;
        let refused = raw.start(version, &who, APP_PASSWORD).await.err().unwrap();
        assert_eq!(refused.error.code(), "0A000");
    }
    // The long key works.
    new.compose(|b| b.query("SELECT pg_sleep(30)")).await;
    world.admin_until("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'", 1).await;
    crate::raw::cancel(world.port, new.pid, &new.secret).await;
    assert_eq!(show(&new.until_ready().await), "E(57014) Z(I)");
}

#[tokio::test(flavor = "multi_thread")]
async fn startup_settings_are_what_reset_returns_to() {
    for transaction in [false, true] {
        let world = World::start(|config| {
            if transaction {
                config.pool.pool_mode = pgusher::config::PoolMode::Transaction;
            }
        })
        .await;
        let parameters = [
            ("statement_timeout", "12345"),
            ("DATESTYLE", "German"),
            ("options", "-c work_mem=1234kB --lock-timeout=77 -c my.var=a\\ b"),
            ("client_encoding", "'utf-8'"),
            ("TimeZone", "Asia/Tokyo"),
        ];
        let mut raw = world.raw_with("client_001", &parameters).await;
        let expected = [
            ("statement_timeout", "12345ms"),
            ("DateStyle", "German, DMY"),
            ("work_mem", "1234kB"),
            ("lock_timeout", "77ms"),
            ("my.var", "a b"),
            ("client_encoding", "UTF8"),
            ("TimeZone", "Asia/Tokyo"),
        ];
        for after in ["", "RESET ALL", "SET DateStyle TO DEFAULT", "DISCARD ALL"] {
            raw.query(after).await;
            for (name, value) in expected {
                assert_eq!(raw.value(&format!("SHOW {name}")).await, value, "{name} after {after:?}");
            }
        }
        assert_eq!(raw.params["client_encoding"], "UTF8");
        assert_eq!(raw.params["TimeZone"], "Asia/Tokyo");
        // Another client's settings are its own.
        let mut plain = world.raw("client_001").await;
        assert_eq!(plain.value("SHOW lock_timeout").await, "0");
        assert_ne!(plain.value("SHOW TimeZone").await, "Asia/Tokyo");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn search_path_may_name_the_tenants_own_schema() {
    let world = World::start(|_| {}).await;
    world.client("client_002").await;
    for own in ["client_001", "\"client_001\"", "client_001, public", "\"$user\""] {
        let mut raw = world.raw_with("client_001", &[("search_path", own)]).await;
        assert_eq!(raw.value("SELECT current_schema()").await, "client_001", "{own}");
        assert_eq!(raw.value("SELECT count(*) FROM bookings").await, "0");
    }
    let violations = "cross_tenant_isolation_violations{action=\"refused\",kind=\"startup\",tenant=\"client_001\"}";
    assert_eq!(world.metric(violations).await, 0.0);
    for foreign in ["client_002", "client_001,client_002", "\"CLIENT_001\", \"client_002\""] {
        for parameters in
            [("search_path", foreign.to_owned()), ("options", format!("-csearch_path={}", foreign.replace(' ', "\\ ")))]
        {
            let refused =
                crate::world::raw(world.port, "client_001", &[(parameters.0, &parameters.1)]).await.err().unwrap();
            assert_eq!(refused.error.code(), "42501", "{foreign} {}", refused.error.field(b'M'));
        }
    }
    assert_eq!(world.metric(violations).await, 6.0);
    for (name, value) in
        [("role", "client_002"), ("session_authorization", "client_002"), ("options", "-c role=client_002")]
    {
        let refused = crate::world::raw(world.port, "client_001", &[(name, value)]).await.err().unwrap();
        assert_eq!(refused.error.code(), "42501", "{name}");
    }
    assert_eq!(world.metric(violations).await, 9.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_place_that_can_name_a_tenant_does() {
    let world = World::start(|_| {}).await;
    for (user, database, more) in [
        ("app.client_001", "client_001", None),
        ("app@client_001", "postgres", None),
        ("app", "client_001", None),
        ("app", "postgres", Some(("options", "-c pgusher.tenant=client_001"))),
        ("app", "postgres", Some(("application_name", "tenant=client_001"))),
        ("app", "postgres", Some(("application_name", "client_001/worker"))),
    ] {
        let mut parameters = vec![("user", user), ("database", database)];
        parameters.extend(more);
        let mut raw = Raw::login(world.port, &parameters, APP_PASSWORD).await.unwrap_or_else(|r| {
            panic!("{parameters:?}: {}", r.error.field(b'M'));
        });
        assert_eq!(raw.value("SELECT current_user || ' ' || current_schema()").await, "client_001 client_001");
    }
    // Two that disagree are an error; so is none.
    let contradiction = [("user", "app.client_001"), ("options", "-c pgusher.tenant=client_002")];
    assert_eq!(Raw::login(world.port, &contradiction, APP_PASSWORD).await.err().unwrap().error.code(), "28000");
    assert_eq!(Raw::login(world.port, &[("user", "app")], APP_PASSWORD).await.err().unwrap().error.code(), "28000");
    // The tenant's own login, with the password that it was given.
    let password = pgusher::tenant::credential::client_password(crate::world::SECRET, "client_001");
    let mut own = Raw::login(world.port, &[("user", "client_001")], &password).await.unwrap();
    assert_eq!(own.value("SELECT current_user").await, "client_001");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unix_socket_serves_too() {
    let sockets = tempfile::tempdir().unwrap();
    let dir = sockets.path().to_owned();
    let world = World::start(|config| config.proxy.unix_socket_dir = Some(dir)).await;
    let path = world.server.addresses().unix.unwrap();
    let mut raw = Raw::over(tokio::net::UnixStream::connect(&path).await.unwrap());
    raw.send(b"\0\0\0\x08\x04\xd2\x16\x2f").await;
    assert_eq!(raw.byte().await, b'N');
    raw.start(V3_0, &[("user", "app.client_001")], APP_PASSWORD).await.unwrap();
    assert_eq!(raw.value("SELECT current_user").await, "client_001");
    raw.terminate().await;
    world.server.drain(Duration::from_secs(5)).await;
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_user_without_the_right_makes_no_tenant() {
    let world = World::start(|config| {
        config.users[0].auto_provision = false;
        config.users[0].tenants = vec!["client_*".into()];
    })
    .await;
    let error = crate::world::client(world.port, "client_001").await.err().unwrap();
    assert_eq!(told(&error), ("3D000".into(), "tenant \"client_001\" does not exist".into()));
    let error = crate::world::client(world.port, "other_001").await.err().unwrap();
    assert_eq!(told(&error).0, "42501");
}
