//! What a client says while it proves who it is.
//!
//! Input: a byte of choices (login exists, channel binding, mechanism), the length of the first message, the first
//! message, the last one.

use std::sync::OnceLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pgusher::client::auth::{Exchange, MockSecret, Step};
use pgusher::pool::scram::Scram;
use pgusher::tenant::credential::{Verifier, hmac};
use pgusher::wire::message::SaslInitialResponse;
use sha2::{Digest as _, Sha256};

use super::Input;

const PASSWORD: &str = "right";
const SALT: &[u8] = b"0123456789abcdef";
const END_POINT: &[u8] = b"hash of the certificate";

fn verifier() -> &'static Verifier {
    static VERIFIER: OnceLock<Verifier> = OnceLock::new();
    VERIFIER.get_or_init(|| Verifier::make(PASSWORD, SALT, 1))
}

fn exchange(exists: bool, bound: bool) -> Exchange {
    let mock = MockSecret::new(b"master");
    let end_point = bound.then_some(END_POINT);
    Exchange::new("app", exists.then(verifier), &mock, end_point, "SERVERNONCE".to_owned())
}

/// See the module.
pub fn run(data: &[u8]) {
    let _ = SaslInitialResponse::read(data);
    let mut input = Input(data);
    let (choices, length) = (input.byte(), usize::from(input.byte()));
    let (exists, bound, plus) = (choices & 1 != 0, choices & 2 != 0, choices & 4 != 0);
    let (first, last) = (input.take(length), input.0);
    let mechanism = if plus { "SCRAM-SHA-256-PLUS" } else { "SCRAM-SHA-256" };
    let mut server = exchange(exists, bound);
    let response = SaslInitialResponse { mechanism, data: (choices & 8 == 0).then_some(first) };
    let mut said = server.initial(&response);
    if choices & 8 != 0 && matches!(&said, Step::Continue(asked) if asked.is_empty()) {
        said = server.respond(first);
    }
    let Step::Continue(challenge) = said else {
        assert!(matches!(said, Step::Fail(_)), "done after one message");
        // It is over, whatever comes.
        assert!(matches!(server.respond(last), Step::Fail(_)));
        return;
    };
    if let Step::Done(_) = server.respond(last) {
        assert!(exists, "somebody who does not exist got in");
        proven(first, &challenge, last);
    }
    assert!(matches!(server.respond(last), Step::Fail(_)), "it goes on after its end");
    on_the_way(choices, data);
}

/// Computes the proof by itself, and compares.
fn proven(first: &[u8], challenge: &[u8], last: &[u8]) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("it was understood");
    let (first, challenge, last) = (text(first), text(challenge), text(last));
    let bare = first.splitn(3, ',').nth(2).expect("a header and the rest");
    let (without, proof) = last.rsplit_once(",p=").expect("a proof");
    let said = format!("{bare},{challenge},{without}");
    let salted = hmac(PASSWORD.as_bytes(), &[SALT, &1_u32.to_be_bytes()]);
    let client_key = hmac(&salted, &[b"Client Key"]);
    let stored: [u8; 32] = Sha256::digest(client_key).into();
    let signature = hmac(&stored, &[said.as_bytes()]);
    let expected: Vec<u8> = client_key.iter().zip(signature).map(|(k, s)| k ^ s).collect();
    assert_eq!(STANDARD.encode(expected), proof, "a proof that proves nothing");
}

/// Our client logs in to our server, and somebody changes one byte on the way: nobody gets in.
fn on_the_way(choices: u8, data: &[u8]) {
    let (exists, bound) = (choices & 1 != 0, choices & 2 != 0);
    let (which, at, change) = match data {
        [.., which, at, change] => (which % 4, usize::from(*at), *change),
        _ => return,
    };
    let spoil = |message: u8, mut bytes: Vec<u8>| {
        if let (true, false) = (which == message, bytes.is_empty()) {
            let at = at % bytes.len();
            bytes[at] ^= change;
        }
        bytes
    };
    let end_point = bound.then_some(END_POINT);
    let offered = ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"];
    let offered = if bound { &offered[..] } else { &offered[1..] };
    let Ok(client) = Scram::new(offered, PASSWORD, None, end_point, "abc".to_owned()) else { panic!("it is offered") };
    let mut server = exchange(exists, bound);
    let (mechanism, first) = client.initial();
    let first = spoil(0, first);
    let Step::Continue(challenge) = server.initial(&SaslInitialResponse { mechanism, data: Some(&first) }) else {
        return;
    };
    let challenge = spoil(1, challenge);
    // PBKDF2 a million times over is slow, and no finding.
    if !challenge.ends_with(b"i=1") && !challenge.ends_with(b"i=4096") {
        return;
    }
    let Ok((last, proof)) = client.respond(&challenge) else { return };
    let Step::Done(end) = server.respond(&spoil(2, last)) else {
        assert!(change != 0 || !exists, "an honest client is refused");
        return;
    };
    let honest = change == 0 || which == 3;
    assert!(honest && exists, "message {which} was changed at {at} and nobody noticed");
    let verified = proof.verify(&spoil(3, end)).is_ok();
    assert_eq!(verified, change == 0, "the server's proof, changed at {at} by {change}");
}
