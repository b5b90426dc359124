//! Visits, ends, resets, and stops of either half in any order: whatever comes next is drawn, and no byte of
//! a visitor ever reaches another.
//!
//! `TP_SOAK_SEED` repeats a draw; threads are as they are, so that a repeated one need not end the same.
#![cfg(target_os = "linux")]

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tunnel_proxy::{Address, ServerOptions};

use crate::support::random::Random;
use crate::support::visits::seconds_and_seed;
use crate::support::{
    DEADLINE, Protection, RunningClient, RunningServer, client_options, eventually, pattern,
    plain_and_sealed, reset_on_close, server_options, unnamed, with,
};

plain_and_sealed! {
    no_byte_of_a_visitor_reaches_another,
}

const STEPS: usize = 12_000;

/// Visits at a time.
const MOST: usize = 8;

/// What a visitor sends first: its number, by which the service knows it.
const NUMBER: usize = 8;

/// A half that is replaced has this long for its visitors.
const DRAIN: Duration = Duration::from_secs(60);

fn no_byte_of_a_visitor_reaches_another(protection: Protection) {
    let (_, seed) = seconds_and_seed();
    // No other test uses this address, whose connections might take a port of the server's.
    let any = match protection {
        Protection::Plain => Address::new("127.0.76.61", 0),
        Protection::Sealed => Address::new("127.0.76.62", 0),
    };
    let mut world = World::new(protection, any, seed);
    for _ in 0..STEPS {
        world.step();
    }
    world.finish();
    eprintln!(
        "{} visits whole, {} cut, {} halves replaced",
        world.whole, world.cut, world.replaced
    );
    assert!(world.whole > STEPS / 400 && world.cut > 0 && world.replaced > 0);
}

/// What one end of a visit has sent the other.
struct Stream {
    bytes: Vec<u8>,
    sent: usize,
    got: usize,
    has_ended: bool,
    /// The other end has seen that.
    end_came: bool,
}

impl Stream {
    fn new(seed: u64, size: usize) -> Self {
        Self {
            bytes: pattern(seed, size),
            sent: 0,
            got: 0,
            has_ended: false,
            end_came: false,
        }
    }

    /// Sends at most so many bytes.
    fn send(&mut self, mut from: &TcpStream, most: usize) -> io::Result<()> {
        let end = self.bytes.len().min(self.sent + most);
        if !self.has_ended && self.sent < end {
            self.sent += if_any(from.write(&self.bytes[self.sent..end]))?.unwrap_or(0);
        }
        Ok(())
    }

    fn end(&mut self, from: &TcpStream) -> io::Result<()> {
        if !self.has_ended && self.sent == self.bytes.len() {
            from.shutdown(Shutdown::Write)?;
            self.has_ended = true;
        }
        Ok(())
    }

    /// Takes what has come, at most so much of it, and compares it.
    fn receive(&mut self, mut to: &TcpStream, most: usize, who: &str) -> io::Result<()> {
        let mut buffer = vec![0; most];
        match if_any(to.read(&mut buffer))? {
            None => {}
            Some(0) if self.end_came => {}
            Some(0) => {
                let (sent, got) = (self.bytes.len(), self.got);
                assert!(
                    self.has_ended && got == sent,
                    "{who}: cut at {got} of {sent}"
                );
                self.end_came = true;
            }
            Some(count) => {
                let wanted = self.bytes[..self.sent].get(self.got..self.got + count);
                assert!(wanted == Some(&buffer[..count]), "{who}: other bytes");
                self.got += count;
            }
        }
        Ok(())
    }
}

/// Returns None if there is nothing to read, or no room to write.
fn if_any(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.kind() == ErrorKind::Interrupted => Ok(None),
        result => result.map(Some),
    }
}

struct Visit {
    visitor: TcpStream,
    /// None before the visitor's number has come there.
    service: Option<TcpStream>,
    up: Stream,
    down: Stream,
    /// The half that it went through was told to cut off its visitors.
    may_fail: bool,
}

impl Visit {
    /// Does what was drawn.
    fn step(&mut self, draw: usize, most: usize, who: &str) -> io::Result<()> {
        match (draw, &self.service) {
            (0, _) => self.up.send(&self.visitor, most),
            (1, _) => self.up.end(&self.visitor),
            (2, _) => self.down.receive(&self.visitor, most, who),
            (3, Some(service)) => self.down.send(service, most),
            (4, Some(service)) => self.down.end(service),
            (5, Some(service)) => self.up.receive(service, most, who),
            _ => Ok(()),
        }
    }

