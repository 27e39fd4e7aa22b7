"""What models said of every image of a split: noted in the pass that evaluates them, kept in one small file."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..hub.files import read_tensors, write_tensors

__all__ = ['MAX_LOGITS', 'Predicted', 'PredictionRecorder', 'SplitPredictions', 'read_predictions', 'write_predictions']

MAX_LOGITS = 2**21
"""Logits of a model that are kept of a split; of more there are, those of a fixed random part of its images."""

Outputs = Mapping[str, torch.Tensor]

_THUMBNAIL = 'thumbnail'


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What one model said of the images of a split.

    Args:
        classes: The most likely class, int64 `[N]`.
        confidence: Its probability, float32 `[N]`.
        logits: Logits float32 `[M, K]` of the images of `SplitPredictions.sample`, the largest of each image 0.
    """

    classes: torch.Tensor
    confidence: torch.Tensor
    logits: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SplitPredictions:
    """What models said of the images of a split.

    Args:
        target: The label of each image, int64 `[N]`; `None` where there are no labels.
        sample: Rows of the images whose logits are kept, int64 `[M]`.
        models: By name.
    """

    target: torch.Tensor | None
    sample: torch.Tensor
    models: Mapping[str, Predicted]

    def __len__(self) -> int:
        return len(next(iter(self.models.values())).classes)

    @property
    def sampled_target(self) -> torch.Tensor | None:
        """The labels `[M]` of the images whose logits are kept."""
        return None if self.target is None else self.target[self.sample]


class PredictionRecorder:
    """Recorder of what models predict in an evaluation.

    Only what is small stays: class and confidence of every image, and a bounded number of logits.

    Args:
        num_classes: Number of classes. Logits of another number, or features, are not noted.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._splits: dict[str, _Notes] = {}

    def start(self, split: str, images: int, labelled: bool = True) -> _Notes:
        """Return what notes a split of that many images; `evaluate_together` calls it with each batch."""
        self._splits[split] = _Notes(self.num_classes, images, labelled)
        return self._splits[split]

    def result(self, names: Mapping[tuple[int, str], str]) -> dict[str, SplitPredictions]:
        """Return what was noted, by split, leaving out what was not seen to its end.

        Args:
            names: What to call the models, by the number of the function that was evaluated and the name of its output.
        """
        whole = {split: notes for split, notes in self._splits.items() if notes.is_whole}
        found = {split: notes.result(names) for split, notes in whole.items()}
        return {split: each for split, each in found.items() if each.models}


class _Notes:
    def __init__(self, num_classes: int, images: int, labelled: bool) -> None:
        self.num_classes, self.images, self.labelled = num_classes, images, labelled
        self._kept = torch.zeros(images, dtype=torch.bool)
        # Not the first ones: images are often sorted by class.
        order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
        self._kept[order[: max(1, MAX_LOGITS // num_classes)]] = True
        self._rows: list[torch.Tensor] = []
        self._targets: list[torch.Tensor] = []
        self._parts: dict[tuple[int, str], list[tuple[torch.Tensor, ...]]] = {}

    def __call__(self, outputs: Sequence[Outputs], target: torch.Tensor, rows: torch.Tensor) -> None:
        self._rows.append(rows)
        self._targets.append(target)
        self._kept = self._kept.to(rows.device)
        kept = self._kept[rows]
        for number, named in enumerate(outputs):
            for name, logits in named.items():
                if logits.shape[1] != self.num_classes:
                    continue
                # As the accuracy is measured: where logits tie, argmax may choose another one.
                classes = logits.topk(1, dim=1).indices[:, 0]
                shifted = (logits - logits.amax(dim=1, keepdim=True)).float()
                confidence = 1 / shifted.exp().sum(dim=1)
                # Beyond the range of half precision there is nothing left of a probability.
                least = torch.finfo(torch.float16).min
                part = (classes, confidence, shifted[kept].clamp(min=least).half())
                self._parts.setdefault((number, name), []).append(part)

    @property
    def is_whole(self) -> bool:
        return sum(map(len, self._rows)) == self.images

    def result(self, names: Mapping[tuple[int, str], str]) -> SplitPredictions:
        rows = torch.cat(self._rows).cpu()
        order = rows.argsort()
        kept = self._kept.cpu()
        sampled = rows[kept[rows]].argsort()
        models: dict[str, Predicted] = {}
        for key, name in names.items():
            if key in self._parts:
                classes, confidence, logits = (torch.cat(part).cpu() for part in zip(*self._parts[key], strict=True))
                models[name] = Predicted(classes[order], confidence[order], logits[sampled].float())
        target = torch.cat(self._targets).cpu()[order] if self.labelled else None
        return SplitPredictions(target, kept.nonzero()[:, 0], models)


def write_predictions(path: Path, splits: Mapping[str, SplitPredictions], thumbnails: Mapping[int, bytes]) -> None:
    """Write predictions and images to one safetensors file.

    Args:
        path: The file.
        splits: Predictions by split.
        thumbnails: Encoded images by their row in the validation data.

    Raises:
        OSError: If it cannot be written.
        ValueError: If a logit is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    for split, predictions in splits.items():
        if predictions.target is not None:
            tensors[f'{split}/target'] = predictions.target.int()
        tensors[f'{split}/sample'] = predictions.sample.int()
        for name, said in predictions.models.items():
            tensors[f'{split}/{name}/classes'] = said.classes.int()
            tensors[f'{split}/{name}/confidence'] = said.confidence
            tensors[f'{split}/{name}/logits'] = said.logits.half()
    for row, image in thumbnails.items():
        tensors[f'{_THUMBNAIL}/{row}'] = torch.frombuffer(bytearray(image), dtype=torch.uint8)
    write_tensors(path, tensors)


def read_predictions(path: Path) -> tuple[dict[str, SplitPredictions], dict[int, bytes]]:
    """Read what `write_predictions` has written.

    Raises:
        ValueError: If the file is damaged, or not such a file.
    """
    thumbnails: dict[int, bytes] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in read_tensors(path).items():
        split, _, rest = key.partition('/')
        if split == _THUMBNAIL:
            thumbnails[int(rest)] = tensor.numpy().tobytes()
        else:
            parts.setdefault(split, {})[rest] = tensor
    try:
        return {split: _split_of(found) for split, found in parts.items()}, thumbnails
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f'{path.name} does not hold the predictions of a run ({error!r}).') from error


def _split_of(parts: Mapping[str, torch.Tensor]) -> SplitPredictions:
    # In the order of the evaluation: safetensors has its own.
    names = sorted({key.rpartition('/')[0] for key in parts} - {''})
    models = {}
    for name in names:
        classes, confidence = parts[f'{name}/classes'].long(), parts[f'{name}/confidence'].float()
        models[name] = Predicted(classes, confidence, parts[f'{name}/logits'].float())
    if len({len(each.classes) for each in models.values()}) != 1:
        raise ValueError('its models saw different numbers of images')
    target = parts['target'].long() if 'target' in parts else None
    return SplitPredictions(target, parts['sample'].long(), models)
