//! Who a connection belongs to. No I/O.
//!
//! Invariant: a [`TenantId`] is always valid; it has one constructor, [`TenantId::parse`].

pub mod adopt;
pub mod credential;
pub mod identify;
pub mod plan;
pub mod rls;
pub mod sql;

use std::borrow::Borrow;
use std::fmt;

use compact_str::CompactString;

pub use plan::Plan;

/// The longest id: PostgreSQL's identifier limit (`NAMEDATALEN - 1`), so that the id can be a role and a schema.
pub const MAX_ID_LEN: usize = 63;

/// What the names of throwaway tenants begin with, which pgusher makes to attack itself. Nobody else can make one.
pub const CANARY_PREFIX: &str = "pgusher_canary_";

/// A tenant's name: `[a-z0-9_][a-z0-9_-]{0,62}`. Up to 24 bytes are kept in place, so that the usual one costs no
/// allocation.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantId(CompactString);

/// Why a string is not a tenant id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTenantId {
    /// Nothing there.
    #[error("a tenant id must not be empty")]
    Empty,
    /// More than [`MAX_ID_LEN`] bytes.
    #[error("a tenant id has at most {MAX_ID_LEN} characters, this one has {0}")]
    TooLong(usize),
    /// A character outside the alphabet.
    #[error("a tenant id consists of a-z, 0-9, '_' and (not in front) '-', this one contains {0:?}")]
    BadCharacter(char),
    /// A name PostgreSQL or pgusher keeps for itself.
    #[error("{0:?} is reserved")]
    Reserved(String),
}

impl TenantId {
    /// Parses an id; the only way to get one.
    ///
    /// # Errors
    /// [`InvalidTenantId`] says which rule is broken. Names that PostgreSQL gives a meaning of their own
    /// (`public`, `postgres`, `pg_…`, `none`, …) or that pgusher uses for itself are reserved.
    pub fn parse(text: &str) -> Result<Self, InvalidTenantId> {
        if text.is_empty() {
            return Err(InvalidTenantId::Empty);
        }
        if text.len() > MAX_ID_LEN {
            return Err(InvalidTenantId::TooLong(text.len()));
        }
        let allowed =
            |(i, c): (usize, char)| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || (c == '-' && i > 0);
        if let Some((_, c)) = text.char_indices().find(|&at| !allowed(at)) {
            return Err(InvalidTenantId::BadCharacter(c));
        }
        let ours = text.starts_with("pgusher_") && !text.starts_with(CANARY_PREFIX);
        if text.starts_with("pg_") || ours || RESERVED.contains(&text) {
            return Err(InvalidTenantId::Reserved(text.to_owned()));
        }
        Ok(Self(text.into()))
    }

    /// Whether it is one of pgusher's throwaway tenants.
    pub fn is_canary(&self) -> bool {
        self.0.starts_with(CANARY_PREFIX)
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

const RESERVED: &[&str] = &[
    "public",
    "postgres",
    "pgusher",
    "information_schema",
    "none",
    "current_user",
    "current_role",
    "session_user",
    "template0",
    "template1",
    "extensions",
    "tenant_shim",
    "provisioner",
    "app_tenants",
];

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &self.0)
    }
}

impl Borrow<str> for TenantId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Where a tenant stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Its place is being made; not visible to clients.
    Creating,
    /// In use.
    Active,
    /// Kept, but no client may connect.
    Suspended,
    /// Its place is being removed.
    Deleting,
    /// Gone; the row is the tombstone.
    Deleted,
}

impl Status {
    /// The word in the catalog.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Active => "active",
            Self::Suspended => "suspended",
            Self::Deleting => "deleting",
            Self::Deleted => "deleted",
        }
    }

    /// Reads the word in the catalog.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Creating, Self::Active, Self::Suspended, Self::Deleting, Self::Deleted]
            .into_iter()
            .find(|s| s.as_str() == text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_what_a_role_and_a_schema_can_be() {
        for good in ["client_001", "a", "0", "_x", "a-b", &"a".repeat(63)] {
            assert_eq!(TenantId::parse(good).unwrap().as_str(), good);
        }
        for bad in
            ["", "-a", "A", "a b", "a.b", "a@b", "ä", "a\"", "a\0", &"a".repeat(64), "public", "pg_x", "pgusher_x"]
        {
            assert!(TenantId::parse(bad).is_err(), "{bad:?}");
        }
    }
}
