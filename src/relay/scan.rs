//! A cheap look at SQL text, once, without allocation and without I/O: may running it leave something behind in the
//! session, and is there anything in it that the guard should read with care?
//!
//! The first answer decides whether a server connection is reset before the next client of the same tenant gets it. It
//! is a question of correctness, not of isolation: *yes* is always safe and costs a reset, so everything unknown is
//! *yes*. The second one is *yes* for whatever [`guard::judge`](super::guard::judge) could possibly refuse; it costs
//! the reading.

use super::lex::{self, Lex};

/// What a look at a text has shown.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Running this text may leave session state behind: settings, temporary tables, locks, cursors, prepared
    /// statements, subscriptions, or whatever a function that is not known to be harmless does.
    pub leaves_state: bool,
    /// The guard has to read it.
    pub suspicious: bool,
    /// It may change what `currval` and `lastval` say in this session.
    pub advances: bool,
    /// It may take away what pins a client.
    pub frees: bool,
    /// It may list prepared statements.
    pub lists: bool,
    /// It asks for the process id of the session.
    pub own_process: bool,
    /// There is a `SET LOCAL` in it.
    pub local: bool,
    /// It may make something in the first schema of the `search_path`.
    pub creates: bool,
    /// It asks who waits for whom, by process ids.
    pub processes: bool,
}

/// Looks at a text. `is_name` says of the lower-case name in front of a dot whether it may be a tenant's; it may say
/// yes too often.
#[inline]
pub fn look(sql: &[u8], lex: Lex, is_name: impl Fn(&[u8]) -> bool) -> Seen {
    Scanner::new(sql, lex, is_name).run()
}

/// See [`Seen::leaves_state`].
pub fn leaves_state(sql: &[u8]) -> bool {
    look(sql, Lex::default(), |_| false).leaves_state
}

/// Whether the text, however it is spelled, could change or show what the session listens to. Function bodies aside.
pub fn may_listen(sql: &[u8]) -> bool {
    ["listen", "discard"].iter().any(|word| contains(sql, word.as_bytes()))
}

/// Whether the text may make, drop or rename a database, which takes that nobody else is connected to it.
pub fn may_need_database_alone(sql: &[u8]) -> bool {
    contains(sql, b"database")
}

/// Whether a transaction that the text begins may still be open at its end.
pub fn may_begin(sql: &[u8]) -> bool {
    ["begin", "start"].iter().any(|word| contains(sql, word.as_bytes()))
}

fn contains(sql: &[u8], word: &[u8]) -> bool {
    sql.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word))
}

/// Whether the first word of the text, white space and comments aside, is this one (lower case).
pub fn begins_with(sql: &[u8], word: &[u8]) -> bool {
    let mut scanner = Scanner::new(sql, Lex::default(), |_| false);
    loop {
        scanner.skip_while(|b| lex::is_space(b) || b == b';');
        match sql.get(scanner.at) {
            Some(b'-') if scanner.next_is(b'-') => scanner.skip_while(|b| b != b'\n' && b != b'\r'),
            Some(b'/') if scanner.next_is(b'*') => scanner.at = lex::comment_end(sql, scanner.at),
            _ => break,
        }
    }
    let rest = &sql[scanner.at..];
    let ends = rest.get(word.len()).is_none_or(|b| !(b.is_ascii_alphanumeric() || *b == b'_' || *b >= 0x80));
    ends && rest.get(..word.len()).is_some_and(|found| found.eq_ignore_ascii_case(word))
}

/// Whether a word before a parenthesis is no call, or the call of a function that leaves nothing behind (lower case).
pub(super) fn is_harmless_call(word: &[u8]) -> bool {
    KEYWORDS.binary_search(&word).is_ok() || HARMLESS.binary_search(&word).is_ok()
}

/// Of which kind a statement is, as far as that matters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Other,
    Copy,
    Insert,
}

