//! Kinds of value: how each is written, what is refused, and how it is written back.

use std::path::PathBuf;
use std::time::Duration;

use super::mistake::nearest;
use super::{AuthType, LogFormat, PoolMode, Secret, Source, SslMode};
use crate::tenant::Plan;
use crate::tenant::plan::Hardening;

/// A value as it was written, before it means anything. No `Debug`: it may be a secret.
#[derive(Clone, PartialEq)]
pub(super) enum Raw {
    /// A number or a boolean of the file.
    Bare(String),
    /// A string of the file.
    Quoted(String),
    /// A list of the file.
    List(Vec<Self>),
    /// An environment variable, in which all kinds look alike.
    Variable(String),
    /// Something else that TOML knows and no key takes, by its name.
    Other(&'static str),
}

/// Why a value is refused.
#[derive(Debug, PartialEq)]
pub(super) struct Wrong {
    pub(super) problem: String,
    pub(super) nearest: Option<String>,
}

impl Wrong {
    fn new(problem: impl Into<String>) -> Self {
        Self { problem: problem.into(), nearest: None }
    }
}

type Result<T> = std::result::Result<T, Wrong>;

/// A kind of value.
pub(super) trait Kind {
    /// What it is in [`super::Config`].
    type Value;

    /// Whether it may also come from a file named by `<key>_file`.
    const SECRET: bool = false;

    fn read(raw: &Raw) -> Result<Self::Value>;

    /// How it is written in a file; `None` if it is left out.
    fn write(value: &Self::Value) -> Option<String>;
}

impl Raw {
    /// The value as it may be repeated to a person.
    fn shown(&self) -> String {
        match self {
            Self::Bare(text) => text.clone(),
            Self::Quoted(text) | Self::Variable(text) => format!("{text:?}"),
            Self::List(_) => "a list".to_owned(),
            Self::Other(what) => (*what).to_owned(),
        }
    }

    /// The text of a string, or of a variable.
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Quoted(text) | Self::Variable(text) => Some(text),
            Self::Bare(_) | Self::List(_) | Self::Other(_) => None,
        }
    }

    /// The text of a number or boolean, or of a variable.
    fn bare(&self) -> Option<&str> {
        match self {
            Self::Bare(text) => Some(text),
            Self::Variable(text) => Some(text.trim()),
            Self::Quoted(_) | Self::List(_) | Self::Other(_) => None,
        }
    }
}

/// A string.
pub(super) struct Text;

impl Kind for Text {
    type Value = String;

    fn read(raw: &Raw) -> Result<String> {
        let text = raw.text().ok_or_else(|| Wrong::new(format!("expected a text in quotes, found {}", raw.shown())))?;
        // A NUL ends a string in PostgreSQL's protocol and in the operating system; no key has a use for it.
        if text.contains('\0') { Err(Wrong::new("must not contain a NUL character")) } else { Ok(text.to_owned()) }
    }

    fn write(value: &String) -> Option<String> {
        Some(format!("{value:?}"))
    }
}

/// A path.
pub(super) struct File;

impl Kind for File {
    type Value = PathBuf;

    fn read(raw: &Raw) -> Result<PathBuf> {
        Text::read(raw).map(PathBuf::from)
    }

    fn write(value: &PathBuf) -> Option<String> {
        Some(format!("{value:?}"))
    }
}

/// A text that is not repeated in any message.
pub(super) struct Hidden;

impl Kind for Hidden {
    type Value = Secret;
    const SECRET: bool = true;

    fn read(raw: &Raw) -> Result<Secret> {
        let text = raw.text().ok_or_else(|| Wrong::new("expected a text in quotes"))?;
        if text.contains('\0') { Err(Wrong::new("must not contain a NUL character")) } else { Ok(Secret::new(text)) }
    }

    fn write(value: &Secret) -> Option<String> {
        (!value.expose().is_empty()).then(|| "\"***\"".to_owned())
    }
}

/// A value that may be absent; an empty text is absent too.
pub(super) struct Optional<K>(std::marker::PhantomData<K>);

impl<K: Kind> Kind for Optional<K> {
    type Value = Option<K::Value>;
    const SECRET: bool = K::SECRET;

    fn read(raw: &Raw) -> Result<Self::Value> {
        if raw.text() == Some("") { Ok(None) } else { K::read(raw).map(Some) }
    }

