//! Faults of a whole host: a path that goes silent, names that change, a room without anything. Each
//! test has hosts of its own, in namespaces that last as long as something is in them.
#![cfg(target_os = "linux")]

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{self, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tempfile::TempDir;

use crate::support::programs::{Launch, Program};
use crate::support::{
    DEADLINE, Protection, Service, accept, assert_echo, connect, eventually, expect_pattern,
    plain_and_sealed, send_pattern,
};

plain_and_sealed! {
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    a_path_that_goes_silent_both_ways_is_survived,
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    a_path_that_goes_silent_to_the_server_is_survived,
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    a_path_that_goes_silent_to_the_client_is_survived,
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    a_link_that_goes_down_at_the_server_is_survived,
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    two_seconds_of_silence_in_a_transfer_lose_nothing,
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    a_name_that_is_unknown_at_first_and_then_moves_is_followed,
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    a_name_whose_first_address_is_dead_is_good_enough,
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    a_host_without_home_disk_or_proc_is_good_enough,
    #[ignore = "needs root, ip and unshare: cargo test -- --include-ignored"]
    a_host_without_free_ports_is_told_what_to_change,
}

fn a_host_without_free_ports_is_told_what_to_change(protection: Protection) {
    Host::new().enter();
    let service = Service::echo();
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    fs::write(range, "40000 40003").unwrap();
    let server = Launch::new(protection)
        .on(["127.0.0.1:7", "127.0.0.1:8", "127.0.0.1:9"].map(|address| address.parse().unwrap()));
    let server = server.server(&[]);
    let addresses = server.addresses();
    let client = Launch::new(protection).client(addresses, service.addr, &[]);
    // The pool is to have eight tunnels, which is more than there are ports.
    let line = client.wait_for_line("could not dial a tunnel");
    for text in [
        &addresses[1].to_string(),
        "ip_local_port_range",
        "tcp_tw_reuse",
    ] {
        assert!(line.contains(text), "{line}");
    }
}

/// A network namespace with a loopback address, and no way to anywhere else.
struct Host {
    link: File,
}

impl Host {
    fn new() -> Self {
        let mut holder = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut to, mut from) = (holder.stdin.take().unwrap(), holder.stdout.take().unwrap());
        // A `cat` that answers has its namespace already.
        to.write_all(b"!").unwrap();
        from.read_exact(&mut [0]).unwrap();
        let link = File::open(format!("/proc/{}/ns/net", holder.id())).unwrap();
        drop(to);
        holder.wait().unwrap();
        let host = Self { link };
        host.inside(|| ip("link set lo up"));
        host
    }

    /// Moves this thread to the host, with all that it starts from now on.
    fn enter(&self) {
        let network = Some(LinkNameSpaceType::Network);
        move_into_link_name_space(self.link.as_fd(), network).unwrap();
    }

    /// Does this on a thread of the host.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter();
                work()
            });
            thread.join().unwrap()
        })
    }
}

/// Runs `ip` with these words, on the host that this thread is on.
fn ip(words: &str) {
    let mut command = Command::new("ip");
    let output = command.args(words.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words}: {errors}");
}

const SERVER: &str = "192.0.2.1";
const CLIENT: &str = "192.0.2.2";

/// The ends of the path, and an end that it does not have: what is sent there is lost, and nobody
/// is told.
const SERVER_END: &str = "02:00:00:00:00:01";
const CLIENT_END: &str = "02:00:00:00:00:02";
const NOWHERE: &str = "02:00:00:00:00:03";

/// A host for the server and its visitors, one for the client and its local service, and the path
/// between them.
struct Hosts {
    server: Host,
    client: Host,
}

impl Hosts {
    /// Makes the hosts and the path. Afterwards this thread is on the client's host.
    fn new() -> Self {
        let (server, client) = (Host::new(), Host::new());
        client.enter();
        let there = format!("/proc/{}/fd/{}", process::id(), server.link.as_raw_fd());
        ip(&format!(
            "link add path address {CLIENT_END} type veth \
             peer name path address {SERVER_END} netns {there}"
        ));
        for (host, address) in [(&server, SERVER), (&client, CLIENT)] {
            host.inside(|| ip(&format!("address add {address}/24 dev path")));
            host.inside(|| ip("link set path up"));
        }
        let hosts = Self { server, client };
        hosts.lead(SERVER_END, CLIENT_END);
        hosts
    }

