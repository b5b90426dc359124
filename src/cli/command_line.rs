//! The command lines of both programs: words in, options out. Nothing is read or printed here.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::io;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use getopts::{HasArg, Occur};
use log::LevelFilter;

use crate::address::{Address, parse_host, parse_port};
use crate::cidr::{Cidr, CidrError};
use crate::cli::error::Error;
use crate::cli::given::Given;
use crate::key::Key;
use crate::options::{ClientOptions, LOOPBACK, ServerOptions};
use crate::service::{MAX_SERVICES, Service};
use crate::wire::line::MAX_POOL;
use crate::wire::proxy_header::NotProxyVersion;

/// A visitor with a page or a download of some size is through by then, and nobody minds a restart
/// that takes as long.
const DRAIN: Duration = Duration::from_secs(30);

/// A year. A larger number is a slip of the finger.
const MAX_SECS: u64 = 366 * 24 * 60 * 60;

/// Each client costs a server a pool of idle tunnels, and each server costs a client one.
const MAX_CLIENTS: usize = 64;
const MAX_SERVERS: usize = 64;

/// Reads the file that `--config` names.
pub type ReadFile = fn(&Path) -> io::Result<String>;

/// What a command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Command<O> {
    /// Run with these options.
    Run(O, Common),
    /// Print this text and end.
    Print(String),
    /// Print a fresh key and end.
    GenerateKey,
    /// Ask the program whose status page is here whether it is ready, and end.
    AskReady(Address),
}

/// What a command line says that is the same for both programs.
#[derive(Debug, PartialEq, Eq)]
pub struct Common {
    /// The program's name.
    pub program: &'static str,
    /// The least important level that is logged.
    pub level: LevelFilter,
    /// The files that hold the keys.
    pub key_files: Vec<PathBuf>,
    /// What is to be warned about.
    pub remark: Option<String>,
    /// Some of that stands in a file, which HUP has read again.
    pub has_file: bool,
    /// Everything is only to be tried.
    pub only_check: bool,
    /// The time that a signal to end leaves to the visitors who are there.
    pub drain: Duration,
}

/// A program, and what its `--help` says that the other's does not.
pub struct Program {
    pub name: &'static str,
    /// A line that begins with a dash declares an option, and a value if its name is one space before
    /// another word.
    options: &'static str,
    /// The options that may be given several times.
    repeatable: &'static [&'static str],
    examples: &'static str,
}

pub const SERVER: Program = Program {
    name: "tpserver",
    options: "
    -b, --bind HOST     host of all ports (127.0.0.1)
    -p, --public [NAME=]HOST:PORT
                        where visitors come to (127.0.0.1:8007); several times,
                        for services of different names
    -t, --tunnel HOST:PORT
                        where clients' tunnels come to (127.0.0.1:8008); may be
                        the same as --control
    -c, --control HOST:PORT
                        where clients' control links come to (127.0.0.1:8009)
        --accept-proxy CIDR
                        take visitors only from these proxies, which say first,
                        by a header of the PROXY protocol, whose connection it
                        is; several times
        --allow [NAME=]CIDR
                        take visitors, of this service or of all, only from
                        these addresses; several times
        --deny [NAME=]CIDR
                        take no visitors from these addresses, whatever --allow
                        says; several times
        --max-per-source N
                        visitors at a time from one address, or from one IPv6
                        network of 64 bits; more are reset
        --log-visits    log each visitor's arrival, too
    -n, --clients N     clients at a time; with more than one, a visitor goes to
                        the one that has the fewest (1)
    -w, --pair-timeout SECS
                        close a visitor that got no tunnel after this long (5)
    -m, --max-conns N   visitors at a time; more wait their turn (4096)
    -k, --key-file FILE the key that the client must have; given twice, it may
                        have either. Without a key, clients of other hosts are
                        not let in
    -g, --generate-key  print a fresh key for both programs and exit
    -i, --insecure      let other hosts reach the tunnel and control ports
                        without a key: whoever reaches them can become the
                        client or read along
        --original      take a client that says nothing for one of the
                        original program, which has no key",
    repeatable: &["public", "accept-proxy", "allow", "deny", "key-file"],
    examples: "
  Try it on one machine (start tpclient and `python3 -m http.server` beside it):
    tpserver
    curl 127.0.0.1:8007

  A public web port, with a client on another host that has the same key:
    (umask 077; tpserver --generate-key > tp.key)
    tpserver --bind :: --public '[::]:80' --key-file tp.key",
};

const CLIENT: Program = Program {
    name: "tpclient",
    options: "
    -s, --server HOST[:PORT]
                        host that tpserver runs on, and its control port
                        (127.0.0.1:8009); several times, for a session with
                        each
    -c, --control-port PORT
                        its control port, if --server has none (8009)
        --control PORT  the same as --control-port
    -t, --tunnel-port PORT
                        its tunnel port, if it is another one than the server
                        tells
        --tunnel PORT   the same as --tunnel-port
    -l, --local [NAME=]HOST:PORT
                        the service that visitors are to reach
                        (127.0.0.1:8000); several times, for those of the
                        server's --public of the same names
        --proxy-protocol [NAME=]v1|v2
                        tell this service first on each connection, by a header
                        of the PROXY protocol, where its visitor comes from
    -p, --pool N        tunnels kept ready, so that no visitor waits for one;
                        at most 64, 0 dials on demand (8)
    -k, --key-file FILE the key that the server has
        --original      serve a server of the original program, too, which has
                        no key
        --check         try everything that a client needs, say what to do about
                        what fails, and exit with 0 if nothing does",
    repeatable: &["server", "local", "proxy-protocol"],
    examples: "
  Try it on one machine (start tpserver and `python3 -m http.server` beside it):
    tpclient
    curl 127.0.0.1:8007

  Offer the sshd of another host in the LAN through HOST, whose tpserver has the same key:
    tpclient --server HOST --key-file tp.key --local 192.0.2.7:22",
};

