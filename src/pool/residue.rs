//! What a client may have left in a server connection's session. No I/O.

use std::collections::BTreeMap;

/// Settings that a client has made and takes along: lower-case name and the server's own spelling of the value.
pub type Carried = BTreeMap<Box<str>, Box<str>>;

/// What a session may have been left with, as far as the texts that ran tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Residue {
    /// Settings that may have changed: lower-case names.
    pub settings: Vec<Box<str>>,
    /// Something else may have changed.
    pub unknown: bool,
    /// Among that, as the text says, what the session listens to.
    pub listens: bool,
}

impl Residue {
    /// Nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Anything.
    pub fn anything() -> Self {
        Self { unknown: true, ..Self::default() }
    }

    /// Whether nothing may be left.
    pub fn is_none(&self) -> bool {
        !self.unknown && self.settings.is_empty()
    }

    /// Both.
    pub fn merge(&mut self, other: &Self) {
        self.unknown |= other.unknown;
        self.listens |= other.listens;
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

const MAX_SETTINGS: usize = 64;