    /// Leads what is sent to the server to this end, and what is sent to the client to that one.
    fn lead(&self, to_server: &str, to_client: &str) {
        let lead = |from: &Host, address, end| {
            let words = format!("neighbour replace {address} lladdr {end} dev path nud permanent");
            from.inside(|| ip(&words));
        };
        lead(&self.client, SERVER, to_server);
        lead(&self.server, CLIENT, to_client);
    }

    /// Undoes every fault.
    fn mend(&self) {
        self.server.inside(|| ip("link set path up"));
        self.lead(SERVER_END, CLIENT_END);
    }

    /// Lets no connection that is yet to come hold more than 1 MiB that nobody has read.
    fn limit_buffers(&self) {
        for host in [&self.server, &self.client] {
            let sizes = ("/proc/sys/net/ipv4/tcp_rmem", "4096 131072 1048576");
            host.inside(|| fs::write(sizes.0, sizes.1).unwrap());
        }
    }

    /// Both programs, and where visitors come to.
    fn start(&self, protection: Protection, local: SocketAddr) -> (Program, Program, SocketAddr) {
        let any = |host: &str| SocketAddr::new(host.parse().unwrap(), 0);
        let launch = Launch::new(protection).on([any("127.0.0.1"), any(SERVER), any(SERVER)]);
        // A visitor waits for as long as the client may take to come back.
        let wait = RETURN.as_secs().to_string();
        let options = ["--insecure", "--pair-timeout", &wait];
        let server = self.server.inside(|| launch.server(&options));
        let addresses = server.addresses();
        let client = launch.client(addresses, local, &[]);
        client.wait_for_line("connected to");
        (server, client, addresses[0])
    }
}

/// A silent link is dead after 6 s; the rest is for a busy machine.
const NOTICE: Duration = Duration::from_secs(8);

/// A dial that the silence swallows takes 5 s, and the pause before the next one is still short.
/// This is twice that, as the machine may be busy.
const RETURN: Duration = Duration::from_secs(12);

fn a_path_that_goes_silent_both_ways_is_survived(protection: Protection) {
    lost_and_found(protection, |hosts| {
        hosts.lead(NOWHERE, NOWHERE);
    });
}

fn a_path_that_goes_silent_to_the_server_is_survived(protection: Protection) {
    lost_and_found(protection, |hosts| {
        hosts.lead(NOWHERE, CLIENT_END);
    });
}

fn a_path_that_goes_silent_to_the_client_is_survived(protection: Protection) {
    lost_and_found(protection, |hosts| {
        hosts.lead(SERVER_END, NOWHERE);
    });
}

/// The server's host knows that the link is down, which is no error to its connections.
fn a_link_that_goes_down_at_the_server_is_survived(protection: Protection) {
    lost_and_found(protection, |hosts| {
        hosts.server.inside(|| ip("link set path down"));
    });
}

/// Cuts the path, and mends it when a dial has been lost too.
fn lost_and_found(protection: Protection, cut: impl FnOnce(&Hosts)) {
    let hosts = Hosts::new();
    let service = Service::echo();
    let (server, client, public) = hosts.start(protection, service.addr);
    let held = hosts.server.inside(|| connect(public));
    assert_echo(&held, "before");
    let start = Instant::now();
    cut(&hosts);
    thread::scope(|scope| {
        scope.spawn(|| assert_says(&server, " left: ", start));
        scope.spawn(|| assert_says(&client, "lost the server", start));
    });
    client.wait_for_line("could not reach the server");
    hosts.mend();
    let start = Instant::now();
    let fresh = hosts.server.inside(|| connect(public));
    assert_echo(&fresh, "after");
    assert!(start.elapsed() < RETURN, "after {:?}", start.elapsed());
    assert_echo(&held, "who was joined before goes on");
    // The client warns once, although it has connected twice.
    let warned = client.lines_with("WARN  tpclient] no --key-file: ").len();
    assert_eq!(warned, usize::from(protection == Protection::Plain));
    assert_no_panic(&[&server, &client]);
}

fn assert_says(program: &Program, text: &str, start: Instant) {
    let line = program.wait_for_line(text);
    assert!(start.elapsed() < NOTICE, "{:?}: {line}", start.elapsed());
}

