//! HUP has a program read its `--config` again, and no visitor notices.
#![cfg(target_os = "linux")]

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::load::{assert_whole, sixteen_at_a_time};
use crate::support::programs::{Launch, Program, ports_of};
use crate::support::{
    Protection, Service, assert_echo, connect, eventually, plain_and_sealed, share_turn,
    try_connect,
};

plain_and_sealed! {
    a_server_takes_up_new_services_while_its_visitors_go_on,
    a_client_goes_to_another_service_while_its_visitors_go_on,
    a_reload_under_load_costs_no_visit,
    a_file_with_a_fault_changes_nothing,
    a_port_that_is_taken_changes_nothing,
    a_port_may_become_one_of_all_addresses,
    a_port_of_which_another_has_a_part_leaves_the_options_from_before,
    a_visitor_whom_a_hung_client_has_holds_no_reload_up_for_ever,
    a_hang_up_during_a_reload_is_obeyed_after_it,
    a_hang_up_before_the_start_is_obeyed_after_it,
    a_stop_after_a_reload_ends_everything,
}

/// A file of options in a folder of its own.
struct Config {
    folder: TempDir,
}

impl Config {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = Self { folder };
        config.write(text);
        config
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("tp.conf")
    }

    fn write(&self, text: &str) {
        std::fs::write(self.path(), text).unwrap();
    }
}

/// The text for a server on fixed ports, as a reload must find them again.
fn ports(protection: Protection, number: usize) -> [std::net::SocketAddr; 3] {
    let low = 2 * number + usize::from(protection == Protection::Sealed);
    ports_of(&format!("127.0.88.{}", low + 1))
}

fn server(protection: Protection, config: &Config) -> Program {
    let path = config.path();
    let server = Launch::new(protection).bare_server(&["--config", path.to_str().unwrap()]);
    server.wait_for_line("for the control link");
    server
}

fn client(protection: Protection, config: &Config) -> Program {
    let path = config.path();
    let client = Launch::new(protection).bare_client(&["--config", path.to_str().unwrap()]);
    client.wait_for_line("connected to");
    client
}

/// Both programs, each with a file, and an echo service behind them.
struct Configured {
    client: Program,
    of_client: Config,
    server: Program,
    of_server: Config,
    _service: Service,
}

impl Configured {
    /// Starts a server with these options, which has this control port, and a client of it.
    fn start(protection: Protection, control: SocketAddr, options: &str) -> Self {
        let of_server = Config::new(options);
        let server = server(protection, &of_server);
        let service = Service::echo();
        let local = service.addr;
        let of_client = Config::new(&format!("server {control}\nlocal {local}\n"));
        Self {
            client: client(protection, &of_client),
            of_client,
            server,
            of_server,
            _service: service,
        }
    }
}

fn reload(program: &Program, time: usize) {
    program.signal(Signal::HUP);
    program.wait_for_lines("taken over from the options before", time);
}

/// A service that says its name first.
fn named(name: &'static str) -> Service {
    use std::io::{Read, Write};
    Service::start(move |mut socket| {
        let mut buffer = [0; 64];
        let _ = socket.write_all(name.as_bytes());
        while let Ok(count @ 1..) = socket.read(&mut buffer) {
            let _ = socket.write_all(&buffer[..count]);
        }
    })
}

fn name_at(address: std::net::SocketAddr) -> (std::net::TcpStream, char) {
    use std::io::Read;
    let (mut visitor, mut name) = (connect(address), [0]);
    visitor.read_exact(&mut name).unwrap();
    (visitor, name[0].into())
}

fn a_server_takes_up_new_services_while_its_visitors_go_on(protection: Protection) {
    let [a, b, control] = ports(protection, 0);
    let text = format!("control {control}\ntunnel {control}\npublic a={a}\n");
    let config = Config::new(&text);
    let server = server(protection, &config);
    let services = ["a", "b"].map(named);
    let [local_a, local_b] = services.each_ref().map(|it| it.addr);
    let both = format!("server {control}\nlocal a={local_a}\nlocal b={local_b}\n");
    let both = Config::new(&both);
    let client = client(protection, &both);
    let (patient, name) = name_at(a);
    assert_eq!(name, 'a');
    config.write(&format!("{text}public b={b}\n"));
    reload(&server, 1);
    client.wait_for_lines("connected to", 2);
    assert_eq!(name_at(b).1, 'b');
    assert_eq!(name_at(a).1, 'a');
    assert_echo(&patient, "still here");
    // And without the first one.
    config.write(&format!(
        "control {control}\ntunnel {control}\npublic b={b}\n"
    ));
    reload(&server, 2);
    client.wait_for_lines("connected to", 3);
    assert_eq!(name_at(b).1, 'b');
    eventually("its port is closed", || try_connect(a).is_err());
    assert_echo(&patient, "still here after that");
}

