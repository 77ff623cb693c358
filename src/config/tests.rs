//! Files and variables as a whole: what they mean, and what is said about their mistakes.

use std::path::PathBuf;
use std::time::Duration;

use super::keys::SECTIONS;
use super::*;

const MASTER_SECRET: &str = "0123456789abcdef0123456789abcdef";
const NO_VARIABLES: [(&str, &str); 0] = [];

fn dev(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse("pgusher.toml", text, NO_VARIABLES, Purpose::Dev)
}

fn with<const N: usize>(text: &str, variables: [(&str, &str); N]) -> Result<Config, ConfigErrors> {
    Config::parse("pgusher.toml", text, variables, Purpose::Dev)
}

fn of_repository(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

/// Every value as it would be written in a file.
fn written(config: &Config) -> Vec<String> {
    let keys = SECTIONS.iter().flat_map(|section| section.keys.iter().map(move |key| (section, key)));
    keys.map(|(section, key)| format!("{}.{} = {:?}", section.name, key.name, (key.write)(config, 0))).collect()
}

#[test]
fn nothing_said_is_the_default() {
    assert_eq!(dev("").unwrap(), Config::default());
}

#[test]
fn the_documented_file_is_the_table_of_keys() {
    let path = of_repository("pgusher.toml");
    if std::env::var_os("UPDATE_REFERENCE").is_some() {
        std::fs::write(&path, reference()).unwrap();
    }
    let file = std::fs::read_to_string(&path).unwrap();
    assert_eq!(file, reference(), "make it again with UPDATE_REFERENCE=1 cargo test the_documented_file");
}

#[test]
fn the_documented_file_has_every_key_at_its_default() {
    let text = std::fs::read_to_string(of_repository("pgusher.toml")).unwrap();
    let config = dev(&text).unwrap();
    assert_eq!(config, Config::default());
    for section in SECTIONS {
        for key in section.keys {
            let is_there = |line: &str| line.trim_start_matches("# ").starts_with(&format!("{} = ", key.name));
            assert!(text.lines().any(is_there), "{}.{} is missing", section.name, key.name);
            assert!(key.about.iter().all(|line| line.len() > 4), "{}.{} is not explained", section.name, key.name);
        }
    }
}

#[test]
fn the_examples_in_the_documented_file_are_valid() {
    let text = std::fs::read_to_string(of_repository("pgusher.toml")).unwrap();
    let is_off = |line: &str| {
        let line = line.strip_prefix("# ").unwrap_or_default();
        line.starts_with("[[") || line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' '))
    };
    let all: Vec<&str> =
        text.lines().map(|line| if is_off(line) { line.trim_start_matches("# ") } else { line }).collect();
    let errors = dev(&all.join("\n")).unwrap_err();
    // Its files are not on this machine; its secrets are "…".
    let others: Vec<_> = errors
        .mistakes()
        .iter()
        .filter(|mistake| !mistake.problem.starts_with("cannot ") && !mistake.key.contains("master_secret"))
        .collect();
    assert!(others.is_empty(), "{others:?}");
}

#[test]
fn the_minimal_file_serves() {
    let secret = [("PGUSHER_PROVISION_MASTER_SECRET", MASTER_SECRET)];
    let config = Config::load(&of_repository("minimal.toml"), secret, Purpose::Serve).unwrap();
    assert_eq!(config.shards[0].name, "shard_1");
    assert_eq!(config.users[0].tenants, ["*"]);
    assert_eq!(config.provision.master_secret.expose(), MASTER_SECRET);
}

