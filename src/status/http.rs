//! As much of an HTTP server as a status page takes: GET and HEAD, one request a connection, all of
//! it bounded.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::journal::Journal;
use crate::os::limits::Slots;
use crate::os::listener::Listener;
use crate::os::net::{timed_out, write_now};
use crate::os::workers::Workers;

/// A connection has this long for everything.
pub const LIMIT: Duration = Duration::from_secs(5);

/// The media type of text for people.
pub const PLAIN: &str = "text/plain; charset=utf-8";

/// The connections at a time: a few browsers and collectors. Further ones are closed at once.
const MAX_CONNECTIONS: usize = 8;

/// The bytes of a request before its body. Browsers send about 1 KiB.
pub const MAX_HEAD: usize = 8 * 1024;

/// The header lines of a request. Browsers send about 20.
const MAX_LINES: usize = 64;

/// Nothing may be loaded, and no page of another site may have this one in a frame.
pub const POLICY: &str =
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What a request ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Ok,
    BadRequest,
    NotFound,
    MethodNotAllowed,
    TooLate,
    /// The host that was asked for cannot be this one.
    Misdirected,
    HeadTooLarge,
    /// No visitor would be served now.
    Unavailable,
    Version,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::TooLate => "408 Request Timeout",
            Self::Misdirected => "421 Misdirected Request",
            Self::HeadTooLarge => "431 Request Header Fields Too Large",
            Self::Unavailable => "503 Service Unavailable",
            Self::Version => "505 HTTP Version Not Supported",
        })
    }
}

/// What is sent back.
pub struct Response {
    pub code: Code,
    pub content_type: &'static str,
    /// The Content-Security-Policy.
    pub policy: Cow<'static, str>,
    pub body: String,
}

impl Response {
    /// A response that loads nothing.
    pub fn new(code: Code, content_type: &'static str, body: String) -> Self {
        Self {
            code,
            content_type,
            policy: POLICY.into(),
            body,
        }
    }

    /// A response that says no more than its code.
    fn refusal(code: Code) -> Self {
        Self::new(code, PLAIN, format!("{code}\n"))
    }

    /// What goes out, without the body if only the head was asked for.
    fn into_bytes(self, head_only: bool) -> Vec<u8> {
        let Self {
            code,
            content_type,
            policy,
            body,
        } = self;
        let allow = match code {
            Code::MethodNotAllowed => "Allow: GET, HEAD\r\n",
            _ => "",
        };
        let mut bytes = format!(
            "HTTP/1.1 {code}\r\n\
             Content-Type: {content_type}\r\n\
             Content-Length: {}\r\n\
             Cache-Control: no-store\r\n\
             X-Content-Type-Options: nosniff\r\n\
             Content-Security-Policy: {policy}\r\n\
             {allow}Connection: close\r\n\r\n",
            body.len()
        );
        if !head_only {
            bytes.push_str(&body);
        }
        bytes.into_bytes()
    }
}

/// Answers requests until the listener is closed or taken. `route` returns what is at a path. Each
/// connection has a thread and this long for everything.
pub fn serve(
    listener: &Listener,
    workers: &Workers,
    journal: &Journal,
    limit: Duration,
    route: impl Fn(&str) -> Option<Response> + Send + Sync + 'static,
) {
    let slots = Slots::new(MAX_CONNECTIONS);
    let route = Arc::new(route);
    let failed = |error: &_| journal.accept_failed(listener.option, error);
    while let Some((socket, ..)) = listener.accept(|| Some(()), failed) {
        let Some(slot) = slots.try_take() else {
            continue;
        };
        let route = route.clone();
        let answered = workers.start("status", move || {
            // The place is free when the socket is closed, and not before.
            let (_slot, socket) = (slot, socket);
            // Who asks a status page and leaves is no news.
            let _ = answer(&socket, Instant::now() + limit, &*route);
        });
        if let Err(error) = answered {
            journal.no_thread("the status page", &error);
        }
    }
}

/// Answers one connection.
fn answer(
    socket: &TcpStream,
    until: Instant,
    route: &impl Fn(&str) -> Option<Response>,
) -> io::Result<()> {
    let local = socket.local_addr()?.ip().to_canonical().is_loopback();
    let mut timed = Timed { socket, until };
    match response_to(&mut timed, local, route) {
        Ok(bytes) => timed.write_all(&bytes)?,
        Err(error) if timed_out(&error) => {
            let late = Response::refusal(Code::TooLate);
            return write_now(socket, &late.into_bytes(false));
        }
        Err(error) => return Err(error),
    }
    // A close before the other side has sent all would be a reset, which can overtake the response.
    socket.shutdown(Shutdown::Write)?;
    io::copy(&mut timed.take(8 * MAX_HEAD as u64), &mut io::sink())?;
    Ok(())
}