fn two_seconds_of_silence_in_a_transfer_lose_nothing(protection: Protection) {
    let hosts = Hosts::new();
    hosts.limit_buffers();
    let (sender, sockets) = mpsc::channel();
    let service = Service::start(move |socket| sender.send(socket).unwrap());
    let (server, client, public) = hosts.start(protection, service.addr);
    let visitor = hosts.server.inside(|| connect(public));
    let served = sockets.recv_timeout(DEADLINE).unwrap();
    transfer_through_silence(&hosts, [&visitor, &served]);
    assert_eq!(client.lines_with("lost the server"), [""; 0]);
    assert_eq!(server.lines_with(" left: "), [""; 0]);
    assert_no_panic(&[&server, &client]);
}

/// Sends from each end to the other, in each half more than all buffers between them hold.
fn transfer_through_silence(hosts: &Hosts, [one, other]: [&TcpStream; 2]) {
    const HALF: usize = 32 * 1024 * 1024;
    let (halves, silent) = (AtomicUsize::new(0), AtomicBool::new(false));
    let receive = |from, seeds: [u64; 2]| {
        expect_pattern(from, seeds[0], HALF);
        halves.fetch_add(1, Ordering::SeqCst);
        eventually("the silence", || silent.load(Ordering::SeqCst));
        expect_pattern(from, seeds[1], HALF);
        Instant::now()
    };
    let send = |to, seeds: [u64; 2]| seeds.map(|seed| send_pattern(to, seed, HALF));
    thread::scope(|scope| {
        scope.spawn(|| send(one, [1, 2]));
        scope.spawn(|| send(other, [3, 4]));
        let receivers = [(other, [1, 2]), (one, [3, 4])]
            .map(|(from, seeds)| scope.spawn(move || receive(from, seeds)));
        eventually("half of it", || halves.load(Ordering::SeqCst) == 2);
        hosts.lead(NOWHERE, NOWHERE);
        silent.store(true, Ordering::SeqCst);
        // The path is silent for this long.
        thread::sleep(Duration::from_secs(2));
        let mended = Instant::now();
        hosts.mend();
        for receiver in receivers {
            let done = receiver.join().unwrap();
            assert!(done > mended, "the path was not silent");
        }
    });
}

fn assert_no_panic(programs: &[&Program]) {
    for program in programs {
        assert_eq!(program.lines_with("panicked"), [""; 0]);
    }
}

/// Runs what follows with an `/etc/hosts` from the first word's folder, and no name service besides.
const WITH_NAMES: &str = r#"
    for file in hosts nsswitch.conf; do
        mount --bind "$0/$file" "/etc/$file" || exit
    done
    exec "$@"
"#;

/// The names that a program knows.
struct Names(TempDir);

impl Names {
    fn new(text: &str) -> Self {
        let names = Self(tempfile::tempdir().unwrap());
        fs::write(names.0.path().join("nsswitch.conf"), "hosts: files\n").unwrap();
        names.set(text);
        names
    }

    /// Writes the file in its place, as the program has the file and not its name.
    fn set(&self, text: &str) {
        fs::write(self.0.path().join("hosts"), text).unwrap();
    }

    fn under(&self) -> [&str; 6] {
        let folder = self.0.path().to_str().unwrap();
        ["unshare", "--mount", "sh", "-c", WITH_NAMES, folder]
    }
}

fn a_name_that_is_unknown_at_first_and_then_moves_is_followed(protection: Protection) {
    Host::new().enter();
    let [here, there] = [1, 2].map(|number| SocketAddr::from(([127, 0, 78, number], 0)));
    let service = Service::echo();
    let mut first = Launch::new(protection).on([here; 3]).server(&[]);
    let addresses = first.addresses();
    let elsewhere = addresses.map(|address| SocketAddr::new(there.ip(), address.port()));
    let second = Launch::new(protection).on(elsewhere).server(&[]);
    second.addresses();

    let names = Names::new("");
    let client = Launch::new(protection)
        .under(&names.under())
        .named("server.invalid", "127.0.0.1")
        .client(addresses, service.addr, &[]);
    client.wait_for_lines("could not reach the server: server.invalid", 3);
    names.set("127.0.78.1 server.invalid\n");
    assert_comes_to(&client, 1, addresses[0]);

    names.set("127.0.78.2 server.invalid\n");
    assert_eq!(second.lines_with(" came: "), [""; 0]);
    first.kill();
    assert_comes_to(&client, 2, elsewhere[0]);
    assert_no_panic(&[&first, &second, &client]);
}

