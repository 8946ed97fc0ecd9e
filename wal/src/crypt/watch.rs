//! Watching that no key meets a nonce with two contents. Without the feature `testing` there is nothing here.

#[cfg(not(feature = "testing"))]
mod nobody {
    use ring::hkdf;

    /// Nobody asks which key it was.
    pub(crate) struct KeyName;

    pub(crate) const fn name(_prk: &hkdf::Prk, _info: &[&[u8]]) -> KeyName {
        KeyName
    }

    pub(crate) const fn note(_key: &KeyName, _part: u8, _place: u64, _aad: &[u8], _body: &[u8]) {}
}

#[cfg(not(feature = "testing"))]
pub(crate) use nobody::{KeyName, name, note};

#[cfg(feature = "testing")]
mod somebody {
    use std::{cell::RefCell, collections::HashMap};

    use ring::{digest, hkdf};

    /// Tells a derived key from every other.
    pub(crate) type KeyName = [u8; 16];

    /// What a key sealed at a place: a digest of it.
    type Uses = HashMap<(KeyName, u8, u64), Vec<u8>>;

    thread_local! {
        static USES: RefCell<Option<Uses>> = const { RefCell::new(None) };
    }

    /// From now on this thread remembers what it seals. How many nonces were used since the last call.
    ///
    /// # Panics
    /// Later, when a key meets a nonce with two contents.
    pub(crate) fn watch_nonces(on: bool) -> usize {
        let uses = USES.with(|uses| uses.replace(on.then(HashMap::new)));
        uses.map_or(0, |uses| uses.len())
    }

    struct NameLen;

    impl hkdf::KeyType for NameLen {
        fn len(&self) -> usize {
            16
        }
    }

    pub(crate) fn name(prk: &hkdf::Prk, info: &[&[u8]]) -> KeyName {
        let mut name = [0; 16];
        let info: Vec<&[u8]> = info.iter().copied().chain([&b"name"[..]]).collect();
        let named = prk.expand(&info, NameLen).and_then(|okm| okm.fill(&mut name));
        named.expect("a name is not longer than HKDF may be");
        name
    }

    pub(crate) fn note(key: &KeyName, part: u8, place: u64, aad: &[u8], body: &[u8]) {
        USES.with_borrow_mut(|uses| {
            let Some(uses) = uses else { return };
            let content =
                digest::digest(&digest::SHA256, &[&aad.len().to_le_bytes()[..], aad, body].concat());
            let before = uses.insert((*key, part, place), content.as_ref().to_vec());
            assert!(
                before.is_none_or(|before| before == content.as_ref()),
                "a key meets the nonce of part {part} at {place} with two contents"
            );
        });
    }
}

#[cfg(feature = "testing")]
pub(crate) use somebody::watch_nonces;
#[cfg(feature = "testing")]
pub(crate) use somebody::{KeyName, name, note};
