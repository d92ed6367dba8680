"""Stores weights in 8 or 4 bits and, for ONNX, computes in 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunekit.config import Names, Section, idle, no_effect, refuse, wrong
from tunekit.errors import ArtifactError, ChainError, require
from tunekit.passes.base import DISTINCT, SAMPLING, Context, Ladder, Outcome, Pass, Start, formats
from tunekit.passes.fidelity import PROBE_STEPS, TESTED_CALLS, VAES, error, fidelity, nothing
from tunekit.passes.metrics import RELATIVE_ERROR, SIZE, Metric
from tunekit.passes.models import around
from tunekit.passes.paths import unmatched
from tunekit.passes.providers import lacks, no_fp8

if TYPE_CHECKING:
    from tunekit.artifacts import Artifact
    from tunekit.families.family import Family
    from tunekit.layers import Scheme


NO_PROMPTS = (
    "has no prompts to measure ranges on, and those of the empty one fit no other; give the run `preview:"
    " {prompts: [...]}`, or write `quantize: {mode: weight_only}`"
)
OF_INT8 = ("target", "activations", "ranges", "reduce_range", "samples", "minutes")
"""Settings of models in ONNX."""
GROUPS = (16, 32, 64, 128, 256)
"""Weights per scale that onnxruntime has in 4 bits."""


class KeepLayers(Section):
    """How many layers stay in floats; which, is measured."""

    psnr: float | None = Field(None, gt=0, le=150)
    """As few as it takes for the worst of four pictures to have so many dB, against the model in floats."""
    share: float | None = Field(None, gt=0, lt=1)
    """Those with up to this share of the multiplications, the ones whose error is largest for their work."""

    @model_validator(mode="after")
    def _one(self) -> KeepLayers:
        if (self.psnr is None) == (self.share is None):
            refuse("takes either psnr, such as `{psnr: 40}`, or share, such as `{share: 0.1}`")
        return self


class Quantize(Pass):
    """Stores weights as int8, int4 or nf4; with ONNX, computes in int8 too.

    Torch: weights are packed and unpacked for each use, so a model takes less memory and is no faster; mode
    dynamic rounds activations too and computes matrix products in 8 bits, which is faster where they are
    large. ONNX: the denoiser computes in int8, with ranges measured on pictures that the model draws from the
    run's own prompts, but for the few layers that lose most by it, which are measured too. See
    docs/quantize.md.
    """

    kind: ClassVar[str] = "quantize"
    accepts: ClassVar[frozenset[str]] = frozenset({"torch", "onnx"})
    refuses: ClassVar[Mapping[str, str]] = {
        "packed": "finds a model that is quantized already, by {giver}; leave one of the two out",
        "fp16": "comes after {giver}, whose graphs are in fp16, and int8 is made of fp32; write"
        " `export_onnx: {{dtype: fp32}}` before it",
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        SIZE,
        RELATIVE_ERROR,
        Metric("sqnr_db", "signal to noise", "dB", lower_is_better=False),
        Metric("quantized_layers", "quantized layers", "count"),
        Metric("int8_computed_layers", "layers computed in int8", "count"),
        Metric("layer_error", "error in int8", lower_is_better=True, bars=True),
    )

    scheme: Literal["int8", "fp8", "int4", "int4_svd", "nf4"] = "int8"
    """int8: a scale per output channel; fp8: likewise, of 8-bit floats (e4m3), for cards that compute in them
    (mode dynamic), and further from floats than int8; int4: a scale per `group`; int4_svd: int4, and in bf16
    the product of rank 16 that makes up for most of what 4 bits lose; nf4: bitsandbytes' 4-bit normal float.
    An ONNX model takes int8, or int4 for its matrix products: the weights of its convolutions are int8
    then."""
    target: Literal["cpu", "openvino", "cuda", "tensorrt"] = "cpu"
    """Of ONNX: what the file is for, which decides how int8 is written in it. cpu: onnxruntime, and OpenVINO
    reads it too; openvino: for OpenVINO alone; tensorrt: symmetric int8, as TensorRT demands; cuda: the same,
    and weight_only unless mode says otherwise, as onnxruntime computes nothing in int8 there."""
    mode: Literal["weight_only", "dynamic", "static"] | None = None
    """Of ONNX. static: convolutions and matrix products in int8, ranges measured before; dynamic: matrix
    products alone, ranges of the moment; weight_only: a small file that computes in floats. null: static;
    dynamic for target cpu where the denoiser has hardly a convolution, as ranges of the moment suit a
    transformer better and cost it no speed; weight_only for target cuda and models in torch. A torch model
    takes weight_only, or dynamic for int8 and fp8: ranges of the moment; fp8 needs a card for it."""
    activations: Literal["uint8", "int8"] | None = None
    """Of mode static; null: as the target takes them, uint8 for processors and int8 for TensorRT."""
    ranges: Literal["minmax", "mse", "percentile"] = "minmax"
    """Of mode static. minmax: the extremes; mse: least squared error of rounding and clipping; percentile:
    without the outermost 0.01 % on either side. What is clipped is wrong in each step alike and adds up, so
    the extremes keep pictures best, though a single call is nearer with mse."""
    reduce_range: bool = False
    """Weights in 7 bits, for processors without VNNI: their sums overflow in modes dynamic and static."""
    rotate: bool = False
    """Of mode dynamic for torch: turn weights and activations by a Hadamard matrix over up to 256 channels,
    which spreads outliers: nearer to floats, and a little slower."""
    group: int = Field(32, ge=8, le=65_536, multiple_of=2)
    """Weights per scale of int4 and int4_svd."""
    keep: Annotated[Names, DISTINCT] | KeepLayers | None = None
    """What of the denoiser is not computed in few bits: paths, such as `up_blocks.-1` (the last one); or how
    much, and the layers are measured: `{psnr: 40}`, `{share: 0.1}`. null: what the family knows to be
    sensitive, such as its first and last layer and the time embedding, and in mode static the layers that are
    measured to lose most, up to a tenth of the multiplications."""
    components: Annotated[Names, DISTINCT] | None = Field(None, min_length=1)
    """Folders to quantize; null means the denoiser, and the weights of the others (up to 2 GB each) are kept
    in float16 and computed with as floats. The text encoders and the VAE run once per picture and gain
    nothing in speed, and most of what int8 costs is lost in them (pictures of builtin/emoji-64, weight_only:
    40.5 dB, and 27.4 with the text encoder); where they are named they are quantized weight_only."""
    samples: int = Field(32, ge=4, le=1_000_000)
    """Calls of the denoiser that ranges are measured on."""
    minutes: float = Field(1.0, gt=0, le=1440)
    """Of mode static: what measuring single layers may take, about. Where it is not enough for each layer by
    itself, those of a module are measured together. `keep: {psnr: ...}` draws pictures beside."""

    @model_validator(mode="after")
    def _effects(self) -> Quantize:
        mode = self.mode or ("weight_only" if self.target == "cuda" or self.scheme != "int8" else "static")
        if mode != "static":
            because = f"mode is {mode}"
            no_effect(self, ("activations", "ranges", "samples", "minutes"), because)
            if isinstance(self.keep, KeepLayers):
                idle("keep", f"{because}, and layers are measured in mode static only; name them")
        elif isinstance(self.keep, list):
            no_effect(self, ("minutes",), "keep names the layers")
        if mode == "weight_only":
            no_effect(self, ("reduce_range",), "mode is weight_only")
        if self.activations == "uint8" and self.target in ("cuda", "tensorrt"):
            wrong("activations", f"uint8 is not what target {self.target} takes; leave it out")
        if not self.scheme.startswith("int4"):
            no_effect(self, ("group",), "scheme is not int4")
        if self.mode != "dynamic":
            no_effect(self, ("rotate",), "mode is not dynamic")
        return self

    @classmethod
    def options(cls, target: str, minutes: float) -> Sequence[Ladder]:
        """A fifth of the work in floats, then the usual tenth."""
        if target == "torch":
            return [[[{cls.kind: {"scheme": scheme}}] for scheme in ("int8", "int4")]]
        return [[[{cls.kind: {"keep": {"share": 0.2}}}], [cls.kind]]] if target == "cpu" else []

    def mode_of(self, format: str) -> Literal["weight_only", "dynamic", "static"]:
        """What `mode` means for a model in this format."""
        if self.mode is not None:
            return self.mode
        computes = format == "onnx" and self.target != "cuda" and self.scheme == "int8"
        return "static" if computes else "weight_only"

    @property
    def is_open(self) -> bool:
        """Whether nothing that is set is of mode static alone, so that another may be taken."""
        asked = self.model_fields_set & {"activations", "ranges", "samples", "minutes"}
        return (
            self.mode is None and self.target == "cpu" and not asked and not isinstance(self.keep, KeepLayers)
        )

    @property
    def packing(self) -> Scheme:
        """How layers of a torch model are packed."""
        if self.mode != "dynamic":
            return self.scheme
        if self.scheme == "fp8":
            return "fp8_dynamic"
        return "int8_rotated" if self.rotate else "int8_dynamic"

    @property
    def wanted_psnr(self) -> float | None:
        """Of `keep`."""
        return self.keep.psnr if isinstance(self.keep, KeepLayers) else None

    @property
    def spared_share(self) -> float | None:
        """Of `keep`."""
        return self.keep.share if isinstance(self.keep, KeepLayers) else None

    def gives(self) -> frozenset[str]:
        """Weights in few bits, and what is computed in uint8."""
        static = self.mode_of("onnx") == "static" and self.scheme == "int8"
        signed = self.activations == "int8" or self.target in ("cuda", "tensorrt")
        uint8 = self.mode == "dynamic" or (static and not signed)
        return frozenset({"changed", "packed", "uint8"} if uint8 else {"changed", "packed"})

    def reads(self, context: Context) -> frozenset[str]:
        """What ranges and errors are measured on."""
        return frozenset({"seed", "prompts", "data", *SAMPLING})

    def formerly(self, format: str) -> dict[str, Any] | None:
        """Only of torch models: of ONNX, what is left open meant something else."""
        if format == "onnx":
            return None
        settings = super().formerly(format) or {}
        if self.mode == "dynamic":
            return None
        for name in ("target", "ranges", "minutes", "rotate"):
            settings.pop(name, None)
        return {**settings, "mode": "weight_only", "activations": "uint8"}

    def problem(self, format: str, earlier: Sequence[Pass]) -> str | None:
        """Finds what this format cannot have."""
        if format == "onnx" and self.scheme not in ("int8", "int4"):
            return f"has scheme {self.scheme}, which is for torch; an ONNX model takes int8 or int4"
        if format == "onnx" and self.scheme == "int4":
            if self.mode_of(format) != "weight_only":
                return f"has mode {self.mode}, which is for int8, and scheme int4; leave one of the two out"
            if self.group not in GROUPS:
                return f"has group {self.group}; an ONNX model takes {', '.join(map(str, GROUPS))}"
            if self.target == "tensorrt":
                return "has scheme int4, which TensorRT does not read as onnxruntime writes it; take int8"
        if format == "onnx" and self.rotate:
            return "sets rotate, which is for torch; leave it out"
        if format == "torch":
            if self.mode_of(format) == "static":
                return f"has mode {self.mode}, which is for ONNX; put it behind export_onnx"
            if self.mode == "dynamic" and self.scheme not in ("int8", "fp8"):
                return (
                    f"has mode dynamic, which is for int8 and fp8, and scheme {self.scheme}; leave one of the"
                    " two out"
                )
            if self.rotate and self.scheme != "int8":
                return f"sets rotate, which is for int8, and scheme {self.scheme}; leave one of the two out"
            if self.packing == "fp8_dynamic" and (why := no_fp8()):
                return (
                    "has scheme fp8 with mode dynamic, for cards that compute in 8-bit floats (GeForce RTX"
                    f" 40, L4, H100 and later), and {why}; take scheme int8, which is computed everywhere"
                )
            for name in OF_INT8:
                if getattr(self, name) != type(self).model_fields[name].default:
                    return f"sets {name}, which is for ONNX; put it behind export_onnx"
            if isinstance(self.keep, KeepLayers):
                return "has a keep that is measured, which is for ONNX; name the layers, or leave it out"
        if self.scheme == "nf4":
            return lacks("bitsandbytes", extra="quant")
        return lacks("onnx", "onnxruntime", extra="onnx") if format == "onnx" else None

    def objection(self, start: Start, earlier: Sequence[Pass]) -> str | None:
        """Finds paths and components that the model does not have."""
        named = self.keep if isinstance(self.keep, list) else []
        if named and start.modules and (wrong := unmatched(named, start.modules)):
            return f"has a wrong keep: {wrong}"
        arriving = formats(start.format, earlier)[-1]
        if not (self.components or start.examples) and self.mode_of(arriving) == "static":
            return NO_PROMPTS
        if not self.components or not start.family:
            return None
        from tunekit import families

        facts = families.planned(start.family).facts
        if arriving == "torch" and self.components != [facts.denoiser_name]:
            return (
                f"has components {', '.join(self.components)}, and of a torch model only the"
                f" {facts.denoiser_name} can be quantized"
            )
        if arriving == "onnx" and start.format != "onnx":
            known = [*(part.name for part in facts.encoders), facts.denoiser_name, *VAES]
            if absent := [name for name in self.components if name not in known]:
                return f"finds no component {', '.join(absent)} to quantize; there are {', '.join(known)}"
        if self.mode not in (None, "weight_only") and facts.denoiser_name not in self.components:
            return (
                f"has mode {self.mode}, which has no effect on {', '.join(self.components)}: only the"
                f" {facts.denoiser_name} is computed in int8"
            )
        if (
            facts.denoiser_name in self.components
            and self.mode_of(arriving) == "static"
            and not start.examples
        ):
            return NO_PROMPTS
        return None

    def run(self, artifact: Artifact, context: Context) -> Outcome:
        """Quantizes, and compares the denoiser with what it was.

        Raises:
            MissingPackageError: nf4 without bitsandbytes, or ONNX without onnx and onnxruntime.
            ArtifactError: a component that is not there, or that nothing can be done with; a PSNR to keep
                that cannot be; a runtime that is here reads the result and gives garbage.
            ChainError: `keep` names what is not there.
            ModelError: a file of weights is missing or damaged.
            NonFiniteError: the model gives values that are not finite while ranges are measured.
        """
        from tunekit import families

        if self.scheme == "nf4":
            require("bitsandbytes", extra="quant", why="scheme nf4 needs")
        family = families.get(context.family)
        if artifact.format == "torch":
            return self._torch(artifact, context, family)
        for package in ("onnx", "onnxruntime"):
            require(package, extra="onnx", why="quantizing an ONNX model needs")
        from tunekit.passes.quantize_onnx import quantize_graphs

        return quantize_graphs(self, self.mode_of("onnx"), artifact, context, family)

    def sensitive(self, family: Family) -> list[str]:
        """Modules that are not computed in few bits whatever they cost."""
        return self.keep if isinstance(self.keep, list) else list(family.facts.denoiser.sensitive)

    def check_keep(self, modules: Sequence[str], source: str) -> None:
        """Raises ChainError where `keep` names no module: it would protect nothing."""
        if isinstance(self.keep, list) and (wrong := unmatched(self.keep, modules)):
            raise ChainError(f"quantize has a wrong keep: {wrong}", where=source)

    def _torch(self, artifact: Artifact, context: Context, family: Family) -> Outcome:
        import copy

        from tunekit import hardware, layers
        from tunekit.runtime import torch_runtime

        name = family.facts.denoiser_name
        if self.components not in (None, [name]):
            raise ArtifactError(
                f"of a torch model only the {name} can be quantized, not {', '.join(self.components or [])}",
                where=artifact.source,
                hint=f"leave components out, or write components: [{name}]",
            )
        whole, device = context.open(artifact), hardware.probe(context.device).torch_device
        denoiser = copy.deepcopy(family.denoiser(whole))
        self.check_keep([path for path, _ in denoiser.named_modules() if path], artifact.source)
        pipeline = around(whole, {name: denoiser})
        runtime = torch_runtime(family, pipeline, artifact=artifact, device=device)
        calls = context.calls(runtime, count=TESTED_CALLS, steps=PROBE_STEPS)
        wanted = [runtime.denoise(*call) for call in calls]
        kept = self.sensitive(family)
        done = layers.quantize(denoiser, self.packing, group=self.group, keep=kept)
        if not done:
            raise nothing(name, "they are quantized already, or keep names them all", artifact.source)
        found = error([runtime.denoise(*call) for call in calls], wanted)
        context.save(pipeline, artifact)
        computed = len(done) if self.mode == "dynamic" else 0
        return Outcome(
            metrics={"quantized_layers": len(done), "int8_computed_layers": computed, **fidelity(found)},
            details={"kept": kept},
        )


PASS = Quantize
