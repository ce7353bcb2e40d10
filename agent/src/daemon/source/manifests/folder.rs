//! The objects in a directory's files, and what has changed in them since the last scan.

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

/// Lists within lists are followed to this depth.
const DEPTH: usize = 4;

/// The identity of an object.
type Id = (Kind, ObjectName);

/// Device, inode, length and times of a file. If they are unchanged, so is the file.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

/// A directory, and what the last scan found in it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    decoder: Decoder,
    files: BTreeMap<Arc<Path>, File>,
    /// For each object the files that have it, with its document and form there.
    objects: BTreeMap<Id, BTreeMap<Arc<Path>, (usize, Object)>>,
    noted: BTreeSet<Subject>,
}

/// A file as it was last read.
#[derive(Debug, Default)]
struct File {
    stamp: Option<Stamp>,
    /// Whether it was written so shortly before it was read that its stamp proves nothing.
    fresh: bool,
    objects: BTreeSet<Id>,
    notes: Vec<(usize, Note)>,
}

/// A file's decoded content.
#[derive(Debug, Default)]
struct Reading {
    objects: BTreeMap<Id, (usize, Object)>,
    /// Objects that exist but cannot be decoded.
    undecodable: BTreeSet<Id>,
    /// Whether a document is broken. It may have held any object.
    broken: bool,
    notes: Vec<(usize, Note)>,
}

/// Returns what distinguishes a directory from another at the same path.
pub(super) fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Folder {
    /// Makes a directory that has not been scanned. The path may also be one file, whatever its
    /// name.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            decoder: Decoder::default(),
            files: BTreeMap::new(),
            objects: BTreeMap::new(),
            noted: BTreeSet::new(),
        }
    }

    /// Reads what has changed since the last scan.
    ///
    /// # Errors
    ///
    /// Fails if the directory itself cannot be read. Then nothing has changed. Errors in single
    /// files are reported as notes.
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

    /// Returns the files that count.
    pub(in crate::daemon::source) fn list(&self) -> io::Result<BTreeSet<Arc<Path>>> {
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

    /// Reads a file if it may have changed. Returns whether it was read.
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

    /// Takes over what was read. Objects that may only have been misread keep their last good form.
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

    /// Replaces a file's objects. Returns those that were added, changed or removed.
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

    /// Returns the change to an object. If several files have it, the first counts.
    fn winner(&self, (kind, name): Id) -> Change {
        let id = (kind, name);
        let object = self
            .objects
            .get(&id)
            .and_then(|files| files.values().next())
            .map(|(_, object)| object.clone());
        change(kind, id.1, object)
    }

    /// Returns notes of all present problems, and empty notes for files without any.
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
                    format!("{} {name} is already in {}: left out", kind.as_str(), first.display());
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
                        "line {line}: {why}; objects that it may have held keep their last good form"
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
            let items = value.get_mut("items").and_then(Value::as_array_mut).map(std::mem::take);
            self.list_items(items.unwrap_or_default(), (item_kind, &version), place, reading);
            return;
        }
        if is_for_people(&kind, &version) {
            return;
        }
        match identify(&value, &kind, &version, place, reading) {
            Ok((id, meta)) => self.one(id, &meta, value, place, reading),
            Err((flaw, what)) => reading.notes.push(place.note(flaw, what)),
        }
    }

    /// Decodes the items of a list. Items without kind and API version have those of the list.
    fn list_items(
        &mut self,
        items: Vec<Value>,
        (kind, version): (&str, &str),
        place: &Place,
        reading: &mut Reading,
    ) {
        let implied = Some((kind, version)).filter(|_| !kind.is_empty());
        // A dump of a cluster has thousands of these.
        let mut others: BTreeMap<String, usize> = BTreeMap::new();
        for (number, item) in items.into_iter().enumerate() {
            let word = |key: &str, implied: Option<&str>| {
                let own = item.get(key).and_then(Value::as_str);
                own.or(implied).filter(|word| !word.is_empty()).map(str::to_owned)
            };
            if let Some(kind) = word("kind", implied.map(|(kind, _)| kind))
                && let Some(version) = word("apiVersion", implied.map(|(_, version)| version))
                && !is_read(&kind, &version)
            {
                if is_for_people(&kind, &version) {
                    continue;
                }
                *others.entry(format!("{version} {kind}")).or_default() += 1;
                continue;
            }
            let field = format!("{}items[{number}]", place.prefix());
            if place.depth > 0 {
                let inner = Place { field, depth: place.depth - 1, ..*place };
                self.object(item, implied, &inner, reading);
            }
        }
        if others.is_empty() {
            return;
        }
        let others: Vec<String> =
            others.into_iter().map(|(kind, count)| format!("{kind} ({count})")).collect();
        let what = format!("line {}: left out unused kinds: {}", place.line, others.join(", "));
        let note = Note::new(Flaw::UnknownKind, format!("{}items", place.prefix()), what);
        reading.notes.push((place.index, note));
    }

    /// Decodes an object that is not a list.
    fn one(&mut self, id: Id, meta: &Meta, value: Value, place: &Place, reading: &mut Reading) {
        let of = format!("line {}: {} {}", place.line, id.0.as_str(), id.1);
        if reading.objects.contains_key(&id) || reading.undecodable.contains(&id) {
            let what = format!("{of} is already in this file: left out");
            reading.notes.push(place.note(Flaw::DuplicateObject, what));
            return;
        }
        match self.decoder.decode(id.0, meta, value) {
            Ok(object) => {
                let _ = reading.objects.insert(id, (place.index, object));
            }
            Err(error) => {
                let what = format!("{of}: {error}; it keeps its last good form");
                reading.notes.push(place.note(Flaw::Undecodable, what));
                let _ = reading.undecodable.insert(id);
            }
        }
    }
}

