//! The audit log: one JSON line for every violation and every change to tenants and shards, append-only, chained.
//!
//! ```text
//! {"seq":7,"time":"2026-11-21T20:19:49.123Z","who":"app","from":"10.0.0.7:51234","tenant":"client_001","kind":"guard",
//!  "action":"refused","what":"SET ROLE","statement":"9f86d081884c7d65","prev":"…","hash":"…"}
//! ```
//!
//! `hash` is HMAC-SHA256 over the line up to it, `prev` the hash of the line before. The key is derived from
//! `master_secret`: who does not have it cannot write a line, change one, or leave one out without [`verify`] finding
//! it. The file `<log>.head` holds number and hash of the last line, so that lines missing at the end are found too.
//!
//! Lines are written to disk (`fdatasync`) before the head is, a batch at a time. Several processes may write one log: each takes
//! the file's lock and goes on from its last line. The chain also goes on when the file was moved away (log rotation):
//! give all the files to [`verify`], oldest first.
//!
//! What cannot be found: that someone who can write to the directory put back an older copy of log *and* head, and
//! lines that never reached the disk. Ship the lines, or the head, to another machine if that matters.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hmac::{Hmac, KeyInit as _, Mac as _};
use nix::fcntl::{Flock, FlockArg};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::violation::Violation;

/// Something to be written down.
#[derive(Debug, Clone)]
pub struct Entry {
    /// When it happened.
    pub at: SystemTime,
    /// Who did it: a login, or who asked for a change.
    pub who: String,
    /// Where it came from; empty if from here.
    pub from: String,
    /// The tenant concerned; may be empty.
    pub tenant: String,
    /// What kind of thing: a violation's, or `control`.
    pub kind: String,
    /// What was done.
    pub action: String,
    /// More about it, in words.
    pub what: String,
    /// Fingerprint of the statement, if there was one.
    pub statement: Option<String>,
}

impl Entry {
    /// A change to the world.
    pub fn control(who: &str, action: &str, tenant: &str, what: impl Into<String>) -> Self {
        Self {
            at: SystemTime::now(),
            who: who.to_owned(),
            from: String::new(),
            tenant: tenant.to_owned(),
            kind: "control".to_owned(),
            action: action.to_owned(),
            what: what.into(),
            statement: None,
        }
    }
}

impl From<&Violation> for Entry {
    fn from(violation: &Violation) -> Self {
        Self {
            at: violation.at,
            who: violation.who.clone(),
            from: violation.from.clone(),
            tenant: violation.tenant.clone(),
            kind: violation.kind.as_str().to_owned(),
            action: violation.action.as_str().to_owned(),
            what: violation.what.clone(),
            statement: violation.statement.clone(),
        }
    }
}

/// A line but for its hash.
#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    time: String,
    who: &'a str,
    from: &'a str,
    tenant: &'a str,
    kind: &'a str,
    action: &'a str,
    what: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    statement: Option<&'a str>,
    prev: &'a str,
}

/// What a line says about its place in the chain.
#[derive(Deserialize)]
struct Link {
    seq: u64,
    prev: String,
}

/// Number and hash of a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    seq: u64,
    hash: String,
}

/// In front of the first line.
fn beginning() -> Head {
    Head { seq: 0, hash: "0".repeat(64) }
}

/// The key of the chain.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Key {
    /// Derives it from the master secret.
    pub fn derive(master_secret: &str) -> Self {
        Self(hmac(master_secret.as_bytes(), b"pgusher audit log 1"))
    }

    fn hash(&self, line: &str) -> String {
        hex(&hmac(&self.0, line.as_bytes()))
    }

    /// The head as it is kept: it must be ours too, or lines at the end could be left out.
    fn seal(&self, head: &Head) -> String {
        let text = format!("{} {}", head.seq, head.hash);
        format!("{text} {}\n", self.hash(&format!("head {text}")))
    }

    fn unseal(&self, text: &str) -> Option<Head> {
        let (body, seal) = text.trim_end().rsplit_once(' ')?;
        let (seq, hash) = body.split_once(' ')?;
        let genuine = self.hash(&format!("head {body}")) == seal;
        genuine.then(|| seq.parse().ok()).flatten().map(|seq| Head { seq, hash: hash.to_owned() })
    }

    /// The line's place in the chain and its hash, if it was written by somebody who has the key.
    fn read(&self, line: &str) -> Result<(Link, String), &'static str> {
        let at = line.rfind(",\"hash\":\"").ok_or("is not a line of an audit log")?;
        let (body, rest) = line.split_at(at);
        let hash = rest.strip_prefix(",\"hash\":\"").and_then(|rest| rest.strip_suffix("\"}"));
        let hash = hash.ok_or("is not a line of an audit log")?;
        if self.hash(body) != hash {
            return Err("was changed, or written without the key");
        }
        let link = serde_json::from_str(&format!("{body}}}")).map_err(|_| "is not a line of an audit log")?;
        Ok((link, hash.to_owned()))
    }
}

