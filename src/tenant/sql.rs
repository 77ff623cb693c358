//! Quoted identifiers and literals: the only way to make SQL text out of values.
//!
//! Both follow PostgreSQL's own `quote_ident` (always quoting) and `quote_literal`, which are safe for every
//! setting of `standard_conforming_strings`.

use std::fmt;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_closes_every_way_out() {
        assert_eq!(Ident("a\"b").to_string(), "\"a\"\"b\"");
        assert_eq!(Literal("o'clock").to_string(), "'o''clock'");
        assert_eq!(Literal("a\\' or 1").to_string(), " E'a\\\\'' or 1'");
    }
}
