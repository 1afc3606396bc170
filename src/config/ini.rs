//! Text to sections and entries with their line numbers. Pure; knows no key and no section.
//!
//! A line is blank, a comment (first non-blank character `#` or `;`), a header `[kind]` or
//! `[kind NAME]`, or `key = value`. Values run to the end of the line, trimmed, and may stand in
//! double quotes to keep blanks. There are no inline comments.

/// One meaningful line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line<'a> {
    Header { kind: &'a str, name: Option<&'a str> },
    Entry { key: &'a str, value: &'a str },
}

/// Reads `text`; each item carries its line number, counted from 1, and what is wrong with the line
/// otherwise.
pub fn lines(text: &str) -> impl Iterator<Item = (u32, Result<Line<'_>, String>)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    (1..).zip(text.split('\n')).filter_map(|(number, line)| Some((number, read(line.trim())?)))
}

/// The language of a text that is written in another one, as that of like programs is, and the line
/// that shows it. No section begins it, and no line of it is an entry.
pub fn foreign(text: &str) -> Option<(u32, &'static str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = (1..).zip(text.split('\n').map(str::trim));
    let mut lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with(['#', ';']));
    let (number, first) = lines.next()?;
    let word = |key: &str| {
        !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "_-\"'".contains(c))
    };
    // a key, and no value or one behind a blank
    let yaml = |line: &str| match line.trim_start_matches("- ").split_once(':') {
        Some((key, rest)) => word(key.trim_end()) && (rest.is_empty() || rest.starts_with(' ')),
        None => line == "---" || line.starts_with("--- ") || line.starts_with("%YAML"),
    };
    if first.starts_with('{') || ["[", "[{"].contains(&first) {
        Some((number, "JSON"))
    } else if yaml(first) && !lines.any(|(_, line)| is_ini(line)) {
        Some((number, "YAML"))
    } else {
        None
    }
}

/// A section header, or an entry whose key could be one of ours.
fn is_ini(line: &str) -> bool {
    match read(line) {
        Some(Ok(Line::Entry { key, .. })) => !key.contains([':', ' ']),
        Some(Ok(Line::Header { .. })) => true,
        _ => false,
    }
}

fn read(line: &str) -> Option<Result<Line<'_>, String>> {
    if line.is_empty() || line.starts_with(['#', ';']) {
        return None;
    }
    Some(if line.contains('\0') {
        Err(format!("a NUL byte in the line: \"{line}\""))
    } else if let Some(rest) = line.strip_prefix('[') {
        header(rest)
    } else {
        entry(line)
    })
}

fn header(rest: &str) -> Result<Line<'_>, String> {
    let Some(inner) = rest.strip_suffix(']') else {
        return Err(match rest.split_once(']') {
            Some((_, behind)) => format!("text behind the section header: \"{}\"", behind.trim()),
            None => format!("section header without \"]\": \"[{rest}\""),
        });
    };
    let inner = inner.trim();
    let (kind, name) = match inner.split_once(char::is_whitespace) {
        Some((kind, name)) => (kind, Some(name.trim())),
        None => (inner, None),
    };
    match kind {
        "" => Err("empty section header".into()),
        _ => Ok(Line::Header { kind, name }),
    }
}

fn entry(line: &str) -> Result<Line<'_>, String> {
    let Some((key, value)) = line.split_once('=') else {
        return Err(format!("expected KEY = VALUE, not \"{line}\""));
    };
    let (key, value) = (key.trim(), value.trim());
    if key.is_empty() {
        return Err(format!("no key before \"=\": \"{line}\""));
    }
    let value = match value.strip_prefix('"') {
        None => value,
        Some(quoted) => match quoted.split_once('"') {
            Some((inner, "")) => inner,
            Some((_, behind)) => {
                return Err(format!("text behind the closing quote: \"{}\"", behind.trim()))
            }
            None => return Err(format!("missing closing quote: {value}")),
        },
    };
    match value {
        "" => Err(format!("no value for \"{key}\"")),
        _ => Ok(Line::Entry { key, value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_line() {
        let text = "\u{feff}# c\n ; c\r\n\n[a]\n[ a  b c ]\n k = v = w # no comment\r\nq=\" x \"\n";
        let got: Vec<_> = lines(text).map(|(n, line)| (n, line.unwrap())).collect();
        let want = [
            (4, Line::Header { kind: "a", name: None }),
            (5, Line::Header { kind: "a", name: Some("b c") }),
            (6, Line::Entry { key: "k", value: "v = w # no comment" }),
            (7, Line::Entry { key: "q", value: " x " }),
        ];
        assert_eq!(got, want);
    }

    #[test]
    fn other_languages() {
        for (text, want) in [
            ("version: 1\nrules:\n  - match: /a=b\n    direct: true\n", Some((1, "YAML"))),
            ("# a\n---\nbypass: [a, b]\n", Some((2, "YAML"))),
            ("bypass:\n  - 10.0.0.0/8\n", Some((1, "YAML"))),
            ("\n{\n  \"port\": 12345\n}\n", Some((2, "JSON"))),
            ("{ \"port\": 1 }", Some((1, "JSON"))),
            ("[global]\ndefault: drop\n", None),
            ("default: drop\n[rules]\ndrop = /a\n", None),
            ("default: drop\nbypass = private\n", None),
            ("default = drop\n", None),
            ("drop = /a: b\n", None),
            ("a::b\n", None),
            ("", None),
        ] {
            assert_eq!(foreign(text), want, "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, want) in [
            ("[a", "section header without \"]\": \"[a\""),
            ("[a] x", "text behind the section header: \"x\""),
            ("[]", "empty section header"),
            ("key", "expected KEY = VALUE, not \"key\""),
            ("= v", "no key before \"=\": \"= v\""),
            ("k =", "no value for \"k\""),
            ("k = \"v", "missing closing quote: \"v"),
            ("k = \"", "missing closing quote: \""),
            ("k = \"a\" b", "text behind the closing quote: \"b\""),
            ("k = a\0b", "a NUL byte in the line: \"k = a\0b\""),
        ] {
            assert_eq!(lines(line).next().unwrap().1.unwrap_err(), want, "{line}");
        }
    }
}