fn hmac(key: &[u8], data: &[u8]) -> [u8; 32] {
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return [0; 32] };
    mac.update(data);
    mac.finalize().into_bytes().into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An audit log that is written to.
pub struct Audit {
    path: PathBuf,
    key: Key,
    writing: Mutex<()>,
}

impl Audit {
    /// A log; the file is made with the first line.
    pub fn new(path: PathBuf, key: Key) -> Self {
        Self { path, key, writing: Mutex::new(()) }
    }

    /// Appends lines and has them on disk when it returns. Blocks.
    ///
    /// # Errors
    /// What the system says about the file.
    pub fn append(&self, entries: &[Entry]) -> io::Result<()> {
        let _one_at_a_time = self.writing.lock();
        let mut file = self.locked()?;
        let mut head = self.end_of(&mut file)?;
        let mut text = String::new();
        for entry in entries {
            let line = Line {
                seq: head.seq + 1,
                time: humantime::format_rfc3339_millis(entry.at).to_string(),
                who: &entry.who,
                from: &entry.from,
                tenant: &entry.tenant,
                kind: &entry.kind,
                action: &entry.action,
                what: &entry.what,
                statement: entry.statement.as_deref(),
                prev: &head.hash,
            };
            let line = serde_json::to_string(&line)?;
            let body = line.strip_suffix('}').unwrap_or(&line);
            head = Head { seq: head.seq + 1, hash: self.key.hash(body) };
            text.push_str(body);
            text.push_str(&format!(",\"hash\":\"{}\"}}\n", head.hash));
        }
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        self.put_head(&head)
    }

    /// The file, ours alone until it is dropped, and still the one of that name.
    fn locked(&self) -> io::Result<Flock<File>> {
        use std::os::unix::fs::MetadataExt as _;
        loop {
            let file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&self.path)?;
            let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| io::Error::from(error))?;
            let (ours, named) = (file.metadata()?, std::fs::metadata(&self.path));
            // Moved away by log rotation while we waited?
            if named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())) {
                return Ok(file);
            }
        }
    }

    /// Where the chain goes on. A last line that was only half written (the machine went down) is taken away; if the
    /// file ends before the head does, lines are missing, and the gap stays for [`verify`] to find.
    fn end_of(&self, file: &mut File) -> io::Result<Head> {
        let kept = std::fs::read_to_string(head_path(&self.path)).ok().and_then(|text| self.key.unseal(&text));
        let kept = kept.unwrap_or_else(beginning);
        let last = last_line(file)?;
        let found = last.as_deref().and_then(|line| self.key.read(line).ok());
        let found = found.map(|(link, hash)| Head { seq: link.seq, hash });
        match found {
            // The head is written last.
            Some(found) if found.seq >= kept.seq => Ok(found),
            Some(_) => {
                tracing::error!(file = %self.path.display(), "lines at the end of the audit log are missing");
                Ok(kept)
            }
            None => {
                if last.is_some() {
                    tracing::error!(file = %self.path.display(), "the last line of the audit log is not ours");
                }
                Ok(kept)
            }
        }
    }

    fn put_head(&self, head: &Head) -> io::Result<()> {
        let (path, new) = (head_path(&self.path), with_suffix(&self.path, ".head.new"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(self.key.seal(head).as_bytes())?;
        file.sync_data()?;
        std::fs::rename(new, path)
    }
}

/// Where the head of a log is kept.
pub fn head_path(log: &Path) -> PathBuf {
    with_suffix(log, ".head")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The last whole line. What follows it is cut off.
fn last_line(file: &mut File) -> io::Result<Option<String>> {
    const BLOCK: u64 = 64 << 10;
    let length = file.metadata()?.len();
    let (mut tail, mut from) = (Vec::new(), length);
    loop {
        let whole = tail.iter().rposition(|&b| b == b'\n');
        let before = whole.and_then(|end| tail[..end].iter().rposition(|&b| b == b'\n'));
        if from == 0 || before.is_some() {
            let keep = from + whole.map_or(0, |end| end as u64 + 1);
            if keep < length {
                file.set_len(keep)?;
            }
            let line = whole.map(|end| &tail[before.map_or(0, |at| at + 1)..end]);
            return Ok(line.map(|line| String::from_utf8_lossy(line).into_owned()));
        }
        let start = from.saturating_sub(BLOCK);
        let mut block = vec![0; usize::try_from(from - start).unwrap_or_default()];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut block)?;
        block.append(&mut tail);
        (tail, from) = (block, start);
    }
}

/// What [`verify`] has found in logs that are as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sound {
    /// Lines.
    pub lines: u64,
    /// Number of the first and the last one.
    pub numbers: Option<(u64, u64)>,
    /// Whether the end was compared with a head.
    pub head: bool,
}

