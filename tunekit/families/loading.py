"""Loading and saving diffusers pipelines, for all families: where weights come from and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from tunekit import layers
from tunekit.errors import ModelError, TunekitError, output_errors
from tunekit.resources import builtin

if TYPE_CHECKING:
    from tunekit.families.family import FamilyFacts, Pipeline

MODEL_INDEX = "model_index.json"
TEXT_LEVEL = "text_model."
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS = ("model", "pytorch_model", "diffusion_pytorch_model")
PICKLE_REFUSED = "weights in a pickle are refused: a pickle can run any program while it is opened"
PICKLE_HINT = "use the .safetensors version, or set model.allow_pickle: true if you trust whoever made it"


def load_pipeline(
    source: str,
    pipeline_class: type[Any],
    denoiser_class: type[Any],
    facts: FamilyFacts,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
    **fixed: Any,
) -> Pipeline:
    """Load a pipeline from a folder, "builtin/...", a single file or a hub id.

    Args:
        source: see `Family.load`, also for the other options.
        pipeline_class: of diffusers.
        denoiser_class: of diffusers, for denoisers with pruned or quantized layers.
        facts: the family's.
        dtype: of the weights.
        revision: of a hub id.
        variant: of the files.
        allow_pickle: open .bin and .ckpt files.
        fixed: arguments of the pipeline's constructor.

    Raises:
        ModelError: see `Family.load`.
    """
    path = builtin(source) or Path(source).expanduser()
    options: dict[str, Any] = {**_dtype_option(dtype), **fixed}
    absent = {name: None for name, value in fixed.items() if value is None}
    choice = {"variant": variant, "use_safetensors": None if allow_pickle else True}
    try:
        if path.is_file():
            pipeline = _load_single_file(path, pipeline_class, options, allow_pickle)
        else:
            folder = path
            if not path.is_dir():
                _check_hub_id(source)
                _check_class(source, pipeline_class_name(source, revision), facts)
                with _quiet():
                    folder = Path(pipeline_class.download(source, revision=revision, **choice, **absent))
            _check_folder(folder, facts, absent, allow_pickle)
            if layers.has_custom_layers(folder / facts.denoiser_name):
                options[facts.denoiser_name] = layers.load_denoiser(
                    denoiser_class, folder / facts.denoiser_name, dtype
                )
            with _quiet():
                options |= _encoders_of_transformers_5(folder, facts, variant, dtype)
                pipeline = pipeline_class.from_pretrained(folder, **choice, **options)
    except TunekitError:
        raise
    # diffusers, transformers, safetensors and the hub raise two dozen kinds; to the user all are one.
    except Exception as error:
        raise ModelError(_reason(error), where=source, hint=_hint(source, path)) from error
    check_finite(pipeline, source)
    for component in components(pipeline).values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipeline


def save_pipeline(pipeline: Pipeline, folder: Path, facts: FamilyFacts) -> None:
    """Write the pipeline in diffusers' layout without the path it was loaded from."""
    with output_errors(folder), _quiet():
        folder.mkdir(parents=True, exist_ok=True)
        for name, component in components(pipeline).items():
            if name == facts.denoiser_name and layers.describe(component) is not None:
                layers.save_denoiser(component, folder / name)
            elif name.startswith("tokenizer"):
                save_tokenizer(component, folder / name)
            else:
                component.save_pretrained(folder / name)
        for _, encoder in facts.encoders:
            portable_encoder(folder / encoder)
        pipeline.save_config(folder)
        for file in [folder / MODEL_INDEX, *folder.glob("*/*config.json")]:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that transformers 4 and 5 and other programs read.

    transformers 5 writes only tokenizer.json; `CLIPTokenizer` of transformers 4 needs vocab.json and
    merges.txt.
    """
    with output_errors(folder):
        tokenizer.save_pretrained(folder)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        model = content.get("model", {})
        if model.get("type") != "BPE" or (folder / "merges.txt").is_file():
            return
        vocabulary = {
            **model["vocab"],
            **{token["content"]: token["id"] for token in content["added_tokens"]},
        }
        ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        (folder / "vocab.json").write_text(json.dumps(ordered, ensure_ascii=False), encoding="utf-8")
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def portable_encoder(folder: Path) -> None:
    """Give a saved CLIP text encoder the weight names that all programs read.

    transformers 5 writes `encoder.layers...` for what every other program calls
    `text_model.encoder.layers...`. It reads both; transformers 4 reads the latter only, and silently takes
    random weights for the former.
    """
    file = folder / "model.safetensors"
    if file.is_file() and _lacks_level(file):
        tensors = safetensors.torch.load_file(file)
        renamed = {TEXT_LEVEL + key: tensor for key, tensor in tensors.items()}
        safetensors.torch.save_file(renamed, file, metadata={"format": "pt"})


def _lacks_level(file: Path) -> bool:
    with safe_open(file, framework="pt") as opened:
        return any(key.startswith("embeddings.token_embedding.") for key in opened.keys())  # noqa: SIM118


def _encoders_of_transformers_5(
    folder: Path, facts: FamilyFacts, variant: str | None, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """Load the text encoders that transformers 5 wrote and the installed transformers 4 would misread."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {}
    loaded = {}
    for _, encoder in facts.encoders:
        file = folder / encoder / (f"model.{variant}.safetensors" if variant else "model.safetensors")
        if file.is_file() and _lacks_level(file):
            state = {TEXT_LEVEL + key: tensor for key, tensor in safetensors.torch.load_file(file).items()}
            encoder_class = getattr(transformers, _index(str(folder))[encoder][1])
            model = encoder_class(encoder_class.config_class.from_pretrained(folder / encoder))
            model.load_state_dict(state)
            loaded[encoder] = model.to(dtype)
    return loaded


