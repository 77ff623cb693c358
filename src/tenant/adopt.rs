//! Taking in a schema or database that was there before: what in it contradicts the plan, and what would repair it.
//! No I/O; the queries look at catalogs only, so that nothing that somebody wrote is run.

use super::plan::{GROUP, Home, OWNER, Plan};
use super::sql::Literal;

/// How much something that was found matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weight {
    /// Worth knowing; the wall does not depend on it.
    Note,
    /// Contradicts the plan, and can be repaired.
    Fix,
    /// Contradicts the plan, and somebody must decide.
    Blocks,
}

/// Something in a place that is not as the plan would have made it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// How much it matters.
    pub weight: Weight,
    /// What it is.
    pub what: String,
    /// What repairs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sql: Option<String>,
}

impl Finding {
    /// From a row of one of [`queries`].
    pub fn new(weight: &str, what: String, sql: Option<String>) -> Self {
        let weight = match weight {
            "note" => Weight::Note,
            "fix" if sql.is_some() => Weight::Fix,
            _ => Weight::Blocks,
        };
        Self { weight, what, sql }
    }
}

/// Whether a plan can take in what is there.
pub fn is_possible(plan: Plan) -> bool {
    matches!(plan, Plan::Schema | Plan::Database)
}

/// Queries in the place's database, for rows of weight (`note`, `fix`, `blocks`), text and SQL (or null). They do not
/// find that the role or the schema is missing, nor a wrong password: making the place anew mends those.
pub fn queries(plan: Plan, home: &Home) -> Vec<String> {
    let scope = match plan {
        Plan::Database => {
            "NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'tenant_shim', 'extensions')".to_owned()
        }
        Plan::Rls | Plan::Schema | Plan::Cluster => format!("= {}", Literal(&home.schema)),
    };
    let mut all = vec![ROLE, OBJECTS, GRANTS];
    all.push(match plan {
        Plan::Database => DATABASE,
        Plan::Rls | Plan::Schema | Plan::Cluster => SCHEMA,
    });
    all.iter()
        .map(|sql| {
            sql.replace("{role}", &Literal(&home.role).to_string())
                .replace("{schema}", &Literal(&home.schema).to_string())
                .replace("{database}", &Literal(&home.database).to_string())
                .replace("{scope}", &scope)
                .replace("{owner}", &Literal(OWNER).to_string())
                .replace("{group}", &Literal(GROUP).to_string())
        })
        .collect()
}

