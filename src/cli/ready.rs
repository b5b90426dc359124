//! `--ready`: asks a running program whether a visitor who comes now would be served.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::status::http::{LIMIT, Timed};
use crate::status::ready::PATH;

/// The bytes of an answer that are read: far more than there are reasons.
const MAX_ANSWER: u64 = 64 * 1024;

/// The header lines of an answer that are read: also those that a proxy in between may add.
const MAX_LINES: usize = 64;

/// Why a program does not count as ready.
#[derive(Debug)]
pub enum NotReady {
    /// There was no answer in time.
    NoAnswer(Address, io::Error),
    /// What answers is no status page.
    NotStatus(Address),
    /// It says so itself, with this code and these words.
    Says(Address, u16, String),
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAnswer(address, error) => write!(
                f,
                "--ready {address}: no answer: {error} (is the program running, with --status \
                 {address}?)"
            ),
            Self::NotStatus(address) => write!(
                f,
                "--ready {address}: what answers is no status page (--status of the program that \
                 is asked)"
            ),
            Self::Says(address, code, what) => {
                write!(f, "--ready {address}: not ready ({code}): {what}")
            }
        }
    }
}

impl std::error::Error for NotReady {}

/// Asks the program whose status page is at an address whether a visitor who comes now would be
/// served. This takes [`LIMIT`] at the most, and the time in which the host's name is looked up.
pub fn ask_ready(address: &Address) -> Result<(), NotReady> {
    let no_answer = |error| NotReady::NoAnswer(address.clone(), error);
    judge(address, &ask(address, LIMIT).map_err(no_answer)?)
}

/// Returns all of the answer.
fn ask(address: &Address, limit: Duration) -> io::Result<Vec<u8>> {
    let found = address.resolve()?;
    let until = Instant::now() + limit;
    let (socket, number) = dial(&found, until)?;
    let mut timed = Timed {
        socket: &socket,
        until,
    };
    // A page on loopback answers to a number, but not to every name.
    let request = format!("GET {PATH} HTTP/1.0\r\nHost: {number}\r\n\r\n");
    timed.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    timed.take(MAX_ANSWER).read_to_end(&mut answer)?;
    Ok(answer)
}

/// Dials each address in turn until one answers.
fn dial(found: &[SocketAddr], until: Instant) -> io::Result<(TcpStream, SocketAddr)> {
    let mut failed = io::ErrorKind::TimedOut.into();
    for number in found {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(number, left) {
            Ok(socket) => return Ok((socket, *number)),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Reads an answer.
fn judge(address: &Address, answer: &[u8]) -> Result<(), NotReady> {
    let mut lines = [httparse::EMPTY_HEADER; MAX_LINES];
    let mut response = httparse::Response::new(&mut lines);
    let Ok(httparse::Status::Complete(body)) = response.parse(answer) else {
        return Err(NotReady::NotStatus(address.clone()));
    };
    let body = String::from_utf8_lossy(&answer[body..]);
    let body = body.trim();
    let readiness = body.starts_with("{\"ready\":");
    match response.code {
        Some(200) if readiness => Ok(()),
        Some(503) if readiness => Err(says(address, 503, body)),
        Some(code) if !readiness && code != 200 => Err(says(address, code, body)),
        _ => Err(NotReady::NotStatus(address.clone())),
    }
}

/// What was said goes to a terminal: nothing of it may move the cursor there.
fn says(address: &Address, code: u16, body: &str) -> NotReady {
    let shown = |char: char| if char.is_control() { ' ' } else { char };
    NotReady::Says(address.clone(), code, body.chars().map(shown).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::http::tests::Served;
    use crate::status::ready::response;
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn address() -> Address {
        Address::new("127.0.0.1", 9000)
    }

    #[test]
    fn an_answer_says_whether_visitors_are_served() {
        let answer = |head: &str, body: &str| {
            let answer = format!("HTTP/1.1 {head}\r\nA: b\r\n\r\n{body}");
            judge(&address(), answer.as_bytes()).map_err(|why| why.to_string())
        };
        assert_eq!(answer("200 OK", "{\"ready\":true,\"why\":[]}\n"), Ok(()));
        let why = answer(
            "503 No",
            "{\"ready\":false,\"why\":[\"no client\u{1b}[2J\"]}\n",
        );
        let why = why.unwrap_err();
        let wanted = "not ready (503): {\"ready\":false,\"why\":[\"no client [2J\"]}";
        assert!(why.ends_with(wanted), "{why}");
        let why = answer("421 Misdirected Request", "421 Misdirected Request\n").unwrap_err();
        assert!(
            why.ends_with("not ready (421): 421 Misdirected Request"),
            "{why}"
        );
        let why = answer("200 OK", "<html>a page of something else").unwrap_err();
        assert!(why.contains("no status page"), "{why}");
    }

    #[test]
    fn what_is_no_answer_is_not_ready() {
        for answer in [
            "",
            "HTTP/1.1 200",
            "hi\nhi\n",
            "HTTP/1.1 200 OK\r\nA: b\r\n",
        ] {
            let why = judge(&address(), answer.as_bytes()).unwrap_err();
            assert!(matches!(why, NotReady::NotStatus(_)), "{answer:?}: {why}");
        }
    }

    #[test]
    fn a_program_says_whether_it_is_ready() {
        let ready = AtomicBool::new(true);
        let served = Served::start(LIMIT, move |path| {
            let not_ready = match ready.swap(false, Ordering::Relaxed) {
                true => vec![],
                false => vec!["no client".to_owned()],
            };
            (path == PATH).then(|| response(&not_ready))
        });
        let name = Address::new("localhost", served.listener.addr.port());
        ask_ready(&name).unwrap();
        let why = ask_ready(&name).unwrap_err().to_string();
        let wanted = "not ready (503): {\"ready\":false,\"why\":[\"no client\"]}";
        assert!(why.ends_with(wanted), "{why}");
    }

    #[test]
    fn a_silent_program_is_not_waited_for() {
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::from(silent.local_addr().unwrap());
        let error = ask(&address, Duration::from_millis(100)).unwrap_err();
        assert_eq!(error.to_string(), "timed out");
    }

    #[test]
    fn nobody_there_is_not_ready() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let gone = Address::from(listener.local_addr().unwrap());
        drop(listener);
        let why = ask_ready(&gone).unwrap_err().to_string();
        assert!(
            why.starts_with(&format!("--ready {gone}: no answer: ")),
            "{why}"
        );
    }
}
