//! What was measured, as a table and as an object.

use pontoon_proto::v1;
use pontoon_shard::EngineKind;
use serde_json::{Map, Value, json};

use super::{
    stage::Moved,
    tiny::Drained,
    traffic::{Seen, Window, quantile},
};
use crate::cli::{Done, Failure, bytes, table};

/// Very many small moves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiny {
    pub(super) count: usize,
    pub(super) per_s: f64,
    pub(super) drained: Drained,
}

/// Everything that was measured.
#[derive(Default)]
pub(super) struct Report {
    pub(super) engine: EngineKind,
    pub(super) budget: String,
    /// Writes per second beside the one each millisecond, and what was answered when nobody waited.
    pub(super) rate: u32,
    pub(super) saturation: Option<f64>,
    pub(super) copy_bytes_per_s: f64,
    pub(super) engine_bytes_per_s: f64,
    pub(super) moves: Vec<Moved>,
    /// As many stretches of time without a move, one before each.
    pub(super) quiet: Vec<Window>,
    /// How much of all cores nodes and writers used in them.
    pub(super) busy: Vec<f64>,
    /// Per move: bytes that the target wrote to its disk beyond what it writes without a move, over the predicate's.
    pub(super) amplification: Vec<f64>,
    pub(super) resume_target_s: Option<f64>,
    pub(super) resume_driver_s: Option<f64>,
    pub(super) tiny: Option<Tiny>,
    pub(super) seen: Option<Seen>,
}

/// A phase of all moves.
struct Phase {
    name: String,
    /// How long a move stands in it: the middle.
    ms: f64,
    /// Of the writes that were due meanwhile; `None`: there were none.
    p99_ms: Option<f64>,
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

fn rounded(value: Option<f64>, digits: i32) -> Value {
    let scale = 10_f64.powi(digits);
    value.map_or(Value::Null, |value| json!((value * scale).round() / scale))
}

/// The middle, and both ends.
fn spread(ascending: &[f64], digits: usize) -> String {
    match (quantile(ascending, 0.5), ascending.first(), ascending.last()) {
        (Some(middle), Some(least), Some(most)) => {
            format!("{middle:.digits$} ({least:.digits$} to {most:.digits$})")
        }
        _ => "not measured".to_owned(),
    }
}

impl Report {
    fn rates(&self, seconds: fn(&Moved) -> f64) -> Vec<f64> {
        let rate = |moved: &Moved| moved.bytes as f64 / seconds(moved).max(0.001);
        sorted(self.moves.iter().map(rate))
    }

    /// Of each move of one kind, or each stretch without one, the longest that a write waited.
    fn gaps(&self, leads: Option<bool>) -> Vec<f64> {
        let Some(seen) = &self.seen else { return Vec::new() };
        let windows: Vec<Window> = match leads {
            None => self.quiet.clone(),
            Some(leads) => self
                .moves
                .iter()
                .filter(|moved| moved.leader_moved == leads)
                .map(|moved| moved.window)
                .collect(),
        };
        sorted(windows.into_iter().filter_map(|window| seen.gap(window)))
    }

    /// What each phase of a move takes, and what clients feel of it.
    fn phases(&self) -> Vec<Phase> {
        let phases =
            (v1::MovePhase::Planned as i32..v1::MovePhase::Done as i32).filter_map(|at| at.try_into().ok());
        let middle = |phase: v1::MovePhase| {
            let windows: Vec<Window> =
                self.moves.iter().filter_map(|moved| moved.phases.get(&phase).copied()).collect();
            let times = windows.iter().map(|window| window.seconds() * 1_000.0);
            let name = phase.as_str_name().trim_start_matches("MOVE_PHASE_").to_lowercase().replace('_', "-");
            let ms = quantile(&sorted(times), 0.5)?;
            let p99_ms = self.seen.as_ref().and_then(|seen| quantile(&seen.paced(&windows), 0.99));
            Some(Phase { name, ms, p99_ms })
        };
        phases.filter_map(middle).collect()
    }

