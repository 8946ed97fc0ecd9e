//! What a command ends with, and how it looks.

use std::{io::Write, process::ExitCode};

use pontoon_node::{NodeError, client::ClientError, load::LoadError, settings::SettingsError};
use serde_json::{Value, json};

use super::Context;

/// A command's result, in both forms.
#[derive(Debug)]
pub(crate) struct Done {
    /// For people; several lines without the last line feed, may be empty.
    pub(crate) text: String,
    /// For programs: an object.
    pub(crate) json: Value,
    /// 0 if all is well.
    pub(crate) code: u8,
}

impl Done {
    pub(crate) fn new(text: impl Into<String>, json: Value) -> Self {
        Done { text: text.into(), json, code: 0 }
    }
}

/// A command that failed: what to say, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) text: String,
}

impl Failure {
    pub(crate) const ERROR: u8 = 1;
    pub(crate) const REFUSED: u8 = 2;
    pub(crate) const STUCK: u8 = 3;
    pub(crate) const WAIT_ENDED: u8 = 4;

    pub(crate) fn error(text: impl Into<String>) -> Self {
        Failure { code: Self::ERROR, text: text.into() }
    }

    pub(crate) fn new(code: u8, text: impl Into<String>) -> Self {
        Failure { code, text: text.into() }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let code = match error {
            ClientError::Refused { .. }
            | ClientError::Tls { .. }
            | ClientError::TooLarge { .. }
            | ClientError::DiskFull { .. }
            | ClientError::Address { .. }
            | ClientError::WrongKind { .. }
            | ClientError::NoSuchLog { .. }
            | ClientError::NoSuchOffset { .. }
            | ClientError::UnexpectedOffset { .. }
            | ClientError::NoSuchPredicate { .. } => Self::REFUSED,
            _ => Self::ERROR,
        };
        Failure { code, text: error.to_string() }
    }
}

/// What a log says about a key, with the flag that gives one.
pub(super) fn key_hint(error: &pontoon_wal::Error, flag: &str) -> String {
    match error {
        pontoon_wal::Error::Key { fault: pontoon_wal::KeyFault::NoKeys, .. } => format!("{error}: {flag}"),
        error => error.to_string(),
    }
}

impl From<NodeError> for Failure {
    fn from(error: NodeError) -> Self {
        let code = match error {
            NodeError::Wal(error @ pontoon_wal::Error::Key { .. }) => {
                return Failure::new(Self::REFUSED, key_hint(&error, "--wal-keys FILE"));
            }
            NodeError::Keys(_)
            | NodeError::NotLoopback { .. }
            | NodeError::Advertise { .. }
            | NodeError::Tls(_)
            | NodeError::Resolve { .. }
            | NodeError::JoinRefused { .. }
            | NodeError::NotADataDirectory { .. }
            | NodeError::ForeignDirectory { .. }
            | NodeError::UnknownEngine { .. }
            | NodeError::WrongVersion { .. }
            | NodeError::UnknownFormat { .. }
            | NodeError::DiskFull { .. } => Self::REFUSED,
            _ => Self::ERROR,
        };
        Failure { code, text: error.to_string() }
    }
}

impl From<SettingsError> for Failure {
    fn from(error: SettingsError) -> Self {
        Failure::new(Self::REFUSED, error.to_string())
    }
}

impl From<LoadError> for Failure {
    fn from(error: LoadError) -> Self {
        let text = error.to_string();
        match error {
            LoadError::Cluster(error) => error.into(),
            LoadError::BadLine { skipped, .. } => {
                let listed: String =
                    skipped.iter().map(|bad| format!("line {}: {}\n", bad.line, bad.reason)).collect();
                Failure::error(format!("{listed}{text}"))
            }
            LoadError::OtherProgress { .. } => Failure::new(Self::REFUSED, text),
            _ => Failure::error(text),
        }
    }
}

/// Says what goes on: on stdout for people, on stderr when stdout is for a program.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Say {
    json: bool,
}

impl Say {
    pub(crate) fn of(context: &Context) -> Say {
        Say { json: context.json }
    }

    pub(crate) fn step(self, text: &str) {
        match self.json {
            true => eprintln!("{text}"),
            false => print_line(text),
        }
    }
}

/// Prints a line to stdout. A reader that has gone away is not worth a panic.
pub(crate) fn print_line(line: &str) {
    let mut out = std::io::stdout().lock();
    drop(writeln!(out, "{line}").and_then(|()| out.flush()));
}

/// Prints a result and gives its exit code.
pub(crate) fn finish(json: bool, end: Result<Done, Failure>) -> ExitCode {
    match end {
        Ok(done) => {
            if json {
                print_line(&done.json.to_string());
            } else if !done.text.is_empty() {
                print_line(&done.text);
            }
            ExitCode::from(done.code)
        }
        Err(failure) => {
            drop(writeln!(std::io::stderr(), "pontoon: {}", failure.text));
            if json {
                print_line(&json!({ "error": failure.text, "code": failure.code }).to_string());
            }
            ExitCode::from(failure.code)
        }
    }
}

/// Columns, each as wide as its widest cell. Columns whose cells are all numbers stand to the right.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let number = |cell: &str| cell.starts_with(|first: char| first.is_ascii_digit());
    let right: Vec<bool> = (0..head.len())
        .map(|column| !rows.is_empty() && rows.iter().all(|row| number(&row[column])))
        .collect();
    let line = |cells: Vec<&str>| {
        let mut line = String::new();
        for (column, cell) in cells.into_iter().enumerate() {
            let gap = " ".repeat(widths[column] - cell.chars().count());
            let (before, after) = if right[column] { (gap.as_str(), "") } else { ("", gap.as_str()) };
            line.push_str(&format!("{before}{cell}{after}  "));
        }
        line.trim_end().to_owned()
    };
    let mut lines = vec![line(head.to_vec())];
    lines.extend(rows.iter().map(|row| line(row.iter().map(String::as_str).collect())));
    lines.join("\n")
}

/// So many of something, for people.
pub(crate) fn counted(count: u64, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

/// A number of bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{count} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// A bar over the bytes of a file, drawn on stderr if that is a terminal.
pub(crate) fn percent_bar(total: u64, template: &str) -> indicatif::ProgressBar {
    let style = indicatif::ProgressStyle::with_template(template)
        .unwrap_or_else(|_| indicatif::ProgressStyle::default_bar())
        .progress_chars("=> ");
    indicatif::ProgressBar::new(total).with_style(style)
}

/// Bytes as text where they are printable, escaped where not.
pub(super) fn text_of(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}

/// Bytes for JSON: a string if they are UTF-8, else an object with their hexadecimal digits.
pub(super) fn json_of(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!({ "hex": bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let rows = vec![vec!["name".to_owned(), "12".to_owned()], vec!["é".to_owned(), "7".to_owned()]];
        assert_eq!(table(&["what", "n"], &rows), "what   n\nname  12\né      7");
    }

    #[test]
    fn sizes_and_bytes_are_legible() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(text_of(b"a\0\xff"), "a\\x00\\xff");
        assert_eq!(json_of(b"\xff").to_string(), r#"{"hex":"ff"}"#);
    }
}
