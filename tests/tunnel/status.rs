//! What is to be seen of both programs over HTTP, and what a health check is told.
#![cfg(target_os = "linux")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::load::under_load;
use crate::support::peer::Peer;
use crate::support::programs::{Both, Launch, Program, ports_of};
use crate::support::{
    DEADLINE, Protection, RunningClient, RunningServer, Service, accept, any, assert_echo,
    assert_was_reset, client_options, closed_port, connect, echo, eventually, plain_and_sealed,
    raise_descriptors, server_options, share_turn, take_turn, try_connect, try_get, unnamed, with,
};
use tunnel_proxy::{Address, Client, Error, Server};

plain_and_sealed! {
    a_page_shows_services_sessions_and_visitors,
    metrics_count_what_goes_on,
    who_waits_for_a_proxys_header_is_counted_and_timed,
    a_rate_is_that_of_the_last_seconds,
    a_server_is_ready_when_clients_offer_all_its_services,
    a_client_is_ready_unless_it_has_no_server_or_a_service_is_down,
    a_client_that_can_dial_no_tunnel_is_not_ready,
    a_server_that_drains_is_not_ready_and_shows_who_is_left,
    a_client_that_drains_is_not_ready_and_shows_who_is_left,
    a_program_under_load_is_ready_and_counts_right,
    four_thousand_visitors_hold_up_neither_the_page_nor_others,
    what_a_client_says_is_no_markup,
    the_next_program_gets_the_page_of_the_one_that_ends,
    the_next_server_gets_the_page_with_the_ports,
    a_client_that_hangs_or_dies_is_not_counted_on,
    a_health_check_exits_as_it_is_told,
}

/// The code and the body of what is at a path.
fn get(page: SocketAddr, path: &str) -> (u16, String) {
    try_get(page, path).unwrap()
}

fn page(at: SocketAddr) -> String {
    let (code, body) = get(at, "/");
    assert_eq!(code, 200, "{body}");
    body
}

/// Why the program is not ready, as it tells.
fn not_ready(at: SocketAddr) -> Option<String> {
    match get(at, "/readyz") {
        (200, _) => None,
        (503, why) => Some(why),
        other => panic!("{other:?}"),
    }
}

/// The metric's value.
fn metric(at: SocketAddr, name: &str) -> f64 {
    let (_, text) = get(at, "/metrics");
    let values = text.lines().filter_map(|line| line.rsplit_once(' '));
    let (_, value) = values
        .clone()
        .find(|(it, _)| it.strip_prefix("tunnel_proxy_") == Some(name))
        .unwrap_or_else(|| panic!("no {name} in {text}"));
    value.parse().unwrap()
}

fn status_of_client(client: &RunningClient) -> SocketAddr {
    eventually("the client shows its page", || {
        client.handle().status_addr().is_some()
    });
    client.handle().status_addr().unwrap()
}

/// Where a program shows its page, by its log.
fn status_of(program: &Program) -> SocketAddr {
    let line = program.wait_for_line("status at http://");
    let (_, address) = line.rsplit_once("http://").unwrap();
    address.trim_end_matches('/').parse().unwrap()
}

/// Both halves with a page each, and where the pages are.
struct Shown {
    client: RunningClient,
    server: RunningServer,
    pages: [SocketAddr; 2],
}

impl Shown {
    /// Starts both for this local service.
    fn start(protection: Protection, local: SocketAddr) -> Self {
        let options = with!(server_options(protection);
                status: Some(any()),
        );
        let server = RunningServer::start(options);
        let options = with!(client_options(&server, local);
                status: Some(any()),
        );
        let client = RunningClient::start(options);
        assert!(server.handle().wait_for_session(DEADLINE));
        assert!(client.handle().wait_for_session(DEADLINE));
        let of_server = server.handle().status_addr().unwrap();
        let pages = [of_server, status_of_client(&client)];
        Self {
            client,
            server,
            pages,
        }
    }
}