/// What the role is and may do besides.
const ROLE: &str = "\
    WITH r AS (SELECT * FROM pg_roles WHERE rolname = {role}) \
    SELECT 'fix', pg_catalog.format('role %I is %s', r.rolname, x.what), \
      pg_catalog.format('ALTER ROLE %I NO%s', r.rolname, x.what) \
    FROM r, LATERAL (VALUES (r.rolsuper, 'SUPERUSER'), (r.rolcreaterole, 'CREATEROLE'), (r.rolcreatedb, 'CREATEDB'), \
      (r.rolreplication, 'REPLICATION'), (r.rolbypassrls, 'BYPASSRLS')) x (has, what) WHERE x.has \
    UNION ALL SELECT 'blocks', pg_catalog.format('role %I is the administrator', r.rolname), NULL FROM r \
      WHERE r.rolname = session_user OR r.oid = 10 \
    UNION ALL SELECT 'fix', pg_catalog.format('role %I is a member of %I', r.rolname, g.rolname), \
      pg_catalog.format('REVOKE %I FROM %I', g.rolname, r.rolname) \
      FROM r JOIN pg_auth_members m ON m.member = r.oid JOIN pg_roles g ON g.oid = m.roleid WHERE g.rolname <> {group} \
    UNION ALL SELECT 'fix', pg_catalog.format('role %I is a member of %I and can do what it can', g.rolname, r.rolname), \
      pg_catalog.format('REVOKE %I FROM %I', r.rolname, g.rolname) \
      FROM r JOIN pg_auth_members m ON m.roleid = r.oid JOIN pg_roles g ON g.oid = m.member WHERE NOT g.rolsuper \
    UNION ALL SELECT 'fix', pg_catalog.format('role %I has settings of its own: %s', r.rolname, \
        pg_catalog.array_to_string(s.setconfig, ', ')), \
      CASE WHEN s.setdatabase = 0 THEN pg_catalog.format('ALTER ROLE %I RESET ALL', r.rolname) \
        ELSE pg_catalog.format('ALTER ROLE %I IN DATABASE %I RESET ALL', r.rolname, d.datname) END \
      FROM r JOIN pg_db_role_setting s ON s.setrole = r.oid LEFT JOIN pg_database d ON d.oid = s.setdatabase \
    UNION ALL SELECT 'blocks', pg_catalog.format('role %I owns database %I', r.rolname, d.datname), NULL \
      FROM r JOIN pg_database d ON d.datdba = r.oid WHERE d.datname <> {database} \
    UNION ALL SELECT 'fix', pg_catalog.format('role %I may %s on database %I', r.rolname, a.privilege_type, d.datname), \
      pg_catalog.format('REVOKE %s ON DATABASE %I FROM %I', a.privilege_type, d.datname, r.rolname) \
      FROM r JOIN pg_database d ON true, LATERAL pg_catalog.aclexplode(d.datacl) a WHERE a.grantee = r.oid \
      AND d.datdba <> r.oid AND (d.datname <> {database} OR a.privilege_type = 'CREATE') \
    UNION ALL SELECT 'blocks', pg_catalog.format('role %I owns schema %I', r.rolname, n.nspname), NULL \
      FROM r JOIN pg_namespace n ON n.nspowner = r.oid WHERE NOT (n.nspname {scope}) \
        AND n.nspname !~ '^pg_(toast_)?temp_' \
    UNION ALL SELECT 'fix', pg_catalog.format('role %I may %s on schema %I', r.rolname, a.privilege_type, n.nspname), \
      pg_catalog.format('REVOKE ALL ON SCHEMA %I FROM %I', n.nspname, r.rolname) \
      FROM r JOIN pg_namespace n ON true, LATERAL pg_catalog.aclexplode(n.nspacl) a \
      WHERE a.grantee = r.oid AND NOT (n.nspname {scope}) AND n.nspowner <> r.oid \
    UNION ALL SELECT 'fix', pg_catalog.format('role %I may %s on %s', r.rolname, a.privilege_type, c.oid::regclass), \
      pg_catalog.format('REVOKE ALL ON %s %s FROM %I', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, \
        c.oid::regclass, r.rolname) \
      FROM r JOIN pg_class c ON true JOIN pg_namespace n ON n.oid = c.relnamespace, \
      LATERAL pg_catalog.aclexplode(c.relacl) a WHERE a.grantee = r.oid AND c.relowner <> r.oid \
        AND NOT (n.nspname {scope}) AND n.nspname NOT IN ('pg_catalog', 'information_schema') \
    UNION ALL SELECT 'blocks', pg_catalog.format('role %I owns %s in another schema', r.rolname, c.oid::regclass), NULL \
      FROM r JOIN pg_class c ON c.relowner = r.oid JOIN pg_namespace n ON n.oid = c.relnamespace \
      WHERE NOT (n.nspname {scope}) AND n.nspname !~ '^pg_(toast|temp)' AND c.relkind NOT IN ('i', 'I', 't')";

