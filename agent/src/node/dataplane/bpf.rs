//! Makes the bpf(2) calls for which aya has no API: batches of elements, links as plain file
//! descriptors, pins, and information about the kernel's objects.
//!
//! Every attribute is a `repr(C)` struct of its own with the fields of the member of
//! `union bpf_attr` that the command reads; the kernel takes the rest as zero.

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const MAP_GET_NEXT_KEY: libc::c_long = 4;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const MAP_DELETE_BATCH: libc::c_long = 27;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;

/// Attaches before the object in `relative`, or first if there is none.
pub(crate) const BEFORE: u32 = 1 << 3;
/// Attaches after the object in `relative`, or last if there is none.
pub(crate) const AFTER: u32 = 1 << 4;

/// Calls bpf(2) with an attribute struct.
///
/// # Safety
///
/// Pointers in `attr` must be valid for what `command` reads and writes through them.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a live struct of this size; the caller guarantees the pointers in it.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

#[repr(C)]
struct ObjectAttr {
    pathname: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u64,
    expected_revision: u64,
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

/// Opens the object that is pinned at a path.
pub(crate) fn object_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { pathname: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: `path` outlives the call and ends with a zero.
    let fd = unsafe { bpf(OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Pins a map, program or link at a path.
pub(crate) fn object_pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { pathname: path.as_ptr() as u64, fd: raw(fd), flags: 0 };
    // SAFETY: `path` outlives the call and ends with a zero.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(drop)
}

/// Returns the kernel's information about an object. Older kernels fill in less; the rest stays
/// zero.
fn object_info<T: Copy>(fd: BorrowedFd<'_>) -> io::Result<T> {
    // SAFETY: only used below with structs of integers, for which zero is a value.
    let mut info: T = unsafe { MaybeUninit::zeroed().assume_init() };
    let mut attr = InfoAttr {
        fd: raw(fd),
        len: size_of::<T>() as u32,
        info: std::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: `info` is live and of the length given.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }.map(|_| info)
}

/// The first fields of `struct bpf_map_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct MapInfo {
    /// `enum bpf_map_type`.
    pub(crate) kind: u32,
    /// The kernel's id of the map.
    pub(crate) id: u32,
    /// Bytes of a key.
    pub(crate) key_size: u32,
    /// Bytes of a value.
    pub(crate) value_size: u32,
    /// Capacity.
    pub(crate) max_entries: u32,
    /// `BPF_F_*`.
    pub(crate) flags: u32,
}

/// Returns the kernel's information about a map.
pub(crate) fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    object_info(fd)
}

/// The first fields of `struct bpf_link_info` for links to devices and cgroups.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct LinkInfo {
    /// `enum bpf_link_type`.
    pub(crate) kind: u32,
    /// The kernel's id of the link.
    pub(crate) id: u32,
    /// The attached program's id.
    pub(crate) program: u32,
    pad: u32,
    /// The ifindex (XDP, TCX; 0 if the device is gone), or the low word of the cgroup's id.
    pub(crate) target: u32,
    /// The attach type (TCX), or the high word of the cgroup's id.
    pub(crate) extra: u32,
    more: [u32; 2],
}

impl LinkInfo {
    /// Whether the link's target is this ifindex or cgroup id.
    pub(crate) fn leads_to(&self, target: u64) -> bool {
        const CGROUP: u32 = 3;
        let high = if self.kind == CGROUP { u64::from(self.extra) << 32 } else { 0 };
        high | u64::from(self.target) == target
    }
}

/// Returns the kernel's information about a link.
pub(crate) fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    object_info(fd)
}

/// Attaches a program to a device (`target` is its ifindex) or a cgroup (a descriptor).
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: u32,
    flags: u32,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: raw(program),
        target,
        attach_type,
        flags,
        relative: 0,
        expected_revision: 0,
    };
    // SAFETY: no pointers.
    let fd = unsafe { bpf(LINK_CREATE, &mut attr) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Replaces a link's program, between two packets.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr =
        LinkUpdateAttr { link: raw(link), program: raw(program), flags: 0, old_program: 0 };
    // SAFETY: no pointers.
    unsafe { bpf(LINK_UPDATE, &mut attr) }.map(drop)
}