fn a_page_shows_services_sessions_and_visitors(protection: Protection) {
    const UP: &str = "<dt>Up</dt><dd>10\u{a0}B<";
    let service = Service::echo();
    let names = ["", "web"].map(|name| name.parse::<tunnel_proxy::Service>().unwrap_or_default());
    let server = RunningServer::start(with!(server_options(protection);
            public: names.iter().map(|name| (name.clone(), any())).collect(),
            status: Some(any()),
    ));
    let local = names
        .iter()
        .map(|name| (name.clone(), Address::from(service.addr)));
    let client = RunningClient::start(with!(client_options(&server, service.addr);
            local: local.collect(),
            status: Some(any()),
    ));
    let [plain, web] = names.map(|name| server.public_addrs[&name]);
    let visitors = [plain, web].map(connect);
    visitors.iter().for_each(echo);
    let sealed = match protection {
        Protection::Plain => "\"Sealed\">no<",
        Protection::Sealed => "\"Sealed\">yes<",
    };
    let from = visitors.each_ref().map(|it| it.local_addr().unwrap());
    let [of_server, of_client] = [
        server.handle().status_addr().unwrap(),
        status_of_client(&client),
    ]
    .map(|at| {
        // The threads that moved the bytes may have counted them a little later.
        eventually("what was moved is counted", || page(at).contains(UP));
        page(at)
    });
    for (shown, program, peer) in [
        (&of_server, "tpserver", "\"Client\">127.0.0.1:".to_owned()),
        (
            &of_client,
            "tpclient",
            format!("\"Server\">{}<", server.control),
        ),
    ] {
        for part in [
            &format!("<title>{program}, ready</title>"),
            sealed,
            &peer,
            &format!("\"Address\">{}</td><td data-head=\"Service\">–<", from[0]),
            &format!("\"Address\">{}</td><td data-head=\"Service\">web<", from[1]),
            "<dt>Visitors now</dt><dd>2 ",
            "<dt>Visits</dt><dd>2<",
            UP,
            "\"Pool\">8<",
            " ago INFO status at http://127.0.0.1:",
        ] {
            assert!(shown.contains(part), "{part} is not in {shown}");
        }
    }
    for public in [plain, web] {
        assert!(
            of_server.contains(&format!("come to\">{public}<")),
            "{of_server}"
        );
    }
    assert!(
        of_client.contains(&format!("reach\">{}<", service.addr)),
        "{of_client}"
    );
    for at in [server.handle(), client.handle()] {
        let at = at.status_addr().unwrap();
        assert_eq!(get(at, "/healthz"), (200, "ok\n".to_owned()));
        assert_eq!(get(at, "/other").0, 404);
    }
}

fn metrics_count_what_goes_on(protection: Protection) {
    let service = Service::echo();
    let shown = Shown::start(protection, service.addr);
    // What has never been refused is 0, and not missing.
    for reason in ["busy", "visitor-denied", "visitor-cut", "local-refused"] {
        let name = format!("refused_total{{reason=\"{reason}\"}}");
        assert_eq!(metric(shown.pages[0], &name), 0.0);
    }
    for at in shown.pages {
        assert_eq!(metric(at, "log_lines_left_out_total"), 0.0);
    }
    let visitors: Vec<_> = (0..3).map(|_| shown.server.visit()).collect();
    visitors.iter().for_each(echo);
    // A stranger and a second client are refused.
    let stranger = connect(shown.server.tunnel);
    (&stranger).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let _second = RunningClient::start(client_options(&shown.server, service.addr));
    let of_server = shown.pages[0];
    let refused = |reason| metric(of_server, &format!("refused_total{{reason=\"{reason}\"}}"));
    // It comes again and again.
    eventually("the second client is refused", || refused("busy") >= 1.0);
    eventually("the stranger is refused", || refused("not-client") == 1.0);
    for at in shown.pages {
        for (name, value) in [
            ("ready", 1.0),
            ("sessions", 1.0),
            ("service_offered{service=\"\"}", 1.0),
            ("joined_visitors{service=\"\"}", 3.0),
            ("visits_total{service=\"\"}", 3.0),
            ("bytes_total{service=\"\",direction=\"up\"}", 15.0),
            ("bytes_total{service=\"\",direction=\"down\"}", 15.0),
            ("timed_out_total", 0.0),
            ("join_seconds_count", 3.0),
        ] {
            eventually(name, || metric(at, name) == value);
        }
        eventually("the pool is dialled", || {
            metric(at, "tunnels_dialled_total") >= 8.0
        });
        assert!(metric(at, "join_seconds_sum") > 0.0);
        assert!(metric(at, "uptime_seconds") > 0.0);
        assert!(metric(at, "max_visitors") > 100.0);
    }
    // Nobody was refused by the client.
    assert_eq!(metric(shown.pages[1], "log_lines_left_out_total"), 0.0);
    // The client does not know.
    assert_eq!(metric(of_server, "waiting_visitors{service=\"\"}"), 0.0);
    let (_, of_client) = get(shown.pages[1], "/metrics");
    assert!(!of_client.contains("_waiting_"), "{of_client}");
    drop(visitors);
    for at in shown.pages {
        eventually("the visitors have left", || {
            metric(at, "joined_visitors{service=\"\"}") == 0.0
        });
        assert_eq!(metric(at, "visits_total{service=\"\"}"), 3.0);
        eventually("the tunnels are idle", || metric(at, "idle_tunnels") >= 8.0);
    }
}

