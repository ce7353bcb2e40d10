//! The text forms of metrics, and which of them a scraper wants.
//!
//! OpenMetrics names a counter without the ending `_total` that its samples have; the older text
//! form (version 0.0.4) takes the name with it, and a reader of one form understands the other's
//! counters as metrics without a type.

use std::collections::BTreeSet;

/// A text form of metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// OpenMetrics 1.0.
    Open,
    /// Prometheus' text form, version 0.0.4: for whoever asks for nothing else.
    Text,
}

const OPEN: &str = "application/openmetrics-text";

impl Form {
    /// Chooses by a request's `Accept` header (RFC 9110, section 12.5.1).
    pub(super) fn wanted(accept: Option<&str>) -> Self {
        let (mut open, mut text) = (0.0, 0.0_f32);
        for range in accept.unwrap_or("*/*").split(',') {
            let mut words = range.split(';').map(str::trim);
            let kind = words.next().unwrap_or_default().to_ascii_lowercase();
            let quality = words
                .filter_map(|word| word.strip_prefix("q="))
                .find_map(|word| word.parse::<f32>().ok())
                .unwrap_or(1.0);
            match kind.as_str() {
                OPEN => open = quality,
                "text/plain" | "text/*" | "*/*" => text = text.max(quality),
                _ => {}
            }
        }
        if open > 0.0 && open >= text { Self::Open } else { Self::Text }
    }

    /// The header `Content-Type` of this form.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Open => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Whether a line says a metric's type and not its help, and the metric's name.
fn described(line: &str) -> Option<(bool, &str)> {
    let (is_type, rest) = match line.strip_prefix("# TYPE ") {
        Some(rest) => (true, rest),
        None => (false, line.strip_prefix("# HELP ")?),
    };
    Some((is_type, rest.split(' ').next()?))
}

/// Turns OpenMetrics into the older form.
pub(super) fn to_text(open: &str) -> String {
    let counters: BTreeSet<&str> = open
        .lines()
        .filter(|line| line.ends_with(" counter"))
        .filter_map(described)
        .filter_map(|(is_type, name)| is_type.then_some(name))
        .collect();
    let mut text = String::with_capacity(open.len());
    for line in open.lines().filter(|line| *line != "# EOF") {
        match described(line) {
            Some((_, name)) if counters.contains(name) => {
                let (before, after) = line.split_at("# TYPE ".len() + name.len());
                text.extend([before, "_total", after]);
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scraper_gets_the_form_that_it_asks_for() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                          text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for (accept, form) in [
            (None, Form::Text),
            (Some("*/*"), Form::Text),
            (Some("text/plain;version=0.0.4"), Form::Text),
            (Some("text/html,application/xhtml+xml,*/*;q=0.8"), Form::Text),
            (Some(prometheus), Form::Open),
            (Some("application/openmetrics-text"), Form::Open),
            (Some("Application/OpenMetrics-Text; version=0.0.1, text/plain;q=0.9"), Form::Open),
            (Some("application/openmetrics-text;q=0.1,text/plain;q=0.9"), Form::Text),
            (Some("application/openmetrics-text;q=0"), Form::Text),
            (Some("application/openmetrics-text;q=x,;,"), Form::Open),
        ] {
            assert_eq!(Form::wanted(accept), form, "{accept:?}");
        }
    }

    #[test]
    fn the_older_form_names_a_counter_as_its_samples() {
        let open = "# HELP a_b Of b.\n# TYPE a_b counter\na_b_total{x=\"# TYPE c counter\"} 1\n\
                    # HELP c Of c.\n# TYPE c gauge\nc 2\n# EOF\n";
        let text = "# HELP a_b_total Of b.\n# TYPE a_b_total counter\n\
                    a_b_total{x=\"# TYPE c counter\"} 1\n# HELP c Of c.\n# TYPE c gauge\nc 2\n";
        assert_eq!(to_text(open), text);
    }
}
