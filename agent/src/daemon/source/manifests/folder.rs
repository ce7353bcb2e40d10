//! What a folder's files hold, and what changed in them since the last look.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use serde::Deserialize as _;
use serde_json::Value;
use sluice_core::model::Change;
use sluice_core::model::object::ObjectName;
use sluice_core::model::report::{Flaw, Note, Subject};

use super::fresh;
use crate::daemon::source::decode::{Decoder, Kind, Meta, Object, change};
use crate::daemon::source::yaml::{Document, json, yaml};

/// Lists within lists are followed this deep.
const DEPTH: usize = 4;

/// Identifies an object.
type Id = (Kind, ObjectName);

/// Tells whether a file may have changed: device, inode, length, times.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

/// A folder and what was last found in it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    decoder: Decoder,
    files: BTreeMap<Arc<Path>, File>,
    /// Object -> the files that have it, with its form and document there.
    objects: BTreeMap<Id, BTreeMap<Arc<Path>, (usize, Object)>>,
    noted: BTreeSet<Subject>,
}

/// A file as it was last read.
#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    /// Written so shortly before it was read that its stamp proves nothing.
    fresh: bool,
    objects: BTreeSet<Id>,
    notes: Vec<(usize, Note)>,
}

/// A file's content, decoded.
#[derive(Debug, Default)]
struct Reading {
    objects: BTreeMap<Id, (usize, Object)>,
    /// Objects that are there but cannot be decoded.
    undecodable: BTreeSet<Id>,
    /// Some document is broken: it may have held any object.
    broken: bool,
    notes: Vec<(usize, Note)>,
}