#[repr(C)]
struct IdAttr {
    id: u32,
    next: u32,
    flags: u32,
}

#[repr(C)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// The first fields of `struct bpf_prog_info`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    lengths: [u32; 2],
    code: [u64; 2],
    loaded: u64,
    user: u32,
    maps: u32,
    map_ids: u64,
    name: [u8; 16],
}

/// The most programs of one hook that are listed; the kernel allows no more than 64.
const QUERIED: usize = 64;

/// Returns the ids of the programs at a hook of a device (`target` is its ifindex) or a cgroup (a
/// descriptor).
pub(crate) fn query(target: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; QUERIED];
    let mut attr = QueryAttr {
        target,
        attach_type,
        query_flags: 0,
        attach_flags: 0,
        programs: ids.as_mut_ptr() as u64,
        count: QUERIED as u32,
        pad: 0,
        program_flags: 0,
        links: 0,
        link_flags: 0,
        revision: 0,
    };
    // SAFETY: `ids` is live and has room for the count given.
    let _ = unsafe { bpf(PROG_QUERY, &mut attr) }?;
    ids.truncate(attr.count as usize);
    Ok(ids)
}

/// Returns the kernel's id of a loaded program.
pub(crate) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    object_info::<ProgramInfo>(program).map(|info| info.id)
}

/// Returns the name of a loaded program.
pub(crate) fn program_name(id: u32) -> io::Result<String> {
    let mut attr = IdAttr { id, next: 0, flags: 0 };
    // SAFETY: no pointers.
    let fd = unsafe { bpf(PROG_GET_FD_BY_ID, &mut attr) }?;
    // SAFETY: the kernel has just made this descriptor for us.
    let program = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let info: ProgramInfo = object_info(program.as_fd())?;
    let end = info.name.iter().position(|byte| *byte == 0).unwrap_or(info.name.len());
    Ok(String::from_utf8_lossy(info.name.get(..end).unwrap_or_default()).into_owned())
}

/// A map whose keys and values have known types.
#[derive(Debug)]
pub(crate) struct Table<K, V> {
    fd: OwnedFd,
    info: MapInfo,
    /// The number of values of each element: 1, or one per possible CPU.
    copies: usize,
    types: PhantomData<fn() -> (K, V)>,
}

/// The number of keys or values that one call passes to the kernel: enough that the call's cost is
/// negligible, and few enough that their copies (below 1 MiB) stay cheap.
const BATCH: usize = 4_096;

/// `BPF_MAP_TYPE_PERCPU_HASH`, `_PERCPU_ARRAY` and `_LRU_PERCPU_HASH`.
const PER_CPU: [u32; 3] = [5, 6, 10];
/// `BPF_MAP_TYPE_ARRAY`.
const ARRAY: u32 = 2;

