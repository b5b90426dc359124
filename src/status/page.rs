//! The page for people. It has no script, and loads nothing: one request shows all of it.

use std::cmp::Reverse;
use std::fmt::{self, Display, Write as _};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use log::Level;
use ring::digest::{SHA256, digest};

use super::http::{Code, POLICY, Response};
use super::snapshot::{LogLine, Service, Session, Side, Snapshot, Visitor};

/// The visitors who are shown: the busiest, then those who came last.
const MAX_VISITORS: usize = 200;

const STYLE: &str = include_str!("style.css");

/// What stands in the place of a value that there is none of.
const NONE: &str = "–";

/// The page. Only its own style is allowed on it, known by its hash: even markup that a stranger could
/// bring in would have none.
pub fn response(snapshot: &Snapshot) -> Response {
    let hash = BASE64_STANDARD.encode(digest(&SHA256, STYLE.as_bytes()));
    let mut response = Response::new(Code::Ok, "text/html; charset=utf-8", render(snapshot));
    response.policy = format!("{POLICY}; img-src data:; style-src 'sha256-{hash}'").into();
    response
}

fn render(snapshot: &Snapshot) -> String {
    let mut page = Page(String::with_capacity(64 * 1024));
    head(&mut page, snapshot);
    figures(&mut page, snapshot);
    services(&mut page, snapshot);
    sessions(&mut page, snapshot);
    refused(&mut page, snapshot);
    visitors(&mut page, snapshot);
    log(&mut page, snapshot);
    page.put("</body>\n</html>\n");
    page.0
}