    fn write(value: &Self::Value) -> Option<String> {
        value.as_ref().and_then(K::write)
    }
}

/// `true` or `false`.
pub(super) struct Flag;

impl Kind for Flag {
    type Value = bool;

    fn read(raw: &Raw) -> Result<bool> {
        match raw.bare() {
            Some("true") => Ok(true),
            Some("false") => Ok(false),
            _ => Err(Wrong::new(format!("expected true or false, found {}", raw.shown()))),
        }
    }

    fn write(value: &bool) -> Option<String> {
        Some(value.to_string())
    }
}

/// A whole number within bounds.
pub(super) struct Number<T, const MIN: i64, const MAX: i64>(std::marker::PhantomData<T>);

impl<T: TryFrom<i64> + ToString, const MIN: i64, const MAX: i64> Kind for Number<T, MIN, MAX> {
    type Value = T;

    fn read(raw: &Raw) -> Result<T> {
        let wrong = || Wrong::new(format!("expected a whole number from {MIN} to {MAX}, found {}", raw.shown()));
        let number: i64 = raw.bare().and_then(|text| text.replace('_', "").parse().ok()).ok_or_else(wrong)?;
        if !(MIN..=MAX).contains(&number) {
            return Err(wrong());
        }
        T::try_from(number).map_err(|_| wrong())
    }

    fn write(value: &T) -> Option<String> {
        Some(value.to_string())
    }
}

/// Permissions of a file: `"0777"`, as PgBouncer writes them, or TOML's `0o777`.
pub(super) struct Mode;

impl Kind for Mode {
    type Value = u32;

    fn read(raw: &Raw) -> Result<u32> {
        let digits = match raw {
            Raw::Bare(text) => text.strip_prefix("0o"),
            _ => raw.text(),
        };
        digits.and_then(|digits| u32::from_str_radix(digits, 8).ok()).filter(|&mode| mode <= 0o777).ok_or_else(|| {
            Wrong::new(format!("expected permissions as octal digits, such as \"0770\", found {}", raw.shown()))
        })
    }

    fn write(value: &u32) -> Option<String> {
        Some(format!("\"{value:04o}\""))
    }
}

/// A time that may be zero, which turns off what it limits.
pub(super) struct Time;

/// A time that must not be zero.
pub(super) struct SomeTime;

/// Longer times are mistakes; besides, adding them to a clock must not overflow.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

impl Kind for Time {
    type Value = Duration;

    fn read(raw: &Raw) -> Result<Duration> {
        let expected = |nearest| Wrong {
            problem: format!(
                "expected a time with a unit, such as \"500ms\", \"30s\", \"5min\", \"1h\", found {}",
                raw.shown()
            ),
            nearest,
        };
        if raw.bare() == Some("0") || raw.text().map(str::trim) == Some("0") {
            return Ok(Duration::ZERO);
        }
        if let Some(seconds) = raw.bare().and_then(|text| text.parse::<u64>().ok()) {
            // PgBouncer's files say it so.
            return Err(expected(Some(format!("{seconds}s"))));
        }
        let time = raw.text().and_then(|text| humantime::parse_duration(text.trim()).ok());
        match time.ok_or_else(|| expected(None))? {
            time if time > LONGEST => Err(Wrong::new(format!("{} is longer than a year", raw.shown()))),
            time => Ok(time),
        }
    }

    fn write(value: &Duration) -> Option<String> {
        if value.is_zero() {
            return Some("0".to_owned());
        }
        let text = match (value.as_secs(), value.subsec_nanos()) {
            (seconds, 0) if seconds % 3600 == 0 => format!("{}h", seconds / 3600),
            (seconds, 0) if seconds % 60 == 0 => format!("{}min", seconds / 60),
            _ => humantime::format_duration(*value).to_string(),
        };
        Some(format!("\"{text}\""))
    }
}

impl Kind for SomeTime {
    type Value = Duration;

    fn read(raw: &Raw) -> Result<Duration> {
        match Time::read(raw)? {
            Duration::ZERO => Err(Wrong::new("must not be zero")),
            time => Ok(time),
        }
    }

    fn write(value: &Duration) -> Option<String> {
        Time::write(value)
    }
}

/// A number of bytes within bounds; units are PostgreSQL's, so that 1 kB is 1024 bytes.
pub(super) struct Size<const MIN: usize, const MAX: usize>;

