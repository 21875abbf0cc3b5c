"""The compiled kernels: how they are built, found, chosen and shared by threads and forks."""

import ctypes
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nearfield.core import BackendUnavailable, library

MISSING = library.unavailable()
needs_kernels = pytest.mark.skipif(MISSING is not None, reason=str(MISSING).partition(". ")[0])


def averages(tokens, threads, first=0.0):
    """Whether zero queries, which weigh all keys the same, average windows of three of `first + token`."""
    import ctypes

    from nearfield.core import library

    def tensor(numbers):
        array = (ctypes.c_float * tokens)(*numbers)
        return array, library.Tensor(ctypes.addressof(array), (tokens, 0, 0, 1, 1))

    _zeros, query = tensor([0.0] * tokens)
    _values, value = tensor(first + i for i in range(tokens))
    found, out = tensor([-1.0] * tokens)
    _logs, lse = tensor([-1.0] * tokens)
    problem = library.Attention(0, 0, 1, 1, 1, 1, 1, ((1, 1, 1, 1, 0), (1, 1, 1, 1, 0), (tokens, 3, 1, 1, 0)))
    problem.scale, problem.query, problem.key, problem.value = 1.0, query, query, value
    problem.out, problem.lse = out, lse
    error = library.kernels().nearfield_attention_forward(problem, 1, threads)
    right = [first + min(max(i, 1), tokens - 2) for i in range(tokens)]
    return error == 0 and all(abs(a - b) <= 1e-4 * (1 + b) for a, b in zip(found, right, strict=True))


SHIPPED = inspect.getsource(averages)  # for other processes


@pytest.fixture
def fresh(monkeypatch):
    """The library as a process finds it that has not looked yet."""
    monkeypatch.delenv(library.VARIABLE, raising=False)
    library._load.cache_clear()
    library.warn_once.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library._load.cache_clear()
    library.warn_once.cache_clear()


