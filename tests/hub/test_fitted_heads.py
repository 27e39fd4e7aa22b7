"""Saved prompt paths of teachers whose head was fitted: the base stays the published model."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import timm_dfpt
from timm_dfpt.hub.base import fingerprint


@pytest.mark.parametrize('variant', ['dfpt', 'dfpt+'])
def test_fitted_heads_come_back_on_the_published_model(tmp_path: Path, variant: Any) -> None:
    """Given the published model, a copy with another head, or the fitted copy itself."""
    torch.manual_seed(0)
    published = timm.create_model('resnet18', num_classes=7, layers=[1, 1, 1, 1], channels=[8, 8, 16, 16]).eval()
    x, target = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
    fitted = timm_dfpt.fit_head(published, [(x, target)], 3)
    teacher = timm_dfpt.wrap(fitted, variant=variant).eval()
    with torch.no_grad():
        for param in teacher.prompt_path.parameters():
            param.add_(0.01)
    out = teacher(x)
    timm_dfpt.save_prompt_path(teacher, tmp_path)
    record = json.loads((tmp_path / 'prompt_config.json').read_text())
    assert record['base_fingerprint']['weights'] == fingerprint(published).weights
    assert record['base_fingerprint']['parameters'] == fingerprint(published).parameters
    assert record['fitted_head']['accuracy'] == fitted.fitted_head.accuracy
    other = timm_dfpt.fit_head(published, [(x, target.flip(0))], 3)
    for model in (published, other, teacher.unwrap()):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        loaded = timm_dfpt.load_teacher(tmp_path, model)
        again = loaded(x)
        assert torch.equal(again.original, out.original)
        assert torch.equal(again.prompt, out.prompt)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        loaded.unwrap()
    with torch.no_grad():
        next(published.parameters()).add_(1)
    with pytest.raises(ValueError, match='Same architecture, other weights'):
        timm_dfpt.load_teacher(tmp_path, published)
    config = {**record, 'fitted_head': {**record['fitted_head'], 'how': 'guessed'}}
    (tmp_path / 'prompt_config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='fitted_head must have the keys'):
        timm_dfpt.load_teacher(tmp_path, published)