const UNITS: [(&str, usize); 4] = [("GB", 1 << 30), ("MB", 1 << 20), ("kB", 1 << 10), ("B", 1)];

fn parse_size(text: &str) -> Option<usize> {
    let text = text.trim();
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let &(_, factor) = UNITS.iter().find(|(name, _)| unit.trim().eq_ignore_ascii_case(name))?;
    digits.parse::<usize>().ok()?.checked_mul(factor)
}

fn format_size(bytes: usize) -> String {
    let found = UNITS.iter().find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor));
    found.map_or_else(|| format!("{bytes}B"), |(unit, factor)| format!("{}{unit}", bytes / factor))
}

impl<const MIN: usize, const MAX: usize> Kind for Size<MIN, MAX> {
    type Value = usize;

    fn read(raw: &Raw) -> Result<usize> {
        let wrong = |nearest| {
            let (min, max) = (format_size(MIN), format_size(MAX));
            Wrong { problem: format!("expected a size from \"{min}\" to \"{max}\", found {}", raw.shown()), nearest }
        };
        if let Some(bytes) = raw.bare().and_then(|text| text.parse().ok()) {
            return Err(wrong(Some(format_size(bytes))));
        }
        let size = raw.text().and_then(parse_size);
        size.filter(|size| (MIN..=MAX).contains(size)).ok_or_else(|| wrong(None))
    }

    fn write(value: &usize) -> Option<String> {
        Some(format!("\"{}\"", format_size(*value)))
    }
}

/// A word out of a closed set.
pub(super) trait Word: Sized + Copy + PartialEq + 'static {
    /// The words, with what they mean.
    const WORDS: &'static [(&'static str, Self)];
}

/// One [`Word`].
pub(super) struct OneOf<W>(std::marker::PhantomData<W>);

fn word<W: Word>(raw: &Raw) -> Result<W> {
    let names = || W::WORDS.iter().map(|(name, _)| *name);
    let found = raw.text().and_then(|text| W::WORDS.iter().find(|(name, _)| *name == text.trim()));
    found.map(|&(_, meaning)| meaning).ok_or_else(|| Wrong {
        problem: format!("expected one of {}, found {}", quoted(names()), raw.shown()),
        nearest: raw.text().and_then(|text| nearest(text, names())),
    })
}

fn quoted<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ")
}

fn name_of<W: Word>(value: W) -> &'static str {
    W::WORDS.iter().find(|(_, meaning)| *meaning == value).map_or("", |(name, _)| name)
}

impl<W: Word> Kind for OneOf<W> {
    type Value = W;

    fn read(raw: &Raw) -> Result<W> {
        word(raw)
    }

    fn write(value: &W) -> Option<String> {
        Some(format!("{:?}", name_of(*value)))
    }
}

/// The members of a list, or of a variable with commas.
fn members(raw: &Raw) -> Result<Vec<Raw>> {
    match raw {
        Raw::List(list) => Ok(list.clone()),
        Raw::Variable(text) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            Ok(parts.map(|part| Raw::Variable(part.to_owned())).collect())
        }
        Raw::Bare(_) | Raw::Quoted(_) | Raw::Other(_) => {
            Err(Wrong::new(format!("expected a list, such as [\"a\", \"b\"], found {}", raw.shown())))
        }
    }
}

/// A list of values of one kind.
pub(super) struct ListOf<K>(std::marker::PhantomData<K>);

impl<K: Kind> Kind for ListOf<K> {
    type Value = Vec<K::Value>;

    fn read(raw: &Raw) -> Result<Self::Value> {
        members(raw)?.iter().map(K::read).collect()
    }

    fn write(value: &Self::Value) -> Option<String> {
        let parts: Vec<_> = value.iter().filter_map(K::write).collect();
        Some(format!("[{}]", parts.join(", ")))
    }
}

impl Word for PoolMode {
    const WORDS: &'static [(&'static str, Self)] = &[("session", Self::Session), ("transaction", Self::Transaction)];
}

impl Word for SslMode {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("disable", Self::Disable),
        ("allow", Self::Allow),
        ("prefer", Self::Prefer),
        ("require", Self::Require),
        ("verify-ca", Self::VerifyCa),
        ("verify-full", Self::VerifyFull),
    ];
}

