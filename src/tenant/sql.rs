//! Quoted identifiers and literals: the only way to make SQL text out of values.
//!
//! Both follow PostgreSQL's own `quote_ident` (always quoting) and `quote_literal`, which are safe for every
//! setting of `standard_conforming_strings`.
//!
//! What is said in a session of a client's is read in the client's encoding: there only [`Name`] and [`Value`] will do,
//! which are ASCII whatever they stand for.

use std::fmt::{self, Write as _};

/// An identifier, quoted when displayed.
#[derive(Debug, Clone, Copy)]
pub struct Ident<'a>(pub &'a str);

impl fmt::Display for Ident<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('"', "\"\"").replace('\0', ""))
    }
}

/// A string literal, quoted when displayed.
#[derive(Debug, Clone, Copy)]
pub struct Literal<'a>(pub &'a str);

impl fmt::Display for Literal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.replace('\'', "''").replace('\0', "");
        if text.contains('\\') { write!(f, " E'{}'", text.replace('\\', "\\\\")) } else { write!(f, "'{text}'") }
    }
}

/// An identifier in ASCII, quoted when displayed.
#[derive(Debug, Clone, Copy)]
pub struct Name<'a>(pub &'a str);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_ascii() {
            return Ident(self.0).fmt(f);
        }
        f.write_str("U&\"")?;
        for c in self.0.chars() {
            match c {
                '\0' => {}
                '"' => f.write_str("\"\"")?,
                '\\' => f.write_str("\\\\")?,
                c if c.is_ascii() => f.write_char(c)?,
                c => write!(f, "\\+{:06X}", u32::from(c))?,
            }
        }
        f.write_char('"')
    }
}

/// A text as an expression in ASCII.
#[derive(Debug, Clone, Copy)]
pub struct Value<'a>(pub &'a str);

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_ascii() {
            return Literal(self.0).fmt(f);
        }
        f.write_str("pg_catalog.convert_from(pg_catalog.decode('")?;
        for byte in self.0.bytes().filter(|&b| b != 0) {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("', 'hex'), 'UTF8')")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_closes_every_way_out() {
        assert_eq!(Ident("a\"b").to_string(), "\"a\"\"b\"");
        assert_eq!(Literal("o'clock").to_string(), "'o''clock'");
        assert_eq!(Literal("a\\' or 1").to_string(), " E'a\\\\'' or 1'");
    }

    #[test]
    fn names_and_values_of_clients_are_ascii() {
        assert_eq!(Name("a\"b").to_string(), "\"a\"\"b\"");
        assert_eq!(Name("\u{e9}\"\\\u{1f600}").to_string(), "U&\"\\+0000E9\"\"\\\\\\+01F600\"");
        assert_eq!(Value("o'clock").to_string(), "'o''clock'");
        let value = Value("\u{e9}'").to_string();
        assert_eq!(value, "pg_catalog.convert_from(pg_catalog.decode('c3a927', 'hex'), 'UTF8')");
    }
}
