//! Cuts a `List`, as `kubectl get -o yaml` prints it, into its items before it is parsed.
//!
//! A dump of a cluster has tens of megabytes, most of them in Pods and `managedFields`, which are
//! not needed. Parsing them takes seconds. Finding the end of an item is nearly free: all items
//! begin in the same column, and the other lines of an item are indented further. Items of other
//! kinds are not parsed at all. The others are parsed without `managedFields` and on all CPUs. A
//! text that does not look like such a list, or that has an item which cannot be parsed by itself,
//! is parsed as a whole.

use std::num::NonZero;
use std::thread;

use serde_json::{Value, json};

/// The fewest items per thread.
const ITEMS_OF_A_THREAD: usize = 64;

/// Parses a list. Returns [`None`] if the text is not a list, or has to be parsed as a whole.
///
/// Of an item that is not `wanted`, by its kind and API version, only these two are kept.
pub(super) fn parse(
    text: &str,
    wanted: fn(&str, &str) -> bool,
    parser: fn(&str) -> Option<Value>,
) -> Option<Value> {
    let (rest, width, items) = cut(text)?;
    let mut list = parser(&rest)?;
    if !list.get("kind")?.as_str()?.ends_with("List") {
        return None;
    }
    let item = |text: &&str| -> Option<Value> {
        match words(text, width) {
            Some((kind, version)) if !wanted(kind, version) => {
                Some(json!({ "kind": kind, "apiVersion": version }))
            }
            _ => parser(&alone(text, width)),
        }
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    let share = items.len().div_ceil(threads).max(ITEMS_OF_A_THREAD);
    let values: Option<Vec<Value>> = thread::scope(|scope| {
        let parts: Vec<_> = items
            .chunks(share)
            .map(|part| scope.spawn(move || part.iter().map(item).collect::<Option<Vec<Value>>>()))
            .collect();
        let parts = parts.into_iter().map(|part| part.join().ok().flatten());
        parts.collect::<Option<Vec<_>>>().map(|parts| parts.into_iter().flatten().collect())
    });
    *list.get_mut("items")? = Value::Array(values?);
    Some(list)
}

/// Cuts a list into its text without items, the column of the items' dashes, and the items.
fn cut(text: &str) -> Option<(String, usize, Vec<&str>)> {
    let mut offset = 0;
    let mut lines = text.split_inclusive('\n').map(|line| {
        offset += line.len();
        (offset - line.len(), line)
    });
    let (head, _) = lines.find(|(_, line)| line.trim_end() == "items:")?;
    let mut width = None;
    let mut begins: Vec<usize> = Vec::new();
    let mut end = text.len();
    for (at, line) in lines {
        let bare = line.trim_start_matches(' ');
        let indent = line.len() - bare.len();
        if bare.trim().is_empty() || bare.starts_with('#') {
            continue;
        }
        if bare.starts_with('\t') {
            return None;
        }
        let width = *width.get_or_insert(indent);
        if indent == width && bare.starts_with("- ") {
            begins.push(at);
        } else if indent <= width {
            // This line comes after the items. If items are indented, nothing else is in their
            // column.
            if indent != 0 {
                return None;
            }
            end = at;
            break;
        } else if begins.is_empty() {
            return None;
        }
    }
    let ends = begins.iter().skip(1).copied().chain([end]);
    let items: Option<Vec<&str>> =
        begins.iter().zip(ends).map(|(begin, end)| text.get(*begin..end)).collect();
    let items = items.filter(|items| !items.is_empty())?;
    let rest = format!("{}items: []\n{}", text.get(..head)?, text.get(end..)?);
    Some((rest, width?, items))
}

/// Returns an item's lines with their indentation, counting the dash as a space.
fn lines(item: &str, width: usize) -> impl Iterator<Item = (usize, &str)> {
    item.split_inclusive('\n').enumerate().map(move |(number, line)| {
        let line = if number == 0 { line.get(width + 1..).unwrap_or_default() } else { line };
        let bare = line.trim_start_matches(' ');
        let indent = line.len() - bare.len() + if number == 0 { width + 1 } else { 0 };
        (indent, bare)
    })
}

/// Returns an item's kind and API version, if both are plain words.
fn words(item: &str, width: usize) -> Option<(&str, &str)> {
    let column = lines(item, width).next()?.0;
    let mut found = [None; 2];
    for (_, line) in lines(item, width).filter(|(indent, _)| *indent == column) {
        for (found, key) in found.iter_mut().zip(["kind:", "apiVersion:"]) {
            if let Some(rest) = line.strip_prefix(key) {
                *found = Some(rest.trim());
            }
        }
        if let [Some(_), Some(_)] = found {
            break;
        }
    }
    let is_plain = |word: &str| {
        word.starts_with(|letter: char| letter.is_ascii_alphabetic())
            && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"./-".contains(&byte))
    };
    match found {
        [Some(kind), Some(version)] if is_plain(kind) && is_plain(version) => Some((kind, version)),
        _ => None,
    }
}

