//! Rot: whatever acknowledged byte changes on disk is invisible, or it is reported with the groups that it hits and the
//! others go on. Nothing acknowledged is ever missing in silence.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use pontoon_wal::{Error, Fs, GroupId, RecoveryReport, Wal, sim::SimFs};

#[path = "support/lib.rs"]
mod support;

use support::{HandClock, Model, Rng, Script, bytes_of, damage, open, restarted_now_and_then};

const SECTOR: usize = 512;

/// A log that was closed after a script, with a crash or a clean restart now and then, and the model of it.
fn closed_log(seed: u64, batches: usize) -> (SimFs, Model) {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let mut script = Script::draw(seed, batches, 6);
    let (mut wal, _) = open(&fs, &clock, seed).unwrap();
    for (nth, batch) in script.batches.drain(..).enumerate() {
        wal.commit(batch).unwrap();
        if nth % 3 == 0 {
            while wal.step() {}
        }
        wal = restarted_now_and_then(wal, nth, &fs, &clock, seed);
    }
    wal.close().unwrap();
    (fs, script.states.pop().unwrap())
}

fn segments(fs: &SimFs) -> Vec<PathBuf> {
    let files = fs.files().into_iter().map(|(path, _)| path);
    files.filter(|path| path.to_string_lossy().ends_with(".wal")).collect()
}

/// Checks a damaged log: each group is as the model says, or is reported and refuses to answer. Returns the groups hit.
fn check(fs: &SimFs, model: &Model, context: &str) -> BTreeSet<GroupId> {
    let clock = Arc::new(HandClock::default());
    let (wal, report): (Wal, RecoveryReport) = match open(fs, &clock, 99) {
        Ok(opened) => opened,
        Err(error) => panic!("{context}: {error}"),
    };
    let (damaged, hit) = damage(&wal, &report);
    for group in model.groups.keys().chain(&wal.groups()) {
        match model.group_differs(&wal, *group) {
            None => {}
            Some(difference) => {
                assert!(hit.contains(group), "{context}: {group} differs in silence: {difference}")
            }
        }
        if hit.contains(group) {
            assert!(wal.group(*group).unwrap().damaged.is_some());
            assert!(matches!(wal.term(*group, 1), Err(Error::Damaged { .. })), "{context}");
            assert!(
                damaged.iter().any(|record| record.group == *group) || report.lost_frames > 0,
                "{context}: the report names the record that hits {group}: {report:?}"
            );
        }
    }
    for (group, id) in &model.tombstones {
        assert_eq!(wal.tombstone(*group), Some(*id), "{context}: tombstone of {group}");
    }
    hit
}

/// Changes one file, checks, and puts the disk back.
fn with_change(
    fs: &SimFs,
    model: &Model,
    path: &Path,
    context: &str,
    change: impl FnOnce(&mut Vec<u8>),
) -> usize {
    let image = fs.image();
    fs.tamper(path, change).unwrap();
    let hit = check(fs, model, context);
    fs.restore(&image);
    hit.len()
}

#[test]
fn each_zeroed_sector_is_invisible_or_reported() {
    let (fs, model) = closed_log(3, 60);
    let mut reported = 0;
    for path in segments(&fs) {
        let bytes = bytes_of(&fs, &path);
        for sector in 0..bytes.len() / SECTOR {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            if bytes[range.clone()].iter().all(|byte| *byte == 0) {
                continue;
            }
            let context = format!("{} sector {sector}", path.display());
            let hit = with_change(&fs, &model, &path, &context, |bytes| bytes[range].fill(0));
            assert!(hit <= 6);
            reported += usize::from(hit > 0);
        }
    }
    assert!(reported > 20, "the script must have something to lose: {reported}");
}

#[test]
fn each_zeroed_block_is_invisible_or_reported() {
    let (fs, model) = closed_log(4, 60);
    for path in segments(&fs) {
        let bytes = bytes_of(&fs, &path);
        for block in 0..bytes.len() / 4096 {
            let range = block * 4096..(block + 1) * 4096;
            if bytes[range.clone()].iter().any(|byte| *byte != 0) {
                let context = format!("{} block {block}", path.display());
                with_change(&fs, &model, &path, &context, |bytes| bytes[range].fill(0));
            }
        }
    }
}

