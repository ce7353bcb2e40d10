//! Tables in the style of kubectl, and the same data in other formats.

#![expect(clippy::cast_precision_loss, reason = "figures for people have few digits")]

use std::fmt::Write as _;

use serde::Serialize;

use crate::tools::units::binary;

/// An output format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// A table.
    #[default]
    Table,
    /// A table with more columns, where there are any.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
}

/// Left-aligned columns, three spaces apart, with upper-case headers.
#[derive(Clone, Debug)]
pub(super) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Makes a table without rows.
    #[must_use]
    pub(super) fn new(headers: &[&str]) -> Self {
        Self { rows: vec![headers.iter().map(|header| (*header).to_owned()).collect()] }
    }

    /// Adds a row. An empty cell is printed as `-`.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells =
            cells.into_iter().map(|cell| if cell.is_empty() { "-".to_owned() } else { cell });
        self.rows.push(cells.collect());
    }

    /// Returns the table as lines without trailing spaces.
    #[must_use]
    pub(super) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or_default();
        let widths: Vec<usize> = (0..columns)
            .map(|column| {
                self.rows
                    .iter()
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.chars().count())
                    .max()
            })
            .map(Option::unwrap_or_default)
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a string cannot fail.
                let _ = write!(line, "{cell:width$}   ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Returns the data in a format; `table` makes the table.
///
/// # Errors
///
/// When the data cannot be serialized.
pub(super) fn render<T: Serialize>(
    format: Format,
    data: &T,
    table: impl FnOnce(&T) -> String,
) -> anyhow::Result<String> {
    Ok(match format {
        Format::Table | Format::Wide => table(data),
        Format::Json => serde_json::to_string_pretty(data)? + "\n",
        Format::Yaml => serde_saphyr::to_string(data)?,
    })
}

/// Formats a number of bytes with few digits: `1023`, `1.5Ki`, `12Mi`.
#[must_use]
pub(super) fn bytes(number: u64) -> String {
    let (scaled, unit) = binary(number as f64);
    if unit.is_empty() || scaled >= 10.0 {
        format!("{scaled:.0}{unit}")
    } else {
        format!("{scaled:.1}{unit}")
    }
}

/// Formats how many of all attempts failed: `0`, or `3 of 5`.
#[must_use]
pub(super) fn failures(failed: u64, attempts: u64) -> String {
    // A flow that failed in two ways was tried once.
    let attempts = attempts.max(failed);
    if failed == 0 { "0".to_owned() } else { format!("{failed} of {attempts}") }
}

/// Returns a part in percent of the whole, or 0 if the whole is 0.
#[must_use]
pub(super) fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// Formats a time span as kubectl does ages: `12s`, `5m`, `3h`, `2d`.
#[must_use]
pub(super) fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", "PORT", "KIND"]);
        table.row(["kubernetes".to_owned(), "443".to_owned(), "ClusterIP".to_owned()]);
        table.row(["a".to_owned(), String::new(), "x".to_owned()]);
        assert_eq!(
            table.text(),
            "NAME         PORT   KIND\nkubernetes   443    ClusterIP\na            -      x\n"
        );
    }

    #[test]
    fn bytes_have_few_digits() {
        assert_eq!(bytes(0), "0");
        assert_eq!(bytes(1023), "1023");
        assert_eq!(bytes(1536), "1.5Ki");
        assert_eq!(bytes(12 << 20), "12Mi");
    }

    #[test]
    fn ages_have_one_unit() {
        assert_eq!(age(90), "90s");
        assert_eq!(age(600), "10m");
        assert_eq!(age(200_000), "2d");
    }
}
