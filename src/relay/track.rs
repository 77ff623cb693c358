//! What SQL text that is not plainly harmless may change in a session. No I/O.
//!
//! [`scan::leaves_state`](super::scan::leaves_state) lets the common statement pass without coming here. For the rest
//! [`look`] names the settings that the text changes, if that is all it does; what the values are is asked of the
//! server afterwards, which knows about rollbacks, savepoints and every spelling. Whatever else the text does is
//! [`Residue::unknown`], and then the server is asked what it holds for the session.

use super::lex::{self, Lex, Token};
use crate::pool::residue::Residue;
use crate::pool::scope;

/// What running this text may leave behind.
pub fn look(sql: &[u8], lex: Lex) -> Residue {
    let mut residue = Residue::none();
    for statement in lex::tokens(sql, lex).split(|token| *token == Token::Sign(b';')) {
        residue.merge(&statement_residue(statement));
    }
    if residue.unknown {
        // It can be anywhere in what was not understood.
        residue.asks |= mentions(sql, b"currval") || mentions(sql, b"lastval");
        residue.seeds |= mentions(sql, b"seed");
        (residue.resets, residue.frees) = (true, true);
    }
    residue
}

/// Whether a statement that has the session's process id in it writes into a table.
pub fn stores(sql: &[u8], lex: Lex) -> bool {
    let writes = |tokens: &[Token]| {
        tokens.iter().enumerate().any(|(at, token)| match token {
            Token::Word(word) => match word.as_str() {
                "insert" | "into" | "merge" => true,
                // FOR UPDATE, FOR NO KEY UPDATE
                "update" => at.checked_sub(1).is_none_or(|at| !(tokens[at].is("for") || tokens[at].is("key"))),
                "as" => tokens.first().is_some_and(|first| first.is("create")),
                _ => false,
            },
            _ => false,
        })
    };
    lex::tokens(sql, lex).split(|token| *token == Token::Sign(b';')).any(writes)
}

fn mentions(sql: &[u8], word: &[u8]) -> bool {
    sql.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word))
}

fn statement_residue(tokens: &[Token]) -> Residue {
    let Some(Token::Word(first)) = tokens.first() else {
        return if tokens.is_empty() { Residue::none() } else { Residue::anything() };
    };
    let named = Residue::named;
    let frees = Residue { frees: true, ..Residue::none() };
    match first.as_str() {
        "begin" | "start" | "commit" | "end" | "rollback" | "abort" | "savepoint" | "release" | "show" | "fetch"
        | "move" | "lock" => Residue::none(),
        "drop" | "close" | "unlisten" | "deallocate" => frees,
        "discard" => match tokens.get(1) {
            Some(what) if what.is("plans") => Residue::none(),
            Some(what) if what.is("all") => Residue { resets: true, ..frees },
            _ => frees,
        },
        "set" => set(&tokens[1..]).unwrap_or_else(Residue::anything),
        "reset" => match &tokens[1..] {
            [Token::Word(a), Token::Word(b)] if a == "time" && b == "zone" => named(&["timezone"]),
            [Token::Word(all)] if all == "all" => Residue { resets: true, ..Residue::none() },
            // `role.x` is a setting like others.
            rest => match setting_name(rest) {
                Some((name, [])) if !matches!(&*name, "role" | "session_authorization") => named(&[&name]),
                _ => Residue::anything(),
            },
        },
        "declare" if !tokens.iter().any(|t| t.is("hold")) => calls(&tokens[1..]),
        "select" | "with" | "values" | "insert" | "update" | "delete" => calls(tokens),
        // It may set what is in no list.
        _ => anything_and(calls(tokens)),
    }
}

