//! The tools on healthy, torn and damaged directories: what they find, what they copy, and that they leave alone.

use std::{
    collections::BTreeSet,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use pontoon_wal::{
    Batch, Entry, Error, GroupId, HardState, Options, Wal, WalReader,
    sim::{Fault, OpKind, SimFs},
    tools::{self, CheckReport, FaultKind, FrameInfo, FrameState, Unreadable},
};

#[path = "support/lib.rs"]
mod support;

use support::{DIR, HandClock, Model, Script, bytes_of, open, options};

const COPY: &str = "/copy";

fn entry(group: u64, index: u64, bytes: usize) -> Entry {
    let mut data = format!("<{group}:{index}>").into_bytes();
    data.resize(bytes.max(data.len()), b'.');
    Entry { index, term: 1, kind: 0, data: data.into() }
}

/// Five groups with forty entries each, in several segments, closed.
fn closed() -> SimFs {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    for index in 1..=40 {
        let mut batch = Batch::new();
        for group in 1..=5 {
            batch.append(GroupId(group), &[entry(group, index, 2_000)]);
            batch.hard_state(GroupId(group), HardState { term: 1, vote: group, commit: index });
        }
        wal.commit(batch).unwrap();
        while wal.step() {}
    }
    wal.close().unwrap();
    fs
}

fn find(fs: &SimFs, what: &str) -> (PathBuf, usize) {
    let what = what.as_bytes();
    let paths = fs.files().into_iter().map(|(path, _)| path);
    let found = paths.filter(|path| path.to_string_lossy().ends_with(".wal")).find_map(|path| {
        let at = bytes_of(fs, &path).windows(what.len()).position(|window| window == what)?;
        Some((path, at))
    });
    found.unwrap()
}

fn check(fs: &SimFs) -> CheckReport {
    tools::check(Arc::new(fs.clone()), Path::new(DIR), None).unwrap()
}

fn reader(fs: &SimFs, dir: &str) -> WalReader {
    WalReader::open(Arc::new(fs.clone()), Path::new(dir)).unwrap()
}

fn all(reader: &WalReader, group: GroupId) -> Vec<Entry> {
    let view = reader.group(group).unwrap();
    let mut entries = Vec::new();
    reader.entries(group, view.first_index..view.last_index + 1, u64::MAX, &mut entries).unwrap();
    entries
}

fn all_frames(fs: &SimFs) -> Vec<FrameInfo> {
    let mut all = Vec::new();
    tools::frames(fs, Path::new(DIR), |frame| {
        all.push(frame);
        ControlFlow::Continue(())
    })
    .unwrap();
    all
}

fn target(fs: &SimFs) -> Options {
    Options { dir: COPY.into(), ..options(fs, &Arc::new(HandClock::default()), 7) }
}

/// All files of the log, with their bytes.
fn content(fs: &SimFs) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = fs.files().into_iter().map(|(path, _)| path).filter(|path| path.starts_with(DIR));
    paths.map(|path| (path.clone(), bytes_of(fs, &path))).collect()
}

#[test]
fn a_whole_log_is_whole_and_every_frame_is_seen() {
    let fs = closed();
    let report = check(&fs);
    assert!(report.is_whole(), "{report:?}");
    assert_eq!((report.entries, report.torn.clone()), (200, None));
    assert!(report.segments >= 2 && report.records >= 400, "{report:?}");
    assert_eq!(reader(&fs, DIR).check().unwrap().records, report.records);
    let frames = all_frames(&fs);
    assert_eq!(frames.len() as u64, report.frames);
    assert_eq!(frames.iter().filter(|frame| frame.is_opening).count(), 1);
    assert!(frames.iter().any(|frame| frame.is_watermark));
    let records = frames.iter().flat_map(|frame| frame.records.as_deref().unwrap());
    let mut held: Vec<u64> = records
        .filter(|record| record.group == GroupId(3))
        .flat_map(|record| record.entries.map_or(0..0, |(low, high)| low..high))
        .collect();
    held.sort_unstable();
    assert_eq!(held, (1..=40).collect::<Vec<_>>());
    let mut seen = 0;
    tools::frames(&fs, Path::new(DIR), |_| {
        seen += 1;
        ControlFlow::Break(())
    })
    .unwrap();
    assert_eq!(seen, 1);
}

