//! What logins began with before `ALTER ROLE … SET` has changed that: clients that were there keep it. No I/O.

use std::collections::VecDeque;
use std::sync::Arc;

use super::residue::Carried;
use super::{DATABASE, Settings};

/// Changes of which it is remembered what was before.
const KEPT: usize = 32;

/// What logins began with.
#[derive(Debug, Clone)]
pub struct Before {
    /// The startup settings that they named.
    pub settings: Arc<Settings>,
    /// The server's settings that clients can make, and their values.
    pub values: Carried,
}

/// What those of each generation began with, but the latest one; the oldest first, of each only what the next one has
/// otherwise.
#[derive(Debug, Default)]
pub(super) struct Defaults(VecDeque<(u64, Before)>);

impl Defaults {
    /// Notes what those of a generation began with that has just ended.
    pub(super) fn note(&mut self, generation: u64, before: Before) {
        if let Some((_, last)) = self.0.back_mut().filter(|(_, last)| last.settings == before.settings) {
            last.values.retain(|name, value| before.values.get(name) != Some(value));
        }
        if self.0.len() >= KEPT {
            self.0.pop_front();
        }
        self.0.push_back((generation, before));
    }

    /// What a client of that generation with these startup settings began with, as far as that is known and it has not
    /// named it itself.
    pub(super) fn of(&self, generation: u64, settings: &Settings) -> Carried {
        let mut values = Carried::new();
        let since = self.0.iter().rev().take_while(|(of, _)| *of >= generation).map(|(_, before)| before);
        for before in since.filter(|before| database(&before.settings) == database(settings)) {
            let named = |name: &str| before.settings.iter().chain(settings).any(|(named, _)| named == name);
            let others = before.values.iter().filter(|(name, _)| !named(name));
            values.extend(others.map(|(name, value)| (name.clone(), value.clone())));
        }
        values
    }
}

fn database(settings: &Settings) -> Option<&str> {
    settings.iter().find(|(name, _)| name == DATABASE).map(|(_, database)| database.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn before(settings: &[(&str, &str)], values: &[(&str, &str)]) -> Before {
        let settings = settings.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        Before {
            settings: Arc::new(settings),
            values: values.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        }
    }

    #[test]
    fn a_client_keeps_what_it_began_with_and_has_not_named() {
        let mut defaults = Defaults::default();
        defaults.note(0, before(&[("a", "1")], &[("a", "1"), ("b", "2"), ("c", "3")]));
        defaults.note(2, before(&[], &[("a", "4"), ("d", "5"), ("e", "6")]));
        defaults.note(3, before(&[], &[("a", "4"), ("d", "7"), ("e", "6")]));
        let of = |generation, named: &[(&str, &str)]| {
            let found = defaults.of(generation, &before(named, &[]).settings);
            found.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of(0, &[("b", "9")]), "a=4 c=3 d=5 e=6");
        assert_eq!([1, 2, 3, 4].map(|of_client| of(of_client, &[])), ["a=4 d=5 e=6", "a=4 d=5 e=6", "a=4 d=7 e=6", ""]);
        assert_eq!(of(0, &[(DATABASE, "other")]), "");
    }

    #[test]
    fn few_are_remembered() {
        let mut defaults = Defaults::default();
        for generation in 0..100 {
            defaults.note(generation, before(&[], &[("a", "1")]));
        }
        assert_eq!(defaults.0.len(), KEPT);
        assert_eq!(defaults.0.iter().map(|(_, before)| before.values.len()).sum::<usize>(), 1);
    }
}