/// Objects of the place that belong to somebody else, or lead out of it.
const OBJECTS: &str = "\
    SELECT 'fix', pg_catalog.format('%s belongs to %I', c.oid::regclass, pg_get_userbyid(c.relowner)), \
      pg_catalog.format('ALTER %s %s OWNER TO %I', CASE c.relkind WHEN 'v' THEN 'VIEW' WHEN 'm' THEN \
        'MATERIALIZED VIEW' WHEN 'S' THEN 'SEQUENCE' WHEN 'f' THEN 'FOREIGN TABLE' ELSE 'TABLE' END, \
        c.oid::regclass, {role}) \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname {scope} AND n.nspname !~ '^pg_' AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') \
      AND pg_get_userbyid(c.relowner) <> {role} \
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid \
                      AND d.deptype IN ('e', 'a', 'i') AND (d.deptype = 'e' OR c.relkind = 'S')) \
    UNION ALL SELECT 'fix', pg_catalog.format('routine %s belongs to %I%s', p.oid::regprocedure, \
        pg_get_userbyid(p.proowner), CASE WHEN p.prosecdef THEN ', as whom it runs' ELSE '' END), \
      pg_catalog.format('ALTER %s %s OWNER TO %I', CASE p.prokind WHEN 'a' THEN 'AGGREGATE' ELSE 'ROUTINE' END, \
        p.oid::regprocedure, {role}) \
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace \
    WHERE n.nspname {scope} AND pg_get_userbyid(p.proowner) <> {role} \
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid \
                      AND d.deptype = 'e') \
    UNION ALL SELECT 'blocks', pg_catalog.format('routine %s is in language %I, which is not safe', \
        p.oid::regprocedure, l.lanname), NULL \
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang \
    WHERE n.nspname {scope} AND NOT l.lanpltrusted \
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid \
                      AND d.deptype = 'e') \
    UNION ALL SELECT 'fix', pg_catalog.format('type %s belongs to %I', t.oid::regtype, pg_get_userbyid(t.typowner)), \
      pg_catalog.format('ALTER TYPE %s OWNER TO %I', t.oid::regtype, {role}) \
    FROM pg_type t JOIN pg_namespace n ON n.oid = t.typnamespace \
    WHERE n.nspname {scope} AND t.typtype IN ('e', 'd', 'r') AND pg_get_userbyid(t.typowner) <> {role} \
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid \
                      AND d.deptype = 'e') \
    UNION ALL SELECT 'note', pg_catalog.format('extension %I is in schema %I: its functions belong to %I', e.extname, \
        n.nspname, pg_get_userbyid(e.extowner)), NULL \
    FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE n.nspname {scope} \
    UNION ALL SELECT 'blocks', pg_catalog.format('foreign key %I of %s leads to %s', x.conname, x.conrelid::regclass, \
        x.confrelid::regclass), NULL \
    FROM pg_constraint x JOIN pg_class a ON a.oid = x.conrelid JOIN pg_namespace an ON an.oid = a.relnamespace \
    JOIN pg_class b ON b.oid = x.confrelid JOIN pg_namespace bn ON bn.oid = b.relnamespace \
    WHERE x.contype = 'f' AND (an.nspname {scope}) <> (bn.nspname {scope}) \
    UNION ALL SELECT DISTINCT 'blocks', pg_catalog.format('%s reads %s', v.oid::regclass, c.oid::regclass), NULL \
    FROM pg_rewrite w JOIN pg_class v ON v.oid = w.ev_class JOIN pg_namespace vn ON vn.oid = v.relnamespace \
    JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid AND d.refclassid = 'pg_class'::regclass \
    JOIN pg_class c ON c.oid = d.refobjid JOIN pg_namespace cn ON cn.oid = c.relnamespace \
    WHERE v.oid <> c.oid AND (vn.nspname {scope}) <> (cn.nspname {scope}) \
      AND cn.nspname NOT IN ('pg_catalog', 'information_schema', 'extensions') \
      AND vn.nspname NOT IN ('pg_catalog', 'information_schema', 'extensions') \
    UNION ALL SELECT 'blocks', pg_catalog.format('trigger %I of %s calls %s', g.tgname, c.oid::regclass, \
        p.oid::regprocedure), NULL \
    FROM pg_trigger g JOIN pg_class c ON c.oid = g.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
    JOIN pg_proc p ON p.oid = g.tgfoid JOIN pg_namespace pn ON pn.oid = p.pronamespace \
    WHERE NOT g.tgisinternal AND n.nspname {scope} AND NOT (pn.nspname {scope}) \
      AND pn.nspname NOT IN ('pg_catalog', 'extensions') \
    UNION ALL SELECT 'fix', pg_catalog.format('%s has policies that its owner need not obey (no FORCE)', \
        c.oid::regclass), pg_catalog.format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', c.oid::regclass) \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
    WHERE n.nspname {scope} AND c.relrowsecurity AND NOT c.relforcerowsecurity";

