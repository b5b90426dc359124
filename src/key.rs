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
// In a box: bytes that are moved leave a copy behind.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(Box<Zeroizing<[u8; Self::SIZE]>>);

impl Key {
    /// Its size in bytes.
    const SIZE: usize = 32;

    /// A fresh key from the system's random source.
    ///
    /// # Errors
    /// The system has no random source.
    pub fn generate() -> Result<Self, Error> {
        let mut key = Self(Box::default());
        getrandom::fill(&mut **key.0).map_err(Error::Random)?;
        Ok(key)
    }

    /// The key as its owner keeps it: 44 letters. The only way to see it. To wipe them is the
    /// caller's part.
    pub fn to_base64(&self) -> String {
        STANDARD.encode(**self.0)
    }

    pub(crate) fn bytes(&self) -> &[u8; Self::SIZE] {
        &self.0
    }
}

/// Takes base64 with its padding; white space around it is forgiven.
impl FromStr for Key {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim_ascii();
        if text.is_empty() {
            return Err("no key is in it");
        }
        // The reason, and not the library's: that would quote what it found.
        let bytes = STANDARD.decode(text).map_err(|_| "not one key in base64")?;
        let bytes = Zeroizing::new(bytes);
        match bytes.len().cmp(&Self::SIZE) {
            Ordering::Less => Err("fewer than 32 bytes in base64"),
            Ordering::Greater => Err("more than 32 bytes in base64"),
            Ordering::Equal => {
                let mut key = Self(Box::default());
                key.0.copy_from_slice(&bytes);
                Ok(key)
            }
        }
    }
}

/// Without the key: options get printed.
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
            (format!("{text}\n{text}"), "not one key"),
            (format!("-{}", &text[1..]), "not one key"),
            ("ü".repeat(22), "not one key"),
        ] {
            let error = bad.parse::<Key>().unwrap_err();
            assert!(error.starts_with(why), "{bad:?}: {error}");
        }
    }
}