/// Returns an object's identity and metadata, or what is wrong with them.
fn identify(
    value: &Value,
    kind: &str,
    version: &str,
    place: &Place,
    reading: &mut Reading,
) -> Result<(Id, Meta), (Flaw, String)> {
    let line = place.line;
    let kind = Kind::from_words(kind, version).ok_or_else(|| {
        let what = match (kind.is_empty(), version.is_empty()) {
            (true, _) => format!("line {line}: no kind: left out"),
            (_, true) => format!("line {line}: {kind} without apiVersion: left out"),
            _ => format!("line {line}: {version} {kind} is not used: left out"),
        };
        (Flaw::UnknownKind, what)
    })?;
    let meta = value.get("metadata").map(Meta::deserialize).transpose().map_err(|error| {
        // The object's identity is unknown, so any object may keep its form.
        reading.broken = true;
        let what = format!("line {line}: {} with unreadable metadata: {error}", kind.as_str());
        (Flaw::Undecodable, what)
    })?;
    let meta = meta.unwrap_or_default();
    let Some(name) = meta.name.as_deref().filter(|name| !name.is_empty()) else {
        let what = format!("line {line}: {} without a name: left out", kind.as_str());
        return Err((Flaw::NoName, what));
    };
    let namespace = match (kind, meta.namespace.as_deref()) {
        (Kind::Node | Kind::ServiceCidr, _) => "",
        (_, Some(namespace)) if !namespace.is_empty() => namespace,
        _ => "default",
    };
    Ok(((kind, ObjectName::new(namespace, name)), meta))
}

/// Whether an object is read, or may contain objects that are.
fn is_read(kind: &str, version: &str) -> bool {
    kind.ends_with("List") || Kind::from_words(kind, version).is_some()
}

/// Whether an object only gives names to what people read.
fn is_for_people(kind: &str, version: &str) -> bool {
    (kind, version) == ("Pod", "v1")
}

/// The position of an object.
struct Place {
    index: usize,
    line: usize,
    depth: usize,
    field: String,
}

impl Place {
    fn note(&self, flaw: Flaw, what: String) -> (usize, Note) {
        (self.index, Note::new(flaw, self.field.clone(), what))
    }

    fn prefix(&self) -> String {
        if self.field.is_empty() { String::new() } else { format!("{}.", self.field) }
    }
}
