//! A file's bytes in pages that copies share, so that a copy of the whole disk costs next to nothing.

use std::sync::{Arc, OnceLock};

const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// A page of which not every byte is zero.
#[derive(Debug)]
struct Page {
    bytes: [u8; PAGE],
    hash: OnceLock<u64>,
}

impl Clone for Page {
    /// A copy is made to be changed: its hash is another.
    fn clone(&self) -> Page {
        Page { bytes: self.bytes, hash: OnceLock::new() }
    }
}

/// A file's bytes.
///
/// Invariants: `pages` has exactly the pages that `len` needs; bytes at and above `len` are zero.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    pages: Arc<Vec<Option<Arc<Page>>>>,
    len: usize,
}

impl Content {
    pub(super) fn from_bytes(bytes: &[u8]) -> Content {
        let mut content = Content::default();
        content.resize(bytes.len());
        content.write(0, bytes);
        content
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Cuts the bytes, or adds zeros.
    pub(super) fn resize(&mut self, len: usize) {
        if len == self.len {
            return;
        }
        let pages = Arc::make_mut(&mut self.pages);
        pages.resize(len.div_ceil(PAGE), None);
        if len < self.len
            && let Some(Some(page)) = pages.last_mut()
            && !len.is_multiple_of(PAGE)
        {
            let page = Arc::make_mut(page);
            page.bytes[len % PAGE..].fill(0);
            page.hash = OnceLock::new();
        }
        self.len = len;
    }

    /// Writes within the length.
    pub(super) fn write(&mut self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.len, "a write never leaves the file");
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let within = at % PAGE;
            let (piece, after) = rest.split_at(rest.len().min(PAGE - within));
            self.write_page(at / PAGE, within, piece);
            (at, rest) = (at + piece.len(), after);
        }
    }

    fn write_page(&mut self, page: usize, within: usize, piece: &[u8]) {
        let zeros = piece == &ZEROS[..piece.len()];
        if zeros && (self.pages[page].is_none() || piece.len() == PAGE) {
            if self.pages[page].is_some() {
                Arc::make_mut(&mut self.pages)[page] = None;
            }
            return;
        }
        let slot = &mut Arc::make_mut(&mut self.pages)[page];
        let page = slot.get_or_insert_with(|| Arc::new(Page { bytes: [0; PAGE], hash: OnceLock::new() }));
        let page = Arc::make_mut(page);
        page.hash = OnceLock::new();
        page.bytes[within..within + piece.len()].copy_from_slice(piece);
    }

    /// Reads as much as there is; how much that is.
    pub(super) fn read(&self, offset: usize, buf: &mut [u8]) -> usize {
        let len = self.len.saturating_sub(offset).min(buf.len());
        let (mut at, mut rest) = (offset, &mut buf[..len]);
        while !rest.is_empty() {
            let within = at % PAGE;
            let (piece, after) = rest.split_at_mut((PAGE - within).min(len - (at - offset)));
            match &self.pages[at / PAGE] {
                Some(page) => piece.copy_from_slice(&page.bytes[within..within + piece.len()]),
                None => piece.fill(0),
            }
            at += piece.len();
            rest = after;
        }
        len
    }

    /// Whether these bytes stand at the offset; what lies beyond the end counts as zeros.
    pub(super) fn holds(&self, offset: usize, data: &[u8]) -> bool {
        let mut here = vec![0; data.len()];
        self.read(offset, &mut here);
        here == data
    }

    pub(super) fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    /// Equal bytes have equal hashes.
    pub(super) fn hash(&self) -> u64 {
        let pages = self.pages.iter().map(|page| page.as_ref().map_or(0, |page| page.hash()));
        pages.fold(self.len as u64, |hash, page| mix(hash ^ page))
    }
}

impl Page {
    fn hash(&self) -> u64 {
        *self.hash.get_or_init(|| {
            let words = self.bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
            // A page that became zero again hashes as one that always was.
            match self.bytes == ZEROS {
                true => 0,
                false => words.fold(1, |hash, word| mix(hash ^ word)),
            }
        })
    }
}

/// Spreads a word.
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (value ^ value >> 32).wrapping_mul(0x94d0_49bb_1331_11eb).rotate_left(23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_and_copies_are_apart() {
        let mut plain = vec![0u8; 10_000];
        let mut content = Content::from_bytes(&plain);
        for (offset, len, fill) in [(0, 10, 1), (4090, 20, 2), (8192, 1808, 3), (0, 4096, 0), (100, 9000, 7)]
        {
            plain[offset..offset + len].fill(fill);
            let before = content.clone();
            content.write(offset, &vec![fill; len]);
            assert_eq!(content.to_vec(), plain);
            assert!(before.hash() != content.hash());
        }
        content.resize(5000);
        content.resize(9000);
        plain.truncate(5000);
        plain.resize(9000, 0);
        assert_eq!(content.to_vec(), plain);
        assert_eq!(content.hash(), Content::from_bytes(&plain).hash());
        let mut buf = [9; 10];
        assert_eq!((content.read(8995, &mut buf), &buf[..5]), (5, &[0; 5][..]));
        assert!(content.holds(8999, &[0, 0, 0]) && !content.holds(4999, &[0]));
    }
}
