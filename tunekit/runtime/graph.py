"""Graphs (ONNX files, engines) that stand in for the components of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tunekit.artifacts import Artifact
from tunekit.errors import ArtifactError, ModelError, TunekitError
from tunekit.families.family import Component, Family, Pipeline
from tunekit.records import read_mapping

Array = np.ndarray[Any, np.dtype[Any]]
STATES = "hidden_states."
"""Prefix of a text encoder's outputs that are its hidden states, as Optimum names them."""
UNBATCHED = "unbatched_inputs"
"""Key of a component's config.json: inputs that are the same for all rows, such as positions of tokens."""


class Graph(Protocol):
    """One loaded ONNX file or engine."""

    inputs: dict[str, tuple[np.dtype[Any], list[int | None]]]
    """Name -> element type and shape, None where a dimension may vary; in the order of the file."""
    max_rows: int | None
    """Largest batch it takes; None means any."""
    unbatched: frozenset[str]
    """Inputs whose first axis is known to be something else than the batch."""

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """Run it on named inputs; all outputs by name."""
        ...


def unbatched_inputs(folder: Path) -> frozenset[str]:
    """Inputs that a component's config.json says are the same for all rows."""
    config = folder / "config.json"
    named = read_mapping(config).get(UNBATCHED) if config.is_file() else None
    return frozenset(map(str, named) if isinstance(named, list) else ())


class GraphModule:
    """A graph that is called like the torch module it was exported from."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, graph: Graph, config: dict[str, Any], name: str = "graph") -> None:
        self.graph, self.name = graph, name
        self.config = SimpleNamespace(**config)
        self._unbatched = graph.unbatched | frozenset(config.get(UNBATCHED, ()))
        self.hidden: tuple[str, ...] = ()  # outputs that are kept and not given on
        self.kept: dict[str, Tensor] = {}
        self.added: dict[str, Tensor] = {}  # inputs that nobody gives

    def __call__(self, *args: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        """Take inputs by position or name; return outputs by name, or as a tuple without `return_dict`.

        Inputs may be grouped in a dict, as diffusers has `added_cond_kwargs`; options that are no tensors,
        such as `output_hidden_states`, change nothing: a graph always gives what it was exported with.
        """
        feeds: dict[str, Tensor] = dict(zip(self.graph.inputs, args, strict=False))
        for name, value in kwargs.items():
            if isinstance(value, dict):
                feeds |= value
            elif isinstance(value, Tensor):
                feeds[name] = value
        feeds |= self.added
        if feeds.keys() != self.graph.inputs.keys():
            raise ModelError(
                f"the {self.name} takes {', '.join(self.graph.inputs)}; it is given {', '.join(feeds)}",
                hint="it was exported by another program or version: export the model with export_onnx",
            )
        outputs: dict[str, Any] = {
            name: torch.from_numpy(array).float() for name, array in self._run(feeds).items()
        }
        self.kept = {name: outputs.pop(name) for name in self.hidden}
        if not return_dict:
            return tuple(outputs.values())
        numbers = [name.removeprefix(STATES) for name in outputs if name.startswith(STATES)]
        if numbers:
            states = {int(number): outputs[STATES + number] for number in numbers if number.isdecimal()}
            whole = sorted(states) == list(range(len(states)))
            outputs["hidden_states"] = (
                tuple(states[index] for index in range(len(states))) if whole else States(self.name, states)
            )
        return Outputs(self.name, outputs)

    def _run(self, feeds: dict[str, Tensor]) -> dict[str, Array]:
        arrays = {}
        for name, value in feeds.items():
            kind, _ = self.graph.inputs[name]
            arrays[name] = np.ascontiguousarray(value.detach().cpu().numpy().astype(kind, copy=False))
        rows = max(len(array) for name, array in arrays.items() if name not in self._unbatched)
        step = min(rows, self.graph.max_rows or rows)
        # Other programs feed one timestep for the whole batch, so graphs take just one; some, a scalar.
        scalar = [name for name in arrays if not self.graph.inputs[name][1]]
        single = [name for name in arrays if self.graph.inputs[name][1][:1] == [1]] + scalar
        if any((arrays[name] != arrays[name][0]).any() for name in single):
            step = 1
        parts = []
        for start in range(0, rows, step):
            part = {
                k: a if k in self._unbatched or len(a) == 1 else a[start : start + step]
                for k, a in arrays.items()
            }
            part |= {name: part[name][:1] for name in single}
            parts.append(self.graph.run({k: a.reshape(()) if k in scalar else a for k, a in part.items()}))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Outputs(SimpleNamespace):
    """What a graph gives, by name."""

    def __init__(self, graph: str, outputs: dict[str, Any]) -> None:
        super().__init__(**outputs)
        self._graph = graph

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        given = ", ".join(key for key in vars(self) if key != "_graph")
        raise _NotGiven(
            f"the {self._graph} gives {given}; needed is {name}",
            hint="it was exported by another program or version: export the model with export_onnx",
        )


class States(dict[int, Tensor]):
    """Those of a text encoder's hidden states that its graph gives, by number."""

    def __init__(self, graph: str, states: dict[int, Tensor]) -> None:
        super().__init__(states)
        self._graph = graph

    def __missing__(self, number: int) -> Tensor:
        raise ModelError(
            f"the {self._graph} gives the hidden states {', '.join(map(str, self))}; needed is {number}",
            hint="it was exported by another program or version: export the model with export_onnx",
        )


class _NotGiven(ModelError, AttributeError):
    """So that it may be asked whether a graph gives something."""