    /// Write latencies without and with a move, all together; and per move the ratio of the p99 to that just before it.
    fn latencies(&self) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let Some(seen) = &self.seen else { return Default::default() };
        let during: Vec<Window> = self.moves.iter().map(|moved| moved.window).collect();
        let p99 = |window: &Window| quantile(&seen.paced(&[*window]), 0.99);
        let ratios =
            self.quiet.iter().zip(&during).filter_map(|(quiet, moving)| Some(p99(moving)? / p99(quiet)?));
        (seen.paced(&self.quiet), seen.paced(&during), sorted(ratios))
    }

    pub(super) fn done(self) -> Done {
        let failed = self.seen.as_ref().map_or(0, |seen| seen.failed);
        Done { text: self.text(), json: self.json(), code: if failed == 0 { 0 } else { Failure::ERROR } }
    }

    fn json(&self) -> Value {
        let gaps = |leads: Option<bool>| {
            let gaps = self.gaps(leads);
            let at = |share| rounded(quantile(&gaps, share), 2);
            json!({ "gap_p50_ms": at(0.5), "gap_p99_ms": at(0.99), "gap_max_ms": at(1.0) })
        };
        let (before, during, ratios) = self.latencies();
        let all = sorted([true, false].into_iter().flat_map(|leads| self.gaps(Some(leads))));
        let p99 = |ascending: &[f64]| rounded(quantile(ascending, 0.99), 3);
        let p50 = |ascending: &[f64]| rounded(quantile(ascending, 0.5), 3);
        let middle = |ascending: &[f64]| rounded(quantile(ascending, 0.5), 0);
        let seen = self.seen.as_ref();
        let resume = [self.resume_target_s, self.resume_driver_s].into_iter().flatten().reduce(f64::max);
        let drained = self.tiny.map(|tiny| tiny.drained);
        let phases = self.phases();
        let of_phases = |value: &dyn Fn(&Phase) -> Value| -> Value {
            phases.iter().map(|phase| (phase.name.clone(), value(phase))).collect::<Map<_, _>>().into()
        };
        json!({
            "engine": self.engine.to_string(),
            "budget": self.budget,
            "rate_per_s": self.rate,
            "saturation_per_s": rounded(self.saturation, 0),
            "cores_busy": p50(&sorted(self.busy.iter().copied())),
            "moves": self.moves.len(),
            "bytes": self.moves.first().map_or(0, |moved| moved.bytes),
            "failed_writes": seen.map_or(0, |seen| seen.failed),
            "first_failure": seen.and_then(|seen| seen.first_failure.clone()),
            "gap_p50_ms": rounded(quantile(&all, 0.5), 2),
            "gap_p99_ms": rounded(quantile(&all, 0.99), 2),
            "gap_max_ms": rounded(quantile(&all, 1.0), 2),
            "leader_moves": gaps(Some(true)),
            "follower_moves": gaps(Some(false)),
            "without_move": gaps(None),
            "p50_before_ms": p50(&before),
            "p50_during_ms": p50(&during),
            "p99_before_ms": p99(&before),
            "p99_during_ms": p99(&during),
            "p99_ratio": p50(&ratios),
            "bytes_per_s": middle(&self.rates(Moved::seconds)),
            "received_bytes_per_s": middle(&self.rates(Moved::received)),
            "phases_ms": of_phases(&|phase| rounded(Some(phase.ms), 1)),
            "phases_p99_ms": of_phases(&|phase| rounded(phase.p99_ms, 2)),
            "copy_bytes_per_s": rounded(Some(self.copy_bytes_per_s), 0),
            "scan_ingest_bytes_per_s": rounded(Some(self.engine_bytes_per_s), 0),
            "write_amplification": p50(&sorted(self.amplification.iter().copied())),
            "resume_s": rounded(resume, 3),
            "resume_target_s": rounded(self.resume_target_s, 3),
            "resume_driver_s": rounded(self.resume_driver_s, 3),
            "tiny": self.tiny.map_or(0, |tiny| tiny.count),
            "tiny_per_s": rounded(self.tiny.map(|tiny| tiny.per_s), 1),
            "drained_leaders": drained.map_or(0, |drained| drained.leaders),
            "drain_s": rounded(drained.map(|drained| drained.window.seconds()), 2),
            "drain_gap_ms": rounded(drained.and_then(|drained| seen?.gap(drained.window)), 2),
        })
    }