impl<K: aya::Pod, V: aya::Pod> Table<K, V> {
    /// Creates a table of a map's descriptor, after comparing the sizes of keys and values.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let info = map_info(fd.as_fd())?;
        if info.key_size as usize != size_of::<K>() || info.value_size as usize != size_of::<V>() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "its keys and values have {} and {} bytes, {} and {} were expected",
                    info.key_size,
                    info.value_size,
                    size_of::<K>(),
                    size_of::<V>()
                ),
            ));
        }
        let copies = if PER_CPU.contains(&info.kind) {
            aya::util::nr_cpus().map_err(|(_, error)| error)?
        } else {
            1
        };
        Ok(Self { fd, info, copies, types: PhantomData })
    }

    /// Returns the capacity.
    pub(crate) fn max_entries(&self) -> u32 {
        self.info.max_entries
    }

    /// Returns the kernel's id of the map.
    pub(crate) fn id(&self) -> u32 {
        self.info.id
    }

    fn element(&self, key: &K, value: u64) -> ElementAttr {
        ElementAttr {
            map_fd: raw(self.fd.as_fd()),
            pad: 0,
            key: std::ptr::from_ref(key) as u64,
            value,
            flags: 0,
        }
    }

    /// Returns the distance in bytes between two values of an element that has several.
    fn stride() -> usize {
        size_of::<V>().next_multiple_of(8)
    }

    /// Splits what the kernel wrote into the values of `count` elements, each with all its copies.
    fn split(&self, bytes: &[u64], count: usize) -> Vec<Vec<V>> {
        let words = Self::stride() / 8;
        bytes
            .chunks_exact(words * self.copies)
            .take(count)
            .map(|element| {
                // SAFETY: a chunk has at least `size_of::<V>` bytes, and any bytes are a value.
                element
                    .chunks_exact(words)
                    .map(|value| unsafe { value.as_ptr().cast::<V>().read_unaligned() })
                    .collect()
            })
            .collect()
    }

    /// Reads all copies of one element: one, unless the map is per CPU.
    pub(crate) fn get_all(&self, key: &K) -> io::Result<Option<Vec<V>>> {
        let mut value = vec![0_u64; self.copies * Self::stride() / 8];
        let mut attr = self.element(key, value.as_mut_ptr() as u64);
        // SAFETY: key and value are live and of the map's sizes (compared in `new`).
        match unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) } {
            Ok(_) => Ok(self.split(&value, 1).pop()),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Reads one element.
    pub(crate) fn get(&self, key: &K) -> io::Result<Option<V>> {
        Ok(self.get_all(key)?.and_then(|values| values.first().copied()))
    }

    /// Writes one element.
    pub(crate) fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attr = self.element(key, std::ptr::from_ref(value) as u64);
        // SAFETY: key and value are live and of the map's sizes (compared in `new`).
        unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    /// Writes one element unless its key exists, and returns whether it was written.
    pub(crate) fn insert_new(&self, key: &K, value: &V) -> io::Result<bool> {
        const NOEXIST: u64 = 1;
        let mut attr =
            ElementAttr { flags: NOEXIST, ..self.element(key, std::ptr::from_ref(value) as u64) };
        // SAFETY: key and value are live and of the map's sizes (compared in `new`).
        match unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) } {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
            result => Ok(result.is_ok()),
        }
    }

    /// Removes one element, and returns whether it existed.
    pub(crate) fn take(&self, key: &K) -> io::Result<bool> {
        let mut attr = self.element(key, 0);
        // SAFETY: the key is live and of the map's size (compared in `new`).
        match unsafe { bpf(MAP_DELETE_ELEM, &mut attr) } {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            result => Ok(result.is_ok()),
        }
    }

    /// Removes one element. It is no error if it does not exist.
    pub(crate) fn remove(&self, key: &K) -> io::Result<()> {
        self.take(key).map(drop)
    }

    fn batch(&self, command: libc::c_long, attr: &mut BatchAttr) -> io::Result<()> {
        attr.map_fd = raw(self.fd.as_fd());
        // SAFETY: the callers below pass arrays of `count` keys and values of the map's sizes.
        unsafe { bpf(command, attr) }.map(drop)
    }

    /// Writes many elements, in batches or, if the kernel has no batches for the map, one by one.
    pub(crate) fn insert_many(&self, elements: &[(K, V)]) -> io::Result<()> {
        for chunk in elements.chunks(BATCH) {
            let (mut keys, mut values): (Vec<K>, Vec<V>) = chunk.iter().copied().unzip();
            let mut attr = BatchAttr {
                in_batch: 0,
                out_batch: 0,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: chunk.len() as u32,
                map_fd: 0,
                elem_flags: 0,
                flags: 0,
            };
            match self.batch(MAP_UPDATE_BATCH, &mut attr) {
                Ok(()) => {}
                Err(error) if lacks_batches(&error) => {
                    for (key, value) in chunk {
                        self.insert(key, value)?;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Removes many elements. It is no error if some do not exist.
    pub(crate) fn remove_many(&self, keys: &[K]) -> io::Result<()> {
        for chunk in keys.chunks(BATCH) {
            let mut keys = chunk.to_vec();
            let mut attr = BatchAttr {
                in_batch: 0,
                out_batch: 0,
                keys: keys.as_mut_ptr() as u64,
                values: 0,
                count: chunk.len() as u32,
                map_fd: 0,
                elem_flags: 0,
                flags: 0,
            };
            if self.batch(MAP_DELETE_BATCH, &mut attr).is_err() {
                // The batch ends at the first key that does not exist.
                for key in chunk {
                    self.remove(key)?;
                }
            }
        }
        Ok(())
    }

    /// Reads every element with all its copies. Elements that are inserted or removed meanwhile may
    /// be missed.
    pub(crate) fn entries_all(&self) -> io::Result<Vec<(K, Vec<V>)>> {
        let mut entries = Vec::new();
        let result = self.read_batches(|keys, values, count| {
            let found = if self.copies == 1 {
                // A batch packs plain values without padding, as userspace arrays are.
                // SAFETY: the kernel wrote `count` values of this size; any bytes are a value.
                (0..count)
                    .map(|i| vec![unsafe { values.as_ptr().cast::<V>().add(i).read_unaligned() }])
                    .collect()
            } else {
                self.split(values, count)
            };
            entries.extend(found.into_iter().enumerate().map(|(i, values)| {
                // SAFETY: the kernel wrote `count` keys of this size; any bytes are a key.
                (unsafe { keys.as_ptr().cast::<K>().add(i).read_unaligned() }, values)
            }));
        });
        match result {
            Err(error) if lacks_batches(&error) => {
                self.walk(|key| {
                    if let Some(values) = self.get_all(key)? {
                        entries.push((*key, values));
                    }
                    Ok(())
                })?;
                Ok(entries)
            }
            result => result.map(|()| entries),
        }
    }

    /// Calls `each` with every element, in the memory of one batch. For maps that are not per CPU.
    pub(crate) fn for_each(&self, mut each: impl FnMut(&K, &V)) -> io::Result<()> {
        let result = self.read_batches(|keys, values, count| {
            for i in 0..count {
                // SAFETY: the kernel wrote `count` keys of this size; any bytes are a key.
                let key = unsafe { keys.as_ptr().cast::<K>().add(i).read_unaligned() };
                // SAFETY: the same number of values, which a batch packs without padding.
                let value = unsafe { values.as_ptr().cast::<V>().add(i).read_unaligned() };
                each(&key, &value);
            }
        });
        match result {
            Err(error) if lacks_batches(&error) => self.walk(|key| {
                if let Some(value) = self.get(key)? {
                    each(key, &value);
                }
                Ok(())
            }),
            result => result,
        }
    }

    /// Counts the elements, in the memory of one batch.
    pub(crate) fn count(&self) -> io::Result<u64> {
        let mut all = 0_u64;
        match self.read_batches(|_, _, count| all += count as u64) {
            Err(error) if lacks_batches(&error) => {
                self.walk(|_| {
                    all += 1;
                    Ok(())
                })?;
                Ok(all)
            }
            result => result.map(|()| all),
        }
    }

    /// Reads every element.
    pub(crate) fn entries(&self) -> io::Result<Vec<(K, V)>> {
        let all = self.entries_all()?;
        Ok(all.into_iter().filter_map(|(key, values)| Some((key, *values.first()?))).collect())
    }

    /// Reads all elements batch by batch. `take` gets the keys and values as the kernel packs them,
    /// and their number.
    fn read_batches(&self, mut take: impl FnMut(&[u64], &[u64], usize)) -> io::Result<()> {
        let mut room = BATCH;
        // The position is opaque: four bytes for hashes, one key for the rest.
        let mut position = vec![0_u64; size_of::<K>().div_ceil(8).max(1)];
        let mut started = false;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        loop {
            keys.resize((room * size_of::<K>()).div_ceil(8), 0_u64);
            values.resize(room * self.copies * Self::stride() / 8, 0_u64);
            let mut attr = BatchAttr {
                in_batch: if started { position.as_ptr() as u64 } else { 0 },
                out_batch: position.as_mut_ptr() as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: room as u32,
                map_fd: 0,
                elem_flags: 0,
                flags: 0,
            };
            let result = self.batch(MAP_LOOKUP_BATCH, &mut attr);
            let last = match &result {
                Ok(()) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                // One bucket holds more than fits. Repeat the call with more room.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) && room < 1 << 22 => {
                    room *= 2;
                    continue;
                }
                Err(_) => return result,
            };
            take(&keys, &values, attr.count as usize);
            if last {
                return Ok(());
            }
            started = true;
        }
    }

    /// Visits every key, one by one.
    fn walk(&self, mut take: impl FnMut(&K) -> io::Result<()>) -> io::Result<()> {
        let mut key: Option<K> = None;
        // If the current key is removed meanwhile, the walk starts over; the bound ends it.
        for _ in 0..u64::from(self.info.max_entries) * 2 {
            let mut next = MaybeUninit::<K>::uninit();
            let mut attr = ElementAttr {
                map_fd: raw(self.fd.as_fd()),
                pad: 0,
                key: key.as_ref().map_or(0, |key| std::ptr::from_ref(key) as u64),
                value: next.as_mut_ptr() as u64,
                flags: 0,
            };
            // SAFETY: both keys are live and of the map's size (compared in `new`).
            match unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) } {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                Err(error) => return Err(error),
            }
            // SAFETY: the kernel has written the key.
            let found = unsafe { next.assume_init() };
            take(&found)?;
            key = Some(found);
        }
        Ok(())
    }
}

/// The kernel's internal error for an operation that a map type lacks; libc has no name for it.
const ENOTSUPP: i32 = 524;

/// Whether an error of a batch call means that this map or kernel has none.
fn lacks_batches(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP))
}

