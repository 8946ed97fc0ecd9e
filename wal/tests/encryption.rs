//! Encryption at rest: nothing of what groups hold is on disk in the clear, keys change while the log lives, a key that is
//! missing or wrong is refused before anything is written, and what somebody changed on purpose does not pass.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use pontoon_wal::{
    Batch, Compression, DamageWhy, DataKey, DriverMode, Entry, Error, GroupId, HardState, KEY_BYTES,
    KeyFault, KeyFile, KeyId, KeyProvider, KeySet, Options, SnapshotMeta, Wal, WalReader,
    rules::{Rule, break_rule, watch_nonces},
    sim::SimFs,
    tools::{self, FrameInfo},
};

#[path = "support/lib.rs"]
mod support;

use support::{DIR, HandClock, Model, Op, Rng, bytes_of, options};

const SECRET: &[u8] = b"the moon is made of cheese";
/// The term of entries that carry it.
const TERM: u64 = 0x0123_4567_89ab_cdef;

/// A number as directories and footers keep it.
fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn key(byte: u8) -> DataKey {
    DataKey::new([byte; KEY_BYTES])
}

/// A disk, its keys, and logs on it with a fresh seed for each open.
struct Place {
    fs: SimFs,
    clock: Arc<HandClock>,
    keys: Arc<KeySet>,
    opens: std::cell::Cell<u64>,
}

impl Place {
    fn new() -> Place {
        let keys = Arc::new(KeySet::new(KeyId(1), key(1)));
        Place { fs: SimFs::new(), clock: Arc::default(), keys, opens: std::cell::Cell::new(0) }
    }

    fn options(&self) -> Options {
        self.opens.set(self.opens.get() + 1);
        let keys: Arc<dyn KeyProvider> = self.keys.clone();
        Options { keys: Some(keys), ..options(&self.fs, &self.clock, self.opens.get()) }
    }

    fn try_open(&self) -> Result<Wal, Error> {
        Wal::open(self.options()).map(|(wal, _)| wal)
    }

    fn open(&self) -> Wal {
        let (wal, report) = Wal::open(self.options()).unwrap();
        assert!(report.damaged.is_empty() && report.torn.is_none(), "{report:?}");
        wal
    }

    fn plain(&self) -> Result<Wal, Error> {
        Wal::open(Options { keys: None, ..self.options() }).map(|(wal, _)| wal)
    }

    fn frames(&self) -> Vec<FrameInfo> {
        let mut frames = Vec::new();
        let visited = tools::frames(&self.fs, Path::new(DIR), |frame| {
            frames.push(frame);
            ControlFlow::Continue(())
        });
        visited.unwrap();
        frames
    }

    /// How often bytes are found in the files of the directory.
    fn found(&self, needle: &[u8]) -> usize {
        let count = |(path, _): (PathBuf, u64)| {
            let bytes = bytes_of(&self.fs, &path);
            bytes.windows(needle.len()).filter(|window| *window == needle).count()
        };
        self.fs.files().into_iter().map(count).sum()
    }
}

fn entry(index: u64, data: &[u8]) -> Entry {
    Entry { index, term: TERM, kind: 1, data: data.to_vec().into() }
}

/// Writes the secret wherever a caller's bytes can go.
fn tell(wal: &Wal, group: GroupId) {
    let last = wal.group(group).map_or(0, |view| view.last_index);
    let mut batch = Batch::new();
    let meta =
        SnapshotMeta { index: last, term: TERM, data: SECRET.to_vec().into(), ..SnapshotMeta::default() };
    batch
        .append(group, &[entry(last + 1, SECRET), entry(last + 2, &SECRET.repeat(300))])
        .hard_state(group, HardState { term: 0x7465_726d_7465_726d, vote: 7, commit: last })
        .snapshot_meta(group, &meta)
        .put_meta(group, SECRET, SECRET);
    wal.commit(batch).unwrap();
}

fn read(wal: &Wal, group: GroupId) -> Vec<Entry> {
    let view = wal.group(group).unwrap();
    let mut out = Vec::new();
    wal.entries(group, view.first_index..view.last_index + 1, u64::MAX, &mut out).unwrap();
    out
}

