//! The names of services.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The most services of a server or a client, each of which costs a server a port and a thread.
pub const MAX_SERVICES: usize = 64;

/// The longest name in bytes.
const MAX_NAME: usize = 32;

/// What one of a server's ports for visitors leads to, by name: 1 to 32 of `a-z`, `0-9`, `-` and `_`.
/// The original's one service, which is the default, has no name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Service(Arc<str>);

impl Service {
    /// Returns false for the original's service.
    pub fn has_name(&self) -> bool {
        !self.0.is_empty()
    }

    /// Returns the name, if there is one.
    pub(crate) fn name(&self) -> Option<String> {
        self.has_name().then(|| self.to_string())
    }

    /// Returns ` of NAME` for a log line about a visitor, or nothing if there is no name.
    pub(crate) fn of(&self) -> String {
        self.behind(" of ")
    }

    /// Returns the name behind these words, or nothing if there is no name.
    pub(crate) fn behind(&self, words: &str) -> String {
        match self.has_name() {
            true => format!("{words}{self}"),
            false => String::new(),
        }
    }

    /// Returns `NAME=` as an option's value has it, or nothing if there is no name.
    pub(crate) fn option(&self) -> String {
        match self.has_name() {
            true => format!("{self}="),
            false => String::new(),
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Service {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let fits =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
        match (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(fits) {
            true => Ok(Self(name.into())),
            false => Err(format!(
                "a service's name has 1 to {MAX_NAME} of a-z, 0-9, - and _"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for name in ["a", "web-1_b", &"z".repeat(MAX_NAME)] {
            let service: Service = name.parse().unwrap();
            assert_eq!(service.to_string(), name);
            assert_eq!(service.of(), format!(" of {name}"));
        }
        for name in ["", "Web", "a b", "a=b", "ä", &"z".repeat(MAX_NAME + 1)] {
            assert!(name.parse::<Service>().is_err(), "{name}");
        }
        assert_eq!(Service::default().of(), "");
    }
}
