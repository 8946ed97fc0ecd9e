//! `pontoon debug profile`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use clap::Args;
use pontoon_proto::{NodeId, v1};
use serde_json::{Value, json};

use super::{
    Context, Done, Failure, node_id,
    output::{bytes, table},
};

/// So many rows are shown to people; a file and `--json` have all.
const SHOWN: usize = 25;
/// So many states of a thread are shown to people.
const STATES_SHOWN: usize = 3;

#[derive(Debug, Args)]
pub(super) struct ProfileArgs {
    /// Which node, as in `pontoon nodes`; without, the one at --addr.
    #[arg(long, value_parser = node_id)]
    node: Option<NodeId>,
    /// For how long, 1 to 60.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=60))]
    seconds: u32,
    /// Which code allocates, instead of what threads do.
    #[arg(long)]
    heap: bool,
    /// Write stacks there, a line each with its milliseconds or bytes, as flame graphs are made of; - for standard output. A file must
    /// not exist.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Write what jemalloc wrote, for jeprof and pprof, instead of stacks.
    #[arg(long, requires_all = ["heap", "out"])]
    raw: bool,
}

pub(super) async fn run(context: &Context, args: ProfileArgs) -> Result<Done, Failure> {
    let client = context.client().await?;
    let address = match args.node {
        None => context.addresses[0].clone(),
        Some(wanted) => {
            let nodes = client.nodes(v1::NodesRequest {}).await?.nodes.into_iter();
            let found = nodes.filter_map(|view| view.node).find(|node| node.id == wanted.get());
            found.map(|node| node.address).ok_or_else(|| {
                Failure::new(
                    Failure::REFUSED,
                    format!("there is no node {wanted}; `pontoon nodes` lists them"),
                )
            })?
        }
    };
    let file = args.out.as_deref().filter(|out| *out != Path::new("-"));
    // Before anybody is asked: an old file is not written over.
    let mut written =
        file.map(|file| File::create_new(file).map(|open| (file, open))).transpose().map_err(|error| {
            let file = file.unwrap_or(Path::new("")).display();
            Failure::new(Failure::REFUSED, format!("{file} cannot be made: {error}; name another file"))
        })?;
    let kind = if args.heap { v1::ProfileKind::Heap } else { v1::ProfileKind::Threads };
    let request = v1::ProfileRequest { kind: kind.into(), seconds: args.seconds, raw: args.raw };
    let end = async {
        let reply = client.profile_at(&address, request).await?;
        let stacks = if args.raw { reply.heap.clone().unwrap_or_default().raw } else { folded(&reply) };
        if let Some((file, open)) = &mut written {
            open.write_all(stacks.as_bytes()).and_then(|()| open.sync_all()).map_err(|error| {
                Failure::error(format!("{} could not be written: {error}", file.display()))
            })?;
        }
        Ok((reply, stacks))
    };
    let (reply, stacks) = match end.await {
        Ok(end) => end,
        Err(failure) => {
            drop(file.map(fs::remove_file));
            return Err(failure);
        }
    };
    let text = match (&args.out, file) {
        (Some(_), None) => stacks.trim_end().to_owned(),
        (_, file) => {
            let mut text = if args.heap { heap_table(&reply) } else { threads_table(&reply) };
            if let Some(file) = file {
                text.push_str(&format!("\n{} has all stacks", file.display()));
            }
            text
        }
    };
    Ok(Done::new(text, if args.heap { heap_json(&reply) } else { threads_json(&reply) }))
}

/// Stacks as flame graphs are made of: frames by semicolons, the outermost first, and a number.
fn folded(reply: &v1::ProfileReply) -> String {
    let frame = |words: &str| words.replace(';', ",");
    let mut lines: BTreeMap<String, u64> = BTreeMap::new();
    for thread in &reply.threads {
        for state in &thread.states {
            let mut stack = format!("{};{}", frame(&thread.name), state.state);
            if !state.call.is_empty() {
                stack.push_str(&format!(";{}", state.call));
            }
            *lines.entry(stack).or_default() += state.ms;
        }
    }
    for stack in reply.heap.iter().flat_map(|heap| &heap.stacks) {
        let frames: Vec<_> = stack.frames.iter().map(|words| frame(words)).collect();
        *lines.entry(frames.join(";")).or_default() += stack.allocated_bytes;
    }
    lines
        .iter()
        .filter(|&(_, &number)| number > 0)
        .map(|(stack, number)| format!("{stack} {number}\n"))
        .collect()
}