#[test]
fn nothing_that_a_group_holds_is_on_disk_in_the_clear() {
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd(1)] {
        for cache_bytes in [0, 1 << 20] {
            let place = Place::new();
            let open = || {
                let options =
                    Options { compression, compress_above_bytes: 100, cache_bytes, ..place.options() };
                Wal::open(options).unwrap().0
            };
            let wal = open();
            (0..60).for_each(|_| tell(&wal, GroupId(5)));
            let written = read(&wal, GroupId(5));
            wal.gc_once().unwrap();
            wal.close().unwrap();
            let wal = open();
            assert_eq!(read(&wal, GroupId(5)), written);
            assert_eq!(wal.meta(GroupId(5), SECRET).as_deref(), Some(SECRET));
            assert_eq!(wal.group(GroupId(5)).unwrap().snapshot.unwrap().data, SECRET);
            tell(&wal, GroupId(5));
            drop(wal);
            for secret in [SECRET, &SECRET[..12], b"mretmret", &TERM.to_le_bytes(), &varint(TERM)] {
                assert_eq!(place.found(secret), 0, "{compression:?}");
            }
            assert!(place.frames().iter().all(|frame| frame.key == Some(KeyId(1))));
        }
    }
    // The same in a plain log is found, so it was looked for in the right way.
    let place = Place::new();
    let wal = place.plain().unwrap();
    tell(&wal, GroupId(5));
    wal.gc_once().unwrap();
    assert!(place.found(SECRET) > 300 && place.found(b"mretmret") >= 2);
    (0..60).for_each(|_| tell(&wal, GroupId(5)));
    wal.close().unwrap();
    assert!(place.found(&TERM.to_le_bytes()) > 0 && place.found(&varint(TERM)) > 0, "a footer holds terms");
}

#[test]
fn encrypted_logs_behave_as_plain_ones() {
    for seed in 0..6 {
        let place = Place::new();
        let mut rng = Rng(seed);
        let mut model = Model::default();
        let mut wal = place.open();
        for nth in 0..160 {
            let mut batch = Batch::new();
            for _ in 0..1 + rng.below(3) {
                model.apply(GroupId(1 + rng.below(4)), &Op::draw(&mut rng), &mut batch);
            }
            wal.commit(batch).unwrap();
            match nth % 40 {
                13 => {
                    drop(wal);
                    place.fs.crash(nth);
                    wal = place.open();
                }
                21 => {
                    let id = KeyId(2 + nth as u32);
                    place.keys.add(id, key(nth as u8));
                    assert_eq!(wal.rotate_key().unwrap(), Some(id));
                }
                33 => {
                    wal.gc_once().unwrap();
                    wal.close().unwrap();
                    wal = place.open();
                }
                _ => {}
            }
            assert_eq!(model.differs(&wal), None, "seed {seed}, batch {nth}");
        }
        let scrubbed = wal.scrub().unwrap();
        assert!(scrubbed.damaged.is_empty() && scrubbed.damaged_heads.is_empty(), "{scrubbed:?}");
    }
}

#[test]
fn a_key_that_is_not_there_is_refused_by_name_and_nothing_is_written() {
    let place = Place::new();
    let wal = place.open();
    tell(&wal, GroupId(1));
    drop(wal);
    let before = place.fs.image().fingerprint();
    let missing = || match place.try_open() {
        Err(Error::Key { dir, key_id: KeyId(1), fault }) if dir == Path::new(DIR) => fault,
        other => panic!("{other:?}"),
    };
    let none = place.plain().unwrap_err().to_string();
    assert_eq!(
        none,
        "/log needs key 1: it is encrypted and was opened without keys; open it with the keys that it was written with"
    );
    place.keys.add(KeyId(2), key(2));
    place.keys.remove(KeyId(1));
    assert!(matches!(missing(), KeyFault::Missing { provider } if provider == "the keys that were given"));
    place.keys.add(KeyId(1), key(9));
    let wrong = missing();
    assert!(matches!(&wrong, KeyFault::Wrong { file, .. } if file.ends_with("manifest-a")), "{wrong}");
    assert!(wrong.to_string().contains("put the right key back under that number"), "{wrong}");
    place.keys.remove(KeyId(1));
    place.keys.remove(KeyId(2));
    assert!(matches!(place.try_open(), Err(Error::KeySource { .. })));
    assert_eq!(place.fs.image().fingerprint(), before, "a refusal writes nothing");
    place.keys.add(KeyId(1), key(1));
    assert_eq!(read(&place.open(), GroupId(1)).len(), 2);
}