/// It has a place among all visitors, and its time began when it was accepted.
fn who_waits_for_a_proxys_header_is_counted_and_timed(protection: Protection) {
    const LATE: Duration = Duration::from_millis(400);
    let service = Service::echo();
    let server = RunningServer::start(with!(server_options(protection);
            accept_proxy: vec!["127.0.0.1".parse().unwrap()],
            status: Some(any()),
    ));
    let _client = RunningClient::start(client_options(&server, service.addr));
    let at = server.handle().status_addr().unwrap();
    let mut visitor = server.visit();
    let waiting = || metric(at, "waiting_visitors{service=\"\"}");
    eventually("the visitor waits", || waiting() == 1.0);
    thread::sleep(LATE);
    visitor
        .write_all(b"PROXY TCP4 192.0.2.1 203.0.113.9 5 443\r\n")
        .unwrap();
    echo(&visitor);
    eventually("nobody waits", || waiting() == 0.0);
    let took = metric(at, "join_seconds_sum");
    assert!(took >= LATE.as_secs_f64(), "{took} s");
}

/// A visitor that has moved a megabyte and then pauses is fast for 10 s.
fn a_rate_is_that_of_the_last_seconds(protection: Protection) {
    const SIZE: usize = 1_000_000;
    let service = Service::start(|mut socket| {
        let _ = socket.write_all(&vec![7; SIZE]);
        let _ = socket.read(&mut [0]);
    });
    let shown = Shown::start(protection, service.addr);
    let mut visitor = shown.server.visit();
    visitor.read_exact(&mut vec![0; SIZE]).unwrap();
    for at in shown.pages {
        let page = page(at);
        let row = page.split("\"Address\">").nth(1).unwrap();
        let rate = row.split("\"Down/s\">").nth(1).unwrap();
        assert!(!rate.starts_with('0'), "{row}");
        assert!(row.contains("\"Up/s\">0\u{a0}B<"), "{row}");
    }
    for at in shown.pages {
        let is_over = || {
            let page = self::page(at);
            page.contains("\"Down/s\">0\u{a0}B<") && page.contains("\"Down\">1.0\u{a0}MB<")
        };
        eventually("the rate is that of a pause", is_over);
    }
}

fn a_server_is_ready_when_clients_offer_all_its_services(protection: Protection) {
    let service = Service::echo();
    let names = ["web", "ssh"].map(|name| name.parse::<tunnel_proxy::Service>().unwrap());
    let server = RunningServer::start(with!(server_options(protection);
            public: names.iter().map(|name| (name.clone(), any())).collect(),
            status: Some(any()),
            clients: 2,
    ));
    let at = server.handle().status_addr().unwrap();
    let why = |reason: &str| Some(format!("{{\"ready\":false,\"why\":[\"{reason}\"]}}\n"));
    let client_of = |name: &tunnel_proxy::Service| {
        RunningClient::start(with!(client_options(&server, service.addr);
                local: [(name.clone(), service.addr.into())].into(),
        ))
    };
    assert_eq!(not_ready(at), why("no client is connected"));
    let web = client_of(&names[0]);
    let without_ssh = why("no client offers ssh");
    eventually("one service is missing", || not_ready(at) == without_ssh);
    let _ssh = client_of(&names[1]);
    eventually("both clients are there", || not_ready(at).is_none());
    assert_eq!(get(at, "/readyz").1, "{\"ready\":true,\"why\":[]}\n");
    drop(web);
    let without_web = why("no client offers web");
    eventually("the other is missing", || not_ready(at) == without_web);
}

