//! Loads the object: finds, makes or replaces its maps, and has its programs verified.

use std::collections::BTreeMap;
use std::path::Path;

use sluice_core::image::{Dataplane, Image, diff};

use super::audit::MapPins;
use super::error::Error;
use super::hooks::{Hooks, Xdp};
use super::kernel::Kernel;
use super::layouts::{Layout, Rounds};
use super::maps::{self, Access, Maps};
use super::object;
use super::pins::{Found, Pins, is_kept};
use super::programs::{Loader, lift_memlock};

/// The loaded object.
#[derive(Debug)]
pub struct Loaded {
    /// The maps.
    pub kernel: Kernel,
    /// The programs, attached nowhere yet.
    pub hooks: Hooks,
    /// Whether the maps already hold an image, so that the programs may be attached immediately.
    pub filled: bool,
}

/// Loads the built-in object, with pins under the pin path.
///
/// `sizes` gives maps another capacity than the object's.
///
/// # Errors
///
/// Fails if the object, the BPF file system, a map or a program is refused.
pub fn load(
    pins: &Pins,
    sizes: &BTreeMap<String, u32>,
    xdp: Xdp,
    layout: Layout,
) -> Result<Loaded, Error> {
    let object = object::bytes()?;
    let specs = object::specs(object, sizes)?;
    lift_memlock();
    pins.prepare()?;
    let loader = Loader::new(object, pins.maps(), specs, sizes.clone());
    let mut rounds = Rounds::begin(loader, pins, layout, &object::previous_specs(object)?)?;
    let found = pins.compare(rounds.loader().specs())?;
    let folder = match &found {
        Found::Nothing | Found::Fitting => {
            let folder = pins.maps();
            std::fs::create_dir_all(&folder)
                .map_err(|cause| Error::pin("create", &folder, cause))?;
            folder
        }
        Found::Differing(maps) => {
            for (map, how) in maps {
                tracing::warn!(
                    map,
                    difference = how,
                    "a pinned map does not fit this version and is replaced"
                );
            }
            pins.stage(rounds.loader().specs(), maps)?
        }
    };
    rounds.loader_mut().folder.clone_from(&folder);
    let programs = rounds.programs()?;
    let mut kernel = Kernel::new(Maps::open(&folder, Access::Write)?);
    let filled = match found {
        Found::Nothing => false,
        Found::Fitting => true,
        Found::Differing(maps) => {
            pins.complete_old(rounds.loader().specs())?;
            migrate(&pins.maps(), &mut kernel, &maps)
        }
    };
    let devices = maps::table(&folder, "devices")?;
    let map_pins = MapPins::open(&folder, rounds.loader().specs().keys())?;
    let hooks = Hooks::new(programs, rounds, devices, (pins.clone(), map_pins), xdp);
    Ok(Loaded { kernel, hooks, filled })
}

/// Fills new maps from those that they replace. Returns false if the old ones cannot be read: the
/// sources then have to deliver everything before programs may use the new ones.
fn migrate(old: &Path, kernel: &mut Kernel, differing: &BTreeMap<String, String>) -> bool {
    if ["ports", "flows_v4", "flows_v6", "imported_v4", "imported_v6"]
        .iter()
        .all(|map| is_kept(map, differing))
    {
        return true;
    }
    let migrated =
        Maps::open(old, Access::Read).map_err(|error| error.to_string()).and_then(|maps| {
            maps.copy_memory_to(kernel.maps()).map_err(|error| error.to_string())?;
            if !is_kept("ports", differing) {
                let image = Kernel::new(maps).read().map_err(|error| error.to_string())?;
                kernel
                    .apply(&diff(&Image::default(), &image))
                    .map_err(|error| error.to_string())?;
            }
            Ok(())
        });
    match migrated {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(error, "the replaced maps' content could not be taken over");
            is_kept("ports", differing)
        }
    }
}
