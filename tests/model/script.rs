//! Random sessions: what several clients say, one after the other. The same seed says the same.

use std::fmt;

/// A generator of its own, so that a seed means the same in every version of every library.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// SplitMix64.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(limit).unwrap()).unwrap()
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.below(from.len())]
    }
}

/// One message of a client.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Op {
    Query(String),
    Parse(&'static str, String),
    Bind(&'static str, Vec<String>),
    DescribeStatement(&'static str),
    DescribePortal,
    Execute,
    CloseStatement(&'static str),
    Sync,
    /// And a wait for the answer to a Describe.
    Flush,
    CopyData(&'static str),
    CopyDone,
    CopyFail,
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |sql: &str| sql.replace(DIGEST, "DIGEST").replace(HELD, "HELD");
        match self {
            Self::Query(sql) => write!(f, "Q[{}]", short(sql)),
            Self::Parse(name, sql) => write!(f, "P({name})[{}]", short(sql)),
            Self::Bind(name, values) => write!(f, "B({name}){values:?}"),
            Self::DescribeStatement(name) => write!(f, "DS({name})"),
            Self::DescribePortal => write!(f, "DP"),
            Self::Execute => write!(f, "E"),
            Self::CloseStatement(name) => write!(f, "CS({name})"),
            Self::Sync => write!(f, "S"),
            Self::Flush => write!(f, "H"),
            Self::CopyData(data) => write!(f, "d({data:?})"),
            Self::CopyDone => write!(f, "c"),
            Self::CopyFail => write!(f, "f"),
        }
    }
}

/// What one client says before it waits for the answer.
#[derive(Clone)]
pub(crate) struct Step {
    pub(crate) client: usize,
    pub(crate) ops: Vec<Op>,
    /// Statements in it.
    pub(crate) statements: usize,
    /// It may pin the client.
    pub(crate) pins: bool,
    /// The client leaves after that, and comes back.
    pub(crate) leaves: bool,
}

impl Step {
    /// Whoever asks for the state of sequences later asks once before it has any.
    fn first_ask(client: usize) -> Self {
        Self { client, ops: vec![Op::Query("SELECT lastval()".to_owned())], statements: 1, pins: true, leaves: false }
    }

    /// It leaves nothing behind that others could notice: when that is gone is not the same direct and through a pooler.
    fn leave(client: usize) -> Self {
        let ops = ["ROLLBACK", "DISCARD ALL"].map(|sql| Op::Query(sql.to_owned())).to_vec();
        Self { client, ops, statements: 2, pins: false, leaves: true }
    }
}

/// What the script has to know of a client to keep the others from waiting for a server connection.
#[derive(Clone, Default)]
pub(crate) struct Known {
    /// It has said something.
    pub(crate) met: bool,
    /// It is in a transaction.
    pub(crate) in_transaction: bool,
    /// It is in a transaction that has failed.
    pub(crate) failed: bool,
    /// It is in a transaction that has changed what texts mean.
    pub(crate) moved: bool,
    /// It may hold what cannot be carried.
    pub(crate) may_be_pinned: bool,
    /// It has asked for the state of sequences before. The first time is another story: see the README.
    pub(crate) asks: bool,
    /// It has seeded `random()`, and keeps its server connection to the end.
    pub(crate) seeded: bool,
}

impl Known {
    pub(crate) fn holds(&self) -> bool {
        self.in_transaction || self.may_be_pinned
    }
}

/// What a statement may do to the server connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    Calm,
    Begins,
    Pins,
}

const NAMES: &[&str] = &["a", "b", "c"];
/// Names by the protocol: `d` is what `EXECUTE` does not run, because its columns change.
const PROTOCOL_NAMES: &[&str] = &["a", "b", "c", "d", "d"];
const KEYS: &[&str] = &["1", "2", "3"];

/// Settings and values for them, some of them wrong.
const SETTINGS: &[(&str, &[&str])] = &[
    ("work_mem", &["'1MB'", "'2MB'", "'64kB'", "'much'"]),
    ("TimeZone", &["'UTC'", "'Asia/Tokyo'", "'Europe/Oslo'", "'No/Where'"]),
    ("DateStyle", &["'ISO, MDY'", "'German'", "'SQL, DMY'"]),
    ("IntervalStyle", &["'iso_8601'", "'postgres'", "'sql_standard'"]),
    ("extra_float_digits", &["0", "3", "99"]),
    ("application_name", &["'a'", "'b c'"]),
    ("client_encoding", &["'UTF8'", "'utf-8'", "'LATIN1'", "'none'"]),
    ("bytea_output", &["'hex'", "'escape'"]),
    ("search_path", &["''", "'public'", "'pg_catalog', 'public'"]),
    ("statement_timeout", &["'0'", "'60s'", "'5min'"]),
    ("lock_timeout", &["'0'", "'61s'"]),
    ("app.user", &["'alice'", "'bob''s'", "''"]),
    ("App.Other", &["'x'", "'\\'"]),
    ("default_transaction_read_only", &["on", "off", "off"]),
    ("default_transaction_isolation", &["'repeatable read'", "'read committed'"]),
    ("enable_seqscan", &["on", "off"]),
    ("standard_conforming_strings", &["on", "off"]),
    ("client_min_messages", &["notice", "warning", "error", "debug9"]),
    ("plan_cache_mode", &["'auto'", "'force_generic_plan'"]),
    ("array_nulls", &["on", "off"]),
    ("no_such_setting", &["1"]),
    ("max_connections", &["1"]),
    ("log_statement", &["'all'"]),
];

/// Every setting of the table, and what the session holds.
const DIGEST: &str = "SELECT name, setting FROM pg_catalog.pg_settings WHERE lower(name) = ANY ('{work_mem,timezone,datestyle,\
    intervalstyle,extra_float_digits,client_encoding,bytea_output,search_path,statement_timeout,lock_timeout,\
    default_transaction_read_only,default_transaction_isolation,enable_seqscan,standard_conforming_strings,\
    client_min_messages,plan_cache_mode,array_nulls,transaction_isolation,transaction_read_only}') ORDER BY 1";

const HELD: &str = "SELECT coalesce(pg_catalog.current_setting('app.user', true), '') AS u, \
    coalesce(pg_catalog.current_setting('app.other', true), '') AS o, \
    (SELECT string_agg(relname, ',' ORDER BY relname) FROM pg_catalog.pg_class WHERE relnamespace = pg_catalog.pg_my_temp_schema()) AS t, \
    (SELECT string_agg(name, ',' ORDER BY name) FROM pg_catalog.pg_cursors WHERE is_holdable) AS c, \
    (SELECT string_agg(name, ',' ORDER BY name) FROM pg_catalog.pg_prepared_statements WHERE from_sql) AS p";

/// Whether a step may change what later texts mean: by `search_path`, `TimeZone` and the like, or all of them.
pub(crate) fn moves(text: &str) -> bool {
    let text = text.to_lowercase();
    let settings =
        ["search_path", "schema", "time", "date", "interval", "encoding", "names", "strings", "nulls", " all"];
    let sets = ["set ", "set_config", "f_set"].iter().any(|word| text.contains(word));
    sets && settings.iter().any(|name| text.contains(name))
}

/// What settings make of literals. Not prepared under a name: whenever a server pleases, it reads the text again.
const READ_BY_SETTINGS: &str =
    "SELECT '02/03/2026 4:05'::timestamptz, '1 day -2 hours'::interval, '-1 2:03:04'::interval, '{NULL}'::text[]";

/// Says what clients say next.
pub(crate) struct Script {
    pub(crate) dice: Dice,
    /// Clients that may hold a server connection at a time.
    pub(crate) holders: usize,
    /// The client at hand may ask for the state of sequences.
    pub(crate) asks: bool,
    /// It is in a transaction that has failed.
    pub(crate) failed: bool,
    /// It is in a transaction that has changed what texts mean.
    pub(crate) moved: bool,
    /// The step at hand may pin.
    pub(crate) pins: bool,
}

impl Script {
    /// The next step, given what is known of the clients.
    pub(crate) fn step(&mut self, clients: &[Known]) -> Step {
        let client = self.dice.below(clients.len());
        let known = &clients[client];
        (self.asks, self.failed, self.moved) = (known.asks, known.failed, known.moved);
        let held = clients.iter().filter(|known| known.holds()).count();
        let free = known.holds() || held < self.holders;
        if known.met && self.dice.one_in(if known.asks || known.seeded { 15 } else { 90 }) {
            return Step::leave(client);
        }
        if !known.met && free && self.dice.one_in(5) {
            return Step::first_ask(client);
        }
        let mut step = Step { client, ops: Vec::new(), statements: 0, pins: false, leaves: false };
        self.pins = false;
        match self.dice.below(20) {
            0..8 => self.simple(&mut step, free, 1),
            8..10 => {
                let statements = 2 + self.dice.below(3);
                self.simple(&mut step, free, statements);
            }
            10..13 => self.unnamed(&mut step, free),
            // What has the name, and keeps it where it is prepared again, may be the beginning of a transaction.
            13..15 if !self.moved && free => self.prepared(&mut step, free),
            15 if free => self.named(&mut step),
            16 if free => self.apart(&mut step, free),
            13..17 => self.unnamed(&mut step, free),
            17 => self.pipeline(&mut step, free),
            18 => self.flushed(&mut step, free),
            _ => self.copy(&mut step),
        }
        step.pins = self.pins;
        step
    }

    fn simple(&mut self, step: &mut Step, free: bool, statements: usize) {
        let mut texts: Vec<String> = (0..statements).map(|_| self.statement(step.client, free)).collect();
        if self.failed {
            // Behind its end, in the same message, a server runs what it had prepared before.
            let mut behind = false;
            texts.retain(|text| !(std::mem::replace(&mut behind, true) && text.starts_with("EXECUTE")));
        }
        let separator = self.dice.pick(&["; ", ";", " ;\n-- and\n"]);
        let mut text = texts.join(separator);
        if self.dice.one_in(4) {
            text.push(';');
        }
        step.ops.push(Op::Query(text));
        step.statements += statements;
    }

    /// P B D E S
    fn unnamed(&mut self, step: &mut Step, free: bool) {
        let (sql, values) = self.parametrised(step.client, free);
        step.ops.push(Op::Parse("", sql));
        step.ops.push(Op::Bind("", values));
        if self.dice.one_in(2) {
            step.ops.push(Op::DescribePortal);
        }
        step.ops.extend([Op::Execute, Op::Sync]);
        step.statements += 1;
    }

    /// P [D] S, then B E S under a name; sometimes only one of the two.
    fn prepared(&mut self, step: &mut Step, free: bool) {
        let (name, (sql, values)) = match self.dice.one_in(3) {
            // Columns come and go.
            true => ("d", (format!("SELECT * FROM own_{} ORDER BY k", step.client), Vec::new())),
            false => (self.dice.pick(NAMES), self.nameable(step.client, free)),
        };
        if self.dice.one_in(3) {
            step.ops.push(Op::CloseStatement(name));
        }
        // A statement of which nobody was told what it returns may return anything later: see docs/compatibility.md.
        let told = name == "d";
        step.ops.push(Op::Parse(name, sql));
        if self.dice.one_in(2) || told {
            step.ops.push(Op::DescribeStatement(name));
        }
        if self.dice.one_in(2) {
            step.ops.push(Op::Sync);
        }
        step.ops.extend([Op::Bind(name, values), Op::Execute, Op::Sync]);
        step.statements += 1;
    }

    /// B D E S of what was, or was not, prepared before. What it runs is not known here: only statements that neither
    /// begin nor pin are prepared under a name.
    fn named(&mut self, step: &mut Step) {
        let name = self.dice.pick(PROTOCOL_NAMES);
        match self.dice.below(5) {
            0 if name != "d" => step.ops.push(Op::DescribeStatement(name)),
            1 => step.ops.push(Op::CloseStatement(name)),
            _ => {
                let values = if self.dice.one_in(2) { vec![self.dice.pick(KEYS).to_owned()] } else { Vec::new() };
                step.ops.extend([Op::Bind(name, values), Op::DescribePortal, Op::Execute]);
            }
        }
        step.ops.push(Op::Sync);
        step.statements += 1;
    }

    /// The unnamed statement lives from one Sync to the next.
    fn apart(&mut self, step: &mut Step, free: bool) {
        let (sql, values) = self.parametrised(step.client, free);
        step.ops.extend([Op::Parse("", sql), Op::DescribeStatement(""), Op::Sync]);
        step.ops.extend([Op::Bind("", values), Op::Execute, Op::Sync]);
        step.statements += 1;
    }

    /// Several statements before one Sync.
    fn pipeline(&mut self, step: &mut Step, free: bool) {
        for _ in 0..2 + self.dice.below(3) {
            let (sql, values) = self.nameable(step.client, free);
            let name = if self.dice.one_in(3) && !self.moved { self.dice.pick(NAMES) } else { "" };
            self.moved |= moves(&format!("{sql} {values:?}"));
            step.ops.extend([Op::Parse(name, sql), Op::Bind(name, values), Op::Execute]);
            if self.dice.one_in(6) {
                step.ops.push(Op::CloseStatement(name));
            }
            step.statements += 1;
        }
        step.ops.push(Op::Sync);
    }

    /// P D H, and after the answer B E S.
    fn flushed(&mut self, step: &mut Step, free: bool) {
        let (sql, values) = self.parametrised(step.client, free);
        step.ops.extend([Op::Parse("", sql), Op::DescribeStatement(""), Op::Flush]);
        step.ops.extend([Op::Bind("", values), Op::Execute, Op::Sync]);
        step.statements += 1;
    }

    fn copy(&mut self, step: &mut Step) {
        step.statements += 1;
        let client = step.client;
        let table = if self.dice.one_in(4) { "no_such_table".to_owned() } else { format!("own_{client}") };
        match self.dice.below(4) {
            0 => step.ops.push(Op::Query(format!("COPY (SELECT k, v FROM {table} ORDER BY k) TO STDOUT"))),
            1 => step.ops.extend([
                Op::Query(format!("COPY {table} (k, v) FROM STDIN")),
                Op::CopyData("7\tcopied\n"),
                Op::CopyDone,
            ]),
            2 => step.ops.extend([
                Op::Query(format!("COPY {table} (k, v) FROM STDIN")),
                Op::CopyData("8\tnot "),
                Op::CopyFail,
            ]),
            _ => step.ops.extend([
                Op::Query(format!("COPY {table} (k, v) FROM STDIN")),
                Op::CopyData("x\ty\n"),
                Op::CopyDone,
            ]),
        }
    }

    fn statement(&mut self, client: usize, free: bool) -> String {
        loop {
            let (sql, effect) = self.any(client);
            if free || effect == Effect::Calm {
                self.pins |= effect == Effect::Pins;
                return sql;
            }
        }
    }

    /// A statement with values for its parameters. It neither begins a transaction nor pins: it may be run by name later.
    fn parametrised(&mut self, client: usize, free: bool) -> (String, Vec<String>) {
        let key = self.dice.pick(KEYS).to_owned();
        match self.dice.below(10) {
            0 => ("SELECT $1::int + 1".to_owned(), vec![key]),
            1 => ("INSERT INTO notes (note) VALUES ($1)".to_owned(), vec![format!("c{client}")]),
            2 => (format!("UPDATE own_{client} SET v = 'p' WHERE k = $1::int"), vec![key]),
            3 => {
                let (name, values) = SETTINGS[self.dice.below(SETTINGS.len())];
                let value = self.dice.pick(values).trim_matches('\'').to_owned();
                let local = self.dice.pick(&["true", "false"]).to_owned();
                ("SELECT set_config($1, $2, $3::bool)".to_owned(), vec![name.to_owned(), value, local])
            }
            4 => ("SELECT 1 / ($1::int - 2)".to_owned(), vec![key]),
            _ => loop {
                let (sql, effect) = self.any(client);
                if effect == Effect::Calm || (free && effect == Effect::Begins && self.dice.one_in(3)) {
                    return (sql, Vec::new());
                }
            },
        }
    }

    /// One that may be prepared under a name: what it does with names of others is the business of the unnamed.
    fn nameable(&mut self, client: usize, free: bool) -> (String, Vec<String>) {
        loop {
            let (sql, values) = self.parametrised(client, free);
            let unfit = ["EXECUTE", "DEALLOCATE", "deallocate", "SELECT * FROM own", READ_BY_SETTINGS];
            if !unfit.iter().any(|verb| sql.starts_with(verb)) {
                return (sql, values);
            }
        }
    }

    fn any(&mut self, client: usize) -> (String, Effect) {
        match self.dice.below(100) {
            0..22 => (self.setting(), Effect::Calm),
            22..34 => (self.shown(), Effect::Calm),
            34..52 => self.transaction(),
            52..66 => (self.data(client), if self.asks { Effect::Pins } else { Effect::Calm }),
            66..70 => (self.mistake(), Effect::Calm),
            70..75 => self.temporary(),
            75..80 => self.sql_prepared(),
            80..85 => self.cursor(),
            85..90 => self.advisory(client),
            90..94 => self.sequence(),
            94..97 => self.function(),
            _ => (self.discard(), Effect::Calm),
        }
    }

    fn setting(&mut self) -> String {
        let (name, values) = SETTINGS[self.dice.below(SETTINGS.len())];
        let value = self.dice.pick(values);
        let text = if value.starts_with('\'') && !value.contains(", ") {
            value.to_owned()
        } else {
            format!("'{}'", value.replace('\'', ""))
        };
        match self.dice.below(14) {
            0..4 => format!("SET {name} = {value}"),
            4 => format!("set session {name} TO {value}"),
            5 | 6 => format!("SET LOCAL {name} = {value}"),
            7 => format!("SELECT set_config('{name}', {text}, false)"),
            8 => format!("SELECT pg_catalog.set_config('{name}', {text}, true)"),
            9 | 10 => format!("RESET {name}"),
            11 => format!("SET {name} TO DEFAULT"),
            12 => "SET TIME ZONE 'Europe/Oslo'".to_owned(),
            _ => self
                .dice
                .pick(&[
                    "RESET ALL",
                    "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ",
                    "/* c */ SET NAMES 'LATIN1'",
                    "RESET TIME ZONE",
                    "SET SCHEMA 'public'",
                    "reset all",
                ])
                .to_owned(),
        }
    }

    fn shown(&mut self) -> String {
        // What an application_name is reset to shows in the next transaction only.
        let readable: Vec<&str> = SETTINGS.iter().map(|(name, _)| *name).filter(|n| *n != "application_name").collect();
        let name = self.dice.pick(&readable);
        match self.dice.below(6) {
            0 if !name.contains('.') => format!("SHOW {name}"),
            1 if !name.contains('.') => format!("SELECT current_setting('{name}')"),
            2 if self.dice.one_in(2) => "SELECT '2026-01-02 03:04:05+00'::timestamptz, '1 day 2 hours'::interval, \
                1.1::float8, '\\x41'::bytea, length('\u{e4}')"
                .to_owned(),
            2 => READ_BY_SETTINGS.to_owned(),
            3 => HELD.to_owned(),
            _ => DIGEST.to_owned(),
        }
    }

    fn transaction(&mut self) -> (String, Effect) {
        let (text, effect) = match self.dice.below(22) {
            0..4 => ("BEGIN", Effect::Begins),
            4 => ("START TRANSACTION ISOLATION LEVEL REPEATABLE READ", Effect::Begins),
            5 => ("BEGIN READ ONLY", Effect::Begins),
            6..10 => ("COMMIT", Effect::Calm),
            10..13 => ("ROLLBACK", Effect::Calm),
            13 => ("COMMIT AND CHAIN", Effect::Begins),
            14 => ("ROLLBACK AND CHAIN", Effect::Begins),
            15 => ("SAVEPOINT s", Effect::Calm),
            16 => ("SAVEPOINT t", Effect::Calm),
            17 => ("ROLLBACK TO SAVEPOINT s", Effect::Calm),
            18 => ("ROLLBACK TO t", Effect::Calm),
            19 => ("RELEASE s", Effect::Calm),
            20 => ("SET TRANSACTION READ ONLY", Effect::Calm),
            _ => ("END", Effect::Calm),
        };
        (text.to_owned(), effect)
    }

    fn data(&mut self, client: usize) -> String {
        let key = self.dice.pick(KEYS);
        match self.dice.below(10) {
            9 => format!(
                "ALTER TABLE own_{client} {}",
                self.dice.pick(&["ADD COLUMN IF NOT EXISTS w int", "DROP COLUMN IF EXISTS w"])
            ),
            0 => format!("INSERT INTO notes (note) VALUES ('c{client}')"),
            1 => format!("INSERT INTO notes (note) VALUES ('c{client}') RETURNING id"),
            2 => format!("UPDATE own_{client} SET v = v || 'x' WHERE k = {key} RETURNING v"),
            3 => "SELECT count(*), max(id) FROM notes".to_owned(),
            4 => format!("SELECT * FROM own_{client} ORDER BY k"),
            5 => format!("DELETE FROM notes WHERE note = 'c{client}'"),
            6 => format!("SELECT k, coalesce(v, '') FROM own_{client} WHERE k IN (1, 2) ORDER BY k"),
            7 => format!("INSERT INTO own_{client} VALUES ({key}, 'again')"),
            _ => String::from("SELECT 1 AS one, 'x;y' AS two"),
        }
    }

    fn mistake(&mut self) -> String {
        self.dice
            .pick(&["SELECT 1/0", "SELEKT", "SELECT * FROM no_such_table", "SELECT no_such_column", "SELECT", ""])
            .to_owned()
    }

    fn temporary(&mut self) -> (String, Effect) {
        let name = self.dice.pick(NAMES);
        match self.dice.below(9) {
            0 => (format!("CREATE TEMP TABLE tmp_{name} (x int)"), Effect::Pins),
            1 => (format!("CREATE TEMPORARY TABLE tmp_{name} (x int) ON COMMIT DROP"), Effect::Pins),
            2 => (format!("SELECT 1 AS x INTO TEMP tmp_{name}"), Effect::Pins),
            3 => (format!("INSERT INTO tmp_{name} VALUES (1), (2)"), Effect::Calm),
            4 | 5 => (format!("SELECT sum(x) FROM tmp_{name}"), Effect::Calm),
            6 => (format!("CREATE TEMP VIEW tmp_{name} AS SELECT 3 AS x"), Effect::Pins),
            7 => ("DISCARD TEMP".to_owned(), Effect::Calm),
            _ => (format!("DROP TABLE tmp_{name}"), Effect::Calm),
        }
    }

    fn sql_prepared(&mut self) -> (String, Effect) {
        let name = self.dice.pick(NAMES);
        match self.dice.below(8) {
            0 => (format!("PREPARE {name} AS SELECT 'sql', 1"), Effect::Pins),
            1 => (format!("PREPARE {name} (int) AS SELECT $1 * 2"), Effect::Pins),
            2 | 3 => (format!("EXECUTE {name}"), Effect::Calm),
            4 => (format!("EXECUTE {name} (3)"), Effect::Calm),
            5 => (format!("DEALLOCATE {name}"), Effect::Calm),
            6 => (format!("deallocate prepare \"{name}\""), Effect::Calm),
            _ => ("DEALLOCATE ALL".to_owned(), Effect::Calm),
        }
    }

    fn cursor(&mut self) -> (String, Effect) {
        let name = self.dice.pick(NAMES);
        match self.dice.below(8) {
            0 => (format!("DECLARE cur_{name} CURSOR FOR SELECT * FROM generate_series(1, 9)"), Effect::Calm),
            1 => (format!("DECLARE cur_{name} CURSOR WITH HOLD FOR SELECT * FROM generate_series(1, 9)"), Effect::Pins),
            2 => (format!("DECLARE cur_{name} SCROLL CURSOR WITHOUT HOLD FOR VALUES (1), (2)"), Effect::Calm),
            3 | 4 => (format!("FETCH 2 FROM cur_{name}"), Effect::Calm),
            5 => (format!("MOVE 1 IN cur_{name}"), Effect::Calm),
            6 => (format!("CLOSE cur_{name}"), Effect::Calm),
            _ => ("CLOSE ALL".to_owned(), Effect::Calm),
        }
    }

    fn advisory(&mut self, client: usize) -> (String, Effect) {
        let key = self.dice.pick(KEYS);
        match self.dice.below(8) {
            0 => (format!("SELECT pg_try_advisory_lock({key})"), Effect::Pins),
            1 => (format!("SELECT pg_advisory_lock({})", 100 + client), Effect::Pins),
            2 => (format!("SELECT pg_try_advisory_lock_shared({key})"), Effect::Pins),
            3 => (format!("SELECT pg_advisory_unlock({key})"), Effect::Calm),
            4 => (format!("SELECT pg_advisory_unlock({})", 100 + client), Effect::Calm),
            5 => (format!("SELECT pg_try_advisory_xact_lock({key})"), Effect::Calm),
            6 => (format!("SELECT pg_advisory_xact_lock({})", 200 + client), Effect::Calm),
            _ => ("SELECT pg_advisory_unlock_all()".to_owned(), Effect::Calm),
        }
    }

    fn sequence(&mut self) -> (String, Effect) {
        let (advances, kinds) = if self.asks { (Effect::Pins, 8) } else { (Effect::Calm, 2) };
        match self.dice.below(kinds) {
            0 => ("SELECT nextval('numbers')".to_owned(), advances),
            1 if !self.asks => ("SELECT setval('numbers', 50)".to_owned(), advances),
            1 => ("SELECT nextval('numbers'), lastval()".to_owned(), Effect::Pins),
            2 => ("SELECT currval('numbers')".to_owned(), Effect::Pins),
            3 => ("SELECT lastval()".to_owned(), Effect::Pins),
            4 => ("SELECT currval('notes_id_seq')".to_owned(), Effect::Pins),
            5 => ("SELECT setval('numbers', 100)".to_owned(), advances),
            6 => ("DISCARD SEQUENCES".to_owned(), Effect::Calm),
            _ => ("SELECT nextval('numbers'), currval('numbers')".to_owned(), Effect::Pins),
        }
    }

    fn function(&mut self) -> (String, Effect) {
        match self.dice.below(8) {
            0 => ("SELECT f_set('work_mem', '3MB')".to_owned(), Effect::Calm),
            1 => ("SELECT f_set('TimeZone', 'Asia/Tokyo')".to_owned(), Effect::Calm),
            2 => ("SELECT f_temp()".to_owned(), Effect::Pins),
            3 => ("DO $$ BEGIN PERFORM set_config('lock_timeout', '7s', false); END $$".to_owned(), Effect::Calm),
            4 => ("DO $$ BEGIN RAISE EXCEPTION 'mine' USING ERRCODE = 'P0042'; END $$".to_owned(), Effect::Calm),
            5 => ("DO $$ BEGIN RAISE NOTICE 'hello'; END $$".to_owned(), Effect::Calm),
            6 => (self.dice.pick(&["SELECT setseed(0.25)", "SET seed TO 0.5"]).to_owned(), Effect::Pins),
            _ => ("SELECT f_note()".to_owned(), Effect::Calm),
        }
    }

    fn discard(&mut self) -> String {
        self.dice
            .pick(&[
                "DISCARD ALL",
                "DISCARD ALL",
                "DISCARD PLANS",
                "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;",
                "UNLISTEN *",
            ])
            .to_owned()
    }
}