fn head(page: &mut Page, snapshot: &Snapshot) {
    let ready = match snapshot.not_ready[..] {
        [] => "ready",
        _ => "not ready",
    };
    page.put("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.put("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    page.put("<meta http-equiv=\"refresh\" content=\"2\">\n");
    // Otherwise a browser asks for an icon each time.
    page.put("<link rel=\"icon\" href=\"data:,\">\n<title>");
    page.text(format_args!("{}, {ready}", snapshot.program()));
    page.put("</title>\n<style>");
    page.put(STYLE);
    page.put("</style>\n</head>\n<body>\n<h1>");
    page.text(snapshot.program());
    page.put("<small>");
    page.text(format_args!(
        "{}, up {}",
        snapshot.version,
        Time(snapshot.uptime)
    ));
    page.put("</small></h1>\n");
    if snapshot.not_ready.is_empty() {
        page.put("<p class=\"good\">Ready: who comes now is served.</p>\n");
    }
    for why in &snapshot.not_ready {
        page.put("<p class=\"bad\">Not ready: ");
        page.text(why);
        page.put("</p>\n");
    }
    // Both can be long, and stand below the rest.
    page.put("<p><a href=\"#Visitors\">Visitors</a><a href=\"#Log\">Log</a></p>\n");
}

/// The totals, and what the process takes. What the system or the other side does not tell is left out.
fn figures(page: &mut Page, snapshot: &Snapshot) {
    let services = &snapshot.services;
    let sum = |of: fn(&Service) -> u64| Count(services.iter().map(of).sum());
    let bytes = |of: fn(&Service) -> u64| Bytes(services.iter().map(of).sum());
    let process = &snapshot.process;
    let told = |value: Option<u64>| value.map_or(NONE.to_owned(), |it| Count(it).to_string());
    let most = |value: Option<u64>| value.map_or(String::new(), |it| format!("of {}", Count(it)));
    let joined = sum(|it| it.joined as u64).to_string();
    let waiting = services.iter().map(|it| Some(it.waiting? as u64)).sum();
    let memory = process
        .memory
        .map_or(NONE.to_owned(), |it| Bytes(it).to_string());
    let cpu = process
        .cpu
        .map_or(NONE.to_owned(), |it| Time(it).to_string());
    page.put("<dl>\n");
    for (name, value, beside) in [
        (
            "Visitors now",
            joined,
            most(Some(snapshot.max_visitors as u64)),
        ),
        ("Waiting", told(waiting), String::new()),
        ("Visits", sum(|it| it.visits).to_string(), String::new()),
        ("Up", bytes(|it| it.moved[0]).to_string(), String::new()),
        ("Down", bytes(|it| it.moved[1]).to_string(), String::new()),
        (
            "Timed out",
            Count(snapshot.timed_out).to_string(),
            String::new(),
        ),
        (
            "Tunnels dialled",
            Count(snapshot.dialled).to_string(),
            String::new(),
        ),
        (
            "Descriptors",
            told(process.descriptors),
            most(process.descriptor_limit),
        ),
        ("Threads", told(process.threads), String::new()),
        ("Memory", memory, String::new()),
        ("Processor time", cpu, String::new()),
    ] {
        if value != NONE {
            page.figure(name, &value, &beside);
        }
    }
    page.put("</dl>\n");
}

/// The column of the visitors who wait, which a client knows nothing of.
const WAITING: usize = 4;

fn services(page: &mut Page, snapshot: &Snapshot) {
    let address = match snapshot.side {
        Side::Server => "Visitors come to",
        Side::Client => "Visitors reach",
    };
    let mut heads = vec![
        address, "Service", "Offered", "Joined", "Visits", "Up", "Down",
    ];
    if snapshot.side == Side::Server {
        heads.insert(WAITING, "Waiting");
    }
    let rows = snapshot.services.iter().map(|service| {
        let mut row = vec![
            service.address.clone(),
            or_none(service.name.as_deref()),
            if service.offered { "yes" } else { "no" }.to_owned(),
            Count(service.joined as u64).to_string(),
            Count(service.visits).to_string(),
            Bytes(service.moved[0]).to_string(),
            Bytes(service.moved[1]).to_string(),
        ];
        if let Some(waiting) = service.waiting {
            row.insert(WAITING, Count(waiting as u64).to_string());
        }
        row
    });
    page.title("Services", "");
    page.table(&heads, 3, rows);
}

fn sessions(page: &mut Page, snapshot: &Snapshot) {
    let peer = match snapshot.side {
        Side::Server => "Client",
        Side::Client => "Server",
    };
    let rows = snapshot.sessions.iter().map(|session| {
        [
            session.peer.clone(),
            session
                .age
                .map_or("no session".to_owned(), |it| Time(it).to_string()),
            sealed(session),
            Count(session.pool as u64).to_string(),
            Count(session.idle as u64).to_string(),
            Count(session.dialled).to_string(),
        ]
    });
    page.title("Sessions", "");
    page.table(&[peer, "Age", "Sealed", "Pool", "Idle", "Dialled"], 3, rows);
}

fn sealed(session: &Session) -> String {
    match session.key {
        _ if session.age.is_none() => NONE.to_owned(),
        None => "no".to_owned(),
        Some((_, 1)) => "yes".to_owned(),
        Some((place, count)) => format!("key {place} of {count}"),
    }
}

fn visitors(page: &mut Page, snapshot: &Snapshot) {
    let mut shown: Vec<_> = snapshot.visitors.iter().collect();
    shown.sort_by_key(|it| (Reverse(it.rate[0].saturating_add(it.rate[1])), it.age));
    shown.truncate(MAX_VISITORS);
    let rows = shown.iter().map(|visitor: &&Visitor| {
        [
            or_none(visitor.address.as_deref()),
            or_none(visitor.service.as_deref()),
            Time(visitor.age).to_string(),
            Bytes(visitor.moved[0]).to_string(),
            Bytes(visitor.moved[1]).to_string(),
            Bytes(visitor.rate[0]).to_string(),
            Bytes(visitor.rate[1]).to_string(),
        ]
    });
    let (count, all) = (shown.len(), Count(snapshot.visitors.len() as u64));
    let few = format!("the {count} busiest or latest of {all}");
    let cut = count < snapshot.visitors.len();
    page.title("Visitors", if cut { &few } else { "" });
    let heads = ["Address", "Service", "Age", "Up", "Down", "Up/s", "Down/s"];
    page.table(&heads, 2, rows);
}

fn refused(page: &mut Page, snapshot: &Snapshot) {
    page.title("Refused", "since the start");
    let refused = || snapshot.refused.iter().filter(|(_, count)| **count > 0);
    if refused().next().is_none() {
        return page.put("<p>None.</p>\n");
    }
    page.put("<dl>\n");
    for (reason, count) in refused() {
        page.figure(reason, &Count(*count).to_string(), "");
    }
    page.put("</dl>\n");
}

fn log(page: &mut Page, snapshot: &Snapshot) {
    let left_out = format!(
        "newest first; {} lines left out",
        Count(snapshot.log_left_out)
    );
    page.title("Log", &left_out);
    page.put("<ol>\n");
    for LogLine { age, level, text } in snapshot.log.iter().rev() {
        page.put(match *level <= Level::Warn {
            true => "<li class=\"bad\">",
            false => "<li>",
        });
        page.text(format_args!("{} ago {level} {text}", Time(*age)));
        page.put("</li>\n");
    }
    page.put("</ol>\n");
}

fn or_none(value: Option<&str>) -> String {
    value.unwrap_or(NONE).to_owned()
}

/// The markup so far. Only text of this program's own gets there as it is: every value is escaped.
struct Page(String);

impl Page {
    fn put(&mut self, markup: &'static str) {
        self.0.push_str(markup);
    }

    fn text(&mut self, value: impl Display) {
        // To write into a string cannot fail.
        let _ = write!(Escaping(&mut self.0), "{value}");
    }

    /// Begins a section, which a link can lead to.
    fn title(&mut self, title: &'static str, beside: &str) {
        self.put("<h2 id=\"");
        self.put(title);
        self.put("\">");
        self.put(title);
        self.beside(beside);
        self.put("</h2>\n");
    }

    /// A value with its name above it.
    fn figure(&mut self, name: &str, value: &str, beside: &str) {
        self.put("<div><dt>");
        self.text(name);
        self.put("</dt><dd>");
        self.text(value);
        self.beside(beside);
        self.put("</dd></div>\n");
    }

    fn beside(&mut self, what: &str) {
        if !what.is_empty() {
            self.put(" <small>");
            self.text(what);
            self.put("</small>");
        }
    }

    /// A table whose first columns are text, and all others numbers. On a narrow screen each row
    /// stands for itself, its heads in it.
    fn table(
        &mut self,
        heads: &[&'static str],
        texts: usize,
        rows: impl Iterator<Item = impl IntoIterator<Item = String>>,
    ) {
        let mut rows = rows.peekable();
        if rows.peek().is_none() {
            return self.put("<p>None.</p>\n");
        }
        self.put("<table>\n<thead><tr>");
        for (column, head) in heads.iter().enumerate() {
            self.put(if column < texts {
                "<th>"
            } else {
                "<th class=\"n\">"
            });
            self.put(head);
            self.put("</th>");
        }
        self.put("</tr></thead>\n<tbody>\n");
        for row in rows {
            self.put("<tr>");
            for (column, (head, value)) in heads.iter().zip(row).enumerate() {
                self.put(if column < texts {
                    "<td"
                } else {
                    "<td class=\"n\""
                });
                self.put(" data-head=\"");
                self.put(head);
                self.put("\">");
                self.text(value);
                self.put("</td>");
            }
            self.put("</tr>\n");
        }
        self.put("</tbody>\n</table>\n");
    }
}

/// Writes text so that it means no markup, in an element as in a quoted attribute.
struct Escaping<'a>(&'a mut String);

impl fmt::Write for Escaping<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for char in text.chars() {
            match char {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                char => self.0.push(char),
            }
        }
        Ok(())
    }
}

