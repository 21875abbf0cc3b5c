"""The pocket vision-language model, asked about scenes with some of its image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nearfield.data import scenes
from nearfield.data.scenes import Question, Scene
from nearfield.hosts.pocket import Pocket
from nearfield.hosts.vision_language import vision_tower
from nearfield.systems.hiprune.steer import HiPrune, shorten
from nearfield.systems.hiprune.study import tower_scores


class Asked:
    """The pocket model, what its tower attends to, and its answers with some of its image tokens."""

    def __init__(self) -> None:
        pocket = Pocket()
        self.model, self.words, self._inputs = pocket.model, pocket.words, pocket.inputs

    def inputs(self, here: Scene, question: str) -> dict[str, Tensor]:
        return self._inputs(scenes.normalised(scenes.render(here).pixels)[None], question)

    def look(self, here: Scene) -> tuple[tuple[Tensor, Tensor], list[Tensor], Tensor]:
        """Scores of the object and the deep layer, the image's features, its pixels."""
        inputs = self.inputs(here, "is there a circle?")
        tower = vision_tower(self.model, inputs)
        layers = HiPrune(1).layers(self.model, tower)
        scores, features = tower_scores(self.model, inputs, layers, tower=tower)
        return (scores[layers[0]][0], scores[layers[1]][0]), features, scenes.render(here).pixels

    @torch.no_grad()
    def ask(
        self,
        here: Scene,
        asked: Sequence[Question],
        kept: Mapping[str, Tensor],
        features: Sequence[Tensor],
        found: dict[str, list[float]],
    ) -> None:
        """Adds for each question and selection whether the greedy answer is right."""
        for question in asked:
            inputs = self.inputs(here, question.text)
            right = self.words.convert_tokens_to_ids(question.answer)
            for name, some in kept.items():
                shorter = shorten(self.model, inputs, [some], features=features).inputs
                chosen = self.model(**shorter, logits_to_keep=1).logits[0, -1].argmax()
                found.setdefault(name, []).append(float(chosen == right))