#[test]
fn a_plain_log_becomes_encrypted_segment_by_segment_and_never_plain_again() {
    let place = Place::new();
    let wal = place.plain().unwrap();
    tell(&wal, GroupId(1));
    wal.close().unwrap();
    let wal = place.open();
    tell(&wal, GroupId(1));
    let written = read(&wal, GroupId(1));
    assert_eq!(written.len(), 4);
    drop(wal);
    place.fs.crash(1);
    let keys = |place: &Place| {
        let mut keys: Vec<Option<KeyId>> = place.frames().iter().map(|frame| frame.key).collect();
        keys.dedup();
        keys
    };
    assert_eq!(keys(&place), [None, Some(KeyId(1))]);
    // No checkpoint is encrypted yet, a frame is.
    assert!(matches!(place.plain(), Err(Error::Key { key_id: KeyId(1), fault: KeyFault::NoKeys, .. })));
    let wal = place.open();
    assert_eq!(read(&wal, GroupId(1)), written);
    tell(&wal, GroupId(1));
    wal.gc_once().unwrap();
    wal.close().unwrap();
    assert!(matches!(place.plain(), Err(Error::Key { .. })));
    let wal = place.open();
    assert_eq!(read(&wal, GroupId(1)).len(), 6);
    // Once what was plain is collected, nothing of it is part of the log.
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(1), 4, TERM);
    wal.commit(batch).unwrap();
    wal.gc_once().unwrap();
    wal.close().unwrap();
    assert_eq!(keys(&place), [Some(KeyId(1))]);
}

#[test]
fn keys_change_while_the_log_lives_and_an_old_one_may_go_when_nothing_needs_it() {
    let place = Place::new();
    let wal = place.open();
    tell(&wal, GroupId(1));
    let ids = |wal: &Wal| wal.key_ids_in_use().into_iter().map(|id| id.0).collect::<Vec<_>>();
    assert_eq!(ids(&wal), [1]);
    place.keys.add(KeyId(2), key(2));
    assert_eq!(wal.rotate_key().unwrap(), Some(KeyId(2)));
    assert_eq!(ids(&wal), [1, 2]);
    tell(&wal, GroupId(1));
    assert!(place.frames().iter().all(|frame| frame.key == Some(KeyId(1))), "not before the next segment");
    wal.close().unwrap();
    let wal = place.open();
    tell(&wal, GroupId(2));
    assert!(place.frames().iter().any(|frame| frame.key == Some(KeyId(2))));
    assert_eq!(read(&wal, GroupId(1)).len(), 4);
    assert_eq!(ids(&wal), [1, 2], "the first segment still holds entries");
    // A collection seals anew what little is left of a segment.
    wal.gc_once().unwrap();
    assert_eq!(ids(&wal), [2]);
    let written = read(&wal, GroupId(1));
    assert_eq!(written.len(), 4);
    wal.close().unwrap();
    place.keys.remove(KeyId(1));
    let wal = place.open();
    assert_eq!((read(&wal, GroupId(1)), read(&wal, GroupId(2)).len()), (written, 2));
    // What nobody asked for by name comes with the next segment that is prepared.
    place.keys.add(KeyId(3), key(3));
    for _ in 0..40 {
        tell(&wal, GroupId(2));
    }
    assert!(ids(&wal).contains(&3));
    // A provider that fails does not stop a log that runs.
    place.keys.remove(KeyId(2));
    place.keys.remove(KeyId(3));
    assert!(matches!(wal.rotate_key(), Err(Error::KeySource { .. })));
    tell(&wal, GroupId(2));
}

/// Mends the CRC of a record that was changed on purpose.
fn mend(record: &mut [u8]) {
    let len = u32::from_le_bytes(record[4..8].try_into().unwrap()) as usize;
    let crc = crc32c::crc32c(&record[4..len.clamp(4, record.len())]);
    record[..4].copy_from_slice(&crc.to_le_bytes());
}

/// A closed log with entries in two segments, as (segment, offset, length) of each record of entries.
fn closed() -> (Place, Vec<(PathBuf, usize, usize)>) {
    let place = Place::new();
    for _ in 0..2 {
        let wal = place.open();
        for group in [GroupId(1), GroupId(2)] {
            let last = wal.group(group).map_or(0, |view| view.last_index);
            let mut batch = Batch::new();
            batch.append(group, &[entry(last + 1, &[group.0 as u8; 100])]);
            wal.commit(batch).unwrap();
        }
        wal.close().unwrap();
    }
    let mut records = Vec::new();
    for frame in place.frames() {
        for record in frame.records.unwrap().iter().filter(|record| record.entries.is_some()) {
            records.push((frame.path.clone(), record.offset as usize, record.bytes as usize));
        }
    }
    assert_eq!(records.len(), 4);
    assert_ne!(records[0].0, records[2].0);
    (place, records)
}

