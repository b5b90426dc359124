//! The handshake that a connection with a key begins with: `Noise_NNpsk0_25519_AESGCM_SHA256`, the
//! client its initiator. Both of its messages are empty, and stand behind their length, as the
//! [frames](super::frame) do that follow. No sockets: what is read comes out of a `Read`.

use std::io::{self, Read, Write};

use snow::{Builder, HandshakeState};
use zeroize::Zeroizing;

use crate::door::openings::{OpeningId, Openings};
use crate::key::Key;
use crate::wire::frame::{
    Cipher, LENGTH, Opener, REKEY_AFTER, Sealer, TAG, begins_with_line, broken,
};

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";

/// A handshake message: an ephemeral public key of 32 bytes, and the tag of nothing.
const MESSAGE: usize = 32 + TAG;

/// What a side that has a key begins with. No line of the protocol begins with a NUL.
pub const OPENING: [u8; LENGTH] = (MESSAGE as u16).to_be_bytes();

/// What ties a tunnel to the control link of its session.
#[derive(Clone)]
pub struct Bond {
    key: Key,
    /// The hash of all that went over the wire in the control link's handshake.
    hash: [u8; 32],
}

impl Bond {
    /// True if it was made with this key.
    pub fn key_is(&self, key: &Key) -> bool {
        self.key == *key
    }
}

/// A handshake's part in the protocol: one that was made for another part fails.
pub enum Purpose<'a> {
    /// A control link, with one of these keys.
    Control(&'a [Key]),
    /// A tunnel of this session.
    Tunnel(&'a Bond),
}

impl<'a> Purpose<'a> {
    fn keys(&self) -> &'a [Key] {
        match self {
            Purpose::Control(keys) => keys,
            Purpose::Tunnel(bond) => std::slice::from_ref(&bond.key),
        }
    }

    fn prologue(&self) -> Vec<u8> {
        match self {
            Purpose::Control(_) => b"tp/2 control".to_vec(),
            Purpose::Tunnel(bond) => [b"tp/2 tunnel".as_slice(), &bond.hash].concat(),
        }
    }
}

/// What a handshake leads to. The peer has proved nothing yet: only its first frame does that.
pub struct Secured {
    /// For what is written.
    pub sealer: Sealer,
    /// For what is read.
    pub opener: Opener,
    /// For the tunnels, if this was a control link.
    pub bond: Bond,
}

/// Why a handshake led to nothing.
pub enum NoHandshake {
    /// The other side begins with these bytes, and nobody who has a key does.
    NotNoise([u8; LENGTH]),
    /// The other side's message was made with another key.
    WrongKey,
    /// The other side's message was made for another of the server's ports.
    OtherPort,
    /// The other side's message has been here before: it was recorded.
    Recorded,
    /// The connection failed, or this side could not do its part.
    Io(io::Error),
}

