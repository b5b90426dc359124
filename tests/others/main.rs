//! Programs that others wrote, visited directly, through the tunnel without a key, and through the
//! tunnel with one. What passes directly must pass through the tunnel.
//!
//! Each program has a shell script of its name. The script's function `serve` is the local service; if
//! it has none, the cases bring their own. Every case in the list below is a function of the script,
//! and three tests: `cargo test --test others nginx::ranges -- --include-ignored` runs those of one.
//! `common.sh` says what a script finds. `TP_OTHERS=1` makes transfers, loads and silences as large
//! as they should be; without it they take a few seconds.
#![cfg(target_os = "linux")]

use std::fmt::{self, Display, Formatter};
use std::fs::{self, File, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use support::programs::{Both, Launch, ports_of};
use support::{Protection, try_connect};

#[expect(
    dead_code,
    unused_imports,
    unused_macros,
    reason = "the other tests need more of what they share"
)]
#[path = "../tunnel/support/mod.rs"]
mod support;

/// Makes three tests of each case of these programs.
macro_rules! three_ways {
    ($($program:ident: $($case:ident)+;)+) => {$(
        mod $program {$(
            mod $case {
                three_ways! { @tests $program $case direct Direct, plain Plain, sealed Sealed }
            }
        )+}
    )+};
    (@tests $program:ident $case:ident $($test:ident $way:ident),+) => {$(
        #[ignore = "needs root, setpriv, unshare and what its script names: cargo test -- --include-ignored"]
        #[test]
        fn $test() {
            crate::pass(stringify!($program), stringify!($case), crate::Way::$way);
        }
    )+};
}

three_ways! {
    nginx: keep_alive connection_close chunked ranges continue_100 upload early_refusal download
        cut_in_the_middle load_kept load_closed load_h2load h2_get h2_upload h2_load;
    redis: all_commands pipelined two_hundred_clients large_value mass_insertion pub_sub;
    ssh: many_at_once scp_both_ways rsync_both_ways sftp_both_ways control_master git_clone_and_push;
    postgres: bench bench_reconnecting copy_both_ways cancel listen_notify;
    mariadb: the_service_speaks_first reconnecting slap load_and_dump;
    socat: the_visitor_ends_first the_service_ends_first both_ways_at_once;
    smtp: one_message many_at_once large_message;
    mqtt: keep_alive exactly_once large_payload last_will;
    websocket: messages silence close_with_a_code two_hundred_at_once;
    nettest: conn;
}

/// How a program is visited.
#[derive(Clone, Copy)]
enum Way {
    Direct,
    Plain,
    Sealed,
}

impl Way {
    fn protection(self) -> Option<Protection> {
        match self {
            Self::Direct => None,
            Self::Plain => Some(Protection::Plain),
            Self::Sealed => Some(Protection::Sealed),
        }
    }
}

impl Display for Way {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "directly, without the tunnel",
            Self::Plain => "through the tunnel without a key",
            Self::Sealed => "through the tunnel with a key",
        })
    }
}

/// Starts a command that ends with the thread that starts it, even if a signal ends all of the tests.
const TO_THE_END: [&str; 3] = ["setpriv", "--pdeathsig", "KILL"];

/// How much of what a script has written is shown when it fails.
const SHOWN_LINES: usize = 60;

/// How long a script has, or a service to listen: several seconds of work on a machine that may run ten
/// of them at a time.
fn deadline() -> Duration {
    let all = std::env::var("TP_OTHERS").is_ok_and(|value| value == "1");
    Duration::from_secs(if all { 600 } else { 90 })
}

