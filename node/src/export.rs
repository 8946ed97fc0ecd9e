//! Exports predicates as RDF that [`crate::load`] gives back unchanged: the same rows, byte for byte.
//!
//! The order is that of predicates by name, then of keys, so two exports of the same rows are the same file. Each line is read back
//! by the loader's parser before it is written: a row that would not come back as it is (it was not loaded from RDF, or is a record of
//! a log) is *foreign*. Such rows are never written as something that they are not; an export that finds some is refused, or leaves
//! them out if it may.

mod output;

use std::{io, time::Duration};

use pontoon_proto::v1::{self, ShardKind};
use serde::Serialize;
use tokio::time::{Instant, sleep};

pub use self::output::{ExportFile, Output};

use crate::{
    backup::{BackupError, Broken, Feed, Item, addresses, holders, rows_of, wanted},
    client::Client,
    load::{row_of, subject_of},
    rdf::parse_line,
};

/// How long a predicate is tried, at one replica after the other.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(200);

/// What to export.
#[derive(Debug, Clone, Default)]
pub struct ExportOptions {
    /// Only these predicates; empty: all.
    pub predicates: Vec<String>,
    /// Leave out what is not RDF.
    pub skip_foreign: bool,
    /// What it may take of each node; see [`crate::backup::BackupOptions::budget`].
    pub budget: String,
}

/// What a predicate gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Exported {
    /// Which.
    pub predicate: String,
    /// As of which index of its group.
    pub index: u64,
    /// Statements that were written.
    pub triples: u64,
    /// Rows or records that are not RDF.
    pub foreign: u64,
}

/// What an export wrote.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ExportReport {
    /// In the order of their names.
    pub predicates: Vec<Exported>,
    /// Statements.
    pub triples: u64,
    /// Bytes of their lines.
    pub bytes: u64,
    /// Rows and records that are not RDF.
    pub foreign: u64,
    /// Predicates that cannot be read, and why.
    pub skipped: Vec<(String, String)>,
    /// How long it took.
    pub seconds: f64,
}

/// Why an export ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The cluster cannot be read.
    #[error(transparent)]
    Cluster(#[from] BackupError),
    /// The lines cannot be written.
    #[error("the lines cannot be written: {0}")]
    Output(#[from] io::Error),
    /// The node that gave the predicate is gone, and what was written of it cannot be taken back.
    #[error(
        "{predicate} is in the output to its middle, and is another one by now where it can still be read: the output is of no use. Run this \
         again, or name a file, from which half a predicate is taken back"
    )]
    Halfway {
        /// Which.
        predicate: String,
    },
    /// There is what is not RDF.
    #[error(
        "{rows} rows or records are not RDF ({}), and loading could not bring them back: leave them out with --skip-foreign, choose others \
         with --predicate, or use `pontoon backup`, which keeps everything",
        predicates.join(", ")
    )]
    Foreign {
        /// How many.
        rows: u64,
        /// Of which predicates.
        predicates: Vec<String>,
    },
}

