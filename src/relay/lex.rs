//! How PostgreSQL reads SQL text: where literals, comments and names end, and what they say. No I/O.
//!
//! Follows `scan.l`. What depends on the session is in [`Lex`]; the server reports both settings that matter.

use std::borrow::Cow;
use std::ops::Range;

/// The server cuts names off after so many bytes (`NAMEDATALEN - 1`).
pub const MAX_NAME: usize = 63;

/// What the reading of a text depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lex {
    /// `standard_conforming_strings` is off: a backslash escapes in every literal.
    pub backslashes: bool,
    /// The client's encoding, if it has characters that contain bytes which mean something else alone.
    pub wide: Wide,
}

/// Encodings in which the second byte of a character can look like ASCII.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wide {
    /// None of them: every byte below 128 is what it looks like.
    #[default]
    No,
    /// SJIS, SHIFT_JIS_2004
    Sjis,
    /// BIG5, GBK, UHC
    Double,
    /// JOHAB
    Johab,
    /// GB18030
    Gb18030,
}

impl Lex {
    /// From the values of `standard_conforming_strings` and `client_encoding` that the server reported last.
    pub fn new(standard_conforming_strings: Option<&str>, client_encoding: Option<&str>) -> Self {
        let wide = match client_encoding.unwrap_or_default() {
            "SJIS" | "SHIFT_JIS_2004" => Wide::Sjis,
            "BIG5" | "GBK" | "UHC" => Wide::Double,
            "JOHAB" => Wide::Johab,
            "GB18030" => Wide::Gb18030,
            _ => Wide::No,
        };
        Self { backslashes: standard_conforming_strings == Some("off"), wide }
    }

    /// Whether a text means the same in every session, so that nobody has to ask.
    #[inline]
    pub fn is_irrelevant_to(sql: &[u8]) -> bool {
        !sql.iter().fold(false, |found, &b| found | (b >= 0x80) | (b == b'\\'))
    }

    /// The text with every byte of a wide character replaced by one that is part of a name and nothing else.
    pub fn narrow<'a>(self, sql: &'a [u8]) -> Cow<'a, [u8]> {
        if self.wide == Wide::No || sql.is_ascii() {
            return Cow::Borrowed(sql);
        }
        let mut narrow = sql.to_vec();
        let mut at = 0;
        while at < narrow.len() {
            let end = (at + self.wide.length(narrow[at], narrow.get(at + 1).copied())).min(narrow.len());
            if end - at > 1 {
                narrow[at..end].fill(0xff);
            }
            at = end;
        }
        Cow::Owned(narrow)
    }
}

impl Wide {
    /// Bytes of the character that begins so; as the server's `pg_*_mblen`.
    fn length(self, byte: u8, next: Option<u8>) -> usize {
        match (self, byte) {
            (Self::No, _) | (_, ..=0x7f) => 1,
            (Self::Sjis, 0xa1..=0xdf) => 1,
            (Self::Johab, 0x8f) => 3,
            (Self::Gb18030, _) if next.is_some_and(|b| b.is_ascii_digit()) => 4,
            _ => 2,
        }
    }
}

/// White space between tokens.
#[inline]
pub fn is_space(byte: u8) -> bool {
    byte.is_ascii_whitespace() || byte == 0x0b
}

/// Whether the byte can begin a name without quotes.
#[inline]
pub fn begins_name(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

/// Whether the byte can be part of a name without quotes.
#[inline]
pub fn continues_name(byte: u8) -> bool {
    // One load: most bytes of every statement come by here.
    CONTINUES_NAME[usize::from(byte)]
}

const CONTINUES_NAME: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        let b = byte as u8;
        table[byte] = b.is_ascii_alphanumeric() || b == b'_' || b == b'$' || b >= 0x80;
        byte += 1;
    }
    table
};

/// Where the comment that begins with `/*` at `at` ends. They nest.
pub fn comment_end(sql: &[u8], at: usize) -> usize {
    let (mut at, mut depth) = (at + 2, 1);
    while depth > 0 && at < sql.len() {
        match (sql[at], sql.get(at + 1)) {
            (b'*', Some(b'/')) => (depth, at) = (depth - 1, at + 2),
            (b'/', Some(b'*')) => (depth, at) = (depth + 1, at + 2),
            _ => at += 1,
        }
    }
    at.min(sql.len())
}

/// Where white space and comments end.
pub fn skip_space(sql: &[u8], mut at: usize) -> usize {
    loop {
        match (sql.get(at), sql.get(at + 1)) {
            (Some(&b), _) if is_space(b) => at += 1,
            (Some(b'-'), Some(b'-')) => at += line(&sql[at..]),
            (Some(b'/'), Some(b'*')) => at = comment_end(sql, at),
            _ => return at,
        }
    }
}

