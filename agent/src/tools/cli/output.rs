//! Output forms and the flags of commands that list, as kubectl has them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::builder::{PossibleValue, TypedValueParser};
use clap::{Arg, Args, Command};
use serde::Serialize;
use serde_json::Value;

use super::jsonpath::{Template, first, path};
use super::names::{NamesArgs, Need};
use super::table::{Column, Style, Table, Text, When};
use super::{Outcome, Places, Usage, print};
use crate::daemon::source::names::{Names, Selector};
use crate::node::view::PortName;
use crate::tools::api::{Kind, List, Object};

/// How often a list that is watched is read.
const PERIOD: Duration = Duration::from_secs(1);

/// An output format.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Format {
    /// A table that fits the terminal.
    #[default]
    Table,
    /// A table with more columns, where nothing is cut.
    Wide,
    /// A name per line.
    Name,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// Parts of the JSON.
    JsonPath(Template),
}

/// Parses formats, and names them in the help and in completions.
#[derive(Clone, Debug)]
pub(super) struct Formats;

const JSONPATH: &str = "jsonpath=";

impl TypedValueParser for Formats {
    type Value = Format;

    fn parse_ref(
        &self,
        command: &Command,
        arg: Option<&Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<Format, clap::Error> {
        let text = value.to_string_lossy();
        let wrong = |why: String| {
            let flag = arg.map_or_else(|| "--output".to_owned(), ToString::to_string);
            let text = format!("invalid value '{text}' for '{flag}': {why}\n");
            clap::Error::raw(clap::error::ErrorKind::InvalidValue, text).with_cmd(command)
        };
        match text.as_ref() {
            "table" => Ok(Format::Table),
            "wide" => Ok(Format::Wide),
            "name" => Ok(Format::Name),
            "json" => Ok(Format::Json),
            "yaml" => Ok(Format::Yaml),
            other => match other.strip_prefix(JSONPATH) {
                Some(template) => Template::parse(template).map(Format::JsonPath).map_err(wrong),
                None => {
                    Err(wrong("expected table, wide, name, json, yaml or jsonpath=EXPR".to_owned()))
                }
            },
        }
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let words = ["table", "wide", "name", "json", "yaml", JSONPATH];
        Some(Box::new(words.into_iter().map(PossibleValue::new)))
    }
}

/// The flags of what a command prints.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Output")]
pub(super) struct Output {
    /// The format: table, wide (more columns, and nothing is cut), name, json, yaml or
    /// jsonpath=EXPR.
    #[arg(
        short = 'o',
        long = "output",
        value_name = "FORMAT",
        value_parser = Formats,
        default_value = "table",
        hide_possible_values = true,
        hide_default_value = true
    )]
    pub(super) format: Format,
    /// Print tables without their headers.
    #[arg(long)]
    pub(super) no_headers: bool,
    /// Colour states in tables.
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub(super) color: When,
}

impl Output {
    /// Returns the look of tables.
    pub(super) fn style(&self) -> Style {
        let style = Style::new(self.color, !self.no_headers);
        if self.format == Format::Wide { Style { width: None, ..style } } else { style }
    }

    /// Returns one thing in the format; `text` returns it for people.
    ///
    /// # Errors
    ///
    /// [`Usage`] for `-o name`. Also when it cannot be serialized.
    pub(super) fn object<T: Kind>(
        &self,
        body: &T,
        text: impl FnOnce(&T, Style) -> String,
    ) -> anyhow::Result<String> {
        match &self.format {
            Format::Table | Format::Wide => Ok(text(body, self.style())),
            Format::Name => bail!(Usage(format!("-o name: a {} has no name", T::KIND))),
            Format::Json | Format::Yaml | Format::JsonPath(_) => {
                self.serialized(&Object::new(body))
            }
        }
    }