/// Asserts that the client has its next session soon, with the server of these visitors.
fn assert_comes_to(client: &Program, sessions: usize, public: SocketAddr) {
    let start = Instant::now();
    client.wait_for_lines("connected to", sessions);
    let took = start.elapsed();
    assert!(took < Duration::from_secs(12), "after {took:?}");
    assert_echo(&connect(public), "served");
}

fn a_name_whose_first_address_is_dead_is_good_enough(protection: Protection) {
    Host::new().enter();
    let (one, other) = ("127.0.78.1", "127.0.78.2");
    // A resolver may keep the order of the file or have one of its own. In some of these cases the
    // dead address is the first one.
    for (dead, live) in [(one, other), (other, one), ("::1", one)] {
        for order in [[dead, live], [live, dead]] {
            reach_by_name(protection, order, live);
        }
    }
}

/// Serves a visitor where the server's name and the local service's have these addresses, of which
/// only one is live.
fn reach_by_name(protection: Protection, addresses: [&str; 2], live: &str) {
    let lines = addresses.map(|address| format!("{address} server.invalid local.invalid\n"));
    let names = Names::new(&lines.concat());
    let local = TcpListener::bind((live, 0)).unwrap();
    let ports = [SocketAddr::new(live.parse().unwrap(), 0); 3];
    let server = Launch::new(protection).on(ports).server(&[]);
    let client = Launch::new(protection)
        .under(&names.under())
        .named("server.invalid", "local.invalid")
        .client(server.addresses(), local.local_addr().unwrap(), &[]);
    client.wait_for_line("connected to server.invalid");
    let visitor = connect(server.addresses()[0]);
    let served = accept(&local);
    send_pattern(&visitor, 1, 1000);
    expect_pattern(&served, 1, 1000);
    for failed in [
        "could not reach",
        "cannot reach the local service",
        "panicked",
    ] {
        assert_eq!(client.lines_with(failed), [""; 0]);
    }
}

/// Runs what follows where nothing can be written, the only disk that could is full, and `/proc` is
/// empty. The program is kept in `/mnt`, as what is in `/tmp` is covered.
const BARE: &str = r#"
    set -e
    unset HOME
    mount -t tmpfs tmpfs /mnt
    : > /mnt/program
    mount --bind "$0" /mnt/program
    while read -r _ _ _ _ point _; do
        mount -o remount,bind,ro "$point" 2> /dev/null || :
    done < /proc/self/mountinfo
    mount -t tmpfs -o size=16k tmpfs /tmp
    cat /dev/zero > /tmp/full 2> /dev/null || :
    mount -t tmpfs -o ro tmpfs /proc
    cd /tmp
    exec /mnt/program "$@"
"#;

fn a_host_without_home_disk_or_proc_is_good_enough(protection: Protection) {
    let launch = Launch::new(protection).under(&["unshare", "--mount", "sh", "-c", BARE]);
    let service = Service::echo();
    let server = launch.server(&[]);
    let addresses = server.addresses();
    let client = launch.client(addresses, service.addr, &[]);
    client.wait_for_line("connected to");
    for program in [&server, &client] {
        assert_bare(program);
    }
    for seed in 1..=5 {
        let visitor = connect(addresses[0]);
        thread::scope(|scope| {
            scope.spawn(|| send_pattern(&visitor, seed, MIB));
            expect_pattern(&visitor, seed, MIB);
        });
    }
    assert_no_panic(&[&server, &client]);
    for mut program in [client, server] {
        program.signal(Signal::TERM);
        assert!(program.wait_for_end().success());
    }
}

const MIB: usize = 1024 * 1024;

/// Asserts that the program can write nothing, and sees no `/proc`.
fn assert_bare(program: &Program) {
    let path = |name: &str| format!("/proc/{}/{name}", program.pid());
    let mounts = fs::read_to_string(path("mountinfo")).unwrap();
    let fields = mounts.lines().map(|line| line.split(' ').skip(4));
    let mut options = fields.filter_map(|mut it| (it.next() == Some("/")).then(|| it.next()));
    let options = options.next().flatten().unwrap();
    assert!(options.split(',').any(|it| it == "ro"), "{options}");
    assert_eq!(fs::read_dir(path("root/proc")).unwrap().count(), 0);
    let error = fs::write(path("root/tmp/more"), "more").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    assert_eq!(fs::read_link(path("cwd")).unwrap().to_str(), Some("/tmp"));
    let environment = fs::read(path("environ")).unwrap();
    let mut variables = environment.split(|byte| *byte == 0);
    assert!(!variables.any(|it| it.starts_with(b"HOME=")));
}