struct Scanner<'a, N> {
    sql: &'a [u8],
    at: usize,
    lex: Lex,
    is_name: N,
    /// At the first word of a statement.
    first: bool,
    /// Where INTO ends: the name behind it is a table, and a parenthesis after that a column list.
    into: usize,
    /// Where a dot ends that does not touch the name before it: the one behind it is in a schema.
    dot: usize,
    kind: Kind,
    /// The name that was read last, if nothing but white space and comments followed it.
    name: (usize, usize),
    seen: Seen,
}

impl<'a, N: Fn(&[u8]) -> bool> Scanner<'a, N> {
    fn new(sql: &'a [u8], lex: Lex, is_name: N) -> Self {
        let seen = Seen::default();
        Self { sql, at: 0, lex, is_name, first: true, into: 0, dot: 0, kind: Kind::Other, name: (0, 0), seen }
    }

    fn run(mut self) -> Seen {
        while let Some(&byte) = self.sql.get(self.at) {
            let unsure = match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'_' | 0x80.. => self.word(),
                b'"' => self.quoted_name(),
                b' ' | b'\n' | b'\t' | b'\r' | b'\x0c' | b'\x0b' => {
                    self.at += 1;
                    continue;
                }
                b'-' if self.next_is(b'-') => {
                    self.skip_while(|b| b != b'\n' && b != b'\r');
                    continue;
                }
                b'/' if self.next_is(b'*') => {
                    self.at = lex::comment_end(self.sql, self.at);
                    continue;
                }
                b'.' => {
                    self.end_schema();
                    self.dot = self.at;
                    false
                }
                _ => {
                    self.name = (0, 0);
                    match byte {
                        b'0'..=b'9' => {
                            // What a letter begins behind it is a word, to its end: `3a$$` begins no literal.
                            self.skip_while(|b| b.is_ascii_digit() || b == b'.');
                            false
                        }
                        b'\'' => self.string(self.lex.backslashes),
                        b'$' => {
                            self.at = lex::dollar_end(self.sql, self.at).map_or(self.at + 1, |end| end.1);
                            false
                        }
                        b';' => {
                            (self.first, self.kind) = (true, Kind::Other);
                            self.at += 1;
                            false
                        }
                        _ => {
                            self.at += 1;
                            false
                        }
                    }
                }
            };
            self.seen.leaves_state |= unsure;
        }
        self.seen
    }

    fn next_is(&self, byte: u8) -> bool {
        self.sql.get(self.at + 1) == Some(&byte)
    }

    fn skip_while(&mut self, keep: impl Fn(u8) -> bool) {
        let rest = &self.sql[self.at..];
        self.at += rest.iter().position(|&b| !keep(b)).unwrap_or(rest.len());
    }

    fn word(&mut self) -> bool {
        let start = self.at;
        self.skip_while(lex::continues_name);
        self.name = (start, self.at);
        let mut lower = [0; 40];
        let word = &self.sql[start..self.at];
        if !self.first && !is_known(word) && self.sql.get(self.at) != Some(&b'.') {
            let next = self.next_token();
            if !self.is_call_at(next) {
                self.at = next;
                return false;
            }
        }
        // A longer word is no keyword and no function of the list.
        let Some(lower) = lower.get_mut(..word.len()) else {
            return std::mem::take(&mut self.first) || self.is_call();
        };
        lower.copy_from_slice(word);
        lower.make_ascii_lowercase();
        let word: &[u8] = lower;
        if let Some(unsure) = self.prefix(word) {
            return unsure;
        }
        if std::mem::take(&mut self.first) {
            // Nine in ten, which need no search.
            if let b"select" | b"update" | b"delete" | b"begin" | b"commit" | b"end" | b"rollback" = word {
                return false;
            }
            if word == b"insert" {
                (self.seen.advances, self.kind) = (true, Kind::Insert);
                return false;
            }
            self.seen.suspicious |= READ.binary_search(&word).is_ok();
            if word == b"copy" {
                self.kind = Kind::Copy;
            }
            return self.first_word(word);
        }
        if is_key(word) || (self.kind == Kind::Copy && word == b"program") {
            self.seen.suspicious = true;
        }
        self.seen.lists |= lists(word);
        // What is executed was looked at somewhere else.
        if matches!(word, b"temp" | b"temporary" | b"execute") || word.starts_with(b"pg_temp") {
            return true;
        }
        if self.sql.get(self.at) == Some(&b'.') {
            // A qualified name: vouched for only in pg_catalog.
            if word == b"pg_catalog" {
                self.at += 1;
                return false;
            }
            self.end_schema();
            if self.is_behind_into(start) {
                self.into = self.at;
                return false;
            }
            return self.qualified_call();
        }
        if word == b"into" {
            self.into = self.at;
            self.seen.creates |= self.kind != Kind::Insert;
        }
        if !self.is_call() || self.is_behind_into(start) {
            return false;
        }
        let dot = std::mem::take(&mut self.dot);
        if dot > 0 && is_next(self.sql, dot, start) {
            // In a schema, and not one of PostgreSQL's own.
            return true;
        }
        if KEYWORDS.binary_search(&word).is_ok() {
            return false;
        }
        self.seen.advances |= matches!(word, b"nextval" | b"setval");
        self.seen.own_process |= word == b"pg_backend_pid";
        self.seen.processes |= WAITS.contains(&word);
        HARMLESS.binary_search(&word).is_err()
    }

    /// `E'…'`, `U&'…'`, `U&"…"`: the letter belongs to what follows.
    fn prefix(&mut self, word: &[u8]) -> Option<bool> {
        match (word, self.sql.get(self.at), self.sql.get(self.at + 1)) {
            (b"e", Some(b'\''), _) => Some(self.string(true)),
            (b"u", Some(b'&'), Some(quote @ (b'"' | b'\''))) => {
                self.seen.suspicious = true;
                // The name may be any.
                self.seen.leaves_state |= *quote == b'"';
                self.seen.lists |= *quote == b'"';
                None
            }
            _ => None,
        }
    }

    /// After a name: what follows belongs to it.
    fn end_schema(&mut self) {
        self.at += 1;
        let (start, end) = std::mem::take(&mut self.name);
        let quoted = self.sql.get(start) == Some(&b'"');
        let name = &self.sql[start..end];
        let name = if quoted { name.get(1..name.len().saturating_sub(1)).unwrap_or_default() } else { name };
        // Longer names are cut off by the server.
        let name = &name[..name.len().min(lex::MAX_NAME)];
        let mut lower = [0; lex::MAX_NAME];
        let lower = &mut lower[..name.len()];
        lower.copy_from_slice(name);
        if !quoted {
            lower.make_ascii_lowercase();
        }
        if !lower.is_empty() && (self.is_name)(lower) {
            self.seen.suspicious = true;
        }
    }

    /// `SET LOCAL` and `SET TRANSACTION` end with the transaction; `SET` and the like do not.
    fn first_word(&mut self, word: &[u8]) -> bool {
        if word == b"set" {
            self.at = lex::skip_space(self.sql, self.at);
            let rest = &self.sql[self.at..];
            let (second, behind) =
                rest.split_at(rest.iter().position(|b| !lex::continues_name(*b)).unwrap_or(rest.len()));
            // `local.x` is a setting.
            let word =
                |word| second.eq_ignore_ascii_case(word) && behind.get(lex::skip_space(behind, 0)) != Some(&b'.');
            let local = word(b"local");
            self.seen.local |= local;
            return !(local || word(b"transaction"));
        }
        self.seen.advances |= matches!(word, b"copy" | b"merge" | b"with");
        self.seen.creates |= matches!(word, b"create" | b"explain");
        self.seen.frees |= matches!(word, b"drop" | b"close");
        let unusual = STATELESS.binary_search(&word).is_err();
        // What is no ordinary statement is rare enough to be read.
        self.seen.suspicious |= unusual;
        unusual
    }

    fn is_call(&self) -> bool {
        self.is_call_at(self.next_token())
    }

    /// Where white space ends.
    #[inline]
    fn next_token(&self) -> usize {
        let mut at = self.at;
        while self.sql.get(at).is_some_and(|b| lex::is_space(*b)) {
            at += 1;
        }
        at
    }

    /// Whether what begins here, a comment perhaps, makes a call of the word before it.
    #[inline]
    fn is_call_at(&self, at: usize) -> bool {
        match self.sql.get(at) {
            Some(b'(') => true,
            Some(b'-' | b'/') => is_call_behind(&self.sql[at..]),
            _ => false,
        }
    }

    /// After `schema.`: whether `name(` follows.
    fn qualified_call(&mut self) -> bool {
        if self.sql.get(self.at) == Some(&b'"') {
            return self.quoted_name();
        }
        let start = self.at;
        self.skip_while(lex::continues_name);
        self.name = (start, self.at);
        if start == self.at {
            // White space, or a comment, and then the name.
            self.dot = start;
            return false;
        }
        self.is_call()
    }

    fn quoted_name(&mut self) -> bool {
        let start = self.at;
        self.at += 1;
        self.skip_while(|b| b != b'"');
        let name = &self.sql[start + 1..self.at];
        self.at = (self.at + 1).min(self.sql.len());
        // A doubled quote is one in the name.
        self.seen.suspicious |= self.sql.get(self.at) == Some(&b'"');
        let system = matches!(name, [b'p', b'g', ..] | [b's', b'e', ..]);
        if system {
            self.seen.suspicious |= is_key(name);
            self.seen.lists |= lists(name);
        }
        self.name = (start, self.at);
        self.first || (system && name.starts_with(b"pg_temp")) || (self.is_call() && !self.is_behind_into(start))
    }

    /// Whether the name that begins at `start` is the first one behind INTO. Asked once for each INTO.
    fn is_behind_into(&mut self, start: usize) -> bool {
        let into = std::mem::take(&mut self.into);
        into > 0 && is_next(self.sql, into, start)
    }

    /// A literal. A backslash in it may or may not escape, which depends on settings: unsure.
    fn string(&mut self, backslashes: bool) -> bool {
        let start = self.at;
        self.at = lex::string_end(self.sql, start, backslashes);
        self.name = (0, 0);
        self.sql[start..self.at].contains(&b'\\')
    }
}

