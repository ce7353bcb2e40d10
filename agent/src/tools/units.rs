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
