"""Who is measured by benchmark_inference.py: each in a process of its own, doing what it is told.

Its one argument is a JSON object: its `kind`, and what `Contestant` says. A request is a line of JSON on
standard input, the answer a line on standard output; all else goes to standard error. The process may be of
another Python, with another program's packages and without tunekit.

    {"do": "make"}                                      -> {"folder", "size_bytes"}: its files
    {"do": "open"}                                      -> {"title"}
    {"do": "step", "calls": 3}                          -> {"cpu_ms": [...], "wall_ms": [...]}
    {"do": "picture", "prompt": "a cat", "number": 0}   -> {"cpu_ms", "wall_ms"}
    {"do": "draw", "prompts": [...], "out": "x.npy"}    -> {}: [N, H, W, 3] in [0, 1]

A step is one call of the denoiser on a guidance pair. `number` says which of the noises in `latents` it is.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 1


class Contestant:
    """What all have in common.

    Attributes:
        told: `source` (the model in torch, a folder), `folder` (for what is made), `height`, `width`,
            `steps`, `guidance`, `latents` (a .npy file [N, C, h, w]), `step` (an .npz file: `latents`,
            `timestep`, `states`), and what its kind reads.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.folder = Path(told["folder"])

    def _make(self) -> dict[str, Any]:
        """Writes what it runs, if it has to."""
        raise NotImplementedError

    def _open(self) -> str:
        """Gets ready; returns what runs it, in words."""
        raise NotImplementedError

    def _call(self) -> Any:
        """One call of the denoiser."""
        raise NotImplementedError

    def _pixels(self, prompts: list[str], numbers: list[int]) -> Any:
        """Pictures [N, H, W, 3] in [0, 1]."""
        raise NotImplementedError

    def _step(self, calls: int) -> dict[str, Any]:
        """Times of calls; the first, which finds the caches cold, is not among them."""
        self._call()
        return _timed(self._call, calls)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what a request says."""
        what = request["do"]
        if what == "make":
            return self._make()
        if what == "open":
            return {"title": self._open()}
        if what == "step":
            return self._step(request["calls"])
        if what == "picture":
            prompts, numbers = [request["prompt"]], [request["number"]]
            found = _timed(lambda: self._pixels(prompts, numbers), 1)
            return {name: values[0] for name, values in found.items()}
        if what == "draw":
            import numpy as np

            prompts = request["prompts"]
            np.save(request["out"], self._pixels(prompts, list(range(len(prompts)))))
            return {}
        raise ValueError(f"unknown request {what}")

    def given(self) -> dict[str, Any]:
        """Inputs of a step as arrays."""
        import numpy as np

        with np.load(self.told["step"]) as found:
            return dict(found)

    def noise(self, numbers: list[int]) -> Any:
        """Starting latents, as a tensor."""
        import numpy as np
        import torch

        return torch.from_numpy(np.load(self.told["latents"])[numbers])


def _timed(call: Callable[[], Any], calls: int) -> dict[str, list[float]]:
    cpu, wall = [], []
    for _ in range(calls):
        began, processor = time.perf_counter(), time.process_time()
        call()
        cpu.append((time.process_time() - processor) * 1e3)
        wall.append((time.perf_counter() - began) * 1e3)
    return {"cpu_ms": cpu, "wall_ms": wall}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Tunekit(Contestant):
    """Any artifact, in the runtime that tunekit takes: torch, ONNX Runtime, OpenVINO.

    `chain` makes it of the source. `dtype` and `provider` are those of `open_runtime`; `compile` has torch
    compile the denoiser. `own` draws with the steps that the artifact states instead of those that are told.
    """

    def _make(self) -> dict[str, Any]:
        from tunekit.artifacts import open_artifact
        from tunekit.config import SamplingConfig
        from tunekit.passes.base import Context, parse_chain, run_chain

        start = open_artifact(self.told["source"], family=self.told["family"])
        if not self.told.get("chain"):
            return {"folder": self.told["source"], "size_bytes": start.size_bytes}
        context = Context(
            run_dir=self.folder,
            family=self.told["family"],
            device="cpu",
            prompts=tuple(self.told["calibration"]),
            sampling=SamplingConfig(
                steps=self.told["steps"],
                guidance=self.told["guidance"],
                height=self.told["height"],
                width=self.told["width"],
            ),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        made = run_chain(parse_chain(self.told["chain"]), start, context)
        return {"folder": str(made.path), "size_bytes": made.size_bytes}

    def _open(self) -> str:
        import torch

        from tunekit.artifacts import open_artifact
        from tunekit.config import SamplingConfig
        from tunekit.runtime import open_runtime

        told = self.told
        artifact = open_artifact(told["made"], family=told["family"])
        options = {name: told[name] for name in ("dtype", "provider") if told.get(name)}
        self.runtime = open_runtime(artifact, family=told["family"], device="cpu", threads=THREADS, **options)
        title = self.runtime.title
        if told.get("compile"):
            self.runtime.family.denoiser(self.runtime.pipeline).compile()
            title = f"{title}, compiled"
        size = SamplingConfig(height=told["height"], width=told["width"])
        plain = SamplingConfig(steps=told["steps"], guidance=told["guidance"])
        self.sampling = (size if told.get("own") else plain.over(size)).over(self.runtime.sampling)
        given = self.given()
        self.latents = torch.from_numpy(given["latents"])
        self.times = torch.from_numpy(given["timestep"])
        self.known = {"encoder_hidden_states": torch.from_numpy(given["states"])}
        return f"{title}, {self.sampling.steps} steps"

    def _call(self) -> Any:
        return self.runtime.denoise(self.latents, self.times, self.known)

    def _pixels(self, prompts: list[str], numbers: list[int]) -> Any:
        from tunekit.runtime import generate_pixels

        seeds = [self.told["seed"] + number for number in numbers]
        # What is compiled was compiled for one picture; others would be compiled for anew.
        batch = 1 if self.told.get("compile") else None
        drawn = generate_pixels(self.runtime, prompts, self.sampling, seeds=seeds, batch=batch)
        return drawn.permute(0, 2, 3, 1).numpy()


class Pipeline(Contestant):
    """A pipeline of diffusers' kind, from another program."""

    pipeline: Any

    def _pixels(self, prompts: list[str], numbers: list[int]) -> Any:
        return self.pipeline(
            prompts,
            negative_prompt=[""] * len(prompts),
            latents=self.noise(numbers),
            num_inference_steps=self.told["steps"],
            guidance_scale=self.told["guidance"],
            height=self.told["height"],
            width=self.told["width"],
            output_type="np",
        ).images

    def _call(self) -> Any:
        return self.pipeline.unet(
            sample=self.inputs[0], timestep=self.inputs[1], encoder_hidden_states=self.inputs[2]
        )

    def ready(self) -> None:
        """Reads a step's inputs, once there is a pipeline."""
        import torch

        self.pipeline.set_progress_bar_config(disable=True)
        given = self.given()
        timestep = torch.from_numpy(given["timestep"])[0]
        self.inputs = (torch.from_numpy(given["latents"]), timestep, torch.from_numpy(given["states"]))