/// Threads of one name, together.
#[derive(Default)]
struct Crew {
    threads: u64,
    cpu_us: u64,
    system_us: u64,
    delayed_us: Option<u64>,
    switches: u64,
    preemptions: u64,
    states: BTreeMap<String, u64>,
}

fn threads_table(reply: &v1::ProfileReply) -> String {
    let took_us = (reply.took_ms * 1_000).max(1) as f64;
    let mut crews: BTreeMap<&str, Crew> = BTreeMap::new();
    for thread in &reply.threads {
        let crew = crews.entry(&thread.name).or_default();
        crew.threads += 1;
        crew.cpu_us += thread.cpu_us;
        crew.system_us += thread.system_us;
        if let Some(delayed) = thread.delayed_us {
            *crew.delayed_us.get_or_insert(0) += delayed;
        }
        crew.switches += thread.switches;
        crew.preemptions += thread.preemptions;
        for state in &thread.states {
            let word = match state.call.is_empty() {
                true => state.state.clone(),
                false => format!("{} in {}", state.state, state.call),
            };
            *crew.states.entry(word).or_default() += state.ms;
        }
    }
    let mut crews: Vec<_> = crews.into_iter().collect();
    crews.sort_by_key(|(_, crew)| std::cmp::Reverse(crew.cpu_us));
    let percent = |us: u64| format!("{:.1}", us as f64 * 100.0 / took_us);
    let per_second = |count: u64| format!("{:.0}", count as f64 * 1e6 / took_us);
    let row = |(name, crew): &(&str, Crew)| {
        let mut states: Vec<_> = crew.states.iter().collect();
        states.sort_by_key(|&(_, &ms)| std::cmp::Reverse(ms));
        let all = crew.states.values().sum::<u64>().max(1) as f64;
        let states = states.iter().take(STATES_SHOWN).filter(|&&(_, &ms)| ms > 0);
        let states: Vec<_> =
            states.map(|&(word, &ms)| format!("{word} {:.0} %", ms as f64 * 100.0 / all)).collect();
        vec![
            (*name).to_owned(),
            crew.threads.to_string(),
            percent(crew.cpu_us),
            percent(crew.system_us),
            crew.delayed_us.map_or("-".to_owned(), percent),
            per_second(crew.switches),
            per_second(crew.preemptions),
            states.join(", "),
        ]
    };
    let rows: Vec<_> = crews.iter().take(SHOWN).map(row).collect();
    let cpu: u64 = reply.threads.iter().map(|thread| thread.cpu_us).sum();
    let head = [
        "thread",
        "of this name",
        "cpu %",
        "kernel %",
        "waits for a core %",
        "gave up /s",
        "lost it /s",
        "seen",
    ];
    format!(
        "n{} over {:.1} s: {} threads had {:.2} cores, and were looked at {} times; 100 % is one core\n{}{}",
        reply.node,
        reply.took_ms as f64 / 1e3,
        reply.threads.len(),
        cpu as f64 / took_us,
        reply.looks,
        table(&head, &rows),
        more(crews.len()),
    )
}

fn more(rows: usize) -> String {
    match rows.saturating_sub(SHOWN) {
        0 => String::new(),
        hidden => format!("\nand {hidden} more: --json or --out has them"),
    }
}

