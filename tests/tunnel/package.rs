//! The man pages and the completions for three shells, which are written out of what each program's
//! `--help` says: the two cannot disagree.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What `--help` does not say, and a man page has to.
struct Page {
    name: &'static str,
    path: &'static str,
    other: &'static str,
    title: &'static str,
    description: &'static str,
}

const PAGES: [Page; 2] = [
    Page {
        name: "tpserver",
        path: env!("CARGO_BIN_EXE_tpserver"),
        other: "tpclient",
        title: "the half of a TCP tunnel that has the public address",
        description: "Visitors who connect to a public port of tpserver reach a service in another \
            network, which needs no public address: tpclient runs there, and dials out to tpserver. \
            With a key that both programs share, nobody else can act as the client or read what passes \
            between the two hosts.",
    },
    Page {
        name: "tpclient",
        path: env!("CARGO_BIN_EXE_tpclient"),
        other: "tpserver",
        title: "the half of a TCP tunnel that is next to the service",
        description: "Runs in a network without a public address, and dials out to tpserver. Visitors \
            who connect to a public port of tpserver then reach a service in the client's network. \
            With a key that both programs share, nobody else can act as the client or read what passes \
            between the two hosts.",
    },
];

/// What writes the files anew.
const WRITE: &str = "TP_WRITE=1 cargo test --test tunnel package";

#[test]
fn man_pages_and_completions_say_what_help_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/package");
    for page in PAGES {
        let help = Help::of(&page);
        let name = page.name;
        for (file, text) in [
            (format!("man/{name}.1"), man_page(&page, &help)),
            (format!("completions/{name}.bash"), bash(name, &help)),
            (format!("completions/_{name}"), zsh(name, &help)),
            (format!("completions/{name}.fish"), fish(name, &help)),
        ] {
            let file = folder.join(file);
            if std::env::var_os("TP_WRITE").is_some() {
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(&file, &text).unwrap();
            }
            let written = fs::read_to_string(&file).unwrap_or_default();
            let file = file.display();
            assert!(
                written == text,
                "{file} is not what --help says: `{WRITE}` writes it anew"
            );
        }
    }
}

/// What `--help` says, taken apart.
struct Help {
    options: Vec<Declared>,
    /// The lines of the other sections.
    sections: BTreeMap<String, Vec<String>>,
}

impl Help {
    fn of(page: &Page) -> Self {
        let output = Command::new(page.path).arg("--help").output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut sections = BTreeMap::<_, Vec<_>>::new();
        let mut title = String::new();
        for line in text.lines() {
            match line.strip_suffix(':') {
                Some(word) if !word.starts_with(' ') => word.clone_into(&mut title),
                _ => sections
                    .entry(title.clone())
                    .or_default()
                    .push(line.to_owned()),
            }
        }
        let options = sections.remove("Options").unwrap();
        let options = items(&options, |line| line.trim_start().starts_with('-'));
        Self {
            options: options.iter().map(|it| Declared::read(it)).collect(),
            sections,
        }
    }

    /// The lines of a section.
    fn section(&self, title: &str) -> &[String] {
        &self.sections[title]
    }
}

/// Returns each item of a list on one line, with two spaces where a line ended.
fn items(lines: &[String], begins: fn(&str) -> bool) -> Vec<String> {
    let mut items = Vec::<String>::new();
    for line in lines.iter().filter(|line| !line.is_empty()) {
        match items.last_mut() {
            Some(item) if !begins(line) => *item += &format!("  {}", line.trim()),
            _ => items.push(line.trim().to_owned()),
        }
    }
    items
}

/// An option, as `--help` declares it.
struct Declared {
    /// Without its dash.
    short: Option<String>,
    /// Without its dashes.
    long: String,
    value: Option<String>,
    about: String,
}

/// What a shell offers behind an option.
enum Offer<'a> {
    /// The option has no value.
    Options,
    Files,
    /// One of these words.
    Words(Vec<&'a str>),
    /// The user knows the value, and nobody else.
    Nothing,
}

impl Declared {
    /// Reads a declaration as the programs do: a value stands one space behind the option's name.
    fn read(item: &str) -> Self {
        let (short, long) = item[1..].split_once('-').unwrap();
        let mut words = long.trim_start_matches('-').splitn(3, ' ');
        let mut word = || words.next().unwrap().to_owned();
        let (long, value, about) = (word(), word(), word());
        let some = |text: &str| Some(text.to_owned()).filter(|it| !it.is_empty());
        Self {
            short: some(short.trim_end_matches(", ")),
            long,
            value: some(&value),
            about: about.split_whitespace().collect::<Vec<_>>().join(" "),
        }
    }

