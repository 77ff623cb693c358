//! The files of a corpus: `attacks.jsonl` (SQL) and `attacks_wire.jsonl` (messages), one JSON object per line.
//!
//! An entry has an id, the plans and pool modes it is meant for, what the attacker does, what another tenant (or the
//! same one later) does then, and `leak_if`: conditions of which any that holds is a leak. Patterns are multi-line.

use std::collections::BTreeMap;
use std::path::Path;

use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::Value;

use super::Error;
use super::client::Reply;

/// Attacker and victim, as the entries call them.
pub const ATTACKER: &str = "tenant_a";
pub const VICTIM: &str = "tenant_b";

/// One line of either file.
#[derive(Debug, Clone, Deserialize)]
pub struct Entry {
    pub id: String,
    #[serde(default)]
    pub group: String,
    pub plan: Vec<String>,
    #[serde(default)]
    pub mode: Vec<String>,
    #[serde(default)]
    pub setup_as: String,
    #[serde(default)]
    pub setup_sql: Vec<String>,
    #[serde(default, rename = "as")]
    pub run_as: String,
    #[serde(default)]
    pub proto: String,
    #[serde(default)]
    pub sql: Vec<String>,
    #[serde(default)]
    pub copy_data: String,
    #[serde(default)]
    pub link: Link,
    #[serde(default)]
    pub then_as: String,
    #[serde(default)]
    pub then_sql: Vec<String>,
    #[serde(default)]
    pub must: String,
    #[serde(default)]
    pub leak_if: LeakIf,
    #[serde(default)]
    pub note: String,
    /// For an entry of `attacks_wire.jsonl`; see [`Step`].
    #[serde(default)]
    pub steps: Vec<Step>,
    /// What others measured, by plan: not used for a verdict.
    #[serde(default)]
    pub observed: BTreeMap<String, String>,
    /// Plans in which others found no way to stop it: not used for a verdict.
    #[serde(default)]
    pub residual_in_rec: Vec<String>,
}

/// How `then_sql` follows `sql`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Link {
    /// It does not.
    #[default]
    SameSession,
    /// The attacker is done, the next one gets what it leaves.
    Handover,
    /// The attacker stays, in whatever state it is.
    Concurrent,
    /// With a server connection that has just logged in.
    NewBackend,
    /// On the connection that ran `setup_sql`.
    ConcurrentSetupConn,
    /// Then the attacker says `SELECT 1`, and what it hears counts as output of `sql`.
    ConcurrentPollA,
}

/// One step of a wire entry: `[verb, connection, …]`.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "Vec<Value>")]
pub enum Step {
    Connect { name: String, tenant: String, parameters: BTreeMap<String, String> },
    Send { name: String, messages: Vec<Message> },
    Receive { name: String, ready: usize },
    Poll { name: String, seconds: f64 },
    Handover { name: String, tenant: String },
    Drop { name: String },
    Cancel { of: String },
}

/// What a client may say.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<Value>")]
pub enum Message {
    Query(String),
    Parse { statement: String, sql: String },
    Bind { portal: String, statement: String, values: Vec<String> },
    Describe { what: u8, name: String },
    Execute { portal: String },
    Close { what: u8, name: String },
    Sync,
    Flush,
    FunctionCall { oid: u32, arguments: Vec<String> },
    CopyData(String),
    CopyDone,
    CopyFail(String),
    Terminate,
    Raw(Vec<u8>),
}

/// When an entry leaked. Fields without a prefix are for wire entries.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LeakIf {
    sql_regex: Option<Pattern>,
    sql_err_regex: Option<Pattern>,
    sql_tags_regex: Option<Pattern>,
    sql_sqlstate: Vec<String>,
    sql_no_error: bool,
    then_regex: Option<Pattern>,
    then_err_regex: Option<Pattern>,
    then_not_regex: Option<Pattern>,
    then_sqlstate: Vec<String>,
    regex: Option<Pattern>,
    regex_b: Option<Pattern>,
    not_regex: Option<Pattern>,
    sqlstate: Vec<String>,
}

/// A regular expression, multi-line.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(Regex);

