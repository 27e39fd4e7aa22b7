"""What users do, as functions that run in a process of their own. Everything is imported inside: the environment of
the process counts at import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LABELS = ['Ankle boot', 'Bag', 'Coat', 'Dress', 'Pull|over']
DATA = {
    'input_size': (3, 64, 64),
    'mean': (0.4, 0.5, 0.6),
    'std': (0.2, 0.3, 0.25),
    'interpolation': 'bilinear',
    'crop_pct': 0.9,
}
GREY_DATA = {'input_size': (1, 28, 28), 'mean': (0.286,), 'std': (0.353,), 'interpolation': 'bilinear', 'crop_pct': 1.0}
GREY_ARGS = {'layers': [1, 1, 1, 1], 'channels': [8, 16, 16, 32], 'in_chans': 1}


def make_model(name: str, seed: int = 0, num_classes: int = 5, **kwargs: Any) -> Any:
    """A timm model with weights like nobody else's."""
    import timm
    import torch

    if name.startswith('cifar_'):
        import timm_dfpt.models  # noqa: F401
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01 * torch.randn_like(tensor))
    return model.eval()


def images(channels: int = 3, size: int = 64) -> Any:
    import torch

    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def logits_of(model: Any, channels: int = 3, size: int = 64) -> list[list[float]]:
    import torch

    with torch.no_grad():
        return model.eval()(images(channels, size)).tolist()


def picture(path: str = 'image.png', grey: bool = False) -> Any:
    """A picture file with a gradient and some structure."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:48, 0:60]
    array = np.stack([4 * x, 5 * y, 2 * (x + y)], -1).astype(np.uint8)
    image = Image.fromarray(array).convert('L' if grey else 'RGB')
    image.save(path)
    return image


def push_model(repo_id: str, name: str, model: dict[str, Any] | None = None, **kwargs: Any) -> list[list[float]]:
    """Publish a student and return its logits."""
    import timm_dfpt.hub

    made = make_model(name, **(model or {}))
    timm_dfpt.hub.push_student(made, repo_id, **kwargs)
    return logits_of(made, made.pretrained_cfg['input_size'][0] if not model else model.get('in_chans', 3), 64)


def validate_card(text: str) -> None:
    """What `ModelCard.validate` does, but on the Hub of the test: huggingface_hub 1 knows only the real one."""
    from huggingface_hub import constants, get_session

    reply = get_session().post(f'{constants.ENDPOINT}/api/validate-yaml', json={'repoType': 'model', 'content': text})
    assert reply.status_code == 200, reply.text


def save_model(folder: str) -> None:
    from timm_dfpt import save_student

    save_student(make_model('test_resnet'), folder, label_names=LABELS)


def load_with_timm(name: str, channels: int = 3, imports: str | None = None) -> list[list[float]]:
    import importlib

    import timm

    if imports:
        importlib.import_module(imports)
    return logits_of(timm.create_model(name, pretrained=True), channels)


def load_with_transformers(repo_id: str, channels: int = 3) -> dict[str, Any]:
    """Load model, image processor and pipeline, and say what they say of one picture."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    model = AutoModelForImageClassification.from_pretrained(repo_id).eval()
    image = picture(grey=channels == 1)
    processed = AutoImageProcessor.from_pretrained(repo_id)(image)['pixel_values']
    plain = timm.create_model(f'hf-hub:{repo_id}', pretrained=True)
    config, weights = plain.pretrained_cfg, model.timm_model.state_dict()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config))
    given = np.array(Image.open('image.png'))[..., None] if channels == 1 else 'image.png'
    with torch.no_grad():
        expected = model(transform(image)[None]).logits.softmax(-1)[0]
        logits = model(images(channels)).logits.tolist()
    answers = pipeline('image-classification', model=repo_id)(given, top_k=len(expected))
    return {
        'logits': logits,
        'same_weights': all(torch.equal(weights[key], value) for key, value in plain.state_dict().items()),
        'labels': [model.config.id2label[i] for i in range(model.config.num_labels)],
        'same_pixels': torch.equal(processed[0], transform(image)),
        'pixels': [processed.mean().item(), list(processed.shape)],
        'answers': {a['label']: a['score'] for a in answers},
        'expected': dict(zip(model.config.id2label.values(), expected.tolist(), strict=True)),
    }


def load_any(name: str, channels: int = 3, **kwargs: Any) -> dict[str, Any]:
    """Load with timm_dfpt whatever it is, and say what it is."""
    import timm_dfpt.hub

    model = timm_dfpt.hub.from_pretrained(name, **kwargs)
    return {'type': type(model).__name__, **outputs(model, channels)}


def outputs(model: Any, channels: int = 3) -> dict[str, Any]:
    import torch

    from timm_dfpt import DualForwardPathTeacher

    with torch.no_grad():
        out = model.eval()(images(channels))
    if isinstance(model, DualForwardPathTeacher):
        return {'original': out.original.tolist(), 'prompt': out.prompt.tolist()}
    return {'logits': out.tolist()}


def make_teacher(base: Any, variant: str = 'dfpt', seed: int = 3, **kwargs: Any) -> Any:
    """A teacher on a model (or the id of one) with a prompt path that has moved away from it."""
    import timm
    import torch

    import timm_dfpt

    model = timm.create_model(base, pretrained=True) if isinstance(base, str) else base
    teacher = timm_dfpt.wrap(model, variant=variant, **kwargs)
    torch.manual_seed(seed)
    for tensor in teacher.prompt_path.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.rand_like(tensor))
    return teacher.eval()


def push_teacher(repo_id: str, base: str, variant: str = 'dfpt', wrap: Any = None, **kwargs: Any) -> dict[str, Any]:
    """Publish a prompt path and return the teacher's outputs."""
    import timm_dfpt.hub

    teacher = make_teacher(base, variant, **(wrap or {}))
    timm_dfpt.hub.push_prompt_path(teacher, repo_id, **kwargs)
    return outputs(teacher)


def cached_files(home: str) -> dict[str, bytes]:
    """Everything that a failed download must not change or leave behind."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in sorted(Path(home).rglob('*'))
        if path.is_file() and not path.name.endswith(('.lock', '.TAG'))
    }
