//! Rows of figures: a table for people, JSON for programs.
//!
//! A figure is a median, and so is what it stands beside. What is taken by turns is compared round by
//! round, so that a busy moment takes part in both, and a target is met, or missed, where the rounds
//! leave no doubt of it; where they do, the row says `unclear`.

use std::fmt::Write;
use std::fs;

/// What a figure must reach.
#[derive(Clone, Copy)]
pub enum Target {
    None,
    /// The value itself, at most. For what no machine makes faster or slower.
    AtMost(f64),
    /// The ratio to the reference, at most.
    RatioAtMost(f64),
    /// The ratio to the reference, at least.
    RatioAtLeast(f64),
}

/// What was measured of one thing, a sample a round; or a count, which is what it is.
#[derive(Clone)]
pub struct Samples(Vec<f64>);

impl From<f64> for Samples {
    fn from(exact: f64) -> Samples {
        Samples(vec![exact])
    }
}

impl From<&Vec<f64>> for Samples {
    fn from(samples: &Vec<f64>) -> Samples {
        Samples(samples.clone())
    }
}

impl From<Vec<f64>> for Samples {
    fn from(samples: Vec<f64>) -> Samples {
        Samples(samples)
    }
}

impl Samples {
    /// Round by round, where there are as many rounds; else beside the median of the others.
    fn zip(&self, others: &Samples, with: impl Fn(f64, f64) -> f64) -> Samples {
        let alike = self.0.len() == others.0.len();
        let middle = others.median();
        let pair = |(i, own): (usize, &f64)| with(*own, if alike { others.0[i] } else { middle });
        Samples(self.0.iter().enumerate().map(pair).collect())
    }

    fn median(&self) -> f64 {
        median(&self.0)
    }

