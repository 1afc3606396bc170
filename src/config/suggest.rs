//! Spelling: what somebody may have meant. Pure.

/// `, did you mean …?` where a known word is close to what was written.
pub fn did_you_mean<'a>(
    written: &str,
    known: impl IntoIterator<Item = &'a str>,
    show: impl Fn(&str) -> String,
) -> String {
    let lower = str::to_ascii_lowercase;
    let close = (written.chars().count() / 3).clamp(1, 3);
    (known.into_iter())
        .map(|word| (distance(&lower(written), &lower(word)), word))
        // two short words that share no letter are not alike
        .filter(|(d, word)| *d <= close && *d < written.len().min(word.len()))
        .min()
        .map_or(String::new(), |(_, word)| format!(", did you mean {}?", show(word)))
}

/// The likeliest reason for a bad value that holds a remark.
pub fn remark(value: &str) -> &'static str {
    match [" #", " ;", "\t#", "\t;"].iter().any(|mark| value.contains(mark)) {
        true => "; a comment needs a line of its own",
        false => "",
    }
}

/// Optimal string alignment distance: insertions, deletions, substitutions, swaps of neighbours.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().take(64).collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let same = usize::from(a[i - 1] != b[j - 1]);
                let mut best =
                    (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + same);
                if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                    best = best.min(rows[i - 2][j - 2] + 1);
                }
                best
            };
        }
    }
    rows[a.len()][b.len()]
}
