//! The metrics, in the text format 0.0.4 of Prometheus.

use std::fmt::{self, Display, Write as _};

use super::snapshot::{JOIN_BOUNDS, Service, Side, Snapshot};

/// The media type of the format.
pub const TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Writes all metrics. What the system does not tell is left out.
pub fn render(snapshot: &Snapshot) -> String {
    let mut text = Text::default();
    of_the_program(&mut text, snapshot);
    of_services(&mut text, snapshot);
    of_sessions(&mut text, snapshot);
    of_refusals(&mut text, snapshot);
    of_join_times(&mut text, snapshot);
    of_the_process(&mut text, snapshot);
    text.written
}

fn of_the_program(text: &mut Text, snapshot: &Snapshot) {
    let labels = [
        ("program", snapshot.program()),
        ("version", snapshot.version),
    ];
    text.gauge("tunnel_proxy_build_info", "The program and its version.")
        .sample(&labels, 1);
    text.gauge("tunnel_proxy_uptime_seconds", "Time since the start.")
        .sample(&[], snapshot.uptime.as_secs_f64());
    let help = "1 if a visitor who came now would be served.";
    text.gauge("tunnel_proxy_ready", help)
        .sample(&[], u8::from(snapshot.not_ready.is_empty()));
    text.gauge("tunnel_proxy_max_visitors", "The most visitors at a time.")
        .sample(&[], snapshot.max_visitors);
}

fn of_services<'a>(text: &mut Text, snapshot: &'a Snapshot) {
    let named = |it: &'a Service| (it.name.as_deref().unwrap_or(""), it);
    let services = || snapshot.services.iter().map(named);
    text.gauge(
        "tunnel_proxy_service_offered",
        "1 if the other side takes part in the service.",
    );
    for (name, service) in services() {
        text.sample(&[("service", name)], u8::from(service.offered));
    }
    text.gauge(
        "tunnel_proxy_joined_visitors",
        "Visitors who are joined now.",
    );
    for (name, service) in services() {
        text.sample(&[("service", name)], service.joined);
    }
    let waiting = services().filter_map(|(name, it)| Some((name, it.waiting?)));
    let mut waiting = waiting.peekable();
    if waiting.peek().is_some() {
        text.gauge("tunnel_proxy_waiting_visitors", "Visitors who wait now.");
    }
    for (name, waiting) in waiting {
        text.sample(&[("service", name)], waiting);
    }
    text.counter("tunnel_proxy_visits_total", "Visitors who were joined.");
    for (name, service) in services() {
        text.sample(&[("service", name)], service.visits);
    }
    text.counter(
        "tunnel_proxy_bytes_total",
        "Bytes moved: up to the local service, down to the visitors.",
    );
    for (name, service) in services() {
        for (direction, moved) in ["up", "down"].iter().zip(service.moved) {
            text.sample(&[("service", name), ("direction", direction)], moved);
        }
    }
}

fn of_sessions(text: &mut Text, snapshot: &Snapshot) {
    text.gauge("tunnel_proxy_sessions", "Sessions of now.")
        .sample(&[], snapshot.live().count());
    // A server's clients come from ever new ports, and each would leave a time series behind.
    if snapshot.side == Side::Client {
        text.gauge(
            "tunnel_proxy_session_up",
            "1 if there is a session with the server.",
        );
        for session in &snapshot.sessions {
            let up = u8::from(session.age.is_some());
            text.sample(&[("peer", &session.peer)], up);
        }
    }
    let idle: usize = snapshot.live().map(|it| it.idle).sum();
    text.gauge("tunnel_proxy_idle_tunnels", "Idle tunnels of now.")
        .sample(&[], idle);
    let help = "Tunnels that were dialled.";
    text.counter("tunnel_proxy_tunnels_dialled_total", help)
        .sample(&[], snapshot.dialled);
}

fn of_refusals(text: &mut Text, snapshot: &Snapshot) {
    text.counter(
        "tunnel_proxy_refused_total",
        "Refused: visitor-* before a tunnel, local-* by the local service, others as client or tunnel.",
    );
    for (reason, count) in &snapshot.refused {
        text.sample(&[("reason", reason)], count);
    }
    let help = "Visitors who were not joined in time.";
    text.counter("tunnel_proxy_timed_out_total", help)
        .sample(&[], snapshot.timed_out);
    let help = "Log lines that a limit has left out.";
    text.counter("tunnel_proxy_log_lines_left_out_total", help)
        .sample(&[], snapshot.log_left_out);
}

fn of_join_times(text: &mut Text, snapshot: &Snapshot) {
    let help = "Time from accept to join.";
    text.family("tunnel_proxy_join_seconds", "histogram", help);
    let mut total = 0;
    let bounds = JOIN_BOUNDS.map(|bound| bound.to_string());
    let bounds = bounds.iter().map(String::as_str).chain(["+Inf"]);
    for (bound, count) in bounds.zip(snapshot.join_times.counts) {
        total += count;
        text.part("_bucket", &[("le", bound)], total);
    }
    text.part("_sum", &[], snapshot.join_times.sum.as_secs_f64());
    text.part("_count", &[], total);
}