/// Bytes up to the end of the line.
pub(super) fn line(rest: &[u8]) -> usize {
    rest.iter().position(|&b| b == b'\n' || b == b'\r').unwrap_or(rest.len())
}

/// Where the literal whose opening quote is at `at` ends, with what continues it on the next line.
#[inline]
pub fn string_end(sql: &[u8], at: usize, backslashes: bool) -> usize {
    let mut at = at + 1;
    loop {
        match sql.get(at) {
            None => return sql.len(),
            Some(b'\\') if backslashes => at = (at + 2).min(sql.len()),
            Some(b'\'') if sql.get(at + 1) == Some(&b'\'') => at += 2,
            Some(b'\'') => match continuation(sql, at + 1) {
                Some(quote) => at = quote + 1,
                None => return at + 1,
            },
            Some(_) => at += 1,
        }
    }
}

/// A literal goes on if white space with a line break in it, and another quote, follow.
fn continuation(sql: &[u8], from: usize) -> Option<usize> {
    let (mut at, mut broken) = (from, false);
    loop {
        match (sql.get(at)?, sql.get(at + 1)) {
            (b'\n' | b'\r', _) => (at, broken) = (at + 1, true),
            (&b, _) if is_space(b) => at += 1,
            (b'-', Some(b'-')) => at += line(&sql[at..]),
            (b'\'', _) if broken => return Some(at),
            _ => return None,
        }
    }
}

/// If a dollar-quoted literal begins at `at`: where its body begins, and where what follows it does.
pub fn dollar_end(sql: &[u8], at: usize) -> Option<(usize, usize)> {
    let rest = &sql[at + 1..];
    let length = rest.iter().position(|&b| b == b'$' || !continues_name(b))?;
    if rest.get(length) != Some(&b'$') || rest.first().is_some_and(u8::is_ascii_digit) {
        return None;
    }
    let body = at + length + 2;
    let delimiter = &sql[at..body];
    let mut from = body;
    while let Some(found) = sql[from..].iter().position(|&b| b == b'$') {
        if sql[from + found..].starts_with(delimiter) {
            return Some((body, from + found + delimiter.len()));
        }
        from += found + 1;
    }
    Some((body, sql.len()))
}

/// A token of SQL text, as far as the guard needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// A keyword or a name without quotes, in lower case.
    Word(String),
    /// A name in double quotes.
    Quoted(String),
    /// A literal, of any spelling.
    Text(String),
    /// A number.
    Number,
    /// `$1`; 0 if the number is too large.
    Parameter(u16),
    /// Anything else, byte by byte.
    Sign(u8),
}

impl Token {
    /// The name, quoted or not.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Word(name) | Self::Quoted(name) => Some(name),
            _ => None,
        }
    }

    /// Whether it is this keyword.
    pub fn is(&self, word: &str) -> bool {
        matches!(self, Self::Word(found) if found == word)
    }
}

/// Takes a text apart.
pub fn tokens(sql: &[u8], lex: Lex) -> Vec<Token> {
    spans(&lex.narrow(sql), lex).into_iter().map(|(token, _)| token).collect()
}

/// The same, with where each token stands; the text is narrow already.
pub fn spans(sql: &[u8], lex: Lex) -> Vec<(Token, Range<usize>)> {
    let (mut tokens, mut at) = (Vec::new(), 0);
    loop {
        at = skip_space(sql, at);
        let Some(&byte) = sql.get(at) else { return tokens };
        let (token, end) = token(sql, at, byte, lex);
        tokens.push((token, at..end));
        at = end;
    }
}

fn token(sql: &[u8], at: usize, byte: u8, lex: Lex) -> (Token, usize) {
    match byte {
        b'\'' => literal(sql, at, lex.backslashes),
        b'"' => {
            let end = quoted_end(sql, at);
            (Token::Quoted(cut(&unquote(&sql[at..end], b'"'))), end)
        }
        b'$' => match dollar_end(sql, at) {
            Some((body, end)) => {
                let tail = if sql[..end].ends_with(&sql[at..body]) && end >= 2 * body - at { body - at } else { 0 };
                (Token::Text(text(&sql[body..end - tail])), end)
            }
            None => {
                let end = at + 1 + run(&sql[at + 1..], |b| b.is_ascii_digit());
                (Token::Parameter(text(&sql[at + 1..end]).parse().unwrap_or_default()), end)
            }
        },
        b'0'..=b'9' => (Token::Number, at + run(&sql[at..], |b| b.is_ascii_digit() || b == b'.')),
        _ if begins_name(byte) => word(sql, at),
        _ => (Token::Sign(byte), at + 1),
    }
}