/// The options of both programs, in the same form.
const COMMON_OPTIONS: &str = "
    -L, --linger SECS   abort a connection that one end has finished and that
                        then moves no byte for this long (600)
    -d, --drain SECS    on TERM, INT or HUP, let the visitors that are there
                        finish for up to this long (30)
        --status HOST:PORT
                        show what goes on at http://HOST:PORT/, /metrics,
                        /healthz and /readyz
        --insecure-status
                        let other hosts see what --status shows
        --ready HOST:PORT
                        ask the program with this --status whether visitors
                        are served, and exit: 0 if they are, or else 1
        --config FILE   read options from this file, an option a line: its name
                        without dashes, then its value; the command line wins
    -v, --verbose       log more
    -q, --quiet         log errors only
    -h, --help          print this and exit
    -V, --version       print the version and exit";

const COMMON_HELP: &str = "

Signals:
  TERM, INT, HUP  take no more visitors, let those that are there finish, exit; a second one ends at
                  once
  HUP             with --config, read the file and the keys again instead
  USR1            log what it does now, and has done

Environment:
  TP_KEY     the key itself, if there is no --key-file
  RUST_LOG   what to log, before -v and -q, such as `info` or `tunnel_proxy=debug`
";

/// Reads the words behind `tpserver`.
pub fn server(words: Vec<OsString>, read_file: ReadFile) -> Result<Command<ServerOptions>, Error> {
    SERVER.read(words, read_file, |given| {
        let mut options = ServerOptions::default();
        let host = value(given, "bind", host)?;
        let host = host.unwrap_or_else(|| LOOPBACK.to_owned());
        for address in options
            .public
            .values_mut()
            .chain([&mut options.tunnel, &mut options.control])
        {
            address.host.clone_from(&host);
        }
        services(&mut options.public, given, "public", |text| {
            listen_address(text, &host)
        })?;
        listening(&mut options.tunnel, given, "tunnel")?;
        listening(&mut options.control, given, "control")?;
        options.accept_proxy = values(given, "accept-proxy", cidr)?;
        options.allow = values(given, "allow", rule)?;
        options.deny = values(given, "deny", rule)?;
        let most = value(given, "max-per-source", number(1..=1_000_000))?;
        options.max_per_source = most.and_then(NonZeroUsize::new);
        options.log_visits = given.opt_present("log-visits");
        set(&mut options.pair_timeout, given, "pair-timeout", seconds(1))?;
        let places = number(1..=1_000_000);
        set(&mut options.max_conns, given, "max-conns", places)?;
        set(
            &mut options.clients,
            given,
            "clients",
            number(1..=MAX_CLIENTS),
        )?;
        set(&mut options.linger, given, "linger", seconds(1))?;
        options.insecure = given.opt_present("insecure");
        (options.status, options.insecure_status) = status(given)?;
        options.original = given.opt_present("original");
        Ok(options)
    })
}

/// Reads the words behind `tpclient`.
pub fn client(words: Vec<OsString>, read_file: ReadFile) -> Result<Command<ClientOptions>, Error> {
    CLIENT.read(words, read_file, |given| {
        let mut options = ClientOptions {
            servers: servers(given)?,
            ..ClientOptions::default()
        };
        options.tunnel_port = server_port(given, ["tunnel-port", "tunnel"])?;
        services(&mut options.local, given, "local", at_port)?;
        let version = |text: &str| text.parse().map_err(|why: NotProxyVersion| why.to_string());
        options.proxy_protocol = named(given, "proxy-protocol", "v1|v2", version)?;
        set(&mut options.pool, given, "pool", number(0..=MAX_POOL))?;
        set(&mut options.linger, given, "linger", seconds(1))?;
        (options.status, options.insecure_status) = status(given)?;
        options.original = given.opt_present("original");
        Ok(options)
    })
}

impl Program {
    /// Does what every command line needs, and has `options` read what is the program's own.
    fn read<O>(
        &self,
        words: Vec<OsString>,
        read_file: ReadFile,
        options: impl FnOnce(&Given) -> Result<O, Error>,
    ) -> Result<Command<O>, Error> {
        let (name, grammar) = (self.name, self.grammar());
        if words.iter().any(holds_key) {
            return Err(usage(
                "a key is among the words of the command, where others can see it: use --key-file \
                 FILE, and a fresh key",
            ));
        }
        if let Some(error) = words.iter().find_map(|word| one_dash(word, &grammar)) {
            return Err(error);
        }
        let line = grammar.parse(words).map_err(usage)?;
        let has = |option| line.opt_present(option);
        if has("help") {
            let (options, examples) = (self.options, self.examples);
            return Ok(Command::Print(format!(
                "Usage: {name} [OPTION]...\n\nOptions:{options}{COMMON_OPTIONS}\n\nExamples:{examples}\
                 {COMMON_HELP}"
            )));
        }
        if has("version") {
            let version = env!("CARGO_PKG_VERSION");
            return Ok(Command::Print(format!("{name} {version}\n")));
        }
        if let Some(word) = line.free.first() {
            return Err(usage(format!("unexpected word '{word}'")));
        }
        if line.opt_defined("generate-key") && has("generate-key") {
            return Ok(Command::GenerateKey);
        }
        let config = line.opt_str("config");
        let mut given = Given::new(line);
        if let Some(path) = config {
            let text = read_file(Path::new(&path));
            let text = text.map_err(|error| Error::ConfigFile(path.clone().into(), error))?;
            given.add_file(&path, &text, &grammar).map_err(usage)?;
        }
        let has = |option| given.opt_present(option);
        if let Some(address) = value(&given, "ready", at_port)? {
            return Ok(Command::AskReady(address));
        }
        if has("original") && has("key-file") {
            return Err(usage("--original and --key-file exclude each other"));
        }
        let options = options(&given)?;
        Ok(Command::Run(options, self.common(&given)?))
    }