/// What tells a folder from another at the same path.
pub(super) fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Folder {
    /// A folder that was never looked at; or one file, which counts whatever its name.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            decoder: Decoder::default(),
            files: BTreeMap::new(),
            objects: BTreeMap::new(),
            noted: BTreeSet::new(),
        }
    }

    /// Reads what changed since the last time.
    ///
    /// # Errors
    ///
    /// When the folder itself cannot be read; then nothing has changed. What is wrong with
    /// single files comes as notes.
    pub fn scan(&mut self) -> io::Result<Vec<Change>> {
        let mut touched = BTreeSet::new();
        let present = self.list()?;
        let gone: Vec<Arc<Path>> =
            self.files.keys().filter(|path| !present.contains(*path)).cloned().collect();
        for path in gone {
            touched.extend(self.replace(&path, BTreeMap::new()));
            let _ = self.files.remove(&path);
        }
        let mut changed = !touched.is_empty();
        for path in present {
            changed |= self.look(&path, &mut touched);
        }
        let mut changes: Vec<Change> = touched.into_iter().map(|id| self.winner(id)).collect();
        if changed || !self.noted.is_empty() {
            changes.append(&mut self.notes());
        }
        Ok(changes)
    }

    /// The files that count.
    fn list(&self) -> io::Result<BTreeSet<Arc<Path>>> {
        let mut files = BTreeSet::new();
        if self.path.is_file() {
            let _ = files.insert(self.path.clone().into());
            return Ok(files);
        }
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let hidden =
                path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            let known =
                path.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json");
            if known && !hidden && !path.is_dir() {
                let _ = files.insert(path.into());
            }
        }
        Ok(files)
    }

    /// Reads a file if it may have changed, and returns whether it was read.
    fn look(&mut self, path: &Arc<Path>, touched: &mut BTreeSet<Id>) -> bool {
        let metadata = fs::metadata(path);
        let stamp = metadata.as_ref().ok().map(|metadata| {
            let times = (
                (metadata.mtime(), metadata.mtime_nsec()),
                (metadata.ctime(), metadata.ctime_nsec()),
            );
            (metadata.dev(), metadata.ino(), metadata.len(), times.0, times.1)
        });
        let known = self.files.get(path);
        if known.is_some_and(|known| known.stamp.is_some() && known.stamp == stamp && !known.fresh)
        {
            return false;
        }
        let young = fresh(metadata.ok().and_then(|metadata| metadata.modified().ok()));
        let notes = match fs::read(path) {
            Ok(bytes) => {
                let reading = self.decode(path, &bytes);
                let notes = reading.notes.clone();
                touched.extend(self.accept(path, reading));
                notes
            }
            Err(error) => {
                let what =
                    format!("cannot be read: {error}; its objects keep their last good form");
                vec![(0, Note::new(Flaw::Unreadable, "", what))]
            }
        };
        let file = self.files.entry(path.clone()).or_default();
        (file.stamp, file.fresh, file.notes) = (stamp, young, notes);
        true
    }

    /// Takes over what was read; what may only be misread keeps its last good form.
    fn accept(&mut self, path: &Arc<Path>, reading: Reading) -> BTreeSet<Id> {
        let Reading { mut objects, undecodable, broken, .. } = reading;
        let known = self.files.get(path).map(|file| file.objects.clone()).unwrap_or_default();
        for id in known.into_iter().filter(|id| broken || undecodable.contains(id)) {
            let last = self.objects.get(&id).and_then(|files| files.get(path));
            if let Some(last) = last {
                let _ = objects.entry(id).or_insert_with(|| last.clone());
            }
        }
        self.replace(path, objects)
    }

    /// Replaces a file's objects, and returns those that came, changed or went.
    fn replace(
        &mut self,
        path: &Arc<Path>,
        objects: BTreeMap<Id, (usize, Object)>,
    ) -> BTreeSet<Id> {
        let file = self.files.entry(path.clone()).or_default();
        let old = std::mem::replace(&mut file.objects, objects.keys().cloned().collect());
        let mut changed = BTreeSet::new();
        for id in old.into_iter().filter(|id| !objects.contains_key(id)) {
            if let Some(files) = self.objects.get_mut(&id) {
                let _ = files.remove(path);
                if files.is_empty() {
                    let _ = self.objects.remove(&id);
                }
            }
            let _ = changed.insert(id);
        }
        for (id, object) in objects {
            let files = self.objects.entry(id.clone()).or_default();
            if files.get(path) != Some(&object) {
                let _ = files.insert(path.clone(), object);
                let _ = changed.insert(id);
            }
        }
        changed
    }

    /// The change that an object underwent: of several files the first has it.
    fn winner(&self, (kind, name): Id) -> Change {
        let id = (kind, name);
        let object = self
            .objects
            .get(&id)
            .and_then(|files| files.values().next())
            .map(|(_, object)| object.clone());
        change(kind, id.1, object)
    }

    /// What is wrong now, and whose faults are gone.
    fn notes(&mut self) -> Vec<Change> {
        let mut notes: BTreeMap<Subject, Vec<Note>> = BTreeMap::new();
        let subject = |path: &Path, index: usize| Subject::Document {
            path: path.display().to_string(),
            index,
        };
        for (path, file) in &self.files {
            for (index, note) in &file.notes {
                notes.entry(subject(path, *index)).or_default().push(note.clone());
            }
        }
        for ((kind, name), files) in self.objects.iter().filter(|(_, files)| files.len() > 1) {
            let Some(first) = files.keys().next() else { continue };
            for (path, (index, _)) in files.iter().skip(1) {
                let what =
                    format!("{} {name} is already in {}: left out", kind.word(), first.display());
                notes.entry(subject(path, *index)).or_default().push(Note::new(
                    Flaw::DuplicateObject,
                    "",
                    what,
                ));
            }
        }
        let noted: BTreeSet<Subject> = notes.keys().cloned().collect();
        let well = std::mem::replace(&mut self.noted, noted)
            .into_iter()
            .filter(|subject| !notes.contains_key(subject));
        let well: Vec<Change> = well.map(|subject| Change::Notes(subject, Vec::new())).collect();
        well.into_iter()
            .chain(notes.into_iter().map(|(subject, notes)| Change::Notes(subject, notes)))
            .collect()
    }

    /// Decodes a file's content.
    fn decode(&mut self, path: &Path, bytes: &[u8]) -> Reading {
        let mut reading = Reading::default();
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let line = 1 + bytes
                    .iter()
                    .take(error.valid_up_to())
                    .filter(|byte| **byte == b'\n')
                    .count();
                let what =
                    format!("line {line}: not UTF-8; the file's objects keep their last good form");
                reading.broken = true;
                reading.notes.push((0, Note::new(Flaw::BrokenDocument, "", what)));
                return reading;
            }
        };
        let documents = if path.extension().is_some_and(|end| end == "json") {
            json(text)
        } else {
            yaml(text, is_read)
        };
        for Document { index, line, content } in documents {
            match content {
                Ok(value) => self.object(
                    value,
                    None,
                    &Place { index, line, depth: DEPTH, field: String::new() },
                    &mut reading,
                ),
                Err((line, why)) => {
                    let what = format!(
                        "line {line}: {why}; objects it may have held keep their last good form"
                    );
                    reading.broken = true;
                    reading.notes.push((index, Note::new(Flaw::BrokenDocument, "", what)));
                }
            }
        }
        reading
    }

    /// Decodes an object, or the objects of a list.
    fn object(
        &mut self,
        mut value: Value,
        implied: Option<(&str, &str)>,
        place: &Place,
        reading: &mut Reading,
    ) {
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let (implied_kind, implied_version) = implied.unwrap_or_default();
        let kind = text("kind").unwrap_or_else(|| implied_kind.to_owned());
        let version = text("apiVersion").unwrap_or_else(|| implied_version.to_owned());
        if let Some(item_kind) = kind.strip_suffix("List") {
            let items = value
                .get_mut("items")
                .and_then(Value::as_array_mut)
                .map(std::mem::take)
                .unwrap_or_default();
            // A dump of a cluster has thousands of these.
            let mut others: BTreeMap<String, usize> = BTreeMap::new();
            for (number, item) in items.into_iter().enumerate() {
                let implied = Some((item_kind, version.as_str())).filter(|_| !item_kind.is_empty());
                let word = |key: &str, implied: Option<&str>| {
                    let own = item.get(key).and_then(Value::as_str);
                    own.or(implied).filter(|word| !word.is_empty()).map(str::to_owned)
                };
                if let Some(kind) = word("kind", implied.map(|(kind, _)| kind))
                    && let Some(version) = word("apiVersion", implied.map(|(_, version)| version))
                    && !is_read(&kind, &version)
                {
                    *others.entry(format!("{version} {kind}")).or_default() += 1;
                    continue;
                }
                let field = format!("{}items[{number}]", place.prefix());
                if place.depth > 0 {
                    let inner = Place { field, depth: place.depth - 1, ..*place };
                    self.object(item, implied, &inner, reading);
                }
            }
            if !others.is_empty() {
                let others: Vec<String> =
                    others.into_iter().map(|(kind, count)| format!("{kind} ({count})")).collect();
                let what = format!(
                    "line {}: left out, as of no meaning here: {}",
                    place.line,
                    others.join(", ")
                );
                let note = Note::new(Flaw::UnknownKind, format!("{}items", place.prefix()), what);
                reading.notes.push((place.index, note));
            }
            return;
        }
        let note =
            |flaw: Flaw, what: String| (place.index, Note::new(flaw, place.field.clone(), what));
        let Some(kind) = Kind::from_words(&kind, &version) else {
            let what = match (kind.is_empty(), version.is_empty()) {
                (true, _) => format!("line {}: there is no kind: left out", place.line),
                (_, true) => format!("line {}: {kind} without apiVersion: left out", place.line),
                _ => format!("line {}: {version} {kind} has no meaning here: left out", place.line),
            };
            reading.notes.push(note(Flaw::UnknownKind, what));
            return;
        };
        let meta = match value.get("metadata").map(Meta::deserialize).transpose() {
            Ok(meta) => meta.unwrap_or_default(),
            Err(error) => {
                // Which object it is cannot be told, so any may keep its form.
                reading.broken = true;
                let what = format!(
                    "line {}: {} with unreadable metadata: {error}",
                    place.line,
                    kind.word()
                );
                reading.notes.push(note(Flaw::Undecodable, what));
                return;
            }
        };
        let Some(name) = meta.name.as_deref().filter(|name| !name.is_empty()) else {
            let what = format!("line {}: {} without a name: left out", place.line, kind.word());
            reading.notes.push(note(Flaw::NoName, what));
            return;
        };
        let namespace = match (kind, meta.namespace.as_deref()) {
            (Kind::Node | Kind::ServiceCidr, _) => "",
            (_, Some(namespace)) if !namespace.is_empty() => namespace,
            _ => "default",
        };
        let id = (kind, ObjectName::new(namespace, name));
        if reading.objects.contains_key(&id) || reading.undecodable.contains(&id) {
            let what = format!(
                "line {}: {} {} is already in this file: left out",
                place.line,
                kind.word(),
                id.1
            );
            reading.notes.push(note(Flaw::DuplicateObject, what));
            return;
        }
        match self.decoder.decode(kind, &meta, value) {
            Ok(object) => {
                let _ = reading.objects.insert(id, (place.index, object));
            }
            Err(error) => {
                let what = format!(
                    "line {}: {} {}: {error}; it keeps its last good form",
                    place.line,
                    kind.word(),
                    id.1
                );
                reading.notes.push(note(Flaw::Undecodable, what));
                let _ = reading.undecodable.insert(id);
            }
        }
    }
}

/// Whether an object has a meaning here, or may hold some that have.
fn is_read(kind: &str, version: &str) -> bool {
    kind.ends_with("List") || Kind::from_words(kind, version).is_some()
}

/// Where an object stands.
struct Place {
    index: usize,
    line: usize,
    depth: usize,
    field: String,
}

impl Place {
    fn prefix(&self) -> String {
        if self.field.is_empty() { String::new() } else { format!("{}.", self.field) }
    }
}