#[test]
fn every_key_can_be_written_and_overridden() {
    let file = r#"
        [pool]
        pool_mode = "transaction"
        default_pool_size = 7
        [proxy]
        unix_socket_mode = "0700"
        pkt_buf = "32kB"
        query_timeout = "1h"
        [[users]]
        name = "app.web"
        password = "of the file"
        tenants = ["client_*"]
        [[shards]]
        name = "eu-1"
        host = "10.0.0.1"
    "#;
    let config = with(
        file,
        [
            ("PGUSHER_POOL_DEFAULT_POOL_SIZE", "50"),
            ("PGUSHER_PROXY_LISTEN_PORT", "7000"),
            ("PGUSHER_PROXY_QUERY_TIMEOUT", "5min"),
            ("PGUSHER_IDENTIFY_ORDER", "database, username"),
            ("PGUSHER_METRICS_METRICS_TOP_TENANTS", "5"),
            ("PGUSHER_USERS_APP_WEB_PASSWORD", "of the variable"),
            ("PGUSHER_SHARDS_EU_1_PORT", "5433"),
            ("PGUSHER_SHARDS_EU_1_MAX_DB_CONNECTIONS", "9"),
            ("PGUSHER_LOG_LOG_CONNECTIONS", "false"),
            ("PGUSHER_API_TOKEN_FILE", ""),
            ("PGUSHER_CONFIG", "/etc/pgusher.toml"),
            ("HOME", "/root"),
        ],
    )
    .unwrap();
    assert_eq!(config.pool.pool_mode, PoolMode::Transaction);
    assert_eq!(config.pool.default_pool_size, 50);
    assert_eq!(config.proxy.listen_port, 7000);
    assert_eq!(config.proxy.unix_socket_mode, 0o700);
    assert_eq!(config.proxy.pkt_buf, 32 << 10);
    assert_eq!(config.proxy.query_timeout, Duration::from_secs(300));
    assert_eq!(config.identify.order, [Source::Database, Source::Username]);
    assert_eq!(config.metrics.metrics_top_tenants, 5);
    assert_eq!(config.users[0].password.expose(), "of the variable");
    assert_eq!((config.shards[0].port, config.shards[0].max_db_connections), (5433, Some(9)));
    assert!(!config.log.log_connections);
}

#[test]
fn every_key_has_a_variable() {
    let elements = "[[users]]\nname = \"u\"\npassword = \"p\"\ntenants = [\"t\"]\n[[shards]]\nname = \"s\"\n";
    let defaults = dev(elements).unwrap();
    for section in SECTIONS {
        for key in section.keys.iter().filter(|key| key.name != "name") {
            let element = match section.name {
                "users" => "U_",
                "shards" => "S_",
                _ => "",
            };
            let name = format!("PGUSHER_{}_{element}{}", section.name, key.name).to_uppercase();
            let Some(value) = (key.write)(&defaults, 0) else { continue };
            let value = value.trim_matches(['[', ']']).replace('"', "");
            let value = if key.secret { "secret secret secret secret secret" } else { &value };
            let config = with(elements, [(name.as_str(), value)]).unwrap_or_else(|errors| panic!("{errors}"));
            assert_eq!(written(&config), written(&defaults), "{name}");
        }
    }
}

#[test]
fn secrets_come_from_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("secret");
    std::fs::write(&path, "two words \r\n").unwrap();
    let path = path.to_str().unwrap();
    let config = dev(&format!("[api]\ntoken_file = {path:?}")).unwrap();
    assert_eq!(config.api.token.expose(), "two words ");
    let config = with("[api]\ntoken = \"of the file\"", [("PGUSHER_API_TOKEN_FILE", path)]).unwrap();
    assert_eq!(config.api.token.expose(), "two words ");
    // What is overridden is not even opened.
    let config = with("[api]\ntoken_file = \"/does/not/exist\"", [("PGUSHER_API_TOKEN", "plain")]).unwrap();
    assert_eq!(config.api.token.expose(), "plain");
}

#[test]
fn secrets_are_never_shown() {
    let config =
        dev("[api]\ntoken = \"hunter2\"\n[[users]]\nname = \"a\"\npassword = \"hunter2\"\ntenants = [\"*\"]\n");
    assert!(!format!("{:?}", config.unwrap()).contains("hunter2"));
    for text in [
        "[api]\ntoken = [\"hunter2\"]",
        "[api]\ntoken = \"hunter2",
        "[api]\ntoken = hunter2",
        "[api]\ntoken = \"hunter2\" x",
        "[provision]\nmaster_secret = \"hunter2\"",
        "[[users]]\nname = \"a\"\npassword = \"SCRAM-SHA-256$hunter2\"\ntenants = [\"*\"]",
    ] {
        let said = dev(text).unwrap_err().to_string();
        assert!(!said.contains("hunter2"), "{said}");
    }
}