fn a_client_goes_to_another_service_while_its_visitors_go_on(protection: Protection) {
    let (_server, [public, _, control]) = Program::server(protection, &[]);
    let services = ["a", "b"].map(named);
    let [local_a, local_b] = services.each_ref().map(|it| it.addr);
    let config = Config::new(&format!("server {control}\nlocal {local_a}\n"));
    let client = client(protection, &config);
    let (patient, name) = name_at(public);
    assert_eq!(name, 'a');
    config.write(&format!("server {control}\nlocal {local_b}\n"));
    reload(&client, 1);
    client.wait_for_lines("connected to", 2);
    assert_eq!(name_at(public).1, 'b');
    assert_echo(&patient, "still here");
}

fn a_reload_under_load_costs_no_visit(protection: Protection) {
    let _turn = share_turn();
    let [public, tunnel, control] = ports(protection, 1);
    let text = format!("control {control}\ntunnel {tunnel}\npublic {public}\n");
    let all = Configured::start(protection, control, &text);
    let made = sixteen_at_a_time(public, Duration::from_secs(6), || {
        for time in 1..=3 {
            thread::sleep(Duration::from_millis(700));
            all.of_server
                .write(&format!("{text}max-conns {}\n", 1000 + time));
            reload(&all.server, time);
            all.client.wait_for_lines("connected to", 2 * time);
            reload(&all.client, time);
            all.client.wait_for_lines("connected to", 2 * time + 1);
        }
    });
    assert_whole(&made);
}

fn a_file_with_a_fault_changes_nothing(protection: Protection) {
    let [public, tunnel, control] = ports(protection, 2);
    let text = format!("control {control}\ntunnel {tunnel}\npublic {public}\n");
    let all = Configured::start(protection, control, &text);
    let status = "status 192.0.2.1:9000\n";
    for (program, config, faults) in [
        (
            &all.server,
            &all.of_server,
            [
                ("nonsense\n", "line 1: there is no option nonsense"),
                ("deny web=192.0.2.1\n", "--deny web: there is no service"),
                (status, "192.0.2.1:9000 is not a loopback address"),
            ],
        ),
        (
            &all.client,
            &all.of_client,
            [
                ("nonsense\n", "line 1: there is no option nonsense"),
                (
                    "proxy-protocol web=v1\n",
                    "--proxy-protocol web: there is no service",
                ),
                (status, "192.0.2.1:9000 is not a loopback address"),
            ],
        ),
    ] {
        for (number, (text, why)) in faults.iter().enumerate() {
            config.write(text);
            program.signal(Signal::HUP);
            let line = program.wait_for_lines("nothing has changed: ", number + 1);
            assert!(line.contains(why), "{line}");
        }
    }
    assert_echo(&connect(public), "as before");
    assert_eq!(all.client.lines_with("lost the server"), [""; 0]);
}

/// Another program has a new port: visitors and the client find the server there all the time.
fn a_port_that_is_taken_changes_nothing(protection: Protection) {
    let [public, tunnel, control] = ports(protection, 5);
    let text = format!("control {control}\ntunnel {tunnel}\npublic {public}\n");
    let all = Configured::start(protection, control, &text);
    let taken = TcpListener::bind((public.ip(), 0)).unwrap();
    let of_other = taken.local_addr().unwrap();
    all.of_server
        .write(&format!("{text}public web={of_other}\n"));
    all.server.signal(Signal::HUP);
    let line = all
        .server
        .wait_for_line("nothing has changed: --public: could not listen on ");
    assert!(line.contains(&of_other.to_string()), "{line}");
    assert_echo(&connect(public), "as before");
    assert_eq!(all.client.lines_with("lost the server"), [""; 0]);
    // A status page that has to wait keeps nobody from the visitors.
    all.of_server.write(&format!("{text}status {of_other}\n"));
    reload(&all.server, 1);
}

/// A port that is free at all addresses, and none of those that other tests dial from.
fn port_of_nobody(protection: Protection) -> u16 {
    let first = 20_000 + 5_000 * u16::from(protection == Protection::Sealed);
    let first = first + (std::process::id() % 4_000) as u16;
    let is_free = |port: &u16| TcpListener::bind(("0.0.0.0", *port)).is_ok();
    (first..first + 1_000).find(is_free).unwrap()
}

/// The server has a part of the port itself.
fn a_port_may_become_one_of_all_addresses(protection: Protection) {
    let [mut public, tunnel, control] = ports(protection, 6);
    public.set_port(port_of_nobody(protection));
    let text = format!("control {control}\ntunnel {tunnel}\n");
    let all = Configured::start(protection, control, &format!("{text}public {public}\n"));
    let patient = connect(public);
    assert_echo(&patient, "before");
    all.of_server
        .write(&format!("{text}public 0.0.0.0:{}\n", public.port()));
    reload(&all.server, 1);
    all.client.wait_for_lines("connected to", 2);
    assert_echo(&connect(public), "as before");
    let elsewhere = SocketAddr::from(([127, 0, 0, 1], public.port()));
    assert_echo(&connect(elsewhere), "everywhere");
    assert_echo(&patient, "still here");
    assert_eq!(all.server.lines_with("going on with"), [""; 0]);
}