/// What a reader of all entries meets.
fn damaged_groups(place: &Place) -> Vec<u64> {
    let wal = match Wal::open(place.options()) {
        Ok((wal, _)) => wal,
        Err(error) => panic!("{error}"),
    };
    let groups = wal.groups().into_iter();
    let damaged = groups.filter(|group| {
        let view = wal.group(*group).unwrap();
        wal.entries(*group, 1..view.last_index + 1, u64::MAX, &mut Vec::new()).is_err()
    });
    damaged.map(|group| group.0).collect()
}

#[test]
fn each_bit_of_a_record_that_is_changed_on_purpose_is_noticed() {
    let (place, records) = closed();
    let image = place.fs.image();
    let (path, offset, len) = records[0].clone();
    // The CRC is mended, so bits in it are not looked at; the length decides what it covers.
    for bit in 8 * 8..len * 8 {
        place.fs.restore(&image);
        place.fs.tamper(&path, |bytes| {
            bytes[offset + bit / 8] ^= 1 << (bit % 8);
            mend(&mut bytes[offset..offset + len]);
        });
        assert_eq!(damaged_groups(&place), [1], "bit {bit}");
    }
}

#[test]
fn records_in_each_others_places_are_refused() {
    let (place, records) = closed();
    let image = place.fs.image();
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 3), (3, 0)] {
        place.fs.restore(&image);
        let (path, offset, len) = records[from].clone();
        let mut bytes = bytes_of(&place.fs, &path)[offset..offset + len].to_vec();
        let (path, at, other_len) = &records[to];
        assert_eq!(len, *other_len);
        // The head that the directory asks for, so that nothing but the tag can object.
        bytes[8..32].copy_from_slice(&bytes_of(&place.fs, path)[at + 8..at + 32]);
        mend(&mut bytes);
        place.fs.patch(path, *at as u64, &bytes).unwrap();
        let hit = [1, 2, 1, 2][to];
        assert_eq!(damaged_groups(&place), [hit], "{from} to {to}");
    }
}

/// Changes a field of a frame's head where it stands and mends the CRC.
fn forge(place: &Place, path: &Path, offset: usize, at: usize, value: &[u8]) {
    let forged = place.fs.tamper(path, |bytes| {
        let head = &mut bytes[offset..offset + 256];
        head[at..at + value.len()].copy_from_slice(value);
        let crc = crc32c::crc32c(&head[12..]);
        head[8..12].copy_from_slice(&crc.to_le_bytes());
    });
    forged.unwrap();
}

