//! The fuzz targets without the fuzzer: the committed corpus, and mutations of it drawn from a seed.

use std::{fs, path::Path};

use pontoon_wal::fuzzing::{TARGETS, Target};

#[path = "support/lib.rs"]
mod support;

use support::Rng;

/// Mutations per target, unless PONTOON_WAL_FUZZ says otherwise.
const MUTATIONS: u64 = 6_000;

/// Says which input it was.
struct Input<'a>(&'a str, &'a [u8]);

impl Drop for Input<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("target {}, input of {} bytes: {}", self.0, self.1.len(), &hex[..hex.len().min(4000)]);
        }
    }
}

fn run((name, body): Target, input: &[u8]) {
    let _input = Input(name, input);
    body(input);
}

#[allow(clippy::disallowed_methods, reason = "the corpus lies in the source tree")]
fn corpus(name: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let files = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

fn mutate(corpus: &[Vec<u8>], rng: &mut Rng) -> Vec<u8> {
    let pick = |rng: &mut Rng| &corpus[rng.below(corpus.len() as u64) as usize];
    let mut input = pick(rng).clone();
    for _ in 0..1 + rng.below(6) {
        let at = rng.below(input.len() as u64 + 1) as usize;
        match rng.below(7) {
            0..=2 if at < input.len() => input[at] ^= 1 << rng.below(8),
            3 if at < input.len() => input[at] = [0, 1, 0x7f, 0x80, 0xff][rng.below(5) as usize],
            4 => input.insert(at, rng.next() as u8),
            5 => input.truncate(at.max(1)),
            _ => {
                let other = pick(rng);
                let from = rng.below(other.len() as u64 + 1) as usize;
                let piece = &other[from..other.len().min(from + 64)];
                let _ = input.splice(at..at, piece.iter().copied());
            }
        }
    }
    input
}

#[test]
fn the_corpus_and_its_mutations_meet_no_panic() {
    let mutations = std::env::var("PONTOON_WAL_FUZZ").map_or(MUTATIONS, |count| count.parse().unwrap());
    for target in TARGETS {
        let corpus = corpus(target.0);
        assert!(!corpus.is_empty(), "{} has a corpus", target.0);
        corpus.iter().for_each(|input| run(target, input));
        let mut rng = Rng(4);
        for _ in 0..mutations {
            run(target, &mutate(&corpus, &mut rng));
        }
    }
}
