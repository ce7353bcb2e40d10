#!/usr/bin/env python3
"""Writes the image of deploy/Dockerfile as an OCI archive, without a container engine.

The image is one layer with one file, the static `sluice` binary. The same binary gives the same
archive, byte for byte. `ctr images import`, `docker load`, `podman load` and `skopeo copy
oci-archive:...` read it.
"""

import argparse
import gzip
import hashlib
import io
import json
import struct
import sys
import tarfile
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
INDEX = "application/vnd.oci.image.index.v1+json"

MACHINES = {62: "amd64", 183: "arm64"}  # e_machine -> Go's name of the architecture
PT_INTERP = 3


def architecture(binary: bytes) -> str:
    """Reads the ELF header; refuses what cannot run in an empty image."""
    if binary[:6] != b"\x7fELF\x02\x01":
        raise ValueError("it is no 64-bit little-endian ELF file")
    (machine,) = struct.unpack_from("<H", binary, 18)
    (headers,) = struct.unpack_from("<Q", binary, 32)
    size, count = struct.unpack_from("<HH", binary, 54)
    kinds = [struct.unpack_from("<I", binary, headers + size * i)[0] for i in range(count)]
    if PT_INTERP in kinds:
        raise ValueError("it is linked dynamically; `cargo xtask build` makes a static one")
    if machine not in MACHINES:
        raise ValueError(f"its machine ({machine}) is none of {', '.join(MACHINES.values())}")
    return MACHINES[machine]


def tar(files: list[tuple[str, bytes, int]]) -> bytes:
    """A tar of files (name, content, mode), with their folders, owned by root, of no time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        made = set()
        for name, content, mode in files:
            for folder in reversed(Path(name).parents[:-1]):
                if folder not in made:
                    made.add(folder)
                    entry = tarfile.TarInfo(str(folder))
                    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                    archive.addfile(entry)
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def image(binary: bytes, name: str) -> bytes:
    """The archive: a layout whose index names one manifest, that a config and a layer."""
    blobs: list[tuple[str, bytes, int]] = []

    def blob(kind: str, content: bytes) -> dict:
        digest = hashlib.sha256(content).hexdigest()
        blobs.append((f"blobs/sha256/{digest}", content, 0o644))
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    def text(value: dict) -> bytes:
        return json.dumps(value, sort_keys=True).encode()

    platform = {"architecture": architecture(binary), "os": "linux"}
    layer = tar([("usr/local/bin/sluice", binary, 0o755)])
    config = {
        **platform,
        "config": {
            "Entrypoint": ["/usr/local/bin/sluice"],
            "Cmd": ["agent"],
            "Env": ["PATH=/usr/local/bin"],
        },
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": blob(CONFIG, text(config)),
        "layers": [blob(LAYER, gzip.compress(layer, 6, mtime=0))],
    }
    annotations = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rpartition(":")[2],
    }
    described = {**blob(MANIFEST, text(manifest)), "platform": platform, "annotations": annotations}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [described]}
    layout = [("oci-layout", text({"imageLayoutVersion": "1.0.0"}), 0o644), ("index.json", text(index), 0o644)]
    return tar(layout + blobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path, help="target/<host>/release/sluice, as `cargo xtask build` made it")
    parser.add_argument("-t", "--tag", default="localhost/sluice:0.1.0", help="the image's full name [%(default)s]")
    parser.add_argument("-o", "--output", type=Path, default="sluice.tar", help="the archive to write [%(default)s]")
    options = parser.parse_args()
    if ":" not in options.tag.rpartition("/")[2]:
        parser.error(f"--tag {options.tag}: the name needs a tag, as in {options.tag}:0.1.0")
    try:
        archive = image(options.binary.read_bytes(), options.tag)
        options.output.write_bytes(archive)
    except (OSError, ValueError, struct.error) as error:
        sys.exit(f"error: cannot make an image of {options.binary}: {error}")
    print(f"{options.output}: {options.tag}, {len(archive) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