    fn common(&self, given: &Given) -> Result<Common, Error> {
        let decides = |option| match given.line_has(&["verbose", "quiet"]) {
            true => given.line_has(&[option]),
            false => given.opt_present(option),
        };
        Ok(Common {
            program: self.name,
            level: match (decides("verbose"), decides("quiet")) {
                (true, true) => return Err(usage("-v and -q exclude each other")),
                (true, false) => LevelFilter::Debug,
                (false, true) => LevelFilter::Error,
                (false, false) => LevelFilter::Info,
            },
            key_files: given.paths("key-file"),
            remark: given.hidden("key-file"),
            has_file: given.line_has(&["config"]),
            only_check: self.name == CLIENT.name && given.line_has(&["check"]),
            drain: value(given, "drain", seconds(0))?.unwrap_or(DRAIN),
        })
    }

    /// The options for getopts, read out of the help.
    fn grammar(&self) -> getopts::Options {
        let mut grammar = getopts::Options::new();
        for line in self.options.lines().chain(COMMON_OPTIONS.lines()) {
            let declared = line.trim_start().strip_prefix('-');
            let Some((short, long)) = declared.and_then(|it| it.split_once('-')) else {
                continue;
            };
            let mut words = long.trim_start_matches('-').split(' ');
            let (name, value) = (words.next().unwrap_or_default(), words.next());
            let has_value = value.is_some_and(|value| !value.is_empty());
            let many = self.repeatable.contains(&name) || name == "verbose";
            grammar.opt(
                short.trim_end_matches(", "),
                name,
                "",
                "",
                if has_value { HasArg::Yes } else { HasArg::No },
                if many { Occur::Multi } else { Occur::Optional },
            );
        }
        grammar
    }
}

/// Returns a port of the server's, which one of two options names: if the command line has one of them,
/// the file does not count.
fn server_port(given: &Given, names: [&str; 2]) -> Result<Option<u16>, Error> {
    let (on_line, mut port) = (given.line_has(&names), None);
    for name in names {
        if on_line && !given.line_has(&[name]) {
            continue;
        }
        let another = value(given, name, number(1..=u16::MAX))?;
        if port.is_some() && another.is_some() && port != another {
            return Err(usage(format!(
                "--{name}: another option names another port"
            )));
        }
        port = port.or(another);
    }
    Ok(port)
}

/// Returns the servers' hosts and control ports. A port may stand in an option of its own, which is for
/// those servers that have none.
fn servers(given: &Given) -> Result<Vec<Address>, Error> {
    let Address { host: near, port } = ClientOptions::new().servers.swap_remove(0);
    let names = ["control-port", "control"];
    let control = server_port(given, names)?;
    let mut servers = Vec::new();
    let mut needed = !given.opt_present("server");
    for text in given.opt_strs("server") {
        let failed = |why: String| usage(format!("{}: {why}", given.place("server", &text)));
        let address = match text.parse::<Address>() {
            Ok(Address { port: 0, .. }) => return Err(failed("the port is 0".to_owned())),
            Ok(address) => address,
            // An IPv6 address without brackets is a host alone: none of its colons stands before a port.
            Err(why) => {
                let host = host(&text).map_err(|_| failed(why))?;
                Address::new(host, control.unwrap_or(port))
            }
        };
        needed |= control == Some(address.port);
        if servers.contains(&address) {
            return Err(failed(format!("{address} is given twice")));
        }
        servers.push(address);
    }
    // A command line that names servers and their ports does without what a file says of ports.
    let is_meant = given.line_has(&names) || !given.line_has(&["server"]);
    if control.is_some() && !needed && is_meant {
        return Err(usage("--control-port: --server names another port"));
    }
    if servers.len() > MAX_SERVERS {
        let count = servers.len();
        return Err(usage(format!(
            "--server: {count} servers, and at most {MAX_SERVERS} are possible"
        )));
    }
    if servers.is_empty() {
        servers.push(Address::new(near, control.unwrap_or(port)));
    }
    Ok(servers)
}

/// True if the word is a key, or an option with one as its value, with or without the key's padding.
/// A message that quotes such a word would show the key.
fn holds_key(word: &OsString) -> bool {
    let word = word.to_string_lossy();
    let values = [
        Some(&*word),
        word.get(2..),
        word.split_once('=').map(|it| it.1),
    ];
    let is_key = |text: &str| {
        format!("{}=", text.trim_end_matches('='))
            .parse::<Key>()
            .is_ok()
    };
    values.into_iter().flatten().any(is_key)
}

