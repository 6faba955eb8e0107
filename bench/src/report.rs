//! Rows, as JSON lines or as a table with the spread.

use crate::measure::{Pair, Samples};

/// How rows are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One object a line.
    Json,
    /// For people.
    Table,
}

/// Prints rows as they come.
pub struct Report {
    suite: &'static str,
    format: Format,
    section: String,
}

impl Report {
    pub fn new(suite: &'static str, format: Format) -> Self {
        Self { suite, format, section: String::new() }
    }

    /// Begins a part of the table.
    pub fn section(&mut self, title: &str) {
        if self.format == Format::Table {
            self.section = title.to_owned();
            println!(
                "\n## {title}\n{:<58} {:>12} {:>17} {:>12} {:>17} {:>7} {:>7}",
                "case", "ours", "(p10..p90)", "baseline", "(p10..p90)", "ratio", "n"
            );
        }
    }

    /// A remark that is not a number: what was skipped and why, which goal is met.
    pub fn note(&self, text: &str) {
        match self.format {
            Format::Table => println!("{text}"),
            Format::Json => eprintln!("{text}"),
        }
    }

    /// A row of two subjects; `per` is how many units each sample stands for.
    pub fn pair(&self, case: &str, metric: &str, unit: &str, baseline: &str, per: usize, pair: &Pair) {
        let n = pair.ours.len() * per;
        self.row(case, metric, unit, &pair.ours, Some((baseline, &pair.baseline, pair.ratio())), n);
    }

    /// A row of one subject.
    pub fn single(&self, case: &str, metric: &str, unit: &str, per: usize, samples: &Samples) {
        self.row(case, metric, unit, samples, None, samples.len() * per);
    }

    /// A row of two subjects' samples that were not paired.
    pub fn samples(&self, case: &str, metric: &str, unit: &str, ours: &Samples, baseline: (&str, &Samples)) {
        let ratio = ours.median() / baseline.1.median();
        self.row(case, metric, unit, ours, Some((baseline.0, baseline.1, ratio)), ours.len());
    }

    /// A row of one number against another.
    pub fn value(&self, case: &str, metric: &str, unit: &str, value: f64, baseline: Option<(&str, f64)>) {
        let mut samples = Samples::default();
        samples.push(value);
        let other = baseline.map(|(name, v)| {
            let mut s = Samples::default();
            s.push(v);
            (name, s, value / v)
        });
        self.row(case, metric, unit, &samples, other.as_ref().map(|(n, s, r)| (*n, s, *r)), 1);
    }

    /// A row as one JSON object. What was measured against nothing has nulls for its baseline.
    fn line(
        &self,
        case: &str,
        metric: &str,
        unit: &str,
        ours: &Samples,
        baseline: Option<(&str, &Samples, f64)>,
        n: usize,
    ) -> String {
        let (name, value, ratio) = match baseline {
            Some((name, b, ratio)) => (quote(name), number(b.median()), number(ratio)),
            None => ("null".into(), "null".into(), "null".into()),
        };
        format!(
            "{{\"suite\":{},\"case\":{},\"metric\":{},\"unit\":{},\"value\":{},\"baseline\":{name},\"baseline_value\":{value},\"ratio\":{ratio},\"n\":{n}}}",
            quote(self.suite),
            quote(case),
            quote(metric),
            quote(unit),
            number(ours.median()),
        )
    }

    fn row(
        &self,
        case: &str,
        metric: &str,
        unit: &str,
        ours: &Samples,
        baseline: Option<(&str, &Samples, f64)>,
        n: usize,
    ) {
        match self.format {
            Format::Json => println!("{}", self.line(case, metric, unit, ours, baseline, n)),
            Format::Table => {
                let spread = |s: &Samples| {
                    if s.len() < 2 {
                        String::new()
                    } else {
                        format!("({}..{})", short(s.quantile(0.1)), short(s.quantile(0.9)))
                    }
                };
                let (value, wide, ratio) = match baseline {
                    Some((_, b, ratio)) => (short(b.median()), spread(b), format!("{ratio:.3}")),
                    None => (String::new(), String::new(), String::new()),
                };
                println!(
                    "{:<58} {:>12} {:>17} {value:>12} {wide:>17} {ratio:>7} {n:>7}",
                    format!("{case}: {metric}"),
                    format!("{} {unit}", short(ours.median())),
                    spread(ours),
                );
            }
        }
    }
}

fn short(v: f64) -> String {
    match v.abs() {
        a if a >= 100.0 => format!("{v:.0}"),
        a if a >= 10.0 => format!("{v:.1}"),
        _ => format!("{v:.3}"),
    }
}

fn number(v: f64) -> String {
    if v.is_finite() { format!("{v:.4}") } else { "null".into() }
}

fn quote(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if (c as u32) < 32 => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn samples(values: &[f64]) -> Samples {
        let mut s = Samples::default();
        values.iter().for_each(|v| s.push(*v));
        s
    }

    fn parsed(line: &str) -> serde_json::Map<String, Value> {
        assert!(!line.contains('\n'), "one object a line");
        let Value::Object(fields) = serde_json::from_str(line).unwrap() else { panic!("{line}") };
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        let all = ["suite", "case", "metric", "unit", "value", "baseline", "baseline_value", "ratio", "n"];
        assert!(all.iter().all(|f| names.contains(f)) && names.len() == all.len(), "{line}");
        fields
    }

    #[test]
    fn a_row_beside_its_baseline_is_one_object_with_all_fields() {
        let report = Report::new("thread", Format::Json);
        let (ours, other) = (samples(&[10.0, 30.0, 20.0]), samples(&[40.0]));
        let row =
            parsed(&report.line("2 threads", "switch", "ns", &ours, Some(("plain call", &other, 0.5)), 3));
        assert_eq!(row["suite"], "thread");
        assert_eq!(row["case"], "2 threads");
        assert_eq!((&row["metric"], &row["unit"]), (&"switch".into(), &"ns".into()));
        assert_eq!((row["value"].as_f64(), row["baseline_value"].as_f64()), (Some(20.0), Some(40.0)));
        assert_eq!((&row["baseline"], row["ratio"].as_f64()), (&"plain call".into(), Some(0.5)));
        assert_eq!(row["n"], 3);
    }

    #[test]
    fn what_has_no_baseline_or_no_value_has_nulls() {
        let report = Report::new("vm", Format::Json);
        let row = parsed(&report.line("a \"quoted\" \\ name\t", "m", "B", &samples(&[]), None, 0));
        assert_eq!(row["case"], "a \"quoted\" \\ name\t");
        assert!(["value", "baseline", "baseline_value", "ratio"].iter().all(|f| row[*f].is_null()));
    }
}