fn threads_json(reply: &v1::ProfileReply) -> Value {
    let thread = |thread: &v1::ThreadProfile| {
        let states: Vec<_> = thread
            .states
            .iter()
            .map(|state| json!({ "state": state.state, "call": state.call, "ms": state.ms }))
            .collect();
        json!({
            "thread": thread.thread,
            "name": thread.name,
            "cpu_us": thread.cpu_us,
            "system_us": thread.system_us,
            "delayed_us": thread.delayed_us,
            "switches": thread.switches,
            "preemptions": thread.preemptions,
            "states": states,
        })
    };
    json!({
        "node": reply.node,
        "took_ms": reply.took_ms,
        "looks": reply.looks,
        "threads": reply.threads.iter().map(thread).collect::<Vec<_>>(),
    })
}

/// Where the source of a frame lies, as the node says it: `name (wal/src/writer.rs:12)`.
fn place(frame: &str) -> &str {
    frame.rsplit_once(" (").map_or("", |(_, place)| place.trim_end_matches(')'))
}

/// Whether a function allocates for whoever calls it: the standard library's and containers.
fn for_others(frame: &str) -> bool {
    let begins = |words: &str, starts: &[&str]| starts.iter().any(|start| words.starts_with(start));
    // What the library compiled for itself has no place.
    begins(place(frame), &["library/", "hashbrown-", "bytes-"])
        || begins(frame.trim_start_matches('<'), &["alloc::", "core::", "std::"])
}

fn is_ours(frame: &str) -> bool {
    ["node/", "proto/", "raftstore/", "shard/", "wal/"].iter().any(|start| place(frame).starts_with(start))
}

/// The innermost function that did not only allocate for another one, and the innermost of ours if that is another.
fn sites(stack: &v1::HeapStack) -> (&str, &str) {
    let frames = || stack.frames.iter().rev().map(String::as_str);
    let site = frames().find(|frame| !for_others(frame)).or(frames().next()).unwrap_or("-");
    let ours = frames().find(|frame| is_ours(frame)).unwrap_or("-");
    (site, if ours == site { "" } else { ours })
}

fn heap_table(reply: &v1::ProfileReply) -> String {
    let heap = reply.heap.clone().unwrap_or_default();
    let mut by_site: BTreeMap<(&str, &str), [u64; 3]> = BTreeMap::new();
    for stack in &heap.stacks {
        let sums = by_site.entry(sites(stack)).or_default();
        sums[0] += stack.allocated_bytes;
        sums[1] += stack.allocations;
        sums[2] += stack.live_bytes;
    }
    let mut by_site: Vec<_> = by_site.into_iter().collect();
    by_site.sort_by_key(|(_, sums)| std::cmp::Reverse(sums[0]));
    let row = |((site, ours), sums): &((&str, &str), [u64; 3])| {
        vec![bytes(sums[0]), sums[1].to_string(), bytes(sums[2]), short(site), short(ours)]
    };
    let rows: Vec<_> = by_site.iter().take(SHOWN).map(row).collect();
    let head = ["allocated", "times", "still held", "by", "for"];
    let cut = match heap.left_out {
        0 => String::new(),
        left_out => format!("\n{left_out} stacks with the fewest bytes are left out"),
    };
    format!(
        "n{} over {:.1} s, reckoned from samples; the process holds {} on {} of pages, {} are in memory\n{}{}{cut}",
        reply.node,
        reply.took_ms as f64 / 1e3,
        bytes(heap.allocated_bytes),
        bytes(heap.active_bytes),
        bytes(heap.resident_bytes),
        table(&head, &rows),
        more(by_site.len()),
    )
}

/// A function's name without the parameters of its types and at most so long that a row is legible, and its place.
fn short(frame: &str) -> String {
    const MOST: usize = 40;
    let name = frame.rsplit_once(" (").map_or(frame, |(name, _)| name);
    let (mut depth, mut bare) = (0_u32, String::new());
    for character in name.chars() {
        match character {
            // A name may begin with one: `<T as Trait>::method`.
            '<' if !bare.is_empty() && !bare.ends_with(' ') => depth += 1,
            '>' if depth > 0 => depth -= 1,
            _ if depth == 0 => bare.push(character),
            _ => {}
        }
    }
    let over = bare.chars().count().saturating_sub(MOST);
    if over > 0 {
        bare = format!("…{}", bare.chars().skip(over + 1).collect::<String>());
    }
    match place(frame) {
        "" => bare,
        place => format!("{bare}, {place}"),
    }
}

