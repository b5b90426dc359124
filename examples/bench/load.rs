//! The load: what visitors do, and how long each thing takes them.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

use crate::service::{Counts, Work, drain, drain_and_pour, pour};
use crate::stop::{self, rest};
use crate::systems::Fallible;
use crate::tunnel::Tunnel;

/// Not measured: the first moments of a load, in which threads start and windows open.
pub const WARM_UP: Duration = Duration::from_millis(200);

/// How long one thing may take a visitor before it counts as lost.
const DEADLINE: Duration = Duration::from_secs(5);

/// A system that loses more is not worth measuring on.
const MOST_LOST: u64 = 100;

/// Held connections under way at a time: fewer than any listener's backlog.
const HOLD_AT_ONCE: usize = 64;

/// Ports run out for a second at most: so long Linux keeps one that was closed on loopback.
const NO_PORT_PAUSE: Duration = Duration::from_millis(20);

/// Room for this many samples a second, so that none has to wait for memory.
const SAMPLES_PER_SEC: f64 = 200_000.0;

/// What became of a load.
pub struct Tally {
    /// How long each exchange took that ended between these two.
    pub micros: Vec<f64>,
    from: Instant,
    to: Instant,
    /// What failed, or did not end in time.
    pub lost: u64,
    /// How often no port was free for one more connection, and the load had to pause.
    pub no_port: u64,
}

impl Tally {
    /// Of a load that starts now, and is measured for that long.
    fn for_span(span: Duration) -> Self {
        let from = Instant::now() + WARM_UP;
        Self {
            micros: Vec::with_capacity((span.as_secs_f64() * SAMPLES_PER_SEC) as usize),
            from,
            to: from + span,
            lost: 0,
            no_port: 0,
        }
    }

    fn add(&mut self, start: Instant, end: Instant) {
        if (self.from..self.to).contains(&end) {
            self.micros.push((end - start).as_secs_f64() * 1e6);
        }
    }

    /// Notes a failure; fails if it is one too many.
    fn fail(&mut self, error: &io::Error) -> Fallible<()> {
        if error.kind() == ErrorKind::AddrNotAvailable {
            self.no_port += 1;
            return rest(NO_PORT_PAUSE);
        }
        self.lost += 1;
        if self.lost > MOST_LOST {
            return Err(format!("{} exchanges lost, the last: {error}", self.lost).into());
        }
        Ok(())
    }

    fn checked(self) -> Fallible<Self> {
        stop::check()?;
        if self.micros.is_empty() {
            return Err("no exchange ended in time".into());
        }
        Ok(self)
    }

    /// The smallest time that at least so many per cent do not exceed.
    pub fn percentile(&mut self, percent: f64) -> f64 {
        self.micros.sort_by(f64::total_cmp);
        let rank = (self.micros.len() as f64 * percent / 100.0).ceil() as usize;
        self.micros[rank.clamp(1, self.micros.len()) - 1]
    }
}

/// The middle one, or the mean of the two that are.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    f64::midpoint(values[last / 2], values[last.div_ceil(2)])
}

fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpStream::connect_timeout(&addr, DEADLINE)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    socket.set_write_timeout(Some(DEADLINE))?;
    Ok(socket)
}

/// There and back.
fn exchange(mut socket: &TcpStream, message: &mut [u8]) -> io::Result<()> {
    socket.write_all(message)?;
    socket.read_exact(message)
}

/// One message there and back at a time, on one connection.
pub fn ping(addr: SocketAddr, size: usize, span: Duration) -> Fallible<Tally> {
    let socket = connect(addr)?;
    let mut message = vec![Work::EchoAlone.byte(); size];
    let mut tally = Tally::for_span(span);
    let mut start = Instant::now();
    while start < tally.to && !stop::stopped() {
        exchange(&socket, &mut message)?;
        let end = Instant::now();
        tally.add(start, end);
        start = end;
    }
    tally.checked()
}

/// Connect, one message there and back, close; one at a time.
pub fn visit(addr: SocketAddr, size: usize, span: Duration) -> Fallible<Tally> {
    // A thread of the service's for each would cost more than the visit.
    let mut message = vec![Work::Echo.byte(); size];
    let mut tally = Tally::for_span(span);
    let mut start = Instant::now();
    while start < tally.to && !stop::stopped() {
        let visited = connect(addr).and_then(|socket| exchange(&socket, &mut message));
        let end = Instant::now();
        match visited {
            Ok(()) => tally.add(start, end),
            Err(error) => tally.fail(&error)?,
        }
        start = end;
    }
    tally.checked()
}