/// Writes every statement of some predicates, one a line, each predicate as of one index.
///
/// If the node that gives a predicate goes, another replica is asked, at a later index. What of it is the same there stays; otherwise the
/// output takes back what it has of this predicate, and it begins anew.
///
/// # Errors
/// [`ExportError::Foreign`] at the end, if there is what is not RDF and that may not be left out; [`ExportError::Halfway`] if the output
/// can take nothing back. What was written then, and after any other error, is of no use as a whole.
pub async fn export(
    client: &Client,
    out: &mut dyn Output,
    options: &ExportOptions,
    mut show: impl FnMut(u64) + Send,
) -> Result<ExportReport, ExportError> {
    let begun = Instant::now();
    let (views, skipped) = wanted(client, &options.predicates).await?;
    let mut report =
        ExportReport { predicates: Vec::new(), triples: 0, bytes: 0, foreign: 0, skipped, seconds: 0.0 };
    for (turn, view) in views.into_iter().enumerate() {
        let name = view.shard.as_ref().map(|shard| shard.predicate.clone()).unwrap_or_default();
        let exporting = Exporting::new(client, options, name.clone(), report.bytes);
        let Some((one, bytes)) = exporting.run(out, view, turn, &mut show).await? else {
            report.skipped.push((name, "it was dropped meanwhile".to_owned()));
            continue;
        };
        report.bytes += bytes;
        report.triples += one.triples;
        report.foreign += one.foreign;
        report.predicates.push(one);
    }
    out.flush()?;
    if report.foreign > 0 && !options.skip_foreign {
        let foreign = report.predicates.iter().filter(|one| one.foreign > 0);
        let predicates = foreign.map(|one| one.predicate.clone()).collect();
        return Err(ExportError::Foreign { rows: report.foreign, predicates });
    }
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// One predicate on its way out.
///
/// Invariant: since the output kept something last, the lines of the rows of `written` were written, in this order, and nothing else.
struct Exporting<'a> {
    client: &'a Client,
    options: &'a ExportOptions,
    name: String,
    /// Bytes of the predicates before.
    before: u64,
    /// Chunks of rows: where they are cut depends on keys alone, so that another replica with the same rows has the same ones.
    written: Vec<blake3::Hash>,
    bytes: u64,
    triples: u64,
    foreign: u64,
}

/// Why a replica was not read to its end.
enum Stopped {
    /// Another one may do better.
    Broken(Broken),
    /// It does not begin with what was written.
    Differs,
    Failed(ExportError),
}

impl From<Broken> for Stopped {
    fn from(broken: Broken) -> Self {
        Stopped::Broken(broken)
    }
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Stopped::Failed(error.into())
    }
}

impl<'a> Exporting<'a> {
    fn new(client: &'a Client, options: &'a ExportOptions, name: String, before: u64) -> Self {
        Exporting { client, options, name, before, written: Vec::new(), bytes: 0, triples: 0, foreign: 0 }
    }

    /// Writes the predicate; `None` if it is gone, and then nothing of it is in the output.
    async fn run(
        mut self,
        out: &mut dyn Output,
        mut view: v1::PredicateView,
        mut turn: usize,
        show: &mut (impl FnMut(u64) + Send),
    ) -> Result<Option<(Exported, u64)>, ExportError> {
        let until = Instant::now() + PATIENCE;
        let mut reason = "no node is known to hold it".to_owned();
        loop {
            let nodes = holders(&view, turn);
            for address in addresses(self.client, &nodes).await.map_err(BackupError::from)? {
                let Some(shard) = &view.shard else { break };
                let mut read = self.read(out, &address, shard, show).await;
                if matches!(read, Err(Stopped::Differs)) {
                    self.take_back(out)?;
                    read = self.read(out, &address, shard, show).await;
                }
                match read {
                    Ok(exported) => {
                        out.keep()?;
                        return Ok(Some((exported, self.bytes)));
                    }
                    Err(Stopped::Failed(error)) => return Err(error),
                    Err(Stopped::Broken(Broken::Refused(error))) => {
                        return Err(BackupError::from(error).into());
                    }
                    Err(Stopped::Broken(Broken::Passes(heard))) => reason = heard,
                    Err(Stopped::Broken(Broken::Gone)) => {
                        reason = format!("{address} does not know its group");
                    }
                    Err(Stopped::Differs) => reason = format!("{address} gives other rows each time"),
                }
            }
            if Instant::now() >= until {
                return Err(BackupError::Unread { predicate: self.name, reason }.into());
            }
            sleep(PAUSE).await;
            turn += 1;
            // Its replicas may lie elsewhere by now, or it is gone.
            let request = v1::FindPredicateRequest { predicate: self.name.clone(), hops: 0 };
            if self.client.find_predicate(request).await.map_err(BackupError::from)?.shard.is_none() {
                self.take_back(out)?;
                return Ok(None);
            }
            let request = v1::PredicatesRequest { predicate: self.name.clone() };
            let fresh = self.client.predicates(request).await.map_err(BackupError::from)?.predicates.pop();
            view = fresh.unwrap_or(view);
        }
    }

