//! The template of a new tenant: `.sql` files, and what can be said about them before they are run.
//!
//! A file is sent to the server as it is, in one message; it is cut into statements only to know on which line a
//! failed one stands, and to refuse what would break out of the one transaction or needs psql.

use std::path::{Path, PathBuf};

use tokio_postgres::error::{DbError, ErrorPosition};

use crate::error::{PgError, sqlstate};

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct File {
    /// Its name without the directory.
    pub(crate) name: String,
    /// Its text.
    pub(crate) text: String,
    /// Line (from 1) on which each statement begins.
    pub(crate) lines: Vec<usize>,
}

/// Reads every `*.sql` of the directory, in the order of their names.
pub(crate) fn load(dir: &Path) -> Result<Vec<File>, PgError> {
    let unreadable = |path: &Path, error: std::io::Error| {
        PgError::fatal(
            sqlstate::NOT_IN_PREREQUISITE_STATE,
            format!("cannot read the template {}: {error}", path.display()),
        )
    };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(|e| unreadable(dir, e))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "sql") && path.is_file())
        .collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).map_err(|e| unreadable(&path, e))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            File::parse(name, text.trim_start_matches('\u{feff}').to_owned())
        })
        .collect()
}

impl File {
    fn parse(name: String, text: String) -> Result<Self, PgError> {
        let refuse = |line: usize, why: &str| {
            PgError::fatal(sqlstate::FEATURE_NOT_SUPPORTED, format!("template {name}, line {line}: {why}"))
                .hint("A template runs as a whole in one transaction of pgusher's; plain SQL statements only.")
        };
        let statements = Scanner::new(&text)
            .statements()
            .map_err(|line| refuse(line, "psql's backslash commands do not work here"))?;
        for statement in &statements {
            if let Some(why) = statement.objection() {
                return Err(refuse(statement.line, why));
            }
        }
        let lines = statements.into_iter().map(|s| s.line).collect();
        Ok(Self { name, text, lines })
    }

    /// An error of the server with file and line. `done` statements had completed before it.
    pub(crate) fn failed(&self, done: usize, error: &DbError) -> PgError {
        let line = match error.position() {
            Some(ErrorPosition::Original(position)) => self.line_of(*position),
            // Errors while running have no position: then it is the line of the statement.
            _ => self.lines.get(done).copied().unwrap_or(1),
        };
        PgError {
            code: error.code().code().to_owned().into(),
            detail: error.detail().map(str::to_owned),
            hint: error.hint().map(str::to_owned),
            ..PgError::fatal(sqlstate::INTERNAL, format!("template {}, line {line}: {}", self.name, error.message()))
        }
    }

    /// The line of a position, which PostgreSQL counts in characters from 1.
    fn line_of(&self, position: u32) -> usize {
        let before = usize::try_from(position).unwrap_or(usize::MAX).saturating_sub(1);
        self.text.chars().take(before).filter(|&c| c == '\n').count() + 1
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Statement {
    line: usize,
    /// Keywords and names outside quotes, upper case.
    words: Vec<String>,
}

impl Statement {
    fn objection(&self) -> Option<&'static str> {
        let words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        match words[..] {
            ["ROLLBACK", "TO", ..] | ["ROLLBACK", "WORK" | "TRANSACTION", "TO", ..] => None,
            ["BEGIN" | "COMMIT" | "END" | "ABORT" | "ROLLBACK", ..]
            | ["START", "TRANSACTION", ..]
            | ["PREPARE", "TRANSACTION", ..] => Some("statements that begin or end a transaction are not allowed"),
            ["COPY", ..] if words.windows(2).any(|w| w == ["FROM", "STDIN"]) => {
                Some("COPY FROM STDIN does not work here, use INSERT")
            }
            _ => None,
        }
    }
}

/// Cuts SQL into statements as psql does: quotes, dollar quotes, nested comments, and `BEGIN ATOMIC` bodies.
struct Scanner<'a> {
    rest: &'a str,
    line: usize,
}

impl<'a> Scanner<'a> {
    fn new(text: &'a str) -> Self {
        Self { rest: text, line: 1 }
    }

    /// All statements that are not empty, or the line of a backslash command.
    fn statements(mut self) -> Result<Vec<Statement>, usize> {
        let mut statements = Vec::new();
        let mut now: Option<Statement> = None;
        let (mut parens, mut blocks) = (0_i32, 0_i32);
        loop {
            self.skip_space_and_comments();
            let Some(c) = self.rest.chars().next() else { break };
            if c == ';' && parens <= 0 && blocks <= 0 {
                self.take(1);
                statements.extend(now.take());
                continue;
            }
            let line = self.line;
            let statement = now.get_or_insert_with(|| {
                (parens, blocks) = (0, 0);
                Statement { line, words: Vec::new() }
            });
            match c {
                '\\' => return Err(line),
                '(' | ')' => {
                    parens += if c == '(' { 1 } else { -1 };
                    self.take(1);
                }
                '\'' => self.skip_string(false),
                '"' => self.skip_until('"'),
                '$' => self.skip_dollar(),
                _ if c.is_alphabetic() || c == '_' => {
                    let word = self.word();
                    if word == "E" && self.rest.starts_with('\'') {
                        self.skip_string(true);
                        continue;
                    }
                    // The body of a function in SQL's own syntax contains semicolons.
                    if statement.words.first().is_some_and(|first| first == "CREATE") {
                        match word.as_str() {
                            "BEGIN" => blocks += 1,
                            "CASE" if blocks > 0 => blocks += 1,
                            "END" if blocks > 0 => blocks -= 1,
                            _ => {}
                        }
                    }
                    statement.words.push(word);
                }
                _ if c.is_ascii_digit() => drop(self.word()),
                _ => self.take(c.len_utf8()),
            }
        }
        statements.extend(now);
        Ok(statements)
    }

