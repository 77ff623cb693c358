//! What a statement means depends on more than its text: on settings that PostgreSQL reads while it parses. No I/O.
//!
//! A text that was prepared in one scope is another statement than the same text in another one: tables are looked up by
//! `search_path`, literals are read by `DateStyle`, `TimeZone` and the like, and the bytes themselves by `client_encoding`.
//! A scope is written as names and values, each with a NUL behind it, of what differs from what the session began with;
//! most clients have an empty one.

use std::borrow::Cow;

use super::params::Params;
use super::residue::Carried;

/// The ones that servers report.
const REPORTED: [&str; 5] =
    ["client_encoding", "DateStyle", "IntervalStyle", "TimeZone", "standard_conforming_strings"];

/// Where names are looked up. A server looks them up again by itself when this one has changed.
pub const PATH: &str = "search_path";

/// The others.
const ASKED: [&str; 7] = [
    PATH,
    "array_nulls",
    "backslash_quote",
    "escape_string_warning",
    "lc_monetary",
    "transform_null_equals",
    "xmloption",
];

/// All of them.
pub fn names() -> impl Iterator<Item = &'static str> {
    REPORTED.into_iter().chain(ASKED)
}

/// The scope of a client that began with `base` and has these settings now.
pub fn of(base: &Params, params: &Params, carried: &Carried) -> String {
    let mut scope = String::new();
    let mut add = |name: &str, value: &str| {
        for part in [name, value] {
            scope.push_str(part);
            scope.push('\0');
        }
    };
    for name in REPORTED {
        if let Some(value) = params.get(name).filter(|value| base.get(name) != Some(value)) {
            add(name, value);
        }
    }
    for name in ASKED {
        if let Some(value) = carried.get(name) {
            add(name, value);
        }
    }
    scope
}

/// The value of a setting in a scope; `None`: what the session began with.
pub fn value<'a>(scope: &'a str, name: &str) -> Option<&'a str> {
    settings(scope).find(|(found, _)| *found == name).map(|(_, value)| value)
}

fn settings(scope: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut parts = scope.split('\0');
    std::iter::from_fn(move || {
        let name = parts.next().filter(|name| !name.is_empty())?;
        Some((name, parts.next()?))
    })
}

/// The place of a statement of one scope that is used in another: the scope itself if literals are read alike in both, else
/// with an empty name behind it and what differs.
pub fn used_in<'a>(home: &'a str, scope: &str) -> Cow<'a, str> {
    let literals = |scope| settings(scope).filter(|(name, _)| *name != PATH);
    if literals(home).eq(literals(scope)) {
        return Cow::Borrowed(home);
    }
    let there = literals(scope).flat_map(|(name, value)| [name, "\0", value, "\0"]);
    Cow::Owned([home, "\0"].into_iter().chain(there).collect())
}

/// The scope at the beginning of a place.
pub fn home(place: &str) -> &str {
    let length = settings(place).map(|(name, value)| name.len() + value.len() + 2).sum();
    place.get(..length).unwrap_or(place)
}

/// Whether this setting, in any case, is a part of scopes.
pub fn has(name: &str) -> bool {
    names().any(|known| known.eq_ignore_ascii_case(name))
}

/// Whether this setting, in any case, says how literals are read.
pub fn has_for_literals(name: &str) -> bool {
    has(name) && !name.eq_ignore_ascii_case(PATH)
}

/// Whether a text with `SET LOCAL` may set one of them; and whether one that says how literals are read.
pub fn may_set(text: &[u8]) -> (bool, bool) {
    // What is between the words may be anything, and `U&"…"` is any name.
    let others = ["names", "zone", "xml", "u&\""];
    let contains = |word: &str| text.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word.as_bytes()));
    let literals = names().filter(|name| *name != PATH).chain(others).any(contains);
    (literals || [PATH, "schema"].into_iter().any(contains), literals)
}

/// Whether what is made without a schema's name may be temporary under this `search_path`.
pub fn is_temporary(path: &str) -> bool {
    path.as_bytes().windows(7).any(|found| found.eq_ignore_ascii_case(b"pg_temp"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_is_what_differs() {
        let (mut base, mut now) = (Params::default(), Params::default());
        for (name, value) in [("TimeZone", "UTC"), ("DateStyle", "ISO, MDY"), ("application_name", "")] {
            base.set(name, value);
            now.set(name, value);
        }
        assert_eq!(of(&base, &now, &Carried::default()), "");
        now.set("TimeZone", "Asia/Tokyo");
        now.set("application_name", "a");
        let carried = Carried::from([("search_path".into(), "".into()), ("work_mem".into(), "1MB".into())]);
        let scope = of(&base, &now, &carried);
        assert_eq!(scope, "TimeZone\0Asia/Tokyo\0search_path\0\0");
        // An empty search_path is not the same as none.
        assert_eq!((value(&scope, "search_path"), value(&scope, "DateStyle")), (Some(""), None));
        assert_eq!(value(&scope, "Asia/Tokyo"), None);
        assert!(has("timezone") && !has("work_mem"));
        assert_eq!(may_set(b"set local Search_Path to x"), (true, false));
        assert_eq!(may_set(b"set local time\nzone 'UTC'"), (true, true));
        assert_eq!(may_set(b"set local statement_timeout to 1"), (false, false));
        assert!(is_temporary("a, \"pg_temp\"") && is_temporary("PG_temp_3") && !is_temporary("\"$user\", public"));
    }
}