impl TryFrom<String> for Pattern {
    type Error = regex::Error;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        RegexBuilder::new(&text).multi_line(true).build().map(Self)
    }
}

impl LeakIf {
    /// The conditions that hold for an entry of SQL.
    pub fn of_sql(&self, sql: &Reply, then: &Reply) -> Vec<String> {
        let mut held = Vec::new();
        let mut check = |name: &str, holds: bool| {
            if holds {
                held.push(name.to_owned());
            }
        };
        check("sql_regex", matches(self.sql_regex.as_ref(), &sql.text));
        check("sql_err_regex", matches(self.sql_err_regex.as_ref(), &sql.error_text()));
        check("sql_tags_regex", matches(self.sql_tags_regex.as_ref(), &sql.tags.join("\n")));
        check("sql_sqlstate", sql.has_code(&self.sql_sqlstate));
        check("sql_no_error", self.sql_no_error && sql.errors.is_empty() && !sql.closed);
        check("then_regex", matches(self.then_regex.as_ref(), &then.text));
        check("then_err_regex", matches(self.then_err_regex.as_ref(), &then.error_text()));
        check("then_not_regex", lacks(self.then_not_regex.as_ref(), &then.text));
        check("then_sqlstate", then.has_code(&self.then_sqlstate));
        // Whoever waits for ever is held up, even if its own time-out did not survive the pool mode.
        let awaits = self.then_sqlstate.iter().any(|code| matches!(code.as_str(), "55P03" | "57014"));
        check("then waits", awaits && then.stuck);
        held
    }

    /// The conditions that hold for a wire entry, by connection.
    pub fn of_wire(&self, replies: &BTreeMap<String, Reply>) -> Vec<String> {
        let all = |part: fn(&Reply) -> String| replies.values().map(part).collect::<Vec<_>>().join("\n");
        let text = all(|reply| reply.text.clone());
        let b = replies.get("b").map_or("", |reply| &reply.text);
        let mut held = Vec::new();
        let mut check = |name: &str, holds: bool| {
            if holds {
                held.push(name.to_owned());
            }
        };
        check("regex", matches(self.regex.as_ref(), &text));
        check("regex_b", matches(self.regex_b.as_ref(), b));
        check("not_regex", lacks(self.not_regex.as_ref(), &text));
        check("sqlstate", replies.values().any(|reply| reply.has_code(&self.sqlstate)));
        held
    }
}

fn matches(pattern: Option<&Pattern>, text: &str) -> bool {
    pattern.is_some_and(|pattern| pattern.0.is_match(text))
}

fn lacks(pattern: Option<&Pattern>, text: &str) -> bool {
    pattern.is_some_and(|pattern| !pattern.0.is_match(text))
}

/// A list read from its head.
struct Words(std::vec::IntoIter<Value>);

impl Words {
    fn text(&mut self) -> Result<String, String> {
        match self.0.next() {
            Some(Value::String(text)) => Ok(text),
            other => Err(format!("a text is missing: {other:?}")),
        }
    }

    fn parse<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, String> {
        let value = self.0.next().ok_or("something is missing at the end")?;
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    fn kind(&mut self) -> Result<u8, String> {
        match self.text()?.as_bytes() {
            [kind] => Ok(*kind),
            _ => Err("S or P is missing".to_owned()),
        }
    }
}

impl TryFrom<Vec<Value>> for Step {
    type Error = String;

    fn try_from(list: Vec<Value>) -> Result<Self, String> {
        let mut words = Words(list.into_iter());
        let (verb, name) = (words.text()?, words.text()?);
        Ok(match verb.as_str() {
            "conn" => Self::Connect { name, tenant: words.text()?, parameters: words.parse()? },
            "send" => Self::Send { name, messages: words.parse()? },
            "recv" => Self::Receive { name, ready: words.parse()? },
            "poll" => Self::Poll { name, seconds: words.parse()? },
            "handover" => Self::Handover { name, tenant: words.text()? },
            "drop" => Self::Drop { name },
            "cancel" => Self::Cancel { of: words.text()? },
            other => return Err(format!("unknown step {other:?}")),
        })
    }
}

impl TryFrom<Vec<Value>> for Message {
    type Error = String;

