//! Rot, everywhere: each bit, each sector, each block in another's place, each length. After a clean close a fault is
//! invisible or it is reported with whom it hits; nothing acknowledged is ever missing in silence, and who is not hit
//! goes on.

use std::{path::Path, thread};

use pontoon_wal::{Error, sim::SimFs};

#[path = "support/lib.rs"]
mod support;
#[path = "support/sweep.rs"]
mod sweep;

use support::{Rng, encrypt, one_key};
use sweep::{
    Answers, BLOCK, Closed, End, SECTOR, Seen, bytes_in, closed_log, ended_log, footers, relocated_log,
    sectors,
};

/// Bytes of the log of which each bit is flipped.
const FLIPPED_BYTES: usize = 64 << 10;

fn fail<T>(result: Result<T, String>) -> T {
    result.unwrap_or_else(|failure| panic!("{failure}"))
}

/// Flips these bits of each byte of a range of a file, one at a time.
fn flip_each(log: &Closed, path: &Path, range: std::ops::Range<usize>, bits: &[usize]) -> Answers {
    let bytes = log.bytes(path);
    let mut answers = Answers::default();
    for at in range {
        for bit in bits {
            let context = || format!("{} byte {at} bit {bit}", path.display());
            let flipped = [bytes[at] ^ 1 << bit];
            answers.count(fail(log.damage(context, |fs| fs.patch(path, at as u64, &flipped).unwrap())));
        }
    }
    answers
}

#[test]
fn each_flipped_bit_is_invisible_or_reported() {
    let log = closed_log(11, 22);
    let mut path = log.files(".wal");
    path.sort_by_key(|path| log.used(path));
    let path = path.pop().unwrap();
    let used = log.used(&path);
    assert!(used >= FLIPPED_BYTES, "the log is long enough: {used}");
    let workers = thread::available_parallelism().map_or(1, |count| count.get());
    let share = FLIPPED_BYTES.div_ceil(workers);
    let mut answers = Answers::default();
    thread::scope(|scope| {
        let flip = |nth: usize| {
            let (log, path) = (&log, &path);
            let range = nth * share..((nth + 1) * share).min(FLIPPED_BYTES);
            scope.spawn(move || flip_each(log, path, range, &[0, 1, 2, 3, 4, 5, 6, 7]))
        };
        let workers: Vec<_> = (0..workers).map(flip).collect();
        workers.into_iter().for_each(|worker| answers.add(worker.join().unwrap()));
    });
    println!("{answers:?}");
    assert_eq!(answers.nothing + answers.reported, FLIPPED_BYTES * 8, "one flipped bit never closes the log");
    assert!(answers.reported > FLIPPED_BYTES, "{answers:?}");
}

#[test]
fn an_encrypted_log_is_as_honest_about_rot_as_any_other() {
    encrypt(Some(one_key()));
    let log = closed_log(12, 60);
    let answers = fail(sectors(&log, &log.files(".wal")));
    println!("{answers:?}");
    assert!(answers.reported > 100 && answers.nothing > 100 && answers.refused == 0, "{answers:?}");
    // One bit of each few bytes, so that heads, directories, tags and bodies of many frames are hit.
    let log = closed_log(11, 22);
    let path = log.files(".wal").into_iter().max_by_key(|path| log.used(path)).unwrap();
    let mut answers = Answers::default();
    for at in (0..log.used(&path)).step_by(11) {
        answers.add(flip_each(&log, &path, at..at + 1, &[at % 8]));
    }
    println!("{answers:?}");
    assert!(answers.reported > 1_000 && answers.refused == 0, "{answers:?}");
    let answers = fail(sectors(&log, &log.files("manifest")));
    assert_eq!((answers.reported, answers.refused), (0, 0), "{answers:?}");
}

#[test]
fn each_bad_sector_of_a_segment_is_invisible_or_reported() {
    let log = closed_log(12, 160);
    let answers = fail(sectors(&log, &log.files(".wal")));
    println!("{answers:?}");
    assert!(answers.reported > 200 && answers.nothing > 200, "{answers:?}");
    assert_eq!(answers.refused, 0, "{answers:?}");
}

#[test]
fn each_bad_byte_of_a_footer_is_invisible() {
    let log = closed_log(12, 60);
    let answers = fail(footers(&log));
    assert!(answers.nothing > 400, "{answers:?}");
    assert_eq!((answers.reported, answers.refused), (0, 0));
}

#[test]
fn each_bad_sector_behind_a_durable_watermark_is_invisible_or_reported() {
    let log = ended_log(17, 70, End::Watermark);
    let answers = fail(sectors(&log, &log.files(".wal")));
    assert!(answers.reported > 100 && answers.refused == 0, "{answers:?}");
}

#[test]
fn without_a_watermark_only_the_last_frame_may_be_cut() {
    let log = ended_log(18, 30, End::NoWatermark);
    let mut path = log.files(".wal");
    path.sort_by_key(|path| log.used(path));
    let (mut cut, mut first, mut last) = (0, usize::MAX, 0);
    for path in path {
        for sector in 0..log.used(&path).div_ceil(SECTOR) {
            let damage = |fs: &SimFs| fs.patch(&path, (sector * SECTOR) as u64, &[0xff; SECTOR]).unwrap();
            let context = || format!("{} sector {sector}", path.display());
            // Either the damage is said, or it is the last frame that is gone.
            match log.damage(context, damage) {
                Ok(seen) => assert_ne!(seen, Seen::Refused, "{}", context()),
                Err(failure) => {
                    assert!(log.is_cut(damage), "{failure}");
                    (cut, first, last) = (cut + 1, first.min(sector), last.max(sector));
                }
            }
        }
    }
    assert!(cut > 0 && last - first < 8 * BLOCK / SECTOR, "{cut} sectors from {first} to {last}");
}

