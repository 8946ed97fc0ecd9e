//! Compressed payloads: read from memory, from disk and after a reopen, cut and damaged like any others.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a byte of a real file is changed behind the log's back"
)]

use std::{fs, os::unix::fs::FileExt, path::Path};

use pontoon_wal::{Batch, Compression, Entry, Error, GroupId, HardState, Options, Wal};

const GROUP: GroupId = GroupId(4);

fn options(dir: &Path, compression: Compression) -> Options {
    let mut options = Options::new(dir.join("wal"));
    options.segment_bytes = 1 << 20;
    options.cache_bytes = 0;
    options.compression = compression;
    options
}

fn entry(index: u64, term: u64, bytes: usize) -> Entry {
    Entry { index, term, kind: 0, data: vec![index as u8; bytes].into() }
}

fn append(wal: &Wal, entries: &[Entry]) {
    let mut batch = Batch::new();
    batch.append(GROUP, entries).hard_state(GROUP, HardState { term: 9, vote: 1, commit: 1 });
    wal.commit(batch).unwrap();
}

fn read(wal: &Wal, low: u64, high: u64) -> Result<Vec<Entry>, Error> {
    let mut out = Vec::new();
    wal.entries(GROUP, low..high, u64::MAX, &mut out).map(|()| out)
}

#[test]
fn a_log_may_change_its_compression_and_reads_what_each_time_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected: Vec<Entry> = Vec::new();
    for (nth, compression) in
        [Compression::None, Compression::Lz4, Compression::Zstd(3), Compression::None].into_iter().enumerate()
    {
        let (wal, report) = Wal::open(options(dir.path(), compression)).unwrap();
        assert!(report.damaged.is_empty() && report.torn.is_none(), "{report:?}");
        let next = expected.last().map_or(1, |entry| entry.index + 1);
        // Small ones and large ones, of two terms in one batch.
        let new: Vec<Entry> = (next..next + 6)
            .map(|index| entry(index, nth as u64 + index % 6 / 3, 10 + (index % 2) as usize * 20_000))
            .collect();
        append(&wal, &new);
        expected.extend(new);
        let end = expected.len() as u64 + 1;
        assert_eq!(read(&wal, 1, end).unwrap(), expected);
        assert_eq!(read(&wal, 3, end - 1).unwrap(), expected[2..expected.len() - 1]);
        // A conflicting suffix that begins inside a record.
        let changed = entry(end - 2, 20, 30_000);
        expected.truncate(end as usize - 3);
        expected.push(changed.clone());
        append(&wal, &[changed]);
        assert_eq!(read(&wal, 1, end - 1).unwrap(), expected);
        for entry in &expected {
            assert_eq!(wal.term(GROUP, entry.index).unwrap(), entry.term);
        }
        wal.close().unwrap();
    }
    let (wal, _) = Wal::open(options(dir.path(), Compression::None)).unwrap();
    assert_eq!(read(&wal, 1, expected.len() as u64 + 1).unwrap(), expected);
}

#[test]
fn compression_saves_what_it_promises_and_damage_in_it_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (wal, _) = Wal::open(options(dir.path(), Compression::Lz4)).unwrap();
    append(&wal, &[entry(1, 1, 200_000)]);
    let live = wal.usage().live_bytes;
    assert!(live < 4_000, "{live} bytes of log for 200,000 that repeat");
    wal.close().unwrap();

    // One byte of the compressed payload.
    let segments = fs::read_dir(dir.path().join("wal")).unwrap().map(|file| file.unwrap().path());
    let mut hit = 0;
    for path in segments.filter(|path| path.extension().is_some_and(|end| end == "wal")) {
        let bytes = fs::read(&path).unwrap();
        let row = [1u64.to_le_bytes().as_slice(), &200_000u32.to_le_bytes()].concat();
        if let Some(at) = bytes.windows(row.len()).position(|window| window == row) {
            let file = fs::File::options().write(true).open(&path).unwrap();
            file.write_all_at(&[!bytes[at + 60]], at as u64 + 60).unwrap();
            hit += 1;
        }
    }
    assert_eq!(hit, 1);
    let (wal, report) = Wal::open(options(dir.path(), Compression::None)).unwrap();
    assert!(report.damaged_groups.contains_key(&GROUP), "{report:?}");
    assert!(matches!(read(&wal, 1, 2), Err(Error::Damaged { .. })));
}

#[test]
fn a_level_that_does_not_exist_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = Wal::open(options(dir.path(), Compression::Zstd(40))).expect_err("it is refused");
    assert!(error.to_string().contains("levels 1 to 22"), "{error}");
}

#[test]
fn a_batch_over_the_limit_is_refused_however_well_it_compresses() {
    let dir = tempfile::tempdir().unwrap();
    let (wal, _) = Wal::open(options(dir.path(), Compression::Lz4)).unwrap();
    let mut batch = Batch::new();
    batch.append(GROUP, &[entry(1, 1, wal.max_batch_bytes() as usize)]);
    assert!(matches!(wal.commit(batch), Err(Error::TooLarge { .. })));
    append(&wal, &[entry(1, 1, wal.max_batch_bytes() as usize / 2)]);
}
