//! JSONPath as kubectl has it: `-o jsonpath=TEMPLATE` and `--sort-by EXPRESSION`.

use std::fmt::Write as _;

use jsonpath_rust::JsonPath as _;
use serde_json::Value;

/// A part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    /// Text that is printed as it is.
    Text(String),
    /// The values at a path, with spaces between them.
    Path(String),
    /// Parts that are printed for each value at a path.
    Range(String, Vec<Part>),
}

/// A template: text, paths in braces, and `{range PATH}...{end}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template(Vec<Part>);

impl Template {
    /// Parses a template. Text without braces is one path.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if !text.contains('{') {
            return Ok(Self(vec![Part::Path(path(text)?)]));
        }
        let mut rest = text;
        let parts = parts(&mut rest, false)?;
        Ok(Self(parts))
    }

    /// Returns the template with a value's parts in it.
    pub(super) fn fill(&self, value: &Value) -> anyhow::Result<String> {
        let mut text = String::new();
        fill(&self.0, value, &mut text)?;
        Ok(text)
    }
}

/// Parses parts up to the end, or up to `{end}` within a range.
fn parts(rest: &mut &str, in_range: bool) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let Some((before, after)) = rest.split_once('{') else {
            parts.push(Part::Text((*rest).to_owned()));
            *rest = "";
            break;
        };
        if !before.is_empty() {
            parts.push(Part::Text(before.to_owned()));
        }
        let end = closing(after).ok_or_else(|| format!("a brace is not closed: {{{after}"))?;
        let (inner, tail) = after.split_at(end);
        *rest = tail.get(1..).unwrap_or_default();
        match inner.trim() {
            "end" if in_range => return Ok(parts),
            "end" => return Err("{end} without {range ...}".to_owned()),
            inner if inner.starts_with("range ") => {
                let of = path(inner.trim_start_matches("range ").trim())?;
                parts.push(Part::Range(of, self::parts(rest, true)?));
            }
            inner if inner.starts_with('"') => {
                let text = serde_json::from_str(inner)
                    .map_err(|error| format!("{inner} is no quoted text: {error}"))?;
                parts.push(Part::Text(text));
            }
            inner => parts.push(Part::Path(path(inner)?)),
        }
    }
    if in_range { Err("{range ...} without {end}".to_owned()) } else { Ok(parts) }
}

/// Returns where the brace is that closes an expression: not one within quotes.
fn closing(text: &str) -> Option<usize> {
    let mut quote = None;
    for (index, letter) in text.char_indices() {
        match (quote, letter) {
            (None, '}') => return Some(index),
            (None, '"' | '\'') => quote = Some(letter),
            (Some(open), letter) if open == letter => quote = None,
            _ => {}
        }
    }
    None
}

/// Returns a path in the form of RFC 9535. kubectl's may leave out the root and the first dot.
pub(super) fn path(text: &str) -> Result<String, String> {
    let text = text.trim();
    let text = text.strip_prefix('{').and_then(|text| text.strip_suffix('}')).unwrap_or(text);
    let path = match text.chars().next() {
        None => return Err("the path is empty".to_owned()),
        Some('$') => text.to_owned(),
        Some('@') => format!("${}", text.get(1..).unwrap_or_default()),
        Some('.' | '[') => format!("${text}"),
        Some(_) => format!("$.{text}"),
    };
    let known = Value::Null.query(&path).map(|_| ());
    known.map(|()| path).map_err(|error| format!("{text:?} is no JSONPath: {error}"))
}

/// Returns the first value at a path.
pub(super) fn first<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    value.query(path).ok()?.into_iter().next()
}

fn fill(parts: &[Part], value: &Value, text: &mut String) -> anyhow::Result<()> {
    for part in parts {
        match part {
            Part::Text(words) => text.push_str(words),
            Part::Path(path) => {
                let found = value.query(path)?;
                let words: Vec<String> = found.into_iter().map(shown).collect();
                // Writing to a string cannot fail.
                let _ = write!(text, "{}", words.join(" "));
            }
            Part::Range(path, parts) => {
                for item in value.query(path)? {
                    fill(parts, item, text)?;
                }
            }
        }
    }
    Ok(())
}

/// Returns a value as kubectl prints it: text without quotes, anything else as JSON.
fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn filled(template: &str) -> String {
        let value = json!({"items": [
            {"service": "web", "port": 80, "vips": ["10.0.0.1", "*:30080"]},
            {"service": "dns", "port": 53, "vips": []},
        ]});
        Template::parse(template).expect(template).fill(&value).expect(template)
    }

    #[test]
    fn templates_are_those_of_kubectl() {
        assert_eq!(filled("{.items[*].service}"), "web dns");
        assert_eq!(filled("{.items[0].vips}"), r#"["10.0.0.1","*:30080"]"#);
        assert_eq!(filled("items[1].port"), "53");
        assert_eq!(filled("{.items[?(@.port==53)].service}!"), "dns!");
        assert_eq!(
            filled(r#"{range .items[*]}{.service}:{@.port}{"\n"}{end}done"#),
            "web:80\ndns:53\ndone"
        );
    }

    #[test]
    fn a_wrong_template_says_what_is_wrong() {
        for (template, why) in [
            ("{.items", "not closed"),
            ("{end}", "without {range"),
            ("{range .items[*]}x", "without {end}"),
            ("{.items[}", "no JSONPath"),
            ("{}", "empty"),
        ] {
            let error = Template::parse(template).expect_err(template);
            assert!(error.contains(why), "{template}: {error}");
        }
    }
}
