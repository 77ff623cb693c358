//! The manual of the configuration, made from the table of keys.

use std::fmt::Write as _;

use super::keys::{Key, SECTIONS, Section};
use super::{Config, ShardConfig, User};

const HEAD: &str = "\
# Everything that pgusher can be told, at its default. A key behind a # is absent by default and shows an example.
#
# Times have a unit: \"500ms\", \"30s\", \"5min\", \"1h\"; 0 turns off what it limits, where the text says so.
# Sizes have one too: \"16kB\", \"64MB\"; as in PostgreSQL, 1 kB is 1024 bytes.
# Relative paths are taken from the directory in which pgusher was started.
#
# Every key can be overridden by a variable PGUSHER_<SECTION>_<KEY>: PGUSHER_POOL_DEFAULT_POOL_SIZE=50; lists are
# written with commas. A user or shard of this file is found by its name, in capitals and with _ for anything else:
# PGUSHER_SHARDS_SHARD_1_ADMIN_PASSWORD.
#
# A secret can also be read from a file: password_file instead of password, PGUSHER_API_TOKEN_FILE instead of
# PGUSHER_API_TOKEN. The newline at the file's end does not count.
#
# `pgusher check --config FILE` tells every mistake in a file. This file is made from the program's own table of keys.
";

/// The documented configuration file `config/pgusher.toml`: every key, at its default.
pub fn reference() -> String {
    let defaults = Config { users: vec![User::default()], shards: vec![ShardConfig::default()], ..Config::default() };
    let mut text = HEAD.to_owned();
    for section in SECTIONS {
        text.push('\n');
        describe(&mut text, section.about);
        // Elements of a list have no default: the file has none of them.
        let (open, close, off) = if section.many { ("# [[", "]]", "# ") } else { ("[", "]", "") };
        let _ = writeln!(text, "{open}{}{close}", section.name);
        for key in section.keys {
            describe(&mut text, key.about);
            let _ = writeln!(text, "{}", assignment(section, key, &defaults, off));
        }
    }
    text
}

fn describe(text: &mut String, about: &[&str]) {
    for line in about {
        let _ = writeln!(text, "# {}", line.trim());
    }
}

fn assignment(section: &Section, key: &Key, defaults: &Config, off: &str) -> String {
    let default = (key.write)(defaults, 0);
    match default {
        // A name or a list of tenants has a default too, but an example says more.
        Some(_) | None if section.many && !key.example.is_empty() => format!("{off}{} = {}", key.name, key.example),
        Some(default) => format!("{off}{} = {default}", key.name),
        None => format!("# {} = {}", key.name, if key.example.is_empty() { "\"\"" } else { key.example }),
    }
}
