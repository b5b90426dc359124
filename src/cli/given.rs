//! The options that a program is given: on its command line, and in the file that `--config` names.

use std::path::{Path, PathBuf};

use getopts::{Fail, Matches, Options};

/// Options, those of the command line before those of the file.
pub struct Given {
    line: Matches,
    file: Option<ConfigFile>,
}

/// What a file says: an option a line, its long name without dashes, and its value behind a space.
struct ConfigFile {
    path: PathBuf,
    options: Matches,
    /// Which option each line has, with the line's number.
    lines: Vec<(Line, usize)>,
}

/// An option's name, and its value if it has one.
type Line = (String, Option<String>);

/// These make sense on a command line only.
const NOT_IN_FILE: [&str; 6] = [
    "check",
    "config",
    "generate-key",
    "help",
    "ready",
    "version",
];

impl Given {
    /// What a command line says.
    pub fn new(line: Matches) -> Self {
        Self { line, file: None }
    }

    /// Adds what a file says, which has this text.
    ///
    /// # Errors
    /// A text that names the file, the line, and what is wrong there.
    pub fn add_file(&mut self, path: &str, text: &str, grammar: &Options) -> Result<(), String> {
        let (mut words, mut lines): (Vec<String>, Vec<(Line, usize)>) = Default::default();
        // A list of networks is one option, many thousand times.
        let mut checked: Vec<(&str, bool)> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let (line, number) = (line.trim(), number + 1);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let failed = |why: String| format!("{path}, line {number}: {why}");
            let (name, value) = match line.split_once(char::is_whitespace) {
                Some((name, value)) => (name, Some(value.trim_start().to_owned())),
                None => (line, None),
            };
            let word = match &value {
                Some(value) => format!("--{name}={value}"),
                None => format!("--{name}"),
            };
            let form = (name, value.is_some());
            if !checked.contains(&form) {
                check(name, &word, grammar).map_err(failed)?;
                checked.push(form);
            }
            words.push(word);
            lines.push(((name.to_owned(), value), number));
        }
        let options = grammar.parse(words).map_err(|fail| {
            let Fail::OptionDuplicated(option) = &fail else {
                return format!("{path}: {fail}");
            };
            let its_lines = lines.iter().filter(|((name, _), _)| name == option);
            let its_lines: Vec<_> = its_lines.map(|(_, number)| number.to_string()).collect();
            format!(
                "{path}: {option} stands in lines {}",
                its_lines.join(" and ")
            )
        })?;
        let path = PathBuf::from(path);
        self.file = Some(ConfigFile {
            path,
            options,
            lines,
        });
        Ok(())
    }

    /// True if the option is given.
    pub fn opt_present(&self, option: &str) -> bool {
        self.source(option).opt_present(option)
    }

    /// The option's values.
    pub fn opt_strs(&self, option: &str) -> Vec<String> {
        self.source(option).opt_strs(option)
    }

    /// True if one of these options stands on the command line.
    pub fn line_has(&self, options: &[&str]) -> bool {
        options.iter().any(|option| self.line.opt_present(option))
    }

    /// Says that an option which stands in the file does not count, if it stands on the command line, too.
    pub fn hidden(&self, option: &str) -> Option<String> {
        let file = self.file.as_ref()?;
        let (_, line) = file.lines.iter().find(|((name, _), _)| name == option)?;
        let path = file.path.display();
        let hidden = || {
            format!(
                "{path}, line {line}: {option} is not used: --{option} of the command line comes first"
            )
        };
        self.line_has(&[option]).then(hidden)
    }

    /// The values of an option that names files. Those in the file are looked for beside it.
    pub fn paths(&self, option: &str) -> Vec<PathBuf> {
        let folder = match &self.file {
            Some(file) if !self.line.opt_present(option) => file.path.parent(),
            _ => None,
        };
        let paths = self.opt_strs(option).into_iter();
        paths
            .map(|path| folder.unwrap_or(Path::new("")).join(path))
            .collect()
    }

    /// Names an option and its value, as an error does: where it stands, and what it says.
    pub fn place(&self, option: &str, value: &str) -> String {
        if let Some(file) = self
            .file
            .as_ref()
            .filter(|_| !self.line.opt_present(option))
        {
            let is_it = |(name, given): &Line| name == option && given.as_deref() == Some(value);
            if let Some((_, number)) = file.lines.iter().find(|(line, _)| is_it(line)) {
                let path = file.path.display();
                return format!("{path}, line {number}: {option} '{value}'");
            }
        }
        format!("--{option} '{value}'")
    }

    /// Where an option is taken from: the command line wins.
    fn source(&self, option: &str) -> &Matches {
        match &self.file {
            Some(file) if !self.line.opt_present(option) => &file.options,
            _ => &self.line,
        }
    }
}

/// What is wrong with a line of a file, but for its value.
fn check(name: &str, word: &str, grammar: &Options) -> Result<(), String> {
    if NOT_IN_FILE.contains(&name) {
        return Err(format!("{name} belongs on the command line"));
    }
    if name.starts_with('-') {
        return Err("leave out the dashes before an option's name".to_owned());
    }
    if let Some((name, _)) = name.split_once('=') {
        return Err(format!("a space, not '=', stands behind {name}"));
    }
    // Short names are for the command line: getopts would take them behind two dashes, too.
    let unknown = || format!("there is no option {name}");
    if name.chars().count() == 1 {
        return Err(unknown());
    }
    match grammar.parse([word]) {
        Ok(_) => Ok(()),
        Err(Fail::UnrecognizedOption(_)) => Err(unknown()),
        Err(Fail::ArgumentMissing(_)) => Err(format!("{name} needs a value behind a space")),
        Err(Fail::UnexpectedArgument(_)) => Err(format!("{name} has no value")),
        Err(other) => Err(other.to_string()),
    }
}
