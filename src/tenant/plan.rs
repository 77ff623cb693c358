//! How a tenant is separated from the others: the one place where plans differ.
//!
//! Every method returns a value; somebody else runs it.

use super::TenantId;
use super::sql::Ident;

/// A tenant's plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// A schema of a shared database, a login role of its own.
    Schema,
}

impl Plan {
    /// The word in config, catalog and API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Schema => "schema",
        }
    }

    /// Reads the word in config, catalog and API.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Schema].into_iter().find(|p| p.as_str() == text)
    }

    /// The role that the tenant's server connections log in as.
    pub fn role(self, id: &TenantId) -> String {
        match self {
            Self::Schema => id.to_string(),
        }
    }

    /// The schema that holds the tenant's objects.
    pub fn schema(self, id: &TenantId) -> String {
        match self {
            Self::Schema => id.to_string(),
        }
    }

    /// Settings of the server connection's startup packet, with which an unchanged client finds its tables.
    pub fn startup_settings(self, id: &TenantId) -> Vec<(String, String)> {
        match self {
            Self::Schema => vec![
                ("search_path".to_owned(), Ident(id.as_str()).to_string()),
                // A tenant may poison its own role with ALTER ROLE … SET local_preload_libraries; this wins over it.
                ("local_preload_libraries".to_owned(), String::new()),
            ],
        }
    }
}