    fn take_back(&mut self, out: &mut dyn Output) -> Result<(), ExportError> {
        if !self.written.is_empty() && !out.take_back()? {
            return Err(ExportError::Halfway { predicate: self.name.clone() });
        }
        self.written.clear();
        (self.bytes, self.triples, self.foreign) = (0, 0, 0);
        Ok(())
    }

    /// Reads one replica to its end, and writes what is not written yet.
    async fn read(
        &mut self,
        out: &mut dyn Output,
        address: &str,
        shard: &v1::Shard,
        show: &mut (impl FnMut(u64) + Send),
    ) -> Result<Exported, Stopped> {
        let mut feed = Feed::open(self.client, address, shard, &self.options.budget).await?;
        let is_log = shard.kind() == ShardKind::Log;
        let (had, mut seen) = (self.written.len(), 0);
        loop {
            match feed.next().await? {
                Item::Cut(cut, hash) => {
                    let known = seen < had;
                    if known && self.written[seen] != hash {
                        return Err(Stopped::Differs);
                    }
                    seen += 1;
                    feed.answer(&cut, hash, !is_log && !known).await;
                }
                Item::Chunk(hash, data) => {
                    let rows = rows_of(data).map_err(|reason| Broken::Passes(reason.to_owned()))?;
                    self.written.push(hash);
                    for (key, value) in rows {
                        match line_of(&self.name, &key, &value) {
                            Some(line) => {
                                out.write_all(line.as_bytes())?;
                                self.bytes += line.len() as u64;
                                self.triples += 1;
                            }
                            None => self.foreign += 1,
                        }
                    }
                    show(self.before + self.bytes);
                }
                Item::End(_) if seen < had => return Err(Stopped::Differs),
                Item::End(end) => {
                    return Ok(Exported {
                        predicate: self.name.clone(),
                        index: feed.begun.index,
                        triples: self.triples,
                        foreign: if is_log { end.rows } else { self.foreign },
                    });
                }
            }
        }
    }
}

/// The line that loads as this row; `None` if there is none.
fn line_of(predicate: &str, key: &[u8], value: &[u8]) -> Option<String> {
    let subject = subject_of(key)?;
    let value = std::str::from_utf8(value).ok()?;
    // Of what stands for a blank node the brackets are dropped when it is read; some labels need them.
    let (subjects, values) = (spellings(&subject), spellings(value));
    let lines = subjects.iter().flat_map(|subject| values.iter().map(move |value| (subject, value)));
    lines
        .map(|(subject, value)| format!("{subject} <{predicate}> {value} .\n"))
        .find(|line| loads_as(line, predicate, key, value))
}

/// A term, or terms one after the other, as they are kept; then with brackets around what begins as a blank node.
fn spellings(kept: &str) -> Vec<String> {
    let mut spellings = vec![kept.to_owned()];
    if kept.starts_with("_:") || kept.contains(" _:") {
        spellings.push(bracketed(kept));
    }
    spellings
}

/// Terms, with brackets around each blank node. What stands in quotes is text.
fn bracketed(kept: &str) -> String {
    let (mut out, mut rest, mut quoted) = (String::with_capacity(kept.len() + 8), kept, false);
    while let Some(next) = rest.chars().next() {
        let begins = !quoted && (out.is_empty() || out.ends_with(' ')) && rest.starts_with("_:");
        let taken = match next {
            _ if begins => rest.find(' ').unwrap_or(rest.len()),
            '\\' if quoted => rest.chars().take(2).map(char::len_utf8).sum(),
            _ => next.len_utf8(),
        };
        quoted ^= next == '"';
        let (word, after) = rest.split_at(taken);
        if begins {
            out.extend(["<", word, ">"]);
        } else {
            out.push_str(word);
        }
        rest = after;
    }
    out
}

