//! What `status` shows in columns: each is declared once, and printed as text and as JSON.

use std::io::IsTerminal;

use crate::error::printable;
use crate::json::Json;
use crate::log::Escaped;

/// A column: its title in text, its member's name in JSON; or only one of them.
pub struct Column {
    title: Option<&'static str>,
    member: Option<&'static str>,
    right: bool,
}

impl Column {
    pub const fn left(title: &'static str) -> Column {
        Column { title: Some(title), member: None, right: false }
    }

    pub const fn right(title: &'static str) -> Column {
        Column { right: true, ..Column::left(title) }
    }

    pub const fn json(member: &'static str) -> Column {
        Column { title: None, member: Some(member), right: false }
    }

    pub const fn member(self, member: &'static str) -> Column {
        Column { member: Some(member), ..self }
    }
}

/// One thing that is shown.
pub struct Value {
    text: String,
    json: Json,
    red: bool,
}

impl Value {
    pub fn new(text: impl Into<String>, json: Json) -> Value {
        Value { text: text.into(), json, red: false }
    }

    /// Something that is not there.
    pub fn none() -> Value {
        Value::new("-", Json::Null)
    }

    pub fn text(text: &str) -> Value {
        Value::new(printable(text), Json::text(text))
    }

    pub fn maybe(text: Option<impl AsRef<str>>) -> Value {
        text.map_or(Value::none(), |text| Value::text(text.as_ref()))
    }

    /// The path of a cgroup; in JSON as it is, where it is UTF-8.
    pub fn path(path: &[u8]) -> Value {
        match path {
            [] => Value::text("/"),
            path => {
                Value::new(Escaped(path).to_string(), Json::text(String::from_utf8_lossy(path)))
            }
        }
    }

    pub fn number(number: Option<impl Into<u64>>) -> Value {
        Value::shown(number, |number| number.to_string())
    }

    pub fn hex(number: Option<u32>) -> Value {
        Value::shown(number, |number| format!("{number:#010x}"))
    }

    pub fn bytes(count: Option<u64>) -> Value {
        Value::shown(count, bytes)
    }

    fn shown(number: Option<impl Into<u64>>, text: fn(u64) -> String) -> Value {
        let number = number.map(Into::into);
        number.map_or(Value::none(), |number| Value::new(text(number), Json::Number(number)))
    }

    pub fn red(self) -> Value {
        Value { red: true, ..self }
    }
}

/// Rows of such columns.
pub struct Rows<const N: usize> {
    pub columns: &'static [Column; N],
    pub rows: Vec<[Value; N]>,
}

impl<const N: usize> Rows<N> {
    /// Writes it in columns that are as wide as their widest piece; the titles first, where there are
    /// any.
    pub fn print(&self, out: &mut String, style: Style) {
        let rows: Vec<&[Value]> = self.rows.iter().map(|row| &row[..]).collect();
        lay_out(self.columns, &rows, out, style);
    }

    /// The same behind a blank line; nothing where there are no rows.
    pub fn print_if_any(&self, out: &mut String, style: Style) {
        if !self.rows.is_empty() {
            out.push('\n');
            self.print(out, style);
        }
    }

    pub fn json(self) -> Json {
        let row = |row: [Value; N]| object(self.columns, row.into());
        Json::List(self.rows.into_iter().map(row).collect())
    }
}

