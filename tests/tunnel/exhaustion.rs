//! Programs that run out of descriptors, threads or places for visitors.
#![cfg(target_os = "linux")]

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::support::programs::{Both, Launch};
use crate::support::{
    Protection, Service, connect, echo, eventually, plain_and_sealed, raise_descriptors, take_turn,
    try_connect,
};

plain_and_sealed! {
    too_few_descriptors_for_the_servers_visitors,
    too_few_descriptors_for_the_clients_visitors,
    too_few_descriptors_for_the_servers_strangers,
    #[ignore = "needs root, prlimit and setpriv: cargo test -- --include-ignored"]
    too_few_threads_for_the_server,
    #[ignore = "needs root, prlimit and setpriv: cargo test -- --include-ignored"]
    too_few_threads_for_the_client,
    five_thousand_visitors_share_a_thousand_places (sealed as root),
}

const FEW_DESCRIPTORS: [&str; 3] = ["sh", "-c", r#"ulimit -n 64; exec "$0" "$@""#];

/// Both programs, each started by way of its command.
fn limited(protection: Protection, local: std::net::SocketAddr, under: [&[&str]; 2]) -> Both {
    let server = Launch::new(protection).under(under[0]).server(&[]);
    let addresses = server.addresses();
    let client = Launch::new(protection).under(under[1]);
    let client = client.client(addresses, local, &[]);
    Both::at_rest(server, client, addresses)
}

fn too_few_descriptors_for_the_servers_visitors(protection: Protection) {
    let service = Service::echo();
    let both = limited(protection, service.addr, [&FEW_DESCRIPTORS, &[]]);
    outlasts_a_crowd(&both, || connect(both.addresses[0]));
}

fn too_few_descriptors_for_the_clients_visitors(protection: Protection) {
    let service = Service::echo();
    let both = limited(protection, service.addr, [&[], &FEW_DESCRIPTORS]);
    outlasts_a_crowd(&both, || connect(both.addresses[0]));
    // Visitors wait until a tunnel is free, and whoever has a tunnel is served.
    assert_eq!(both.client.lines_with("Too many open files"), [""; 0]);
}

/// A stranger that never proves to be a client has a place for 5 s.
fn too_few_descriptors_for_the_servers_strangers(protection: Protection) {
    let service = Service::echo();
    let both = limited(protection, service.addr, [&FEW_DESCRIPTORS, &[]]);
    outlasts_a_crowd(&both, || connect(both.addresses[1]));
}

/// Two hundred visitors or strangers come and stay for a while. Both programs live through that
/// quietly. When the crowd has gone, and those of it that were still waiting have been seen to, the
/// next visitor is served at once.
fn outlasts_a_crowd(both: &Both, come: impl Fn() -> TcpStream) {
    let programs = [&both.server, &both.client];
    let lines = || programs.map(|program| program.lines_with("").len());
    let (start, before) = (Instant::now(), lines());
    let crowd: Vec<_> = (0..200).map(|_| come()).collect();
    for mut one in &crowd {
        let _ = one.write_all(b"hello");
    }
    thread::scope(|scope| {
        for program in programs {
            scope.spawn(|| {
                let share = program.processor_share(Duration::from_secs(3));
                assert!(share < 5.0, "{share} % of a processor");
            });
        }
    });
    let seconds = start.elapsed().as_secs() as usize + 1;
    for (program, before) in programs.into_iter().zip(before) {
        let mut new = program.lines_with("").split_off(before);
        // Lines about a visitor's life have a limit of their own.
        new.retain(|line| !line.contains(" bytes down "));
        assert!(
            new.len() <= seconds,
            "{} lines in {seconds} s: {new:#?}",
            new.len()
        );
    }
    drop(crowd);
    eventually("a visitor is served", || was_served(both));
    let mut late = [(); 3].map(|()| forgets_a_crowd(both, &come));
    late.sort();
    // The median: a machine with other work spoils one of them now and then.
    assert!(late[1] < Duration::from_secs(1), "{late:?}");
    both.assert_recovered(echo);
}

/// How long a visitor waits behind a crowd that has gone, besides what a busy machine takes to see to
/// those of the crowd that still wait.
fn forgets_a_crowd(both: &Both, come: impl Fn() -> TcpStream) -> Duration {
    let start = Instant::now();
    (0..100).for_each(|_| echo(&both.visit()));
    let busy = 5 * start.elapsed();
    drop((0..200).map(|_| come()).collect::<Vec<_>>());
    let start = Instant::now();
    eventually("a visitor is served", || was_served(both));
    start.elapsed().saturating_sub(busy)
}

fn was_served(both: &Both) -> bool {
    let visit = || {
        let mut visitor = try_connect(both.addresses[0])?;
        visitor.write_all(b"hello")?;
        visitor.read_exact(&mut [0; 5])
    };
    visit().is_ok()
}

/// A folder for a copy of a program, and what runs that copy as a user of its own who may have no
/// more than 24 threads.
fn few_threads() -> (TempDir, String) {
    static USERS: AtomicUsize = AtomicUsize::new(0);
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
    let number = std::process::id() as usize + 10_000 * USERS.fetch_add(1, Ordering::Relaxed);
    let (user, path) = (100_000 + number, folder.path().display());
    let script = format!(
        r#"cp "$0" {path}/program &&
           exec prlimit --nproc=24 setpriv --reuid={user} --regid={user} --clear-groups \
           {path}/program "$@""#
    );
    (folder, script)
}

fn too_few_threads_for_the_server(protection: Protection) {
    let (_folder, script) = few_threads();
    let service = Service::echo();
    let both = limited(protection, service.addr, [&["sh", "-c", &script], &[]]);
    outlasts_a_burst(&both, 100);
    both.server.wait_for_line("no thread for");
    // The tunnels that were asked for meanwhile are still being dialled, and need threads, too.
    both.wait_for_rest();
    both.assert_recovered(echo);
}

fn too_few_threads_for_the_client(protection: Protection) {
    let (_folder, script) = few_threads();
    let service = Service::echo();
    let both = limited(protection, service.addr, [&[], &["sh", "-c", &script]]);
    outlasts_a_burst(&both, 100);
    both.client.wait_for_line("no thread for");
    // The tunnels that were asked for meanwhile are still being dialled, and need threads, too.
    both.wait_for_rest();
    both.assert_recovered(echo);
}

/// Asserts that of so many visitors at a time some are served and the others closed soon: nobody
/// waits for ever.
fn outlasts_a_burst(both: &Both, size: usize) {
    let visitors: Vec<_> = (0..size)
        .filter_map(|_| try_connect(both.addresses[0]).ok())
        .collect();
    let mut served = 0;
    for mut visitor in &visitors {
        let echo = visitor.write_all(b"hello");
        served += usize::from(echo.and_then(|()| visitor.read_exact(&mut [0; 5])).is_ok());
    }
    assert!((1..size).contains(&served), "{served} of {size}");
    drop(visitors);
    eventually("a visitor is served", || was_served(both));
}

fn five_thousand_visitors_share_a_thousand_places(protection: Protection) {
    const VISITORS: usize = 5000;
    const PLACES: usize = 1000;
    // KiB of each program: 128 for each place, which is three times what a pair takes.
    const MEMORY: usize = 128 * PLACES;
    raise_descriptors();
    let turn = take_turn();
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (now.clone(), most.clone());
    let service = Service::start(move |mut socket| {
        counts.1.fetch_max(
            counts.0.fetch_add(1, Ordering::SeqCst) + 1,
            Ordering::SeqCst,
        );
        let mut text = [0; 5];
        while socket.read_exact(&mut text).is_ok() && socket.write_all(&text).is_ok() {}
        counts.0.fetch_sub(1, Ordering::SeqCst);
    });
    let options: [&[&str]; 2] = [&["--max-conns", "1000", "--pair-timeout", "20"], &[]];
    let both = Both::start(protection, service.addr, options);
    // All of them are there before the first one leaves.
    let visitors: Vec<_> = (0..VISITORS).map(|_| both.visit()).collect();
    for mut visitor in &visitors {
        visitor.write_all(b"hello").unwrap();
    }
    eventually("all places are taken", || {
        now.load(Ordering::SeqCst) == PLACES
    });
    let full = "all 1000 places for visitors are taken (--max-conns";
    both.server.wait_for_line(full);
    both.server.signal(rustix::process::Signal::USR1);
    both.server.wait_for_line(" max=1000 ");
    let memory = [&both.server, &both.client].map(|program| program.memory("Pss_Anon"));
    for kib in memory {
        assert!(kib < MEMORY, "{kib} KiB");
    }
    for visitor in visitors {
        let mut text = [0; 5];
        (&visitor).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        // The next visitor gets the place of this one.
        drop(visitor);
    }
    drop(turn);
    assert_eq!(most.load(Ordering::SeqCst), PLACES);
    // All places were taken thousands of times, which is logged once.
    assert_eq!(both.server.lines_with(full).len(), 1);
    both.assert_recovered(echo);
}
