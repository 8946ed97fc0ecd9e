//! Encryption at rest: what is sealed with which key, under which nonce.
//!
//! The unit is the record, since reads fetch single records. Its header stays in the clear, as associated data; its body
//! becomes ciphertext with a tag behind it. The CRC covers the ciphertext, so whoever looks for rot needs no key. A frame's
//! directory, the head that it carries and its header are not hidden but vouched for: each has a tag. A manifest's list of
//! segments is vouched for as well, its groups are sealed.
//!
//! Keys. A segment's key is HKDF-SHA256 of the data key with the segment's epoch as salt, over store, incarnation, segment.
//! What stands for itself has a key of its own, too, with random bytes as salt. The algorithm is AES-256-GCM, which breaks if one key ever
//! meets one nonce with two contents. The nonce is a place in the segment, and the argument is:
//!
//! 1. An open writes each block of a segment at most once: frames follow each other, and after a failed write nothing is
//!    written. So within one key, which is of one open and one use of a segment, a place is written once.
//! 2. The same segment in a later open, before it was taken into use again: the incarnation differs, and with it the key.
//! 3. The same segment in a later use by the same open: the epoch differs, and with it the key.
//! 4. Recovery writes frames beyond the proven mark again, with the bytes that stand there: the same content.
//! 5. The two places where a head stands, and the next frame that carries it, repeat its tag and compute none.
//! 6. A copy of the whole directory that somebody else opens draws an incarnation of its own.
//! 7. A footer may be written to the same place again, with other content: its nonce is drawn, and stands before it.
//! 8. The key of what stands for itself (a manifest's groups) is used once: its salt is drawn for each that is sealed.
//!
//! What is left to chance is that no two opens of one store draw the same 64 bits ([`Options::rng`](crate::Options)).

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::{BufMut, Bytes, BytesMut};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey},
    hkdf,
};

use crate::{
    DataKey, Error, KeyFault, KeyId, KeyProvider, Result,
    codec::{Decoder, round_up},
    compress::Heads,
    frame::{BLOCK, CIPHER_AES, CIPHER_NONE, FrameHeader},
    record::{self, FLAGS_AT, RECORD_HEADER, SEALED},
    rules::{Rule, is_broken},
};

pub(crate) mod watch;

/// Bytes that sealing adds.
pub(crate) const TAG: usize = 16;

/// What sealing adds to a footer: what its nonce was drawn from, and the tag.
pub(crate) const FOOTER_EXTRA: usize = 8 + TAG;

/// What stands before the ciphertext of a blob.
const BLOB_HEAD: usize = 20;
/// What sealing adds to a blob.
pub(crate) const BLOB_EXTRA: usize = BLOB_HEAD + TAG;

/// What a tag vouches for; the first byte of its nonce, so that places of different kinds never meet.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Part {
    Record = 0,
    Directory = 1,
    Carry = 2,
    Head = 3,
    Blob = 4,
    Footer = 5,
}

/// A derived key, which seals and opens.
pub(crate) struct Seal {
    pub(crate) key_id: KeyId,
    key: LessSafeKey,
    /// Tells keys apart in tests.
    name: watch::KeyName,
}

/// One use of a segment by one open, which has a key of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) store: u128,
    pub(crate) epoch: u128,
    pub(crate) segment: u32,
    pub(crate) incarnation: u64,
}

impl Use {
    fn of(header: &FrameHeader) -> Use {
        let FrameHeader { store, epoch, segment, incarnation, .. } = *header;
        Use { store, epoch, segment, incarnation }
    }
}

