//! `--check`: goes through all that a client needs, step by step, and says what to do about what fails.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::address::Address;
use crate::door::{Answered, NoSession, no_server, open_link, seal_tunnel};
use crate::options::ClientOptions;
use crate::os::net;
use crate::session::Proto;
use crate::wire::conn::Conn;
use crate::wire::control::{Lines, send};
use crate::wire::line::{Line, Reason};

/// A server that refuses a tunnel does so at once. Its answer gets this long besides the time of a dial.
const REFUSAL: Duration = Duration::from_millis(300);

/// What one step has come to.
pub struct Step {
    time: Duration,
    what: String,
    result: Result<String, String>,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mark, said) = match &self.result {
            Ok(said) => ("ok    ", said),
            Err(why) => ("FAILED", why),
        };
        let millis = self.time.as_secs_f64() * 1e3;
        write!(f, "{mark} {millis:7.1} ms  {}: {said}", self.what)
    }
}

/// Goes through all steps, and tells each. Returns true if none has failed.
pub fn check(options: &ClientOptions, tell: impl FnMut(&Step)) -> bool {
    let mut check = Check {
        tell,
        failed: false,
    };
    for server in &options.servers {
        check.server(server, options);
    }
    for (service, local) in &options.local {
        let what = format!("local service{} {local}", service.behind(" "));
        check.step(what, || match net::dial(local, false) {
            Ok(_) => Ok(("it takes connections".to_owned(), ())),
            Err(error) => Err(format!("{}: {error}", at_service(&error))),
        });
    }
    !check.failed
}

struct Check<T> {
    tell: T,
    failed: bool,
}

impl<T: FnMut(&Step)> Check<T> {
    /// Does one step. Returns what the next one needs, if it has not failed.
    fn step<N>(
        &mut self,
        what: String,
        work: impl FnOnce() -> Result<(String, N), String>,
    ) -> Option<N> {
        let start = Instant::now();
        let done = work();
        let time = start.elapsed();
        let (result, next) = match done {
            Ok((said, next)) => (Ok(said), Some(next)),
            Err(why) => (Err(why), None),
        };
        self.failed |= next.is_none();
        (self.tell)(&Step { time, what, result });
        next
    }

    /// All that a session with this server needs, and the ports for its visitors.
    fn server(&mut self, server: &Address, options: &ClientOptions) -> Option<()> {
        self.step(format!("name {}", server.host), || {
            let found = server.resolve().map_err(|error| {
                format!("{error}: check how it is spelled, and the name service of this host")
            })?;
            let found: Vec<_> = found.iter().map(|it| it.ip().to_string()).collect();
            Ok((found.join(", "), ()))
        })?;
        let control = self.step(format!("control port {server}"), || {
            let control = net::dial(server, false).map_err(|error| at_server(&error))?;
            let peer = control.peer_addr().map_err(|error| error.to_string())?;
            Ok((format!("{peer} answers"), (control, peer)))
        })?;
        let (control, peer) = control;
        let mut link = self.step(format!("hello of {server}"), || {
            let conn = Conn::new(Arc::new(control));
            let link = open_link(conn, options).map_err(|why| why.to_string())?;
            let sealed = match link.bond {
                Some(_) => ", sealed with the key",
                None => ", without a key",
            };
            Ok((format!("{}{sealed}", link.proto), link))
        })?;
        let tunnel = link.tunnel_port(options.tunnel_port).map(|port| {
            let mut tunnel = peer;
            tunnel.set_port(port);
            tunnel
        });
        let what = match &tunnel {
            Ok(tunnel) => format!("tunnel port {tunnel}"),
            Err(_) => format!("tunnel port of {server}"),
        };
        self.step(what, || {
            try_tunnel(tunnel.map_err(|why| why.to_string())?, &link)?;
            Ok(("it takes tunnels".to_owned(), ()))
        });
        for service in options.local.keys() {
            let what = format!("visitors{} at {}", service.behind(" "), server.host);
            self.step(what, || match link.offers.get(service) {
                Some(Some(port)) => {
                    let public = Address::new(&server.host, *port);
                    Ok((format!("they come to {public}"), ()))
                }
                Some(None) => Ok(("the server does not tell where they come to".to_owned(), ())),
                None => Err(format!(
                    "the server has no port for them (--public {}PORT of tpserver)",
                    service.option()
                )),
            });
        }
        let reason = Reason::Draining;
        let _ = send(&mut link.writer, &Line::Bye { reason });
        Some(())
    }
}

/// Opens one tunnel of a session, as the client does.
fn try_tunnel(addr: SocketAddr, link: &Answered) -> Result<(), String> {
    let start = Instant::now();
    let socket: TcpStream = net::dial_one(addr, false).map_err(|error| at_server(&error))?;
    let patience = REFUSAL + 2 * start.elapsed();
    let mut conn = Conn::new(Arc::new(socket));
    let Proto::Tp2 { id, .. } = link.proto else {
        return Ok(());
    };
    let failed = |why: NoSession| why.to_string();
    if let Some(bond) = &link.bond {
        seal_tunnel(&mut conn, bond).map_err(failed)?;
    }
    conn.begin_frames();
    let named = send(&mut conn.writer, &Line::Tunnel { session: id });
    named.map_err(|error| failed(error.into()))?;
    let mut lines = Lines::new(conn.reader);
    match lines.next_line_by(Instant::now() + patience) {
        // A visitor has come just now, and is asked to try again.
        Ok(Line::New(_)) => Ok(()),
        Err(error) if net::timed_out(&error) => Ok(()),
        other => Err(failed(no_server(other, &lines))),
    }
}

/// What a failed dial of the server means.
fn at_server(error: &io::Error) -> String {
    use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable};
    let hint = match error.kind() {
        ConnectionRefused => {
            "nobody listens there: is tpserver running, with --bind ::, and is the port right?"
        }
        HostUnreachable | NetworkUnreachable => "there is no way to that host from here",
        _ if net::timed_out(error) => {
            "no answer, as behind a firewall that drops packets: let it admit this port"
        }
        _ => "the dial failed",
    };
    format!("{hint} ({error})")
}

/// What a failed dial of a local service means.
fn at_service(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            "nobody listens there: start the service, or correct --local"
        }
        io::ErrorKind::NotFound => "the host has no address: correct --local",
        _ if net::timed_out(error) => {
            "no answer: is its host up, and does a firewall admit this one?"
        }
        _ => "the dial failed: correct --local",
    }
}
