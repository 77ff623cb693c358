//! Whether a text names another tenant, wherever and however. No I/O.
//!
//! It says nothing about right or wrong: a tenant may write another's name into a row. It counts only for what the
//! server has refused ([`watch`](super::watch)).

use super::lex::{Lex, Token, tokens};

/// Words behind which a name without a dot is a role, a schema or a database.
const BEFORE: &[&str] =
    &["authorization", "by", "database", "for", "group", "owner", "role", "schema", "template", "to", "user"];
/// Statements in which every name may be one.
const ABOUT: &[&str] = &["grant", "reassign", "revoke", "set"];

/// Looks at SQL, token by token: at qualified names, at names where roles, schemas and databases stand, and at every
/// word of a literal, which may be a statement or a part of one.
pub fn in_sql(sql: &[u8], lex: Lex, is_tenant: &dyn Fn(&str) -> bool) -> bool {
    let tokens = tokens(sql, lex);
    let statements = tokens.split(|token| *token == Token::Sign(b';'));
    statements.into_iter().any(|statement| statement_names(statement, is_tenant))
}

fn statement_names(tokens: &[Token], is_tenant: &dyn Fn(&str) -> bool) -> bool {
    let about = tokens.first().is_some_and(|t| ABOUT.iter().any(|word| t.is(word)));
    let place = |at: usize| {
        let qualified = tokens.get(at + 1) == Some(&Token::Sign(b'.'));
        // Where the list begins that the name may be in.
        let mut start = at;
        while start >= 2 && tokens[start - 1] == Token::Sign(b',') && !matches!(tokens[start - 2], Token::Sign(_)) {
            start -= 2;
        }
        let before = tokens[..start].last();
        about || qualified || before.is_some_and(|t| BEFORE.iter().any(|word| t.is(word)))
    };
    tokens.iter().enumerate().any(|(at, token)| match token {
        Token::Word(name) | Token::Quoted(name) => place(at) && is_tenant(name),
        Token::Text(text) => is_tenant(text) || in_bytes(text.as_bytes(), is_tenant),
        _ => false,
    })
}

/// Looks at every word in whatever it is.
pub fn in_bytes(bytes: &[u8], is_tenant: &dyn Fn(&str) -> bool) -> bool {
    let of_a_name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    let is_tenant = |word: &[u8]| {
        let fits = !word.is_empty() && word.len() <= super::lex::MAX_NAME;
        fits && std::str::from_utf8(word).is_ok_and(|word| is_tenant(&word.to_ascii_lowercase()))
    };
    bytes.split(|b| !of_a_name(b)).filter(|word| !word.is_empty()).any(|word| {
        // `a-b` is a name, and may be a difference.
        is_tenant(word) || (word.contains(&b'-') && word.split(|b| *b == b'-').any(is_tenant))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_tenant(name: &str) -> bool {
        matches!(name, "client_002" | "note" | "new-york")
    }

    #[test]
    fn names_count_where_they_can_reach() {
        for (sql, expected) in [
            ("SELECT * FROM client_002.bookings", true),
            ("SELECT * FROM \"client_002\" . bookings", true),
            ("SELECT query_to_xml('select note from client_002.bookings', true, true, '')", true),
            ("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'client_002'", true),
            ("UPDATE pg_settings SET setting = 'client_002' WHERE name = 'app.tenant_id'", true),
            ("DO $$ BEGIN EXECUTE 'SET search_' || 'path = client_002'; END $$", true),
            ("SET search_path = a, client_002", true),
            ("SET search_path = U&\"client\\005F002\"", true),
            ("SET \"SEARCH_PATH\" = client_002", true),
            ("CREATE DATABASE stolen TEMPLATE client_002", true),
            ("DROP OWNED BY client_002", true),
            ("GRANT SELECT ON t TO client_002", true),
            ("SELECT 'new-york'", true),
            ("SELECT 'x-client_002'", true),
            ("SELECT note FROM bookings", false),
            ("SELECT client_002 FROM bookings", false),
            ("SELECT 'client_0022', 'xclient_002'", false),
            ("SELECT 1 -- client_002.bookings", false),
        ] {
            assert_eq!(in_sql(sql.as_bytes(), Lex::default(), &is_tenant), expected, "{sql}");
        }
        assert!(in_bytes(b"\0\0\0\x0aclient_002\0", &is_tenant));
        assert!(!in_bytes(b"\0\0\0\x0bclient_0022\0", &is_tenant));
    }
}