/// Rights that others have in the place, now or by default.
const GRANTS: &str = "\
    SELECT DISTINCT 'fix', pg_catalog.format('%s may %s on %s', coalesce(pg_catalog.quote_ident(g.rolname), 'PUBLIC'), \
        pg_catalog.string_agg(DISTINCT a.privilege_type, ', '), c.oid::regclass), \
      pg_catalog.format('REVOKE ALL ON %s %s FROM %s CASCADE', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' \
        END, c.oid::regclass, coalesce(pg_catalog.quote_ident(g.rolname), 'PUBLIC')) \
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace, LATERAL (SELECT * FROM \
      pg_catalog.aclexplode(c.relacl) UNION ALL SELECT x.* FROM pg_attribute t, \
      LATERAL pg_catalog.aclexplode(t.attacl) x WHERE t.attrelid = c.oid) a LEFT JOIN pg_roles g ON g.oid = a.grantee \
    WHERE n.nspname {scope} AND n.nspname !~ '^pg_' AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') \
      AND a.grantee <> c.relowner AND coalesce(g.rolname, '') <> {role} \
      AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid \
                      AND d.deptype = 'e') \
    GROUP BY c.oid, c.relkind, g.rolname \
    UNION ALL SELECT DISTINCT 'fix', pg_catalog.format('%I may execute %s', g.rolname, p.oid::regprocedure), \
      pg_catalog.format('REVOKE ALL ON %s %s FROM %I', CASE p.prokind WHEN 'a' THEN 'FUNCTION' ELSE 'ROUTINE' END, \
        p.oid::regprocedure, g.rolname) \
    FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace, LATERAL pg_catalog.aclexplode(p.proacl) a \
    JOIN pg_roles g ON g.oid = a.grantee \
    WHERE n.nspname {scope} AND a.grantee <> p.proowner AND g.rolname <> {role} \
    UNION ALL SELECT DISTINCT 'fix', pg_catalog.format('%s may %s on schema %I', \
        coalesce(pg_catalog.quote_ident(g.rolname), 'PUBLIC'), a.privilege_type, n.nspname), \
      pg_catalog.format('REVOKE ALL ON SCHEMA %I FROM %s CASCADE', n.nspname, \
        coalesce(pg_catalog.quote_ident(g.rolname), 'PUBLIC')) \
    FROM pg_namespace n, LATERAL pg_catalog.aclexplode(n.nspacl) a LEFT JOIN pg_roles g ON g.oid = a.grantee \
    WHERE n.nspname {scope} AND n.nspname !~ '^pg_' AND a.grantee <> n.nspowner AND coalesce(g.rolname, '') NOT IN ({role}, {owner}) \
    UNION ALL SELECT 'fix', pg_catalog.format('what %I makes%s, %s may %s', o.rolname, \
        CASE WHEN n.nspname IS NULL THEN '' ELSE pg_catalog.format(' in schema %I', n.nspname) END, \
        coalesce(pg_catalog.quote_ident(g.rolname), 'PUBLIC'), a.privilege_type), \
      pg_catalog.format('ALTER DEFAULT PRIVILEGES FOR ROLE %I %s REVOKE ALL ON %s FROM %s', o.rolname, \
        CASE WHEN n.nspname IS NULL THEN '' ELSE pg_catalog.format('IN SCHEMA %I', n.nspname) END, \
        CASE d.defaclobjtype WHEN 'r' THEN 'TABLES' WHEN 'S' THEN 'SEQUENCES' WHEN 'f' THEN 'ROUTINES' \
          WHEN 'T' THEN 'TYPES' ELSE 'SCHEMAS' END, coalesce(pg_catalog.quote_ident(g.rolname), 'PUBLIC')) \
    FROM pg_default_acl d JOIN pg_roles o ON o.oid = d.defaclrole LEFT JOIN pg_namespace n ON n.oid = d.defaclnamespace, \
    LATERAL pg_catalog.aclexplode(d.defaclacl) a LEFT JOIN pg_roles g ON g.oid = a.grantee \
    WHERE (n.nspname {scope} OR (n.nspname IS NULL AND o.rolname = {role})) AND a.grantee <> d.defaclrole \
      AND coalesce(g.rolname, '') <> {role} \
      AND NOT (g.rolname IS NULL AND n.nspname IS NULL AND d.defaclobjtype IN ('f', 'T'))";