    fn take(&mut self, bytes: usize) {
        let (taken, rest) = self.rest.split_at(bytes.min(self.rest.len()));
        self.line += taken.matches('\n').count();
        self.rest = rest;
    }

    fn word(&mut self) -> String {
        let end = self.rest.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$')).unwrap_or(self.rest.len());
        let word = self.rest[..end].to_ascii_uppercase();
        self.take(end);
        word
    }

    fn skip_space_and_comments(&mut self) {
        loop {
            let space = self.rest.len() - self.rest.trim_start().len();
            self.take(space);
            if self.rest.starts_with("--") {
                self.take(self.rest.find('\n').unwrap_or(self.rest.len()));
            } else if self.rest.starts_with("/*") {
                self.skip_block_comment();
            } else if space == 0 {
                return;
            }
        }
    }

    fn skip_block_comment(&mut self) {
        let mut depth = 0_usize;
        while !self.rest.is_empty() {
            if self.rest.starts_with("/*") {
                depth += 1;
                self.take(2);
            } else if self.rest.starts_with("*/") {
                self.take(2);
                depth -= 1;
                if depth == 0 {
                    return;
                }
            } else {
                self.take(self.rest.chars().next().map_or(0, char::len_utf8));
            }
        }
    }

    /// A quoted thing in which the doubled quote stands for itself (two such things in a row are the same to us).
    fn skip_until(&mut self, quote: char) {
        let end = self.rest[1..].find(quote).map_or(self.rest.len(), |at| at + 2);
        self.take(end);
    }

    fn skip_string(&mut self, escapes: bool) {
        if !escapes {
            return self.skip_until('\'');
        }
        let mut escaped = false;
        let end = self.rest[1..].char_indices().find(|&(_, c)| {
            let ends = c == '\'' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        self.take(end.map_or(self.rest.len(), |(at, _)| at + 2));
    }

    fn skip_dollar(&mut self) {
        let tag_end = self.rest[1..].find(|c: char| !(c.is_alphanumeric() || c == '_')).map(|at| at + 1);
        let Some(tag_end) = tag_end.filter(|&at| self.rest[at..].starts_with('$')) else { return self.take(1) };
        let tag = &self.rest[..=tag_end];
        let body = &self.rest[tag.len()..];
        self.take(body.find(tag).map_or(self.rest.len(), |at| at + 2 * tag.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<usize> {
        File::parse("t.sql".into(), text.into()).unwrap().lines
    }

    #[test]
    fn statements_are_found_as_psql_finds_them() {
        for (text, expected) in [
            ("", vec![]),
            (";; -- nothing\n;", vec![]),
            ("select 1; select 2", vec![1, 1]),
            ("-- a; b\nselect ';';\n/* ; /* ; */ ; */ select 2;", vec![2, 3]),
            ("select E'it\\'s; ', 'a''b;'\n;select \"x;\"\n", vec![1, 2]),
            ("create function f() returns int language sql as $$ select 1; select 2; $$;\nselect 3;", vec![1, 2]),
            ("do $a$ begin $$;$$; end $a$;\nselect $1; select 4", vec![1, 2, 2]),
            (
                "create function f() returns int\nbegin atomic\n select case when true then 1 end;\nend;\nselect 1;",
                vec![1, 5],
            ),
            ("create rule r as on insert to t do (select 1; select 2);\nselect 3", vec![1, 2]),
            ("select 'unfinished\n;", vec![1]),
            ("select 1; $$ unfinished", vec![1, 1]),
        ] {
            assert_eq!(lines(text), expected, "{text}");
        }
    }

    #[test]
    fn what_would_break_out_of_the_transaction_is_refused_with_its_line() {
        for (text, line) in [
            ("select 1;\nBEGIN;", 2),
            ("commit", 1),
            ("\n\nrollback;", 3),
            ("start transaction;", 1),
            ("end;", 1),
            ("prepare transaction 'x';", 1),
            ("\\i other.sql", 1),
            ("copy t (a, b) from stdin;\n1\t2\n", 1),
        ] {
            let error = File::parse("a.sql".into(), text.into()).unwrap_err();
            assert!(error.message.starts_with(&format!("template a.sql, line {line}: ")), "{text}: {error}");
        }
        for text in ["savepoint a; rollback to a; release a", "prepare x as select 1", "do $$begin commit; end$$"] {
            assert!(File::parse("a.sql".into(), text.into()).is_ok(), "{text}");
        }
    }

    #[test]
    fn positions_count_characters() {
        let file = File::parse("a.sql".into(), "select 'ä';\nselekt 1;".into()).unwrap();
        assert_eq!(file.line_of(1), 1);
        assert_eq!(file.line_of(13), 2);
        assert_eq!(file.line_of(u32::MAX), 2);
    }
}