    /// Where the median of infinitely many rounds lies, with a chance of one in a hundred that it
    /// does not: the order of the samples tells, whatever their distribution.
    fn interval(&self) -> (f64, f64) {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len() as f64;
        let first = ((count - 2.6 * count.sqrt()) / 2.0).max(0.0) as usize;
        (sorted[first], sorted[sorted.len() - 1 - first])
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Met {
    Yes,
    No,
    Unclear,
}

impl Met {
    /// `excess` is what is above the most that may be.
    fn of(excess: &Samples) -> Met {
        match excess.interval() {
            (_, high) if high <= 0.0 => Met::Yes,
            (low, _) if low > 0.0 => Met::No,
            _ => Met::Unclear,
        }
    }
}

struct Row {
    figure: String,
    value: f64,
    /// The interval of the median; see [`Samples::interval`].
    between: (f64, f64),
    unit: &'static str,
    reference: Option<(String, f64)>,
    ratio: Option<f64>,
    target: String,
    met: Option<Met>,
}

pub struct Report {
    machine: String,
    rows: Vec<Row>,
    skipped: Vec<String>,
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
        Report { machine, rows: Vec::new(), skipped: Vec::new() }
    }

    /// A figure without a reference.
    pub fn alone(
        &mut self,
        figure: impl Into<String>,
        value: impl Into<Samples>,
        unit: &'static str,
        target: Target,
    ) {
        self.push(figure.into(), value.into(), unit, None, target);
    }

    /// A figure beside `reference`, which is in the same unit.
    pub fn beside(
        &mut self,
        figure: impl Into<String>,
        value: impl Into<Samples>,
        unit: &'static str,
        reference: (&str, impl Into<Samples>),
        target: Target,
    ) {
        let reference = Some((reference.0, reference.1.into()));
        self.push(figure.into(), value.into(), unit, reference, target);
    }

    /// What this machine cannot measure, and why.
    pub fn skip(&mut self, what: &str, reason: &str) {
        let line = format!("SKIP: {what}: {}", reason.trim().replace('\n', "; "));
        eprintln!("bench: {line}");
        self.skipped.push(line);
    }

    fn push(
        &mut self,
        figure: String,
        samples: Samples,
        unit: &'static str,
        reference: Option<(&str, Samples)>,
        target: Target,
    ) {
        let value = samples.median();
        let beside = reference.as_ref().map(|(_, reference)| reference);
        let ratio = |within: &dyn Fn(f64, f64) -> f64| {
            beside.map(|reference| Met::of(&samples.zip(reference, within)))
        };
        let (target, met) = match target {
            Target::None => (String::new(), None),
            Target::AtMost(most) => {
                let excess = samples.zip(&most.into(), |own, most| own - most);
                (format!("<= {} {unit}", number(most)), Some(Met::of(&excess)))
            }
            Target::RatioAtMost(most) => {
                (format!("<= {most} x"), ratio(&|own, reference| own - most * reference))
            }
            Target::RatioAtLeast(least) => {
                (format!(">= {least} x"), ratio(&|own, reference| least * reference - own))
            }
        };
        let row = Row {
            figure,
            value,
            between: samples.interval(),
            unit,
            ratio: beside.map(|reference| value / reference.median()),
            reference: reference.map(|(name, samples)| (name.to_owned(), samples.median())),
            target,
            met,
        };
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
        for line in &self.skipped {
            let _ = writeln!(out, "{line}");
        }
        let of = |met| self.rows.iter().filter(|r| r.met == Some(met)).count();
        let [met, missed, unclear] = [Met::Yes, Met::No, Met::Unclear].map(of);
        let _ = writeln!(out, "{met} targets met, {missed} missed, {unclear} unclear");
        out
    }

    pub fn json(&self) -> String {
        let rows: Vec<String> = self.rows.iter().map(Row::json).collect();
        let skipped: Vec<String> = self.skipped.iter().map(|line| format!("{line:?}")).collect();
        format!(
            "{{\n  \"machine\": {:?},\n  \"quick\": {},\n  \"skipped\": [{}],\n  \"rows\": [\n    {}\n  ]\n}}\n",
            self.machine,
            crate::quick_run(),
            skipped.join(", "),
            rows.join(",\n    ")
        )
    }
}

impl Row {
    fn cells(&self) -> [String; 6] {
        let reference = self.reference.as_ref();
        let (low, high) = self.between;
        let about = match low == high {
            true => String::new(),
            false => format!(" ±{}", number((high - low) / 2.0)),
        };
        [
            self.figure.clone(),
            format!("{}{about} {}", number(self.value), self.unit),
            reference.map_or(String::new(), |(name, value)| {
                format!("{} {} ({name})", number(*value), self.unit)
            }),
            self.ratio.map_or(String::new(), |r| format!("{r:.2}")),
            self.target.clone(),
            match self.met {
                None => "",
                Some(Met::Yes) => "yes",
                Some(Met::No) => "NO",
                Some(Met::Unclear) => "unclear",
            }
            .to_owned(),
        ]
    }

    /// Names hold nothing that Rust and JSON would write in different ways.
    fn json(&self) -> String {
        let finite = |v: f64| match v.is_finite() {
            true => v.to_string(),
            false => "null".to_owned(),
        };
        let or_null = |text: Option<String>| text.unwrap_or("null".to_owned());
        // neither where it is unclear
        let met = self.met.and_then(|met| match met {
            Met::Unclear => None,
            clear => Some((clear == Met::Yes).to_string()),
        });
        format!(
            "{{\"figure\": {:?}, \"value\": {}, \"low\": {}, \"high\": {}, \"unit\": {:?}, \"reference\": {}, \"reference_name\": {}, \"ratio\": {}, \"target\": {:?}, \"met\": {}}}",
            self.figure,
            finite(self.value),
            finite(self.between.0),
            finite(self.between.1),
            self.unit,
            or_null(self.reference.as_ref().map(|r| finite(r.1))),
            or_null(self.reference.as_ref().map(|r| format!("{:?}", r.0))),
            or_null(self.ratio.map(finite)),
            self.target,
            or_null(met),
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
