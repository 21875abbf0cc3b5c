"""What importing costs, what it pulls in, and which way imports run."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

# Absent packages, as a fresh `pip install nearfield` leaves them.
OPTIONAL = (
    "transformers",
    "accelerate",
    "gguf",
    "huggingface_hub",
    "onnx",
    "timm",
    "torch_geometric",
    "matplotlib",
)
WITHOUT = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"


def test_importing_nearfield_is_cheap_and_leaves_torch_alone(python):
    code = """
import json, sys, time
start = time.process_time()
import nearfield
seconds = time.process_time() - start
print(json.dumps([seconds, "torch" in sys.modules, "typer" in sys.modules]))
"""
    runs = [json.loads(python("-c", code).stdout) for _ in range(3)]
    assert not any(torch or typer for _, torch, typer in runs)
    assert min(seconds for seconds, _, _ in runs) < 0.05


def test_public_names_resolve_and_a_wrong_one_names_the_right_ones():
    import nearfield

    assert nearfield.Neighborhood.__name__ == "Neighborhood"
    assert set(nearfield.__all__) <= set(dir(nearfield))
    with pytest.raises(AttributeError, match="neighborhood_attention"):
        nearfield.neighbourhood_attention


@pytest.mark.parametrize(
    "module",
    ["nearfield.catalog", "nearfield.cli", "nearfield.systems", "nearfield.plan", "nearfield.plan.config"],
)
def test_cards_plans_and_the_command_need_no_torch(python, module):
    code = (
        f"import sys, nearfield, {module}\nnearfield.Neighborhood(7).on(9)\nsys.exit('torch' in sys.modules)"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_the_optional_packages(python, root):
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((root / "nearfield").rglob("*.py"))
        if not path.name.startswith("test_") and path.name != "__main__.py"
    ]
    # hosts/transformers_cache.py and its like subclass that package's classes; only its adapter imports them
    parts_of = tuple(f"nearfield.hosts.{package}_" for package in OPTIONAL)
    modules = [name for name in names if not name.startswith(parts_of)]
    done = python("-W", "error:::nearfield", "-c", WITHOUT + "".join(f"import {m}\n" for m in modules))
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_leaves_no_trace_in_torch(python):
    code = """
import torch, warnings
import torch.nn.functional as F
def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), F.softmax,
            F.scaled_dot_product_attention, torch.backends.cuda.matmul.allow_tf32)
before = state()
warnings.simplefilter("error")
import nearfield.ops.neighborhood
assert before == state()
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_imports_run_one_way(root, monkeypatch, capsys):
    from importlinter.cli import lint_imports

    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    status = lint_imports(config_filename=str(root / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


def test_only_two_environment_variables_steer_the_library(root):
    read = re.compile(r"""environ(?:\.get\(|\[|\.setdefault\()\s*["'](\w+)|getenv\(\s*["'](\w+)""")
    found = {
        name
        for path in (root / "nearfield").rglob("*.py")
        if not path.name.startswith("test_")
        for match in read.findall(path.read_text())
        for name in match
        if name.startswith("NEARFIELD")
    }
    assert found <= {"NEARFIELD_BACKEND", "NEARFIELD_CPU_ISA"}


def test_the_suite_is_offline_and_torchvision_is_absent():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not any(Path(place, "torchvision").is_dir() for place in sys.path if place)