/// The names are those that every program has in Prometheus.
fn of_the_process(text: &mut Text, snapshot: &Snapshot) {
    let process = &snapshot.process;
    if let Some(cpu) = process.cpu {
        let help = "Processor time, user and system.";
        text.counter("process_cpu_seconds_total", help)
            .sample(&[], cpu.as_secs_f64());
    }
    let memory = ("process_resident_memory_bytes", "Resident memory.");
    let descriptors = ("process_open_fds", "Open descriptors.");
    let most = ("process_max_fds", "The most open descriptors.");
    for ((name, help), value) in [
        (memory, process.memory),
        (descriptors, process.descriptors),
        (most, process.descriptor_limit),
        (("process_threads", "Threads."), process.threads),
    ] {
        if let Some(value) = value {
            text.gauge(name, help).sample(&[], value);
        }
    }
}

/// What is written so far, and the name that the samples which follow belong to. To write into a string
/// cannot fail.
#[derive(Default)]
struct Text {
    written: String,
    name: &'static str,
}

impl Text {
    fn gauge(&mut self, name: &'static str, help: &'static str) -> &mut Self {
        self.family(name, "gauge", help)
    }

    fn counter(&mut self, name: &'static str, help: &'static str) -> &mut Self {
        self.family(name, "counter", help)
    }

    /// Begins what belongs to one name.
    fn family(&mut self, name: &'static str, kind: &str, help: &str) -> &mut Self {
        self.name = name;
        let _ = write!(self.written, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        self
    }

    /// A line with a value.
    fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.part("", labels, value);
    }

    /// A line with a part of the value. What is behind the name tells which part.
    fn part(&mut self, part: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.written, "{}{part}", self.name);
        for (place, (label, value)) in labels.iter().enumerate() {
            let before = if place == 0 { '{' } else { ',' };
            let _ = write!(self.written, "{before}{label}=\"{}\"", Escaped(value));
        }
        let end = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.written, "{end} {value}");
    }
}