    /// Returns things of one kind in the format; `text` returns them for people.
    ///
    /// # Errors
    ///
    /// [`Usage`] for `-o name`. Also when they cannot be serialized.
    pub(super) fn items<T: Kind>(
        &self,
        items: &[T],
        text: impl FnOnce(&[T], Style) -> String,
    ) -> anyhow::Result<String> {
        match &self.format {
            Format::Table | Format::Wide => Ok(text(items, self.style())),
            Format::Name => bail!(Usage(format!("-o name: a {} has no name", T::KIND))),
            Format::Json | Format::Yaml | Format::JsonPath(_) => self.serialized(&List::new(items)),
        }
    }

    /// Returns a value as JSON, YAML, or what a template takes of it.
    fn serialized<T: Serialize>(&self, value: &T) -> anyhow::Result<String> {
        Ok(match &self.format {
            Format::JsonPath(template) => template.fill(&serde_json::to_value(value)?)?,
            Format::Yaml => serde_saphyr::to_string(value)?,
            Format::Table | Format::Wide | Format::Name | Format::Json => {
                serde_json::to_string_pretty(value)? + "\n"
            }
        })
    }
}

/// Something that a command lists.
pub(super) trait Item: Kind {
    /// All columns.
    const COLUMNS: &'static [Column];

    /// Returns a cell for each column.
    fn cells(&self, is_wide: bool) -> Vec<Text>;

    /// Returns the name, `kind/name`, as the commands take it.
    fn name(&self) -> String;

    /// Returns what distinguishes it from all others.
    fn key(&self) -> String {
        self.name()
    }

    /// Returns its namespace, if it has one.
    fn namespace(&self) -> Option<&str>;

    /// Returns what has to change for a watch to print it again.
    fn state(&self) -> anyhow::Result<Value> {
        Ok(serde_json::to_value(self)?)
    }
}

/// The flags of a command that lists.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Filters")]
pub(super) struct ListArgs {
    /// List only what belongs to this namespace.
    #[arg(short, long, value_name = "NAMESPACE", conflicts_with = "all_namespaces")]
    pub(super) namespace: Option<String>,
    /// List all namespaces, which is the default.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// List only what belongs to Services with these labels, such as app=web,tier!=db. Labels are
    /// read from the agent's sources.
    #[arg(short = 'l', long, value_name = "LABELS")]
    pub(super) selector: Option<String>,
    /// Sort by the value at this JSONPath of each item, such as .failed.
    #[arg(long, value_name = "EXPR", value_parser = path, help_heading = "Output")]
    sort_by: Option<String>,
    /// Continue after the list, and print rows when they change.
    #[arg(short, long, help_heading = "Output")]
    watch: bool,
    #[command(flatten)]
    pub(super) output: Output,
}