/// What comes behind SET.
fn set(tokens: &[Token]) -> Option<Residue> {
    let named = |names: &[&str]| Some(Residue::named(names));
    // Whatever it begins with: `local.x` is a setting.
    let dotted = tokens.get(1) == Some(&Token::Sign(b'.'));
    let words: Vec<&str> =
        tokens.iter().map_while(|t| if let Token::Word(w) = t { Some(w.as_str()) } else { None }).collect();
    match words.as_slice() {
        _ if dotted => assigned(tokens),
        ["session", ..] if tokens.get(2) == Some(&Token::Sign(b'.')) => assigned(&tokens[1..]),
        ["transaction" | "constraints", ..] => Some(Residue::none()),
        ["local", ..] => Some(local(&tokens[1..])),
        ["session", "characteristics", ..] => {
            named(&["default_transaction_isolation", "default_transaction_read_only", "default_transaction_deferrable"])
        }
        ["seed", ..] => Some(Residue { seeds: true, ..Residue::none() }),
        ["role", ..] | ["session", "authorization" | "role", ..] => None,
        ["session", ..] => set(&tokens[1..]),
        ["time", "zone", ..] => named(&["timezone"]),
        ["names", ..] => named(&["client_encoding"]),
        ["schema"] => named(&["search_path"]),
        ["xml", "option", ..] => named(&["xmloption"]),
        _ => assigned(tokens),
    }
}

/// `name = …`
fn assigned(tokens: &[Token]) -> Option<Residue> {
    let (name, rest) = setting_name(tokens)?;
    let assigns =
        matches!(rest.first(), Some(Token::Sign(b'='))) || rest.first().is_some_and(|t| t.is("to") || t.is("from"));
    assigns.then(|| Residue::named(&[&name]))
}

/// What comes behind SET LOCAL: over with the transaction.
fn local(tokens: &[Token]) -> Residue {
    let settings = set(tokens).map(|residue| residue.settings).unwrap_or_default();
    let (rescopes, rereads) =
        (settings.iter().any(|name| scope::has(name)), settings.iter().any(|name| scope::has_for_literals(name)));
    Residue { rescopes, rereads, ..Residue::none() }
}

