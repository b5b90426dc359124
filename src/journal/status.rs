//! What a running program tells about itself.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use crate::service::Service;

/// What a [`Server`](crate::Server) or a [`Client`](crate::Client) does now and has done. It prints as
/// one line of `key=value`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The time since the server or client was made.
    pub uptime: Duration,
    /// The names of the live sessions in both logs: the start of a session's id, or `original`.
    pub sessions: Vec<String>,
    /// The visitors who are joined now.
    pub joined: usize,
    /// The most visitors at a time. On the client, that is as many as it has descriptors for.
    pub max: usize,
    /// The visitors who were ever joined, those of now included.
    pub joined_total: u64,
    /// On the server, the visitors who wait for a tunnel, whose client has still to say whether it
    /// reached its local service, or whose proxy has still to say where they come from. On the client,
    /// the tunnels that are being dialled.
    pub waiting: usize,
    /// The idle tunnels.
    pub idle: usize,
    /// The bytes that visitors have sent to the local service in all.
    pub bytes_up: u64,
    /// The bytes that the local service has sent to visitors in all.
    pub bytes_down: u64,
    /// On the server, the control links, tunnels and visitors that were refused, and the visitors whom
    /// the client could not bring to the local service. On the client, those visitors. On both, also
    /// visitors for whom there was no thread.
    pub refused: u64,
    /// On the server, the visitors who got no tunnel in time. On the client, those whose local
    /// service did not answer in time.
    pub timed_out: u64,
    /// On the client, the reason why there is no session with the server that was lost last. None on the
    /// server, and while there is a session with each. The printed line leaves it out.
    pub last_error: Option<String>,
    /// The same for each service. The printed line shows it for those that have a name.
    pub services: BTreeMap<Service, ServiceStatus>,
}

/// What a server or a client does now and has done for the visitors of one service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServiceStatus {
    /// The visitors who are joined now.
    pub joined: usize,
    /// The visitors who were ever joined, those of now included.
    pub joined_total: u64,
    /// On the server, the visitors who wait. The client does not know.
    pub waiting: usize,
    /// The bytes that visitors have sent to the local service in all.
    pub bytes_up: u64,
    /// The bytes that the local service has sent to visitors in all.
    pub bytes_down: u64,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            uptime,
            sessions,
            joined,
            max,
            joined_total,
            waiting,
            idle,
            bytes_up,
            bytes_down,
            refused,
            timed_out,
            last_error: _,
            services,
        } = self;
        let (uptime, session) = (uptime.as_secs(), sessions.join(","));
        let session = if session.is_empty() { "none" } else { &session };
        write!(
            f,
            "uptime={uptime} session={session} joined={joined} max={max} \
             joined_total={joined_total} waiting={waiting} idle={idle} bytes_up={bytes_up} bytes_down={bytes_down} \
             refused={refused} timed_out={timed_out}"
        )?;
        for (service, status) in services.iter().filter(|(service, _)| service.has_name()) {
            let ServiceStatus {
                joined,
                joined_total,
                waiting,
                bytes_up,
                bytes_down,
            } = status;
            write!(
                f,
                " {service}.joined={joined} {service}.joined_total={joined_total} \
                 {service}.waiting={waiting} {service}.bytes_up={bytes_up} \
                 {service}.bytes_down={bytes_down}"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_line() {
        let mut status = Status {
            uptime: Duration::from_millis(61_900),
            sessions: vec!["00112233".to_owned()],
            joined: 1,
            max: 9,
            joined_total: 2,
            waiting: 3,
            idle: 4,
            bytes_up: 5,
            bytes_down: 6,
            refused: 7,
            timed_out: 8,
            last_error: None,
            services: [(Service::default(), ServiceStatus::default())].into(),
        };
        let line = "uptime=61 session=00112233 joined=1 max=9 joined_total=2 waiting=3 idle=4 \
                    bytes_up=5 bytes_down=6 refused=7 timed_out=8";
        assert_eq!(status.to_string(), line);
        status.sessions.push("44556677".to_owned());
        let web = ServiceStatus {
            joined: 1,
            joined_total: 2,
            waiting: 3,
            bytes_up: 4,
            bytes_down: 5,
        };
        status.services.insert("web".parse().unwrap(), web);
        let line = line.replace("session=00112233", "session=00112233,44556677");
        assert_eq!(
            status.to_string(),
            line + " web.joined=1 web.joined_total=2 web.waiting=3 web.bytes_up=4 web.bytes_down=5"
        );
    }
}