def components(pipeline: Pipeline) -> dict[str, Any]:
    """Return the pipeline's parts that have files of their own, by name."""
    return {k: v for k, v in pipeline.components.items() if hasattr(v, "save_pretrained")}


def check_finite(pipeline: Pipeline, source: str) -> None:
    """Raise ModelError naming the first tensor that holds NaN or infinity."""
    for name, component in components(pipeline).items():
        if isinstance(component, nn.Module):
            for key, tensor in component.state_dict().items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ModelError(
                        f"{name}: tensor {key} holds NaN or infinity",
                        where=source,
                        hint="the file is damaged, or its training diverged: use another version of it",
                    )


def pipeline_class_name(source: str, revision: str | None = None) -> str:
    """Read `_class_name` from the model_index.json of a folder, "builtin/..." or hub id.

    Raises:
        ModelError: there is none.
    """
    name = _index(source, revision).get("_class_name")
    if not isinstance(name, str):
        raise ModelError(f"{MODEL_INDEX} names no pipeline class (_class_name)", where=source)
    return name


def _index(source: str, revision: str | None = None) -> dict[str, Any]:
    path = builtin(source) or Path(source).expanduser()
    if path.is_dir():
        index = path / MODEL_INDEX
        if not index.is_file():
            raise ModelError(
                f"not a pipeline folder: it has no {MODEL_INDEX}",
                where=source,
                hint="give the folder that a diffusers pipeline was saved to",
            )
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"not JSON: {error}", where=str(index)) from error
    else:
        _check_hub_id(source)
        from diffusers import DiffusionPipeline

        try:
            content = DiffusionPipeline.load_config(source, revision=revision)
        except Exception as error:
            raise ModelError(
                f"its {MODEL_INDEX} cannot be read from the Hugging Face hub: {_reason(error)}",
                where=source,
                hint=_hint(source, path),
            ) from error
    return dict(content) if isinstance(content, dict) else {}


def _check_folder(path: Path, facts: FamilyFacts, absent: Collection[str], allow_pickle: bool) -> None:
    """Refuse a folder that is another pipeline, exported, incomplete or pickled; `absent` may be missing."""
    _check_class(str(path), pipeline_class_name(str(path)), facts)
    for name, value in sorted(_index(str(path)).items()):
        if not isinstance(value, list) or len(value) != 2 or value[0] is None or name in absent:
            continue
        if (path / name / "model.onnx").is_file():
            raise ModelError(
                f"{name} is an ONNX graph, and this needs a torch model",
                where=str(path),
                hint="give the model that it was exported from",
            )
        if not (path / name).is_dir():
            raise ModelError(f"its component {name} is missing", where=str(path))
        files = sorted((path / name).iterdir())
        pickles = [f for f in files if f.suffix in PICKLES and f.name.startswith(WEIGHTS)]
        if pickles and not allow_pickle and not any(f.suffix == ".safetensors" for f in files):
            raise ModelError(PICKLE_REFUSED, where=str(pickles[0]), hint=PICKLE_HINT)


def _check_class(source: str, name: str, facts: FamilyFacts) -> None:
    if name not in facts.pipeline_classes:
        raise ModelError(
            f"holds a {name}, which is not {facts.title}",
            where=source,
            hint=f"this family loads {', '.join(facts.pipeline_classes)}; name the family of the source",
        )


def _check_hub_id(source: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise ModelError(
            "no such file or folder",
            where=source,
            hint='a source is a folder, a .safetensors file, a hub id "owner/name", "builtin/..." or "tiny"',
        )


def _load_single_file(
    path: Path, pipeline_class: type[Any], options: dict[str, Any], allow_pickle: bool
) -> Pipeline:
    if path.suffix in PICKLES and not allow_pickle:
        raise ModelError(PICKLE_REFUSED, where=str(path), hint=PICKLE_HINT)
    if path.suffix not in (".safetensors", *PICKLES):
        raise ModelError("not a weights file", where=str(path), hint="single files end in .safetensors")
    # The configs and the tokenizer are not in such a file. diffusers fetches them from the hub, unless a
    # folder of the file's name beside it has them.
    beside = path.with_suffix("")
    if (beside / MODEL_INDEX).is_file():
        options = {**options, "config": str(beside)}
    with _quiet():
        return pipeline_class.from_single_file(str(path), **options)


def _dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (0, 42) else "torch_dtype": dtype}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _hint(source: str, path: Path) -> str | None:
    if path.exists():
        return None
    return f'no folder "{source}" is here either; without a network, give a folder or "builtin/emoji-64"'


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers: one per component says nothing to the user."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