/// Returns the error of a long option behind one dash. getopts would read `-bind` as `-b ind`, or
/// complain about a letter.
fn one_dash(word: &OsString, grammar: &getopts::Options) -> Option<Error> {
    let word = word.to_string_lossy();
    let name = word.strip_prefix('-')?.split('=').next()?;
    let unknown = |name| {
        let long = grammar.parse([format!("--{name}")]);
        matches!(long, Err(getopts::Fail::UnrecognizedOption(_)))
    };
    let is_option = name.len() > 1 && !name.starts_with('-') && !unknown(name);
    is_option.then(|| usage(format!("-{name}: did you mean --{name}?")))
}

fn usage(what: impl Display) -> Error {
    Error::Usage(format!("{what} (see --help)"))
}

/// Replaces a default by the option's value, if it is given.
fn set<T>(
    default: &mut T,
    given: &Given,
    option: &str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<(), Error> {
    if let Some(value) = value(given, option, read)? {
        *default = value;
    }
    Ok(())
}

/// Returns the option's value, if it is given.
fn value<T>(
    given: &Given,
    option: &str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, Error> {
    Ok(values(given, option, read)?.pop())
}

/// Returns the option's values, one for each time that it is given.
fn values<T>(
    given: &Given,
    option: &str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<Vec<T>, Error> {
    let read = |text: String| {
        let named = |why| usage(format!("{}: {why}", given.place(option, &text)));
        read(&text).map_err(named)
    };
    given.opt_strs(option).into_iter().map(read).collect()
}

/// Replaces the default by the services that are given, each of them `[NAME=]` and what `read` reads.
fn services(
    default: &mut BTreeMap<Service, Address>,
    given: &Given,
    option: &str,
    read: impl Fn(&str) -> Result<Address, String>,
) -> Result<(), Error> {
    let services = named(given, option, "HOST:PORT", read)?;
    if services.len() > MAX_SERVICES {
        let count = services.len();
        return Err(usage(format!(
            "--{option}: {count} services, and at most {MAX_SERVICES} are possible"
        )));
    }
    if !services.is_empty() {
        *default = services;
    }
    Ok(())
}

/// Returns what is given of services, each of them `[NAME=]` and what `read` reads, of this form.
fn named<T>(
    given: &Given,
    option: &str,
    form: &str,
    read: impl Fn(&str) -> Result<T, String>,
) -> Result<BTreeMap<Service, T>, Error> {
    let mut all = BTreeMap::new();
    for text in given.opt_strs(option) {
        let mut add = || {
            let (service, value) = match text.split_once('=') {
                Some((name, value)) => (name.parse()?, value),
                None => (Service::default(), &*text),
            };
            match all.insert(service.clone(), read(value)?) {
                None => Ok(()),
                Some(_) if service.has_name() => Err(format!("{service} is given twice")),
                Some(_) => Err(format!("a second service needs a name: NAME={form}")),
            }
        };
        add().map_err(|why: String| usage(format!("{}: {why}", given.place(option, &text))))?;
    }
    Ok(all)
}

/// Returns where the status page is to be, if anywhere, and whether other hosts may see it.
fn status(given: &Given) -> Result<(Option<Address>, bool), Error> {
    let address = value(given, "status", on_this_host)?;
    let anywhere = given.opt_present("insecure-status");
    match anywhere && address.is_none() {
        true => Err(usage("--insecure-status: there is no --status")),
        false => Ok((address, anywhere)),
    }
}

/// Reads an address to dial, or a port alone as one of this host.
fn at_port(text: &str) -> Result<Address, String> {
    match on_this_host(text)? {
        Address { port: 0, .. } => Err("the port is 0".to_owned()),
        address => Ok(address),
    }
}

/// Reads an address, or a port alone as one of the loopback address.
fn on_this_host(text: &str) -> Result<Address, String> {
    address(text, LOOPBACK).map_err(|why| match text.starts_with(':') {
        true => format!("{why}; for this host: {LOOPBACK}{text}"),
        false => why,
    })
}

/// Replaces the default of an address to listen on. A port alone keeps the default's host.
fn listening(default: &mut Address, given: &Given, option: &str) -> Result<(), Error> {
    let host = default.host.clone();
    set(default, given, option, |text| listen_address(text, &host))
}

/// Reads an address to listen on, or a port alone as one on `host`.
fn listen_address(text: &str, host: &str) -> Result<Address, String> {
    match address(text, host) {
        Err(why) if text.starts_with(':') => Err(format!("{why}; for all addresses: [::]{text}")),
        other => other,
    }
}

/// Reads an address, or a port alone as one on `host`.
fn address(text: &str, host: &str) -> Result<Address, String> {
    let is_port = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match is_port {
        true => Ok(Address::new(host, parse_port(text)?)),
        false => text.parse(),
    }
}

/// Reads a network of addresses.
fn cidr(text: &str) -> Result<Cidr, String> {
    text.parse().map_err(|why: CidrError| why.to_string())
}

/// Reads a network of addresses, and the service that it is meant for, if it is not for all.
fn rule(text: &str) -> Result<(Option<Service>, Cidr), String> {
    match text.split_once('=') {
        Some((name, network)) => Ok((Some(name.parse()?), cidr(network)?)),
        None => Ok((None, cidr(text)?)),
    }
}

/// Reads a host without a port. Brackets around an IPv6 address are forgiven.
fn host(text: &str) -> Result<String, String> {
    let inside = text.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    parse_host(inside.unwrap_or(text))
}

/// Reads a whole number in this range.
fn number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String>
where
    T: Copy + PartialOrd + Display + FromStr,
{
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        let (from, to) = (range.start(), range.end());
        number.ok_or_else(|| format!("a whole number from {from} to {to} is needed"))
    }
}

/// Reads a whole number of seconds, at least so many.
fn seconds(least: u64) -> impl Fn(&str) -> Result<Duration, String> {
    let number = number(least..=MAX_SECS);
    move |text| number(text).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::proxy_header::ProxyVersion;

    fn no_file(_: &Path) -> io::Result<String> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    fn server_options(line: &str) -> ServerOptions {
        match server(words(line), no_file).unwrap() {
            Command::Run(options, _) => options,
            other => panic!("{other:?}"),
        }
    }

    fn client_common(line: &str) -> Common {
        match client(words(line), no_file).unwrap() {
            Command::Run(_, common) => common,
            other => panic!("{other:?}"),
        }
    }

    fn client_options(line: &str) -> ClientOptions {
        match client(words(line), no_file).unwrap() {
            Command::Run(options, _) => options,
            other => panic!("{other:?}"),
        }
    }

    /// The one service's address.
    fn of(services: &BTreeMap<Service, Address>) -> String {
        assert_eq!(services.len(), 1);
        services[&Service::default()].to_string()
    }

    #[test]
    fn the_defaults_are_the_originals_ports() {
        let server = server_options("");
        assert_eq!(server, ServerOptions::default());
        assert_eq!(of(&server.public), "127.0.0.1:8007");
        assert_eq!(server.tunnel.to_string(), "127.0.0.1:8008");
        assert_eq!(server.control.to_string(), "127.0.0.1:8009");
        let client = client_options("");
        assert_eq!(client, ClientOptions::default());
        assert_eq!(of(&client.local), "127.0.0.1:8000");
    }

    #[test]
    fn every_option_is_taken_in_both_spellings() {
        let network = "192.0.2.0/24".parse().unwrap();
        let expected = ServerOptions {
            public: [(Service::default(), Address::new("::", 80))].into(),
            tunnel: Address::new("localhost", 81),
            control: Address::new("192.0.2.1", 82),
            accept_proxy: vec![network, "::1".parse().unwrap()],
            allow: vec![(None, network), ("web".parse().ok(), network)],
            deny: vec![("web".parse().ok(), network), (None, network)],
            max_per_source: NonZeroUsize::new(12),
            log_visits: true,
            clients: 3,
            port_patience: Duration::ZERO,
            pair_timeout: Duration::from_secs(7),
            max_conns: 9,
            linger: Duration::from_secs(11),
            keys: Vec::new(),
            insecure: true,
            status: Some(Address::new("::", 83)),
            insecure_status: true,
            original: false,
        };
        for line in [
            "--public [::]:80 --tunnel localhost:81 --control 192.0.2.1:82 --pair-timeout 7 \
             --max-conns 9 --linger 11 --insecure --clients 3 --status [::]:83 --insecure-status",
            "-p [::]:80 -t localhost:81 -c 192.0.2.1:82 -w 7 -m 9 -L 11 -i -n 3 --status [::]:83 --insecure-status",
        ] {
            let line = format!("{line} --accept-proxy NET --accept-proxy ::1 --allow NET")
                + " --allow web=NET --deny web=NET --deny NET --max-per-source 12 --log-visits";
            let line = line.replace("NET", "192.0.2.0/24");
            assert_eq!(server_options(&line), expected);
        }
        let expected = ClientOptions {
            servers: vec![Address::new("::1", 1)],
            tunnel_port: Some(2),
            local: [(Service::default(), Address::new("db", 3))].into(),
            proxy_protocol: [(Service::default(), ProxyVersion::V2)].into(),
            pool: 0,
            linger: Duration::from_secs(11),
            key: None,
            status: None,
            insecure_status: false,
            original: true,
        };
        for line in [
            "--server ::1 --control-port 1 --tunnel-port 2 --local db:3 --pool 0 --linger 11 \
             --original",
            "-s [::1] -c 1 -t 2 -l db:3 -p 0 -L 11 --original",
            "-s [::1]:1 --tunnel 2 -l db:3 -p 0 -L 11 --original",
            "-s ::1 --control 1 --tunnel 2 -l db:3 -p 0 -L 11 --original",
        ] {
            let line = format!("{line} --proxy-protocol v2");
            assert_eq!(client_options(&line), expected);
        }
    }

    #[test]
    fn a_servers_port_is_named_once() {
        let server = |line| {
            let servers = client_options(line).servers;
            let servers: Vec<_> = servers.iter().map(Address::to_string).collect();
            servers.join(" ")
        };
        assert_eq!(server("--server host"), "host:8009");
        assert_eq!(server("--server host:7 --control-port 7"), "host:7");
        assert_eq!(server("-s a -s b:7 -s ::1 -c 8"), "a:8 b:7 [::1]:8");
        assert_eq!(server("-c 8"), "127.0.0.1:8");
        let many: String = (1..=65).map(|it| format!("-s h{it} ")).collect();
        for (line, why) in [
            ("-s a -s a:8009", "--server 'a:8009': a:8009 is given twice"),
            ("-s a:7 -s b:7 -c 8", "names another port"),
            (&many, "--server: 65 servers, and at most 64 are possible"),
            ("--server host:7 --control-port 8", "names another port"),
            ("--control 7 --control-port 8", "names another port"),
            ("--tunnel 7 --tunnel-port 8", "names another port"),
            ("--server host:0", "the port is 0"),
            ("--server host:x", "not a number"),
            ("--original --key-file x", "exclude each other"),
        ] {
            let error = client(words(line), no_file).unwrap_err().to_string();
            assert!(error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn a_port_on_the_command_line_comes_before_the_files_in_both_spellings() {
        let options = |line: &str, file| match client(words(&format!("--config x {line}")), file) {
            Ok(Command::Run(options, _)) => options,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            options("--tunnel-port 1", |_| Ok("tunnel 2".to_owned())).tunnel_port,
            Some(1)
        );
        assert_eq!(
            options("--tunnel 1", |_| Ok("tunnel-port 2".to_owned())).tunnel_port,
            Some(1)
        );
        let server = |line, file| options(line, file).servers[0].to_string();
        let file: ReadFile = |_| Ok("server host\ncontrol 7".to_owned());
        assert_eq!(server("", file), "host:7");
        assert_eq!(server("--control-port 8", file), "host:8");
        assert_eq!(server("--server other:9", file), "other:9");
        let line = words("--config x --control-port 8");
        let error = client(line, |_| Ok("server host:7".to_owned())).unwrap_err();
        assert!(error.to_string().contains("names another port"), "{error}");
    }

    #[test]
    fn bind_is_the_host_of_what_is_not_given() {
        let options = server_options("--tunnel 192.0.2.1:1 --bind ::");
        assert_eq!(of(&options.public), "[::]:8007");
        assert_eq!(options.tunnel.to_string(), "192.0.2.1:1");
        assert_eq!(options.control.to_string(), "[::]:8009");
    }

    #[test]
    fn a_port_alone_is_enough() {
        let options = server_options("--bind :: --public 8080 -t 192.0.2.1:1 -c 0");
        assert_eq!(of(&options.public), "[::]:8080");
        assert_eq!(options.control.to_string(), "[::]:0");
        assert_eq!(of(&server_options("-p 80").public), "127.0.0.1:80");
        assert_eq!(of(&client_options("-l 80").local), "127.0.0.1:80");
        assert_eq!(client_options("-p 64").pool, 64);
    }

    #[test]
    fn services_have_names() {
        let addresses = |services: BTreeMap<Service, Address>| {
            let all = services.iter();
            let all: Vec<_> = all.map(|(name, at)| format!("{name}={at}")).collect();
            all.join(" ")
        };
        let options = server_options("-b :: -p web=80 -p 8007 --public ssh=192.0.2.1:22");
        assert_eq!(
            addresses(options.public),
            "=[::]:8007 ssh=192.0.2.1:22 web=[::]:80"
        );
        let options = client_options("--local web=80 -l ssh=nas:22");
        assert_eq!(addresses(options.local), "ssh=nas:22 web=127.0.0.1:80");
        let many = |count: usize| {
            let all = (0..count).map(|number| format!("-p s{number}={}", 8000 + number));
            all.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(server_options(&many(64)).public.len(), 64);
        for (line, why) in [
            ("-p web=80 -p web=81", "'web=81': web is given twice"),
            (
                "-p 80 -p 81",
                "'81': a second service needs a name: NAME=HOST:PORT",
            ),
            ("-p Web=80", "'Web=80': a service's name has 1 to 32 of a-z"),
            ("-p =80", "'=80': a service's name has"),
            ("-p web=", "'web=': no port"),
            (
                "-p web=:80",
                "'web=:80': no host; for all addresses: [::]:80",
            ),
            (
                &many(65),
                "--public: 65 services, and at most 64 are possible",
            ),
        ] {
            let error = server(words(line), no_file).unwrap_err().to_string();
            assert!(error.contains(why), "{line}: {error}");
        }
        for (line, why) in [
            ("-l web=80 -l web=81", "'web=81': web is given twice"),
            ("-l web=0", "'web=0': the port is 0"),
            ("-l w.b=80", "'w.b=80': a service's name has"),
            (
                "--proxy-protocol v1 --proxy-protocol v2",
                "'v2': a second service needs a name: NAME=v1|v2",
            ),
            (
                "--proxy-protocol web=2",
                "--proxy-protocol 'web=2': the PROXY protocol has v1 (text) and v2 (binary) only",
            ),
        ] {
            let error = client(words(line), no_file).unwrap_err().to_string();
            assert!(error.contains(why), "{line}: {error}");
        }
    }

    #[test]
    fn a_status_page_is_near_unless_its_host_is_named() {
        let of_server = server_options("--status 9090");
        assert_eq!(of_server.status, Some(Address::new(LOOPBACK, 9090)));
        assert!(!of_server.insecure_status);
        let of_client = client_options("--status host:0 --insecure-status");
        assert_eq!(of_client.status, Some(Address::new("host", 0)));
        assert!(of_client.insecure_status);
        let ask = Command::AskReady(Address::new(LOOPBACK, 9090));
        assert_eq!(client(words("--ready 9090"), no_file).unwrap(), ask);
        for (line, why) in [
            ("--status", "status"),
            ("--status host", "--status 'host': no port"),
            ("--status :9090", "no host; for this host: 127.0.0.1:9090"),
            ("--status 99999", "not from 0 to 65535"),
            ("--status http://h:9", "leave out http://"),
            ("--insecure-status", "there is no --status"),
            ("--status 1 --status 2", "status"),
            ("--ready", "ready"),
            ("--ready 0", "--ready '0': the port is 0"),
            ("--ready host", "--ready 'host': no port"),
        ] {
            for error in [
                server(words(line), no_file).unwrap_err(),
                client(words(line), no_file).unwrap_err(),
            ] {
                let error = error.to_string();
                assert!(error.contains(why), "{line}: {error}");
                assert!(error.contains("--help"), "{line}: {error}");
            }
        }
    }

    #[test]
    fn the_level_follows_v_and_q() {
        for (line, level) in [
            ("", LevelFilter::Info),
            ("-v", LevelFilter::Debug),
            ("-vv", LevelFilter::Debug),
            ("--verbose", LevelFilter::Debug),
            ("-q", LevelFilter::Error),
            ("--quiet", LevelFilter::Error),
        ] {
            assert_eq!(client_common(line).level, level);
        }
    }

    #[test]
    fn key_files_are_named_and_keys_are_not() {
        assert!(client_common("").key_files.is_empty());
        assert_eq!(client_common("-k a").key_files, [PathBuf::from("a")]);
        let Ok(Command::Run(_, common)) = server(words("--key-file a -k b/c"), no_file) else {
            panic!("not understood");
        };
        assert_eq!(common.key_files, ["a", "b/c"].map(PathBuf::from));
        let error = client(words("-k a -k b"), no_file).unwrap_err().to_string();
        assert!(error.contains("key-file"), "{error}");

        let generate = server(words("--generate-key"), no_file).unwrap();
        assert_eq!(generate, Command::GenerateKey);

        let key = Key::generate().unwrap().to_base64();
        let key = key.trim_end_matches('=');
        for line in [
            "-k KEY",
            "-k KEY=",
            "-kKEY=",
            "--key-file=KEY=",
            "KEY",
            "-b KEY=",
        ] {
            let line = line.replace("KEY", key);
            let error = server(words(&line), no_file).unwrap_err().to_string();
            assert!(!error.contains(key), "{error}");
            assert!(error.contains("--key-file FILE"), "{error}");
        }
    }

    #[test]
    fn bad_words_are_refused_by_name() {
        for (line, named) in [
            ("--nonsense", "nonsense"),
            ("--public", "public"),
            (
                "--public 99999",
                "--public '99999': the port is not from 0 to 65535",
            ),
            (
                "--public http://h:80",
                "--public 'http://h:80': leave out http://",
            ),
            ("--bind http://h", "--bind 'http://h': leave out http://"),
            ("--tunnel [::1]", "--tunnel '[::1]': no port"),
            (
                "--public :8080",
                "--public ':8080': no host; for all addresses: [::]:8080",
            ),
            ("-version", "-version: did you mean --version?"),
            ("-public=80", "-public: did you mean --public?"),
            ("-bind ::", "-bind: did you mean --bind?"),
            ("--public host:99999", "--public 'host:99999'"),
            ("--bind a/b", "--bind 'a/b'"),
            ("--max-conns 0", "--max-conns '0'"),
            (
                "--accept-proxy 192.0.2.1/24",
                "--accept-proxy '192.0.2.1/24': the network is written 192.0.2.0/24",
            ),
            (
                "--allow example.org",
                "--allow 'example.org': not an IP address",
            ),
            (
                "--deny Web=::1",
                "--deny 'Web=::1': a service's name has 1 to 32",
            ),
            (
                "--max-per-source 0",
                "--max-per-source '0': a whole number from 1 to",
            ),
            (
                "--clients 0",
                "--clients '0': a whole number from 1 to 64 is",
            ),
            ("--max-conns many", "--max-conns 'many'"),
            ("--pair-timeout 0", "--pair-timeout '0'"),
            ("--linger 1.5", "--linger '1.5'"),
            ("--linger 99999999999999999999", "--linger"),
            ("-v -q", "-v and -q"),
            ("one two", "'one'"),
        ] {
            let error = server(words(line), no_file).unwrap_err().to_string();
            assert!(error.contains(named), "{line}: {error}");
            assert!(error.contains("--help"), "{line}: {error}");
        }
        for (line, named) in [
            ("--pool -1", "pool"),
            ("--pool=-1", "--pool '-1'"),
            ("--control-port 0", "--control-port '0'"),
            ("--local 127.0.0.1:0", "--local '127.0.0.1:0'"),
            ("--server host:80:80", "--server 'host:80:80'"),
            ("--server http://host", "leave out http://"),
            (
                "--local :80",
                "--local ':80': no host; for this host: 127.0.0.1:80",
            ),
            ("--local 0", "--local '0': the port is 0"),
            (
                "--pool 65",
                "--pool '65': a whole number from 0 to 64 is needed",
            ),
        ] {
            let error = client(words(line), no_file).unwrap_err().to_string();
            assert!(error.contains(named), "{line}: {error}");
        }
    }

    #[test]
    fn the_help_shows_every_default() {
        let Ok(Command::Print(help)) = server(words("-h"), no_file) else {
            panic!("no help");
        };
        let default = ServerOptions::default();
        for shown in [
            format!("all ports ({LOOPBACK})"),
            format!("({})", of(&default.public)),
            format!("({})", default.tunnel),
            format!("({})", default.control),
            format!("({})", default.pair_timeout.as_secs()),
            format!("({})", default.max_conns),
            format!("the fewest ({})", default.clients),
            format!("({})", default.linger.as_secs()),
            format!("({})", DRAIN.as_secs()),
        ] {
            assert!(help.contains(&shown), "{shown}");
        }
        let Ok(Command::Print(help)) = client(words("--help"), no_file) else {
            panic!("no help");
        };
        let default = ClientOptions::default();
        for shown in [
            format!("({})", default.servers[0]),
            format!("({})", default.servers[0].port),
            format!("({})", of(&default.local)),
            format!("at most {MAX_POOL}, 0 dials on demand ({})", default.pool),
            format!("({})", default.linger.as_secs()),
            format!("({})", DRAIN.as_secs()),
        ] {
            assert!(help.contains(&shown), "{shown}");
        }
    }

    /// The options of a server with a file that has this text.
    fn with_file(line: &str, read_file: ReadFile) -> Result<(ServerOptions, Common), Error> {
        match server(words(&format!("--config dir/tp.conf {line}")), read_file)? {
            Command::Run(options, common) => Ok((options, common)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_file_has_an_option_a_line_and_the_command_line_wins() {
        let file = |_: &Path| {
            Ok(
                "# comment\n\npublic web=8080\n  public\tssh=[::]:22 \nbind 192.0.2.1\n\
                insecure\nmax-conns 7\nkey-file a b.key\nverbose\n"
                    .to_owned(),
            )
        };
        let (options, common) = with_file("", file).unwrap();
        let public: Vec<_> = options.public.values().map(Address::to_string).collect();
        assert_eq!(public, ["[::]:22", "192.0.2.1:8080"]);
        assert_eq!((options.max_conns, options.insecure), (7, true));
        assert_eq!(common.key_files, [PathBuf::from("dir/a b.key")]);
        assert_eq!(common.remark, None);
        assert_eq!(common.level, LevelFilter::Debug);
        let (options, common) = with_file("-p 1 -m 9 -k c -q", file).unwrap();
        assert_eq!(of(&options.public), "192.0.2.1:1");
        assert_eq!(options.max_conns, 9);
        assert_eq!(common.key_files, [PathBuf::from("c")]);
        let remark =
            "dir/tp.conf, line 8: key-file is not used: --key-file of the command line comes first";
        assert_eq!(common.remark.as_deref(), Some(remark));
        assert_eq!(common.level, LevelFilter::Error);
    }

    #[test]
    fn every_line_of_the_example_files_is_understood() {
        /// Reads a file as if the # before each option were taken away: no space stands behind that.
        fn options_in(text: &str) -> io::Result<String> {
            let lines = text.lines().map(|line| match line.strip_prefix('#') {
                Some(option) if option.starts_with(|first: char| first.is_lowercase()) => option,
                _ => line,
            });
            Ok(lines.collect::<Vec<_>>().join("\n"))
        }
        let packaged: ReadFile =
            |_| options_in(include_str!("../../examples/systemd/tpserver.conf"));
        let (options, _) = with_file("", packaged).unwrap();
        assert_eq!(options.public.len(), 2);
        assert!(options.public.values().all(|it| it.host == "::"));
        let balanced: ReadFile =
            |_| options_in(include_str!("../../examples/balanced/tpserver.conf"));
        let (options, _) = with_file("", balanced).unwrap();
        assert_eq!(of(&options.public), "[::]:8007");
        let packaged: ReadFile =
            |_| options_in(include_str!("../../examples/systemd/tpclient.conf"));
        let balanced: ReadFile =
            |_| options_in(include_str!("../../examples/balanced/tpclient.conf"));
        for (file, servers, services) in [(packaged, 1, 2), (balanced, 2, 1)] {
            let read = client(words("--config tp.conf"), file).unwrap();
            let Command::Run(options, _) = read else {
                panic!("{read:?}");
            };
            assert_eq!(options.servers.len(), servers);
            assert_eq!(options.local.len(), services);
        }
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named_with_its_line() {
        let checks: [(ReadFile, &str); 10] = [
            (|_| Ok("p 1".to_owned()), "line 1: there is no option p"),
            (
                |_| Ok("bind ::\npublic http://x:1\n".to_owned()),
                "dir/tp.conf, line 2: public 'http://x:1': leave out http://",
            ),
            (
                |_| Ok("\n# x\nnonsense 1".to_owned()),
                "dir/tp.conf, line 3: there is no option nonsense",
            ),
            (
                |_| Ok("bind=::".to_owned()),
                "line 1: a space, not '=', stands behind bind",
            ),
            (
                |_| Ok("--bind ::".to_owned()),
                "line 1: leave out the dashes before an option's name",
            ),
            (
                |_| Ok("bind".to_owned()),
                "line 1: bind needs a value behind a space",
            ),
            (
                |_| Ok("insecure yes".to_owned()),
                "line 1: insecure has no value",
            ),
            (
                |_| Ok("drain 1\ndrain 2".to_owned()),
                "dir/tp.conf: drain stands in lines 1 and 2",
            ),
            (
                |_| Ok("config other".to_owned()),
                "line 1: config belongs on the command line",
            ),
            (
                |_| Ok("public web=1\npublic web=2".to_owned()),
                "line 2: public 'web=2': web is given twice",
            ),
        ];
        for (file, why) in checks {
            let error = with_file("", file).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let error = with_file("", no_file).unwrap_err().to_string();
        assert_eq!(error, "--config: could not read dir/tp.conf");
    }
}
