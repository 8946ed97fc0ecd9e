//! One line of RDF.

/// A statement, borrowed from its line where that is possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement<'a> {
    /// `<iri>` or `_:label`.
    pub subject: String,
    /// The IRI without brackets.
    pub predicate: &'a str,
    /// The object as it is written.
    pub object: String,
    /// The graph label as it is written.
    pub graph: Option<String>,
    /// The facets as they are written, with their parentheses.
    pub facets: Option<&'a str>,
}

impl Statement<'_> {
    /// What is stored for the statement: object, graph label and facets, one space between them.
    pub fn value(&self) -> String {
        let mut value = self.object.clone();
        for part in self.graph.as_deref().into_iter().chain(self.facets) {
            value.push(' ');
            value.push_str(part);
        }
        value
    }
}

/// Why a line is not a statement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RdfError {
    /// Bytes that are no UTF-8.
    #[error("column {column}: not UTF-8")]
    NotUtf8 {
        /// Counted in bytes from 1.
        column: usize,
    },
    /// Something else was expected.
    #[error("column {column}: {wanted} expected, found {found}")]
    Expected {
        /// Counted in bytes from 1.
        column: usize,
        /// What may stand there.
        wanted: &'static str,
        /// What stands there.
        found: String,
    },
    /// A part that has no end on its line.
    #[error("column {column}: this {what} does not end")]
    Unended {
        /// Where it begins, counted in bytes from 1.
        column: usize,
        /// What it is.
        what: &'static str,
    },
    /// A character that must not stand there.
    #[error("column {column}: {found} must not stand in {what}")]
    Illegal {
        /// Counted in bytes from 1.
        column: usize,
        /// The character.
        found: String,
        /// What it stands in.
        what: &'static str,
    },
    /// Part of the language of mutations, not of data.
    #[error("column {column}: {what} belongs to a mutation, not to data; write the value itself")]
    Mutation {
        /// Counted in bytes from 1.
        column: usize,
        /// Which.
        what: &'static str,
    },
}

/// Reads a line without its line feed. `None`: it is blank or a comment.
///
/// # Errors
/// Where the line stops making sense, and why.
pub fn parse_line(line: &[u8]) -> Result<Option<Statement<'_>>, RdfError> {
    let text =
        std::str::from_utf8(line).map_err(|error| RdfError::NotUtf8 { column: error.valid_up_to() + 1 })?;
    let mut rest = Cursor { text, at: 0 };
    rest.space();
    if rest.is_end() {
        return Ok(None);
    }
    let subject = match rest.peek() {
        Some('"') => return Err(rest.expected("a subject (<iri>, _:label or a bare word)")),
        _ => rest.resource("a subject (<iri>, _:label or a bare word)", true)?,
    };
    rest.space();
    let predicate = rest.predicate()?;
    rest.space();
    let object = match rest.peek() {
        Some('"') => rest.literal()?.to_owned(),
        _ => rest.resource("an object (<iri>, _:label or \"literal\")", false)?,
    };
    rest.space();
    let graph = match rest.peek() {
        Some('<' | '_') => Some(rest.resource("a graph label", false)?),
        _ => None,
    };
    rest.space();
    let facets = match rest.peek() {
        Some('(') => Some(rest.facets()?),
        _ => None,
    };
    rest.space();
    rest.eat('.', "the full stop that ends a statement")?;
    rest.space();
    if !rest.is_end() {
        return Err(rest.expected("the end of the line or a comment"));
    }
    Ok(Some(Statement { subject, predicate, object, graph, facets }))
}