/// An mmap-able array shared with the kernel programs.
///
/// The kernel gives each element `size_of::<T>` bytes rounded up to eight.
#[derive(Debug)]
pub(crate) struct Array<T> {
    base: *mut u8,
    bytes: usize,
    len: u32,
    types: PhantomData<fn() -> T>,
}

// SAFETY: the mapping is plain shared memory; the kernel reads it from other CPUs all the time,
// and whoever stores through it orders the stores (see `store_words`).
unsafe impl<T> Send for Array<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Array<T> {}

#[expect(
    clippy::cast_ptr_alignment,
    reason = "elements and offsets are multiples of what is cast to: checked beside each cast"
)]
impl<T: aya::Pod> Array<T> {
    /// Bytes from one element to the next.
    const STRIDE: usize = size_of::<T>().next_multiple_of(8);

    /// Maps a `BPF_F_MMAPABLE` array, read-only unless `writable`.
    pub(crate) fn new(fd: BorrowedFd<'_>, writable: bool) -> io::Result<Self> {
        let info = map_info(fd)?;
        if info.kind != ARRAY || info.value_size as usize != size_of::<T>() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it is no array of {}-byte elements", size_of::<T>()),
            ));
        }
        // SAFETY: sysconf has no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4_096);
        let bytes = (Self::STRIDE * info.max_entries as usize).next_multiple_of(page);
        let protection =
            if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a fresh mapping of an own descriptor; the kernel bounds it by the map's size.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), bytes, len: info.max_entries, types: PhantomData })
    }

    /// Returns the number of elements.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    fn element(&self, index: u32) -> Option<*mut u8> {
        // SAFETY: an index below `len` stays inside the mapping.
        (index < self.len).then(|| unsafe { self.base.add(index as usize * Self::STRIDE) })
    }

    /// Returns a copy of an element.
    pub(crate) fn get(&self, index: u32) -> Option<T> {
        // SAFETY: the element lies in the mapping; any bytes are a value.
        self.element(index).map(|element| unsafe { element.cast::<T>().read_volatile() })
    }

    /// Returns every element that is not all zeros, and some that are, with their indexes.
    ///
    /// A map is mostly zeros, and a block of zeros costs one comparison. Starting an agent reads
    /// tens of thousands of elements, and tests start hundreds of unoptimised agents.
    pub(crate) fn filled(&self) -> impl Iterator<Item = (u32, T)> {
        const BLOCK: u32 = 512;
        let zeros = vec![0_u8; BLOCK as usize * Self::STRIDE];
        (0..self.len)
            .step_by(BLOCK as usize)
            .filter(move |first| {
                let mut block = vec![0_u8; (self.len - first).min(BLOCK) as usize * Self::STRIDE];
                // SAFETY: the block lies in the mapping, which `self` keeps; any bytes are a value.
                unsafe {
                    let from = self.base.add(*first as usize * Self::STRIDE);
                    from.copy_to_nonoverlapping(block.as_mut_ptr(), block.len());
                }
                zeros.get(..block.len()) != Some(&block[..])
            })
            .flat_map(|first| first..first.saturating_add(BLOCK).min(self.len))
            .filter_map(|index| Some((index, self.get(index)?)))
    }

    /// Returns one aligned 32-bit word of an element (`offset` in bytes).
    pub(crate) fn get_u32(&self, index: u32, offset: usize) -> Option<u32> {
        let element = self.element(index)?;
        if !offset.is_multiple_of(4) || offset + 4 > size_of::<T>() {
            return None;
        }
        // SAFETY: inside the element and aligned, both checked above.
        Some(unsafe { element.add(offset).cast::<u32>().read_volatile() })
    }

    /// Whether an element and those after it hold these words. The elements must be without gaps.
    pub(crate) fn holds_words(&self, index: u32, words: &[u32]) -> bool {
        const PIECE: usize = 1_024;
        let elements = words.len().div_ceil(Self::STRIDE / 4);
        let Some(first) = self.element(index) else { return words.is_empty() };
        if size_of::<T>() != Self::STRIDE || elements > (self.len - index) as usize {
            return false;
        }
        let mut found = [0_u32; PIECE];
        words.chunks(PIECE).enumerate().all(|(piece, wanted)| {
            // SAFETY: all words lie in elements of the mapping (checked above), which `self` keeps;
            // any bytes are a word.
            unsafe {
                let from = first.cast::<u32>().add(piece * PIECE);
                from.copy_to_nonoverlapping(found.as_mut_ptr(), wanted.len());
            }
            found.get(..wanted.len()) == Some(wanted)
        })
    }

    /// Writes an element word by word in ascending order, each word atomically and no earlier
    /// than the words before it.
    ///
    /// Returns false if the index is out of range.
    #[must_use]
    pub(crate) fn set(&self, index: u32, value: &T) -> bool {
        let Some(element) = self.element(index) else { return false };
        let source = std::ptr::from_ref(value).cast::<u32>();
        for word in 0..size_of::<T>() / 4 {
            // SAFETY: inside the value; every ABI struct is made of whole words.
            let bits = unsafe { source.add(word).read_unaligned() };
            // SAFETY: inside the element, which is aligned to eight bytes.
            let target =
                unsafe { std::sync::atomic::AtomicU32::from_ptr(element.cast::<u32>().add(word)) };
            target.store(bits, std::sync::atomic::Ordering::Release);
        }
        true
    }

    /// Stores one aligned 64-bit word of an element (`offset` in bytes) after everything stored
    /// before.
    #[must_use]
    pub(crate) fn set_u64(&self, index: u32, offset: usize, bits: u64) -> bool {
        let Some(element) = self.element(index) else { return false };
        if !offset.is_multiple_of(8) || offset + 8 > size_of::<T>() {
            return false;
        }
        // SAFETY: inside the element and aligned, both checked above.
        let target = unsafe { std::sync::atomic::AtomicU64::from_ptr(element.add(offset).cast()) };
        target.store(bits, std::sync::atomic::Ordering::Release);
        true
    }

    /// Stores one aligned 32-bit word of an element (`offset` in bytes) after everything stored
    /// before.
    #[must_use]
    pub(crate) fn set_u32(&self, index: u32, offset: usize, bits: u32) -> bool {
        let Some(element) = self.element(index) else { return false };
        if !offset.is_multiple_of(4) || offset + 4 > size_of::<T>() {
            return false;
        }
        // SAFETY: inside the element and aligned, both checked above.
        let target = unsafe { std::sync::atomic::AtomicU32::from_ptr(element.add(offset).cast()) };
        target.store(bits, std::sync::atomic::Ordering::Release);
        true
    }
}

impl<T> Drop for Array<T> {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`. A failure leaves it mapped, which harms
        // nobody.
        let _ = unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}