impl ListArgs {
    /// Returns what is listed, with the names that are needed for it.
    ///
    /// # Errors
    ///
    /// [`Usage`] for a wrong selector. Also when labels cannot be read.
    pub(super) fn chosen<'a>(
        &self,
        places: &Places,
        names: &NamesArgs,
        service: Option<&'a str>,
    ) -> anyhow::Result<Chosen<'a>> {
        let selector = self.selector.as_deref().map(Selector::parse).transpose();
        let selector = selector.map_err(|error| Usage(format!("--selector: {error}")))?;
        let shows_pods = !matches!(self.output.format, Format::Table | Format::Name);
        let need = Need { namespace: self.namespace.as_deref(), pods: names.kubeconfig.is_some() };
        let names = if selector.is_some() {
            names.read(places, need).context("--selector needs the labels of Services")?
        } else if shows_pods {
            names.read_or_warn(places, need)
        } else {
            Names::default()
        };
        Ok(Chosen { service, selector, names })
    }

    /// Prints a list, once or as it changes.
    ///
    /// # Errors
    ///
    /// [`Usage`] if nothing in the list has what it is to be sorted by. Also when it cannot be
    /// read.
    pub(super) fn list<T: Item>(
        &self,
        mut read: impl FnMut() -> anyhow::Result<Vec<T>>,
    ) -> anyhow::Result<Outcome> {
        let mut items = self.taken(read()?)?;
        if !self.watch {
            return Ok(self.text(&items)?.into());
        }
        let style = self.output.style();
        let widths = self.table(&items).widths(style);
        let _ = print(&self.changed(&items, style, &widths)?)?;
        let mut known = states(&items)?;
        let style = Style { headers: false, ..style };
        loop {
            std::thread::sleep(PERIOD);
            items = self.taken(read()?)?;
            let now = states(&items)?;
            items.retain(|item| now.get(&item.key()) != known.get(&item.key()));
            let is_open = print(&self.changed(&items, style, &widths)?)?;
            if !is_open {
                return Ok(Outcome::default());
            }
            known = now;
        }
    }

    /// Returns the items of the namespace, sorted.
    fn taken<T: Item>(&self, mut items: Vec<T>) -> anyhow::Result<Vec<T>> {
        if let Some(namespace) = &self.namespace {
            items.retain(|item| item.namespace() == Some(namespace));
        }
        let Some(path) = &self.sort_by else { return Ok(items) };
        let mut keyed = Vec::new();
        for item in items {
            let value = serde_json::to_value(&item)?;
            keyed.push((Key::of(first(&value, path)), item));
        }
        if !keyed.is_empty() && keyed.iter().all(|(key, _)| *key == Key::Missing) {
            bail!(Usage(format!("--sort-by: nothing in the list has {path}; -o json shows it")));
        }
        keyed.sort_by(|(a, _), (b, _)| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
        Ok(keyed.into_iter().map(|(_, item)| item).collect())
    }

    fn table<T: Item>(&self, items: &[T]) -> Table {
        let is_wide = self.output.format == Format::Wide;
        let is_shown = |column: &Column| {
            (is_wide || !column.wide) && !(column.head == "NAMESPACE" && self.namespace.is_some())
        };
        let columns: Vec<Column> = T::COLUMNS.iter().copied().filter(is_shown).collect();
        let mut table = Table::new(&columns);
        for item in items {
            let cells = T::COLUMNS.iter().zip(item.cells(is_wide));
            table.row(cells.filter(|(column, _)| is_shown(column)).map(|(_, cell)| cell));
        }
        table
    }

    /// Returns a list in the format.
    fn text<T: Item>(&self, items: &[T]) -> anyhow::Result<String> {
        Ok(match &self.output.format {
            Format::Table | Format::Wide | Format::Name if items.is_empty() => {
                eprintln!("{}", self.nothing());
                String::new()
            }
            Format::Table | Format::Wide => self.table(items).text(self.output.style()),
            Format::Name => lines(items),
            Format::Json | Format::Yaml | Format::JsonPath(_) => {
                self.output.serialized(&List::new(items))?
            }
        })
    }

    /// Returns rows of a watch.
    fn changed<T: Item>(
        &self,
        items: &[T],
        style: Style,
        widths: &[usize],
    ) -> anyhow::Result<String> {
        Ok(match &self.output.format {
            Format::Table | Format::Wide => self.table(items).text_with(style, widths),
            Format::Name => lines(items),
            Format::Json | Format::Yaml | Format::JsonPath(_) => {
                let mut text = String::new();
                for item in items {
                    text += &self.output.serialized(&Object::new(item))?;
                }
                text
            }
        })
    }

    /// Returns what is said where nothing was found: kubectl's words.
    fn nothing(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("No resources found in {namespace} namespace."),
            None => "No resources found.".to_owned(),
        }
    }
}

/// What a command lists.
#[derive(Debug)]
pub(super) struct Chosen<'a> {
    service: Option<&'a str>,
    selector: Option<Selector>,
    pub(super) names: Names,
}

impl Chosen<'_> {
    /// Whether nothing is left out.
    pub(super) fn takes_all(&self) -> bool {
        self.service.is_none() && self.selector.is_none()
    }

    /// Whether a service port is listed.
    pub(super) fn takes(&self, name: &PortName) -> bool {
        let labels = || self.names.labels(&name.namespace, &name.service);
        self.service.is_none_or(|word| name.is(word))
            && self.selector.as_ref().is_none_or(|selector| selector.matches(&labels()))
    }
}

fn lines<T: Item>(items: &[T]) -> String {
    let mut names: Vec<String> = items.iter().map(|item| item.name() + "\n").collect();
    names.dedup();
    names.concat()
}

