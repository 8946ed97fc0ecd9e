//! Bodies of the fuzz targets: bytes in, no panic out. Behind the feature `testing`, not part of the interface.
//!
//! Random bytes hardly ever have a right CRC, so most bodies mend the CRCs of what they are given: then the decoders behind
//! them meet nonsense too. That is more than the fault model asks for, which leaves out bytes that were changed on purpose.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;

use crate::{
    Batch, Clock, DataKey, DriverMode, Entry, Fs, GroupId, HardState, KEY_BYTES, KeyId, KeyProvider, KeySet,
    Options, RecoveryReport, SnapshotMeta, Wal,
    codec::Decoder,
    crypt::Keyring,
    frame::{BLOCK, FRAME_HEADER, FrameHeader, Probe},
    fs::{FileOp, OpenMode},
    manifest::Manifest,
    record::{self, Body},
    recovery,
    rng::Rng,
    segment::Segment,
    sim::{SimFs, SimImage},
};

const DIR: &str = "/log";
const STORE: u128 = 7;
const EPOCH: u128 = 9;
const SEGMENT_BYTES: usize = 256 << 10;

/// A target by name.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 4] =
    [("record", record), ("segment", segment), ("manifest", manifest), ("directory", directory)];

/// One record, as it is and with its CRC mended.
pub fn record(input: &[u8]) {
    let mut mended = input.to_vec();
    mend_record(&mut mended);
    for bytes in [input, &mended] {
        let Some(head) = record::decode_head(bytes) else { continue };
        let sound = record::verify_self(bytes);
        let Some((decoded, body)) = record::decode(&Bytes::copy_from_slice(bytes)) else { continue };
        assert_eq!(head, decoded);
        assert!(!sound || record::verify(bytes, &head));
        if let Body::Entries(entries) = body {
            let mut count = 0;
            entries.read(0, u64::MAX, |entry| {
                assert_eq!(entry.index, entries.first + count);
                count += 1;
                true
            });
            assert_eq!(count, entries.count as u64);
            assert!(entries.term_runs().count() <= entries.count);
        }
        let mut line = Vec::new();
        head.encode_dir(&mut line);
        assert_eq!(record::Head::decode_dir(&mut Decoder(&line)), Some(head));
    }
}

/// One manifest, as it is and with its CRCs mended.
pub fn manifest(input: &[u8]) {
    let mut mended = input.to_vec();
    mend_manifest(&mut mended);
    for bytes in [input, &mended] {
        let keyring = Keyring::new(Path::new(DIR), None).expect("no provider fails");
        if let Ok(mut manifest) = Manifest::decode(bytes, &keyring) {
            let again = manifest.encode(&keyring, &mut Rng::new(1));
            assert_eq!(Manifest::decode(&again, &keyring).ok(), Some(manifest));
        }
    }
}

/// The frames of a segment, their CRCs mended, through scan, chain and replay.
pub fn segment(input: &[u8]) {
    let mut bytes = input[..input.len().min(SEGMENT_BYTES)].to_vec();
    bytes.resize(SEGMENT_BYTES, 0);
    for block in 0..SEGMENT_BYTES / BLOCK {
        let head = &mut bytes[block * BLOCK..];
        if head.starts_with(b"PNTNFRAM") || head.starts_with(b"PNTNCOPY") {
            head[16..32].copy_from_slice(&STORE.to_le_bytes());
            head[32..48].copy_from_slice(&EPOCH.to_le_bytes());
            head[48..52].copy_from_slice(&1u32.to_le_bytes());
            if head[3] == b'N' && head[4] == b'F' {
                head[52..56].copy_from_slice(&(block as u32).to_le_bytes());
            }
            mend_frame(head);
        }
    }
    let fs = SimFs::new();
    let path = Path::new("/segment");
    let file = fs.open(path, OpenMode::Create).expect("the disk is empty");
    let written = file.submit(FileOp::Write { offset: 0, data: bytes.into() });
    written.wait().expect("the disk has room");
    let segment = Arc::new(Segment::new(1, EPOCH, path.to_owned(), file));
    recovery::replay_one(&segment, STORE, SEGMENT_BYTES as u64);
}