/// Whether a word in the middle of a statement may be one of those that [`Scanner::word`] knows. Most are not, by their first
/// letter and their length; what is called, or qualifies a name, is another matter.
#[inline]
fn is_known(word: &[u8]) -> bool {
    match (word.first().map_or(0, |first| first | 0x20), word.len()) {
        (b'i', 4) | (b't', 4 | 9) | (b's', 10) | (b'p', 7) | (b'e', 1 | 7) | (b'u', 1) => true,
        (b'p', 8..) => word[2] == b'_',
        _ => false,
    }
}

/// Functions of [`HARMLESS`] that take process ids.
const WAITS: [&[u8]; 3] =
    [b"pg_blocking_pids", b"pg_safe_snapshot_blocking_pids", b"pg_isolation_test_session_is_blocked"];

/// Whether nothing but white space and comments is between the two.
#[inline(never)]
fn is_next(sql: &[u8], end: usize, start: usize) -> bool {
    lex::skip_space(sql, end) == start
}

/// Whether a parenthesis follows behind comments.
#[cold]
#[inline(never)]
fn is_call_behind(rest: &[u8]) -> bool {
    rest.get(lex::skip_space(rest, 0)) == Some(&b'(')
}

/// Names by which prepared statements are listed: a view, and what it calls.
#[inline]
fn lists(name: &[u8]) -> bool {
    matches!(name, b"pg_prepared_statements" | b"pg_prepared_statement")
}