fn lay_out(columns: &[Column], rows: &[&[Value]], out: &mut String, style: Style) {
    let shown = || columns.iter().enumerate().filter(|(_, column)| column.title.is_some());
    let width = |(i, column): (usize, &Column)| {
        let texts = rows.iter().map(|row| &*row[i].text).chain(column.title);
        texts.map(|text| text.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = shown().map(width).collect();
    let mut print = |row: &mut dyn Iterator<Item = (&str, bool, Option<u8>)>| {
        let mut line = String::new();
        for ((text, right, colour), width) in row.zip(&widths) {
            let pad = " ".repeat(width - text.chars().count());
            let text = match colour.filter(|_| style.colour) {
                Some(colour) => format!("\x1b[{colour}m{text}\x1b[0m"),
                None => text.to_string(),
            };
            line.push_str(if line.is_empty() { "" } else { "  " });
            line.push_str(&match right {
                true => pad + &text,
                false => text + &pad,
            });
        }
        out.push_str(line.trim_end());
        out.push('\n');
    };
    let titles = || shown().filter_map(|(_, column)| Some((column.title?, column.right, BOLD)));
    if titles().any(|(title, ..)| !title.is_empty()) {
        print(&mut titles());
    }
    for row in rows {
        let colour = |red: bool| red.then_some(RED);
        let texts = shown().map(|(i, column)| (&*row[i].text, column.right, colour(row[i].red)));
        print(&mut { texts });
    }
}

fn object(columns: &[Column], row: Vec<Value>) -> Json {
    let members = columns.iter().zip(row);
    let members = members.filter_map(|(column, value)| Some((column.member?, value.json)));
    Json::Object(members.collect())
}

/// Parameters of the terminal's SGR sequence.
const BOLD: Option<u8> = Some(1);
const RED: u8 = 31;

/// What standard output can show.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    pub terminal: bool,
    pub colour: bool,
}

impl Style {
    /// Colour only on a terminal that has it, and not where the user does not want it
    /// (no-color.org).
    pub fn of_stdout() -> Style {
        let terminal = std::io::stdout().is_terminal();
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        Style { terminal, colour: terminal && !unwanted && !dumb }
    }
}

/// Bytes with an IEC unit.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    // in integers: the library's formatting of floats is 8 KiB of program
    let tenths = |shift: usize| ((u128::from(count) * 10 + (1 << (shift - 1))) >> shift) as u64;
    let mut unit = 0;
    // what would be rounded to 1024.0 belongs to the next unit
    while tenths(10 * (unit + 1)) >= 10240 && unit + 1 < UNITS.len() {
        unit += 1;
    }
    let value = tenths(10 * (unit + 1));
    format!("{}.{} {}", value / 10, value % 10, UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iec_units() {
        for (count, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (1024 * 1024 - 1, "1.0 MiB"),
            (5 << 40, "5.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), want);
        }
    }

    #[test]
    fn columns_are_declared_once() {
        const COLUMNS: [Column; 3] = [
            Column::left("a").member("name"),
            Column::json("kind"),
            Column::right("N").member("number"),
        ];
        let rows = || {
            let row = |text, number: Option<u32>| [text, Value::text("any"), Value::number(number)];
            vec![row(Value::text("long"), Some(100)), row(Value::text("é").red(), None)]
        };
        let table = || Rows { columns: &COLUMNS, rows: rows() };
        // colours do not count
        let shown = |colour| {
            let mut out = String::new();
            table().print(&mut out, Style { terminal: colour, colour });
            out
        };
        assert_eq!(shown(false), "a       N\nlong  100\né       -\n");
        let coloured =
            "\x1b[1ma\x1b[0m       \x1b[1mN\x1b[0m\nlong  100\n\x1b[31mé\x1b[0m       -\n";
        assert_eq!(shown(true), coloured);
        let json = r#"[{"name":"long","kind":"any","number":100},{"name":"é","kind":"any","number":null}]"#;
        assert_eq!(table().json().to_string(), json);
    }

    #[test]
    fn a_table_without_titles_has_no_head() {
        const COLUMNS: [Column; 2] = [Column::left(""), Column::left("")];
        let rows = vec![[Value::text("missing").red(), Value::text("a rule")]];
        let mut out = String::new();
        Rows { columns: &COLUMNS, rows }.print(&mut out, Style { terminal: false, colour: false });
        assert_eq!(out, "missing  a rule\n");
    }
}