/// The rest of a line. `at` always lies between two characters.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    /// A comment ends a line as its last byte does.
    fn is_end(&self) -> bool {
        matches!(self.peek(), None | Some('#'))
    }

    fn space(&mut self) {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start_matches([' ', '\t', '\r', '\u{feff}']).len();
    }

    fn expected(&self, wanted: &'static str) -> RdfError {
        let found = match self.peek() {
            Some(found) => format!("{found:?}"),
            None => "the end of the line".to_owned(),
        };
        RdfError::Expected { column: self.at + 1, wanted, found }
    }

    fn illegal(&self, at: usize, found: char, what: &'static str) -> RdfError {
        RdfError::Illegal { column: at + 1, found: format!("{found:?}"), what }
    }

    fn eat(&mut self, wanted: char, name: &'static str) -> Result<(), RdfError> {
        if self.peek() != Some(wanted) {
            return Err(self.expected(name));
        }
        self.at += wanted.len_utf8();
        Ok(())
    }

    /// `<iri>`, `_:label`, and where `bare` allows it a word.
    fn resource(&mut self, wanted: &'static str, bare: bool) -> Result<String, RdfError> {
        self.no_mutation()?;
        match self.peek() {
            Some('<') => {
                let inside = self.iri()?;
                Ok(if inside.starts_with("_:") { inside.to_owned() } else { format!("<{inside}>") })
            }
            Some('_') => self.blank().map(str::to_owned),
            Some(first) if bare && is_word(first) => Ok(format!("<{}>", self.word())),
            _ => Err(self.expected(wanted)),
        }
    }

    fn predicate(&mut self) -> Result<&'a str, RdfError> {
        const WANTED: &str = "a predicate (<iri> or a bare word)";
        self.no_mutation()?;
        let column = self.at;
        match self.peek() {
            Some('<') => match self.iri()? {
                blank if blank.starts_with("_:") => Err(RdfError::Expected {
                    column: column + 1,
                    wanted: WANTED,
                    found: format!("<{blank}>"),
                }),
                iri => Ok(iri),
            },
            Some(first) if is_word(first) && first != '_' => Ok(self.word()),
            _ => Err(self.expected(WANTED)),
        }
    }

    fn no_mutation(&self) -> Result<(), RdfError> {
        let what = match &self.text[self.at..] {
            rest if rest.starts_with('*') => "*",
            rest if rest.starts_with("uid(") => "uid()",
            rest if rest.starts_with("val(") => "val()",
            _ => return Ok(()),
        };
        Err(RdfError::Mutation { column: self.at + 1, what })
    }

    /// What stands between the brackets.
    fn iri(&mut self) -> Result<&'a str, RdfError> {
        let begin = self.at + 1;
        for (offset, found) in self.text[begin..].char_indices() {
            match found {
                '>' if offset == 0 => return Err(self.illegal(begin, '>', "an empty IRI")),
                '>' => {
                    self.at = begin + offset + 1;
                    return Ok(&self.text[begin..begin + offset]);
                }
                '\\' => self.escape(begin + offset, "uU", "an IRI")?,
                '\0'..=' ' | '<' | '"' | '{' | '}' | '|' | '^' | '`' => {
                    return Err(self.illegal(begin + offset, found, "an IRI"));
                }
                _ => {}
            }
        }
        Err(RdfError::Unended { column: self.at + 1, what: "IRI" })
    }

    fn blank(&mut self) -> Result<&'a str, RdfError> {
        let begin = self.at;
        let label = self.text[begin..].strip_prefix("_:").unwrap_or("");
        let inside =
            |found: char| found.is_alphanumeric() || matches!(found, '_' | '-' | '.' | ':' | '\u{b7}');
        let end = label.find(|found| !inside(found)).unwrap_or(label.len());
        // A full stop may stand inside a label, never at its end: there it ends the statement.
        let label = label[..end].trim_end_matches('.');
        if label.is_empty() {
            return Err(self.expected("a blank node (_:label)"));
        }
        self.at = begin + 2 + label.len();
        Ok(&self.text[begin..self.at])
    }

    fn word(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        let end = rest.find(|found| !is_word(found)).unwrap_or(rest.len());
        let word = match rest[..end].trim_end_matches('.') {
            "" => &rest[..end],
            word => word,
        };
        self.at += word.len();
        word
    }

    /// A quoted literal with its language or datatype, as it is written.
    fn literal(&mut self) -> Result<&'a str, RdfError> {
        let begin = self.at;
        let mut inside = self.text[begin + 1..].char_indices();
        let mut end = None;
        while let Some((offset, found)) = inside.next() {
            let at = begin + 1 + offset;
            match found {
                '"' => {
                    end = Some(at + 1);
                    break;
                }
                '\\' => {
                    self.escape(at, "tbnrf\"'\\uU", "a literal")?;
                    inside.next();
                }
                '\n' | '\r' | '\0' => return Err(self.illegal(at, found, "a literal")),
                _ => {}
            }
        }
        self.at = end.ok_or(RdfError::Unended { column: begin + 1, what: "literal" })?;
        if self.text[self.at..].starts_with("^^") {
            self.at += 2;
            if self.peek() != Some('<') {
                return Err(self.expected("a datatype (<iri>)"));
            }
            self.iri()?;
        } else if self.peek() == Some('@') {
            self.at += 1;
            let rest = &self.text[self.at..];
            let end = rest
                .find(|found: char| !(found.is_ascii_alphanumeric() || found == '-'))
                .unwrap_or(rest.len());
            if !rest.starts_with(|first: char| first.is_ascii_alphabetic()) || rest[..end].ends_with('-') {
                return Err(self.expected("a language (as in @en)"));
            }
            self.at += end;
        }
        Ok(&self.text[begin..self.at])
    }

    /// Checks the escape whose backslash stands at `at`.
    fn escape(&self, at: usize, allowed: &str, what: &'static str) -> Result<(), RdfError> {
        let rest = &self.text[at + 1..];
        let Some(kind) = rest.chars().next().filter(|kind| allowed.contains(*kind)) else {
            let found = rest.chars().next().map_or_else(|| "\\".to_owned(), |kind| format!("\\{kind}"));
            return Err(RdfError::Illegal { column: at + 1, found, what });
        };
        let digits = match kind {
            'u' => 4,
            'U' => 8,
            _ => return Ok(()),
        };
        let code = rest.get(1..=digits).filter(|hex| hex.bytes().all(|digit| digit.is_ascii_hexdigit()));
        let named = code.and_then(|hex| u32::from_str_radix(hex, 16).ok()).and_then(char::from_u32);
        match named {
            Some(_) => Ok(()),
            None => Err(RdfError::Expected {
                column: at + 1,
                wanted: "\\u with 4 or \\U with 8 hexadecimal digits of a character",
                found: format!("\\{}", rest.chars().take(digits + 1).collect::<String>()),
            }),
        }
    }

    /// `(key=value, ...)` as it is written. Values may be quoted.
    fn facets(&mut self) -> Result<&'a str, RdfError> {
        let begin = self.at;
        let mut quoted = false;
        let mut escaped = false;
        for (offset, found) in self.text[begin..].char_indices() {
            match found {
                _ if escaped => escaped = false,
                '\\' if quoted => escaped = true,
                '"' => quoted = !quoted,
                '\0' => return Err(self.illegal(begin + offset, found, "facets")),
                '(' if !quoted && offset > 0 => return Err(self.illegal(begin + offset, found, "facets")),
                ')' if !quoted => {
                    self.at = begin + offset + 1;
                    return Ok(&self.text[begin..self.at]);
                }
                _ => {}
            }
        }
        Err(RdfError::Unended { column: begin + 1, what: "list of facets" })
    }
}

