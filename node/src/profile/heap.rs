//! Reads what jemalloc recorded (`heap_v2`), and names the functions.
//!
//! ```text
//! heap_v2/524288                     one sample in so many bytes, on average
//! @ 0x55d0aa 0x55d1bb                a stack, the innermost first
//!   t*: 3: 196608 [40: 2621440]      live objects and bytes, and those allocated since the start
//! ```

use std::{cmp::Reverse, collections::HashMap, ffi::c_void, path::Path};

use pontoon_proto::v1;
use tonic::Status;

use crate::config::HeapUsage;

/// What stacks may take in an answer, in bytes; the smallest are left out.
const STACKS_BYTES: usize = 4 << 20;
/// What the allocator's own text may take.
const RAW_BYTES: usize = 8 << 20;

/// A stack with its counts, the innermost first.
#[derive(Debug, Clone, PartialEq)]
struct Stack {
    addresses: Vec<usize>,
    live: Sampled,
    allocated: Sampled,
}

/// What was sampled of a stack's allocations.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Sampled {
    objects: u64,
    bytes: u64,
}

impl Sampled {
    /// How much there was, reckoned from the samples: an allocation of `size` bytes is seen with the chance 1 - e^(-size / rate).
    fn reckoned(self, rate: u64) -> Sampled {
        if self.objects == 0 || self.bytes == 0 || rate == 0 {
            return self;
        }
        let size = self.bytes as f64 / self.objects as f64;
        let scale = 1.0 / (1.0 - (-size / rate as f64).exp());
        Sampled {
            objects: (self.objects as f64 * scale).round() as u64,
            bytes: (self.bytes as f64 * scale).round() as u64,
        }
    }
}

/// What was recorded, with names. Takes seconds the first time, and blocks.
///
/// # Errors
/// `INTERNAL` for a text that is none of jemalloc's; `RESOURCE_EXHAUSTED` if it was asked for and is too large to send.
pub(super) fn profile(dump: String, raw: bool, usage: HeapUsage) -> Result<v1::HeapProfile, Status> {
    if raw && dump.len() > RAW_BYTES {
        return Err(Status::resource_exhausted(format!(
            "the allocator's text has {} bytes, more than the {RAW_BYTES} that are sent: profile for fewer seconds",
            dump.len()
        )));
    }
    let mut stacks =
        parse(&dump).ok_or_else(|| Status::internal("what the allocator wrote is not legible"))?;
    stacks.sort_by_key(|stack| Reverse((stack.allocated.bytes, stack.live.bytes)));
    let mut names = HashMap::new();
    let mut told: Vec<v1::HeapStack> = Vec::new();
    let (mut left_out, mut bytes) = (0, 0);
    for stack in stacks {
        let frames: Vec<String> = match bytes < STACKS_BYTES {
            true => frames(&stack.addresses, &mut names),
            false => Vec::new(),
        };
        bytes += frames.iter().map(String::len).sum::<usize>();
        if bytes >= STACKS_BYTES {
            left_out += 1;
            continue;
        }
        told.push(v1::HeapStack {
            frames,
            allocated_bytes: stack.allocated.bytes,
            allocations: stack.allocated.objects,
            live_bytes: stack.live.bytes,
            live_allocations: stack.live.objects,
        });
    }
    // The debug information of the whole program was read for the names.
    backtrace::clear_symbol_cache();
    Ok(v1::HeapProfile {
        stacks: told,
        left_out,
        allocated_bytes: usage.allocated,
        active_bytes: usage.active,
        resident_bytes: usage.resident,
        retained_bytes: usage.retained,
        raw: if raw { dump } else { String::new() },
    })
}

fn parse(dump: &str) -> Option<Vec<Stack>> {
    let mut lines = dump.lines();
    let rate = lines.next()?.strip_prefix("heap_v2/")?.parse().ok()?;
    let mut stacks = Vec::new();
    let mut open: Option<Vec<usize>> = None;
    for line in lines {
        if line.starts_with("MAPPED_LIBRARIES") {
            break;
        }
        if let Some(addresses) = line.strip_prefix('@') {
            let address = |word: &str| usize::from_str_radix(word.strip_prefix("0x")?, 16).ok();
            open = Some(addresses.split_whitespace().map(address).collect::<Option<_>>()?);
        } else if let Some(counts) = line.trim_start().strip_prefix("t*:") {
            // Before the first stack stands the sum of all.
            let Some(addresses) = open.take() else { continue };
            let [live, allocated] = counted(counts)?;
            stacks.push(Stack { addresses, live: live.reckoned(rate), allocated: allocated.reckoned(rate) });
        }
    }
    Some(stacks)
}

/// ` 3: 196608 [40: 2621440]`.
fn counted(text: &str) -> Option<[Sampled; 2]> {
    let (live, rest) = text.split_once('[')?;
    let sampled = |text: &str| {
        let (objects, bytes) = text.split_once(':')?;
        Some(Sampled { objects: objects.trim().parse().ok()?, bytes: bytes.trim().parse().ok()? })
    };
    Some([sampled(live)?, sampled(rest.trim_end().strip_suffix(']')?)?])
}

