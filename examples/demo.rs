//! Fetches files from a small web site, directly and through a tunnel, and compares them.
//!
//! `cargo run --example demo` uses free ports and ends with exit code 0 if all files were equal.
//! With `-- --stay` it uses the original's ports, and one more for the status page, and stays for a
//! browser, until Ctrl-C.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tunnel_proxy::{Address, Client, ClientOptions, Server, ServerOptions, Service};

const PAGE: &str = "index.html";
const IMAGE: &str = "picture.bin";
const EMPTY: &str = "empty.txt";

/// Where the server shows what goes on: the port behind the original's three.
const STATUS: (&str, u16) = ("127.0.0.1", 8010);

/// How long a fetch may stand still before the demo gives up.
const DEADLINE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let stay = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--stay"] => true,
        _ => {
            eprintln!("demo: the only option is --stay");
            return ExitCode::from(2);
        }
    };
    match demo(stay) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// True if every file came through unchanged.
fn demo(stay: bool) -> Result<bool, Box<dyn Error>> {
    // From here on Ctrl-C is read from `signals`, so that what was started is ended in any case.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let folder = tempfile::tempdir()?;
    make_site(folder.path())?;
    let site = Site::start(folder.path())?;
    println!("site      http://{} ({})", site.addr, site.what);

    let mut options = ServerOptions::default();
    if stay {
        options.status = Some(Address::new(STATUS.0, STATUS.1));
    } else {
        let any = Address::new("127.0.0.1", 0);
        options.public = [(Service::default(), any.clone())].into();
        (options.tunnel, options.control) = (any.clone(), any);
    }
    let server = Server::bind(options)?;
    let public = server.public_addr();
    println!("server    http://{public} for visitors");
    let mut options = ClientOptions::new();
    options.servers = vec![server.control_addr().into()];
    options.local = [(Service::default(), site.addr.into())].into();
    let client = Client::new(options);
    let handles = [server.handle(), client.handle()];
    let running = [server.spawn()?, client.spawn()?];
    let stop = move || handles.iter().for_each(|it| it.stop(Duration::ZERO));
    let (no_more_signals, stop_on_signal) = (signals.handle(), stop.clone());
    let signalled = thread::spawn(move || signals.forever().take(1).for_each(|_| stop_on_signal()));

    let result = compare(site.addr, public);
    if stay && result.is_ok() {
        let (host, port) = STATUS;
        println!("\nwhat goes on: http://{host}:{port}");
        println!("open http://{public} in a browser; Ctrl-C ends");
    } else {
        no_more_signals.close();
    }
    signalled
        .join()
        .map_err(|_| "the signals' thread panicked")?;
    stop();
    for half in running {
        half.join()?;
    }
    result
}

fn make_site(folder: &Path) -> std::io::Result<()> {
    let links = format!("<a href={IMAGE}>{IMAGE}</a>, <a href={EMPTY}>{EMPTY}</a>");
    let page = format!("<!doctype html><title>demo</title><h1>It works</h1><p>{links}\n");
    std::fs::write(folder.join(PAGE), page)?;
    // 1 MiB that a wrong order of its parts would change.
    let image: Vec<u8> = (0..1 << 18_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(folder.join(IMAGE), image)?;
    std::fs::write(folder.join(EMPTY), "")
}

fn compare(direct: SocketAddr, tunnel: SocketAddr) -> Result<bool, Box<dyn Error>> {
    let mut all_equal = true;
    for file in [PAGE, IMAGE, EMPTY] {
        let (wanted, direct_time) = fetch(direct, file)?;
        let (got, tunnel_time) = fetch(tunnel, file)?;
        let equal = got == wanted;
        all_equal &= equal;
        println!(
            "{} {file:12} {:>8} bytes  direct {:>6.1} ms  tunnel {:>6.1} ms",
            if equal { "equal    " } else { "DIFFERENT" },
            wanted.len(),
            direct_time.as_secs_f64() * 1e3,
            tunnel_time.as_secs_f64() * 1e3,
        );
    }
    Ok(all_equal)
}

/// The body of a file, and how long that took.
fn fetch(site: SocketAddr, file: &str) -> Result<(Vec<u8>, Duration), Box<dyn Error>> {
    let start = Instant::now();
    let mut socket = TcpStream::connect_timeout(&site, DEADLINE)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    // In one piece: the end of a request that is written in pieces waits for an acknowledgement of
    // its start, which can take 0.2 s.
    let request = format!("GET /{file} HTTP/1.0\r\nHost: {site}\r\n\r\n");
    socket.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    let took = start.elapsed();
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let (head, body) = answer.split_at(end.ok_or("an answer without a head")? + 4);
    let head = String::from_utf8_lossy(head);
    let status = head.lines().next().unwrap_or_default();
    if !status.contains(" 200 ") {
        return Err(format!("{site}: {file}: {status}").into());
    }
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>())
    });
    match length {
        Some(Ok(length)) if length == body.len() => Ok((body.to_vec(), took)),
        _ => Err(format!("{site}: {file}: {} bytes, not {length:?}", body.len()).into()),
    }
}

/// The local service: python3's web server, or one of a few lines where there is no python3.
struct Site {
    addr: SocketAddr,
    what: &'static str,
    python: Option<Child>,
}

impl Site {
    fn start(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let started = Command::new("python3")
            .args(["-u", "-m", "http.server", "0", "--bind", "127.0.0.1"])
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut python) = started else {
            return Ok(Self {
                addr: respond_from(folder.to_owned())?,
                what: "built in, as there is no python3 here",
                python: None,
            });
        };
        let stdout = python.stdout.take();
        // From here on dropping it ends the process.
        let mut site = Self {
            addr: ([127, 0, 0, 1], 0).into(),
            what: "python3 -m http.server",
            python: Some(python),
        };
        // "Serving HTTP on 127.0.0.1 port 34567 (http://127.0.0.1:34567/) ..."
        let mut line = String::new();
        BufReader::new(stdout.ok_or("no stdout of python3")?).read_line(&mut line)?;
        let port = line
            .split(" port ")
            .nth(1)
            .and_then(|it| it.split(' ').next());
        let port = port.ok_or_else(|| format!("python3 -m http.server said {line:?}"))?;
        site.addr.set_port(port.parse()?);
        Ok(site)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(python) = &mut self.python {
            let _ = python.kill();
            let _ = python.wait();
        }
    }
}

/// Serves the three files for as long as the demo runs.
fn respond_from(folder: PathBuf) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    thread::spawn(move || {
        for socket in listener.incoming().flatten() {
            let folder = folder.clone();
            thread::spawn(move || respond(&folder, socket));
        }
    });
    Ok(addr)
}

fn respond(folder: &Path, mut socket: TcpStream) -> std::io::Result<()> {
    socket.set_read_timeout(Some(DEADLINE))?;
    let mut lines = BufReader::new(socket.try_clone()?).take(8192).lines();
    let request = lines.next().unwrap_or(Ok(String::new()))?;
    while lines
        .next()
        .transpose()?
        .is_some_and(|line| !line.is_empty())
    {}
    let path = request.split(' ').nth(1);
    let name = match path.and_then(|path| path.strip_prefix('/')) {
        Some("") => PAGE,
        Some(name) if [PAGE, IMAGE, EMPTY].contains(&name) => name,
        _ => return socket.write_all(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
    };
    let mut file = File::open(folder.join(name))?;
    let length = file.metadata()?.len();
    write!(
        socket,
        "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n"
    )?;
    std::io::copy(&mut file, &mut socket).map(drop)
}