impl Seal {
    fn derive(key_id: KeyId, key: &DataKey, salt: u128, label: &str, info: &[&[u8]]) -> Seal {
        let label = [label.as_bytes()];
        let info: Vec<&[u8]> = label.iter().chain(info).copied().collect();
        let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &salt.to_le_bytes()).extract(key.bytes());
        let derived = prk.expand(&info, &AES_256_GCM).expect("one key is not longer than HKDF may be");
        let name = watch::name(&prk, &info);
        Seal { key_id, key: LessSafeKey::new(UnboundKey::from(derived)), name }
    }

    fn of_segment(key_id: KeyId, key: &DataKey, of: &Use) -> Seal {
        let epoch = if is_broken(Rule::EpochInKey) { 0 } else { of.epoch };
        let (store, incarnation) = (of.store.to_le_bytes(), of.incarnation.to_le_bytes());
        let segment = of.segment.to_le_bytes();
        Seal::derive(key_id, key, epoch, "pontoon-wal segment 1", &[&store, &incarnation, &segment])
    }

    fn nonce(part: Part, place: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[0] = part as u8;
        nonce[4..].copy_from_slice(&place.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    /// Encrypts in place.
    fn close(&self, part: Part, place: u64, aad: &[u8], body: &mut [u8]) -> Tag {
        watch::note(&self.name, part as u8, place, aad, body);
        let sealed = self.key.seal_in_place_separate_tag(Seal::nonce(part, place), Aad::from(aad), body);
        sealed.expect("a body is far below the limit of the algorithm")
    }

    /// Decrypts in place what ends with a tag; `None` if it is not what was sealed at this place.
    fn open<'a>(&self, part: Part, place: u64, aad: &[u8], sealed: &'a mut [u8]) -> Option<&'a mut [u8]> {
        if is_broken(Rule::TagsChecked) {
            // The algorithm is a stream: sealing once more takes the stream off again.
            let body = sealed.len().checked_sub(TAG)?;
            let nonce = Seal::nonce(part, place);
            let _ = self.key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut sealed[..body]).ok()?;
            return Some(&mut sealed[..body]);
        }
        self.key.open_in_place(Seal::nonce(part, place), Aad::from(aad), sealed).ok()
    }

    /// A tag over bytes that stay in the clear.
    fn vouch(&self, part: Part, place: u64, bytes: &[u8]) -> [u8; TAG] {
        self.close(part, place, bytes, &mut []).as_ref().try_into().expect("tags have 16 bytes")
    }

    fn vouched(&self, part: Part, place: u64, bytes: &[u8], tag: &[u8; TAG]) -> bool {
        self.open(part, place, bytes, &mut tag.clone()).is_some()
    }

    /// Fills in the tags of a header whose other fields are settled. It begins at its block.
    pub(crate) fn vouch_head(&self, header: &mut FrameHeader, directory: &[u8], carry: &[u8]) {
        let place = header.place();
        (header.cipher, header.key_id) = (CIPHER_AES, self.key_id.0);
        header.dir_tag = self.vouch(Part::Directory, place, directory);
        if !carry.is_empty() {
            header.carry_tag = self.vouch(Part::Carry, place, carry);
        }
        header.tag = self.vouch(Part::Head, place, &header.vouched_bytes());
    }

    /// Whether a header is one that was sealed with this key.
    pub(crate) fn knows(&self, header: &FrameHeader) -> bool {
        header.cipher == CIPHER_AES
            && header.key_id == self.key_id.0
            && self.vouched(Part::Head, header.place(), &header.vouched_bytes(), &header.tag)
    }

    /// Whether these are the bytes of the directory of a header that is known.
    pub(crate) fn knows_directory(&self, header: &FrameHeader, directory: &[u8]) -> bool {
        self.vouched(Part::Directory, header.place(), directory, &header.dir_tag)
    }

    /// Whether these are the bytes that the frame of a header that is known carries for the one before.
    pub(crate) fn knows_carry(&self, header: &FrameHeader, carry: &[u8]) -> bool {
        carry.is_empty() || self.vouched(Part::Carry, header.place(), carry, &header.carry_tag)
    }

    /// Appends a plain record, given without padding, as it stands on disk at this offset of the segment, with padding.
    pub(crate) fn seal_record(&self, out: &mut BytesMut, offset: u32, plain: &[u8]) {
        let start = out.len();
        let len = plain.len() + TAG;
        out.put_slice(plain);
        out[start + 4..start + 8].copy_from_slice(&(len as u32).to_le_bytes());
        out[start + FLAGS_AT] |= SEALED;
        let (head, body) = out[start..].split_at_mut(RECORD_HEADER);
        let tag = self.close(Part::Record, u64::from(offset), &head[4..], body);
        out.put_slice(tag.as_ref());
        let crc = crc32c::crc32c(&out[start + 4..]);
        out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
        out.put_bytes(0, round_up(len, 8) - len);
    }

    /// Appends the plain records of a batch to a frame, which begins at this offset of the segment.
    pub(crate) fn seal_batch(&self, frame: &mut BytesMut, begins: u32, batch: &[u8]) {
        for (head, at) in Heads::of(batch) {
            let offset = begins + frame.len() as u32;
            self.seal_record(frame, offset, &batch[at..at + head.len as usize]);
        }
    }

    /// The plain record, without padding, that was sealed at this offset of the segment; `None` if it was not, or is not
    /// what was sealed. Its CRC is that of the sealed one and means nothing.
    pub(crate) fn open_record(&self, offset: u32, sealed: &[u8]) -> Option<Bytes> {
        let head = record::decode_head(sealed)?;
        let len = head.len as usize;
        let mut plain = BytesMut::from(sealed.get(..len)?);
        let (header, body) = plain.split_at_mut(RECORD_HEADER);
        let body = self.open(Part::Record, u64::from(offset), &header[4..], body)?.len();
        let len = RECORD_HEADER + body;
        plain.truncate(len);
        plain[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        plain[FLAGS_AT] &= !SEALED;
        Some(plain.freeze())
    }
}

