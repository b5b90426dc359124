//! The key that both programs share, as people handle it: 32 random bytes, in base64.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::error::Error;

/// A secret of 32 random bytes that a server shares with its client: who does not have it can
/// neither become the client nor read along.
///
/// ```
/// use tunnel_proxy::Key;
///
/// let key = Key::generate()?;
/// assert_eq!(key.to_base64().parse(), Ok(key));
/// # Ok::<(), tunnel_proxy::Error>(())
/// ```
///
/// Its bytes are wiped when it is dropped.
// The bytes are in a box, as bytes that are moved leave a copy behind.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(Box<Zeroizing<[u8; Self::SIZE]>>);

impl Key {
    const SIZE: usize = 32;

    /// Makes a fresh key out of the system's random source.
    ///
    /// # Errors
    /// The system has no random source.
    pub fn generate() -> Result<Self, Error> {
        let mut key = Self(Box::default());
        getrandom::fill(&mut **key.0).map_err(Error::Random)?;
        Ok(key)
    }

    /// Returns the key as its owner keeps it, in 44 letters. Nothing else shows it. The caller is to
    /// wipe them.
    pub fn to_base64(&self) -> String {
        STANDARD.encode(**self.0)
    }

    pub(crate) fn bytes(&self) -> &[u8; Self::SIZE] {
        &self.0
    }
}

/// Why a text is not a [`Key`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// Nothing, or white space.
    Missing,
    /// Something else than base64.
    Malformed,
    /// Fewer than 32 bytes in base64.
    Short,
    /// More than 32 bytes in base64.
    Long,
    /// A byte order mark, with which some editors and shells begin a file.
    ByteOrderMark,
    /// Quotes around a key.
    Quoted,
    /// A comment.
    Comment,
    /// A line of an environment file.
    Assignment,
    /// More keys than one.
    Several,
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "no key is in it",
            Self::Malformed => "not one key in base64",
            Self::Short => "fewer than 32 bytes in base64",
            Self::Long => "more than 32 bytes in base64",
            Self::ByteOrderMark => "it begins with a byte order mark; save it as plain ASCII",
            Self::Quoted => "quotes are around the key; leave them out",
            Self::Comment => "a # comment is in it; leave the key alone in it",
            Self::Assignment => "TP_KEY= is in it; leave that out",
            Self::Several => "several keys are in it; leave one",
        })
    }
}

impl std::error::Error for KeyError {}

/// Reads base64 with its padding. White space around it is forgiven.
impl FromStr for Key {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::read(text.as_bytes())
    }
}

impl Key {
    /// Reads a key out of a file's content. The error never quotes it.
    pub(crate) fn read(text: &[u8]) -> Result<Self, KeyError> {
        let text = text.trim_ascii();
        if text.is_empty() {
            return Err(KeyError::Missing);
        }
        // The library's own error would quote a letter of the key.
        let bytes = STANDARD.decode(text).map_err(|_| mistake(text))?;
        let bytes = Zeroizing::new(bytes);
        match bytes.len().cmp(&Self::SIZE) {
            Ordering::Less => Err(KeyError::Short),
            Ordering::Greater => Err(KeyError::Long),
            Ordering::Equal => {
                let mut key = Self(Box::default());
                key.0.copy_from_slice(&bytes);
                Ok(key)
            }
        }
    }
}

/// Returns what is wrong with a text that is not base64.
fn mistake(text: &[u8]) -> KeyError {
    // The byte order marks of UTF-8, and of UTF-16 in both byte orders.
    let marks: [&[u8]; 3] = [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"];
    let is_quote = |byte: Option<&u8>| matches!(byte, Some(b'"' | b'\''));
    let words = text.split(u8::is_ascii_whitespace);
    let is_key = |word: &&[u8]| {
        STANDARD
            .decode(word)
            .is_ok_and(|bytes| bytes.len() == Key::SIZE)
    };
    if marks.iter().any(|mark| text.starts_with(mark)) {
        KeyError::ByteOrderMark
    } else if text.contains(&b'#') {
        KeyError::Comment
    } else if text.windows(7).any(|part| part == b"TP_KEY=") {
        KeyError::Assignment
    } else if is_quote(text.first()) || is_quote(text.last()) {
        KeyError::Quoted
    } else if words.filter(is_key).count() > 1 {
        KeyError::Several
    } else {
        KeyError::Malformed
    }
}

/// Leaves the key out, as options get printed.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_back_and_not_shown() {
        let (one, other) = (Key::generate().unwrap(), Key::generate().unwrap());
        assert!(one != other);
        let text = one.to_base64();
        assert_eq!(text.len(), 44);
        for spelling in [text.clone(), format!("{text}\n"), format!("\r\n {text} \t")] {
            assert_eq!(spelling.parse(), Ok(one.clone()));
        }
        assert_eq!(format!("{one:?}"), "Key(…)");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let text = STANDARD.encode([1; 32]);
        for (bad, why) in [
            (String::new(), "no key"),
            (" \n".to_owned(), "no key"),
            (STANDARD.encode([1; 31]), "fewer"),
            (STANDARD.encode([1; 33]), "more"),
            (text.replace('=', ""), "not one key"),
            (format!("{text}\n{text}\n"), "several keys"),
            (format!("{text} {text}"), "several keys"),
            (format!("{text}\nhello"), "not one key"),
            (
                format!("\u{feff}{text}"),
                "it begins with a byte order mark",
            ),
            (format!("\"{text}\""), "quotes"),
            (format!("'{text}'\n"), "quotes"),
            (format!("# made today\n{text}"), "a # comment"),
            (format!("{text} # made today"), "a # comment"),
            (format!("TP_KEY={text}"), "TP_KEY= is"),
            (format!("export TP_KEY='{text}'"), "TP_KEY= is"),
            (format!("-{}", &text[1..]), "not one key"),
            ("ü".repeat(22), "not one key"),
        ] {
            let error = bad.parse::<Key>().unwrap_err().to_string();
            assert!(error.starts_with(why), "{bad:?}: {error}");
        }
        // As a shell of Windows writes it.
        let utf16 = [0xfeff].into_iter().chain(text.encode_utf16());
        let utf16: Vec<_> = utf16.flat_map(u16::to_le_bytes).collect();
        assert_eq!(Key::read(&utf16), Err(KeyError::ByteOrderMark));
    }
}