/// From the dial to the first byte back, of one visitor.
pub fn first_byte(addr: SocketAddr, size: usize) -> io::Result<Duration> {
    let start = Instant::now();
    let mut socket = connect(addr)?;
    socket.write_all(&vec![Work::Echo.byte(); size])?;
    socket.read_exact(&mut [0])?;
    Ok(start.elapsed())
}

/// Opens connections that say nothing, and waits until all have reached the service.
pub fn hold(tunnel: &Tunnel, count: usize) -> Fallible<Vec<TcpStream>> {
    let accepted = &tunnel.service.counts.accepted;
    let before = accepted.load(Ordering::SeqCst);
    let mut held = Vec::with_capacity(count);
    while held.len() < count {
        for _ in held.len()..count.min(held.len() + HOLD_AT_ONCE) {
            let number = held.len();
            let socket = connect(tunnel.public);
            held.push(socket.map_err(|error| format!("connection {number}: {error}"))?);
        }
        let start = Instant::now();
        while accepted.load(Ordering::SeqCst) < before + held.len() {
            if start.elapsed() > DEADLINE {
                let arrived = accepted.load(Ordering::SeqCst) - before;
                let all = held.len();
                return Err(format!("of {all} connections, {arrived} reached the service").into());
            }
            rest(Duration::from_millis(1))?;
        }
    }
    Ok(held)
}

/// Bulk bytes for a while.
pub struct Bulk {
    pub bytes: f64,
    pub secs: f64,
    /// Processor time of the tunnel's processes in that while, if it has any.
    pub cpu: Option<f64>,
}

/// That many connections which do `work`, bytes being counted where they are received.
pub fn bulk(tunnel: &Tunnel, work: Work, connections: usize, span: Duration) -> Fallible<Bulk> {
    let sockets: Result<Vec<_>, _> = (0..connections).map(|_| connect(tunnel.public)).collect();
    let (sockets, counts) = (sockets?, &*tunnel.service.counts);
    for mut socket in &sockets {
        socket.write_all(&[work.byte()])?;
    }
    let ended = AtomicU64::new(0);
    thread::scope(|threads| {
        for socket in &sockets {
            threads.spawn(|| {
                move_bulk(socket, work, counts);
                ended.fetch_add(1, Ordering::SeqCst);
            });
        }
        let bulk = measure_bulk(tunnel, span);
        let early = ended.load(Ordering::SeqCst);
        for socket in &sockets {
            // Ends the threads; if it cannot, the connection has ended already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        match (bulk, early) {
            (Ok(_), 1..) => Err(format!("{early} connections ended early").into()),
            (bulk, _) => bulk,
        }
    })
}

/// The visitor's end of a bulk connection.
fn move_bulk(socket: &TcpStream, work: Work, counts: &Counts) {
    match work {
        Work::Source => drop(drain(socket, counts)),
        Work::Sink => drop(pour(socket)),
        _ => drain_and_pour(socket, counts),
    }
}

fn measure_bulk(tunnel: &Tunnel, span: Duration) -> Fallible<Bulk> {
    let received = &tunnel.service.counts.received;
    rest(WARM_UP)?;
    let (start, cpu, bytes) = (
        Instant::now(),
        tunnel.cpu()?,
        received.load(Ordering::SeqCst),
    );
    rest(span)?;
    let secs = start.elapsed().as_secs_f64();
    let bytes = received.load(Ordering::SeqCst) - bytes;
    if bytes == 0 {
        return Err(format!("not a byte in {span:?}").into());
    }
    let cpu = tunnel.cpu()?.zip(cpu).map(|(end, start)| end - start);
    Ok(Bulk {
        bytes: bytes as f64,
        secs,
        cpu,
    })
}

/// What many connections at once do, all in one thread.
#[derive(Clone, Copy)]
pub struct Crowd {
    pub connections: usize,
    /// Of a message, there and back; a connection has one under way at a time.
    pub size: usize,
    /// A fresh connection for each message: what is timed is dial, exchange, close.
    pub close: bool,
}