/// Names by which settings are changed without SET.
#[inline]
fn is_key(word: &[u8]) -> bool {
    matches!(word, b"set_config" | b"pg_settings")
}

/// First words of statements that the guard reads. Sorted.
const READ: &[&[u8]] = &[
    b"alter",
    b"base_backup",
    b"call",
    b"comment",
    b"create",
    b"create_replication_slot",
    b"do",
    b"drop",
    b"drop_replication_slot",
    b"execute",
    b"grant",
    b"identify_system",
    b"import",
    b"load",
    b"prepare",
    b"read_replication_slot",
    b"reassign",
    b"reindex",
    b"revoke",
    b"security",
    b"set",
    b"start_replication",
    b"timeline_history",
];

/// First words of statements that leave nothing behind by themselves. Sorted.
const STATELESS: &[&[u8]] = &[
    b"abort",
    b"alter",
    b"analyze",
    b"begin",
    b"checkpoint",
    b"close",
    b"cluster",
    b"comment",
    b"commit",
    b"copy",
    b"create",
    b"delete",
    b"drop",
    b"end",
    b"explain",
    b"fetch",
    b"grant",
    b"insert",
    b"lock",
    b"merge",
    b"move",
    b"notify",
    b"reassign",
    b"refresh",
    b"reindex",
    b"release",
    b"revoke",
    b"rollback",
    b"savepoint",
    b"select",
    b"show",
    b"start",
    b"table",
    b"truncate",
    b"update",
    b"vacuum",
    b"values",
    b"with",
];