    fn is_whole(&self) -> bool {
        self.up.end_came && self.down.end_came
    }
}

struct World {
    random: Random,
    listener: TcpListener,
    options: ServerOptions,
    server: RunningServer,
    client: RunningClient,
    /// Those that have been replaced, and may still have visitors.
    servers: Vec<RunningServer>,
    clients: Vec<RunningClient>,
    visits: BTreeMap<u64, Visit>,
    /// What has come to the service, with as much of its visitor's number as is there.
    unknown: Vec<(TcpStream, Vec<u8>)>,
    next: u64,
    whole: usize,
    cut: usize,
    replaced: usize,
}

impl World {
    fn new(protection: Protection, any: Address, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut options = with!(server_options(protection);
                public: unnamed(any.clone()),
                tunnel: any.clone(),
                control: any,
                port_patience: DEADLINE,
                pair_timeout: DEADLINE,
                clients: 1 + seed as usize % 2,
        );
        let server = RunningServer::start(options.clone());
        options.public = unnamed(server.public);
        options.tunnel = server.tunnel.into();
        options.control = server.control.into();
        let local = listener.local_addr().unwrap();
        Self {
            client: RunningClient::start(client_options(&server, local)),
            random: Random::new(seed),
            listener,
            options,
            server,
            servers: Vec::new(),
            clients: Vec::new(),
            visits: BTreeMap::new(),
            unknown: Vec::new(),
            next: 0,
            whole: 0,
            cut: 0,
            replaced: 0,
        }
    }

    fn step(&mut self) {
        self.hear_numbers();
        match self.random.below(1000) {
            0 | 1 => self.replace_client(DRAIN),
            2 => self.replace_client(Duration::ZERO),
            3 => self.replace_server(),
            4..12 => self.reset(),
            12..80 if self.visits.len() < MOST => self.begin(),
            // The programs get on meanwhile.
            80..160 => thread::sleep(Duration::from_micros(300)),
            _ => self.go_on(),
        }
    }

    fn begin(&mut self) {
        let mut size = || {
            let most = 1 << self.random.below(18);
            self.random.below(most)
        };
        let (up, down, number) = (size(), size(), self.next);
        self.next += 1;
        let mut visitor = self.server.visit();
        visitor.write_all(&number.to_le_bytes()).unwrap();
        visitor.set_nonblocking(true).unwrap();
        let visit = Visit {
            visitor,
            service: None,
            up: Stream::new(2 * number + 1, up),
            down: Stream::new(2 * number + 2, down),
            may_fail: false,
        };
        self.visits.insert(number, visit);
    }

    fn any_visit(&mut self) -> Option<u64> {
        let place = self.random.below(self.visits.len().max(1));
        self.visits.keys().nth(place).copied()
    }

    /// One end of one visit sends, ends or receives.
    fn go_on(&mut self) {
        let Some(number) = self.any_visit() else {
            return;
        };
        let (draw, most) = (self.random.below(6), 1 + self.random.below(40_000));
        self.with_visit(number, |visit, who| visit.step(draw, most, who));
    }

    /// Does something with a visit, and lets it go once it is whole or was cut as it may be.
    fn with_visit(&mut self, number: u64, work: impl FnOnce(&mut Visit, &str) -> io::Result<()>) {
        let visit = self.visits.get_mut(&number).unwrap();
        let done = work(visit, &format!("visit {number}"));
        let (is_whole, may_fail) = (visit.is_whole(), visit.may_fail);
        match done {
            Ok(()) if !is_whole => return,
            Ok(()) => self.whole += 1,
            Err(error) if may_fail => {
                let kinds = [
                    ErrorKind::ConnectionReset,
                    ErrorKind::BrokenPipe,
                    ErrorKind::NotConnected,
                ];
                assert!(kinds.contains(&error.kind()), "visit {number}: {error}");
                self.cut += 1;
            }
            Err(error) => panic!("visit {number}: {error}"),
        }
        self.visits.remove(&number);
    }