impl Word for AuthType {
    const WORDS: &'static [(&'static str, Self)] = &[("scram-sha-256", Self::ScramSha256), ("trust", Self::Trust)];
}

impl Word for Source {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("username", Self::Username),
        ("options", Self::Options),
        ("sni", Self::Sni),
        ("database", Self::Database),
        ("application_name", Self::ApplicationName),
    ];
}

impl Word for LogFormat {
    const WORDS: &'static [(&'static str, Self)] = &[("text", Self::Text), ("json", Self::Json)];
}

impl Word for Plan {
    const WORDS: &'static [(&'static str, Self)] =
        &[("rls", Self::Rls), ("schema", Self::Schema), ("database", Self::Database), ("cluster", Self::Cluster)];
}

impl Word for Hardening {
    const WORDS: &'static [(&'static str, Self)] = &[("compat", Self::Compat), ("strict", Self::Strict)];
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quoted(text: &str) -> Raw {
        Raw::Quoted(text.to_owned())
    }

    fn bare(text: &str) -> Raw {
        Raw::Bare(text.to_owned())
    }

    #[test]
    fn times_have_units() {
        for (text, millis) in [
            ("500ms", 500),
            ("30s", 30_000),
            ("5m", 300_000),
            ("10min", 600_000),
            ("1h", 3_600_000),
            ("1h 30min", 5_400_000),
            ("0s", 0),
            ("0", 0),
        ] {
            assert_eq!(Time::read(&quoted(text)), Ok(Duration::from_millis(millis)), "{text}");
            assert_eq!(Time::read(&Raw::Variable(text.to_owned())), Ok(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(Time::read(&bare("0")), Ok(Duration::ZERO));
        assert_eq!(Time::read(&bare("30")).unwrap_err().nearest.as_deref(), Some("30s"));
        assert_eq!(Time::read(&Raw::Variable("30".into())).unwrap_err().nearest.as_deref(), Some("30s"));
        for bad in ["", "-1s", "abc", "5 parsecs", "99999999999999999999s", "2y", "30"] {
            assert!(Time::read(&quoted(bad)).is_err(), "{bad}");
        }
        assert!(SomeTime::read(&bare("0")).is_err());
    }

    #[test]
    fn times_are_written_as_they_are_read() {
        for millis in [0, 500, 1000, 60_000, 90_000, 120_000, 3_600_000, 86_400_000] {
            let time = Duration::from_millis(millis);
            let written = Time::write(&time).unwrap();
            let raw = if written == "0" { bare("0") } else { quoted(written.trim_matches('"')) };
            assert_eq!(Time::read(&raw), Ok(time), "{written}");
        }
    }

    #[test]
    fn sizes_are_counted_as_postgresql_does() {
        type Any = Size<0, { usize::MAX }>;
        for (text, bytes) in [("16kB", 16 << 10), ("16KB", 16 << 10), ("64MB", 64 << 20), ("1 GB", 1 << 30), ("7B", 7)]
        {
            assert_eq!(Any::read(&quoted(text)), Ok(bytes), "{text}");
        }
        for bad in ["", "16", "MB", "16 miles", "1.5MB", "-1B", "99999999999GB"] {
            assert!(Any::read(&quoted(bad)).is_err(), "{bad}");
        }
        assert_eq!(Any::read(&bare("16384")).unwrap_err().nearest.as_deref(), Some("16kB"));
        assert!(Size::<4096, 8192>::read(&quoted("16kB")).is_err());
        assert_eq!(format_size(16 << 10), "16kB");
        assert_eq!(format_size(1000), "1000B");
    }

    #[test]
    fn permissions_are_octal() {
        assert_eq!(Mode::read(&quoted("0770")), Ok(0o770));
        assert_eq!(Mode::read(&bare("0o777")), Ok(0o777));
        for bad in [bare("777"), quoted("0888"), quoted("10777"), quoted("")] {
            assert!(Mode::read(&bad).is_err());
        }
    }

    #[test]
    fn a_secret_is_not_repeated() {
        for raw in [bare("31415926535"), Raw::List(vec![quoted("hunter2")]), quoted("hunter2\0")] {
            let problem = Hidden::read(&raw).err().map(|wrong| wrong.problem).unwrap();
            assert!(!problem.contains("31415926535") && !problem.contains("hunter2"), "{problem}");
        }
    }
}
