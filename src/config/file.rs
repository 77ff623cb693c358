//! Reads the TOML text into [`Entries`], with a line for each and a mistake for everything that does not belong.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::entries::{Entries, Header, Slot};
use super::keys::{SECTIONS, Section};
use super::kind::Raw;
use super::mistake::{Mistake, Place, nearest};

/// Reads as much as can be understood; what cannot becomes a mistake.
pub(super) fn read(text: &str, mistakes: &mut Vec<Mistake>) -> Entries {
    let (document, errors) = DeTable::parse_recoverable(text);
    let syntax = errors.iter().map(|error| (line(text, &error.span().unwrap_or_default()), error.message().to_owned()));
    let mut reader =
        Reader { text, syntax: syntax.collect(), paths: BTreeMap::new(), entries: Entries::default(), mistakes };
    for (name, value) in document.get_ref() {
        reader.section(name, value);
    }
    reader.finish()
}

struct Reader<'a> {
    text: &'a str,
    /// Lines that are not TOML, with the reason. What the parser made of them is not to be trusted.
    syntax: Vec<(usize, String)>,
    /// The key that stands on a line.
    paths: BTreeMap<usize, String>,
    entries: Entries,
    mistakes: &'a mut Vec<Mistake>,
}

fn line(text: &str, span: &Range<usize>) -> usize {
    let before = text.as_bytes().get(..span.start).unwrap_or(text.as_bytes());
    before.iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// The one section that has such a key.
fn home(written: &str) -> Option<&'static Section> {
    let mut homes = SECTIONS.iter().filter(|section| section.key(written).is_some());
    homes.next().filter(|_| homes.next().is_none())
}

impl Reader<'_> {
    fn refuse(&mut self, span: &Range<usize>, key: &str, problem: impl Into<String>, nearest: Option<String>) {
        let line = line(self.text, span);
        if !self.is_broken(line) {
            let (key, problem) = (key.to_owned(), problem.into());
            self.mistakes.push(Mistake { place: Place::Line(line), key, problem, nearest });
        }
    }

    fn is_broken(&self, line: usize) -> bool {
        self.syntax.iter().any(|(broken, _)| *broken == line)
    }

    fn section(&mut self, name: &Spanned<toml::de::DeString<'_>>, value: &Spanned<DeValue<'_>>) {
        let (span, written) = (name.span(), name.get_ref().as_ref());
        let Some(section) = Section::find(written) else {
            return self.unknown_section(&span, written, value.get_ref());
        };
        match value.get_ref() {
            DeValue::Table(table) if !section.many => self.keys(section, 0, &span, table),
            DeValue::Array(elements) if section.many => {
                for (index, element) in elements.iter().enumerate() {
                    match element.get_ref() {
                        DeValue::Table(table) => self.keys(section, index, &element.span(), table),
                        _ => self.refuse(&element.span(), written, format!("write [[{written}]]"), None),
                    }
                }
            }
            _ if section.many => {
                self.refuse(&span, written, format!("there may be several of them: write [[{written}]]"), None);
            }
            _ => self.refuse(&span, written, format!("is a section, and there is one: write [{written}]"), None),
        }
    }

    fn unknown_section(&mut self, span: &Range<usize>, written: &str, value: &DeValue<'_>) {
        let is_table = matches!(value, DeValue::Table(_) | DeValue::Array(_));
        match home(written) {
            Some(home) if !is_table => {
                let problem = format!("stands outside a section, it belongs to [{}]", home.name);
                self.refuse(span, written, problem, None);
            }
            _ => {
                let nearest = nearest(written, SECTIONS.iter().map(|section| section.name));
                let problem = match nearest {
                    Some(_) => "unknown section".to_owned(),
                    None => {
                        let names: Vec<_> = SECTIONS.iter().map(|section| section.name).collect();
                        format!("unknown section; there are {}", names.join(", "))
                    }
                };
                self.refuse(span, written, problem, nearest);
            }
        }
    }

    fn keys(&mut self, section: &'static Section, index: usize, span: &Range<usize>, table: &DeTable<'_>) {
        let name = table.get("name").and_then(|name| name.get_ref().as_str()).filter(|_| section.many);
        let header = Header { line: line(self.text, span), name: name.map(str::to_owned) };
        self.entries.headers.insert((section.name, index), header);
        for (key, value) in table {
            let (written, at) = (key.get_ref().as_ref(), line(self.text, &key.span()));
            let path = self.entries.path(section.name, index, written);
            self.paths.entry(at).or_insert_with(|| path.clone());
            let Some((known, from_file)) = section.key(written) else {
                self.unknown_key(section, &key.span(), &path, written);
                continue;
            };
            if !self.is_broken(at) {
                let slot = Slot { section: section.name, index, key: known.name, from_file };
                self.entries.values.insert(slot, (raw(value.get_ref()), Place::Line(at)));
            }
            if from_file && table.contains_key(known.name) {
                let problem = format!("{} is given too; give one of them", known.name);
                self.refuse(&key.span(), &path, problem, None);
            }
        }
    }

    fn unknown_key(&mut self, section: &Section, span: &Range<usize>, path: &str, written: &str) {
        let names: Vec<_> = section.names().collect();
        let near = nearest(written, names.iter().map(String::as_str));
        let problem = match (&near, home(written)) {
            (Some(_), _) => "unknown key".to_owned(),
            (None, Some(home)) => format!("unknown key, it belongs to [{}]", home.name),
            (None, None) => format!("unknown key; [{}] has {}", section.name, names.join(", ")),
        };
        self.refuse(span, path, problem, near);
    }

    fn finish(self) -> Entries {
        for (line, problem) in self.syntax {
            let key = self.paths.get(&line).cloned().unwrap_or_default();
            self.mistakes.push(Mistake { place: Place::Syntax(line), key, problem, nearest: None });
        }
        self.entries
    }
}

fn raw(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Quoted(text.to_string()),
        DeValue::Integer(number) => Raw::Bare(match number.radix() {
            2 => format!("0b{}", number.as_str()),
            8 => format!("0o{}", number.as_str()),
            16 => format!("0x{}", number.as_str()),
            _ => number.as_str().to_owned(),
        }),
        DeValue::Float(number) => Raw::Bare(number.as_str().to_owned()),
        DeValue::Boolean(flag) => Raw::Bare(flag.to_string()),
        DeValue::Array(list) => Raw::List(list.iter().map(|member| raw(member.get_ref())).collect()),
        DeValue::Datetime(_) => Raw::Other("a date"),
        DeValue::Table(_) => Raw::Other("a table"),
    }
}