/// Something is wrong with a log.
#[derive(Debug, thiserror::Error)]
pub enum Unsound {
    /// A file that cannot be read.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// What is wrong, line by line.
    #[error("the audit log is not as it was written:\n  {}", .0.join("\n  "))]
    Findings(Vec<String>),
}

/// Most findings that are told.
const MAX_FINDINGS: usize = 100;

/// Reads logs in the order in which they were written and finds every line that was changed, put in, taken out or moved.
/// The last file's head, if it is there, tells whether lines are missing at the end.
///
/// # Errors
/// [`Unsound`] names the lines.
pub fn verify(files: &[PathBuf], key: &Key) -> Result<Sound, Unsound> {
    let (mut findings, mut lines) = (Vec::new(), 0);
    let (mut previous, mut first) = (beginning(), None);
    for path in files {
        let io = |error| Unsound::Io(path.clone(), error);
        let file = File::open(path).map_err(io)?;
        for (number, line) in BufReader::new(file).split(b'\n').enumerate() {
            let line = String::from_utf8_lossy(&line.map_err(io)?).into_owned();
            lines += 1;
            let place = format!("{}:{}", path.display(), number + 1);
            match key.read(&line) {
                Err(why) => findings.push(format!("{place}: this line {why}")),
                Ok((link, hash)) => {
                    findings.extend(gap(&previous, &link).map(|what| format!("{place}: {what}")));
                    first.get_or_insert(link.seq);
                    previous = Head { seq: link.seq, hash };
                }
            }
            if findings.len() >= MAX_FINDINGS {
                findings.push("… and perhaps more".to_owned());
                return Err(Unsound::Findings(findings));
            }
        }
    }
    let head = files.last().map(|path| head_path(path)).and_then(|path| std::fs::read_to_string(path).ok());
    match head.as_deref().map(|text| key.unseal(text)) {
        Some(Some(head)) if head.seq > previous.seq => {
            let (from, to) = (previous.seq + 1, head.seq);
            findings.push(format!("the end: {} missing", numbers(from, to)));
        }
        Some(Some(head)) if head.seq == previous.seq && head.hash != previous.hash => {
            findings.push(format!("the end: number {} is not the one that was written last", head.seq));
        }
        Some(None) => findings.push("the head was changed, or written without the key".to_owned()),
        _ => {}
    }
    if findings.is_empty() {
        Ok(Sound { lines, numbers: first.map(|first| (first, previous.seq)), head: head.is_some() })
    } else {
        Err(Unsound::Findings(findings))
    }
}

fn numbers(from: u64, to: u64) -> String {
    if from == to { format!("number {from} is") } else { format!("numbers {from} to {to} are") }
}