fn states<T: Item>(items: &[T]) -> anyhow::Result<BTreeMap<String, Value>> {
    items.iter().map(|item| Ok((item.key(), item.state()?))).collect()
}

/// A value to sort by. What is missing comes first, as in kubectl.
#[derive(Clone, Debug, PartialEq, PartialOrd)]
enum Key {
    Missing,
    Number(f64),
    Text(String),
}

impl Key {
    fn of(value: Option<&Value>) -> Self {
        match value {
            None | Some(Value::Null) => Self::Missing,
            Some(Value::Bool(is)) => Self::Number(f64::from(u8::from(*is))),
            Some(Value::Number(number)) => number.as_f64().map_or(Self::Missing, Self::Number),
            Some(Value::String(text)) => Self::Text(text.clone()),
            Some(other @ (Value::Array(_) | Value::Object(_))) => Self::Text(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::table::{cut, whole, wide};
    use super::*;
    use crate::tools::api::kinds;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        list: ListArgs,
    }

    fn args(line: &str) -> ListArgs {
        let words = std::iter::once("sluice").chain(line.split_whitespace());
        Flags::try_parse_from(words).expect(line).list
    }

    #[derive(Clone, Debug, Serialize)]
    struct Thing {
        namespace: &'static str,
        name: &'static str,
        failed: u64,
    }

    kinds! { Thing = "Thing"; }

    impl Item for Thing {
        const COLUMNS: &'static [Column] =
            &[cut("NAMESPACE"), cut("NAME"), whole("FAILED"), wide("ID")];

        fn cells(&self, _: bool) -> Vec<Text> {
            vec![
                self.namespace.into(),
                self.name.into(),
                self.failed.to_string().into(),
                "7".into(),
            ]
        }

        fn name(&self) -> String {
            format!("thing/{}/{}", self.namespace, self.name)
        }

        fn namespace(&self) -> Option<&str> {
            Some(self.namespace)
        }
    }

    fn listed(line: &str) -> String {
        let things = vec![
            Thing { namespace: "shop", name: "web", failed: 10 },
            Thing { namespace: "shop", name: "db", failed: 9 },
            Thing { namespace: "kube-system", name: "dns", failed: 0 },
        ];
        args(line).list(|| Ok(things.clone())).expect(line).text
    }

    #[test]
    fn lists_are_filtered_sorted_and_printed_as_kubectl_does() {
        assert_eq!(
            listed("--color never"),
            "NAMESPACE     NAME   FAILED\nshop          web    10\nshop          db     9\n\
             kube-system   dns    0\n"
        );
        assert_eq!(listed("-n shop --sort-by .failed --no-headers"), "db    9\nweb   10\n");
        assert_eq!(listed("-n kube-system -o wide"), "NAME   FAILED   ID\ndns    0        7\n");
        assert_eq!(listed("-o name -n shop"), "thing/shop/web\nthing/shop/db\n");
        assert_eq!(listed("-o jsonpath={.items[*].name} --sort-by=name"), "db dns web");
        assert_eq!(listed("-n nosuch"), "", "what is said is said on standard error");
        assert_eq!(args("-n a").nothing(), "No resources found in a namespace.");
        let list: Value = serde_json::from_str(&listed("-o json -n nosuch")).expect("JSON");
        assert_eq!(
            list,
            serde_json::json!({"apiVersion": "sluice.dev/v1", "kind": "ThingList", "items": []})
        );
    }

    #[test]
    fn what_cannot_be_sorted_by_is_said() {
        let error = args("--sort-by .nosuch")
            .list(|| Ok(vec![Thing { namespace: "a", name: "b", failed: 0 }]))
            .expect_err("no such field");
        assert!(error.is::<Usage>() && error.to_string().contains("$.nosuch"), "{error}");
        let words = ["sluice", "-o", "jsonpath={.x"];
        let error = Flags::try_parse_from(words).expect_err("not closed").to_string();
        assert!(error.contains("--output <FORMAT>") && error.contains("not closed"), "{error}");
        assert!(Flags::try_parse_from(["sluice", "-o", "xml"]).is_err());
    }
}