/// Recovery of a whole directory. The input is a row of edits of a small log that was closed.
pub fn directory(input: &[u8]) {
    static BASES: [OnceLock<SimImage>; 2] = [OnceLock::new(), OnceLock::new()];
    let (mends, sealed, edits) = match input.split_first() {
        Some((first, edits)) => (first & 1 == 1, first & 2 == 2, edits),
        None => (false, false, input),
    };
    let fs = SimFs::from_image(BASES[usize::from(sealed)].get_or_init(|| small_log(sealed)));
    edits.as_chunks::<8>().0.iter().take(64).for_each(|edit| apply(&fs, edit));
    if mends {
        mend_all(&fs);
    }
    fs.lose_patience_after(2_000);
    let Ok((wal, report)) = open(&fs, 5, sealed) else { return };
    let damaged = use_all(&wal, &report);
    drop(wal);
    fs.crash(u64::from(input.len() as u32));
    // What was opened once opens again, and nobody is healed by that.
    match open(&fs, 6, sealed) {
        Ok((wal, report)) => assert!(mends || use_all(&wal, &report) >= damaged),
        Err(error) => assert!(mends, "a log that opened does not open again: {error}"),
    }
}

/// Reads everything and writes something. How many groups are damaged.
fn use_all(wal: &Wal, report: &RecoveryReport) -> usize {
    for group in wal.groups() {
        let Some(view) = wal.group(group) else { continue };
        let mut out = Vec::new();
        let last = view.last_index.min(view.first_index + 1_000);
        let read = wal.entries(group, view.first_index..last.saturating_add(1), 1 << 20, &mut out);
        assert_eq!(view.damaged.is_some(), report.damaged_groups.contains_key(&group));
        // Behind a footer, rot shows when it is read, and from then on.
        let is_damaged = wal.group(group).is_some_and(|view| view.damaged.is_some());
        assert!(report.footers > 0 || is_damaged == view.damaged.is_some());
        assert!(read.is_ok() != is_damaged || out.is_empty(), "{group}: {read:?}");
    }
    let mut batch = Batch::new();
    batch.put_meta(GroupId(u64::MAX), b"key", b"value");
    if wal.commit(batch).is_ok() {
        assert_eq!(wal.meta(GroupId(u64::MAX), b"key").as_deref(), Some(&b"value"[..]));
    }
    report.damaged_groups.len()
}

struct NoTime;