/// Words before a parenthesis that are no functions. Sorted.
const KEYWORDS: &[&[u8]] = &[
    b"all",
    b"and",
    b"any",
    b"array",
    b"as",
    b"between",
    b"bigint",
    b"bit",
    b"by",
    b"case",
    b"cast",
    b"char",
    b"character",
    b"check",
    b"conflict",
    b"cube",
    b"decimal",
    b"default",
    b"distinct",
    b"else",
    b"except",
    b"exists",
    b"filter",
    b"float",
    b"for",
    b"from",
    b"having",
    b"ilike",
    b"in",
    b"int",
    b"integer",
    b"intersect",
    b"interval",
    b"is",
    b"join",
    b"key",
    b"lateral",
    b"like",
    b"limit",
    b"materialized",
    b"not",
    b"null",
    b"numeric",
    b"of",
    b"offset",
    b"on",
    b"or",
    b"order",
    b"over",
    b"partition",
    b"returning",
    b"rollup",
    b"row",
    b"select",
    b"set",
    b"sets",
    b"some",
    b"then",
    b"time",
    b"timestamp",
    b"timestamptz",
    b"union",
    b"unique",
    b"using",
    b"values",
    b"varchar",
    b"varying",
    b"when",
    b"where",
    b"window",
    b"with",
    b"within",
];