const SCHEMA: &str = "\
    SELECT 'fix', pg_catalog.format('schema %I belongs to %I', n.nspname, pg_get_userbyid(n.nspowner)), \
      pg_catalog.format('ALTER SCHEMA %I OWNER TO %I', n.nspname, {owner}) \
    FROM pg_namespace n WHERE n.nspname = {schema} AND pg_get_userbyid(n.nspowner) <> {owner} \
    UNION ALL SELECT 'blocks', pg_catalog.format('schema %I is not one of a tenant', {schema}), NULL \
    WHERE {schema} IN ('public', 'information_schema', 'tenant_shim', 'extensions') OR {schema} ~ '^pg_'";

const DATABASE: &str = "\
    SELECT 'fix', pg_catalog.format('database %I belongs to %I', d.datname, pg_get_userbyid(d.datdba)), \
      pg_catalog.format('ALTER DATABASE %I OWNER TO %I', d.datname, {owner}) \
    FROM pg_database d WHERE d.datname = {database} AND pg_get_userbyid(d.datdba) <> {owner} \
    UNION ALL SELECT 'fix', pg_catalog.format('%s may %s on database %I', \
        coalesce(pg_catalog.quote_ident(g.rolname), 'PUBLIC'), pg_catalog.string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type), \
        d.datname), pg_catalog.format('REVOKE ALL ON DATABASE %I FROM %s CASCADE', d.datname, \
        coalesce(pg_catalog.quote_ident(g.rolname), 'PUBLIC')) \
    FROM pg_database d, LATERAL pg_catalog.aclexplode(coalesce(d.datacl, pg_catalog.acldefault('d', d.datdba))) a \
    LEFT JOIN pg_roles g ON g.oid = a.grantee \
    WHERE d.datname = {database} AND a.grantee <> d.datdba AND coalesce(g.rolname, '') NOT IN ({role}, {owner}) \
    GROUP BY d.datname, g.rolname \
    UNION ALL SELECT 'fix', pg_catalog.format('schema %I belongs to %I', n.nspname, pg_get_userbyid(n.nspowner)), \
      pg_catalog.format('ALTER SCHEMA %I OWNER TO %I', n.nspname, {role}) \
    FROM pg_namespace n WHERE n.nspname {scope} AND n.nspname !~ '^pg_' AND n.nspname <> 'public' \
      AND pg_get_userbyid(n.nspowner) <> {role} \
    UNION ALL SELECT 'fix', pg_catalog.format('schema public belongs to %I', pg_get_userbyid(n.nspowner)), \
      'ALTER SCHEMA public OWNER TO pg_database_owner' \
    FROM pg_namespace n WHERE n.nspname = 'public' \
      AND pg_get_userbyid(n.nspowner) NOT IN ('pg_database_owner', {owner}) \
    UNION ALL SELECT 'blocks', pg_catalog.format('event trigger %I runs for everybody, as %I', e.evtname, \
        pg_get_userbyid(e.evtowner)), NULL FROM pg_event_trigger e \
    UNION ALL SELECT 'blocks', pg_catalog.format('foreign server %I leads elsewhere', s.srvname), NULL \
      FROM pg_foreign_server s \
    UNION ALL SELECT 'blocks', pg_catalog.format('database %I is not one of a tenant', {database}), NULL \
    WHERE {database} IN ('postgres', 'template0', 'template1', 'pgusher_template')";