#[test]
fn a_damaged_record_is_named_in_every_segment_sealed_ones_too() {
    let fs = closed();
    let image = fs.image();
    let mut files = BTreeSet::new();
    for index in [1, 20, 40] {
        fs.restore(&image);
        let (path, at) = find(&fs, &format!("<3:{index}>"));
        fs.tamper(&path, |bytes| bytes[at + 1_000] ^= 1).unwrap();
        let report = check(&fs);
        let [hit] = &report.damaged[..] else { panic!("{report:?}") };
        assert_eq!((&hit.path, hit.group, hit.entries), (&path, GroupId(3), Some((index, index + 1))));
        assert!(hit.offset < at as u64 && at as u64 + 1_000 < hit.offset + hit.bytes);
        assert!(report.faults.iter().any(|fault| fault.kind == FaultKind::Records { count: 1 }));
        assert_eq!(report.lost.keys().collect::<Vec<_>>(), [&GroupId(3)]);
        assert_eq!(report.lost[&GroupId(3)].entries, [(index, index + 1)]);
        assert!(!report.is_whole() && report.refused.is_none());
        files.insert(path);
    }
    assert!(files.len() >= 2, "the records lie in several segments");
}

#[test]
fn a_damaged_copy_of_a_head_is_named_though_nothing_is_lost_yet() {
    let fs = closed();
    let image = fs.image();
    let frame = all_frames(&fs).into_iter().find(|frame| frame.bytes > 4096).unwrap();
    let last_block = (frame.offset + frame.bytes - 4096) as usize;
    for (at, kind) in [(frame.offset as usize, FaultKind::Head), (last_block, FaultKind::Copy)] {
        fs.restore(&image);
        fs.tamper(&frame.path, |bytes| bytes[at + 300] ^= 1).unwrap();
        let report = check(&fs);
        let [fault] = &report.faults[..] else { panic!("{report:?}") };
        assert_eq!((fault.kind, fault.frame, fault.offset), (kind, Some(frame.seq), frame.offset));
        assert!(!fault.loses() && !report.is_whole() && report.lost.is_empty() && report.damaged.is_empty());
    }
}

#[test]
fn a_frame_that_is_gone_with_both_heads_is_named_and_nothing_is_copied() {
    let fs = closed();
    let frames = all_frames(&fs);
    let frame = frames.iter().find(|frame| frame.bytes > 8192 && frame.seq > 3).unwrap();
    fs.tamper(&frame.path, |bytes| bytes[frame.offset as usize..][..frame.bytes as usize].fill(0)).unwrap();
    let report = check(&fs);
    assert!(matches!(report.refused, Some(Error::Corrupt { .. })), "{report:?}");
    let [fault] = &report.faults[..] else { panic!("{report:?}") };
    assert_eq!((fault.kind, fault.frame, fault.offset), (FaultKind::Unknown, Some(frame.seq), frame.offset));
    let before = content(&fs);
    assert!(matches!(tools::copy(Path::new(DIR), target(&fs)), Err(Error::Corrupt { .. })));
    assert_eq!(content(&fs), before);
    assert!(!fs.files().iter().any(|(path, _)| path.starts_with(COPY)));
}

#[test]
fn a_segment_that_is_missing_or_short_is_named() {
    let fs = closed();
    let image = fs.image();
    let (path, _) = find(&fs, "<1:1>");
    fs.cut(&path, 8192).unwrap();
    let report = check(&fs);
    assert!(report.refused.is_some());
    assert!(
        report
            .faults
            .iter()
            .any(|fault| { fault.path == path && fault.kind == FaultKind::SegmentLength { bytes: 8192 } })
    );
    fs.restore(&image);
    pontoon_wal::Fs::remove_file(&fs, &path).unwrap();
    let report = check(&fs);
    assert!(report.faults.iter().any(|fault| fault.path == path && fault.kind == FaultKind::SegmentMissing));
}

#[test]
fn a_torn_tail_and_a_torn_manifest_are_no_damage() {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let (wal, _) = open(&fs, &clock, 1).unwrap();
    for index in 1..=3 {
        let mut batch = Batch::new();
        batch.append(GroupId(1), &[entry(1, index, 9_000)]);
        wal.commit(batch).unwrap();
        // No checkpoint is left to be made when the last one comes.
        while index < 3 && wal.step() {}
    }
    drop(wal);
    fs.kill();
    let (path, at) = find(&fs, "<1:3>");
    fs.tamper(&path, |bytes| bytes[at + 5_000] ^= 1).unwrap();
    fs.tamper(Path::new("/log/manifest-a"), |bytes| bytes[20] ^= 1).unwrap();
    let report = check(&fs);
    assert!(report.is_whole(), "{report:?}");
    let torn = report.torn.unwrap();
    assert!(torn.path == path && torn.offset < at as u64);
    assert_eq!(report.unreadable_manifest.as_deref(), Some(Path::new("/log/manifest-a")));
    assert_eq!(all_frames(&fs).last().unwrap().state, FrameState::Torn);
    let plan = tools::plan_copy(Arc::new(fs.clone()), Path::new(DIR), None).unwrap();
    assert_eq!((plan.losing().count(), plan.torn.unwrap()), (0, torn));
    // What a later open cuts is void from then on.
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    wal.commit(Batch::new()).unwrap();
    let mut batch = Batch::new();
    batch.append(GroupId(1), &[entry(1, 3, 10)]);
    wal.commit(batch).unwrap();
    wal.close().unwrap();
    assert!(all_frames(&fs).iter().any(|frame| frame.state == FrameState::Void));
    assert!(check(&fs).is_whole());
}

