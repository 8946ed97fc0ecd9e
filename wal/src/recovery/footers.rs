//! Reading the footers that a manifest lists, so that their segments need not be scanned.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;

use super::whole::on_threads;
use crate::{
    Error, Result,
    crypt::FOOTER_EXTRA,
    footer::Footer,
    frame::BLOCK,
    fs::read_exact,
    manifest::{FooterAt, ListedSegment, Listing, Manifest},
    segment::Segment,
};

/// The footers by segment. A segment whose footer is not what the manifest says is left out: it is scanned.
pub(crate) fn read(
    segments: &BTreeMap<u32, Arc<Segment>>,
    manifest: &Manifest,
    threads: usize,
) -> Result<BTreeMap<u32, Footer>> {
    let listed: Vec<(&ListedSegment, &Arc<Segment>, FooterAt)> = manifest
        .segments
        .iter()
        .filter(|listed| listed.listing == Listing::Sealed)
        .filter_map(|listed| Some((listed, segments.get(&listed.id)?, listed.footer?)))
        // Without the key nobody can look.
        .filter(|(listed, segment, _)| listed.key_id == 0 || segment.seal().is_some())
        .collect();
    let mut footers = BTreeMap::new();
    for some in listed.chunks(threads) {
        let read = |(listed, segment, at): (&ListedSegment, &Arc<Segment>, FooterAt)| {
            let extra = segment.seal().map_or(0, |_| FOOTER_EXTRA);
            let mut bytes = vec![0; at.len as usize + extra];
            // A read that fails is an error, here as everywhere.
            read_exact(&*segment.file, &mut bytes, u64::from(at.block) * BLOCK as u64)
                .map_err(|source| Error::io("read", &segment.path, source))?;
            let plain = match segment.seal() {
                Some(seal) => seal.open_footer(&bytes),
                None => Some(bytes),
            };
            let footer = plain.and_then(|plain| Footer::decode(segment, &at, Bytes::from(plain)));
            let footer = footer.filter(|footer| is_of(footer, listed, manifest));
            if footer.is_none() {
                tracing::warn!(path = %segment.path.display(), "the segment's footer is damaged; it is scanned");
            }
            Ok(footer)
        };
        let read = on_threads(some.iter().map(|&one| move || read(one)).collect());
        for footer in read.into_iter().collect::<Result<Vec<Option<Footer>>>>()? {
            footer.into_iter().for_each(|footer| drop(footers.insert(footer.facts.segment, footer)));
        }
    }
    Ok(footers)
}

/// Whether a footer is of this use of the segment, and belongs to this checkpoint or an earlier one.
fn is_of(footer: &Footer, listed: &ListedSegment, manifest: &Manifest) -> bool {
    let facts = &footer.facts;
    (facts.store, facts.stream, facts.incarnation) == (manifest.store, listed.stream, listed.incarnation)
        && (facts.first_seq, facts.last_seq) == (listed.first_seq, listed.last_seq)
        && facts.lsn <= manifest.as_of.lsns.least()
}