#[test]
fn flipped_bits_are_invisible_or_reported() {
    let (fs, model) = closed_log(5, 40);
    let mut rng = Rng(5);
    for path in segments(&fs) {
        let bytes = bytes_of(&fs, &path);
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        for _ in 0..used.min(600) {
            let (at, bit) = (rng.below(used as u64) as usize, rng.below(8));
            let context = format!("{} byte {at} bit {bit}", path.display());
            with_change(&fs, &model, &path, &context, |bytes| bytes[at] ^= 1 << bit);
        }
    }
}

#[test]
fn either_manifest_may_rot() {
    let (fs, model) = closed_log(6, 120);
    for name in ["/log/manifest-a", "/log/manifest-b"] {
        let path = PathBuf::from(name);
        for at in [0, 20, 4100] {
            let hit = with_change(&fs, &model, &path, name, |bytes| bytes[at] ^= 1);
            assert_eq!(hit, 0, "{name}");
        }
    }
}

#[test]
fn a_segment_that_is_missing_or_short_is_named() {
    let (fs, model) = closed_log(7, 40);
    let (image, clock) = (fs.image(), Arc::new(HandClock::default()));
    let mut named = 0;
    for path in segments(&fs) {
        for missing in [false, true] {
            match missing {
                true => fs.remove_file(&path).unwrap(),
                false => fs.tamper(&path, |bytes| bytes.truncate(4096)).unwrap(),
            }
            match open(&fs, &clock, 1) {
                Err(Error::Corrupt { path: found, .. }) => named += usize::from(found == path),
                Err(error) => panic!("{error}"),
                // No manifest lists it: nobody misses it.
                Ok((wal, _)) => assert_eq!(model.differs(&wal), None),
            }
            fs.restore(&image);
        }
    }
    assert!(named >= 4, "{named}");
}

#[test]
fn a_block_in_anothers_place_is_not_taken_for_it() {
    let (fs, model) = closed_log(8, 40);
    let path = segments(&fs).remove(0);
    for (from, to) in [(1, 2), (2, 1), (3, 9), (0, 5)] {
        let context = format!("block {from} over block {to}");
        with_change(&fs, &model, &path, &context, |bytes| {
            bytes.copy_within(from * 4096..(from + 1) * 4096, to * 4096)
        });
    }
}

#[test]
fn a_damaged_group_stays_dead_until_it_is_destroyed() {
    let (fs, model) = closed_log(3, 60);
    // The first block whose loss hits somebody.
    let image = fs.image();
    let blocks = segments(&fs).into_iter().flat_map(|path| (1..64).map(move |block| (path.clone(), block)));
    let (_, block) = blocks
        .into_iter()
        .find(|(path, block)| {
            fs.restore(&image);
            fs.tamper(path, |bytes| bytes[block * 4096..(block + 1) * 4096].fill(0)).unwrap();
            !check(&fs, &model, "search").is_empty()
        })
        .expect("some block holds something that is needed");
    let clock = Arc::new(HandClock::default());
    let (wal, report) = open(&fs, &clock, 1).unwrap();
    let group = *damage(&wal, &report).1.first().unwrap();
    let mut batch = pontoon_wal::Batch::new();
    batch.hard_state(group, pontoon_wal::HardState { term: 1000, vote: 1, commit: 0 });
    assert!(matches!(wal.commit(batch), Err(Error::Damaged { .. })), "block {block}");
    // A checkpoint remembers it, and so does the next open.
    let mut batch = pontoon_wal::Batch::new();
    batch.put_meta(GroupId(500), b"k", b"v");
    wal.commit(batch).unwrap();
    wal.gc_once().unwrap();
    wal.close().unwrap();
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    assert!(wal.group(group).unwrap().damaged.is_some());
    let mut batch = pontoon_wal::Batch::new();
    batch.destroy(group, 77).put_meta(group, b"new", b"life");
    wal.commit(batch).unwrap();
    assert_eq!(wal.group(group).unwrap().damaged, None);
    wal.close().unwrap();
    let (wal, _) = open(&fs, &clock, 3).unwrap();
    assert_eq!(wal.group(group).unwrap().damaged, None);
    assert_eq!(wal.meta(group, b"new").as_deref(), Some(&b"life"[..]));
    assert!(wal.tombstone(group) >= Some(77));
}
