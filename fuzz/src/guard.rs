//! SQL text, as the scan, the guard and the tracker of session state read it.
//!
//! Input: a byte of choices (how the session reads text, what a tenant's neighbours are), then the text.

use pgusher::config::PoolMode;
use pgusher::relay::guard::{Neighbours, Seat, fingerprint, judge};
use pgusher::relay::lex::{Lex, Token, tokens};
use pgusher::relay::session::Session;
use pgusher::relay::{scan, track};

use super::Input;

/// Tenants are `client_000` to `client_999`; the one who speaks is `client_001`.
fn is_tenant(name: &str) -> bool {
    name.len() == 10
        && name.starts_with("client_")
        && name[7..].bytes().all(|b| b.is_ascii_digit())
        && name != "client_001"
}

fn is_name(name: &[u8]) -> bool {
    std::str::from_utf8(name).is_ok_and(is_tenant)
}

/// What ends every statement, whatever state it is in but inside of something.
const END: &[u8] = b"\n;";

/// Nothing, in many words.
const NOTHING: [&[u8]; 5] =
    [b"/* ' /* \" */ $$ */", b"-- ' \" $$ /*\n", b" \t\r\n\x0b\x0c", b"-- \r", b"/**/--\n/* ; */ "];

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let choices = input.byte();
    let sql = input.0;
    let encoding = ["UTF8", "SJIS", "BIG5", "JOHAB", "GB18030", "UTF8", "UTF8", "UTF8"][usize::from(choices & 7)];
    let lex = Lex::new(Some(if choices & 8 == 0 { "on" } else { "off" }), Some(encoding));
    let kinds = [Neighbours::Schemas, Neighbours::Databases, Neighbours::Rows, Neighbours::None];
    let neighbours = kinds[usize::from(choices >> 4 & 3)];
    let all = read(sql, lex, neighbours);
    let Reading { seen, refused, .. } = &all;
    if let Some(what) = refused {
        assert!(seen.suspicious, "the scan lets pass what the guard refuses: {what}");
        assert_ne!(neighbours, Neighbours::None);
    }
    let nothing = NOTHING[usize::from(choices >> 6) + usize::from(choices & 1)];
    let front = [nothing, sql].concat();
    // Where the reading stops depends on the length.
    if front.len() < 200 << 10 {
        assert!(all == read(&front, lex, neighbours), "something changes behind {}", nothing.escape_ascii());
    }
    for word in ["listen", "set"] {
        assert_eq!(scan::begins_with(sql, word.as_bytes()), scan::begins_with(&front, word.as_bytes()));
    }
    behind(sql, lex, neighbours);
    before(sql, lex, neighbours);
    let _ = Session::new(1, PoolMode::Auto, 1);
}

#[derive(PartialEq)]
struct Reading {
    seen: scan::Seen,
    leaves_state: bool,
    refused: Option<String>,
    residue: (Vec<Box<str>>, bool),
    fingerprint: String,
}

fn read(sql: &[u8], lex: Lex, neighbours: Neighbours) -> Reading {
    let seen = scan::look(&lex.narrow(sql), lex, is_name);
    let seat = Seat { role: "client_001", neighbours, is_tenant: &is_tenant };
    let residue = track::look(sql, lex);
    Reading {
        seen,
        leaves_state: scan::leaves_state(sql),
        refused: judge(sql, lex, &seat).map(|refusal| refusal.what().to_owned()),
        residue: (residue.settings, residue.unknown),
        fingerprint: fingerprint(sql, lex),
    }
}

/// A statement behind the text is seen for what it is, if it is not inside of something.
fn behind(sql: &[u8], lex: Lex, neighbours: Neighbours) {
    let count = tokens(sql, lex).len();
    for (statement, refused) in [("SET zz.q = 1", false), ("SET ROLE client_002", true)] {
        let text = [sql, END, statement.as_bytes()].concat();
        let found = tokens(&text, lex);
        let alone = tokens(statement.as_bytes(), lex);
        let apart =
            found.len() == count + 1 + alone.len() && found[count] == Token::Sign(b';') && found[count + 1..] == alone;
        if apart && text.len() < 200 << 10 {
            noticed(&text, lex, neighbours, refused, sql.is_ascii() && !lex.backslashes);
        }
    }
}

/// So is one in front of it, always.
fn before(sql: &[u8], lex: Lex, neighbours: Neighbours) {
    for (statement, refused) in [("SET zz.q = 1", false), ("SET ROLE client_002", true)] {
        let text = [statement.as_bytes(), END, sql].concat();
        if text.len() < 200 << 10 {
            noticed(&text, lex, neighbours, refused, sql.is_ascii() && !lex.backslashes);
        }
    }
}

fn noticed(text: &[u8], lex: Lex, neighbours: Neighbours, refused: bool, plain: bool) {
    let all = read(text, lex, neighbours);
    let shown = || text.escape_ascii().to_string();
    assert!(all.seen.leaves_state, "state is left behind: {}", shown());
    assert!(!plain || all.leaves_state, "state is left behind, without a guard: {}", shown());
    let (settings, unknown) = &all.residue;
    assert!(*unknown || refused || settings.iter().any(|name| &**name == "zz.q"), "{settings:?}: {}", shown());
    assert!(*unknown || !refused, "a role is no setting that is carried: {}", shown());
    if refused && neighbours != Neighbours::None {
        assert!(all.refused.is_some(), "let through: {}", shown());
    }
}