impl From<io::Error> for NoHandshake {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The client's half of a handshake: its own message, and then the server's. Only the first key
/// counts.
pub fn initiate(
    reader: &mut impl Read,
    writer: &mut impl Write,
    purpose: &Purpose,
) -> Result<Secured, NoHandshake> {
    let prologue = purpose.prologue();
    let [key, ..] = purpose.keys() else {
        return Err(io::Error::other("there is no key").into());
    };
    // One ephemeral key in 256 would make the message begin like a line in a frame, and a server without
    // a key would tell the client that it has come to the wrong port.
    let mut state = loop {
        let mut state = begin(key, &prologue)?.build_initiator().map_err(broken)?;
        let message = write_message(&mut state)?;
        if !begins_with_line(&message) {
            writer.write_all(&message)?;
            break state;
        }
    };
    let message = read_message(reader)?;
    let opened = state.read_message(&message, &mut []);
    opened.map_err(|_| NoHandshake::WrongKey)?;
    Ok(Secured::new(state, key)?)
}

/// The server's half of a handshake. What was recorded of another one may get an answer, too: only
/// the first frame shows that the client is there. It gets none if `openings` remember it.
/// `due` is what comes to this port of the server's, with what is remembered of that; `elsewhere` is what
/// comes to the other one. To try them all costs no curve arithmetic. Also returns which one it is.
///
/// `known` is called once the client's message has opened for the first time.
pub fn respond(
    reader: &mut impl Read,
    writer: &mut impl Write,
    due: &[(Purpose, &Openings)],
    elsewhere: &[Purpose],
    known: impl FnOnce(),
) -> Result<(Secured, usize), NoHandshake> {
    let message = read_message(reader)?;
    let mut id = OpeningId::default();
    id.copy_from_slice(&message[..size_of::<OpeningId>()]);
    if due.iter().any(|(_, openings)| openings.knows(id)) {
        return Err(NoHandshake::Recorded);
    }
    for (place, (purpose, openings)) in due.iter().enumerate() {
        let Some((answer, secured)) = answer(&message, purpose)? else {
            continue;
        };
        if !openings.remember(id) {
            return Err(NoHandshake::Recorded);
        }
        known();
        writer.write_all(&answer)?;
        return Ok((secured, place));
    }
    for purpose in elsewhere {
        if fits(&message, purpose)? {
            return Err(NoHandshake::OtherPort);
        }
    }
    Err(NoHandshake::WrongKey)
}

/// The server's message, and what it leads to; None if the client's does not open. Not inlined:
/// kilobytes of a handshake's state have no place on the stack of a thread that waits for a stranger.
#[inline(never)]
fn answer(
    message: &[u8; MESSAGE],
    purpose: &Purpose,
) -> io::Result<Option<([u8; LENGTH + MESSAGE], Secured)>> {
    let Some((mut state, key)) = open(message, purpose)? else {
        return Ok(None);
    };
    let answer = write_message(&mut state)?;
    Ok(Some((answer, Secured::new(state, key)?)))
}

/// True if the client's message was made for this. Not inlined either.
#[inline(never)]
fn fits(message: &[u8; MESSAGE], purpose: &Purpose) -> io::Result<bool> {
    Ok(open(message, purpose)?.is_some())
}

/// The server's side of a handshake that the client's message has opened, and the key that opened it.
fn open<'a>(
    message: &[u8; MESSAGE],
    purpose: &Purpose<'a>,
) -> io::Result<Option<(HandshakeState, &'a Key)>> {
    let prologue = purpose.prologue();
    for key in purpose.keys() {
        let mut state = begin(key, &prologue)?.build_responder().map_err(broken)?;
        if state.read_message(message, &mut []).is_ok() {
            return Ok(Some((state, key)));
        }
    }
    Ok(None)
}

fn begin<'a>(key: &'a Key, prologue: &'a [u8]) -> io::Result<Builder<'a>> {
    let pattern = PATTERN.parse().map_err(broken)?;
    Builder::new(pattern)
        .psk(0, key.bytes())
        .and_then(|builder| builder.prologue(prologue))
        .map_err(broken)
}

fn write_message(state: &mut HandshakeState) -> io::Result<[u8; LENGTH + MESSAGE]> {
    let mut bytes = [0; LENGTH + MESSAGE];
    bytes[..LENGTH].copy_from_slice(&OPENING);
    state
        .write_message(&[], &mut bytes[LENGTH..])
        .map_err(broken)?;
    Ok(bytes)
}

/// The far side's message. Whoever begins with something else is not waited for.
fn read_message(reader: &mut impl Read) -> Result<[u8; MESSAGE], NoHandshake> {
    let (mut opening, mut message) = (OPENING, [0; MESSAGE]);
    reader.read_exact(&mut opening)?;
    if opening != OPENING {
        return Err(NoHandshake::NotNoise(opening));
    }
    reader.read_exact(&mut message)?;
    Ok(message)
}