#[test]
fn every_used_sector_that_is_zeroed_is_found_or_holds_nothing_that_counts() {
    let fs = closed();
    let image = fs.image();
    let (path, _) = find(&fs, "<1:1>");
    let bytes = bytes_of(&fs, &path);
    let mut found = 0;
    for at in (0..64 << 10).step_by(512) {
        fs.restore(&image);
        fs.patch(&path, at as u64, &[0; 512]).unwrap();
        let changed = bytes[at..at + 512].iter().any(|byte| *byte != 0);
        let report = check(&fs);
        assert_eq!(changed, !report.is_whole(), "sector at {at}: {report:?}");
        found += usize::from(changed);
    }
    assert!(found > 90, "{found}");
}

#[test]
fn a_damaged_group_is_read_as_far_as_it_goes() {
    let fs = closed();
    let (path, at) = find(&fs, "<3:20>");
    fs.tamper(&path, |bytes| bytes[at + 9] ^= 1).unwrap();
    let reader = reader(&fs, DIR);
    let (mut next, mut read, mut lost) = (5, Vec::new(), Vec::new());
    while next < 38 {
        let page = reader.salvage(GroupId(3), next..38, 6_000).unwrap();
        assert!(page.next > next && page.entries.len() <= 4);
        page.entries.iter().for_each(|got| assert_eq!(*got, entry(3, got.index, 2_000)));
        read.extend(page.entries.into_iter().map(|entry| entry.index));
        lost.extend(page.lost);
        next = page.next;
    }
    assert_eq!(read, (5..38).filter(|index| *index != 20).collect::<Vec<_>>());
    assert_eq!(lost, [(20, 21)]);
    let nobody = reader.salvage(GroupId(99), 1..5, 1).unwrap();
    assert_eq!((nobody.entries.len(), nobody.lost.len(), nobody.next), (0, 0, 5));
}

#[test]
fn a_copy_of_a_whole_log_is_the_same_log() {
    let (fs, clock) = (SimFs::new(), Arc::new(HandClock::default()));
    let mut script = Script::draw(11, 150, 8);
    let (wal, _) = open(&fs, &clock, 11).unwrap();
    for batch in script.batches.drain(..) {
        wal.commit(batch).unwrap();
    }
    wal.close().unwrap();
    let model: Model = script.states.pop().unwrap();
    let before = content(&fs);
    let report = tools::copy(Path::new(DIR), target(&fs)).unwrap();
    assert_eq!(report.losing().count(), 0);
    assert_eq!(report.groups.len(), model.groups.len());
    assert_eq!(content(&fs), before, "the original is as it was");
    let (copied, report) = Wal::open(target(&fs)).unwrap();
    assert!(!report.created && report.damaged_groups.is_empty());
    assert_eq!(model.differs(&copied), None);
    // What exists is in nobody's way.
    assert!(matches!(tools::copy(Path::new(DIR), target(&fs)), Err(Error::BadOption { .. })));
}

#[test]
fn a_copy_of_a_damaged_log_keeps_the_others_whole_and_the_damaged_dead() {
    let fs = closed();
    let (path, at) = find(&fs, "<3:20>");
    fs.tamper(&path, |bytes| bytes[at + 9] ^= 1).unwrap();
    let before = content(&fs);
    let report = tools::copy(Path::new(DIR), target(&fs)).unwrap();
    let losing: Vec<_> = report.losing().collect();
    assert_eq!((losing[0].group, losing[0].last_index, losing.len()), (GroupId(3), 19, 1));
    assert_eq!(losing[0].lost.as_ref().unwrap().entries, [(20, 41)]);
    assert_eq!(content(&fs), before, "the original is as it was");
    // Damage is remembered whichever manifest rots.
    let image = fs.image();
    for rotten in ["manifest-a", "manifest-b"] {
        fs.restore(&image);
        fs.tamper(&Path::new(COPY).join(rotten), |bytes| bytes[20] ^= 1).unwrap();
        let (wal, _) = Wal::open(target(&fs)).unwrap();
        assert!(matches!(wal.term(GroupId(3), 5), Err(Error::Damaged { .. })), "{rotten}");
        for group in [1, 2, 4, 5] {
            let (_, state, entries) = wal.storage(GroupId(group)).read_all().unwrap();
            assert_eq!(state, HardState { term: 1, vote: group, commit: 40 });
            assert_eq!(entries, (1..=40).map(|index| entry(group, index, 2_000)).collect::<Vec<_>>());
        }
    }
    fs.restore(&image);
    let copied = reader(&fs, COPY);
    assert_eq!(copied.salvage(GroupId(3), 1..99, u64::MAX).unwrap().entries.len(), 19);
}

