//! What a client may have left in a server connection's session. No I/O.

use std::collections::BTreeMap;

/// Settings that a client has made and takes along: lower-case name and the server's own spelling of the value.
pub type Carried = BTreeMap<Box<str>, Box<str>>;

/// What a session may have been left with, as far as the texts that ran tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Residue {
    /// Settings that may have changed: lower-case names.
    pub settings: Vec<Box<str>>,
    /// Parameters of the statement ($1 is 1) that name settings which may have changed.
    pub parameters: Vec<u16>,
    /// Something else may have changed.
    pub unknown: bool,
    /// Among that, as the text says, what the session listens to.
    pub listens: bool,
    /// All settings may have been reset.
    pub resets: bool,
    /// What pins a client may be gone: a table dropped, a cursor closed, a lock released, a statement deallocated.
    pub frees: bool,
    /// `random()` was seeded.
    pub seeds: bool,
    /// `currval` or `lastval` was asked, or the state of sequences is to be kept for whoever asks for it.
    pub asks: bool,
    /// A database may be made, dropped or renamed: idle connections are in the way.
    pub databases: bool,
    /// Prepared statements may be listed, which leaves nothing.
    pub lists: bool,
    /// Process ids of the server's may be among what it is about, which leaves nothing.
    pub processes: bool,
    /// The server is asked for the session's own process id, which leaves nothing.
    pub own_process: bool,
    /// What later texts mean may be something else until the transaction ends: `SET LOCAL search_path`, for one.
    pub rescopes: bool,
    /// Among that, how literals are read.
    pub rereads: bool,
    /// Something may be made in the first schema of the `search_path`, which leaves nothing unless that is `pg_temp`.
    pub creates: bool,
    /// That id is written down where others may find it.
    pub stores_process: bool,
    /// The state of sequences may have changed. Counts for those who ask for it, and leaves nothing for others.
    pub advances: bool,
}

impl Residue {
    /// Nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Anything.
    pub fn anything() -> Self {
        Self { unknown: true, advances: true, ..Self::default() }
    }

    /// These settings.
    pub fn named(names: &[&str]) -> Self {
        Self { settings: names.iter().map(|name| (*name).into()).collect(), ..Self::default() }
    }

    /// Whether nothing may be left that anybody has to look after.
    #[inline]
    pub fn is_none(&self) -> bool {
        !(self.unknown | self.resets | self.frees | self.seeds | self.asks | self.stores_process)
            && self.settings.is_empty()
            && self.parameters.is_empty()
    }

    /// The same once it is known what the parameters say, given what follows the names in a Bind message.
    pub fn with_values(&self, bind: &[u8]) -> Self {
        let mut known = Self { parameters: Vec::new(), ..self.clone() };
        for parameter in &self.parameters {
            match value(bind, *parameter).map(|name| std::str::from_utf8(name).map(str::to_ascii_lowercase)) {
                Some(Ok(name)) => known.settings.push(name.into()),
                _ => known.unknown = true,
            }
        }
        known
    }

    /// Both.
    pub fn merge(&mut self, other: &Self) {
        self.unknown |= other.unknown;
        self.listens |= other.listens;
        self.resets |= other.resets;
        self.frees |= other.frees;
        self.seeds |= other.seeds;
        self.asks |= other.asks;
        self.advances |= other.advances;
        self.lists |= other.lists;
        self.rescopes |= other.rescopes;
        self.rereads |= other.rereads;
        self.creates |= other.creates;
        self.databases |= other.databases;
        self.processes |= other.processes;
        self.own_process |= other.own_process;
        self.stores_process |= other.stores_process;
        for parameter in &other.parameters {
            if !self.parameters.contains(parameter) {
                self.parameters.push(*parameter);
            }
        }
        for name in &other.settings {
            if !self.settings.contains(name) {
                self.settings.push(name.clone());
            }
        }
        // Nobody sets so many: asking for everything is cheaper then.
        if self.settings.len() > MAX_SETTINGS {
            self.unknown = true;
            self.settings.clear();
        }
    }
}

/// The value of a parameter: formats, then values, each with its length.
fn value(bind: &[u8], parameter: u16) -> Option<&[u8]> {
    let number = |at: usize| Some(usize::from(u16::from_be_bytes(bind.get(at..at + 2)?.try_into().ok()?)));
    let mut at = 2 + 2 * number(0)?;
    if usize::from(parameter) > number(at)? {
        return None;
    }
    at += 2;
    for _ in 1..parameter {
        at += 4 + length(bind, at)?;
    }
    let length = length(bind, at)?;
    bind.get(at + 4..at + 4 + length)
}

/// NULL has none.
fn length(bind: &[u8], at: usize) -> Option<usize> {
    let length = i32::from_be_bytes(bind.get(at..at + 4)?.try_into().ok()?);
    Some(usize::try_from(length).unwrap_or(0))
}

const MAX_SETTINGS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_may_name_a_setting() {
        let residue = Residue { parameters: vec![2], ..Residue::none() };
        let values = b"\0\x01\0\0\0\x02\xff\xff\xff\xff\0\0\0\x05App.X\0\0";
        assert_eq!(*residue.with_values(values).settings, ["app.x".into()]);
        assert!(residue.with_values(&values[..14]).unknown);
        assert!(residue.with_values(b"\0\0\0\x01\0\0\0\0").unknown);
    }
}
