//! What a server reports of its settings (ParameterStatus), and how they are carried from one connection to another.

use std::sync::{Arc, OnceLock};

use bytes::BytesMut;

use crate::tenant::sql::Literal;
use crate::wire::message;

/// Values by reported name, sorted by name.
#[derive(Debug, Default)]
pub struct Params {
    values: Vec<(Box<str>, Box<str>)>,
    /// As messages, once somebody was greeted with them.
    statuses: OnceLock<Box<[u8]>>,
}

impl PartialEq for Params {
    fn eq(&self, other: &Self) -> bool {
        self.values == other.values
    }
}

/// Reported, but no client can set them: they are never carried. `search_path`, reported from PostgreSQL 18 on, is one
/// that clients do set; it is no wall, so it is theirs.
const FIXED: &[&str] = &[
    "server_version",
    "server_encoding",
    "integer_datetimes",
    "is_superuser",
    "session_authorization",
    "in_hot_standby",
];

/// Reported by PostgreSQL 18, but carried as settings that are not, so that all versions are treated alike.
const CARRIED_ANYWAY: &[&str] = &["search_path"];

impl Params {
    /// The value reported last.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.find(name).ok().map(|at| &*self.values[at].1)
    }

    /// Notes a reported value.
    pub fn set(&mut self, name: &str, value: &str) {
        self.statuses = OnceLock::new();
        match self.find(name) {
            Ok(at) => self.values[at].1 = value.into(),
            Err(at) => self.values.insert(at, (name.into(), value.into())),
        }
    }

    /// The same with one value changed; itself if nothing changes.
    #[must_use]
    pub fn with(self: &Arc<Self>, name: &str, value: &str) -> Arc<Self> {
        if self.get(name) == Some(value) {
            return self.clone();
        }
        let mut changed = Self { values: self.values.clone(), statuses: OnceLock::new() };
        changed.set(name, value);
        Arc::new(changed)
    }

    /// Whether these are `others` [with](Params::with) one value changed. Says no where `others` do not have that name.
    pub fn are(&self, others: &Self, name: &str, value: &str) -> bool {
        let expected = others.iter().map(|(have, old)| (have, if have == name { value } else { old }));
        self.get(name) == Some(value) && self.values.len() == others.values.len() && self.iter().eq(expected)
    }

    /// Appends a ParameterStatus for each of them, in order.
    pub fn put_statuses(&self, out: &mut BytesMut) {
        let statuses = self.statuses.get_or_init(|| {
            let mut statuses = BytesMut::new();
            for (name, value) in self.iter() {
                message::parameter_status(&mut statuses, name, value.as_bytes());
            }
            statuses[..].into()
        });
        out.extend_from_slice(statuses);
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(name, value)| (&**name, &**value))
    }

    /// Whether the server reports this setting, in whatever case it is written.
    pub fn has(&self, name: &str) -> bool {
        self.values.iter().any(|(have, _)| have.eq_ignore_ascii_case(name) && !CARRIED_ANYWAY.contains(&&**have))
    }

    /// Whether all that a client can set is carried. Servers report values in the client's encoding of that moment: what is
    /// not ASCII (a time zone of one's own making, for one) may have been something else.
    pub fn can_be_carried(&self) -> bool {
        let elsewhere = |name| FIXED.contains(&name) || CARRIED_ANYWAY.contains(&name);
        self.iter().all(|(name, value)| value.is_ascii() || elsewhere(name))
    }

    /// The calls of `set_config` that bring a server from `self` to `wanted`.
    pub fn changes_to(&self, wanted: &Self) -> Vec<String> {
        let differs =
            |(name, value): &(&str, &str)| !FIXED.contains(name) && value.is_ascii() && self.get(name) != Some(*value);
        let call = |(name, value)| format!("pg_catalog.set_config({}, {}, false)", Literal(name), Literal(value));
        wanted.iter().filter(differs).map(call).collect()
    }

    fn find(&self, name: &str) -> Result<usize, usize> {
        self.values.binary_search_by(|(have, _)| (**have).cmp(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_and_can_be_set_is_carried() {
        let mut server = Params::default();
        server.set("TimeZone", "UTC");
        server.set("DateStyle", "ISO, MDY");
        server.set("server_version", "15.1");
        let server = Arc::new(server);
        assert!(server.changes_to(&server.with("server_version", "16")).is_empty());
        assert!(Arc::ptr_eq(&server, &server.with("TimeZone", "UTC")));
        assert_eq!(
            server.changes_to(&server.with("TimeZone", "Mars/'x")).concat(),
            "pg_catalog.set_config('TimeZone', 'Mars/''x', false)"
        );
    }

    #[test]
    fn one_value_changed_is_told_from_others() {
        let mut server = Params::default();
        server.set("TimeZone", "UTC");
        server.set("application_name", "");
        let server = Arc::new(server);
        let named = server.with("application_name", "a");
        assert!(named.are(&server, "application_name", "a") && server.are(&named, "application_name", ""));
        assert!(!named.are(&server, "application_name", "b") && !named.are(&server, "TimeZone", "UTC"));
        let elsewhere = named.with("TimeZone", "PST8PDT");
        assert!(!elsewhere.are(&server, "application_name", "a"));
        assert!(
            !server.are(&server, "DateStyle", "ISO")
                && !server.with("DateStyle", "ISO").are(&server, "DateStyle", "ISO")
        );
    }

    #[test]
    fn statuses_follow_the_values() {
        let mut server = Params::default();
        server.set("a", "1");
        let mut out = BytesMut::new();
        server.put_statuses(&mut out);
        assert_eq!(&out[..], b"S\0\0\0\x08a\x001\0");
        server.set("a", "2");
        out.clear();
        Arc::new(server).with("b", "").put_statuses(&mut out);
        assert_eq!(&out[..], b"S\0\0\0\x08a\x002\0S\0\0\0\x07b\0\0");
    }

    #[test]
    fn what_is_not_ascii_may_be_something_else() {
        let mut server = Params::default();
        server.set("search_path", "\u{e9}");
        server.set("TimeZone", "UTC");
        let server = Arc::new(server);
        assert!(server.can_be_carried());
        let doubtful = server.with("TimeZone", "\u{fffd}5");
        assert!(!doubtful.can_be_carried() && server.changes_to(&doubtful).is_empty());
        assert_eq!(doubtful.changes_to(&server).len(), 1);
    }
}