/// `name` or `prefix.name`, and what comes behind it.
fn setting_name(tokens: &[Token]) -> Option<(String, &[Token])> {
    let part = |token: &Token| match token {
        Token::Word(word) => Some(word.clone()),
        Token::Quoted(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    };
    let mut name = part(tokens.first()?)?;
    let mut rest = &tokens[1..];
    while let [Token::Sign(b'.'), next, behind @ ..] = rest {
        name = format!("{name}.{}", part(next)?);
        rest = behind;
    }
    Some((name, rest))
}

/// A statement that may call `set_config('name', …)`; unknown if it does anything else that is not known to be harmless.
fn calls(tokens: &[Token]) -> Residue {
    let (mut residue, mut unknown) = (Residue::none(), false);
    for (at, token) in tokens.iter().enumerate() {
        let Some(name) = token.name() else { continue };
        unknown |= token.is("temp") || token.is("temporary") || name.starts_with("pg_temp");
        if tokens.get(at + 1) != Some(&Token::Sign(b'(')) || is_behind_into(tokens, at) {
            continue;
        }
        let qualified = at >= 2 && tokens[at - 1] == Token::Sign(b'.');
        let in_catalog = qualified && tokens[at - 2].is("pg_catalog");
        match (name, argument(tokens, at + 2)) {
            ("set_config", Some(Token::Text(name))) if !qualified || in_catalog => {
                residue.settings.push(name.to_ascii_lowercase().into());
            }
            ("set_config", Some(Token::Parameter(parameter))) if !qualified || in_catalog => {
                residue.parameters.push(*parameter);
            }
            _ if matches!(token, Token::Quoted(_)) => unknown = true,
            ("currval" | "lastval", _) if !qualified || in_catalog => residue.asks = true,
            ("setseed", _) if !qualified || in_catalog => residue.seeds = true,
            ("pg_advisory_unlock" | "pg_advisory_unlock_shared" | "pg_advisory_unlock_all", _) if !qualified => {
                residue.frees = true;
            }
            (word, _) if (!qualified || in_catalog) && super::scan::is_harmless_call(word.as_bytes()) => {}
            _ => unknown = true,
        }
    }
    if unknown { anything_and(residue) } else { residue }
}

fn anything_and(mut residue: Residue) -> Residue {
    residue.merge(&Residue::anything());
    residue
}

/// An argument that is nothing but this token, whatever it is cast to, if others follow.
fn argument(tokens: &[Token], at: usize) -> Option<&Token> {
    let behind = match tokens.get(at + 1..)? {
        [Token::Sign(b':'), Token::Sign(b':'), Token::Word(_), behind @ ..] => behind,
        behind => behind,
    };
    if behind.first()? == &Token::Sign(b',') { tokens.get(at) } else { None }
}

/// Whether the name that ends here is the table behind INTO, and a parenthesis behind it a list of columns.
fn is_behind_into(tokens: &[Token], mut at: usize) -> bool {
    while at >= 2 && tokens[at - 1] == Token::Sign(b'.') {
        at -= 2;
    }
    at > 0 && tokens[at - 1].is("into")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_found_by_name_in_every_ordinary_spelling() {
        for (sql, names) in [
            ("SET search_path = a, b", "search_path"),
            ("set session Statement_Timeout to '5s'", "statement_timeout"),
            ("SET \"search_path\" TO x", "search_path"),
            ("SET app.user = 'x'", "app.user"),
            ("SET TIME ZONE 'UTC'", "timezone"),
            ("SET NAMES 'utf8'", "client_encoding"),
            ("SET SCHEMA 'x'", "search_path"),
            (
                "set session characteristics as transaction read only",
                "default_transaction_isolation default_transaction_read_only default_transaction_deferrable",
            ),
            ("RESET statement_timeout", "statement_timeout"),
            ("reset app.user", "app.user"),
            ("SELECT pg_catalog.set_config('search_path', '', false)", "search_path"),
            ("select set_config('a', $1, false), set_config('B', 'x', false)", "a b"),
            ("SET a = 1; SET b = 2; SELECT 1", "a b"),
            ("-- x\rSET a = 1", "a"),
            ("/*/ SET a = 1", ""),
            ("\x0b/* /* ' */ */SET\x0ba = 1", "a"),
            ("select set_config('a', 'b''s', false), set_config(E'c\\144', $$x$$, false)", "a cd"),
            ("SET U&\"x\" = '\\'", "x"),
            ("SET LOCAL a = 1", ""),
            ("set transaction read only; select count(*) from t", ""),
            ("declare c cursor for select 1", ""),
        ] {
            let residue = look(sql.as_bytes(), Lex::default());
            assert!(!residue.unknown, "{sql}");
            let found: Vec<&str> = residue.settings.iter().map(|s| &**s).collect();
            assert_eq!(found.join(" "), names, "{sql}");
        }
    }

    #[test]
    fn what_takes_away_needs_no_question_unless_there_is_something() {
        let (resets, frees) = ((true, false), (false, true));
        for (sql, (expect_resets, expect_frees)) in [
            ("RESET ALL", resets),
            ("DISCARD ALL", (true, true)),
            ("DISCARD TEMP", frees),
            ("DEALLOCATE a", frees),
            ("SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;", (true, true)),
            ("BEGIN; DROP TABLE t; COMMIT", frees),
            ("DISCARD PLANS", (false, false)),
        ] {
            let residue = look(sql.as_bytes(), Lex::default());
            assert!(!residue.unknown && residue.settings.is_empty(), "{sql}");
            assert_eq!((residue.resets, residue.frees), (expect_resets, expect_frees), "{sql}");
        }
        assert!(
            look(b"select setseed(0.5)", Lex::default()).seeds
                && look(b"set seed to 1", Lex::default()).seeds
                && look(b"select $$$$, setseed(1)", Lex::default()).seeds
        );
        assert!(
            look(b"select currval('a')", Lex::default()).asks && look(b"select my(LastVal())", Lex::default()).asks
        );
    }

    #[test]
    fn what_writes_is_told_from_what_locks() {
        for sql in [
            "INSERT INTO locks SELECT pg_backend_pid()",
            "begin; update jobs set locked_by = pg_backend_pid() where id = 1",
            "WITH x AS (SELECT 1) UPDATE jobs SET locked_by = (SELECT pg_backend_pid())",
            "CREATE TABLE a AS SELECT pg_backend_pid()",
            "SELECT pg_backend_pid() INTO a",
        ] {
            assert!(stores(sql.as_bytes(), Lex::default()), "{sql}");
        }
        for sql in [
            "SELECT pg_backend_pid()",
            "SELECT id FROM jobs WHERE pid <> pg_backend_pid() FOR UPDATE",
            "SELECT 'insert' AS a, pg_backend_pid() FROM t FOR NO KEY UPDATE",
            "DELETE FROM locks WHERE pid = pg_backend_pid()",
        ] {
            assert!(!stores(sql.as_bytes(), Lex::default()), "{sql}");
        }
    }

    #[test]
    fn whatever_is_hard_to_read_may_do_anything() {
        for sql in [
            "SET ROLE x",
            "SET SESSION AUTHORIZATION x",
            "RESET ROLE",
            "SELECT my_function()",
            "SELECT set_config(a, b, false) from t",
            "SELECT 1; LISTEN a",
            "DO $$ $$",
            "CALL p()",
            "LISTEN a",
            "CREATE TEMP TABLE t ()",
            "SELECT 1 INTO TEMP t",
            "SELECT \"f\"(1)",
            "PREPARE a AS SELECT 1",
            "SET",
            "SET x",
            "select s.set_config('a', 'b', false)",
            "declare c cursor with hold for select 1",
        ] {
            assert!(look(sql.as_bytes(), Lex::default()).unknown, "{sql}");
        }
    }

    #[test]
    fn a_setting_may_be_called_like_a_word_of_set() {
        for (sql, name) in [
            ("SET local.x = 1", "local.x"),
            ("SET SESSION role . x TO 1", "role.x"),
            ("SET session.x = 1", "session.x"),
            ("SET names.x = 1", "names.x"),
            ("RESET session.x", "session.x"),
            ("SELECT \"set_config\"('a.x', 'y', false)", "a.x"),
            ("SELECT set_config('a.x'::text, 'y', false)", "a.x"),
        ] {
            let residue = look(sql.as_bytes(), Lex::default());
            assert_eq!((&*residue.settings, residue.unknown), (&[name.into()][..], false), "{sql}");
        }
        for sql in [
            "SELECT set_config('a.x', 'y', false), f()",
            "EXPLAIN ANALYZE SELECT set_config('a.x', 'y', false)",
            "SET ROLE x; SELECT set_config('a.x', 'y', false)",
        ] {
            let residue = look(sql.as_bytes(), Lex::default());
            assert_eq!((&*residue.settings, residue.unknown), (&["a.x".into()][..], true), "{sql}");
        }
        for sql in [
            "SELECT set_config('a.' || 'x', 'y', false)",
            "INSERT INTO t SELECT \"f\"(1)",
            "SELECT * FROM \"pg_temp\".t",
        ] {
            assert!(look(sql.as_bytes(), Lex::default()).unknown, "{sql}");
        }
    }

    #[test]
    fn what_is_local_may_change_how_texts_are_read() {
        for (sql, expected) in [
            ("SET a = 1; SET LOCAL TimeZone = 'UTC'", (true, true)),
            ("SET LOCAL TIME ZONE 'UTC'", (true, true)),
            ("SET LOCAL NAMES 'LATIN1'", (true, true)),
            ("SET LOCAL U&\"search!005fpath\" UESCAPE '!' = x", (true, false)),
            ("SET LOCAL SCHEMA 'x'", (true, false)),
            ("SET LOCAL work_mem = 1", (false, false)),
            ("SET TimeZone = 'UTC'", (false, false)),
        ] {
            let residue = look(sql.as_bytes(), Lex::default());
            assert_eq!((residue.rescopes, residue.rereads), expected, "{sql}");
        }
    }
}