@pytest.fixture(scope="session")
def compiler(root):
    """The compiler that hatch_build.py would take; tests that need one are skipped without."""
    spec = importlib.util.spec_from_file_location("hatch_build", root / "hatch_build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    try:
        command = build.compiler()
    except build.NoKernels as reason:
        pytest.skip(str(reason))
    if not build.understands(command, build.COMMON):
        pytest.skip(f"{command[0]} is too old")
    return command


# ---- the interface
def test_structures_are_those_of_the_header(root):
    header = re.sub(r"//.*", "", (root / "csrc" / "nearfield.h").read_text())
    kinds = {
        "int64_t": ctypes.c_int64,
        "double": ctypes.c_double,
        "nearfield_tensor": library.Tensor,
        "nearfield_axis": library.Axis,
    }
    structures = {
        "tensor": library.Tensor,
        "axis": library.Axis,
        "attention": library.Attention,
        "decode": library.Decode,
        "shares": library.Shares,
        "choice": library.Choice,
        "linear": library.Linear,
        "scan": library.Scan,
        "lla": library.LocalLinear,
    }
    found = re.findall(r"typedef struct \{(.*?)\} nearfield_(\w+);", header, re.DOTALL)
    assert {name for _, name in found} == set(structures)
    for body, structure in found:
        fields = []
        for kind, names in re.findall(r"(?:const )?(\w+) ([^;]+);", body):
            for field in names.split(","):
                star, name, count = re.fullmatch(r"\s*(\*?)(\w+)(?:\[(\d+)\])?", field).groups()
                ctype = ctypes.c_void_p if star else kinds[kind]
                fields.append((name, ctype * int(count) if count else ctype))
        assert structures[structure]._fields_ == fields
    assert f"#define NEARFIELD_ABI {library.ABI}\n" in header
    assert set(library.FUNCTIONS) | {"nearfield_abi"} == set(re.findall(r"\*?(\w+)\([^)]*\);", header))


def test_where_there_is_a_compiler_there_are_kernels(compiler):
    assert library.unavailable() is None


def test_looking_for_kernels_needs_no_torch(python):
    code = (
        "import sys\nfrom nearfield.core import library\nlibrary.kernels()\nsys.exit('torch' in sys.modules)"
    )
    assert python("-c", code).returncode == 0


# ---- instruction sets
@needs_kernels
def test_the_best_instruction_set_is_taken(fresh):
    assert library.isas() == tuple(isa for isa in library.ISAS if isa in library.isas())
    assert library.isa() == library.isas()[0]


@needs_kernels
@pytest.mark.parametrize("isa", library.ISAS)
def test_the_variable_forces_an_instruction_set(python, isa):
    code = f"{SHIPPED}\nassert averages(50, 2)\nfrom nearfield.core import library\nprint(library.isa())"
    done = python("-c", code, NEARFIELD_CPU_ISA=isa)
    if isa in library.isas():
        assert done.stdout.split() == [isa], done.stderr
    else:
        assert f"BackendUnavailable: NEARFIELD_CPU_ISA='{isa}' cannot be used" in done.stderr


def test_an_unknown_instruction_set_names_the_nearest(fresh, tmp_path):
    fresh.setenv(library.VARIABLE, "avx5")
    with pytest.raises(
        ValueError, match="NEARFIELD_CPU_ISA='avx5' is unknown. Did you mean 'avx512' or 'avx2'"
    ):
        library.kernels()
    fresh.setattr(library, "PATH", tmp_path / "none.so")
    with pytest.raises(ValueError, match="avx512"):
        library.unavailable()


@needs_kernels
def test_the_library_itself_obeys_the_variable(python):
    code = f"""
import ctypes
raw = ctypes.CDLL({str(library.PATH)!r})
raw.nearfield_isa.restype = ctypes.c_char_p
nothing = raw.nearfield_attention_forward
nothing.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
print(raw.nearfield_isa(), nothing(None, 0, 1), raw.nearfield_isa())
"""
    least = library.isas()[-1]
    assert python("-c", code, NEARFIELD_CPU_ISA=least).stdout.split() == ["None", "0", f"b'{least}'"]
    assert python("-c", code, NEARFIELD_CPU_ISA="avx5").stdout.split() == ["None", "1", "None"]


@needs_kernels
def test_another_instruction_set_lasts_as_long_as_its_with():
    before = library.isa()
    for isa in library.isas():
        with library.use(isa):
            assert library.isa() == isa and averages(50, 2)
    with pytest.raises(ZeroDivisionError), library.use(library.isas()[-1]):
        1 / 0
    with pytest.raises(ValueError, match="isa='sse' is unknown"), library.use("sse"):
        pass
    assert library.isa() == before


# ---- what may be missing
def test_without_kernels_there_is_a_way_out(fresh, tmp_path):
    fresh.setattr(library, "PATH", tmp_path / "none.so")
    assert library.kernels() is None and library.isas() == () and library.isa() == "none"
    assert library.unavailable().startswith(
        "This installation has no compiled CPU kernels. Install a C++ compiler"
    )
    assert "pip install --force-reinstall" in library.unavailable()
    with pytest.raises(BackendUnavailable, match="Install a C"), library.use("baseline"):
        pass


def test_one_warning_says_that_kernels_are_missing(fresh, tmp_path, recwarn):
    fresh.setattr(library, "PATH", tmp_path / "none.so")
    library.warn_once()
    library.warn_once()
    (warning,) = recwarn
    assert warning.category is RuntimeWarning and "pip install" in str(warning.message)


def test_a_file_that_is_no_library_is_a_reason(fresh, tmp_path):
    (tmp_path / "broken.so").write_text("not a library")
    fresh.setattr(library, "PATH", tmp_path / "broken.so")
    assert "do not load here" in library.unavailable()


@needs_kernels
def test_a_library_of_another_version_is_not_used(fresh):
    fresh.setattr(library, "ABI", library.ABI + 1)
    assert library.kernels() is None
    assert f"another interface ({library.ABI - 1}, not {library.ABI})" in library.unavailable()


# ---- threads
TORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


@pytest.fixture(params=["own", "torch's"])
def every_thread(request):
    """Even small jobs take all their threads, which are the library's own or those that torch has."""
    has_team = library.run_on_threads_of(TORCH)
    if request.param == "own":
        library.kernels().nearfield_set_team(None)
    elif not has_team:
        pytest.skip("torch does not run on OpenMP here")
    with library.grain(0):
        yield
    library.run_on_threads_of(TORCH)


@needs_kernels
def test_threads_come_from_libraries_that_are_loaded_and_have_some(tmp_path):
    assert not library.run_on_threads_of(tmp_path / "libtorch_cpu.so")
    assert not library.run_on_threads_of(library.PATH)


@needs_kernels
@pytest.mark.usefixtures("every_thread")
def test_a_job_runs_on_the_threads_that_it_was_given():
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("threads cannot be counted here")
    assert averages(20_000, 3)
    before = {task.name for task in tasks.iterdir()}
    for tokens in (20_000, 20, 20_000, 5, 20_000):  # a smaller team would end threads, a larger start some
        assert averages(tokens, 3)
    assert {task.name for task in tasks.iterdir()} == before


@needs_kernels
@pytest.mark.usefixtures("every_thread")
@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_any_number_of_threads_computes_the_same(threads):
    assert averages(20_000, threads)


@needs_kernels
@pytest.mark.usefixtures("every_thread")
def test_python_threads_may_call_at_once():
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(averages, 3000 + 100 * i, 1 + i % 4, float(i)) for i in range(60)]
        assert all(job.result() for job in jobs)


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("of", ["own", "torch's"])
def test_a_forked_child_has_a_pool_of_its_own(python, of):
    # the second time another thread keeps the parent's pool, and its locks, busy
    code = f"""
import os, threading
{SHIPPED}
from nearfield.core import library
library.kernels().nearfield_set_grain(0.0)
if {of == "torch's"}:
    library.run_on_threads_of({str(TORCH)!r})
assert averages(20_000, 4)
stop = threading.Event()
def noise():
    while not stop.is_set():
        assert averages(2000, 4)
for busy in (False, True):
    other = threading.Thread(target=noise)
    if busy:
        other.start()
    for _ in range(10):
        child = os.fork()
        if child == 0:
            right = averages(20_000, 4)
            tasks = "/proc/self/task"  # it has workers again, where that can be seen
            os._exit(not (right and (not os.path.isdir(tasks) or len(os.listdir(tasks)) > 1)))
        assert os.waitpid(child, 0)[1] == 0
    stop.set()
    if busy:
        other.join()
    stop.clear()
assert averages(20_000, 4)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


# ---- building
SMALL = 'extern "C" __attribute__((visibility("default"))) const char *stamp() { return NEARFIELD_STAMP; }'


@pytest.fixture
def copy(root, tmp_path):
    """The sources in a place of their own, with the library that is here."""
    there = tmp_path / "copy"
    unwanted = shutil.ignore_patterns("__pycache__", "_kernels.so.*", "check")
    for name in ("nearfield", "csrc"):
        shutil.copytree(root / name, there / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py", ".gitignore"):
        shutil.copy(root / name, there)
    return there


def test_only_a_change_is_compiled(python, copy, compiler):
    for path in (copy / "csrc").glob("*.cpp"):
        path.write_text(SMALL if path.name == "library.cpp" else "")

    def built(*options):
        done = python(str(copy / "hatch_build.py"), *options)
        assert done.returncode == 0, done.stderr
        return (copy / "nearfield" / "_kernels.so").read_bytes()

    first = built()
    (copy / "nearfield" / "_kernels.so").write_bytes(first + b"still here")
    assert built().endswith(b"still here")
    (copy / "csrc" / "more.h").write_text("")
    changed = built()
    assert not changed.endswith(b"still here") and changed != first
    assert built("--isas", "baseline") not in (first, changed)
    assert built("--flags=-g") not in (first, changed)


def test_a_library_that_cannot_be_renewed_is_removed(python, copy):
    built = copy / "nearfield" / "_kernels.so"
    for path in (copy / "csrc").glob("*.cpp"):
        path.write_text("int f( {")
    for options, compiler in ((), ""), (("--optional",), "nowhere"):
        built.write_text("an older one")
        done = python(str(copy / "hatch_build.py"), *options, CXX=compiler)
        assert not built.exists() and f"no {built}: " in done.stderr
        assert (done.returncode == 0) == bool(options)


def wheel(copy, out, **environment):
    """The one wheel of the sources in `copy`; pip asks no index."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w"]
    done = subprocess.run(
        [*command, str(out), str(copy)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


@pytest.mark.slow
@pytest.mark.native
@needs_kernels
def test_a_wheel_with_kernels_is_of_this_platform_and_runs_where_it_is_unpacked(copy, tmp_path):
    made = wheel(copy, tmp_path / "out")
    assert re.fullmatch(r"nearfield-.*-py3-none-(?!any)\w+\.whl", made.name)
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if "csrc" in name or "test_" in name]
        archive.extractall(tmp_path / "unpacked")
    code = f"import sys\nsys.path.insert(0, sys.argv[1])\n{SHIPPED}\nassert averages(50, 2)"
    code += "\nfrom nearfield.core import library\nprint(library.PATH)"
    ran = [sys.executable, "-I", "-c", code, str(tmp_path / "unpacked")]
    done = subprocess.run(ran, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tmp_path / "unpacked" / "nearfield" / "_kernels.so"), done.stderr


@pytest.mark.slow
@pytest.mark.native
def test_a_wheel_made_without_a_compiler_is_of_any_platform_and_has_no_kernels(copy, tmp_path):
    (copy / "nearfield" / "_kernels.so").write_text("left by somebody")
    made = wheel(copy, tmp_path / "out", CXX="nowhere")
    assert made.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
    assert "nearfield/core/library.py" in names and not [name for name in names if "_kernels" in name]


def test_the_source_distribution_can_make_kernels(copy, root, tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path / "out")]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (made,) = (tmp_path / "out").glob("*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (root / "csrc").glob("*.*")}
    assert sources | {"hatch_build.py"} <= names and "nearfield/_kernels.so" not in names