fn word(sql: &[u8], at: usize) -> (Token, usize) {
    let end = at + run(&sql[at..], continues_name);
    match (&sql[at..end], sql.get(end), sql.get(end + 1)) {
        (b"e" | b"E", Some(b'\''), _) => literal(sql, end, true),
        // Prefixes that change nothing: N'…', and B'…' and X'…', whose bits nobody reads.
        (b"n" | b"N" | b"b" | b"B" | b"x" | b"X", Some(b'\''), _) => literal(sql, end, false),
        (b"u" | b"U", Some(b'&'), Some(b'\'')) => {
            let close = string_end(sql, end + 1, false);
            let (escape, next) = uescape(sql, close);
            (Token::Text(unicode(&text(&unquote(&sql[end + 1..close], b'\'')), escape)), next)
        }
        (b"u" | b"U", Some(b'&'), Some(b'"')) => {
            let close = quoted_end(sql, end + 1);
            let (escape, next) = uescape(sql, close);
            (Token::Quoted(cut(unicode(&text(&unquote(&sql[end + 1..close], b'"')), escape).as_bytes())), next)
        }
        (word, ..) => (Token::Word(cut(&word.to_ascii_lowercase())), end),
    }
}

fn run(bytes: &[u8], keep: impl Fn(u8) -> bool) -> usize {
    bytes.iter().position(|&b| !keep(b)).unwrap_or(bytes.len())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn cut(name: &[u8]) -> String {
    text(&name[..name.len().min(MAX_NAME)])
}

fn quoted_end(sql: &[u8], at: usize) -> usize {
    let mut at = at + 1;
    loop {
        match (sql.get(at), sql.get(at + 1)) {
            (None, _) => return sql.len(),
            (Some(b'"'), Some(b'"')) => at += 2,
            (Some(b'"'), _) => return at + 1,
            _ => at += 1,
        }
    }
}

/// Without the quotes around it, and with doubled ones made one.
fn unquote(quoted: &[u8], quote: u8) -> Vec<u8> {
    let inner = quoted.get(1..).unwrap_or_default();
    let inner = inner.strip_suffix(&[quote]).unwrap_or(inner);
    let (mut out, mut at) = (Vec::with_capacity(inner.len()), 0);
    while let Some(&byte) = inner.get(at) {
        at += if byte == quote && inner.get(at + 1) == Some(&quote) { 2 } else { 1 };
        out.push(byte);
    }
    out
}

fn literal(sql: &[u8], at: usize, backslashes: bool) -> (Token, usize) {
    let end = string_end(sql, at, backslashes);
    let mut out = Vec::with_capacity(end - at);
    let mut from = at + 1;
    while from < end {
        match (sql[from], sql.get(from + 1)) {
            (b'\\', Some(&next)) if backslashes => from = escape(sql, from + 1, next, &mut out),
            (b'\'', Some(b'\'')) if from + 1 < end => {
                out.push(b'\'');
                from += 2;
            }
            (b'\'', _) => match continuation(sql, from + 1) {
                Some(quote) if quote < end => from = quote + 1,
                _ => break,
            },
            (byte, _) => {
                out.push(byte);
                from += 1;
            }
        }
    }
    (Token::Text(text(&out)), end)
}

/// What follows a backslash; returns where it ends.
fn escape(sql: &[u8], at: usize, byte: u8, out: &mut Vec<u8>) -> usize {
    let digits = |from: usize, most: usize, radix: u32| {
        let digits = sql.get(from..).unwrap_or_default();
        let count = run(&digits[..digits.len().min(most)], |b| char::from(b).is_digit(radix));
        let value = std::str::from_utf8(&digits[..count]).ok().and_then(|d| u32::from_str_radix(d, radix).ok());
        (value, from + count)
    };
    let (value, end) = match byte {
        b'0'..=b'7' => digits(at, 3, 8),
        b'x' => digits(at + 1, 2, 16),
        b'u' => digits(at + 1, 4, 16),
        b'U' => digits(at + 1, 8, 16),
        _ => (None, at),
    };
    match (byte, value) {
        (b'u' | b'U', Some(value)) => {
            let mut buffer = [0; 4];
            out.extend_from_slice(char::from_u32(value).unwrap_or('\u{fffd}').encode_utf8(&mut buffer).as_bytes());
            end
        }
        (_, Some(value)) => {
            out.push(u8::try_from(value & 0xff).unwrap_or_default());
            end
        }
        (byte, None) => {
            out.push(match byte {
                b'n' => b'\n',
                b't' => b'\t',
                b'r' => b'\r',
                b'b' => 8,
                b'f' => 12,
                other => other,
            });
            at + 1
        }
    }
}

/// `UESCAPE 'c'` behind a `U&` token, if it is there.
fn uescape(sql: &[u8], at: usize) -> (char, usize) {
    let start = skip_space(sql, at);
    let end = start + run(&sql[start..], continues_name);
    if sql[start..end].eq_ignore_ascii_case(b"uescape") {
        let quote = skip_space(sql, end);
        if let (Some(b'\''), Some(&escape), Some(b'\'')) = (sql.get(quote), sql.get(quote + 1), sql.get(quote + 2)) {
            return (char::from(escape), quote + 3);
        }
    }
    ('\\', at)
}

fn unicode(text: &str, escape: char) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(escape) {
        out.push_str(before);
        if let Some(literal) = after.strip_prefix(escape) {
            out.push(escape);
            rest = literal;
            continue;
        }
        let (from, most) = if after.starts_with('+') { (1, 7) } else { (0, 4) };
        match after.get(from..most).and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32) {
            Some(character) => {
                out.push(character);
                rest = &after[most..];
            }
            None => {
                out.push(escape);
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(sql: &[u8], lex: Lex) -> Vec<String> {
        let show = |token: Token| match token {
            Token::Word(word) => word,
            Token::Quoted(name) => format!("<{name}>"),
            Token::Text(text) => format!("[{text}]"),
            Token::Number => "1".to_owned(),
            Token::Parameter(_) => "$".to_owned(),
            Token::Sign(sign) => char::from(sign).to_string(),
        };
        tokens(sql, lex).into_iter().map(show).collect()
    }

    #[test]
    fn tokens_are_the_servers() {
        for (sql, expected) in [
            ("SELECT 'a''b', E'\\'x\\x41\\101\\u0042', $1", "select [a'b] , ['xAAB] , $"),
            ("U&\"r\\006Fle\" U&'d!0061t!+000061' uescape '!' \"a\"\"b\"", "<role> [data] <a\"b>"),
            ("SET/**/search_path/* a /* nested */ b */=--x\rclient_002", "set search_path = client_002"),
            ("/* ' */ SELECT '/*' ; SET x -- */ '", "select [/*] ; set x"),
            ("$$ a $b$ c $$ $b$ $$ $b$ $1$ a$b$c", "[ a $b$ c ] [ $$ ] $ $ a$b$c"),
            ("E'a'\n  'b\\'c' 'd' 'e'", "[ab'c] [d] [e]"),
            ("$x$ open", "[ open]"),
            ("'open", "[open]"),
            ("U&\"", "<>"),
            ("1from t", "1 from t"),
            ("N'x'", "[x]"),
        ] {
            assert_eq!(texts(sql.as_bytes(), Lex::default()).join(" "), expected, "{sql}");
        }
    }

    #[test]
    fn a_backslash_is_what_the_session_says() {
        let off = Lex::new(Some("off"), Some("UTF8"));
        assert_eq!(texts(b"'a\\' z'", Lex::default()), ["[a\\]", "z", "[]"]);
        assert_eq!(texts(b"'a\\' z'", off), ["[a' z]"]);
        // In SJIS 0x95 0x5C is one character; 0xB1 is one by itself.
        let sjis = Lex::new(Some("off"), Some("SJIS"));
        assert_eq!(texts(b"'\x95\x5c' b", sjis).len(), 2);
        assert_eq!(texts(b"'\xb1\\' b'", sjis).len(), 1);
        assert_eq!(Lex::new(Some("on"), Some("GB18030")).narrow(b"\x81\x30\x81\x27'").as_ref(), b"\xff\xff\xff\xff'");
    }

    #[test]
    fn names_are_cut_off_like_the_servers() {
        let long = "x".repeat(70);
        assert_eq!(tokens(long.as_bytes(), Lex::default()), [Token::Word("x".repeat(63))]);
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_confuse_it(sql in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), off: bool) {
            for encoding in ["UTF8", "SJIS", "BIG5", "JOHAB", "GB18030"] {
                let lex = Lex::new(Some(if off { "off" } else { "on" }), Some(encoding));
                tokens(&sql, lex);
                super::super::scan::look(&lex.narrow(&sql), lex, |_| true);
            }
        }

        #[test]
        fn no_sql_confuses_it(sql in "[Ee]?(U&)?['\"$a\\\\\n */;.-]{0,60}", off: bool) {
            let lex = Lex { backslashes: off, wide: Wide::No };
            tokens(sql.as_bytes(), lex);
            super::super::scan::look(sql.as_bytes(), lex, |_| true);
        }
    }
}
