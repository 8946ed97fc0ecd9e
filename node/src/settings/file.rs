//! The file: TOML, taken apart into settings with their lines.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::{Origin, SettingsError};

/// A setting as the file has it.
#[derive(Debug)]
pub(super) struct Line {
    /// With its tables, as in `raft.tick`.
    pub(super) key: String,
    pub(super) value: String,
    /// Counted from 1.
    pub(super) line: usize,
}

pub(super) fn read(path: &Path, text: &str) -> Result<Vec<Line>, SettingsError> {
    let line_of =
        |at: usize| text.as_bytes()[..at.min(text.len())].iter().filter(|&&byte| byte == b'\n').count() + 1;
    let table = DeTable::parse(text).map_err(|error| {
        let line = line_of(error.span().map_or(0, |span| span.start));
        let origin = Origin::File { path: path.to_owned(), line };
        SettingsError::Syntax { origin, reason: error.message().to_owned() }
    })?;
    let mut lines = Vec::new();
    walk("", table.get_ref(), &line_of, &mut lines);
    // As they stand, so that the first mistake is told first.
    lines.sort_by_key(|line| line.line);
    Ok(lines)
}

fn walk(prefix: &str, table: &DeTable<'_>, line_of: &dyn Fn(usize) -> usize, lines: &mut Vec<Line>) {
    for (name, value) in table {
        let key = match prefix {
            "" => name.get_ref().to_string(),
            prefix => format!("{prefix}.{}", name.get_ref()),
        };
        let value = match value.get_ref() {
            DeValue::Table(table) => {
                walk(&key, table, line_of, lines);
                continue;
            }
            DeValue::String(text) => text.to_string(),
            DeValue::Integer(number) => number.as_str().to_owned(),
            DeValue::Float(number) => number.as_str().to_owned(),
            DeValue::Boolean(switch) => switch.to_string(),
            DeValue::Datetime(time) => time.to_string(),
            // No setting takes one; it says so itself.
            DeValue::Array(_) => "[…]".to_owned(),
        };
        lines.push(Line { key, value, line: line_of(name.span().start) });
    }
}
