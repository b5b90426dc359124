//! Options that lead to the wrong port, or in a circle: each side says what it most likely reached,
//! and which option to check. Nobody is told that the key is wrong when it is not.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

use crate::support::programs::{Launch, Program};
use crate::support::{
    Protection, Service, assert_was_reset, connect, echo, plain_and_sealed, try_connect,
};

plain_and_sealed! {
    a_control_link_at_the_tunnel_port_is_told_so,
    a_tunnel_at_the_control_port_is_told_so,
    a_client_at_the_port_for_visitors_is_told_so,
    a_client_behind_the_port_for_visitors_finds_no_server,
    a_client_at_another_program_says_what_that_speaks,
    a_tunnel_port_that_is_the_public_one_is_refused_at_once,
    a_client_needs_no_tunnel_port,
    a_local_service_that_leads_back_to_the_server_is_refused,
    a_local_service_that_is_down_is_seen_on_the_server,
}

/// The advice that would lead a user away from the cause.
fn assert_no_word_of_the_key(programs: &[&Program]) {
    for program in programs {
        for wrong in [
            "wrong key",
            "another key",
            "another one",
            "--key-file)",
            "connected to",
        ] {
            assert_eq!(program.lines_with(wrong), [""; 0]);
        }
    }
}

/// A client that goes there with its control link, and whose tunnels go where the server says.
fn client_of(protection: Protection, control: SocketAddr, local: SocketAddr) -> Program {
    let (server, local) = (control.to_string(), local.to_string());
    Launch::new(protection).bare_client(&["--server", &server, "--local", &local])
}

fn a_control_link_at_the_tunnel_port_is_told_so(protection: Protection) {
    let service = Service::echo();
    let (server, [_, tunnel, _]) = Program::server(protection, &[]);
    let client = client_of(protection, tunnel, service.addr);
    client.wait_for_line("this is its tunnel port, not its control port (--control-port)");
    server.wait_for_line("it is a client's control link, and this is the tunnel port");
    assert_no_word_of_the_key(&[&server, &client]);
}

/// Copies both ways, until one of them ends.
fn forward(one: &TcpStream, other: &TcpStream) {
    let copy = |mut from: &TcpStream, mut to: &TcpStream| {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    };
    thread::scope(|scope| {
        scope.spawn(|| copy(one, other));
        copy(other, one);
    });
}

fn a_tunnel_at_the_control_port_is_told_so(protection: Protection) {
    let service = Service::echo();
    let (server, [public, _, control]) = Program::server(protection, &[]);
    // The tunnels go by way of a forwarded port: tpclient itself refuses two equal ones.
    let forwarded = Service::start(move |socket| forward(&socket, &connect(control)));
    let addresses = [public, forwarded.addr, control];
    let client = Program::client(protection, addresses, service.addr, &[]);
    client.wait_for_line("this is its control port, not its tunnel port (--tunnel-port)");
    server.wait_for_line("it is a client's tunnel, and this is the control port");
}

fn a_client_at_the_port_for_visitors_is_told_so(protection: Protection) {
    let service = Service::echo();
    let (server, [public, ..]) = Program::server(protection, &["--pair-timeout", "1"]);
    let client = client_of(protection, public, service.addr);
    client.wait_for_line("this is its port for visitors (--control-port, --tunnel-port)");
    server.wait_for_line("it is a tpclient, and this is the port for visitors");
    assert_no_word_of_the_key(&[&server, &client]);
}

/// The client's hello gets to the local service, and whatever that makes of it comes back.
fn a_client_behind_the_port_for_visitors_finds_no_server(protection: Protection) {
    let service = Service::echo();
    let (server, addresses) = Program::server(protection, &[]);
    let good = Program::client(protection, addresses, service.addr, &[]);
    good.wait_for_line("connected to");
    let client = client_of(protection, addresses[0], service.addr);
    client.wait_for_line("is this tpserver's control port (--control-port)?");
    assert_no_word_of_the_key(&[&server, &client]);
    echo(&connect(addresses[0]));
}

fn a_client_at_another_program_says_what_that_speaks(protection: Protection) {
    for (greeting, name) in [
        ("SSH-2.0-OpenSSH_9.2p1\r\n", "it speaks ssh"),
        ("HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks HTTP"),
        ("220 mail.example.org ESMTP\r\n", "it speaks FTP or SMTP"),
    ] {
        let service = Service::start(move |mut socket| {
            let _ = socket.write_all(greeting.as_bytes());
            let _ = std::io::copy(&mut socket, &mut std::io::sink());
        });
        let client = client_of(protection, service.addr, service.addr);
        client.wait_for_line(&format!("{name}: is this tpserver's control port"));
        assert_no_word_of_the_key(&[&client]);
    }
}

fn a_tunnel_port_that_is_the_public_one_is_refused_at_once(protection: Protection) {
    let service = Service::echo();
    let (server, addresses) = Program::server(protection, &["--log-visits"]);
    let [public, _, control] = addresses;
    let client = Program::client(protection, [public, public, control], service.addr, &[]);
    let option = format!("--tunnel-port {} is its port for visitors", public.port());
    client.wait_for_line(&option);
    assert_eq!(server.lines_with("visitor 127.0.0.1:"), [""; 0]);
    assert_no_word_of_the_key(&[&server]);
}

fn a_client_needs_no_tunnel_port(protection: Protection) {
    let service = Service::echo();
    let (_server, [public, _, control]) = Program::server(protection, &[]);
    let _client = client_of(protection, control, service.addr);
    echo(&connect(public));
}

fn a_local_service_that_leads_back_to_the_server_is_refused(protection: Protection) {
    let (server, addresses) = Program::server(protection, &[]);
    let client = Program::client(protection, addresses, addresses[0], &[]);
    client.wait_for_line("connected to");
    assert_was_reset(try_connect(addresses[0]));
    client.wait_for_line("--local leads back to the server's port for visitors");
    server.wait_for_line("the client could not reach the local service: loop");
    let visits = server.lines_with("bytes down").len();
    assert!(visits < 50, "{visits} visits came of one");
}

fn a_local_service_that_is_down_is_seen_on_the_server(protection: Protection) {
    let refusing = crate::support::closed_port();
    let (server, addresses) = Program::server(protection, &[]);
    let client = Program::client(protection, addresses, refusing.addr, &[]);
    client.wait_for_line("connected to");
    assert_was_reset(try_connect(addresses[0]));
    let line = server.wait_for_line(": the client could not reach the local service: refused");
    assert!(line.contains("visitor 127.0.0.1:"), "{line}");
    #[cfg(unix)]
    {
        server.signal(rustix::process::Signal::USR1);
        let status = server.wait_for_line("status: ");
        assert!(status.contains(" refused=1 "), "{status}");
    }
}
