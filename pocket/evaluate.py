"""Measure the trained pocket models against their gates; write weights and cards.

Cards hold what was measured, whether the gates hold or not.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

HOME = Path(__file__).resolve().parent
sys.path[:0] = [str(HOME), str(HOME.parent)]

import lm  # noqa: E402
import texts  # noqa: E402
import train_lm  # noqa: E402
import train_vlm  # noqa: E402
import vlm  # noqa: E402
from ngram import NGram  # noqa: E402

from nearfield.data import scenes  # noqa: E402
from nearfield.data.scenes import Question, Scene  # noqa: E402

PACKAGE = HOME / "nearfield_pocket"
LICENCE = "Apache-2.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("lm", "vlm"))
    parser.add_argument("--out", type=Path, help="where the training wrote (pocket/checkpoints/MODEL)")
    arguments = parser.parse_args()
    out = arguments.out or HOME / "checkpoints" / arguments.model
    if arguments.model == "lm":
        publish_lm(lm.corpus(out), out, tuple(train_lm.STAGES))
        return
    from safetensors.torch import load_model

    learner = vlm.Learner(vlm.build())
    load_model(learner, str(out / tuple(train_vlm.STAGES)[-1] / "model.safetensors"))
    publish_vlm(learner.model, out, tuple(train_vlm.STAGES))


def publish_lm(corpus: lm.Corpus, out: Path, stages: tuple[str, ...]) -> None:
    """Base and twin with their cards. The twin is judged on instructions as well."""
    from safetensors.torch import load_model

    model = lm.build()
    for name in ("base", "chat"):
        load_model(model, str(out / name / "model.safetensors"))
        model.eval()
        folder = PACKAGE / f"lm_{name}"
        _save(model, folder)
        corpus.tokenizer.save_pretrained(folder)
        metrics = lm_metrics(reread(folder), corpus)
        gates = {
            "loss below that of 5-grams by 0.1 at least": metrics["loss"] < metrics["loss of 5-grams"] - 0.1,
            "recall of one of 8 pairs above 0.9": metrics["recall-8"] > 0.9,
        }
        if name == "chat":
            gates = {"responses right in every token above 0.8": metrics["instructions"] > 0.8}
        data = {
            "texts": {part: f"docstrings, {licence}" for part, licence in texts.LICENCES.items()},
            "tasks": "pocket/tasks.py, generated",
            "python": platform.python_version(),
            "versions": {part: _version(part) for part in texts.LICENCES if part != "python"},
            "tokens": {"train": len(corpus.train), "held out": len(corpus.held_out)},
        }
        _card(folder, f"lm-{name}", data, _stages(out, stages[: stages.index(name) + 1]), metrics, gates)


def lm_metrics(model: nn.Module, corpus: lm.Corpus, *, prompts: int = 100) -> dict[str, float]:
    """The loss of a token of held-out text, that of 5-grams on the same, and shares of right answers."""
    ids = lm.held_out_windows(corpus, 96, 256)
    with torch.no_grad():
        logits = torch.cat([model(some[:, :-1], use_cache=False).logits for some in ids.split(8)])
    # the first token of a window is left out, since the 5-grams have nothing to tell it by
    loss = torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), ids[:, 2:].flatten())
    grams = NGram(corpus.train.long().numpy())
    told = [grams.log_probability(row[1:].numpy()).mean() for row in ids]
    found = {"loss": float(loss), "loss of 5-grams": -float(sum(told) / len(told))}
    found |= lm.judge(corpus, "recall", windows=1, prompts=prompts)(model) | {"loss": float(loss)}
    responses = lm.judge(corpus, "instruction", windows=1, prompts=prompts)(model)
    responses.pop("loss")
    return {**found, "instructions": sum(responses.values()) / len(responses), **responses}


def publish_vlm(model: nn.Module, out: Path, stages: tuple[str, ...]) -> None:
    """The vision-language model with what prepares its input, and its card."""
    folder = PACKAGE / "vlm"
    _save(model.eval(), folder)
    processor().save_pretrained(folder)
    metrics = vlm_metrics(reread(folder))
    gates = {
        "POPE, random, accuracy above 0.9": metrics["pope-random"]["accuracy"] > 0.9,
        "POPE, adversarial, accuracy in 0.65 to 0.85": 0.65
        <= metrics["pope-adversarial"]["accuracy"]
        <= 0.85,
    }
    data = {"scenes": "nearfield.data.scenes, rendered", "versions": {"torch": _version("torch")}}
    _card(folder, "vlm", data, _stages(out, stages), metrics, gates)


def processor() -> Any:
    """Words to numbers, pixels to what the tower takes, and how a question is put."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = Tokenizer(models.WordLevel(vlm.NUMBER, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        **special,
        additional_special_tokens=["<image>", "<user>", "<assistant>"],
        model_input_names=["input_ids", "attention_mask"],
    )
    side = vlm.GRID * vlm.PATCH
    images = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[scenes.MEAN] * 3,
        image_std=[scenes.DEVIATION] * 3,
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vlm.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="<bos><image><user> {{ messages[-1]['content'][-1]['text'] }} <assistant>",
    )


