//! Figures as a table, and as JSON.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// The unit of a figure, which decides which of several samples is the truest: whatever disturbs a
/// measurement makes a time longer and a rate lower.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Nanoseconds.
    Time,
    /// Connections a second.
    Rate,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Time => "ns",
            Self::Rate => "connects/s",
        }
    }
}

/// One figure of every agent.
#[derive(Serialize)]
pub(crate) struct Row {
    /// The subject of the measurement.
    what: String,
    /// The best sample of each agent, in the agents' order.
    best: Vec<f64>,
    /// The median of each.
    median: Vec<f64>,
}

impl Row {
    /// Makes a row of the samples of each agent.
    pub(crate) fn new(what: impl Into<String>, unit: Unit, samples: Vec<Vec<f64>>) -> Self {
        let (mut best, mut median) = (Vec::new(), Vec::new());
        for mut of_one in samples {
            of_one.sort_by(f64::total_cmp);
            let truest = if unit == Unit::Time { of_one.first() } else { of_one.last() };
            best.push(truest.copied().unwrap_or(f64::NAN));
            median.push(of_one.get(of_one.len() / 2).copied().unwrap_or(f64::NAN));
        }
        Self { what: what.into(), best, median }
    }

    /// Returns the first agent's figure as a multiple of the second's.
    fn ratio(&self) -> Option<f64> {
        match self.best[..] {
            [this, other] => Some(this / other),
            _ => None,
        }
    }
}

/// Prints all figures, and writes them where `json` says.
pub(crate) fn print(unit: Unit, names: &[&str], rows: &[Row], json: Option<&Path>) -> Result<()> {
    let unit = unit.name();
    let mut table = Table::new();
    let _ = table.load_preset(presets::NOTHING);
    let mut heads = vec!["MEASURED".to_owned()];
    heads.extend(names.iter().map(|name| format!("{} {unit} (MEDIAN)", name.to_uppercase())));
    if names.len() == 2 {
        heads.push("RATIO".to_owned());
    }
    let columns = heads.len();
    let _ = table.set_header(heads);
    for row in rows {
        let mut cells = vec![row.what.clone()];
        for (best, median) in row.best.iter().zip(&row.median) {
            cells.push(format!("{best:.0} ({median:.0})"));
        }
        cells.extend(row.ratio().map(|ratio| format!("{ratio:.2}")));
        let _ = table.add_row(cells);
    }
    for column in 1..columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    println!("{table}");
    if let Some(path) = json {
        let file =
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        serde_json::to_writer_pretty(
            file,
            &serde_json::json!({ "unit": unit, "agents": names, "rows": rows }),
        )
        .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
