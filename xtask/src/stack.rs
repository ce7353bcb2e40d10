//! The stack depth of each program, computed from the object: functions, their frames and calls.
//!
//! A program and everything that it calls share 512 bytes. Kernel 6.1 rounds each frame up to 32
//! bytes, newer kernels to less, so 6.1 may refuse a program that loads on a newer one.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, Rel as _, SectionHeader as _, Sym as _};
use object::{Endianness, SectionIndex};

/// The multiple that a frame is rounded up to.
const ROUND: u32 = 32;
/// The size of an instruction in bytes.
const INSTRUCTION: usize = 8;
/// The register that points to the end of the frame.
const FRAME: u8 = 10;

/// A function: its position and what it uses.
#[derive(Debug, Default)]
struct Function {
    name: String,
    frame: u32,
    calls: Vec<Place>,
}

/// A section and an instruction in it.
type Place = (usize, usize);

/// The deepest call chain of a program.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Depth {
    /// Bytes of all frames.
    pub(crate) bytes: u32,
    /// The functions and their frames.
    way: Vec<(String, u32)>,
}

impl fmt::Display for Depth {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (name, frame)) in self.way.iter().enumerate() {
            write!(formatter, "{}{name} {frame}", if at == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// Returns the deepest stack of each program of an object.
pub(crate) fn depths(object: &[u8]) -> Result<BTreeMap<String, Depth>> {
    let functions = read(object)?;
    let called: Vec<_> =
        functions.values().flat_map(|function| function.calls.iter().copied()).collect();
    functions
        .iter()
        .filter(|(place, _)| !called.contains(place))
        .map(|(place, function)| Ok((function.name.clone(), depth(&functions, *place, 0)?)))
        .collect()
}

/// Returns the stack of a function with that of its deepest callee.
fn depth(functions: &BTreeMap<Place, Function>, place: Place, level: u32) -> Result<Depth> {
    ensure!(level < 8, "functions call one another more than eight deep, which no kernel takes");
    let function =
        functions.get(&place).with_context(|| format!("there is no function at {place:?}"))?;
    let mut deepest = Depth::default();
    for callee in &function.calls {
        let below = depth(functions, *callee, level + 1)?;
        if below.bytes > deepest.bytes {
            deepest = below;
        }
    }
    let frame = function.frame.max(1).next_multiple_of(ROUND);
    let mut way = vec![(function.name.clone(), frame)];
    way.extend(deepest.way);
    Ok(Depth { bytes: frame + deepest.bytes, way })
}

fn read(object: &[u8]) -> Result<BTreeMap<Place, Function>> {
    let header = FileHeader64::<Endianness>::parse(object)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, object)?;
    let symbols = sections.symbols(endian, object, elf::SHT_SYMTAB)?;
    // The targets of calls that the linker left to the loader.
    let mut relocated = BTreeMap::new();
    for section in sections.iter() {
        let Some((relocations, _)) = section.rel(endian, object)? else { continue };
        let of = section.info_link(endian).0;
        for relocation in relocations {
            let symbol = symbols.symbol(relocation.symbol(endian).context("no symbol")?)?;
            let at = usize::try_from(relocation.r_offset.get(endian))? / INSTRUCTION;
            let to = usize::from(symbol.st_shndx.get(endian));
            let start = usize::try_from(symbol.st_value(endian))? / INSTRUCTION;
            let _ = relocated.insert((of, at), (to, start));
        }
    }
    let mut functions = BTreeMap::new();
    for symbol in symbols.iter().filter(|symbol| symbol.st_type() == elf::STT_FUNC) {
        let index = usize::from(symbol.st_shndx.get(endian));
        let code = sections.section(SectionIndex(index))?.data(endian, object)?;
        let start = usize::try_from(symbol.st_value(endian))? / INSTRUCTION;
        let count = usize::try_from(symbol.st_size(endian))? / INSTRUCTION;
        let name = String::from_utf8_lossy(symbols.symbol_name(endian, symbol)?).into_owned();
        let mut function = Function { name, ..Function::default() };
        for at in start..start + count {
            let bytes = code
                .get(at * INSTRUCTION..(at + 1) * INSTRUCTION)
                .with_context(|| format!("{} ends behind its section", function.name))?;
            follow(&mut function, bytes.try_into()?, (index, at), &relocated)?;
        }
        let _ = functions.insert((index, start), function);
    }
    ensure!(!functions.is_empty(), "the object has no functions");
    Ok(functions)
}

/// Takes one instruction into account.
fn follow(
    function: &mut Function,
    bytes: [u8; INSTRUCTION],
    (section, at): Place,
    relocated: &BTreeMap<Place, Place>,
) -> Result<()> {
    let [code, registers, low, high, immediate @ ..] = bytes;
    let (target, source) = (registers & 0xf, registers >> 4);
    let offset = i16::from_le_bytes([low, high]);
    let immediate = i32::from_le_bytes(immediate);
    let class = code & 7;
    let below = match class {
        // Loads and stores relative to the frame's end.
        1 if source == FRAME => -i32::from(offset),
        2 | 3 if target == FRAME => -i32::from(offset),
        _ => 0,
    };
    // The address of a slot is a copy of the frame's end plus a negative number. Any other addition
    // of such a number counts as one too, which overestimates the depth rather than underestimates
    // it.
    let below =
        if code == 0x07 && (-512..0).contains(&immediate) { below.max(-immediate) } else { below };
    function.frame = function.frame.max(u32::try_from(below).unwrap_or(0));
    // Calls of functions, not of helpers.
    if code == 0x85 && source == 1 {
        // The loader does not relocate calls within a section.
        let (to, from) = relocated.get(&(section, at)).copied().unwrap_or((section, at));
        let Some(start) = from.checked_add_signed(immediate as isize + 1) else {
            bail!("{} calls something before its section", function.name)
        };
        function.calls.push((to, start));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> [u8; INSTRUCTION] {
        let ([low, high], [a, b, c, d]) = (offset.to_le_bytes(), immediate.to_le_bytes());
        [code, registers, low, high, a, b, c, d]
    }

    #[test]
    fn a_frame_reaches_to_the_lowest_place_that_is_named() -> Result<()> {
        let mut function = Function::default();
        let relocated = BTreeMap::from([((1, 2), (4, 30))]);
        let mut take = |at, bytes| follow(&mut function, bytes, (1, at), &relocated);
        // *(u64 *)(r10 - 24) = r1
        take(0, instruction(0x7b, 0x1a, -24, 0))?;
        // r2 = r10; r2 += -40
        take(1, instruction(0x07, 0x02, 0, -40))?;
        // call: relocated; a helper; near
        take(2, instruction(0x85, 0x10, 0, -1))?;
        take(3, instruction(0x85, 0x00, 0, 5))?;
        take(4, instruction(0x85, 0x10, 0, 5))?;
        assert_eq!(function.frame, 40);
        assert_eq!(function.calls, [(4, 30), (1, 10)]);
        Ok(())
    }

    #[test]
    fn frames_are_rounded_up_and_added_along_the_deepest_way() -> Result<()> {
        let function = |frame, calls: &[Place]| Function {
            frame,
            calls: calls.to_vec(),
            ..Function::default()
        };
        let functions = BTreeMap::from([
            ((0, 0), function(33, &[(0, 1), (0, 2)])),
            ((0, 1), function(200, &[])),
            ((0, 2), function(0, &[(0, 3)])),
            ((0, 3), function(225, &[])),
        ]);
        assert_eq!(depth(&functions, (0, 0), 0)?.bytes, 64 + 32 + 256);
        let circle = BTreeMap::from([((0, 0), function(1, &[(0, 0)]))]);
        assert!(depth(&circle, (0, 0), 0).is_err());
        Ok(())
    }
}