/// The functions of a stack, the outermost first and without the allocator's own.
fn frames(addresses: &[usize], names: &mut HashMap<usize, Vec<String>>) -> Vec<String> {
    let mut frames: Vec<String> = Vec::new();
    for &address in addresses {
        let named = names.entry(address).or_insert_with(|| functions(address));
        frames.extend(named.iter().cloned());
    }
    let own = frames.iter().take_while(|name| of_the_allocator(name)).count();
    frames.drain(..own);
    frames.reverse();
    frames
}

/// The function at an address and those that were compiled into it, the innermost first.
fn functions(address: usize) -> Vec<String> {
    let mut functions = Vec::new();
    backtrace::resolve(address as *mut c_void, |symbol| {
        let Some(name) = symbol.name() else { return };
        // The name of a function that was compiled into another has no path: its file tells whose it is.
        functions.push(match (symbol.filename().and_then(Path::to_str), symbol.lineno()) {
            (Some(file), Some(line)) => format!("{name:#} ({}:{line})", place(file)),
            _ => format!("{name:#}"),
        });
    });
    if functions.is_empty() {
        functions.push(format!("{address:#x}"));
    }
    functions
}

/// A source file without the directories that only the builder has: `wal/src/writer.rs`, `h2-0.4.20/src/frame/mod.rs`,
/// `library/alloc/src/vec/mod.rs`.
fn place(file: &str) -> &str {
    if let Some((_, inside)) = file.split_once("/registry/src/") {
        return inside.split_once('/').map_or(inside, |(_, inside)| inside);
    }
    let known =
        ["/library/", "/node/src/", "/proto/src/", "/raftstore/src/", "/shard/src/", "/wal/src/", "/out/"];
    known.iter().find_map(|name| file.find(name)).map_or(file, |at| &file[at + 1..])
}

fn of_the_allocator(name: &str) -> bool {
    [
        "_rjem_",
        "prof_",
        "je_",
        "imalloc",
        "ialloc",
        "iralloc",
        "malloc_",
        "mallocx",
        "calloc",
        "rallocx",
        "do_rallocx",
        "irallocx",
    ]
    .iter()
    .any(|start| name.starts_with(start))
        || name.contains("tikv_jemallocator")
        || name.contains("__rust_")
        || name.contains("__rustc")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUMP: &str = "heap_v2/524288
  t*: 4: 196672 [41: 2621504]
  t0: 4: 196672 [41: 2621504]
@ 0x10 0x20
  t*: 0: 0 [40: 41943040]
  t0: 0: 0 [40: 41943040]
@ 0x10
  t*: 1: 64 [1: 64]
  t0: 1: 64 [1: 64]

MAPPED_LIBRARIES:
@ 0x99
  t*: 9: 9 [9: 9]
";

    #[test]
    fn a_dump_is_read_and_reckoned() {
        let stacks = parse(DUMP).unwrap();
        assert_eq!(stacks.len(), 2);
        assert_eq!(stacks[0].addresses, [0x10, 0x20]);
        assert_eq!(stacks[0].live, Sampled::default());
        // Objects of twice the rate: one in seven is missed.
        let scaled = 40.0 / (1.0 - (-2.0_f64).exp());
        assert_eq!(stacks[0].allocated.objects, scaled.round() as u64);
        // A small object that was seen stands for all that were not.
        assert_eq!(stacks[1].live.bytes.div_ceil(1 << 19), 2);
        assert_eq!(stacks[1].live.objects, stacks[1].live.bytes.div_ceil(64));
    }

    #[test]
    fn what_is_no_dump_is_refused() {
        for wrong in [
            "",
            "heap_v1/1\n",
            "heap_v2/x\n",
            "heap_v2/8\n@ 0xzz\n  t*: 1: 1 [1: 1]\n",
            "heap_v2/8\n@ 0x1\n  t*: 1 1\n",
        ] {
            assert!(parse(wrong).is_none(), "{wrong}");
        }
        assert_eq!(parse("heap_v2/8\n  t*: 0: 0 [0: 0]\n"), Some(Vec::new()));
        let large = format!("{DUMP}{}", "x".repeat(RAW_BYTES));
        let refused = profile(large, true, HeapUsage::default()).unwrap_err();
        assert!(refused.message().contains("fewer seconds"), "{refused}");
    }

    #[test]
    fn functions_are_named_the_outermost_first() {
        let here = functions_are_named_the_outermost_first as fn() as usize + 1;
        let frames = frames(&[here, 0x1], &mut HashMap::new());
        assert_eq!(frames[0], "0x1");
        let last = frames.last().unwrap();
        assert!(last.contains("functions_are_named_the_outermost_first"), "{frames:?}");
        assert!(last.contains(" (node/src/profile/heap.rs:"), "{frames:?}");
        let foreign = "x/.cargo/registry/src/registry-1/h2-0.4.20/src/lib.rs";
        assert_eq!(place(foreign), "h2-0.4.20/src/lib.rs");
        assert_eq!(place("/rustc/1/library/alloc/src/vec/mod.rs"), "library/alloc/src/vec/mod.rs");
        assert_eq!(place("/x/y.rs"), "/x/y.rs");
        let profile = profile(DUMP.to_owned(), false, HeapUsage::default()).unwrap();
        assert!(profile.raw.is_empty() && profile.left_out == 0);
        assert!(profile.stacks[0].allocated_bytes > profile.stacks[1].allocated_bytes);
    }
}