/// Files with mistakes, and all that is said about each.
const MISTAKES: &[(&str, &[&str])] = &[
    // Names.
    (
        "\n[pool]\ndefualt_pool_size = 5\n",
        &["pgusher.toml:3: pool.defualt_pool_size: unknown key, did you mean \"default_pool_size\"?"],
    ),
    ("[pol]\n", &["pgusher.toml:1: pol: unknown section, did you mean \"pool\"?"]),
    ("listen_port = 1\n", &["pgusher.toml:1: listen_port: stands outside a section, it belongs to [proxy]"]),
    ("[proxy]\nport = 1\n", &["pgusher.toml:2: proxy.port: unknown key, did you mean \"listen_port\"?"]),
    (
        "[pool]\nquery_timeout = \"1s\"\n",
        &["pgusher.toml:2: pool.query_timeout: unknown key, did you mean \"query_wait_timeout\"?"],
    ),
    ("[pool]\nlisten_addr = \"*\"\n", &["pgusher.toml:2: pool.listen_addr: unknown key, it belongs to [proxy]"]),
    ("[auth]\nbanana = 1\n", &["pgusher.toml:2: auth.banana: unknown key; [auth] has auth_type"]),
    ("[users]\nname = \"a\"\n", &["pgusher.toml:1: users: there may be several of them: write [[users]]"]),
    ("[[pool]]\n", &["pgusher.toml:1: pool: is a section, and there is one: write [pool]"]),
    ("pool = 3\n", &["pgusher.toml:1: pool: is a section, and there is one: write [pool]"]),
    // Values.
    (
        "[pool]\ndefault_pool_size = 0\n",
        &["pgusher.toml:2: pool.default_pool_size: expected a whole number from 1 to 1000000, found 0"],
    ),
    (
        "[pool]\ndefault_pool_size = \"20\"\n",
        &["pgusher.toml:2: pool.default_pool_size: expected a whole number from 1 to 1000000, found \"20\""],
    ),
    (
        "[pool]\nquery_wait_timeout = 120\n",
        &["pgusher.toml:2: pool.query_wait_timeout: expected a time with a unit, such as \"500ms\", \"30s\", \
           \"5min\", \"1h\", found 120, did you mean \"120s\"?"],
    ),
    ("[pool]\nserver_lifetime = 0\n", &["pgusher.toml:2: pool.server_lifetime: must not be zero"]),
    (
        "[proxy]\npkt_buf = 16384\n",
        &[
            "pgusher.toml:2: proxy.pkt_buf: expected a size from \"4kB\" to \"1MB\", found 16384, did you mean \"16kB\"?",
        ],
    ),
    (
        "[proxy]\npkt_buf = \"2MB\"\n",
        &["pgusher.toml:2: proxy.pkt_buf: expected a size from \"4kB\" to \"1MB\", found \"2MB\""],
    ),
    (
        "[proxy]\nlisten_port = 70000\n",
        &["pgusher.toml:2: proxy.listen_port: expected a whole number from 1 to 65535, found 70000"],
    ),
    (
        "[pool]\npool_mode = \"sesion\"\n",
        &[
            "pgusher.toml:2: pool.pool_mode: expected one of \"auto\", \"session\", \"transaction\", found \"sesion\", did you mean \"session\"?",
        ],
    ),
    ("[log]\nlog_connections = 1\n", &["pgusher.toml:2: log.log_connections: expected true or false, found 1"]),
    ("[log]\nlevel = \"inof\"\n", &["pgusher.toml:2: log.level: \"inof\" is not a level, did you mean \"info\"?"]),
    (
        "[proxy]\nlisten_addr = 1979-05-27\n",
        &["pgusher.toml:2: proxy.listen_addr: expected a text in quotes, found a date"],
    ),
    (
        "[proxy]\nunix_socket_mode = 777\n",
        &["pgusher.toml:2: proxy.unix_socket_mode: expected permissions as octal digits, such as \"0770\", found 777"],
    ),
    // Not TOML, several times; what follows is still read.
    (
        "[pool]\nquery_wait_timeout = 30s\nserver_lifetime = 1h\npol_mode = \"session\"\n",
        &[
            "pgusher.toml:2: pool.query_wait_timeout: string values must be quoted, expected literal string",
            "pgusher.toml:3: pool.server_lifetime: string values must be quoted, expected literal string",
            "pgusher.toml:4: pool.pol_mode: unknown key, did you mean \"pool_mode\"?",
        ],
    ),
    ("[pool]\npool_mode = \"session\"\npool_mode = \"session\"\n", &["pgusher.toml:3: duplicate key"]),
    // Keys that do not fit together.
    (
        "[tls]\nclient_tls_sslmode = \"verify-full\"\n",
        &[
            "pgusher.toml:2: tls.client_tls_sslmode: needs client_tls_cert_file",
            "pgusher.toml:2: tls.client_tls_sslmode: needs client_tls_key_file",
            "pgusher.toml:2: tls.client_tls_sslmode: needs client_tls_ca_file",
        ],
    ),
    (
        "[tls]\nserver_tls_sslmode = \"verify-ca\"\n",
        &["pgusher.toml:2: tls.server_tls_sslmode: needs server_tls_ca_file"],
    ),
    (
        "[tls]\nserver_tls_ca_file = \"/does/not/exist\"\n",
        &[
            "pgusher.toml:2: tls.server_tls_ca_file: cannot read \"/does/not/exist\": No such file or directory (os error 2)",
        ],
    ),
    (
        "[proxy]\nlisten_addr = \"\"\n",
        &["pgusher.toml:2: proxy.listen_addr: is empty and there is no unix_socket_dir: clients could not connect"],
    ),
    (
        "[api]\ntoken = \"a\"\ntoken_file = \"/dev/null\"\n",
        &[
            "pgusher.toml:3: api.token_file: token is given too; give one of them",
            "pgusher.toml:3: api.token_file: \"/dev/null\" is empty",
        ],
    ),
    (
        "[api]\nlisten = \"0.0.0.0:6480\"\n",
        &["pgusher.toml:2: api.listen: \"0.0.0.0:6480\" can be reached from other machines and needs a token"],
    ),
    (
        "[metrics]\nlisten = \"127.0.0.1:6480\"\n",
        &["pgusher.toml:2: metrics.listen: port 6480 is that of [api] listen"],
    ),
    ("[api]\nlisten = \"127.0.0.1:6432\"\n", &["pgusher.toml:2: api.listen: port 6432 is [proxy] listen_port"]),
    (
        "[api]\nlisten = \"6480\"\n",
        &["pgusher.toml:2: api.listen: expected address and port, such as \"127.0.0.1:6480\", found \"6480\""],
    ),
    (
        "[identify]\nusername_regex = \"(\"\n",
        &["pgusher.toml:2: identify.username_regex: is not a regular expression: unclosed group"],
    ),
    (
        "[identify]\nusername_regex = \"^(.*)$\"\n",
        &["pgusher.toml:2: identify.username_regex: has no group named tenant: (?<tenant>…)"],
    ),
    (
        "[provision]\nmaster_secret = \"short\"\n",
        &["pgusher.toml:2: provision.master_secret: has 5 characters, at least 32 are needed"],
    ),
    // Lists of tables.
    (
        "[[users]]\nname = \"app\"\npassword = \"p\"\ntenants = [\"*\"]\n\n[[users]]\nname = \"app\"\npassword = \"p\"\ntenants = [\"*\"]\n",
        &["pgusher.toml:7: users.app.name: is the same as on line 2"],
    ),
    (
        "[[users]]\ntenants = [\"Client_*\"]\n",
        &[
            "pgusher.toml:1: users[0].name: is missing",
            "pgusher.toml:1: users[0].password: is missing",
            "pgusher.toml:2: users[0].tenants: \"Client_*\" matches no tenant: none contains 'C'",
        ],
    ),
    (
        "[[users]]\nname = \"a\"\npassword = \"md50123456789abcdef0123456789abcdef\"\n",
        &[
            "pgusher.toml:1: users.a.tenants: is missing: name tenants, or \"*\" for every tenant",
            "pgusher.toml:3: users.a.password: is an MD5 hash, which SCRAM cannot use: give a SCRAM-SHA-256$ verifier",
        ],
    ),
    (
        "[[shards]]\nname = \"a\"\n[[shards]]\nname = \"b\"\nprot = 1\n",
        &[
            "pgusher.toml:3: shards.b.database: is the same database as that of shard \"a\"",
            "pgusher.toml:5: shards.b.prot: unknown key, did you mean \"port\"?",
        ],
    ),
];

