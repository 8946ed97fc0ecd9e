//! The parser against whatever a file may hold.

use pontoon_node::{
    load::{row_of, subject_of, subject_prefix},
    rdf::{Lines, parse_line},
};
use proptest::prelude::*;

fn literal() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "[^\"\\\\\u{0}\n\r]{0,6}",
        Just("\\\"".to_owned()),
        Just("\\\\".to_owned()),
        Just("\\n".to_owned()),
        Just("\\u00e9".to_owned()),
        Just("\\U0001F600".to_owned()),
    ];
    let tail = prop_oneof![
        Just(String::new()),
        "@[a-z]{2}(-[A-Z]{2})?",
        "\\^\\^<http://[a-z]{1,8}/[A-Za-z#]{0,8}>",
    ];
    (prop::collection::vec(piece, 0..5), tail)
        .prop_map(|(pieces, tail)| format!("\"{}\"{tail}", pieces.concat()))
}

fn object() -> impl Strategy<Value = String> {
    prop_oneof![literal(), "<[a-z.:/#]{1,12}>", "_:[a-z][a-z0-9]{0,5}"]
}

proptest! {
    #[test]
    fn any_bytes_are_a_statement_or_an_error(line in prop::collection::vec(any::<u8>(), 0..80)) {
        drop(parse_line(&line));
    }

    /// Bytes that RDF is made of get further into the parser than any bytes do.
    #[test]
    fn any_mixture_of_marks_is_a_statement_or_an_error(line in "[<>_:\"\\\\@^().,= \tauU0#*é-]{0,60}") {
        if let Ok(Some(statement)) = parse_line(line.as_bytes()) {
            let (key, _) = row_of(&statement);
            prop_assert_eq!(subject_of(&key), Some(statement.subject));
        }
    }

    #[test]
    fn what_is_stored_gives_the_same_statement_back(
        subject in "(<[a-z.0-9]{1,12}>|_:[a-z]{1,5})",
        predicate in "[a-z._]{1,12}",
        object in object(),
        graph in prop::option::of("<[a-z]{1,6}>"),
        facets in prop::option::of("\\([a-z]{1,4}=[a-z0-9]{1,4}(, [a-z]{1,4}=\"[a-z )]{0,4}\")?\\)"),
    ) {
        let rest: Vec<String> = [Some(object), graph, facets].into_iter().flatten().collect();
        let value = rest.join(" ");
        let line = format!("{subject}\t<{predicate}>  {} . # said", rest.join("\t"));
        let statement = parse_line(line.as_bytes()).unwrap().unwrap();
        prop_assert_eq!(&statement.value(), &value);
        let (key, stored) = row_of(&statement);
        prop_assert!(key.starts_with(&subject_prefix(&subject)));
        let exported = format!("{} <{}> {stored} .", subject_of(&key).unwrap(), statement.predicate);
        prop_assert_eq!(row_of(&parse_line(exported.as_bytes()).unwrap().unwrap()), (key, value));
    }
}

#[test]
fn packed_and_plain_files_have_the_same_lines() {
    use std::io::Write;
    let scratch = tempfile::tempdir().unwrap();
    let (plain, packed) = (scratch.path().join("a.rdf"), scratch.path().join("a.rdf.gz"));
    let text = "<a> <b> <c> .\n\n# nothing\n<d> <e> \"f\" .";
    std::fs::write(&plain, text).unwrap();
    // Two members, as `cat a.gz b.gz` makes them.
    let mut bytes = Vec::new();
    for part in [&text[..20], &text[20..]] {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(part.as_bytes()).unwrap();
        bytes.extend(encoder.finish().unwrap());
    }
    std::fs::write(&packed, bytes).unwrap();
    let read = |path| {
        let mut lines = Lines::open(path).unwrap();
        std::iter::from_fn(move || lines.next_line().unwrap()).collect::<Vec<_>>()
    };
    let lines = read(&plain);
    assert_eq!(lines.len(), 4);
    assert_eq!(lines, read(&packed));
    let mut rest = Lines::open(&packed).unwrap();
    rest.skip_to(lines[2].next, lines[2].number).unwrap();
    assert_eq!(rest.next_line().unwrap().as_ref(), Some(&lines[3]));
    assert_eq!(rest.next_line().unwrap(), None);
    let error = Lines::open(&packed).unwrap().skip_to(1_000, 9).unwrap_err().to_string();
    assert!(error.contains("is it the same file"), "{error}");
}