fn a_client_that_can_dial_no_tunnel_is_not_ready(protection: Protection) {
    let (server, closed) = (
        RunningServer::start(server_options(protection)),
        closed_port(),
    );
    let client = RunningClient::start(with!(client_options(&server, closed.addr);
            tunnel_port: Some(closed.addr.port()),
            status: Some(any()),
    ));
    let at = status_of_client(&client);
    let why = "{\"ready\":false,\"why\":[\"no tunnel can be dialled\"]}\n";
    eventually("the dials have failed", || {
        not_ready(at).as_deref() == Some(why)
    });
}

fn a_client_is_ready_unless_it_has_no_server_or_a_service_is_down(protection: Protection) {
    let down = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    down.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .unwrap();
    let local = down.local_addr().unwrap().as_socket().unwrap();
    let shown = Shown::start(protection, local);
    let of_client = shown.pages[1];
    assert_eq!(not_ready(of_client), None);
    assert_was_reset(try_connect(shown.server.public));
    let why = format!(
        "{{\"ready\":false,\"why\":[\"the last dial of {local} for a visitor failed\"]}}\n"
    );
    eventually("the dial has failed", || {
        not_ready(of_client).as_ref() == Some(&why)
    });
    for at in shown.pages {
        eventually("it is counted", || {
            let (_, metrics) = get(at, "/metrics");
            metrics.contains("{reason=\"local-refused\"} 1\n")
        });
    }
    // The service comes up.
    down.listen(16).unwrap();
    let up = TcpListener::from(down);
    let mut visitor = shown.server.visit();
    visitor.write_all(b"x").unwrap();
    accept(&up).read_exact(&mut [0]).unwrap();
    assert_eq!(not_ready(of_client), None);
    let Shown { server, client, .. } = shown;
    drop(server);
    let nobody = "{\"ready\":false,\"why\":[\"no server is connected\"]}\n";
    eventually("the server is gone", || {
        not_ready(of_client).as_deref() == Some(nobody)
    });
    assert!(page(of_client).contains("no session"));
    let handle = client.handle().clone();
    drop(client);
    assert_eq!(handle.status_addr(), None);
}

fn a_server_that_drains_is_not_ready_and_shows_who_is_left(protection: Protection) {
    let service = Service::echo();
    let mut shown = Shown::start(protection, service.addr);
    let visitor = shown.server.visit();
    echo(&visitor);
    let at = shown.pages[0];
    assert_eq!(not_ready(at), None);
    shown.server.handle().stop(DEADLINE);
    let why = "{\"ready\":false,\"why\":[\"the server is about to stop\"]}\n";
    assert_eq!(not_ready(at).as_deref(), Some(why));
    eventually("the session has ended", || metric(at, "sessions") == 0.0);
    assert!(page(at).contains(&visitor.local_addr().unwrap().to_string()));
    assert_eq!(get(at, "/healthz").0, 200);
    assert_echo(&visitor, "still here");
    drop(visitor);
    shown.server.wait_for_end();
    assert_eq!(shown.server.handle().status_addr(), None);
}

fn a_client_that_drains_is_not_ready_and_shows_who_is_left(protection: Protection) {
    let service = Service::echo();
    let mut shown = Shown::start(protection, service.addr);
    let visitor = shown.server.visit();
    echo(&visitor);
    let at = shown.pages[1];
    shown.client.handle().stop(DEADLINE);
    let why = "{\"ready\":false,\"why\":[\"the client is about to stop\"]}\n";
    assert_eq!(not_ready(at).as_deref(), Some(why));
    assert!(page(at).contains(&visitor.local_addr().unwrap().to_string()));
    assert_echo(&visitor, "still here");
    drop(visitor);
    shown.client.wait_for_end();
    assert_eq!(shown.client.handle().status_addr(), None);
}