fn a_port_of_which_another_has_a_part_leaves_the_options_from_before(protection: Protection) {
    let [public, tunnel, control] = ports(protection, 3);
    let text = format!("control {control}\ntunnel {tunnel}\npair-timeout 1\npublic {public}\n");
    let all = Configured::start(protection, control, &text);
    // All of the port, of which the server has a part already.
    let other = [127, 0, 88, 200 + u8::from(protection == Protection::Sealed)];
    let _taken = TcpListener::bind(SocketAddr::from((other, public.port()))).unwrap();
    let everywhere = format!("0.0.0.0:{}", public.port());
    all.of_server
        .write(&text.replace(&format!("public {public}"), &format!("public {everywhere}")));
    all.server.signal(Signal::HUP);
    let line = all
        .server
        .wait_for_line("going on with the options from before");
    assert!(line.contains(&everywhere), "{line}");
    // For a moment nobody listens.
    all.server.wait_for_lines("for the control link", 2);
    assert_echo(&connect(public), "as before");
}

/// The client is silent for 6 s before it counts as dead, longer than the next server waits for a port.
fn a_visitor_whom_a_hung_client_has_holds_no_reload_up_for_ever(protection: Protection) {
    let [public, tunnel, control] = ports(protection, 7);
    let text = format!("control {control}\ntunnel {tunnel}\npublic {public}\nclients 2\n");
    let config = Config::new(&text);
    let server = server(protection, &config);
    let service = Service::echo();
    let [hung, _other] = [(); 2].map(|()| {
        let local = service.addr;
        let client = Config::new(&format!("server {control}\nlocal {local}\n"));
        self::client(protection, &client)
    });
    eventually("both have their pools", || {
        server.signal(Signal::USR1);
        thread::sleep(Duration::from_millis(50));
        !server.lines_with(" idle=16 ").is_empty()
    });
    hung.signal(Signal::STOP);
    // Of two that have no visitor, the one that came first gets this one.
    let visitor = connect(public);
    thread::sleep(Duration::from_millis(300));
    reload(&server, 1);
    assert_echo(&visitor, "the other has this one");
    assert_echo(&connect(public), "and the next one");
}

/// A visitor without a client keeps the first server from ending, and the second one from its start.
fn a_hang_up_during_a_reload_is_obeyed_after_it(protection: Protection) {
    let [public, b, control] = ports(protection, 9);
    let text = format!("control {control}\ntunnel {control}\npublic {public}\npair-timeout 5\n");
    let config = Config::new(&text);
    let server = server(protection, &config);
    let _visitor = connect(public);
    eventually("a visitor waits", || {
        server.signal(Signal::USR1);
        !server.lines_with(" waiting=1 ").is_empty()
    });
    server.signal(Signal::HUP);
    server.wait_for_line("handed over by the server that ends");
    config.write(&format!("{text}public b={b}\n"));
    server.signal(Signal::HUP);
    server.wait_for_line("when those that were read last are in force");
    server.wait_for_lines("taken over from the options before", 2);
    drop(connect(b));
}

fn a_hang_up_before_the_start_is_obeyed_after_it(protection: Protection) {
    let [public, b, control] = ports(protection, 10);
    let text = format!("control {control}\ntunnel {control}\npublic {public}\n");
    let config = Config::new(&text);
    let taken = TcpListener::bind(control).unwrap();
    let path = config.path();
    let server = Launch::new(protection).bare_server(&["--config", path.to_str().unwrap()]);
    server.wait_for_line("is in use, waiting for it");
    config.write(&format!("{text}public b={b}\n"));
    server.signal(Signal::HUP);
    server.wait_for_line("when those that were read last are in force");
    drop(taken);
    server.wait_for_line("taken over from the options before");
    drop(connect(b));
}

fn a_stop_after_a_reload_ends_everything(protection: Protection) {
    let [public, tunnel, control] = ports(protection, 4);
    let mut all = Configured::start(
        protection,
        control,
        &format!("control {control}\ntunnel {tunnel}\npublic {public}\n"),
    );
    let patient = connect(public);
    assert_echo(&patient, "before");
    reload(&all.server, 1);
    all.client.wait_for_lines("connected to", 2);
    reload(&all.client, 1);
    all.client.wait_for_lines("connected to", 3);
    assert_echo(&patient, "on what is left of the first ones");
    let later = connect(public);
    assert_echo(&later, "on the new ones");
    for program in [&all.server, &all.client] {
        program.signal(Signal::TERM);
        program.wait_for_line("stopping");
    }
    assert_echo(&patient, "in the drain");
    assert_echo(&later, "in the drain, too");
    drop((patient, later));
    assert!(all.server.wait_for_end().success());
    assert!(all.client.wait_for_end().success());
}