/// Returns an item as a document of its own, without `metadata.managedFields`.
fn alone(item: &str, width: usize) -> String {
    let mut text = String::with_capacity(item.len());
    let column = lines(item, width).next().map_or(width + 2, |(indent, _)| indent);
    let (mut in_metadata, mut skipped) = (false, None);
    for (indent, line) in lines(item, width) {
        let is_blank = line.trim().is_empty();
        if let Some(of) = skipped {
            if is_blank || indent > of || indent == of && line.starts_with("- ") {
                continue;
            }
            skipped = None;
        }
        if !is_blank && indent <= column {
            in_metadata = line.trim_end() == "metadata:";
        } else if in_metadata && indent == column + 2 && line.trim_end() == "managedFields:" {
            skipped = Some(indent);
            continue;
        }
        text.extend(std::iter::repeat_n(' ', indent));
        text.push_str(line);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parser(text: &str) -> Option<Value> {
        serde_saphyr::from_str(text).ok()
    }

    fn services_alone(kind: &str, _: &str) -> bool {
        kind == "Service"
    }

    fn parsed(text: &str) -> Option<Value> {
        parse(text, services_alone, parser)
    }

    const DUMP: &str = r#"apiVersion: v1
items:
- apiVersion: v1
  data:
    text: |
      - apiVersion: v1
        kind: Service
      items:

      # no comment
  kind: ConfigMap
  metadata: {name: c}
# a comment
- apiVersion: v1
  kind: Service
  metadata:
    annotations:
      a: "one
        two"
    managedFields:
    - apiVersion: v1
      fieldsV1:
        f:spec: {}
      manager: m

    - manager: n
    name: s
  spec:
    managedFields:
    - kept
    ports:
    - port: 80
-   kind: Service
    metadata:
      managedFields: []
      name: t
- {kind: Service, apiVersion: v1}
kind: List
metadata:
  resourceVersion: ""
"#;

    #[test]
    fn a_list_is_what_the_parser_makes_of_it_but_for_what_nobody_reads() {
        let found = parsed(DUMP).expect("a list");
        let mut expected = parser(DUMP).expect("YAML");
        expected["items"][0] = json!({"kind": "ConfigMap", "apiVersion": "v1"});
        let _ =
            expected["items"][1]["metadata"].as_object_mut().expect("one").remove("managedFields");
        assert_eq!(found, expected);
        // Items may be indented.
        let indented: String = DUMP
            .split_inclusive('\n')
            .skip(2)
            .take_while(|line| *line != "kind: List\n")
            .map(|line| if line.trim().is_empty() { line.to_owned() } else { format!("  {line}") })
            .collect();
        let indented = format!("apiVersion: v1\nkind: List\nitems:\n{indented}");
        let mut found = parsed(&indented).expect("a list");
        found["metadata"] = expected["metadata"].clone();
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_no_such_list_is_left_to_the_parser() {
        for text in [
            "",
            "kind: Service\nspec: {}\n",
            "kind: List\nitems: []\n",
            "kind: List\nitems:\n",
            "kind: List\nitems: # none\n- kind: Service\n",
            "kind: ConfigMap\nitems:\n- kind: Service\n",
            "kind: List\nitems:\n- kind: Service\n  spec: [\n",
            "kind: List\nitems:\n- &a\n  kind: Service\n- *a\n",
            "kind: List\nitems:\n  - kind: Service\n  more: 1\n",
            "kind: List\nitems:\n\t- kind: Service\n",
            "kind: List\nitems:\n-\n  kind: Service\n",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
    }
}