fn a_program_under_load_is_ready_and_counts_right(protection: Protection) {
    let turn = share_turn();
    let service = Service::echo();
    let shown = Shown::start(protection, service.addr);
    let visits = |at| metric(at, "visits_total{service=\"\"}");
    let [whole, refused] = under_load(shown.server.public, 3, |_| {
        let (start, mut before) = (Instant::now(), [0.0; 2]);
        while start.elapsed() < Duration::from_secs(3) {
            for (at, before) in shown.pages.into_iter().zip(&mut before) {
                assert_eq!(not_ready(at), None);
                assert!(page(at).contains(", ready</title>"));
                let now = visits(at);
                assert!(now >= *before, "{now} visits after {before}");
                *before = now;
            }
        }
        assert!(before[0] > 0.0);
    });
    drop(turn);
    assert_eq!(refused, 0);
    for at in shown.pages {
        eventually("all have left", || {
            metric(at, "joined_visitors{service=\"\"}") == 0.0
        });
        assert_eq!(visits(at), whole as f64);
        assert_eq!(metric(at, "join_seconds_count"), whole as f64);
        let (_, text) = get(at, "/metrics");
        let all = format!("join_seconds_bucket{{le=\"+Inf\"}} {whole}\n");
        assert!(text.contains(&all), "{text}");
    }
}

fn four_thousand_visitors_hold_up_neither_the_page_nor_others(protection: Protection) {
    const HELD: usize = 4000;
    raise_descriptors();
    let turn = take_turn();
    // It accepts, and keeps what it has without a thread for each.
    let holding = TcpListener::bind("127.0.0.1:0").unwrap();
    let held_by = holding.local_addr().unwrap();
    let kept = std::sync::Arc::new(Mutex::new(Vec::new()));
    let keep = kept.clone();
    thread::spawn(move || {
        for socket in holding.incoming().take(HELD) {
            keep.lock().unwrap().push(socket.unwrap());
        }
    });
    let echoing = Service::echo();
    let launch = Launch::new(protection);
    let server = launch.bare_server(&["-p0", "-pheld=0", "-t0", "-c0", "--status", "0"]);
    let control = server.address("the control link").to_string();
    let local = [format!("-l{}", echoing.addr), format!("-lheld={held_by}")];
    let client = launch.bare_client(&["-s", &control, &local[0], &local[1], "--status", "0"]);
    client.wait_for_line("connected to");
    let pages = [&server, &client].map(status_of);
    let [public, held] = ["visitors", "visitors of held"].map(|whom| server.address(whom));
    let visitors: Vec<TcpStream> = (0..HELD)
        .map(|number| {
            // The kernel would drop what comes too fast, and make it come again a second later.
            if number % 100 == 99 {
                eventually("those before are joined", || {
                    kept.lock().unwrap().len() + 100 > number
                });
            }
            connect(held)
        })
        .collect();
    for at in pages {
        eventually("all are joined", || {
            metric(at, "joined_visitors{service=\"held\"}") == HELD as f64
        });
    }
    // Long enough for looks at how fast they are.
    let (start, mut took) = (Instant::now(), Vec::new());
    thread::scope(|scope| {
        scope.spawn(|| {
            while start.elapsed() < Duration::from_secs(4) {
                for at in pages {
                    let before = Instant::now();
                    let page = page(at);
                    took.push(before.elapsed());
                    assert!(page.contains("200 busiest or latest of 4,0"), "{page}");
                    thread::sleep(Duration::from_millis(50));
                }
            }
        });
        while start.elapsed() < Duration::from_secs(4) {
            let before = Instant::now();
            echo(&connect(public));
            assert!(before.elapsed() < Duration::from_secs(5));
        }
    });
    drop((visitors, turn));
    took.sort();
    let median = took[took.len() / 2];
    eprintln!(
        "{median:?} a page, {:?} the slowest of {}",
        took[took.len() - 1],
        took.len()
    );
    assert!(median < Duration::from_secs(1), "{took:?}");
}