#[test]
fn every_mistake_is_told_with_line_key_and_way_out() {
    for (text, expected) in MISTAKES {
        let said = dev(text).expect_err(text).to_string();
        assert_eq!(said.lines().collect::<Vec<_>>(), *expected, "{text}");
    }
}

#[test]
fn mistakes_of_variables_name_the_variable() {
    let file = "[[shards]]\nname = \"eu-1\"\n[[shards]]\nname = \"eu.1\"\nport = 1\n";
    for (name, value, expected) in [
        ("PGUSHER_POOL_POOL_MODE", "x", "expected one of \"auto\", \"session\", \"transaction\", found \"x\""),
        ("PGUSHER_POOL_POLL_MODE", "session", "unknown variable, did you mean \"PGUSHER_POOL_POOL_MODE\"?"),
        ("PGUSHER_XYZZY", "", "unknown variable"),
        ("PGUSHER_SHARDS_EU_1_PORT", "5432", "stands for more than one of [[shards]]"),
        ("PGUSHER_API_LISTEN", "*:80", "\"*:80\" can be reached from other machines and needs a token"),
        (
            "PGUSHER_API_TOKEN_FILE",
            "/does/not/exist",
            "cannot read \"/does/not/exist\": No such file or directory (os error 2)",
        ),
    ] {
        let said = with(file, [(name, value)]).unwrap_err().to_string();
        assert_eq!(said, format!("environment: {name}: {expected}"));
    }
    let both = with("", [("PGUSHER_API_TOKEN", "a"), ("PGUSHER_API_TOKEN_FILE", "/dev/null")]).unwrap_err();
    assert_eq!(
        both.to_string(),
        "environment: PGUSHER_API_TOKEN_FILE: PGUSHER_API_TOKEN is given too; give one of them"
    );
}

