//! Formats numbers for people.

/// Scales a number to the largest binary unit that leaves at least one: `(1.5, "Ki")`, `(12.0,
/// "")`.
#[must_use]
pub(crate) fn binary(number: f64) -> (f64, &'static str) {
    let (mut scaled, mut unit) = (number, "");
    for next in ["Ki", "Mi", "Gi", "Ti", "Pi"] {
        if scaled < 1024.0 {
            break;
        }
        scaled /= 1024.0;
        unit = next;
    }
    (scaled, unit)
}

/// Returns a part in percent of the whole, or 0 if the whole is 0.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "figures for people have few digits")]
pub(crate) fn percent(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}
