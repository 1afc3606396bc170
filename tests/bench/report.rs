//! Rows of figures: a table for people, JSON for programs.

use std::fmt::Write;
use std::fs;

/// What a figure must reach.
#[derive(Clone, Copy)]
pub enum Target {
    None,
    /// The value itself, at most.
    AtMost(f64),
    /// The ratio to the reference, at most.
    RatioAtMost(f64),
    /// The ratio to the reference, at least.
    RatioAtLeast(f64),
}

struct Row {
    figure: String,
    value: f64,
    unit: &'static str,
    reference: Option<(String, f64)>,
    ratio: Option<f64>,
    target: String,
    met: Option<bool>,
}

pub struct Report {
    machine: String,
    rows: Vec<Row>,
}

impl Report {
    pub fn new() -> Report {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find(|l| l.starts_with("model name"));
        let model = model.and_then(|l| l.split(": ").nth(1));
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let machine = format!(
            "{cores} x {}, Linux {}, load {}",
            model.unwrap_or(std::env::consts::ARCH),
            read("/proc/sys/kernel/osrelease").trim(),
            read("/proc/loadavg").split(' ').next().unwrap_or_default(),
        );
        Report { machine, rows: Vec::new() }
    }

    /// A figure without a reference.
    pub fn alone(&mut self, figure: impl Into<String>, value: f64, unit: &'static str, t: Target) {
        self.push(figure.into(), value, unit, None, t);
    }

    /// A figure beside `reference`, which is in the same unit.
    pub fn beside(
        &mut self,
        figure: impl Into<String>,
        value: f64,
        unit: &'static str,
        reference: (&str, f64),
        target: Target,
    ) {
        let reference = Some((reference.0.to_owned(), reference.1));
        self.push(figure.into(), value, unit, reference, target);
    }

    fn push(
        &mut self,
        figure: String,
        value: f64,
        unit: &'static str,
        reference: Option<(String, f64)>,
        target: Target,
    ) {
        let ratio = reference.as_ref().map(|(_, r)| value / r);
        let (target, met) = match target {
            Target::None => (String::new(), None),
            Target::AtMost(most) => (format!("<= {} {unit}", number(most)), Some(value <= most)),
            Target::RatioAtMost(most) => (format!("<= {most} x"), ratio.map(|r| r <= most)),
            Target::RatioAtLeast(least) => (format!(">= {least} x"), ratio.map(|r| r >= least)),
        };
        let row = Row { figure, value, unit, reference, ratio, target, met };
        eprintln!("bench: {}", row.cells().join("  "));
        self.rows.push(row);
    }

    pub fn table(&self) -> String {
        let mut rows =
            vec![["figure", "value", "reference", "ratio", "target", "met"].map(String::from)];
        rows.extend(self.rows.iter().map(Row::cells));
        let widths: [usize; 6] =
            std::array::from_fn(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0));
        let mut out = format!("\n{}\n", self.machine);
        rows.insert(1, widths.map(|w| "-".repeat(w)));
        for row in &rows {
            let cells: Vec<String> =
                (row.iter().zip(widths)).map(|(cell, w)| format!("{cell:w$}")).collect();
            let _ = writeln!(out, "| {} |", cells.join(" | "));
        }
        let of = |met| self.rows.iter().filter(|r| r.met == Some(met)).count();
        let _ = writeln!(out, "{} targets met, {} missed", of(true), of(false));
        out
    }

    pub fn json(&self) -> String {
        let rows: Vec<String> = self.rows.iter().map(Row::json).collect();
        format!(
            "{{\n  \"machine\": {:?},\n  \"quick\": {},\n  \"rows\": [\n    {}\n  ]\n}}\n",
            self.machine,
            crate::quick_run(),
            rows.join(",\n    ")
        )
    }
}

impl Row {
    fn cells(&self) -> [String; 6] {
        let reference = self.reference.as_ref();
        [
            self.figure.clone(),
            format!("{} {}", number(self.value), self.unit),
            reference.map_or(String::new(), |(name, value)| {
                format!("{} {} ({name})", number(*value), self.unit)
            }),
            self.ratio.map_or(String::new(), |r| format!("{r:.2}")),
            self.target.clone(),
            self.met.map_or("", |met| if met { "yes" } else { "NO" }).to_owned(),
        ]
    }

    /// Names hold nothing that Rust and JSON would write in different ways.
    fn json(&self) -> String {
        let finite = |v: f64| match v.is_finite() {
            true => v.to_string(),
            false => "null".to_owned(),
        };
        let or_null = |text: Option<String>| text.unwrap_or("null".to_owned());
        format!(
            "{{\"figure\": {:?}, \"value\": {}, \"unit\": {:?}, \"reference\": {}, \"reference_name\": {}, \"ratio\": {}, \"target\": {:?}, \"met\": {}}}",
            self.figure,
            finite(self.value),
            self.unit,
            or_null(self.reference.as_ref().map(|r| finite(r.1))),
            or_null(self.reference.as_ref().map(|r| format!("{:?}", r.0))),
            or_null(self.ratio.map(finite)),
            self.target,
            or_null(self.met.map(|m| m.to_string())),
        )
    }
}

/// Three significant digits, or all of an integer's.
fn number(value: f64) -> String {
    match value.abs() {
        v if v == v.trunc() || v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The value below which the part `q` of the samples lies.
pub fn quantile(samples: &[f64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1).expect("at least one sample");
    sorted[(last as f64 * q).round() as usize]
}

pub fn median(samples: &[f64]) -> f64 {
    quantile(samples, 0.5)
}
