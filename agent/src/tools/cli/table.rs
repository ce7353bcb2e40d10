//! Tables in the style of kubectl.
//!
//! A table fits its width. What is cut ends with an ellipsis, so that it never looks whole, and
//! figures are never cut. `-o wide` cuts nothing.

#![expect(clippy::cast_precision_loss, reason = "figures for people have few digits")]

use std::io::IsTerminal as _;

use comfy_table::{Cell, ColumnConstraint, ContentArrangement, Width, presets};
use unicode_width::UnicodeWidthStr;

use crate::tools::units::binary;

/// The width of tables where there is no terminal.
const WIDTH: usize = 80;
/// The space between two columns.
const GAP: usize = 3;
/// Columns are not made narrower than this.
const LEAST: usize = 8;
/// Columns of sentences are not made narrower than this.
const LEAST_PROSE: usize = 20;

/// When output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum When {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl When {
    /// Whether this process colours its standard output.
    pub(super) fn is_on(self) -> bool {
        let unwanted = || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let is_dumb = || std::env::var_os("TERM").is_some_and(|value| value == "dumb");
        match self {
            Self::Auto => std::io::stdout().is_terminal() && !unwanted() && !is_dumb(),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// The look of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    /// Whether states are coloured.
    pub(super) color: bool,
    /// The width that tables have to fit, or [`None`] if nothing is cut.
    pub(super) width: Option<usize>,
    /// Whether there is a line of headers.
    pub(super) headers: bool,
}

impl Style {
    /// Returns the look of tables on this process's standard output: as wide as the terminal, else
    /// as `COLUMNS` says, else 80 columns.
    pub(super) fn new(color: When, headers: bool) -> Self {
        let given = || std::env::var("COLUMNS").ok()?.parse().ok();
        let terminal = || {
            let size = ratatui::crossterm::terminal::size();
            size.ok().map(|(columns, _)| usize::from(columns)).filter(|columns| *columns > 0)
        };
        let width = if std::io::stdout().is_terminal() { terminal() } else { None }.or_else(given);
        Self { color: color.is_on(), width: Some(width.unwrap_or(WIDTH)), headers }
    }
}

/// How good a state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    /// As it should be: green.
    Good,
    /// Somebody should look: yellow.
    Warning,
    /// Something fails: red.
    Bad,
}

impl Mood {
    fn color(self) -> comfy_table::Color {
        match self {
            Self::Good => comfy_table::Color::Green,
            Self::Warning => comfy_table::Color::Yellow,
            Self::Bad => comfy_table::Color::Red,
        }
    }
}

/// A cell: text, and how good the state is that it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Text {
    text: String,
    mood: Option<Mood>,
}

impl<T: Into<String>> From<T> for Text {
    fn from(text: T) -> Self {
        Self { text: text.into(), mood: None }
    }
}

impl Text {
    /// Returns a cell in the colour of a state.
    pub(super) fn new(text: impl Into<String>, mood: Option<Mood>) -> Self {
        Self { text: text.into(), mood }
    }
}

/// What may happen to a column's cells where they do not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// Figures and words that mean something else when they are cut: never cut.
    Whole,
    /// Cut with an ellipsis.
    Cut,
    /// Sentences: continued in the next line. Then nothing in the table is cut.
    Wrap,
}

/// A column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) head: &'static str,
    pub(super) fit: Fit,
    /// Whether only `-o wide` shows it.
    pub(super) wide: bool,
}

/// Returns a column that is never cut.
pub(super) const fn whole(head: &'static str) -> Column {
    Column { head, fit: Fit::Whole, wide: false }
}

/// Returns a column that may be cut.
pub(super) const fn cut(head: &'static str) -> Column {
    Column { head, fit: Fit::Cut, wide: false }
}

/// Returns a column of sentences.
pub(super) const fn prose(head: &'static str) -> Column {
    Column { head, fit: Fit::Wrap, wide: false }
}

/// Returns a column that only `-o wide` shows.
pub(super) const fn wide(head: &'static str) -> Column {
    Column { head, fit: Fit::Whole, wide: true }
}

/// Left-aligned columns, three spaces apart, with upper-case headers.
#[derive(Clone, Debug)]
pub(super) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<Text>>,
}

