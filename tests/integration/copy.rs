//! COPY both ways, rows of any size, function calls.

use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use pgusher::config::PoolMode;

use crate::raw::show;
use crate::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn copy_in_and_out_by_a_driver() {
    for mode in [PoolMode::Auto, PoolMode::Session, PoolMode::Transaction] {
        let world = World::start(|config| config.pool.pool_mode = mode).await;
        let client = world.client("client_001").await;
        let sink = client.copy_in("COPY things FROM stdin").await.unwrap();
        let mut sink = std::pin::pin!(sink);
        let mut chunk = BytesMut::new();
        for n in 0..50_000 {
            chunk.put_slice(format!("{n}\tvalue {n}\n").as_bytes());
            if chunk.len() > 60_000 {
                sink.send(chunk.split().freeze()).await.unwrap();
            }
        }
        sink.send(chunk.freeze()).await.unwrap();
        assert_eq!(sink.finish().await.unwrap(), 50_000);
        let stream = client.copy_out("COPY (SELECT * FROM things ORDER BY k) TO stdout").await.unwrap();
        let rows: Vec<_> = stream.map(Result::unwrap).collect().await;
        let text = rows.concat();
        assert_eq!(text.iter().filter(|&&b| b == b'\n').count(), 50_000);
        assert!(text.ends_with(b"49999\tvalue 49999\n"));
        // An error in the middle, and the client that gives up.
        let sink = client.copy_in("COPY things FROM stdin").await.unwrap();
        let mut sink = std::pin::pin!(sink);
        sink.send(bytes::Bytes::from_static(b"100000\tx\n0\ttwice\n")).await.unwrap();
        assert_eq!(sink.finish().await.unwrap_err().code().unwrap().code(), "23505");
        let sink = client.copy_in::<_, bytes::Bytes>("COPY things FROM stdin").await.unwrap();
        drop(sink);
        let row = client.query_one("SELECT count(*) FROM things", &[]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 50_000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_that_fails_leaves_the_conversation_in_step() {
    for mode in [PoolMode::Auto, PoolMode::Session, PoolMode::Transaction] {
        let world = World::start(|config| {
            config.pool.pool_mode = mode;
            config.pool.default_pool_size = 1;
        })
        .await;
        let mut raw = world.raw("client_001").await;
        // Simple: everything at once, before anybody knows that the server does not want it.
        for (sql, code) in [("COPY no_such FROM stdin", "42P01"), ("COPY things FROM stdin", "22P02")] {
            raw.compose(|b| {
                b.query(sql);
                b.copy_data(b"not a number\tx\n");
                b.copy_data(b"1\tx\n");
                b.copy_done();
            })
            .await;
            let answer = show(&raw.until_ready().await);
            assert_eq!(answer.trim_start_matches("G "), format!("E({code}) Z(I)"), "{mode:?}");
            assert_eq!(raw.value("SELECT 5").await, "5");
        }
        // Stray COPY messages are ignored, as on a server.
        raw.compose(|b| {
            b.copy_data(b"stray");
            b.copy_done();
            b.message(b'f', b"stray\0");
            b.query("SELECT 6");
            b.copy_done();
            b.extended("SELECT 7", &[]);
        })
        .await;
        assert_eq!(show(&raw.until_ready().await), "D(6) C(SELECT 1) Z(I)", "{mode:?}");
        assert_eq!(show(&raw.until_ready().await), "1 2 D(7) C(SELECT 1) Z(I)", "{mode:?}");
        // Within a group, with COPY messages that nobody wants.
        raw.compose(|b| {
            b.parse("", "SELECT 8");
            b.bind("", "", &[]);
            b.execute("");
            b.copy_data(b"stray");
            b.copy_done();
            b.parse("", "SELECT 9");
            b.bind("", "", &[]);
            b.execute("");
            b.sync();
        })
        .await;
        assert_eq!(show(&raw.until_ready().await), "1 2 D(8) C(SELECT 1) 1 2 D(9) C(SELECT 1) Z(I)", "{mode:?}");
        // Extended, good and bad, with the Sync at the right place and at every driver's favourite wrong one.
        for (data, answer) in [(&b"1\tx\n"[..], "1 2 G C(COPY 1) Z(I)"), (b"bad\tx\n", "1 2 G E(22P02) Z(I)")] {
            for early_sync in [false, true] {
                raw.query("TRUNCATE things").await;
                raw.compose(|b| {
                    b.parse("", "COPY things FROM stdin");
                    b.bind("", "", &[]);
                    b.execute("");
                    if early_sync { b.sync() } else { b.flush() }
                })
                .await;
                let mut said = raw.until(b'G').await;
                raw.compose(|b| {
                    b.copy_data(data);
                    b.copy_done();
                    b.sync();
                })
                .await;
                said.extend(raw.until_ready().await);
                assert_eq!(show(&said), answer, "{mode:?} {early_sync}");
                assert_eq!(raw.value("SELECT 10").await, "10");
            }
        }
        // The client's own failure.
        raw.compose(|b| b.query("COPY things FROM stdin")).await;
        raw.until(b'G').await;
        raw.compose(|b| b.message(b'f', b"changed my mind\0")).await;
        assert_eq!(show(&raw.until_ready().await), "E(57014) Z(I)");
        // COPY in both directions and statements around it, in one Query.
        raw.compose(|b| {
            b.query(
                "COPY things FROM stdin; SELECT count(*) FROM things; COPY things TO stdout; COPY things FROM stdin",
            );
            b.copy_data(b"21\ta\n");
            b.copy_done();
            b.copy_data(b"22\tb\n");
            b.copy_done();
        })
        .await;
        let said = show(&raw.until_ready().await);
        assert_eq!(said, "G C(COPY 1) D(1) C(SELECT 1) H d c C(COPY 1) G C(COPY 1) Z(I)", "{mode:?}");
        assert_eq!(raw.value("SELECT count(*) FROM things").await, "2");
    }
}

/// The end of the data may reach the server before, between and after its error and its ReadyForQuery.
#[tokio::test(flavor = "multi_thread")]
async fn copy_whose_end_races_with_its_error() {
    for mode in [PoolMode::Auto, PoolMode::Session, PoolMode::Transaction] {
        let world = World::start(|config| {
            config.pool.pool_mode = mode;
            config.pool.default_pool_size = 1;
        })
        .await;
        let mut raw = world.raw("client_001").await;
        for round in 0..300 {
            raw.compose(|b| b.query("COPY things FROM stdin")).await;
            raw.until(b'G').await;
            raw.compose(|b| b.copy_data(b"bad\tx\n")).await;
            // Busy: a timer is too coarse.
            let began = std::time::Instant::now();
            while began.elapsed() < Duration::from_micros(round * 3) {
                std::hint::spin_loop();
            }
            raw.compose(|b| b.copy_done()).await;
            assert_eq!(show(&raw.until_ready().await), "E(22P02) Z(I)", "{mode:?} {round}");
            let said = show(&raw.query("SELECT 5").await);
            assert_eq!(said, "D(5) C(SELECT 1) Z(I)", "{mode:?} {round}");
        }
        raw.terminate().await;
        let mut next = world.raw("client_001").await;
        assert_eq!(next.value("SELECT 5").await, "5");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_rows_go_through_both_ways() {
    let world = World::transaction(|_| {}).await;
    let client = world.client("client_001").await;
    let size = 30_000_000;
    let row = client.query_one("SELECT repeat('x', $1)", &[&size]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0).len(), 30_000_000);
    let value = "y".repeat(20_000_000);
    let row = client.query_one("SELECT length($1::text), md5($1::text) = md5(repeat('y', 20000000))", &[&value]).await;
    let row = row.unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, bool>(1)), (20_000_000, true));
    let literal = format!("SELECT length('{value}')");
    client.batch_execute(&literal).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn function_calls_are_for_large_objects_only() {
    for mode in [PoolMode::Auto, PoolMode::Session, PoolMode::Transaction] {
        let world = World::start(|config| config.pool.pool_mode = mode).await;
        let mut raw = world.raw("client_001").await;
        let call = |oid: u32, arguments: &[&[u8]]| {
            let mut body = BytesMut::new();
            body.put_u32(oid);
            body.put_slice(&[0, 1, 0, 1]);
            body.put_u16(u16::try_from(arguments.len()).unwrap());
            for argument in arguments {
                body.put_u32(u32::try_from(argument.len()).unwrap());
                body.put_slice(argument);
            }
            body.put_u16(1);
            body
        };
        // set_config(text, text, bool); nothing at all; and what is left after a refusal.
        for body in [call(2078, &[b"role", b"x", &[0]]), BytesMut::new(), call(1, &[])] {
            raw.compose(|b| b.message(b'F', &body)).await;
            assert_eq!(show(&raw.until_ready().await), "E(42501) Z(I)", "{mode:?}");
        }
        raw.query("BEGIN").await;
        raw.compose(|b| b.message(b'F', &call(2078, &[b"role", b"x", &[0]]))).await;
        assert_eq!(show(&raw.until_ready().await), "E(42501) Z(E)");
        raw.query("ROLLBACK").await;
        // lo_creat(-1): the fast path itself works; whether large objects are granted is the server's word.
        raw.compose(|b| b.message(b'F', &call(957, &[&(-1_i32).to_be_bytes()]))).await;
        let answer = show(&raw.until_ready().await);
        assert!(["V Z(I)", "E(42501) Z(I)"].contains(&answer.as_str()), "{answer}");
        assert_eq!(raw.value("SELECT 5").await, "5");
    }
}

/// A Sync between CopyData and CopyDone: a server in COPY ignores it, one whose COPY has failed by then answers it. If the
/// Sync was on its way when the COPY failed, the proxy cannot know how many answers will come, and ends the connection
/// rather than give it to the next client; if it came later, both Syncs are answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_sync_in_the_middle_of_copy_data_that_fails_leaves_nothing_to_the_next_client() {
    let world = World::transaction(|_| {}).await;
    let mut raw = world.raw("client_001").await;
    raw.compose(|b| {
        b.parse("", "COPY things FROM stdin");
        b.bind("", "", &[]);
        b.execute("");
        b.copy_data(b"bad\tx\n");
        b.sync();
        b.copy_done();
        b.sync();
    })
    .await;
    // The answer to the first Sync, if there is one, is for nobody.
    let mut said = Vec::new();
    while !said.iter().any(|message: &crate::raw::Message| message.tag == b'Z') {
        let Some(message) = raw.next().await else { break };
        said.push(message);
    }
    let said = show(&said);
    assert!(said.ends_with("E(22P02) E(08P01)"), "{said}");
    let mut next = world.raw("client_001").await;
    assert_eq!(next.value("SELECT 1").await, "1");
}
