//! What a tenant may say on a replication connection to a server that others use, too. No I/O.
//!
//! `REPLICATION` is a privilege on the whole server: with it a connection is sent everybody's files (`BASE_BACKUP`) and
//! everybody's write-ahead log (a physical stream), and drops anybody's slots. Here the text is the wall, so this is an
//! allow-list, whatever `[guard] mode` says.
//!
//! The server looks at the first token only (`repl_scanner.l` of PostgreSQL 15 to 18): if it is a keyword of
//! replication, in capitals, the whole text is one command of replication; else the whole text is SQL. Therefore:
//!
//! - SQL passes if its first word is one of SQL's, whatever follows. What it does is up to the role's rights.
//! - A command passes if all of it is what is expected: plain names, logical, nothing behind it.
//! - What cannot be read is refused, and so is what only a later version knows.

use super::lex;
use crate::error::{PgError, sqlstate};
use crate::tenant::plan::OUTPUT_PLUGINS;

/// What a text turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// SQL, as on any other connection.
    Sql,
    /// A command that may go to the server as it is.
    Command,
    /// `START_REPLICATION`: a logical stream of a slot that the server finds to be of this database, or refuses.
    Stream,
    /// `DROP_REPLICATION_SLOT`, of a slot that may be another tenant's: the server does not look.
    Drop {
        /// Its name: lower-case letters, digits, underscores.
        slot: String,
        /// Whether to wait for whoever uses it.
        wait: bool,
    },
}

/// Why a text is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The command, if it is a known one.
    what: &'static str,
    why: &'static str,
}

impl Refusal {
    /// What the client is told.
    pub fn error(&self) -> PgError {
        PgError::error(sqlstate::INSUFFICIENT_PRIVILEGE, format!("permission denied: {}", self.what))
            .detail(self.why)
            .hint(HINT)
    }

    /// What was tried, without anything that only the client may know.
    pub fn what(&self) -> &'static str {
        self.what
    }
}

const HINT: &str = "Here work IDENTIFY_SYSTEM, SHOW, SQL, and logical slots of this database: CREATE_REPLICATION_SLOT, \
     START_REPLICATION, DROP_REPLICATION_SLOT. For more, ask for a server of your own (plan \"cluster\").";

const EVERYBODYS: &str = "It concerns the data of all tenants of the server.";
const ANY_SLOT: &str = "It reaches every slot of the server.";
const LOGICAL_ONLY: &str = "Only logical slots can be used here, with names of at most 63 lower-case letters, digits and underscores, \
     and the output plugins pgoutput, test_decoding, wal2json and decoderbufs.";
const UNKNOWN: &str = "It is none of the commands that are known to concern a tenant's own database alone.";

/// Reads the text of a Query, of which the rest has not come yet unless it is `whole`.
///
/// # Errors
/// It is not among what may be said.
pub fn read(text: &[u8], whole: bool) -> Result<Said, Refusal> {
    let start = lex::skip_space(text, 0);
    let rest = &text[start..];
    let end = rest.iter().position(|&b| !lex::continues_name(b)).unwrap_or(rest.len());
    let (word, rest) = rest.split_at(end);
    // What may go on behind what has come could be another word.
    if whole || !rest.is_empty() {
        let is_empty = word.is_empty() && rest.is_empty();
        if is_empty || SQL.binary_search(&word.to_ascii_lowercase().as_slice()).is_ok() {
            return Ok(Said::Sql);
        }
    }
    let mut reader = Reader { rest };
    let (said, what, why) = match word {
        b"IDENTIFY_SYSTEM" => (reader.end().map(|()| Said::Command), "IDENTIFY_SYSTEM", UNKNOWN),
        b"CREATE_REPLICATION_SLOT" => (reader.create(), "CREATE_REPLICATION_SLOT", LOGICAL_ONLY),
        b"START_REPLICATION" => (reader.start(), "START_REPLICATION", LOGICAL_ONLY),
        b"DROP_REPLICATION_SLOT" => (reader.drop(), "DROP_REPLICATION_SLOT", LOGICAL_ONLY),
        b"ALTER_REPLICATION_SLOT" => (None, "ALTER_REPLICATION_SLOT", ANY_SLOT),
        b"READ_REPLICATION_SLOT" => (None, "READ_REPLICATION_SLOT", ANY_SLOT),
        b"BASE_BACKUP" => (None, "BASE_BACKUP", EVERYBODYS),
        b"TIMELINE_HISTORY" => (None, "TIMELINE_HISTORY", EVERYBODYS),
        b"UPLOAD_MANIFEST" => (None, "UPLOAD_MANIFEST", EVERYBODYS),
        _ => (None, "this command on a replication connection", UNKNOWN),
    };
    said.filter(|_| whole).ok_or(Refusal { what, why })
}

