"""Compiles csrc/ into nearfield/_kernels.so, with one build of the kernels for each instruction set.

hatchling runs this whenever nearfield is built or installed, also with `pip install -e`. By hand:

    python hatch_build.py [--out PATH] [--flags "-g -fsanitize=thread"] [--isas "avx2 baseline"] [--optional]

The compiler is $CXX, else the first of c++, g++, clang++.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # by hand
    BuildHookInterface = object

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OUT = "nearfield/_kernels.so"  # on every system: ctypes does not look at the ending
PORTABLE = ("library.cpp", "parallel.cpp", "validate.cpp")  # compiled once, others for each instruction set
UNROLLED = ("linear.cpp", "scan.cpp")  # as written: -O3 takes twice as long to compile and gains nothing
COMMON = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread"]
COMMON += ["-fno-math-errno", "-ffp-contract=fast", "-fno-trapping-math"]
AVX2 = ["-march=x86-64-v2", "-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# The least first, and linked in this order: of an inline function that several objects hold the linker keeps
# the first copy, which must run everywhere.
X86 = {
    "baseline": ["-march=x86-64-v2"],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
LINK = ["-shared", "-pthread"]
if sys.platform == "linux":
    LINK.append("-Wl,-z,nodelete")  # sleeping workers need their code even after a dlclose
# No newer libstdc++ is asked of the machine that runs it, and none of its names get out. Some distributions
# keep the static one in a package of its own: then the shared one must do.
STATIC = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]


class NoKernels(Exception):
    """Why there is no library, in one line; `details` is what the compiler said."""

    def __init__(self, reason: str, details: str = ""):
        super().__init__(reason)
        self.details = details


def compiler() -> list[str]:
    """The command of the C++ compiler."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise NoKernels(f"no C++ compiler: {named[0] if named else 'c++, g++ or clang++'} is not there")


def call(command: list[str]) -> str:
    """What the compiler says, or `NoKernels`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise NoKernels(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise NoKernels(f"{command[0]} failed: {reason.strip()}", done.stderr)
    return done.stdout


def understands(cxx: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows the flags."""
    try:
        call([*cxx, *flags, "-x", "c++", "-fsyntax-only", os.devnull])
    except NoKernels:
        return False
    return True


def build(out: Path, flags: list[str], isas: list[str]) -> str:
    """Compile and link `out`, unless it is there and made of the same; the names of its instruction sets.

    A library that cannot be renewed is removed: it would run code that no longer fits its callers.
    """
    try:
        cxx = compiler()
        known = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}
        if wrong := set(isas) - set(known):
            raise NoKernels(f"{', '.join(sorted(wrong))} is none of {', '.join(known)}")
        wanted = {isa: own for isa, own in known.items() if not isas or isa in isas}
        tables = {isa: own for isa, own in wanted.items() if understands(cxx, [*COMMON, *own])}
        if not tables:
            raise NoKernels(f"{cxx[0]} does not know {' '.join([*COMMON, *known['baseline']])}")

        digest = hashlib.sha256(Path(__file__).read_bytes())
        digest.update(repr([call([*cxx, "--version"]), sys.platform, tables, flags]).encode())
        for path in sorted(CSRC.glob("*.[ch]*")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        stamp = f"nearfield:{digest.hexdigest()}"
        if out.is_file() and stamp.encode() in out.read_bytes():
            os.utime(out)  # for make
        else:
            compile_and_link(out, cxx, flags, tables, stamp)
    except NoKernels:
        out.unlink(missing_ok=True)
        raise
    return " ".join(tables)


def compile_and_link(
    out: Path, cxx: list[str], flags: list[str], tables: dict[str, list[str]], stamp: str
) -> None:
    """Make `out`, which appears at once and whole: whoever has an earlier one loaded keeps it."""
    portable = [f"-DNEARFIELD_WITH_{isa}" for isa in tables] + [f'-DNEARFIELD_STAMP="{stamp}"']
    units = [(CSRC / name, name, portable) for name in PORTABLE]
    kernels = [path for path in sorted(CSRC.glob("*.cpp")) if path.name not in PORTABLE]
    for isa, own in tables.items():
        for path in kernels:
            level = ["-O2"] if path.name in UNROLLED else []
            units.append((path, f"{isa}-{path.stem}", [*level, *own, f"-DNEARFIELD_ISA={isa}"]))
    with tempfile.TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{name}.o")) for _, name, _ in units]
        commands = [
            [*cxx, *COMMON, *own, *flags, "-c", str(path), "-o", made]
            for (path, _, own), made in zip(units, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(call, commands))
        linked = Path(folder, "linked")
        command = [*cxx, *LINK, *objects, *flags, "-o", str(linked)]
        try:
            call([*command, *(STATIC if sys.platform == "linux" else [])])
        except NoKernels:
            call(command)
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = out.with_name(f"{out.name}.{os.getpid()}")
        shutil.copy(linked, fresh)
        os.replace(fresh, out)


class KernelsHook(BuildHookInterface):
    """With a compiler the wheel is py3-none-<platform> and holds the library, without one py3-none-any."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it packs a wheel; `version` is "standard" or "editable"."""
        try:
            print(f"nearfield's CPU kernels are compiled: {build(ROOT / OUT, [], [])}.", flush=True)
        except NoKernels as reason:
            print(f"nearfield is installed without its compiled CPU kernels: {reason}.", flush=True)
            return
        if version == "editable":  # only a path is packed
            return
        from packaging.tags import platform_tags

        # the name of this machine's kind, not a promise of manylinux, which is auditwheel's to make
        platform_tag = next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
        build_data.update(pure_python=False, tag=f"py3-none-{platform_tag}")
        build_data["artifacts"].append(f"/{OUT}")


def main() -> None:
    """Build by hand."""
    parser = argparse.ArgumentParser(description="Compile the CPU kernels.")
    parser.add_argument("--out", type=Path, default=ROOT / OUT)
    parser.add_argument("--flags", type=shlex.split, default=[], help="further flags, to compile and to link")
    parser.add_argument("--isas", type=str.split, default=[], help="only these instruction sets")
    parser.add_argument("--optional", action="store_true", help="to fail is no error")
    wanted = parser.parse_args()
    try:
        print(f"{wanted.out}: {build(wanted.out, wanted.flags, wanted.isas)}")
    except NoKernels as reason:
        print(f"no {wanted.out}: {reason}.\n{reason.details}", file=sys.stderr)
        sys.exit(not wanted.optional)


if __name__ == "__main__":
    main()
