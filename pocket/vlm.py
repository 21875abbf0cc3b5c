"""The pocket vision-language model while it learns: packed questions, and labels for every patch.

All questions on a picture share its tokens: they lie behind one another in one sequence, each sees the
picture and itself alone, and each stands at the positions that it would have if it were the only one. Small
pictures are windows of the full grid, with the positions of the patches that they show, so that what is
learnt on them holds for large ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from first import widen
from torch import Tensor, nn

from nearfield.data import scenes
from nearfield.data.scenes import Picture, Question, Scene, World
from nearfield.train import Loss

GRID, PATCH, WIDTH = 16, 6, 128
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<user>", "<assistant>", "<unk>")
PAD, BOS, EOS, IMAGE, USER, ASSISTANT, UNKNOWN = range(len(SPECIAL))
WORDS = (*SPECIAL, *scenes.vocabulary())
NUMBER = {word: number for number, word in enumerate(WORDS)}
WHAT = (*scenes.KINDS, "nothing", *scenes.GLYPHS)  # what a patch may show
GROUND = len(scenes.KINDS)
TEXT = 1 + GRID * GRID  # the position of the first token behind a picture
DESCRIBE = "describe this picture."
IGNORED = -100
HELD_OUT = 10_000  # the seed of scenes that are never learnt from
CELLS = 3  # a patch is covered in 3 × 3 cells, or not
HALFWAY = 4  # the layer behind which the tower knows where shapes are
# Of what patches show, of the class token, of cells and of offsets: beside answers, and in seeing alone.
WEIGHTS, ALONE = (0.3, 0.1, 0.5, 0.3), (1.0, 1.0, 3.0, 2.0)


def build() -> nn.Module:
    """The model with fresh weights: 8 layers that see, a projector of 2, 6 layers that speak."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=8,
        num_attention_heads=4,
        image_size=GRID * PATCH,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlavaForConditionalGeneration(config)
    widen(model.model.language_model.layers, WIDTH)
    with torch.no_grad():  # as strong as the patches, so that neighbours find one another from the start
        model.model.vision_tower.embeddings.position_embedding.weight[1:] = 0.3 * _waves()
    return model