/// Reads a request, and returns the bytes of its response.
pub fn response_to(
    input: &mut impl Read,
    local: bool,
    route: &impl Fn(&str) -> Option<Response>,
) -> io::Result<Vec<u8>> {
    let mut head = [0; MAX_HEAD];
    let mut filled = 0;
    let response = loop {
        match path(&head[..filled], local) {
            Ok(Some(path)) => {
                break route(path).unwrap_or_else(|| Response::refusal(Code::NotFound));
            }
            Ok(None) if filled == MAX_HEAD => break Response::refusal(Code::HeadTooLarge),
            Ok(None) => {}
            Err(code) => break Response::refusal(code),
        }
        match input.read(&mut head[filled..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    };
    // Empty lines may come first.
    let head_only = head.trim_ascii_start().starts_with(b"HEAD ");
    Ok(response.into_bytes(head_only))
}

/// Returns the path that a request asks for, or None if there is more of its head to come.
fn path(head: &[u8], local: bool) -> Result<Option<&str>, Code> {
    let mut lines = [httparse::EMPTY_HEADER; MAX_LINES];
    let mut request = httparse::Request::new(&mut lines);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Code::HeadTooLarge),
        Err(httparse::Error::Version) => return Err(Code::Version),
        Err(_) => return Err(Code::BadRequest),
    }
    if !matches!(request.method, Some("GET" | "HEAD")) {
        return Err(Code::MethodNotAllowed);
    }
    let is_host = |line: &&httparse::Header| line.name.eq_ignore_ascii_case("Host");
    let mut hosts = request.headers.iter().filter(is_host);
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if local && !is_local(host.value) => return Err(Code::Misdirected),
        (Some(_), None) => {}
        // Only HTTP/1.0 does without.
        (None, _) if request.version == Some(0) => {}
        _ => return Err(Code::BadRequest),
    }
    let target = request.path.filter(|it| it.starts_with('/'));
    let target = target.ok_or(Code::BadRequest)?;
    Ok(Some(
        target.split_once('?').map_or(target, |(path, _)| path),
    ))
}

/// Returns true for an IP address and for `localhost`, with a port or without. Any other name may be
/// that of a web site which has its own name lead to this host, so that its pages can read this one.
fn is_local(host: &[u8]) -> bool {
    let Ok(host) = str::from_utf8(host) else {
        return false;
    };
    let is_port = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let name = match host.rsplit_once(':') {
        Some((name, port)) if is_port(port) => name,
        _ => host,
    };
    let inside = name.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    inside.unwrap_or(name).parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
}

/// A connection whose reads and writes all end at one moment.
pub struct Timed<'a> {
    pub socket: &'a TcpStream,
    pub until: Instant,
}

impl Timed<'_> {
    /// Returns the time that is left, or an error if none is.
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            left => Ok(Some(left)),
        }
    }
}

/// The system says "would block" when the time of a read or a write is over.
fn in_words(error: io::Error) -> io::Error {
    match timed_out(&error) {
        true => io::ErrorKind::TimedOut.into(),
        false => error,
    }
}