/// Built-in functions that leave nothing behind. Sorted.
const HARMLESS: &[&[u8]] = &[
    b"abs",
    b"age",
    b"any_value",
    b"array_agg",
    b"array_append",
    b"array_cat",
    b"array_length",
    b"array_lower",
    b"array_position",
    b"array_remove",
    b"array_to_json",
    b"array_to_string",
    b"array_upper",
    b"ascii",
    b"avg",
    b"bit_and",
    b"bit_or",
    b"bool_and",
    b"bool_or",
    b"btrim",
    b"cardinality",
    b"ceil",
    b"ceiling",
    b"char_length",
    b"chr",
    b"clock_timestamp",
    b"coalesce",
    b"col_description",
    b"concat",
    b"concat_ws",
    b"count",
    b"cume_dist",
    b"current_database",
    b"current_schema",
    b"current_schemas",
    b"current_setting",
    b"date",
    b"date_bin",
    b"date_part",
    b"date_trunc",
    b"decode",
    b"dense_rank",
    b"div",
    b"encode",
    b"every",
    b"exp",
    b"extract",
    b"first_value",
    b"floor",
    b"format",
    b"format_type",
    b"gen_random_uuid",
    b"generate_series",
    b"greatest",
    b"has_any_column_privilege",
    b"has_column_privilege",
    b"has_database_privilege",
    b"has_schema_privilege",
    b"has_sequence_privilege",
    b"has_table_privilege",
    b"hashtext",
    b"initcap",
    b"isfinite",
    b"json_agg",
    b"json_array_elements",
    b"json_array_elements_text",
    b"json_array_length",
    b"json_build_array",
    b"json_build_object",
    b"json_each",
    b"json_each_text",
    b"json_extract_path",
    b"json_extract_path_text",
    b"json_object_agg",
    b"json_object_keys",
    b"json_populate_record",
    b"json_populate_recordset",
    b"json_typeof",
    b"jsonb_agg",
    b"jsonb_array_elements",
    b"jsonb_array_elements_text",
    b"jsonb_array_length",
    b"jsonb_build_array",
    b"jsonb_build_object",
    b"jsonb_each",
    b"jsonb_each_text",
    b"jsonb_extract_path",
    b"jsonb_extract_path_text",
    b"jsonb_object_agg",
    b"jsonb_object_keys",
    b"jsonb_path_exists",
    b"jsonb_path_query",
    b"jsonb_pretty",
    b"jsonb_set",
    b"jsonb_strip_nulls",
    b"jsonb_to_recordset",
    b"jsonb_typeof",
    b"justify_days",
    b"lag",
    b"last_value",
    b"lead",
    b"least",
    b"left",
    b"length",
    b"ln",
    b"log",
    b"lower",
    b"lpad",
    b"ltrim",
    b"make_date",
    b"make_interval",
    b"make_time",
    b"make_timestamp",
    b"make_timestamptz",
    b"max",
    b"md5",
    b"min",
    b"mod",
    b"mode",
    b"nextval",
    b"now",
    b"nth_value",
    b"ntile",
    b"nullif",
    b"num_nonnulls",
    b"obj_description",
    b"octet_length",
    b"overlay",
    b"percent_rank",
    b"percentile_cont",
    b"percentile_disc",
    b"pg_advisory_xact_lock",
    b"pg_advisory_xact_lock_shared",
    b"pg_backend_pid",
    b"pg_blocking_pids",
    b"pg_column_size",
    b"pg_encoding_to_char",
    b"pg_get_constraintdef",
    b"pg_get_expr",
    b"pg_get_indexdef",
    b"pg_get_serial_sequence",
    b"pg_get_userbyid",
    b"pg_get_viewdef",
    b"pg_is_in_recovery",
    b"pg_isolation_test_session_is_blocked",
    b"pg_postmaster_start_time",
    b"pg_relation_size",
    b"pg_safe_snapshot_blocking_pids",
    b"pg_size_pretty",
    b"pg_sleep",
    b"pg_table_is_visible",
    b"pg_table_size",
    b"pg_total_relation_size",
    b"pg_try_advisory_xact_lock",
    b"pg_try_advisory_xact_lock_shared",
    b"pg_type_is_visible",
    b"pg_typeof",
    b"plainto_tsquery",
    b"position",
    b"power",
    b"quote_ident",
    b"quote_literal",
    b"quote_nullable",
    b"random",
    b"rank",
    b"regexp_match",
    b"regexp_matches",
    b"regexp_replace",
    b"regexp_split_to_array",
    b"regexp_split_to_table",
    b"repeat",
    b"replace",
    b"reverse",
    b"right",
    b"round",
    b"row_number",
    b"row_to_json",
    b"rpad",
    b"rtrim",
    b"setval",
    b"sha256",
    b"sign",
    b"split_part",
    b"sqrt",
    b"starts_with",
    b"statement_timestamp",
    b"stddev",
    b"string_agg",
    b"string_to_array",
    b"strpos",
    b"substr",
    b"substring",
    b"sum",
    b"to_char",
    b"to_date",
    b"to_json",
    b"to_jsonb",
    b"to_number",
    b"to_timestamp",
    b"to_tsquery",
    b"to_tsvector",
    b"transaction_timestamp",
    b"translate",
    b"trim",
    b"trunc",
    b"ts_rank",
    b"txid_current",
    b"unnest",
    b"upper",
    b"var_pop",
    b"variance",
    b"version",
    b"width_bucket",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_behind_a_number_ends_where_the_lexer_says() {
        for sql in ["delete 3Oj$$ $e\n;SET zz.q = 1", "select 1$$ ' $$; SET zz.q = 1", "select 1e5; SET zz.q = 1"] {
            assert!(leaves_state(sql.as_bytes()), "{sql}");
        }
        for sql in ["select 1$$; SET zz.q = 1$$", "select 0x1f, 1_000, 1.5e10, 2.", "select 1from t"] {
            assert!(!leaves_state(sql.as_bytes()), "{sql}");
        }
    }

    #[test]
    fn lists_are_sorted() {
        for list in [READ, STATELESS, KEYWORDS, HARMLESS] {
            for pair in list.windows(2) {
                assert!(pair[0] < pair[1], "{:?}", String::from_utf8_lossy(pair[1]));
            }
        }
    }

    #[test]
    fn the_first_word_is_found_behind_comments() {
        for (sql, expected) in [
            ("LISTEN a", true),
            (" ;\n-- x\n/* y */listen\ta", true),
            ("listen\"a\"", true),
            ("listener", false),
            ("select 'listen'", false),
            ("", false),
            ("lis", false),
            ("/* listen", false),
        ] {
            assert_eq!(begins_with(sql.as_bytes(), b"listen"), expected, "{sql}");
        }
    }

    #[test]
    fn ordinary_statements_leave_nothing() {
        for sql in [
            "SELECT abalance FROM pgbench_accounts WHERE aid = 123;",
            "UPDATE pgbench_tellers SET tbalance = tbalance + -5 WHERE tid = 3;",
            "INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (1, 2, 3, 4, CURRENT_TIMESTAMP);",
            "insert into s.t(a) values ($1) on conflict (a) do update set a = excluded.a returning id",
            "BEGIN",
            "COMMIT;",
            "",
            "  ",
            "-- nothing\n",
            "/* a /* nested */ set x */ select 1",
            "select count(*), coalesce(max(x), 0) from t where y in (1,2) and z like '%''set_config(%'",
            "SET LOCAL statement_timeout = 5",
            "set transaction isolation level serializable",
            "select $$ set_config( $$ || $a$ $$ ; set x $a$",
            "with a as (select 1) select * from a",
            "select pg_catalog.now()",
            "INSERT INTO \"T\" (a) VALUES (1)",
        ] {
            assert!(!leaves_state(sql.as_bytes()), "{sql}");
        }
    }

    #[test]
    fn whatever_may_leave_something_is_noticed() {
        for sql in [
            "SET x = 1",
            "set session x = 1",
            "RESET ALL",
            "LISTEN a",
            "PREPARE a AS SELECT 1",
            "DISCARD TEMP",
            "LOAD 'x'",
            "select 1; set x = 1",
            "select set_config('a','b',false)",
            "select pg_catalog . set_config('a','b',false)",
            "select pg_advisory_lock(1)",
            "select PG_Advisory_Lock (1)",
            "select my_function(1)",
            "select s.f(1)",
            "select \"set_config\"('a','b',false)",
            "select s.\"f\"(1)",
            "CREATE TEMP TABLE t (a int)",
            "create local temporary table t (a int)",
            "select 1 into temp t",
            "select * from pg_temp.t",
            "DO $$ begin end $$",
            "CALL p()",
            "declare c cursor with hold for select 1",
            "EXECUTE a",
            "/* */ SET x=1",
            "-- a\nset x=1",
            "select 'a\\' || set_config('b')",
            "update t set a = f(1)",
            "\u{e4}rger",
            "select setseed(0.5)",
        ] {
            assert!(leaves_state(sql.as_bytes()), "{sql}");
        }
    }

    fn seen(sql: &str) -> Seen {
        look(sql.as_bytes(), Lex::default(), |_| false)
    }

    #[test]
    fn a_call_is_one_however_it_is_set_apart() {
        for sql in [
            "SELECT set_config/**/('a.b', 'c', false)",
            "SELECT set_config -- \n ('a.b', 'c', false)",
            "SELECT my\x0b(1)",
            "SELECT \"f\" /* */ (1)",
            "SELECT s . count(1)",
            "SELECT s./**/count(1)",
            "SELECT \"s\".count(1)",
            "SELECT 1 AS into, set_config('a.b', 'c', false)",
            "SELECT t . into - set_config('a.b', 'c', false)",
            "INSERT INTO t SELECT \"set_config\"('a.b', 'c', false)",
            "EXPLAIN ANALYZE EXECUTE a",
            "CREATE TABLE t AS EXECUTE a",
            "SET local.x = 1",
            "SET transaction . x = 1",
            "SELECT U&\"f\"(1)",
        ] {
            assert!(seen(sql).leaves_state, "{sql}");
        }
        for sql in [
            "SELECT a - (1), b / (2) FROM t",
            "INSERT INTO t (a) SELECT count(*) FROM u",
            "INSERT INTO s.t(a) VALUES (lower('x'))",
            "INSERT INTO /* */ t -- x\n (a) VALUES (1)",
            "SELECT \"t\".a, count(*), \"t\" . b FROM t WHERE lower(a) = 'x'",
            "SELECT t.*, pg_catalog.now() FROM t",
            "SET\tLOCAL\na = 1",
            "SET/**/TRANSACTION-- x\nREAD ONLY",
        ] {
            assert!(!seen(sql).leaves_state, "{sql}");
        }
    }

    #[test]
    fn what_is_temporary_by_its_schema_or_by_the_path() {
        for sql in
            ["CREATE TABLE \"pg_temp\".x AS SELECT 1", "SELECT 1 INTO \"pg_temp_3\".x", "TABLE U&\"pg!005ftemp\".x"]
        {
            assert!(seen(sql).leaves_state, "{sql}");
        }
        for sql in ["CREATE TABLE x AS SELECT 1", "SELECT 1 INTO x", "EXPLAIN ANALYZE CREATE VIEW x AS SELECT 1"] {
            assert!(seen(sql).creates && !seen(sql).leaves_state, "{sql}");
        }
        for sql in ["INSERT INTO x SELECT 1", "SELECT 1", "DELETE FROM t", "/* create */ SELECT 'into'"] {
            assert!(!seen(sql).creates, "{sql}");
        }
        assert!(seen("INSERT INTO x SELECT 1; SELECT 1 INTO y").creates);
    }

    #[test]
    fn it_looks_to_the_end() {
        let behind = |sql: &str| seen(&format!("SET a = 1; {sql}"));
        assert!(behind("SET LOCAL b = 1").local && behind("INSERT INTO t VALUES (pg_backend_pid())").own_process);
        assert!(behind("TABLE pg_prepared_statements").lists && behind("SELECT pg_prepared_statement()").lists);
        assert!(behind("SELECT pg_blocking_pids(1)").processes && behind("DROP TABLE t").frees);
        assert!(behind("SELECT nextval('a')").advances && behind("CREATE TABLE x AS SELECT 1").creates);
        assert!(seen("SELECT * FROM \"pg_prepared_statements\"").lists);
        for set in ["SET LOCAL\na = 1", "SET\x0bLOCAL\ta = 1", "SET/**/LOCAL--\na = 1"] {
            assert!(seen(set).local, "{set}");
        }
        assert!(!seen("SET locality.a = 1").local && !seen("SET local.a = 1").local);
    }
}