#[test]
fn a_forged_head_is_as_good_as_none() {
    let (place, _) = closed();
    let image = place.fs.image();
    let frames = place.frames();
    let victim =
        frames.iter().find(|frame| frame.records.as_ref().is_some_and(|records| !records.is_empty()));
    let victim = victim.unwrap();
    // LSN, durable_seq, number of records, cut, checkpoint, cipher, key, each of its tags.
    let fields = [
        (96, 9),
        (88, 1),
        (104, 0),
        (152, 77),
        (160, 1),
        (184, 1),
        (73, 0),
        (76, 1),
        (192, 1),
        (208, 1),
        (224, 1),
    ];
    for (at, value) in fields {
        place.fs.restore(&image);
        let mut byte = [0];
        place.fs.peek(&victim.path, victim.offset + at as u64, &mut byte);
        let value = if byte[0] == value { value + 1 } else { value };
        forge(&place, &victim.path, victim.offset as usize, at, &[value]);
        match Wal::open(place.options()) {
            // The next frame carries its head: known to be gone, and whom it hits.
            Ok((_, report)) => {
                assert_eq!(report.lost_frames, 1, "byte {at}: {report:?}");
                assert!(
                    report.damaged.iter().all(|record| record.why == DamageWhy::Gone),
                    "byte {at}: {report:?}"
                );
                assert_eq!(report.damaged_groups.len(), 1, "byte {at}: {report:?}");
            }
            Err(Error::Key { .. }) if at == 76 => {}
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
}

/// Appends a plain watermark frame that fits: whoever may write to the disk needs no key for that.
fn forge_a_plain_frame(place: &Place) {
    let frames = place.frames();
    let last = frames.iter().rfind(|frame| frame.is_watermark).unwrap();
    let at = last.offset + last.bytes;
    let mut forged = bytes_of(&place.fs, &last.path)[last.offset as usize..][..4096].to_vec();
    // Neither cipher nor key, tags nor a carried head.
    for field in [73..74, 76..80, 124..128, 192..240] {
        forged[field].fill(0);
    }
    forged[52..56].copy_from_slice(&((at / 4096) as u32).to_le_bytes());
    forged[80..88].copy_from_slice(&(last.seq + 1).to_le_bytes());
    let crc = crc32c::crc32c(&forged[12..256]);
    forged[8..12].copy_from_slice(&crc.to_le_bytes());
    place.fs.patch(&last.path, at, &forged).unwrap();
}

#[test]
fn plain_frames_do_not_pass_in_an_encrypted_log() {
    for (encrypted, more) in [(false, 1), (true, 0)] {
        let place = Place::new();
        let keys = |options: Options| if encrypted { options } else { Options { keys: None, ..options } };
        let frames = || Wal::open(keys(place.options())).unwrap().1.frames;
        let (wal, _) = Wal::open(keys(place.options())).unwrap();
        tell(&wal, GroupId(1));
        wal.gc_once().unwrap();
        wal.close().unwrap();
        let before = (frames(), place.frames().len());
        forge_a_plain_frame(&place);
        assert_eq!((frames(), place.frames().len()), (before.0 + more, before.1 + more as usize));
    }
}

/// Plays a long run with crashes; how many nonces were used. Panics when one is used twice.
fn count_nonces(seed: u64) -> usize {
    watch_nonces(true);
    let place = Place::new();
    let mut rng = Rng(seed);
    let mut model = Model::default();
    let mut wal = place.open();
    for nth in 0..250 {
        let mut batch = Batch::new();
        let ops = [Op::Append { back: 0, count: 1, bytes: 30_000 }, Op::Truncate { keep: 1 }];
        let group = GroupId(1 + rng.below(3));
        match rng.below(3) {
            0 => ops.iter().for_each(|op| model.apply(group, op, &mut batch)),
            _ => model.apply(group, &Op::draw(&mut rng), &mut batch),
        }
        let end = rng.below(40);
        if end < 3 {
            // It ends while this batch is on its way.
            let sink = Arc::new(support::Told::default());
            let door = wal.submitter(sink);
            let room = door.try_reserve_internal(GroupId(1));
            door.submit(batch, room, 1).unwrap();
            for _ in 0..rng.below(8) {
                wal.step();
            }
            drop((wal, door));
            match end {
                0 => place.fs.kill(),
                _ => place.fs.crash(rng.next()),
            }
            wal = place.open_torn();
            model = Model::default();
            wal.groups().into_iter().for_each(|group| {
                let mut batch = Batch::new();
                batch.destroy(group, 0);
                wal.commit(batch).unwrap();
            });
            model.salt(seed << 32 | nth);
            continue;
        }
        if let Err(error) = wal.commit(batch) {
            panic!("seed {seed}, batch {nth}: {error}");
        }
        if rng.below(30) == 0 {
            place.keys.add(KeyId(100 + nth as u32), key(nth as u8));
        }
    }
    drop(wal);
    watch_nonces(false)
}

#[test]
fn no_key_ever_meets_a_nonce_with_two_contents() {
    let nonces: usize = (0..12).map(count_nonces).sum();
    assert!(nonces > 5_000, "{nonces} nonces");
}

#[test]
fn a_key_without_the_epoch_is_noticed() {
    break_rule(Some(Rule::EpochInKey));
    let noticed = std::panic::catch_unwind(|| (0..12).map(count_nonces).sum::<usize>());
    break_rule(None);
    watch_nonces(false);
    let message = noticed.unwrap_err();
    let message = message.downcast_ref::<String>().unwrap();
    assert!(message.contains("meets the nonce"), "{message}");
}

#[test]
fn a_tag_that_is_not_checked_is_noticed() {
    let (place, records) = closed();
    let (path, offset, len) = records[0].clone();
    place.fs.tamper(&path, |bytes| {
        bytes[offset + 60] ^= 1;
        mend(&mut bytes[offset..offset + len]);
    });
    assert_eq!(damaged_groups(&place), [1]);
    break_rule(Some(Rule::TagsChecked));
    let damaged = damaged_groups(&place);
    break_rule(None);
    assert!(damaged.is_empty(), "what the tests above ask for comes from the tags alone: {damaged:?}");
}

impl Place {
    fn open_torn(&self) -> Wal {
        let (wal, report) = Wal::open(self.options()).unwrap();
        assert!(report.damaged.is_empty() && report.lost_frames == 0, "{report:?}");
        wal
    }
}

#[test]
fn tools_see_what_needs_no_key_and_say_what_they_did_not_see() {
    let (place, records) = closed();
    let fs = || Arc::new(place.fs.clone());
    let blind = tools::check(fs(), Path::new(DIR), None).unwrap();
    assert_eq!((blind.is_whole(), blind.sealed, blind.entries), (true, Some(KeyId(1)), 0));
    assert_eq!(blind.records, 4);
    let keys: Arc<dyn KeyProvider> = place.keys.clone();
    let seen = tools::check(fs(), Path::new(DIR), Some(keys.clone())).unwrap();
    assert_eq!((seen.is_whole(), seen.sealed, seen.entries), (true, None, 4));
    assert!(matches!(WalReader::open(fs(), Path::new(DIR)), Err(Error::Key { fault: KeyFault::NoKeys, .. })));
    let reader = WalReader::open_with(fs(), Path::new(DIR), Some(keys.clone())).unwrap();
    assert_eq!(reader.key_ids_in_use().into_iter().collect::<Vec<_>>(), [KeyId(1)]);
    // A copy needs them, too, and is encrypted with them.
    let target = |keys| Options { dir: "/copy".into(), keys, ..place.options() };
    assert!(matches!(tools::copy(Path::new(DIR), target(None)), Err(Error::Key { .. })));
    let report = tools::copy(Path::new(DIR), target(Some(keys.clone()))).unwrap();
    assert_eq!(report.losing().count(), 0);
    let copy = WalReader::open_with(fs(), Path::new("/copy"), Some(keys.clone())).unwrap();
    let mut entries = Vec::new();
    copy.entries(GroupId(2), 1..3, u64::MAX, &mut entries).unwrap();
    assert_eq!(entries.len(), 2);
    assert!(WalReader::open(fs(), Path::new("/copy")).is_err());
    // What was changed on purpose is seen with the keys only.
    let (path, offset, len) = &records[0];
    place.fs.tamper(path, |bytes| {
        bytes[offset + 40] ^= 1;
        mend(&mut bytes[*offset..offset + len]);
    });
    assert!(tools::check(fs(), Path::new(DIR), None).unwrap().is_whole());
    assert!(!tools::check(fs(), Path::new(DIR), Some(keys)).unwrap().is_whole());
}

#[test]
fn a_real_log_with_a_key_file_is_rotated_without_a_restart() {
    let parent = tempfile::tempdir().unwrap();
    let (dir, file) = (parent.path().join("log"), parent.path().join("keys"));
    KeyFile::create(&file).unwrap();
    let open = || {
        let keys: Arc<dyn KeyProvider> = Arc::new(KeyFile::open(&file).unwrap());
        Wal::open(Options { segment_bytes: 1 << 20, keys: Some(keys), seed: 1, ..Options::new(&dir) })
            .unwrap()
            .0
    };
    assert_eq!(Options::new(&dir).driver, DriverMode::Threads);
    let wal = open();
    tell(&wal, GroupId(1));
    assert_eq!(KeyFile::rotate(&file).unwrap(), KeyId(2));
    assert_eq!(wal.rotate_key().unwrap(), Some(KeyId(2)));
    let write = |wal: &Wal| (0..400).for_each(|_| tell(wal, GroupId(1)));
    write(&wal);
    assert_eq!(wal.key_ids_in_use().into_iter().collect::<Vec<_>>(), [KeyId(1), KeyId(2)]);
    let (written, incarnation) = (read(&wal, GroupId(1)), wal.incarnation());
    wal.close().unwrap();
    let wal = open();
    assert_eq!(read(&wal, GroupId(1)), written);
    assert_ne!(wal.incarnation(), incarnation);
    write(&wal);
    wal.close().unwrap();
    let reader = Wal::open_read_only(&dir).err().map(|error| error.to_string()).unwrap();
    assert!(reader.contains("opened without keys"), "{reader}");
}
