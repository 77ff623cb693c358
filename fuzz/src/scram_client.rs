//! What a server says while we prove to it who we are.
//!
//! Input: a byte of choices (channel binding, cached keys), the length of the first message, the server's first message,
//! its last one.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pgusher::pool::connect::server_error;
use pgusher::pool::scram::{MAX_ITERATIONS, Scram, ScramError};
use pgusher::tenant::credential::hmac;
use pgusher::wire::message::{self, Authentication};

use super::Input;

const PASSWORD: &str = "right";

/// See the module.
pub fn run(data: &[u8]) {
    parsers(data);
    let mut input = Input(data);
    let (choices, length) = (input.byte(), usize::from(input.byte()));
    let (first, last) = (input.take(length), input.0);
    let end_point = (choices & 1 != 0).then_some(&b"hash"[..]);
    let both = ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"];
    let offered = if choices & 2 != 0 { &both[..] } else { &both[1..] };
    let scram = || Scram::new(offered, PASSWORD, None, end_point, "abc".to_owned()).expect("it is offered");
    let iterations = iterations(first);
    // Slow, and no finding.
    if iterations.is_some_and(|n| (2_000..=u64::from(MAX_ITERATIONS)).contains(&n)) {
        return;
    }
    let (mechanism, hello) = scram().initial();
    assert_eq!(mechanism == "SCRAM-SHA-256-PLUS", end_point.is_some() && choices & 2 != 0);
    match scram().respond(first) {
        Ok((said, proof)) => {
            let challenge = String::from_utf8(first.to_vec()).expect("it was understood");
            let nonce = challenge.split(',').next().and_then(|part| part.strip_prefix("r=")).expect("a nonce");
            assert!(nonce.len() > 3 && nonce.starts_with("abc"), "somebody else's nonce: {nonce}");
            let said = String::from_utf8(said).expect("our own text");
            let (without, _) = said.rsplit_once(",p=").expect("our proof");
            assert_eq!(without.rsplit_once(",r=").map(|(_, ours)| ours), Some(nonce));
            let expected = signature(&hello, &challenge, without);
            let trusted = proof.verify(last);
            let shown = last.strip_prefix(b"v=").map(|rest| rest.split(|&b| b == b',').next().unwrap_or_default());
            assert_eq!(trusted.is_ok(), shown == Some(expected.as_bytes()), "an impostor, or an honest server");
            if let Ok(keys) = trusted {
                cached(keys, offered, end_point, first, &said);
            }
        }
        Err(ScramError::Iterations(n)) => assert!(n > MAX_ITERATIONS),
        Err(_) => {}
    }
}

/// The same proof comes out of the keys alone.
fn cached(
    keys: pgusher::pool::scram::CachedKeys,
    offered: &[&str],
    end_point: Option<&[u8]>,
    first: &[u8],
    said: &str,
) {
    let scram = Scram::new(offered, "forgotten", Some(keys), end_point, "abc".to_owned()).expect("it is offered");
    let Ok((again, _)) = scram.respond(first) else { panic!("keys that fit are refused") };
    assert_eq!(again, said.as_bytes());
}

fn iterations(first: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(first).ok()?;
    text.split(',').nth(2)?.strip_prefix("i=")?.parse().ok()
}

/// The signature that only somebody can make who knows the verifier, by RFC 5802.
fn signature(hello: &[u8], challenge: &str, without: &str) -> String {
    let hello = String::from_utf8_lossy(hello);
    let bare = hello.splitn(3, ',').nth(2).expect("a header and the rest");
    let mut parts = challenge.split(',').skip(1);
    let salt = parts.next().and_then(|p| STANDARD.decode(p.strip_prefix("s=")?).ok()).expect("salt");
    let rounds: u32 = parts.next().and_then(|p| p.strip_prefix("i=")?.parse().ok()).expect("iterations");
    let mut block = hmac(PASSWORD.as_bytes(), &[&salt, &1_u32.to_be_bytes()]);
    let mut salted = block;
    for _ in 1..rounds {
        block = hmac(PASSWORD.as_bytes(), &[&block]);
        salted.iter_mut().zip(block).for_each(|(s, b)| *s ^= b);
    }
    let server_key = hmac(&salted, &[b"Server Key"]);
    STANDARD.encode(hmac(&server_key, &[format!("{bare},{challenge},{without}").as_bytes()]))
}

/// Everything else that is read of a server during its login.
fn parsers(data: &[u8]) {
    let _ = Authentication::read(data);
    let _ = message::read_parameter_status(data);
    if let Ok((_, key)) = message::read_backend_key_data(data) {
        assert!(key.len() <= 256, "a key that no cancel request can hold");
    }
    // An error is passed on as one whole message that says the same.
    let error = server_error(data);
    let mut out = bytes::BytesMut::new();
    message::error_response(&mut out, &error);
    let Ok(Some(header)) = pgusher::wire::frame::header(&out) else { panic!("no message") };
    assert_eq!(header.total, out.len());
    assert_eq!(server_error(&out[5..]).message, error.message);
}