class Optimum(Pipeline):
    """optimum-onnx: its own export, its own pipeline."""

    def _make(self) -> dict[str, Any]:
        from optimum.exporters.onnx import main_export

        if not (self.folder / "model_index.json").is_file():
            main_export(self.told["source"], self.folder, task="text-to-image", do_validation=False)
        return {"folder": str(self.folder), "size_bytes": _size(self.folder)}

    def _open(self) -> str:
        import onnxruntime
        from optimum.onnxruntime import ORTDiffusionPipeline

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = THREADS
        self.pipeline = ORTDiffusionPipeline.from_pretrained(self.told["made"], session_options=options)
        self.ready()
        return f"optimum, ONNX Runtime {onnxruntime.__version__}, {self.told['steps']} steps"


class OptimumIntel(Pipeline):
    """optimum-intel: its own export; `hybrid` quantizes as it does for U-Nets, ranges of the same prompts."""

    def _make(self) -> dict[str, Any]:
        from optimum.intel import OVDiffusionPipeline

        options: dict[str, Any] = {}
        if self.told.get("hybrid"):
            from optimum.intel import OVWeightQuantizationConfig

            options["quantization_config"] = OVWeightQuantizationConfig(
                bits=8, quant_method="hybrid", dataset=self.told["calibration"], num_samples=32
            )
        if not (self.folder / "model_index.json").is_file():
            pipeline = OVDiffusionPipeline.from_pretrained(
                self.told["source"], export=True, compile=False, **options
            )
            pipeline.save_pretrained(self.folder)
        return {"folder": str(self.folder), "size_bytes": _size(self.folder)}

    def _open(self) -> str:
        import openvino
        from optimum.intel import OVDiffusionPipeline

        config = {"INFERENCE_NUM_THREADS": str(THREADS), "NUM_STREAMS": "1"}
        self.pipeline = OVDiffusionPipeline.from_pretrained(self.told["made"], ov_config=config)
        self.ready()
        return f"optimum-intel, OpenVINO {openvino.__version__.partition('-')[0]}, {self.told['steps']} steps"


