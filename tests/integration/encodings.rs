//! Clients with different encodings on one server connection: what one has set is neither changed nor read otherwise.

use pgusher::config::PoolMode;

use crate::raw::{Raw, show};
use crate::world::World;

async fn one_connection() -> World {
    World::start(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 1;
    })
    .await
}

/// A simple query of these bytes, which must not fail.
async fn bytes(client: &mut Raw, sql: &[u8]) {
    let sql = [sql, b"\0"].concat();
    client.compose(|b| b.message(b'Q', &sql)).await;
    let answer = client.until_ready().await;
    assert!(!answer.is_empty() && !answer.iter().any(|m| m.tag == b'E'), "{}: {}", sql.escape_ascii(), show(&answer));
}

/// A setting's value as UTF-8, whatever the client's encoding is.
async fn setting(client: &mut Raw, name: &str) -> String {
    let hex = client
        .value(&format!("SELECT coalesce(encode(convert_to(current_setting('{name}', true), 'UTF8'), 'hex'), '')"))
        .await;
    let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    String::from_utf8((0..hex.len()).step_by(2).map(byte).collect()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn values_mean_the_same_in_every_clients_encoding() {
    let world = one_connection().await;
    // Encoding, value, and how that is written there.
    let written: [(&str, &str, &[u8]); 5] = [
        ("UTF8", "Jos\u{e9} \u{3041}\\'", "Jos\u{e9} \u{3041}\\'".as_bytes()),
        ("LATIN1", "Jos\u{e9}", b"Jos\xe9"),
        // These bytes would be UTF-8, too.
        ("LATIN1", "Jos\u{c3}\u{a9}", b"Jos\xc3\xa9"),
        ("SJIS", "\u{8868}\\", b"\x95\x5c\\"),
        ("GBK", "\u{4e57}'", b"\x81\x5c'"),
    ];
    let mut clients = Vec::new();
    for (encoding, value, text) in written {
        let mut client = world.raw("client_001").await;
        bytes(&mut client, format!("SET client_encoding = '{encoding}'").as_bytes()).await;
        bytes(&mut client, &[b"SET app.name = $x$", text, b"$x$"].concat()).await;
        // What the text does not tell is asked in another way.
        bytes(&mut client, b"DO 'BEGIN END'").await;
        clients.push((client, encoding, value));
    }
    for _ in 0..2 {
        for (client, encoding, value) in &mut clients {
            assert_eq!(setting(client, "app.name").await, *value, "{encoding}");
            assert_eq!(setting(client, "client_encoding").await, *encoding);
        }
        clients.reverse();
    }
    // One that cannot be said in the client's encoding is kept all the same.
    for (client, ..) in &mut clients {
        bytes(client, b"SELECT set_config('app.name', convert_from('\\xe29883', 'UTF8'), false) IS NULL").await;
    }
    for (client, encoding, _) in &mut clients {
        assert_eq!(setting(client, "app.name").await, "\u{2603}", "{encoding}");
    }
    assert_eq!(world.server_processes().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_value_gets_out_of_its_literal_in_the_encoding_of_the_client_before() {
    let world = one_connection().await;
    let (mut one, mut two) = (world.raw("client_001").await, world.raw("client_001").await);
    // In GBK the second of the three bytes' last one and the backslash are one character.
    let value = "\u{3041}\\', false), pg_catalog.set_config($$app.role$$, $$admin$$, false) --";
    bytes(&mut one, format!("SET app.name = $x${value}$x$").as_bytes()).await;
    bytes(&mut two, b"SET client_encoding = 'GBK'; SET backslash_quote = on").await;
    assert_eq!(setting(&mut one, "app.role").await, "");
    assert_eq!(setting(&mut one, "app.name").await, value);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_cannot_be_read_keep_their_connection() {
    let world = World::start(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 3;
    })
    .await;
    let mut other = world.raw("client_001").await;
    for (name, encoding) in [(&b"caf\xe9"[..], "LATIN1"), (b"\x93\xfa", "SJIS")] {
        let mut client = world.raw("client_001").await;
        bytes(&mut client, format!("SET client_encoding = '{encoding}'").as_bytes()).await;
        bytes(&mut client, &[b"SET \"", name, b".x\" = 'kept'"].concat()).await;
        bytes(&mut client, &[b"LISTEN \"", name, b"\""].concat()).await;
        bytes(&mut client, b"DO 'BEGIN END'").await;
        other.query("SELECT 1").await;
        bytes(&mut client, &[b"NOTIFY \"", name, b"\""].concat()).await;
        let sql = [b"SELECT current_setting('", name, b".x')\0"].concat();
        client.compose(|b| b.message(b'Q', &sql)).await;
        let answer = client.until_ready().await;
        let row = answer.iter().find(|m| m.tag == b'D');
        assert_eq!(row.map(|row| row.values().concat()).as_deref(), Some("kept"), "{encoding}: {}", show(&answer));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reported_value_that_is_not_ascii_is_kept() {
    let world = World::start(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 2;
    })
    .await;
    let (mut client, mut other) = (world.raw("client_001").await, world.raw("client_001").await);
    bytes(&mut client, b"SET client_encoding = 'LATIN1'").await;
    bytes(&mut client, b"SET TimeZone = '\xe9\xe9\xe95'").await;
    for _ in 0..2 {
        other.query("SELECT 1").await;
        assert_eq!(setting(&mut client, "TimeZone").await, "\u{e9}\u{e9}\u{e9}5");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_finds_its_path_again_in_another_encoding() {
    let world = World::start(|config| {
        config.pool.pool_mode = PoolMode::Auto;
        config.pool.default_pool_size = 1;
        config.pool.max_prepared_statements = 1;
    })
    .await;
    let (mut client, mut other) = (world.raw("client_001").await, world.raw("client_001").await);
    bytes(&mut client, b"SET client_encoding = 'SJIS'").await;
    // U+3041, whose last byte in UTF-8 and a quote behind it would be half a character.
    bytes(&mut client, b"SET search_path = \"\x82\x9f\"").await;
    client.compose(|b| (b.parse("p", "SELECT 'found'"), b.sync()).1).await;
    client.until_ready().await;
    bytes(&mut client, b"SET search_path = public").await;
    other.compose(|b| (b.parse("p", "SELECT 1"), b.sync()).1).await;
    other.until_ready().await;
    client.compose(|b| (b.bind("", "p", &[]), b.execute(""), b.sync()).2).await;
    let answer = client.until_ready().await;
    let row = answer.iter().find(|m| m.tag == b'D');
    assert_eq!(row.map(|row| row.values().concat()).as_deref(), Some("found"), "{}", show(&answer));
    assert_eq!(setting(&mut client, "search_path").await, "public");
}
