//! A data set about films that never was: deterministic, with predicates as skewed as real ones.

use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

const FIRST: [&str; 16] = [
    "Silent", "Crimson", "Last", "Broken", "Golden", "Hidden", "Long", "Paper", "Northern", "Glass",
    "Second", "Burning", "Quiet", "Iron", "Distant", "Blue",
];
const LAST: [&str; 16] = [
    "River", "Harbour", "Winter", "Letter", "Garden", "Mirror", "Bridge", "Summer", "Stranger", "Island",
    "Journey", "City", "Shadow", "Orchard", "Signal", "Tide",
];
const FAMILY: [&str; 12] =
    ["Arnold", "Bell", "Carré", "Duarte", "Eriksen", "Fuchs", "Grau", "Hana", "Ito", "Jovan", "Kral", "Lang"];
const GENRES: u64 = 40;
const FILMS_PER_DIRECTOR: u64 = 6;

/// Writes exactly `triples` triples, the same ones each time.
pub(super) fn write_films(path: &Path, triples: u64) -> io::Result<()> {
    let mut out = Counted { out: BufWriter::with_capacity(1 << 20, File::create(path)?), left: triples };
    let mut chance = Chance(0x706f_6e74_6f6f_6e21);
    for genre in 0..GENRES {
        out.line(&format!("<g.{genre}>\t<name>\t\"{} {}\"@en", chance.pick(&FIRST), chance.pick(&LAST)))?;
    }
    let mut film = 0_u64;
    while out.left > 0 {
        let director = film / FILMS_PER_DIRECTOR;
        if film.is_multiple_of(FILMS_PER_DIRECTOR) {
            let name = format!("{} {}", chance.pick(&FAMILY), chance.pick(&LAST));
            out.line(&format!("<d.{director}>\t<name>\t\"{name}\"@en"))?;
        }
        let title = format!("{} {} {film}", chance.pick(&FIRST), chance.pick(&LAST));
        let title = if chance.one_in(50) { format!("The \\\"{title}\\\"") } else { title };
        out.line(&format!("<f.{film}>\t<name>\t\"{title}\"@en"))?;
        if chance.one_in(3) {
            out.line(&format!(
                "<f.{film}>\t<name>\t\"{} №{film}\"@ru",
                chance.pick(&["Тишина", "Мост", "Сад"])
            ))?;
        }
        if chance.one_in(9) {
            out.line(&format!("<f.{film}>\t<name>\t\"映画{film}\"@ja"))?;
        }
        out.line(&format!("<f.{film}>\t<directed_by>\t<d.{director}>"))?;
        if !chance.one_in(7) {
            let (year, month, day) = (1920 + chance.below(100), 1 + chance.below(12), 1 + chance.below(28));
            out.line(&format!(
                "<f.{film}>\t<initial_release_date>\t\"{year}-{month:02}-{day:02}\"^^<http://www.w3.org/2001/XMLSchema#date>"
            ))?;
        }
        if !chance.one_in(3) {
            out.line(&format!("<d.{director}>\t<director.film>\t<f.{film}>"))?;
        }
        if chance.one_in(2) {
            out.line(&format!("<f.{film}>\t<genre>\t<g.{}>", chance.below(GENRES)))?;
        }
        if chance.one_in(20) {
            out.line(&format!("<f.{film}>\t<award>\t_:a{film} (year={})", 1950 + chance.below(70)))?;
        }
        film += 1;
    }
    out.out.flush()
}

struct Counted {
    out: BufWriter<File>,
    left: u64,
}

impl Counted {
    fn line(&mut self, statement: &str) -> io::Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        self.left -= 1;
        writeln!(self.out, "{statement}\t.")
    }
}

/// splitmix64: the same data on every machine.
pub(super) struct Chance(pub(super) u64);

impl Chance {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pick(&mut self, words: &[&'static str]) -> &'static str {
        words[self.below(words.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_set_is_always_the_same_and_legible() {
        let scratch = tempfile::tempdir().unwrap();
        let (one, two) = (scratch.path().join("1"), scratch.path().join("2"));
        write_films(&one, 5_000).unwrap();
        write_films(&two, 5_000).unwrap();
        let text = std::fs::read_to_string(&one).unwrap();
        assert_eq!(text, std::fs::read_to_string(&two).unwrap());
        assert_eq!(text.lines().count(), 5_000);
        for line in text.lines() {
            assert!(pontoon_node::rdf::parse_line(line.as_bytes()).unwrap().is_some());
        }
        let names = text.lines().filter(|line| line.contains("\t<name>\t")).count();
        assert!(names > 1_500, "the skew is there: {names}");
    }
}
