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

/// A visit that was made while something happened.
pub struct Made {
    pub began: Instant,
    pub ended: Instant,
    /// Why it was not whole.
    pub failed: Option<std::io::Error>,
}

/// Lets sixteen visitors come again and again for this time, with a short pause, while `meanwhile` goes
/// on. A visitor says something, gets it back, ends, and gets the end.
pub fn sixteen_at_a_time(
    address: SocketAddr,
    time: Duration,
    meanwhile: impl FnOnce(),
) -> Vec<Made> {
    let start = Instant::now();
    let visit = |text: &str| {
        let mut visitor = TcpStream::connect_timeout(&address, DEADLINE)?;
        visitor.set_read_timeout(Some(DEADLINE))?;
        visitor.write_all(text.as_bytes())?;
        visitor.shutdown(Shutdown::Write)?;
        let mut back = String::new();
        visitor.read_to_string(&mut back)?;
        match back == text {
            true => Ok(()),
            false => Err(std::io::Error::other(format!("{back:?} came back"))),
        }
    };
    let visits = |visitor: usize| {
        let mut made = Vec::new();
        while start.elapsed() < time {
            let began = Instant::now();
            let failed = visit(&format!("{visitor}: {}", made.len())).err();
            let ended = Instant::now();
            made.push(Made {
                began,
                ended,
                failed,
            });
            thread::sleep(Duration::from_millis(5));
        }
        made
    };
    thread::scope(|scope| {
        let visits = &visits;
        let visitors: Vec<_> = (0..16).map(|it| scope.spawn(move || visits(it))).collect();
        meanwhile();
        let made = visitors.into_iter().map(|it| it.join().unwrap());
        made.flatten().collect()
    })
}

/// Asserts that no visit failed but those that were under way at this moment, and that others followed.
pub fn assert_whole_after(made: &[Made], moment: Instant) {
    let later = || made.iter().filter(|it| it.began >= moment);
    let failed: Vec<_> = later().filter_map(|it| it.failed.as_ref()).collect();
    assert!(
        failed.is_empty(),
        "{} of {}: {failed:?}",
        failed.len(),
        later().count()
    );
    assert!(
        later().count() > 16,
        "{} visits afterwards",
        later().count()
    );
}

/// Asserts that every visit was whole.
pub fn assert_whole(made: &[Made]) {
    let failed = made.iter().filter_map(|it| it.failed.as_ref());
    let failed: Vec<_> = failed.collect();
    assert!(
        failed.is_empty(),
        "{} of {}: {failed:?}",
        failed.len(),
        made.len()
    );
}
