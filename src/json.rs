//! A JSON writer. Pure. It writes what RFC 8259 allows and nothing else; it reads nothing.

use std::fmt;

#[derive(Debug, Clone, PartialEq)]
pub enum Json {
    Null,
    Bool(bool),
    Number(u64),
    Text(String),
    List(Vec<Json>),
    /// In this order; each name once.
    Object(Vec<(&'static str, Json)>),
}

impl Json {
    pub fn text(text: impl Into<String>) -> Json {
        Json::Text(text.into())
    }

    pub fn texts<T: Into<String>>(all: impl IntoIterator<Item = T>) -> Json {
        Json::List(all.into_iter().map(Json::text).collect())
    }

    pub fn text_or_null(text: Option<impl Into<String>>) -> Json {
        text.map_or(Json::Null, Json::text)
    }

    /// `null` where there is nothing.
    pub fn or_null<T: Into<u64>>(number: Option<T>) -> Json {
        number.map_or(Json::Null, |n| Json::Number(n.into()))
    }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Json::Null => f.write_str("null"),
            Json::Bool(value) => write!(f, "{value}"),
            Json::Number(value) => write!(f, "{value}"),
            Json::Text(text) => string(f, text),
            Json::List(items) => {
                f.write_str("[")?;
                for (i, item) in items.iter().enumerate() {
                    let comma = if i == 0 { "" } else { "," };
                    write!(f, "{comma}{item}")?;
                }
                f.write_str("]")
            }
            Json::Object(members) => {
                f.write_str("{")?;
                for (i, (name, value)) in members.iter().enumerate() {
                    f.write_str(if i == 0 { "" } else { "," })?;
                    string(f, name)?;
                    write!(f, ":{value}")?;
                }
                f.write_str("}")
            }
        }
    }
}

fn string(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_str("\"")?;
    for c in text.chars() {
        match c {
            '"' => f.write_str("\\\"")?,
            '\\' => f.write_str("\\\\")?,
            c if c.is_control() => write!(f, "\\u{:04x}", u32::from(c))?,
            c => write!(f, "{c}")?,
        }
    }
    f.write_str("\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_that_must_be_escaped_is() {
        let text = "a\"b\\c\n\u{1}\u{1b}[0m\u{7f}é\u{fffd}";
        let want = "\"a\\\"b\\\\c\\u000a\\u0001\\u001b[0m\\u007fé\u{fffd}\"";
        assert_eq!(Json::text(text).to_string(), want);
    }

    #[test]
    fn lists_and_objects_have_commas_between_only() {
        let json = Json::Object(vec![
            ("none", Json::List(Vec::new())),
            ("two", Json::List(vec![Json::Number(u64::MAX), Json::Null])),
            ("empty", Json::Object(Vec::new())),
            ("yes", Json::Bool(true)),
        ]);
        let want = r#"{"none":[],"two":[18446744073709551615,null],"empty":{},"yes":true}"#;
        assert_eq!(json.to_string(), want);
    }
}