#[test]
fn a_log_in_use_is_not_copied() {
    let (fs, clock) = (closed(), Arc::new(HandClock::default()));
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    assert!(matches!(tools::copy(Path::new(DIR), target(&fs)), Err(Error::Locked { .. })));
    wal.close().unwrap();
    tools::copy(Path::new(DIR), target(&fs)).unwrap();
}

#[test]
fn a_power_cut_while_copying_leaves_no_copy_or_a_whole_one() {
    let fs = closed();
    let (image, before) = (fs.image(), fs.counts().changes);
    tools::copy(Path::new(DIR), target(&fs)).unwrap();
    let changes = fs.counts().changes - before;
    let (mut none, mut whole) = (0, 0);
    for nth in (1..changes).step_by(3).chain(changes.saturating_sub(4)..changes + 1) {
        fs.restore(&image);
        fs.fail_nth(OpKind::Change, nth, Fault::PowerCut);
        let copied = tools::copy(Path::new(DIR), target(&fs));
        fs.crash(nth);
        let there = fs.files().iter().any(|(path, _)| path.starts_with(COPY));
        assert!(there || copied.is_err(), "change {nth}: a copy that was promised is gone");
        match there {
            false => none += 1,
            true => {
                let report = tools::check(Arc::new(fs.clone()), Path::new(COPY), None).unwrap();
                assert!(report.is_whole() && report.entries == 200, "change {nth}: {report:?}");
                whole += 1;
            }
        }
        assert!(check(&fs).is_whole());
    }
    assert!(none > 5 && whole > 0, "{none} without, {whole} whole");
}

#[test]
fn what_is_read_while_the_log_is_written_is_the_log_of_a_moment() {
    let (fs, clock) = (closed(), Arc::new(HandClock::default()));
    let (wal, _) = open(&fs, &clock, 2).unwrap();
    for index in 41..=45 {
        let mut batch = Batch::new();
        batch.append(GroupId(1), &[entry(1, index, 50)]);
        wal.commit(batch).unwrap();
        clock.advance(Duration::from_millis(1));
        let report = check(&fs);
        assert!(report.is_whole(), "{report:?}");
        assert_eq!(report.entries, 200 + index - 40);
    }
}

#[test]
fn a_disk_that_does_not_answer_everywhere_is_read_around() {
    let fs = closed();
    let before = reader(&fs, DIR);
    let groups: Vec<(GroupId, Vec<Entry>)> =
        before.groups().into_iter().map(|group| (group, all(&before, group))).collect();
    let (path, at) = find(&fs, "<3:20>");
    let block = at as u64 / 4096 * 4096;
    fs.set_unreadable(&path, block + 512..block + 1024).unwrap();
    // An open for use ends there, and says where.
    let refused = WalReader::open(Arc::new(fs.clone()), Path::new(DIR)).map(drop).unwrap_err();
    assert!(matches!(&refused, Error::Io { path: named, .. } if *named == path), "{refused}");
    let report = check(&fs);
    assert!(!report.is_whole() && report.refused.is_none(), "{report:?}");
    let [Unreadable { path: named, offset, bytes: 4096, .. }] = &report.unreadable[..] else {
        panic!("{report:?}")
    };
    assert_eq!((named, *offset), (&path, block));
    let hit: Vec<GroupId> = report.lost.keys().copied().collect();
    assert!(!hit.is_empty(), "{report:?}");
    // What is not on that place is copied.
    let copied = tools::copy(Path::new(DIR), target(&fs)).unwrap();
    assert_eq!(copied.unreadable, report.unreadable);
    assert_eq!(copied.losing().map(|copied| copied.group).collect::<Vec<_>>(), hit);
    let copy = reader(&fs, COPY);
    for (group, entries) in groups.iter().filter(|(group, _)| !hit.contains(group)) {
        assert_eq!(all(&copy, *group), *entries);
    }
    // A manifest on such a place is one that a crash might have left.
    let fs = closed();
    fs.set_unreadable(&Path::new(DIR).join("manifest-a"), 0..1).unwrap();
    let report = check(&fs);
    assert!(report.unreadable_manifest.is_some() && report.unreadable.len() == 1 && report.faults.is_empty());
}
