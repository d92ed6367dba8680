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
from tunekit.errors import ArtifactError, ModelError
from tunekit.families.family import Family, Pipeline
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

    def __init__(self, graph: Graph, config: dict[str, Any]) -> None:
        self.graph = graph
        self.config = SimpleNamespace(**config)
        self._unbatched = graph.unbatched | frozenset(config.get(UNBATCHED, ()))

    def __call__(self, *args: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        """Take inputs by position or name; return outputs by name, or as a tuple without `return_dict`.

        Inputs may be grouped in a dict, as diffusers has `added_cond_kwargs`; `output_hidden_states` changes
        nothing, as a graph always gives what it was exported with.
        """
        kwargs.pop("output_hidden_states", None)
        feeds: dict[str, Tensor] = dict(zip(self.graph.inputs, args, strict=False))
        for name, value in kwargs.items():
            feeds |= value if isinstance(value, dict) else {name: value}
        if feeds.keys() != self.graph.inputs.keys():
            raise ModelError(
                f"the graph takes {', '.join(self.graph.inputs)}; it was given {', '.join(feeds)}",
                hint="export it again with this version",
            )
        outputs = {name: torch.from_numpy(array).float() for name, array in self._run(feeds).items()}
        if not return_dict:
            return tuple(outputs.values())
        states = [name for name in outputs if name.startswith(STATES)]
        if states:
            outputs["hidden_states"] = tuple(  # type: ignore[assignment]
                outputs[f"{STATES}{index}"] for index in range(len(states))
            )
        return SimpleNamespace(**outputs)

    def _run(self, feeds: dict[str, Tensor]) -> dict[str, Array]:
        arrays = {}
        for name, value in feeds.items():
            kind, _ = self.graph.inputs[name]
            arrays[name] = np.ascontiguousarray(value.detach().cpu().numpy().astype(kind, copy=False))
        rows = max(len(array) for name, array in arrays.items() if name not in self._unbatched)
        step = min(rows, self.graph.max_rows or rows)
        # Other programs feed one timestep for the whole batch, so graphs take just one.
        single = [name for name in arrays if self.graph.inputs[name][1][:1] == [1]]
        if any((arrays[name] != arrays[name][0]).any() for name in single):
            step = 1
        parts = []
        for start in range(0, rows, step):
            part = {
                k: a if k in self._unbatched or len(a) == 1 else a[start : start + step]
                for k, a in arrays.items()
            }
            parts.append(self.graph.run({k: a[:1] if k in single else a for k, a in part.items()}))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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


def graph_pipeline(folder: Path, family: Family, open_graph: Callable[[Path], Graph]) -> Pipeline:
    """Build the stand-in for a pipeline out of a folder in Optimum's layout.

    Args:
        folder: with model_index.json, scheduler/, tokenizer/ and one folder with config.json per graph.
        family: whose denoiser and encoders to look for.
        open_graph: opens the graph in a component's folder.
    """
    import diffusers
    import transformers

    index_file = folder / "model_index.json"
    try:
        index = read_mapping(index_file)
    except FileNotFoundError as error:
        raise ArtifactError("its model_index.json is missing", where=str(folder)) from error

    def class_of(library: Any, name: str) -> Any:
        match index.get(name):
            case [str(), str(named)]:
                found = getattr(library, named, None)
            case _:
                found = None
        if not isinstance(found, type):
            message = f"its model_index.json names no class for {name} that is known here"
            raise ArtifactError(message, where=str(index_file))
        return found

    def component(name: str) -> GraphModule:
        config = folder / name / "config.json"
        if not config.is_file():
            raise ArtifactError(f"its component {name} is missing", where=str(folder))
        return GraphModule(open_graph(folder / name), read_mapping(config))

    parts: dict[str, Any] = {family.facts.denoiser_name: component(family.facts.denoiser_name)}
    for row in family.facts.encoders:
        tokenizer_class = class_of(transformers, str(row.tokenizer))
        parts[row.tokenizer] = tokenizer_class.from_pretrained(folder / row.tokenizer)
        parts[row.name] = component(row.name)
    encoder_there = (folder / "vae_encoder" / "config.json").is_file()
    parts["vae"] = GraphVae(component("vae_encoder") if encoder_there else None, component("vae_decoder"))
    parts["scheduler"] = class_of(diffusers, "scheduler").from_pretrained(folder / "scheduler")
    settings = {key: value for key, value in index.items() if not isinstance(value, list)}
    return SimpleNamespace(**parts, config=SimpleNamespace(**settings))


def model_folder(artifact: Artifact) -> Path:
    """Return the folder of an artifact whose model is graphs."""
    if artifact.model_path is None or not artifact.model_path.is_dir():
        raise ArtifactError(f"a model in {artifact.format} has to be a folder", where=artifact.source)
    return artifact.model_path


def first_line(error: Exception) -> str:
    """Return what an error says, without the trace that some libraries put after it."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