impl Read for Timed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.set_read_timeout(self.left()?)?;
        self.socket.read(buffer).map_err(in_words)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.set_write_timeout(self.left()?)?;
        self.socket.write(bytes).map_err(in_words)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::address::Address;
    use crate::fuzz::Pieces;
    use crate::seeded;
    use crate::stop::{Phase, Stop};
    use std::thread;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// A page of which only `/` exists.
    fn route(path: &str) -> Option<Response> {
        (path == "/").then(|| Response::new(Code::Ok, PLAIN, "it is here\n".to_owned()))
    }

    /// The response to these bytes, which come in pieces of this size.
    fn respond(request: &[u8], piece: usize, local: bool) -> io::Result<String> {
        let bytes = response_to(&mut Pieces(request, piece), local, &route)?;
        Ok(String::from_utf8(bytes).unwrap())
    }

    /// The code of the response.
    fn code(request: &str, local: bool) -> String {
        let response = respond(request.as_bytes(), 100, local).unwrap();
        response["HTTP/1.1 ".len()..][..3].to_owned()
    }

    #[test]
    fn a_request_gets_its_page() {
        let request = b"GET /?again HTTP/1.1\r\nHost: [::1]:80\r\nUser-Agent: x\r\n\r\n";
        for piece in [1, 7, 100] {
            assert_eq!(
                respond(request, piece, true).unwrap(),
                "HTTP/1.1 200 OK\r\n\
                 Content-Type: text/plain; charset=utf-8\r\n\
                 Content-Length: 11\r\n\
                 Cache-Control: no-store\r\n\
                 X-Content-Type-Options: nosniff\r\n\
                 Content-Security-Policy: default-src 'none'; base-uri 'none'; form-action 'none'; \
                 frame-ancestors 'none'\r\n\
                 Connection: close\r\n\r\n\
                 it is here\n"
            );
        }
    }

    #[test]
    fn a_head_has_no_body() {
        let whole = respond(b"GET / HTTP/1.0\r\n\r\n", 9, true).unwrap();
        let head = respond(b"\r\nHEAD / HTTP/1.0\r\n\r\n", 9, true).unwrap();
        assert_eq!(whole, head.clone() + "it is here\n");
        let missing = respond(b"HEAD /missing HTTP/1.0\r\n\r\n", 9, true).unwrap();
        assert!(
            missing.starts_with("HTTP/1.1 404 Not Found\r\n"),
            "{missing}"
        );
        assert!(missing.ends_with("\r\n\r\n"), "{missing}");
    }

    #[test]
    fn what_is_not_understood_is_refused_with_its_code() {
        let lines = |count| "a: b\r\n".repeat(count);
        let long = "a".repeat(MAX_HEAD);
        for (request, wanted) in [
            ("GET /missing HTTP/1.1\r\nHost: localhost\r\n\r\n", "404"),
            ("POST / HTTP/1.1\r\nHost: localhost\r\n\r\n", "405"),
            ("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", "405"),
            ("GET / HTTP/2.0\r\n\r\n", "505"),
            ("GET / HTTP/1.1\r\n\r\n", "400"),
            ("GET / HTTP/1.1\r\nHost: ::\r\nHost: ::\r\n\r\n", "400"),
            ("GET / HTTP/1.0\r\nHost: ::\r\nHost: ::\r\n\r\n", "400"),
            ("GET http://localhost/ HTTP/1.0\r\n\r\n", "400"),
            ("GET /\r\n\r\n", "400"),
            ("hello proto=2 pool=8\n", "505"),
            ("\u{16}\u{3}\u{1}", "400"),
            ("GET / HTTP/1.0\r\na\u{0}: b\r\n\r\n", "400"),
            (
                &format!("GET / HTTP/1.0\r\n{}\r\n", lines(MAX_LINES)),
                "200",
            ),
            (
                &format!("GET / HTTP/1.0\r\n{}\r\n", lines(MAX_LINES + 1)),
                "431",
            ),
            (&format!("GET /{long} HTTP/1.0\r\n\r\n"), "431"),
            (&format!("GET / HTTP/1.0\r\na: {long}"), "431"),
        ] {
            assert_eq!(code(request, true), wanted, "{request:?}");
        }
        let not_allowed = respond(b"PUT / HTTP/1.0\r\n\r\n", 99, true).unwrap();
        assert!(
            not_allowed.contains("\r\nAllow: GET, HEAD\r\n"),
            "{not_allowed}"
        );
    }

    #[test]
    fn a_page_on_loopback_is_not_another_sites() {
        for (host, is_ours) in [
            ("localhost", true),
            ("LocalHost:9000", true),
            ("127.0.0.1", true),
            ("127.0.0.1:9000", true),
            ("[::1]", true),
            ("[::1]:9000", true),
            ("192.0.2.1:9000", true),
            ("attacker.example", false),
            ("attacker.example:9000", false),
            ("localhost.attacker.example", false),
            ("127.0.0.1.attacker.example:80", false),
            ("[localhost]", false),
            ("", false),
            (":80", false),
        ] {
            let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
            let wanted = if is_ours { "200" } else { "421" };
            assert_eq!(code(&request, true), wanted, "{host}");
            // Who opens the page to other hosts has names for this one.
            assert_eq!(code(&request, false), "200", "{host}");
        }
    }

    #[test]
    fn malformed_requests_are_answered_or_end_within_bounds() {
        const VALID: [&str; 4] = [
            "GET / HTTP/1.1\r\nHost: localhost:9000\r\nAccept: text/html\r\n\r\n",
            "HEAD /metrics HTTP/1.1\r\nHost: [::1]\r\nX: \u{e9}\r\n\r\n",
            "GET /?a=b HTTP/1.0\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\n\r\nabc",
        ];
        const ODD: [&[u8]; 10] = [
            b"\0",
            b"\r",
            b"\n",
            b"\r\n\r\n",
            b" ",
            b":",
            b"Host: x\r\n",
            b"\xff",
            b"[",
            b"HTTP/9.9",
        ];
        let mut random = seeded::below();
        let mut answered = 0;
        for round in 0..100_000 {
            let mut request = VALID[random(VALID.len())].as_bytes().to_vec();
            for _ in 0..=random(4) {
                let place = random(request.len() + 1);
                let rest = request.split_off(place);
                match random(5) {
                    0 => {}
                    1 => request.extend(rest.iter().skip(1)),
                    2 => request.extend([ODD[random(ODD.len())], &rest].concat()),
                    3 => request.extend([&rest[..], &rest].concat()),
                    _ => request.extend(rest.iter().map(|byte| byte ^ (1 << random(8)))),
                }
            }
            if random(1_000) == 0 {
                let byte = request.last().copied().unwrap_or(b'\n');
                request.resize(2 * MAX_HEAD, byte);
            }
            match respond(&request, 1 + random(200), random(2) == 0) {
                Ok(response) => {
                    answered += 1;
                    assert!(response.starts_with("HTTP/1.1 "), "{round}: {response}");
                    assert!(response.len() < 400, "{round}: {response}");
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{round}");
                    assert!(request.len() < MAX_HEAD, "{round}");
                }
            }
        }
        assert!((50_000..100_000).contains(&answered), "{answered}");
    }

    /// A page on a port of its own, until it is dropped.
    pub struct Served {
        pub listener: Arc<Listener>,
        thread: Option<thread::JoinHandle<()>>,
    }

    impl Served {
        pub fn start(
            limit: Duration,
            route: impl Fn(&str) -> Option<Response> + Send + Sync + 'static,
        ) -> Self {
            let any = Address::new("127.0.0.1", 0);
            let found = Listener::find(
                "--status",
                &any,
                false,
                Instant::now(),
                &mut |_| None,
                &|_| (),
            );
            let stop = Stop::new();
            let listener = Listener::new("--status", found.unwrap(), stop, Phase::Done);
            let listener = Arc::new(listener.unwrap());
            let thread = thread::spawn({
                let listener = listener.clone();
                move || {
                    let workers = Workers::new(|job| panic!("{job}"));
                    serve(
                        &listener,
                        &workers,
                        &Journal::new(1, false, false),
                        limit,
                        route,
                    );
                }
            });
            Self {
                listener,
                thread: Some(thread),
            }
        }

        fn dial(&self) -> TcpStream {
            let socket = TcpStream::connect(self.listener.addr).unwrap();
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
            socket
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            self.listener.take();
            self.thread.take().unwrap().join().unwrap();
        }
    }

    fn read_all(mut socket: &TcpStream) -> String {
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_response_arrives_although_a_body_came_with_the_request() {
        let served = Served::start(DEADLINE, route);
        let mut socket = served.dial();
        let body = "b".repeat(3 * MAX_HEAD);
        let request = format!(
            "POST / HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        socket.write_all(request.as_bytes()).unwrap();
        let response = read_all(&socket);
        assert!(response.starts_with("HTTP/1.1 405 "), "{response}");
    }

    #[test]
    fn a_slow_request_is_cut_off() {
        let limit = Duration::from_millis(300);
        let served = Served::start(limit, route);
        let start = Instant::now();
        let mut socket = served.dial();
        // Every byte in time, but not all of them.
        while start.elapsed() < limit / 2 {
            if socket.write_all(b"G").is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        let mut first = [0; 12];
        socket.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"HTTP/1.1 408");
        assert!(start.elapsed() >= limit);
    }

    #[test]
    fn the_ninth_connection_is_closed_at_once() {
        let served = Served::start(DEADLINE, route);
        let mut eight: Vec<_> = (0..MAX_CONNECTIONS).map(|_| served.dial()).collect();
        // Connections are accepted in their order: the eight have their places.
        let start = Instant::now();
        let closed = served.dial().read(&mut [0]);
        assert!(!closed.is_ok_and(|count| count > 0));
        assert!(start.elapsed() < DEADLINE);
        for socket in &mut eight {
            socket.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
            assert!(read_all(socket).ends_with("it is here\n"));
        }
    }

    #[test]
    fn the_page_ends_with_its_listener() {
        let served = Served::start(LIMIT, route);
        let address = served.listener.addr;
        drop(served);
        // A program that another test starts just now has the listener, too, until it is executed.
        let deadline = Instant::now() + DEADLINE;
        while TcpStream::connect(address).is_ok() {
            assert!(Instant::now() < deadline, "somebody still listens");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