class Nncf(Tunekit):
    """nncf's post-training quantization with its defaults, of the denoiser that `chain` exports."""

    def _make(self) -> dict[str, Any]:
        import shutil

        import nncf
        import openvino

        from tunekit.artifacts import open_artifact
        from tunekit.config import SamplingConfig
        from tunekit.runtime import generate_pixels, open_runtime

        target = self.folder / "nncf"
        if not (target / "model_index.json").is_file():
            source = Path(super()._make()["folder"])
            runtime = open_runtime(
                open_artifact(source), family=self.told["family"], device="cpu", threads=THREADS
            )
            feeds: list[Any] = []
            graph = runtime.family.denoiser(runtime.pipeline)
            run = graph.graph.run
            graph.graph.run = lambda feed: (feeds.append(dict(feed)), run(feed))[1]
            few = SamplingConfig(steps=min(self.told["steps"], 8), guidance=self.told["guidance"])
            size = SamplingConfig(height=self.told["height"], width=self.told["width"])
            calibration = self.told["calibration"]
            seeds = list(range(len(calibration)))
            generate_pixels(runtime, calibration, few.over(size), seeds=seeds, batch=1)
            runtime.close()
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=lambda *_: ["model_index.json"])
            name = runtime.family.facts.denoiser_name
            model = openvino.Core().read_model(source / name / "openvino_model.xml")
            dataset = nncf.Dataset(feeds)
            quantized = nncf.quantize(model, dataset, subset_size=min(48, len(feeds)))
            openvino.save_model(quantized, target / name / "openvino_model.xml", compress_to_fp16=False)
            for record in ("artifact.json", "README.md"):
                (target / record).unlink(missing_ok=True)
            shutil.copy(source / "model_index.json", target)
        return {"folder": str(target), "size_bytes": _size(target)}


class Cyllama(Contestant):
    """stable-diffusion.cpp through the package cyllama; `type` is what weights are kept in (F16, Q8_0).

    It has no call for one step, so a step is a picture of three steps less one of one step, by two.
    """

    def _make(self) -> dict[str, Any]:
        file = self.folder / f"model-{self.told['type'].lower()}.gguf"
        if not file.is_file():
            from cyllama import sd

            self.folder.mkdir(parents=True, exist_ok=True)
            kind = getattr(sd.SDType, self.told["type"])
            done = sd.convert_model(self.told["single_file"], str(file), output_type=kind)
            if done is False or not file.is_file():
                raise RuntimeError(f"stable-diffusion.cpp does not convert {self.told['single_file']}")
        return {"folder": str(file), "size_bytes": file.stat().st_size}

    def _open(self) -> str:
        from cyllama import sd

        params = sd.SDContextParams(model_path=self.told["made"])
        params.n_threads = THREADS
        self.context = sd.SDContext(params)
        if not self.context.is_valid:
            raise RuntimeError("stable-diffusion.cpp does not open the model")
        return f"stable-diffusion.cpp {self.told['type'].lower()}"

    def _draw(self, steps: int, prompt: str = "a cat") -> Any:
        return self.context.generate(
            prompt,
            width=self.told["width"],
            height=self.told["height"],
            sample_steps=steps,
            cfg_scale=self.told["guidance"],
            seed=self.told["seed"],
        )

    def _step(self, calls: int) -> dict[str, Any]:
        short, long = _timed(lambda: self._draw(1), 1), _timed(lambda: self._draw(3), 1)
        return {name: [(long[name][0] - short[name][0]) / 2] for name in short}

    def _pixels(self, prompts: list[str], numbers: list[int]) -> Any:
        return [self._draw(self.told["steps"], prompt) for prompt in prompts]


KINDS: dict[str, type[Contestant]] = {
    "tunekit": Tunekit,
    "optimum": Optimum,
    "optimum_intel": OptimumIntel,
    "nncf": Nncf,
    "cyllama": Cyllama,
}


def main() -> None:
    """Answers until there is nothing more to read."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not break an answer
    told = json.loads(sys.argv[1])
    contestant = KINDS[told["kind"]](told)
    try:
        import torch

        torch.set_num_threads(THREADS)
    except ImportError:
        pass
    for line in sys.stdin:
        try:
            answer = contestant.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(str(error).split()) or type(error).__name__
            answer = {"error": f"{type(error).__name__}: {reason}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