/// Footers, which lie behind a segment's last frame and may be written there more than once.
impl Seal {
    /// Encrypts a footer. `drawn` must be drawn for this call.
    pub(crate) fn seal_footer(&self, plain: &[u8], drawn: u64) -> Vec<u8> {
        let mut sealed = Vec::with_capacity(plain.len() + FOOTER_EXTRA);
        sealed.put_u64_le(drawn);
        sealed.put_slice(plain);
        let tag = self.close(Part::Footer, drawn, &[], &mut sealed[8..]);
        sealed.put_slice(tag.as_ref());
        sealed
    }

    /// The footer that was encrypted; `None` if these are not its bytes.
    pub(crate) fn open_footer(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let mut body = Decoder(sealed);
        let drawn = body.u64()?;
        let mut plain = body.0.to_vec();
        let len = self.open(Part::Footer, drawn, &[], &mut plain)?.len();
        plain.truncate(len);
        Some(plain)
    }
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Seal(key {})", self.key_id)
    }
}

/// The lines of a batch's directory, with the records as long as they are when they are sealed.
pub(crate) fn sealed_dir(data: &[u8], dir: &mut Vec<u8>) {
    dir.clear();
    for (head, _) in Heads::of(data) {
        record::Head { len: head.len + TAG as u32, ..head }.encode_dir(dir);
    }
}

/// The keys of one open log.
pub(crate) struct Keyring {
    dir: std::path::PathBuf,
    access: Access,
}

enum Access {
    /// No keys: nothing is encrypted, and what is encrypted is refused.
    None,
    /// Nothing is opened that needs a key: for looking at what can be seen without.
    Blind,
    Keys {
        provider: Arc<dyn KeyProvider>,
        /// What is written with from now on.
        current: RwLock<(KeyId, DataKey)>,
    },
}

impl Keyring {
    /// The keys of a log in this directory. With a provider, everything that is written is encrypted.
    ///
    /// # Errors
    /// [`Error::KeySource`] if the provider has no current key.
    pub(crate) fn new(dir: &std::path::Path, provider: Option<Arc<dyn KeyProvider>>) -> Result<Arc<Keyring>> {
        let dir = dir.to_owned();
        let access = match provider {
            None => Access::None,
            Some(provider) => {
                let current = RwLock::new(current_of(&dir, &*provider)?);
                Access::Keys { provider, current }
            }
        };
        Ok(Arc::new(Keyring { dir, access }))
    }