impl Table {
    /// Makes a table without rows.
    #[must_use]
    pub(super) fn new(columns: &[Column]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a row. An empty cell is printed as `-`, and a control character, which a terminal might
    /// obey, as `\u{fffd}`.
    pub(super) fn row<T: Into<Text>>(&mut self, cells: impl IntoIterator<Item = T>) {
        let cells = cells.into_iter().map(|cell| {
            let mut cell: Text = cell.into();
            if cell.text.contains(is_obeyed) {
                cell.text = cell.text.replace(is_obeyed, "\u{fffd}");
            }
            if cell.text.is_empty() { Text { text: "-".to_owned(), ..cell } } else { cell }
        });
        self.rows.push(cells.collect());
    }

    /// Returns the table as lines without trailing spaces.
    #[must_use]
    pub(super) fn text(&self, style: Style) -> String {
        self.text_with(style, &self.widths(style))
    }

    /// Returns the table in columns of these widths. A whole cell that is wider stands out.
    pub(super) fn text_with(&self, style: Style, widths: &[usize]) -> String {
        let heads = self.columns.iter().map(|column| Text::from(column.head)).collect();
        let heads: Option<&Vec<Text>> = style.headers.then_some(&heads);
        if heads.is_none() && self.rows.is_empty() {
            return String::new();
        }
        let mut table = comfy_table::Table::new();
        let _ = table
            .load_preset(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Disabled)
            .set_truncation_indicator("…");
        if style.color {
            let _ = table.enforce_styling();
        } else {
            let _ = table.force_no_tty();
        }
        let wraps = self.columns.iter().any(|column| column.fit == Fit::Wrap);
        for row in heads.into_iter().chain(&self.rows) {
            let mut cells = comfy_table::Row::new();
            for cell in row {
                let mood = cell.mood.map(Mood::color);
                let text = Cell::new(&cell.text);
                let _ = cells.add_cell(match mood {
                    Some(color) => text.fg(color),
                    None => text,
                });
            }
            if !wraps {
                let _ = cells.max_height(1);
            }
            let _ = table.add_row(cells);
        }
        let last = self.columns.len().saturating_sub(1);
        for (index, (column, width)) in table.column_iter_mut().zip(widths).enumerate() {
            let gap = if index == last { 0 } else { GAP as u16 };
            let _ = column.set_padding((0, gap));
            let width = u16::try_from(*width).unwrap_or(u16::MAX - gap) + gap;
            let _ = column.set_constraint(ColumnConstraint::Absolute(Width::Fixed(width)));
        }
        table.trim_fmt() + "\n"
    }

    /// Returns the columns' widths, so that the table fits if it can.
    pub(super) fn widths(&self, style: Style) -> Vec<usize> {
        let content = |(index, column): (usize, &Column)| {
            let cells = self.rows.iter().filter_map(|row| row.get(index));
            let widest = cells.map(|cell| cell.text.width()).max().unwrap_or_default();
            if style.headers { widest.max(column.head.width()) } else { widest }
        };
        let mut widths: Vec<usize> = self.columns.iter().enumerate().map(content).collect();
        let Some(width) = style.width else { return widths };
        let gaps = GAP * widths.len().saturating_sub(1);
        loop {
            let total = widths.iter().sum::<usize>() + gaps;
            let shrinks = |(_, (column, width)): &(usize, (&Column, &mut usize))| {
                let least = match column.fit {
                    Fit::Whole => return false,
                    Fit::Cut => LEAST.max(column.head.width()),
                    Fit::Wrap => LEAST_PROSE,
                };
                **width > least
            };
            // The widest one gives way first.
            let widest = self.columns.iter().zip(&mut widths).enumerate().filter(shrinks);
            match widest.max_by_key(|(_, (_, width))| **width) {
                Some((_, (_, widest))) if total > width => *widest -= 1,
                _ => return widths,
            }
        }
    }
}

fn is_obeyed(letter: char) -> bool {
    letter.is_control() && letter != '\n'
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
pub(super) fn failures(failed: u64, attempts: u64) -> Text {
    // A flow that failed in two ways was tried once.
    let attempts = attempts.max(failed);
    if failed == 0 {
        "0".into()
    } else {
        let mood = if failed == attempts { Mood::Bad } else { Mood::Warning };
        Text::new(format!("{failed} of {attempts}"), Some(mood))
    }
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

    fn style(width: usize) -> Style {
        Style { color: false, width: Some(width), headers: true }
    }

    fn services() -> Table {
        let mut table = Table::new(&[cut("NAME"), whole("PORT"), cut("VIPS"), whole("BYTES")]);
        table.row(["kubernetes", "443", "ClusterIP", "12.6Ki"]);
        table.row(["a", "", "x", "0"]);
        table
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        assert_eq!(
            services().text(style(80)),
            "NAME         PORT   VIPS        BYTES\n\
             kubernetes   443    ClusterIP   12.6Ki\n\
             a            -      x           0\n"
        );
    }

    #[test]
    fn a_cut_cell_ends_with_an_ellipsis_and_figures_are_never_cut() {
        for width in 20..80 {
            let text = services().text(style(width));
            assert!(text.contains("12.6Ki") && text.contains("443"), "{width}:\n{text}");
            for name in text.split_whitespace().filter(|word| word.starts_with("kub")) {
                assert!(name == "kubernetes" || name.ends_with('…'), "{width}: {name}");
            }
            let widest = text.lines().map(UnicodeWidthStr::width).max();
            assert!(width < 36 || widest <= Some(width), "{width}:\n{text}");
        }
        assert_eq!(
            services().text(style(36)).lines().nth(1),
            Some("kubernet…   443    Cluster…   12.6Ki")
        );
    }

    #[test]
    fn sentences_are_continued_and_nothing_is_cut() {
        let mut table = Table::new(&[cut("OBJECT"), prose("WHY")]);
        table.row([
            "Service shop/younger",
            "Service shop/older has it, being older: not served here",
        ]);
        let text = table.text(style(50));
        assert!(!text.contains('…') && text.lines().count() > 2, "{text}");
        assert!(text.lines().all(|line| line.width() <= 50), "{text}");
    }

    #[test]
    fn nothing_in_a_cell_is_obeyed_by_a_terminal() {
        let mut table = Table::new(&[cut("NAME")]);
        table.row(["a\u{1b}[2Jb\u{9b}c"]);
        assert_eq!(table.text(style(80)), "NAME\na\u{fffd}[2Jb\u{fffd}c\n");
    }

    #[test]
    fn only_states_are_coloured_and_only_if_wanted() {
        let mut table = Table::new(&[cut("STATE"), whole("FAILED")]);
        table.row([Text::new("serving", Some(Mood::Good)), failures(3, 3)]);
        assert!(!table.text(style(80)).contains('\u{1b}'));
        let coloured = table.text(Style { color: true, ..style(80) });
        assert!(
            coloured.contains("\u{1b}[38;5;10mserving")
                && coloured.contains("\u{1b}[38;5;9m3 of 3"),
            "{coloured:?}"
        );
        let bare = table.text(Style { headers: false, ..style(80) });
        assert_eq!(bare, "serving   3 of 3\n");
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