/// What is wrong between two genuine lines.
fn gap(previous: &Head, link: &Link) -> Option<String> {
    let expected = previous.seq + 1;
    if link.seq == expected {
        let changed = link.prev != previous.hash;
        return changed.then(|| format!("number {} does not follow the line in front of it", link.seq));
    }
    Some(if link.seq > expected {
        format!("{} missing in front of number {}", numbers(expected, link.seq - 1), link.seq)
    } else {
        format!("number {} stands behind number {}: moved, or put in twice", link.seq, previous.seq)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Log {
        dir: tempfile::TempDir,
        key: Key,
    }

    impl Log {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), key: Key::derive("secret") }
        }

        fn path(&self) -> PathBuf {
            self.dir.path().join("audit.log")
        }

        /// Each call as if by another process.
        fn write(&self, count: usize) {
            let entry =
                |n| Entry::control("ann", "tenant created", &format!("client_{n}"), "with \"quotes\"\nand, lines");
            let entries: Vec<_> = (0..count).map(entry).collect();
            Audit::new(self.path(), self.key.clone()).append(&entries).unwrap();
        }

        fn lines(&self) -> Vec<String> {
            std::fs::read_to_string(self.path()).unwrap().lines().map(str::to_owned).collect()
        }

        fn put(&self, lines: &[String]) {
            std::fs::write(self.path(), lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        }

        fn verify(&self) -> Result<Sound, Unsound> {
            verify(&[self.path()], &self.key)
        }

        fn findings(&self) -> String {
            match self.verify() {
                Err(Unsound::Findings(findings)) => {
                    findings.join("\n").replace(&format!("{}:", self.path().display()), "")
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_chain_goes_on_over_restarts_and_rotation() {
        let log = Log::new();
        log.write(3);
        log.write(2);
        assert_eq!(log.verify().unwrap(), Sound { lines: 5, numbers: Some((1, 5)), head: true });
        let old = log.dir.path().join("audit.log.1");
        std::fs::rename(log.path(), &old).unwrap();
        log.write(1);
        assert_eq!(verify(&[old, log.path()], &log.key).unwrap().numbers, Some((1, 6)));
        assert_eq!(
            log.findings(),
            "1: numbers 1 to 5 are missing in front of number 6",
            "the older file was not given"
        );
    }

    #[test]
    fn many_writers_make_one_chain() {
        let log = Log::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10).for_each(|_| log.write(2)));
            }
        });
        assert_eq!(log.verify().unwrap().numbers, Some((1, 80)));
    }

    #[test]
    fn every_manipulation_is_found_and_its_place_told() {
        let log = Log::new();
        log.write(5);
        let lines = log.lines();
        let with = |change: fn(&mut Vec<String>)| {
            let mut lines = lines.clone();
            change(&mut lines);
            log.put(&lines);
            log.findings()
        };
        for (change, expected) in [
            // Edited: the text, the hash, both by somebody without the key, an added field.
            ((|l| l[1] = l[1].replace("client_1", "client_9")) as fn(&mut Vec<String>), "2: this line was changed"),
            (|l| l[1] = l[1].replace("\"seq\":2", "\"seq\": 2"), "2: this line was changed"),
            (|l| l[4] = l[4].replace("ann", "bob"), "5: this line was changed"),
            (|l| l[2] = "{}".to_owned(), "3: this line is not a line"),
            (|l| l[2].truncate(40), "3: this line is not a line"),
            (|l| l[1] = l[1].replace("}", ",\"x\":1}"), "2: this line is not a line"),
            // Removed: from the middle, the beginning, the end.
            (|l| drop(l.remove(2)), "3: number 3 is missing in front of number 4"),
            (|l| drop(l.drain(1..3)), "2: numbers 2 to 3 are missing in front of number 4"),
            (|l| drop(l.remove(0)), "1: number 1 is missing in front of number 2"),
            (|l| l.truncate(3), "the end: numbers 4 to 5 are missing"),
            (|l| l.clear(), "the end: numbers 1 to 5 are missing"),
            // Inserted, twice, in another order.
            (|l| l.insert(2, l[2].clone()), "4: number 3 stands behind number 3"),
            (|l| l.insert(1, "x".to_owned()), "2: this line is not a line"),
            (|l| l.insert(3, String::new()), "4: this line is not a line"),
            (|l| l.swap(1, 2), "2: number 2 is missing in front of number 3"),
            (|l| l.reverse(), "1: numbers 1 to 4 are missing in front of number 5"),
        ] {
            let found = with(change);
            assert!(found.contains(expected), "expected {expected:?}, found {found:?}");
        }
    }

    #[test]
    fn lines_of_another_chain_do_not_fit_in() {
        let (log, other) = (Log::new(), Log::new());
        log.write(4);
        other.write(3);
        let mut lines = log.lines();
        lines[1].clone_from(&other.lines()[1]);
        log.put(&lines);
        assert!(log.findings().contains("number 2 does not follow"), "{}", log.findings());
    }

    #[test]
    fn another_key_verifies_nothing_and_the_head_is_sealed() {
        let log = Log::new();
        log.write(2);
        assert!(verify(&[log.path()], &Key::derive("other")).is_err());
        // Lines taken from the end, and the head changed to fit.
        let lines = log.lines();
        log.put(&lines[..1]);
        let hash = log.key.read(&lines[0]).unwrap().1;
        std::fs::write(head_path(&log.path()), format!("1 {hash} {}\n", "0".repeat(64))).unwrap();
        assert!(log.findings().contains("the head was changed"), "{}", log.findings());
    }

    #[test]
    fn a_gap_at_the_end_stays_one_when_writing_goes_on() {
        let log = Log::new();
        log.write(5);
        log.put(&log.lines()[..3]);
        log.write(1);
        assert!(log.findings().contains("numbers 4 to 5 are missing in front of number 6"), "{}", log.findings());
    }

    #[test]
    fn half_a_line_is_taken_away_at_the_next_start() {
        let log = Log::new();
        log.write(3);
        let mut file = OpenOptions::new().append(true).open(log.path()).unwrap();
        file.write_all(b"{\"seq\":4,\"ti").unwrap();
        assert!(log.verify().is_err());
        log.write(1);
        assert_eq!(log.verify().unwrap().numbers, Some((1, 4)));
    }

    #[test]
    fn long_lines_are_found_from_behind() {
        let log = Log::new();
        let audit = Audit::new(log.path(), log.key.clone());
        for n in 0..3 {
            audit.append(&[Entry::control("ann", "x", "t", "y".repeat(100_000 * n))]).unwrap();
        }
        assert_eq!(log.verify().unwrap().lines, 3);
    }
}
