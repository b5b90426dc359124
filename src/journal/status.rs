//! What a running program tells about itself.

use std::fmt;
use std::time::Duration;

/// What a [`Server`](crate::Server) or a [`Client`](crate::Client) does now, and has done. Prints as
/// one line of `key=value`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// Since it was made.
    pub uptime: Duration,
    /// What both logs call the session, if there is one: the start of its id, or `original`.
    pub session: Option<String>,
    /// Visitors that are joined now.
    pub joined: usize,
    /// Visitors that there may be at a time. On the client, more have no descriptors.
    pub max: usize,
    /// Visitors that were joined, those of now included.
    pub joined_total: u64,
    /// On the server: visitors that wait for a tunnel. On the client: tunnels that are being
    /// dialled.
    pub waiting: usize,
    /// Idle tunnels.
    pub idle: usize,
    /// What visitors sent to the local service in all, in bytes.
    pub bytes_up: u64,
    /// What the local service sent to visitors in all, in bytes.
    pub bytes_down: u64,
    /// On the server: control links and tunnels that were refused. On the client: visitors whose
    /// local service could not be reached.
    pub refused: u64,
    /// On the server: visitors that got no tunnel in time. On the client: visitors whose local
    /// service did not answer in time.
    pub timed_out: u64,
    /// On the client: why there is no session, or none was lately. None on the server, and as soon as
    /// there is one. Not in the line.
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