    /// For looking at a directory without its keys.
    pub(crate) fn blind(dir: &std::path::Path) -> Arc<Keyring> {
        Arc::new(Keyring { dir: dir.to_owned(), access: Access::Blind })
    }

    /// Whether what is written is encrypted.
    pub(crate) fn is_on(&self) -> bool {
        matches!(self.access, Access::Keys { .. })
    }

    pub(crate) fn is_blind(&self) -> bool {
        matches!(self.access, Access::Blind)
    }

    /// The key that is written with.
    pub(crate) fn current_id(&self) -> Option<KeyId> {
        self.current().map(|(id, _)| id)
    }

    fn current(&self) -> Option<(KeyId, DataKey)> {
        match &self.access {
            Access::Keys { current, .. } => {
                Some(current.read().unwrap_or_else(PoisonError::into_inner).clone())
            }
            Access::None | Access::Blind => None,
        }
    }

    /// Asks the provider which key is to be written with from now on.
    ///
    /// # Errors
    /// [`Error::KeySource`]; then the one before stays.
    pub(crate) fn refresh(&self) -> Result<Option<KeyId>> {
        let Access::Keys { provider, current } = &self.access else { return Ok(None) };
        let fresh = current_of(&self.dir, &**provider)?;
        let id = fresh.0;
        *current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(Some(id))
    }

    fn key(&self, key_id: KeyId) -> Result<DataKey> {
        let refused = |fault| Error::Key { dir: self.dir.clone(), key_id, fault };
        let Access::Keys { provider, .. } = &self.access else { return Err(refused(KeyFault::NoKeys)) };
        let key = provider.key(key_id).map_err(|source| source_failed(&self.dir, source))?;
        key.ok_or_else(|| refused(KeyFault::Missing { provider: provider.name() }))
    }

    /// What the log says when something does not open with the key of its number.
    pub(crate) fn wrong(&self, key_id: KeyId, file: &std::path::Path) -> Error {
        let provider = match &self.access {
            Access::Keys { provider, .. } => provider.name(),
            Access::None | Access::Blind => String::new(),
        };
        let fault = KeyFault::Wrong { provider, file: file.to_owned() };
        Error::Key { dir: self.dir.clone(), key_id, fault }
    }

    /// The seal of a segment that is taken into use; `None` in a log that is not encrypted.
    pub(crate) fn seal_new(&self, of: &Use) -> Option<Arc<Seal>> {
        self.current().map(|(id, key)| Arc::new(Seal::of_segment(id, &key, of)))
    }

    /// The seal of a segment that was written before.
    pub(crate) fn seal(&self, key_id: KeyId, of: &Use) -> Result<Arc<Seal>> {
        Ok(Arc::new(Seal::of_segment(key_id, &self.key(key_id)?, of)))
    }

    /// Encrypts bytes that stand for themselves, with a key that is used for nothing else: `salt` must be drawn for this call.
    /// `what` and `aad` must be the same to open it. `None` in a log that is not encrypted.
    ///
    /// ```text
    ///  0 key id u32 | 4 salt | 20 ciphertext | tag 16
    /// ```
    pub(crate) fn seal_blob(&self, what: &str, aad: &[u8], plain: &[u8], salt: u128) -> Option<Vec<u8>> {
        let (key_id, key) = self.current()?;
        let seal = Seal::derive(key_id, &key, salt, what, &[]);
        let mut blob = Vec::with_capacity(BLOB_HEAD + plain.len() + TAG);
        blob.put_u32_le(key_id.0);
        blob.put_u128_le(salt);
        blob.put_slice(plain);
        let tag = seal.close(Part::Blob, 0, aad, &mut blob[BLOB_HEAD..]);
        blob.put_slice(tag.as_ref());
        Some(blob)
    }

