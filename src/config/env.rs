//! Environment variables: `PGUSHER_<SECTION>_<KEY>`, and `PGUSHER_SHARDS_<NAME>_<KEY>` for an element of a list.

use std::collections::BTreeMap;
use std::ffi::OsString;

use super::entries::{Entries, Slot};
use super::keys::SECTIONS;
use super::kind::Raw;
use super::mistake::{Mistake, Place, nearest};

const PREFIX: &str = "PGUSHER_";

/// Variables that are read elsewhere: the configuration file's own name, and what `pgusher dev` starts servers with.
const ELSEWHERE: &[&str] = &["PGUSHER_CONFIG", "PGUSHER_PG_BIN", "PGUSHER_PG_CACHE", "PGUSHER_PG_USER"];

/// Puts variables over what the file says.
pub(super) fn overlay(
    entries: &mut Entries,
    variables: impl Iterator<Item = (OsString, OsString)>,
    mistakes: &mut Vec<Mistake>,
) {
    let known = names(entries);
    let mut variables: Vec<(String, OsString)> = variables
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| name.starts_with(PREFIX) && !ELSEWHERE.contains(&name.as_str()))
        .collect();
    variables.sort();
    for (name, value) in variables {
        let mut refuse = |problem: String, nearest| {
            mistakes.push(Mistake { place: Place::Environment, key: name.clone(), problem, nearest });
        };
        let Ok(value) = value.into_string() else {
            refuse("is not UTF-8".to_owned(), None);
            continue;
        };
        if is_service_link(&name, &value) {
            continue;
        }
        match known.get(&name).map(Vec::as_slice) {
            None => {
                let nearest = nearest(&name, known.keys().map(String::as_str));
                refuse("unknown variable".to_owned(), nearest);
            }
            Some(&[slot]) => {
                if let Err(problem) = put(entries, slot, value) {
                    refuse(problem, None);
                }
            }
            Some(_) => refuse(format!("stands for more than one of [[{}]]", several(&known, &name)), None),
        }
    }
}

fn several(known: &BTreeMap<String, Vec<Slot>>, name: &str) -> &'static str {
    known.get(name).and_then(|slots| slots.first()).map_or("", |slot| slot.section)
}

fn put(entries: &mut Entries, slot: Slot, value: String) -> Result<(), String> {
    let is_secret = SECTIONS
        .iter()
        .any(|section| section.name == slot.section && section.key(slot.key).is_some_and(|(key, _)| key.secret));
    // Containers often pass on every variable, empty where it was not set.
    if is_secret && value.is_empty() {
        return Ok(());
    }
    if is_secret && entries.values.get(&slot.twin()).is_some_and(|(_, place)| *place == Place::Environment) {
        return Err(format!("{} is given too; give one of them", entries.variable(slot.twin())));
    }
    entries.values.remove(&slot.twin());
    entries.values.insert(slot, (Raw::Variable(value), Place::Environment));
    Ok(())
}

/// Every variable there is, for the users and shards of this file.
fn names(entries: &Entries) -> BTreeMap<String, Vec<Slot>> {
    let mut names: BTreeMap<String, Vec<Slot>> = BTreeMap::new();
    for section in SECTIONS {
        let elements = entries.headers.iter().filter(|((name, _), header)| {
            *name == section.name && header.name.as_ref().is_some_and(|name| !name.is_empty())
        });
        let indexes: Vec<usize> = if section.many { elements.map(|((_, index), _)| *index).collect() } else { vec![0] };
        // An element's name is what its variables are found by.
        for key in section.keys.iter().filter(|key| !section.many || key.name != "name") {
            for &index in &indexes {
                for from_file in [false, true].into_iter().take(1 + usize::from(key.secret)) {
                    let slot = Slot { section: section.name, index, key: key.name, from_file };
                    names.entry(entries.variable(slot)).or_default().push(slot);
                }
            }
        }
    }
    names
}

/// Whether Kubernetes made the variable, as it does in every container beside a service named `pgusher` or
/// `pgusher-…`: `PGUSHER_PORT=tcp://…`, `PGUSHER_SERVICE_HOST`, `PGUSHER_PORT_6432_TCP_ADDR`.
fn is_service_link(name: &str, value: &str) -> bool {
    let has_protocol = ["tcp://", "udp://", "sctp://"].iter().any(|protocol| value.starts_with(protocol));
    let is_port = name.rsplit_once("_PORT_").is_some_and(|(_, rest)| {
        let mut parts = rest.split('_');
        let number = parts.next().is_some_and(|part| part.parse::<u16>().is_ok());
        number && parts.next().is_some_and(|part| ["TCP", "UDP", "SCTP"].contains(&part))
    });
    let is_service =
        name.ends_with("_SERVICE_HOST") || name.ends_with("_SERVICE_PORT") || name.contains("_SERVICE_PORT_");
    is_service || is_port || (name.ends_with("_PORT") && has_protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubernetes_sets_is_not_ours() {
        for (name, value) in [
            ("PGUSHER_SERVICE_HOST", "10.0.0.1"),
            ("PGUSHER_SERVICE_PORT", "6432"),
            ("PGUSHER_SERVICE_PORT_POSTGRES", "6432"),
            ("PGUSHER_PORT", "tcp://10.0.0.1:6432"),
            ("PGUSHER_PORT_6432_TCP", "tcp://10.0.0.1:6432"),
            ("PGUSHER_PORT_6432_TCP_ADDR", "10.0.0.1"),
            ("PGUSHER_CATALOG_PORT", "tcp://10.0.0.2:5432"),
        ] {
            assert!(is_service_link(name, value), "{name}");
        }
        for (name, value) in [("PGUSHER_CATALOG_PORT", "5432"), ("PGUSHER_API_PUBLIC_PORT", "1"), ("PGUSHER_PORT", "1")]
        {
            assert!(!is_service_link(name, value), "{name}");
        }
    }
}
