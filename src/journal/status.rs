//! What a running program tells about itself.

use std::fmt;
use std::time::Duration;

/// What a [`Server`](crate::Server) or a [`Client`](crate::Client) does now and has done. It prints as
/// one line of `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// The time since the server or client was made.
    pub uptime: Duration,
    /// The session's name in both logs, if there is a session: the start of its id, or `original`.
    pub session: Option<String>,
    /// The visitors who are joined now.
    pub joined: usize,
    /// The most visitors at a time. On the client, that is as many as it has descriptors for.
    pub max: usize,
    /// The visitors who were ever joined, those of now included.
    pub joined_total: u64,
    /// On the server, the visitors who wait for a tunnel. On the client, the tunnels that are being
    /// dialled.
    pub waiting: usize,
    /// The idle tunnels.
    pub idle: usize,
    /// The bytes that visitors have sent to the local service in all.
    pub bytes_up: u64,
    /// The bytes that the local service has sent to visitors in all.
    pub bytes_down: u64,
    /// On the server, the control links and tunnels that were refused, and the visitors whom the
    /// client could not bring to the local service. On the client, those visitors.
    pub refused: u64,
    /// On the server, the visitors who got no tunnel in time. On the client, those whose local
    /// service did not answer in time.
    pub timed_out: u64,
    /// On the client, the reason why there is no session. None on the server, and while there is a
    /// session. The printed line leaves it out.
    pub last_error: Option<String>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            uptime,
            session,
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
        } = self;
        let (uptime, session) = (uptime.as_secs(), session.as_deref().unwrap_or("none"));
        write!(
            f,
            "uptime={uptime} session={session} joined={joined} max={max} \
             joined_total={joined_total} waiting={waiting} idle={idle} bytes_up={bytes_up} bytes_down={bytes_down} \
             refused={refused} timed_out={timed_out}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_line() {
        let status = Status {
            uptime: Duration::from_millis(61_900),
            session: Some("00112233".to_owned()),
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
        };
        assert_eq!(
            status.to_string(),
            "uptime=61 session=00112233 joined=1 max=9 joined_total=2 waiting=3 idle=4 bytes_up=5 \
             bytes_down=6 refused=7 timed_out=8"
        );
    }
}
