//! The command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use getopts::Matches;

use crate::rows::ROWS;

/// The row that is measured behind all others.
pub const SOAK: &str = "soak";

const ROUNDS: u32 = 5;
const SECS: f64 = 0.8;
const SOAK_SECS: f64 = 60.0;

/// Shorter ones are lost in the clock ticks that processor time is counted in, longer ones are a
/// slip of the finger.
const SECS_RANGE: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

pub struct Options {
    pub rounds: u32,
    pub span: Duration,
    pub soak: Duration,
    /// Names of rows.
    pub only: Vec<String>,
    pub json: Option<PathBuf>,
    pub svg: Option<PathBuf>,
    /// Where our programs are, if they are not to be built.
    pub bins: Option<PathBuf>,
    pub rathole: String,
    pub bore: String,
}

impl Options {
    pub fn has_row(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|it| it == name)
    }
}

pub enum Command {
    Run(Options),
    Print(String),
}

pub fn read(words: impl Iterator<Item = String>) -> Result<Command, String> {
    let names: Vec<_> = ROWS.iter().map(|row| row.name).chain([SOAK]).collect();
    let only = format!("measure these alone, of: {}", names.join(", "));
    let mut grammar = getopts::Options::new();
    grammar
        .optopt(
            "",
            "rounds",
            &format!("rounds, whose medians count ({ROUNDS})"),
            "N",
        )
        .optopt(
            "",
            "secs",
            &format!("how long a load is measured ({SECS})"),
            "S",
        )
        .optopt(
            "",
            "soak-secs",
            &format!("how long the soak takes ({SOAK_SECS})"),
            "S",
        )
        .optopt("", "only", &only, "NAME[,NAME]...")
        .optopt(
            "",
            "json",
            "write every value of every round into this file",
            "FILE",
        )
        .optopt(
            "",
            "svg",
            "draw the ratios to rathole into this file",
            "FILE",
        )
        .optopt(
            "",
            "bins",
            "take tpserver and tpclient from here, and build nothing",
            "DIR",
        )
        .optopt(
            "",
            "rathole",
            "this program, in place of the one on the PATH",
            "PATH",
        )
        .optopt(
            "",
            "bore",
            "this program, in place of the one on the PATH",
            "PATH",
        )
        .optflag("h", "help", "print this and exit");
    let given = grammar.parse(words).map_err(|error| error.to_string())?;
    if given.opt_present("help") {
        let brief = "Usage: cargo run --release --example bench -- [OPTION]...";
        return Ok(Command::Print(grammar.usage(brief)));
    }
    if let Some(word) = given.free.first() {
        return Err(format!("unexpected word '{word}'"));
    }
    let only: Vec<_> = given.opt_str("only").map_or_else(Vec::new, |text| {
        text.split(',').map(str::to_owned).collect()
    });
    if let Some(name) = only.iter().find(|name| !names.contains(&name.as_str())) {
        return Err(format!("--only: there is no row '{name}'"));
    }
    let peer = |name: &str| given.opt_str(name).unwrap_or_else(|| name.to_owned());
    Ok(Command::Run(Options {
        rounds: number(&given, "rounds", ROUNDS, |it| (1..=1000).contains(it))?,
        span: seconds(&given, "secs", SECS)?,
        soak: seconds(&given, "soak-secs", SOAK_SECS)?,
        only,
        json: given.opt_str("json").map(PathBuf::from),
        svg: given.opt_str("svg").map(PathBuf::from),
        bins: given.opt_str("bins").map(PathBuf::from),
        rathole: peer("rathole"),
        bore: peer("bore"),
    }))
}

fn seconds(given: &Matches, option: &str, default: f64) -> Result<Duration, String> {
    let secs = number(given, option, default, |it| SECS_RANGE.contains(it))?;
    Ok(Duration::from_secs_f64(secs))
}

fn number<T: FromStr>(
    given: &Matches,
    option: &str,
    default: T,
    fits: impl Fn(&T) -> bool,
) -> Result<T, String> {
    let Some(text) = given.opt_str(option) else {
        return Ok(default);
    };
    let number = text.parse().ok().filter(fits);
    number.ok_or_else(|| format!("--{option} '{text}' is not a sensible number"))
}