/// A number as people read it: 1,234,567.
struct Count(u64);

impl Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                f.write_char(',')?;
            }
            f.write_char(digit)?;
        }
        Ok(())
    }
}

/// Bytes in the unit that leaves up to three digits before the point: 999 B, 1.2 MB.
struct Bytes(u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        let mut units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"].iter();
        let mut unit = units.next();
        // What would be rounded up to 1000 gets the next unit.
        while value >= 999.5 {
            value /= 1000.0;
            unit = units.next();
        }
        let places = usize::from(self.0 >= 1000 && value < 99.95);
        write!(f, "{value:.places$}\u{a0}{}", unit.unwrap_or(&"B"))
    }
}

/// A time in its two largest units: 5.2 s, 3 min 20 s, 4 d 7 h.
struct Time(Duration);

impl Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
        match seconds {
            0..10 => write!(f, "{:.1}\u{a0}s", self.0.as_millis() as f64 / 1e3),
            10..60 => write!(f, "{seconds}\u{a0}s"),
            60..3_600 => write!(f, "{minutes}\u{a0}min {}\u{a0}s", seconds % 60),
            3_600..86_400 => write!(f, "{hours}\u{a0}h {}\u{a0}min", minutes % 60),
            _ => write!(f, "{}\u{a0}d {}\u{a0}h", Count(days), hours % 24),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_is_markup() {
        let mut snapshot = Snapshot::invented();
        let evil = "\"><script>alert('&')</script>";
        snapshot.not_ready = vec![evil.to_owned()];
        snapshot.services[0].name = Some(evil.to_owned());
        snapshot.services[0].address = evil.to_owned();
        snapshot.sessions[0].peer = evil.to_owned();
        snapshot.visitors[0].address = Some(evil.to_owned());
        snapshot.visitors[0].service = Some(evil.to_owned());
        snapshot.refused.insert(evil.to_owned(), 1);
        snapshot.log[0].text = evil.to_owned();
        let page = render(&snapshot);
        let escaped = "&quot;&gt;&lt;script&gt;alert(&#39;&amp;&#39;)&lt;/script&gt;";
        assert_eq!(page.matches(escaped).count(), 8);
        assert!(!page.contains("<script") && !page.contains(evil), "{page}");
        // The other half of the invented guest.
        assert!(page.contains("&lt;/script&gt;&quot;&amp;</td>"), "{page}");
    }

    #[test]
    fn a_page_shows_what_there_is() {
        let page = render(&Snapshot::invented());
        for shown in [
            "<title>tpserver, not ready</title>",
            "<small>0.1.0, up 1\u{a0}d 2\u{a0}h</small>",
            "Not ready: no client offers &quot;ssh&quot;",
            "<dt>Visitors now</dt><dd>4 <small>of 4,000</small></dd>",
            "<dt>Visits</dt><dd>2,468</dd>",
            "<dt>Down</dt><dd>2.5\u{a0}GB</dd>",
            "<dt>Descriptors</dt><dd>31 <small>of 20,000</small></dd>",
            "<dt>Processor time</dt><dd>1.5\u{a0}s</dd>",
            "<td data-head=\"Visitors come to\">0.0.0.0:2222</td>",
            "<td data-head=\"Sealed\">key 2 of 3</td>",
            "<td class=\"n\" data-head=\"Down/s\">2.5\u{a0}MB</td>",
            "<dt>wrong-key</dt><dd>3</dd>",
            "newest first; 4 lines left out",
            "<li>3\u{a0}min 20\u{a0}s ago INFO listening on ",
            "<li class=\"bad\">3\u{a0}min 20\u{a0}s ago WARN refused ",
        ] {
            assert!(page.contains(shown), "{shown} is not in {page}");
        }
        let [newest, oldest] = ["refused control link", "listening on"].map(|it| page.find(it));
        assert!(newest < oldest && newest.is_some(), "{page}");
    }

    #[test]
    fn a_client_names_its_servers_and_lost_ones_too() {
        let mut snapshot = Snapshot::invented();
        snapshot.side = Side::Client;
        snapshot.not_ready.clear();
        snapshot.sessions[0].age = None;
        snapshot
            .services
            .iter_mut()
            .for_each(|it| it.waiting = None);
        snapshot.visitors.clear();
        snapshot.refused = [("local-refused".to_owned(), 0)].into();
        let page = render(&snapshot);
        for shown in [
            "<title>tpclient, ready</title>",
            "Ready: who comes now is served.",
            "<th>Server</th>",
            "<th>Visitors reach</th>",
            "<td data-head=\"Age\">no session</td>",
            "</h2>\n<p>None.</p>\n<h2 id=\"Visitors\">",
        ] {
            assert!(page.contains(shown), "{shown} is not in {page}");
        }
        assert!(!page.contains("Waiting"), "{page}");
    }

    /// The style that is on the page is the one that its policy allows.
    #[test]
    fn only_the_pages_own_style_is_allowed() {
        let response = response(&Snapshot::invented());
        let (_, style) = response.body.split_once("<style>").unwrap();
        let (style, _) = style.split_once("</style>").unwrap();
        let hash = BASE64_STANDARD.encode(digest(&SHA256, style.as_bytes()));
        let wanted = format!("style-src 'sha256-{hash}'");
        assert!(response.policy.contains(&wanted), "{}", response.policy);
        assert!(!response.body.contains("style="));
    }

    #[test]
    fn a_crowd_is_shown_in_part() {
        let mut snapshot = Snapshot::invented();
        snapshot.visitors = (0..4_000)
            .map(|number| Visitor {
                address: Some(format!("198.51.100.1:{number}")),
                service: Some("web".to_owned()),
                age: Duration::from_secs(4_000 - number),
                moved: [number, number],
                rate: [0, u64::from(number == 17)],
            })
            .collect();
        let start = processor_time();
        let page = render(&snapshot);
        let taken = processor_time() - start;
        assert!(taken < Duration::from_millis(100), "{taken:?}");
        assert_eq!(page.matches("198.51.100.1:").count(), MAX_VISITORS);
        assert!(page.contains("the 200 busiest or latest of 4,000"));
        // The busiest, and the latest.
        let [busiest, latest] = [":17<", ":3999<"].map(|it| page.find(it));
        assert!(busiest < latest && busiest.is_some(), "{page}");
        assert!(page.len() < 150_000, "{}", page.len());
    }

    /// The processor time of this thread, which other tests do not lengthen.
    fn processor_time() -> Duration {
        #[cfg(target_os = "linux")]
        {
            use rustix::time::{ClockId, clock_gettime};
            clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap()
        }
        #[cfg(not(target_os = "linux"))]
        Duration::ZERO
    }

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1,000"),
            (1_234_567, "1,234,567"),
        ] {
            assert_eq!(Count(number).to_string(), text);
        }
    }

    #[test]
    fn bytes_have_a_unit_that_fits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (99_949, "99.9 kB"),
            (99_950, "100 kB"),
            (999_499, "999 kB"),
            (999_500, "1.0 MB"),
            (1_234_567_890, "1.2 GB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(Bytes(bytes).to_string().replace('\u{a0}', " "), text);
        }
    }

    #[test]
    fn times_have_their_two_largest_units() {
        for (millis, text) in [
            (0, "0.0 s"),
            (9_940, "9.9 s"),
            (59_999, "59 s"),
            (60_000, "1 min 0 s"),
            (3_600_000, "1 h 0 min"),
            (93_784_500, "1 d 2 h"),
        ] {
            let time = Time(Duration::from_millis(millis));
            assert_eq!(time.to_string().replace('\u{a0}', " "), text);
        }
    }
}