impl Secured {
    fn new(mut state: HandshakeState, key: &Key) -> io::Result<Self> {
        let mut hash = [0; 32];
        hash.copy_from_slice(state.get_handshake_hash());
        // The keys of the two directions, the initiator's first. They are taken out of snow, which
        // could only rekey both directions under one lock.
        let (first, second) = state.dangerously_get_raw_split();
        let (first, second) = (Zeroizing::new(first), Zeroizing::new(second));
        let (out, into) = match state.is_initiator() {
            true => (first, second),
            false => (second, first),
        };
        Ok(Self {
            sealer: Sealer::new(Some(Cipher::new(&out, REKEY_AFTER)?)),
            opener: Opener::new(Some(Cipher::new(&into, REKEY_AFTER)?)),
            bond: Bond {
                key: key.clone(),
                hash,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::Kind;

    /// What a handshake with everything fixed leads to: the two messages, and both sides.
    fn fixed_handshake(purpose: &Purpose) -> ([Vec<u8>; 2], [Secured; 2]) {
        let (key, prologue) = (&purpose.keys()[0], purpose.prologue());
        let begin = || begin(key, &prologue).unwrap();
        let mut client = begin()
            .fixed_ephemeral_key_for_testing_only(&[0x11; 32])
            .build_initiator()
            .unwrap();
        let mut server = begin()
            .fixed_ephemeral_key_for_testing_only(&[0x22; 32])
            .build_responder()
            .unwrap();
        let first = write_message(&mut client).unwrap();
        server.read_message(&first[LENGTH..], &mut []).unwrap();
        let second = write_message(&mut server).unwrap();
        client.read_message(&second[LENGTH..], &mut []).unwrap();
        let sides = [client, server].map(|state| Secured::new(state, key).unwrap());
        ([first.to_vec(), second.to_vec()], sides)
    }

    fn fixed_key() -> Key {
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        key.parse().unwrap()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// One in 256 would begin so by chance.
    #[test]
    fn no_handshake_begins_like_a_line_in_a_frame() {
        let key = fixed_key();
        let control = Purpose::Control(std::slice::from_ref(&key));
        for _ in 0..3000 {
            let mut opening = Vec::new();
            assert!(initiate(&mut std::io::empty(), &mut opening, &control).is_err());
            assert!(opening.starts_with(&OPENING) && !begins_with_line(&opening));
        }
    }

    /// From an implementation of its own, written after the Noise specification alone.
    #[test]
    fn the_wire_format_is_what_it_was() {
        let key = fixed_key();
        let control = Purpose::Control(std::slice::from_ref(&key));
        let (messages, [mut client, mut server]) = fixed_handshake(&control);
        assert_eq!(
            messages.map(|message| hex(&message)),
            [
                "00307b4e909bbe7ffe44c465a220037d608ee35897d31ef972f07f74892cb0f73f13\
                 c3a6ff21c44824463dda84dd32b47aac",
                "00300faa684ed28867b97f4a6a2dee5df8ce974e76b7018e3f22a1c4cf2678570f20\
                 f9734afc77ebe98219b3577d7164d19c",
            ]
        );
        assert_eq!(
            hex(&client.bond.hash),
            "3581eb4d24e741c49feea5c37d5259f1c0a48b524a4a8abe343a5b9fda2567c3"
        );
        let mut client_says =
            |kind, carried: &[u8]| hex(client.sealer.frame(kind, carried).unwrap());
        assert_eq!(
            client_says(Kind::Line, b"hello proto=2 pool=8\n") + &client_says(Kind::End, b""),
            "0026ebb38a3f3c6f37be1897fa1b061afd3a0eca5e3955a2dabbe0133cdac9827286ed99b48457c2\
             0011cb696958f416525489f2fd74ff31cd7c25"
        );
        let hi = server.sealer.frame(Kind::Line, b"hi\n").unwrap();
        assert_eq!(hex(hi), "001432bc30703b3873b49b1d57ae810d613b0d6e9ce9");

        let bond = client.bond;
        let (messages, _) = fixed_handshake(&Purpose::Tunnel(&bond));
        assert_eq!(
            messages.map(|message| hex(&message)),
            [
                "00307b4e909bbe7ffe44c465a220037d608ee35897d31ef972f07f74892cb0f73f13\
                 1409564fc97c5f518848abe95d20561c",
                "00300faa684ed28867b97f4a6a2dee5df8ce974e76b7018e3f22a1c4cf2678570f20\
                 05704f27fac23574bf2e8407ff0d5ef3",
            ]
        );
    }

    /// Snow has a rekey of its own, which knows nothing of this one.
    #[test]
    fn a_new_key_is_what_noise_says() {
        let key = fixed_key();
        let prologue = Purpose::Control(std::slice::from_ref(&key)).prologue();
        let mut client = begin(&key, &prologue).unwrap().build_initiator().unwrap();
        let mut server = begin(&key, &prologue).unwrap().build_responder().unwrap();
        let first = write_message(&mut client).unwrap();
        server.read_message(&first[LENGTH..], &mut []).unwrap();
        let second = write_message(&mut server).unwrap();
        client.read_message(&second[LENGTH..], &mut []).unwrap();

        let (out, into) = client.dangerously_get_raw_split();
        let mut sealer = Sealer::new(Cipher::new(&out, 3).ok());
        let mut opener = Opener::new(Cipher::new(&into, 2).ok());
        let mut server = server.into_transport_mode().unwrap();
        let mut buffer = [0; 100];
        for count in 1..=10 {
            let frame = sealer.frame(Kind::Line, b"up\n").unwrap();
            let length = server.read_message(&frame[LENGTH..], &mut buffer).unwrap();
            assert_eq!(buffer[..length], *b"\x02up\n", "frame {count}");
            let length = server.write_message(b"\x02down\n", &mut buffer).unwrap();
            let frame = [&(length as u16).to_be_bytes(), &buffer[..length]].concat();
            assert_eq!(opener.open_one(&mut &frame[..]).unwrap(), b"down\n");
            if count % 3 == 0 {
                server.rekey_incoming();
            }
            if count % 2 == 0 {
                server.rekey_outgoing();
            }
        }
    }
}