    /// Its names, with their dashes.
    fn names(&self) -> Vec<String> {
        let short = self.short.iter().map(|it| format!("-{it}"));
        short.chain([format!("--{}", self.long)]).collect()
    }

    /// What it does, in so few words as a shell has room for.
    fn brief(&self) -> &str {
        let ends = [";", ". "].map(|end| self.about.find(end).unwrap_or(self.about.len()));
        &self.about[..ends[0].min(ends[1])]
    }

    fn offer(&self) -> Offer<'_> {
        let Some(value) = &self.value else {
            return Offer::Options;
        };
        let value = value.trim_start_matches("[NAME=]");
        match value {
            "FILE" => Offer::Files,
            _ if value.contains('|') => Offer::Words(value.split('|').collect()),
            _ => Offer::Nothing,
        }
    }
}

/// Says in a comment where a file comes from.
fn origin(name: &str) -> String {
    format!("Written out of `{name} --help` by `{WRITE}`.")
}

fn man_page(page: &Page, help: &Help) -> String {
    let Page {
        name,
        other,
        title,
        description,
        ..
    } = page;
    let mut text = format!(
        ".\\\" {}\n.TH {} 1 \"\" tunnel\\-proxy \"User Commands\"\n.SH NAME\n{name} \\- {title}\n\
         .SH SYNOPSIS\n.B {name}\n[\\fIOPTION\\fR]...\n.SH DESCRIPTION\n{}.SH OPTIONS\n",
        origin(name),
        name.to_uppercase(),
        filled(description),
    );
    for option in &help.options {
        let names = option
            .names()
            .into_iter()
            .map(|it| format!("\\fB{}\\fR", escaped(&it)));
        let value = option
            .value
            .iter()
            .map(|it| format!(" \\fI{}\\fR", escaped(it)));
        let names = names.collect::<Vec<_>>().join(", ");
        text += &format!(
            ".TP\n{names}{}\n{}",
            value.collect::<String>(),
            filled(&option.about)
        );
    }
    let paragraphs = help.section("Examples").split(String::is_empty);
    let examples = paragraphs.filter(|it| !it.is_empty()).map(|paragraph| {
        let (commands, about): (Vec<_>, Vec<_>) =
            paragraph.iter().partition(|it| it.starts_with("    "));
        let about = about.into_iter().map(|it| it.trim()).collect::<Vec<_>>();
        let commands = commands.into_iter().map(|it| escaped(it.trim()) + "\n");
        let commands = commands.collect::<String>();
        format!(
            "{}.RS 4\n.EX\n{commands}.EE\n.RE\n",
            filled(&about.join(" "))
        )
    });
    text += ".SH EXAMPLES\n";
    text += &examples.collect::<Vec<_>>().join(".PP\n");
    for title in ["Signals", "Environment"] {
        text += &format!(".SH {}\n", title.to_uppercase());
        for item in items(help.section(title), |line| !line.starts_with("   ")) {
            let (term, about) = item.split_once("  ").unwrap();
            text += &format!(".TP\n\\fB{}\\fR\n{}", escaped(term), filled(about));
        }
    }
    text + &format!(
        ".SH EXIT STATUS\n.TP\n0\nIt was told to stop, or did what was asked.\n.TP\n1\n\
         The machine refused something, such as a port in use, or a check has failed.\n.TP\n2\n\
         The command line makes no sense, or a file or a key cannot be read.\n\
         .SH FILES\n.TP\n.I /etc/tunnel\\-proxy/{name}.conf\nThe options of the systemd unit {name}.\n\
         .TP\n.I /etc/tunnel\\-proxy/tp.key\nIts key.\n\
         .SH SEE ALSO\n.BR {other} (1)\n"
    )
}