class GraphVae:
    """The two graphs of a VAE, called like diffusers' AutoencoderKL."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, encoder: GraphModule | None, decoder: GraphModule) -> None:
        self.encoder, self.decoder = encoder, decoder
        self.config = decoder.config

    def encode(self, sample: Tensor) -> Any:
        """Encode pixels; `.latent_dist` has `.mean` and `.std`."""
        if self.encoder is None:
            raise ModelError("this artifact has no vae_encoder", hint="export it again with all components")
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return SimpleNamespace(
            latent_dist=DiagonalGaussianDistribution(self.encoder(sample).latent_parameters)
        )

    def decode(self, latents: Tensor) -> Any:
        """Decode unscaled latents; `.sample` is in [-1, 1]."""
        return self.decoder(latents)


def graph_module(folder: Path, open_graph: Callable[[Path], Graph]) -> GraphModule:
    """The graph in a component's folder.

    Raises:
        ArtifactError: its config.json is missing.
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"its component {folder.name} is missing", where=str(folder.parent))
    return GraphModule(open_graph(folder), read_json(folder / "config.json"), folder.name)


def graph_pipeline(folder: Path, family: Family, open_graph: Callable[[Path], Graph]) -> Pipeline:
    """Build the stand-in for a pipeline out of a folder in Optimum's layout.

    Args:
        folder: with model_index.json, scheduler/, tokenizer/ and one folder with config.json per graph.
        family: whose denoiser and encoders to look for.
        open_graph: opens the graph in a component's folder.
    """
    index = read_json(folder / "model_index.json")

    def component(name: str) -> GraphModule:
        return graph_module(folder / name, open_graph)

    # What is small and may be missing, before what takes long to open.
    encoders = [row for row in family.facts.encoders if not row.is_left_out(index)]
    parts: dict[str, Any] = {row.tokenizer: _tokenizer(folder, index, row) for row in encoders}
    parts["scheduler"] = _scheduler(folder, index)
    for name in (family.facts.denoiser_name, *(row.name for row in encoders)):
        parts[name] = component(name)
    encoder_there = (folder / "vae_encoder" / "config.json").is_file()
    parts["vae"] = GraphVae(component("vae_encoder") if encoder_there else None, component("vae_decoder"))
    settings = {key: value for key, value in index.items() if not isinstance(value, list)}
    pipeline = SimpleNamespace(**parts, config=SimpleNamespace(**settings))
    _check_configs(pipeline, family, folder)
    return pipeline


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArtifactError: missing, or something else.
    """
    try:
        return read_mapping(file)
    except FileNotFoundError as error:
        raise ArtifactError(f"its {file.name} is missing", where=str(file)) from error


def _class_named(
    module: str, kind: str, index: dict[str, Any], part: str, otherwise: Any, where: Path
) -> Any:
    """The class that model_index.json names for a part; `otherwise` where it names none."""
    import importlib

    entry = index.get(part)
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else otherwise
    found = getattr(importlib.import_module(module), str(name), None)
    base = getattr(importlib.import_module(module), kind)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ArtifactError(f'its {part} is of an unknown class "{name}"', where=str(where))
    return found


def _scheduler(folder: Path, index: dict[str, Any]) -> Any:
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ArtifactError(
            "its scheduler is missing: how it is drawn is not known",
            where=str(file),
            hint="copy scheduler/ from the model that it was exported from",
        )
    config = read_json(file)
    made = _class_named("diffusers", "SchedulerMixin", index, "scheduler", config.get("_class_name"), file)
    try:
        return made.from_config(config)
    except Exception as error:  # whatever a class makes of foreign settings
        raise ArtifactError(f"its scheduler cannot be made: {first_line(error)}", where=str(file)) from error


VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")


def _tokenizer(folder: Path, index: dict[str, Any], row: Component) -> Any:
    """The tokenizer that a text encoder reads, from the folder alone: never from a hub."""
    place = folder / row.tokenizer
    if not any((place / name).is_file() for name in VOCABULARIES):
        raise ArtifactError(
            f"its {row.tokenizer} is missing: prompts cannot be read",
            where=str(place),
            hint=f"copy {row.tokenizer}/ from the model that it was exported from",
        )
    config = read_json(file) if (file := place / "tokenizer_config.json").is_file() else {}
    otherwise = config.get("tokenizer_class", "CLIPTokenizer")
    made = _class_named("transformers", "PreTrainedTokenizerBase", index, row.tokenizer, otherwise, place)
    try:
        tokenizer = made.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # whatever a class makes of foreign files
        raise ArtifactError(
            f"its {row.tokenizer} cannot be read: {first_line(error)}", where=str(place)
        ) from error
    if not 0 < tokenizer.model_max_length < 10**6:  # its config does not say
        tokenizer.model_max_length = row.tokens
    return tokenizer


def _check_configs(pipeline: Pipeline, family: Family, folder: Path) -> None:
    """Raises ArtifactError unless the config.json files say what drawing needs."""
    try:
        height, width = family.default_size(pipeline)
        family.latent_shape(pipeline, height, width)
        family.objective(pipeline)  # refuses schedulers of another kind
        float(getattr(pipeline.vae.config, "scaling_factor", 1.0))
        float(getattr(pipeline.vae.config, "shift_factor", None) or 0.0)
    except TunekitError as error:
        error.where = error.where or str(folder)
        raise
    except Exception as error:  # whatever comes of sizes that are texts, or not there
        raise ArtifactError(
            f"its config.json files do not describe a {family.facts.title} model: {first_line(error)}",
            where=str(folder),
        ) from error


def model_folder(artifact: Artifact) -> Path:
    """Return the folder of an artifact whose model is graphs."""
    if artifact.model_path is None or not artifact.model_path.is_dir():
        raise ArtifactError(f"a model in {artifact.format} has to be a folder", where=artifact.source)
    return artifact.model_path


def first_line(error: Exception) -> str:
    """Return what an error says, without the trace that some libraries put after it."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
