//! The text format of Prometheus, version 0.0.4.

use std::fmt::{Display, Write};

use pontoon_wal::Histogram;

use super::table::{Kind, Metric};

/// Of a histogram's buckets every fourth is shown, from 64 µs to 34 s: each bound is twice the one before.
const STEP: usize = 4;
const FIRST: usize = 6;
const LAST: usize = 25;

/// A page as it is written. The lines of a metric stand together.
#[derive(Default)]
pub(super) struct Page {
    text: String,
    last: &'static str,
}

impl Page {
    pub(super) fn text(self) -> String {
        self.text
    }

    fn head(&mut self, metric: &Metric) {
        if self.last == metric.name {
            return;
        }
        self.last = metric.name;
        let help = metric.help.replace('\\', "\\\\").replace('\n', "\\n");
        let kind = metric.kind.word();
        let _ = writeln!(self.text, "# HELP {} {help}\n# TYPE {} {kind}", metric.name, metric.name);
    }

    pub(super) fn put(&mut self, metric: &Metric, value: impl Display) {
        self.put_with(metric, &[], value);
    }

    pub(super) fn put_with(&mut self, metric: &Metric, labels: &[(&str, &str)], value: impl Display) {
        debug_assert_ne!(metric.kind, Kind::Histogram);
        self.head(metric);
        self.line(metric.name, "", labels, value);
    }

    /// Times, in seconds.
    pub(super) fn times(&mut self, metric: &Metric, labels: &[(&str, &str)], times: &Histogram) {
        debug_assert_eq!(metric.kind, Kind::Histogram);
        self.head(metric);
        let mut at_most = 0;
        let mut counts = times.counts.iter().enumerate();
        for doubling in FIRST..=LAST {
            let nth = doubling * STEP;
            at_most += counts.by_ref().take_while(|(at, _)| *at < nth).map(|(_, count)| count).sum::<u64>();
            // The one that ended the walk.
            at_most += times.counts[nth];
            let bound = Histogram::bound(nth).map_or(f64::INFINITY, |bound| bound.as_secs_f64());
            let bound = bound.to_string();
            let with: Vec<_> = labels.iter().copied().chain([("le", bound.as_str())]).collect();
            self.line(metric.name, "_bucket", &with, at_most);
        }
        let with: Vec<_> = labels.iter().copied().chain([("le", "+Inf")]).collect();
        self.line(metric.name, "_bucket", &with, times.count);
        self.line(metric.name, "_sum", labels, times.sum.as_secs_f64());
        self.line(metric.name, "_count", labels, times.count);
    }

    fn line(&mut self, name: &str, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(name);
        self.text.push_str(suffix);
        for (at, (label, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{}{label}=\"{value}\"", if at == 0 { '{' } else { ',' });
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pontoon_wal::Times;

    use super::*;

    const COUNT: Metric =
        Metric { name: "things_total", kind: Kind::Counter, labels: &[], help: "Things.\nMany" };
    const TIMES: Metric =
        Metric { name: "things_seconds", kind: Kind::Histogram, labels: &[], help: "How long." };

    #[test]
    fn a_name_has_one_head_and_labels_are_escaped() {
        let mut page = Page::default();
        page.put_with(&COUNT, &[("what", "a\"b\\c\nd")], 1);
        page.put_with(&COUNT, &[("what", "e"), ("where", "f")], 2.5);
        assert_eq!(
            page.text(),
            "# HELP things_total Things.\\nMany\n# TYPE things_total counter\n\
             things_total{what=\"a\\\"b\\\\c\\nd\"} 1\nthings_total{what=\"e\",where=\"f\"} 2.5\n"
        );
    }

    #[test]
    fn buckets_add_up_and_each_bound_is_twice_the_one_before() {
        let times = Times::default();
        let all = [1, 64, 65, 128, 129, 1_000, 33_000_000, 40_000_000, 70_000_000];
        all.iter().for_each(|&micros| times.note(Duration::from_micros(micros)));
        let mut page = Page::default();
        page.times(&TIMES, &[], &times.copy());
        let text = page.text();
        let buckets: Vec<(f64, u64)> = text
            .lines()
            .filter_map(|line| line.strip_prefix("things_seconds_bucket{le=\""))
            .filter_map(|line| line.split_once("\"} "))
            .filter(|(bound, _)| *bound != "+Inf")
            .map(|(bound, count)| (bound.parse().unwrap(), count.parse().unwrap()))
            .collect();
        assert_eq!(buckets.len(), LAST - FIRST + 1);
        for (bound, count) in &buckets {
            let expected = all.iter().filter(|&&micros| micros as f64 / 1e6 <= *bound).count();
            assert_eq!(*count, expected as u64, "at most {bound}");
        }
        assert!(buckets.windows(2).all(|pair| (pair[1].0 / pair[0].0 - 2.0).abs() < 1e-9), "{buckets:?}");
        assert!(text.contains("le=\"+Inf\"} 9\n") && text.contains("things_seconds_count 9\n"), "{text}");
    }
}