    fn text(&self) -> String {
        let (before, during, ratios) = self.latencies();
        let gap = |leads: Option<bool>| {
            let gaps = self.gaps(leads);
            let at = |share| quantile(&gaps, share).map_or_else(|| "-".to_owned(), |gap| format!("{gap:.1}"));
            vec![gaps.len().to_string(), at(0.5), at(0.99), at(1.0)]
        };
        let named = |name: &str, cells: Vec<String>| [vec![name.to_owned()], cells].concat();
        let gaps = [
            named("the leader moves", gap(Some(true))),
            named("a follower moves", gap(Some(false))),
            named("nothing moves", gap(None)),
        ];
        let at = |ascending: &[f64], share| quantile(ascending, share).unwrap_or_default();
        let seen = self.seen.as_ref();
        let phases: Vec<Vec<String>> = self
            .phases()
            .into_iter()
            .map(|Phase { name, ms, p99_ms }| {
                let p99 = p99_ms.map_or_else(|| "-".to_owned(), |p99| format!("{p99:.2}"));
                vec![name, format!("{ms:.0}"), p99]
            })
            .collect();
        let whole = self.rates(Moved::seconds);
        let per_s = |rate: f64| format!("{}/s", bytes(rate as u64));
        let mut lines = vec![
            String::new(),
            format!(
                "{} moves of {} with {} at budget {}, {} writes/s beside them and one each millisecond, cores {:.0} % busy",
                self.moves.len(),
                bytes(self.moves.first().map_or(0, |moved| moved.bytes)),
                self.engine,
                self.budget,
                self.rate,
                100.0 * at(&sorted(self.busy.iter().copied()), 0.5)
            ),
            format!("failed writes      {}", seen.map_or(0, |seen| seen.failed)),
            String::new(),
            table(&["longest wait of a write, ms", "times", "p50", "p99", "max"], &gaps),
            String::new(),
            format!(
                "writes             p50 {:.2} ms before a move, {:.2} ms during; p99 {:.2} ms before, {:.2} ms during; p99 during over \
                 before, per move: {}",
                at(&before, 0.5),
                at(&during, 0.5),
                at(&before, 0.99),
                at(&during, 0.99),
                spread(&ratios, 2)
            ),
            format!(
                "a move             {} of the whole move, {} while the state is received",
                per_s(at(&whole, 0.5)),
                per_s(at(&self.rates(Moved::received), 0.5))
            ),
            String::new(),
            table(&["phase", "ms", "p99 of writes, ms"], &phases),
            String::new(),
            format!(
                "the same bytes     {} copied over the loopback and synced, {} scanned and ingested by the engine: the move has {:.0} % \
                 of that",
                per_s(self.copy_bytes_per_s),
                per_s(self.engine_bytes_per_s),
                100.0 * at(&whole, 0.5) / self.engine_bytes_per_s.max(1.0)
            ),
            format!(
                "written            {} bytes to the target's disk per byte moved",
                spread(&sorted(self.amplification.iter().copied()), 2)
            ),
        ];
        if let (Some(target), Some(driver)) = (self.resume_target_s, self.resume_driver_s) {
            lines.push(format!(
                "resumed            {target:.2} s after a killed target serves, {driver:.2} s after another leader of the meta group"
            ));
        }
        if let Some(tiny) = &self.tiny {
            let window = tiny.drained.window;
            lines.push(format!(
                "tiny predicates    {} moved, {:.0} per second; {} leaders drained in {:.2} s, longest wait of a write {:.1} ms",
                tiny.count,
                tiny.per_s,
                tiny.drained.leaders,
                window.seconds(),
                seen.and_then(|seen| seen.gap(window)).unwrap_or_default()
            ));
        }
        lines.extend(
            seen.and_then(|seen| seen.first_failure.as_ref())
                .map(|failure| format!("first failure      {failure}")),
        );
        lines.join("\n")
    }
}
