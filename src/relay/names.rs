//! Names of prepared statements in SQL text: `PREPARE`, `EXECUTE`, `DEALLOCATE`, and `EXECUTE` in `EXPLAIN` and
//! `CREATE TABLE AS`. No I/O.
//!
//! What a client has prepared by the protocol is on the server under a name of ours. SQL that names it gets our name in
//! the place of the client's; everything else of the text stays as it is.

use std::ops::Range;

use super::lex::{self, Lex, Token};

/// What a statement does with the name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// `PREPARE name`
    Prepare,
    /// `EXECUTE name`
    Execute,
    /// `DEALLOCATE name`
    Deallocate,
    /// `DEALLOCATE ALL`, `DISCARD ALL`: all names, and none stands there.
    ForgetAll,
}

/// A name of a prepared statement in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// What is done.
    pub verb: Verb,
    /// The name, without quotes and folded as the server does.
    pub name: Box<[u8]>,
    /// Where it stands.
    pub at: Range<usize>,
}

/// All of them, in order.
pub fn uses(sql: &[u8], lex: Lex) -> Vec<Use> {
    let tokens = lex::spans(&lex.narrow(sql), lex);
    let statements = tokens.split(|(token, _)| *token == Token::Sign(b';'));
    statements.filter_map(in_statement).collect()
}

fn in_statement(tokens: &[(Token, Range<usize>)]) -> Option<Use> {
    let tokens = executed(explained(tokens));
    let word = |at: usize| match tokens.get(at) {
        Some((Token::Word(word), _)) => word.as_str(),
        _ => "",
    };
    let all = Use { verb: Verb::ForgetAll, name: Box::default(), at: 0..0 };
    let (verb, at) = match (word(0), word(1)) {
        ("discard" | "deallocate", "all") => return Some(all),
        ("deallocate", "prepare") if word(2) == "all" => return Some(all),
        ("prepare", second) if second != "transaction" => (Verb::Prepare, 1),
        ("execute", _) => (Verb::Execute, 1),
        ("deallocate", "prepare") if tokens.len() > 2 => (Verb::Deallocate, 2),
        ("deallocate", _) => (Verb::Deallocate, 1),
        _ => return None,
    };
    let (token, span) = tokens.get(at)?;
    Some(Use { verb, name: token.name()?.as_bytes().into(), at: span.clone() })
}

/// What is explained, if anything is.
fn explained(tokens: &[(Token, Range<usize>)]) -> &[(Token, Range<usize>)] {
    let Some(((Token::Word(first), _), rest)) = tokens.split_first() else { return tokens };
    if first != "explain" {
        return tokens;
    }
    let option = |token: &Token| ["analyze", "analyse", "verbose"].iter().any(|word| token.is(word));
    let words = rest.iter().take_while(|(token, _)| option(token)).count();
    let close = match rest.first() {
        Some((Token::Sign(b'('), _)) => rest.iter().position(|(token, _)| *token == Token::Sign(b')')),
        _ => None,
    };
    &rest[close.map_or(words, |at| at + 1)..]
}

/// From the `EXECUTE` on that fills a table, if one does; otherwise all of it.
fn executed(tokens: &[(Token, Range<usize>)]) -> &[(Token, Range<usize>)] {
    let makes_table = tokens.first().is_some_and(|(token, _)| token.is("create"))
        && tokens.iter().take(4).any(|(token, _)| token.is("table"));
    let mut depth = 0_usize;
    let first_as = tokens.iter().position(|(token, _)| {
        match token {
            Token::Sign(b'(') => depth += 1,
            Token::Sign(b')') => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && token.is("as")
    });
    match first_as.filter(|_| makes_table).map(|at| &tokens[at + 1..]) {
        Some(rest) if rest.first().is_some_and(|(token, _)| token.is("execute")) => rest,
        _ => tokens,
    }
}

/// The text with other names where `ours`, in the order of the uses, has one.
pub fn rename<'a>(sql: &[u8], uses: &[Use], ours: impl Iterator<Item = Option<&'a [u8]>>) -> Vec<u8> {
    let (mut text, mut from) = (Vec::with_capacity(sql.len() + 16), 0);
    for (found, name) in uses.iter().zip(ours) {
        let Some(name) = name else { continue };
        text.extend_from_slice(&sql[from..found.at.start]);
        text.extend_from_slice(name);
        from = found.at.end;
    }
    text.extend_from_slice(&sql[from..]);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_every_spelling() {
        for (sql, expected) in [
            ("DEALLOCATE \"_pg3_0\"", "Deallocate _pg3_0"),
            ("deallocate prepare Abc;", "Deallocate abc"),
            ("DEALLOCATE ALL", "ForgetAll "),
            ("DEALLOCATE prepare all", "ForgetAll "),
            ("discard all; EXECUTE a", "ForgetAll  Execute a"),
            ("DISCARD PLANS", ""),
            ("DEALLOCATE \"all\"", "Deallocate all"),
            ("DEALLOCATE prepare", "Deallocate prepare"),
            ("/* x */ EXECUTE\n\"a\"\"b\" (1, 'x;y')", "Execute a\"b"),
            ("SELECT 1; PREPARE a (int) AS SELECT ';'; EXECUTE a(1)", "Prepare a Execute a"),
            ("PREPARE TRANSACTION 'x'", ""),
            ("SELECT 'EXECUTE a'", ""),
            ("EXECUTE", ""),
            ("EXPLAIN EXECUTE a(1)", "Execute a"),
            ("explain analyze verbose execute a", "Execute a"),
            ("EXPLAIN (ANALYZE, FORMAT json) EXECUTE \"A\"; DEALLOCATE a", "Execute A Deallocate a"),
            ("EXPLAIN SELECT 1", ""),
            ("EXPLAIN (", ""),
            ("EXPLAIN", ""),
            ("CREATE TABLE t AS EXECUTE a(1) WITH NO DATA", "Execute a"),
            ("create global temporary table if not exists t (x, y) with (fillfactor = 70) as execute a", "Execute a"),
            ("EXPLAIN CREATE UNLOGGED TABLE t AS EXECUTE a", "Execute a"),
            ("CREATE TABLE t AS SELECT 1 AS execute FROM a", ""),
            ("CREATE TABLE t (a int GENERATED ALWAYS AS (1) STORED)", ""),
            ("CREATE VIEW v AS EXECUTE a", ""),
            ("CREATE FUNCTION execute() RETURNS int LANGUAGE sql AS 'EXECUTE a'", ""),
        ] {
            let found = uses(sql.as_bytes(), Lex::default());
            let shown: Vec<String> =
                found.iter().map(|u| format!("{:?} {}", u.verb, String::from_utf8_lossy(&u.name))).collect();
            assert_eq!(shown.join(" "), expected, "{sql}");
        }
    }

    #[test]
    fn only_the_names_are_replaced() {
        let sql = b"SELECT 'a'; EXECUTE \"a\" ('a'); deallocate a; EXECUTE b";
        let uses = uses(sql, Lex::default());
        let ours = uses.iter().map(|found| (*found.name == *b"a").then_some(&b"ours_1"[..]));
        let text = rename(sql, &uses, ours);
        assert_eq!(text, b"SELECT 'a'; EXECUTE ours_1 ('a'); deallocate ours_1; EXECUTE b");
    }
}
