//! 200,000 triples about films, where they are there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{BufRead, BufReader},
};

use flate2::read::MultiGzDecoder;
use pontoon_node::load::subject_of;

use crate::traffic::Rows;

/// Beside the checkout, where it was put; it is not part of it.
pub const FILMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/data/films-200k.rdf.gz");

/// Subject and object.
pub type Triples = BTreeSet<(String, String)>;

/// The file, read in the simplest way that fits it: four columns between tabs.
///
/// # Panics
/// If it cannot be read.
pub fn films() -> BTreeMap<String, Triples> {
    let mut films: BTreeMap<String, Triples> = BTreeMap::new();
    for line in BufReader::new(MultiGzDecoder::new(File::open(FILMS).unwrap())).lines() {
        let line = line.unwrap();
        let columns: Vec<&str> = line.split('\t').collect();
        let [subject, predicate, object, "."] = columns[..] else { panic!("not four columns: {line}") };
        let predicate = predicate.trim_start_matches('<').trim_end_matches('>');
        films.entry(predicate.to_owned()).or_default().insert((subject.to_owned(), object.to_owned()));
    }
    films
}

/// Splits what a predicate holds into triples and other rows.
///
/// # Panics
/// If a triple lies under two keys.
pub fn triples_of(rows: Rows) -> (Triples, Rows) {
    let (mut triples, mut others) = (Triples::new(), Rows::new());
    for (key, value) in rows {
        match subject_of(&key) {
            Some(subject) => {
                let new = triples.insert((subject, String::from_utf8(value.to_vec()).unwrap()));
                assert!(new, "a triple lies under two keys, the second is {key:?}");
            }
            None => drop(others.insert(key, value)),
        }
    }
    (triples, others)
}