/// What a bare word is made of.
fn is_word(found: char) -> bool {
    found.is_alphanumeric() || matches!(found, '_' | '-' | '.' | ':' | '/' | '~' | '%' | '+' | '@')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Statement<'_> {
        parse_line(line.as_bytes()).unwrap().unwrap()
    }

    fn refused(line: &str) -> String {
        parse_line(line.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn triples_and_quads_with_tabs_or_spaces() {
        let triple = read("<g.1>\t<name>\t\"Jail Breakers\"@en\t.");
        assert_eq!((triple.subject.as_str(), triple.predicate), ("<g.1>", "name"));
        assert_eq!(triple.value(), "\"Jail Breakers\"@en");
        let quad = read("_:a <p> <http://x/y> <graph> . # said so");
        assert_eq!(quad.graph.as_deref(), Some("<graph>"));
        assert_eq!(quad.value(), "<http://x/y> <graph>");
        assert_eq!(read("<a><b><c>.").object, "<c>");
    }

    #[test]
    fn objects_keep_their_text() {
        for object in [
            r#""a \"b\" \\ \u00e9 \U0001F600 c""#,
            r#""x"@en-GB"#,
            r#""1976-06-19"^^<http://www.w3.org/2001/XMLSchema#date>"#,
            r#""""#,
            "\"脱走遊戯\"@ja",
            "<a\\u0020b>",
        ] {
            assert_eq!(read(&format!("<s> <p> {object} .")).value(), object);
        }
    }

    #[test]
    fn facets_stay_with_the_object() {
        let line = r#"_:a <friend> _:b (close=true, since=2006-01-02, note="a ) b") ."#;
        assert_eq!(read(line).value(), r#"_:b (close=true, since=2006-01-02, note="a ) b")"#);
    }

    #[test]
    fn blank_nodes_have_one_spelling_and_words_may_be_bare() {
        assert_eq!(read("<_:b> <p> <_:c> .").subject, "_:b");
        assert_eq!(read("<_:b> <p> <_:c> .").object, "_:c");
        assert_eq!(read("_:a.b <p> _:c. ").object, "_:c");
        let bare = read("alice likes <cake> .");
        assert_eq!((bare.subject.as_str(), bare.predicate), ("<alice>", "likes"));
    }

    #[test]
    fn blank_lines_and_comments_say_nothing() {
        for line in ["", "  \t", "# <a> <b> <c> .", "\r"] {
            assert_eq!(parse_line(line.as_bytes()), Ok(None));
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_column() {
        assert!(refused("<a> <b> \"c .").contains("column 9: this literal does not end"));
        assert!(refused("<a <b> <c> .").contains("must not stand in an IRI"));
        assert!(refused("<a> <b> <c>").contains("the full stop"));
        assert!(refused("<a> <b> .").contains("an object"));
        assert!(refused("<a> _:b <c> .").contains("a predicate"));
        assert!(refused("<a> <_:b> <c> .").contains("a predicate"));
        assert!(refused("<a> <b> * .").contains("* belongs to a mutation"));
        assert!(refused("uid(v) <b> <c> .").contains("uid()"));
        assert!(refused(r#"<a> <b> "\x" ."#).contains("\\x"));
        assert!(refused(r#"<a> <b> "\ud800" ."#).contains("hexadecimal digits"));
        assert!(refused(r#"<a> <b> "x"@ ."#).contains("a language"));
        assert!(refused("<a> <b> <c> . <d>").contains("the end of the line"));
        assert!(refused("<> <b> <c> .").contains("an empty IRI"));
        assert_eq!(parse_line(b"<a> <\xff>"), Err(RdfError::NotUtf8 { column: 6 }));
    }
}
