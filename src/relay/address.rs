//! Process ids in what a client says. Clients know each other by the ids that they were told at their login; the server
//! knows its own processes. Where a text ends one, cancels what it does, or asks who waits for whom, the first are replaced
//! by the second. No I/O.

/// What becomes of a text, or of values, in which process ids stand.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Addressed {
    /// They are as the server knows them.
    AsItIs,
    /// It reads so.
    Said(Vec<u8>),
    /// One of them stands for no process of the server's yet.
    Later,
}

/// Whether a text may call a function that takes process ids.
pub(super) fn takes_processes(sql: &[u8]) -> bool {
    signals(sql) || ["pg_blocking_pids", "session_is_blocked"].iter().any(|name| contains(sql, name.as_bytes()))
}

/// Whether a text may end processes, or stop what they do.
pub(super) fn signals(sql: &[u8]) -> bool {
    ["pg_terminate_backend", "pg_cancel_backend"].iter().any(|name| contains(sql, name.as_bytes()))
}

fn contains(sql: &[u8], word: &[u8]) -> bool {
    sql.windows(word.len()).any(|found| found.eq_ignore_ascii_case(word))
}

/// A text with other numbers in the place of those for which there are any; it may be the text of an array.
pub(super) fn in_text(text: &[u8], process: impl Fn(u32) -> Option<u32>) -> Option<Vec<u8>> {
    let (mut said, mut copied, mut at) = (Vec::new(), 0, 0);
    while let Some(&byte) = text.get(at) {
        if !byte.is_ascii_digit() {
            at += 1;
            continue;
        }
        let length = text[at..].iter().take_while(|b| b.is_ascii_digit()).count();
        // What belongs to a name, a parameter or a fraction is no number of its own.
        let before = at.checked_sub(1).map(|at| text[at]);
        let alone = !before.is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$' | b'.' | 0x80..));
        let number = std::str::from_utf8(&text[at..at + length]).ok().and_then(|number| number.parse().ok());
        if let Some(other) = number.filter(|_| alone).and_then(&process) {
            said.extend_from_slice(&text[copied..at]);
            said.extend_from_slice(other.to_string().as_bytes());
            copied = at + length;
        }
        at += length;
    }
    (copied > 0).then(|| {
        said.extend_from_slice(&text[copied..]);
        said
    })
}

/// The same for what follows the names in a Bind message: formats, values, formats of the result.
pub(super) fn in_values(bind: &[u8], process: impl Fn(u32) -> Option<u32>) -> Option<Vec<u8>> {
    let number = |at: usize| Some(u16::from_be_bytes(bind.get(at..at + 2)?.try_into().ok()?));
    let formats = usize::from(number(0)?);
    let format = |parameter: usize| match formats {
        0 => Some(0),
        1 => number(2),
        _ => number(2 + 2 * parameter),
    };
    let mut at = 2 + 2 * formats;
    let parameters = usize::from(number(at)?);
    at += 2;
    let (mut said, mut changed) = (bind[..at].to_vec(), false);
    for parameter in 0..parameters {
        let length = i32::from_be_bytes(bind.get(at..at + 4)?.try_into().ok()?);
        let value = bind.get(at + 4..at + 4 + usize::try_from(length).unwrap_or(0))?;
        let other = match format(parameter)? {
            0 => in_text(value, &process),
            _ => in_binary(value, &process).or_else(|| in_array(value, &process)),
        };
        match &other {
            Some(other) => {
                // Digits of a process id in the place of others: as long as it was, nearly.
                said.extend_from_slice(&i32::try_from(other.len()).ok()?.to_be_bytes());
                said.extend_from_slice(other);
            }
            None => said.extend_from_slice(&bind[at..at + 4 + value.len()]),
        }
        changed |= other.is_some();
        at += 4 + value.len();
    }
    said.extend_from_slice(bind.get(at..)?);
    changed.then_some(said)
}

/// An int4 or int8.
fn in_binary(value: &[u8], process: impl Fn(u32) -> Option<u32>) -> Option<Vec<u8>> {
    let (front, last) = value.split_last_chunk::<4>()?;
    let other = front.iter().all(|&b| b == 0).then(|| process(u32::from_be_bytes(*last))).flatten()?;
    matches!(front.len(), 0 | 4).then(|| [front, &other.to_be_bytes()].concat())
}