/// Returns a text for a man page, with a line for each sentence, and more for a long one.
fn filled(text: &str) -> String {
    let mut lines = vec![String::new()];
    let mut is_code = false;
    for word in text.split_whitespace() {
        let mut shown = String::new();
        for (number, part) in word.split('`').enumerate() {
            if number > 0 {
                is_code = !is_code;
                shown += if is_code { "\\fB" } else { "\\fR" };
            }
            shown += &escaped(part);
        }
        let line = lines.last_mut().unwrap();
        if !line.is_empty() && line.len() + shown.len() > 76 {
            lines.push(shown);
        } else {
            let gap = if line.is_empty() { "" } else { " " };
            *line += &format!("{gap}{shown}");
        }
        if word.ends_with('.') {
            lines.push(String::new());
        }
    }
    let lines = lines.iter().filter(|line| !line.is_empty());
    lines.map(|line| format!("{line}\n")).collect()
}

/// Returns a text in which a man page has no character of its own.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    let text = text
        .replace('\'', "\\(aq")
        .replace('~', "\\(ti")
        .replace('^', "\\(ha");
    match text.starts_with('.') {
        true => format!("\\&{text}"),
        false => text,
    }
}

fn bash(name: &str, help: &Help) -> String {
    let [mut words, mut files, mut nothing] = [const { Vec::new() }; 3];
    for option in &help.options {
        let names = option.names().join(" | ");
        match option.offer() {
            Offer::Options => {}
            Offer::Words(these) => {
                words.push(format!(
                    "        {names}) {} ;;\n",
                    offered(&these.join(" "))
                ));
            }
            Offer::Files => files.push(names),
            Offer::Nothing => nothing.push(names),
        }
    }
    let all = help.options.iter().map(|it| format!("--{}", it.long));
    format!(
        "# {}\n_{name}() {{\n    local option=$3\n    \
         # Three words are what --option=value is here.\n    \
         [[ $option != = ]] || option=${{COMP_WORDS[COMP_CWORD - 2]}}\n    COMPREPLY=()\n    \
         case $option in\n{}        {}) compopt -o default ;;\n        \
         # Nobody but the user knows a value for these.\n        {}) ;;\n        \
         *) {} ;;\n    esac\n}}\ncomplete -F _{name} {name}\n",
        origin(name),
        words.concat(),
        files.join(" | "),
        nothing.join(" | \\\n            "),
        offered(&all.collect::<Vec<_>>().join(" ")),
    )
}

/// Returns the command that offers those of these words that begin as the user's does.
fn offered(words: &str) -> String {
    format!("mapfile -t COMPREPLY < <(compgen -W '{words}' -- \"$2\")")
}

fn zsh(name: &str, help: &Help) -> String {
    let mut specs = String::new();
    let escaped = |text: &str| {
        let text = text.replace('\\', "\\\\").replace('\'', "'\\''");
        text.replace('[', "\\[")
            .replace(']', "\\]")
            .replace(':', "\\:")
    };
    for option in &help.options {
        let offer = match option.offer() {
            Offer::Options => None,
            Offer::Files => Some("_files".to_owned()),
            Offer::Words(words) => Some(format!("({})", words.join(" "))),
            Offer::Nothing => Some(" ".to_owned()),
        };
        let value = option.value.as_deref().zip(offer);
        let value = value.map(|(value, offer)| format!(":{}:{offer}", escaped(value)));
        let (plus, equals) = if value.is_some() {
            ("+", "=")
        } else {
            ("", "")
        };
        let long = format!("--{}{equals}", option.long);
        let names = match &option.short {
            Some(short) => format!("'*'{{-{short}{plus},{long}}}'"),
            None => format!("'*{long}"),
        };
        let (about, value) = (escaped(option.brief()), value.unwrap_or_default());
        specs += &format!(" \\\n    {names}[{about}]{value}'");
    }
    format!(
        "#compdef {name}\n# {}\n_arguments -s -S{specs}\n",
        origin(name)
    )
}

fn fish(name: &str, help: &Help) -> String {
    let mut text = format!("# {}\ncomplete -c {name} -f\n", origin(name));
    for option in &help.options {
        let short = option
            .short
            .iter()
            .map(|it| format!(" -s {it}"))
            .collect::<String>();
        let value = match option.offer() {
            Offer::Options => String::new(),
            Offer::Files => " -r -F".to_owned(),
            Offer::Words(words) => format!(" -x -a '{}'", words.join(" ")),
            Offer::Nothing => " -x".to_owned(),
        };
        let about = option.brief().replace('\\', "\\\\").replace('\'', "\\'");
        text += &format!(
            "complete -c {name}{short} -l {}{value} -d '{about}'\n",
            option.long
        );
    }
    text
}