def _waves() -> Tensor:
    """Sines and cosines of row and column, as the first values of the positions of patches."""
    rates = 100.0 ** -(torch.arange(WIDTH // 4) / (WIDTH // 4))
    angles = torch.arange(GRID)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, GRID, -1), line[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def encode(text: str) -> list[int]:
    """Words and marks by number."""
    for mark in ",.?":
        text = text.replace(mark, f" {mark}")
    return [NUMBER[word] for word in text.split()]


class Learner(nn.Module):
    """The model, and heads on its class token and on its patches that only training needs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.summary = nn.Linear(WIDTH, len(scenes.KINDS) + len(scenes.COLOURS))
        self.parts = nn.Linear(WIDTH, CELLS**2 + 2)
        what, colours, sizes = (
            torch.tensor([NUMBER[word] for word in words])
            for words in (WHAT, tuple(scenes.COLOURS), tuple(scenes.SIZES))
        )
        self.register_buffer("words", torch.cat([what, colours, sizes]), persistent=False)

    def learns_to_see(self, on: bool) -> None:
        """Whether training changes what leads from pixels to the language model, and the heads beside it."""
        speaks = set(self.model.model.language_model.parameters())
        for parameter in self.parameters():
            parameter.requires_grad_(on or parameter in speaks)

    def see(self, pixels: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projected patches, the class token and the patches halfway.

        `places` are the patches' numbers in the full grid.
        """
        tower = self.model.model.vision_tower
        patches = tower.embeddings.patch_embedding(pixels).flatten(2).mT
        summary = tower.embeddings.class_embedding.expand(len(patches), 1, -1)
        table = tower.embeddings.position_embedding.weight
        hidden = torch.cat([summary + table[0], patches + table[1 + places]], 1)
        hidden = tower.pre_layrnorm(hidden)
        halfway = hidden
        for number, layer in enumerate(tower.encoder.layers[:-1], 1):
            hidden = layer(hidden, attention_mask=None)
            if number == HALFWAY:
                halfway = hidden[:, 1:]
        seen = self.model.model.multi_modal_projector(hidden[:, 1:])
        last = tower.encoder.layers[-1](hidden, attention_mask=None)
        return seen, tower.post_layernorm(last[:, 0]), halfway

    def losses(self, seen: Tensor, summary: Tensor, halfway: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Four: what a patch shows, what the picture holds, which cells are covered, where the centre is.

        Patches are compared with the words for what they show: the language model shall meet its own words.
        """
        words = self.model.get_input_embeddings().weight[self.words]
        near = 12 * F.normalize(seen, dim=-1) @ F.normalize(words, dim=-1).T
        what, colours, sizes = near.split((len(WHAT), len(scenes.COLOURS), len(scenes.SIZES)), -1)
        weights = torch.ones(len(WHAT), device=near.device)
        weights[GROUND] = 0.2  # most patches show nothing
        shown = F.cross_entropy(what.flatten(0, 1), batch["what"].flatten(), weights)
        for logits, labels in ((colours, batch["colours"]), (sizes, batch["sizes"])):
            shown = shown + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        told = F.binary_cross_entropy_with_logits(self.summary(summary), batch["holds"])
        cells, offsets = self.parts(halfway).split((CELLS**2, 2), -1)
        covered = F.binary_cross_entropy_with_logits(cells, batch["covered"])
        is_shape = batch["colours"] != IGNORED
        off = F.smooth_l1_loss(offsets[is_shape], batch["offsets"][is_shape])
        return torch.stack([shown, told, covered, off])

    def speak(self, seen: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The last hidden states of the text behind the picture."""
        ids, segments, positions = batch["ids"], batch["segments"], batch["positions"]
        count, length = seen.shape[1], ids.shape[1]
        table = self.model.get_input_embeddings()
        bos = table(torch.full((len(ids), 1), BOS, device=ids.device))
        embedded = torch.cat([bos, seen.to(bos.dtype), table(ids)], 1)
        start = torch.zeros_like(ids[:, :1])
        positions = torch.cat([start, 1 + batch["places"], positions], 1)
        owner = torch.cat([start.expand(-1, 1 + count), segments], 1)
        causal = torch.ones(2 * (1 + count + length,), dtype=torch.bool, device=ids.device).tril()
        mask = causal & ((owner[:, None] == 0) | (owner[:, None] == owner[:, :, None]))
        found = self.model.model.language_model(
            inputs_embeds=embedded, attention_mask=mask[:, None], position_ids=positions, use_cache=False
        )
        return found.last_hidden_state[:, 1 + count :]

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits where an answer's tokens are wanted, those tokens, and the loss of seeing."""
        seen, summary, halfway = self.see(batch["pixels"], batch["places"])
        beside = self.losses(seen, summary, halfway, batch) @ torch.tensor(WEIGHTS, device=seen.device)
        hidden = self.speak(seen, batch)
        wanted = batch["targets"] != IGNORED
        return self.model.lm_head(hidden[wanted]), batch["targets"][wanted], beside


def look(learner: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of seeing alone."""
    inner = learner.module if hasattr(learner, "module") else learner
    found = inner.losses(*inner.see(batch["pixels"], batch["places"]), batch)
    return found @ torch.tensor(ALONE, device=found.device)


def talk(learner: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """The loss of answers, with that of seeing beside it."""
    logits, targets, beside = learner(batch)
    return Loss(F.cross_entropy(logits, targets, reduction="sum") + len(targets) * beside, len(targets))


@dataclass(frozen=True)
class Lessons:
    """Pictures with questions by number. `plan` gives the share of the way at which each world begins."""

    seed: int
    batches: int
    batch_size: int
    plan: tuple[tuple[float, World], ...]
    asks: bool = True

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __getitem__(self, number: int) -> dict[str, Any]:
        done = (number // self.batch_size) / self.batches
        world = next(world for start, world in reversed(self.plan) if done >= start)
        here = scenes.scene(number, seed=self.seed, world=world)
        draw = Random(f"questions/{self.seed}/{number}")
        asked = [Question("caption", DESCRIBE, scenes.caption(here))]
        asked += scenes.questions(here, draw)
        draw.shuffle(asked)
        return sample(here, asked if self.asks else [], draw, world.side)

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return collate(samples)


def sample(here: Scene, asked: list[Question], draw: Random, side: int = GRID * PATCH) -> dict[str, Any]:
    """One picture with its questions behind one another, as tensors."""
    picture = scenes.render(here, side)
    cells = side // PATCH
    row, column = (draw.randrange(GRID - cells + 1) for _ in range(2))
    places = (row + torch.arange(cells))[:, None] * GRID + column + torch.arange(cells)
    ids, segments, positions, targets = [], [], [], []
    for number, question in enumerate(asked, 1):
        before = [USER, *encode(question.text), ASSISTANT]
        answer = [*encode(question.answer), EOS]
        text = before + answer[:-1]
        ids += text
        segments += [number] * len(text)
        positions += range(TEXT, TEXT + len(text))
        targets += [IGNORED] * (len(before) - 1) + answer
    text = torch.tensor([ids, segments, positions, targets], dtype=torch.long)
    return {
        "pixels": scenes.normalised(picture.pixels),
        "places": places.flatten(),
        "text": text,
        **_labels(here, picture, cells),
    }


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch; texts are filled up with a segment that nothing else sees."""
    longest = max(each["text"].shape[1] for each in samples)
    filling = torch.tensor([PAD, -1, TEXT, IGNORED])[:, None]
    texts = [
        torch.cat([each["text"], filling.expand(4, longest - each["text"].shape[1])], 1) for each in samples
    ]
    text = dict(zip(("ids", "segments", "positions", "targets"), torch.stack(texts, 1), strict=True))
    rest = {name: torch.stack([each[name] for each in samples]) for name in samples[0] if name != "text"}
    return {**rest, **text}


def _labels(here: Scene, picture: Picture, cells: int) -> dict[str, Tensor]:
    """For each patch what it shows, by at least a third of it, in what colour and size, and where."""
    what = torch.full((cells * cells,), GROUND)
    colours, sizes = torch.full_like(what, IGNORED), torch.full_like(what, IGNORED)
    kinds, tints, lengths = (list(each) for each in (scenes.KINDS, scenes.COLOURS, scenes.SIZES))
    masks = torch.cat([picture.masks, picture.letters]).float()
    offsets = torch.zeros(cells * cells, 2)
    centres = (torch.arange(cells) + 0.5) * PATCH
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).flatten(0, 1)
    if len(masks):
        shares, owners = F.avg_pool2d(masks, PATCH).flatten(1).max(0)
        for number in range(len(masks)):
            mine = (owners == number) & (shares > 1 / 3)
            if number >= len(here.shapes):
                letter = here.sign.text[number - len(here.shapes)] if here.sign is not None else ""
                what[mine] = WHAT.index(letter)
                continue
            shape = here.shapes[number]
            what[mine] = kinds.index(shape.kind)
            colours[mine] = tints.index(shape.colour)
            sizes[mine] = lengths.index(shape.size)
            offsets[mine] = (grid[mine] - torch.tensor([shape.y, shape.x])) / shape.radius
    any_shape = picture.masks.any(0).float() if len(picture.masks) else torch.zeros(2 * (cells * PATCH,))
    covered = F.avg_pool2d(any_shape[None], PATCH // CELLS)[0]
    covered = covered.view(cells, CELLS, cells, CELLS).transpose(1, 2).reshape(-1, CELLS**2)
    holds = [float(kind in here.kinds) for kind in kinds]
    holds += [float(any(shape.colour == tint for shape in here.shapes)) for tint in tints]
    return {
        "what": what,
        "colours": colours,
        "sizes": sizes,
        "holds": torch.tensor(holds),
        "covered": covered,
        "offsets": offsets,
    }


@torch.no_grad()
def patches_right(learner: nn.Module) -> dict[str, float]:
    """The share of patches told rightly among those that show something, and of those that do not."""
    data = Lessons(HELD_OUT, 1, 32, ((0.0, World()),), asks=False)
    batch = _on(learner, collate([data[number] for number in range(len(data))]))
    seen, *_ = learner.see(batch["pixels"], batch["places"])
    words = learner.model.get_input_embeddings().weight[learner.words[: len(WHAT)]]
    found = (F.normalize(seen, dim=-1) @ F.normalize(words, dim=-1).T).argmax(-1)
    right, what = found == batch["what"], batch["what"]
    shown = {"shape": what < GROUND, "ground": what == GROUND, "letter": what > GROUND}
    return {name: float(right[where].float().mean()) for name, where in shown.items()}


@torch.no_grad()
def answers_right(learner: nn.Module) -> dict[str, float]:
    """The share of answers that are right in every token, by kind of question, and those of POPE's splits."""
    scores: dict[str, list[float]] = {}
    samples, asked = [], []
    for number in range(32):
        here = scenes.scene(number, seed=HELD_OUT)
        draw = Random(number)
        questions = [Question("caption", DESCRIBE, scenes.caption(here)), *scenes.questions(here, draw)]
        samples.append(sample(here, questions, draw))
        asked.append([question.about for question in questions])
    splits = {split: scenes.pope(split, 32, seed=HELD_OUT) for split in scenes.SPLITS}
    for places in zip(*splits.values(), strict=True):
        samples.append(sample(places[0][0], [q for _, pair in places for q in pair], Random(0)))
        asked.append([split for split in splits for _ in range(2)])
    for start in range(0, len(samples), 16):
        batch = _on(learner, collate(samples[start : start + 16]))
        seen, *_ = learner.see(batch["pixels"], batch["places"])
        found = learner.model.lm_head(learner.speak(seen, batch)).argmax(-1)
        targets, segments = batch["targets"], batch["segments"]
        wrong = (found != targets) & (targets != IGNORED)
        for row, names in enumerate(asked[start : start + 16]):
            for number, name in enumerate(names, 1):
                scores.setdefault(name, []).append(float(not wrong[row][segments[row] == number].any()))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _on(learner: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(learner.words.device) for name, value in batch.items()}