/// An array of int4 or int8: number of dimensions, flags, type of the elements, length and lower bound of each dimension, and
/// the elements, each with its length (`array_send` in PostgreSQL).
fn in_array(value: &[u8], process: impl Fn(u32) -> Option<u32>) -> Option<Vec<u8>> {
    const INT8: i32 = 20;
    const INT4: i32 = 23;
    let number = |at: usize| Some(i32::from_be_bytes(value.get(at..at + 4)?.try_into().ok()?));
    let dimensions = usize::try_from(number(0)?).ok().filter(|n| (1..=6).contains(n))?;
    if !matches!(number(8)?, INT4 | INT8) {
        return None;
    }
    let mut at = 12 + 8 * dimensions;
    let (mut said, mut changed) = (value.get(..at)?.to_vec(), false);
    while at < value.len() {
        let length = usize::try_from(number(at)?).unwrap_or(0);
        let element = value.get(at + 4..at + 4 + length)?;
        said.extend_from_slice(&value[at..at + 4]);
        let other = in_binary(element, &process);
        changed |= other.is_some();
        said.extend_from_slice(other.as_deref().unwrap_or(element));
        at += 4 + length;
    }
    changed.then_some(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(pid: u32) -> Option<u32> {
        (pid == 1_234_567).then_some(42)
    }

    fn text(text: &str) -> Option<String> {
        in_text(text.as_bytes(), known).map(|said| String::from_utf8(said).unwrap())
    }

    #[test]
    fn numbers_that_stand_alone_are_replaced() {
        let said = |now: &str| Some(now.to_owned());
        assert_eq!(text("SELECT pg_terminate_backend(1234567)"), said("SELECT pg_terminate_backend(42)"));
        assert_eq!(text("f(1234567, '{1,1234567,3}') -- x"), said("f(42, '{1,42,3}') -- x"));
        assert_eq!(text("1234567"), said("42"));
        for same in
            ["", "f(1)", "f(12345678)", "f($1234567, a1234567, 0.1234567, t_1234567, é1234567)", "99999999999999"]
        {
            assert_eq!(text(same), None, "{same}");
        }
    }

    #[test]
    fn arrays_of_values_are_replaced() {
        let array = |kind: i32, pid: u32| {
            let header = [1, 1, kind, 3, 1].map(i32::to_be_bytes).concat();
            let size = if kind == 20 { 8_i32 } else { 4 };
            let element =
                |pid: u32| [&size.to_be_bytes()[..], &vec![0; size as usize - 4], &pid.to_be_bytes()].concat();
            [header, element(7), (-1_i32).to_be_bytes().to_vec(), element(pid)].concat()
        };
        for kind in [20, 23] {
            let whole = array(kind, 1_234_567);
            assert_eq!(in_array(&whole, known), Some(array(kind, 42)));
            for end in 0..whole.len() {
                assert_eq!(in_array(&whole[..end], known), None);
            }
        }
        // Other numbers, and what is no array of these.
        assert_eq!(in_array(&array(23, 7), known), None);
        assert_eq!(in_array(&array(25, 1_234_567), known), None);
        assert_eq!(in_array(&[255; 64], known), None);
    }

    #[test]
    fn values_are_replaced_in_either_format() {
        let pid = 1_234_567_u32.to_be_bytes();
        let bind = |formats: &[u8], value: &[u8]| {
            let length = u32::try_from(value.len()).unwrap().to_be_bytes();
            [formats, &[0, 2, 255, 255, 255, 255], &length, value, &[0, 1, 0, 1]].concat()
        };
        let other = 42_u32.to_be_bytes();
        for formats in [&[0, 1, 0, 1][..], &[0, 2, 0, 0, 0, 1]] {
            assert_eq!(in_values(&bind(formats, &pid), known), Some(bind(formats, &other)));
            let wide = bind(formats, &[[0; 4], pid].concat());
            assert_eq!(in_values(&wide, known), Some(bind(formats, &[[0; 4], other].concat())));
            assert_eq!(in_values(&bind(formats, b"1234567"), known), None);
        }
        for formats in [&[0, 0][..], &[0, 1, 0, 0]] {
            assert_eq!(in_values(&bind(formats, b"1234567"), known), Some(bind(formats, b"42")));
            assert_eq!(in_values(&bind(formats, &pid), known), None);
        }
        // Whatever is cut off, or says something else, stays as it is.
        let whole = bind(&[0, 1, 0, 1], &pid);
        for end in 0..whole.len() - 4 {
            assert_eq!(in_values(&whole[..end], known), None);
        }
        assert_eq!(in_values(&[0, 1, 0, 1, 0, 1, 0, 0, 0, 4, 0, 0, 0, 7, 0, 0], known), None);
    }
}
