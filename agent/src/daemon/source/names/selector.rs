//! Label selectors, as `kubectl -l` takes them.

use std::collections::{BTreeMap, BTreeSet};

use kube::core::{Expression, SelectorExt as _};

/// A selector: all of its terms have to match.
#[derive(Clone, Debug)]
pub struct Selector(kube::core::Selector);

impl Selector {
    /// Parses `a=b,c!=d,e in (f,g),h notin (i),j,!k`.
    ///
    /// # Errors
    ///
    /// Says which term is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let terms: Result<Vec<Expression>, String> = terms(text).into_iter().map(term).collect();
        Ok(Self(terms?.into_iter().collect()))
    }

    /// Whether labels match.
    #[must_use]
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.matches(labels)
    }
}

/// Splits at the commas that are not in parentheses.
fn terms(text: &str) -> Vec<&str> {
    let mut depth = 0_u32;
    let parts = text.split(move |letter| {
        match letter {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        letter == ',' && depth == 0
    });
    parts.map(str::trim).collect()
}

fn term(text: &str) -> Result<Expression, String> {
    let wrong = || {
        format!(
            "{text:?} is no selector: expected key=value, key!=value, key, !key, key in (a,b) or key notin (a,b)"
        )
    };
    let key = |text: &str| {
        let text = text.trim();
        let is_good = |letter: char| letter.is_ascii_alphanumeric() || "-_./".contains(letter);
        if text.is_empty() || !text.chars().all(is_good) {
            Err(wrong())
        } else {
            Ok(text.to_owned())
        }
    };
    if let Some((name, value)) = text.split_once("!=") {
        return Ok(Expression::NotEqual(key(name)?, value.trim().to_owned()));
    }
    if let Some((name, value)) = text.split_once("==").or_else(|| text.split_once('=')) {
        return Ok(Expression::Equal(key(name)?, value.trim().to_owned()));
    }
    if let Some(name) = text.strip_prefix('!') {
        return Ok(Expression::DoesNotExist(key(name)?));
    }
    let Some((head, set)) = text.split_once('(') else {
        return Ok(Expression::Exists(key(text)?));
    };
    let set = set.trim().strip_suffix(')').ok_or_else(wrong)?;
    let set: BTreeSet<String> = set.split(',').map(|word| word.trim().to_owned()).collect();
    let (name, word) = head.trim().rsplit_once(char::is_whitespace).ok_or_else(wrong)?;
    match word {
        "in" => Ok(Expression::In(key(name)?, set)),
        "notin" => Ok(Expression::NotIn(key(name)?, set)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_those_of_kubectl() {
        let labels = BTreeMap::from([
            ("app".to_owned(), "web".to_owned()),
            ("example.org/tier".to_owned(), "front".to_owned()),
        ]);
        let matches = |text: &str| Selector::parse(text).expect(text).matches(&labels);
        for text in [
            "app=web",
            "app == web, example.org/tier!=back",
            "app in (db, web),example.org/tier",
            "app notin (db),!other",
        ] {
            assert!(matches(text), "{text}");
        }
        for text in ["app=db", "other", "!app", "app in (db,dns)", "app=web,app!=web"] {
            assert!(!matches(text), "{text}");
        }
        for text in ["", "a b", "app in web", "app of (web)", "app in (web"] {
            assert!(Selector::parse(text).is_err(), "{text}");
        }
    }
}
