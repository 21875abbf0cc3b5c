"""What the README shows works."""

import re

import pytest
import torch


@pytest.fixture
def readme(root):
    return (root / "README.md").read_text(encoding="utf-8")


def test_the_first_thirty_lines_get_a_newcomer_going(readme):
    head = "\n".join(readme.splitlines()[:30])
    for wanted in ("make demo", "make test", "docs/neighborhood.svg", "neighborhood_attention(", "measure("):
        assert wanted in head


def test_the_python_lines_run_as_they_stand(readme):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    input_ids = torch.arange(32)[None]
    with torch.no_grad():
        before = model(input_ids).logits
    [code] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = {"model": model, "input_ids": input_ids}
    exec(code, names)
    assert names["out"].shape == (1, 56, 56, 4, 32)
    assert len(names["locality"].sites) == 2
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, before)


def test_links_and_commands_are_there(readme, root):
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        if "://" not in target:
            assert (root / target).exists(), target
    from nearfield import cli

    known = {info.name or info.callback.__name__ for info in cli.app.registered_commands}
    used = set(re.findall(r"(?:^|`)nearfield (\w+)", readme, re.MULTILINE))
    assert used
    assert used <= known
    targets = set(re.findall(r"^make ([\w-]+)|`make ([\w-]+)", readme, re.MULTILINE))
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    for target in {name for pair in targets for name in pair if name}:
        assert f"\n{target}:" in makefile