/// First words of SQL statements, in order. `SHOW` is a command of replication, too, and does the same.
const SQL: &[&[u8]] = &[
    b"abort",
    b"alter",
    b"analyze",
    b"begin",
    b"call",
    b"close",
    b"cluster",
    b"comment",
    b"commit",
    b"copy",
    b"create",
    b"deallocate",
    b"declare",
    b"delete",
    b"discard",
    b"do",
    b"drop",
    b"end",
    b"execute",
    b"explain",
    b"fetch",
    b"grant",
    b"insert",
    b"listen",
    b"lock",
    b"merge",
    b"move",
    b"notify",
    b"prepare",
    b"reassign",
    b"refresh",
    b"reindex",
    b"release",
    b"reset",
    b"revoke",
    b"rollback",
    b"savepoint",
    b"security",
    b"select",
    b"set",
    b"show",
    b"start",
    b"table",
    b"truncate",
    b"unlisten",
    b"update",
    b"vacuum",
    b"values",
    b"with",
];

/// Reads a command as `repl_gram.y` does, token by token; `None` as soon as anything is not as expected.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// `name [TEMPORARY] LOGICAL plugin [options]`
    fn create(&mut self) -> Option<Said> {
        self.plain_name()?;
        self.keyword("TEMPORARY");
        self.keyword("LOGICAL")?;
        let plugin = self.plain_name()?;
        if !OUTPUT_PLUGINS.contains(&plugin.as_str()) {
            return None;
        }
        if self.sign(b'(').is_some() {
            self.options(|reader| {
                let option = reader.plain_name()?;
                let known = ["snapshot", "two_phase", "failover", "reserve_wal"].contains(&option.as_str());
                let _value = reader.literal().or_else(|| reader.number()).or_else(|| reader.label().map(drop));
                known.then_some(())
            })?;
        } else {
            // As before PostgreSQL 15.
            let words = ["EXPORT_SNAPSHOT", "NOEXPORT_SNAPSHOT", "USE_SNAPSHOT", "RESERVE_WAL", "TWO_PHASE"];
            while words.iter().any(|word| self.keyword(word).is_some()) {}
        }
        self.end().map(|()| Said::Command)
    }

    /// `SLOT name LOGICAL X/X [options]`
    fn start(&mut self) -> Option<Said> {
        self.keyword("SLOT")?;
        self.plain_name()?;
        self.keyword("LOGICAL")?;
        self.position()?;
        if self.sign(b'(').is_some() {
            // They are the output plugin's.
            self.options(|reader| {
                reader.label()?;
                reader.literal();
                Some(())
            })?;
        }
        self.end().map(|()| Said::Stream)
    }

    /// `name [WAIT]`
    fn drop(&mut self) -> Option<Said> {
        let slot = self.plain_name()?;
        let wait = self.keyword("WAIT").is_some();
        self.end().map(|()| Said::Drop { slot, wait })
    }

    /// The end of the command, and of the text.
    fn end(&mut self) -> Option<()> {
        self.sign(b';');
        self.space();
        self.rest.is_empty().then_some(())
    }

    /// One or more, with commas between them and a parenthesis behind.
    fn options(&mut self, one: impl Fn(&mut Self) -> Option<()>) -> Option<()> {
        loop {
            one(self)?;
            if self.sign(b')').is_some() {
                return Some(());
            }
            self.sign(b',')?;
        }
    }

    fn space(&mut self) {
        let end = self.rest.iter().position(|b| !b" \t\n\r\x0c".contains(b)).unwrap_or(self.rest.len());
        self.rest = &self.rest[end..];
    }

    /// As many of these bytes as there are, at least one.
    fn run(&mut self, of: impl Fn(u8) -> bool) -> Option<&'a [u8]> {
        let end = self.rest.iter().position(|&b| !of(b)).unwrap_or(self.rest.len());
        let (run, rest) = self.rest.split_at(end);
        self.rest = rest;
        (!run.is_empty()).then_some(run)
    }

    fn sign(&mut self, sign: u8) -> Option<()> {
        self.space();
        self.rest = self.rest.strip_prefix(&[sign])?;
        Some(())
    }

    /// In capitals, as the server wants them.
    fn keyword(&mut self, word: &str) -> Option<()> {
        self.space();
        let before = self.rest;
        let found = self.run(lex::continues_name) == Some(word.as_bytes());
        if !found {
            self.rest = before;
        }
        found.then_some(())
    }

    /// What stands in quotes, which cannot be in it, or a word.
    fn label(&mut self) -> Option<&'a [u8]> {
        self.space();
        let Some(quoted) = self.rest.strip_prefix(b"\"") else {
            return self.run(lex::continues_name).filter(|word| lex::begins_name(word[0]));
        };
        let end = quoted.iter().position(|&b| b == b'"')?;
        self.rest = &quoted[end + 1..];
        Some(&quoted[..end])
    }

    /// A name that means the same in quotes and without, in every encoding and at full length.
    fn plain_name(&mut self) -> Option<String> {
        self.space();
        let quoted = self.rest.first() == Some(&b'"');
        let name = String::from_utf8(self.label()?.to_vec()).ok()?;
        let name = if quoted { name } else { name.to_ascii_lowercase() };
        let plain = name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'));
        (plain && (1..=lex::MAX_NAME).contains(&name.len())).then_some(name)
    }

    /// Quotes in it are doubled, and nothing else means anything.
    fn literal(&mut self) -> Option<()> {
        self.sign(b'\'')?;
        loop {
            let end = self.rest.iter().position(|&b| b == b'\'')?;
            self.rest = &self.rest[end + 1..];
            match self.rest.strip_prefix(b"'") {
                Some(rest) => self.rest = rest,
                None => return Some(()),
            }
        }
    }

    fn number(&mut self) -> Option<()> {
        self.space();
        self.run(|b| b.is_ascii_digit()).map(|_| ())
    }

    /// `16/B374D848`
    fn position(&mut self) -> Option<()> {
        self.space();
        self.run(|b| b.is_ascii_hexdigit())?;
        self.rest = self.rest.strip_prefix(b"/")?;
        self.run(|b| b.is_ascii_hexdigit()).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn told(text: &str) -> String {
        match read(text.as_bytes(), true) {
            Ok(Said::Drop { slot, wait }) => format!("drop {slot} {wait}"),
            Ok(said) => format!("{said:?}").to_lowercase(),
            Err(refusal) => format!("no {}", refusal.what()),
        }
    }

    #[test]
    fn what_clients_say_passes() {
        let long = format!("DROP_REPLICATION_SLOT {}", "x".repeat(63));
        for (text, expected) in [
            ("IDENTIFY_SYSTEM", "command"),
            (" \t\r\n\x0cIDENTIFY_SYSTEM ; ", "command"),
            ("SHOW data_directory_mode", "sql"),
            ("SHOW \"some\".setting;", "sql"),
            ("CREATE_REPLICATION_SLOT s LOGICAL pgoutput", "command"),
            ("CREATE_REPLICATION_SLOT \"s\" TEMPORARY LOGICAL \"test_decoding\" ( SNAPSHOT 'nothing')", "command"),
            ("CREATE_REPLICATION_SLOT s LOGICAL pgoutput (TWO_PHASE, FAILOVER true, SNAPSHOT 'export');", "command"),
            ("CREATE_REPLICATION_SLOT s LOGICAL wal2json NOEXPORT_SNAPSHOT", "command"),
            ("CREATE_REPLICATION_SLOT s LOGICAL decoderbufs USE_SNAPSHOT TWO_PHASE", "command"),
            ("START_REPLICATION SLOT s LOGICAL 0/0", "stream"),
            ("START_REPLICATION SLOT \"s\" LOGICAL 16/B374D848 (\"include-xids\" '0', skip, \"a\" 'it''s')", "stream"),
            ("START_REPLICATION SLOT s LOGICAL 0/0(proto_version '1',publication_names '\"p\",\"ä\"')", "stream"),
            ("DROP_REPLICATION_SLOT s", "drop s false"),
            ("DROP_REPLICATION_SLOT \"s\" WAIT;", "drop s true"),
            ("DROP_REPLICATION_SLOT S_1", "drop s_1 false"),
            (&long, &format!("drop {} false", "x".repeat(63))),
            ("", "sql"),
            ("-- ping", "sql"),
            ("SELECT pg_catalog.set_config('search_path', '', false);", "sql"),
            ("/* a tag */ begin", "sql"),
            ("SELECT 1; BASE_BACKUP", "sql"),
            ("copy t to stdout", "sql"),
            ("VALUES(1)", "sql"),
        ] {
            assert_eq!(told(text), expected, "{text}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        let long = format!("DROP_REPLICATION_SLOT {}", "x".repeat(64));
        for text in [
            "BASE_BACKUP",
            "BASE_BACKUP (LABEL 'x')",
            "TIMELINE_HISTORY 1",
            "UPLOAD_MANIFEST",
            "READ_REPLICATION_SLOT s",
            "ALTER_REPLICATION_SLOT s (FAILOVER true)",
            "SOMETHING_NEW",
            "FOO",
            "\"SELECT\" 1",
            "(SELECT 1)",
            ";SELECT 1",
            "base_backup",
            "identify_system",
            "LOAD 'x'",
            "IMPORT FOREIGN SCHEMA x",
            "IDENTIFY_SYSTEM; BASE_BACKUP",
            "IDENTIFY_SYSTEM;;",
            "IDENTIFY_SYSTEM -- x",
            "IDENTIFY_SYSTEM\x0b",
            "CREATE_REPLICATION_SLOT s PHYSICAL",
            "CREATE_REPLICATION_SLOT s TEMPORARY PHYSICAL RESERVE_WAL",
            "CREATE_REPLICATION_SLOT s logical pgoutput",
            "CREATE_REPLICATION_SLOT s LOGICAL",
            "CREATE_REPLICATION_SLOT s LOGICAL \"/tmp/x\"",
            "CREATE_REPLICATION_SLOT s LOGICAL set_user",
            "CREATE_REPLICATION_SLOT s LOGICAL \"PGOUTPUT\"",
            "CREATE_REPLICATION_SLOT s LOGICAL pgoutput ()",
            "CREATE_REPLICATION_SLOT s LOGICAL pgoutput (NEW_OPTION)",
            "CREATE_REPLICATION_SLOT s LOGICAL pgoutput (SNAPSHOT 'use') PHYSICAL",
            "CREATE_REPLICATION_SLOT s LOGICAL pgoutput (SNAPSHOT 'use'",
            "CREATE_REPLICATION_SLOT s LOGICAL pgoutput /* */",
            "CREATE_REPLICATION_SLOT \"a\"\"b\" LOGICAL pgoutput",
            "CREATE_REPLICATION_SLOT \"\" LOGICAL pgoutput",
            "CREATE_REPLICATION_SLOT \"S\" LOGICAL pgoutput",
            "CREATE_REPLICATION_SLOT sä LOGICAL pgoutput",
            "CREATE_REPLICATION_SLOT 1 LOGICAL pgoutput",
            "START_REPLICATION 0/0",
            "START_REPLICATION PHYSICAL 0/0",
            "START_REPLICATION SLOT s 0/0",
            "START_REPLICATION SLOT s PHYSICAL 0/0 TIMELINE 1",
            "START_REPLICATION SLOT s LOGICAL 0/0 TIMELINE 1",
            "START_REPLICATION SLOT s LOGICAL 0/0 (a 'b', )",
            "START_REPLICATION SLOT s LOGICAL 0/0 (a 'b' 'c')",
            "START_REPLICATION SLOT s LOGICAL 0/0 (a 'b",
            "START_REPLICATION SLOT s LOGICAL 0/0 (\"a\"\"b\")",
            "START_REPLICATION SLOT s LOGICAL 0/0x",
            "START_REPLICATION SLOT s LOGICAL 0",
            "DROP_REPLICATION_SLOT",
            "DROP_REPLICATION_SLOT s wait",
            "DROP_REPLICATION_SLOT s WAIT WAIT",
            "DROP_REPLICATION_SLOT s; DROP_REPLICATION_SLOT t",
            &long,
        ] {
            assert!(told(text).starts_with("no "), "{text}: {}", told(text));
        }
        assert_eq!(read(b"\xffSELECT 1", true).unwrap_err().error().code, "42501");
    }

    #[test]
    fn what_has_not_come_whole_passes_only_if_it_is_sql_for_sure() {
        for (text, passes) in [
            ("SELECT ", true),
            ("/* x */ COPY t", true),
            ("SELECT", false),
            ("   ", false),
            ("/* x", false),
            ("IDENTIFY_SYSTEM ", false),
            ("START_REPLICATION SLOT s LOGICAL 0/0 ", false),
            ("START_REPLICATION SLOT s LOGICAL 0/0 (a 'b", false),
        ] {
            assert_eq!(read(text.as_bytes(), false).is_ok(), passes, "{text}");
        }
    }

    #[test]
    fn the_words_are_in_order() {
        assert!(SQL.is_sorted());
    }

    /// The first token as the server reads it, if it is a keyword of replication.
    fn first_keyword(text: &str) -> Option<&str> {
        let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0c']);
        let cont = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
        let word = &text[..text.find(|c| !cont(c)).unwrap_or(text.len())];
        let all = [
            "BASE_BACKUP",
            "IDENTIFY_SYSTEM",
            "READ_REPLICATION_SLOT",
            "SHOW",
            "START_REPLICATION",
            "UPLOAD_MANIFEST",
            "CREATE_REPLICATION_SLOT",
            "DROP_REPLICATION_SLOT",
            "ALTER_REPLICATION_SLOT",
            "TIMELINE_HISTORY",
        ];
        all.contains(&word).then_some(word)
    }

    proptest! {
        #[test]
        fn what_the_server_takes_for_a_command_passes_as_that_command_only(parts in prop::collection::vec(prop::sample::select(vec![
            "BASE_BACKUP", "IDENTIFY_SYSTEM", "SHOW", "START_REPLICATION", "CREATE_REPLICATION_SLOT", "DROP_REPLICATION_SLOT",
            "ALTER_REPLICATION_SLOT", "SLOT", "LOGICAL", "PHYSICAL", "TEMPORARY", "WAIT", "RESERVE_WAL", "pgoutput", "select",
            "s", "0/0", "a", "A", "_", "1", "$", "ä", " ", " ", " ", "\n", "\x0b", ";", "\"", "'", "(", ")", ",", "--", "/*", "*/", "/",
        ]), 0..9)) {
            let text = parts.concat();
            let said = read(text.as_bytes(), true);
            match first_keyword(&text) {
                None => {}
                Some("SHOW") => prop_assert_eq!(&said, &Ok(Said::Sql)),
                Some("IDENTIFY_SYSTEM") => prop_assert!(matches!(said, Err(_) | Ok(Said::Command))),
                Some("CREATE_REPLICATION_SLOT") => {
                    prop_assert!(said.is_err() || said == Ok(Said::Command) && text.contains("LOGICAL"));
                }
                Some("START_REPLICATION") => {
                    prop_assert!(said.is_err() || said == Ok(Said::Stream) && text.contains("LOGICAL"));
                }
                Some("DROP_REPLICATION_SLOT") => {
                    let dropped = said.as_ref().is_ok_and(|said| matches!(said, Said::Drop { .. }));
                    prop_assert!(said.is_err() || dropped);
                }
                Some(_) => prop_assert!(said.is_err()),
            }
            prop_assert!(read(text.as_bytes(), false).is_err() || said == Ok(Said::Sql));
        }

        #[test]
        fn no_bytes_confuse_it(text in prop::collection::vec(any::<u8>(), 0..60), whole: bool) {
            let _ = read(&text, whole);
        }
    }
}
