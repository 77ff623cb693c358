//! What a client has prepared by name, and how much memory that takes. No I/O.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::pool::statements::Statement;

/// Statements by the client's names for them.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// A tree: most clients have few or none, and an empty one is small.
    map: BTreeMap<Arc<[u8]>, Entry>,
    bytes: usize,
}

#[derive(Debug)]
struct Entry {
    statement: Arc<Statement>,
    /// What the client was told that it returns; 0 is nothing.
    told: u64,
}

/// About what an entry takes beside name and text, which a client may well be alone with.
const OVERHEAD: usize = 256;

fn cost(name: &[u8], body: &[u8]) -> usize {
    name.len() + body.len() + OVERHEAD
}

impl Named {
    /// Whether one more would take more than `limit` bytes; 0 is no limit.
    pub(super) fn is_full(&self, name: &[u8], body: &[u8], limit: usize) -> bool {
        limit > 0 && self.bytes + cost(name, body) > limit
    }

    pub(super) fn get(&self, name: &[u8]) -> Option<&Arc<Statement>> {
        self.map.get(name).map(|entry| &entry.statement)
    }

    /// The statement, and what the client was told that it returns (see [`Prepared::described`]); 0 is nothing.
    ///
    /// [`Prepared::described`]: crate::pool::statements::Prepared::described
    pub(super) fn get_told(&self, name: &[u8]) -> Option<(&Arc<Statement>, u64)> {
        self.map.get(name).map(|entry| (&entry.statement, entry.told))
    }

    /// Notes what the client was told, if the name still means that statement.
    pub(super) fn tell(&mut self, name: &[u8], id: u64, told: u64) {
        if let Some(entry) = self.map.get_mut(name).filter(|entry| entry.statement.id == id) {
            entry.told = told;
        }
    }

    pub(super) fn get_key_value(&self, name: &[u8]) -> Option<(&Arc<[u8]>, &Arc<Statement>)> {
        self.map.get_key_value(name).map(|(name, entry)| (name, &entry.statement))
    }

    pub(super) fn contains_key(&self, name: &[u8]) -> bool {
        self.map.contains_key(name)
    }

    pub(super) fn values(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.map.values().map(|entry| &entry.statement)
    }

    /// For statements in the place of others with the same text.
    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Arc<Statement>> {
        self.map.values_mut().map(|entry| &mut entry.statement)
    }

    pub(super) fn insert(&mut self, name: Arc<[u8]>, statement: Arc<Statement>) -> Option<Arc<Statement>> {
        let length = name.len();
        self.bytes += cost(&name, statement.body());
        let before = self.map.insert(name, Entry { statement, told: 0 }).map(|entry| entry.statement);
        if let Some(before) = &before {
            self.bytes -= length + before.body().len() + OVERHEAD;
        }
        before
    }

    pub(super) fn remove(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        self.remove_entry(name).map(|(_, statement)| statement)
    }

    pub(super) fn remove_entry(&mut self, name: &[u8]) -> Option<(Arc<[u8]>, Arc<Statement>)> {
        let (name, Entry { statement, .. }) = self.map.remove_entry(name)?;
        self.bytes -= cost(&name, statement.body());
        Some((name, statement))
    }
}

impl FromIterator<(Arc<[u8]>, Arc<Statement>)> for Named {
    fn from_iter<I: IntoIterator<Item = (Arc<[u8]>, Arc<Statement>)>>(entries: I) -> Self {
        let mut named = Self::default();
        entries.into_iter().for_each(|(name, statement)| drop(named.insert(name, statement)));
        named
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::residue::Residue;
    use crate::pool::statements::Registry;

    #[test]
    fn what_is_taken_away_makes_room() {
        let registry = Registry::default();
        let statement = |text: &[u8]| registry.intern("", text, Residue::none);
        let (short, long) = (statement(b"a"), statement(&[b'x'; 500]));
        let mut named = Named::default();
        let limit = cost(b"n", long.body()) + cost(b"m", short.body());
        assert!(!named.is_full(b"n", long.body(), limit));
        named.insert(b"n"[..].into(), long.clone());
        assert!(named.is_full(b"m", long.body(), limit) && !named.is_full(b"m", short.body(), limit));
        assert!(!named.is_full(b"m", long.body(), 0));
        named.insert(b"n"[..].into(), short.clone());
        assert!(!named.is_full(b"m", long.body(), limit));
        named.insert(b"m"[..].into(), long);
        assert!(named.remove(b"n").is_some() && named.remove(b"n").is_none() && named.remove(b"m").is_some());
        assert_eq!(named.bytes, 0);
        let again: Named = [(b"n"[..].into(), short.clone())].into_iter().collect();
        assert_eq!(again.bytes, cost(b"n", short.body()));
    }
}
