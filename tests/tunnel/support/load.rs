//! Visitors that come again and again while something happens to the programs.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::{DEADLINE, assert_echo, assert_ended};

/// How a visit of several messages went.
enum Visit {
    Whole,
    /// The visit ended before the first answer.
    Refused,
}

fn visit(public: SocketAddr, messages: usize) -> Visit {
    let begin = || {
        let mut visitor = TcpStream::connect(public)?;
        visitor.set_read_timeout(Some(DEADLINE))?;
        visitor.write_all(b"first")?;
        visitor.read_exact(&mut [0; 5])?;
        std::io::Result::Ok(visitor)
    };
    let Ok(visitor) = begin() else {
        return Visit::Refused;
    };
    for message in 0..messages {
        assert_echo(&visitor, &format!("message {message}"));
    }
    visitor.shutdown(Shutdown::Write).unwrap();
    assert_ended(&visitor);
    Visit::Whole
}

/// Lets eight visitors come again and again while `meanwhile` goes on, each with a first message
/// and so many more. Returns how many visits were whole, and how many refused.
pub fn under_load(
    public: SocketAddr,
    messages: usize,
    meanwhile: impl FnOnce(&AtomicUsize),
) -> [usize; 2] {
    let (over, began) = (AtomicBool::new(false), Instant::now());
    let counts = [AtomicUsize::new(0), AtomicUsize::new(0)];
    thread::scope(|scope| {
        for number in 0..8 {
            let (over, counts) = (&over, &counts);
            scope.spawn(move || {
                // Each visitor is at another place of its visit, even if all visits take as long.
                thread::sleep(number * Duration::from_millis(100));
                // The visitors end, too, if the test has failed.
                while !over.load(Ordering::SeqCst) && began.elapsed() < DEADLINE {
                    counts[visit(public, messages) as usize].fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        meanwhile(&counts[Visit::Whole as usize]);
        over.store(true, Ordering::SeqCst);
    });
    counts.map(AtomicUsize::into_inner)
}
