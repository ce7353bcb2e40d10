//! Cuts text with several documents, so that a broken one does not hide the others.

use serde_json::Value;

use super::lists;

/// A document, or why it cannot be parsed.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Document {
    /// The document's position in the file, from 1. Empty documents do not count.
    pub(super) index: usize,
    /// The line where the document begins, from 1.
    pub(super) line: usize,
    /// The document's content, or the line and the text of an error.
    pub(super) content: Result<Value, (usize, String)>,
}

/// Reads the documents of a JSON file, up to the first broken one.
pub(super) fn json(text: &str) -> Vec<Document> {
    let mut documents = Vec::new();
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    loop {
        let line =
            1 + text.get(..values.byte_offset()).map_or(0, |before| before.matches('\n').count());
        let Some(value) = values.next() else { return documents };
        let content = value.map_err(|error| (error.line(), error.to_string()));
        let broken = content.is_err();
        documents.push(Document { index: documents.len() + 1, line, content });
        if broken {
            return documents;
        }
    }
}

/// Reads the documents of a YAML file. Of an item of a list that is not `wanted`, by its kind and
/// API version, only these two may be kept.
pub(super) fn yaml(text: &str, wanted: fn(&str, &str) -> bool) -> Vec<Document> {
    let mut documents = Vec::new();
    for (line, chunk) in chunks(text.trim_start_matches('\u{feff}')) {
        if is_empty(chunk) {
            continue;
        }
        let content =
            lists::parse(chunk, wanted, |text| parse(text).ok()).map_or_else(|| parse(chunk), Ok);
        let content = content.map_err(|(within, why)| (line + within.max(1) - 1, why));
        documents.push(Document { index: documents.len() + 1, line, content });
    }
    documents
}

/// Cuts at the marks between documents. Returns the first line and the text of each.
fn chunks(text: &str) -> Vec<(usize, &str)> {
    let mut chunks = Vec::new();
    let (mut start, mut first, mut offset) = (0, 1, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let mark = |mark: &str| {
            line.strip_prefix(mark)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
        };
        if mark("---") || mark("...") {
            chunks.push((first, text.get(start..offset).unwrap_or_default()));
            // The rest of the mark's line belongs to the new document.
            start = offset + 3;
            first = number + 1;
        }
        offset += line.len();
    }
    chunks.push((first, text.get(start..).unwrap_or_default()));
    chunks
}

/// Whether a text has only blank lines, comments and directives.
fn is_empty(chunk: &str) -> bool {
    chunk.lines().map(str::trim).all(|line| line.is_empty() || line.starts_with(['#', '%']))
}

/// Parses one document, with room for some tens of thousands of endpoints but not for alias bombs.
fn parse(chunk: &str) -> Result<Value, (usize, String)> {
    // Text that looks like JSON mostly is, and may be indented by tabs.
    if chunk.trim_start().starts_with('{')
        && let Ok(value) = serde_json::from_str(chunk)
    {
        return Ok(value);
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: 20_000_000,
            max_nodes: 10_000_000,
            max_total_scalar_bytes: 512 << 20,
        },
        strict_booleans: true,
    };
    serde_saphyr::from_str_with_options(chunk, options).map_err(|error| {
        let line = error.location().map_or(1, |location| location.line() as usize);
        (line, first_line(&error.to_string()))
    })
}

/// Returns an error's first line. The parser reports the position within the document and shows the
/// lines around it, while a report is one line and counts lines in the file.
fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    match line.split_once(": ") {
        Some((place, what)) if place.starts_with("line ") => what.to_owned(),
        _ => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_document_hides_no_other_and_tells_its_line() {
        let text = "# first\na: 1\n---\nb: [1\n--- # third\nc: 3\n---\n\n# nothing\n";
        let documents = yaml(text, |_, _| true);
        assert_eq!(documents.len(), 3);
        assert_eq!(documents[0].content, Ok(serde_json::json!({"a": 1})));
        let (line, _) = documents[1].content.clone().expect_err("a bracket is open");
        assert!((3..=5).contains(&line), "{line}");
        assert_eq!(documents[2].content, Ok(serde_json::json!({"c": 3})));
        assert_eq!((documents[2].index, documents[2].line), (3, 5));
    }

    #[test]
    fn scalars_are_what_kubernetes_takes_them_for() {
        let text = "a: 2024-08-20T15:47:51Z\nb: null\nc: ~\nd: 'true'\ne: true\nf: 10.0.0.1\ng: 80\nh: \"80\"\ni: [10.0.0.1, ::1]\n";
        let expected = serde_json::json!({
            "a": "2024-08-20T15:47:51Z", "b": null, "c": null, "d": "true", "e": true, "f": "10.0.0.1", "g": 80, "h": "80",
            "i": ["10.0.0.1", "::1"],
        });
        assert_eq!(yaml(text, |_, _| true)[0].content, Ok(expected));
    }

    #[test]
    fn json_may_be_indented_by_tabs_and_follow_json() {
        assert_eq!(
            yaml("{\n\t\"a\": 1\n}\n", |_, _| true)[0].content,
            Ok(serde_json::json!({"a": 1}))
        );
        let documents = json("{\"a\": 1}\n{\"b\": 2}\n{");
        assert_eq!(documents.len(), 3);
        assert_eq!(documents[1].content, Ok(serde_json::json!({"b": 2})));
        assert_eq!(documents[2].content.clone().map_err(|(line, _)| line), Err(3));
    }
}
