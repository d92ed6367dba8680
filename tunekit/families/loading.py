"""Loading and saving diffusers pipelines, for all families: where weights come from and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from tunekit import layers
from tunekit.errors import ModelError, TunekitError, output_errors
from tunekit.resources import Source

if TYPE_CHECKING:
    from tunekit.families.family import Dtypes, FamilyFacts, Packing, Pipeline

MODEL_INDEX = "model_index.json"
TEXT_LEVEL = "text_model."
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS = ("model", "pytorch_model", "diffusion_pytorch_model")
PICKLE_REFUSED = "weights in a pickle are refused: a pickle can run any program while it is opened"
PICKLE_HINT = "use the .safetensors version, or set model.allow_pickle: true if you trust whoever made it"


def load_pipeline(
    source: Source,
    facts: FamilyFacts,
    dtypes: Dtypes = torch.float32,
    *,
    pack: Packing = "",
    fixed: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Load a pipeline from a folder, "builtin/...", a single file or a hub id.

    Each component is read in its own type, shard by shard; the whole is never there in another one.

    Args:
        source: what to open, and how.
        facts: the family's.
        dtypes: of the weights, see `Family.load`.
        pack: of the denoiser's linear layers, see `Family.load`.
        fixed: arguments of the pipeline's constructor.

    Raises:
        ModelError: see `Family.load`.
    """
    import diffusers

    pipeline_class = getattr(diffusers, facts.pipeline_class)
    fixed = dict(fixed or {})
    absent = {name: None for name, value in fixed.items() if value is None}
    choice = {"variant": source.variant, "use_safetensors": None if source.allow_pickle else True}
    try:
        path = source.path
        if path is not None and path.is_file():
            pipeline = cast(
                _load_single_file(path, pipeline_class, fixed, source.allow_pickle), facts, dtypes
            )
        else:
            folder = path
            if folder is None:
                _check_hub_id(source.name)
                _check_class(source.name, pipeline_class_name(source), facts)
                with _quiet():
                    folder = Path(
                        pipeline_class.download(source.name, revision=source.revision, **choice, **absent)
                    )
            _check_folder(folder, facts, absent, source.allow_pickle)
            options: dict[str, Any] = {**_dtype_option(facts, dtypes), **fixed}
            denoiser = folder / facts.denoiser_name
            if pack or layers.has_custom_layers(denoiser):
                files = () if layers.has_custom_layers(denoiser) else weight_files(denoiser, source.variant)
                if files or layers.has_custom_layers(denoiser):
                    dtype = _dtype_of(dtypes, facts.denoiser_name)
                    options[facts.denoiser_name] = layers.load_denoiser(
                        facts.denoiser.type, denoiser, dtype, files=files, pack=pack
                    )
            with _quiet():
                options |= _encoders_of_transformers_5(folder, facts, source.variant, dtypes)
                pipeline = pipeline_class.from_pretrained(folder, **choice, **options)
    except TunekitError:
        raise
    # diffusers, transformers, safetensors and the hub raise two dozen kinds; to the user all are one.
    except Exception as error:
        raise ModelError(_reason(error), where=source.name, hint=_hint(source)) from error
    check_finite(pipeline, source.name)
    for component in components(pipeline).values():
        if isinstance(component, nn.Module):
            component.eval()
    return pipeline


def cast(pipeline: Pipeline, facts: FamilyFacts, dtypes: Dtypes) -> Pipeline:
    """Give each network of a pipeline that is there its type, one after the other."""
    for part in facts.components:
        network = getattr(pipeline, part.name, None)
        if isinstance(network, nn.Module):
            network.to(_dtype_of(dtypes, part.name))
    return pipeline


def _dtype_of(dtypes: Dtypes, name: str) -> torch.dtype:
    return dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(name, torch.float32)


def weight_files(folder: Path, variant: str | None = None) -> tuple[Path, ...]:
    """The safetensors files of one component's weights, its shards in order; empty if it has none.

    Args:
        folder: of the component.
        variant: such as "fp16"; where no file has it, the plain ones are taken, as diffusers does.
    """
    for choice in dict.fromkeys((variant, None)):
        ending = f".{choice}.safetensors" if choice else ".safetensors"
        for stem in WEIGHTS:
            index = sorted(folder.glob(f"{stem}.safetensors.index{f'.{choice}' if choice else ''}.json"))
            if index:
                names = json.loads(index[0].read_text(encoding="utf-8"))["weight_map"].values()
                shards = [folder / name for name in sorted(set(names))]
                return tuple(shard for shard in shards if shard.suffix == ".safetensors")
            if (folder / f"{stem}{ending}").is_file():
                return (folder / f"{stem}{ending}",)
    return ()