/// A label's value, as it stands in quotes.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for char in self.0.chars() {
            match char {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                char => f.write_char(char)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn a_servers_metrics_are_these() {
        let text = render(&Snapshot::invented());
        for (line, (got, wanted)) in text.lines().zip(SERVER.lines()).enumerate() {
            assert_eq!(got, wanted, "line {}", line + 1);
        }
        assert_eq!(text, SERVER);
    }

    #[test]
    fn a_client_tells_which_servers_it_has() {
        let mut snapshot = Snapshot::invented();
        snapshot.side = Side::Client;
        snapshot.sessions[0].age = None;
        snapshot
            .services
            .iter_mut()
            .for_each(|it| it.waiting = None);
        snapshot.sessions[0].peer = "a\\b\"c\nd:8009".to_owned();
        let text = render(&snapshot);
        let line = "\ntunnel_proxy_session_up{peer=\"a\\\\b\\\"c\\nd:8009\"} 0\n";
        assert!(text.contains(line), "{text}");
        assert!(text.contains("\ntunnel_proxy_sessions 0\n"), "{text}");
        assert!(text.contains("\ntunnel_proxy_idle_tunnels 0\n"), "{text}");
        assert!(!text.contains("_waiting_"), "{text}");
    }

    #[test]
    fn what_the_system_does_not_tell_is_left_out() {
        let mut snapshot = Snapshot::invented();
        snapshot.process = crate::status::process::Process::default();
        assert!(!render(&snapshot).contains("process_"));
    }

    /// Prometheus' own checker reads the text, and finds no fault with its names. Nothing is checked
    /// where `promtool` is not installed.
    #[test]
    fn promtool_finds_no_fault() {
        for side in [Side::Server, Side::Client] {
            let mut snapshot = Snapshot::invented();
            snapshot.side = side;
            snapshot.sessions[0].peer = "a\\b\"c\nd\u{e9}:8009".to_owned();
            let tool = Command::new("promtool")
                .args(["check", "metrics"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            let mut tool = match tool {
                Err(error) if error.kind() == ErrorKind::NotFound => return,
                tool => tool.unwrap(),
            };
            let text = render(&snapshot);
            tool.stdin
                .take()
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
            let told = tool.wait_with_output().unwrap();
            let said = [told.stdout, told.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(told.status.success() && said.is_empty(), "{said}\n{text}");
        }
    }

    const SERVER: &str = r##"# HELP tunnel_proxy_build_info The program and its version.
# TYPE tunnel_proxy_build_info gauge
tunnel_proxy_build_info{program="tpserver",version="0.1.0"} 1
# HELP tunnel_proxy_uptime_seconds Time since the start.
# TYPE tunnel_proxy_uptime_seconds gauge
tunnel_proxy_uptime_seconds 93784.5
# HELP tunnel_proxy_ready 1 if a visitor who came now would be served.
# TYPE tunnel_proxy_ready gauge
tunnel_proxy_ready 0
# HELP tunnel_proxy_max_visitors The most visitors at a time.
# TYPE tunnel_proxy_max_visitors gauge
tunnel_proxy_max_visitors 4000
# HELP tunnel_proxy_service_offered 1 if the other side takes part in the service.
# TYPE tunnel_proxy_service_offered gauge
tunnel_proxy_service_offered{service=""} 1
tunnel_proxy_service_offered{service="ssh"} 0
# HELP tunnel_proxy_joined_visitors Visitors who are joined now.
# TYPE tunnel_proxy_joined_visitors gauge
tunnel_proxy_joined_visitors{service=""} 2
tunnel_proxy_joined_visitors{service="ssh"} 2
# HELP tunnel_proxy_waiting_visitors Visitors who wait now.
# TYPE tunnel_proxy_waiting_visitors gauge
tunnel_proxy_waiting_visitors{service=""} 1
tunnel_proxy_waiting_visitors{service="ssh"} 1
# HELP tunnel_proxy_visits_total Visitors who were joined.
# TYPE tunnel_proxy_visits_total counter
tunnel_proxy_visits_total{service=""} 1234
tunnel_proxy_visits_total{service="ssh"} 1234
# HELP tunnel_proxy_bytes_total Bytes moved: up to the local service, down to the visitors.
# TYPE tunnel_proxy_bytes_total counter
tunnel_proxy_bytes_total{service="",direction="up"} 56789
tunnel_proxy_bytes_total{service="",direction="down"} 1234567890
tunnel_proxy_bytes_total{service="ssh",direction="up"} 56789
tunnel_proxy_bytes_total{service="ssh",direction="down"} 1234567890
# HELP tunnel_proxy_sessions Sessions of now.
# TYPE tunnel_proxy_sessions gauge
tunnel_proxy_sessions 1
# HELP tunnel_proxy_idle_tunnels Idle tunnels of now.
# TYPE tunnel_proxy_idle_tunnels gauge
tunnel_proxy_idle_tunnels 7
# HELP tunnel_proxy_tunnels_dialled_total Tunnels that were dialled.
# TYPE tunnel_proxy_tunnels_dialled_total counter
tunnel_proxy_tunnels_dialled_total 24
# HELP tunnel_proxy_refused_total Refused: visitor-* before a tunnel, local-* by the local service, others as client or tunnel.
# TYPE tunnel_proxy_refused_total counter
tunnel_proxy_refused_total{reason="busy"} 1
tunnel_proxy_refused_total{reason="wrong-key"} 3
# HELP tunnel_proxy_timed_out_total Visitors who were not joined in time.
# TYPE tunnel_proxy_timed_out_total counter
tunnel_proxy_timed_out_total 2
# HELP tunnel_proxy_log_lines_left_out_total Log lines that a limit has left out.
# TYPE tunnel_proxy_log_lines_left_out_total counter
tunnel_proxy_log_lines_left_out_total 4
# HELP tunnel_proxy_join_seconds Time from accept to join.
# TYPE tunnel_proxy_join_seconds histogram
tunnel_proxy_join_seconds_bucket{le="0.0005"} 2
tunnel_proxy_join_seconds_bucket{le="0.001"} 3
tunnel_proxy_join_seconds_bucket{le="0.002"} 3
tunnel_proxy_join_seconds_bucket{le="0.005"} 3
tunnel_proxy_join_seconds_bucket{le="0.01"} 3
tunnel_proxy_join_seconds_bucket{le="0.02"} 3
tunnel_proxy_join_seconds_bucket{le="0.05"} 4
tunnel_proxy_join_seconds_bucket{le="0.1"} 4
tunnel_proxy_join_seconds_bucket{le="0.25"} 4
tunnel_proxy_join_seconds_bucket{le="0.5"} 4
tunnel_proxy_join_seconds_bucket{le="1"} 4
tunnel_proxy_join_seconds_bucket{le="5"} 4
tunnel_proxy_join_seconds_bucket{le="+Inf"} 5
tunnel_proxy_join_seconds_sum 7.0316
tunnel_proxy_join_seconds_count 5
# HELP process_cpu_seconds_total Processor time, user and system.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 1.5
# HELP process_resident_memory_bytes Resident memory.
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 6291456
# HELP process_open_fds Open descriptors.
# TYPE process_open_fds gauge
process_open_fds 31
# HELP process_max_fds The most open descriptors.
# TYPE process_max_fds gauge
process_max_fds 20000
# HELP process_threads Threads.
# TYPE process_threads gauge
process_threads 9
"##;
}