    fn try_from(list: Vec<Value>) -> Result<Self, String> {
        let mut words = Words(list.into_iter());
        Ok(match words.text()?.as_str() {
            "Q" => Self::Query(words.text()?),
            "P" => Self::Parse { statement: words.text()?, sql: words.text()? },
            "B" => Self::Bind { portal: words.text()?, statement: words.text()?, values: words.parse()? },
            "D" => Self::Describe { what: words.kind()?, name: words.text()? },
            "E" => Self::Execute { portal: words.text()? },
            "C" => Self::Close { what: words.kind()?, name: words.text()? },
            "S" => Self::Sync,
            "H" => Self::Flush,
            "F" => Self::FunctionCall { oid: words.parse()?, arguments: words.parse()? },
            "d" => Self::CopyData(words.text()?),
            "c" => Self::CopyDone,
            "f" => Self::CopyFail(words.text()?),
            "X" => Self::Terminate,
            "raw" => Self::Raw(hex(&words.text()?)?),
            other => return Err(format!("unknown message {other:?}")),
        })
    }
}

fn hex(text: &str) -> Result<Vec<u8>, String> {
    let digits: Vec<char> = text.chars().collect();
    let byte = |pair: &[char]| {
        u8::from_str_radix(&pair.iter().collect::<String>(), 16).map_err(|_| format!("not hexadecimal: {text}"))
    };
    digits.chunks(2).map(byte).collect()
}

/// Reads the files of a folder, of which one may be missing.
///
/// # Errors
/// Neither file is there, or a line is not an entry.
pub fn load(folder: &Path) -> Result<Vec<Entry>, Error> {
    let mut entries = Vec::new();
    for file in ["attacks.jsonl", "attacks_wire.jsonl"] {
        let path = folder.join(file);
        if !path.exists() {
            continue;
        }
        for (number, line) in std::fs::read_to_string(&path)?.lines().enumerate() {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let entry = serde_json::from_str(line)
                .map_err(|error| format!("{}, line {}: {error}", path.display(), number + 1))?;
            entries.push(entry);
        }
    }
    if entries.is_empty() {
        return Err(format!("no attacks.jsonl or attacks_wire.jsonl in {}", folder.display()).into());
    }
    Ok(entries)
}

fn incomplete(path: &Path, line: &str) -> Error {
    format!("{}: not `id plan grade reason`: {line}", path.display()).into()
}

/// Leaks that a plan cannot prevent: lines `id plan grade reason`, where the grade is `compat`, `strict` or `any`.
#[derive(Debug, Default)]
pub struct Unstoppable(Vec<(String, String, String, String)>);

impl Unstoppable {
    /// # Errors
    /// The file is not there, or a line lacks something, the reason for instance.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let mut list = Vec::new();
        for line in std::fs::read_to_string(path)?.lines() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            let [id, plan, grade, reason @ ..] = words.as_slice() else { return Err(incomplete(path, line)) };
            if reason.is_empty() || !["compat", "strict", "any"].contains(grade) {
                return Err(incomplete(path, line));
            }
            let [id, plan, grade] = [id, plan, grade].map(|word| (*word).to_owned());
            let reason = reason.join(" ");
            list.push((id, plan, grade, reason));
        }
        Ok(Self(list))
    }

    /// Why this one may leak, if it may.
    pub fn reason(&self, id: &str, plan: &str, grade: &str) -> Option<&str> {
        let fits = |line: &&(String, String, String, String)| {
            line.0 == id && line.1 == plan && (line.2 == "any" || line.2 == grade)
        };
        self.0.iter().find(fits).map(|line| line.3.as_str())
    }

    /// The ids listed for a plan and grade.
    pub fn ids<'a>(&'a self, plan: &'a str, grade: &'a str) -> impl Iterator<Item = &'a str> {
        let fits =
            move |line: &&(String, String, String, String)| line.1 == plan && (line.2 == "any" || line.2 == grade);
        self.0.iter().filter(fits).map(|line| line.0.as_str())
    }
}
