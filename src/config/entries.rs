//! What was written, key by key and with its place, before it becomes a [`Config`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;

use super::keys::Section;
use super::kind::Raw;
use super::mistake::{Mistake, Place};
use super::{Config, ShardConfig, User};

/// Where a value belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot {
    pub(super) section: &'static str,
    /// Which element of a `[[section]]`; 0 for a `[section]`.
    pub(super) index: usize,
    pub(super) key: &'static str,
    /// Whether the value is the name of a file that holds the value.
    pub(super) from_file: bool,
}

/// A `[section]` or one element of a `[[section]]`, as far as it is written in the file.
pub(super) struct Header {
    pub(super) line: usize,
    /// The element's own `name`.
    pub(super) name: Option<String>,
}

/// Everything that was written.
#[derive(Default)]
pub(super) struct Entries {
    pub(super) values: BTreeMap<Slot, (Raw, Place)>,
    pub(super) headers: BTreeMap<(&'static str, usize), Header>,
}

/// More is no secret, and a device file must not be read for ever.
const LARGEST_SECRET_FILE: u64 = 64 << 10;

impl Slot {
    /// The other way to give the same secret.
    pub(super) fn twin(self) -> Self {
        Self { from_file: !self.from_file, ..self }
    }

    pub(super) fn written(self) -> String {
        format!("{}{}", self.key, if self.from_file { "_file" } else { "" })
    }
}

impl Entries {
    /// How a key is named in a mistake: `pool.pool_mode`, `shards.eu-1.port`, `shards[0].name`.
    pub(super) fn path(&self, section: &str, index: usize, key: &str) -> String {
        let many = Section::find(section).is_some_and(|section| section.many);
        let header = self.headers.iter().find(|((name, at), _)| *name == section && *at == index);
        match header.and_then(|(_, header)| header.name.as_deref()) {
            Some(name) if many => format!("{section}.{name}.{key}"),
            _ if many => format!("{section}[{index}].{key}"),
            _ => format!("{section}.{key}"),
        }
    }

    /// Where a key was written; if it was not, where it would belong.
    pub(super) fn place(&self, section: &'static str, index: usize, key: &'static str) -> Place {
        let slot = Slot { section, index, key, from_file: false };
        let written = self.values.get(&slot).or_else(|| self.values.get(&slot.twin()));
        match (written, self.headers.get(&(section, index))) {
            (Some((_, place)), _) => *place,
            (None, Some(header)) => Place::Line(header.line),
            (None, None) => Place::File,
        }
    }

    /// Name and place of a key in a mistake about its value.
    pub(super) fn describe(&self, section: &'static str, index: usize, key: &'static str) -> (String, Place) {
        let plain = Slot { section, index, key, from_file: false };
        let slot = if self.values.contains_key(&plain.twin()) { plain.twin() } else { plain };
        let place = self.place(section, index, key);
        (self.name(slot, place), place)
    }

    fn name(&self, slot: Slot, place: Place) -> String {
        match place {
            Place::Environment => self.variable(slot),
            _ => self.path(slot.section, slot.index, &slot.written()),
        }
    }

    /// How many elements a `[[section]]` has.
    fn count(&self, section: &str) -> usize {
        self.headers.keys().filter(|(name, _)| *name == section).count()
    }

    /// Reads every value into a configuration that otherwise has the defaults.
    pub(super) fn apply(&self, mistakes: &mut Vec<Mistake>) -> Config {
        let mut config = Config {
            users: vec![User::default(); self.count("users")],
            shards: vec![ShardConfig::default(); self.count("shards")],
            ..Config::default()
        };
        for (slot, (raw, place)) in &self.values {
            let Some((key, _)) = Section::find(slot.section).and_then(|section| section.key(slot.key)) else {
                continue;
            };
            let mut refuse = |problem, nearest| {
                mistakes.push(Mistake { place: *place, key: self.name(*slot, *place), problem, nearest });
            };
            let content = if slot.from_file { secret_file(raw).map(Some) } else { Ok(None) };
            match content {
                Err(problem) => refuse(problem, None),
                Ok(content) => {
                    let value = content.as_ref().unwrap_or(raw);
                    if let Err(wrong) = (key.set)(&mut config, slot.index, value) {
                        refuse(wrong.problem, wrong.nearest);
                    }
                }
            }
        }
        config
    }

    /// The environment variable that overrides a key.
    pub(super) fn variable(&self, slot: Slot) -> String {
        let header = self.headers.get(&(slot.section, slot.index));
        let name = header.and_then(|header| header.name.as_deref()).map(|name| format!("{name}_"));
        let name = format!("PGUSHER_{}_{}{}", slot.section, name.unwrap_or_default(), slot.written());
        let allowed = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        name.chars().map(allowed).collect()
    }
}

/// The content of a file that holds a secret, without the newline at its end.
fn secret_file(raw: &Raw) -> Result<Raw, String> {
    let name = raw.text().filter(|name| !name.is_empty()).ok_or("expected the name of a file, in quotes")?;
    let mut content = String::new();
    File::open(name)
        .and_then(|file| file.take(LARGEST_SECRET_FILE + 1).read_to_string(&mut content))
        .map_err(|error| format!("cannot read {name:?}: {error}"))?;
    let secret = content.trim_end_matches(['\n', '\r']);
    match secret.len() as u64 {
        0 => Err(format!("{name:?} is empty")),
        1..=LARGEST_SECRET_FILE => Ok(Raw::Quoted(secret.to_owned())),
        _ => Err(format!("{name:?} is too large for a secret")),
    }
}