impl Clock for NoTime {
    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

fn open(fs: &SimFs, seed: u64, sealed: bool) -> crate::Result<(Wal, RecoveryReport)> {
    let keys = || Arc::new(KeySet::new(KeyId(1), DataKey::new([1; KEY_BYTES]))) as Arc<dyn KeyProvider>;
    Wal::open(Options {
        keys: sealed.then(keys),
        fs: Arc::new(fs.clone()),
        segment_bytes: SEGMENT_BYTES as u64,
        cache_bytes: 0,
        seed,
        clock: Arc::new(NoTime),
        driver: DriverMode::Manual,
        prepared_segments: 1,
        ..Options::new(DIR)
    })
}

/// A log with a bit of everything, of two opens.
fn small_log(sealed: bool) -> SimImage {
    let fs = SimFs::new();
    for open_nth in 0..2 {
        let (wal, _) = open(&fs, open_nth, sealed).expect("the disk is sound");
        for round in 0..12 {
            let mut batch = Batch::new();
            let group = GroupId(1 + round % 4);
            let first = wal.group(group).map_or(1, |view| view.last_index + 1);
            let entries: Vec<Entry> = (first..first + 3)
                .map(|index| Entry {
                    index,
                    term: round,
                    kind: 0,
                    data: vec![round as u8; 700 * (round % 3) as usize].into(),
                })
                .collect();
            batch
                .append(group, &entries)
                .hard_state(group, HardState { term: round, vote: 1, commit: first });
            match round {
                5 => drop(batch.truncate_prefix(group, first, round).put_meta(group, b"k", b"v")),
                7 => drop(batch.snapshot(GroupId(9), &SnapshotMeta { index: 4, ..SnapshotMeta::default() })),
                9 => drop(batch.destroy(GroupId(3), 8)),
                _ => {}
            }
            wal.commit(batch).expect("the disk is sound");
        }
        wal.gc_once().expect("the disk is sound");
        wal.close().expect("the disk is sound");
    }
    fs.image()
}

/// One edit: which file, what, where, with what.
fn apply(fs: &SimFs, edit: &[u8; 8]) {
    let files = fs.files();
    let (path, len) = &files[edit[0] as usize % files.len()];
    if *len == 0 {
        return;
    }
    let block = u64::from(edit[2]) % 24 * BLOCK as u64;
    let offset = match edit[1] >> 4 {
        // Heads are where it hurts.
        0..8 => block + u64::from(edit[3]),
        _ => block + u64::from(u16::from_le_bytes([edit[3], edit[4]])) % BLOCK as u64,
    };
    let offset = offset.min(len - 1);
    let room = (len - offset) as usize;
    match edit[1] & 15 {
        0..6 => {
            let mut byte = [0];
            fs.peek(path, offset, &mut byte);
            fs.patch(path, offset, &[byte[0] ^ edit[5].max(1)]);
        }
        6..9 => {
            let word =
                [0, 1, u64::MAX, 1 << 31, 1 << 32, 1 << 63, 4096, u64::from(edit[6])][edit[5] as usize % 8];
            let width = [1, 2, 4, 8][edit[7] as usize % 4].min(room);
            fs.patch(path, offset, &word.to_le_bytes()[..width]);
        }
        9 => drop(fs.patch(path, offset / 512 * 512, &vec![0; 512.min((len - offset / 512 * 512) as usize)])),
        10 => drop(fs.patch(path, offset, &vec![edit[5]; (edit[6] as usize + 1).min(room)])),
        11..13 => {
            let mut copied = vec![0; BLOCK];
            fs.peek(path, u64::from(edit[5]) % 24 * BLOCK as u64, &mut copied);
            copied.truncate((len - block.min(len - 1)) as usize);
            fs.patch(path, block.min(len - 1), &copied);
        }
        13 => drop(fs.cut(path, offset)),
        14 => drop(fs.remove_file(path).and_then(|()| fs.sync_dir(Path::new(DIR)))),
        _ => drop(fs.patch(path, offset, &edit[4..].repeat(4)[..16.min(room)])),
    }
}

fn mend_all(fs: &SimFs) {
    for (path, len) in fs.files() {
        let is_manifest = path.to_string_lossy().contains("manifest");
        fs.tamper(&path, |bytes| {
            if is_manifest {
                return mend_manifest(bytes);
            }
            for block in 0..len as usize / BLOCK {
                let head = &mut bytes[block * BLOCK..];
                if head.starts_with(b"PNTNFRAM") || head.starts_with(b"PNTNCOPY") {
                    mend_frame(head);
                }
            }
        });
    }
}

fn word(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..at + 4).map_or(0, |word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]) as usize)
}

fn put_crc(bytes: &mut [u8], at: usize, from: usize, to: usize) {
    if from <= to && to <= bytes.len() {
        let crc = crc32c::crc32c(&bytes[from..to]);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

fn mend_record(record: &mut [u8]) {
    let len = word(record, 4);
    put_crc(record, 0, 4, len);
}

/// Mends directory, header and the records that the directory announces.
fn mend_frame(frame: &mut [u8]) {
    if frame.len() < FRAME_HEADER {
        return;
    }
    let dir_len = word(frame, 112);
    put_crc(frame, 116, FRAME_HEADER, FRAME_HEADER.saturating_add(dir_len));
    put_crc(frame, 8, 12, FRAME_HEADER);
    let Probe::Frame(header) = FrameHeader::probe(frame) else { return };
    let Some(heads) = frame.get(FRAME_HEADER..).and_then(|dir| header.directory(dir)) else { return };
    let mut at = header.records_offset as usize;
    for head in heads {
        if let Some(record) = frame.get_mut(at..) {
            mend_record(record);
        }
        at = at.saturating_add(head.padded());
    }
}

fn mend_manifest(bytes: &mut [u8]) {
    if bytes.len() < 128 {
        return;
    }
    let body_len = word(bytes, 56);
    put_crc(bytes, 64, BLOCK, BLOCK.saturating_add(body_len));
    put_crc(bytes, 8, 12, 128);
}
