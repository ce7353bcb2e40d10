//! The JSON schema of all answers.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Value, json};

use super::{Backend, Flow, Kind, Service, VERSION};
use crate::tools::cli::answers;

/// Returns the schema of everything that `-o json` prints, except the lines of `sluice trace`.
#[must_use]
pub fn schema() -> Value {
    let mut schemas = Schemas {
        generator: SchemaSettings::draft2020_12().for_serialize().into_generator(),
        answers: Vec::new(),
    };
    schemas.list::<Service>();
    schemas.list::<Backend>();
    schemas.list::<Flow>();
    answers(&mut schemas);
    let definitions = schemas.generator.take_definitions(true);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": format!("Answers of sluice, {VERSION}"),
        "oneOf": schemas.answers,
        "$defs": definitions,
    })
}

/// The answers, as they are collected.
#[derive(Debug)]
pub(crate) struct Schemas {
    generator: SchemaGenerator,
    answers: Vec<Value>,
}

impl Schemas {
    /// Adds a list, and one of its things, which a watch prints.
    pub(crate) fn list<T: Kind + JsonSchema>(&mut self) {
        let item = self.generator.subschema_for::<T>();
        self.answers.push(json!({
            "title": T::LIST,
            "type": "object",
            "properties": {
                "apiVersion": {"const": VERSION},
                "kind": {"const": T::LIST},
                "items": {"type": "array", "items": item},
            },
            "required": ["apiVersion", "kind", "items"],
        }));
        self.object::<T>();
    }

    /// Adds a thing.
    pub(crate) fn object<T: Kind + JsonSchema>(&mut self) {
        let body = self.generator.subschema_for::<T>();
        self.answers.push(json!({
            "title": T::KIND,
            "type": "object",
            "properties": {"apiVersion": {"const": VERSION}, "kind": {"const": T::KIND}},
            "required": ["apiVersion", "kind"],
            "allOf": [body],
        }));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_document_is_the_schema() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/schema.json");
        let text = serde_json::to_string_pretty(&schema()).expect("JSON") + "\n";
        if std::env::var_os("SLUICE_BLESS").is_some() {
            fs::write(&path, &text).expect("docs can be written");
        }
        let found = fs::read_to_string(&path).unwrap_or_default();
        assert!(found == text, "SLUICE_BLESS=1 cargo test -p sluice --lib schema writes {path:?}");
    }
}
