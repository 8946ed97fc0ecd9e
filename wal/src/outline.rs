//! What replaying a record takes, without its payload: its head, the terms of its entries, or all of what it says if it
//! holds none.

use bytes::Bytes;

use crate::{
    record::{self, Body, Head, Kind},
    types::HardState,
};

/// The terms of a record's entries. Nearly always there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Terms {
    /// Of all of them.
    One(u64),
    /// (first index, term) of each run, ascending.
    Runs(Box<[(u64, u64)]>),
}

impl Terms {
    /// The runs of entries that begin at an index.
    pub(crate) fn runs(&self, first: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (one, runs) = match self {
            Terms::One(term) => (Some((first, *term)), None),
            Terms::Runs(runs) => (None, Some(runs)),
        };
        one.into_iter().chain(runs.into_iter().flatten().copied())
    }
}

/// What a record says, as far as replay needs it.
#[derive(Debug, Clone)]
pub(crate) enum Gist {
    Entries(Terms),
    HardState(HardState),
    Other(Box<Body>),
}

impl Gist {
    fn of(body: Body) -> Gist {
        match body {
            Body::HardState(state) => Gist::HardState(state),
            other => Gist::Other(Box::new(other)),
        }
    }
}

/// A record's head and gist.
#[derive(Debug, Clone)]
pub(crate) struct Outline {
    pub(crate) head: Head,
    pub(crate) gist: Gist,
}

impl Outline {
    /// Reads it off a whole plain record; `None` if that is none. The caller has checked the CRC. `head` is the one that the
    /// record has on disk, where it may be longer.
    pub(crate) fn of(head: Head, record: &Bytes) -> Option<Outline> {
        let gist = match head.kind {
            Kind::Entries => Gist::Entries(record::terms(&record::decode_head(record)?, record)?),
            _ => Gist::of(record::decode(record)?.1),
        };
        Some(Outline { head, gist })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Batch, Entry};
    use pontoon_proto::GroupId;

    #[test]
    fn terms_are_read_as_runs() {
        let entry = |index, term| Entry { index, term, kind: 0, data: "payload".into() };
        let mut batch = Batch::new();
        batch.append(GroupId(1), &[entry(7, 1), entry(8, 2), entry(9, 2), entry(10, 7)]);
        batch.append(GroupId(1), &[entry(11, 7), entry(12, 7)]);
        let data = Bytes::from(batch.data.clone());
        let first = record::decode_head(&data).unwrap();
        let second = data.slice(first.padded()..);
        let terms = |record: &Bytes| match Outline::of(record::decode_head(record).unwrap(), record) {
            Some(Outline { head, gist: Gist::Entries(terms) }) => terms.runs(head.index).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        assert_eq!(terms(&data), [(7, 1), (8, 2), (10, 7)]);
        assert_eq!(terms(&second), [(11, 7)]);
    }
}
