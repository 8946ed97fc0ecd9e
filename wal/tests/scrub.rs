//! Rot under an open log: a scrub finds what matters, marks whom it hits, and leaves the others alone.

use std::{path::Path, sync::Arc};

use pontoon_wal::{Batch, Entry, Error, GroupId, HardState, Wal, sim::SimFs};

#[path = "support/lib.rs"]
mod support;

use support::{DIR, HandClock, bytes_of, open};

const GROUPS: u64 = 5;
const ROUNDS: u64 = 60;

/// Entries of a few groups over several segments, some of them truncated.
fn filled(fs: &SimFs) -> Wal {
    let (wal, _) = open(fs, &Arc::new(HandClock::default()), 1).unwrap();
    for index in 1..=ROUNDS {
        let mut batch = Batch::new();
        for group in 1..=GROUPS {
            let data = vec![(group * 40 + index) as u8; 3_000 + index as usize].into();
            batch.append(GroupId(group), &[Entry { index, term: 1, kind: 0, data }]);
            batch.hard_state(GroupId(group), HardState { term: 1, vote: group, commit: index });
        }
        wal.commit(batch).unwrap();
        while wal.step() {}
    }
    let mut batch = Batch::new();
    batch.truncate_prefix(GroupId(1), 20, 1);
    wal.commit(batch).unwrap();
    while wal.step() {}
    wal
}

fn sealed_segments(fs: &SimFs) -> Vec<String> {
    let files = fs.files().into_iter().map(|(path, _)| path.display().to_string());
    files.filter(|path| path.ends_with(".wal") && Path::new(path).starts_with(DIR)).collect()
}

fn read(wal: &Wal, group: u64) -> Result<Vec<Entry>, Error> {
    let (first, last) = wal.group(GroupId(group)).map(|view| (view.first_index, view.last_index)).unwrap();
    let mut out = Vec::new();
    wal.entries(GroupId(group), first..last + 1, u64::MAX, &mut out).map(|()| out)
}

#[test]
fn a_healthy_log_has_nothing_to_report() {
    let fs = SimFs::new();
    let wal = filled(&fs);
    let report = wal.scrub().unwrap();
    assert!(report.segments >= 3, "{report:?}");
    assert!(report.records > 100 && report.bytes > 300_000, "{report:?}");
    assert!(report.damaged.is_empty() && report.damaged_heads.is_empty(), "{report:?}");
    assert_eq!(wal.scrub().unwrap(), report, "a second look sees the same");
}

#[test]
fn each_sector_that_rots_is_found_if_anybody_may_ask_for_it() {
    let fs = SimFs::new();
    let expected: Vec<Vec<Entry>> = {
        let wal = filled(&fs);
        (1..=GROUPS).map(|group| read(&wal, group).unwrap()).collect()
    };
    let (mut records, mut heads, mut nothing) = (0, 0, 0);
    for path in sealed_segments(&fs) {
        let bytes = bytes_of(&fs, Path::new(&path));
        for sector in (0..bytes.len() / 512).step_by(7) {
            let range = sector * 512..(sector + 1) * 512;
            if bytes[range.clone()].iter().all(|byte| *byte == 0) {
                continue;
            }
            let fs = SimFs::from_image(&fs.image());
            let (wal, opened) = open(&fs, &Arc::new(HandClock::default()), 7).unwrap();
            assert!(opened.damaged.is_empty());
            fs.tamper(Path::new(&path), |bytes| bytes[range].fill(0xa5)).unwrap();
            let report = wal.scrub().unwrap();
            for group in 1..=GROUPS {
                let hit = report.damaged.iter().any(|record| record.group == GroupId(group));
                match read(&wal, group) {
                    Ok(entries) => {
                        assert!(!hit, "{path} {sector}: a damaged group answers");
                        assert_eq!(entries, expected[group as usize - 1], "{path} {sector}: silent change");
                    }
                    Err(Error::Damaged { damage, .. }) => {
                        assert!(hit, "{path} {sector}: group {group} is dead without a report");
                        let record =
                            report.damaged.iter().find(|record| record.group == GroupId(group)).unwrap();
                        assert_eq!(record.path, Path::new(&path));
                        assert!(damage.entries.contains(&record.entries.unwrap()));
                    }
                    Err(other) => panic!("{path} {sector}: {other}"),
                }
            }
            assert!(
                report
                    .damaged
                    .iter()
                    .all(|record| record.group != GroupId(1) || record.entries.unwrap().1 > 21)
            );
            records += usize::from(!report.damaged.is_empty());
            heads += usize::from(!report.damaged_heads.is_empty());
            nothing += usize::from(report.damaged.is_empty() && report.damaged_heads.is_empty());
        }
    }
    // What was truncated, padding and copies of heads may rot unseen.
    assert!(records > 50 && heads > 5 && nothing > 0, "{records} records, {heads} heads, {nothing} unseen");
}

#[test]
fn a_disk_that_does_not_read_is_an_error_and_no_damage() {
    use pontoon_wal::sim::{Fault, OpKind};
    let fs = SimFs::new();
    let wal = filled(&fs);
    fs.fail_nth(OpKind::Read, 3, Fault::Io);
    assert!(matches!(wal.scrub(), Err(Error::Io { .. })));
    assert!((1..=GROUPS).all(|group| read(&wal, group).is_ok()));
}
