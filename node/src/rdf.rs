//! N-Triples, N-Quads and Dgraph's RDF dialect, one statement per line.
//!
//! ```text
//!  <subject>  <predicate>  <object> | _:b | "literal"@lang | "literal"^^<type>  [<graph>]  [(facet=value, ...)] .
//! ```
//!
//! What an object says is kept as it is written: escapes, language, datatype, graph label and facets stay the text that
//! they were, so that an export gives the same statement back. Only the spaces between the parts become one, and the
//! two spellings of a blank node (`_:b`, `<_:b>`) become the first, since they name the same thing.
//!
//! Dgraph's dialect also allows a bare word for a subject or predicate; it is read as if it stood in brackets. What only
//! makes sense in a mutation (`*`, `uid(v)`, `val(v)`) is refused by name.

mod lines;
mod parse;

pub use lines::{Line, Lines, LinesError};
pub use parse::{RdfError, Statement, parse_line};