/// Runs this case of this program in this way.
fn pass(program: &str, case: &str, way: Way) {
    let directory = tempfile::tempdir().unwrap();
    // A service that refuses to run as root passes through.
    fs::set_permissions(&directory, Permissions::from_mode(0o711)).unwrap();
    let local = free_port();
    let serve = format!("serve {case}");
    let mut service = Script::start(program, &serve, directory.path(), [local, local]);
    let start = Instant::now();
    while try_connect(local).is_err() {
        match service.ended() {
            Some(end) if end.success() => break,
            None if start.elapsed() < deadline() => thread::sleep(Duration::from_millis(20)),
            end => panic!("{program} does not listen on {local}: {end:?}\n{service}"),
        }
    }
    let tunnel = way.protection().map(|protection| {
        let launch = Launch::new(protection).under(&TO_THE_END);
        let server = launch.server(&[]);
        let addresses = server.addresses();
        let client = launch.client(addresses, local, &[]);
        Both::at_rest(server, client, addresses)
    });
    let public = tunnel.as_ref().map_or(local, |it| it.addresses[0]);
    let mut visitor = Script::start(program, case, directory.path(), [local, public]);
    let end = visitor.wait_for_end();
    assert!(
        end.is_some_and(|end| end.success()),
        "{program}, {case}: fails {way}, {}\n{visitor}{service}",
        end.map_or("not ended in time".to_owned(), |end| end.to_string()),
    );
    drop(visitor);
    if let Some(both) = tunnel {
        both.wait_for_rest();
        for half in [&both.server, &both.client] {
            assert_eq!(half.lines_with("panicked"), [""; 0]);
        }
    }
}

/// A port of a loopback address that no other test here uses.
fn free_port() -> SocketAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let host = NEXT.fetch_add(1, Ordering::Relaxed);
    let [port, ..] = ports_of(&format!("127.0.91.{host}"));
    port
}

/// A function of a program's script, with whatever it starts. All of it ends when this is dropped.
struct Script {
    child: Child,
    what: String,
    output: std::path::PathBuf,
}

impl Script {
    /// Starts it in this directory, for a local service and for where to visit it.
    fn start(program: &str, function: &str, directory: &Path, ports: [SocketAddr; 2]) -> Self {
        let scripts = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/others");
        let output = directory.join(format!("{function}.output"));
        let file = File::create(&output).unwrap();
        let [local, at] = ports;
        // A first process that ends takes all others of its namespace with it, and its shared memory.
        let child = Command::new(TO_THE_END[0])
            .args(&TO_THE_END[1..])
            .args(["unshare", "--pid", "--ipc", "--fork", "--kill-child"])
            .args(["bash", "-euo", "pipefail", "-c"])
            .arg(format!(
                ". {scripts}/common.sh; . {scripts}/{program}.sh; set -x; {function}"
            ))
            .current_dir(directory)
            .env("HOME", directory)
            .env("TMPDIR", directory)
            .env("SCRIPTS", scripts)
            .env("CACHE", env!("CARGO_TARGET_TMPDIR"))
            .env("LOCAL", local.to_string())
            .env("LOCAL_HOST", local.ip().to_string())
            .env("LOCAL_PORT", local.port().to_string())
            .env("AT", at.to_string())
            .env("HOST", at.ip().to_string())
            .env("PORT", at.port().to_string())
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", TO_THE_END[0]));
        Self {
            child,
            what: format!("{program}.sh, {function}"),
            output,
        }
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// How it has ended, if it has in time.
    fn wait_for_end(&mut self) -> Option<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < deadline() {
            if let Some(end) = self.ended() {
                return Some(end);
            }
            thread::sleep(Duration::from_millis(20));
        }
        None
    }
}

/// What it has written, from the end.
impl Display for Script {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let bytes = fs::read(&self.output).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().collect();
        let left_out = lines.len().saturating_sub(SHOWN_LINES);
        writeln!(f, "--- {}, but for {left_out} lines:", self.what)?;
        writeln!(f, "{}", lines[left_out..].join("\n"))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // `unshare` ends after the first process of the namespace, and that one after all others.
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let first = children.ok().and_then(|it| it.trim().parse().ok());
        match first.and_then(Pid::from_raw) {
            Some(first) => drop(kill_process(first, Signal::KILL)),
            None => drop(self.child.kill()),
        }
        let _ = self.child.wait();
    }
}
