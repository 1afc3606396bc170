//! Metrics in the text format of Prometheus, version 0.0.4
//! (prometheus.io/docs/instrumenting/exposition_formats). Pure.

use std::fmt::Write;

/// The value of a sample, and the labels that tell it from others of its family.
pub type Sample<'a> = (Vec<(&'static str, &'a str)>, u64);

#[derive(Debug, Default)]
pub struct Metrics {
    text: String,
}

impl Metrics {
    /// Adds a family; without samples it is left out. Each name is given once, and that of a counter,
    /// which grows and begins at zero again now and then, ends in `_total`.
    pub fn family<'a>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = Sample<'a>>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        let kind = if name.ends_with("_total") { "counter" } else { "gauge" };
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            self.text += name;
            for (i, (label, value)) in labels.iter().enumerate() {
                let mark = if i == 0 { '{' } else { ',' };
                let _ = write!(self.text, "{mark}{label}=\"{}\"", escaped(value));
            }
            self.text += if labels.is_empty() { "" } else { "}" };
            let _ = writeln!(self.text, " {value}");
        }
    }

    pub fn into_text(self) -> String {
        self.text
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_and_labels() {
        let mut metrics = Metrics::default();
        metrics.family("a_up", "Whether it is.", [(vec![], 1)]);
        metrics.family("none", "Never.", []);
        let labels = vec![("x", "a\"b\\c\nd"), ("y", "é")];
        metrics.family("b_total", "All.", [(labels, u64::MAX), (vec![("x", "")], 0)]);
        let want = "# HELP a_up Whether it is.\n# TYPE a_up gauge\na_up 1\n\
                    # HELP b_total All.\n# TYPE b_total counter\n\
                    b_total{x=\"a\\\"b\\\\c\\nd\",y=\"é\"} 18446744073709551615\nb_total{x=\"\"} 0\n";
        assert_eq!(metrics.into_text(), want);
    }
}
