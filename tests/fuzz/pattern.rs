//! A rule's pattern says of any text what its regex alone would say: the look for literal text in
//! front of it rules out no match, and the group around it gives a pattern no other meaning.
//!
//! The first line of the input is the pattern, each other line a text.

#![no_main]

use cgtproxy::config;
use libfuzzer_sys::{fuzz_target, Corpus};
use regex_lite::RegexBuilder;

fuzz_target!(|input: &str| -> Corpus {
    let mut lines = input.lines();
    let pattern = lines.next().unwrap_or_default();
    let Ok(compiled) = config::pattern::compile(pattern) else {
        return Corpus::Keep;
    };
    let build = |text: &str| RegexBuilder::new(text).nest_limit(100).build();
    let alone = build(pattern).expect("well-formed without a group around it too");
    // the newline ends a comment of (?x), which would swallow the end of the group
    let whole = build(&format!(r"\A(?:{pattern})\z"))
        .or_else(|_| build(&format!("\\A(?:{pattern}\n)\\z")))
        .expect("well-formed with a group around it");
    for text in lines {
        let matches = compiled.is_match(text);
        assert_eq!(matches, whole.is_match(text), "{pattern:?} {text:?}");
        assert!(!matches || alone.is_match(text), "{pattern:?} {text:?}");
        for (at, _) in text.char_indices() {
            let standing = compiled.stand(&text[..at]);
            let from = compiled.is_match_from(standing, text, at);
            assert_eq!(from, matches, "{pattern:?} {text:?} from {at}");
        }
    }
    Corpus::Keep
});