    /// One end of a visit resets it, and the other one sees that, whatever else it sees before.
    fn reset(&mut self) {
        let Some(number) = self.any_visit() else {
            return;
        };
        let mut visit = self.visits.remove(&number).unwrap();
        let who = format!("visit {number}, whose other end has reset it");
        let Some(service) = visit.service.take() else {
            // It may come to the service yet, as one that nobody knows.
            return reset_on_close(&visit.visitor);
        };
        let (gone, left, stream) = match self.random.below(2) {
            0 => (visit.visitor, service, &mut visit.up),
            _ => (service, visit.visitor, &mut visit.down),
        };
        reset_on_close(&gone);
        drop(gone);
        left.set_nonblocking(false).unwrap();
        left.set_read_timeout(Some(DEADLINE)).unwrap();
        let error = loop {
            match stream.receive(&left, 64 * 1024, &who) {
                // Its end was passed on before. The reset is told by a write, or by nothing.
                Ok(()) if stream.end_came => break None,
                Ok(()) => {}
                Err(error) => break Some(error.kind()),
            }
        };
        assert!(
            matches!(error, None | Some(ErrorKind::ConnectionReset)),
            "{who}: {error:?}"
        );
        self.cut += 1;
    }

    /// Stops the client, which leaves its visitors so much time, and starts another one: before, if the
    /// server takes two.
    fn replace_client(&mut self, drain: Duration) {
        let local = self.listener.local_addr().unwrap();
        let pool = self.random.below(4);
        let options = with!(client_options(&self.server, local); pool);
        let before = (self.options.clients > 1).then(|| RunningClient::start(options.clone()));
        if let Some(next) = &before {
            assert!(next.handle().wait_for_session(DEADLINE), "the next one");
        }
        self.client.handle().stop(drain);
        let next = before.unwrap_or_else(|| RunningClient::start(options));
        self.clients.push(std::mem::replace(&mut self.client, next));
        self.replaced += 1;
        if drain.is_zero() {
            for client in &mut self.clients {
                client.handle().stop(Duration::ZERO);
                client.wait_for_end();
            }
            // Whoever was there, or was given to one of their tunnels, is cut off.
            self.visits
                .values_mut()
                .for_each(|visit| visit.may_fail = true);
            // Nobody is given to one of their tunnels any more.
            let next = self.client.handle();
            assert!(next.wait_for_session(DEADLINE), "the next one");
            let server = self.server.handle();
            eventually("one session", || {
                server.status().unwrap().sessions.len() == 1
            });
            self.clients.clear();
        }
    }

    /// Starts the next server, to which the old one leaves its ports.
    fn replace_server(&mut self) {
        self.server.handle().stop(DRAIN);
        let next = RunningServer::start(self.options.clone());
        self.servers.push(std::mem::replace(&mut self.server, next));
        self.replaced += 1;
    }

    /// Takes those who come to the service, and finds out who they are.
    fn hear_numbers(&mut self) {
        while let Ok((service, _)) = self.listener.accept() {
            service.set_nonblocking(true).unwrap();
            self.unknown.push((service, Vec::new()));
        }
        for (mut service, mut number) in std::mem::take(&mut self.unknown) {
            let mut buffer = vec![0; NUMBER - number.len()];
            match if_any(service.read(&mut buffer)) {
                // Its visitor was cut off before a byte of it came here.
                Ok(Some(0)) if number.is_empty() => continue,
                Ok(Some(0)) => panic!("a proper end within a number"),
                Ok(count) => number.extend(&buffer[..count.unwrap_or(0)]),
                // Its visitor was cut off.
                Err(_) => continue,
            }
            match <[u8; NUMBER]>::try_from(&number[..]) {
                Err(_) => self.unknown.push((service, number)),
                Ok(number) => {
                    let number = u64::from_le_bytes(number);
                    assert!(number < self.next, "nobody has said {number}");
                    if let Some(visit) = self.visits.get_mut(&number) {
                        assert!(visit.service.is_none(), "{number} comes twice");
                        visit.service = Some(service);
                    }
                }
            }
        }
    }

    /// Brings all visits to their ends.
    fn finish(&mut self) {
        let start = Instant::now();
        while !self.visits.is_empty() {
            self.hear_numbers();
            let numbers: Vec<_> = self.visits.keys().copied().collect();
            for number in numbers {
                for draw in 0..6 {
                    if self.visits.contains_key(&number) {
                        self.with_visit(number, |visit, who| visit.step(draw, 64 * 1024, who));
                    }
                }
            }
            assert!(
                start.elapsed() < DEADLINE,
                "{} visits do not end",
                self.visits.len()
            );
            thread::sleep(Duration::from_millis(1));
        }
        self.unknown.clear();
        eventually("nobody is joined", || {
            let status =
                [self.server.handle(), self.client.handle()].map(|it| it.status().unwrap());
            status.iter().all(|it| it.joined == 0 && it.waiting == 0)
        });
        for server in &mut self.servers {
            server.wait_for_end();
        }
        for client in &mut self.clients {
            client.wait_for_end();
        }
    }
}
