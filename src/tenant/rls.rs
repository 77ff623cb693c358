//! Making the tables of an application that knows no tenants into shared ones: what is to be run, or why it cannot be
//! done safely. No I/O.
//!
//! Each table gets a column `tenant_id` that defaults to the login role, the column in front of every key (checks of
//! foreign keys and of uniqueness do not look at policies), row-level security that the owner obeys too, and grants to
//! the tenants' group: rows can be read, written and updated, but `tenant_id` cannot be changed.

use super::plan::{GROUP, Hardening, OWNER, POLICY, TENANT_COLUMN};
use super::sql::{Ident, Literal};

/// A table of schema `public`, as it is now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Columns, in order.
    pub columns: Vec<String>,
    /// Type of the column `tenant_id`, if it has one.
    pub tenant_column: Option<String>,
    /// Whether there is a row.
    pub has_rows: bool,
    /// Whether it has the policy already.
    pub converted: bool,
    /// Keys.
    pub keys: Vec<Key>,
    /// Foreign keys.
    pub references: Vec<Reference>,
    /// Sequences that defaults of its columns take numbers from, as SQL names.
    pub sequences: Vec<String>,
    /// Roles besides the owner that have rights on it; empty is `PUBLIC`.
    pub grantees: Vec<String>,
    /// What the catalogs say that stands in the way.
    pub obstacles: Vec<String>,
}

/// A primary key, a unique constraint or a unique index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: KeyKind,
    /// Its columns.
    pub columns: Vec<String>,
    /// `DEFERRABLE INITIALLY …`, or nothing.
    pub deferrable: String,
}

/// What a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// `PRIMARY KEY`
    Primary,
    /// `UNIQUE`
    Unique,
    /// `CREATE UNIQUE INDEX`
    Index,
}

/// A foreign key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// Its name.
    pub name: String,
    /// Its columns.
    pub columns: Vec<String>,
    /// The table that it leads to, with its schema if that is not `public`.
    pub table: String,
    /// The columns there.
    pub target: Vec<String>,
    /// `ON UPDATE …`, or nothing.
    pub on_update: String,
    /// `ON DELETE …`, or nothing; behind `SET NULL` and `SET DEFAULT` come the columns.
    pub on_delete: String,
    /// `DEFERRABLE INITIALLY …`, or nothing.
    pub deferrable: String,
}

/// What the operator wants.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Role of the tenant that gets the rows that are there.
    pub rows_to: Option<&'a str>,
    /// The grade of the database.
    pub hardening: Hardening,
}

/// The statements, for one transaction, or every reason against them. Tables that are converted already stay.
///
/// # Errors
/// What stands in the way, table by table.
pub fn convert(tables: &[Table], wanted: Wanted<'_>) -> Result<Vec<String>, Vec<String>> {
    let objections: Vec<String> = tables.iter().flat_map(|table| objections(table, tables, wanted)).collect();
    if !objections.is_empty() {
        return Err(objections);
    }
    let new: Vec<&Table> = tables.iter().filter(|table| !table.converted).collect();
    let mut sql = Vec::new();
    for table in &new {
        for reference in &table.references {
            sql.push(format!("ALTER TABLE {} DROP CONSTRAINT {}", public(&table.name), Ident(&reference.name)));
        }
    }
    for table in &new {
        prepare(table, wanted, &mut sql);
    }
    for table in &new {
        for reference in &table.references {
            sql.push(format!(
                "ALTER TABLE {} ADD CONSTRAINT {} FOREIGN KEY ({}) REFERENCES {} ({}){}{}{}",
                public(&table.name),
                Ident(&reference.name),
                with_tenant(&reference.columns),
                public(&reference.table),
                with_tenant(&reference.target),
                reference.on_update,
                reference.on_delete,
                reference.deferrable,
            ));
        }
        share(table, wanted, &mut sql);
    }
    Ok(sql)
}

fn objections(table: &Table, tables: &[Table], wanted: Wanted<'_>) -> Vec<String> {
    if table.converted {
        return Vec::new();
    }
    let mut all = table.obstacles.clone();
    if let Some(kind) = &table.tenant_column {
        all.push(format!("has a column {TENANT_COLUMN} of type {kind}, and no policy {POLICY}"));
    }
    if table.has_rows && wanted.rows_to.is_none() {
        all.push("has rows, and it is not said whose they are (--default-tenant)".to_owned());
    }
    for reference in &table.references {
        let there = tables.iter().find(|other| other.name == reference.table);
        match there {
            None => all.push(format!(
                "foreign key {} leads to {}, which is not among the tables",
                reference.name, reference.table
            )),
            Some(other) if other.converted => all.push(format!(
                "foreign key {} leads to {}, which was converted before",
                reference.name, reference.table
            )),
            Some(_) => {}
        }
    }
    all.into_iter().map(|reason| format!("table {}: {reason}", table.name)).collect()
}

fn public(name: &str) -> String {
    format!("public.{}", Ident(name))
}

fn list(columns: &[String]) -> String {
    columns.iter().map(|column| Ident(column).to_string()).collect::<Vec<_>>().join(", ")
}

fn with_tenant(columns: &[String]) -> String {
    format!("{TENANT_COLUMN}, {}", list(columns))
}