#[test]
fn each_bad_sector_of_either_manifest_is_invisible() {
    let log = closed_log(13, 160);
    let answers = fail(sectors(&log, &log.files("manifest")));
    println!("{answers:?}");
    assert_eq!((answers.reported, answers.refused), (0, 0));
    for path in log.files("manifest") {
        let bytes = log.bytes(&path);
        for (at, byte) in bytes.iter().enumerate() {
            let context = || format!("{} byte {at}", path.display());
            let flipped = [byte ^ 1 << (at % 8)];
            let seen = log.damage(context, |fs| fs.patch(&path, at as u64, &flipped).unwrap());
            assert_eq!(fail(seen), Seen::Nothing);
        }
    }
}

#[test]
fn a_write_that_went_astray_is_invisible_or_reported() {
    let log = closed_log(14, 120);
    let files = log.files(".wal");
    let mut rng = Rng(14);
    let (mut answers, mut doubled) = (Answers::default(), Answers::default());
    for path in &files {
        let bytes = log.bytes(path);
        let blocks = bytes.len() / BLOCK;
        let used = log.used(path).div_ceil(BLOCK);
        for from in 0..used {
            let block = &bytes[from * BLOCK..(from + 1) * BLOCK];
            let near = [from.saturating_sub(1), (from + 1).min(blocks - 1), used.min(blocks - 1)];
            let far = std::iter::repeat_with(|| rng.below(blocks as u64) as usize).take(5);
            for to in near.into_iter().chain(far).filter(|to| *to != from).collect::<Vec<_>>() {
                let target = &files[rng.below(files.len() as u64) as usize];
                for target in [path, target] {
                    let at = (to * BLOCK) as u64;
                    let context = || {
                        format!("block {from} of {} over block {to} of {}", path.display(), target.display())
                    };
                    doubled.count(fail(log.damage(context, |fs| fs.patch(target, at, block).unwrap())));
                    // And its own place keeps what was there before.
                    let older = log.past.iter().map(|image| bytes_in(image, path));
                    let older = older.rev().find(|older| {
                        older.get(from * BLOCK..(from + 1) * BLOCK).is_some_and(|older| older != block)
                    });
                    let older = older
                        .map_or(vec![0; BLOCK], |older| older[from * BLOCK..(from + 1) * BLOCK].to_vec());
                    // What is written later lies over what went astray.
                    let covered = target == path && to > from && to < used;
                    let seen = log.damage(context, |fs| {
                        fs.patch(path, (from * BLOCK) as u64, &older).unwrap();
                        if !covered {
                            fs.patch(target, at, block).unwrap();
                        }
                    });
                    answers.count(fail(seen));
                }
            }
        }
    }
    println!("{doubled:?} {answers:?}");
    assert!(doubled.refused == 0 && doubled.reported > 100, "{doubled:?}");
    assert!(answers.reported > 100, "{answers:?}");
}

#[test]
fn a_listed_segment_of_any_other_length_is_named() {
    let log = closed_log(15, 20);
    let manifest =
        pontoon_wal::WalReader::open(std::sync::Arc::new(log.fs()), support::DIR.as_ref()).unwrap();
    assert!(manifest.report().segments >= 1);
    let mut path = log.files(".wal");
    path.sort_by_key(|path| log.used(path));
    let path = path.pop().unwrap();
    let len = log.bytes(&path).len() as u64;
    let clock = std::sync::Arc::new(support::HandClock::default());
    for cut in 0..len {
        let fs = log.fs();
        fs.cut(&path, cut).unwrap();
        match support::open(&fs, &clock, 1) {
            Err(Error::Corrupt { path: named, .. }) if named == path => {}
            Err(error) => panic!("{cut} bytes: {error}"),
            Ok(_) => panic!("{cut} bytes: nobody noticed"),
        }
    }
}

#[test]
fn a_manifest_of_any_shorter_length_is_made_up_for_by_the_other() {
    let log = closed_log(16, 100);
    for path in log.files("manifest") {
        for cut in 0..log.bytes(&path).len() {
            let context = || format!("{} cut to {cut} bytes", path.display());
            let seen = fail(log.damage(context, |fs| fs.cut(&path, cut as u64).unwrap()));
            assert_eq!(seen, Seen::Nothing);
        }
    }
}

#[test]
fn each_bad_sector_and_byte_of_relocated_records_is_invisible_or_reported() {
    let log = relocated_log(21);
    let files = log.cold_files();
    assert!(!files.is_empty());
    let mut answers = fail(sectors(&log, &files));
    for path in &files {
        let bytes = log.bytes(path);
        for (at, byte) in bytes.iter().enumerate().take(log.used(path)) {
            let context = || format!("{} byte {at}", path.display());
            let flipped = [byte ^ 1 << (at % 8)];
            answers.count(fail(log.damage(context, |fs| fs.patch(path, at as u64, &flipped).unwrap())));
        }
    }
    println!("{answers:?}");
    assert!(answers.reported > 1_000 && answers.nothing > 1_000, "{answers:?}");
    assert_eq!(answers.refused, 0, "{answers:?}");
}
