"""What importing costs, what it pulls in, and which way imports run."""

import json
import re
import sys
from pathlib import Path

import pytest

# Absent packages, as a fresh `pip install nearfield` leaves them.
OPTIONAL = ("transformers", "accelerate", "gguf", "huggingface_hub", "onnx", "timm", "torch_geometric", "matplotlib")
WITHOUT = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"


def test_importing_nearfield_is_cheap_and_leaves_torch_alone(python):
    code = """
import json, sys, time
start = time.perf_counter()
import nearfield
seconds = time.perf_counter() - start
print(json.dumps([seconds, "torch" in sys.modules, "typer" in sys.modules]))
"""
    runs = [json.loads(python("-c", code).stdout) for _ in range(3)]
    assert not any(torch or typer for _, torch, typer in runs)
    assert min(seconds for seconds, _, _ in runs) < 0.05


def test_public_names_resolve_and_a_wrong_one_names_the_right_ones(python):
    import nearfield

    assert nearfield.Neighborhood.__name__ == "Neighborhood"
    assert set(nearfield.__all__) <= set(dir(nearfield))
    with pytest.raises(AttributeError, match="neighborhood_attention"):
        nearfield.neighbourhood_attention  # noqa: B018
    assert "torch" not in json.loads(
        python("-c", "import nearfield, sys, json; nearfield.Neighborhood; print(json.dumps(list(sys.modules)))").stdout
    )


@pytest.mark.parametrize("module", ["nearfield.catalog", "nearfield.cli", "nearfield.plan"])
def test_modules_of_integers_and_cards_need_no_torch(python, module):
    done = python("-c", f"import sys, {module}; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_the_optional_packages(python, root):
    modules = [
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((root / "nearfield").rglob("*.py"))
        if not path.name.startswith("test_") and path.name != "__main__.py"
    ]
    done = python("-W", "error:::nearfield", "-c", WITHOUT + "".join(f"import {m}\n" for m in modules))
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_leaves_no_trace_in_torch(python, root):
    code = """
import torch, warnings
before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.nn.functional.softmax,
          torch.nn.functional.scaled_dot_product_attention, torch.backends.cuda.matmul.allow_tf32)
warnings.simplefilter("error")
import nearfield.ops.neighborhood
after = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.nn.functional.softmax,
         torch.nn.functional.scaled_dot_product_attention, torch.backends.cuda.matmul.allow_tf32)
assert before == after
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
    import os

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not any(Path(place, "torchvision").is_dir() for place in sys.path if place)
