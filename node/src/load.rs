//! Loads RDF into predicates: streaming, in bounded memory, resumable after a kill.
//!
//! ```text
//!  file ─> lines ─> chunk (lines n..m) ─> one batch per predicate ─> write_many ─┐  a few chunks in flight
//!                                                                                │
//!  progress file <── the end of the last chunk before which all are acknowledged ┘
//! ```
//!
//! **Rows.** Key = subject, escaped, `00 01`, then 16 bytes of BLAKE3 of the value; value = the object as it is written.
//! In the subject `00` is written as `00 ff`. So all objects of a subject come back by one scan of
//! [`subject_prefix`], and the same statement always has the same row: loading it again changes nothing, which makes a
//! load resumable from any place at or before the first statement that was not acknowledged.

mod chunk;
mod progress;
mod run;

use std::path::PathBuf;

pub use run::{LoadOptions, LoadReport, LoadStep, SkippedLine, load};

use crate::{
    client::ClientError,
    rdf::{LinesError, Statement},
};

/// Why a load stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The input cannot be read.
    #[error(transparent)]
    Input(#[from] LinesError),
    /// A line is not RDF, and no more bad lines are tolerated.
    #[error("{}, line {line}: {reason}; correct it and load again, or tolerate it with --skip-bad N", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
        /// Bad lines that were tolerated before.
        skipped: Vec<SkippedLine>,
    },
    /// The cluster did not take a batch.
    #[error(
        "loading into {predicate} (lines {first_line} to {last_line}): {source}; once that is mended the same command goes on from there"
    )]
    Write {
        /// The predicate.
        predicate: String,
        /// The lines that the batch came from.
        first_line: u64,
        /// Inclusive.
        last_line: u64,
        /// Why.
        source: ClientError,
    },
    /// The progress file belongs to another load.
    #[error("{} is the progress of another load ({reason}); remove it to load from the beginning", path.display())]
    OtherProgress {
        /// The progress file.
        path: PathBuf,
        /// What differs.
        reason: String,
    },
    /// The progress file cannot be read or written.
    #[error("the progress file {}: {source}; name another with --state", path.display())]
    Progress {
        /// The progress file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The cluster does not say who it is.
    #[error(transparent)]
    Cluster(#[from] ClientError),
}

/// The prefix of all rows of a subject, given as it is kept: `<iri>` or `_:label`.
pub fn subject_prefix(subject: &str) -> Vec<u8> {
    let mut prefix = Vec::with_capacity(subject.len() + 18);
    for &byte in subject.as_bytes() {
        prefix.push(byte);
        if byte == 0 {
            prefix.push(0xff);
        }
    }
    prefix.extend([0, 1]);
    prefix
}

/// The row of a statement: key and value.
pub fn row_of(statement: &Statement<'_>) -> (Vec<u8>, String) {
    let (mut key, value) = (subject_prefix(&statement.subject), statement.value());
    key.extend(&blake3::hash(value.as_bytes()).as_bytes()[..16]);
    (key, value)
}

/// The subject that a row's key was made of, if it was made by [`row_of`].
pub fn subject_of(key: &[u8]) -> Option<String> {
    let mut subject = Vec::new();
    let mut bytes = key.iter().copied();
    loop {
        match (bytes.next()?, &mut bytes) {
            (0, rest) => match rest.next()? {
                0xff => subject.push(0),
                1 => break,
                _ => return None,
            },
            (byte, _) => subject.push(byte),
        }
    }
    if bytes.len() != 16 {
        return None;
    }
    String::from_utf8(subject).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rdf::parse_line;

    #[test]
    fn a_statement_always_has_the_same_row_and_a_subject_one_prefix() {
        let row = |line: &str| row_of(&parse_line(line.as_bytes()).unwrap().unwrap());
        let (first, value) = row("<a> <p> \"x\"@en .");
        assert_eq!(value, "\"x\"@en");
        assert_eq!(row("<a>\t<p>   \"x\"@en ."), (first.clone(), value));
        let (other, _) = row("<a> <p> \"y\"@en .");
        assert_ne!(first, other);
        assert!(first.starts_with(&subject_prefix("<a>")) && other.starts_with(&subject_prefix("<a>")));
        assert!(!row("<ab> <p> <c> .").0.starts_with(&subject_prefix("<a>")));
        assert_eq!(subject_of(&first).as_deref(), Some("<a>"));
        assert_eq!(subject_of(b"plain"), None);
    }

    #[test]
    fn a_zero_byte_in_a_subject_does_not_end_it() {
        let mut key = subject_prefix("a\0b");
        assert!(!key.starts_with(&subject_prefix("a")));
        key.extend([7; 16]);
        assert_eq!(subject_of(&key).as_deref(), Some("a\0b"));
    }
}