def prompt(question: str) -> list[int]:
    """The numbers of a picture and a question behind it, up to where the answer begins."""
    return [vlm.BOS, *[vlm.IMAGE] * vlm.GRID**2, vlm.USER, *vlm.encode(question), vlm.ASSISTANT]


def vlm_metrics(model: nn.Module, *, num_scenes: int = 300, seed: int = vlm.HELD_OUT) -> dict[str, Any]:
    """POPE's figures by split, the share of right answers by kind of question, and CHAIR's of captions."""
    learner = vlm.Learner(model)
    found: dict[str, Any] = {}
    for split in scenes.SPLITS:
        rows = scenes.pope(split, num_scenes, seed=seed)
        found[f"pope-{split}"] = pope_figures(learner, rows)
    asked = []
    for number in range(num_scenes):
        here = scenes.scene(number, seed=seed)
        asked.append((here, scenes.questions(here, Random(f"evaluate/{number}"))))
    right = answers(learner, asked)
    by_kind: dict[str, list[bool]] = {}
    for (_, questions), row in zip(asked, right, strict=True):
        for question, hit in zip(questions, row, strict=True):
            by_kind.setdefault(question.about, []).append(hit)
    found["questions"] = {name: sum(row) / len(row) for name, row in sorted(by_kind.items())}
    found["captions"] = chair([here for here, _ in asked[: num_scenes // 3]], model)
    return found


def pope_figures(learner: vlm.Learner, rows: Sequence[tuple[Scene, Sequence[Question]]]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes, as POPE counts them."""
    hits = answers(learner, rows)
    pairs = [
        (question.answer == "yes", hit)
        for (_, questions), row in zip(rows, hits, strict=True)
        for question, hit in zip(questions, row, strict=True)
    ]
    true_yes = sum(yes and hit for yes, hit in pairs)
    false_yes = sum(not yes and not hit for yes, hit in pairs)
    precision = true_yes / max(true_yes + false_yes, 1)
    recall = true_yes / sum(yes for yes, _ in pairs)
    return {
        "accuracy": sum(hit for _, hit in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-9),
        "yes": (true_yes + false_yes) / len(pairs),
    }


@torch.no_grad()
def answers(learner: vlm.Learner, rows: Sequence[tuple[Scene, Sequence[Question]]]) -> list[list[bool]]:
    """For each question whether the model's own choice is right in every token, the answer so far given."""
    found = []
    for start in range(0, len(rows), 16):
        some = rows[start : start + 16]
        batch = vlm.collate([vlm.sample(here, list(asked), Random(0)) for here, asked in some])
        seen, *_ = learner.see(batch["pixels"], batch["places"])
        chosen = learner.model.lm_head(learner.speak(seen, batch)).argmax(-1)
        wrong = (chosen != batch["targets"]) & (batch["targets"] != vlm.IGNORED)
        for row, (_, asked) in enumerate(some):
            owners = batch["segments"][row]
            found.append([not bool(wrong[row][owners == n].any()) for n in range(1, len(asked) + 1)])
    return found


@torch.no_grad()
def captions(here: Sequence[Scene], model: nn.Module) -> list[str]:
    """Greedy captions by the host's own `generate`."""
    ids = torch.tensor([prompt(vlm.DESCRIBE)] * len(here))
    pixels = torch.stack([scenes.normalised(scenes.render(scene).pixels) for scene in here])
    made: list[Tensor] = []
    for some, shown in zip(ids.split(16), pixels.split(16), strict=True):
        out = model.generate(input_ids=some, pixel_values=shown, max_new_tokens=40, do_sample=False)
        made += list(out[:, ids.shape[1] :])
    return [" ".join(vlm.WORDS[n] for n in row.tolist() if n >= len(vlm.SPECIAL)) for row in made]


def chair(here: Sequence[Scene], model: nn.Module) -> dict[str, float]:
    """Of the kinds that captions name, the share that is not there; captions with such; recall; words."""
    named = captions(here, model)
    wrong = right = there = bad = 0
    for scene, text in zip(here, named, strict=True):
        kinds = set(scenes.mentioned(text))
        wrong, right = wrong + len(kinds - set(scene.kinds)), right + len(kinds & set(scene.kinds))
        there, bad = there + len(scene.kinds), bad + bool(kinds - set(scene.kinds))
    return {
        "chair-i": wrong / max(wrong + right, 1),
        "chair-s": bad / len(named),
        "recall": right / there,
        "words": sum(len(text.split()) for text in named) / len(named),
    }


def reread(folder: Path) -> nn.Module:
    """The model as a user gets it, in float32."""
    from transformers import AutoConfig, LlamaForCausalLM, LlavaForConditionalGeneration

    kind = AutoConfig.from_pretrained(folder).model_type
    host = LlavaForConditionalGeneration if kind == "llava" else LlamaForCausalLM
    return host.from_pretrained(folder, dtype=torch.float32).eval()


def _save(model: nn.Module, folder: Path) -> None:
    """Half precision is enough to store: figures are measured on what is stored."""
    folder.mkdir(parents=True, exist_ok=True)
    halves: dict[int, Tensor] = {}  # a matrix that serves twice is stored once
    state = {name: halves.setdefault(x.data_ptr(), x.half()) for name, x in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)


def _stages(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """Recipe and last figures of each stage, from what the training wrote."""
    found = {}
    for name in names:
        states = sorted((out / name / "checkpoints").glob("step-*/state.json"))
        state = json.loads(states[-1].read_text("utf-8"))
        lines = (out / name / "log.jsonl").read_text("utf-8").splitlines()
        losses = [json.loads(line) for line in lines if '"loss"' in line and '"evaluate"' not in line]
        recipe = {key: value for key, value in state["recipe"].items() if value not in ("", None, {})}
        found[name] = {"recipe": recipe, "seconds": round(state["seconds"]), "loss": losses[-1]["loss"]}
    return found


def _card(
    folder: Path, name: str, data: dict[str, Any], stages: dict[str, Any], metrics: dict[str, Any], gates: Any
) -> None:
    card = {
        "name": name,
        "licence": LICENCE,
        "trained by": f"pocket/train_{'vlm' if name == 'vlm' else 'lm'}.py",
        "data": data,
        "stages": stages,
        "metrics": _rounded(metrics),
        "gates": gates,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"metrics": card["metrics"], "gates": gates}, indent=1))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _version(package: str) -> str:
    return version({"sklearn": "scikit-learn", "skimage": "scikit-image"}.get(package, package))


if __name__ == "__main__":
    main()