impl Crowd {
    pub fn run(self, addr: SocketAddr, span: Duration) -> Fallible<Tally> {
        let mut lanes = Lanes {
            crowd: self,
            addr,
            poll: epoll::create(CreateFlags::CLOEXEC)?,
            lanes: (0..self.connections).map(|_| None).collect(),
            message: vec![Work::Echo.byte(); self.size],
            buffer: vec![0; self.size],
            ending: false,
        };
        let mut tally = Tally::for_span(span);
        let mut events = Vec::with_capacity(self.connections);
        // What is under way at the end may still end well, or be lost.
        while !lanes.have_ended() && !stop::stopped() {
            lanes.ending = Instant::now() >= tally.to;
            lanes.drop_late(&mut tally)?;
            lanes.open_missing(&mut tally)?;
            epoll::wait(&lanes.poll, spare_capacity(&mut events), Some(&TICK))?;
            for event in events.drain(..) {
                let lane = event.data.u64() as usize;
                match lanes.step(lane) {
                    Ok(Some(start)) => tally.add(start, Instant::now()),
                    Ok(None) => {}
                    Err(error) => {
                        lanes.lanes[lane] = None;
                        tally.fail(&error)?;
                    }
                }
            }
        }
        tally.checked()
    }
}

/// How often lanes are looked at that nothing happens on.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// One connection of a crowd, and its exchange under way.
struct Lane {
    socket: TcpStream,
    start: Instant,
    /// Bytes still to come back; none before the message is written.
    due: usize,
}

struct Lanes {
    crowd: Crowd,
    addr: SocketAddr,
    poll: OwnedFd,
    lanes: Vec<Option<Lane>>,
    message: Vec<u8>,
    buffer: Vec<u8>,
    /// Time is up: nothing new begins.
    ending: bool,
}

impl Lanes {
    fn have_ended(&self) -> bool {
        self.ending && self.lanes.iter().all(Option::is_none)
    }

    fn drop_late(&mut self, tally: &mut Tally) -> Fallible<()> {
        let now = Instant::now();
        for lane in &mut self.lanes {
            if lane.take_if(|it| now > it.start + DEADLINE).is_some() {
                tally.fail(&ErrorKind::TimedOut.into())?;
            }
        }
        Ok(())
    }

    fn open_missing(&mut self, tally: &mut Tally) -> Fallible<()> {
        for number in 0..self.lanes.len() {
            if self.lanes[number].is_none() && !self.ending {
                match self.open(number) {
                    Ok(lane) => self.lanes[number] = Some(lane),
                    Err(error) => tally.fail(&error)?,
                }
            }
        }
        Ok(())
    }

    fn open(&self, number: usize) -> io::Result<Lane> {
        let start = Instant::now();
        let socket = Socket::new(Domain::for_address(self.addr), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        if let Err(error) = socket.connect(&self.addr.into())
            && error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error())
        {
            return Err(error);
        }
        let key = EventData::new_u64(number as u64);
        epoll::add(&self.poll, &socket, key, EventFlags::OUT)?;
        Ok(Lane {
            socket: socket.into(),
            start,
            due: 0,
        })
    }

    /// Goes on with a lane that something has happened on; tells when an exchange began that is
    /// done.
    fn step(&mut self, number: usize) -> io::Result<Option<Instant>> {
        let Some(lane) = &mut self.lanes[number] else {
            return Ok(None);
        };
        if lane.due == 0 {
            lane.send(&self.message)?;
            let key = EventData::new_u64(number as u64);
            epoll::modify(&self.poll, &lane.socket, key, EventFlags::IN)?;
            return Ok(None);
        }
        let count = lane.socket.read(&mut self.buffer)?;
        if count == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        lane.due = lane.due.saturating_sub(count);
        if lane.due > 0 {
            return Ok(None);
        }
        let start = lane.start;
        if self.crowd.close || self.ending {
            self.lanes[number] = None;
        } else {
            lane.start = Instant::now();
            lane.send(&self.message)?;
        }
        Ok(Some(start))
    }
}

impl Lane {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        // A buffer with nothing in it takes all of a message.
        self.socket.write_all(message)?;
        self.due = message.len();
        Ok(())
    }
}