    /// What [`Keyring::seal_blob`] encrypted; `None` if it was not that, or with another key.
    ///
    /// # Errors
    /// [`Error::Key`] if the key is not there.
    pub(crate) fn open_blob(&self, what: &str, aad: &[u8], blob: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut head = Decoder(blob);
        let (Some(key_id), Some(salt)) = (head.u32(), head.u128()) else { return Ok(None) };
        let seal = Seal::derive(KeyId(key_id), &self.key(KeyId(key_id))?, salt, what, &[]);
        let mut plain = head.0.to_vec();
        let len = seal.open(Part::Blob, 0, aad, &mut plain).map(|plain| plain.len());
        Ok(len.map(|len| {
            plain.truncate(len);
            plain
        }))
    }
}

/// The number of the key that a blob needs.
pub(crate) fn blob_key(blob: &[u8]) -> Option<KeyId> {
    Decoder(blob).u32().map(KeyId)
}

fn current_of(dir: &std::path::Path, provider: &dyn KeyProvider) -> Result<(KeyId, DataKey)> {
    let (id, key) = provider.current().map_err(|source| source_failed(dir, source))?;
    match id {
        KeyId(0) => Err(source_failed(dir, "it names its current key 0, which means none".into())),
        id => Ok((id, key)),
    }
}

fn source_failed(dir: &std::path::Path, source: crate::KeyError) -> Error {
    Error::KeySource { dir: dir.to_owned(), source: source.into() }
}

/// Which frames may count in a segment that a manifest lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expected {
    /// It took frames of this key and open, or, without a key, plain ones.
    Written { key_id: u32, incarnation: u64 },
    /// It has taken none as far as the manifest knows. If that one is encrypted, only encrypted ones can be there.
    Unused { encrypted: bool },
}

/// Decides which frames of a listed segment count, before it has a seal.
pub(crate) struct Guard {
    keyring: Arc<Keyring>,
    expected: Expected,
    /// The seal of the last open that was asked for.
    last: Mutex<Option<(u64, Arc<Seal>)>>,
}

impl Guard {
    pub(crate) fn new(keyring: Arc<Keyring>, expected: Expected) -> Guard {
        Guard { keyring, expected, last: Mutex::default() }
    }

    /// The seal that the header asks for; `None` if it is not encrypted, or nobody can look.
    pub(crate) fn seal_of(&self, header: &FrameHeader) -> Result<Option<Arc<Seal>>> {
        if header.cipher == CIPHER_NONE || self.keyring.is_blind() {
            return Ok(None);
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((incarnation, seal)) = &*last
            && (*incarnation, seal.key_id.0) == (header.incarnation, header.key_id)
        {
            return Ok(Some(seal.clone()));
        }
        let seal = self.keyring.seal(KeyId(header.key_id), &Use::of(header))?;
        *last = Some((header.incarnation, seal.clone()));
        Ok(Some(seal))
    }

    /// Whether the header is one that this log wrote here.
    ///
    /// # Errors
    /// [`Error::Key`] if that takes a key that is not there.
    pub(crate) fn admits(&self, header: &FrameHeader) -> Result<bool> {
        let plausible = match self.expected {
            Expected::Written { key_id: 0, .. } => header.cipher == CIPHER_NONE,
            Expected::Written { key_id, incarnation } => {
                header.cipher == CIPHER_AES && (header.key_id, header.incarnation) == (key_id, incarnation)
            }
            Expected::Unused { encrypted } => header.cipher == CIPHER_AES || !encrypted,
        };
        if !plausible {
            return Ok(false);
        }
        Ok(self.seal_of(header)?.is_none_or(|seal| seal.knows(header)))
    }
}

impl FrameHeader {
    /// Where it begins in its segment.
    fn place(&self) -> u64 {
        u64::from(self.block) * BLOCK as u64
    }
}