def source_files(source: Source, facts: FamilyFacts) -> dict[str, tuple[Path, ...]]:
    """Component -> the files on this machine that its weights were read from, as far as that is known."""
    folder = source.path
    if folder is None or folder.is_file():
        return {}
    return {part.name: weight_files(folder / part.name, source.variant) for part in facts.components}


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
        for encoder in facts.encoders:
            portable_encoder(folder / encoder.name)
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
    folder: Path, facts: FamilyFacts, variant: str | None, dtypes: Dtypes
) -> dict[str, nn.Module]:
    """Load the text encoders that transformers 5 wrote and the installed transformers 4 would misread."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {}
    loaded = {}
    for encoder in facts.encoders:
        files = weight_files(folder / encoder.name, variant)
        if files and _lacks_level(files[0]):
            state = {
                TEXT_LEVEL + key: tensor
                for file in files
                for key, tensor in safetensors.torch.load_file(file).items()
            }
            kind = getattr(transformers, _index(Source(str(folder)))[encoder.name][1])
            model = kind(kind.config_class.from_pretrained(folder / encoder.name))
            model.load_state_dict(state, strict=False)
            loaded[encoder.name] = model.to(_dtype_of(dtypes, encoder.name))
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


def pipeline_class_name(source: Source) -> str:
    """Read `_class_name` from the model_index.json of a folder, "builtin/..." or hub id.

    Raises:
        ModelError: there is none.
    """
    name = _index(source).get("_class_name")
    if not isinstance(name, str):
        raise ModelError(f"{MODEL_INDEX} names no pipeline class (_class_name)", where=source.name)
    return name


def component_configs(source: Source, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Read the config.json of some components of a folder or a hub id, as far as they can be read."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        with suppress(Exception):  # diffusers and the hub raise many kinds; an absent file is no error here
            if source.path is not None:
                text = (source.path / name / "config.json").read_text(encoding="utf-8")
            else:
                from huggingface_hub import hf_hub_download

                file = hf_hub_download(source.name, f"{name}/config.json", revision=source.revision)
                text = Path(file).read_text(encoding="utf-8")
            found[name] = dict(json.loads(text))
    return found


def _index(source: Source) -> dict[str, Any]:
    path = source.path
    if path is not None and path.is_dir():
        index = path / MODEL_INDEX
        if not index.is_file():
            raise ModelError(
                f"not a pipeline folder: it has no {MODEL_INDEX}",
                where=source.name,
                hint="give the folder that a diffusers pipeline was saved to",
            )
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"not JSON: {error}", where=str(index)) from error
    else:
        _check_hub_id(source.name)
        from diffusers import DiffusionPipeline

        try:
            content = DiffusionPipeline.load_config(source.name, revision=source.revision)
        except Exception as error:
            raise ModelError(
                f"its {MODEL_INDEX} cannot be read from the Hugging Face hub: {_reason(error)}",
                where=source.name,
                hint=_hint(source),
            ) from error
    return dict(content) if isinstance(content, dict) else {}


def _check_folder(path: Path, facts: FamilyFacts, absent: Collection[str], allow_pickle: bool) -> None:
    """Refuse a folder that is another pipeline, exported, incomplete or pickled; `absent` may be missing."""
    index = _index(Source(str(path)))
    _check_class(str(path), pipeline_class_name(Source(str(path))), facts)
    for name, value in sorted(index.items()):
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
    path: Path, pipeline_class: type[Any], fixed: Mapping[str, Any], allow_pickle: bool
) -> Pipeline:
    """Load all of a file in the type that it was written in, which loses nothing."""
    if path.suffix in PICKLES and not allow_pickle:
        raise ModelError(PICKLE_REFUSED, where=str(path), hint=PICKLE_HINT)
    if path.suffix not in (".safetensors", *PICKLES):
        raise ModelError("not a weights file", where=str(path), hint="single files end in .safetensors")
    options: dict[str, Any] = {**fixed, _dtype_keyword(): _widest(path)}
    # The configs and the tokenizer are not in such a file. diffusers fetches them from the hub, unless a
    # folder of the file's name beside it has them.
    beside = path.with_suffix("")
    if (beside / MODEL_INDEX).is_file():
        options["config"] = str(beside)
    with _quiet():
        return pipeline_class.from_single_file(str(path), **options)


def _widest(path: Path) -> torch.dtype:
    """The widest floating type of the matrices in a weights file; float32 where that cannot be told."""
    if path.suffix != ".safetensors":
        return torch.float32
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with safe_open(path, framework="pt") as opened:
        slices = (opened.get_slice(key) for key in opened.keys())  # noqa: SIM118
        kinds = {part.get_dtype() for part in slices if len(part.get_shape()) > 1}
    found = {names[kind] for kind in kinds if kind in names}
    return found.pop() if len(found) == 1 else torch.float32


def _dtype_keyword() -> str:
    import diffusers

    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (0, 42) else "torch_dtype"


def _dtype_option(facts: FamilyFacts, dtypes: Dtypes) -> dict[str, Any]:
    if isinstance(dtypes, torch.dtype):
        return {_dtype_keyword(): dtypes}
    known = {part.name: _dtype_of(dtypes, part.name) for part in facts.components if part.role != "scheduler"}
    return {_dtype_keyword(): {**known, "default": torch.float32}}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _hint(source: Source) -> str | None:
    if source.path is not None:
        return None
    return f'no folder "{source.name}" is here either; without a network, give a folder or "builtin/emoji-64"'


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