#[test]
fn serving_needs_a_place_for_tenants_and_a_master_secret() {
    let serve = |text: &str| Config::parse("pgusher.toml", text, NO_VARIABLES, Purpose::Serve);
    assert_eq!(
        serve("").unwrap_err().to_string(),
        "pgusher.toml: catalog.host: is missing, and there is no [[shards]] either: give one of them\n\
         pgusher.toml: provision.master_secret: is missing; `openssl rand -hex 32` makes one"
    );
    let secret = format!("[provision]\nmaster_secret = \"{MASTER_SECRET}\"\n");
    assert!(serve(&format!("{secret}[catalog]\nhost = \"db\"\n")).is_ok());
    assert!(serve(&format!("{secret}[[shards]]\nname = \"a\"\n")).is_ok());
}

#[test]
fn a_file_that_is_not_there_is_a_mistake() {
    let said = Config::load(Path::new("/does/not/exist"), NO_VARIABLES, Purpose::Dev).unwrap_err();
    assert_eq!(said.to_string(), "/does/not/exist: cannot be read: No such file or directory (os error 2)");
}

#[test]
fn warnings_are_about_what_is_allowed() {
    let warnings = |text: &str| dev(text).unwrap().warnings();
    let token = "[api]\ntoken = \"0123456789abcdef\"\n";
    assert_eq!(warnings(token), Vec::<String>::new());
    for (text, expected) in [
        (
            "[proxy]\nlisten_addr = \"127.0.0.1, 10.0.0.1\"\n[auth]\nauth_type = \"trust\"\n",
            "auth.auth_type: \"trust\" with proxy.listen_addr \"10.0.0.1\"",
        ),
        ("[proxy]\nlisten_addr = \"*\"\n", "tls.client_tls_sslmode: \"disable\""),
        ("[pool]\ndefault_pool_size = 200\n", "pool.default_pool_size: 200 is never reached"),
        ("[provision]\nrole_connection_limit = 5\n", "provision.role_connection_limit: 5 is less than"),
        ("[catalog]\nport = 6000\n", "catalog: only database and snapshot_file have an effect"),
        ("[metrics]\nlisten = \"*:6490\"\n", "metrics.listen: \"*:6490\" shows"),
        ("[identify]\nusername_regex = \"(?<tenant>a)\"\n", "identify.username_regex: is not anchored"),
        ("[[shards]]\nname = \"a\"\nweight = 0\n", "shards: every weight is 0"),
    ] {
        let said = warnings(&format!("{text}{token}"));
        assert!(said.len() == 1 && said[0].starts_with(expected), "{said:?}");
    }
    assert!(
        warnings("[proxy]\nlisten_addr = \"localhost, ::1\"\n[auth]\nauth_type = \"trust\"\n")
            .iter()
            .all(|line| !line.contains("trust"))
    );
}

proptest::proptest! {
    #[test]
    fn no_text_and_no_variable_makes_it_panic(text in "[\\[\\]a-z_=\"'0-9 \n.\\PC]{0,200}", key in "[A-Z_]{0,20}", value in "\\PC{0,20}") {
        let name = format!("PGUSHER_{key}");
        let _ = Config::parse("x", &text, [(name.as_str(), value.as_str())], Purpose::Serve).map_err(|e| e.to_string());
        let pooled = format!("[pool]\n{text}\n[[users]]\nname = {text}\n");
        let _ = Config::parse("x", &pooled, [("PGUSHER_POOL_QUERY_WAIT_TIMEOUT", value.as_str())], Purpose::Dev);
    }
}