fn what_a_client_says_is_no_markup(protection: Protection) {
    let server = RunningServer::start(with!(server_options(protection);
            status: Some(any()),
    ));
    let at = server.handle().status_addr().unwrap();
    let mut client = Peer::dial_control(&server);
    client.say_hello(0);
    client.write("failed visitor=192.0.2.1:5 reason=<script>'\"&</script>\n");
    client.write("bye reason=<img/src=x>\n");
    client.read_until_closed();
    let has_left = || page(at).contains("it said bye, &lt;img/src=x&gt;");
    eventually("the client has left", has_left);
    let shown = page(at);
    let escaped = "&lt;script&gt;";
    assert!(shown.contains(escaped), "{shown}");
    assert!(
        !shown.contains("<script") && !shown.contains("<img"),
        "{shown}"
    );
    let (_, metrics) = get(at, "/metrics");
    assert!(
        metrics.contains("{reason=\"local-other\"} 1\n"),
        "{metrics}"
    );
}

fn the_next_program_gets_the_page_of_the_one_that_ends(protection: Protection) {
    let service = Service::echo();
    let [of_server, of_client, _] = ports_of(match protection {
        Protection::Plain => "127.0.84.1",
        Protection::Sealed => "127.0.84.2",
    });
    let start = || {
        let server = RunningServer::start(with!(server_options(protection);
                status: Some(of_server.into()),
        ));
        let client = RunningClient::start(with!(client_options(&server, service.addr);
                status: Some(of_client.into()),
        ));
        assert!(client.handle().wait_for_session(DEADLINE));
        (server, client)
    };
    let first = start();
    assert_eq!(status_of_client(&first.1), of_client);
    let (server, client) = start();
    assert_eq!(server.handle().status_addr(), None);
    assert_eq!(client.handle().status_addr(), None);
    echo(&server.visit());
    drop(first);
    for (at, handle) in [(of_server, server.handle()), (of_client, client.handle())] {
        eventually("the page is there", || handle.status_addr() == Some(at));
        assert_eq!(metric(at, "visits_total{service=\"\"}"), 1.0);
    }
}

/// The old server still has a visitor then.
fn the_next_server_gets_the_page_with_the_ports(protection: Protection) {
    let [of_ports, of_page] = match protection {
        Protection::Plain => ["127.0.92.3", "127.0.92.4"],
        Protection::Sealed => ["127.0.92.5", "127.0.92.6"],
    };
    let service = Service::echo();
    let launch = Launch::new(protection).on(ports_of(of_ports));
    let at = ports_of(of_page)[0].to_string();
    let mut old = launch.server(&["--status", &at]);
    let at = status_of(&old);
    let addresses = old.addresses();
    let client = launch.client(addresses, service.addr, &[]);
    client.wait_for_line("connected to");
    let visitor = connect(addresses[0]);
    echo(&visitor);
    let new = launch.server(&["--status", &at.to_string()]);
    new.wait_for_line("is in use, waiting for it");
    old.signal(Signal::TERM);
    assert_eq!(status_of(&new), at);
    assert_echo(&visitor, "still here");
    assert!(old.ended().is_none());
    eventually("the next server is ready", || not_ready(at).is_none());
    assert_eq!(metric(at, "visits_total{service=\"\"}"), 0.0);
    drop(visitor);
    assert!(old.wait_for_end().success());
}

fn a_client_that_hangs_or_dies_is_not_counted_on(protection: Protection) {
    let service = Service::echo();
    let mut both = Both::start(protection, service.addr, [&["--status", "0"], &[]]);
    let at = status_of(&both.server);
    let why = "{\"ready\":false,\"why\":[\"no client is connected\"]}\n";
    let nobody = || not_ready(at).as_deref() == Some(why);
    assert!(!nobody());
    both.client.signal(Signal::STOP);
    eventually("the client is given up", nobody);
    both.client.signal(Signal::CONT);
    eventually("the client is back", || not_ready(at).is_none());
    both.client.kill();
    eventually("the client is dead", nobody);
}

