//! From a client's first byte to its tenant and the startup packet that a server would get for it.
//!
//! Input: a byte of choices (TLS, sources of the tenant), the size of the pieces, then what the client sends.

use bytes::BytesMut;
use pgusher::client::handshake::{Handshake, Step, TlsPolicy};
use pgusher::client::parameters::ClientParameters;
use pgusher::tenant::TenantId;
use pgusher::tenant::identify::{Hello, Known, Login, Rules, Source, identify};
use pgusher::tenant::plan::Replication;
use pgusher::wire::startup::{self, Startup, StartupMessage};
use pgusher::wire::{CANCEL_KEY_LEN, MAX_STARTUP_BYTES, Version, message};

use super::Input;

/// Application user `app` has two tenants, everything else nothing.
struct World;

impl Known for World {
    fn is_app_user(&self, name: &str) -> bool {
        name == "app" || name == "odd.name"
    }

    fn may_use(&self, app_user: &str, tenant: &TenantId) -> bool {
        app_user == "app" && ["client_001", "client_002"].contains(&tenant.as_str())
    }

    fn exists(&self, tenant: &TenantId) -> bool {
        ["client_001", "client_002", "client_003"].contains(&tenant.as_str())
    }
}

/// See the module.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let (choices, piece) = (input.byte(), usize::from(input.byte()).max(1));
    let bytes = input.0;
    let policy = [TlsPolicy::Unavailable, TlsPolicy::Available, TlsPolicy::Required][usize::from(choices & 3) % 3];
    let whole = talk(policy, bytes, bytes.len().max(1));
    let pieces = talk(policy, bytes, piece);
    // What follows an upgrade's request at once is another thing than what follows later; a session is a session.
    if let (Some(Step::Session(_) | Step::Cancel(_)), false) = (&whole, bytes.get(4..8) == Some(&[4, 0xd2, 0x16, 0x2f]))
    {
        assert_eq!(whole, pieces, "pieces of {piece}");
    }
    for step in [whole, pieces].into_iter().flatten() {
        match step {
            Step::Session(message) => session(&message, choices),
            Step::Cancel(cancel) => assert!(CANCEL_KEY_LEN.contains(&cancel.secret_key.len())),
            _ => {}
        }
    }
}

/// The last step that is worth looking at; `None` if more is waited for.
fn talk(policy: TlsPolicy, bytes: &[u8], piece: usize) -> Option<Step> {
    let mut handshake = Handshake::new(policy);
    let mut input = BytesMut::new();
    let (mut given, mut upgraded) = (0, false);
    loop {
        assert!(handshake.budget() <= MAX_STARTUP_BYTES);
        let before = input.len();
        let step = handshake.feed(&mut input);
        assert!(input.len() <= before, "it adds nothing");
        match step {
            Step::NeedMore => {
                assert!(input.len() < handshake.budget().max(4), "it waits for more than it would take");
                if given == bytes.len() {
                    return None;
                }
                let end = (given + piece).min(bytes.len());
                input.extend_from_slice(&bytes[given..end]);
                given = end;
            }
            Step::Reply(byte) => assert_eq!(byte, b'N'),
            Step::StartTls { reply } => {
                assert!(!upgraded && policy != TlsPolicy::Unavailable, "TLS inside TLS, or none at hand");
                assert!(reply.is_none() || input.is_empty(), "plaintext would survive the upgrade");
                upgraded = true;
                // What comes now comes through TLS.
                input.clear();
                let alpn = reply.is_none().then_some(&b"postgresql"[..]);
                assert!(handshake.tls_established(alpn).is_ok());
            }
            step @ Step::Session(_) => {
                assert!(policy != TlsPolicy::Required || upgraded, "a session in the clear");
                return Some(step);
            }
            step => return Some(step),
        }
    }
}

fn session(message: &StartupMessage, choices: u8) {
    assert!(!message.user().is_empty() && message.version() <= Version::V3_2);
    assert!(message.parameters.iter().all(|(name, value)| !name.contains('\0') && !value.contains('\0')));
    let parameters = ClientParameters::read(message);
    identity(message, &parameters, choices);
    for (schema, replication, values) in [
        (Some("client_001"), Replication::Nothing, &[][..]),
        (Some("client_001"), Replication::OwnDatabase, &["database"]),
        (None, Replication::Everything, &["true", "database"]),
    ] {
        if let Ok(settings) = parameters.settings_for(schema, replication) {
            to_the_server(&settings, parameters.application_name.as_deref(), values);
        }
    }
}

/// Settings of a client never become anything but settings of the server connection, but for the kinds of replication
/// that its plan has.
fn to_the_server(settings: &[(String, String)], application_name: Option<&str>, kinds: &[&str]) {
    let replicates = |name: &str, value: &str| name == "replication" && kinds.contains(&value);
    for (name, value) in settings {
        let own = ["user", "database", "options", "replication", "role", "session_authorization"];
        assert!(replicates(name, value) || !own.contains(&name.as_str()) && !name.starts_with("_pq_."), "{name}");
        assert!(!name.bytes().any(|b| b.is_ascii_uppercase()), "{name}");
    }
    let mut packet = BytesMut::new();
    let ours = [("user", "role_of_tenant"), ("database", "tenants")];
    let theirs = settings.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let label = application_name.filter(|name| !name.is_empty()).map(|name| ("application_name", name));
    message::startup_message(&mut packet, Version::V3_0, ours.into_iter().chain(theirs).chain(label));
    assert!(packet.len() <= MAX_STARTUP_BYTES, "no server takes {} bytes", packet.len());
    let Ok(Startup::Session(read)) = startup::parse(&packet) else { panic!("no server understands it") };
    assert_eq!((read.user(), read.database()), ("role_of_tenant", Some("tenants")));
    assert_eq!(read.get("options"), None);
    assert!(read.get("replication").is_none_or(|value| replicates("replication", value)));
    assert_eq!(read.parameters.len(), 2 + settings.len() + usize::from(label.is_some()));
}

fn identity(message: &StartupMessage, parameters: &ClientParameters, choices: u8) {
    let all = [Source::Username, Source::Options, Source::Sni, Source::Database, Source::ApplicationName];
    let order: Vec<Source> =
        all.into_iter().enumerate().filter(|(at, _)| choices >> (at + 2) & 1 == 0).map(|(_, s)| s).collect();
    let regex = (choices & 0x80 != 0).then_some("(?<user>[^:]*):(?<tenant>.*)");
    let Ok(rules) = Rules::new(order.clone(), regex, Some("db.example.com")) else { panic!("the rules are good") };
    let hello = Hello {
        user: message.user(),
        database: message.database(),
        application_name: parameters.application_name.as_deref(),
        tenant_option: parameters.tenant.as_deref(),
        // Anything that the client chose.
        sni: message.database(),
    };
    let identity = identify(&rules, &hello, &World);
    if matches!(identity.login, Login::Tenant(_)) {
        assert!(order.contains(&Source::Username), "no tenant logs in by itself");
    }
    let Ok(tenant) = identity.tenant else { return };
    assert_eq!(TenantId::parse(tenant.as_str()).as_ref(), Ok(&tenant));
    match identity.login {
        Login::Tenant(own) => assert_eq!(own, tenant),
        Login::AppUser(user) => assert!(World.may_use(&user, &tenant), "{user} gets {tenant:?}"),
        Login::Nobody => panic!("nobody gets {tenant:?}"),
    }
}
