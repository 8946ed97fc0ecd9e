//! Memory for frames: aligned pieces of large buffers that are used again, so that no frame costs fresh pages.

use std::collections::VecDeque;

use bytes::BytesMut;

use crate::frame::BLOCK;

/// Bytes of one buffer; a larger frame has its own.
const SLAB: usize = 2 << 20;
/// Buffers that are kept until their frames are gone; what the cache of written frames holds on to comes first.
const KEPT: usize = 64;

/// Buffers that frames are cut from.
///
/// Invariants: what is left of `current` begins on a block. `spent` holds buffers in the order in which they were used up;
/// frames die about in that order too.
#[derive(Default)]
pub(crate) struct Slabs {
    current: BytesMut,
    spent: VecDeque<BytesMut>,
}

impl Slabs {
    /// An empty piece with room for exactly `len` bytes, a multiple of the block, that begins on a block.
    pub(crate) fn take(&mut self, len: usize) -> BytesMut {
        debug_assert!(len.is_multiple_of(BLOCK));
        if len > SLAB {
            return aligned(BytesMut::with_capacity(len + BLOCK));
        }
        if self.current.capacity() < len {
            self.refill();
        }
        let rest = self.current.split_off(len);
        std::mem::replace(&mut self.current, rest)
    }

    fn refill(&mut self) {
        let reclaimed = match self.spent.front_mut().map(|oldest| oldest.try_reclaim(SLAB + BLOCK)) {
            Some(true) => self.spent.pop_front(),
            _ => None,
        };
        let fresh = aligned(reclaimed.unwrap_or_else(|| BytesMut::with_capacity(SLAB + BLOCK)));
        let spent = std::mem::replace(&mut self.current, fresh);
        if spent.capacity() > 0 {
            self.spent.push_back(spent);
        }
        if self.spent.len() > KEPT {
            // Somebody holds its frames for long; it is freed when they are gone.
            self.spent.pop_front();
        }
    }
}

/// The part of an empty buffer that begins on a block.
fn aligned(mut buffer: BytesMut) -> BytesMut {
    let start = buffer.as_ptr().align_offset(BLOCK);
    buffer.split_off(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_begin_on_blocks_and_buffers_come_back() {
        let mut slabs = Slabs::default();
        let mut seen = std::collections::HashSet::new();
        for round in 0..40 {
            let mut piece = slabs.take(SLAB / 4);
            assert_eq!((piece.as_ptr().align_offset(BLOCK), piece.len()), (0, 0));
            assert!(piece.capacity() >= SLAB / 4);
            piece.resize(SLAB / 4, round);
            seen.insert(piece.as_ptr() as usize);
            assert!(piece.freeze().iter().all(|byte| *byte == round));
        }
        assert!(seen.len() <= 12, "{} places", seen.len());
        assert_eq!(slabs.take(SLAB + BLOCK).as_ptr().align_offset(BLOCK), 0);
    }
}
