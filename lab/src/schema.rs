//! Checks JSON against a JSON schema, by the keywords that `schemars` writes.

use serde_json::Value;

/// Keywords without an effect on what is valid.
const REMARKS: [&str; 6] = ["$schema", "$defs", "title", "description", "format", "default"];

/// Checks a value against a schema. Fails with where the value differs.
///
/// # Errors
///
/// If the value does not follow the schema, or the schema has a keyword that is not known here.
pub fn check(schema: &Value, value: &Value) -> Result<(), String> {
    follow(schema, schema, value, "")
}

fn follow(root: &Value, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
    let Value::Object(schema) = schema else {
        let is_open = schema == &Value::Bool(true);
        return if is_open { Ok(()) } else { Err(format!("{at}: nothing is allowed")) };
    };
    for (keyword, wanted) in schema {
        match keyword.as_str() {
            "$ref" => {
                let path = wanted.as_str().and_then(|path| path.strip_prefix('#'));
                let target = path.and_then(|path| root.pointer(path));
                follow(root, target.ok_or_else(|| format!("no {wanted}"))?, value, at)?;
            }
            "type" => {
                let types = wanted.as_array().map_or(std::slice::from_ref(wanted), Vec::as_slice);
                if !types.iter().filter_map(Value::as_str).any(|name| is(value, name)) {
                    return Err(format!("{at}: {value} is no {wanted}"));
                }
            }
            "const" if value != wanted => return Err(format!("{at}: {value} is not {wanted}")),
            "enum" if !list(wanted).contains(value) => {
                return Err(format!("{at}: {value} is none of {wanted}"));
            }
            "minimum" if value.is_number() && value.as_f64() < wanted.as_f64() => {
                return Err(format!("{at}: {value} is less than {wanted}"));
            }
            "maximum" if value.is_number() && value.as_f64() > wanted.as_f64() => {
                return Err(format!("{at}: {value} is more than {wanted}"));
            }
            "const" | "enum" | "minimum" | "maximum" => {}
            "required" => {
                let missing = |name: &&str| value.is_object() && value.get(name).is_none();
                if let Some(name) = list(wanted).iter().filter_map(Value::as_str).find(missing) {
                    return Err(format!("{at}: there is no {name}"));
                }
            }
            "properties" => {
                for (name, inner) in wanted.as_object().into_iter().flatten() {
                    if let Some(value) = value.get(name) {
                        follow(root, inner, value, &format!("{at}/{name}"))?;
                    }
                }
            }
            "items" => {
                for (index, value) in list(value).iter().enumerate() {
                    follow(root, wanted, value, &format!("{at}/{index}"))?;
                }
            }
            "allOf" => list(wanted).iter().try_for_each(|inner| follow(root, inner, value, at))?,
            "anyOf" | "oneOf" => {
                let results = list(wanted).iter().map(|inner| follow(root, inner, value, at));
                let mut errors = Vec::new();
                let mut fits = 0;
                for result in results {
                    match result {
                        Ok(()) => fits += 1,
                        Err(error) => errors.push(error),
                    }
                }
                if fits == 0 || keyword == "oneOf" && fits > 1 {
                    return Err(format!("{at}: {fits} forms fit: {}", errors.join("; ")));
                }
            }
            remark if REMARKS.contains(&remark) => {}
            other => return Err(format!("{at}: the keyword {other} is not known")),
        }
    }
    Ok(())
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn is(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_does_not_follow_the_schema_is_named() {
        let schema = json!({
            "oneOf": [{"type": "object", "required": ["kind"], "properties": {
                "kind": {"const": "A"}, "items": {"type": "array", "items": {"$ref": "#/$defs/B"}}}}],
            "$defs": {"B": {"type": ["integer", "null"], "minimum": 0}},
        });
        assert_eq!(check(&schema, &json!({"kind": "A", "items": [1, null]})), Ok(()));
        for (value, why) in [
            (json!({"kind": "C"}), "\"C\" is not \"A\""),
            (json!({}), "no kind"),
            (json!({"kind": "A", "items": [-1]}), "/items/0: -1 is less"),
            (json!({"kind": "A", "items": ["x"]}), "\"x\" is no"),
        ] {
            let error = check(&schema, &value).expect_err(why);
            assert!(error.contains(why), "{error}");
        }
    }
}
