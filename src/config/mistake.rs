//! Mistakes in a configuration, as lines for people.

use std::fmt;

/// Everything that is wrong with a configuration. Displays as one line per mistake.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigErrors {
    file: String,
    mistakes: Vec<Mistake>,
}

/// One thing that is wrong, with its place, so that it displays as
/// `12: pool.defualt_pool_size: unknown key, did you mean "default_pool_size"?`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// Where it was written.
    pub place: Place,
    /// The key with its section, or the variable; empty if it concerns the whole file.
    pub key: String,
    /// What is wrong.
    pub problem: String,
    /// The nearest name or value that would be right.
    pub nearest: Option<String>,
}

/// Where something was written, in the order in which mistakes are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// On this line of the file; the text is not TOML there.
    Syntax(usize),
    /// On this line of the file.
    Line(usize),
    /// Nowhere: it is missing.
    File,
    /// In an environment variable.
    Environment,
}

impl ConfigErrors {
    pub(super) fn new(file: String, mut mistakes: Vec<Mistake>) -> Self {
        mistakes.sort_by_key(|mistake| (mistake.place.line(), mistake.place));
        mistakes.dedup();
        Self { file, mistakes }
    }

    /// The mistakes, those in the file first, by line.
    pub fn mistakes(&self) -> &[Mistake] {
        &self.mistakes
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, mistake) in self.mistakes.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            match mistake.place {
                Place::Syntax(line) | Place::Line(line) => write!(f, "{}:{line}: {mistake}", self.file)?,
                Place::File => write!(f, "{}: {mistake}", self.file)?,
                Place::Environment => write!(f, "environment: {mistake}")?,
            }
        }
        Ok(())
    }
}

impl Mistake {
    pub(super) fn of_file(problem: String) -> Self {
        Self { place: Place::File, key: String::new(), problem, nearest: None }
    }

    pub(super) fn is_syntax(&self) -> bool {
        matches!(self.place, Place::Syntax(_))
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.problem)?;
        match &self.nearest {
            Some(nearest) => write!(f, ", did you mean {nearest:?}?"),
            None => Ok(()),
        }
    }
}

impl Place {
    fn line(self) -> usize {
        match self {
            Self::Syntax(line) | Self::Line(line) => line,
            Self::File | Self::Environment => usize::MAX,
        }
    }
}

/// The name most like `written`, if one is like it at all.
pub(super) fn nearest<'a>(written: &str, names: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let written = written.to_lowercase();
    let names: Vec<&str> = names.into_iter().collect();
    let misspelt = names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&written, &name.to_lowercase()), *name))
        .filter(|&(distance, name)| distance <= name.len().div_ceil(3))
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| name);
    misspelt.or_else(|| shortened(&written, &names)).map(str::to_owned)
}

/// The one name that begins or ends with the word `written`: `port` for `listen_port`.
fn shortened<'a>(written: &str, names: &[&'a str]) -> Option<&'a str> {
    let is_part = |name: &&&str| {
        let rest = name.strip_prefix(written).map(|rest| rest.starts_with('_'));
        rest.or_else(|| name.strip_suffix(written).map(|rest| rest.ends_with('_'))).unwrap_or(false)
    };
    let mut found = names.iter().filter(is_part);
    found.next().copied().filter(|_| found.next().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_similar_name_is_proposed() {
        let names = ["default_pool_size", "pool_mode", "port"];
        assert_eq!(nearest("defualt_pool_size", names).as_deref(), Some("default_pool_size"));
        assert_eq!(nearest("POOL-MODE", names).as_deref(), Some("pool_mode"));
        assert_eq!(nearest("mode", names).as_deref(), Some("pool_mode"));
        assert_eq!(nearest("banana", names), None);
        assert_eq!(nearest("timeout", ["client_timeout", "server_timeout"]), None);
    }
}