/// The column, and every key with it in front.
fn prepare(table: &Table, wanted: Wanted<'_>, sql: &mut Vec<String>) {
    let name = public(&table.name);
    let add =
        |default: String| format!("ALTER TABLE {name} ADD COLUMN {TENANT_COLUMN} name NOT NULL DEFAULT {default}");
    match wanted.rows_to.filter(|_| table.has_rows) {
        Some(role) => {
            sql.push(add(Literal(role).to_string()));
            sql.push(format!("ALTER TABLE {name} ALTER COLUMN {TENANT_COLUMN} SET DEFAULT session_user"));
        }
        None => sql.push(add("session_user".to_owned())),
    }
    for key in &table.keys {
        let (key_name, columns) = (Ident(&key.name), with_tenant(&key.columns));
        let drop = format!("ALTER TABLE {name} DROP CONSTRAINT {key_name}");
        match key.kind {
            KeyKind::Primary | KeyKind::Unique => {
                let what = if key.kind == KeyKind::Primary { "PRIMARY KEY" } else { "UNIQUE" };
                sql.push(drop);
                sql.push(format!("ALTER TABLE {name} ADD CONSTRAINT {key_name} {what} ({columns}){}", key.deferrable));
            }
            KeyKind::Index => {
                sql.push(format!("DROP INDEX public.{key_name}"));
                sql.push(format!("CREATE UNIQUE INDEX {key_name} ON {name} ({columns})"));
            }
        }
    }
    if table.keys.is_empty() {
        sql.push(format!("CREATE INDEX ON {name} ({TENANT_COLUMN})"));
    }
}

/// Owner, row-level security and grants.
fn share(table: &Table, wanted: Wanted<'_>, sql: &mut Vec<String>) {
    let name = public(&table.name);
    sql.push(format!("ALTER TABLE {name} OWNER TO {OWNER}"));
    for grantee in &table.grantees {
        let grantee = if grantee.is_empty() { "PUBLIC".to_owned() } else { Ident(grantee).to_string() };
        sql.push(format!("REVOKE ALL ON {name} FROM {grantee}"));
    }
    sql.push(format!("ALTER TABLE {name} ENABLE ROW LEVEL SECURITY"));
    // Or it would not hold for the owner, as whom foreign keys are checked and views are read.
    sql.push(format!("ALTER TABLE {name} FORCE ROW LEVEL SECURITY"));
    // The login role: what SET can change (current_user, settings) can be forged.
    sql.push(format!(
        "CREATE POLICY {POLICY} ON {name} USING ({TENANT_COLUMN} = session_user) \
         WITH CHECK ({TENANT_COLUMN} = session_user)"
    ));
    sql.push(format!("GRANT SELECT, INSERT ON {name} TO {GROUP}"));
    if !table.columns.is_empty() {
        // By columns, without tenant_id: the right to update the whole table is one to lock it against everybody.
        sql.push(format!("GRANT UPDATE ({}) ON {name} TO {GROUP}", list(&table.columns)));
    }
    if wanted.hardening == Hardening::Compat {
        sql.push(format!("GRANT DELETE ON {name} TO {GROUP}"));
    }
    for sequence in &table.sequences {
        // No SELECT, no UPDATE: nobody reads or sets the counter of all.
        sql.push(format!("REVOKE ALL ON SEQUENCE {sequence} FROM PUBLIC"));
        sql.push(format!("GRANT USAGE ON SEQUENCE {sequence} TO {GROUP}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted<'static> = Wanted { rows_to: None, hardening: Hardening::Compat };

    fn table(name: &str) -> Table {
        Table { name: name.into(), columns: vec!["id".into()], ..Table::default() }
    }

    fn to(table: &str) -> Reference {
        Reference {
            name: "fk".into(),
            columns: vec!["a".into()],
            table: table.into(),
            target: vec!["id".into()],
            on_update: String::new(),
            on_delete: " ON DELETE SET NULL (\"a\")".into(),
            deferrable: String::new(),
        }
    }

    #[test]
    fn keys_get_the_tenant_in_front_and_foreign_keys_come_last() {
        let mut users = table("users");
        users.keys.push(Key {
            name: "users_pkey".into(),
            kind: KeyKind::Primary,
            columns: vec!["id".into()],
            deferrable: String::new(),
        });
        let bookings = Table { references: vec![to("users")], ..table("bookings") };
        let sql = convert(&[bookings, users], WANTED).unwrap();
        assert_eq!(sql[0], "ALTER TABLE public.\"bookings\" DROP CONSTRAINT \"fk\"");
        let at = |part: &str| sql.iter().position(|s| s.contains(part)).unwrap_or_else(|| panic!("{part}: {sql:#?}"));
        assert!(at("\"users_pkey\" PRIMARY KEY (tenant_id, \"id\")") < at("ADD CONSTRAINT \"fk\""));
        at("FOREIGN KEY (tenant_id, \"a\") REFERENCES public.\"users\" (tenant_id, \"id\") ON DELETE SET NULL (\"a\")");
        at("GRANT UPDATE (\"id\")");
        at("GRANT DELETE");
        let strict = convert(&[table("t")], Wanted { hardening: Hardening::Strict, ..WANTED }).unwrap();
        assert!(!strict.iter().any(|sql| sql.contains("DELETE")));
    }

    #[test]
    fn what_is_not_safe_is_refused_with_every_reason() {
        let odd = Table {
            has_rows: true,
            references: vec![to("elsewhere.x")],
            tenant_column: Some("integer".into()),
            obstacles: vec!["is partitioned".into()],
            ..table("odd")
        };
        let reasons = convert(std::slice::from_ref(&odd), WANTED).unwrap_err();
        assert_eq!(reasons.len(), 4, "{reasons:#?}");
        assert!(reasons.iter().all(|reason| reason.starts_with("table odd: ")));
        let done = Table { converted: true, ..odd };
        assert_eq!(convert(&[done], WANTED).unwrap(), Vec::<String>::new());
    }
}
