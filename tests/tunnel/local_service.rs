//! Local services that do not do what they should, and connections that end in every way at once.
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use crate::support::programs::Both;
use crate::support::{
    DEADLINE, Protection, Service, accept, assert_reset, echo, plain_and_sealed, reset_on_close,
};

plain_and_sealed! {
    a_service_that_lets_dials_hang_holds_up_nobody_else,
    a_service_that_says_nothing_holds_up_nobody_else,
    a_thousand_resets_and_ends_leave_nothing,
}

/// A reset that is not passed on is never seen.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A visitor takes no longer beside others that wait, even on a busy machine. Those others wait for
/// 5 s or more.
const BESIDE: Duration = Duration::from_secs(3);

/// A service that takes connections only when told to, and no more than one before that.
struct Reluctant {
    listener: TcpListener,
    addr: SocketAddr,
}

impl Reluctant {
    fn new() -> Self {
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&any.into()).unwrap();
        socket.listen(0).unwrap();
        let listener = TcpListener::from(socket);
        let addr = listener.local_addr().unwrap();
        Self { listener, addr }
    }

    /// Lets nobody in any more: a dial gets no answer at all from now on.
    fn fill(&self) -> Vec<TcpStream> {
        let dial = |_| TcpStream::connect_timeout(&self.addr, Duration::from_millis(500)).ok();
        (0..10).map_while(dial).collect()
    }
}

fn a_service_that_lets_dials_hang_holds_up_nobody_else(protection: Protection) {
    const VISITORS: usize = 20;
    let service = Reluctant::new();
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let joined = both.visit();
    let served = accept(&service.listener);
    let filling = service.fill();
    assert!(filling.len() < 10, "the listener takes all");
    let (over, start) = (AtomicBool::new(false), Instant::now());
    let visitors: Vec<_> = (0..VISITORS).map(|_| both.visit()).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) && start.elapsed() < DEADLINE {
                let before = Instant::now();
                assert_passes(&joined, &served);
                assert!(before.elapsed() < BESIDE, "others wait");
                thread::sleep(Duration::from_millis(10));
            }
        });
        for visitor in &visitors {
            assert_reset(visitor, DEADLINE);
            let dial_timeout = Duration::from_millis(4500)..Duration::from_secs(10);
            assert!(
                dial_timeout.contains(&start.elapsed()),
                "{:?}",
                start.elapsed()
            );
        }
        over.store(true, Ordering::SeqCst);
    });
    let line = both.client.wait_for_line("cannot reach the local service");
    assert!(line.contains("timed out"), "{line}");
    // The service takes dials again.
    for _ in 0..filling.len() {
        accept(&service.listener);
    }
    drop((filling, joined, served));
    both.assert_recovered(|mut visitor| {
        let mut served = accept(&service.listener);
        served.write_all(b"welcome").unwrap();
        visitor.read_exact(&mut [0; 7]).unwrap();
    });
}

fn a_service_that_says_nothing_holds_up_nobody_else(protection: Protection) {
    let (sender, silent) = mpsc::channel();
    let service = Service::start(move |mut socket| {
        let mut first = [0; 1];
        if socket.peek(&mut first).is_ok_and(|count| count == 0) || &first == b"?" {
            return sender.send(socket).unwrap();
        }
        let mut hello = [0; 5];
        socket.read_exact(&mut hello).unwrap();
        socket.write_all(&hello).unwrap();
    });
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let waiting: Vec<_> = (0..20).map(|_| both.visit()).collect();
    for mut visitor in &waiting {
        visitor.write_all(b"?").unwrap();
    }
    let silent: Vec<_> = waiting
        .iter()
        .map(|_| silent.recv_timeout(DEADLINE).unwrap())
        .collect();
    let start = Instant::now();
    // This is longer than any deadline of a handshake or a dial.
    while start.elapsed() < Duration::from_secs(7) {
        let before = Instant::now();
        echo(&both.visit());
        assert!(before.elapsed() < BESIDE, "others wait");
        thread::sleep(Duration::from_millis(100));
    }
    for mut socket in &silent {
        socket.write_all(b"at last").unwrap();
    }
    for mut visitor in &waiting {
        visitor.read_exact(&mut [0; 7]).unwrap();
    }
    drop((waiting, silent));
    both.assert_recovered(echo);
}

fn a_thousand_resets_and_ends_leave_nothing(protection: Protection) {
    let (sender, sockets) = mpsc::channel();
    let service = Service::start(move |socket| sender.send(socket).unwrap());
    let both = Both::start(protection, service.addr, [&[], &[]]);
    let served = || sockets.recv_timeout(DEADLINE).unwrap();
    for round in 0..1000 {
        let visitor = both.visit();
        let served = served();
        assert_passes(&visitor, &served);
        end_somehow(round, visitor, served);
    }
    both.assert_recovered(|visitor| assert_passes(visitor, &served()));
}

fn assert_passes(mut visitor: &TcpStream, mut served: &TcpStream) {
    visitor.write_all(b"hello").unwrap();
    served.read_exact(&mut [0; 5]).unwrap();
}

/// Bulk is under way down, and then one end or both of them end or reset.
fn end_somehow(round: usize, visitor: TcpStream, served: TcpStream) {
    (&served).write_all(&[7; 10_000]).unwrap();
    match round % 6 {
        0 => {
            reset(visitor);
            assert_reset(&served, AT_ONCE);
        }
        1 => {
            reset(served);
            assert_reset(&visitor, AT_ONCE);
        }
        // The service sees the end or the reset, whichever comes first.
        2 => {
            visitor.shutdown(Shutdown::Write).unwrap();
            reset(visitor);
            assert_over(&served);
        }
        3 => {
            visitor.shutdown(Shutdown::Write).unwrap();
            reset(served);
            assert_reset(&visitor, AT_ONCE);
        }
        4 => {
            served.shutdown(Shutdown::Write).unwrap();
            reset(visitor);
            assert_over(&served);
        }
        _ => {
            reset(visitor);
            reset(served);
        }
    }
}

fn reset(socket: TcpStream) {
    reset_on_close(&socket);
}

/// Asserts that an end or a reset comes soon, and nothing before it. If nothing else tells the
/// program, its look at all pairs every second does.
fn assert_over(mut socket: &TcpStream) {
    let start = Instant::now();
    let end = socket.read(&mut [0]);
    assert!(!matches!(end, Ok(1..)), "{end:?}");
    assert!(start.elapsed() < 2 * AT_ONCE, "{:?}", start.elapsed());
}