fn loads_as(line: &str, predicate: &str, key: &[u8], value: &str) -> bool {
    // A line feed inside would make two lines of it.
    let Some((line, "")) = line.split_once('\n') else { return false };
    match parse_line(line.as_bytes()) {
        Ok(Some(statement)) => {
            let (made_key, made) = row_of(&statement);
            statement.predicate == predicate && made_key == key && made == value
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn back_and_forth(line: &str) {
        let statement = parse_line(line.as_bytes()).unwrap().unwrap();
        let (key, value) = row_of(&statement);
        let made = line_of(statement.predicate, &key, value.as_bytes());
        let made = made.unwrap_or_else(|| panic!("{line} is foreign"));
        let again = parse_line(made.trim_end().as_bytes()).unwrap().unwrap();
        assert_eq!((again.predicate, row_of(&again)), (statement.predicate, (key, value)), "{line}");
    }

    #[test]
    fn whatever_can_be_loaded_comes_back() {
        for line in [
            "<s> <p> <o> .",
            "<http://a/b?c=d#e> <http://p/q> <urn:x> <http://graph> .",
            r#"<s> <p> "plain" ."#,
            r#"<s> <p> "" ."#,
            r#"<s> <p> "tab\t line\n quote\" back\\ \b \f \r \' \u00e9 \U0001F600" ."#,
            r#"<s> <p> "raw é 脱走遊戯 😀" ."#,
            r#"<s> <p> "x"@en ."#,
            r#"<s> <p> "x"@zh-Hant-TW ."#,
            r#"<s> <p> "1976-06-19"^^<http://www.w3.org/2001/XMLSchema#date> ."#,
            r#"<s> <p> "1.5"^^<xs:float> <g> ."#,
            r#"_:a.b <p> _:c-d . # a comment"#,
            "<_:odd/label> <p> <_:other!> .",
            "<_:odd/label> <p> <_:other!> <_:graph?> .",
            r#"<s> <p> "the _:word is text" <_:graph?> ."#,
            r#"_:a <friend> _:b (close=true, since=2006-01-02, note="a ) b") ."#,
            r#"_:a <friend> <o> <g> (f="x y") ."#,
            "alice likes <cake> .",
            r"<a\u0020b> <p\u0020q> <o\U0001F600> .",
            "<s>\t<p>\t<o>\t.",
        ] {
            back_and_forth(line);
        }
    }

    #[test]
    fn what_does_not_come_from_rdf_is_foreign() {
        let (key, value) = row_of(&parse_line(b"<s> <p> <o> .").unwrap().unwrap());
        assert!(line_of("p", &key, value.as_bytes()).is_some());
        // Another value than the key's hash is of, another key, a value that is not RDF, a name that is no IRI.
        assert_eq!(line_of("p", &key, b"<other>"), None);
        assert_eq!(line_of("p", b"alice", b"<o>"), None);
        assert_eq!(line_of("p", &key, b"\xff"), None);
        assert_eq!(line_of("two words", &key, value.as_bytes()), None);
        let mut broken = crate::load::subject_prefix("<s> <p> <o> .\n<t>");
        broken.extend(&blake3::hash(b"<o>").as_bytes()[..16]);
        assert_eq!(line_of("p", &broken, b"<o>"), None, "a statement must not be smuggled in");
    }

    proptest! {
        #[test]
        fn any_text_in_a_literal_comes_back(text in "[^\"\\\\\n\r\0]{0,40}", lang in "(@[a-z]{2})?") {
            back_and_forth(&format!("<s> <p> \"{text}\"{lang} ."));
        }

        #[test]
        fn no_row_makes_a_line_that_loads_as_another(key in prop::collection::vec(any::<u8>(), 0..40), value in ".{0,30}") {
            if let Some(line) = line_of("p", &key, value.as_bytes()) {
                let again = parse_line(line.trim_end_matches('\n').as_bytes()).unwrap().unwrap();
                prop_assert_eq!(row_of(&again), (key, value));
            }
        }
    }
}