fn ask(program: &str, at: SocketAddr) -> Output {
    let program = match program {
        "tpserver" => env!("CARGO_BIN_EXE_tpserver"),
        _ => env!("CARGO_BIN_EXE_tpclient"),
    };
    let at = at.to_string();
    Command::new(program)
        .args(["--ready", &at])
        .output()
        .unwrap()
}

fn a_health_check_exits_as_it_is_told(protection: Protection) {
    let closed = closed_port();
    let mut shown = Shown::start(protection, closed.addr);
    let [of_server, of_client] = shown.pages;
    for (program, at) in [("tpserver", of_server), ("tpclient", of_client)] {
        let output = ask(program, at);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert_eq!(
            (&*output.stdout, &*output.stderr),
            (&b"ready\n"[..], &b""[..])
        );
    }
    assert_was_reset(try_connect(shown.server.public));
    eventually("the dial has failed", || not_ready(of_client).is_some());
    shown.client.handle().stop(Duration::ZERO);
    shown.client.wait_for_end();
    eventually("the client has left", || not_ready(of_server).is_some());
    for (program, at, why) in [
        (
            "tpserver",
            of_server,
            "not ready (503): {\"ready\":false,\"why\":[\"no client is",
        ),
        ("tpclient", of_client, "no answer: Connection refused"),
        ("tpclient", shown.server.public, "no"),
    ] {
        let output = ask(program, at);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(
            (output.stdout.len(), said.lines().count()),
            (0, 1),
            "{said}"
        );
        assert!(
            said.starts_with(&format!("{program}: --ready {at}: ")),
            "{said}"
        );
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn a_page_for_other_hosts_needs_insecure_status() {
    let anywhere = Some(Address::new("0.0.0.0", 0));
    let options = |insecure_status| {
        with!(server_options(Protection::Sealed);
                status: anywhere.clone(),
                insecure_status,
        )
    };
    let is_refused = |error: &Error| matches!(error, Error::NotLoopback("--status", _));
    assert!(Server::bind(options(false)).is_err_and(|error| is_refused(&error)));
    let server = RunningServer::start(options(true));
    let port = server.handle().status_addr().unwrap().port();
    let near = ([127, 0, 0, 1], port).into();
    assert_eq!(get(near, "/healthz").0, 200);
    // A browser on this host that a web site has sent here.
    let mut browser = connect(near);
    browser
        .write_all(b"GET / HTTP/1.1\r\nHost: site.example\r\n\r\n")
        .unwrap();
    let mut response = String::new();
    browser.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 421 "), "{response}");
    let closed = closed_port();
    let options = |insecure_status| {
        with!(client_options(&server, closed.addr);
                local: unnamed(closed.addr),
                status: anywhere.clone(),
                insecure_status,
        )
    };
    let refused = Client::new(options(false)).run();
    assert!(refused.is_err_and(|error| is_refused(&error)));
    let client = RunningClient::start(options(true));
    let port = status_of_client(&client).port();
    assert_eq!(get(([127, 0, 0, 1], port).into(), "/healthz").0, 200);
}

/// The signal comes while a request is under way.
#[test]
fn a_request_that_never_ends_holds_up_no_stop() {
    let launch = Launch::new(Protection::Plain);
    let mut server = launch.bare_server(&["-p0", "-t0", "-c0", "--status", "0"]);
    let at = status_of(&server);
    let mut slow = connect(at);
    slow.write_all(b"GET / HT").unwrap();
    assert_eq!(get(at, "/healthz").0, 200);
    let start = Instant::now();
    server.signal(Signal::TERM);
    assert!(server.wait_for_end().success());
    // The request itself would have 5 s.
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "{:?}",
        start.elapsed()
    );
    assert_ended_or_reset(&slow);
}

fn assert_ended_or_reset(mut socket: &TcpStream) {
    let read = socket.read(&mut [0]);
    assert!(!read.is_ok_and(|count| count > 0));
}