fn heap_json(reply: &v1::ProfileReply) -> Value {
    let heap = reply.heap.clone().unwrap_or_default();
    let stack = |stack: &v1::HeapStack| {
        json!({
            "frames": stack.frames,
            "allocated_bytes": stack.allocated_bytes,
            "allocations": stack.allocations,
            "live_bytes": stack.live_bytes,
            "live_allocations": stack.live_allocations,
        })
    };
    json!({
        "node": reply.node,
        "took_ms": reply.took_ms,
        "allocated_bytes": heap.allocated_bytes,
        "active_bytes": heap.active_bytes,
        "resident_bytes": heap.resident_bytes,
        "retained_bytes": heap.retained_bytes,
        "left_out": heap.left_out,
        "stacks": heap.stacks.iter().map(stack).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(state: &str, call: &str, ms: u64) -> v1::ThreadState {
        v1::ThreadState { state: state.to_owned(), call: call.to_owned(), ms }
    }

    #[test]
    fn threads_of_one_name_are_one_stack_and_one_row() {
        let thread = |name: &str, cpu_us, states| v1::ThreadProfile {
            name: name.to_owned(),
            cpu_us,
            states,
            ..Default::default()
        };
        let threads = vec![
            thread("a;b", 500_000, vec![state("runs", "", 600), state("sleeps", "futex", 400)]),
            thread("pool", 100_000, vec![state("runs", "", 1_000)]),
            thread("pool", 150_000, vec![state("runs", "", 500), state("sleeps", "futex", 0)]),
        ];
        let reply = v1::ProfileReply { node: 3, took_ms: 1_000, looks: 50, threads, ..Default::default() };
        assert_eq!(folded(&reply), "a,b;runs 600\na,b;sleeps;futex 400\npool;runs 1500\n");
        let shown = threads_table(&reply);
        let pool = shown.lines().find(|line| line.starts_with("pool")).unwrap();
        assert!(pool.contains('2') && pool.contains("25.0") && pool.contains("runs 100 %"), "{shown}");
        assert!(shown.starts_with("n3 over 1.0 s: 3 threads had 0.75 cores"), "{shown}");
    }

    #[test]
    fn who_allocates_is_named_below_the_library() {
        let stack = |frames: &[&str], allocated_bytes| v1::HeapStack {
            frames: frames.iter().map(|&frame| frame.to_owned()).collect(),
            allocated_bytes,
            ..Default::default()
        };
        let grow = "grow_one<u8> (library/alloc/src/raw_vec.rs:1)";
        let write = "write (wal/src/writer.rs:7)";
        let stacks = vec![
            stack(
                &["main", write, "pack (lz4_flex-0.13.1/src/lib.rs:3)", "<alloc::raw_vec::RawVec>::x", grow],
                2 << 20,
            ),
            stack(&["main", write, "call_once<pontoon_wal::F> (library/core/src/ops.rs:1)"], 100),
        ];
        assert_eq!(sites(&stacks[0]), ("pack (lz4_flex-0.13.1/src/lib.rs:3)", write));
        assert_eq!(sites(&stacks[1]), (write, ""));
        let reply = v1::ProfileReply {
            heap: Some(v1::HeapProfile { stacks, ..Default::default() }),
            ..Default::default()
        };
        assert!(
            folded(&reply).contains(&format!("lib.rs:3);<alloc::raw_vec::RawVec>::x;{grow} 2097152\n")),
            "{}",
            folded(&reply)
        );
        assert!(heap_table(&reply).contains("2.0 MiB"), "{}", heap_table(&reply));
        assert_eq!(short("a::B<C<D>>::e (wal/src/x.rs:1)"), "a::B::e, wal/src/x.rs:1");
        assert_eq!(short("<A<B> as C>::e"), "<A as C>::e");
        assert_eq!(short(&"x".repeat(80)).chars().count(), 40);
    }
}
