//! The load: what visitors do, and how long each thing takes them.

use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::rows::Sample;
use crate::run::{Fallible, check, rest};
use crate::service::{DOWN, ECHO, UP, stream};
use crate::systems::Tunnel;

/// Not measured: the first moments of a load, in which threads start and windows open.
const WARM_UP: Duration = Duration::from_millis(200);

/// How long one thing may take a visitor.
const DEADLINE: Duration = Duration::from_secs(5);

/// Held connections that are opened at a time: fewer than any listener's backlog.
const HOLD_AT_ONCE: usize = 64;

fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(&addr, DEADLINE)?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// What the exchanges of a crowd tell, each at its place; an exchange is one message there and back.
pub type Tally = [Option<f64>; 4];
pub const PER_SEC: usize = 0;
/// µs that an exchange took; with a fresh connection, from the dial to the close.
pub const MEDIAN: usize = 1;
pub const P99: usize = 2;
/// µs of processor time that the tunnel's processes took for each, if it has any.
pub const CPU_EACH: usize = 3;

/// One visitor, the beginning of its exchange, and the bytes that are still to come back.
struct Lane {
    socket: TcpStream,
    start: Instant,
    due: usize,
}

impl Lane {
    fn begin(mut socket: TcpStream, due: usize, start: Instant) -> io::Result<Self> {
        // A socket with nothing under way takes a whole message at once.
        socket.write_all(&vec![ECHO; due])?;
        Ok(Self { socket, start, due })
    }

    /// Reads what has come; returns true if that was the end of the exchange.
    fn read(&mut self) -> io::Result<bool> {
        let count = self.socket.read(&mut vec![0; self.due])?;
        self.due -= count;
        let ended = (count > 0).then_some(self.due == 0);
        ended.ok_or(ErrorKind::UnexpectedEof.into())
    }
}

/// The bytes of a message, and whether each has a fresh connection.
pub type Message = (usize, bool);

/// That many visitors who exchange one message after the other, all in one thread. Fails if one
/// exchange does.
pub fn crowd(tunnel: &Tunnel, visitors: usize, it: Message, span: Duration) -> Fallible<Tally> {
    let ((message, close), deadline, cpu) = (it, DEADLINE.try_into()?, tunnel.cpu()?);
    let (mut micros, mut exchanges) = (Vec::new(), 0.0);
    let from = Instant::now() + WARM_UP;
    let mut lanes = Vec::new();
    for _ in 0..visitors {
        let socket = connect(tunnel.public)?;
        lanes.push(Lane::begin(socket, message, Instant::now())?);
    }
    while Instant::now() < from + span {
        check()?;
        let polled = lanes
            .iter()
            .map(|lane| PollFd::new(&lane.socket, PollFlags::IN));
        let mut polled: Vec<_> = polled.collect();
        if poll(&mut polled, Some(&deadline))? == 0 {
            return Err(format!("nothing came back in {DEADLINE:?}").into());
        }
        let ready: Vec<_> = polled.iter().map(|it| !it.revents().is_empty()).collect();
        for (mut lane, ready) in mem::take(&mut lanes).into_iter().zip(ready) {
            if ready && lane.read()? {
                let kept = (!close).then_some(lane.socket);
                let end = Instant::now();
                exchanges += 1.0;
                if end >= from {
                    micros.push((end - lane.start).as_secs_f64() * 1e6);
                }
                let socket = kept.map_or_else(|| connect(tunnel.public), Ok)?;
                lane = Lane::begin(socket, message, end)?;
            }
            lanes.push(lane);
        }
    }
    // What is under way has to end, too.
    for lane in &mut lanes {
        lane.socket.set_read_timeout(Some(DEADLINE))?;
        while !lane.read()? {}
    }
    if micros.is_empty() {
        return Err("no exchange ended in time".into());
    }
    micros.sort_by(f64::total_cmp);
    // The smallest time that at least so many hundredths do not exceed.
    let percentile = |of: usize| Some(micros[(micros.len() * of).div_ceil(100) - 1]);
    let per_sec = micros.len() as f64 / span.as_secs_f64();
    let used = tunnel.cpu()?.zip(cpu);
    let cpu = used.map(|(after, before)| (after - before) * 1e6 / exchanges);
    Ok([Some(per_sec), percentile(50), percentile(99), cpu])
}

/// The time of one visitor from the dial to the first byte back.
pub fn first_byte(addr: SocketAddr) -> io::Result<Duration> {
    let start = Instant::now();
    let mut socket = connect(addr)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.write_all(&[ECHO])?;
    socket.read_exact(&mut [0])?;
    Ok(start.elapsed())
}

/// Opens connections that say nothing, and waits until all have reached the service.
pub fn hold(tunnel: &Tunnel, count: usize) -> Fallible<Vec<TcpStream>> {
    let accepted = || tunnel.counts.accepted.load(Ordering::SeqCst);
    let before = accepted();
    let mut held = Vec::with_capacity(count);
    for number in 1..=count {
        let socket = connect(tunnel.public);
        held.push(socket.map_err(|error| format!("connection {number}: {error}"))?);
        let under_way = if number < count { HOLD_AT_ONCE } else { 0 };
        let start = Instant::now();
        while accepted() - before + under_way < number {
            if start.elapsed() > DEADLINE {
                let arrived = accepted() - before;
                return Err(format!("of {number} connections, {arrived} got through").into());
            }
            rest(Duration::from_millis(1))?;
        }
    }
    Ok(held)
}

/// That many visitors who move bulk bytes at once: Gbit/s, counted where they are received, and
/// seconds of processor time that the tunnel's processes took a GB, if it has any.
pub fn bulk(tunnel: &Tunnel, work: u8, visitors: usize, span: Duration) -> Fallible<Sample> {
    let mut sockets = Vec::new();
    for _ in 0..visitors {
        let mut socket = connect(tunnel.public)?;
        socket.write_all(&[work])?;
        sockets.push(socket);
    }
    thread::scope(|threads| {
        for socket in &sockets {
            threads.spawn(|| stream(socket, &tunnel.counts, work != DOWN, work != UP));
        }
        let (bulk, mut early) = (measure_bulk(tunnel, span), false);
        // Ends the threads. Only what has ended already cannot be shut down.
        for socket in &sockets {
            early |= socket.shutdown(Shutdown::Both).is_err();
        }
        if early {
            return Err("a connection ended early".into());
        }
        bulk
    })
}

fn measure_bulk(tunnel: &Tunnel, span: Duration) -> Fallible<Sample> {
    let received = || tunnel.counts.received.load(Ordering::SeqCst);
    rest(WARM_UP)?;
    let (start, cpu, bytes) = (Instant::now(), tunnel.cpu()?, received());
    rest(span)?;
    let gigabytes = (received() - bytes) as f64 / 1e9;
    let gbit_per_sec = gigabytes * 8.0 / start.elapsed().as_secs_f64();
    if gigabytes == 0.0 {
        return Err(format!("not a byte in {span:?}").into());
    }
    let used = tunnel.cpu()?.zip(cpu);
    let cpu = used.map(|(after, before)| (after - before) / gigabytes);
    Ok(vec![Some(gbit_per_sec), cpu])
}
